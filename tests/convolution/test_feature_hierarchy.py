"""Convolution against F.conv2d and plain loops; receptive fields against gradients."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from snippets.convolution.feature_hierarchy import ConvNet, conv2d, receptive_field

# (N, C, H, W), (O, kh, kw)
SIZES = [
    ((2, 3, 8, 8), (4, 3, 3)),
    ((3, 2, 5, 9), (2, 2, 4)),
    ((2, 1, 9, 6), (3, 5, 1)),
    ((1, 4, 3, 3), (2, 3, 3)),
    ((1, 1, 1, 1), (1, 1, 1)),
    ((2, 2, 4, 7), (3, 1, 7)),
    ((0, 3, 5, 5), (4, 3, 3)),
]
STEPS = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (9, 0)]


def random_arguments(size, kernel, dtype=torch.float64):
    (count, kh, kw), channels = kernel, size[1]
    shapes = size, (count, channels, kh, kw), (count,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def by_loops(x, weight, bias, stride, padding):
    """One output after the other, as the formula says; padding is nowhere stored."""
    (N, C, H, W), (maps, _, kh, kw) = x.shape, weight.shape
    h, w = ((s + 2 * padding - k) // stride + 1 for s, k in ((H, kh), (W, kw)))
    out = torch.zeros(N, maps, h, w, dtype=x.dtype)
    for n, o, i, j in product(range(N), range(maps), range(h), range(w)):
        total = bias[o].item()
        for c, u, v in product(range(C), range(kh), range(kw)):
            row, column = i * stride + u - padding, j * stride + v - padding
            if 0 <= row < H and 0 <= column < W:
                total += x[n, c, row, column].item() * weight[o, c, u, v].item()
        out[n, o, i, j] = total
    return out


@pytest.mark.parametrize(("stride", "padding"), STEPS)
@pytest.mark.parametrize(("size", "kernel"), SIZES, ids=str)
def test_values_and_gradients_are_those_of_torch(
    size, kernel, stride, padding, agrees_with_gradients
):
    agrees_with_gradients(
        lambda x, weight, bias: conv2d(x, weight, bias, stride, padding),
        lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding),
        *random_arguments(size, kernel),
        against="F.conv2d",
        atol=1e-11,
    )


@pytest.mark.parametrize(("size", "kernel"), SIZES[:3], ids=str)
def test_without_a_bias_there_is_none(size, kernel, agrees_with_gradients):
    x, weight, _ = random_arguments(size, kernel)
    agrees_with_gradients(conv2d, F.conv2d, x, weight, against="F.conv2d", atol=1e-11)


# Up to 27 products of order 1 in a sum: 24 bits of it in float32, 8 in bfloat16. A
# gradient of the weights is a sum over 128 windows, in bfloat16 rounded on the way.
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.float32, 2e-5, 0), (torch.bfloat16, 0.1, 0.02)]
)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_lower_precisions(stride, padding, dtype, atol, rtol, agrees_with_gradients):
    agrees_with_gradients(
        lambda x, weight, bias: conv2d(x, weight, bias, stride, padding),
        lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding),
        *random_arguments((2, 3, 8, 8), (4, 3, 3), dtype),
        against="F.conv2d",
        atol=atol,
        rtol=rtol,
    )


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize(("size", "kernel"), SIZES[1:4], ids=str)
def test_it_is_what_plain_loops_compute(size, kernel, stride, padding, agrees):
    x, weight, bias = random_arguments(size, kernel)
    ours = conv2d(x, weight, bias, stride, padding)
    loops = by_loops(x, weight, bias, stride, padding)
    agrees(ours, loops, "plain loops", atol=1e-12)


def test_the_kernel_is_laid_on_as_it_is_and_not_flipped():
    kernel = torch.arange(9.0).view(1, 1, 3, 3)
    dot = torch.zeros(1, 1, 5, 5)
    dot[..., 2, 2] = 1
    # A convolution would answer a dot with the kernel; this answers with it turned.
    assert torch.equal(conv2d(dot, kernel), kernel.flip(2, 3))
    assert torch.equal(conv2d(kernel, kernel).flatten(), torch.tensor([204.0]))


def test_a_shift_of_the_image_is_a_shift_of_the_map():
    x, weight, bias = random_arguments((2, 3, 12, 12), (4, 3, 3))
    for down, right in product(range(-3, 4), repeat=2):
        moved = F.pad(x, (right, -right, down, -down))
        shifted = F.pad(conv2d(x, weight, bias), (right, -right, down, -down))
        inside = (..., slice(3, 7), slice(3, 7))  # where nothing has entered
        torch.testing.assert_close(
            conv2d(moved, weight, bias)[inside], shifted[inside], atol=1e-12, rtol=0
        )


def test_it_is_a_linear_layer_whose_matrix_repeats_the_kernel():
    size, kernel = (1, 2, 5, 4), torch.randn(3, 2, 3, 2, dtype=torch.float64)
    pixels = torch.eye(40, dtype=torch.float64).view(40, *size[1:])
    matrix = conv2d(pixels, kernel).flatten(1).T  # a column for each pixel
    assert matrix.shape == (3 * 3 * 3, 40)
    # In each row the 12 weights of one kernel, and nothing else.
    for o, row in enumerate(matrix.view(3, 9, 40)):
        for entries in row:
            assert torch.equal(entries[entries != 0], kernel[o].flatten())
    x = torch.randn(size, dtype=torch.float64)
    out = (matrix @ x.flatten()).view(1, 3, 3, 3)
    torch.testing.assert_close(conv2d(x, kernel), out)


def test_non_contiguous_inputs_work_and_nothing_is_modified(agrees):
    x, weight, bias = random_arguments((2, 3, 8, 6), (4, 3, 2))
    given = [
        x.transpose(2, 3).contiguous().transpose(2, 3),
        weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        bias.repeat_interleave(2)[::2],
    ]
    assert not any(tensor.is_contiguous() for tensor in given)
    agrees(conv2d(*given, 2, 1), F.conv2d(x, weight, bias, 2, 1), "F.conv2d", 1e-11)
    for tensor, before in zip(given, (x, weight, bias), strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.bfloat16, 0.1, 2**-7), (torch.float16, 0.02, 2**-10)],
    ids=str,
)
def test_autocast_gives_what_torchs_layer_gives(dtype, atol, rtol, agrees):
    x, weight, bias = random_arguments((2, 3, 8, 8), (4, 3, 3), torch.float32)
    with torch.autocast("cpu", dtype):
        for b in (bias, None):
            found = conv2d(x, weight, b, padding=1)
            assert found.dtype == dtype
            # The sum is rounded, and once more when the bias is added.
            theirs = F.conv2d(x, weight, b, padding=1)
            agrees(found, theirs, "F.conv2d", atol=atol, rtol=rtol)
        assert ConvNet()(torch.randn(2, 1, 8, 8)).dtype == dtype


@pytest.mark.parametrize(("stride", "padding"), STEPS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_returned_is_contiguous(layout, with_bias, stride, padding):
    x, weight, bias = random_arguments((2, 3, 8, 8), (4, 3, 3))
    x = x.contiguous(memory_format=layout)
    out = conv2d(x, weight, bias if with_bias else None, stride, padding)
    assert out.is_contiguous() and out.view(2, -1).shape[1] == out[0].numel()


def test_maps_and_logits_are_contiguous():
    net, x = ConvNet(), torch.randn(2, 1, 8, 8)
    assert all(tensor.is_contiguous() for tensor in (net(x), *net.features(x)))


def test_conv2d_compiles_for_every_batch_size(compiles):
    steps = (4, (1, 1)), (3, (1, 1)), (3, (2, 0))
    size, kernel = (3, 8, 8), (4, 3, 3)
    calls = ((*random_arguments((N, *size), kernel), *step) for N, step in steps)
    compiles(conv2d, *calls)


def test_the_network_compiles_for_every_batch_size(compiles):
    compiles(ConvNet(), *((torch.randn(N, 1, 8, 8),) for N in (4, 3)))


def test_everything_happens_on_the_device_of_the_images():
    shapes = (2, 3, 9, 8), (4, 3, 3, 2), (4,)
    out = conv2d(*(torch.empty(s, device="meta") for s in shapes), 2, 1)
    assert out.device.type == "meta" and out.shape == (2, 4, 5, 5)
    net = ConvNet().to("meta")
    assert net(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8), (1, 2, 3, 8, 8)])
def test_images_of_other_than_four_dimensions_are_refused(shape, refuses):
    with refuses(ValueError, f"x must be (N, C, H, W), got {shape}"):
        conv2d(torch.zeros(shape), torch.zeros(4, 3, 3, 3))


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 1, 3, 3), (3, 3), (4, 3, 3)])
def test_weights_of_another_shape_are_refused(shape, refuses):
    with refuses(ValueError, f"weight must be (O, 3, kh, kw), got {shape}"):
        conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_a_bias_of_another_shape_is_refused(shape, refuses):
    with refuses(ValueError, f"bias must be (4,), got {shape}"):
        conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(shape))


@pytest.mark.parametrize(("stride", "padding"), [(0, 0), (-1, 2), (1, -1), (0, -1)])
def test_a_stride_or_padding_too_small_is_refused(stride, padding, refuses):
    message = f"stride must be >= 1, padding >= 0, got {stride}, {padding}"
    with refuses(ValueError, message):
        conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), None, stride, padding)


@pytest.mark.parametrize("value", ["same", 1.0, 1.5, True, (1, 1), None])
@pytest.mark.parametrize("name", ["stride", "padding"])
def test_a_stride_or_padding_that_is_no_int_is_refused(name, value, refuses):
    given = {"stride": 1, "padding": 0, name: value}
    message = "stride, padding must be ints, got {stride!r}, {padding!r}"
    with refuses(TypeError, message.format(**given)):
        conv2d(torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), **given)


@pytest.mark.parametrize("kernel", [(0, 3), (3, 0), (9, 3), (3, 8), (0, 0)])
def test_kernels_that_are_empty_or_too_large_are_refused(kernel, refuses):
    message = f"weight must be 1 x 1 to 8 x 7 in size, got {kernel[0]} x {kernel[1]}"
    with refuses(ValueError, message):
        conv2d(torch.zeros(2, 3, 6, 5), torch.zeros(4, 3, *kernel), padding=1)
    largest = torch.zeros(4, 3, 8, 7)
    assert conv2d(torch.zeros(2, 3, 6, 5), largest, padding=1).shape == (2, 4, 1, 1)


# --- the receptive field -------------------------------------------------------------

STACKS = [
    [],
    [(1, 1)],
    [(1, 3)],
    [(3, 1)],
    [(3, 1), (3, 1)],
    [(5, 2), (3, 1)],
    [(3, 1), (2, 2), (3, 1), (2, 2), (3, 1)],
    [(7, 2), (3, 2), (1, 1), (3, 1)],
    [(2, 3), (2, 3), (4, 1)],
    [(3, 1, 1), (3, 1, 2), (3, 1, 4)],
    [(3, 2, 3), (2, 1), (4, 3, 2), (2, 2)],
]


def extent(gradient):
    """From the first to the last place, of either direction, that is not zero."""
    places = gradient.nonzero()[:, -2:]
    return (places.amax(0) - places.amin(0) + 1).tolist()


@pytest.mark.parametrize("layers", STACKS, ids=str)
def test_the_receptive_field_is_as_wide_as_the_gradient(layers):
    image = torch.zeros(1, 1, 130, 130, dtype=torch.float64, requires_grad=True)
    x = image
    for kernel, stride, *dilation in layers:
        weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
        x = F.conv2d(x, weight, stride=stride, dilation=dilation or 1)
    middle = x[0, 0, x.shape[2] // 2, x.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle, image)
    side = receptive_field(layers)
    assert isinstance(side, int)
    assert extent(gradient) == [side, side]


def test_known_receptive_fields():
    assert receptive_field([(3, 1)] * 2) == 5  # two of 3 by 3 see what one of 5 does
    # Of the last pooling in AlexNet and in VGG-16 (Araujo, Norris and Sim, 2019)
    alexnet = [(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)]
    assert receptive_field(alexnet) == 195
    vgg = [(3, 1)] * 2 + [(2, 2)]
    deeper = [(3, 1)] * 3 + [(2, 2)]
    assert receptive_field(vgg * 2 + deeper * 3) == 212


def test_layers_can_be_any_iterable():
    assert receptive_field(iter([[3, 1], torch.Size((2, 2)), (3, 1)])) == 8


@pytest.mark.parametrize(
    "layer",
    [
        *[(), (3,), (3, 1, 1, 1), (0, 1), (3, 0), (3, 1, 0), (3, -1), (-3, 1)],
        *[(3.0, 1), (3, 1.5), (3, 1, 2.0), (True, 1), ("3", 1)],
    ],
)
def test_layers_that_are_none_are_refused(layer, refuses):
    message = f"layers must hold 2 or 3 ints >= 1, got {layer}"
    with refuses(ValueError, message):
        receptive_field([(3, 1), layer])


# --- the network ---------------------------------------------------------------------


def by_functions(net, x):
    """The maps of the stages and the logits, from torch's functions and our weights."""
    maps = []
    for i, stage in enumerate(net.stages):
        if i:
            x = F.max_pool2d(x, 2, 2)
        x = F.conv2d(x, stage[1].weight, stage[1].bias, padding=1).relu()
        maps.append(x)
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return *maps, F.linear(pooled, net.classifier.weight, net.classifier.bias)


