"""Advantages against torchrl's, and against the two estimates that they lie between."""

import itertools

import pytest
import torch

from snippets.rl.advantage import generalized_advantage_estimate

TORCHRL = "torchrl's generalized_advantage_estimate"


def steps(*shape, dtype=torch.float64):
    """Rewards, values, dones, last values and final values, time first."""
    rewards, values, final_values = torch.randn(3, *shape, dtype=dtype)
    dones = torch.rand(shape) < 0.3
    return rewards, values, dones, torch.randn(shape[1:], dtype=dtype), final_values


def by_definition(rewards, values, dones, last_value, gamma, lam, final_values):
    """For each step the sum of the surprises up to the end of its episode."""
    T = len(rewards)
    following = torch.cat([values[1:], last_value[None]])
    following = torch.where(dones, final_values, following)
    deltas = rewards + gamma * following - values
    found = 0 * rewards
    for t, *rest in itertools.product(*map(range, rewards.shape)):
        rest, total = tuple(rest), 0.0
        for k in range(t, T):
            total = total + (gamma * lam) ** (k - t) * deltas[(k, *rest)]
            if dones[(k, *rest)]:
                break
        found[(t, *rest)] = total
    return found, found + values


@pytest.mark.parametrize("shape", [(7,), (7, 3), (4, 2, 3), (1,), (1, 4), (5, 0)])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1, 1), (0.9, 0), (0, 0.9)])
def test_values_and_gradients_are_those_of_the_definition(
    shape, gamma, lam, agrees_with_gradients
):
    rewards, values, dones, last_value, final_values = steps(*shape)
    agrees_with_gradients(
        lambda r, v, last, final: generalized_advantage_estimate(
            r, v, dones, last, gamma, lam, final_values=final
        ),
        lambda r, v, last, final: by_definition(r, v, dones, last, gamma, lam, final),
        rewards,
        values,
        last_value,
        final_values,
        against="the sum over each episode",
        atol=1e-12,
    )


@pytest.mark.parametrize("function", ["", "vec_"])
@pytest.mark.parametrize(("gamma", "lam"), [(0.96875, 0.9375), (0.75, 0.5), (1, 1)])
def test_values_and_gradients_are_those_of_torchrl(
    gamma, lam, function, reference_library, agrees_with_gradients
):
    functional = reference_library("torchrl.objectives.value.functional")
    estimate = getattr(functional, f"{function}generalized_advantage_estimate")
    rewards, values, dones, last_value, final_values = steps(12, 3)
    terminated = dones & (torch.rand(12, 3) < 0.5)  # the others: cut off
    # gamma and lam are short in binary: torchrl rounds them to float32.

    def torchrls(rewards, values, last_value, final_values):
        following = torch.cat([values[1:], last_value[None]])
        following = torch.where(dones, final_values, following)
        inputs = values, following, rewards, dones, terminated
        found = estimate(gamma, lam, *(x.T[..., None] for x in inputs))  # (B, T, 1)
        return tuple(x[..., 0].T for x in found)

    agrees_with_gradients(
        lambda rewards, values, last, final: generalized_advantage_estimate(
            rewards,
            values,
            dones,
            last,
            gamma,
            lam,
            final_values=final.masked_fill(terminated, 0),
        ),
        torchrls,
        rewards,
        values,
        last_value,
        final_values,
        against=TORCHRL,
        atol=1e-10,
    )


def test_gradients_are_those_of_finite_differences():
    rewards, values, dones, last_value, final_values = steps(4, 2)
    inputs = [x.requires_grad_() for x in (rewards, values, last_value, final_values)]

    def estimate(rewards, values, last_value, final_values):
        return generalized_advantage_estimate(
            rewards, values, dones, last_value, final_values=final_values
        )

    assert torch.autograd.gradcheck(estimate, inputs)


