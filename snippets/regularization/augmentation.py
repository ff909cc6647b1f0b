"""Data augmentation by random shifts (Simard et al., 2003, section 2).

Each image moves by an offset of its own, and what enters at the border is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_shift(
    images: Tensor, max_shift: int, generator: torch.Generator | None = None
) -> Tensor:
    """Moves each image by up to max_shift pixels in either direction.

    Args:
        images: (N, C, H, W), of any dtype.
        max_shift: the largest offset, in pixels; all offsets from -max_shift to
            max_shift are equally likely, down and right independently.
        generator: where the offsets are drawn from; the default generator if None.

    Returns:
        (N, C, H, W). All channels of an image move together; nothing wraps around.

    Raises:
        ValueError: images are not 4-D, or max_shift is outside 0..min(H, W) - 1.
        TypeError: max_shift is not an int.

    Source:
        Simard, Steinkraus and Platt, 2003, "Best Practices for Convolutional Neural
        Networks Applied to Visual Document Analysis", section 2.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if type(max_shift) is not int:
        raise TypeError(f"max_shift must be an int, got {max_shift!r}")
    N, _, H, W = images.shape
    if not 0 <= max_shift < min(H, W):
        raise ValueError(
            f"max_shift must lie in 0..{min(H, W) - 1} for images of {H} by {W}, "
            f"got {max_shift}"
        )
    padded = F.pad(images, [max_shift] * 4)  # (N, C, H + 2 max_shift, W + 2 max_shift)
    # A window of the old size, cut out of the middle, would be the image as it was.
    where = {"device": images.device}
    if generator is not None:  # torch.compile fails at generator=None
        where["generator"] = generator
    top, left = torch.randint(2 * max_shift + 1, (2, N, 1), **where)
    side = torch.arange(max(H, W), device=top.device)
    rows, columns = top + side[:H], left + side[:W]  # (N, H), (N, W)
    n = torch.arange(N, device=top.device)[:, None, None]
    # The indices (N, 1, 1), (N, H, 1), (N, 1, W) put C last: (N, H, W, C).
    moved = padded[n, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
