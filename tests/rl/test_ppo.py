"""PPO's losses against torchrl's and by hand; where the gradient ends; CartPole."""

import math

import pytest
import torch
from torch import nn

from snippets.rl.ppo import (
    ppo_clip_loss,
    ppo_kl_penalty_loss,
    rlhf_token_rewards,
    update_kl_coefficient,
)

SHAPES = [(7,), (3, 5), (2, 3, 4), (1,), ()]


def random_inputs(shape, dtype=torch.float64):
    """Ratios on both sides of the clip, in it, and advantages of both signs."""
    old = -3 * torch.rand(shape, dtype=dtype)
    new = old + 0.5 * torch.randn(shape, dtype=dtype)
    return new, old, torch.randn(shape, dtype=dtype)


def clip_by_cases(log_probs, old_log_probs, advantages, clip_range):
    """Each element's term as section 3 of the paper tells it, case by case."""
    terms = []
    flat = (x.flatten() for x in (log_probs, old_log_probs, advantages))
    for new, old, advantage in zip(*flat, strict=True):
        r = torch.exp(new) / torch.exp(old)
        if advantage > 0 and r > 1 + clip_range:
            r = torch.full_like(r, 1 + clip_range)
        if advantage < 0 and r < 1 - clip_range:
            r = torch.full_like(r, 1 - clip_range)
        terms.append(-r * advantage)
    return sum(terms) / len(terms) + 0 * log_probs.sum()


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 1.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_four_cases(
    shape, clip_range, agrees_with_gradients
):
    new, old, advantages = random_inputs(shape)
    agrees_with_gradients(
        lambda new: ppo_clip_loss(new, old, advantages, clip_range),
        lambda new: clip_by_cases(new, old, advantages, clip_range),
        new,
        against="the four cases, one by one",
        atol=1e-12,
    )


