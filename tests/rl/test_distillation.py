"""Distillation against torch, trl and closed forms; what a temperature does."""

import math

import pytest
import torch
import torch.nn.functional as F

from snippets.rl.distillation import distillation_loss

SHAPES = [(4, 7), (2, 3, 5), (6,), (1, 1), (2, 3, 2, 4)]
TEMPERATURES = [0.5, 1.0, 2.0, 5.0]


def batch(shape=(4, 7), dtype=torch.float64, scale=3.0):
    """Logits of student and teacher, and labels."""
    student, teacher = (scale * torch.randn(shape, dtype=dtype) for _ in range(2))
    return student, teacher, torch.randint(shape[-1], shape[:-1])


def torchs(student, teacher, labels, temperature, alpha):
    """As it is usually written with torch's own functions."""
    student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    soft = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    hard = F.cross_entropy(student, labels.reshape(-1))
    return alpha * temperature**2 * soft + (1 - alpha) * hard


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(
    shape, alpha, temperature, agrees_with_gradients
):
    student, teacher, labels = batch(shape)
    agrees_with_gradients(
        lambda x: distillation_loss(x, teacher, labels, temperature, alpha),
        lambda x: torchs(x, teacher, labels, temperature, alpha),
        student,
        against="F.kl_div and F.cross_entropy",
        atol=1e-12,
    )


@pytest.fixture
def gkd(reference_library, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = reference_library("trl.experimental.gkd.gkd_trainer")
    return trainer.GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_values_and_gradients_are_those_of_trl(temperature, gkd, agrees_with_gradients):
    student, teacher, labels = batch((3, 5, 7))
    labels[0, 2:] = labels[2, 1] = -100

    def theirs(student):  # at beta = 0 it is the KL, from teacher to student
        kl = gkd(student, teacher, labels, beta=0, temperature=temperature)
        return temperature**2 * kl

    agrees_with_gradients(
        lambda x: distillation_loss(x, teacher, labels, temperature, alpha=1),
        theirs,
        student,
        against="trl's GKDTrainer",
        atol=1e-12,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_row_after_row_by_hand(alpha, temperature):
    student, teacher, labels = batch()
    total = 0.0
    for z, v, label in zip(
        student.tolist(), teacher.tolist(), labels.tolist(), strict=True
    ):
        q, p = ([math.exp(x / temperature) for x in row] for row in (z, v))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        entropy = math.log(sum(math.exp(x) for x in z)) - z[label]
        total += alpha * temperature**2 * kl + (1 - alpha) * entropy
    found = distillation_loss(student, teacher, labels, temperature, alpha)
    assert found.shape == ()
    assert found.item() == pytest.approx(total / 4, rel=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_gradient_is_the_difference_of_probabilities(alpha, temperature):
    """Hinton's equation 2, times T², and that of the cross-entropy."""
    student, teacher, labels = batch()
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, temperature, alpha)
    (gradient,) = torch.autograd.grad(loss, student)
    z = student.detach()
    soft = (z / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    hard = z.softmax(-1) - F.one_hot(labels, 7)
    expected = (alpha * temperature * soft + (1 - alpha) * hard) / 4
    torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=0)


def test_gradients_are_those_of_finite_differences():
    student, teacher, labels = batch((2, 3, 5))
    labels[0, 1] = -100
    student.requires_grad_()
    for temperature, alpha in ((2.0, 0.5), (0.7, 1.0), (3.0, 0.0)):
        assert torch.autograd.gradcheck(
            lambda x, t=temperature, a=alpha: distillation_loss(
                x, teacher, labels, t, a
            ),
            student,
        )


def test_what_is_not_said_is_a_temperature_of_two_and_half_the_weight():
    inputs = batch()
    said = distillation_loss(*inputs, temperature=2.0, alpha=0.5)
    assert torch.equal(distillation_loss(*inputs), said)


def test_at_a_high_temperature_logits_are_matched():
    """Section 2.1: the gradient nears (z - v) / V, both with a mean of 0."""
    student, teacher, _ = batch()
    student.requires_grad_()
    centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
    gap = centred[0] - centred[1]
    errors = []
    for temperature in (1e2, 1e3):
        loss = distillation_loss(student, teacher, None, temperature, alpha=1)
        (gradient,) = torch.autograd.grad(loss, student)
        errors.append((gradient - gap / 7 / 4).abs().max())
        half = gap.square().sum(-1).mean() / 2 / 7
        assert loss.item() == pytest.approx(half.item(), rel=10 / temperature)
    assert errors[1] < errors[0] / 9 < 1e-2


def test_the_factor_keeps_the_gradient_at_one_size():
    student, teacher, _ = batch(scale=0.1)  # small, compared with every temperature
    student.requires_grad_()
    sizes = [
        torch.autograd.grad(distillation_loss(student, teacher, None, T, 1), student)[0]
        for T in (2.0, 20.0)
    ]
    assert sizes[1].norm().item() == pytest.approx(sizes[0].norm().item(), rel=0.05)


def test_it_is_zero_and_has_no_gradient_only_where_both_agree_up_to_a_constant():
    student, teacher, _ = batch()
    same = (teacher + torch.randn(4, 1)).requires_grad_()
    loss = distillation_loss(same, teacher, alpha=1)
    assert abs(loss.item()) < 1e-14
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-14
    assert distillation_loss(student, teacher, alpha=1) > 0.1
    swapped = distillation_loss(teacher, student, alpha=1)
    assert abs(swapped - distillation_loss(student, teacher, alpha=1)) > 0.01


def test_a_constant_added_to_all_logits_of_a_row_changes_nothing():
    student, teacher, labels = batch()
    loss = distillation_loss(student, teacher, labels)
    added = 10 * torch.randn(2, 4, 1, dtype=torch.float64)
    found = distillation_loss(student + added[0], teacher + added[1], labels)
    torch.testing.assert_close(found, loss, atol=1e-12, rtol=0)


def test_a_teacher_that_is_sure_of_the_label_is_the_label():
    student, _, labels = batch()
    sure = 1e4 * F.one_hot(labels, 7).double()
    for alpha in (0.3, 1.0):
        found = distillation_loss(student, sure, labels, 1.0, alpha)
        torch.testing.assert_close(found, F.cross_entropy(student, labels))


def test_it_differs_from_soft_cross_entropy_by_the_teachers_entropy():
    student, teacher, _ = batch()
    soft = (teacher / 2).softmax(-1)
    entropy = torch.distributions.Categorical(soft).entropy().mean()
    found = distillation_loss(student, teacher, alpha=1)
    expected = 4 * (F.cross_entropy(student / 2, soft) - entropy)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_gradient_reaches_the_student_alone():
    student, teacher, labels = batch()
    student.requires_grad_(), teacher.requires_grad_()
    loss = distillation_loss(student, teacher, labels)
    ours, theirs = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
    assert ours.abs().min() > 0 and theirs is None
    assert not distillation_loss(student.detach(), teacher, labels).requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_rows_without_a_label_count_for_nothing_whatever_stands_there(bad, alpha):
    student, teacher, labels = batch((3, 5, 7))
    left_out = torch.zeros(3, 5, dtype=torch.bool)
    left_out[0, 3:] = left_out[2] = True
    padded = student.masked_fill(left_out[..., None], bad).requires_grad_()
    of_bad = teacher.masked_fill(left_out[..., None], bad)
    loss = distillation_loss(
        padded, of_bad, labels.masked_fill(left_out, -100), 3, alpha
    )
    kept = [x[~left_out] for x in (student, teacher, labels)]
    kept[0].requires_grad_()
    expected = distillation_loss(*kept, 3, alpha)
    torch.testing.assert_close(loss, expected, atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(loss, padded)
    (of_kept,) = torch.autograd.grad(expected, kept[0])
    assert (gradient[left_out] == 0).all()
    torch.testing.assert_close(gradient[~left_out], of_kept, atol=1e-14, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3), (2, 3)], ids=str)
def test_where_no_row_counts_the_loss_is_zero_with_a_gradient_of_zeros(shape, alpha):
    student = torch.randn(shape, requires_grad=True)
    labels = torch.full(shape[:-1], -100)
    loss = distillation_loss(student, torch.randn(shape), labels, 2.0, alpha)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros(shape))


