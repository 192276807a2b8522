"""What a run was predicted to need: memory.json, the live view's facts, and the report; measured peaks beside it."""

import dataclasses
import json
import time

import pytest

from memory.cards import lookup
from memory.plan import MemoryPlan
from memory.timeline import CATEGORIES
from trainer import memory_file
from trainer.clock import WAITING
from trainer.diagnose import diagnose_run
from trainer.errors import InputOutputError
from trainer.findings import finding
from trainer.health import Health
from trainer.loop import train
from trainer.memory_file import NUM_POINTS, MemoryForecast, keep_forecast, thinned
from trainer.monitor import watch
from trainer.planning import forecast_as_given
from trainer.report import write_report
from trainer.run_files import RunFiles, read_metrics

CARD = lookup("4090")


@pytest.fixture
def streamed(tiny_config):
    return tiny_config(memory=MemoryPlan(resident_blocks=0, boundaries="host"))


def test_the_timeline_is_thin_and_keeps_every_peak(tiny_config):
    found = forecast_as_given(tiny_config(), CARD)
    points = thinned(found.trace)
    assert len(list(found.trace.timeline())) > 2 * NUM_POINTS > len(points) > NUM_POINTS / 2
    assert list(dict.fromkeys(phase for phase, _ in points)) == ["load", "teacher", "student", "backward", "optimizer"]
    for phase, ours in (("student forward", "student"), ("student backward", "backward"), ("teacher", "teacher")):
        highest = max(total for p, total, _ in found.trace.timeline() if p == phase)
        assert max(sum(values) for p, values in points if p == ours) == highest
    assert {len(values) for _, values in points} == {len(CATEGORIES)}


def test_the_planners_word_is_used_for_its_own_plan_only(tiny_config):
    config = tiny_config()
    known = dataclasses.replace(forecast_as_given(config, CARD), needed_bytes=12345)
    assert MemoryForecast(CARD, known)(config)["predicted"]["needed_bytes"] == 12345
    other = dataclasses.replace(config, memory=MemoryPlan(resident_blocks=0))
    content = MemoryForecast(CARD, known)(other)
    assert content["predicted"]["needed_bytes"] != 12345 and content["plan"]["resident_blocks"] == 0


def test_a_forecast_is_made_once_a_plan_and_card(tiny_config, tmp_path, monkeypatch):
    config, asked = tiny_config(), []

    def counted(self, config):
        asked.append((self.card.name, config.memory))
        return {"card": self.card.name, "budget_bytes": 10, "plan": dataclasses.asdict(config.memory),
                "guidance_scale": config.output.guidance_scale, "num_processes": memory_file.num_ranks(), "predicted": {"needed_bytes": 7}}

    monkeypatch.setattr(MemoryForecast, "__call__", counted)
    forecast, facts = MemoryForecast(CARD), {"budget_bytes": 10, "predicted_peak_bytes": 7}
    assert keep_forecast(tmp_path, config, forecast) == keep_forecast(tmp_path, config, forecast) == facts
    assert keep_forecast(tmp_path, config, None) == facts and asked == [("rtx-4090", config.memory)]
    other = dataclasses.replace(config, memory=MemoryPlan(resident_blocks=0))
    assert keep_forecast(tmp_path, other, forecast) == facts and len(asked) == 2
    assert keep_forecast(tmp_path, other, MemoryForecast(lookup("h100"))) == facts and asked[2:] == [("h100", other.memory)]
    guided = dataclasses.replace(other, output=dataclasses.replace(other.output, guidance_scale=3.0))  # a run may go on with it
    assert keep_forecast(tmp_path, guided, MemoryForecast(lookup("h100"))) == facts and len(asked) == 4
    monkeypatch.setattr(memory_file, "num_ranks", lambda: 4)
    assert keep_forecast(tmp_path, guided, MemoryForecast(lookup("h100"))) == facts and len(asked) == 5  # who share the batch
    assert keep_forecast(tmp_path, config, None) == {} and not (tmp_path / "memory.json").exists()
    (tmp_path / "memory.json").write_text("{")
    assert keep_forecast(tmp_path, config, forecast) == facts
    with pytest.raises(InputOutputError, match="memory.json"):
        keep_forecast(tmp_path / "nowhere", config, forecast)