@pytest.fixture
def torchrl_loss(reference_library):
    """torchrl's loss of a table of logits, as a function of the table."""

    def build(name, state, action, data, **options):
        objectives = reference_library("torchrl.objectives")
        modules = reference_library("torchrl.modules")
        tensordict = reference_library("tensordict")

        class Table(nn.Module):
            def forward(self, state):
                return self.logits[state]

        table = Table()
        table.logits = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
        actor = modules.ProbabilisticActor(
            tensordict.nn.TensorDictModule(table, ["state"], ["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        loss = getattr(objectives, name)(actor, None, entropy_bonus=False, **options)
        data = {"state": state, "action": action, **data}
        data["action_log_prob"] = (
            data["logits"].log_softmax(-1).gather(-1, action[:, None])[:, 0]
        )
        data = tensordict.TensorDict(data, [len(state)])
        return loss, table, data

    return build


def experience(steps=40):
    old_logits = torch.randn(5, 3, dtype=torch.float64)
    state, action = torch.randint(5, (steps,)), torch.randint(3, (steps,))
    return old_logits, state, action, torch.randn(steps, dtype=torch.float64)


@pytest.mark.parametrize("clip_range", [0.1, 0.3])
def test_values_and_gradients_are_those_of_torchrls_clip(
    clip_range, torchrl_loss, agrees
):
    old_logits, state, action, advantages = experience()
    data = {"logits": old_logits[state], "advantage": advantages[:, None]}
    loss, table, data = torchrl_loss(
        "ClipPPOLoss", state, action, data, clip_epsilon=clip_range
    )
    logits = (old_logits + 0.4 * torch.randn(5, 3)).requires_grad_()
    loss.actor_network_params["module", "0", "module", "logits"].data.copy_(logits)
    theirs = loss(data)["loss_objective"]
    theirs.backward()
    ours = ppo_clip_loss(
        logits.log_softmax(-1)[state, action],
        old_logits.log_softmax(-1)[state, action],
        advantages,
        clip_range,
    )
    # torchrl keeps the bounds in float32
    agrees(ours, theirs, "torchrl's ClipPPOLoss", atol=1e-7)
    (gradient,) = torch.autograd.grad(ours, logits)
    agrees(gradient, table.logits.grad, "torchrl's ClipPPOLoss", atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_values_and_gradients_are_those_of_torchrls_kl_penalty(
    beta, torchrl_loss, agrees
):
    old_logits, state, action, advantages = experience()
    data = {"logits": old_logits[state], "advantage": advantages[:, None]}
    # torchrl changes beta in place, before the gradient is taken: here it stays.
    still = {"increment": 1.0, "decrement": 1.0}
    loss, table, data = torchrl_loss(
        "KLPENPPOLoss", state, action, data, beta=beta, **still
    )
    logits = (old_logits + 0.4 * torch.randn(5, 3)).requires_grad_()
    loss.actor_network_params["module", "0", "module", "logits"].data.copy_(logits)
    theirs = loss(data)["loss_objective"]
    theirs.backward()
    new, old = logits.log_softmax(-1), old_logits.log_softmax(-1)
    kl = (old.exp() * (old - new)).sum(-1)[state]
    ours = ppo_kl_penalty_loss(
        new[state, action], old[state, action], advantages, kl, beta
    )
    # torchrl keeps beta in float32
    agrees(ours, theirs, "torchrl's KLPENPPOLoss", atol=1e-7)
    (gradient,) = torch.autograd.grad(ours, logits)
    agrees(gradient, table.logits.grad, "torchrl's KLPENPPOLoss", atol=1e-7)


@pytest.mark.parametrize("change", [0.0, 0.05, 0.2, 0.4, 1.0])
def test_the_coefficient_moves_as_torchrls(change, torchrl_loss):
    old_logits, state, action, advantages = experience()
    data = {"logits": old_logits[state], "advantage": advantages[:, None]}
    loss, _, data = torchrl_loss(
        "KLPENPPOLoss", state, action, data, beta=0.5, dtarg=0.02
    )
    logits = old_logits + change * torch.randn(5, 3)
    loss.actor_network_params["module", "0", "module", "logits"].data.copy_(logits)
    kl = loss(data)["kl"].mean()
    assert update_kl_coefficient(0.5, kl, 0.02) == loss.beta.item()


def test_the_coefficient_is_kept_between_the_thresholds_and_on_them():
    kept = [0.02 / 1.5, 0.015, 0.02, 0.029, 0.02 * 1.5]
    assert [update_kl_coefficient(3.0, kl, 0.02) for kl in kept] == [3.0] * 5
    low, high = math.nextafter(0.02 / 1.5, 0), math.nextafter(0.02 * 1.5, 1)
    assert update_kl_coefficient(3.0, low, 0.02) == 1.5
    assert update_kl_coefficient(3.0, high, 0.02) == 6.0
    assert update_kl_coefficient(0, math.inf, 0.02) == 0
    # An estimate of a KL may be below 0.
    assert update_kl_coefficient(3.0, torch.tensor(-0.1), 0.02) == 1.5


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # better, and further than the clip: no more to gain
        (0.5, -2.0, 1.6, 0.0),  # worse, and rarer than the clip: no more to gain
        (1.5, -2.0, 3.0, 3.0),  # worse, but more frequent: back, with all force
        (0.5, 2.0, -1.0, -1.0),  # better, but rarer: back
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 2.0, -2.0, -2.0),  # value and gradient agree where the policy is the old
        (1.0, 0.0, 0.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_gradient_ends_outside_the_clip_on_the_right_side_only(
    ratio, advantage, value, slope
):
    new = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    old = torch.zeros((), dtype=torch.float64)
    loss = ppo_clip_loss(new, old, torch.tensor(advantage, dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)


def test_the_clip_range_is_two_tenths_unless_it_is_said():
    new, old, advantages = random_inputs((50,))
    assert torch.equal(
        ppo_clip_loss(new, old, advantages), ppo_clip_loss(new, old, advantages, 0.2)
    )
    assert ppo_clip_loss(new, old, advantages) != ppo_clip_loss(
        new, old, advantages, 0.21
    )


def test_gradients_are_those_of_finite_differences():
    new, old, advantages = random_inputs((4, 5))
    kl = torch.rand(4, 5, dtype=torch.float64).requires_grad_()
    mask = torch.rand(4, 5) < 0.7
    new.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda new: ppo_clip_loss(new, old, advantages, 0.2, mask), new
    )
    assert torch.autograd.gradcheck(
        lambda new, kl: ppo_kl_penalty_loss(new, old, advantages, kl, 0.3, mask),
        (new, kl),
    )


def test_the_loss_never_pays_more_than_the_ratio_alone():
    for new, old, advantage in zip(*random_inputs((200,)), strict=True):
        unclipped = -advantage * (new - old).exp()
        assert ppo_clip_loss(new, old, advantage) >= unclipped - 1e-12


def test_no_gradient_reaches_the_old_policy_or_the_critic():
    inputs = [x.requires_grad_() for x in random_inputs((3, 5))]
    for loss in (
        ppo_clip_loss(*inputs),
        ppo_kl_penalty_loss(*inputs, torch.zeros(3, 5), 1.0),
    ):
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert gradients[0] is not None and gradients[1] is gradients[2] is None


def test_at_the_old_policy_the_gradient_is_that_of_reinforce():
    new, _, advantages = random_inputs((3, 5))
    new.requires_grad_()
    (reinforce,) = torch.autograd.grad(-(new * advantages).mean(), new)
    for loss in (
        ppo_clip_loss(new, new, advantages),
        ppo_kl_penalty_loss(new, new, advantages, torch.zeros(3, 5), 2.0),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(loss, new)[0], reinforce, atol=1e-15, rtol=0
        )


BAD = [math.nan, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("bad", BAD)
def test_padding_counts_for_nothing_whatever_stands_there(bad, agrees):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    *inputs, kl = *random_inputs((3, 4)), torch.rand(3, 4, dtype=torch.float64)
    padded = [x.masked_fill(~mask, bad).requires_grad_() for x in (*inputs, kl)]
    kept = [x[mask].requires_grad_() for x in (*inputs, kl)]
    for ours, expected in (
        (ppo_clip_loss(*padded[:3], mask=mask), ppo_clip_loss(*kept[:3])),
        (
            ppo_kl_penalty_loss(*padded, 0.7, mask),
            ppo_kl_penalty_loss(*kept, 0.7),
        ),
    ):
        agrees(ours, expected, "the same loss without padding", atol=1e-12)
        (gradient,) = torch.autograd.grad(ours, padded[0])
        (of_kept,) = torch.autograd.grad(expected, kept[0])
        assert (gradient[~mask] == 0).all()
        torch.testing.assert_close(gradient[mask], of_kept, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3), (0,), (0, 3), (3, 0)], ids=str)
def test_where_nothing_counts_the_loss_is_zero_with_a_gradient_of_zeros(shape):
    new, old, advantages = random_inputs(shape)
    new.requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    for loss in (
        ppo_clip_loss(new, old, advantages, mask=mask),
        ppo_kl_penalty_loss(new, old, advantages, torch.ones(shape), 1.0, mask),
    ):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, new)
        assert torch.equal(gradient, torch.zeros(shape, dtype=torch.float64))
    if new.numel() == 0:
        assert ppo_clip_loss(new, old, advantages).item() == 0


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_losses_stay_in_float32_under_autocast_and_with_half_precision(low, agrees):
    mask = torch.rand(4, 5) < 0.7
    *inputs, kl = *random_inputs((4, 5)), torch.rand(4, 5, dtype=torch.float64)
    halves = [x.to(low) for x in (*inputs, kl)]
    exact = [x.double() for x in halves]
    for dtype in (low, torch.float32):
        given = [x.to(dtype) for x in halves]
        with torch.autocast("cpu", low):
            clip = ppo_clip_loss(*given[:3], mask=mask)
            penalty = ppo_kl_penalty_loss(*given, 0.7, mask)
            rewards = rlhf_token_rewards(given[0][:, 0], *given[:2], mask)
        for ours, expected in (
            (clip, ppo_clip_loss(*exact[:3], mask=mask)),
            (penalty, ppo_kl_penalty_loss(*exact, 0.7, mask)),
            (rewards, rlhf_token_rewards(exact[0][:, 0], *exact[:2], mask)),
        ):
            assert ours.dtype == torch.float32
            agrees(ours.double(), expected, "float64", atol=1e-6)


def test_a_small_step_is_not_lost_in_bfloat16():
    new = torch.tensor([-5.0, -5.03125], dtype=torch.bfloat16)  # neighbours
    loss = ppo_clip_loss(new[:1], new[1:], torch.ones(1, dtype=torch.bfloat16))
    assert loss.item() == pytest.approx(-math.exp(0.03125), abs=1e-6)


def test_the_sum_of_the_rewards_is_the_score_less_the_kl():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]]).bool()
    new, ref, scores = *random_inputs((4, 4))[:2], torch.randn(4).double()
    rewards = rlhf_token_rewards(scores, new, ref, mask, beta=0.3)
    expected = scores - 0.3 * ((new - ref) * mask).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_rewards_token_by_token(beta):
    mask = [[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    last = [2, 3, 1, 2, None]
    new, ref, scores = *random_inputs((5, 4))[:2], torch.randn(5).double()
    rewards = rlhf_token_rewards(scores, new, ref, torch.tensor(mask).bool(), beta)
    for b in range(5):
        for t in range(4):
            kl = (new[b, t] - ref[b, t]).item()
            expected = -beta * kl * mask[b][t] + scores[b].item() * (t == last[b])
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_the_weight_of_the_kl_is_a_tenth_unless_it_is_said():
    new, ref, _ = random_inputs((2, 3))
    mask, scores = torch.ones(2, 3).bool(), torch.zeros(2).double()
    assert torch.equal(rlhf_token_rewards(scores, new, ref, mask), 0.1 * (ref - new))


@pytest.mark.parametrize("bad", BAD)
def test_padding_earns_nothing_whatever_stands_there(bad):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    new, ref, _ = random_inputs((2, 3))
    scores = torch.tensor([1.0, bad]).double()
    rewards = rlhf_token_rewards(
        scores, new.masked_fill(~mask, bad), ref.masked_fill(~mask, bad), mask
    )
    assert (rewards[~mask] == 0).all() and rewards.isfinite().all()
    assert (rewards[mask] != 0).all()


def test_a_score_of_infinity_stays_on_its_token():
    ones = torch.ones(1, 3)
    rewards = rlhf_token_rewards(torch.tensor([math.inf]), ones, ones, ones.bool())
    assert rewards.tolist() == [[0, 0, math.inf]]


def test_rewards_have_no_gradient_and_may_be_empty():
    new, ref, _ = random_inputs((2, 3))
    new.requires_grad_(), ref.requires_grad_()
    scores = torch.ones(2, requires_grad=True)
    rewards = rlhf_token_rewards(scores, new, ref, torch.ones(2, 3).bool())
    assert not rewards.requires_grad and new.requires_grad
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(shape)
        rewards = rlhf_token_rewards(torch.ones(shape[0]), empty, empty, empty.bool())
        assert rewards.shape == shape


def test_non_contiguous_inputs_work(agrees):
    new, old, advantages = random_inputs((5, 4))
    turned = [x.T.contiguous().T for x in (new, old, advantages)]
    mask = torch.rand(4, 5).T < 0.7
    assert not any(x.is_contiguous() for x in (*turned, mask))
    expected = ppo_clip_loss(new, old, advantages, mask=mask)
    agrees(ppo_clip_loss(*turned, mask=mask), expected, "contiguous", atol=1e-15)
    rewards = rlhf_token_rewards(new[:, 0], *turned[:2], mask)
    assert torch.equal(rewards, rlhf_token_rewards(new[:, 0], new, old, mask))
    assert rewards.is_contiguous()


def test_inputs_are_not_modified():
    inputs = *random_inputs((2, 3)), torch.rand(2, 3), torch.rand(2, 3) < 0.5
    copies = [x.clone() for x in inputs]
    ppo_clip_loss(*inputs[:3], mask=inputs[4])
    ppo_kl_penalty_loss(*inputs[:4], 0.5, inputs[4])
    rlhf_token_rewards(inputs[0][:, 0], *inputs[:2], inputs[4])
    assert all(map(torch.equal, inputs, copies))


def test_the_device_follows_the_inputs():
    inputs = [x.to("meta") for x in random_inputs((2, 3))]
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    for loss in (
        ppo_clip_loss(*inputs),
        ppo_clip_loss(*inputs, mask=mask),
        ppo_kl_penalty_loss(*inputs, inputs[2], 0.5),
        rlhf_token_rewards(inputs[0][:, 0], *inputs[:2], mask),
    ):
        assert loss.device.type == "meta"


def test_it_compiles_to_one_graph(compiles):
    calls = [(*random_inputs((n, 3)), torch.rand(n, 3) < 0.7) for n in (4, 5)]
    compiles(lambda n, o, a, m: ppo_clip_loss(n, o, a, mask=m), *calls)
    compiles(lambda n, o, a, m: ppo_kl_penalty_loss(n, o, a, o * n, 0.1, m), *calls)
    compiles(lambda n, o, a, m: rlhf_token_rewards(a[:, 0], n, o, m), *calls)


@pytest.mark.parametrize("clip_range", [0, -0.2, math.nan])
def test_a_clip_of_nothing_is_refused(clip_range, refuses):
    with refuses(ValueError, f"clip_range must be positive, got {clip_range}"):
        ppo_clip_loss(*random_inputs((3,)), clip_range)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_a_negative_beta_is_refused(beta, refuses):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    message = f"beta must be at least 0, got {beta}"
    with refuses(ValueError, message):
        ppo_kl_penalty_loss(x, x, x, x, beta)
    with refuses(ValueError, message):
        rlhf_token_rewards(x[:, 0], x, x, mask, beta)
    with refuses(ValueError, message):
        update_kl_coefficient(beta, 0.1, 0.1)


@pytest.mark.parametrize(
    ("kl", "target"), [(0.1, 0), (0.1, -1), (0.1, math.nan), (math.nan, 1)]
)
def test_a_kl_that_is_no_number_and_a_target_of_zero_are_refused(kl, target, refuses):
    message = f"kl must be a number and target positive, got {kl}, {target}"
    with refuses(ValueError, message):
        update_kl_coefficient(1.0, kl, target)


@pytest.mark.parametrize("odd", ["log_probs", "old_log_probs", "advantages", "kl"])
@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), ()], ids=str)
def test_nothing_is_broadcast(odd, shape, refuses):
    given = {n: torch.zeros(2, 3) for n in ("log_probs", "old_log_probs", "advantages")}
    losses = [(ppo_clip_loss, {})]
    if odd == "kl":
        given["kl"] = None
        losses = []
    losses += [(ppo_kl_penalty_loss, {"beta": 1.0, "kl": torch.zeros(2, 3)})]
    for loss, more in losses:
        arguments = {**given, **more, odd: torch.zeros(shape)}
        shapes = {n: tuple(x.shape) for n, x in arguments.items() if n != "beta"}
        shapes["mask"] = shapes["log_probs"]
        with refuses(ValueError, f"all tensors must have one shape, got {shapes}"):
            loss(**arguments)


