"""Several processes on the CPU (gloo) train as one: the same numbers, one set of files, one end."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from compared_runs import differences, numbers
from processes import in_processes
from safetensors.torch import load_file

from memory.sharding import can_shard
from trainer import assemble, distributed, loop, state
from trainer.checkpoint import latest_checkpoint
from trainer.distributed import attended, average, everyones, on_main, rows_of, shared
from trainer.eraser_files import load_eraser
from trainer.errors import InputOutputError, UsageError
from trainer.health import Health
from trainer.lock import RunLock
from trainer.loop import train
from trainer.prompts import collect
from trainer.run_directory import restarted_run, write_config

# A batch of one rounds otherwise than a batch of two, and Adam divides small gradients by themselves.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 2e-3
REPOSITORY = Path(__file__).parents[2]


def _newest(run_dir: Path) -> Path:
    return sorted((run_dir / "ckpt").glob("step-*"))[-1]


def _nearly_the_same(one: Path, two: Path) -> None:
    for a, b in zip(numbers(one), numbers(two), strict=True):
        for name in ("loss", "unlearn", "loc", "pre", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=LOSS_TOLERANCE, abs=1e-9), (a["step"], name)
        for name, norms in a["blocks"].items():
            assert norms == pytest.approx(b["blocks"][name], rel=1e-3, abs=1e-9), (a["step"], name)
        assert a["prediction_norms"] == pytest.approx(b["prediction_norms"], rel=1e-2)
    a, b = load_eraser(one).state, load_eraser(two).state
    for name in a:
        assert (a[name] - b[name]).abs().max() <= WEIGHT_TOLERANCE * a[name].abs().max(), name
    a, b = (load_file(_newest(d) / "latents.safetensors") for d in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


def _files(run_dir: Path) -> set[str]:
    return {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}


@pytest.fixture
def two(tiny_config, pipelines, tmp_path):
    """A run of two processes, in a directory of its own."""
    def run(name: str, before=lambda rank: None, *, resume: bool = False, num: int = 2, expect=(0, 0), **overrides) -> Path:
        out = tmp_path / name
        config = tiny_config(**{"output__out": out, "optim__steps": 4, "output__save_every": 2, "model__model": str(pipelines["5b"]),
                                **overrides})

        def one(rank: int) -> None:
            before(rank)
            train(config, {}, resume=out if resume else None)

        ended = in_processes(one, num)
        assert tuple(ended.codes) == tuple(expect), ended
        run.errors = ended.errors
        return out

    return run


@pytest.mark.parametrize("overrides", [
    {}, {"data__latents": "noise", "optim__accumulation": 2, "model__model": "2b"}, {"data__pool": 4, "data__batch_size": 4}],
    ids=["trajectories-dpm", "noise-accumulated", "pool"])
def test_two_processes_train_as_one(two, tiny_config, pipelines, tmp_path, overrides):
    overrides = {name: str(pipelines[v]) if name == "model__model" else v for name, v in overrides.items()}
    digests = tmp_path / "digests"
    digests.mkdir()

    def remember_weights(rank: int) -> None:
        export = loop.TrainState.export

        def exported(state):
            tensors, description = export(state)
            torch.save(tensors["adapter"], digests / f"{state.step}-{rank}")
            return tensors, description

        loop.TrainState.export = exported

    shared_run = two("two", remember_weights, output__sample_every=2, **overrides)
    alone = train(tiny_config(**{"output__out": tmp_path / "one", "optim__steps": 4, "output__save_every": 2, "output__sample_every": 2,
                                 "model__model": str(pipelines["5b"]), **overrides}), {})
    _nearly_the_same(alone, shared_run)
    assert _files(alone) == _files(shared_run)  # one set: nothing that only a second process wrote
    for step in (2, 4):
        ours = [torch.load(digests / f"{step}-{rank}", weights_only=True) for rank in (0, 1)]
        assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])


@pytest.mark.parametrize("tells, codes", [(True, (0, 0)), (False, (6, 6))])
def test_work_of_one_process_may_take_as_long_as_it_likes_if_it_tells(monkeypatch, tmp_path, tells, codes):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))

    def work(rank: int) -> None:
        with attended() as tell:
            for _ in range(8 if tell else 0):
                time.sleep(0.5)
                if tells:
                    tell()
        (tmp_path / f"{rank}").touch()
        everyones(rank)

    ended = in_processes(work)
    assert tuple(ended.codes) == codes, ended
    assert (tmp_path / "1").exists() == tells


def test_who_waits_goes_on_when_the_work_fails(tmp_path):
    def work(rank: int) -> None:
        with suppress(ZeroDivisionError), attended() as tell:
            if tell:
                1 / 0
        assert everyones(rank) == [0, 1]

    assert in_processes(work).codes == [0, 0]


def test_each_process_adds_its_share_of_a_gradient(two, tmp_path):
    """A share is of the whole batch's loss: in float16 nothing on its way is larger than in one process."""
    def remember(rank: int) -> None:
        reduce = Health.reduce

        def reduced(health, terms):
            parameters = health.erasers.parameters()
            before = [p.grad.clone() for p in parameters]
            found = reduce(health, terms)
            torch.save((before, [p.grad.clone() for p in parameters]), tmp_path / f"gradients-{rank}")
            return found

        Health.reduce = reduced

    two("two", remember, optim__steps=1)
    (first, whole), (second, same) = (torch.load(tmp_path / f"gradients-{rank}", weights_only=True) for rank in (0, 1))
    assert any(g.abs().max() > 0 for g in whole)
    for a, b, total, other in zip(first, second, whole, same, strict=True):
        torch.testing.assert_close(a + b, total)
        assert torch.equal(total, other)