def test_with_one_class_there_is_nothing_to_learn():
    student, teacher, labels = batch((3, 1))
    student.requires_grad_()
    for loss in (
        distillation_loss(student, teacher, labels),
        distillation_loss(student, teacher, alpha=1),
    ):
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_classes_that_the_teacher_rules_out_ask_for_nothing_of_their_own():
    """As padding of a vocabulary: -inf with the teacher, or with both."""
    student, teacher, labels = batch((4, 5))
    labels %= 3
    teacher[:, 3:] = -math.inf
    student[:, 4] = -math.inf
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    z = student.detach()
    soft = (z / 2).softmax(-1) - (teacher / 2).softmax(-1)
    hard = z.softmax(-1) - F.one_hot(labels, 5)
    assert loss.isfinite()
    torch.testing.assert_close(gradient, (soft + hard / 2) / 4, atol=1e-14, rtol=0)
    assert (gradient[:, 3] > 0).all() and (gradient[:, 4] == 0).all()
    ruled_out = student.detach().index_fill(1, torch.tensor([0]), -math.inf)
    assert distillation_loss(ruled_out, teacher, alpha=1) == math.inf


def test_without_a_weight_the_other_term_is_not_looked_at():
    student, teacher, labels = batch()
    found = distillation_loss(student, teacher * math.nan, labels, alpha=0)
    torch.testing.assert_close(found, F.cross_entropy(student, labels))
    other = distillation_loss(student, teacher, (labels + 1) % 7, alpha=1)
    assert torch.equal(other, distillation_loss(student, teacher, alpha=1))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_it_stays_in_float32_under_autocast_and_with_half_precision(low, agrees):
    student, teacher, labels = batch((5, 50), low)
    exact = distillation_loss(student.double(), teacher.double(), labels)
    for dtype in (low, torch.float32):
        with torch.autocast("cpu", low):
            loss = distillation_loss(student.to(dtype), teacher.to(dtype), labels)
        assert loss.dtype == torch.float32
        agrees(loss.double(), exact, "float64", atol=5e-6)


