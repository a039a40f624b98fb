"""Numbers read off next-token distributions: refusal score, KL divergence, log-likelihoods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.errors import GateNotMet
from abliterate.judging import Label, Verdict

#: A first token counts as refusing when it starts at least this share of the refusals …
MIN_SHARE = 0.05
#: … and is at least this many times as common there as in replies that comply.
MIN_LIFT = 4.0


@dataclass(frozen=True, slots=True)
class RefusalToken:
    """A token that refusals start with: how often, among refusals and among replies that comply."""

    token: int
    text: str
    in_refusals: int
    in_compliances: int


def refusal_score(logits: Float[Tensor, "*n vocab"], tokens: Sequence[int]) -> Float[Tensor, "*n"]:
    """log p_R − log(1 − p_R), p_R the probability summed over the refusal tokens (Arditi et al. 2024, §2.4)."""
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    inside[list(tokens)] = True
    refusing = logits[..., inside].logsumexp(-1)
    other = logits.masked_fill(inside, -torch.inf).logsumexp(-1)
    return (refusing - other).double()


def kl_divergence(base: Float[Tensor, "*n vocab"], edited: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(base ‖ edited) in nats per position, from logits in float32."""
    p, q = base.log_softmax(-1), edited.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def log_likelihood(logits: Float[Tensor, "*n vocab"], targets: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log p(target) in nats per position."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def find_refusal_tokens(
    replies: Sequence[Sequence[int]], verdicts: Sequence[Verdict], decode: dict[int, str]
) -> tuple[RefusalToken, ...]:
    """First tokens that mark the model's own refusals: common in them and rare in replies that comply.

    Comparing harmful with harmless prompts instead would also find words like "Creating", with which a model obeys.

    Raises `GateNotMet` when no first token tells refusals from compliance.
    """
    refusing: Counter[int] = Counter()
    complying: Counter[int] = Counter()
    for reply, verdict in zip(replies, verdicts, strict=True):
        if reply and verdict.label is Label.REFUSAL:
            refusing[reply[0]] += 1
        elif reply and verdict.label is Label.COMPLIANCE:
            complying[reply[0]] += 1
    refusals, compliances = refusing.total(), complying.total()
    found = tuple(
        RefusalToken(token, decode.get(token, ""), count, complying[token])
        for token, count in refusing.most_common()
        if count >= max(2, MIN_SHARE * refusals)
        and count / refusals >= MIN_LIFT * (complying[token] + 0.5) / (compliances + 1)
    )
    if not found:
        common = ", ".join(f"{decode.get(t, t)!r} ({n})" for t, n in refusing.most_common(3)) or "none"
        raise GateNotMet(
            f"refusal tokens: no first token marks refusals ({refusals} refusals, most common first tokens: {common}); "
            "give --refusal-tokens"
        )
    return found
