"""Fixtures on the tiny transformer of tiny_transformer.py."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from tiny_transformer import make_tiny


@pytest.fixture(params=["sincos", "rope"])
def kind(request):
    """The 2b's way with positions, and the 5b's."""
    return request.param


@pytest.fixture
def tiny(kind):
    return make_tiny(kind)


@pytest.fixture(scope="session", autouse=True)
def _processes():
    """Under torchrun, the process group that sharding needs."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    yield
    if dist.is_torchelastic_launched():
        dist.destroy_process_group()