@pytest.mark.parametrize(
    ("num_classes", "channels", "size"),
    [
        (10, (16, 32, 64), (3, 1, 8, 8)),
        (3, [4, 2], (2, 1, 7, 10)),
        (1, (1,), (2, 1, 1, 1)),
        (5, (2, 3, 4, 5), (1, 1, 8, 9)),
        (5, (2, 3), (0, 1, 4, 4)),
    ],
)
def test_maps_and_logits_and_gradients_are_those_of_torchs_functions(
    num_classes, channels, size, randomize, agrees_with_gradients
):
    net = randomize(ConvNet(num_classes, channels)).double()
    agrees_with_gradients(
        lambda x: (*net.features(x), net(x)),
        lambda x: by_functions(net, x),
        torch.randn(size, dtype=torch.float64),
        against="torch's functions",
        atol=1e-11,
        modules=(net, net),
    )


def test_a_stage_is_conv2d_with_its_weights(randomize, agrees):
    net = randomize(ConvNet()).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    maps = net.features(x)
    for i, stage in enumerate(net.stages):
        read = F.max_pool2d(maps[i - 1], 2) if i else x
        found = conv2d(read, stage[1].weight, stage[1].bias, padding=1).relu()
        agrees(maps[i], found, "conv2d", 1e-11)


