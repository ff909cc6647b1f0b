"""Sampling against transformers' warpers; calibration against scipy and a loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from snippets.test_time.temperature import (
    TemperatureScaler,
    expected_calibration_error,
    sample,
    softmax_with_temperature,
)

# --- the softmax ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (3, 1)])
def test_it_is_the_softmax_of_divided_logits(
    shape, dtype, atol, temperature, agrees_with_gradients
):
    agrees_with_gradients(
        lambda x: softmax_with_temperature(x, temperature),
        lambda x: F.softmax(x / temperature, dim=-1),
        torch.randn(shape, dtype=dtype),
        against="F.softmax",
        atol=atol,
    )


def test_it_warps_as_transformers_does(reference_library, agrees):
    warpers = reference_library("transformers.generation.logits_process")
    logits = torch.randn(3, 11)
    for temperature in (0.5, 1.7):
        theirs = warpers.TemperatureLogitsWarper(temperature)(None, logits).softmax(-1)
        ours = softmax_with_temperature(logits, temperature)
        agrees(ours, theirs, "TemperatureLogitsWarper", atol=1e-6)


def test_any_dimension_will_do(agrees):
    x = torch.randn(4, 5, 6)
    for dim in (0, 1, 2, -2):
        agrees(
            softmax_with_temperature(x, 2.0, dim), (x / 2).softmax(dim), "softmax", 1e-6
        )
    assert torch.equal(
        softmax_with_temperature(x), softmax_with_temperature(x, 1.0, -1)
    )


def test_it_goes_from_the_largest_alone_to_all_alike():
    logits = torch.tensor([3.0, 3.0, 1.0, -2.0])
    cold = softmax_with_temperature(logits, 1e-40)
    assert cold.tolist() == [0.5, 0.5, 0, 0]
    hot = softmax_with_temperature(logits, 1e10)
    torch.testing.assert_close(hot, torch.full((4,), 0.25))


def test_entropy_rises_with_the_temperature_and_the_order_stays():
    logits = torch.randn(200, 50)
    last = torch.zeros(200)
    for temperature in (0.2, 0.5, 1.0, 2.0, 5.0):
        probs = softmax_with_temperature(logits, temperature)
        entropy = torch.special.entr(probs).sum(-1)
        assert (entropy > last).all()
        assert torch.equal(probs.argsort(-1), logits.argsort(-1))
        last = entropy


def test_logits_of_masked_tokens_get_no_share():
    logits = torch.tensor([1.0, -math.inf, 2.0])
    for temperature in (1e-3, 1.0, 1e3):
        probs = softmax_with_temperature(logits, temperature)
        assert probs[1] == 0 and probs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    logits = (8 * torch.randn(5, 9)).to(dtype)
    exact = softmax_with_temperature(logits.double(), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = softmax_with_temperature(logits, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


def test_the_softmax_compiles(compiles):
    calls = [(torch.randn(3, 7),), (torch.randn(2, 7),)]
    compiles(lambda x: softmax_with_temperature(x, 0.7), *calls)


# --- sampling -------------------------------------------------------------------------


def shares(logits, draws=40_000, **how):
    drawn = sample(logits.expand(draws, -1), **how)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.9, "temperature": 1.5},
        {"top_k": 4, "top_p": 0.8, "temperature": 0.8},
        {"top_k": 99, "top_p": 1.0},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_would(how, reference_library):
    warpers = reference_library("transformers.generation.logits_process")
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, 1.5, -1.0]])
    expected = logits
    if "temperature" in how:
        expected = warpers.TemperatureLogitsWarper(how["temperature"])(None, expected)
    if "top_k" in how:
        expected = warpers.TopKLogitsWarper(how["top_k"])(None, expected)
    if "top_p" in how:
        expected = warpers.TopPLogitsWarper(how["top_p"])(None, expected)
    expected = expected.softmax(-1)[0]
    found = shares(logits, **how)
    # 5 standard deviations of a share of 40,000 draws
    assert (found - expected).abs().max() < 5 * 0.5 / 40_000**0.5
    assert torch.equal(found > 0, expected > 1e-3)


def test_top_p_takes_its_share_of_what_top_k_left():
    # 0.4, 0.3, 0.2, 0.1: of the first two, the first has 4/7, more than a half
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert shares(logits, draws=200, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]
    assert (shares(logits, draws=200, top_p=0.5)[:2] > 0).all()
    assert (shares(logits, draws=2000, top_k=2, top_p=0.6) > 0).tolist() == [1, 1, 0, 0]


def test_the_temperature_comes_before_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert shares(logits, draws=500, top_p=0.5).tolist() == [1, 0, 0]
    # at 10 all have about a third: two are needed to reach a half
    found = shares(logits, draws=500, temperature=10.0, top_p=0.5) > 0
    assert found.tolist() == [True, True, False]


def test_a_token_always_stays():
    logits = torch.randn(50, 9)
    for how in (
        {"top_p": 1e-9},
        {"top_k": 1},
        {"temperature": 1e-8},
        {"temperature": 0},
    ):
        assert torch.equal(sample(logits, **how), logits.argmax(-1))


def test_of_equals_the_first_ones_are_kept():
    logits = torch.zeros(1, 5)
    assert (shares(logits, draws=300, top_k=2) > 0).tolist() == [1, 1, 0, 0, 0]
    assert (shares(logits, draws=300, top_p=0.4) > 0).tolist() == [1, 1, 0, 0, 0]
    assert sample(logits, temperature=0).tolist() == [0]
    # A sort that is not stable keeps the order of short rows by chance.
    assert sample(torch.zeros(500, 3000), top_k=3).max() == 2


def test_a_share_of_one_keeps_all_tokens(monkeypatch):
    # Rare tokens, of which the cumulated sum, rounded to 1 already, would see nothing
    logits, draw, shares = 3 * torch.randn(1, 50_000), torch.multinomial, []

    def spy(probs, *args, **options):
        shares.append(probs)
        return draw(probs, *args, **options)

    monkeypatch.setattr(torch, "multinomial", spy)
    sample(logits, top_p=1.0)
    assert shares[0].shape == (1, 50_000) and (shares[0] > 0).all()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7), (4, 1)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_one_token_for_each_row(shape, temperature):
    drawn = sample(torch.randn(shape), temperature, top_k=5, top_p=0.9)
    assert drawn.shape == shape[:-1] and drawn.dtype == torch.int64


def test_rows_are_drawn_on_their_own():
    logits = torch.full((3, 4), -math.inf)
    logits[0, 2] = logits[1, 0] = logits[2, 3] = 0
    assert sample(logits).tolist() == [2, 0, 3]
    assert sample(logits.view(3, 1, 4), top_p=0.5).tolist() == [[2], [0], [3]]


def test_the_generator_makes_it_repeatable():
    logits = torch.randn(20, 9)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (sample(logits, generator=g) for g in generators)
    assert torch.equal(first, second)
    torch.manual_seed(1)
    third = sample(logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, third)
    assert not torch.equal(sample(logits), sample(logits))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_other_dtypes_and_strided_logits_are_drawn_from_alike(dtype):
    logits = torch.randn(9, 20).to(dtype).T
    before = logits.clone()
    drawn = [
        sample(x, 0.9, 4, 0.8, torch.Generator().manual_seed(0))
        for x in (logits, logits.contiguous())
    ]
    assert torch.equal(*drawn) and torch.equal(logits, before)


def test_rows_without_a_token_are_refused():
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        sample(torch.full((2, 3), -math.inf))


# --- calibration ----------------------------------------------------------------------


def answers(temperature, N=4000, V=5):
    """Logits that are too sure by a factor, with labels drawn from the honest ones."""
    honest = 2 * torch.randn(N, V, dtype=torch.float64)
    labels = torch.multinomial(honest.softmax(-1), 1)[:, 0]
    return temperature * honest, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fit_is_scipys_and_finds_the_factor(temperature, reference_library):
    logits, labels = answers(temperature)
    scaler = TemperatureScaler().fit(logits, labels)
    found = reference_library("scipy.optimize").minimize_scalar(
        lambda t: F.cross_entropy(logits / t, labels).item(), bounds=(0.05, 20)
    )
    assert scaler.temperature.item() == pytest.approx(found.x, rel=1e-3)
    assert scaler.temperature.item() == pytest.approx(temperature, rel=0.08)


def test_at_the_fit_the_cross_entropy_is_flat():
    logits, labels = answers(2.5)
    t = TemperatureScaler().fit(logits, labels).temperature.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits / t, labels), t)
    assert slope.abs() < 1e-6


def test_more_halvings_come_closer():
    logits, labels = answers(3.0)
    best = TemperatureScaler().fit(logits, labels).temperature
    off = [
        (TemperatureScaler().fit(logits, labels, n).temperature - best).abs().item()
        for n in (5, 12, 40)
    ]
    assert off[0] > off[1] > 1e-4 and off[2] < 1e-6


def test_it_makes_the_error_smaller_and_changes_no_prediction():
    logits, labels = answers(3.0)
    scaler = TemperatureScaler().fit(logits[:2000], labels[:2000])
    before, after = (
        expected_calibration_error(x[2000:].softmax(-1), labels[2000:])
        for x in (logits, scaler(logits))
    )
    assert after < 0.3 * before
    assert torch.equal(scaler(logits).argmax(-1), logits.argmax(-1))


def test_it_divides_and_starts_at_one(agrees_with_gradients):
    scaler = TemperatureScaler()
    x = torch.randn(4, 5)
    assert torch.equal(scaler(x), x)
    scaler.fit(*answers(2.0))
    t = scaler.temperature.item()
    agrees_with_gradients(scaler, lambda x: x / t, x, against="x / T", atol=1e-6)
    assert scaler(x.bfloat16()).dtype == torch.float32
    assert scaler(x.double()).dtype == torch.float64


def test_its_state_is_saved_and_nothing_is_trained():
    scaler, other = TemperatureScaler(), TemperatureScaler()
    assert scaler.fit(*answers(2.0)) is scaler
    other.load_state_dict(scaler.state_dict())
    assert scaler.state_dict().keys() == {"temperature"}
    assert (
        torch.equal(other.temperature, scaler.temperature) and other.temperature > 1.8
    )
    assert scaler.temperature.dtype == torch.float32 and scaler.temperature.shape == ()
    assert not list(scaler.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fit_is_in_float64_whatever_comes(dtype):
    logits, labels = answers(2.0)
    logits = logits.to(dtype).requires_grad_()
    expected = TemperatureScaler().fit(logits.double(), labels).temperature
    with torch.autocast("cpu", torch.bfloat16):
        found = TemperatureScaler().fit(logits, labels).temperature
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_what_has_no_best_temperature_is_refused(refuses):
    message = "labels are all predicted, or not at all: nothing to fit"
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    with refuses(ValueError, message):
        TemperatureScaler().fit(logits, torch.tensor([0, 1]))
    with refuses(ValueError, message):
        TemperatureScaler().fit(logits, torch.tensor([1, 0]))
    with refuses(ValueError, message):
        TemperatureScaler().fit(torch.ones(2, 2), torch.tensor([1, 0]))
    level = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    with refuses(ValueError, message):
        TemperatureScaler().fit(level, torch.tensor([0, 0]))
    three = torch.tensor([[2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    assert TemperatureScaler().fit(three, torch.tensor([0, 1, 0])).temperature > 0


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_error_is_that_of_a_loop_over_bins(num_bins, dtype, agrees):
    probs = (2 * torch.randn(300, 4, dtype=dtype)).softmax(-1)
    labels = torch.randint(4, (300,))
    confidence, predicted = probs.max(-1)
    expected = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            right = (predicted == labels)[inside].to(dtype).mean()
            gap = (right - confidence[inside].mean()).abs()
            expected = expected + inside.to(dtype).mean() * gap
    found = expected_calibration_error(probs, labels, num_bins)
    agrees(found, expected, "a loop over bins", atol=1e-6)


@pytest.mark.parametrize("num_bins", [2, 3, 8])
def test_gaps_of_neighbouring_bins_do_not_cancel(num_bins, agrees):
    # All right in one bin, all wrong in the next.
    middles = (torch.arange(num_bins) + 0.5) / num_bins
    rest = (1 - middles)[:, None].expand(-1, 100) / 100
    probs = torch.cat([middles[:, None], rest], dim=-1)  # the first is the largest
    labels = torch.arange(num_bins) % 2
    expected = (1 - labels - middles).abs().mean()
    found = expected_calibration_error(probs, labels, num_bins)
    agrees(found, expected, "a bin for each example", atol=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # In (0.4, 0.6] both: their gaps cancel. 0.6 in a bin of its own would not.
    probs = torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    found = expected_calibration_error(probs, labels, num_bins=5)
    torch.testing.assert_close(found, torch.tensor(0.075, dtype=torch.float64))
    # In float32 this edge would be below 0.7.
    probs = torch.tensor([[0.7, 0.3], [0.65, 0.35]], dtype=torch.float64)
    found = expected_calibration_error(probs, labels, num_bins=10)
    torch.testing.assert_close(found, torch.tensor(0.175, dtype=torch.float64))


def test_the_error_at_its_ends():
    sure = torch.eye(2)[[0, 1, 0]]
    assert expected_calibration_error(sure, torch.tensor([0, 1, 0])) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 0, 1])) == 1
    assert expected_calibration_error(torch.ones(1, 1), torch.tensor([0]), 1) == 0
    even = torch.full((2, 2), 0.5)
    assert expected_calibration_error(even, torch.tensor([0, 1])) == 0


def test_fifteen_bins_are_the_default():
    probs, labels = torch.rand(200, 3).softmax(-1), torch.randint(3, (200,))
    assert torch.equal(
        expected_calibration_error(probs, labels),
        expected_calibration_error(probs, labels, 15),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_of_half_precision_is_counted_in_float32(dtype):
    probs, labels = (
        torch.randn(5000, 3).softmax(-1).to(dtype),
        torch.randint(3, (5000,)),
    )
    found = expected_calibration_error(probs, labels)
    exact = expected_calibration_error(probs.double(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_temperatures_that_make_no_sense_are_refused(temperature, refuses):
    with refuses(ValueError, f"{temperature=} must be positive and finite"):
        softmax_with_temperature(torch.zeros(3), temperature)
    if temperature != 0:
        with refuses(ValueError, f"{temperature=} must be positive and finite"):
            sample(torch.zeros(3), temperature)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cuts_that_leave_nothing_are_refused(temperature, refuses):
    for top_k in (0, -2):
        with refuses(ValueError, f"{top_k=} must be at least 1"):
            sample(torch.zeros(3), temperature, top_k=top_k)
    for top_p in (0, -0.1, 1.01, math.nan):
        with refuses(ValueError, f"{top_p=} must be in (0, 1]"):
            sample(torch.zeros(3), temperature, top_p=top_p)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((3,), 3), ((2, 3, 4), 2), ((3, 4), 2), ((0, 4), 0), ((3, 0), 3)],
)
def test_shapes_that_do_not_fit_are_refused(shape, labels, refuses):
    rest = f"and labels must be (N, V) and (N,), got {(shape, (labels,))}"
    wanted = torch.zeros(labels, dtype=torch.long)
    with refuses(ValueError, f"logits {rest}"):
        TemperatureScaler().fit(torch.zeros(shape), wanted)
    with refuses(ValueError, f"probs {rest}"):
        expected_calibration_error(torch.zeros(shape), wanted)


def test_what_are_no_probabilities_is_refused(refuses):
    labels = torch.tensor([0])
    message = "probs must be rows of probabilities that sum to 1"
    for row in ([2.0, 1.0], [0.5, 0.4], [1.5, -0.5], [0.5, 0.52]):
        with refuses(ValueError, message):
            expected_calibration_error(torch.tensor([row]), labels)
    for num_bins in (0, -3):
        with refuses(ValueError, f"{num_bins=} must be at least 1"):
            expected_calibration_error(torch.ones(1, 1), labels, num_bins)