def test_at_a_high_temperature_float32_is_exact_enough():
    student, teacher, _ = batch((50, 100), torch.float32)
    for temperature, error in ((10, 1e-4), (100, 1e-2)):
        found = distillation_loss(student, teacher, None, temperature, 1)
        exact = distillation_loss(
            student.double(), teacher.double(), None, temperature, 1
        )
        assert found.item() == pytest.approx(exact.item(), rel=error)


def test_the_wider_of_two_precisions_is_kept():
    student, teacher, labels = batch(dtype=torch.float32)
    for a, b in ((student.double(), teacher), (student, teacher.double())):
        found = distillation_loss(a, b, labels)
        assert found.dtype == torch.float64
        exact = distillation_loss(student.double(), teacher.double(), labels)
        torch.testing.assert_close(found, exact, atol=2e-6, rtol=0)


def test_large_logits_do_not_overflow():
    student = torch.tensor([[5000.0, 0.0]], requires_grad=True)
    loss = distillation_loss(
        student, torch.tensor([[0.0, 5000.0]]), torch.tensor([1]), 2, 0.5
    )
    assert loss.item() == 0.5 * 4 * 2500 + 0.5 * 5000
    assert torch.autograd.grad(loss, student)[0].tolist() == [[1.5, -1.5]]


def test_non_contiguous_inputs_work():
    student, teacher, labels = batch((4, 3, 7))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (student, labels)]
    assert not any(x.is_contiguous() for x in turned)
    found = distillation_loss(turned[0], teacher.mT.contiguous().mT, turned[1])
    assert torch.equal(found, distillation_loss(student, teacher, labels))


def test_inputs_are_not_modified():
    inputs = batch()
    inputs[2][1] = -100
    copies = [x.clone() for x in inputs]
    distillation_loss(*inputs)
    assert all(map(torch.equal, inputs, copies))


def test_the_device_follows_the_inputs():
    student, teacher, labels = (x.to("meta") for x in batch())
    for found in (
        distillation_loss(student, teacher, labels),
        distillation_loss(student, teacher, alpha=1),
    ):
        assert found.device.type == "meta" and found.shape == ()


def test_it_compiles_to_one_graph(compiles):
    compiles(distillation_loss, *(batch((n, 7)) for n in (4, 5)))
    compiles(
        lambda *x: distillation_loss(*x, None, 3.0, 1.0),
        *(batch((n, 3, 5))[:2] for n in (2, 3)),
    )


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature, refuses):
    message = f"temperature must be positive and finite, got {temperature}"
    with refuses(ValueError, message):
        distillation_loss(*batch(), temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_outside_of_zero_to_one_is_refused(alpha, refuses):
    with refuses(ValueError, f"alpha must be in [0, 1], got {alpha}"):
        distillation_loss(*batch(), alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_labels_are_needed_unless_the_teacher_has_all_the_weight(alpha, refuses):
    student, teacher, _ = batch()
    message = f"labels must be given when alpha is {alpha}, got None"
    with refuses(ValueError, message):
        distillation_loss(student, teacher, alpha=alpha)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((4, 7), (4, 6)),
        ((4, 7), (7,)),
        ((4, 7), (1, 7)),
        ((4, 1), (4, 7)),
        ((), ()),
        ((4, 0), (4, 0)),
    ],
    ids=str,
)
def test_logits_of_other_shapes_are_refused(ours, theirs, refuses):
    message = f"student and teacher must be one (..., V >= 1), got {ours} and {theirs}"
    with refuses(ValueError, message):
        distillation_loss(torch.zeros(ours), torch.zeros(theirs), alpha=1)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(), (1,), (4, 1), (1, 3), (3, 4), (4, 3, 7)], ids=str
)
def test_labels_of_another_shape_are_refused(shape, alpha, refuses):
    student, teacher, _ = batch((4, 3, 7))
    message = f"labels must be one for each row, got {shape} for logits (4, 3, 7)"
    with refuses(ValueError, message):
        distillation_loss(student, teacher, torch.zeros(shape).long(), alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_labels_of_another_dtype_are_refused(dtype, refuses):
    student, teacher, labels = batch()
    with refuses(TypeError, f"labels must be int64, got {dtype}"):
        distillation_loss(student, teacher, labels.to(dtype))
