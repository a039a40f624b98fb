"""How each next token of a reply is chosen: the likeliest, or as a model's `generation_config` asks.

What the configuration asks for is done by transformers' own processors, in the order in which `generate` applies them.
Sampling draws a number of its own for each token of each reply, by prompt, seed and number of the sample: a reply does
not depend on which others are made beside it, and the same prompt is answered with the same luck before an edit and
after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from abliterate.errors import UsageError

#: Rows of prompts and their replies so far → which replies need not go on.
Settled = Callable[[Sequence[int], Sequence[str]], Sequence[bool]]

#: Settings by which generate() would choose other tokens than the likeliest, with the values that change nothing.
_STEERING: dict[str, tuple[Any, ...]] = {
    "sequence_bias": ({}, []),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "stop_strings": ([],),
    "watermarking_config": (),
}
#: The same where it samples.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_h": (),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
#: What generate() takes where it samples and the configuration does not say.
_USUAL_TOP_K = 50

#: The settings that are followed, in order: value, number of tokens before the reply, ids that end it, device → what
#: changes the logits.
_PROCESSORS: dict[str, Callable[[Any, int, list[int], str], Any]] = {
    "sequence_bias": lambda v, start, ends, device: transformers.SequenceBiasLogitsProcessor(v),
    "repetition_penalty": lambda v, start, ends, device: transformers.RepetitionPenaltyLogitsProcessor(v),
    "no_repeat_ngram_size": lambda v, start, ends, device: transformers.NoRepeatNGramLogitsProcessor(v),
    "bad_words_ids": lambda v, start, ends, device: transformers.NoBadWordsLogitsProcessor(v, ends),
    "min_length": lambda v, start, ends, device: transformers.MinLengthLogitsProcessor(v, ends, device=device),
    "min_new_tokens": lambda v, start, ends, device: transformers.MinNewTokensLengthLogitsProcessor(
        start, v, ends, device=device
    ),
    "exponential_decay_length_penalty": lambda v, start, ends, device: transformers.ExponentialDecayLengthPenalty(
        tuple(v), ends, start
    ),
    "suppress_tokens": lambda v, start, ends, device: transformers.SuppressTokensLogitsProcessor(v, device=device),
    "begin_suppress_tokens": lambda v, start, ends, device: transformers.SuppressTokensAtBeginLogitsProcessor(
        v, start, device=device
    ),
    "temperature": lambda v, start, ends, device: transformers.TemperatureLogitsWarper(float(v)),
    "top_k": lambda v, start, ends, device: transformers.TopKLogitsWarper(v),
    "top_p": lambda v, start, ends, device: transformers.TopPLogitsWarper(float(v)),
    "min_p": lambda v, start, ends, device: transformers.MinPLogitsWarper(float(v)),
    "typical_p": lambda v, start, ends, device: transformers.TypicalLogitsWarper(float(v)),
    "epsilon_cutoff": lambda v, start, ends, device: transformers.EpsilonLogitsWarper(float(v)),
    "eta_cutoff": lambda v, start, ends, device: transformers.EtaLogitsWarper(float(v), device=device),
}
#: These count the tokens before the reply, padding among them: prompts of one length only are answered together.
_COUNT_TOKENS = frozenset(("no_repeat_ngram_size", "min_length"))


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen, and when a reply is left before its end.

    `asked` holds the settings of a `generation_config` that are followed; without any, each token is the likeliest.
    Where it samples, `seed` and `sample` (the number of the reply to the same prompt) decide the draws. Replies that
    `settled` says True of are left; `rule` names what decides that, and its version.
    """

    asked: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    sample: int = 0
    settled: Settled | None = field(default=None, compare=False)
    rule: str = ""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.asked.get("do_sample"))

    @property
    def counts_tokens(self) -> bool:
        """Whether padding before a prompt would change its reply."""
        return not _COUNT_TOKENS.isdisjoint(self.asked)

    @property
    def key(self) -> list[Any]:
        """All that replies depend on, as JSON holds it."""
        draws = [self.seed, self.sample] if self.samples else []
        return [json.dumps(dict(self.asked), sort_keys=True, default=str), draws, self.rule]

    def seed_for(self, prompt: Iterable[int]) -> int:
        """The seed of the draws for one prompt (its token ids), 0 to 2¹²⁸ − 1."""
        text = f"{self.seed} {self.sample} {' '.join(map(str, prompt))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


GREEDY = Decoding()


