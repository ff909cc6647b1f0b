"""GRPO's advantages, KL and loss against trl's and torchrl's, and by hand."""

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from snippets.rl.grpo import group_relative_advantages, grpo_loss, kl_k3

TRL = "trl's GRPOTrainer"
LOSS_TYPES = {"sequence": "grpo", "token": "bnpo", "constant": "dr_grpo"}
LENGTHS = [6, 1, 3, 0, 4]


def answers(dtype=torch.float64, lengths=LENGTHS, width=6):
    """log_probs, old, advantages, mask, ref: ratios on both sides of the clip."""
    shape = len(lengths), width
    old = -3 * torch.rand(shape, dtype=dtype)
    new = old + 0.4 * torch.randn(shape, dtype=dtype)
    ref = old + 0.4 * torch.randn(shape, dtype=dtype)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return new, old, torch.randn(len(lengths), dtype=dtype), mask, ref


@pytest.fixture
def trl_loss(reference_library):
    """The loss of trl's trainer, of which only this method is built."""
    trainer = reference_library("trl.trainer.grpo_trainer").GRPOTrainer

    def loss(
        new, old, advantages, mask, ref, loss_type, clip_range, beta, max_length=None
    ):
        stub = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (new, 0 * new, None),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            beta=beta,
            loss_type=loss_type,
            epsilon_low=clip_range,
            epsilon_high=clip_range,
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=max_length,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
            accelerator=SimpleNamespace(
                num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
            ),
            args=SimpleNamespace(
                delta=None, use_bias_correction_kl=False, steps_per_generation=1
            ),
        )
        tokens = torch.zeros_like(mask, dtype=torch.long)
        inputs = {
            "prompt_ids": tokens,
            "prompt_mask": mask.long(),
            "completion_ids": tokens,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        }
        return trainer._compute_loss(stub, None, inputs)

    return loss


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("clip_range", [0.2, 0.05])
@pytest.mark.parametrize("aggregation", LOSS_TYPES)
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6], [2], [0, 0]], ids=str)
def test_values_and_gradients_are_those_of_trl(
    lengths, aggregation, clip_range, beta, trl_loss, agrees_with_gradients
):
    new, *rest = answers(lengths=lengths)
    options = clip_range, beta, aggregation, 7
    agrees_with_gradients(
        lambda new: grpo_loss(new, *rest, *options),
        lambda new: trl_loss(new, *rest, LOSS_TYPES[aggregation], clip_range, beta, 7),
        new,
        against=TRL,
        atol=1e-12,
    )


def test_over_all_tokens_it_is_trls_dapo(trl_loss, agrees_with_gradients):
    new, *rest = answers()
    agrees_with_gradients(
        lambda new: grpo_loss(new, *rest, 0.2, 0.1, "token"),
        lambda new: trl_loss(new, *rest, "dapo", 0.2, 0.1),
        new,
        against=TRL,
        atol=1e-12,
    )


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_an_answer_after_the_other_by_hand(aggregation):
    new, old, advantages, mask, ref = answers()
    rows = []
    for b, length in enumerate(LENGTHS):
        row = []
        for t in range(length):
            r = math.exp(new[b, t] - old[b, t])
            A = advantages[b].item()
            d = (ref[b, t] - new[b, t]).item()
            kl = math.exp(d) - d - 1
            row.append(-min(r * A, min(max(r, 0.8), 1.2) * A) + 0.3 * kl)
        rows.append(row)
    expected = {
        "sequence": sum(sum(row) / max(len(row), 1) for row in rows) / 5,
        "token": sum(map(sum, rows)) / sum(LENGTHS),
        "constant": sum(map(sum, rows)) / (5 * 9),
    }[aggregation]
    found = grpo_loss(
        new, old, advantages, mask, ref, 0.2, 0.3, aggregation, max_length=9
    )
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_what_is_not_said_is_the_paper_s_clip_no_kl_and_a_mean_for_each_answer():
    inputs = answers()
    said = grpo_loss(*inputs, clip_range=0.2, beta=0.0, aggregation="sequence")
    assert torch.equal(grpo_loss(*inputs[:4]), said)
    assert torch.equal(grpo_loss(*inputs), said)
    others = [{"clip_range": 0.21}, {"beta": 0.01}, {"aggregation": "token"}]
    assert all(grpo_loss(*inputs, **other) != said for other in others)


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_gradients_are_those_of_finite_differences(aggregation):
    new, *rest = answers()
    new.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda new: grpo_loss(new, *rest, 0.2, 0.3, aggregation, 6), new
    )
    ref = rest[-1].requires_grad_()
    assert torch.autograd.gradcheck(kl_k3, (new, ref))


