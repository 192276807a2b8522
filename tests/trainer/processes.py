"""Run a function in several forked processes that see what torchrun would tell them. Forked: nothing is imported again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from trainer.distributed import joined
from trainer.errors import TrainerError

# Autograd counts devices once, and threads of its own, one a device, cannot be forked. Without a card there are none, if it counts
# before the simulator has said that there is one.
torch.ones((), requires_grad=True).backward()


@dataclass
class Ended:
    """How the processes ended: exit codes in order of rank, negative for a signal that killed."""

    codes: list[int]
    errors: list[str]


def in_processes(function: Callable[[int], object], num: int = 2, *, timeout: float = 120) -> Ended:
    """Call `function(rank)` in `num` processes, joined. A TrainerError becomes its exit code, as in run.py."""
    if torch.cuda.device_count():
        pytest.skip("a process with a card cannot be forked once autograd ran: CUDA_VISIBLE_DEVICES= pytest tests/trainer/test_distributed.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_child, args=(function, rank, num, port, queue)) for rank in range(num)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    stuck = [child for child in children if child.is_alive()]
    for child in stuck:
        child.kill()
        child.join()
    errors = []
    while not queue.empty():
        errors.append(queue.get())
    assert not stuck, f"{len(stuck)} of {num} processes did not end within {timeout} s: {errors}"
    return Ended([child.exitcode for child in children], errors)


def _child(function: Callable[[int], object], rank: int, num: int, port: int, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)  # before any operator: threads do not survive a fork
    code = 0
    try:
        with joined("cpu"):
            function(rank)
    except TrainerError as e:
        queue.put(f"rank {rank}: {e}")
        code = e.exit_code
    except BaseException as e:
        queue.put(f"rank {rank}: {type(e).__name__}: {e}")
        code = 1
    sys.stderr.flush()
    os._exit(code)
