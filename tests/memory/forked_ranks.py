"""Run pytest in two processes that see what torchrun would tell them. Forked from one that ran no operator: all is imported once.

    python tests/memory/forked_ranks.py PYTEST-ARGUMENT...
"""

import multiprocessing
import os
import socket
import sys

import pytest
import tiny_transformer  # noqa: F401  what takes long to import
import torch.distributed.fsdp  # noqa: F401


def _rank(rank: int, port: int, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    sys.exit(pytest.main(words))


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [multiprocessing.get_context("fork").Process(target=_rank, args=(rank, port, sys.argv[1:])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