def test_by_default_there_are_three_stages_of_sixteen_to_sixty_four_maps():
    maps = ConvNet().features(torch.randn(2, 1, 12, 8))
    shapes = [tuple(m.shape) for m in maps]
    assert shapes == [(2, 16, 12, 8), (2, 32, 6, 4), (2, 64, 3, 2)]
    assert ConvNet()(torch.randn(2, 1, 12, 8)).shape == (2, 10)
    assert ConvNet(7)(torch.randn(2, 1, 12, 8)).shape == (2, 7)


def test_the_stages_see_3_and_8_and_18_pixels():
    # Through the largest of four the gradient takes one of four ways: it needs several
    # images to be everywhere that it can be.
    image = torch.randn(200, 1, 40, 40, requires_grad=True)
    layers = [(3, 1)]
    for features, side in zip(ConvNet().features(image), (3, 8, 18), strict=True):
        middle = features.shape[2] // 2
        (gradient,) = torch.autograd.grad(
            features[..., middle, middle].sum(), image, retain_graph=True
        )
        assert receptive_field(layers) == side
        assert extent(gradient) == [side, side]
        layers += [(2, 2), (3, 1)]


def test_state_dict_names_stages_and_the_classifier():
    names = [f"stages.{i}.1.{p}" for i in range(3) for p in ("weight", "bias")]
    names += ["classifier.weight", "classifier.bias"]
    assert list(ConvNet().state_dict()) == names