def test_three_steps_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0])
    values = torch.tensor([2.0, 4.0, 1.0])
    dones = torch.tensor([False, False, True])
    advantages, returns = generalized_advantage_estimate(
        rewards, values, dones, 8.0, gamma=0.5, lam=0.5
    )
    # surprises: 1 + 2 - 2, 0 + 0.5 - 4, 2 - 1
    assert advantages.tolist() == [1 + 0.25 * -3.25, -3.5 + 0.25, 1]
    assert returns.tolist() == [2.1875, 0.75, 2]
    advantages, _ = generalized_advantage_estimate(
        rewards, values, torch.zeros(3).bool(), 8.0, gamma=0.5, lam=0.5
    )
    assert advantages[2] == 5
    advantages, _ = generalized_advantage_estimate(
        rewards, values, dones, 8.0, gamma=0.5, lam=0.5, final_values=4 * torch.ones(3)
    )
    assert advantages[2] == 3


def test_lambda_1_is_the_return_less_the_value_whatever_the_values_are():
    rewards, values, dones, _, _ = steps(9, 2)
    dones[-1] = True
    _, returns = generalized_advantage_estimate(rewards, values, dones, 0.0, 0.9, 1.0)
    other = generalized_advantage_estimate(rewards, 0 * values, dones, 0.0, 0.9, 1.0)
    torch.testing.assert_close(returns, other[0], atol=1e-12, rtol=0)


