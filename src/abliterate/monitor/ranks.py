"""Several processes that do one job, as torchrun starts them: prompts are divided, and what was found is put together.

Every process runs the whole program on the same prompts and decides the same. Only a pass over prompts differs
(`one_pass`): each process runs every n-th prompt, and afterwards all of them hold what each has found. Where the model
itself is divided (`lockstep`) all run all prompts, and talk inside the model. The process of rank 0 leads: it alone
speaks and writes, and what depends on more than the prompts (clocks, files, free memory, servers) the others are told
by it (`agreed`, `led`). What goes from one to another is numbers and JSON, never objects of Python.

Alone, which is how most programs run, every function here gives back what it was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from abliterate import errors
from abliterate.errors import AbliterateError, LostProcessError, UsageError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Shaped
    from torch import Tensor

_Value = TypeVar("_Value")

#: How long a process waits for the others: the leader may be writing a large model meanwhile. One that ends is seen at
#: once, by its closed connections.
_PATIENCE = timedelta(days=1)
#: What dtypes are sent as, where gloo cannot add them.
_SENT_AS = {"torch.bool": "int32", "torch.bfloat16": "float32", "torch.float16": "float32"}


@runtime_checkable
class Merged(Protocol):
    """What gathers numbers of prompts and can take in what its likes in the other processes gathered."""

    def merge(self) -> None:
        """Hold from now on what all processes' hold together, by `summed`, `joined` and the like."""
        ...


@dataclass(slots=True, eq=False)
class _World:
    """The processes of one job; `store` holds what may be read without the others, `passing` is set within a pass."""

    rank: int
    size: int
    store: Any
    local_rank: int = 0
    local_size: int = 1
    lockstep: bool = False
    passing: bool = field(default=False, init=False)


_world: _World | None = None


@contextlib.contextmanager
def joined_processes(environment: Any = os.environ) -> Iterator[None]:
    """The processes that torchrun started, as one job inside the `with`.

    `environment` has RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and LOCAL_RANK and LOCAL_WORLD_SIZE where several
    machines have some each.
    """
    global _world
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local, beside = int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(minutes=10)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        place = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        raise AbliterateError(f"{size} processes: cannot meet at {place} ({' '.join(str(error).split())})") from error
    _world = _World(rank, size, store, local, beside)
    try:
        yield
    finally:
        _world = None
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def count() -> int:
    """How many processes do this job."""
    return 1 if _world is None else _world.size


def leads() -> bool:
    """Whether this process speaks and writes: the one of rank 0, or the only one."""
    return _world is None or _world.rank == 0


def place() -> tuple[int, int]:
    """The number of this process among those of its machine, and how many these are."""
    return (0, 1) if _world is None else (_world.local_rank, _world.local_size)


def name() -> str:
    """What this process is called in messages; "" where it is alone."""
    return "" if _world is None else f"process {_world.rank + 1} of {_world.size} ({socket.gethostname()})"


def divide_model() -> None:
    """From now on the processes have a part of the model each: all run all prompts, in lockstep.

    Raises `UsageError` where this process is alone.
    """
    if _world is None:
        raise UsageError("--parallel tensor: expected several processes, found one; start them with torchrun")
    _world.lockstep = True


def lockstep() -> bool:
    """Whether the processes have a part of the model each: what one does in a pass all must do."""
    return _world is not None and _world.lockstep


def between_passes() -> bool:
    """Whether there are other processes that can be talked to now."""
    return _world is not None and not _world.passing


