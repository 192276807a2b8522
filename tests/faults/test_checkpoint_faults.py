"""Faults put into saving and into what was saved: kills, power cuts, full disks, damage, hostile files, two writers."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trainer import checkpoint, manifest
from trainer.checkpoint import Saver, latest_checkpoint, read_tensors, save_checkpoint
from trainer.errors import CheckpointError, InputOutputError
from trainer.lock import RunLock

REPOSITORY = Path(__file__).parents[2]
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NUM_FLIPS = 64


def save(run_dir: Path, step: int) -> None:
    save_checkpoint(run_dir, step, **content(step))


def content(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "adapter": {"up": torch.randn(32, 8, generator=generator)},
        "optimizer": {"state1": torch.randint(0, 256, (512,), dtype=torch.uint8, generator=generator), "step": torch.tensor(float(step))},
    }
    return {"tensors": tensors, "state": {"step": step, "position": {"epoch": 0, "prompt": step}}}


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 1 and 2."""
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    return tmp_path / "run"


def newest_step(run_dir: Path) -> int:
    return latest_checkpoint(run_dir).step


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "ckpt").iterdir())


def damage_matters_once(run_dir: Path, caplog) -> None:
    """The newest checkpoint, step 2, is bad: it is reported and set aside once, and step 1 is used."""
    caplog.clear()
    assert newest_step(run_dir) == 1
    assert len(caplog.records) == 1 and "step-000002" in caplog.text
    assert names(run_dir) == ["bad-step-000002", "step-000001"]
    caplog.clear()
    assert newest_step(run_dir) == 1
    assert not caplog.records


# --- death and power cuts ---------------------------------------------------------------------------------------------------------------


