"""Where a model's weights will lie, and whether that fits: arithmetic on bytes, before anything is loaded.

Rooms are devices by the names that accelerate has for them: numbers of GPUs, "mps" and "cpu", fastest first. Weights
that find no room there stay on disk, where a folder was named for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import UsageError
from abliterate.monitor import ranks

#: A device as accelerate names it.
Room = int | str
#: What keys, values and activations are estimated for.
ROWS, TOKENS = 16, 256
#: The share of a room that weights may take where they are spread: of the first, where a model computes, a GPU's or a
#: CPU's, and of the others.
_COMPUTES, _HOLDS = (0.8, 0.5), 0.9
#: What is left of the bytes of weights, about, where they are quantised while they are loaded.
QUANTISED = {"bnb-8bit": 0.55, "bnb-4bit": 0.32}
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of weights; and for each token of a batch of its keys and values, and of what one block makes of it.

    `row` is what the distribution of a row's next token takes.
    """

    weights: int
    cache: int
    activations: int
    row: int = 0

    @property
    def batch(self) -> int:
        """Of a batch of `ROWS` prompts of `TOKENS` tokens."""
        return ROWS * (TOKENS * (self.cache + self.activations) + self.row)

    def times(self, share: float) -> Needs:
        """The same with fewer bytes of weights."""
        return Needs(int(self.weights * share), self.cache, self.activations, self.row)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: all of them to `device`; or spread, each device to its bytes in `limits`, the rest to `folder`.

    `balanced` is spread evenly over all GPUs, `part` of the weights goes to the device and the others elsewhere, `said`
    is the estimate in a line.
    """

    device: str
    limits: Mapping[Room, int] | None = None
    folder: Path | None = None
    balanced: bool = False
    said: str = ""
    part: bool = False

    @property
    def spread(self) -> bool:
        """Whether accelerate puts each part of the model somewhere of its own."""
        return self.balanced or self.limits is not None

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is told, where the model is spread."""
        found: dict[str, Any] = {"device_map": "balanced" if self.balanced else "auto"}
        if self.limits is not None:
            found["max_memory"] = dict(self.limits)
        return found if self.folder is None else found | {"offload_folder": str(self.folder)}


def place(
    device: str,
    needs: Needs,
    rooms: Mapping[Room, int],
    *,
    limits: Mapping[Room, int] | None = None,
    folder: Path | None = None,
    quantised: bool = False,
) -> Placement:
    """Where the weights go, given the bytes that are free in each of `rooms`.

    `device` is what the user asked for (auto: the fastest that holds them, spread where none does), `limits` are the
    user's own and stand for what is free, `folder` is where weights may stay on disk.

    Raises `UsageError` with the nearest setting that fits when the weights do not.
    """
    if device not in ("auto", "balanced") and _room(device) not in rooms:
        return Placement(device)  # a kind of which nothing is known
    free = dict(limits) if limits is not None else {room: rooms[room] for room in _asked(device, rooms)}
    _check_limits(device, rooms, limits)
    said, first = _estimate(needs, free), next(iter(free))
    gpus = [room for room in free if isinstance(room, int)]
    if device == "balanced" and len(gpus) < 2:
        raise UsageError(f"--device balanced: expected two GPUs or more, found {len(gpus)}; give --device auto")
    if limits is None and device != "balanced":
        alone = len(free) == 1 or device != "auto"
        if needs.weights + needs.batch <= free[first]:
            return Placement(_named(first), said=said)
        if folder is None and alone and needs.weights <= free[first]:
            return Placement(_named(first), said=f"{said}: batches will be small")
        if folder is None and alone:
            free = {first: free[first]}
    kept = limits if limits is not None else _shares(free)
    left = needs.weights - sum(kept.values())
    if folder is None and left > 0:
        todo = nearest(device, needs, rooms if limits is None else limits, quantised=quantised)
        raise UsageError(f"the model does not fit: {said}; {todo}")
    where = f": {_size(left)} or more stay on disk" if left > 0 else f": spread over {_words(kept)}"
    return Placement("auto", kept, folder, balanced=device == "balanced", said=said + where)


def place_part(needs: Needs, rooms: Mapping[Room, int]) -> Placement:
    """Where the part of the weights goes that each of several processes has.

    Raises `UsageError` where it does not fit.
    """
    room, free = next(iter(rooms.items()))
    part = needs.times(1 / ranks.count())
    said = f"in each of {ranks.count()} processes {_estimate(part, {room: free})}"
    if part.weights > free:
        raise UsageError(f"the model does not fit: {said}; give more processes")
    return Placement(_named(room), said=said, part=True)


def _asked(device: str, rooms: Mapping[Room, int]) -> list[Room]:
    """The rooms that weights may take, the one asked for first."""
    if device in ("auto", "balanced"):
        return list(rooms)
    return [_room(device)] if _room(device) == "cpu" else [_room(device), "cpu"]


