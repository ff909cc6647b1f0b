"""Policy gradient: REINFORCE (Williams, 1992; Sutton and Barto, 2018, section 13.3).

Actions are drawn from the policy. Each one's log-probability is then raised in
proportion to the return that followed it.
"""

import torch
from torch import Tensor


def discounted_returns(
    rewards: Tensor,
    gamma: float,
    dones: Tensor | None = None,
    last_value: Tensor | float = 0.0,
    *,
    final_values: Tensor | None = None,
) -> Tensor:
    """Sums the rewards to come: G_t = r_t + gamma G_{t+1}.

    Args:
        rewards: (T, ...), time first; r_t follows the action of step t.
        gamma: discount per step.
        dones: (T, ...), bool, True where an episode ends with this step.
        last_value: (...) or a number, what is expected after the last step, where its
            episode goes on.
        final_values: (T, ...), read where dones is True: the value of the state that a
            time limit cut the episode off in, 0 where the episode was over. None
            means 0 everywhere.

    Returns:
        (T, ...), in float32 or better.

    Raises:
        ValueError: gamma is outside [0, 1], shapes differ, or final_values is given
            without dones.
        TypeError: dones is not bool.

    Source:
        Sutton and Barto, 2018, "Reinforcement Learning", eq. 3.9.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    if rewards.dim() == 0:
        raise ValueError("rewards must be (T, ...), got a single number")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if not isinstance(last_value, Tensor):
        last_value = rewards.new_full(rewards.shape[1:], last_value, dtype=dtype)
    if dones is None:
        if final_values is not None:
            raise ValueError("final_values must come with dones, got it alone")
        dones = torch.zeros_like(rewards, dtype=torch.bool)
    if final_values is None:
        final_values = torch.zeros_like(rewards)
    for name, x, shape in (
        ("dones", dones, rewards.shape),
        ("final_values", final_values, rewards.shape),
        ("last_value", last_value, rewards.shape[1:]),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
    if dones.dtype != torch.bool:
        raise TypeError(f"dones must be bool, got {dones.dtype}")

    final_values, returns = final_values.to(dtype), []
    for t in reversed(range(len(rewards))):
        # where, not a product with 0: what follows the end of an episode may be NaN.
        last_value = rewards[t] + gamma * torch.where(
            dones[t], final_values[t], last_value
        )
        returns.append(last_value)
    return torch.stack(returns[::-1]) if returns else rewards.to(dtype)


def reinforce_loss(
    log_probs: Tensor, returns: Tensor, baseline: Tensor | None = None
) -> Tensor:
    """The loss whose gradient is the negative REINFORCE estimate, a mean over steps.

    Args:
        log_probs: (T, ...), log π(a_t | s_t) of the actions that were taken.
        returns: (T, ...), what followed them.
        baseline: (T, ...), subtracted from the returns; it must not depend on the
            action. Neither receives a gradient.

    Returns:
        0-d, in float32 or better. Its value says nothing: only the gradient counts.

    Raises:
        ValueError: shapes differ, or there are no steps.

    Source:
        Williams, 1992, "Simple statistical gradient-following algorithms for
        connectionist reinforcement learning"; Sutton and Barto, 2018, eq. 13.11.
    """
    baseline = torch.zeros_like(returns) if baseline is None else baseline
    for name, x in (("returns", returns), ("baseline", baseline)):
        if x.shape != log_probs.shape:  # (T,) and (T, 1) would broadcast to (T, T)
            raise ValueError(
                f"{name} must be {tuple(log_probs.shape)} as log_probs, "
                f"got {tuple(x.shape)}"
            )
    if log_probs.numel() == 0:
        raise ValueError("log_probs must hold one step at least, got none")
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    weight = (returns.to(dtype) - baseline).detach()
    return -(weight * log_probs).mean()
