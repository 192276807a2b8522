"""Tests have the environment of a run, which must stand before torch is imported."""

import gc

from memory import environment

environment.prepare()


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections during the tests, up to a fifth of their time, need not look at it."""
    gc.collect()
    gc.freeze()
