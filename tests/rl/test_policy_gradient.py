"""Returns against torchrl's, the score-function gradient against exact ones."""

import itertools

import pytest
import torch

from snippets.rl.policy_gradient import discounted_returns, reinforce_loss

TORCHRL = "torchrl's reward2go"


def steps(*shape, dtype=torch.float64):
    """Rewards, dones, last values and final values of some episodes, time first."""
    rewards, final_values = torch.randn(2, *shape, dtype=dtype)
    dones = torch.rand(shape) < 0.3
    return rewards, dones, torch.randn(shape[1:], dtype=dtype), final_values


def by_definition(rewards, gamma, dones, last_value, final_values):
    """For each step the sum over those that follow it, up to the end of its episode."""
    found = 0 * rewards
    for t, *rest in itertools.product(*map(range, rewards.shape)):
        rest = tuple(rest)
        end = t
        while end < len(rewards) - 1 and not dones[(end, *rest)]:
            end += 1
        after = final_values[(end, *rest)] if dones[(end, *rest)] else last_value[rest]
        total = gamma ** (end + 1 - t) * after
        for k in range(t, end + 1):
            total = total + gamma ** (k - t) * rewards[(k, *rest)]
        found[(t, *rest)] = total
    return found


@pytest.mark.parametrize("shape", [(7,), (7, 3), (5, 2, 3), (1,), (1, 4), (5, 0)])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_and_gradients_are_those_of_the_definition(
    shape, gamma, agrees_with_gradients
):
    rewards, dones, last_value, final_values = steps(*shape)
    agrees_with_gradients(
        lambda r, last, final: discounted_returns(
            r, gamma, dones, last, final_values=final
        ),
        lambda r, last, final: by_definition(r, gamma, dones, last, final),
        rewards,
        last_value,
        final_values,
        against="the sum over each episode",
        atol=1e-12,
    )


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_whole_episodes_have_the_returns_of_torchrl(
    gamma, reference_library, agrees_with_gradients
):
    functional = reference_library("torchrl.objectives.value.functional")
    rewards, dones, _, _ = steps(9, 4)
    dones[-1] = True

    def torchrls(rewards):  # (B, T, 1)
        rewards, ends = rewards.T[..., None], dones.T[..., None]
        return functional.reward2go(rewards, ends, gamma)[..., 0].T

    agrees_with_gradients(
        lambda rewards: discounted_returns(rewards, gamma, dones),
        torchrls,
        rewards,
        against=TORCHRL,
        atol=1e-12,
    )


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_unfinished_episodes_have_the_td_1_returns_of_torchrl(
    gamma, reference_library, agrees
):
    functional = reference_library("torchrl.objectives.value.functional")
    rewards, dones, last_value, final_values = steps(9, 4)
    terminated = dones & (torch.rand(9, 4) < 0.5)
    dones[-1] = True
    final_values[-1] = torch.where(terminated[-1], 0, last_value)
    next_values = final_values.masked_fill(terminated, 0)
    theirs = functional.td1_return_estimate(
        gamma, *(x.T[..., None] for x in (next_values, rewards, dones, terminated))
    )[..., 0].T
    ours = discounted_returns(rewards, gamma, dones, final_values=next_values)
    agrees(ours, theirs, "torchrl's td1_return_estimate", atol=1e-12)


def test_returns_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0])
    assert discounted_returns(rewards, 0.5).tolist() == [1.5, 1.0, 2.0]
    assert discounted_returns(rewards, 0.5, last_value=4.0).tolist() == [2, 2, 4]
    dones = torch.tensor([False, True, False])
    found = discounted_returns(rewards, 0.5, dones, torch.tensor(4.0))
    assert found.tolist() == [1, 0, 4]
    cut = torch.tensor([9.0, 8.0, 9.0])
    found = discounted_returns(rewards, 0.5, dones, 4.0, final_values=cut)
    assert found.tolist() == [3, 4, 4]


def test_nothing_after_the_end_is_read():
    rewards = torch.tensor([1.0, torch.nan])
    dones = torch.tensor([True, True])
    found = discounted_returns(rewards, 0.9, dones, torch.nan)
    assert found[0] == 1 and found[1].isnan()
    final = torch.tensor([torch.nan, 5.0])
    found = discounted_returns(
        torch.ones(2), 0.5, torch.tensor([False, True]), final_values=final
    )
    assert found.tolist() == [2.75, 3.5]


def test_without_steps_there_are_no_returns():
    found = discounted_returns(torch.zeros(0, 3, dtype=torch.bfloat16), 0.9)
    assert found.shape == (0, 3) and found.dtype == torch.float32


