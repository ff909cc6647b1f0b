"""The loss against torch, trl and a logistic regression; what two orders cancel."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from snippets.rl.rlaif import ai_preferences, preference_loss

SHAPES = [(7,), (1,), (), (2, 3)]


def pairs(shape=(7,), dtype=torch.float64):
    """reward_first, reward_second, target."""
    first, second = 3 * torch.randn(2, *shape, dtype=dtype)
    return first, second, torch.rand(shape, dtype=dtype)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def judge_of(first=0.0, longer=0.0):
    """Prefers the number nearer to the prompt's, what is first, and what is longer."""

    def judge(prompt, a, b):
        better = (abs(int(b) - prompt) - abs(int(a) - prompt)) / 4
        return sigmoid(better + first + longer * (len(a) - len(b)))

    return judge


# The labels


def test_each_pair_is_asked_about_in_both_orders_and_the_answers_are_averaged():
    asked = []

    def judge(prompt, a, b):
        asked.append((prompt, a, b))
        return {"red": 0.9, "blue": 0.6, "old": 0.25, "new": 0.5}[a]

    labels = ai_preferences(judge, ["color?", "age?"], ["red", "old"], ["blue", "new"])
    assert asked == [
        ("color?", "red", "blue"),
        ("color?", "blue", "red"),
        ("age?", "old", "new"),
        ("age?", "new", "old"),
    ]
    assert torch.equal(labels, torch.tensor([(0.9 + 0.4) / 2, (0.25 + 0.5) / 2]))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_there_is_a_float32_label_for_each_pair(n, kind):
    columns = [kind([float(n + k) for n in range(n)]) for k in range(3)]
    labels = ai_preferences(lambda p, a, b: a / (a + b), *columns)
    assert labels.shape == (n,) and labels.dtype == torch.float32
    expected = torch.tensor([(1 + k) / (3 + 2 * k) for k in range(n)])
    torch.testing.assert_close(labels, expected)


def test_labels_are_float32_whatever_torch_makes_by_default():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert ai_preferences(lambda *_: 0.5, [0], [1], [2]).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_a_bias_to_a_place_that_adds_to_the_probability_cancels_exactly():
    answers = ["1", "7", "12", "14"]
    first, second = zip(*((a, b) for a in answers for b in answers), strict=True)
    prompts = [7] * 16
    fair = judge_of()
    for bias in (-0.2, 0.0, 0.1):

        def judge(prompt, a, b, bias=bias):
            return 0.3 + 0.4 * fair(prompt, a, b) + bias

        labels = ai_preferences(judge, prompts, first, second)
        plain = [0.3 + 0.4 * fair(7, a, b) for a, b in zip(first, second, strict=True)]
        torch.testing.assert_close(labels, torch.tensor(plain), atol=1e-7, rtol=0)


@pytest.mark.parametrize("bias", [-2.0, 0.5, 3.0])
def test_a_bias_to_a_place_flattens_labels_and_leaves_the_better_answer_ahead(bias):
    answers = [str(n) for n in range(8)]  # all of one length
    first, second = zip(*((a, b) for a in answers for b in answers), strict=True)
    prompts = [5] * 64
    labels, fair = (
        ai_preferences(judge_of(first=b), prompts, first, second) - 0.5
        for b in (bias, 0.0)
    )
    assert torch.equal(labels.sign(), fair.sign())
    ahead = fair > 0
    assert (labels[ahead] < fair[ahead]).all() and ahead.sum() > 20
    alone = torch.tensor(
        [judge_of(bias)(5, a, b) for a, b in zip(first, second, strict=True)]
    )
    assert not torch.equal((alone - 0.5).sign(), fair.sign())


def test_a_bias_to_length_stays():
    label = ai_preferences(judge_of(longer=1.0), [7], ["4"], ["10"])  # as far from 7
    assert label.item() == pytest.approx(sigmoid(-1))