def test_masks_that_do_not_fit_are_refused(refuses):
    x = torch.zeros(2, 3)
    shapes = {"log_probs": (2, 3), "ref_log_probs": (2, 3), "mask": (2, 1)}
    with refuses(ValueError, f"all tensors must have one shape, got {shapes}"):
        rlhf_token_rewards(x[:, 0], x, x, torch.ones(2, 1).bool())
    for dtype in (torch.int64, torch.float32):
        message = f"mask must be bool, got {dtype}"
        with refuses(TypeError, message):
            ppo_clip_loss(x, x, x, mask=x.to(dtype))
        with refuses(TypeError, message):
            rlhf_token_rewards(x[:, 0], x, x, x.to(dtype))


@pytest.mark.parametrize("scores", [(3,), (2, 1), (), (1,)], ids=str)
def test_one_score_an_answer_is_asked_for(scores, refuses):
    x = torch.zeros(2, 3)
    message = f"scores must be (B,) and mask (B, T), got {scores} and (2, 3)"
    with refuses(ValueError, message):
        rlhf_token_rewards(torch.zeros(scores), x, x, x.bool())


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)], ids=str)
def test_answers_are_rows(shape, refuses):
    x = torch.zeros(shape)
    scores = torch.zeros(shape[:1])
    message = f"scores must be (B,) and mask (B, T), got {shape[:1]} and {shape}"
    with refuses(ValueError, message):
        rlhf_token_rewards(scores, x, x, x.bool())


