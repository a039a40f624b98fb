"""Replies of unchanged models, kept on disk: the state "before" is the same in every run on a model.

A key holds all that greedy replies depend on: the model's files (by SHA-256, remembered per file until size, times or
inode change), dtype, kind of device, versions, the prompts' token ids, limit, ends of turn, and what stops replies
early. Token ids are kept, not text, in `answers` of the cache folder, readable by the owner only; files that are
damaged, cut off or of another format are ignored, and the ones unused for longest are removed beyond 200 MB. A cache
that cannot be written is done without.

Keys are of models as loaded from their files. Edited states have none: a model with hooks gets no key, but weights
changed in place are not seen, so do not ask for one after that. No key either for live models that compute with codes
(their kernels vary with libraries this package does not know), nor for code from outside transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from abliterate._version import __version__
from abliterate.config import cache_folder
from abliterate.files.checkpoint import open_checkpoint, sha256
from abliterate.model.batches import Encoded
from abliterate.model.generation import Reply, end_tokens, reply_text
from abliterate.model.loading import LoadedModel

#: Of what is kept of a reply: to be raised when that changes.
_FORMAT = 1
#: Bytes of all kept replies together.
_MOST_BYTES = 200_000_000
#: Bytes of remembered hashes (each about a hundred).
_MOST_HASH_BYTES = 1_000_000
#: What a model is made from besides its weights.
_DESCRIPTIONS = ("*.json", "*.model", "*.txt")


def key_of(loaded: LoadedModel, prompts: Encoded, max_new_tokens: int, *, stopping: str = "") -> str | None:
    """What the greedy replies of a model as loaded are kept under; None where they are not kept.

    `stopping` names what settles replies early, and its version; "" where they run to their end.

    Rows per batch are not part of it: outside float32 they can turn a tie between two tokens.
    """
    import transformers

    model = loaded.model
    if loaded.quantised or _is_foreign(model) or _has_hooks(model):
        return None
    parts = {
        "files": _hashes(loaded.files.folder),
        "versions": [__version__, torch.__version__, transformers.__version__],
        "numbers": [str(loaded.dtype), loaded.device.type],
        "model": [type(model).__name__, getattr(model.config, "_attn_implementation", None)],
        "ends": sorted(end_tokens(model, loaded.tokenizer)),
        "prompts": [prompts.prefix, prompts.suffixes],
        "limits": [max_new_tokens, stopping],
    }
    return _digest(json.dumps(parts, sort_keys=True))


def kept_replies(key: str | None, tokenizer: Any) -> list[Reply] | None:
    """The replies kept under `key`, or None where there are none (or no key)."""
    if key is None:
        return None
    path = _place(key)
    kept = _read(path)
    if kept is None or kept.get("format") != _FORMAT:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used last: removed last
    return [
        Reply(tuple(tokens), reply_text(tokenizer, tokens), ended, stopped)
        for tokens, ended, stopped in zip(kept["tokens"], kept["ended"], kept["stopped"], strict=True)
    ]


def keep(key: str | None, replies: Iterable[Reply]) -> None:
    """Keep replies under `key`; nothing is done without a key, or where the cache folder cannot be written."""
    if key is None:
        return
    replies = list(replies)
    flags = {name: [getattr(reply, name) for reply in replies] for name in ("tokens", "ended", "stopped")}
    _write(_place(key), {"format": _FORMAT, **flags}, _MOST_BYTES)


def _place(key: str) -> Path:
    return cache_folder() / "answers" / f"{key}.json"


def _is_foreign(model: Any) -> bool:
    """Whether the model's code came with the model: files elsewhere may change it."""
    return not type(model).__module__.startswith("transformers.")


def _has_hooks(model: Any) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _hashes(folder: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that decides what the model says."""
    paths = {shard.path for shard in open_checkpoint(folder).shards}
    paths.update(path for pattern in _DESCRIPTIONS for path in folder.glob(pattern) if path.is_file())
    return [(path.name, _hash(path)) for path in sorted(paths)]


def _hash(path: Path) -> str:
    """The SHA-256 of a file, computed again only when the file is another one or was written to."""
    real = path.resolve()
    stat = real.stat()
    state = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    place = cache_folder() / "hashes" / f"{_digest(json.dumps(state))}.json"
    known = _read(place)
    if isinstance(known, str):
        return known
    found = sha256(real)
    _write(place, found, _MOST_HASH_BYTES)
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Any:
    """The value written to `path`; None where there is none, or it is damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return json.loads(text) if digest == _digest(text) else None


def _write(path: Path, value: Any, most_bytes: int) -> None:
    """Write `value` behind its own digest, whole or not at all, and keep the folder within `most_bytes`."""
    text = json.dumps(value, separators=(",", ":"))
    with contextlib.suppress(OSError):  # what is kept only saves time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{_digest(text)}\n{text}")
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        _prune(path.parent, most_bytes)


def _prune(folder: Path, most_bytes: int) -> None:
    """Remove the files unused for longest, also drafts of runs that were killed, beyond `most_bytes`."""
    files = [(path.stat(), path) for path in folder.iterdir()]
    total = 0
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > most_bytes:
            path.unlink(missing_ok=True)
