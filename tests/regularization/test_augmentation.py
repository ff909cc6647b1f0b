"""Random shifts against F.pad, image by image; how the offsets are spread."""

import pytest
import torch
import torch.nn.functional as F

# Private in name only: torch's notes on extending it say to see each operation with it.
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.regularization.augmentation import random_shift


def shifted(image, down, right):
    """One image (C, H, W) moved: negative padding cuts off."""
    return F.pad(image, (right, -right, down, -down))


def offsets_of(height, width, max_shift, n, seed=0):
    """The offsets that a seed gives: seen from where a single bright pixel lands."""
    images = torch.zeros(n, 1, height, width)
    middle = height // 2, width // 2
    images[:, 0, middle[0], middle[1]] = 1
    generator = torch.Generator().manual_seed(seed)
    found = random_shift(images, max_shift, generator).nonzero()
    assert len(found) == n, "the pixel may not leave"
    return [(i[2] - middle[0], i[3] - middle[1]) for i in found.tolist()]


SIZES = [(1, 5, 5, 2), (3, 5, 9, 2), (2, 9, 6, 2), (1, 7, 7, 3), (1, 3, 3, 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "height", "width", "max_shift"), SIZES)
def test_values_and_gradients_are_those_of_padding_each_image(
    channels, height, width, max_shift, dtype, agrees_with_gradients
):
    offsets = offsets_of(height, width, max_shift, n=12, seed=5)
    # The pixels are moved, not computed: nothing to differ in
    agrees_with_gradients(
        lambda x: random_shift(x, max_shift, torch.Generator().manual_seed(5)),
        lambda x: torch.stack(
            [shifted(image, *o) for image, o in zip(x, offsets, strict=True)]
        ),
        torch.randn(12, channels, height, width, dtype=dtype),
        against="F.pad, image by image",
        atol=0,
    )


def test_all_offsets_are_equally_likely_and_none_is_larger():
    offsets = offsets_of(7, 7, 2, n=25_000)
    counts = {o: offsets.count(o) for o in set(offsets)}
    assert set(counts) == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    # 1000 each, give or take 31: five standard deviations
    assert all(abs(count - 1000) < 155 for count in counts.values())


def test_each_image_and_each_call_has_an_offset_of_its_own():
    images = torch.rand(1, 1, 8, 8).expand(50, 1, 8, 8)
    first, second = random_shift(images, 3), random_shift(images, 3)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 20
    assert not torch.equal(first, second)


def test_a_generator_repeats_the_offsets_and_leaves_the_default_one_alone():
    images = torch.rand(20, 1, 8, 8)
    before = torch.get_rng_state()
    runs = [
        random_shift(images, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_wraps_around_and_zeros_enter():
    images = torch.ones(200, 1, 6, 6)
    out = random_shift(images, 5)
    # What is left of an image of ones is one rectangle that touches a corner.
    for image in out[:, 0]:
        rows, columns = image.amax(1), image.amax(0)
        assert torch.equal(image, rows[:, None] * columns)
        assert rows[0] or rows[-1]
        assert columns[0] or columns[-1]
    assert out.sum((1, 2, 3)).min() < 12


def test_channels_move_together():
    image = torch.rand(10, 1, 6, 6)
    out = random_shift(image * torch.tensor([1.0, 2.0]).view(2, 1, 1), 3)
    assert torch.equal(2 * out[:, 0], out[:, 1])


def test_no_shift_returns_the_images():
    images = torch.rand(4, 2, 6, 5)
    assert torch.equal(random_shift(images, 0), images)


@pytest.mark.parametrize("max_shift", [0, 2])
@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_returned_is_contiguous(layout, channels, max_shift):
    images = torch.rand(4, channels, 6, 5).contiguous(memory_format=layout)
    moved = random_shift(images, max_shift)
    assert moved.is_contiguous()
    assert moved.view(4, -1).shape == (4, channels * 30)


def test_it_compiles_for_every_batch_size(compiles):
    compiles(random_shift, *((torch.rand(N, 3, 6, 5), 2) for N in (4, 3)))


@pytest.mark.parametrize("max_shift", [1.0, 1.5, True, "1", None])
def test_a_shift_that_is_no_int_is_refused(max_shift, refuses):
    with refuses(TypeError, f"max_shift must be an int, got {max_shift!r}"):
        random_shift(torch.rand(2, 1, 4, 6), max_shift)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16])
def test_any_dtype_works(dtype):
    images = (torch.rand(10, 1, 6, 6) * 9).to(dtype)
    generator = torch.Generator().manual_seed(4)
    out = random_shift(images, 2, generator)
    assert out.dtype == dtype
    again = random_shift(images.double(), 2, generator.manual_seed(4))
    assert torch.equal(out.double(), again)


def test_non_contiguous_and_empty_inputs_work_and_are_not_modified():
    images = torch.rand(4, 6, 5, 2).permute(0, 3, 1, 2)
    copy = images.clone()
    assert not images.is_contiguous()
    ours = random_shift(images, 2, torch.Generator().manual_seed(0))
    same = random_shift(images.contiguous(), 2, torch.Generator().manual_seed(0))
    assert torch.equal(ours, same) and torch.equal(images, copy)
    assert random_shift(torch.rand(0, 1, 4, 4), 2).shape == (0, 1, 4, 4)
    assert random_shift(torch.rand(3, 0, 4, 4), 2).shape == (3, 0, 4, 4)


class Devices(TorchDispatchMode):
    """Writes down where the results of all operations are."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(result.device.type)
        return result


def test_everything_happens_on_the_device_of_the_images():
    with Devices() as devices:
        images = torch.empty(3, 1, 4, 4, device="meta")
        assert random_shift(images, 2).shape == (3, 1, 4, 4)
    assert devices.seen == {"meta"}


@pytest.mark.parametrize("max_shift", [-1, 4, 9])
@pytest.mark.parametrize("size", [(4, 6), (6, 4)])
def test_shifts_beyond_the_image_are_refused(size, max_shift, refuses):
    message = (
        f"max_shift must lie in 0..3 for images of {size[0]} by {size[1]}, "
        f"got {max_shift}"
    )
    with refuses(ValueError, message):
        random_shift(torch.rand(2, 1, *size), max_shift)
    assert random_shift(torch.rand(2, 1, *size), 3).shape == (2, 1, *size)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 1, 1, 8, 8)])
def test_other_than_four_dimensions_are_refused(shape, refuses):
    with refuses(ValueError, f"images must be (N, C, H, W), got {shape}"):
        random_shift(torch.zeros(shape), 1)
