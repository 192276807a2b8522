"""The doctor: a healthy machine, and one trouble at a time."""

import errno
import json
import os
import shutil
import sys
import warnings
from collections import namedtuple
from dataclasses import replace
from importlib import metadata
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run
from memory.cards import GIB, lookup
from memory.nvml import CardUnreadable
from memory.plan import PlanError
from trainer import cli, doctor
from trainer.doctor import Check, Unfit, raise_if_unfit, show

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def quick(monkeypatch):
    """The model's own check takes seconds and has a test of its own."""
    monkeypatch.setattr(doctor, "bundled_model", lambda: Check(name="bundled model", status="ok", found="runs"))


def _one(checks, name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_this_machine_is_fit_and_json_says_so(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "doctor", "--json"])
    assert run.main() == 0
    content = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in content["checks"]}
    assert content["healthy"] and {"python", "torch", "card", "host memory", "disk for runs", "bundled model"} <= names
    assert ("kernels" in names) == ("8-bit Adam" in names) == ("link" in names) == torch.cuda.is_available()
    assert all(check["status"] != "problem" for check in content["checks"])


@pytest.mark.slow
def test_the_bundled_model_runs():
    assert doctor.bundled_model().status == "ok"


def test_a_model_that_does_not_load_is_a_problem_with_a_code(monkeypatch):
    monkeypatch.setattr(doctor, "_generate_once", lambda: (_ for _ in ()).throw(OSError(errno.ENOENT, "no such file")))
    assert (doctor.bundled_model().status, doctor.bundled_model().exit_code) == ("problem", 5)
    monkeypatch.setattr(doctor, "_generate_once", lambda: (False, (9, 32, 32)))
    assert doctor.bundled_model().exit_code == 4


def test_packages_missing_and_old(monkeypatch):
    versions = {"torch": "1.13.0+cu117", "rich": "15.0.0", "tyro": None}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    checks = list(doctor.packages())
    assert _one(checks, "torch").status == "problem" and "--upgrade 'torch>=" in _one(checks, "torch").fix
    assert _one(checks, "diffusers").found == _one(checks, "tyro").found == "not installed" and _one(checks, "rich").status == "ok"
    assert [check.name for check in doctor.examine()][-1].startswith("disk")  # no model is tried without torch


def test_a_card_that_does_not_answer(monkeypatch):
    def lost():
        raise CardUnreadable("card 0 does not answer (GPU is lost)")

    monkeypatch.setattr(doctor, "detect", lost)
    card, check = doctor.the_card()
    assert card is None and (check.status, check.exit_code) == ("problem", 6) and "nvidia-smi" in check.fix


@pytest.mark.parametrize("built, newest, fix", [
    (None, "12.4", "it is built without CUDA; install one that is built with it"),
    ("13.0", "12.4", "it is built for CUDA 13.0 and the driver is for 12.4; update the driver, or install a torch built for CUDA 12"),
    ("12.6", "11.8", "it is built for CUDA 12.6 and the driver is for 11.8; update the driver"),
    ("12.8", "12.4", "it is built for CUDA 12.8; look at CUDA_VISIBLE_DEVICES, and whether nvidia-smi shows the card"),
    ("12.8", None, "it is built for CUDA 12.8; look at CUDA_VISIBLE_DEVICES, and whether nvidia-smi shows the card")])
