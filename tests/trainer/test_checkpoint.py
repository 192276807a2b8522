import errno
import json
import logging
import os
import shutil
import stat
import struct
from collections import namedtuple
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import checkpoint, manifest
from trainer.checkpoint import Saver, compatible, latest_checkpoint, read_tensors, save_checkpoint
from trainer.errors import CheckpointError, InputOutputError
from trainer.lock import RunLock

TENSORS = {"adapter": {"up": torch.arange(6.0).reshape(2, 3)}, "optimizer": {}}
STATE = {"step": 1, "config": {"lr": 1e-4}, "note": "η = 7"}


def names(run_dir):
    return sorted(path.name for path in (run_dir / "ckpt").iterdir())


# --- saving and loading -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.bool])
def test_round_trip_is_bitwise(tmp_path, dtype):
    shared = torch.arange(12.0).reshape(3, 4)
    values = torch.randint(0, 2, (3, 5)).to(dtype)
    group = {
        "plain": values, "transposed": values.T, "scalar": values[0, 0], "empty": values[:0], "parameter": torch.nn.Parameter(shared[0]),
        "shared": shared, "shared_too": shared, "shared_row": shared[1], "nan": torch.tensor([float("nan"), -0.0]),
    }  # fmt: skip
    path = save_checkpoint(tmp_path, 7, tensors={"adapter": group, "optimizer": {}}, state=STATE)
    assert path == tmp_path / "ckpt/step-000007"
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.path, found.state) == (7, path, STATE)
    loaded = found.tensors("adapter")
    assert loaded.keys() == group.keys() and found.tensors("optimizer") == {}
    for name, tensor in group.items():
        assert (loaded[name].shape, loaded[name].dtype, loaded[name].device.type) == (tensor.shape, tensor.dtype, "cpu")
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8))


def test_loaded_tensors_outlive_the_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    loaded = latest_checkpoint(tmp_path).tensors("adapter")
    os.truncate(tmp_path / "ckpt/step-000001/adapter.safetensors", 0)  # would be a bus error under mmap
    loaded["up"].add_(1)
    assert torch.equal(loaded["up"], TENSORS["adapter"]["up"] + 1)


def test_files_have_the_mode_of_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    finally:
        os.umask(former)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_the_newest_two_stay(tmp_path):
    for step in (5, 10, 15, 1000000):
        save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)
    assert names(tmp_path) == ["step-000015", "step-1000000"]
    assert latest_checkpoint(tmp_path).step == 1000000  # ordered as numbers, not as names


def test_no_checkpoints_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "ckpt/.tmp-000001-1").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("step", [1, 2])
def test_another_runs_checkpoints_are_neither_replaced_nor_mixed(tmp_path, step):
    path = save_checkpoint(tmp_path, 2, tensors=TENSORS, state=STATE)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="belongs to another run"):
        save_checkpoint(tmp_path, step, tensors=TENSORS, state={})
    assert names(tmp_path) == ["step-000002"] and {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"path": object()}])
def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path, state):
    with pytest.raises((ValueError, TypeError)):
        save_checkpoint(tmp_path, 1, tensors=TENSORS, state=state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../adapter", "a/b", "", ".x", "manifest.json"])
def test_file_names_are_checked(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name"):
        save_checkpoint(tmp_path, 1, tensors={name: {}}, state={})


def test_missing_file_of_tensors_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    with pytest.raises(CheckpointError, match=r"no rng\.safetensors; it has adapter\.safetensors"):
        latest_checkpoint(tmp_path).tensors("rng")


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    monkeypatch.setattr("trainer.checkpoint.STAGES", (lambda _: pytest.fail("wrote"),))
    with pytest.raises(InputOutputError, match=r"MiB needed and 1\.00 MiB free"):
        save_checkpoint(tmp_path, 2, tensors=TENSORS, state=STATE)
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    def lose_a_page(save):
        checkpoint._sync_root(save)
        (save.final / "adapter.safetensors").write_bytes(bytes((save.final / "adapter.safetensors").stat().st_size))

    stages = [lose_a_page if stage is checkpoint._sync_root else stage for stage in checkpoint.STAGES]
    with monkeypatch.context() as patch, pytest.raises(InputOutputError, match="does not read back"):
        patch.setattr(checkpoint, "STAGES", stages)
        save_checkpoint(tmp_path, 2, tensors=TENSORS, state=STATE)
    assert names(tmp_path) == ["step-000001"]
    save_checkpoint(tmp_path, 2, tensors=TENSORS, state=STATE)  # the step is free for the next try


# --- finding the latest -----------------------------------------------------------------------------------------------------------------


def rewrite(path, **changes):
    body = json.loads(path.read_text()) | changes
    del body["sha256"]
    path.write_text(json.dumps({**body, "sha256": manifest._digest_of(body)}))


def test_a_newer_format_is_refused_but_left_alone(tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)
    rewrite(path / "manifest.json", format=2)
    with pytest.raises(CheckpointError, match="format 2 and this version reads 1: resume with the version that wrote it"):
        latest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("changes", [{"step": 3}, {"step": True}, {"files": {}}, {"files": []}, {"files": {"state.json": {"bytes": 1}}}])
def test_manifests_that_make_no_sense_are_bad(tmp_path, changes, caplog):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)
    rewrite(path / "manifest.json", **changes)
    assert latest_checkpoint(tmp_path).step == 1 and len(caplog.records) == 1


def test_a_manifest_without_the_state_is_bad(tmp_path, caplog):
    path = save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    files = json.loads((path / "manifest.json").read_text())["files"]
    del files["state.json"]
    rewrite(path / "manifest.json", files=files)
    with pytest.raises(CheckpointError):
        latest_checkpoint(tmp_path)
    assert "lists no state.json" in caplog.text and "using the one before" not in caplog.text  # there is none


def test_readers_rename_nothing(tmp_path, caplog):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)
    (path / "state.json").unlink()
    assert latest_checkpoint(tmp_path, rename_bad=False).step == 1
    assert "step-000002 is bad, using the one before" in caplog.text and names(tmp_path) == ["step-000001", "step-000002"]