def test_the_gradient_reaches_the_policy_alone():
    new, old, advantages, mask, ref = answers()
    inputs = [x.requires_grad_() for x in (new, old, advantages, ref)]
    loss = grpo_loss(new, old, advantages, mask, ref, beta=1.0)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [True, False, False, False]


def test_on_policy_the_loss_is_zero_and_its_gradient_is_that_of_reinforce():
    new, _, _, _, _ = answers(lengths=[6, 6, 6, 6])
    new.requires_grad_()
    mask = torch.ones(4, 6, dtype=torch.bool)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    advantages = group_relative_advantages(rewards).flatten()
    loss = grpo_loss(new, new, advantages, mask)
    assert abs(loss.item()) < 1e-15
    (ours,) = torch.autograd.grad(loss, new)
    (reinforce,) = torch.autograd.grad(-(advantages[:, None] * new).mean(), new)
    torch.testing.assert_close(ours, reinforce, atol=1e-15, rtol=0)
    assert ours.abs().min() > 0.03


BAD = [math.nan, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_padding_counts_for_nothing_whatever_stands_there(aggregation, bad, agrees):
    new, old, advantages, mask, ref = answers()
    clean = new.clone().requires_grad_()
    padded = [x.masked_fill(~mask, bad) for x in (new, old, ref)]
    padded[0].requires_grad_()
    of_nothing = advantages.masked_fill(~mask.any(dim=1), bad)
    options = 0.2, 0.1, aggregation, 6
    ours = grpo_loss(*padded[:2], of_nothing, mask, padded[2], *options)
    expected = grpo_loss(clean, old, advantages, mask, ref, *options)
    agrees(ours, expected, "the same without bad padding", atol=0)
    (gradient,) = torch.autograd.grad(ours, padded[0])
    (of_clean,) = torch.autograd.grad(expected, clean)
    assert torch.equal(gradient, of_clean) and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_more_padding_changes_nothing(aggregation):
    new, old, advantages, mask, ref = answers()
    wide = [torch.nn.functional.pad(x, (2, 5)) for x in (new, old, mask, ref)]
    torch.testing.assert_close(
        grpo_loss(*wide[:2], advantages, *wide[2:], 0.2, 0.1, aggregation),
        grpo_loss(new, old, advantages, mask, ref, 0.2, 0.1, aggregation),
        atol=1e-15,
        rtol=0,
    )


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (3, 0)], ids=str)
def test_where_nothing_counts_the_loss_is_zero_with_a_gradient_of_zeros(
    shape, aggregation
):
    new = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    loss = grpo_loss(
        new, new, torch.ones(shape[0]), mask, new, 0.2, 0.1, aggregation, 3
    )
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_a_single_token_is_its_own_mean(aggregation):
    one = torch.zeros(1, 1, dtype=torch.float64)
    loss = grpo_loss(
        one, one, one[0] + 3, one == 0, aggregation=aggregation, max_length=1
    )
    assert loss.item() == -3


def test_without_a_weight_for_the_kl_the_reference_is_not_looked_at():
    new, old, advantages, mask, ref = answers()
    found = grpo_loss(new, old, advantages, mask, ref - math.inf)
    assert torch.equal(found, grpo_loss(new, old, advantages, mask))


