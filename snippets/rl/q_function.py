"""The Q function (Sutton and Barto, 2018, chapters 3 and 4; Watkins, 1989).

Q(s, a) is the expected return, the discounted sum of all rewards to come, of action a
in state s under a policy. Known dynamics give it exactly; Q-learning takes samples.
"""

import math

import torch
from torch import Tensor


def policy_evaluation(
    transitions: Tensor, rewards: Tensor, policy: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Solves the Bellman equation of a policy, which is linear in V.

    Args:
        transitions: (S, A, S), the probability of each next state. A terminal state
            leads to itself with reward 0.
        rewards: (S, A), the expected reward of an action.
        policy: (S, A), the probability of each action.
        gamma: discount per step.

    Returns:
        V (S,) and Q (S, A) of the policy, in float32 or better.

    Raises:
        ValueError: shapes do not fit, gamma is outside [0, 1), rows of transitions or
            policy are no probabilities, or a reward is not finite.

    Source:
        Sutton and Barto, 2018, "Reinforcement Learning", eq. 3.14.
    """
    p, r = _model(transitions, rewards, gamma)
    policy = _probabilities("policy", policy, tuple(r.shape)).to(r.dtype)
    step = (policy[..., None] * p).sum(dim=1)  # (S, S), where a step leads
    identity = torch.ones_like(r[:, 0]).diag()
    v = torch.linalg.solve(identity - gamma * step, (policy * r).sum(dim=1))  # (S,)
    return v, r + gamma * (p * v).sum(dim=-1)  # autocast would round p @ v


def value_iteration(
    transitions: Tensor, rewards: Tensor, gamma: float, tol: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Repeats Q <- R + gamma P max_a Q, from 0, until it is the best policy's.

    Args:
        transitions, rewards, gamma: as in policy_evaluation.
        tol: how far a value may be from the optimum, rounding aside.

    Returns:
        V (S,) and Q (S, A) of the best policy, in float32 or better.

    Raises:
        ValueError: as in policy_evaluation, or tol is not positive.

    Source:
        Sutton and Barto, 2018, "Reinforcement Learning", eq. 4.10.
    """
    p, r = _model(transitions, rewards, gamma)
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    q = r  # (S, A), after the first sweep
    # No return is above max |R| / (1 - gamma), and each sweep takes the error times
    # gamma. To wait until the values stand still may not end: rounding moves them.
    error = gamma * r.abs().max().item() / (1 - gamma)
    sweeps = math.ceil(math.log(tol / error, gamma)) if error > tol else 0
    for _ in range(sweeps):
        q = r + gamma * (p * q.amax(dim=1)).sum(dim=-1)
    return q.amax(dim=1), q


def q_learning_update(
    q: Tensor, state: int, action: int, reward: float, next_state: int,
    terminated: bool, lr: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Moves Q(state, action) towards reward + gamma max_a Q(next_state, a).

    Args:
        q: (S, A); it is not modified.
        state, action, reward, next_state: one step, as it was seen.
        terminated: nothing follows next_state. False where only a time limit ended it.
        lr: the share of the way to go.
        gamma: discount per step.

    Returns:
        (S, A), the new table.

    Raises:
        ValueError: lr is outside (0, 1], gamma outside [0, 1), or an index negative.

    Source:
        Watkins, 1989; Sutton and Barto, 2018, eq. 6.8.
    """
    _check_gamma(gamma)
    if not 0 < lr <= 1:
        raise ValueError(f"lr must be in (0, 1], got {lr}")
    if min(at := (state, action, next_state)) < 0:  # torch would count from the end
        raise ValueError(f"state, action and next_state must be >= 0, got {at}")
    target = reward if terminated else reward + gamma * q[next_state].amax()
    new = q.clone()
    new[state, action] += lr * (target - q[state, action])
    return new


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")


def _model(p: Tensor, r: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    _check_gamma(gamma)
    if r.dim() != 2 or r.numel() == 0 or not r.isfinite().all():
        raise ValueError(f"rewards must be finite and (S, A), got {r}")
    p = _probabilities("transitions", p, (*r.shape, len(r)))
    dtype = torch.promote_types(p.dtype, torch.promote_types(r.dtype, torch.float32))
    return p.contiguous(), r.to(dtype).contiguous()


def _probabilities(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    off = (x.sum(dim=-1) - 1).abs().max()
    exact = torch.finfo(x.dtype).eps ** 0.5 if x.is_floating_point() else 0
    if not (off <= exact and (x >= 0).all()):
        raise ValueError(f"{name} must be >= 0, its rows sum to 1, got {x}")
    return x
