"""A tiny pipeline of each kind on disk, and a cache of embeddings of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.faults import PIPELINES, tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by kind; read only."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_pipeline(root / name, **kind) for name, kind in PIPELINES.items()}