def test_a_long_wrong_answer_is_punished_less_per_token_only_by_the_mean_over_answers():
    new = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(8) < torch.tensor([2, 8])[:, None]
    advantages = -torch.ones(2, dtype=torch.float64)
    for aggregation, expected in (
        ("sequence", (1 / 4, 1 / 16)),
        ("token", (1 / 10, 1 / 10)),
        ("constant", (1 / 40, 1 / 40)),
    ):
        loss = grpo_loss(
            new, new, advantages, mask, aggregation=aggregation, max_length=20
        )
        (gradient,) = torch.autograd.grad(loss, new)
        assert gradient[:, 0].tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_everything_stays_in_float32_under_autocast_and_with_half_precision(
    low, agrees
):
    inputs = answers(low)
    exact = [x if x.dtype == torch.bool else x.double() for x in inputs]
    for dtype in (low, torch.float32):
        given = [x if x.dtype == torch.bool else x.to(dtype) for x in inputs]
        with torch.autocast("cpu", low):
            loss = grpo_loss(*given, beta=0.1)
            kl = kl_k3(given[0], given[4])
            advantages = group_relative_advantages(given[1])
        for ours, expected in (
            (loss, grpo_loss(*exact, beta=0.1)),
            (kl, kl_k3(exact[0], exact[4])),
            (advantages, group_relative_advantages(exact[1])),
        ):
            assert ours.dtype == torch.float32
            agrees(ours.double(), expected, "float64", atol=2e-6)


# Advantages


@pytest.mark.parametrize("eps", [1e-4, 0.0, 0.5])
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_the_statistics_module(scale, eps):
    rewards = torch.randn(3, 5, dtype=torch.float64)
    found = group_relative_advantages(rewards, scale, eps)
    assert found.shape == (3, 5)
    for row, own in zip(rewards.tolist(), found.tolist(), strict=True):
        mean, std = statistics.mean(row), statistics.stdev(row)
        expected = [(r - mean) / (std + eps if scale else 1) for r in row]
        assert own == pytest.approx(expected, abs=1e-12)


def test_what_is_not_said_is_a_scale_with_an_epsilon_of_a_ten_thousandth():
    rewards = torch.randn(2, 4, dtype=torch.float64)
    said = group_relative_advantages(rewards, scale=True, eps=1e-4)
    assert torch.equal(group_relative_advantages(rewards), said)


def test_advantages_by_hand():
    found = group_relative_advantages(torch.tensor([[1.0, 0.0], [7.0, 5.0]]), eps=0)
    half = math.sqrt(0.5)
    assert found.flatten().tolist() == pytest.approx([half, -half] * 2, abs=1e-6)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1e6 / 3, -1e-3])
def test_equal_rewards_give_zero_whatever_their_rounding(reward, dtype, eps, scale):
    rewards = torch.full((2, 7), reward, dtype=dtype)
    rewards[1] = torch.arange(7)
    found = group_relative_advantages(rewards, scale, eps)
    assert (found[0] == 0).all() and found[1].abs().max() > 1


def test_one_that_differs_by_rounding_alone_is_no_equal():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0 + 2**-23]])
    found = group_relative_advantages(rewards)
    assert 0 < found.abs().max() < 0.01


