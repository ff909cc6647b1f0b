"""Positional encodings (Vaswani et al., 2017, section 3.5; Su et al., 2021).

Attention alone cannot tell one order of its tokens from another. Sinusoids are added to
the embeddings once; rotary encodings turn the queries and keys of every layer.
"""

import torch
from torch import Tensor


def sinusoidal_positions(num_positions: int, dim: int, base: float = 10000.0) -> Tensor:
    """Computes PE(pos, 2i) = sin(pos / base^(2i/dim)) and PE(pos, 2i + 1) = cos(same).

    Args:
        num_positions: number of rows, for positions 0 to num_positions - 1.
        dim: number of columns, even; d_model where the rows are added to embeddings.
        base: sets the wavelengths, from 2 pi to almost base * 2 pi positions.

    Returns:
        (num_positions, dim), float32, on the default device.

    Raises:
        ValueError: num_positions < 0, dim < 2 or odd, or base <= 0.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, section 3.5.
    """
    if num_positions < 0:
        raise ValueError(f"num_positions must be at least 0, got {num_positions}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    # On the CPU, which has float64 for sure.
    angle = _angles(torch.arange(num_positions, device="cpu"), dim, base)
    pairs = torch.stack((angle.sin(), angle.cos()), dim=-1)  # (num_positions, dim/2, 2)
    return pairs.flatten(1).float().to(torch.empty(()).device)  # (num_positions, dim)


def rotary(x: Tensor, positions: Tensor | None = None, base: float = 10000.0) -> Tensor:
    """Turns the pair of features (i, i + d_k/2) by the angle position / base^(2i/d_k).

    The dot product of a query and a key so turned depends on how far apart they are,
    not on where they are. Here the halves pair up, as in Llama; in the paper neighbours
    do, (2i, 2i + 1). Weights trained with one layout do not work with the other.

    Args:
        x: (..., T, d_k), queries or keys of a head; d_k is even.
        positions: (T,), or (..., T) with as many dimensions, where all but T may be 1;
            0 to T - 1 by default. (B, T) enters (B, H, T, d_k) as `positions[:, None]`.
        base: sets the wavelengths, from 2 pi to almost base * 2 pi positions.

    Returns:
        (..., T, d_k), in the dtype of x, under autocast too.

    Raises:
        ValueError: d_k < 2 or odd, positions that do not fit x, or base <= 0.
        TypeError: x is not of a float dtype, or positions are bool.

    Source:
        Su et al., 2021, "RoFormer", 2104.09864, section 3.2.2.
    """
    if x.dim() < 2 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must be (..., T, d_k) with d_k even, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a float dtype, got {x.dtype}")
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)  # (T,)
    if positions.dtype == torch.bool:
        raise TypeError("positions must be numbers, got torch.bool")
    got, full = tuple(positions.shape), tuple(x.shape[:-1])
    # No other rank: (B, T) would pass for (H, T) whenever B = H.
    fits = len(got) in (1, len(full)) and got[-1] == full[-1]
    if not fits or any(got[i] not in (1, full[i]) for i in range(-len(got), 0)):
        raise ValueError(
            f"positions must be {full[-1:]}, or {full} with 1 for any size but the "
            f"last, got {got}"
        )
    angle = _angles(positions, x.shape[-1], base)  # (..., T, d_k/2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = x.chunk(2, dim=-1)  # (..., T, d_k/2) each
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1).to(x.dtype).contiguous()  # (..., T, d_k)


def _angles(positions: Tensor, dim: int, base: float) -> Tensor:
    """Returns position / base^(2i/dim) for i = 0..dim/2 - 1, (..., dim/2)."""
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    # In float32 the angle of position 100,000 would be off by some thousandths, in
    # bfloat16 257 would be 256. Apple's GPUs have no float64.
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
    return positions.unsqueeze(-1) * base**-exponent
