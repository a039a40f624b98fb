"""Replies of unchanged models, kept on disk: the state "before" is the same in every run on a model.

A key holds all that replies depend on: the model's files (by SHA-256, remembered per file until size, times or
inode change), dtype, kind of device, versions, the prompts' token ids, limit, ends of turn, how tokens are chosen (with
seed and number of the sample), and what stops replies early. Token ids are kept, not text, in `answers` of the cache
folder, readable by the owner only; files that are damaged, cut off or of another format are ignored, and the ones
unused for longest are removed beyond 200 MB. A cache that cannot be written is done without.

Keys are of models as loaded from their files. Edited states have none: a model with hooks or an adapter gets no key,
but weights changed in place are not seen, so do not ask for one after that. No key either for live models that compute
with codes (their kernels vary with libraries this package does not know), nor for code from outside transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from abliterate._version import __version__
from abliterate.files.cache import DiskCache, digest
from abliterate.files.checkpoint import sha256
from abliterate.model._compat import attention_kernel, has_adapter
from abliterate.model.batches import Encoded
from abliterate.model.decoding import GREEDY, Decoding
from abliterate.model.generation import Reply, end_tokens, reply_text
from abliterate.model.loading import LoadedModel
from abliterate.model.meter import changes_nothing
from abliterate.model.on_disk import ModelOnDisk
from abliterate.monitor import ranks

#: Of what is kept of a reply: to be raised when that changes.
_FORMAT = 1
_REPLIES = DiskCache("answers", 200_000_000)
_HASHES = DiskCache("hashes", 1_000_000)  # each about a hundred bytes
#: What a model is made from besides its weights.
_DESCRIPTIONS = ("*.json", "*.model", "*.txt")


class _Kept(BaseModel):
    """What is kept of the replies to a list of prompts."""

    model_config = ConfigDict(strict=True)

    format: int
    tokens: list[Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(strict=False)]]
    ended: list[bool]
    stopped: list[bool]


def key_of(loaded: LoadedModel, prompts: Encoded, max_new_tokens: int, decoding: Decoding = GREEDY) -> str | None:
    """What the replies of a model as loaded are kept under; None where they are not kept.

    Rows per batch are not part of it: outside float32 they can turn a tie between two tokens.
    """
    import transformers

    model = loaded.model
    if loaded.in_memory or loaded.quantised or loaded.partial:
        return None
    if _is_foreign(model) or _has_hooks(model) or has_adapter(model):
        return None
    parts = {
        "files": _hashes(loaded.files),
        "versions": [__version__, torch.__version__, transformers.__version__],
        "numbers": [str(loaded.dtype), loaded.device.type],
        "model": [type(model).__name__, attention_kernel(model)],
        "ends": sorted(end_tokens(model, loaded.tokenizer)),
        "prompts": [prompts.prefix, prompts.suffixes],
        "limits": [max_new_tokens, *decoding.key],
    }
    return digest(json.dumps(parts, sort_keys=True))


def kept_replies(key: str | None, tokenizer: Any) -> list[Reply] | None:
    """The replies kept under `key`, or None where there are none (or no key); of several processes the leader's."""
    if (found := ranks.agreed(None if key is None else _REPLIES.read(key))) is None:
        return None
    try:
        kept = _Kept.model_validate(found)
        rows = list(zip(kept.tokens, kept.ended, kept.stopped, strict=True))
    except ValueError:
        return None
    if kept.format != _FORMAT:
        return None
    return [Reply(tokens, reply_text(tokenizer, tokens), ended, stopped) for tokens, ended, stopped in rows]


def keep(key: str | None, replies: Iterable[Reply]) -> None:
    """Keep replies under `key`; nothing is done without a key, or where the cache folder cannot be written."""
    if key is None:
        return
    replies = list(replies)
    flags = {name: [getattr(reply, name) for reply in replies] for name in ("tokens", "ended", "stopped")}
    _REPLIES.write(key, {"format": _FORMAT, **flags})


def _is_foreign(model: Any) -> bool:
    """Whether the model's code came with the model: files elsewhere may change it."""
    return not type(model).__module__.startswith("transformers.")


def _has_hooks(model: Any) -> bool:
    hooks = (hooks for one in model.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks))
    return any(not changes_nothing(hook) for some in hooks for hook in some.values())


def _hashes(files: ModelOnDisk) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that decides what the model says."""
    paths = {shard.path for shard in files.checkpoint.shards}
    paths.update(path for pattern in _DESCRIPTIONS for path in files.folder.glob(pattern) if path.is_file())
    return [(path.name, _hash(path)) for path in sorted(paths)]


def _hash(path: Path) -> str:
    """The SHA-256 of a file, computed again only when the file is another one or was written to."""
    real = path.resolve()
    stat = real.stat()
    state = json.dumps([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    known = _HASHES.read(state)
    if isinstance(known, str):
        return known
    found = sha256(real)
    _HASHES.write(state, found)
    return found
