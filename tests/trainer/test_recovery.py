"""Memory that runs out, put into every phase: where it stops, what it says, and that a step down changes no number."""

import gc
import logging
import re
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
from compared_runs import differences
from torch._subclasses.fake_tensor import FakeTensor

import memory.lockstep
import run
from memory.advice import Advice
from memory.cards import lookup
from memory.plan import MemoryPlan
from trainer import checkpoint, loop, losses, recovery, samples, tracing
from trainer.arguments import resolve
from trainer.assemble import Assembly
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.text_encoder import TextEncoder
from trainer.checkpoint import latest_checkpoint
from trainer.config import replaced
from trainer.eraser_files import load_eraser
from trainer.errors import DoesNotFit, InputOutputError, OutOfMemory
from trainer.health import Health
from trainer.latents import TrajectoryLatents
from trainer.loop import train
from trainer.planning import forecast
from trainer.prompts import Embeddings
from trainer.recovery import Failure, cheaper, described, train_in_memory
from trainer.run_directory import program, read_config
from trainer.run_files import read_metrics

MESSAGE = "CUDA out of memory. Tried to allocate 4.00 KiB. GPU 0 has a total capacity of 8.00 GiB"


def _failing(owner, name: str, *, call: int, after: bool = False):
    """(owner, name, function): the `call`-th call raises, before its work or after it."""
    real, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise torch.OutOfMemoryError(MESSAGE)
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise torch.OutOfMemoryError(MESSAGE)
        return result

    return owner, name, function


@pytest.fixture
def config(tiny_config):
    """Settings of a run of 4 steps that saves after the second, in the middle of a trajectory."""
    def make(**overrides):
        return tiny_config(**{"optim__steps": 4, "output__save_every": 2, "data__batch_size": 1, "output__sample_steps": 1} | overrides)

    return make


NUM_STATES = 8  # adapter tensors of the pipeline's 2 blocks: each has its state made by a call of the optimizer
# Calls are counted from the start: the optimizer makes its state, the pre-flight takes one step, and tries the optimizer once.
# phase -> (what fails, finished steps, newest checkpoint afterwards)
PHASES = {
    "load": (lambda: _failing(CogVideoX, "load_transformer", call=1), None, None),
    "optimizer": (lambda: _failing(torch.optim.AdamW, "step", call=1), None, None),
    "teacher of the pre-flight": (lambda: _failing(losses.Teacher, "passes", call=1), 0, None),
    "backward of the pre-flight": (lambda: _failing(torch.autograd, "backward", call=1), 0, None),
    "optimizer of the pre-flight": (lambda: _failing(torch.optim.AdamW, "step", call=NUM_STATES + 1), 0, None),
    "teacher": (lambda: _failing(losses.Teacher, "passes", call=5), 3, 3),
    "teacher, latents already moved": (lambda: _failing(TrajectoryLatents, "advance", call=9, after=True), 3, 3),
    "student": (lambda: _failing(F, "mse_loss", call=10), 3, 3),
    "backward": (lambda: _failing(torch.autograd, "backward", call=10), 3, 3),
    "backward, first step": (lambda: _failing(torch.autograd, "backward", call=4), 0, None),
    "optimizer, before": (lambda: _failing(torch.nn.utils, "clip_grads_with_norm_", call=4), 3, 3),
    "optimizer, while it moves weights": (lambda: _failing(torch.optim.AdamW, "step", call=NUM_STATES + 5), 3, 2),
    "optimizer, after": (lambda: _failing(torch.optim.AdamW, "step", call=NUM_STATES + 5, after=True), 3, 2),
    "save": (lambda: _failing(checkpoint, "_to_host", call=1), 2, 2),
}


def _in_memory(config, *, step_down: bool, command=("python", "run.py", "--rank", "4")):
    return train_in_memory(train, config, {}, resume=None, card=lookup("24gb"), step_down=step_down, command=command)


@pytest.fixture(scope="module")
def reference():
    """The run without an error: made once, by the first test that asks."""
    made = {}

    def run_of(config):
        if not made:
            made["run"] = train(config, {})
        return made["run"]

    return run_of


