"""Values of small MDPs against power series, enumeration and a linear program."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from snippets.rl.q_function import (
    policy_evaluation,
    q_learning_update,
    value_iteration,
)


def random_mdp(S=4, A=3, dtype=torch.float64):
    """Transitions (S, A, S), rewards (S, A) and a policy (S, A)."""
    transitions = torch.randn(S, A, S, dtype=dtype).softmax(dim=-1)
    policy = torch.randn(S, A, dtype=dtype).softmax(dim=-1)
    return transitions, torch.randn(S, A, dtype=dtype), policy


def corridor():
    """Three cells, left and right; stepping right from the second earns 1 and ends."""
    left, right, stay = F.one_hot(torch.tensor([0, 1, 2])).double().roll(0, 1)
    transitions = torch.stack(
        [
            torch.stack([left, right]),
            torch.stack([left, stay]),
            torch.stack([stay, stay]),
        ]
    )
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double()
    return transitions, rewards


def by_power_series(transitions, rewards, policy, gamma):
    """Adds up what each of the next steps brings, far beyond what counts."""
    occupied = torch.eye(len(rewards), dtype=rewards.dtype)
    step = torch.einsum("sa,sat->st", policy, transitions)
    reward = torch.einsum("sa,sa->s", policy, rewards)
    v = torch.zeros_like(reward)
    for k in range(600):
        v = v + gamma**k * (occupied @ reward)
        occupied = occupied @ step
    return v, rewards + gamma * torch.einsum("sat,t->sa", transitions, v)


@pytest.mark.parametrize(("S", "A"), [(4, 3), (1, 1), (1, 3), (5, 1), (2, 4)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.93])
def test_a_policys_values_and_gradients_are_those_of_the_power_series(
    S, A, gamma, agrees_with_gradients
):
    def of_logits(evaluate):
        def values(p, r, pi):
            return evaluate(p.softmax(dim=-1), r, pi.softmax(dim=-1), gamma)

        return values

    agrees_with_gradients(
        of_logits(policy_evaluation),
        of_logits(by_power_series),
        torch.randn(S, A, S).double(),
        torch.randn(S, A).double(),
        torch.randn(S, A).double(),
        against="the sum of 600 discounted steps",
        atol=1e-9,
    )


def test_gradients_are_those_of_finite_differences():
    def values(p, r, pi):
        return policy_evaluation(p.softmax(dim=-1), r, pi.softmax(dim=-1), 0.8)

    shapes = (3, 2, 3), (3, 2), (3, 2)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(values, inputs)

    def best(r):
        return value_iteration(inputs[0].softmax(dim=-1).detach(), r, 0.5, tol=1e-12)

    assert torch.autograd.gradcheck(best, inputs[1])


def test_the_corridor_by_hand():
    transitions, rewards = corridor()
    v, q = value_iteration(transitions, rewards, gamma=0.5)
    assert v.tolist() == [0.5, 1.0, 0.0]
    assert q.tolist() == [[0.25, 0.5], [0.25, 1.0], [0.0, 0.0]]
    always_right = torch.tensor([0.0, 1.0]).double().expand(3, 2)
    v, q = policy_evaluation(transitions, rewards, always_right, gamma=0.5)
    torch.testing.assert_close(v, torch.tensor([0.5, 1.0, 0.0]).double())
    half = torch.full((3, 2), 0.5).double()
    v, q = policy_evaluation(transitions, rewards, half, gamma=0.5)
    # v0 = (v0 + v1) / 4 and v1 = v0 / 4 + 1/2
    torch.testing.assert_close(v, torch.tensor([2 / 11, 6 / 11, 0]).double())
    torch.testing.assert_close(q[1], torch.tensor([1 / 11, 1.0]).double())


@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.95])
def test_v_is_the_mean_of_q_and_q_is_the_reward_and_what_v_promises(gamma):
    p, r, pi = random_mdp()
    v, q = policy_evaluation(p, r, pi, gamma)
    torch.testing.assert_close((pi * q).sum(dim=1), v, atol=1e-12, rtol=0)
    torch.testing.assert_close(r + gamma * p @ v, q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.95])
def test_the_optimum_is_the_best_of_all_deterministic_policies(gamma, agrees):
    p, r, _ = random_mdp()
    found = []
    for actions in itertools.product(range(3), repeat=4):
        pi = F.one_hot(torch.tensor(actions), 3).double()
        found.append(torch.cat([x.flatten() for x in by_power_series(p, r, pi, gamma)]))
    best = torch.stack(found).amax(dim=0)
    v, q = value_iteration(p, r, gamma)
    against = "the best of all 81 policies"
    agrees(torch.cat([v, q.flatten()]), best, against, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_the_optimum_is_that_of_the_linear_program(gamma, reference_library, agrees):
    linprog = reference_library("scipy.optimize").linprog
    p, r, _ = random_mdp(6, 3)
    # The least V with V >= R + gamma P V
    above = (gamma * p - torch.eye(6).double()[:, None]).flatten(0, 1)
    solved = linprog([1] * 6, above.numpy(), -r.flatten().numpy(), bounds=(None, None))
    v, _ = value_iteration(p, r, gamma)
    agrees(v, torch.tensor(solved.x), "scipy.optimize.linprog", atol=1e-8)


def test_gradients_of_the_optimum_are_those_of_its_greedy_policy(agrees_with_gradients):
    p, r, _ = random_mdp()
    greedy = F.one_hot(value_iteration(p, r, 0.8)[1].argmax(dim=1), 3).double()
    agrees_with_gradients(
        lambda p, r: value_iteration(p, r, 0.8),
        lambda p, r: by_power_series(p, r, greedy, 0.8),
        p,
        r,
        against="the power series of the greedy policy",
        atol=1e-8,
    )


@pytest.mark.parametrize("tol", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_it_is_as_exact_as_asked_for_and_no_sweep_longer(gamma, tol):
    # One state that pays 1 for ever: the error after n sweeps is gamma**n / (1 - gamma)
    p, r = torch.ones(1, 1, 1).double(), torch.ones(1, 1).double()
    error = 1 / (1 - gamma) - value_iteration(p, r, gamma, tol)[0].item()
    assert error <= tol * (1 + 1e-6)
    sweeps = 1
    while gamma**sweeps / (1 - gamma) > tol:
        sweeps += 1
    assert error == pytest.approx(gamma**sweeps / (1 - gamma), rel=1e-6)


def test_rewards_of_zero_need_no_sweep_and_values_are_zero():
    p, r, _ = random_mdp()
    v, q = value_iteration(p, 0 * r, 0.9)
    assert (v == 0).all() and (q == 0).all()


def test_it_ends_where_float32_can_not_be_as_exact_as_asked_for(agrees):
    p, r, _ = random_mdp()
    found = value_iteration(p.float(), r.float(), 0.99, tol=1e-30)
    for ours, exact in zip(found, value_iteration(p, r, 0.99), strict=True):
        assert ours.dtype == torch.float32
        # Rounding 2**-24 of values up to 100, added up over 1 / (1 - gamma) steps
        agrees(ours, exact.float(), "itself in float64", atol=2e-3)


def test_acting_greedily_on_q_is_never_worse_than_the_policy():
    for _ in range(5):
        p, r, pi = random_mdp()
        v, q = policy_evaluation(p, r, pi, 0.9)
        greedy = F.one_hot(q.argmax(dim=1), 3).double()
        better, _ = policy_evaluation(p, r, greedy, 0.9)
        assert (better >= v - 1e-12).all() and (better > v).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, agrees):
    p, r, pi = (x.to(dtype) for x in random_mdp())
    evaluated = by_power_series(p.double(), r.double(), pi.double(), 0.5)
    best = r.double()
    for _ in range(60):
        best = r.double() + 0.5 * p.double() @ best.amax(dim=1)
    for ours, reference in zip(
        (*policy_evaluation(p, r, pi, 0.5), *value_iteration(p, r, 0.5)),
        (*evaluated, best.amax(dim=1), best),
        strict=True,
    ):
        agrees(ours, reference.float(), "the same in float64", atol=1e-5)


def test_the_widest_of_the_dtypes_is_kept():
    p, r, pi = random_mdp()
    for model in ((p, r.float()), (p.float(), r)):
        for policy in (pi, pi.float()):
            found = (
                *policy_evaluation(*model, policy, 0.5),
                *value_iteration(*model, 0.5),
            )
            assert {x.dtype for x in found} == {torch.float64}


def test_integers_are_taken_for_the_numbers_they_are():
    p, r = corridor()
    v, q = value_iteration(p.long(), r.long(), 0.5)
    assert v.dtype == q.dtype == torch.float32 and v.tolist() == [0.5, 1.0, 0.0]
    pi = torch.tensor([[0, 1], [0, 1], [1, 0]])
    v, _ = policy_evaluation(p.long(), r.long(), pi, 0.5)
    torch.testing.assert_close(v, torch.tensor([0.5, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing(dtype):
    p, r, pi = (x.float() for x in random_mdp())
    expected = *policy_evaluation(p, r, pi, 0.9), *value_iteration(p, r, 0.9)
    with torch.autocast("cpu", dtype):
        found = *policy_evaluation(p, r, pi, 0.9), *value_iteration(p, r, 0.9)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_non_contiguous_inputs_work_and_results_are_contiguous():
    p, r, pi = random_mdp(4, 4)
    p, r, pi = p.permute(1, 0, 2), r.T, pi.expand(2, 4, 4)[0].T.contiguous().T
    for ours, copied in (
        (policy_evaluation(p, r, pi, 0.9), (p.contiguous(), r.contiguous(), pi)),
        (value_iteration(p, r, 0.9), None),
    ):
        assert all(x.is_contiguous() for x in ours)
        if copied:
            expected = policy_evaluation(*copied, 0.9)
            for x, y in zip(ours, expected, strict=True):
                assert torch.equal(x, y)


def test_it_runs_where_its_inputs_are():
    # Nothing may be made on another device: meta has no values, but refuses a mixture.
    q = torch.zeros(4, 3, device="meta")
    assert q_learning_update(q, 0, 1, 1.0, 2, False, 0.5, 0.9).device.type == "meta"


def test_an_update_goes_a_share_of_the_way(reference_library, agrees):
    functional = reference_library("torchrl.objectives.value.functional")
    q = torch.randn(4, 3).double()
    for terminated in (False, True):
        # 0.75: torchrl rounds gamma to float32
        new = q_learning_update(q, 2, 1, -0.7, 3, terminated, lr=0.3, gamma=0.75)
        target = functional.td0_return_estimate(
            0.75,
            q[3].max().view(1, 1),
            torch.tensor([[-0.7]], dtype=torch.float64),
            torch.tensor([[terminated]]),
        )
        agrees(new[2, 1], q[2, 1].lerp(target[0, 0], 0.3), "torchrl's td0", atol=1e-12)


def test_an_update_by_hand():
    q = torch.tensor([[0.0, 4.0], [10.0, 20.0]])
    assert q_learning_update(q, 0, 1, 1.0, 1, False, 0.5, 0.5)[0, 1] == 7.5
    assert q_learning_update(q, 0, 1, 1.0, 1, True, 0.5, 0.5)[0, 1] == 2.5
    assert q_learning_update(q, 0, 1, 1.0, 1, False, 1, 0)[0, 1] == 1.0


def test_an_update_changes_one_entry_of_a_new_table():
    q = torch.randn(4, 3)
    before = q.clone()
    new = q_learning_update(q, 2, 1, 5.0, 3, False, 0.3, 0.9)
    assert torch.equal(q, before)
    assert (new != q).nonzero().tolist() == [[2, 1]]


def test_what_follows_the_end_is_not_read():
    q = torch.zeros(2, 2)
    q[1] = torch.nan
    assert q_learning_update(q, 0, 0, 3.0, 1, True, 1.0, 0.9)[0, 0] == 3


def test_updates_with_ever_smaller_steps_reach_the_optimum():
    transitions, rewards = corridor()
    best = value_iteration(transitions, rewards, 0.5)[1]
    q = torch.zeros(3, 2).double()
    generator = torch.Generator().manual_seed(0)
    visits = torch.zeros(3, 2)
    for _ in range(1000):
        state, action = (int(torch.randint(n, (), generator=generator)) for n in (2, 2))
        visits[state, action] += 1
        next_state = int(transitions[state, action].argmax())
        q = q_learning_update(
            q,
            state,
            action,
            rewards[state, action].item(),
            next_state,
            next_state == 2,
            visits[state, action].item() ** -0.6,
            0.5,
        )
    torch.testing.assert_close(q, best, atol=1e-3, rtol=0)


def test_on_average_an_update_is_the_bellman_optimality_equation():
    p, r, _ = random_mdp()
    q = torch.randn(4, 3).double()
    mean = sum(
        p[1, 2, n] * q_learning_update(q, 1, 2, r[1, 2], n, False, 1.0, 0.9)
        for n in range(4)
    )
    expected = r[1, 2] + 0.9 * (p[1, 2] * q.amax(dim=1)).sum()
    torch.testing.assert_close(mean[1, 2], expected)


def test_the_bootstrapped_target_carries_a_gradient():
    q = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def update(q):
        return q_learning_update(q, 0, 1, 1.0, 2, False, 0.3, 0.9)

    assert torch.autograd.gradcheck(update, q)


def test_an_update_compiles_to_one_graph(compiles):
    calls = [(torch.randn(S, 3), 1, 2, 0.5, 0, False, 0.1, 0.9) for S in (4, 6)]
    compiles(q_learning_update, *calls)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma, refuses):
    p, r, pi = random_mdp()
    message = f"gamma must be in [0, 1), got {gamma}"
    with refuses(ValueError, message):
        policy_evaluation(p, r, pi, gamma)
    with refuses(ValueError, message):
        value_iteration(p, r, gamma)
    with refuses(ValueError, message):
        q_learning_update(r, 0, 0, 1.0, 1, False, 0.1, gamma)


@pytest.mark.parametrize(
    "rewards",
    [
        torch.zeros(4),
        torch.zeros(4, 3, 1),
        torch.zeros(0, 3),
        torch.zeros(4, 0),
        torch.tensor([[1.0, torch.inf]]),
        torch.tensor([[1.0, torch.nan]]),
    ],
)
def test_rewards_that_are_no_finite_matrix_are_refused(rewards, refuses):
    p, _, pi = random_mdp()
    with refuses(ValueError, f"rewards must be finite and (S, A), got {rewards}"):
        value_iteration(p, rewards, 0.9)
    with refuses(ValueError, f"rewards must be finite and (S, A), got {rewards}"):
        policy_evaluation(p, rewards, pi, 0.9)


def test_shapes_that_do_not_fit_are_refused(refuses):
    p, r, pi = random_mdp()
    for wrong in (p[:3], p[..., :3], p[0], p[:, :2]):
        message = f"transitions must be (4, 3, 4), got {tuple(wrong.shape)}"
        with refuses(ValueError, message):
            policy_evaluation(wrong, r, pi, 0.9)
        with refuses(ValueError, message):
            value_iteration(wrong, r, 0.9)
    for wrong in (pi[0], pi[:3], pi[:, :2], pi[None]):
        with refuses(ValueError, f"policy must be (4, 3), got {tuple(wrong.shape)}"):
            policy_evaluation(p, r, wrong, 0.9)


def test_rows_that_are_no_probabilities_are_refused(refuses):
    p, r, pi = random_mdp()
    more, less, negative, nan, slightly = (p.clone() for _ in range(5))
    more[1, 1] *= 1.01
    less[1, 1] *= 0.99
    negative[2, 0, :2] += torch.tensor([2.0, -2.0])
    nan[3, 2, 1] = torch.nan
    slightly[1, 1] *= 1 + 1e-7
    for wrong in (more, less, negative, nan, slightly):
        message = f"transitions must be >= 0, its rows sum to 1, got {wrong}"
        with refuses(ValueError, message):
            value_iteration(wrong, r, 0.9)
        with refuses(ValueError, message):
            policy_evaluation(wrong, r, pi, 0.9)
        wrong = wrong[:, :, :3]
        with refuses(
            ValueError, f"policy must be >= 0, its rows sum to 1, got {wrong[1]}"
        ):
            policy_evaluation(p[:3, :, :3].softmax(dim=-1), r[:3], wrong[1], 0.9)


def test_integers_must_sum_to_one_exactly_and_a_zero_is_no_negative_number(refuses):
    p, r = corridor()
    value_iteration(p.long(), r, 0.9)
    with refuses(
        ValueError, f"transitions must be >= 0, its rows sum to 1, got {2 * p.long()}"
    ):
        value_iteration(2 * p.long(), r, 0.9)


@pytest.mark.parametrize("tol", [0, -1e-3, float("nan")])
def test_a_tolerance_has_to_be_positive(tol, refuses):
    p, r, _ = random_mdp()
    with refuses(ValueError, f"tol must be positive, got {tol}"):
        value_iteration(p, r, 0.9, tol)


@pytest.mark.parametrize("lr", [0, 1.1, -0.5, float("nan")])
def test_a_learning_rate_outside_its_range_is_refused(lr, refuses):
    with refuses(ValueError, f"lr must be in (0, 1], got {lr}"):
        q_learning_update(torch.zeros(3, 2), 0, 0, 1.0, 1, False, lr, 0.9)


@pytest.mark.parametrize("at", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_indices_are_refused(at, refuses):
    message = f"state, action and next_state must be >= 0, got {at}"
    with refuses(ValueError, message):
        q_learning_update(torch.zeros(3, 2), *at[:2], 1.0, at[2], False, 0.1, 0.9)