def test_advantages_do_not_depend_on_shift_or_on_scale():
    rewards = torch.randn(4, 6, dtype=torch.float64)
    found = group_relative_advantages(rewards, eps=0)
    moved = group_relative_advantages(3 * rewards - 7, eps=0)
    torch.testing.assert_close(moved, found, atol=1e-12, rtol=0)
    assert found.mean(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(
        found.std(dim=1), torch.ones(4).double(), atol=1e-12, rtol=0
    )


def test_groups_do_not_mix_and_the_order_of_samples_is_kept():
    rewards = torch.randn(3, 5, dtype=torch.float64)
    order = torch.randperm(5)
    found = group_relative_advantages(rewards)
    for alone, expected in (
        (group_relative_advantages(rewards[1:2]), found[1:2]),
        (group_relative_advantages(rewards[:, order]), found[:, order]),
    ):
        torch.testing.assert_close(alone, expected, atol=1e-12, rtol=0)


def test_centred_rewards_are_the_leave_one_out_baseline_but_for_a_factor():
    rewards = torch.randn(3, 5, dtype=torch.float64)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / 4
    found = group_relative_advantages(rewards, scale=False)
    expected = (rewards - others) * (1 - 1 / 5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_rewards_may_be_right_or_wrong(dtype):
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    found = group_relative_advantages(rewards.to(dtype))
    assert torch.equal(found, group_relative_advantages(rewards.float()))


def test_advantages_carry_no_gradient_and_no_group_is_fine():
    rewards = torch.randn(2, 3, requires_grad=True)
    assert not group_relative_advantages(rewards).requires_grad
    assert group_relative_advantages(torch.zeros(0, 3)).shape == (0, 3)


def test_a_nan_stays_in_its_group():
    rewards = torch.randn(2, 3)
    rewards[0, 1] = math.nan
    found = group_relative_advantages(rewards)
    assert found[0].isnan().all() and found[1].isfinite().all()


# The estimate of the KL


def test_values_and_gradients_of_the_kl_are_those_of_torchrl(
    reference_library, agrees_with_gradients
):
    distillation = reference_library("torchrl.objectives.llm.distillation")
    new, _, _, _, ref = answers()
    agrees_with_gradients(
        kl_k3,
        lambda new, ref: distillation.k3_kl_token_estimate(ref, new),
        new,
        ref,
        against="torchrl's k3_kl_token_estimate",
        atol=1e-12,
    )


def test_its_expectation_is_the_kl_and_it_varies_less_than_the_log_ratio():
    new, ref = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    near = (new + 0.1 * (ref - new)).log_softmax(-1)
    for other in (ref, near):
        exact = torch.nn.functional.kl_div(other, new, log_target=True, reduction="sum")
        k1, k3 = new - other, kl_k3(new, other)
        assert (new.exp() * k3).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    spread = [(new.exp() * (k - exact) ** 2).sum().sqrt() for k in (k1, k3)]
    assert spread[1] < 0.5 * spread[0]


def test_it_is_never_negative_and_zero_where_both_agree():
    new = -10 * torch.rand(10_000)
    for size in (1e-6, 1e-3, 1.0):
        assert kl_k3(new, new + size * torch.randn(10_000)).min() >= 0
    assert (kl_k3(new, new) == 0).all()


def test_a_small_kl_is_not_lost_in_float32():
    found = kl_k3(torch.zeros(()), torch.tensor(1e-3))
    assert found.item() == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)


# What all of them promise


def test_non_contiguous_inputs_work():
    new, old, advantages, mask, ref = answers()
    turned = [x.T.contiguous().T for x in (new, old, mask, ref)]
    stepped = torch.stack([advantages, advantages], dim=1).flatten()[::2]
    assert not any(x.is_contiguous() for x in (*turned, stepped))
    found = grpo_loss(*turned[:2], stepped, *turned[2:], beta=0.1)
    torch.testing.assert_close(
        found, grpo_loss(new, old, advantages, mask, ref, beta=0.1)
    )
    assert group_relative_advantages(turned[0]).shape == (5, 6)


def test_inputs_are_not_modified():
    inputs = answers()
    copies = [x.clone() for x in inputs]
    grpo_loss(*inputs, beta=0.1)
    kl_k3(inputs[0], inputs[4])
    group_relative_advantages(inputs[0])
    assert all(map(torch.equal, inputs, copies))


def test_the_device_follows_the_inputs():
    inputs = [x.to("meta") for x in answers()]
    for aggregation in LOSS_TYPES:
        loss = grpo_loss(*inputs, 0.2, 0.1, aggregation, 6)
        assert loss.device.type == "meta" and loss.shape == ()
    assert kl_k3(inputs[0], inputs[4]).device.type == "meta"
    assert group_relative_advantages(inputs[0]).device.type == "meta"


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_it_compiles_to_one_graph(aggregation, compiles):
    calls = [answers(lengths=lengths) for lengths in (LENGTHS, [1, 2, 3])]
    compiles(lambda *x: grpo_loss(*x, 0.2, 0.1, aggregation, 6), *calls)
    compiles(lambda *x: group_relative_advantages(x[0]), *calls)


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (4, 0), (2, 3, 4)], ids=str)
def test_a_group_of_less_than_two_is_refused(shape, refuses):
    with refuses(ValueError, f"rewards must be (groups, >= 2), got {shape}"):
        group_relative_advantages(torch.zeros(shape))


