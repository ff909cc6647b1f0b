"""Attention over chunks of a cache (Milakov and Gimelshein, 2018, algorithm 3).

The online softmax needs one chunk of keys at a time and is exact; the output is carried
along (Rabe and Staats, 2021). The chunks can come from a file mapped into memory.
"""

import math
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Chunk = tuple[Tensor, Tensor]  # keys (..., C, d_k) and values (..., C, d_v)


def iter_chunks(keys: Tensor, values: Tensor, chunk_size: int) -> Iterator[Chunk]:
    """Cuts keys (..., S, d_k) and values (..., S, d_v) into views of chunk_size rows.

    The last chunk has what is left. Raises ValueError if chunk_size is below 1, or
    keys and values don't fit each other.
    """
    k, v = tuple(keys.shape), tuple(values.shape)
    if len(k) < 2 or k[:-1] != v[:-1]:
        message = "keys and values must be (..., S, d_k) and (..., S, d_v), got "
        raise ValueError(message + f"{k} and {v}")
    if not chunk_size >= 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rows = (slice(n, n + chunk_size) for n in range(0, k[-2], chunk_size))
    return ((keys[..., r, :], values[..., r, :]) for r in rows)


def chunked_attention(
    query: Tensor, chunks: Iterable[Chunk], scale: float | None = None
) -> Tensor:
    """Computes softmax(Q K^T * scale) V from chunks of K and V, in any order.

    Args:
        query: (..., L, d_k).
        chunks: pairs of keys (..., C, d_k) and values (..., C, d_v), gone through once;
            C may differ. One is in memory at a time if they are made when asked for,
            and no gradient is: autograd keeps them all.
        scale: factor on the scores, 1 / sqrt(d_k) by default.

    Returns:
        (..., L, d_v) in the dtype of query. Until then maximum, sum and output are in
        float32 or better, under autocast too. A key that scores -inf takes no part;
        where all do, the output is 0.

    Raises:
        ValueError: there are no chunks, or shapes do not fit.
        TypeError: dtypes differ or are not floats.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide)
    top, total, output = q.new_full((), -torch.inf), q.new_zeros(()), q.new_zeros(())
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        for keys, values in chunks:
            _check(query, keys, values, output)
            scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            scores = q @ keys.to(wide).mT * scale  # (..., L, C)
            # The maximum only keeps exp from overflowing: it needs no gradient.
            highest = scores.detach().amax(dim=-1, keepdim=True)  # (..., L, 1)
            old, top = top, torch.maximum(top, highest)
            base = top.masked_fill(top == -torch.inf, 0)  # -inf - -inf would be NaN
            weights = torch.exp(scores - base)
            shrink = torch.exp(old - base)  # what came before had the old maximum
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            output = output * shrink + weights @ values.to(wide)  # (..., L, d_v)
            del keys, values, scores, weights  # or there are two when the next is made
    if not output.dim():
        raise ValueError("chunks must hold a chunk at least, got none")
    return (output / total.masked_fill(total == 0, 1)).to(query.dtype)


def _check(query: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
    q, k, v = (tuple(x.shape) for x in (query, keys, values))
    fits = k[:-2] + k[-1:] == q[:-2] + q[-1:] and v[:-1] == k[:-1]
    fits = fits and min(len(q), len(k)) > 1 and q[-1] * k[-2] > 0
    if not fits or (output.dim() and output.shape[-1] != v[-1]):
        message = "shapes must be (..., L, d_k), (..., C, d_k) and (..., C, d_v) "
        raise ValueError(message + f"with d_k, C > 0 and one d_v, got {q}, {k}, {v}")
    dtypes = query.dtype, keys.dtype, values.dtype
    if not query.is_floating_point() or len(set(dtypes)) > 1:
        raise TypeError(f"query, keys, values must share a float dtype, got {dtypes}")


class MemoryMappedKV:
    """Keys and values, (length, dim) each, in a file of just their bytes.

    A file that exists is used as it is; a new one holds zeros. Raises ValueError if
    length or dim is below 1, or the file has another size.
    """

    def __init__(
        self, path: str, length: int, dim: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if not min(length, dim) >= 1:
            raise ValueError(f"length, dim must be at least 1, got {length}, {dim}")
        count = 2 * length * dim
        size = count * dtype.itemsize
        found = os.path.getsize(path) if os.path.exists(path) else size
        if found != size:
            raise ValueError(f"path must hold {size} bytes, got {found}")
        data = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        self._rows = data.view(2, length, dim)

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Puts keys and values, (n, dim) each and of the dtype, into rows start on."""
        _, length, dim = self._rows.shape
        k, v = tuple(keys.shape), tuple(values.shape)
        if k != v or k != (*k[:1], dim) or not 0 <= start <= length - k[0]:
            message = f"keys and values must be (n, {dim}) in rows 0 to {length}, got "
            raise ValueError(message + f"{k} and {v} at row {start}")
        dtypes = keys.dtype, values.dtype
        if set(dtypes) != {self._rows.dtype}:
            raise TypeError(f"dtypes must be {self._rows.dtype}, got {dtypes}")
        rows = slice(start, start + k[0])
        self._rows[0, rows], self._rows[1, rows] = keys.detach(), values.detach()

    def chunks(self, chunk_size: int, stop: int | None = None) -> Iterator[Chunk]:
        """Copies of the rows before stop (of all, by default), chunk_size at a time."""
        _, length, _ = self._rows.shape
        stop = length if stop is None else stop
        if not 1 <= stop <= length:
            raise ValueError(f"stop must be from 1 to {length}, got {stop}")
        views = iter_chunks(*self._rows[:, :stop], chunk_size)
        return ((keys.clone(), values.clone()) for keys, values in views)
