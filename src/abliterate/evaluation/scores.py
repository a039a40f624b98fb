"""Numbers read off next-token distributions: refusal score, KL divergence, log-likelihoods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def refusal_score(logits: Float[Tensor, "*n vocab"], tokens: Sequence[int]) -> Float[Tensor, "*n"]:
    """log p_R − log(1 − p_R), p_R the probability summed over the refusal tokens (Arditi et al. 2024, §2.4).

    In float64 on the CPU, since not every accelerator has it. NaN without tokens: of a behaviour that first tokens do
    not tell.
    """
    if not tokens:
        return torch.full(logits.shape[:-1], torch.nan, dtype=torch.float64)
    inside = torch.tensor(sorted(set(tokens)), device=logits.device)
    refusing = logits.index_select(-1, inside).logsumexp(-1)
    other = logits.index_fill(-1, inside, -torch.inf).logsumexp(-1)
    return (refusing - other).cpu().double()


def kl_divergence(base: Float[Tensor, "*n vocab"], edited: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(base ‖ edited) in nats per position, from logits in float32.

    A token that the base model gives no probability (logit −∞) adds nothing, also where the edited one gives it none;
    a token that only the edited model gives none makes it infinite.
    """
    p, q = base.log_softmax(-1), edited.log_softmax(-1)
    mass = p.exp()
    return (mass * (p - q)).masked_fill(mass == 0, 0).sum(-1).clamp_min(0)


def log_likelihood(logits: Float[Tensor, "*n vocab"], targets: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log p(target) in nats per position."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