def test_halves_and_integers_are_added_in_float32_and_doubles_stay(agrees):
    for dtype in (torch.bfloat16, torch.float16):
        rewards, dones, last_value, final = steps(300, 2, dtype=dtype)
        exact = discounted_returns(
            rewards.double(),
            0.99,
            dones,
            last_value.double(),
            final_values=final.double(),
        )
        ours = discounted_returns(rewards, 0.99, dones, last_value, final_values=final)
        agrees(ours, exact.float(), "the same in float64", atol=1e-5)
        assert discounted_returns(rewards, 0.99).dtype == torch.float32
    found = discounted_returns(torch.tensor([0, 0, 1]), 0.5, last_value=0.5)
    assert found.dtype == torch.float32 and found.tolist() == [0.3125, 0.625, 1.25]
    rewards = torch.zeros(3).double()
    found = discounted_returns(rewards, 1, last_value=0.1)
    assert found.dtype == torch.float64 and (found == 0.1).all()
    found = discounted_returns(
        rewards, 1, last_value=torch.tensor(0.5), final_values=None
    )
    assert found.dtype == torch.float64


def test_returns_of_non_contiguous_rewards_are_contiguous_and_inputs_stay():
    rewards, dones, _, final = steps(4, 7)
    rewards, dones, final = rewards.T, dones.T, final.T
    last_value = torch.randn(4).double()
    before = [x.clone() for x in (rewards, dones, final)]
    found = discounted_returns(rewards, 0.9, dones, last_value, final_values=final)
    assert found.is_contiguous()
    copies = [x.contiguous() for x in (rewards, dones, final)]
    expected = discounted_returns(
        copies[0], 0.9, copies[1], last_value, final_values=copies[2]
    )
    assert torch.equal(found, expected)
    assert all(map(torch.equal, before, (rewards, dones, final)))


def test_returns_are_made_where_the_rewards_are():
    rewards = torch.zeros(3, 2, device="meta")
    assert discounted_returns(rewards, 0.9, last_value=1.0).is_meta


def test_returns_compile_to_one_graph(compiles):
    calls = [(torch.randn(T, 2), 0.9, torch.rand(T, 2) < 0.3) for T in (4, 3)]
    compiles(discounted_returns, *calls)


# --- the loss -------------------------------------------------------------------------


def bandit():
    """Preferences of five arms and what each of them pays."""
    return torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


def test_the_loss_and_its_gradient_are_the_closed_form(agrees_with_gradients):
    theta, _ = bandit()
    actions = torch.randint(5, (8, 3))
    returns, baseline = torch.randn(2, 8, 3, dtype=torch.float64)

    def ours(theta):
        log_probs = theta.log_softmax(dim=-1)[actions]
        return reinforce_loss(log_probs, returns, baseline)

    class ByHand(torch.autograd.Function):
        """d loss / d theta = -mean (G - b) (onehot(a) - pi)"""

        @staticmethod
        def forward(theta):
            chosen = (theta - theta.exp().sum().log())[actions]
            return -((returns - baseline) * chosen).sum() / 24

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, arriving):
            (theta,) = ctx.saved_tensors
            pi = theta.exp() / theta.exp().sum()
            score = torch.eye(5, dtype=torch.float64)[actions] - pi
            weight = (returns - baseline)[..., None]
            return -arriving * (weight * score).sum(dim=(0, 1)) / 24

    agrees_with_gradients(ours, ByHand.apply, theta, against="by hand", atol=1e-12)


def test_it_is_the_weighted_cross_entropy_of_torch(agrees_with_gradients):
    actions, weight = torch.randint(5, (9,)), torch.randn(9, dtype=torch.float64)

    def torchs(logits):
        losses = torch.nn.functional.cross_entropy(logits, actions, reduction="none")
        return losses @ weight / 9

    def ours(logits):
        chosen = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        return reinforce_loss(chosen, weight)

    agrees_with_gradients(
        ours,
        torchs,
        torch.randn(9, 5, dtype=torch.float64),
        against="F.cross_entropy",
        atol=1e-12,
    )


@pytest.mark.parametrize("b", [None, 0.7, 30.0])
def test_the_mean_over_all_draws_is_the_exact_gradient_with_any_baseline(b, agrees):
    theta, pays = bandit()
    theta.requires_grad_()
    (exact,) = torch.autograd.grad(theta.softmax(-1) @ pays, theta)
    pi = theta.softmax(-1).detach()
    mean = torch.zeros_like(pi)
    for action in range(5):
        loss = reinforce_loss(
            theta.log_softmax(-1)[action : action + 1],
            pays[action : action + 1],
            None if b is None else torch.full((1,), b, dtype=torch.float64),
        )
        mean -= pi[action] * torch.autograd.grad(loss, theta)[0]
    agrees(mean, exact, "the exact gradient", atol=1e-12)