shards = pytest.mark.skipif(not can_shard(), reason="of torch 2.13")


@shards
def test_sharded_weights_train_to_the_same_bits(two):
    whole = two("whole", output__sample_every=2)
    sharded = two("sharded", output__sample_every=2, memory__num_shards=2)
    assert not differences(whole, sharded)
    assert _files(whole) == _files(sharded)


def _signal_in_step(step: int, by: int):
    """The process of that rank gets a SIGTERM in the course of a step."""
    def patch(rank: int) -> None:
        original, seen = loop.student_backward, []

        def counted(*args, **kwargs):
            seen.append(1)
            if rank == by and len(seen) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        loop.student_backward = counted

    return patch


@pytest.mark.parametrize("by", [0, 1])
def test_a_signal_to_one_stops_all_and_they_go_on_bitwise(two, by):
    straight = two("straight")
    stopped = two("stopped", _signal_in_step(3, by), expect=(143, 143))
    assert all("stopped at step 3 and saved; go on with torchrun --nproc-per-node=2 -- run.py --resume" in error for error in two.errors)
    assert _newest(stopped).name == "step-000003" and len(numbers(stopped)) == 3
    assert not differences(straight, two("stopped", resume=True))


def test_another_number_of_processes_goes_on(two, tiny_config, pipelines, tmp_path):
    """A checkpoint holds the whole batch: 2 processes' is that of 1, to rounding."""
    two("run", optim__steps=2)
    config = tiny_config(output__out=tmp_path / "run", optim__steps=4, output__save_every=2, model__model=str(pipelines["5b"]))
    train(config, {}, resume=tmp_path / "run")
    _nearly_the_same(two("straight"), tmp_path / "run")


def _keep_weights(directory: Path):
    """Each process says, when its training fails, whether its erasers are those of the newest checkpoint."""
    def patch(rank: int) -> None:
        assemble = loop.assemble

        def kept(*args, **kwargs):
            assembly = assemble(*args, **kwargs)
            leave = Health.__exit__

            def left(health, *error):
                saved = latest_checkpoint(directory, rename_bad=False).tensors("adapter")
                ours = assembly.erasers.state_dict()
                (directory.parent / f"untouched-{rank}").write_text(str(all(torch.equal(saved[n], ours[n]) for n in saved)))
                return leave(health, *error)

            Health.__exit__ = left
            return assembly

        loop.assemble = kept

    return patch


def _spoiled_gradient(step: int, by: int, spoil):
    def patch(rank: int) -> None:
        original, seen = loop.student_backward, []

        def spoiled(predict, erasers, *args, **kwargs):
            terms = original(predict, erasers, *args, **kwargs)
            seen.append(1)
            if rank == by and len(seen) == step + 1:
                spoil(erasers.parameters()[-1])
            return terms

        loop.student_backward = spoiled

    return patch


@pytest.mark.parametrize("spoil, code", [(lambda p: p.grad.fill_(float("nan")), "non-finite-gradient"),
                                         (lambda p: setattr(p, "grad", None), "detached-eraser")], ids=["nan", "none"])