def test_bad_ones_are_set_aside_under_free_names(tmp_path):
    (tmp_path / "ckpt/bad-step-000002").mkdir(parents=True)
    (tmp_path / "ckpt/step-000002").mkdir()
    save_checkpoint(tmp_path, 3, tensors=TENSORS, state=STATE)
    (tmp_path / "ckpt/step-000003/manifest.json").unlink()
    with pytest.raises(CheckpointError):
        latest_checkpoint(tmp_path)
    assert names(tmp_path) == ["bad-step-000002", "bad-step-000002-1", "bad-step-000003"]


def test_a_directory_that_cannot_be_renamed_does_not_stop_the_search(tmp_path, caplog, monkeypatch):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)
    (path / "state.json").unlink()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    assert latest_checkpoint(tmp_path).step == 1 and "Read-only" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_read_refused_for_other_reasons_condemns_nothing(tmp_path, monkeypatch, number):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors=TENSORS, state=STATE)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(InputOutputError, match="left as it is") as refused:
        patch.setattr(os, "open", refuse)
        latest_checkpoint(tmp_path)
    assert refused.value.exit_code == 6 and latest_checkpoint(tmp_path).step == 2


# --- resuming as something else ---------------------------------------------------------------------------------------------------------

SAVED = {
    "base_model": {"name": "a/model", "config_hash": "ab12"},
    "adapter": {"type": "adapter", "rank": 128, "width": 1920, "num_blocks": 30},
    "optimizer": "adamw",
    "config": {"plan": {"offload": False}},
}


def test_another_memory_plan_is_compatible():
    compatible(json.loads(json.dumps(SAVED)), {**SAVED, "config": {"plan": {"offload": True}}, "versions": {"torch": "3"}})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("base_model", {**SAVED["base_model"], "config_hash": "cd34"}, "--model .its configuration's hash. was 'ab12' and is 'cd34' now"),
        ("base_model", {**SAVED["base_model"], "name": "other"}, "base_model.name was 'a/model' and is 'other' now"),
        ("adapter", {**SAVED["adapter"], "rank": 64}, "--rank was 128 and is 64 now"),
        ("adapter", {**SAVED["adapter"], "type": "lora"}, "adapter.type was 'adapter' and is 'lora' now"),
        ("optimizer", "adamw8bit", "--optimizer was 'adamw' and is 'adamw8bit' now"),
    ],
)
def test_incompatible_states_are_refused_naming_field_and_values(field, value, named):
    with pytest.raises(CheckpointError, match=named) as refused:
        compatible(SAVED, {**SAVED, field: value})
    assert refused.value.exit_code == 5
    without = {key: old for key, old in SAVED.items() if key != field}
    with pytest.raises(CheckpointError, match=f"{field}.* was 'missing'"):
        compatible(without, SAVED)


# --- the policy -------------------------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)


def test_saver_counts_failures_in_a_row(tmp_path, monkeypatch, caplog):
    saver = Saver(tmp_path)
    for step in (1, 2):
        with monkeypatch.context() as patch:
            full_disk(patch)
            assert saver.save(step, tensors=TENSORS, state=STATE) is None
    assert saver.num_failures == 2 and "No space left" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert saver.save(3, tensors=TENSORS, state=STATE).name == "step-000003"
    assert saver.num_failures == 0
    full_disk(monkeypatch)
    for step in (4, 5):
        assert saver.save(step, tensors=TENSORS, state=STATE) is None
    with pytest.raises(InputOutputError, match="failure 3 of 3.*; older checkpoints in .*ckpt are untouched"):
        saver.save(6, tensors=TENSORS, state=STATE)
    assert latest_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("number, of_directories, saved", [(errno.EINVAL, True, True), (errno.EINVAL, False, False), (errno.EIO, True, False)])
