"""Key-value cache of a causal decoder (Pope et al., 2022, 2211.05102).

The keys and values of past tokens never change. A cache keeps them, so that of a new
token only its own have to be computed.
"""

import math

import torch
from torch import Tensor


def kv_cache_bytes(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    seq_len: int,
    batch_size: int = 1,
    bytes_per_element: int = 2,
) -> int:
    """Computes the bytes of all keys and values.

    Args:
        num_layers: attention layers, each with a cache of its own.
        num_kv_heads: heads of keys and values. Grouped-query attention (Ainslie et
            al., 2023, 2305.13245) has fewer than query heads, multi-query attention
            (Shazeer, 2019, 1911.02150) one.
        head_dim: features of a key and of a value, d_k.
        seq_len: tokens in the cache.
        batch_size: sequences.
        bytes_per_element: 2 for float16 and bfloat16.

    Raises:
        ValueError: a number is below 1.
    """
    numbers = dict(locals())
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    return 2 * math.prod(numbers.values())


class KVCache:
    """The keys and values of one attention layer, of all tokens so far.

    Args:
        max_length: tokens for which the first update sets one buffer aside; updates
            write into it, and record no gradients. None: each update copies the cache
            into a longer one, and gradients flow back to every token.

    Attributes:
        keys, values: (B, H, T, d_k) with H key-value heads, views; None before the
            first update.

    Raises:
        ValueError: max_length is below 1.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._buffer: Tensor | None = None  # (2, B, H, T or max_length, d_k)

    def __len__(self) -> int:
        """Tokens in the cache."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held: with max_length, of the whole buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens.

        Args:
            key: (B, H, new tokens, d_k).
            value: likewise.

        Returns:
            the keys and the values of all tokens, (B, H, T, d_k) each.

        Raises:
            ValueError: shapes do not fit, or max_length is too small.
            TypeError: dtype or device differ.
            RuntimeError: gradients would be recorded in spite of max_length.
            The cache is then as it was.
        """
        like = key if self.keys is None else self.keys
        shape = like.shape[:2] + key.shape[2:3] + like.shape[3:]
        for name, x in (("key", key), ("value", value)):
            if x.dim() != 4 or x.shape != shape:
                expected = f"(B, H, T, d_k) = {tuple(shape)}"
                raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)}")
            if (x.dtype, x.device) != (like.dtype, like.device):
                expected = f"{like.dtype} on {like.device}"
                raise TypeError(
                    f"{name} must be {expected}, got {x.dtype} on {x.device}"
                )
        start, end = len(self), len(self) + shape[2]
        new = torch.stack((key, value))  # (2, B, H, new tokens, d_k)
        if self.max_length is None:
            past = new if self._buffer is None else self._buffer
            self._buffer = torch.cat((past[..., :start, :], new), dim=-2)
        elif end > self.max_length:
            raise ValueError(
                f"max_length must be at least {end}, got {self.max_length}"
            )
        elif new.requires_grad:
            raise RuntimeError("max_length must be None where gradients are recorded")
        else:
            if self._buffer is None:
                self._buffer = new.new_empty(2, *shape[:2], self.max_length, shape[3])
            self._buffer[..., start:end, :] = new
        self.keys, self.values = self._buffer[..., :end, :]
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Forgets all but the first tokens; the next update frees their memory.

        Raises:
            ValueError: length is not in 0..len(cache).
        """
        if not 0 <= length <= len(self):
            raise ValueError(f"length must be in 0..{len(self)}, got {length}")
        if length < len(self):
            self.keys, self.values = self._buffer[..., :length, :]