def led_alone(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> contextlib.AbstractContextManager[Any]:
    """What `make` gives, in the process that leads; nothing in the others."""
    return make() if leads() else contextlib.nullcontext()


@contextlib.contextmanager
def one_pass(rows: Sequence[int], into: Sequence[Tensor | Merged] | None) -> Iterator[Sequence[int]]:
    """The rows of prompts that this process is to run, inside; all of them where it is alone.

    `into` is where the work puts what it finds: tensors that are zero before, of which each process fills those of its
    rows or adds to, and whatever can be `Merged`. Afterwards every process holds the whole. Without `into` each runs
    all rows. A pass within a pass is one process's own.

    Raises in all processes what is raised in one of them.
    """
    world = _world
    if world is None or world.passing:
        yield rows
        return
    divided = into is not None and not world.lockstep
    world.passing, failed = True, None
    try:
        yield rows[world.rank :: world.size] if divided else rows
    except Exception as error:
        if world.lockstep:  # the others wait inside the model, where nothing can be said to them
            raise
        failed = error
    finally:
        world.passing = False
    _raise_together(world, failed)
    if divided:
        for one in into or ():
            if isinstance(one, Merged):
                one.merge()
            else:
                summed(one)


def _raise_together(world: _World, failed: Exception | None) -> None:
    import torch

    flags = torch.zeros(world.size, dtype=torch.int64)
    flags[world.rank] = failed is not None
    if not bool(summed(flags).any()):
        return
    first = int(flags.nonzero()[0])
    kind, text = json.loads(_sent(json.dumps(_worded(world, failed)) if world.rank == first else "", first))
    if failed is not None:
        raise failed
    found = getattr(errors, kind, AbliterateError)
    raise found(text)


def _worded(world: _World, error: Exception | None) -> tuple[str, str]:
    """The name of an error's class and its message, for the processes in which nothing went wrong."""
    if isinstance(error, AbliterateError):
        return type(error).__name__, str(error)
    trace = getattr(error, "__traceback__", None)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
    return "AbliterateError", f"{name()}: {type(error).__name__}: {error}{where}"


def summed(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`tensor`, which lies on the CPU, with the sum over all processes in it; the same bits in all of them."""
    if _world is None:
        return tensor
    import torch.distributed as dist

    sent = tensor.to(_sent_as(tensor.dtype)).contiguous()
    _talk(lambda: dist.all_reduce(sent))
    return tensor.copy_(sent) if sent is not tensor else tensor


def joined(rows: Shaped[Tensor, "n d"]) -> Shaped[Tensor, "m d"]:
    """The rows that all processes have, one process's after the other's. One without rows need not know d."""
    if _world is None:
        return rows
    import torch

    lengths, width = torch.zeros(_world.size, dtype=torch.int64), largest(rows.shape[1] if len(rows) else 0)
    lengths[_world.rank] = len(rows)
    summed(lengths)
    found = torch.zeros(int(lengths.sum()), width, dtype=rows.dtype)
    start = int(lengths[: _world.rank].sum())
    if len(rows):
        found[start : start + len(rows)] = rows
    return summed(found)


def largest(number: int) -> int:
    """The largest of the numbers that the processes have."""
    if _world is None:
        return number
    import torch
    import torch.distributed as dist

    found = torch.tensor(number, dtype=torch.int64)
    _talk(lambda: dist.all_reduce(found, op=dist.ReduceOp.MAX))
    return int(found)


def least(number: int) -> int:
    """The least of the numbers that the processes have."""
    return -largest(-number)


def agreed(value: _Value) -> _Value:
    """What the process that leads gives, in all of them. JSON holds it: several values come back as a list."""
    if _world is None or _world.size == 1:
        return value
    found: _Value = json.loads(_sent(json.dumps(value) if leads() else "", 0))
    return found


def led(*tensors: Tensor) -> None:
    """Give `tensors`, which lie on the CPU, the numbers that they have in the process that leads."""
    if _world is None:
        return
    for tensor in tensors:
        sent = tensor.detach().to(_sent_as(tensor.dtype)).contiguous()
        _broadcast(sent, 0)
        tensor.detach().copy_(sent)


def first_to_end(patience: float) -> bool:
    """Whether this process is to say why the job ends: the one that leads where it can, else whoever asks first.

    The others wait for so many seconds whether the one that leads asks.
    """
    if _world is None:
        return True
    import time

    store, until = _world.store, time.monotonic() + patience
    try:
        while not leads() and time.monotonic() < until and store.add("abliterate/ended", 0) == 0:
            time.sleep(0.05)
        return bool(store.add("abliterate/ended", 1) == 1)
    except RuntimeError:  # whoever kept the store is gone, and has said why
        return leads()


def _sent_as(dtype: torch.dtype) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, _SENT_AS.get(str(dtype), str(dtype).removeprefix("torch.")))
    return found


def _sent(text: str, source: int) -> str:
    """The text that one process has, in all of them."""
    import torch

    content = text.encode()
    length = torch.tensor(len(content))
    _broadcast(length, source)
    found = torch.tensor(list(content) if content else [0] * int(length), dtype=torch.uint8)
    _broadcast(found, source)
    return bytes(found.numpy()).decode()


def _broadcast(tensor: Tensor, source: int) -> None:
    import torch.distributed as dist

    _talk(lambda: dist.broadcast(tensor, source))


def _talk(speak: Callable[[], object]) -> None:
    """One exchange of all processes. Raises `LostProcessError` where one of them has ended."""
    if not between_passes():
        raise RuntimeError("an exchange of processes within a pass: the others may not come to it")
    try:
        speak()
    except RuntimeError as error:
        raise LostProcessError("another process of this run has ended; what it said stands above") from error
