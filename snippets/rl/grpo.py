"""Group relative policy optimization (Shao et al., 2024, section 4.1).

Several answers to one question are compared with their own mean, which takes the place
of a critic. The loss is PPO's clip on every token, and a KL to the reference beside it.
"""

import torch
from torch import Tensor


@torch.no_grad()
def group_relative_advantages(
    rewards: Tensor, scale: bool = True, eps: float = 1e-4
) -> Tensor:
    """Computes (r - mean) / (std + eps) within each group.

    Args:
        rewards: (groups, samples), one row for the answers to one question.
        scale: False leaves the deviations as they are (Dr. GRPO: no difficulty bias).
        eps: added to the deviation, of which n - 1 is the divisor.

    Returns:
        (groups, samples), in float32 or better, without gradient. Exactly 0 where all
        rewards of a group are equal, whatever the rounding of their mean.

    Raises:
        ValueError: rewards are not 2-D or have fewer than two samples; eps is negative.

    Source:
        Shao et al., 2024, 2402.03300, section 4.1.2; Liu et al., 2025, 2503.20783.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (groups, >= 2), got {tuple(rewards.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    rewards = _wide(rewards)
    above = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        variance = above.square().sum(dim=1, keepdim=True) / (rewards.shape[1] - 1)
        above = above / (variance.sqrt() + eps)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return above.masked_fill(equal, 0)


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Estimates KL(π ‖ π_ref) by π_ref/π - log(π_ref/π) - 1 (Schulman, 2020: k3).

    Args:
        log_probs, ref_log_probs: of what π sampled, of any one shape; nats.

    Returns:
        One estimate each, 0 or more, in float32 or better. Their mean nears the KL.

    Raises:
        ValueError: shapes differ.
    """
    if log_probs.shape != ref_log_probs.shape:
        got = f"{tuple(log_probs.shape)} and {tuple(ref_log_probs.shape)}"
        raise ValueError(f"log_probs and ref_log_probs must have one shape, got {got}")
    log_ratio = _wide(ref_log_probs) - _wide(log_probs)
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_log_probs: Tensor | None = None,
    clip_range: float = 0.2,
    beta: float = 0.0,
    aggregation: str = "sequence",
    max_length: int | None = None,
) -> Tensor:
    """Averages -min(r A, clip(r, 1 - ε, 1 + ε) A) + β KL over all tokens (eq. 3).

    Args:
        log_probs: (B, T), of the tokens sampled; they alone get a gradient.
        old_log_probs: (B, T), of the policy that sampled them.
        advantages: (B,), one for all tokens of an answer.
        mask: (B, T), bool, True at the tokens of the answer.
        ref_log_probs: (B, T), of the frozen reference; needed if beta is not 0.
        clip_range, beta: ε, and β, the weight of the KL.
        aggregation: "sequence", mean over an answer's tokens, then over answers (empty
            ones count as 0); "token", mean over all tokens (DAPO, 2503.14476);
            "constant", sum over B times max_length (Dr. GRPO, 2503.20783).
        max_length: the longest answer that is allowed; for "constant".

    Returns:
        0-d, in float32 or better; 0 where nothing counts.

    Raises:
        ValueError: a shape or option does not fit, or one that is needed is missing.
        TypeError: mask is not bool.
    """
    if not clip_range > 0 or not beta >= 0:
        raise ValueError(f"clip_range must be > 0, beta >= 0, got {clip_range}, {beta}")
    if beta > 0 and ref_log_probs is None:
        raise ValueError(f"ref_log_probs must be given when beta is {beta}, got None")
    if aggregation not in ("sequence", "token", "constant"):
        known = "sequence, token or constant"
        raise ValueError(f"aggregation must be {known}, got {aggregation}")
    if aggregation == "constant" and (max_length is None or max_length < 1):
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    ref = log_probs if ref_log_probs is None else ref_log_probs
    shapes = [tuple(x.shape) for x in (log_probs, old_log_probs, ref, mask)]
    if len(shapes[0]) != 2 or len({*shapes}) > 1 or advantages.shape != mask.shape[:1]:
        got = f"{shapes} and {tuple(advantages.shape)}"
        raise ValueError(f"all must be (B, T) and advantages (B,), got {got}")
    # Padding may hold -inf or NaN: it goes first, or the gradient brings it back.
    gain = advantages[:, None].expand_as(mask)
    given = log_probs, old_log_probs.detach(), ref.detach(), gain.detach()
    new, old, ref, gain = (_wide(x).masked_fill(~mask, 0) for x in given)
    ratio = torch.exp(new - old)  # (B, T)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * gain, clipped * gain)
    if beta > 0:
        loss = loss + beta * kl_k3(new, ref)
    if aggregation == "sequence":
        lengths = mask.sum(dim=1).clamp(min=1)
        return (loss.sum(dim=1) / lengths).sum() / max(len(mask), 1)
    if aggregation == "token":
        return loss.sum() / mask.sum().clamp(min=1)
    return loss.sum() / max(len(mask) * max_length, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
