"""The environment that torch's allocator and cuBLAS start with."""

import os

import pytest

from memory import environment, host
from memory.cards import lookup

MIB = 1 << 20


def test_what_was_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8",
                                      "TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0", "TORCH_CUBLAS_WORKSPACE_CACHE": "0",
                                      "TRITON_DEFAULT_FP_FUSION": "0", "MKL_CBWR": "COMPATIBLE", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    before = dict(os.environ)
    environment.prepare()
    assert os.environ == before


def test_what_was_not_set_is_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    environment.prepare()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment.cublas_workspace_bytes() == 2 * 8.125 * MIB


@pytest.mark.parametrize("release, card, grow", [("6.12.9-generic", False, True), ("6.6.87.2-microsoft-standard-WSL2", False, False),
                                                 ("5.15.167.4-Microsoft", False, False), ("6.1.0-my-own-kernel", True, False)])
def test_segments_do_not_grow_under_wsl(release, card, grow, monkeypatch, tmp_path):
    monkeypatch.setattr(host.platform, "release", lambda: release)
    monkeypatch.setattr(host, "_WINDOWS_CARD", tmp_path if card else tmp_path / "none")
    monkeypatch.setattr(os, "environ", {})
    assert environment.expandable_segments() is grow
    environment.prepare()
    assert os.environ["PYTORCH_ALLOC_CONF"] == f"expandable_segments:{grow}" and environment.expandable_segments() is grow


def test_nothing_is_set_that_every_product_would_parse(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    environment.prepare()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("variables, grow", [
    ({}, True), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False), ({"PYTORCH_ALLOC_CONF": ""}, False),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments : True"}, True),
    ({"PYTORCH_ALLOC_CONF": "expandable_segments:False", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, False),
])
def test_segments_grow_unless_somebody_says_otherwise(variables, grow, monkeypatch):
    monkeypatch.setattr(os, "environ", variables)
    assert environment.expandable_segments() is grow


@pytest.mark.parametrize("name, mib", [("h100", 32), ("b200", 32), ("rtx-5090", 8.125), ("rtx-4090", 8.125), ("24gb", 8.125)])
def test_workspaces_are_torchs_own_for_a_card(name, mib, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert lookup(name).cublas_workspace_bytes == 2 * mib * MIB


@pytest.mark.parametrize("config, mib", [(":4096:2:16:8", 8.125), (":4096:8", 32), (":0:0", 0), ("much", 8.125), (None, 8.125)])
def test_a_workspace_for_forward_and_one_for_backward(config, mib, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert environment.cublas_workspace_bytes() == 2 * mib * MIB
