"""PPO's losses, and RLHF's KL reward (Schulman et al., 2017, sections 3 and 4).

The clip ends the reward for moving an action's probability further than a factor 1 ± ε
from the policy that acted. The KL penalty is PPO's other choice; RLHF's KL is a third.
"""

import torch
from torch import Tensor


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_range: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes -mean(min(r A, clip(r, 1 - ε, 1 + ε) A)), r = π / π_old.

    Args:
        log_probs: log π(a|s) of the actions taken, of any shape; they get the gradient.
        old_log_probs: likewise, of the policy that took them, the same in every epoch.
        advantages: likewise. No gradient reaches them, nor old_log_probs.
        clip_range: ε.
        mask: bool, True where an element counts; all of them by default.

    Returns:
        0-d, in float32 or better; 0 where nothing counts.

    Raises:
        ValueError: shapes differ, or clip_range is not positive.
        TypeError: mask is not bool.

    Source:
        Schulman et al., 2017, 1707.06347, eq. 7.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    given = {"log_probs": log_probs, "old_log_probs": old_log_probs}
    (new, old, gain), count = _ready(mask, **given, advantages=advantages)
    ratio, gain = torch.exp(new - old.detach()), gain.detach()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    # The lower of the two: a step too far earns nothing more, one too far back costs.
    return -torch.minimum(ratio * gain, clipped * gain).sum() / count


def ppo_kl_penalty_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    kl: Tensor,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes -mean(r A - β KL(π_old ‖ π)), without a clip (eq. 8).

    Args, Returns and Raises are those of `ppo_clip_loss`, and:
        kl: KL(π_old ‖ π) in nats, of the same shape, with its gradient.
        beta: β, from `update_kl_coefficient`; a ValueError if it is negative.
    """
    _check_beta(beta)
    given = {"log_probs": log_probs, "old_log_probs": old_log_probs}
    (new, old, gain, kl), count = _ready(mask, **given, advantages=advantages, kl=kl)
    ratio = torch.exp(new - old.detach())
    return -(ratio * gain.detach() - beta * kl).sum() / count


def update_kl_coefficient(beta: float, kl: float, target: float) -> float:
    """Halves β if KL < target / 1.5, doubles it if KL > 1.5 target (section 4).

    Raises:
        ValueError: beta is negative, kl is NaN, or target is not positive.
    """
    _check_beta(beta)
    if not target > 0 or kl != kl:
        raise ValueError(f"kl must be a number and target positive, got {kl}, {target}")
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta


@torch.no_grad()
def rlhf_token_rewards(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The reward of each token: -β log(π / π_ref), and on the last one the score.

    Args:
        scores: (B,), what the reward model gives each answer.
        log_probs, ref_log_probs: (B, T), of the policy and of the frozen reference.
        mask: (B, T), bool, True at the tokens of the answer.
        beta: β, the weight of the KL.

    Returns:
        (B, T), without gradient; 0 at padding. An empty answer has no token to reward.
        A row adds up to R(x, y) of Ziegler et al., 2019, 1909.08593.

    Raises:
        ValueError: shapes differ, or beta is negative.
        TypeError: mask is not bool.
    """
    _check_beta(beta)
    (new, ref), _ = _ready(mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    if mask.dim() != 2 or scores.shape != mask.shape[:1]:
        got = f"{tuple(scores.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"scores must be (B,) and mask (B, T), got {got}")
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)  # (B, T)
    return beta * (ref - new) + torch.where(last, scores[:, None], 0.0)


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")


def _ready(mask: Tensor | None, **given: Tensor) -> tuple[list[Tensor], Tensor]:
    if mask is None:
        mask = torch.ones_like(given["log_probs"], dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    shapes = {name: tuple(x.shape) for name, x in {**given, "mask": mask}.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all tensors must have one shape, got {shapes}")
    # Padding may hold -inf or NaN: it goes first, or the gradient brings it back.
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in given.values()]
    wide = [x.masked_fill(~mask, 0) for x in wide]
    return wide, mask.sum().clamp(min=1)
