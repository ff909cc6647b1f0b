"""Positional encodings (Vaswani et al., 2017, section 3.5; Su et al., 2021).

Attention alone cannot tell one order of its tokens from another. Sinusoids are added to
the embeddings once; rotary encodings turn the queries and keys of every layer.
"""

import torch
from torch import Tensor


def sinusoidal_positions(num_positions: int, dim: int, base: float = 10000.0) -> Tensor:
    """Computes PE(pos, 2i) = sin(pos / base^(2i/dim)) and PE(pos, 2i + 1) = cos(same).

    Args:
        num_positions: number of rows P, for positions 0 to P - 1.
        dim: number of columns D, even.
        base: sets the wavelengths, from 2 pi to almost base * 2 pi positions.

    Returns:
        (P, D), float32.

    Raises:
        ValueError: num_positions < 0, dim < 2 or odd, or base <= 0.

    Source:
        Vaswani et al., 2017, "Attention Is All You Need", 1706.03762, section 3.5.
    """
    if num_positions < 0:
        raise ValueError(f"num_positions must be at least 0, got {num_positions}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    # In float32 the angles of position 100,000 would be off by some thousandths.
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu")  # (P,)
    angle = position[:, None] * _frequencies(dim, base, position)  # (P, D/2)
    pairs = torch.stack((angle.sin(), angle.cos()), dim=-1)  # (P, D/2, 2)
    return pairs.flatten(1).to(torch.get_default_device(), torch.float32)  # (P, D)


def rotary(x: Tensor, positions: Tensor | None = None, base: float = 10000.0) -> Tensor:
    """Turns the pair of features (i, i + D/2) by the angle position / base^(2i/D).

    The dot product of a query and a key so turned depends on how far apart they are,
    not on where they are. Here the halves pair up, as in Llama; in the paper neighbours
    do, (2i, 2i + 1). Weights trained with one layout do not work with the other.

    Args:
        x: (..., T, D), queries or keys of a head; D is even.
        positions: broadcasts to (..., T); 0 to T - 1 by default.
        base: sets the wavelengths, from 2 pi to almost base * 2 pi positions.

    Returns:
        (..., T, D).

    Raises:
        ValueError: D < 2 or odd, positions that do not fit x, or base <= 0.
        TypeError: x is not of a float dtype.

    Source:
        Su et al., 2021, "RoFormer", 2104.09864, section 3.2.2.
    """
    if x.dim() < 2 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must be (..., T, D) with D even, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a float dtype, got {x.dtype}")
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)  # (T,)
    try:
        positions = positions.expand(x.shape[:-1])  # (..., T)
    except RuntimeError as error:
        expected, got = tuple(x.shape[:-1]), tuple(positions.shape)
        raise ValueError(
            f"positions must broadcast to {expected}, got {got}"
        ) from error
    # bfloat16 cannot tell position 256 from 257: angles in float32, or float64 as x.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    frequencies = _frequencies(x.shape[-1], base, wide)  # (D/2,)
    angle = positions[..., None] * frequencies  # (..., T, D/2)
    first, second = wide.chunk(2, dim=-1)  # (..., T, D/2) each
    cos, sin = angle.cos(), angle.sin()
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1).to(x.dtype)  # (..., T, D)


def _frequencies(dim: int, base: float, like: Tensor) -> Tensor:
    """Returns base^(-2i/dim) for i = 0..dim/2 - 1, in dtype and on device of like."""
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    exponent = torch.arange(0, dim, 2, dtype=like.dtype, device=like.device) / dim
    return base**-exponent  # (D/2,)
