"""Fixtures on the tiny transformer of tiny_transformer.py."""

import pytest
from tiny_transformer import make_tiny


@pytest.fixture(params=["sincos", "rope"])
def kind(request):
    """The 2b's way with positions, and the 5b's."""
    return request.param


@pytest.fixture
def tiny(kind):
    return make_tiny(kind)