QUICK = ("load", "backward", "teacher, latents already moved", "optimizer, while it moves weights", "save")


@pytest.mark.parametrize("phase", [pytest.param(phase, marks=[] if phase in QUICK else [pytest.mark.slow]) for phase in PHASES])
def test_a_step_down_in_any_phase_ends_with_the_same_bits(phase, config, reference, tmp_path_factory, monkeypatch, caplog):
    straight = reference(config(output__out=tmp_path_factory.getbasetemp() / "recovery-straight"))
    fault, step, saved = PHASES[phase]
    settings = config()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "trainer.recovery"):
        patch.setattr(*fault())
        run_dir = _in_memory(settings, step_down=True)
    said = next(r.getMessage() for r in caplog.records if r.name == "trainer.recovery")
    assert f"out of memory on the device in {phase.split(',')[0]}, after {step or 0} steps" in said
    if saved is not None:
        assert f"step {saved} is saved in {run_dir}" in said
    plan = read_config(run_dir)[0].memory
    assert plan != MemoryPlan() and plan.optimizer == "adamw"
    records = read_metrics(run_dir)
    events = [(r["step"], e) for r in records for e in r.get("events", ())]
    assert [e["event"] for _, e in events] == ["step-down"] and events[0][1]["phase"] == phase.split(",")[0]
    assert events[0][0] == (saved or 0)  # told in the first record of the new plan
    changed = {name for name, value in vars(plan).items() if value != getattr(MemoryPlan(), name)}
    assert set(events[0][1]["change"]) == changed and events[0][1]["predicted_bytes"] > 0
    metrics = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(re.sub(r', "events": \[\{.*?\}\]', "", metrics))
    assert not differences(straight, run_dir)


def test_a_step_down_gives_pinned_memory_back_before_it_goes_on(config, monkeypatch, tmp_path):
    told = []

    def train(*args, **more):
        told.append("train")
        if len(told) == 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return tmp_path

    monkeypatch.setattr(recovery, "release_pinned", lambda: told.append("release"))
    assert train_in_memory(train, config(), {}, resume=None, card=lookup("24gb"), step_down=True, command=("python", "run.py")) == tmp_path
    assert told == ["train", "release", "train"]