def _check_limits(device: str, rooms: Mapping[Room, int], limits: Mapping[Room, int] | None) -> None:
    unknown = [room for room in limits or () if room not in rooms]
    if unknown:
        raise UsageError(f"--max-memory: expected devices of {_words(rooms)}, found {_named(unknown[0])}")
    if limits is not None and device not in ("auto", "balanced") and _room(device) not in limits:
        raise UsageError(f"--max-memory: expected a limit for --device {device}, found {_words(limits)}")


def _room(device: str) -> Room:
    kind, _, number = device.partition(":")
    return int(number or 0) if kind == "cuda" else kind


def _named(room: Room) -> str:
    return f"cuda:{room}" if isinstance(room, int) else room


def _shares(free: Mapping[Room, int]) -> dict[Room, int]:
    """How much of what is free weights may take: where the model computes the rest is for activations."""
    first = next(iter(free))
    return {room: int((_COMPUTES[room == "cpu"] if room == first else _HOLDS) * size) for room, size in free.items()}


def nearest(device: str, needs: Needs, rooms: Mapping[Room, int], *, quantised: bool = False) -> str:
    """The setting nearest to what was asked for under which the weights fit: more devices, fewer bits, the disk."""
    gpus = {room: size for room, size in rooms.items() if isinstance(room, int)}
    if ranks.count() > 1 and needs.weights <= ranks.count() * next(iter(rooms.values())):
        return "give --parallel tensor, by which each process has a part of the model"
    if device not in ("auto", "balanced"):
        if len(gpus) > 1 and needs.weights <= sum(gpus.values()):
            return "give --device balanced"
        if needs.weights <= sum(rooms.values()) and len(rooms) > 1:
            return "give --device auto, which spreads it over GPUs and memory"
    if not quantised:
        for method, share in QUANTISED.items():
            if needs.times(share).weights <= max(rooms.values()):
                return f"give --quantization {method} (about {_size(int(needs.weights * share))} of weights)"
    return "give --offload FOLDER, which leaves on disk what fits nowhere"


def _estimate(needs: Needs, free: Mapping[Room, int]) -> str:
    cache, made = ROWS * TOKENS * needs.cache, ROWS * (TOKENS * needs.activations + needs.row)
    room = ", ".join(f"{_size(size)} on {_named(room)}" for room, size in free.items())
    return (
        f"{_size(needs.weights)} of weights, and for {ROWS} prompts of {TOKENS} tokens {_size(cache)} of keys and "
        f"values and {_size(made)} of activations; free: {room}"
    )


def _words(rooms: Mapping[Room, int]) -> str:
    return ", ".join(_named(room) for room in rooms)


def _size(count: int) -> str:
    return f"{count / _GB:.1f} GB"


def needs_of(config: Any, weights: int, itemsize: int) -> Needs:
    """What a model of a configuration needs: `weights` bytes, and activations of `itemsize` bytes a number."""
    text = config.get_text_config(decoder=True)
    width, layers = _number(text, "hidden_size", 4096), _number(text, "num_hidden_layers", 32)
    heads = _number(text, "num_attention_heads", 32)
    keys = _number(text, "num_key_value_heads", heads) * _number(text, "head_dim", width // max(1, heads))
    inner = _number(text, "intermediate_size", 4 * width)
    row = 12 * _number(text, "vocab_size", 32000)  # three rows of float32
    return Needs(weights, 2 * layers * keys * itemsize, itemsize * (8 * width + 3 * inner), row)


def _number(config: Any, name: str, otherwise: int) -> int:
    found = getattr(config, name, None)
    if isinstance(found, list | tuple) and found and all(isinstance(item, int) for item in found):
        return int(max(found))
    return int(found) if isinstance(found, int) and found > 0 else otherwise


def rooms() -> dict[Room, int]:
    """Bytes that are free on every device here, the fastest first; of several processes each has one GPU."""
    found: dict[Room, int] = {}
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count()) if ranks.count() == 1 else [own_gpu()]
        found |= {index: free_memory(torch.device("cuda", index)) for index in indices}
    elif torch.backends.mps.is_available():
        found["mps"] = free_memory(torch.device("mps"))
    return found | {"cpu": free_memory(torch.device("cpu"))}


def own_gpu() -> int:
    """The GPU of this process, where several processes of a machine have one each."""
    return ranks.place()[0] % max(1, torch.cuda.device_count())


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now; of a CPU's, the part of one of several processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return next(_free_here(), 4 << 30) // ranks.place()[1]  # not every system says


def _free_here() -> Iterator[int]:
    """What each way to ask for free memory says, of those that this system has."""
    with contextlib.suppress(OSError, ValueError, StopIteration):  # what files keep in memory can be had back
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    if sys.platform == "win32":
        yield _free_on_windows()
    with contextlib.suppress(ValueError, OSError, AttributeError):
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ValueError, OSError, AttributeError):  # macOS only says how much there is
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *((name, ctypes.c_ulonglong) for name in ("total", "free", "pages", "free_pages", "space", "free_space", "_")),
    ]


def _free_on_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    library: Any = getattr(ctypes, "windll")  # noqa: B009  # there on Windows only
    library.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free)
