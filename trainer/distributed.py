"""Several processes, one a card, started by torchrun: each trains on its rows of every batch.

Only the erasers' gradients travel, once a step. Randomness is drawn for the whole batch and then divided, so what a run trains
on and what its checkpoints hold does not depend on the number of processes. Process 0 alone writes files. What one process
learns (a signal, an error, a finding) all act upon at the same step, or one would wait for the others for ever.
In a run of one process every function here does the plain thing. Processes must see the same file system.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memory.exhaustion import exhausted
from trainer.errors import InputOutputError, TrainerError, UsageError
from trainer.signals import StopFlag

TIMEOUT = timedelta(minutes=30)  # of a collective: process 0 may be saving meanwhile
PARTING = timedelta(seconds=10)  # how long who ends waits for the others
logger = logging.getLogger(__name__)


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Within: this process works with those that torchrun started beside it, if it did. Yields its rank.

    Each takes the card of its local rank: NCCL between cards, gloo on the CPU and for what the hosts agree upon.
    Raises UsageError where `device` (as --device) cannot be divided; InputOutputError when another process is lost.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield 0
        return
    backend = _take_card(device)
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps one store for all restarts (torch 2.13), and a first attempt's addresses would be found in it.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    parting = dist.new_group(backend="gloo", timeout=PARTING)
    level = logging.getLogger().level
    if rank():
        logging.getLogger().setLevel(logging.ERROR)  # what is to be said, process 0 says
    try:
        yield rank()
    except RuntimeError as e:
        if "gloo" not in str(e) and not isinstance(e, dist.DistError):
            raise
        raise InputOutputError(f"process {rank()} lost the others (one of them died or hangs); the newest checkpoint is "
                               "good: go on with torchrun … -- run.py --resume RUN, or let torchrun --max-restarts do so") from e
    finally:
        # torchrun ends the others as soon as one has failed: nobody leaves while another may still be writing.
        with suppress(RuntimeError):
            dist.barrier(group=parting)
        if sys.exception() is None:
            dist.destroy_process_group()
        else:  # when it has said what is wrong: who loses it then leaves, and torchrun ends it
            atexit.register(dist.destroy_process_group)
        logging.getLogger().setLevel(level)


def _take_card(device: str) -> str:
    """Make the card of this process' local rank the current one, if cards are used; returns the backend's name."""
    local, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "gloo"
    if device not in ("auto", "cuda"):
        raise UsageError(f"--device {device}: with {num_local} processes each takes its own card; use --device cuda")
    if num_local > torch.cuda.device_count():
        raise UsageError(f"{num_local} processes but {torch.cuda.device_count()} cards: torchrun "
                         f"--nproc-per-node={max(1, torch.cuda.device_count())}")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process' number. The one numbered 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def divided(batch_size: int, count: int, whom: str, *, kept: bool = False) -> int:
    """How many samples of a batch each of `count` takes. Raises UsageError if it cannot be divided evenly among `whom`. `kept`: the run
    goes on, and can take no other batch."""
    share, left = divmod(batch_size, count)
    if left:
        fitting = max(number for number in range(1, count) if batch_size % number == 0)
        advice = f"a resumed run keeps it, so use torchrun --nproc-per-node={fitting}" if kept else f"use --batch-size {(share + 1) * count}"
        raise UsageError(f"--batch-size {batch_size} cannot be divided among {count} {whom}: it counts the samples of all of them; {advice}")
    return share


def rows_of(batch_size: int, of_rank: int | None = None) -> slice:
    """The rows of every batch that a process trains on. Raises UsageError if they cannot be divided evenly."""
    count = divided(batch_size, num_ranks(), "processes")
    first = (rank() if of_rank is None else of_rank) * count
    return slice(first, first + count)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (b, ...) of all processes, in order of rank: (B, ...)."""
    if num_ranks() == 1:
        return rows
    whole = rows.new_empty(num_ranks() * len(rows), *rows.shape[1:])
    dist.all_gather(list(whole.chunk(num_ranks())), rows.contiguous())
    return whole


@torch.no_grad()
def average(tensors: Sequence[Tensor], *, reduce: Callable[[Tensor], object] = dist.all_reduce) -> None:
    """Replace every tensor by its mean over the processes: one sum of one flat float32 buffer, the same bits everywhere.

    `reduce` sums the buffer over the processes; a rehearsal, which has none, leaves it.
    """
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    reduce(flat)
    flat /= num_ranks()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(mean.view_as(tensor))


def agreed(stop: StopFlag) -> bool:
    """Whether a signal came to any process; `stop` then says so in all."""
    number = largest(stop.signal_number or 0)
    if number and not stop:
        stop.signal_number = number
    return bool(number)


def largest(number: int) -> int:
    """The largest of all processes' numbers. Between hosts: no card is waited for."""
    if num_ranks() == 1:
        return number
    whole = torch.tensor(number)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    return int(whole)


def everyones(value: Any) -> list[Any]:
    """The values of all processes, in order of rank. Plain data and small."""
    values = [value] * num_ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call it in process 0 only; None in the others, which wait. What goes wrong is raised in all of them, unless memory ran out: what is to
    be said of that takes a while, and the first to leave would end all (torchrun). They wait on until process 0 has left."""
    if num_ranks() == 1:
        return function(*args, **kwargs)
    result, failure, told = None, None, [None]
    if rank() == 0:
        try:
            result = function(*args, **kwargs)
        except Exception as e:
            if exhausted(e):
                raise
            failure, told = e, [_plain(e)]
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if error := failure or told[0]:
        raise error
    return result


def _plain(error: Exception) -> Exception:
    """An error that travels, and ends a process as `error` does. Those of the trainer may hold what cannot, or is made otherwise again."""
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, error.strerror, error.filename)
    plain = TrainerError(str(error))
    plain.exit_code = getattr(error, "exit_code", 1)
    return plain


@contextmanager
def attended() -> Iterator[Callable[[], None] | None]:
    """Process 0 works within, however long, and calls what it gets at least every half hour, or the others take it for lost.
    They wait here until it is through, and get None.
    """
    working = torch.ones((), dtype=torch.long)

    def tell() -> None:
        if num_ranks() > 1:
            dist.broadcast(working, 0)

    while rank() and working:
        tell()
    try:
        yield None if rank() else tell
    finally:
        if not rank():
            working.zero_()
            tell()


def shared(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`on_main`, with the result in all processes. Plain data and small."""
    box = [on_main(function, *args, **kwargs)]
    if num_ranks() > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]