@pytest.mark.parametrize(
    ("num_classes", "channels"),
    [(0, (16, 32)), (-1, (4,)), (10, ()), (10, (16, 0)), (10, (0, 16)), (10, [-3])],
)
def test_sizes_below_one_are_refused(num_classes, channels, refuses):
    message = f"num_classes and channels must be >= 1, got {num_classes}, {channels}"
    with refuses(ValueError, message):
        ConvNet(num_classes, channels)


@pytest.mark.parametrize(
    "shape", [(8, 8), (1, 8, 8), (2, 3, 8, 8), (2, 8, 8, 1), (2, 1, 3, 8), (2, 1, 8, 3)]
)
def test_images_that_do_not_fit_the_network_are_refused(shape, refuses):
    net, x = ConvNet(), torch.zeros(shape)
    for call in (net, net.features):
        with refuses(ValueError, f"x must be (N, 1, >= 4, >= 4), got {shape}"):
            call(x)
    smallest = torch.zeros(2, 1, 4, 4)
    assert net.features(smallest)[-1].shape == (2, 64, 1, 1)
    with refuses(ValueError, "x must be (N, 1, >= 8, >= 8), got (2, 1, 9, 7)"):
        ConvNet(channels=(3, 3, 3, 3))(torch.zeros(2, 1, 9, 7))
