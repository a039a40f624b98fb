"""The configuration of a model on disk, checked before anything is built from it, and the model's skeleton."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from abliterate.errors import AbliterateError, CheckpointError, ModelError
from abliterate.files.checkpoint import Checkpoint
from abliterate.files.checkpoint.messages import short
from abliterate.files.formats import PLAIN
from abliterate.files.storage import configuration, stored_dtype, without_quantization
from abliterate.model._compat import auto_class, quiet_transformers

#: Fields that say how many modules there are of a kind (each is built, and each has a tensor of its own), and those by
#: which tables are computed that are not stored.
_COUNT = re.compile(
    r"(^|_)(n|num)_(\w+_)?(layers?|blocks|routed_experts|experts)$|^(encoder|decoder)_layers$|^depth$|(^|_)head_dim$"
)
#: As many modules as this are built without asking what is stored.
_FEW = 1000


def transformers_config(name: str, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of the checkpoint of model `name`; without a dtype it gets the stored one.

    Code that lies in the folder is not run, and nobody is asked whether it may be, unless it is trusted.

    Raises `CheckpointError` for a config.json that cannot be read or asks for more layers than there are tensors,
    `ModelError` for one that transformers makes nothing of.
    """
    import transformers

    check_counts(name, configuration(checkpoint), [info.shape for info in checkpoint.tensors.values()])
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # configurations are checked by many hands in many ways
            raise unreadable(name, "it cannot be loaded, for its configuration cannot be used", error) from error
    if getattr(config, "transformers_weights", None) is not None:
        del config.transformers_weights  # another file than the ones that are listed, edited and hashed
    config.dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    if config.dtype is not None and not isinstance(config.dtype, torch.dtype):
        found = f"found dtype {short(config.dtype)}"
        raise CheckpointError(f"model '{name}': config.json: expected a dtype of torch, {found}; correct it")
    if config.dtype not in PLAIN.values():  # none, or that of codes
        config.dtype = stored_dtype(checkpoint)
    return config


def unreadable(name: str, what: str, error: Exception) -> ModelError:
    """The error for a part of model `name` that transformers cannot read, in one line."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model '{name}': {what} without the custom code that comes with it (auto_map), which is not run unasked; "
            "read that code, then give --trust-remote-code"
        )
    return ModelError(f"model '{name}': {what} ({one_line(error)})")


def one_line(error: Exception) -> str:
    """The beginning of an error's text."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def build_skeleton(name: str, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device, unquantised: every name and shape, and no numbers.

    Raises `ModelError` when the configuration makes no model.
    """
    plain = without_quantization(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            return auto_class(plain).from_config(plain, trust_remote_code=trust_remote_code)
    except AbliterateError:
        raise
    except Exception as error:  # configurations are checked by many hands in many ways
        raise unreadable(name, "it cannot be built from its configuration", error) from error


def check_counts(name: str, config: Mapping[str, Any], shapes: Collection[Sequence[int]]) -> None:
    """Check that no more modules would be built for model `name` than tensors of such `shapes` could be stored for: it
    might take for ever, or all memory.

    Raises `CheckpointError`, naming the field.
    """
    widest = max((size for shape in shapes for size in shape), default=0)
    for key, value in _counts(config):
        most = max(_FEW, len(shapes), widest if key.endswith(("experts", "dim")) else 0)
        if value > most:
            raise CheckpointError(
                f"model '{name}': its configuration has {key} {short(value)}, its files hold {len(shapes)} tensors of "
                f"at most {widest} rows or columns; correct it or download the model again"
            )


def _counts(value: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every count of modules, also in the configurations inside a configuration."""
    waiting: list[Any] = [value]
    while waiting:
        for key, inner in waiting.pop().items():
            if isinstance(inner, dict):
                waiting.append(inner)
            elif type(inner) is int and _COUNT.search(key):
                yield key, inner