def test_swapped_answers_have_the_opposite_label_whatever_the_judge():
    for _ in range(20):
        table = torch.rand(5, 5)
        first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
        labels, swapped = (
            ai_preferences(lambda _, a, b, t=table: t[a, b], [0] * 25, *columns)
            for columns in ((first, second), (second, first))
        )
        torch.testing.assert_close(labels + swapped, torch.ones(25))
        assert (labels[first == second] == 0.5).all()


@pytest.mark.parametrize("kind", [float, bool, int, torch.tensor])
def test_a_judge_may_be_sure_and_answer_in_any_number(kind):
    labels = ai_preferences(lambda _, a, b: kind(a > b), [0, 0], [2, 1], [1, 2])
    assert labels.tolist() == [1, 0]


def test_labels_carry_no_gradient_to_the_judge():
    weight = torch.tensor(0.3, requires_grad=True)
    labels = ai_preferences(lambda _, a, b: torch.sigmoid(weight * a), [0], [2], [1])
    assert not labels.requires_grad


def test_the_lists_stay_as_they_were():
    columns = [7, 8], ["7", "6"], ["10", "8"]
    ai_preferences(judge_of(), *columns)
    assert columns == ([7, 8], ["7", "6"], ["10", "8"])


@pytest.mark.parametrize("answer", [1.5, -0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_an_answer_that_is_no_probability_is_refused(answer, when, refuses):
    answers = [0.5] * 4
    answers[when] = answer
    asked = iter(answers)
    message = f"judge must return a probability, got {answer} for pair {when // 2}"
    with refuses(ValueError, message):
        ai_preferences(lambda *_: next(asked), [0, 0], [1, 1], [2, 2])


def test_the_name_of_an_answer_is_no_probability(refuses):
    message = "judge must return a probability, got the string '1'"
    with refuses(TypeError, message):
        ai_preferences(lambda *_: "1", [0], [1], [2])


@pytest.mark.parametrize("odd", range(3))
@pytest.mark.parametrize("size", [0, 1, 3])
def test_prompts_and_answers_of_different_number_are_refused(odd, size, refuses):
    columns = [["x"] * 2 for _ in range(3)]
    columns[odd] = ["x"] * size
    n, a, b = map(len, columns)
    message = (
        f"each prompt must have two answers, got {n} prompts, {a} first, {b} second"
    )
    with refuses(ValueError, message):
        ai_preferences(lambda *_: 0.5, *columns)


def test_no_prompt_is_refused(refuses):
    with refuses(ValueError, "prompts must hold one at least, got none"):
        ai_preferences(lambda *_: 0.5, [], [], [])


@pytest.mark.parametrize("odd", range(3))
def test_a_string_is_not_judged_letter_by_letter(odd, refuses):
    columns = [["a", "b"] for _ in range(3)]
    columns[odd] = "ab"
    name = ("prompts", "first", "second")[odd]
    with refuses(TypeError, f"{name} must be a list, got the string 'ab'"):
        ai_preferences(lambda *_: 0.5, *columns)


# The loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_binary_cross_entropy(
    shape, dtype, agrees_with_gradients
):
    first, second, target = pairs(shape, dtype)
    agrees_with_gradients(
        lambda a, b: preference_loss(a, b, target),
        lambda a, b: F.binary_cross_entropy_with_logits(a - b, target),
        first,
        second,
        against="F.binary_cross_entropy_with_logits",
        atol=1e-12 if dtype == torch.float64 else 1e-6,
    )


def test_hard_labels_give_the_values_and_gradients_of_trl(
    reference_library, agrees_with_gradients
):
    trainer = reference_library("trl.trainer.reward_trainer").RewardTrainer
    first, second, _ = pairs()

    def theirs(chosen, rejected):
        # Of trl's trainer only this method is built: chosen come first in the batch.
        stub = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=None),
            accelerator=SimpleNamespace(
                gather=lambda x: x, gather_for_metrics=lambda x: x
            ),
            _metrics={"eval": defaultdict(list)},
            _total_train_tokens=0,
        )
        logits = torch.cat([chosen, rejected])[:, None]
        return trainer.compute_loss(
            stub, lambda **_: SimpleNamespace(logits=logits), {}
        )

    agrees_with_gradients(
        lambda a, b: preference_loss(a, b, torch.ones(7)),
        theirs,
        first,
        second,
        against="trl's RewardTrainer",
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_after_pair_by_hand(shape):
    inputs = pairs(shape)
    losses = []
    for a, b, t in zip(*(x.flatten().tolist() for x in inputs), strict=True):
        p = math.exp(a) / (math.exp(a) + math.exp(b))  # Bradley and Terry
        losses.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
    loss = preference_loss(*inputs)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_the_gradient_is_the_probability_minus_the_label():
    first, second, target = (x.requires_grad_() for x in pairs())
    loss = preference_loss(first, second, target)
    gradients = torch.autograd.grad(loss, (first, second, target), allow_unused=True)
    expected = (torch.sigmoid(first - second) - target).detach() / 7
    torch.testing.assert_close(gradients[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients[1], -expected, atol=1e-12, rtol=0)
    assert gradients[2] is None


def test_gradients_are_those_of_finite_differences():
    first, second, target = pairs()
    inputs = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: preference_loss(*x, target), inputs)


def fit(first, second, target, answers):
    """The rewards with the smallest loss, in float64, with mean 0."""
    rewards = torch.zeros(answers, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [rewards],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = preference_loss(rewards[first], rewards[second], target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (rewards - rewards.mean()).detach()


def test_the_fitted_rewards_are_the_coefficients_of_a_logistic_regression(
    reference_library, agrees
):
    """Each pair is a row with 1 and -1; a soft label is two rows with weights."""
    first, second = torch.combinations(torch.arange(6)).T
    target = 0.1 + 0.8 * torch.rand(15, dtype=torch.float64)
    rows = (F.one_hot(first, 6) - F.one_hot(second, 6)).double()
    linear = reference_library("sklearn.linear_model")
    model = linear.LogisticRegression(
        C=math.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12
    )
    # The last reward is fixed at 0: rewards count only by their differences.
    model.fit(
        torch.cat([rows, rows])[:, :5].numpy(),
        torch.arange(2).repeat_interleave(15).numpy(),
        sample_weight=torch.cat([1 - target, target]).numpy(),
    )
    theirs = F.pad(torch.tensor(model.coef_[0]), (0, 1))
    ours = fit(first, second, target, 6)
    agrees(ours, theirs - theirs.mean(), "sklearn's LogisticRegression", atol=1e-6)


def test_the_rewards_of_two_answers_differ_by_the_logit_of_their_mean_label():
    target = torch.tensor([0.9, 0.4, 0.8], dtype=torch.float64)
    zeros, ones = torch.zeros(3).long(), torch.ones(3).long()
    rewards = fit(zeros, ones, target, 2)
    assert (rewards[0] - rewards[1]).item() == pytest.approx(math.log(0.7 / 0.3))


def test_rewards_that_made_the_labels_are_found_again():
    truth = torch.randn(6, dtype=torch.float64)
    first, second = torch.combinations(torch.arange(6)).T
    labels = torch.sigmoid(truth[first] - truth[second])
    found = fit(first, second, labels, 6)
    torch.testing.assert_close(found, truth - truth.mean(), atol=1e-7, rtol=0)


def test_a_soft_label_weighs_the_two_hard_ones():
    first, second, target = pairs()
    whole = preference_loss(first, second, target)
    each = [
        (preference_loss(a[None], b[None], torch.tensor([hard])) * share).item()
        for a, b, t in zip(first, second, target, strict=True)
        for hard, share in ((True, t), (False, 1 - t))
    ]
    assert whole.item() == pytest.approx(sum(each) / 7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_hard_labels_may_be_of_any_dtype(dtype):
    first, second, _ = pairs((4,))
    hard = torch.tensor([1, 0, 0, 1])
    found = preference_loss(first, second, hard.to(dtype))
    assert torch.equal(found, preference_loss(first, second, hard.double()))


def test_swapping_the_answers_turns_the_label_round():
    first, second, target = pairs()
    loss = preference_loss(first, second, target)
    torch.testing.assert_close(preference_loss(second, first, 1 - target), loss)


def test_what_is_added_to_both_rewards_cancels():
    first, second, target = pairs()
    added = 10 * torch.randn(7, dtype=torch.float64)
    loss = preference_loss(first, second, target)
    torch.testing.assert_close(
        preference_loss(first + added, second + added, target), loss
    )


def test_large_rewards_neither_overflow_nor_vanish():
    far, zero = torch.tensor([5000.0], requires_grad=True), torch.zeros(1)
    for target, expected, slope in ((1.0, 0, 0), (0.0, 5000, 1), (0.5, 2500, 0.5)):
        loss = preference_loss(far, zero, torch.tensor([target]))
        assert loss.item() == expected
        assert torch.autograd.grad(loss, far)[0].item() == slope


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_loss_stays_in_float32_under_autocast_and_with_half_precision(low, agrees):
    inputs = pairs(dtype=low)
    exact = preference_loss(*(x.double() for x in inputs))
    for dtype in (low, torch.float32):
        with torch.autocast("cpu", low):
            found = preference_loss(*(x.to(dtype) for x in inputs))
        assert found.dtype == torch.float32
        agrees(found.double(), exact, "float64", atol=5e-6)


def test_rewards_of_mixed_precision_give_the_better_one():
    first, second, target = pairs()
    for a, b in ((first, second.bfloat16()), (first.bfloat16(), second)):
        found = preference_loss(a, b, target.float())
        assert found.dtype == torch.float64
        exact = preference_loss(a.double(), b.double(), target.float().double())
        assert torch.equal(found, exact)


def test_labels_move_to_the_device_of_the_rewards():
    first, second, target = pairs()
    found = preference_loss(first.to("meta"), second.to("meta"), target)
    assert found.device.type == "meta" and found.shape == ()


def test_non_contiguous_inputs_work():
    inputs = [x[::2] for x in pairs((14,))]
    assert not any(x.is_contiguous() for x in inputs)
    expected = preference_loss(*(x.contiguous() for x in inputs))
    assert torch.equal(preference_loss(*inputs), expected)


def test_inputs_are_not_modified():
    inputs = pairs()
    copies = [x.clone() for x in inputs]
    preference_loss(*inputs)
    assert all(map(torch.equal, inputs, copies))


def test_it_compiles_to_one_graph(compiles):
    compiles(preference_loss, *(pairs((n,)) for n in (4, 5)))


def test_a_graph_does_not_look_at_the_labels(monkeypatch):
    """Compilers run no Python that could be counted as run: this plays one."""
    first, second, target = pairs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert preference_loss(first, second, target + 2).isfinite()


@pytest.mark.parametrize("shape", [(1,), (7, 1), (), (6,)], ids=str)
@pytest.mark.parametrize("odd", range(3))
def test_nothing_is_broadcast(odd, shape, refuses):
    inputs = list(pairs())
    inputs[odd] = torch.zeros(shape)
    got = ", ".join(str(tuple(x.shape)) for x in inputs)
    message = f"rewards and target must have one shape, got {got}"
    with refuses(ValueError, message):
        preference_loss(*inputs)


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_no_pair_is_refused(shape, refuses):
    with refuses(ValueError, "target must hold one label at least, got none"):
        preference_loss(*pairs(shape))


@pytest.mark.parametrize("bad", [1.5, -0.25, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 6])
def test_a_target_that_is_no_probability_is_refused(bad, place, refuses):
    first, second, target = pairs()
    target[place] = bad
    with refuses(ValueError, f"target must be in [0, 1], got {bad}"):
        preference_loss(first, second, target)


def test_a_hard_label_of_two_is_refused(refuses):
    with refuses(ValueError, "target must be in [0, 1], got 2"):
        preference_loss(torch.zeros(2), torch.zeros(2), torch.tensor([1, 2]))


def test_targets_of_zero_and_one_are_allowed():
    loss = preference_loss(torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(math.log(2))