def test_in_an_mdp_the_mean_over_all_episodes_is_the_gradient_of_the_value(agrees):
    # Two states, two actions, three steps: all 64 episodes from state 0
    p = torch.randn(2, 2, 2, dtype=torch.float64).softmax(-1)
    r = torch.randn(2, 2, dtype=torch.float64)
    theta = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    log_pi = theta.log_softmax(-1)

    value = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        value = (log_pi.exp() * (r + 0.9 * p @ value)).sum(dim=1)
    (exact,) = torch.autograd.grad(value[0], theta, retain_graph=True)

    mean = torch.zeros_like(theta)
    for actions in itertools.product(range(2), repeat=3):
        for places in itertools.product(range(2), repeat=2):
            states = [0, *places]
            chance = 1.0
            for t, (s, a) in enumerate(zip(states, actions, strict=True)):
                chance *= log_pi[s, a].exp().item()
                chance *= p[s, a, states[t + 1]].item() if t < 2 else 1
            returns = discounted_returns(r[states, actions], 0.9)
            # The discount from the start: dropped in practice, needed to be exact
            returns = returns * 0.9 ** torch.arange(3).double()
            loss = reinforce_loss(log_pi[states, actions], returns)
            (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            mean -= 3 * chance * grad
    agrees(mean, exact, "the gradient of V", atol=1e-12)


def test_neither_returns_nor_baseline_get_a_gradient():
    log_probs, returns, baseline = (
        torch.randn(4, requires_grad=True) for _ in range(3)
    )
    reinforce_loss(log_probs, returns, baseline).backward()
    assert returns.grad is None and baseline.grad is None
    torch.testing.assert_close(log_probs.grad, -(returns - baseline).detach() / 4)


def test_a_baseline_of_zero_is_none():
    log_probs, returns = torch.randn(2, 6)
    assert torch.equal(
        reinforce_loss(log_probs, returns),
        reinforce_loss(log_probs, returns, torch.zeros(6)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_halves_is_computed_in_float32(dtype, agrees):
    log_probs, returns, baseline = torch.randn(3, 1000, dtype=dtype)
    exact = reinforce_loss(log_probs.double(), returns.double(), baseline.double())
    assert exact.dtype == torch.float64
    ours = reinforce_loss(log_probs, returns, baseline)
    agrees(ours, exact.float(), "the same in float64", atol=1e-6)
    with torch.autocast("cpu", dtype):
        found = reinforce_loss(log_probs.float(), returns, baseline)
    assert torch.equal(found, ours)


def test_the_loss_takes_non_contiguous_inputs():
    log_probs, returns = torch.randn(2, 4, 6).transpose(1, 2)
    torch.testing.assert_close(
        reinforce_loss(log_probs, returns), -(log_probs * returns).sum() / 24
    )


def test_the_loss_compiles_to_one_graph(compiles):
    compiles(
        reinforce_loss,
        *[(torch.randn(n), torch.randn(n), torch.randn(n)) for n in (5, 3)],
    )


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma, refuses):
    with refuses(ValueError, f"gamma must be in [0, 1], got {gamma}"):
        discounted_returns(torch.zeros(3), gamma)


def test_returns_refuse_what_does_not_fit(refuses):
    rewards, dones, last, final = steps(5, 2)
    with refuses(ValueError, "rewards must be (T, ...), got a single number"):
        discounted_returns(torch.tensor(1.0), 0.9)
    with refuses(ValueError, "dones must be (5, 2), got (5, 1)"):
        discounted_returns(rewards, 0.9, dones[:, :1])
    with refuses(ValueError, "last_value must be (2,), got (2, 1)"):
        discounted_returns(rewards, 0.9, dones, last[:, None])
    with refuses(ValueError, "last_value must be (2,), got ()"):
        discounted_returns(rewards, 0.9, dones, last[0])
    with refuses(ValueError, "final_values must be (5, 2), got (5,)"):
        discounted_returns(rewards, 0.9, dones, final_values=final[:, 0])
    with refuses(ValueError, "final_values must come with dones, got it alone"):
        discounted_returns(rewards, 0.9, final_values=final)
    with refuses(TypeError, "dones must be bool, got torch.float64"):
        discounted_returns(rewards, 0.9, dones.double())


def test_the_loss_refuses_what_does_not_fit(refuses):
    log_probs = torch.randn(3)
    column = torch.randn(3, 1)
    with refuses(ValueError, "returns must be (3,) as log_probs, got (3, 1)"):
        reinforce_loss(log_probs, column)
    with refuses(ValueError, "baseline must be (3,) as log_probs, got (3, 1)"):
        reinforce_loss(log_probs, log_probs, column)
    with refuses(ValueError, "log_probs must hold one step at least, got none"):
        reinforce_loss(log_probs[:0], log_probs[:0])