def test_a_file_system_that_brings_no_directory_to_the_disk_will_do(tmp_path, monkeypatch, number, of_directories, saved):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_directories:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if saved else pytest.raises(InputOutputError):
        save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    monkeypatch.undo()
    assert bool(latest_checkpoint(tmp_path)) == saved


def test_saver_does_not_excuse_a_failed_last_save(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(InputOutputError, match="step 1 was not saved"):
        Saver(tmp_path).save(1, tensors=TENSORS, state=STATE, final=True)


def test_saver_speaks_of_no_checkpoints_where_there_are_none(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(InputOutputError, match="No space left") as error:
        Saver(tmp_path).save(1, tensors=TENSORS, state=STATE, final=True)
    assert "older" not in str(error.value)


def test_saver_saves_a_step_once(tmp_path):
    path = Saver(tmp_path).save(1, tensors=TENSORS, state=STATE)
    resumed = Saver(tmp_path, last_step=1)
    assert resumed.save(1, tensors=TENSORS, state=STATE, final=True) == path
    assert resumed.save(2, tensors=TENSORS, state=STATE).name == "step-000002"
    with pytest.raises(CheckpointError):  # a run that did not resume is stopped at once, not after three
        Saver(tmp_path).save(1, tensors=TENSORS, state=STATE)


def test_lock_needs_a_writable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputOutputError, match="cannot lock"), RunLock(tmp_path / "file"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    """What others may be writing there stays."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "ckpt" / ".tmp-000001-1").mkdir(parents=True)
    with RunLock(tmp_path):
        assert "this file system has no locks" in caplog.text and (tmp_path / "ckpt" / ".tmp-000001-1").is_dir()


def test_lock_removes_only_left_overs(tmp_path):
    save_checkpoint(tmp_path, 1, tensors=TENSORS, state=STATE)
    for name in (".tmp-000002-77", "bad-step-000000", ".tmp-mine"):
        (tmp_path / "ckpt" / name).mkdir()
    (tmp_path / "run.lock").write_text("123456789012345\n")  # of a dead holder: not what counts
    with RunLock(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()}:"), RunLock(tmp_path):
        pass
    assert names(tmp_path) == [".tmp-mine", "bad-step-000000", "step-000001"]


# --- arbitrary bytes: CheckpointError, or a value ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


MANIFEST_ENTRY = st.fixed_dictionaries({"bytes": JSON, "sha256": JSON | st.text("0123456789abcdef", min_size=64, max_size=64)})


def accept_or_refuse(read, *arguments):
    try:
        return read(*arguments)
    except CheckpointError:
        return None


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_fuzz_json_reader(data):
    value = accept_or_refuse(manifest.parse_json, data, "state.json")
    assert value is None or isinstance(value, dict)


@pytest.mark.parametrize("depth", [10, 200, 500, 900, 950, 990, 1000, 2000, 100000])
def test_deeply_nested_json_is_refused_not_a_crash(depth):
    accept_or_refuse(manifest.parse_manifest, b'{"files":' * depth + b"1" + b"}" * depth, 1)
    accept_or_refuse(manifest.parse_manifest, b'{"files":' + b"[" * depth + b"]" * depth + b"}", 1)
    with pytest.raises(CheckpointError):
        manifest.parse_json(b'{"step": 1' + b"0" * 5000 + b"}", "state.json")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.just(1) | JSON,
            "step": st.just(5) | JSON,
            "files": JSON | st.dictionaries(st.text(max_size=12), JSON | MANIFEST_ENTRY, max_size=3),
        },
    ),
    JSON,
)
def test_fuzz_manifest_signed_by_its_author(body, extra):
    """Everything that a hostile author could sign: what is accepted has plain names, sizes and digests."""
    body = {**body, "extra": extra}
    data = json.dumps({**body, "sha256": manifest._digest_of(body)}).encode()
    for name, entry in (accept_or_refuse(manifest.parse_manifest, data, 5) or {}).items():
        assert "/" not in name and name not in (".", "..") and isinstance(entry["bytes"], int) and len(entry["sha256"]) == 64


HEADER_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "?"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**62), max_size=3) | st.lists(st.integers(0, 3), max_size=3),
        "data_offsets": st.lists(st.integers(0, 2**62), max_size=3) | st.tuples(st.just(0), st.integers(0, 32)),
    },
)


@settings(deadline=None)
@given(
    header=st.binary(max_size=64)
    | st.dictionaries(st.text(max_size=4), HEADER_ENTRY | JSON, max_size=2).map(lambda header: json.dumps(header).encode()),
    length_off_by=st.sampled_from([0, 0, 0, 1, -1, 2**40]),
    data=st.binary(max_size=32),
)
def test_fuzz_tensor_reader(tmp_path_factory, header, length_off_by, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(header) + length_off_by)) + header + data)
    tensors = accept_or_refuse(read_tensors, path)
    assert tensors is None or all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_fuzz_tensor_reader_raw(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    accept_or_refuse(read_tensors, path)
