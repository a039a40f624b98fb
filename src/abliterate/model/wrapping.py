"""Models that somebody else has loaded: a live transformers or PEFT model, or a pipeline, with its tokenizer."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from abliterate.errors import UsageError
from abliterate.model._compat import computes_with_codes, has_adapter, merge_adapter
from abliterate.model.loading import LoadedModel
from abliterate.model.on_disk import ModelOnDisk

#: Folders of models that were wrapped: they go when the process ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def wrapped(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A live model as this package measures and edits it: the same object, in evaluation mode, without gradients.

    `model` is a transformers model, a PEFT model (its adapter is merged into the live weights), or a text-generation
    pipeline, which brings its tokenizer along. Raises `UsageError` for anything else.
    """
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):  # a pipeline
        tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        model = model.model
    if not isinstance(model, nn.Module):
        raise UsageError(f"wrap: expected a live model of transformers, found {type(model).__name__}")
    model = merge_adapter(model)
    if has_adapter(model):
        raise UsageError(
            "wrap: expected a model without an adapter loaded into it, or a peft.PeftModel, found one with"
        )
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise UsageError(f"wrap: expected a live model of transformers, found {type(model).__name__}")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise UsageError(
            f"wrap: expected the model's tokenizer, found {type(tokenizer).__name__}; give "
            "transformers.AutoTokenizer.from_pretrained(…)"
        )
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    files = ModelOnDisk(name, "folder", Path(name)) if computes_with_codes(model) else _nowhere(name)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, files, in_memory=True)


def _nowhere(name: str) -> ModelOnDisk:
    """A model under a name, whose folder is empty until `on_disk` fills it."""
    folder = tempfile.TemporaryDirectory(prefix="abliterate-")
    _FOLDERS.append(folder)
    return ModelOnDisk(name, "folder", Path(folder.name) / (re.sub(r"[^\w.-]+", "_", Path(name).name) or "model"))


def on_disk(loaded: LoadedModel) -> ModelOnDisk:
    """The files of a model; one that is only in memory is written into a temporary folder, once.

    Raises `UsageError` for one that transformers cannot write, since another library has put modules into it.
    """
    files = loaded.files
    if loaded.in_memory and not files.folder.exists():
        try:
            loaded.model.save_pretrained(files.folder)
        except (RuntimeError, ValueError, TypeError) as error:
            shutil.rmtree(files.folder, ignore_errors=True)
            raise UsageError(
                f"model '{files.name}': transformers cannot write it as it is in memory ({str(error)[:200]}); save a "
                "direction, and apply it to the model that was loaded"
            ) from error
        loaded.tokenizer.save_pretrained(files.folder)
    return files