def test_a_run_keeps_prediction_peaks_and_waiting_time(streamed, monkeypatch):
    monitors = []

    def watched(*args):
        monitors.append(watch(*args))
        return monitors[0]

    monkeypatch.setattr("trainer.loop.watch", watched)
    run_dir = train(streamed, {}, forecast=MemoryForecast(CARD))
    files, records = RunFiles.read(run_dir), read_metrics(run_dir)
    predicted = files.memory["predicted"]
    assert files.memory["card"] == "rtx-4090" and files.memory["budget_bytes"] == CARD.usable_bytes
    assert predicted["step_seconds"] is None  # of so small a model the host is the limit
    assert monitors[0].facts == {"budget_bytes": CARD.usable_bytes, "predicted_peak_bytes": predicted["needed_bytes"],
                                 "trajectory_steps": streamed.data.trajectory_steps}
    assert predicted["peak_bytes"] == max(predicted["peak_bytes_by_phase"].values()) <= predicted["needed_bytes"]
    # Weights of both blocks stream, so copies take time; on the CPU nothing hides it.
    assert all(0 < r["phase_seconds"][WAITING] < sum(r["phase_seconds"].values()) for r in records[1:])
    measured = files.measured_peaks()
    assert {"encode prompts", "load", "pre-flight", "teacher", "student", "backward"} <= measured.keys()
    assert {"teacher", "student", "backward", "optimizer", "sample", "decode"} <= predicted["peak_bytes_by_phase"].keys()
    assert "load" not in predicted["peak_bytes_by_phase"]  # of the steps it is, whose optimizer has its state: not of reading the model
    assert min(measured.values()) > 2**24 and records[-1]["memory"]["process_bytes"] > 2**24
    page = write_report(run_dir).read_text()
    for wanted in ("One step by category, predicted", "measured (process)", "Without a card the whole process", "rtx-4090",
                   "transfer buffers", "waiting for transfers"):
        assert wanted in page, wanted


def test_a_run_that_is_far_slower_than_predicted_says_so(tiny_config, monkeypatch):
    monkeypatch.setattr("memory.timing.LAUNCH_S", 0.0)  # a host that is no limit, so that the card's time is the prediction
    run_dir = train(tiny_config(optim__steps=12), {}, forecast=MemoryForecast(CARD))
    expected = json.loads((run_dir / "memory.json").read_text())["predicted"]["step_seconds"]
    found, = (f for f in json.loads((run_dir / "findings.json").read_text())["findings"] if f["code"] == "slow-steps")
    assert found["evidence"]["predicted_seconds"] == expected < found["evidence"]["seconds"] / 3 and found["evidence"]["step"] >= 10
    assert "a step, predicted" in write_report(run_dir).read_text()
    (run_dir / "findings.json").unlink()
    assert "slow-steps" in {f.code for f in diagnose_run(run_dir).findings}
    (run_dir / "memory.json").unlink()
    assert "slow-steps" not in {f.code for f in diagnose_run(run_dir).findings}


def test_nothing_is_expected_of_a_cpus_steps(tiny_config):
    assert MemoryForecast(lookup("cpu"))(tiny_config())["predicted"]["step_seconds"] is None


def test_a_steps_time_is_that_of_all_its_phases(tiny_config, monkeypatch):
    step = Health._step_optimizer
    monkeypatch.setattr(Health, "_step_optimizer", lambda self, bad: (time.sleep(0.3), step(self, bad)))
    for record in read_metrics(train(tiny_config(optim__steps=2), {})):
        assert record["phase_seconds"]["optimizer"] >= 0.3
        assert record["seconds"] == pytest.approx(sum(record["phase_seconds"].values()))


def test_without_offload_nothing_waits(tiny_config):
    assert all(WAITING not in r["phase_seconds"] for r in read_metrics(train(tiny_config(optim__steps=3), {})))


def test_a_resumed_run_keeps_what_was_found_before(tiny_config):
    run_dir = train(tiny_config(optim__steps=3), {})
    path = run_dir / "findings.json"
    content = json.loads(path.read_text())
    fatal, mild = finding("non-finite-gradient", "backward", block=1), finding("dead-gelu", "training", block=0, severity="warning")
    content["findings"] += [fatal.as_json(), mild.as_json(), {"code": "half a finding"}]
    path.write_text(json.dumps(content))
    train(tiny_config(), {}, resume=run_dir)
    found = {f["code"]: f for f in json.loads(path.read_text())["findings"]}
    assert list(found) == ["zero-down-gradient", "non-finite-gradient", "dead-gelu"]
    assert found["non-finite-gradient"]["severity"] == "warning"  # it went on
    assert found["non-finite-gradient"]["evidence"] == {"stopped_an_earlier_start": True} and found["dead-gelu"] == mild.as_json()
