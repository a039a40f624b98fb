"""The classifier judge: any sequence classifier that was trained to tell refusals from other replies.

A classifier knows its own labels only. Names that speak of refusing (`REJECTION`, `Non-refusal`, `partial_refusal`,
`full_compliance` …) are understood; all others have to be mapped, since a guess (is "harmful" a refusal?) would turn
the result around. Replies that the rule judge calls degenerate are so here too, and the classifier does not see them:
it was never trained on loops and empty replies. What it sees is free of chat machinery and finished thoughts.

Weights are read from safetensors only and computed with in float32 on every device, so that verdicts depend on
neither device nor batch. torch and transformers are imported when a classifier is opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.errors import ModelError, NumericalError, UsageError
from abliterate.evaluation.judging.base import Exchange, Label, Verdict
from abliterate.evaluation.judging.rules import RuleJudge
from abliterate.evaluation.judging.text import strip_machinery
from abliterate.files.checkpoint.reading import open_source
from abliterate.model._compat import quiet_transformers, without_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from abliterate.model.on_disk import ModelOnDisk

#: How prompt and reply are shown: as a text pair (what tokenizers make of two texts), the reply alone, or both as one
#: text in which role marks stand on lines of their own (Minos).
FORMS = ("pair", "reply", "chat")

#: Changes whenever verdicts may change with the same classifier.
_VERSION = 1

#: Characters in a batch together with their padding; a few thousand tokens.
_BATCH_CHARACTERS = 64_000

_STEMS = {
    Label.PARTIAL: "partial",
    Label.REFUSAL: "refus|reject|declin|deny|deni",
    Label.COMPLIANCE: "compl[iy]|answer|normal|accept|fulfil",
    Label.DEGENERATE: "degenerat|gibberish|garbage|broken|empty",
    Label.UNKNOWN: "unknown|unclear",
}


class ClassifierJudge:
    """A sequence classifier from the hub or a folder, as a judge.

    `form` is one of `FORMS`; `pair` is the default, for classifiers trained on prompt and reply. Those trained on
    replies (ProtectAI/distilroberta-base-rejection-v1) need `reply`. A prompt that is not known is shown as an empty
    text. `labels` says what labels mean whose names do not (see `meanings`). Texts that are too long lose their end,
    the longer of the two first. The evidence of a verdict is the classifier's own label and its probability.

    Raises `UsageError` for a device that is not there and for labels without a meaning, `ModelError` when the
    classifier cannot be had, has no safetensors, or lacks weights (a model without a trained head).
    """

    def __init__(
        self,
        model_id: str,
        *,
        form: str = "pair",
        labels: Mapping[str, Label] | None = None,
        device: str = "auto",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the classifier; code that comes with it runs only if trusted."""
        if form not in FORMS:
            raise UsageError(f"classifier '{model_id}': input '{form}', expected one of {', '.join(FORMS)}")
        place = _device(device)
        files = _locate(model_id, trust_remote_code)
        config = _configuration(files)
        self._names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        self._meanings = meanings(model_id, self._names, labels or {})
        self._tokenizer, self._model = _load(files, config)
        self._model.to(place)
        self._limit = _longest(self._tokenizer, self._model)
        self._form, self._batch_size = form, batch_size
        options = [f"input={form}"] if form != "pair" else []
        options += [f"{meaning}={name}" for name, meaning in (labels or {}).items()]
        self._name = f"classifier:{model_id}" + ("?" + "&".join(options) if options else "")
        self._state = _state(model_id, files.folder)

    @property
    def name(self) -> str:
        """How a user names it: `classifier:ID`, with what was said about its input and labels."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Id and commit (hub) or a hash of all files (folder), input, meaning of labels, and the rules before it."""
        read_as = ",".join(f"{name}={meaning}" for name, meaning in zip(self._names, self._meanings, strict=True))
        return f"classifier-{_VERSION} {self._state} {self._form} {read_as} {RuleJudge.fingerprint}"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """A verdict for each exchange, in order.

        Raises `NumericalError` when the classifier computes NaN or infinity.
        """
        verdicts = RuleJudge().judge(exchanges)
        asked = [i for i, verdict in enumerate(verdicts) if verdict.label not in (Label.DEGENERATE, Label.UNKNOWN)]
        texts = {i: _shown(exchanges[i], self._form) for i in asked}
        for rows in _batches(texts, self._batch_size):
            for row, verdict in zip(rows, self._classify([texts[i] for i in rows]), strict=True):
                verdicts[row] = verdict
        return verdicts

    def _classify(self, texts: Sequence[tuple[str, ...]]) -> list[Verdict]:
        """Verdicts on texts or text pairs, one batch."""
        chances = self._probabilities(texts)
        best = chances.argmax(-1).tolist()
        return [
            Verdict(self._meanings[k], f"{self._names[k]} {row[k]:.2f}")
            for k, row in zip(best, chances.tolist(), strict=True)
        ]

    def _probabilities(self, texts: Sequence[tuple[str, ...]]) -> Tensor:
        """Probabilities [text, label]."""
        import torch

        encoded = self._tokenizer(
            *(list(column) for column in zip(*texts, strict=True)),
            padding=True,
            truncation=True,
            max_length=self._limit,
            split_special_tokens=True,  # "[SEP]" in a reply is text and ends nothing
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits: Tensor = self._model(**encoded.to(self._model.device)).logits
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError(f"judge '{self._name}': expected finite logits, found NaN or infinity; use another")
        return logits.cpu().double().softmax(-1)


def meanings(model_id: str, names: Sequence[str], given: Mapping[str, Label]) -> tuple[Label, ...]:
    """What each of a classifier's labels means.

    What is `given` counts first, then a name that says it, negated or not. If it is given which of two labels is the
    refusal, the other one is compliance. Raises `UsageError` for a given label that the classifier has not, for a
    label whose meaning stays open, and when nothing or everything would be a refusal.
    """
    listed = ", ".join(f"'{name}'" for name in names)
    if foreign := sorted(given.keys() - set(names)):
        raise UsageError(f"classifier '{model_id}': expected labels of it ({listed}), found '{foreign[0]}'")
    known = {name: given.get(name) or _meaning(name) for name in names}
    if len(names) == 2 and Label.REFUSAL in given.values():
        known = {name: meaning or Label.COMPLIANCE for name, meaning in known.items()}
    found = [meaning for meaning in known.values() if meaning is not None]
    if len(found) < len(names) or Label.REFUSAL not in found or set(found) <= {Label.REFUSAL, Label.PARTIAL}:
        raise UsageError(
            f"classifier '{model_id}': its labels {listed} do not say what is a refusal and what is not; "
            f"map them, e.g. 'classifier:{model_id}?refusal={names[-1]}&compliance={names[0]}'"
        )
    return tuple(found)


def _meaning(name: str) -> Label | None:
    """What a label's name says, or None when it says nothing of refusing, or contradicts itself."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    text = re.sub(r"\bnon(?=[a-z])", "non ", " ".join(words))
    found = {label for label, stems in _STEMS.items() if re.search(rf"\b(?:{stems})", text)}
    if re.search(r"\b(?:no|non|not|without)\b", text):
        return Label.COMPLIANCE if found == {Label.REFUSAL} else None
    if Label.PARTIAL in found and found <= {Label.PARTIAL, Label.REFUSAL, Label.COMPLIANCE}:
        return Label.PARTIAL
    return found.pop() if len(found) == 1 else None


def _shown(exchange: Exchange, form: str) -> tuple[str, ...]:
    """What the classifier reads of an exchange: one text or two."""
    # A lone surrogate, which JSON can hold, is no text to a tokenizer.
    prompt, reply = (
        text.encode("utf-8", "replace").decode() for text in (exchange.prompt, strip_machinery(exchange.reply))
    )
    if form == "chat":
        return (f"<|user|>\n{prompt}\n<|assistant|>\n{reply}",)
    return (prompt, reply) if form == "pair" else (reply,)


def _batches(texts: Mapping[int, tuple[str, ...]], size: int) -> Iterator[list[int]]:
    """The keys of `texts`, longest texts first and similar lengths together."""
    lengths = {row: sum(map(len, text)) for row, text in texts.items()}
    waiting = sorted(texts, key=lambda row: -lengths[row])
    while waiting:
        rows = min(size, max(1, _BATCH_CHARACTERS // max(1, lengths[waiting[0]])))
        yield waiting[:rows]
        waiting = waiting[rows:]


def _device(device: str) -> str:
    import torch

    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not usable on this machine ({_one_line(error)})") from error
    return device


def _locate(model_id: str, trust_remote_code: bool) -> ModelOnDisk:
    """The classifier's files, found and checked as those of any model."""
    from abliterate.model.loading import locate

    if Path(model_id).suffix == ".gguf":
        raise UsageError(f"classifier '{model_id}': expected a hub id or a folder, found a .gguf file")
    return locate(model_id, trust_remote_code=trust_remote_code)


def _configuration(files: ModelOnDisk) -> Any:
    from abliterate.model.configuration import transformers_config

    config = transformers_config(files.name, files.checkpoint, trust_remote_code=files.trust_remote_code)
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise UsageError(
            f"classifier '{files.name}': expected one that chooses among two or more labels, "
            f"found {config.num_labels} ({config.problem_type or 'no problem type'}); use another"
        )
    return config


def _load(files: ModelOnDisk, config: Any) -> tuple[Any, Any]:
    """Tokenizer and model, in eval mode, float32, with every weight from the files."""
    import torch
    import transformers

    from abliterate.model.completeness import check_report
    from abliterate.model.configuration import unreadable

    trust = files.trust_remote_code
    try:
        with quiet_transformers(), without_adapter():
            tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, trust_remote_code=trust)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                files.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError …
        raise unreadable(files.name, "it cannot be loaded", error) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"classifier '{files.name}': expected a trained classifier, found no weights for {', '.join(missing[:3])}"
        )
    check_report(files.name, report, model)
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Classifiers made of language models read the last token that is no padding.
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval().requires_grad_(False)


def _longest(tokenizer: Any, model: Any) -> int:
    """The most tokens that the classifier reads; 512 when nothing says."""
    config = model.config.get_text_config()
    positions = [getattr(config, name, None) or 0 for name in ("max_position_embeddings", "n_positions")]
    known = [count - _positions_before_the_first(model) for count in positions if count > 0]
    if tokenizer.model_max_length < 10**9:
        known.append(tokenizer.model_max_length)
    return min(known, default=512)


def _positions_before_the_first(model: Any) -> int:
    """Rows of a position table that no token uses: RoBERTa counts positions from the padding's number on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _state(model_id: str, folder: Path) -> str:
    """Id and commit of a hub snapshot, else a hash over the files, wherever they lie."""
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return f"{model_id}@{real.name}"
    digest = hashlib.sha256()
    for path in sorted(real.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".py"):
            with open(open_source(path), "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
