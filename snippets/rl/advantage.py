"""Advantage estimation with a value baseline (Schulman et al., 2015, section 3).

An advantage says how much better things went than the value function expected.
"""

import torch
from torch import Tensor


def generalized_advantage_estimate(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_value: Tensor | float,
    gamma: float = 0.99,
    lam: float = 0.95,
    *,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums the surprises to come: A_t = δ_t + gamma lam A_{t+1}.

    The surprise of a step is δ_t = r_t + gamma V(s_{t+1}) - V(s_t).

    Args:
        rewards: (T, ...), time first; r_t follows the action of step t.
        values: (T, ...), V(s_t) of the states that were acted in.
        dones: (T, ...), bool, True where an episode ends with this step.
        last_value: (...) or a number, V of the state after the last step. It is not
            read where dones is True.
        gamma: discount per step.
        lam: 0 trusts the values (A_t = δ_t), 1 the rewards (A_t = return - V(s_t)).
        final_values: (T, ...), read where dones is True: V of the state in which a time
            limit cut the episode off, 0 where the episode was over. None means 0
            everywhere.

    Returns:
        Advantages (T, ...) and returns (T, ...), advantages + values, the targets of a
        value function; in float32 or better. Gradients flow to values: detach both, or
        call it under `torch.no_grad()`, before they enter a loss.

    Raises:
        ValueError: gamma or lam is outside [0, 1], or shapes differ.
        TypeError: dones is not bool.

    Source:
        Schulman et al., 2015, "High-Dimensional Continuous Control Using Generalized
        Advantage Estimation", 1506.02438, eq. 16.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    if rewards.dim() == 0:
        raise ValueError("rewards must be (T, ...), got a single number")
    dtype = torch.promote_types(
        torch.promote_types(rewards.dtype, values.dtype), torch.float32
    )
    if not isinstance(last_value, Tensor):
        last_value = rewards.new_full(rewards.shape[1:], last_value, dtype=dtype)
    if final_values is None:
        final_values = torch.zeros_like(values)
    for name, x, shape in (
        ("values", values, rewards.shape),
        ("dones", dones, rewards.shape),
        ("final_values", final_values, rewards.shape),
        ("last_value", last_value, rewards.shape[1:]),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
    if dones.dtype != torch.bool:
        raise TypeError(f"dones must be bool, got {dones.dtype}")

    rewards, values, final_values = (
        x.to(dtype) for x in (rewards, values, final_values)
    )
    next_value, advantage, advantages = last_value, torch.zeros_like(last_value), []
    for t in reversed(range(len(rewards))):
        # where, not a product with 0: what follows the end of an episode may be NaN.
        next_value = torch.where(dones[t], final_values[t], next_value)
        advantage = torch.where(dones[t], 0, advantage)
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * lam * advantage
        advantages.append(advantage)
        next_value = values[t]
    advantages = torch.stack(advantages[::-1]) if advantages else rewards
    return advantages, advantages + values
