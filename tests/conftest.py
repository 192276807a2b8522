"""Tests have the environment of a run, which must stand before torch and the hub's library are imported."""

import gc
import os

import pytest

from memory import environment

gc.disable()  # imports leave nothing to collect
environment.prepare()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: threads that wait for each other's cores take several times as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes to compile in take longer to start than what is compiled here


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA card")


def pytest_collection_finish() -> None:
    """Collections during the tests, up to a fifth of their time, are rarer, and need not look at what is imported by now and stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain at the end of what is never taken down