def asked_by(generation_config: Any) -> dict[str, Any]:
    """What a generation configuration asks for that greedy replies do not do, by name; {} where it is nothing."""
    found = _differing(generation_config, _STEERING)
    if getattr(generation_config, "do_sample", None):
        found |= {"do_sample": True, **_differing(generation_config, _SAMPLING)}
        if getattr(generation_config, "top_k", None) is None:
            found["top_k"] = _USUAL_TOP_K
    return found


def _differing(generation_config: Any, neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    values = {name: getattr(generation_config, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value is not None and value not in neutral[name]}


def in_words(asked: Mapping[str, Any]) -> str:
    """'repetition_penalty 1.1, do_sample True, top_k 20'; "" of nothing."""
    return ", ".join(f"{name} {str(value)[:60]}" for name, value in asked.items())


def decoding_of(generation_config: Any, seed: int) -> Decoding:
    """The decoding that a model's generation configuration asks for.

    Raises `UsageError` for what replies here cannot follow, such as beams, and for values that cannot be.
    """
    asked = asked_by(generation_config)
    if beyond := {name: value for name, value in asked.items() if name not in _PROCESSORS and name != "do_sample"}:
        raise UsageError(
            f"--decoding model: the model's generation_config asks for {in_words(beyond)}, which replies here cannot "
            "follow; use --decoding greedy"
        )
    found = Decoding(asked, seed)
    _processors(found, 1, [0], "cpu")
    return found


def _processors(decoding: Decoding, start: int, ends: list[int], device: str) -> list[Any]:
    found = []
    for name, make in _PROCESSORS.items():
        if name in decoding.asked:
            try:
                found.append(make(decoding.asked[name], start, ends, device))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise UsageError(
                    f"--decoding model: the model's generation_config asks for {name} "
                    f"{str(decoding.asked[name])[:60]} ({' '.join(str(error).split())[:120]}); use --decoding greedy"
                ) from error
    return found


class Chooser:
    """Chooses the next tokens of one batch. Rows are those that still run; `keep` says which do."""

    def __init__(self, decoding: Decoding, prompts: Sequence[tuple[int, ...]], most: int, ends: Iterable[int]) -> None:
        """For replies of at most `most` tokens to `prompts` (all their tokens), which `ends` end."""
        width = max(map(len, prompts))
        self._seen: Tensor | None = None
        self._draws: Tensor | None = None
        self._step = 0
        self._make = lambda device: _processors(decoding, width, sorted(ends), device)
        self._processors: list[Any] | None = None
        if decoding.asked:
            # A token that the prompt holds anyhow: penalties for what stands there do not see the padding.
            self._seen = torch.tensor([[p[-1]] * (width - len(p)) + list(p) for p in prompts])
        if decoding.samples:
            draws = [np.random.Generator(np.random.Philox(key=decoding.seed_for(p))).random(most) for p in prompts]
            self._draws = torch.tensor(np.array(draws))

    def choose(self, logits: Float[Tensor, "b vocab"]) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
        """The next token of each row, and the largest logit, by which it can be told that all are finite."""
        if self._seen is None:
            best, chosen = logits.max(-1)
            return best, chosen
        if self._processors is None:
            self._processors = self._make(str(logits.device))
        self._seen = self._seen.to(logits.device)
        finite, scores = logits.amax(-1), logits.float()
        for processor in self._processors:
            scores = processor(self._seen, scores)
        chosen = scores.argmax(-1) if self._draws is None else drawn(scores, self._draws[:, self._step])
        self._seen = torch.cat([self._seen, chosen[:, None]], dim=1)
        self._step += 1
        return finite, chosen

    def keep(self, rows: Int[Tensor, " c"]) -> None:
        """Go on with these rows only."""
        if self._seen is not None:
            self._seen = self._seen[rows.to(self._seen.device)]
        if self._draws is not None:
            self._draws = self._draws[rows.to(self._draws.device)]


def drawn(scores: Float[Tensor, "b vocab"], numbers: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The token of each row at which the cumulated probability passes its number (0 to 1)."""
    if scores.device.type == "mps":  # without float64
        return drawn(scores.cpu(), numbers).to(scores.device)
    cumulated = scores.double().softmax(-1).cumsum(-1)
    aim = numbers.to(scores.device)[:, None] * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, aim, right=True)[:, 0]
    return found.clamp_max(scores.shape[-1] - 1)


__all__ = ["GREEDY", "Chooser", "Decoding", "Settled", "asked_by", "decoding_of", "drawn", "in_words"]