@pytest.mark.parametrize("phase, fault", [
    ("student", lambda: _failing(memory.lockstep.Lockstep, "_rest", call=11)),  # five a step: in the third
    ("teacher", lambda: _failing(Embeddings, "__call__", call=10)),  # three a step, the pre-flight's too
    ("teacher", lambda: _failing(losses.Teacher, "_advance", call=7)),  # two a step, the pre-flight's too
    ("backward", lambda: _failing(torch.autograd, "backward", call=5)),  # one a step; two in the pre-flight, which is not in lockstep
])
def test_a_step_down_from_lockstep_ends_with_the_same_bits(phase, fault, config, reference, tmp_path_factory, monkeypatch, caplog):
    straight = reference(config(output__out=tmp_path_factory.getbasetemp() / "recovery-straight"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "trainer.recovery"):
        patch.setattr(*fault())
        run_dir = _in_memory(config(memory__passes="lockstep"), step_down=True)
    said = next(r.getMessage() for r in caplog.records if r.name == "trainer.recovery")
    assert f"out of memory on the device in {phase}, after 2 steps" in said and read_config(run_dir)[0].memory != MemoryPlan(passes="lockstep")
    expected, found = (load_eraser(run).state for run in (straight, run_dir))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_where_the_host_pins_no_more_the_plan_that_needs_less_of_it_goes_on(config, reference, tmp_path_factory, monkeypatch, caplog):
    """Of two streamed blocks one finds room. Where the card has room for both they go there."""
    straight = reference(config(output__out=tmp_path_factory.getbasetemp() / "recovery-straight"))
    settings, real, made = config(memory__resident_blocks=0, memory__boundaries="host"), torch.empty, []

    def refusing(*args, **kwargs):
        if kwargs.get("device") == "cpu" and "pin_memory" in kwargs:  # as masters are made
            made.append(1)
            if len(made) == 2:
                raise RuntimeError("CUDA error: out of memory")
        return real(*args, **kwargs)

    def run_on_a_card(**how):
        made.clear()
        return train_in_memory(train, settings, {}, resume=None, card=lookup("8gb"), command=("python", "run.py"), **how)

    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": 1 << 20})
    monkeypatch.setattr(torch, "empty", refusing)
    with pytest.raises(DoesNotFit, match="out of memory on the host in load, after 0 steps: no more of the host's memory can be pinned than the 1.00 MiB") as raised:
        run_on_a_card(step_down=False)
    *_, cheaper, command = str(raised.value).splitlines()
    assert re.fullmatch(r"cheaper: the fastest plan that pins no more of the host's memory \(predicted: 0\.\d\d MiB pinned\)", cheaper)
    assert resolve(shlex.split(command)[2:])[0].settings.memory == MemoryPlan(checkpoint="none")
    with caplog.at_level(logging.WARNING, "trainer.recovery"):
        run_dir = run_on_a_card(step_down=True)
    assert "going on with that" in caplog.text and read_config(run_dir)[0].memory.resident_blocks is None
    expected, found = (load_eraser(run).state for run in (straight, run_dir))
    assert all(expected[name].equal(found[name]) for name in expected)


@pytest.mark.parametrize("phase, settings, fault", [
    ("teacher", {"data__pool": 4}, (losses.Sample, "parked")), ("teacher", {"data__pool": 4}, (losses.Sample, "to")),
    ("optimizer", {}, ("trainer.health.average",))])
def test_what_is_around_a_pass_is_of_the_phase_that_the_clock_says(phase, settings, fault, config, monkeypatch):
    monkeypatch.setattr("trainer.health.num_ranks", lambda: 2)  # as of several processes, whose gradients are averaged
    monkeypatch.setattr(*fault, _exhausted)
    with pytest.raises(DoesNotFit, match=rf"out of memory .* in {phase}, after 0 steps(.|\n)*predicted: .* in {phase}\)"):
        _in_memory(config(**settings), step_down=False)


@pytest.mark.parametrize("phase", ["backward of the pre-flight", "backward", pytest.param("load", marks=pytest.mark.slow),
                                   pytest.param("save", marks=pytest.mark.slow)])
def test_stop_says_where_and_what_to_paste(phase, config, monkeypatch):
    fault, step, saved = PHASES[phase]
    settings = config()
    with monkeypatch.context() as patch:
        patch.setattr(*fault())
        with pytest.raises(DoesNotFit) as raised:
            _in_memory(settings, step_down=False)
    assert raised.value.exit_code == 3
    lines = str(raised.value).splitlines()
    assert lines[0] == f"out of memory on the device in {phase}, after {step or 0} steps: {MESSAGE}"
    words = shlex.split(lines[-1])
    if saved is None:
        assert words[:4] == ["python", "run.py", "--rank", "4"] and "--boundaries" in words
    else:
        assert latest_checkpoint(settings.output.out).step == saved
        assert words[:4] == ["python", "run.py", "--resume", str(settings.output.out)] and "--boundaries" not in words[4:-2]
        assert any(line.startswith("peak, GiB") for line in lines)
        assert [line.split()[0] for line in lines if line.split()[0] in ("teacher", "student", "backward", "optimizer")] == [
            "teacher", "student", "backward", "optimizer"]
    assert lines[-2].startswith("cheaper: ") and "predicted" in lines[-2]


@pytest.mark.parametrize("phase", ["load", "teacher of the pre-flight"])
def test_a_run_that_goes_on_has_the_steps_of_its_checkpoint_before_it_is_restored(phase, config, monkeypatch):
    settings = config()
    run_dir = train(replaced(settings, {"optim.steps": 2}), {})
    monkeypatch.setattr(*PHASES[phase][0]())
    with pytest.raises(DoesNotFit, match=f"in {phase}, after 2 steps"):
        train_in_memory(train, settings, {}, resume=run_dir, card=lookup("cpu"), step_down=False, command=("python", "run.py", "--resume", "RUN"))


def test_a_run_that_goes_on_by_other_settings_keeps_them_in_the_command(config, monkeypatch):
    """What it says of itself is still what it was before."""
    settings = config(optim__schedule="constant", optim__steps=4)
    run_dir = train(replaced(settings, {"optim.steps": 2}), {})
    again = replaced(settings, {"memory.resident_blocks": 0})
    command = ("python", "run.py", "--resume", str(run_dir), "--steps", "4", "--resident-blocks", "0")
    with monkeypatch.context() as patch:
        patch.setattr(*PHASES["backward of the pre-flight"][0]())
        with pytest.raises(DoesNotFit) as raised:
            train_in_memory(train, again, {}, resume=run_dir, card=lookup("24gb"), step_down=False, command=command)
        patch.setattr(*PHASES["backward of the pre-flight"][0]())
        train_in_memory(train, again, {}, resume=run_dir, card=lookup("24gb"), step_down=True, command=command)
    words = shlex.split(str(raised.value).splitlines()[-1])
    assert words[:6] == [*command[:6]] and words[words.index("--resident-blocks") + 1] == "0" and "--boundaries" in words
    assert latest_checkpoint(run_dir).step == 4 and read_config(run_dir)[0].memory.resident_blocks == 0


def test_of_divided_blocks_the_command_names_nothing_that_contradicts_them(config):
    advice = Advice(plan=MemoryPlan(num_shards=2, boundaries="host"), change={"boundaries": "host"}, why="", needed_bytes=0)
    words = shlex.split(recovery.command_of(advice, ("torchrun", "--nproc-per-node=2", "--", "run.py", "--batch-size", "2"), begun=False))
    assert words[words.index("--num-shards") + 1] == "2" and not {"--resident-blocks", "--passes"} & set(words)
    origins = resolve(words[words.index("run.py") + 1:])[1]
    given = {name.removeprefix("memory.") for name, origin in origins.items() if origin == "flag"}
    assert {"num_shards", "boundaries", "checkpoint"} < given
    assert forecast(config(memory=advice.plan, data__batch_size=2), lookup("24gb"), given, num_cards=2).chosen.plan == advice.plan
    assert recovery.command_of(advice, ("run.py",), begun=True) == "run.py --boundaries host"


def test_where_no_plan_helps_it_says_what_would(config, monkeypatch, tmp_path):
    """The text encoder needs what it needs, whatever the plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no embeddings of earlier runs
    monkeypatch.setattr(*_failing(TextEncoder, "encode", call=1))
    with pytest.raises(DoesNotFit, match="in encode prompts, after 0 steps(.|\n)*no memory plan needs less there: the text encoder"):
        _in_memory(config(), step_down=True)


def test_the_pasted_command_goes_on(config, reference, tmp_path_factory, monkeypatch, capsys):
    straight = reference(config(output__out=tmp_path_factory.getbasetemp() / "recovery-straight"))
    with monkeypatch.context() as patch:
        patch.setattr(*PHASES["backward"][0]())
        with pytest.raises(DoesNotFit) as raised:
            _in_memory(config(), step_down=False)
    monkeypatch.setattr(sys, "argv", shlex.split(str(raised.value).splitlines()[-1])[1:])
    assert run.main() == 0
    run_dir = capsys.readouterr().out.splitlines()[-1].removeprefix("run: ")
    assert not differences(straight, config().output.out)
    assert run_dir == str(config().output.out)


@pytest.mark.parametrize("phase", ["student", "encode prompts"])
def test_without_a_card_nothing_is_advised_that_takes_one(phase):
    failure = Failure(phase=phase, whose="host", said="can't allocate memory", requested_bytes=None, peaks={})
    here, elsewhere = (described(failure, None, None, on_cpu=on_cpu).splitlines()[-1] for on_cpu in (True, False))
    assert here.startswith("no memory plan needs less there") and "card" not in here and "--device cpu" not in here
    assert "keep more on the card" in elsewhere or "--device cpu" in elsewhere


def test_processes_that_torchrun_started_are_started_by_it_again(config, monkeypatch):
    """One alone would have all rows of the batch, and need more."""
    monkeypatch.setattr(*_failing(torch.autograd, "backward", call=4))
    with pytest.raises(DoesNotFit) as raised:
        _in_memory(config(), step_down=False, command=(*program(2), "--rank", "4"))
    words = shlex.split(str(raised.value).splitlines()[-1])
    assert words[:6] == ["torchrun", "--nproc-per-node=2", "--", "run.py", "--resume", str(config().output.out)]
    assert [*program(1)] == ["python", "run.py"]


def test_running_out_again_and_again_ends_when_no_plan_is_left(config, monkeypatch):
    real, seen = torch.autograd.backward, []

    def never_enough(*args, **kwargs):
        seen.append(isinstance(args[0], FakeTensor))  # the planner's own rehearsal has memory
        if not seen[-1] and len(seen) > 2:  # the pre-flight's first step passes
            raise torch.OutOfMemoryError(MESSAGE)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", never_enough)
    with pytest.raises(DoesNotFit, match="no memory plan needs less there; fewer --frames"):
        _in_memory(config(), step_down=True)
    assert 3 < seen.count(False) < 20


def test_on_the_command_line(config, monkeypatch, capsys, tmp_path):
    settings = config(optim__steps=2)
    argv = ["run.py", "--on-oom", "step-down", "--model", settings.model.model, "--prompts", str(settings.data.prompts), "--preserve",
            "a blue circle", "--rank", "4", "--steps", "2", "--trajectory-steps", "2", "--sample-steps", "1", "--device", "cpu",
            "--out", str(tmp_path / "run"), "--monitor", "off"]
    monkeypatch.setattr(sys, "argv", argv)
    with monkeypatch.context() as patch:
        patch.setattr(*_failing(torch.autograd, "backward", call=4))
        assert run.main() == 0
    assert "events" in read_metrics(tmp_path / "run")[0]
    monkeypatch.setattr(sys, "argv", [word.replace("step-down", "stop").replace(str(tmp_path / "run"), str(tmp_path / "other")) for word in argv])
    with monkeypatch.context() as patch:
        patch.setattr(*_failing(torch.autograd, "backward", call=4))
        assert run.main() == 3
    captured = capsys.readouterr()
    assert captured.out.count("run: ") == 1
    assert captured.err.splitlines()[-1].startswith(f"python run.py --resume {tmp_path / 'other'} --")


def test_in_sampling_it_is_a_warning_and_training_goes_on_as_if_it_had_not_been(config, reference, tmp_path_factory, monkeypatch, caplog):
    straight = reference(config(output__out=tmp_path_factory.getbasetemp() / "recovery-straight"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "trainer.samples"):
        patch.setattr(*_failing(samples, "generate_latents", call=1))
        run_dir = _in_memory(config(output__sample_every=2), step_down=False)
    assert "sampling at step 0 failed, training is not affected" in caplog.text
    assert not differences(straight, run_dir)


def test_where_the_second_look_runs_out_too_the_run_is_known_all_the_same(config, monkeypatch):
    """The record of the step before is not finite, and memory runs out before it was looked at, and once more in looking."""
    def spoilt(self, step, terms, apply=Health.apply):
        apply(self, step, terms)
        if step == 2:
            self._pending.values[0] = float("nan")

    monkeypatch.setattr(Health, "apply", spoilt)
    monkeypatch.setattr(*_failing(losses.Teacher, "passes", call=5))
    monkeypatch.setattr("trainer.health.trace", _exhausted)
    with pytest.raises(DoesNotFit, match=r"out of memory .* in teacher.*\n.*step 2 is saved in"):
        _in_memory(config(), step_down=False)


def test_where_the_rescue_cannot_be_written_the_newest_checkpoint_is_named(config, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise InputOutputError("no space left")

    monkeypatch.setattr(*PHASES["teacher"][0]())
    monkeypatch.setattr(recovery, "save_checkpoint", full)
    with pytest.raises(OutOfMemory) as raised:
        train(config(), {})
    assert raised.value.failure.saved_step == 2
    assert "step 3 could not be saved after memory ran out: no space left" in caplog.text


def test_a_defect_found_in_the_rescue_is_not_taken_for_want_of_memory(config, monkeypatch):
    def flush(self):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(*PHASES["teacher"][0]())
    monkeypatch.setattr(Health, "flush", flush)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(config(), {})


def _exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError(MESSAGE)


def test_nothing_of_the_failed_step_is_held_when_the_next_plan_starts(config, monkeypatch):
    held = []

    def counting(settings, origins, **more):
        gc.collect()
        held.append(sum(isinstance(found, Assembly) for found in gc.get_objects()))
        return train(settings, origins, **more)

    with monkeypatch.context() as patch:
        patch.setattr(*PHASES["backward"][0]())
        train_in_memory(counting, config(), {}, resume=None, card=lookup("cpu"), step_down=True, command=("python", "run.py"))
    assert held == [held[0], held[0]]


def test_an_unsound_step_is_not_saved_by_a_rescue(config, monkeypatch):
    """Memory runs out while the watcher looks for the cause of a NaN: the weights of that step are not to be trusted."""
    original = losses.student_backward
    calls = []

    def poisoned(predict, erasers, *args, **kwargs):
        terms = original(predict, erasers, *args, **kwargs)
        calls.append(1)
        return terms | {"loss": terms["loss"] * float("nan")} if len(calls) == 2 else terms

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(loop, "student_backward", poisoned)
    monkeypatch.setattr(tracing, "student_backward", no_room)
    settings = config()
    with pytest.raises(OutOfMemory, match="of the second pass"):
        train(settings, {})
    assert latest_checkpoint(settings.output.out) is None


def test_the_step_down_asks_for_as_much_as_the_failed_request(config):
    settings = config()
    small = cheaper(settings, lookup("4090"), Failure(phase="backward", whose="device", said="", requested_bytes=None, peaks={}))
    much = cheaper(settings, lookup("4090"), Failure(phase="backward", whose="device", said="", requested_bytes=1 << 30, peaks={}))
    assert small.plan != much.plan and much.needed_bytes < small.needed_bytes
    assert cheaper(settings, lookup("4090"), Failure(phase="load", whose="host", said="", requested_bytes=None, peaks={})) is None


@pytest.mark.parametrize("card, whose", [("cpu", "host"), ("gb10", "device"), ("gb10", "host")])
@pytest.mark.parametrize("plan", [{}, {"resident_blocks": 1}, {"boundaries": "host"}], ids=str)
def test_within_one_memory_nothing_is_gained_by_moving(config, plan, card, whose):
    settings = config(**{f"memory__{name}": value for name, value in plan.items()})
    advice = cheaper(settings, lookup(card), Failure(phase="backward", whose=whose, said="", requested_bytes=None, peaks={}))
    assert advice.needed_bytes > 0 and not advice.change.keys() & {"resident_blocks", "boundaries"}


def _under_a_cap(owner, name: str, *, call: int):
    """(owner, name, function): at the `call`-th call this process may hold no more of the card than it does, and asks for 1 GiB."""
    real, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
            try:
                torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        return real(*args, **kwargs)

    return owner, name, function


CALLS = {"teacher": (losses.Teacher, "passes", 5), "student": (F, "mse_loss", 10), "backward": (torch.autograd, "backward", 10),
         "optimizer": (torch.nn.utils, "clip_grads_with_norm_", 4)}


@pytest.mark.gpu
@pytest.mark.parametrize("phase", CALLS)
def test_a_card_that_is_full(phase, config, monkeypatch):
    """The allocator's own refusal, under the cap of a process, in place of an error put in."""
    owner, name, call = CALLS[phase]
    settings = config(model__device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(*_under_a_cap(owner, name, call=call))
        with pytest.raises(DoesNotFit) as raised:
            _in_memory(settings, step_down=False)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"out of memory on the device in {phase}, after 3 steps: CUDA out of memory. Tried to allocate 1")
    row = next(line for line in lines if line.startswith(phase))
    assert float(row.split()[-3]) >= 0 and latest_checkpoint(settings.output.out).step == 3
