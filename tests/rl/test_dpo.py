"""DPO's loss against trl's and by hand; what a reference and a margin do."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from snippets.rl.dpo import dpo_loss, implicit_reward, sequence_log_probs

TRL = "trl's DPOTrainer"
SHAPES = [(7,), (1,), (0,), (), (2, 3)]


def pairs(shape=(7,), dtype=torch.float64):
    """policy_chosen, policy_rejected, ref_chosen, ref_rejected."""
    return [-20 * torch.rand(shape, dtype=dtype) for _ in range(4)]


def texts(dtype=torch.float64, lengths=((2, 6), (1, 3), (3, 3), (0, 5), (4, 5))):
    """logits, ids, mask: prompts up to the first length, answers up to the second."""
    logits = torch.randn(len(lengths), 6, 9, dtype=dtype)
    ids = torch.randint(9, (len(lengths), 6))
    start, end = torch.tensor(lengths).T[..., None]
    return logits, ids, (torch.arange(6) >= start) & (torch.arange(6) < end)


@pytest.fixture
def trl_loss(reference_library):
    """The loss of trl's trainer, of which only this method is built.

    Chosen answers come first in the batch; the model's outputs are given.
    """
    trainer = reference_library("trl.trainer.dpo_trainer").DPOTrainer

    def loss(
        token_log_probs, mask, ref_chosen, ref_rejected, beta, kind="sigmoid", smooth=0
    ):
        zeros = torch.zeros_like(token_log_probs).detach()
        outputs = SimpleNamespace(
            log_probs=token_log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )
        stub = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(
                device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
            ),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[kind],
            loss_weights=[1.0],
            label_smoothing=smooth,
            beta=beta,
            use_weighting=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {
            "input_ids": torch.zeros_like(mask, dtype=torch.long),
            "attention_mask": mask.long(),
            "completion_mask": mask.long(),
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        return trainer._compute_loss(stub, lambda **_: outputs, inputs, False)

    return loss


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_values_and_gradients_are_those_of_trl(beta, trl_loss, agrees_with_gradients):
    logits, ids, mask = texts(lengths=[(2, 6), (1, 3), (3, 4), (1, 5)])
    refs = pairs((2,))[2:]

    def ours(logits):
        chosen, rejected = sequence_log_probs(logits, ids, mask).chunk(2)
        return dpo_loss(chosen, rejected, *refs, beta)[0]

    def theirs(logits):
        # As trl's own models give them: shifted, and 0 where the label is -100
        labels = ids.masked_fill(~mask, -100)[:, 1:]
        log_probs = -F.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, reduction="none"
        )
        return trl_loss(log_probs, mask, *refs, beta)

    agrees_with_gradients(ours, theirs, logits, against=TRL, atol=1e-12)


@pytest.mark.parametrize("smooth", [0.1, 0.3])
def test_smoothed_it_differs_from_trls_robust_loss_as_their_papers_say(
    smooth, trl_loss, agrees
):
    """cDPO mixes both labels; robust DPO subtracts the flipped one and rescales."""
    policy_chosen, policy_rejected, *refs = pairs((4,))
    log_probs = torch.zeros(8, 1, dtype=torch.float64)
    log_probs[:, 0] = torch.cat([policy_chosen, policy_rejected])
    mask = torch.tensor([[False, True]]).expand(8, 2)
    robust = trl_loss(log_probs, mask, *refs, 0.1, "robust", smooth)
    clean = trl_loss(log_probs, mask, *refs, 0.1)
    flipped = (clean * (1 - smooth) - robust * (1 - 2 * smooth)) / smooth
    ours, _, _ = dpo_loss(policy_chosen, policy_rejected, *refs, 0.1, smooth)
    agrees(ours, (1 - smooth) * clean + smooth * flipped, TRL, atol=1e-12)


@pytest.mark.parametrize("smooth", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_after_pair_by_hand(shape, beta, smooth):
    inputs = pairs(shape)
    losses, rewards = [], ([], [])
    for pc, pr, rc, rr in zip(*(x.flatten().tolist() for x in inputs), strict=True):
        chosen, rejected = beta * (pc - rc), beta * (pr - rr)
        p = 1 / (1 + math.exp(rejected - chosen))
        losses.append(-(1 - smooth) * math.log(p) - smooth * math.log(1 - p))
        rewards[0].append(chosen), rewards[1].append(rejected)
    loss, *found = dpo_loss(*inputs, beta, smooth)
    expected = sum(losses) / max(len(losses), 1)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for ours, own in zip(found, rewards, strict=True):
        assert ours.shape == shape
        assert ours.flatten().tolist() == pytest.approx(own, abs=1e-12)


def test_what_is_not_said_is_a_beta_of_a_tenth_and_no_smoothing():
    inputs = pairs()
    said = dpo_loss(*inputs, beta=0.1, label_smoothing=0.0)
    assert all(map(torch.equal, dpo_loss(*inputs), said))
    assert torch.equal(
        implicit_reward(*inputs[:2]), implicit_reward(*inputs[:2], beta=0.1)
    )


def test_gradients_are_those_of_finite_differences():
    inputs = pairs()
    for x in inputs[:2]:
        x.requires_grad_()
    for smooth in (0.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda c, r, s=smooth: dpo_loss(c, r, *inputs[2:], 0.3, s)[0], inputs[:2]
        )
    logits, ids, mask = texts()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_log_probs(x, ids, mask), logits)
    for x in inputs[2:]:
        x.requires_grad_()
    assert torch.autograd.gradcheck(implicit_reward, inputs[1:3])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_is_beta_times_how_wrong_the_margin_is(beta):
    inputs = [x.requires_grad_() for x in pairs()]
    loss, chosen, rejected = dpo_loss(*inputs, beta)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    wrong = torch.sigmoid(rejected - chosen)
    torch.testing.assert_close(gradients[0], -beta * wrong / 7, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients[1], beta * wrong / 7, atol=1e-12, rtol=0)
    assert gradients[2] is gradients[3] is None  # the reference stays
    assert not chosen.requires_grad and not rejected.requires_grad


def test_at_the_reference_the_loss_is_log_two_and_the_rewards_are_zero():
    chosen, rejected, _, _ = pairs()
    for smooth in (0.0, 0.3):
        loss, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.1, smooth)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
        assert all((reward == 0).all() for reward in rewards)


def test_what_depends_on_the_prompt_alone_cancels():
    inputs = pairs()
    prompt = 10 * torch.randn(7, dtype=torch.float64)
    loss, *_ = dpo_loss(*inputs)
    for moved in ((prompt, prompt, 0, 0), (0, 0, prompt, prompt)):
        found, *_ = dpo_loss(*(x + y for x, y in zip(inputs, moved, strict=True)))
        torch.testing.assert_close(found, loss, atol=1e-12, rtol=0)


def test_swapping_the_pair_turns_the_margin_round():
    a, b, ref_a, ref_b = pairs((1,))
    loss, *_ = dpo_loss(a, b, ref_a, ref_b)
    swapped, *_ = dpo_loss(b, a, ref_b, ref_a)
    assert math.exp(-loss) + math.exp(-swapped) == pytest.approx(1, abs=1e-12)


def test_the_best_policy_is_the_reference_times_the_exponential_of_the_reward():
    """Section 4: where the pairs come from a reward, that reward is found again."""
    ref = torch.randn(4, dtype=torch.float64).log_softmax(-1)
    reward, beta = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=torch.float64), 0.7
    best = (ref + reward / beta).log_softmax(-1)
    found = implicit_reward(best, ref, beta)
    torch.testing.assert_close(found - found[0], reward - reward[0], atol=1e-12, rtol=0)
    # And no other policy has a smaller loss on pairs that follow Bradley and Terry.
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    wins = torch.sigmoid(reward[first] - reward[second])
    logits = best.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    loss = sum(
        wins[n] * dpo_loss(policy[i], policy[j], ref[i], ref[j], beta)[0]
        for n, (i, j) in enumerate(zip(first, second, strict=True))
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12


def test_large_margins_neither_overflow_nor_vanish():
    zero = torch.zeros(1)
    chosen = torch.tensor([-5000.0], requires_grad=True)
    loss, *_ = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    assert loss.item() == 5000
    assert torch.autograd.grad(loss, chosen)[0].item() == -1
    loss, *_ = dpo_loss(zero, chosen, zero, zero, beta=1.0)
    assert loss.item() == 0


# Log-probabilities of sequences


def test_log_probs_token_by_token():
    logits, ids, mask = texts()
    found = sequence_log_probs(logits, ids, mask)
    for b in range(len(ids)):
        expected = 0.0
        for t in range(1, 6):
            if mask[b, t]:
                scores = logits[b, t - 1].tolist()
                total = math.log(sum(math.exp(score) for score in scores))
                expected += scores[ids[b, t]] - total
        assert found[b].item() == pytest.approx(expected, abs=1e-10)
    assert found[2] == 0  # an answer of no token


def test_values_and_gradients_are_those_of_cross_entropy(agrees_with_gradients):
    logits, ids, mask = texts()
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    agrees_with_gradients(
        lambda logits: sequence_log_probs(logits, ids, mask),
        lambda logits: (
            -F.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels, reduction="none"
            ).sum(dim=1)
        ),
        logits,
        against="F.cross_entropy",
        atol=1e-12,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_and_prompt_count_for_nothing_whatever_stands_there(bad):
    logits, ids, mask = texts()
    used = torch.cat([mask[:, 1:], torch.zeros(len(ids), 1).bool()], dim=1)
    results = []
    for value, token in ((0.0, 3), (bad, -100)):
        x = logits.masked_fill(~used[..., None], value).requires_grad_()
        found = sequence_log_probs(x, ids.masked_fill(~mask, token), mask)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert (gradient[~used] == 0).all() and (gradient[used] != 0).all()
        results.append((found, gradient))
    assert all(map(torch.equal, *results))


def test_more_padding_changes_nothing():
    logits, ids, mask = texts()
    found = sequence_log_probs(
        F.pad(logits, (0, 0, 0, 3)), F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    )
    torch.testing.assert_close(found, sequence_log_probs(logits, ids, mask))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1)], ids=str)
def test_without_a_token_the_log_probability_is_zero(shape):
    logits = torch.randn(*shape, 5, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.long)
    found = sequence_log_probs(logits, ids, torch.ones(shape).bool())
    assert torch.equal(found, torch.zeros(shape[0]))
    assert (torch.autograd.grad(found.sum(), logits)[0] == 0).all()


def test_a_vocabulary_of_one_token_is_certain():
    ids, mask = torch.zeros(2, 4).long(), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    found = sequence_log_probs(torch.randn(2, 4, 1), ids, mask.bool())
    assert found.tolist() == [0, 0]


# What all of them promise


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_everything_stays_in_float32_under_autocast_and_with_half_precision(
    low, agrees
):
    logits, ids, mask = texts(low)
    inputs = pairs(dtype=low)
    for dtype in (low, torch.float32):
        with torch.autocast("cpu", low):
            log_probs = sequence_log_probs(logits.to(dtype), ids, mask)
            loss, *rewards = dpo_loss(*(x.to(dtype) for x in inputs))
        exact, *exact_rewards = dpo_loss(*(x.double() for x in inputs))
        for ours, expected in (
            (log_probs, sequence_log_probs(logits.double(), ids, mask)),
            (loss, exact),
            *zip(rewards, exact_rewards, strict=True),
        ):
            assert ours.dtype == torch.float32
            agrees(ours.double(), expected, "float64", atol=5e-6)


def test_a_log_probability_of_hundreds_is_not_rounded_to_bfloat16():
    logits = torch.randn(1, 200, 50, dtype=torch.bfloat16)
    ids, mask = torch.randint(50, (1, 200)), torch.ones(1, 200).bool()
    exact = sequence_log_probs(logits.double(), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = sequence_log_probs(logits, ids, mask)
    assert exact.item() < -500
    assert found.item() == pytest.approx(exact.item(), abs=1e-2)


def test_non_contiguous_inputs_work():
    logits, ids, mask = texts()
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (logits, ids)]
    assert not any(x.is_contiguous() for x in turned)
    found = sequence_log_probs(*turned, mask)
    assert torch.equal(found, sequence_log_probs(logits, ids, mask))
    inputs = pairs((14,))
    halves = [x[::2] for x in inputs]
    loss, *rewards = dpo_loss(*halves)
    assert torch.equal(loss, dpo_loss(*(x.contiguous() for x in halves))[0])
    assert all(reward.is_contiguous() for reward in rewards)


def test_inputs_are_not_modified():
    inputs = *texts(), *pairs()
    copies = [x.clone() for x in inputs]
    sequence_log_probs(*inputs[:3])
    dpo_loss(*inputs[3:], label_smoothing=0.1)
    assert all(map(torch.equal, inputs, copies))


def test_the_device_follows_the_inputs():
    found = sequence_log_probs(*(x.to("meta") for x in texts()))
    assert found.device.type == "meta" and found.shape == (5,)
    assert all(
        x.device.type == "meta" for x in dpo_loss(*(x.to("meta") for x in pairs()))
    )


def test_it_compiles_to_one_graph(compiles):
    compiles(dpo_loss, *(tuple(pairs((n,))) for n in (4, 5)))
    compiles(sequence_log_probs, texts(), texts(lengths=[(1, 4), (2, 6)]))


@pytest.mark.parametrize("beta", [0, -0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta, refuses):
    message = f"beta must be positive, got {beta}"
    with refuses(ValueError, message):
        dpo_loss(*pairs(), beta)
    with refuses(ValueError, message):
        implicit_reward(*pairs()[:2], beta)


@pytest.mark.parametrize("smooth", [-0.1, 0.5, 1.0, math.nan])
def test_labels_that_are_mostly_wrong_are_refused(smooth, refuses):
    message = f"label_smoothing must be in [0, 0.5), got {smooth}"
    with refuses(ValueError, message):
        dpo_loss(*pairs(), label_smoothing=smooth)


@pytest.mark.parametrize("shape", [(1,), (7, 1), (), (6,)], ids=str)
def test_nothing_is_broadcast(shape, refuses):
    for odd in range(4):
        inputs = pairs()
        inputs[odd] = torch.zeros(shape)
        # An odd pair is seen first; else the policy and its reference are.
        a, b = (inputs[:2], inputs[0::2], inputs[1::2])[max(odd - 1, 0)]
        names = "chosen and rejected" if odd < 2 else "log-probs of policy and ref"
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        with refuses(ValueError, f"{names} must have one shape, got {got}"):
            dpo_loss(*inputs)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3), (2, 3), (2, 3)],
        [(2, 3, 5), (2, 3), (2, 1)],
        [(2, 3, 5), (2, 1), (2, 3)],
        [(1, 3, 5), (2, 3), (2, 3)],
        [(3, 5), (3,), (3,)],
        [(2, 3, 4, 5), (2, 3, 4), (2, 3, 4)],
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shapes, refuses):
    got = ", ".join(map(str, shapes))
    message = f"need logits (B, T, V), ids and mask (B, T), got {got}"
    logits, ids, mask = map(torch.zeros, shapes)
    with refuses(ValueError, message):
        sequence_log_probs(logits, ids.long(), mask.bool())


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("mask", [torch.bool, torch.int64])
def test_other_dtypes_of_ids_and_mask_are_refused(ids, mask, refuses):
    x, *rest = texts()
    rest = [y.to(dtype) for y, dtype in zip(rest, (ids, mask), strict=True)]
    if (ids, mask) == (torch.int64, torch.bool):
        assert sequence_log_probs(x, *rest).shape == (5,)
        return
    message = f"ids must be int64 and mask bool, got {ids} and {mask}"
    with refuses(TypeError, message):
        sequence_log_probs(x, *rest)
