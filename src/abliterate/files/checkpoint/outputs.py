"""Which files an edited copy of a checkpoint has, and where the bytes of each come from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from abliterate.errors import UsageError
from abliterate.files.checkpoint.links import leads_out
from abliterate.files.checkpoint.messages import OUR_FAULT, error, short
from abliterate.files.checkpoint.reading import (
    ADAPTER_CONFIG,
    BITS,
    INDEX,
    INDEX_NAME,
    OWN_RESULTS,
    SINGLE_NAME,
    Checkpoint,
    TensorInfo,
)
from abliterate.texts import encodable, printable

_OTHER_WEIGHTS = re.compile(
    r"\.(bin|pth?|pt2|ckpt|gguf|ggml|h5|keras|msgpack|onnx|pkl|pickle|safetensors|npz|ot|tflite|nemo|pdparams)"
    r"(\.index\.json|[._]data.*|\.index|\.part.*|\.\d+)?$",
    re.IGNORECASE,
)

#: Files without which the copy would be another model, or none.
_NEEDED = re.compile(
    r"\.(json|model|jinja|py|tiktoken|safetensors)$|^(vocab|merges|special_tokens)\.txt$", re.IGNORECASE
)

#: Names that are taken in OUT: a folder of that name in the source, and below FRONT anything, would be in the way.
CARD, DIRECTION, FRONT, JOURNAL = "README.md", "direction.safetensors", "front", "trials.log"
_TAKEN = frozenset({CARD, FRONT, *OWN_RESULTS})


@dataclass(frozen=True, slots=True)
class Changes:
    """How the files of the copy differ from the source's, beside the bytes of rewritten tensors.

    `shard_bytes`: None keeps the source's files; else the tensors are dealt out anew, in order, to files of at most
    that many bytes (a larger tensor has a file alone). `extra`: more tensors, each with the original bytes of a
    tensor of the source; they go to the end of the last shard. `replaced`: new content of other files, by name.
    `indexed`: an index also for a single file, for readers that take every *.safetensors of a folder without one.
    `only`: names of the files beside the shards that come along; None for all.
    """

    shard_bytes: int | None = None
    extra: Mapping[str, TensorInfo] = field(default_factory=dict)
    replaced: Mapping[str, bytes] = field(default_factory=dict)
    indexed: bool = False
    only: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of a file of the source; `tensor` where they are one that may be rewritten."""

    path: Path
    start: int
    end: int
    tensor: TensorInfo | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A file to be written: the bytes `head`, then the spans. Its mode is that of `like`."""

    name: str
    head: bytes
    spans: tuple[Span, ...]
    like: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(span.end - span.start for span in self.spans)

    @property
    def original(self) -> Path | None:
        """The file of the source that this one has the layout of, byte for byte."""
        return self.like if self.spans and not self.head else None


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of the copy: those with tensors first. `left_out`: names of the source's files without a copy.

    `links` are those of them that are links out of the folder; `companions` the source's files beside the shards that
    come along, whether as they are or with new content.
    """

    files: tuple[Output, ...]
    left_out: tuple[str, ...]
    links: tuple[str, ...] = ()
    companions: tuple[Output, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


def plan_outputs(source: Checkpoint, changes: Changes) -> Outputs:
    """The files of a copy of `source` with `changes`."""
    if taken := sorted(changes.extra.keys() & source.tensors.keys()):
        raise error(f"{source.folder} already has a tensor {short(taken[0])}; {OUR_FAULT}")
    shards = _shards(source, changes)
    content = dict(changes.replaced)
    others, left_out, links = other_files(source)
    if source.index is None or source.misplaced or changes.shard_bytes is not None or changes.extra:
        others = [path for path in others if path != source.index]
        if changes.indexed or len(shards) > 1 or (source.index and changes.shard_bytes is None):
            tensors = {**source.tensors, **changes.extra}
            content[INDEX_NAME] = _index(source.index, {shard.name: shard.tensors for shard in shards}, tensors)
    if (adapter := source.folder / ADAPTER_CONFIG) in others:  # readers would look for the adapter, which is left out
        others.remove(adapter)
        left_out = (ADAPTER_CONFIG, *left_out)
    copies = [Output(str(path.relative_to(source.folder)), b"", (_whole_file(path),), path) for path in others]
    copies = [copy for copy in copies if changes.only is None or copy.name in changes.only]
    kept = [copy for copy in copies if copy.name not in content]
    like = {copy.name: copy.like for copy in copies}
    made = [Output(name, data, (), like.get(name)) for name, data in content.items()]
    left_out = tuple(name for name in left_out if name not in content)
    return Outputs((*(shard.output for shard in shards), *kept, *made), left_out, links, tuple(copies))


def index_of(checkpoint: Checkpoint, like: Path | None = None) -> bytes:
    """The index that a copy with these shards gets, where the source's is `like` and cannot be kept."""
    names = {str(shard.path.relative_to(checkpoint.folder)): shard.tensors for shard in checkpoint.shards}
    return _index(like, names, checkpoint.tensors)


class Others(NamedTuple):
    """The files beside the shards: those that come along, the names of the rest, and which of these lead out."""

    files: list[Path]
    left_out: tuple[str, ...]
    links: tuple[str, ...]


def other_files(source: Checkpoint) -> Others:
    """The files of the folder beside the shards.

    Raises `CheckpointError` for what can be no file of a model, and for a link out of the folder that the model needs.
    """
    shards = {shard.path for shard in source.shards}
    others: list[Path] = []
    left_out: list[str] = []
    links: list[str] = []
    for path in walk(source.folder):
        name = str(path.relative_to(source.folder))
        if path in shards:
            continue
        if _is_ours(name) or encodable(name) != name or (path != source.index and _OTHER_WEIGHTS.search(path.name)):
            left_out.append(name)
        elif leads_out(path, source.folder) and os.path.exists(path):
            links.append(name)
            if _NEEDED.search(path.name):
                raise error(f"{path} is a link out of the folder and is not followed; put the file itself there")
        elif path.is_file():
            others.append(path)
        else:
            raise error(f"{path} is a broken link or no regular file; remove it or download the model again")
    return Others(others, (*left_out, *links), tuple(links))


def _is_ours(name: str) -> bool:
    """Whether a file of the source is the result of an earlier run, or lies where this one's results go."""
    first, *below = PurePath(name).parts
    return name in OWN_RESULTS or (first in _TAKEN and bool(below)) or name == FRONT


def walk(folder: Path, root: Path | None = None, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Everything below `folder` that is not a folder, through links inside it, without hidden folders.

    A link to a folder elsewhere is given as it is.
    """
    root = folder if root is None else root
    real = os.path.realpath(folder)
    if real in above:
        raise error(f"{folder} is a link to a folder around it; remove the link")
    try:
        paths = sorted(folder.iterdir())
    except OSError as exc:
        raise error(f"cannot read {folder}: {exc.strerror}; check its permissions") from exc
    for path in paths:
        if not path.is_dir() or leads_out(path, root):
            yield path
        elif not path.name.startswith("."):
            yield from walk(path, root, (*above, real))


def _whole_file(path: Path) -> Span:
    return Span(path, 0, os.stat(path).st_size)


# ------------------------------------------------------------------------------------------------- the shards


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file with tensors: what it is called, what is in it, and what is written."""

    name: str
    tensors: tuple[str, ...]
    output: Output


def _shards(source: Checkpoint, changes: Changes) -> list[_Shard]:
    if changes.shard_bytes is not None:
        return _dealt_out(source, changes, changes.shard_bytes)
    shards = []
    for shard in source.shards:
        name = str(shard.path.relative_to(source.folder))
        spans = [Span(shard.path, 0, shard.header_bytes), *map(_span, shard.tensors.values())]
        shards.append(_Shard(name, tuple(shard.tensors), Output(name, b"", tuple(spans), shard.path)))
    if changes.extra:
        last = source.shards[-1]
        shards[-1] = _new_shard(shards[-1].name, last.metadata, last.path, {**last.tensors, **changes.extra}, changes)
    return shards


def _dealt_out(source: Checkpoint, changes: Changes, most: int) -> list[_Shard]:
    """All tensors in order, in new files of at most `most` bytes."""
    if most <= 0:
        raise UsageError(printable(f"shards of {most} bytes cannot be written; give a larger --shard-size"))
    metadata = {key: value for shard in reversed(source.shards) for key, value in shard.metadata.items()}
    groups: list[dict[str, TensorInfo]] = []
    free = 0
    for name, info in {**source.tensors, **changes.extra}.items():
        need = info.nbytes + len(_entry(name, info, 2**63)) + 2
        if need > free or not groups:
            groups.append({})
            free = most - len(_header(metadata, {})) - 8  # the header is padded by at most 7
        groups[-1][name] = info
        free -= need
    count, like = len(groups), source.shards[0].path
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE_NAME]
    return [_new_shard(name, metadata, like, group, changes) for name, group in zip(names, groups, strict=True)]


def _new_shard(
    name: str, metadata: Mapping[str, str], like: Path, tensors: Mapping[str, TensorInfo], changes: Changes
) -> _Shard:
    # Largest elements first, as the reference writer has it: readers view the data in place, where it must be aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype]))
    spans = tuple(_span(info, may_change=key not in changes.extra) for key, info in ordered.items())
    return _Shard(name, tuple(ordered), Output(name, _header(metadata, ordered), spans, like))


def _span(info: TensorInfo, *, may_change: bool = True) -> Span:
    return Span(info.file, info.start, info.end, info if may_change else None)


def _header(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bytes:
    """The header of a file of these tensors one after the other, with its length before it."""
    entries = [f'"__metadata__":{json.dumps(dict(metadata))}'] if metadata else []
    start = 0
    for name, info in tensors.items():
        entries.append(_entry(name, info, start))
        start += info.nbytes
    raw = f"{{{','.join(entries)}}}".encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _entry(name: str, info: TensorInfo, start: int) -> str:
    entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, start + info.nbytes]}
    return f"{json.dumps(name)}:{json.dumps(entry)}"


def _index(like: Path | None, names: Mapping[str, Iterable[str]], tensors: Mapping[str, TensorInfo]) -> bytes:
    """An index of `tensors`, whose `names` are given by file, with whatever else the index `like` says."""
    content: dict[str, object] = {}
    if like:
        content = INDEX.fields(like)
    metadata = content.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    content["metadata"] = {**metadata, "total_size": sum(info.nbytes for info in tensors.values())}
    content["weight_map"] = {name: file for file, inside in names.items() for name in sorted(inside)}
    return (json.dumps(content, indent=2) + "\n").encode()