@pytest.mark.parametrize("eps", [-1e-4, math.nan])
def test_a_negative_epsilon_is_refused(eps, refuses):
    with refuses(ValueError, f"eps must be at least 0, got {eps}"):
        group_relative_advantages(torch.zeros(2, 3), eps=eps)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), ()], ids=str)
def test_the_kl_does_not_broadcast(shape, refuses):
    message = "log_probs and ref_log_probs must have one shape, got "
    with refuses(ValueError, f"{message}(2, 3) and {shape}"):
        kl_k3(torch.zeros(2, 3), torch.zeros(shape))


@pytest.mark.parametrize(
    ("clip_range", "beta"), [(0, 0), (-1, 0), (math.nan, 0), (1, -1), (1, math.nan)]
)
def test_clips_of_nothing_and_negative_betas_are_refused(clip_range, beta, refuses):
    message = f"clip_range must be > 0, beta >= 0, got {clip_range}, {beta}"
    with refuses(ValueError, message):
        grpo_loss(*answers(), clip_range, beta)


def test_a_kl_needs_a_reference(refuses):
    with refuses(ValueError, "ref_log_probs must be given when beta is 0.1, got None"):
        grpo_loss(*answers()[:4], beta=0.1)


def test_other_ways_to_average_are_refused(refuses):
    message = "aggregation must be sequence, token or constant, got mean"
    with refuses(ValueError, message):
        grpo_loss(*answers(), aggregation="mean")


@pytest.mark.parametrize("max_length", [None, 0, -1])
def test_a_constant_needs_a_length(max_length, refuses):
    with refuses(ValueError, f"max_length must be at least 1, got {max_length}"):
        grpo_loss(*answers(), aggregation="constant", max_length=max_length)
    assert grpo_loss(*answers(), aggregation="constant", max_length=1).isfinite()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_that_are_not_bool_are_refused(dtype, refuses):
    new, old, advantages, mask, _ = answers()
    with refuses(TypeError, f"mask must be bool, got {dtype}"):
        grpo_loss(new, old, advantages, mask.to(dtype))


@pytest.mark.parametrize("odd", range(5))
@pytest.mark.parametrize("shape", [(5, 1), (1, 6), (6,), (), (5, 6, 1)], ids=str)
def test_nothing_is_broadcast(odd, shape, refuses):
    inputs = list(answers())
    inputs[odd] = torch.zeros(shape).to(inputs[odd].dtype)
    shapes = [tuple(inputs[n].shape) for n in (0, 1, 4, 3)]
    got = f"{shapes} and {tuple(inputs[2].shape)}"
    with refuses(ValueError, f"all must be (B, T) and advantages (B,), got {got}"):
        grpo_loss(*inputs)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)], ids=str)
def test_answers_are_rows(shape, refuses):
    x, advantages = torch.zeros(shape), torch.zeros(shape[:1])
    got = f"{[shape] * 4} and {shape[:1]}"
    with refuses(ValueError, f"all must be (B, T) and advantages (B,), got {got}"):
        grpo_loss(x, x, advantages, x.bool())
