"""Direct preference optimization (Rafailov et al., 2023, section 4).

From pairs of a better and a worse answer the policy learns as its own reward model: its
reward is how much likelier it makes an answer than a frozen reference does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_log_probs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of each answer: the sum over its tokens.

    Args:
        logits: (B, T, V), of a causal model that read ids; row t is for ids[:, t + 1].
        ids: (B, T), int64, prompt and answer; anything at padding, -100 too.
        mask: (B, T), bool, True at the tokens of the answer: no prompt, no padding.
            Position 0 never counts, because nothing predicts it.

    Returns:
        (B,), in float32 or better; 0 where nothing counts.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ids are not int64, or mask is not bool.
    """
    if ids.dtype != torch.int64 or mask.dtype != torch.bool:
        got = f"{ids.dtype} and {mask.dtype}"
        raise TypeError(f"ids must be int64 and mask bool, got {got}")
    if ids.dim() != 2 or not logits.shape[:-1] == ids.shape == mask.shape:
        got = ", ".join(str(tuple(x.shape)) for x in (logits, ids, mask))
        raise ValueError(f"need logits (B, T, V), ids and mask (B, T), got {got}")
    logits, ids, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:]
    # Padding may hold NaN: it goes before the softmax, or the gradient brings it back.
    logits = _wide(logits).masked_fill(~mask[..., None], 0)  # (B, T - 1, V)
    ids = ids.masked_fill(~mask, 0)
    log_probs = logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    return (log_probs * mask).sum(dim=1)


def implicit_reward(
    policy_log_probs: Tensor, ref_log_probs: Tensor, beta: float = 0.1
) -> Tensor:
    """Computes β log(π / π_ref), the reward up to a term of the prompt alone.

    Args:
        policy_log_probs, ref_log_probs: of whole answers, of any one shape; nats.
        beta: β; the smaller, the further the policy may go for the same reward.

    Returns:
        The rewards, of that shape, in float32 or better.

    Raises:
        ValueError: shapes differ, or beta is not positive.

    Source:
        Rafailov et al., 2023, 2305.18290, eq. 5.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if policy_log_probs.shape != ref_log_probs.shape:
        got = f"{tuple(policy_log_probs.shape)} and {tuple(ref_log_probs.shape)}"
        raise ValueError(f"log-probs of policy and ref must have one shape, got {got}")
    return beta * (_wide(policy_log_probs) - _wide(ref_log_probs))


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages -log sigmoid(chosen reward - rejected reward) over pairs.

    Args:
        policy_chosen, policy_rejected: (B,), log-probabilities of the better and of the
            worse answer to each prompt, as `sequence_log_probs` gives them.
        ref_chosen, ref_rejected: likewise by the reference; they get no gradient.
        beta: β of `implicit_reward`.
        label_smoothing: the probability that a pair is the wrong way round.

    Returns:
        The loss, 0-d, 0 for an empty batch; the rewards of chosen and rejected answers,
        (B,), without gradient. All in float32 or better.

    Raises:
        ValueError: shapes differ, beta is not positive, or label_smoothing is not in
            [0, 0.5).

    Source:
        Rafailov et al., 2023, 2305.18290, eq. 7.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if policy_chosen.shape != policy_rejected.shape:
        got = f"{tuple(policy_chosen.shape)} and {tuple(policy_rejected.shape)}"
        raise ValueError(f"chosen and rejected must have one shape, got {got}")
    chosen = implicit_reward(policy_chosen, ref_chosen.detach(), beta)
    rejected = implicit_reward(policy_rejected, ref_rejected.detach(), beta)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    loss = loss - label_smoothing * F.logsigmoid(-margin)
    return loss.sum() / max(loss.numel(), 1), chosen.detach(), rejected.detach()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
