"""Models on the hub: what names one, and which of its files are fetched."""

from __future__ import annotations

import io
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.errors import ModelError
from abliterate.model.configuration import one_line
from abliterate.monitor import Monitor, under_way

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

    What is fetched is shown in the phase under way, and by nothing else.

    Raises `ModelError` when it cannot be fetched.
    """
    import huggingface_hub

    wanted = [*_WANTED, "*.py"] if trust_remote_code else [*_WANTED]
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    fetched = _Fetched(under_way())
    try:
        found = huggingface_hub.snapshot_download(
            identifier, allow_patterns=wanted, ignore_patterns=[*_COPIES], tqdm_class=_bars(fetched), **which
        )
        fetched.finish()
    except Exception as error:  # network, authentication and cache errors of several libraries
        raise ModelError(f"model '{identifier}': {_why_not(identifier, revision, error)}") from error
    return Path(found)


@dataclass(slots=True)
class _Fetched:
    """Bytes that were fetched so far, of how many, told to a monitor.

    The hub's library counts them in bars, in some versions twice (bytes that came in, bytes that were put together);
    totals grow as files are begun, from several threads.
    """

    monitor: Monitor
    bars: list[Any] = field(default_factory=list)
    total: int = 0
    done: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def look(self) -> None:
        """Tell what is new."""
        with self.lock:
            total, done = (
                max((int(getattr(bar, name) or 0) for bar in self.bars), default=0) for name in ("total", "n")
            )
            if total != self.total:
                self.total = total
                self.monitor.expect_bytes(total)
            if done > self.done:
                self.monitor.advance(done - self.done)
                self.done = done

    def finish(self) -> None:
        """Leave a line where anything was fetched."""
        self.look()
        if self.total:
            self.monitor.note(f"fetched {self.done / 1e6:,.1f} MB from the hub")
            self.monitor.expect_bytes(0)


def _bars(fetched: _Fetched) -> type:
    """What the hub's library makes in place of its bars."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that looks after bars

        def __init__(self, *args: Any, **options: Any) -> None:
            options = {name: value for name, value in options.items() if name != "name"}
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False, "leave": False})
            if options.get("unit") == "B":
                fetched.bars.append(self)

        def display(self, *_: Any, **__: Any) -> bool:
            fetched.look()
            return True

        def clear(self, *_: Any, **__: Any) -> None:
            pass

    return Bar


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