def test_a_card_that_torch_cannot_use(monkeypatch, built, newest, fix):
    monkeypatch.setattr(doctor, "detect", lambda: replace(lookup("4090"), used_by_others_bytes=GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr("trainer.assemble.driver_cuda", lambda: newest)
    card, check = doctor.the_card()
    assert card is None and (check.status, check.exit_code, check.fix) == ("problem", 2, fix)
    assert check.found == "GeForce RTX 4090 is there, but torch cannot use it"


def test_little_memory_and_a_container(monkeypatch):
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: GIB)
    monkeypatch.setattr(doctor, "host_limit_bytes", lambda: 2 * GIB)
    check = _one(doctor.host(None), "host memory")
    assert check.status == "warning" and "1.0 GiB available" in check.found and "limited to 2.0" in check.found and check.fix


@pytest.mark.parametrize("name, free, writable, status, code", [
    ("disk for runs", 9 * GIB, True, "ok", 0), ("disk for runs", GIB, True, "warning", 0), ("disk for runs", 9 * GIB, False, "problem", 6),
    ("disk for models", 9 * GIB, True, "warning", 0), ("disk for models", 30 * GIB, False, "warning", 6)])
def test_disks(monkeypatch, name, free, writable, status, code, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    check = _one(doctor.disk(), name)
    assert (check.status, check.exit_code) == (status, code) and bool(check.fix) == (status != "ok")


def test_without_a_home_the_other_checks_are_made(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    found = {check.name: check.status for check in doctor.disk()}
    assert found["disk for the cache"] == "problem" and {"disk for runs", "disk for models"} <= set(found)


def test_a_place_that_cannot_be_looked_at_is_one_of_the_problems(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / (300 * "a")))
    found = {check.name: check for check in doctor.disk()}
    assert found["disk for the cache"].status == "problem" and "File name too long" in found["disk for the cache"].found
    assert {"disk for runs", "disk for models"} <= set(found)


def test_problems_end_with_the_code_of_the_first(monkeypatch, capsys):
    checks = [Check(name="a", status="ok", found=""), Check(name="b", status="problem", found="gone [1]", fix="bring it back", exit_code=6),
              Check(name="c", status="problem", found="", exit_code=2), Check(name="d", status="warning", found="")]
    with pytest.raises(Unfit, match="2 problems: b, c") as raised:
        raise_if_unfit(checks)
    assert raised.value.exit_code == 6
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    monkeypatch.setattr(sys, "argv", ["run.py", "doctor"])
    assert run.main() == 6
    captured = capsys.readouterr()
    assert "gone [1]" in captured.out and "→ bring it back" in captured.out and captured.err == "error: 2 problems: b, c\n"
    out = StringIO()
    show(checks, out, as_json=True)
    assert json.loads(out.getvalue())["healthy"] is False


def test_a_lost_card_ends_training_in_one_line(monkeypatch, capsys):
    def lost(argv):
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(cli, "main", lost)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 6
    assert capsys.readouterr().err.startswith("error: the card is lost (CUDA error: unknown error); what is saved is good: go on with python run.py --resume RUN once")


@pytest.mark.parametrize("said, what, setting", [
    ("CUDA driver error: operation not supported", "the card's driver fails where memory grows, as some do", "PYTORCH_ALLOC_CONF=expandable_segments:False"),
    ("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.", "cuDNN has no attention for this card",
     "TORCH_CUDNN_SDPA_DEPRIORITIZED=1")])
def test_what_the_cards_libraries_do_not_do_ends_in_one_line_and_a_way_around(said, what, setting, monkeypatch, capsys):
    def fail(*words):
        raise RuntimeError(said)

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(cli, "main", fail)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(doctor, "_generate_once", fail)
    assert run.main() == 6
    assert capsys.readouterr().err == f"error: {what} ({said}); put {setting} before the command\n"
    check = doctor.bundled_model()
    assert (check.status, check.exit_code, check.fix) == ("problem", 6, f"export {setting}")
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(RuntimeError):  # whatever it is then, it is nothing that is known
        run.main()


@pytest.mark.parametrize("argv, advice", [
    (["generate"], "fewer --frames, a smaller --height and --width and, beside a card, a larger --resident-blocks need less; or close"),
    (["forget"], "a smaller --batch-size and, beside a card, a larger --resident-blocks need less; or close")])
def test_a_host_without_memory_ends_in_one_line(argv, advice, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda argv: (_ for _ in ()).throw(MemoryError("no more")))
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    assert run.main() == 3
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory on the host (no more); ") and advice in said


def test_read_only_places_end_in_one_line(monkeypatch, capsys):
    def refuse(argv):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/somewhere/report.html")

    monkeypatch.setattr(cli, "main", refuse)
    monkeypatch.setattr(sys, "argv", ["run.py", "report", "x"])
    assert run.main() == 6
    assert capsys.readouterr().err == ("error: /somewhere/report.html: Read-only file system; choose a place that can be written and "
                                       "has room\n")


def test_the_driver_that_fails_to_say_its_version(monkeypatch):
    class NVMLError(Exception):
        pass

    def fail():
        raise NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError, nvmlInit=fail))
    assert doctor._driver() == "unknown"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert doctor._driver() == "unknown"


def test_whether_tritons_kernels_work(monkeypatch):
    from trainer.backbones import norm_rotate

    def broken(device):
        warnings.warn("Triton's kernels do not work here: no compiler", stacklevel=2)

    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    found = []
    for answer in (lambda device: norm_rotate, lambda device: None, broken):
        monkeypatch.setattr(norm_rotate, "working_kernels", answer)
        found.append(doctor.kernels())
    assert [check.status for check in found] == ["ok", "warning", "warning"]
    assert "not installed" in found[1].found and "no compiler" in found[2].found and "gcc" in found[2].fix


def test_whether_8_bit_adam_works(monkeypatch):
    assert doctor.eight_bit("cpu").status == "ok"
    monkeypatch.setattr("memory.optimizers.require_usable", lambda kind, device: (_ for _ in ()).throw(PlanError(f"no library for {kind}")))
    check = doctor.eight_bit("cpu")
    assert (check.status, check.found) == ("warning", "no library for adamw8bit")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)  # not installed, or not whole
    assert doctor.eight_bit("cpu").status == "warning" and "bitsandbytes" in doctor.eight_bit("cpu").found


def test_a_card_that_torch_was_not_built_for(monkeypatch):
    monkeypatch.setattr(doctor, "detect", lambda: lookup("v100-16gb"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_120"])
    card, check = doctor.the_card()
    assert card is None and check.status == "problem" and check.exit_code == 2
    assert "no kernels for compute capability 7.0, only for sm_75 sm_120; install one" in check.fix


def test_a_card_that_others_fill_ends_no_examination(quick, monkeypatch):
    from trainer.backbones import norm_rotate

    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(doctor, "the_card", lambda: (lookup("4090"), Check(name="card", status="ok", found="")))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(norm_rotate, "working_kernels", full)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: full(device))
    monkeypatch.setattr(doctor, "_best_seconds", lambda work, wait: full(None))
    checks = doctor.examine()
    assert [_one(checks, name).status for name in ("kernels", "8-bit Adam", "link", "bundled model")] == ["problem", "problem", "problem", "ok"]
    assert _one(checks, "kernels").exit_code == 3 and "cannot be tried (CUDA out of memory" in _one(checks, "kernels").found
    assert doctor._refused("link", RuntimeError("CUDA error: unspecified launch failure")).exit_code == 6


def test_a_model_for_which_there_is_no_memory_is_not_damaged(monkeypatch):
    monkeypatch.setattr(doctor, "_generate_once", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    check = doctor.bundled_model()
    assert check.exit_code == 3 and "nvidia-smi" in check.fix and "pretrain" not in check.fix
