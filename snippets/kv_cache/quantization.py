"""Quantization to 8 bits and fewer (Jacob et al., 2018, equation 1).

Each value becomes a whole number of few bits. The values of a group share a scale,
which turns the numbers back into values that are off by half a scale at most.
"""

import math

import torch
from torch import Tensor

Dims = int | tuple[int, ...] | None


def quantize_symmetric(
    x: Tensor, bits: int = 8, dim: Dims = None
) -> tuple[Tensor, Tensor]:
    """Rounds x to codes from -n to n, n = 2^(bits - 1) - 1, with 0 at code 0.

    Args:
        x: any shape, float. No gradient flows back: that of rounding is 0.
        bits: 2 to 8.
        dim: what shares a scale, None for all of x. Keys (B, H, T, d_k) have a scale
            per channel with dim=-2 and per token with dim=-1.

    Returns:
        codes, int8, shaped as x; scale, float32, above 0, of size 1 in `dim`. A NaN or
        an infinity leaves codes of 0 and a scale that is not finite, so that its whole
        group comes back as NaN: an integer has none.

    Raises:
        ValueError: bits or dim is out of range, or a group has no values.
        TypeError: x is not float.

    Source:
        Jacob et al., 2018, 1712.05877, eq. 1, with zero point 0.
    """
    x, dims, levels = _prepare(x, bits, dim)
    scale = _positive(x.abs().amax(dims, keepdim=True) / (levels // 2))
    return (x / scale).round().nan_to_num().to(torch.int8), scale


def quantize_affine(
    x: Tensor, bits: int = 8, dim: Dims = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds x to codes from 0 to 2^bits - 1, with the value 0 at code zero_point.

    The codes span the values of a group and 0. All else is as in quantize_symmetric,
    which returns no zero_point: int32, shaped as scale. The codes are uint8.
    """
    x, dims, levels = _prepare(x, bits, dim)
    low = x.amin(dims, keepdim=True).clamp(max=0)
    high = x.amax(dims, keepdim=True).clamp(min=0)
    scale = _positive(high / levels - low / levels)  # high - low may overflow
    zero_point = (-low / scale).round().nan_to_num()
    # If both ends lie halfway between codes, the upper may round past the last code.
    codes = ((x / scale).round().nan_to_num() + zero_point).clamp(max=levels)
    return codes.to(torch.uint8), scale, zero_point.to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    """Computes scale * (q - zero_point), in the dtype of scale.

    Raises ValueError: scale or zero_point does not fit q; TypeError: q is no integer.
    """
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(f"q must be an integer tensor, got {q.dtype}")
    for given in (scale, zero_point):
        sizes = tuple(given.shape) if isinstance(given, Tensor) else (1,) * q.dim()
        sides = range(q.dim())
        if len(sizes) != q.dim() or any(sizes[d] not in (1, q.shape[d]) for d in sides):
            expected = f"{tuple(q.shape)}, with 1 where shared"
            raise ValueError(f"scale and zero_point must be {expected}, got {sizes}")
    # In floats: uint8 has no numbers below 0, so 3 - 5 would be 254.
    return ((q.to(scale.dtype) - zero_point) * scale).contiguous()


def pack_int4(q: Tensor) -> Tensor:
    """Stores two codes of -8 to 7 in a byte: int8 (..., D) to uint8 (..., D / 2).

    Raises ValueError: D is odd or missing, a code is out of range; TypeError: not int8.
    """
    if q.dtype != torch.int8:
        raise TypeError(f"q must be int8, got {q.dtype}")
    if not q.shape or q.shape[-1] % 2:
        raise ValueError(f"q must be (..., D) with an even D, got {tuple(q.shape)}")
    if (wrong := q[(q < -8) | (q > 7)]).numel():
        raise ValueError(f"q must hold codes from -8 to 7, got {wrong[0].item()}")
    nibbles = q.contiguous().to(torch.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4  # (..., D / 2), low nibble first


def unpack_int4(packed: Tensor) -> Tensor:
    """Undoes pack_int4: uint8 (..., D / 2) to int8 (..., D); TypeError if not uint8."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # (..., D)
    return (nibbles ^ 8).to(torch.int8) - 8  # the fourth bit is the sign


def storage_bytes(
    shape: tuple[int, ...], bits: int, dim: Dims = None, affine: bool = False
) -> int:
    """Counts bytes: the codes without gaps, 4 for each scale, 4 for each zero point."""
    dims = _dims(shape, bits, dim)
    groups = math.prod(size for d, size in enumerate(shape) if d not in dims)
    return math.ceil(math.prod(shape) * bits / 8) + groups * (8 if affine else 4)


def _dims(shape: tuple[int, ...], bits: int, dim: Dims) -> tuple[int, ...]:
    if bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, got {bits}")
    n = len(shape)
    dims = range(n) if dim is None else (dim,) if isinstance(dim, int) else dim
    if any(d not in range(-n, n) for d in dims) or dims == ():
        raise ValueError(f"dim must name dimensions of {tuple(shape)}, got {dim}")
    if not all(shape[d] for d in dims):
        raise ValueError(f"dim must span a value at least, got {dim} of {tuple(shape)}")
    return tuple({d % n for d in dims})


def _prepare(x: Tensor, bits: int, dim: Dims) -> tuple[Tensor, tuple[int, ...], int]:
    if not x.is_floating_point():
        raise TypeError(f"x must be float, got {x.dtype}")
    dims, wide = _dims(x.shape, bits, dim), torch.promote_types(x.dtype, torch.float32)
    return x.detach().to(wide).contiguous(), dims, 2**bits - 1


def _positive(scale: Tensor) -> Tensor:  # or a group of zeros would divide by 0
    return scale.float().clamp(min=torch.finfo(torch.float32).tiny)
