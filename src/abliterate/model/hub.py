"""Models on the hub: what names one, and which of its files are fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from abliterate.errors import ModelError
from abliterate.model.configuration import one_line

#: What a snapshot needs to hold: never pickles, never other frameworks' weights.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*")
#: The same weights once more, in the formats of those who made them or for other runtimes: as large as the model.
_COPIES = ("original/*", "consolidated*", "*/consolidated*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "mlx/*")

_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ADDRESS = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<path>[^?#]*)")


def hub_id(spec: str) -> str | None:
    """The id (owner/name) that `spec` is or is the pasted address of; None where it is neither."""
    if address := _ADDRESS.match(spec):
        owner, _, rest = address["path"].strip("/").partition("/")
        name, _, place = rest.partition("/")
        identifier = f"{owner}/{name}"
        known = place in ("", "tree/main") and owner not in ("datasets", "spaces", "models")
        return identifier if known and _IDENTIFIER.fullmatch(identifier) else None
    return spec if _IDENTIFIER.fullmatch(spec) else None


def no_hub_id(spec: str) -> str:
    """Why `spec`, which names nothing here, is no hub id either, and what to give."""
    if _ADDRESS.match(spec):
        return (
            "expected the address of a model on the hub (https://huggingface.co/OWNER/NAME), found another; download "
            "single files and other revisions first and give their path"
        )
    if "+" in spec:
        return "no such folder or file; BASE+ADAPTER is read by `abliterate compare` only"
    if "/" not in spec:
        return f"no such folder or file, and a hub id has an owner (OWNER/{spec or 'NAME'})"
    return "no such folder or file, and not a hub id (owner/name)"


def snapshot(identifier: str, trust_remote_code: bool, revision: str | None = None) -> Path:
    """The folder in the hub's own cache with the files of a model; Python code only where it is trusted.

    Raises `ModelError` when it cannot be fetched.
    """
    import huggingface_hub

    wanted = [*_WANTED, "*.py"] if trust_remote_code else [*_WANTED]
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        found = huggingface_hub.snapshot_download(
            identifier, allow_patterns=wanted, ignore_patterns=[*_COPIES], **which
        )
    except Exception as error:  # network, authentication and cache errors of several libraries
        raise ModelError(f"model '{identifier}': {_why_not(identifier, revision, error)}") from error
    return Path(found)


def _why_not(identifier: str, revision: str | None, error: Exception) -> str:
    """Why a model could not be fetched, and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{identifier}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks for consent; accept the terms at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "not a folder here, and the hub has no such model, or shows it to its owner only; check the spelling at "
            f"https://huggingface.co/models?search={identifier.rpartition('/')[2]}, or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision '{revision}' of it; the branches and tags are at {page}/tree/main"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "not a folder here, not in the cache, and the hub does not answer or HF_HUB_OFFLINE is set; go online "
            f"once, or give the path of a copy ({one_line(error)})"
        )
    return f"not a folder here and cannot be fetched from the hub ({one_line(error)})"
