"""Every fault is named, at its block, within one step; and sound settings raise no alarm."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.faults import FAULTS, Fault, run_fault
from bench.watched import PIPELINES, healthy_settings, settings, tiny_pipeline, watch
from memory.compiling import compile_blocks
from trainer.findings import CODES

NUM_HEALTHY, NUM_HEALTHY_SLOW = 52, 150
NOT_INJECTED = {"frozen-weights-changed", "non-finite-loss", "slow-steps", "zero-down-gradient"}  # see tests/trainer


@pytest.fixture(scope="module", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cached embeddings of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by kind; read only."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_pipeline(root / name, **kind) for name, kind in PIPELINES.items()}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """The setting; compiled as far as autograd goes, which takes a tenth of the time."""
    monkeypatch.setitem(compile_blocks.__kwdefaults__, "backend", "aot_eager")
    return {"memory__compile": True}


def _case(fault: Fault, at: int):
    # One block of each fault in every run of the tests, all of them in the slow one.
    elsewhere = fault.name.endswith(("block 0", "block 2"))
    return pytest.param(fault, at, id=f"{fault.name}, step {at}", marks=[pytest.mark.slow] if elsewhere else [])


@pytest.mark.parametrize("fault, at", [_case(fault, at) for fault in FAULTS for at in fault.at])
def test_a_fault_is_named(fault: Fault, at: int, tiny_pipelines: dict[str, Path], tmp_path: Path) -> None:
    outcome = run_fault(fault, at, Path(shutil.copytree(tiny_pipelines[fault.pipeline], tmp_path / "model")))

    assert outcome.named == (fault.code, fault.block), [str(f) for f in outcome.bill.findings]
    if outcome.bill.fatal:
        assert outcome.stopped <= at + 1
        if fault.code != "non-finite-latents":  # the step that spoils the next latents is itself sound
            assert not outcome.touched
    assert all(f.evidence for f in outcome.bill.findings)


def test_every_code_is_put_to_the_test() -> None:
    assert {fault.code for fault in FAULTS} | NOT_INJECTED == set(CODES)


IN_COMPILED_BLOCKS = (
    "NaN in the student alone, block 1", "NaN in one gradient, block 1", "overflow of an fp16-native model, block 1",
    "checkpointing silently off, block 1", "eraser diverged, block 1", "untrained eraser acts, block 1", "switched off before recompute")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if i > 1 else []) for i, name in enumerate(IN_COMPILED_BLOCKS)])
def test_a_fault_is_named_in_compiled_blocks(name: str, tiny_pipelines: dict[str, Path], compiled) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    outcome = run_fault(replace(fault, settings=fault.settings | compiled), fault.at[0], tiny_pipelines[fault.pipeline])

    assert outcome.named == (fault.code, fault.block), [str(f) for f in outcome.bill.findings]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "bf16" else [pytest.mark.slow]) for kind in PIPELINES])
def test_compiled_blocks_raise_no_alarm(kind: str, tiny_pipelines: dict[str, Path], compiled) -> None:
    outcome = watch(settings(tiny_pipelines[kind], **compiled), num_steps=2)
    assert (outcome.named[0], outcome.stopped, outcome.touched) == ("healthy", None, True), outcome.bill.findings


def _healthy(first: int, last: int):
    return [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(healthy_settings(last)) if i >= first]


@pytest.mark.parametrize("kind, changes", _healthy(0, NUM_HEALTHY))
def test_no_false_alarm(kind: str, changes: dict, tiny_pipelines: dict[str, Path]) -> None:
    outcome = watch(settings(tiny_pipelines[kind], **changes), num_steps=2)
    assert (outcome.named[0], outcome.stopped, outcome.touched) == ("healthy", None, True), outcome.bill.findings


@pytest.mark.slow
@pytest.mark.parametrize("kind, changes", _healthy(NUM_HEALTHY, NUM_HEALTHY_SLOW))
def test_no_false_alarm_over_more_steps(kind: str, changes: dict, tiny_pipelines: dict[str, Path]) -> None:
    outcome = watch(settings(tiny_pipelines[kind], **changes), num_steps=8)
    assert (outcome.named[0], outcome.stopped) == ("healthy", None), outcome.bill.findings