def victim(*arguments: object) -> dict:
    command = [sys.executable, str(REPOSITORY / "tests/faults/checkpoint_victim.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_kills(result: dict, record_property) -> None:
    for key, value in result.items():
        record_property(key, value)
    assert result["went_back"] == 0 and result["bad"] == []
    assert result["step"] > result["kills"] // 4  # the children did save
    assert len(result["died_in_stage"]) >= 3  # and did not always die in the same place


def test_random_kills_while_saving(record_property):
    memory = Path("/dev/shm")  # a kill cannot tell it from a disk, and a busy disk would make this slow
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        check_kills(victim("kills", directory, 20, 0), record_property)


@pytest.mark.slow
def test_two_hundred_random_kills_while_saving(tmp_path, record_property):
    check_kills(victim("kills", tmp_path, 200, 1), record_property)


def test_each_crash_point_has_its_one_outcome(tmp_path, record_property):
    old = {"newest": 2, "left": [".tmp-000003", "step-000001", "step-000002"], "after_restart": ["step-000002", "step-000003"]}
    new = {"newest": 3, "left": ["step-000001", "step-000002", "step-000003"], "after_restart": ["step-000003", "step-000004"]}
    expected = {f"{when} {stage}": old if stage < 5 else new for stage in range(1, 8) for when in ("before", "after")}
    expected["before 1"] = {**old, "left": ["step-000001", "step-000002"]}
    expected["before 5"] = expected["inside 1"] = old
    expected["after 7"] = {**new, "left": ["step-000002", "step-000003"]}
    expected["inside 7"] = {**new, "left": [".tmp-000001", "step-000002", "step-000003"]}
    outcomes = victim("crashes", tmp_path)
    record_property("num_crash_points", len(outcomes))
    assert outcomes == expected


def test_order_of_calls(run_dir, monkeypatch):
    """fsync of each file < manifest < directory < rename < parent < prune, and no file changes after its fsync."""
    calls, synced = [], {}
    real_fsync, real_rename, real_rmtree = os.fsync, Path.rename, shutil.rmtree

    def short(path: Path) -> str:
        return path.name.removesuffix(f"-{os.getpid()}")

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(f"fsync {short(path)}")
        if path.is_file():
            synced[path.name] = (path.read_bytes(), path.stat().st_mode)
        real_fsync(descriptor)

    def rename(path, target):
        calls.append(f"rename {short(path)} {short(target)}")
        return real_rename(path, target)

    def rmtree(path, **options):
        calls.append(f"remove {short(path)}")
        real_rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(run_dir, 3)
    assert calls == [
        "fsync adapter.safetensors",
        "fsync optimizer.safetensors",
        "fsync state.json",
        "fsync manifest.json",
        "fsync .tmp-000003",
        "rename .tmp-000003 step-000003",
        "fsync ckpt",
        "rename step-000001 .tmp-000001",
        "remove .tmp-000001",
    ]
    final = run_dir / "ckpt" / "step-000003"
    assert synced == {path.name: (path.read_bytes(), path.stat().st_mode) for path in final.iterdir()}


# --- full disks -------------------------------------------------------------------------------------------------------------------------

WRITES = [(checkpoint, "save_file"), (os, "fsync"), (json, "dump"), *((Path, name) for name in ("mkdir", "write_text", "chmod", "rename"))]
DISK_ERRORS = {
    "OSError": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "RuntimeError": lambda: RuntimeError("[enforce fail at inline_container.cc:858] unexpected pos"),
    "SafetensorError": lambda: SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


def fail_call(monkeypatch, number: int, error: str) -> list[str]:
    """Make the `number`-th writing call of a save raise; returns the growing list of calls. Only safetensors hides its OSErrors."""
    calls: list[str] = []

    def failing(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                raise DISK_ERRORS[error]() if name == "save_file" else DISK_ERRORS["OSError"]()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in WRITES:
        failing(owner, name)
    return calls


CALLS_OF_A_SAVE = (
    ["mkdir", "save_file", "save_file", "write_text", "chmod", "fsync", "chmod", "fsync", "chmod", "fsync", "dump", "fsync"]
    + ["fsync", "rename", "fsync"]  # directory, commit, parent; the rename of the pruned one comes after
    + ["rename"]
)


def test_the_writing_calls_of_a_save(run_dir, monkeypatch):
    calls = fail_call(monkeypatch, 0, "OSError")
    save(run_dir, 3)
    assert calls == CALLS_OF_A_SAVE


@pytest.mark.parametrize("error", DISK_ERRORS)
@pytest.mark.parametrize("number", range(1, len(CALLS_OF_A_SAVE)))
def test_disk_full_at_each_write(run_dir, number, error, caplog):
    saver = Saver(run_dir, last_step=2)
    for attempt, step in enumerate((3, 4, 5), start=1):
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_call(patch, number, error)
            if attempt < 3:
                assert saver.save(step, **content(step)) is None
                assert f"step {step} was not saved (failure {attempt} of 3)" in caplog.records[-1].message
            else:
                with pytest.raises(InputOutputError, match="failure 3 of 3") as stop:
                    saver.save(step, **content(step))
                assert stop.value.exit_code == 6
        assert len(calls) == number  # nothing is written after a failure
        assert newest_step(run_dir) == 2 and names(run_dir) == ["step-000001", "step-000002"]
    assert saver.save(6, **content(6)).name == "step-000006" and saver.num_failures == 0


def test_an_old_checkpoint_that_cannot_be_removed_does_not_spoil_the_new_one(run_dir, monkeypatch, caplog):
    fail_call(monkeypatch, len(CALLS_OF_A_SAVE), "OSError")
    assert Saver(run_dir).save(3, **content(3)).name == "step-000003"
    assert "cannot remove the old checkpoint" in caplog.text
    assert newest_step(run_dir) == 3 and "step-000001" in names(run_dir)


def test_a_write_that_really_fails(run_dir):
    """The kernel refuses to let any file grow beyond 64 KiB; the file of 256 KiB is the second of the checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"adapter": {"up": torch.ones(4)}, "optimizer": {"state1": torch.ones(65536)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(InputOutputError, match="optimizer.safetensors"):
            save_checkpoint(run_dir, 3, tensors=big, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_step(run_dir) == 2 and names(run_dir) == ["step-000001", "step-000002"]
    save_checkpoint(run_dir, 3, tensors=big, state={})
    assert newest_step(run_dir) == 3


# --- damage -----------------------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def truncate_by_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path, offset: int = -1, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap_in_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_in_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, truncate_by_half, extend, flip, empty, Path.unlink, swap_in_a_directory, swap_in_a_pipe])
def test_damage_is_detected_and_the_one_before_is_used(run_dir, file, damage, caplog):
    damage(run_dir / "ckpt/step-000002" / file)
    damage_matters_once(run_dir, caplog)
    damage(run_dir / "ckpt/step-000001" / file)
    for _ in range(2):  # setting them aside must not make the run look like one without checkpoints
        with pytest.raises(CheckpointError, match="bad-step-000001") as refused:
            latest_checkpoint(run_dir)
    assert refused.value.exit_code == 5


def test_a_wrong_length_is_told_from_wrong_content(run_dir):
    path = run_dir / "ckpt/step-000002/adapter.safetensors"
    extend(path)
    with pytest.raises(CheckpointError, match=r"adapter.safetensors has 1,097 bytes where the manifest says 1,096"):
        manifest.verify(path.parent, 2)
    truncate(path)
    flip(path)
    with pytest.raises(CheckpointError, match="content of adapter.safetensors"):
        manifest.verify(path.parent, 2)


@pytest.mark.parametrize("file", FILES)
def test_each_flipped_bit_is_detected(run_dir, file, record_property):
    """One bit at each of 64 offsets, evenly over the file: length and header of safetensors, tensor data, the last byte."""
    path = run_dir / "ckpt/step-000002" / file
    size = path.stat().st_size
    assert manifest.verify(path.parent, 2)
    for index in range(NUM_FLIPS):
        offset = index * (size - 1) // (NUM_FLIPS - 1)
        flip(path, offset, index % 8)
        with pytest.raises(CheckpointError):
            manifest.verify(path.parent, 2)
        flip(path, offset, index % 8)
    record_property("num_flips", NUM_FLIPS)
    assert newest_step(run_dir) == 2


def test_every_bit_of_the_manifest_counts(run_dir):
    data = (run_dir / "ckpt/step-000002/manifest.json").read_bytes()
    assert set(manifest.parse_manifest(data, 2)) == {"adapter.safetensors", "optimizer.safetensors", "state.json"}
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointError) as refused:
            manifest.parse_manifest(bytes(flipped), 2)
        assert not isinstance(refused.value, manifest.NewerFormat)  # damage is not taken for a later version


# --- hostile files ----------------------------------------------------------------------------------------------------------------------


def rewrite_manifest(directory: Path, **changes) -> None:
    """Describe what is now in the directory, as its own writer would, with `changes` to the body."""
    (directory / "manifest.json").unlink()
    manifest.write_manifest(directory, int(directory.name.removeprefix("step-")))
    body = json.loads((directory / "manifest.json").read_text()) | changes
    del body["sha256"]
    (directory / "manifest.json").write_text(json.dumps({**body, "sha256": manifest._digest_of(body)}))


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def huge_header() -> bytes:
    return struct.pack("<Q", 2**62) + b"{}"


def header_beyond_the_data() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", len(header)) + header


def test_pickle_named_safetensors_is_refused_and_not_executed(run_dir, tmp_path):
    directory, traces = run_dir / "ckpt/step-000002", [tmp_path / "ran-pickle", tmp_path / "ran-torch"]
    for trace, write in zip(traces, (lambda data, path: path.write_bytes(pickle.dumps(data)), torch.save), strict=True):
        write(Payload(trace), directory / "adapter.safetensors")
        rewrite_manifest(directory)  # a hostile author signs what he wrote
        found = latest_checkpoint(run_dir)
        assert found.step == 2
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            found.tensors("adapter")
        assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(traces[0])))
    assert traces[0].exists()  # the payload was a live one


@pytest.mark.parametrize("data", [huge_header(), header_beyond_the_data(), b"", b"\x08" + b"\0" * 7, b"PK\x03\x04" + b"\0" * 64])
def test_hostile_headers_are_refused(tmp_path, data):
    (tmp_path / "adapter.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "a/b", "a\\b", ".hidden", "manifest.json", "a\0b", "\ud800"])
def test_names_that_lead_out_are_refused(run_dir, name):
    (run_dir / "ckpt/secret").write_text("s")
    directory = run_dir / "ckpt/step-000002"
    files = json.loads((directory / "manifest.json").read_text())["files"]
    rewrite_manifest(directory, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match="only plain file names"):
        manifest.verify(directory, 2)


@pytest.mark.parametrize("file", FILES)
def test_links_to_files_are_refused(run_dir, tmp_path, file, caplog):
    """Even to a file with the right content: what it points to may change after the check."""
    path = run_dir / "ckpt/step-000002" / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    damage_matters_once(run_dir, caplog)
    assert (tmp_path / file).is_file()


def test_links_to_directories_are_refused(run_dir, tmp_path, caplog):
    outside = (run_dir / "ckpt/step-000002").rename(tmp_path / "outside")
    (run_dir / "ckpt/step-000002").symlink_to(outside)
    damage_matters_once(run_dir, caplog)
    assert sorted(path.name for path in outside.iterdir()) == sorted(FILES)


def test_a_linked_checkpoint_root_is_refused_by_readers_and_writers(run_dir, tmp_path):
    outside = (run_dir / "ckpt").rename(tmp_path / "outside")
    (run_dir / "ckpt").symlink_to(outside)
    (outside / ".tmp-000009-1").mkdir()
    for attempt in (lambda: latest_checkpoint(run_dir), lambda: save(run_dir, 3)):
        with pytest.raises(CheckpointError, match="symbolic link"):
            attempt()
    with RunLock(run_dir):
        pass
    assert (outside / ".tmp-000009-1").is_dir()  # cleaning up does not follow it either


# --- two writers ------------------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from trainer.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_writer_is_refused_naming_the_first_whose_death_frees_the_run(run_dir):
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}:") as refused, RunLock(run_dir):
            pass
        assert refused.value.exit_code == 5
        left_over = run_dir / "ckpt" / f".tmp-000003-{holder.pid}"
        left_over.mkdir()
        (left_over / "adapter.safetensors").write_bytes(b"half")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(run_dir):
        assert names(run_dir) == ["step-000001", "step-000002"]
        assert (run_dir / "run.lock").read_text() == f"{os.getpid()}\n"
    with RunLock(run_dir):  # and it was given back
        pass


def test_a_checkpoint_that_cannot_be_looked_at_stays(run_dir, monkeypatch, caplog):
    """It is committed, and an error of looking, such as too many open files, says nothing of it. What it might have to be replaced by stays."""
    def blind(directory, step):
        raise InputOutputError("too many open files")

    saver = Saver(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.verify", blind)
        assert saver.save(3, **content(3)) == run_dir / "ckpt" / "step-000003"
    assert "was saved and not looked at: too many open files" in caplog.text
    assert names(run_dir) == ["step-000001", "step-000002", "step-000003"] and newest_step(run_dir) == 3
    saver.save(3, **content(3), final=True)  # of a run that ends there
    saver.save(4, **content(4))
    assert names(run_dir) == ["step-000003", "step-000004"]