def test_a_bad_gradient_in_one_stops_all_before_any_weight_is_touched(two, tmp_path, spoil, code):
    def before(rank: int) -> None:
        _keep_weights(tmp_path / "bad")(rank)
        _spoiled_gradient(2, by=1, spoil=spoil)(rank)

    run_dir = two("bad", before, expect=(4, 4), output__save_every=1)
    assert _newest(run_dir).name == "step-000002"
    assert [(tmp_path / f"untouched-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    codes = [f["code"] for f in json.loads((run_dir / "findings.json").read_text())["findings"]]
    assert code in codes and not (run_dir / "eraser.safetensors").exists()


@pytest.mark.parametrize("num_shards", [1, pytest.param(2, marks=shards)])
def test_the_cause_is_named_by_whoever_sees_it(two, num_shards):
    """Process 1 has a block that fails from the second step on; process 0, which writes, names that block."""
    def before(rank: int) -> None:
        assemble, seen = loop.assemble, []

        def damaged(*args, **kwargs):
            assembly = assemble(*args, **kwargs)

            def fail(module, inputs, output):
                return output * float("nan") if seen and rank == 1 else output

            assembly.blocks[1].ff.register_forward_hook(fail)
            return assembly

        end_step = loop.PhaseClock.end_step
        loop.assemble = damaged
        loop.PhaseClock.end_step = lambda clock: (seen.append(1), end_step(clock))[1]

    run_dir = two("damaged", before, expect=(4, 4), memory__num_shards=num_shards)
    fatal = [f for f in json.loads((run_dir / "findings.json").read_text())["findings"] if f["severity"] == "fatal"]
    assert [(f["code"], f["block"]) for f in fatal] == [("non-finite-activation", 1)]
    assert "transformer_blocks.1.ff" in fatal[0]["module"] and not (run_dir / "ckpt").exists()


def test_the_death_of_one_ends_all_with_a_valid_checkpoint(two):
    def before(rank: int) -> None:
        original, seen = loop.student_backward, []

        def dying(*args, **kwargs):
            seen.append(1)
            if rank == 1 and len(seen) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        loop.student_backward = dying

    started = time.monotonic()
    run_dir = two("dead", before, expect=(6, -9))
    assert time.monotonic() - started < 60
    assert "lost the others" in two.errors[0] and "torchrun … -- run.py --resume" in two.errors[0]
    assert latest_checkpoint(run_dir).step == 2
    assert not differences(two("straight"), two("dead", resume=True))


def test_what_fails_where_files_are_written_fails_everywhere(two):
    def before(rank: int) -> None:
        def full(*args, **kwargs):
            raise InputOutputError("no space left")

        loop.Saver.save = full

    two("full", before, expect=(6, 6))
    assert len(two.errors) == 2 and all("no space left" in error for error in two.errors)


def test_what_the_file_system_refuses_one_is_the_same_error_in_all(tmp_path):
    """run.py makes 6 of it, and of an error that it does not know 1."""
    ended = in_processes(lambda rank: on_main((tmp_path / "absent").unlink))
    first, second = sorted(ended.errors)
    assert first.removeprefix("rank 0: ") == second.removeprefix("rank 1: ") and first.startswith("rank 0: FileNotFoundError: [Errno 2]"), ended


def test_where_memory_runs_out_for_all_the_others_wait_for_what_is_said(monkeypatch):
    """What would do is planned first, and torchrun ends all as soon as one has left."""
    monkeypatch.setattr(distributed, "PARTING", timedelta(seconds=3))

    def work(rank: int) -> None:
        def save() -> None:
            raise MemoryError

        try:
            on_main(save)
        except MemoryError:
            time.sleep(4)
            raise UsageError("said") from None

    ended = in_processes(work)
    assert ended.codes == [2, 6] and "lost the others" in " ".join(ended.errors), ended


def test_who_fails_says_why_before_the_others_can_leave(monkeypatch):
    monkeypatch.setattr(distributed, "PARTING", timedelta(seconds=3))

    class Wordy(UsageError):
        def __str__(self) -> str:
            time.sleep(3)
            return "the cause"

    def work(rank: int) -> None:
        if rank == 0:
            raise Wordy
        everyones(rank)

    ended = in_processes(work)
    assert ended.codes == [2, 6] and [e.split(":")[0] for e in ended.errors] == ["rank 0", "rank 1"], ended


def test_a_run_directory_in_use_stops_all(two, tmp_path):
    with RunLock(tmp_path / "used"):
        two("used", expect=(5, 5))
    assert all(f"in use by process {os.getpid()}" in error for error in two.errors)


@pytest.mark.parametrize("what", ["prompts", "weights", "a scheduler"])
def test_processes_that_read_other_files_are_no_run(two, tmp_path, what):
    """On another host's disk, say, or because a file changes while they start."""
    def before(rank: int) -> None:
        if rank and what == "prompts":
            (other := tmp_path / "other.txt").write_text("a red triangle moving left\n")
            assemble.collect = lambda data, **more: collect(replace(data, prompts=other), **more)
        if rank and what == "weights":
            Health.frozen = lambda health: "others"
        if rank and what == "a scheduler":
            state.scheduler_hash = lambda scheduler: "another"

    run_dir = two("other", before, expect=(2, 2))
    assert all(f"process 1 has read {what} other than those of process 0" in error for error in two.errors)
    assert not (run_dir / "config.json").exists()


def test_a_batch_that_cannot_be_divided_is_refused(two):
    two("odd", expect=(2, 2), data__batch_size=3)
    assert all("--batch-size 3 cannot be divided among 2 processes" in e and "use --batch-size 4" in e for e in two.errors)


def test_a_run_that_goes_on_keeps_its_batch_and_another_number_of_processes_is_named():
    for count, fitting in ((3, 2), (5, 4), (16, 8)):
        with pytest.raises(UsageError, match=f"a resumed run keeps it, so use torchrun --nproc-per-node={fitting}$"):
            distributed.divided(8, count, "processes", kept=True)


def test_agreement():
    def check(rank: int) -> None:
        tensors = [torch.full((2, 3), float(rank)), torch.tensor(2.0 * rank)]
        average(tensors)
        assert torch.equal(tensors[0], torch.full((2, 3), 1.0)) and tensors[1] == 2.0
        assert everyones(rank) == [0, 1, 2]
        assert on_main(os.getpid) == (os.getpid() if rank == 0 else None)
        assert shared(lambda: f"said by {rank}") == "said by 0"
        assert [rows_of(6), rows_of(6, 0)] == [slice(2 * rank, 2 * rank + 2), slice(0, 2)]
        assert logging.getLogger().level == (logging.ERROR if rank else logging.WARNING)

    logging.getLogger().setLevel(logging.WARNING)
    ended = in_processes(check, 3)
    assert ended.codes == [0, 0, 0], ended


def test_one_process_needs_nobody():
    assert (distributed.num_ranks(), distributed.rank(), rows_of(3)) == (1, 0, slice(0, 3))
    with distributed.joined("cpu") as rank:
        assert rank == 0 and shared(on_main, lambda: 7) == 7


def test_devices_that_cannot_be_divided_are_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="use --device cuda"), distributed.joined("cuda:1"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes but 1 cards: torchrun --nproc-per-node=1"), distributed.joined("cuda"):
        pass


def test_a_restart_finds_its_own_run_and_no_other(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    named, unnamed = tiny_config(), tiny_config(output__out=None)
    for number, run_id in enumerate(("b", "a", "c")):
        directory = tmp_path / "runs" / f"red-{number}"
        directory.mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setenv("TORCHELASTIC_RUN_ID", run_id)
            write_config(directory, unnamed, {})
    assert restarted_run(named) is restarted_run(unnamed) is None  # a first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_run(unnamed) == Path("runs/red-1")
    assert restarted_run(named) is None  # died before it wrote anything
    named.output.out.mkdir()
    with monkeypatch.context() as patch:
        patch.delenv("TORCHELASTIC_RUN_ID")
        write_config(named.output.out, named, {})
    assert restarted_run(named) is None  # somebody else's
    write_config(named.output.out, named, {})
    assert restarted_run(named) == named.output.out


VICTIM = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from trainer import loop
original, seen = loop.student_backward, []
def dying(*args, **kwargs):
    seen.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
loop.student_backward = dying
import run
sys.exit(run.main())
"""


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on_by_itself(two, tiny_config, pipelines, tmp_path):
    """The real thing: torchrun, run.py's own command line, a process killed in step 4, --max-restarts."""
    config = tiny_config()
    (tmp_path / "victim.py").write_text(VICTIM)
    words = ["--device", "cpu", "--monitor", "off", "--model", str(pipelines["5b"]), "--prompts", str(config.data.prompts), "--preserve",
             *config.data.preserve, "--trajectory-steps", "4", "--batch-size", "2", "--rank", "4", "--steps", "4", "--warmup", "2", "--lr",
             "1e-2", "--save-every", "2", "--sample-steps", "2", "--sample-prompts", *config.output.sample_prompts]

    def torchrun(out: Path, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options, "--",
                   str(tmp_path / "victim.py"), str(REPOSITORY), *words, "--out", str(out)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    once = torchrun(tmp_path / "once")
    assert once.returncode != 0 and re.search(r"exitcode\s*: -9", once.stderr), once.stderr
    assert latest_checkpoint(tmp_path / "once").step == 2
    again = torchrun(tmp_path / "again", "--max-restarts=1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("run: ") == 1  # one process speaks
    assert not differences(two("straight"), tmp_path / "again")
