"""Convolution and its receptive field (LeCun et al., 1989; Araujo et al., 2019).

A small kernel is laid over every place of an image. In a stack of such layers each sees
a larger window of the image than the one before it.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Lays each kernel over every window of each image and sums the products.

    Args:
        x: images, (N, C, H, W).
        weight: O kernels, (O, C, kh, kw), which are not flipped.
        bias: (O,).
        stride: rows or columns from one window to the next.
        padding: rows or columns of zeros on each of the four sides.

    Returns:
        (N, O, H', W') with H' = (H + 2 padding - kh) // stride + 1, and so W'.

    Raises:
        ValueError: shapes do not fit, a kernel is empty or larger than the padded
            image, stride < 1, or padding < 0.
        TypeError: stride or padding is not an int.

    Source:
        Dumoulin and Visin, 2016, 1603.07285, relationship 6.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    C = x.shape[1]
    if weight.ndim != 4 or weight.shape[1] != C:
        raise ValueError(f"weight must be (O, {C}, kh, kw), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if type(stride) is not int or type(padding) is not int:
        raise TypeError(f"stride, padding must be ints, got {stride!r}, {padding!r}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be >= 1, padding >= 0, got {stride}, {padding}")
    x = F.pad(x, [padding] * 4)  # (N, C, H + 2 padding, W + 2 padding)
    (H, W), (kh, kw) = x.shape[2:], weight.shape[2:]
    if not (1 <= kh <= H and 1 <= kw <= W):
        raise ValueError(f"weight must be 1 x 1 to {H} x {W} in size, got {kh} x {kw}")
    windows = x.unfold(2, kh, stride).unfold(3, kw, stride)  # (N, C, H', W', kh, kw)
    out = torch.einsum("nchwij,ocij->nohw", windows, weight)  # (N, O, H', W')
    # Autocast makes the sum bfloat16, and the bias must not undo that.
    out = out if bias is None else out + bias.to(out.dtype)[:, None, None]
    return out.contiguous()  # einsum's is a permuted view


def receptive_field(layers: Iterable[Sequence[int]]) -> int:
    """The side of the window in the image that one output depends on, in pixels.

    Args:
        layers: (kernel, stride) or (kernel, stride, dilation) of every convolution
            and pooling, from the image on.

    Raises:
        ValueError: a layer of another length, or with other than ints >= 1.

    Source:
        Araujo, Norris and Sim, 2019, Distill, 10.23915/distill.00021.
    """
    side = step = 1  # step: from one place of a map to the next, in pixels
    for layer in layers:
        if len(layer) not in (2, 3) or any(type(n) is not int or n < 1 for n in layer):
            raise ValueError(f"layers must hold 2 or 3 ints >= 1, got {tuple(layer)}")
        kernel, stride, dilation = (*layer, 1)[:3]
        side += (kernel - 1) * dilation * step
        step *= stride
    return side


class ConvNet(nn.Module):
    """Stages of one convolution of 3 x 3 each; between them the sides are halved.

    Args:
        num_classes: logits to return, K.
        channels: a stage for each, of so many maps.

    Raises:
        ValueError: no channels, or a number < 1.
    """

    def __init__(
        self, num_classes: int = 10, channels: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if min(num_classes, len(channels), *channels) < 1:
            raise ValueError(
                f"num_classes and channels must be >= 1, got {num_classes}, {channels}"
            )
        self.stages = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise((1, *channels))):
            halve = nn.MaxPool2d(2) if i else nn.Identity()
            conv = nn.Conv2d(c_in, c_out, 3, padding=1)  # conv2d, with its weights
            self.stages.append(nn.Sequential(halve, conv, nn.ReLU()))
        self.classifier = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """(N, 1, H, W) to each stage's maps: (N, channels, H, W), then H/2 and so on.

        Raises:
            ValueError: x has another shape, or is too small to be halved so often.
        """
        least = 2 ** (len(self.stages) - 1)
        if x.ndim != 4 or x.shape[1] != 1 or min(x.shape[2:]) < least:
            raise ValueError(
                f"x must be (N, 1, >= {least}, >= {least}), got {tuple(x.shape)}"
            )
        return [x := stage(x) for stage in self.stages]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) from the mean of the last maps, so H and W are free."""
        return self.classifier(self.features(x)[-1].mean((2, 3)))
