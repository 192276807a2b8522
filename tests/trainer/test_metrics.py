"""metrics.jsonl survives crashes, full disks and resumption; TensorBoard is an option with a clear message."""

import json
import sys
import types

import pytest

from trainer import cli
from trainer.config import TrainConfig, replaced
from trainer.errors import InputOutputError, UsageError
from trainer.metrics import MetricsLog, scalars
from trainer.run_directory import read_config, write_config
from trainer.run_files import METRICS, read_metrics


def test_floats_come_back_exactly(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 0, "loss": 0.1 + 0.2, "gradient_norm": float("nan")})
    log.close()
    (record,) = read_metrics(tmp_path)
    assert record["loss"] == 0.1 + 0.2 and record["gradient_norm"] != record["gradient_norm"]


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 0})
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 0}
    log.close()


def test_a_resumed_run_drops_steps_after_its_checkpoint_and_goes_on(tmp_path):
    first = MetricsLog(tmp_path)
    for step in range(5):
        first.write({"step": step, "half": 1})
    first.close()
    second = MetricsLog(tmp_path, first_step=3)
    second.write({"step": 3, "half": 2})
    second.close()
    assert [(r["step"], r["half"]) for r in read_metrics(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("damage", ['{"step": 1, "phase_seconds": {"teacher": 1.0}', '{"st', "\0\0\0", "}", '"text"', "\xff",
                                    '{"step": "5"}', '{"step": null}'])
def test_damaged_lines_are_left_out(tmp_path, damage):
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 0}\n' + damage.encode("latin-1"))
    assert read_metrics(tmp_path) == [{"step": 0}]
    log = MetricsLog(tmp_path, first_step=1)  # a resumed run does not append to half a line
    log.write({"step": 1})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("events", [3, None, [3]])
def test_events_that_are_none_are_passed_over(tmp_path, events):
    (tmp_path / METRICS).write_text(json.dumps({"step": 0, "events": events}) + "\n")
    log = MetricsLog(tmp_path, first_step=1, events=[{"event": "step-down"}])
    log.write({"step": 1})
    log.close()
    assert read_metrics(tmp_path)[1]["events"] == [{"event": "step-down"}]


class _Disk:
    """A file on a disk with `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[:self.room])
        self.room -= written
        return written

    def close(self):
        self.file.close()


def test_a_full_disk_warns_once_and_loses_nothing_if_room_comes_back(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log._file = disk = _Disk(log._file, room=20)
    for step in range(3):
        log.write({"step": step, "loss": 0.5})
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    disk.room = 10**6
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_what_never_reached_the_disk_is_reported(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log._file = _Disk(log._file, room=0)
    log.write({"step": 0})
    log.close()
    assert "could not be written" in caplog.records[-1].getMessage()


def test_an_unwritable_directory_is_an_input_output_error(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(InputOutputError, match="the run directory must be writable"):
        MetricsLog(tmp_path)


def test_scalars_by_tag():
    record = {"step": 7, "loss": 1, "phase_seconds": {"teacher": 0.5}, "gradient_norm_by_block": [1.0, 2.0], "note": "x"}
    assert scalars(record) == {"loss": 1.0, "phase_seconds/teacher": 0.5, "gradient_norm_by_block/00": 1.0,
                               "gradient_norm_by_block/01": 2.0}


def test_without_the_package_tensorboard_the_flag_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard, or say --no-tensorboard"):
        cli.main(["--tensorboard", "--device", "cpu", "--out", str(tmp_path / "new")])
    write_config(tmp_path, replaced(TrainConfig(), {"output.tensorboard": True}), {})
    assert read_config(tmp_path)[0].output.tensorboard  # it can still be generated from, and go on without
    with pytest.raises(UsageError, match="pip install tensorboard"):
        cli.main(["--resume", str(tmp_path)])


@pytest.fixture
def tensorboard(monkeypatch):
    """Makes its writer be there, on a disk with room for a number of values; returns what was written."""
    written, room = [], [1000]

    def write(what):
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= 1
        written.append(what)

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            write((log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            write((tag, value, step))

        def close(self):
            write("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return written, room


def test_tensorboard_gets_every_number(tmp_path, tensorboard):
    log = MetricsLog(tmp_path, first_step=3, tensorboard=True)
    log.write({"step": 3, "loss": 0.5, "phase_seconds": {"teacher": 1.5}})
    log.close()
    assert tensorboard[0] == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3), ("phase_seconds/teacher", 1.5, 3), "closed"]


@pytest.mark.parametrize("room", [2, 4], ids=["in a step", "in closing"])
def test_a_full_disk_ends_tensorboards_files_and_not_the_run(tmp_path, tensorboard, room, caplog):
    tensorboard[1][0] = room
    log = MetricsLog(tmp_path, tensorboard=True)
    for step in range(3):
        log.write({"step": step, "loss": 0.5})
    log.close()
    assert len(read_metrics(tmp_path)) == 3 and len(tensorboard[0]) == room
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path / 'tensorboard'} ends here, it cannot be written ([Errno 28] No space left on device)"]
