"""A model on disk: its checkpoint, how its weights are stored, skeleton and anatomy, each made once and kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import CheckpointError, ModelError
from abliterate.files.checkpoint import ADAPTER_CONFIG, INDEX_NAME, Checkpoint, open_checkpoint, same_bytes, sha256
from abliterate.files.checkpoint.reading import CONFIG
from abliterate.files.storage import Storage, how_stored, stored_shapes
from abliterate.model.anatomy import TOLERANCE, Anatomy
from abliterate.model.anatomy.names import sources, tied_and_stored, unclaimed
from abliterate.model.anatomy.offline import study_files
from abliterate.model.completeness import check_stored
from abliterate.model.configuration import build_skeleton, transformers_config

ModelSource = Literal["hub", "folder", "gguf"]


@dataclass(frozen=True, slots=True)
class Description:
    """What the files of a model say of it, once it is known that they hold all of it.

    `config` is transformers' configuration, `skeleton` the model on the meta device: None where how weights are stored
    leaves the check to the library that loads them. `warnings` are what a user must know.
    """

    config: Any
    skeleton: Any
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ModelOnDisk:
    """A model on disk: `name` as the user gave it, `folder` with safetensors and tokenizer.

    Two are equal when they are the same files under the same name; what was read of them is left out of that, and is
    not pickled.
    """

    name: str
    kind: ModelSource
    folder: Path
    trust_remote_code: bool = False
    _studied: dict[float, tuple[Anatomy, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors in its files. Raises `CheckpointError` when they are damaged."""
        return open_checkpoint(self.folder, stale_index=True)

    @cached_property
    def storage(self) -> Storage:
        """How its weights are stored. Raises `CheckpointError` when config.json cannot be read."""
        return how_stored(self.checkpoint)

    @cached_property
    def sha256(self) -> Mapping[str, str]:
        """The SHA-256 of every file of weights, by its name."""
        return {shard.path.name: sha256(shard.path) for shard in self.checkpoint.shards}

    @cached_property
    def description(self) -> Description:
        """Its configuration, and what there is to say of its files; they hold every number of it.

        Raises `CheckpointError`, naming a few tensors, when they do not, or when config.json contradicts them,
        `ModelError` when its configuration makes no model.
        """
        config = transformers_config(self.name, self.checkpoint, trust_remote_code=self.trust_remote_code)
        said = (*self._adapter(), *self._stale_index())
        if not self.storage.editable:
            return Description(config, None, said)
        try:
            whole = self._whole(config)
        except ModelError:
            if self.trust_remote_code:  # such code may not be made for the meta device: the live model is checked
                return Description(config, None, said)
            raise
        return replace(whole, warnings=(*said, *whole.warnings))

    def _whole(self, config: Any) -> Description:
        """The skeleton of `config`, which ties nothing that is stored apart, once all of it is known to be stored."""
        skeleton, said = self._built(config), []
        stored = stored_shapes(self.checkpoint)
        found = sources(skeleton, stored)
        if pairs := tied_and_stored(skeleton, found):
            apart = untied(config)
            separate = self._built(apart)
            check_stored(self.name, separate, stored, sources(separate, stored))
            if any(not same_bytes(*(self.checkpoint.tensors[one] for one in pair)) for pair in pairs):
                config, skeleton = apart, separate
                said.append(_not_tied(self.name, pairs[0]))
        else:
            check_stored(self.name, skeleton, stored, found)
        if others := unclaimed(skeleton, self.checkpoint.tensors):
            said.append(_unclaimed(self.name, others))
        return Description(config, skeleton, tuple(said))

    def _built(self, config: Any) -> Any:
        return build_skeleton(self.name, config, trust_remote_code=self.trust_remote_code)

    def anatomy(self, max_leak: float = TOLERANCE) -> Anatomy:
        """Every writer of the model, proved without loading it.

        Raises `AnatomyError` when a writer is not known, and what `description` raises.
        """
        return self._study(max_leak)[0]

    def skeleton(self, max_leak: float = TOLERANCE) -> Any:
        """The model on the meta device: every name and shape, and no numbers. Raises what `anatomy` raises."""
        return self._study(max_leak)[1]

    def _study(self, max_leak: float) -> tuple[Anatomy, Any]:
        if max_leak not in self._studied:
            trust, config = self.trust_remote_code, self.description.config
            self._studied[max_leak] = study_files(
                self.name, self.checkpoint, trust_remote_code=trust, max_leak=max_leak, config=config
            )
        return self._studied[max_leak]

    def require_editable(self) -> None:
        """Raise `ModelError` for weights that can be measured on but not edited in place."""
        if not self.storage.editable:
            raise ModelError(
                f"model '{self.name}': its weights are stored quantised ({self.storage.method}): {self.storage.why}; "
                "give the full-precision checkpoint (--quantization bnb-4bit measures it in less memory), or --as lora"
            )

    def _adapter(self) -> list[str]:
        """What is said of an adapter in the folder: transformers would put it on the model without a word."""
        if not (self.folder / ADAPTER_CONFIG).is_file():
            return []
        return [
            f"model '{self.name}': an adapter lies in its folder ({ADAPTER_CONFIG}) and is left out: it is no part of "
            f"the model; '{self.name}+{self.folder}' in `abliterate compare` is the model with it"
        ]

    def _stale_index(self) -> list[str]:
        if not (listed := self.checkpoint.misplaced):
            return []
        return [
            f"model '{self.name}': {INDEX_NAME} lists {len(listed)} tensors in files that do not hold them, "
            f"{', '.join(listed[:3])}; the model is whole without them, and what is written gets an index of its own"
        ]

    def __reduce__(self) -> tuple[type[ModelOnDisk], tuple[str, ModelSource, Path, bool]]:
        """Pickled as its name and place: what was read is read again."""
        return ModelOnDisk, (self.name, self.kind, self.folder, self.trust_remote_code)


def untied(config: Any) -> Any:
    """A copy of a configuration that ties nothing, at the top and in the part for text."""
    apart = copy.deepcopy(config)
    for part in (apart, apart.get_text_config()):
        part.tie_word_embeddings = False
    return apart


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in `folder` says it was made for; None where there is none, or it says nothing."""
    try:
        base = CONFIG.fields(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except CheckpointError:
        return None
    return str(base) if base else None


def _not_tied(name: str, pair: tuple[str, str]) -> str:
    embedding, head = pair
    return (
        f"model '{name}': its configuration ties {head} to {embedding} (tie_word_embeddings), its files hold two "
        "different ones: both are used as they are stored, as transformers does; other engines may use one for both"
    )


def _unclaimed(name: str, others: list[str]) -> str:
    return (
        f"model '{name}': {len(others)} stored matrices are no part of the model as transformers loads it and stay as "
        f"they are: {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
    )