@pytest.mark.parametrize("seed", [0, 1])
def test_it_balances_the_pole(seed, reference_library):
    """CartPole-v1: batches of 64 steps of 16 copies, 6 epochs each."""
    gymnasium = reference_library("gymnasium")
    torch.manual_seed(seed)

    def net(outputs):
        layers = nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(64, outputs))

    actor, critic = net(2), net(1)
    weights = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    envs = gymnasium.make_vec(
        "CartPole-v1", num_envs=16, vectorization_mode="vector_entry_point"
    )
    state, _ = envs.reset(seed=seed)
    # The step after an episode's end only resets: it is no step of the policy.
    resets, length, lengths, largest = torch.zeros(16).bool(), torch.zeros(16), [], 0
    for _ in range(30):
        memory = []
        for _ in range(64):
            x = torch.as_tensor(state)
            with torch.no_grad():
                policy = torch.distributions.Categorical(logits=actor(x))
                action, value = policy.sample(), critic(x)[:, 0]
            state, reward, end, cut, _ = envs.step(action.numpy())
            end, done = torch.as_tensor(end), torch.as_tensor(end | cut)
            with torch.no_grad():
                after = critic(torch.as_tensor(state))[:, 0]
            delta = torch.as_tensor(reward).float() + 0.99 * after * ~end - value
            memory.append(
                (x, action, policy.log_prob(action), value, delta, done, ~resets)
            )
            length += ~resets
            lengths += length[done].tolist()
            length[done], resets = 0, done
        columns = map(torch.stack, zip(*memory, strict=True))
        x, action, old, value, delta, done, real = columns
        advantages, running = torch.zeros(64, 16), torch.zeros(16)
        for t in reversed(range(64)):
            running = delta[t] + 0.99 * 0.95 * running * ~done[t]
            advantages[t] = running
        returns = advantages + value
        chosen = advantages[real]
        advantages = (advantages - chosen.mean()) / chosen.std()
        for _ in range(6):
            for rows in torch.randperm(64).split(16):
                policy = torch.distributions.Categorical(logits=actor(x[rows]))
                new = policy.log_prob(action[rows])
                keep = real[rows]
                ratio = (new - old[rows])[keep].exp().max().item()
                largest = max(largest, ratio)
                error = (critic(x[rows])[..., 0] - returns[rows])[keep].square().mean()
                loss = ppo_clip_loss(new, old[rows], advantages[rows], mask=keep)
                loss = loss + 0.5 * error - 0.01 * policy.entropy()[keep].mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 0.5)
                optimizer.step()
    first, last = lengths[:100], lengths[-100:]
    assert sum(first) / 100 < 40 and sum(last) / len(last) > 150
    assert largest > 1.2  # the clip bounds no ratio