def test_lambda_0_looks_one_step_ahead():
    rewards, values, dones, last_value, _ = steps(9, 2)
    advantages, _ = generalized_advantage_estimate(
        rewards, values, dones, last_value, 0.9, 0.0
    )
    following = torch.cat([values[1:], last_value[None]]) * ~dones
    torch.testing.assert_close(
        advantages, rewards + 0.9 * following - values, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_exact_values_of_a_deterministic_chain_are_never_surprised(lam):
    rewards = torch.randn(6).double()
    values = torch.zeros(6).double()
    following = 0.0
    for t in reversed(range(6)):
        values[t] = following = rewards[t] + 0.9 * following
    dones = torch.arange(6) == 5
    advantages, returns = generalized_advantage_estimate(
        rewards, values, dones, 0.0, 0.9, lam
    )
    torch.testing.assert_close(advantages, 0 * values, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, values, atol=1e-12, rtol=0)


def test_episodes_do_not_see_each_other():
    rewards, values, _, _, _ = steps(8)
    dones = torch.arange(8) == 4
    before, _ = generalized_advantage_estimate(rewards, values, dones, 1.0)
    rewards[5:], values[5:] = torch.nan, torch.nan
    after, _ = generalized_advantage_estimate(rewards, values, dones, torch.nan)
    assert torch.equal(before[:5], after[:5])
    assert after[5:].isnan().all()


def test_final_values_are_read_only_where_an_episode_ends():
    rewards, values, _, last_value, final_values = steps(6)
    dones = torch.arange(6) == 2
    final_values[~dones] = torch.nan
    advantages, _ = generalized_advantage_estimate(
        rewards, values, dones, last_value, final_values=final_values
    )
    assert advantages.isfinite().all()


def test_a_value_added_to_the_last_reward_is_a_final_value():
    rewards, values, dones, last_value, final_values = steps(8, 3)
    ours = generalized_advantage_estimate(
        rewards, values, dones, last_value, 0.9, final_values=final_values
    )
    raised = rewards + 0.9 * final_values * dones
    again = generalized_advantage_estimate(raised, values, dones, last_value, 0.9)
    torch.testing.assert_close(ours, again, atol=1e-12, rtol=0)


def test_the_defaults_are_099_and_095():
    inputs = steps(8, 3)[:4]
    assert torch.equal(
        generalized_advantage_estimate(*inputs)[0],
        generalized_advantage_estimate(*inputs, 0.99, 0.95)[0],
    )


def test_without_steps_there_are_no_advantages():
    empty = torch.zeros(0, 3, dtype=torch.bfloat16)
    advantages, returns = generalized_advantage_estimate(
        empty, empty, empty.bool(), torch.zeros(3)
    )
    assert advantages.shape == returns.shape == (0, 3)
    assert advantages.dtype == returns.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_in_float32(dtype, agrees):
    inputs = rewards, values, dones, last_value, final = steps(200, 2, dtype=dtype)
    found = generalized_advantage_estimate(*inputs[:4], final_values=final)
    exact = generalized_advantage_estimate(
        rewards.double(),
        values.double(),
        dones,
        last_value.double(),
        final_values=final.double(),
    )
    for ours, reference in zip(found, exact, strict=True):
        agrees(ours, reference.float(), "the same in float64", atol=1e-5)
    with torch.autocast("cpu", dtype):
        again = generalized_advantage_estimate(*inputs[:4], final_values=final)
    assert all(map(torch.equal, found, again))


def test_the_wider_dtype_is_kept():
    rewards, values, dones, _, _ = steps(5)
    for r, v in ((rewards.float(), values), (rewards, values.float())):
        found = generalized_advantage_estimate(r, v, dones, torch.tensor(1.0))
        assert {x.dtype for x in found} == {torch.float64}
    found = generalized_advantage_estimate(
        torch.ones(5).long(), values.half(), dones, 0
    )
    assert {x.dtype for x in found} == {torch.float32}
    _, returns = generalized_advantage_estimate(
        torch.zeros(1).long(), torch.zeros(1).double(), dones[:1] & False, 0.1, 1.0
    )
    assert returns.item() == 0.1


def test_non_contiguous_inputs_work_and_results_are_contiguous():
    rewards, values, dones, _, final = steps(3, 7)
    rewards, values, dones, final = rewards.T, values.T, dones.T, final.T
    last_value = torch.randn(3).double()
    inputs = rewards, values, dones
    before = [x.clone() for x in inputs]
    found = generalized_advantage_estimate(*inputs, last_value, final_values=final)
    expected = generalized_advantage_estimate(
        *(x.contiguous() for x in inputs), last_value, final_values=final.contiguous()
    )
    assert all(map(torch.equal, found, expected))
    assert all(x.is_contiguous() for x in found)
    assert all(map(torch.equal, before, inputs))


def test_it_runs_where_its_inputs_are():
    rewards, values = torch.zeros(2, 3, 2, device="meta")
    found = generalized_advantage_estimate(rewards, values, rewards.bool(), 1.0)
    assert all(x.is_meta for x in found)


def test_it_compiles_to_one_graph(compiles):
    compiles(
        generalized_advantage_estimate,
        *[steps(T, 2, dtype=torch.float32)[:4] for T in (4, 3)],
    )


@pytest.mark.parametrize("number", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_numbers_outside_their_range_are_refused(name, number, refuses):
    with refuses(ValueError, f"{name} must be in [0, 1], got {number}"):
        generalized_advantage_estimate(*steps(5)[:4], **{name: number})


def test_what_does_not_fit_is_refused(refuses):
    rewards, values, dones, last, final = steps(5, 2)
    estimate = generalized_advantage_estimate
    one = torch.tensor(1.0)
    with refuses(ValueError, "rewards must be (T, ...), got a single number"):
        estimate(one, one, one.bool(), 0.0)
    with refuses(ValueError, "values must be (5, 2), got (5, 2, 1)"):
        estimate(rewards, values[..., None], dones, last)
    with refuses(ValueError, "values must be (5, 2), got (6, 2)"):
        estimate(rewards, torch.cat([values, last[None]]), dones, last)
    with refuses(ValueError, "dones must be (5, 2), got (5,)"):
        estimate(rewards, values, dones[:, 0], last)
    with refuses(ValueError, "last_value must be (2,), got ()"):
        estimate(rewards, values, dones, last[0])
    with refuses(ValueError, "final_values must be (5, 2), got (2,)"):
        estimate(rewards, values, dones, last, final_values=final[0])
    with refuses(TypeError, "dones must be bool, got torch.int64"):
        estimate(rewards, values, dones.long(), last)
