"""A model on disk: its checkpoint, how its weights are stored, skeleton and anatomy, each made once and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import ModelError
from abliterate.files.checkpoint import Checkpoint, open_checkpoint, sha256
from abliterate.files.storage import Storage, how_stored
from abliterate.model.anatomy import TOLERANCE, Anatomy
from abliterate.model.anatomy.offline import study_files

ModelSource = Literal["hub", "folder", "gguf"]


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
        return open_checkpoint(self.folder)

    @cached_property
    def storage(self) -> Storage:
        """How its weights are stored. Raises `CheckpointError` when config.json cannot be read."""
        return how_stored(self.checkpoint)

    @cached_property
    def sha256(self) -> Mapping[str, str]:
        """The SHA-256 of every file of weights, by its name."""
        return {shard.path.name: sha256(shard.path) for shard in self.checkpoint.shards}

    def anatomy(self, max_leak: float = TOLERANCE) -> Anatomy:
        """Every writer of the model, proved without loading it.

        Raises `AnatomyError` when a writer is not known, `ModelError` when the configuration makes no model.
        """
        return self._study(max_leak)[0]

    def skeleton(self, max_leak: float = TOLERANCE) -> Any:
        """The model on the meta device: every name and shape, and no numbers. Raises what `anatomy` raises."""
        return self._study(max_leak)[1]

    def _study(self, max_leak: float) -> tuple[Anatomy, Any]:
        if max_leak not in self._studied:
            trust = self.trust_remote_code
            self._studied[max_leak] = study_files(
                self.name, self.checkpoint, trust_remote_code=trust, max_leak=max_leak
            )
        return self._studied[max_leak]

    def require_editable(self) -> None:
        """Raise `ModelError` for weights that can be measured on but not edited in place."""
        if not self.storage.editable:
            raise ModelError(
                f"model '{self.name}': its weights are stored quantised ({self.storage.method}): {self.storage.why}; "
                "give the full-precision checkpoint (--quantization bnb-4bit measures it in less memory), or --as lora"
            )

    def __reduce__(self) -> tuple[type[ModelOnDisk], tuple[str, ModelSource, Path, bool]]:
        """Pickled as its name and place: what was read is read again."""
        return ModelOnDisk, (self.name, self.kind, self.folder, self.trust_remote_code)
