"""The watcher: what it measures, that an unsound step changes nothing, and that it costs nothing."""

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.injected import nan_in_gradient
from bench.watched import one_step
from trainer.checkpoint import latest_checkpoint
from trainer.config import TrainConfig
from trainer.diagnose import prepare
from trainer.erasers import Erasers
from trainer.findings import Unhealthy, finding
from trainer.health import MAX_SKIPS, Health
from trainer.inspection import Fingerprint
from trainer.loop import train
from trainer.losses import Teacher, student_backward
from trainer.preflight import Preflight
from trainer.records import BLOCK_NORMS, Judge, non_finite
from trainer.run_files import FINDINGS, read_metrics
from trainer.state import learning_rate

Make = Callable[..., TrainConfig]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                             torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def _records(config: TrainConfig, num_steps: int) -> tuple[list[dict], Health]:
    subject, records = prepare(config), []
    with subject.assembly, Health(subject) as health:
        health.sinks = (records.append,)
        for step in range(num_steps):
            one_step(subject, health, step)
        health.flush()
    return records, health


def test_norms_are_those_of_the_definition(tiny_config: Make) -> None:
    config = tiny_config(optim__clip=0.0)
    records, _ = _records(config, 2)
    subject = prepare(config)
    erasers, before = subject.assembly.erasers, None
    for step in range(2):
        student_backward(subject.assembly.predict, erasers, subject.teacher.sample(step), config.loss)
        expected = [math.hypot(*(p.grad.norm().item() for p in a.parameters())) for a in erasers.adapters]
        assert records[step]["blocks"]["gradient"] == pytest.approx(expected, rel=1e-5)
        assert records[step]["gradient_norm"] == pytest.approx(math.hypot(*expected), rel=1e-5)
        before = [[p.detach().clone() for p in a.parameters()] for a in erasers.adapters]
        subject.optimizer.step()
        subject.optimizer.zero_grad()
        moved = [math.hypot(*((p - b).norm().item() for p, b in zip(a.parameters(), old)))
                 for a, old in zip(erasers.adapters, before)]
        assert records[step]["blocks"]["update"] == pytest.approx(moved, rel=1e-5)
    assert records[0]["blocks"]["eraser"] == [0.0, 0.0] and min(records[1]["blocks"]["eraser"]) > 0
    assert all(set(r["blocks"]) == set(BLOCK_NORMS) and min(r["blocks"]["residual"]) > 0 for r in records)


@pytest.mark.parametrize("checkpoint", ["none", "all"])
def test_activation_norms_are_those_of_the_student_with_the_concept(tiny_config: Make, checkpoint: str) -> None:
    config, seen = tiny_config(memory__checkpoint=checkpoint), {}
    subject = prepare(config)
    with subject.assembly, Health(subject) as health:
        health.sinks = (lambda record: seen.update(record),)
        for p in subject.assembly.erasers.parameters():
            p.data += 0.01
        sample, inputs, outputs = subject.teacher.sample(0), [], []
        handles = [subject.assembly.blocks[1].register_forward_pre_hook(
                       lambda m, a, k: inputs.append(k["hidden_states"].norm().item()), with_kwargs=True),
                   subject.assembly.erasers.adapters[1].register_forward_hook(lambda m, a, o: outputs.append(o.norm().item()))]
        terms = student_backward(subject.assembly.predict, subject.assembly.erasers, sample, config.loss)
        health.apply(0, terms)
        with torch.no_grad(), subject.assembly.erasers.switched(True):  # as sampling does: not part of a step
            subject.assembly.predict(sample.latents * 100, sample.timestep, sample.text)
        health.flush()
        for handle in handles:
            handle.remove()
    assert seen["blocks"]["residual"][1] == pytest.approx(inputs[0])
    assert seen["blocks"]["eraser"][1] == pytest.approx(outputs[0]) != pytest.approx(outputs[-2])  # with the preserved prompt
    assert health._student == 0


def test_the_watcher_changes_no_number(tiny_config: Make) -> None:
    config = tiny_config(optim__clip=1e-4)
    plain = prepare(config)
    for step in range(3):
        student_backward(plain.assembly.predict, plain.assembly.erasers, plain.teacher.sample(step), config.loss)
        torch.nn.utils.clip_grad_norm_(plain.assembly.erasers.parameters(), 1e-4)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    watched = prepare(config)
    with watched.assembly, Health(watched) as health:
        health.before_training()
        for step in range(3):
            one_step(watched, health, step)
        health.after_training()
    ours, theirs = watched.assembly.erasers.state_dict(), plain.assembly.erasers.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_unsound_step_is_not_applied(optimizer: str, what: str, tiny_config: Make, caplog) -> None:
    subject = prepare(tiny_config(memory__optimizer=optimizer))
    with subject.assembly, Health(subject) as health, ExitStack() as stack:
        one_step(subject, health, 0)
        before = subject.assembly.erasers.state_dict()
        moments = {k: v.clone() for s in subject.optimizer.state.values() for k, v in s.items() if k == "exp_avg"}
        terms = student_backward(subject.assembly.predict, subject.assembly.erasers, subject.teacher.sample(1),
                                 subject.config.loss)
        if what == "gradient":
            nan_in_gradient(1)(subject, stack)
            subject.assembly.erasers.adapters[1].up.weight.grad[0, 0] = float("inf")
        else:
            terms["loss"] = terms["loss"] * float("nan")
        health.apply(1, terms)
        subject.optimizer.zero_grad()
        terms = student_backward(subject.assembly.predict, subject.assembly.erasers, subject.teacher.sample(2),
                                 subject.config.loss)
        with pytest.raises(Unhealthy, match="^step 2 .no weight was changed") as raised:
            health.apply(2, terms)  # sound or not, it is not applied either
        after = subject.assembly.erasers.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        now = {k: v for s in subject.optimizer.state.values() for k, v in s.items() if k == "exp_avg"}
        assert all(torch.equal(now[k], moments[k]) for k in moments)
    code = {"gradient": "non-finite-gradient", "loss": "non-finite-loss"}[what]
    assert [f.code for f in raised.value.findings] == [code] and raised.value.exit_code == 4
    assert code not in caplog.text  # it is said once, by whoever catches it


def test_a_gradient_that_does_not_come_ends_the_run_before_its_step(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    erasers = subject.assembly.erasers
    with subject.assembly, Health(subject) as health:
        terms = student_backward(subject.assembly.predict, erasers, subject.teacher.sample(0), subject.config.loss)
        erasers.adapters[1].down.weight.grad, before = None, erasers.state_dict()
        with pytest.raises(Unhealthy, match="^step 3 .no weight was changed.: detached-eraser .backward, block 1, .*down.weight.: .* step 3, num"):
            health.apply(2, terms)
        assert all(torch.equal(tensor, before[name]) for name, tensor in erasers.state_dict().items())


def _half(tiny_config: Make, **overrides):
    subject = prepare(tiny_config(memory__dtype="float16", **overrides))
    subject.scaler.scale(torch.ones(()))  # the scale exists from here on
    return subject


def test_an_infinite_gradient_under_a_loss_scaler_halves_the_scale(tiny_config: Make) -> None:
    subject, records = _half(tiny_config), []
    with subject.assembly, Health(subject) as health:
        health.sinks = (records.append,)
        one_step(subject, health, 0)
        before, scale = subject.assembly.erasers.state_dict(), subject.scaler.get_scale()
        hook = subject.assembly.erasers.adapters[0].up.weight.register_hook(lambda g: g * float("inf"))
        one_step(subject, health, 1)
        hook.remove()
        after = subject.assembly.erasers.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert subject.scaler.get_scale() == scale / 2
        one_step(subject, health, 2)
        health.flush()
    assert [r["skipped"] for r in records] == [False, True, False]
    assert [r["loss_scale"] for r in records] == [scale, scale, scale / 2]
    assert health.bill.healthy


@pytest.mark.parametrize("accumulation, bad", [(1, 1), (2, 1), (4, 3)])
def test_what_overflows_in_a_later_pass_of_a_step_is_named_by_the_second_pass(accumulation: int, bad: int, tiny_config: Make) -> None:
    """Not the gradients of passes before it, which at the loss scale of a whole step may overflow too."""
    subject = prepare(tiny_config(memory__dtype="float16", optim__accumulation=accumulation, data__trajectory_steps=8, data__latents="noise"))
    bad_timesteps, timesteps = subject.teacher.draw(bad).timestep, {}
    with subject.assembly, Health(subject) as health, pytest.raises(Unhealthy) as raised:
        subject.assembly.transformer.register_forward_pre_hook(lambda m, a, kwargs: timesteps.update(now=kwargs["timestep"]), with_kwargs=True)
        subject.assembly.blocks[1].ff.register_forward_hook(
            lambda m, a, output: output * float("inf") if torch.equal(timesteps["now"], bad_timesteps) else None)
        subject.scaler.scale(torch.ones(()))
        subject.scaler.update(2.0**30)  # where gradients would overflow as well
        for step in range(3):
            one_step(subject, health, step)
    assert [(f.code, f.block) for f in raised.value.findings] == [("half-precision-overflow", 1)]


def test_a_target_too_far_away_for_any_loss_scale_is_named_before_the_scale(tiny_config: Make) -> None:
    subject = _half(tiny_config, loss__eta=1e13)
    with subject.assembly:
        codes = [f.code for f in Preflight(subject).run().findings]
    assert codes[:2] == ["eta-too-large", "loss-scale-collapse"]


@pytest.mark.parametrize("growth, limit", [(1.0, MAX_SKIPS), (0.5, 18)], ids=["skips in a row", "scale below 1"])
def test_a_collapsing_loss_scale_is_a_finding(growth: float, limit: int, tiny_config: Make) -> None:
    subject = _half(tiny_config)
    subject.scaler.set_backoff_factor(growth if growth < 1 else 0.999)

    def overflow(module, args, output) -> None:  # the flow, not the parameter: float16 cannot hold it at any scale
        if output.requires_grad:
            output.register_hook(lambda g: g * float("inf"))

    for adapter in subject.assembly.erasers.adapters:
        adapter.register_forward_hook(overflow)
    with subject.assembly, Health(subject) as health, pytest.raises(Unhealthy) as raised:
        for step in range(MAX_SKIPS + 2):
            one_step(subject, health, step)
    assert raised.value.findings[0].code == "loss-scale-collapse"
    assert raised.value.findings[0].evidence["num_skipped_steps"] == limit


def test_the_preflight_holds_no_gradients_while_it_tries_a_smaller_loss_scale(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, held = _half(tiny_config), []
    preflight = Preflight(subject)
    backward = preflight._backward

    def overflowing(scale: float) -> dict[str, torch.Tensor | None]:
        held.append(len(preflight.gradients))
        found = backward(scale)
        held.append(sum(p.grad is not None for p in subject.assembly.erasers.parameters()))  # the same ones, not two of each
        return {name: gradient * (float("inf") if scale > 1000 else 1) for name, gradient in found.items()}

    monkeypatch.setattr(preflight, "_backward", overflowing)
    assert not preflight.run().fatal
    assert len(held) == 16 and not any(held)  # from 65536 to 512


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_are_zeroed_in_other_ways_raise_no_alarm(accumulation: int, tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, records = prepare(tiny_config(optim__accumulation=accumulation)), []
    optimizer, parameters = subject.optimizer, subject.assembly.erasers.parameters()
    ways = (partial(optimizer.zero_grad, set_to_none=False), lambda: [p.grad.data.zero_() for p in parameters], lambda: None)
    with subject.assembly, Health(subject) as health:
        health.before_training()
        health.sinks = (records.append,)
        for step, way in enumerate(ways):
            with monkeypatch.context() as patched:
                patched.setattr(optimizer, "zero_grad", lambda set_to_none: way())
                one_step(subject, health, step)
        health.flush()
        assert health.bill.healthy and not any("gradient_left" in record for record in records)
        one_step(subject, health, 3)  # the way before this one zeroed nothing
        health.flush()
    assert [f["code"] for f in health.findings()] == ["zero-down-gradient", "gradients-not-zeroed"]
    assert records[3]["gradient_left"] > 0


def test_several_optimizers_are_one_to_the_watcher(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    erasers, whole = subject.assembly.erasers, subject.optimizer
    matrices, biases = ([p for p in erasers.parameters() if (p.ndim == 2) == two] for two in (True, False))
    subject = replace(subject, optimizer=(torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(biases, lr=1e-3, fused=True)))
    with subject.assembly, Health(subject) as health:
        health.before_training()
        assert health.bill.healthy and not any(optimizer.state for optimizer in subject.optimizer) and [g["lr"] for g in subject.param_groups] == [1e-3] * 2
        for step, loss in enumerate((None, torch.tensor(math.nan))):
            before = erasers.state_dict()
            terms = student_backward(subject.assembly.predict, erasers, subject.teacher.sample(step), subject.config.loss)
            health.apply(step, terms if loss is None else terms | {"loss": loss})
            whole.zero_grad(set_to_none=True)
            moved = {name for name, tensor in erasers.state_dict().items() if not torch.equal(tensor, before[name])}
            assert {"0.up.weight", "1.up.bias"} <= moved if loss is None else not moved
        with pytest.raises(Unhealthy, match="^step 2 .no weight was changed"):
            health.flush()
        (found,) = Preflight(replace(subject, optimizer=subject.optimizer[:1])).run().fatal
    assert found.code == "not-in-optimizer" and found.module.endswith(".bias")


def test_what_several_blocks_have_is_warned_of_once(tiny_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    subject = prepare(tiny_config())
    monkeypatch.setattr(Judge, "see", lambda judge, record: [finding("dead-gelu", "training", block=i, severity="warning") for i in (0, 1, 3)])
    with subject.assembly, Health(subject) as health:
        one_step(subject, health, 0)
        health.flush()
    assert [f["block"] for f in health.findings()] == [0, 1, 3]
    (warning,) = (r.getMessage() for r in caplog.records)
    assert warning.startswith("step 1: dead-gelu (training, block 0): ") and warning.endswith("; likewise in blocks 1, 3")


def test_what_a_full_disk_does_not_take_is_said_all_the_same(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    subject = prepare(tiny_config())
    with subject.assembly, Health(subject, run_dir=tmp_path) as health:
        health.before_training()
        (tmp_path / f".{FINDINGS}.part").mkdir()  # in the way of what is written first
        with monkeypatch.context() as patched:
            patched.setattr(subject.optimizer, "zero_grad", lambda set_to_none: None)
            one_step(subject, health, 0)
        one_step(subject, health, 1)
        health.flush()  # a warning stops no run
        assert "gradients-not-zeroed" in caplog.text and f"{FINDINGS} cannot be written" in caplog.text
        one_step(subject, health, 2)
        health._pending.values[0] = math.nan
        with pytest.raises(Unhealthy, match="step 3"):
            health.flush()


def test_no_step_waits(tiny_config: Make) -> None:
    """Neither the watcher nor the step around it; without the watcher the numbers would be read at once."""
    subject = prepare(tiny_config())
    with subject.assembly:
        with Health(subject) as health:
            health.before_training()
            one_step(subject, health, 0)
            terms = student_backward(subject.assembly.predict, subject.assembly.erasers, subject.teacher.sample(1),
                                     subject.config.loss)
            with Waits() as apply:
                health.apply(1, terms)
            subject.optimizer.zero_grad()
            sample = subject.teacher.sample(2)
            with Waits() as watched:
                student_backward(subject.assembly.predict, subject.assembly.erasers, sample, subject.config.loss)
        with Waits() as plain:
            student_backward(subject.assembly.predict, subject.assembly.erasers, sample, subject.config.loss)
    assert apply.num == 0 and watched.num == plain.num
    with Waits() as control:
        terms["loss"].item()
    assert control.num == 1


def test_hooks_go_with_the_watcher(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.assembly.transformer.modules()]
    with Health(subject) as health:
        health.before_training()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.assembly.transformer.modules()] == hooks


def test_a_changed_frozen_weight_is_found_at_the_end(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    with subject.assembly, Health(subject) as health:
        health.before_training()
        one_step(subject, health, 0)
        weight = subject.assembly.blocks[1].attn1.to_q.weight.data
        weight.view(torch.int32)[3, 5] += 1  # one bit
        with pytest.raises(Unhealthy) as raised:
            health.after_training()
    found = raised.value.findings[-1]
    assert (found.code, found.module) == ("frozen-weights-changed", "transformer_blocks.1.attn1.to_q.weight")


def test_a_table_of_positions_that_changed_is_found_at_the_end(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    with subject.assembly, Health(subject) as health:
        health.before_training()
        frozen, positions = health.frozen(), subject.assembly.transformer.patch_embed.pos_embedding
        positions.mul_(1.5)
        with pytest.raises(Unhealthy, match="frozen-weights-changed .weights, patch_embed.pos_embedding"):
            health.after_training()
        assert Fingerprint(subject).digest() == frozen  # of what is stored


def test_a_warning_does_not_keep_what_is_fatal_from_stopping_the_run(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    with subject.assembly, Health(subject) as health:
        one_step(subject, health, 0)
        for step, weight in ((1, 1e4), (2, 3e38)):
            health.flush()
            subject.assembly.erasers.adapters[1].up.weight.data.fill_(weight)
            one_step(subject, health, step)
            if step == 1:
                health.flush()
                assert [(f["code"], f["severity"], f["block"]) for f in health.findings()] == [("eraser-diverged", "warning", 1)]
        with pytest.raises(Unhealthy, match="^step 3 .no weight was changed.: eraser-diverged"):
            health.flush()


def test_what_an_eraser_that_ran_away_ends_in_is_put_down_to_it(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    with subject.assembly, Health(subject) as health:
        one_step(subject, health, 0)
        health.flush()
        subject.assembly.erasers.adapters[1].up.weight.data.fill_(1e4)
        one_step(subject, health, 1)
        health.flush()
        subject.assembly.erasers.adapters[1].up.weight.register_hook(lambda gradient: gradient * float("inf"))
        one_step(subject, health, 2)
        with pytest.raises(Unhealthy, match="^step 3 .no weight was changed.: eraser-diverged .*ended in non-finite-gradient"):
            health.flush()


def test_a_loss_that_is_only_rounding_is_nothing_to_learn(tiny_config: Make, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt in another row of a batch comes out different by an ulp or so."""
    prompts = tmp_path / "same.csv"
    prompts.write_text("prompt,safe\na red circle moving left,a red circle moving left\n")
    subject = prepare(tiny_config(data__prompts=prompts, loss__alpha=0.0, loss__beta=0.0))
    exact = Teacher.sample
    monkeypatch.setattr(Teacher, "sample", lambda *step: replace(made := exact(*step), target=made.target * (1 + 2**-23)))
    with subject.assembly:
        bill = Preflight(subject).run()
    found = bill.findings[0]
    assert found.code == "nothing-to-learn" and found.evidence["loss"] > 0


def test_a_run_writes_its_bill_and_its_records(tiny_config: Make) -> None:
    run_dir = train(tiny_config(), {})
    bill = json.loads((run_dir / FINDINGS).read_text())
    assert bill["healthy"] and [f["code"] for f in bill["findings"]] == ["zero-down-gradient"] and len(bill["checked"]) == 11
    records = read_metrics(run_dir)
    assert [r["step"] for r in records] == list(range(6))
    assert [r["lr"] for r in records] == [learning_rate(step, tiny_config()) for step in range(6)]


def test_a_run_that_stops_keeps_its_last_checkpoint_and_says_why(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.losses as losses

    mse, calls = losses.mean_squared_error, iter(range(10**6))
    first = 2 + 2 * 4  # the pre-flight's two terms, then two a step
    monkeypatch.setattr(losses, "mean_squared_error", lambda a, b: mse(a, b) * (float("nan") if next(calls) >= first else 1.0))
    with pytest.raises(Unhealthy, match="step 5 .no weight was changed.: non-finite-loss"):
        train(tiny_config(), {})
    run_dir = tiny_config().output.out
    assert latest_checkpoint(run_dir).state["step"] == 3
    assert math.isnan(read_metrics(run_dir)[-1]["loss"]) and not (run_dir / "eraser.safetensors").exists()
    assert json.loads((run_dir / FINDINGS).read_text())["findings"][-1]["code"] == "non-finite-loss"


def test_erasers_that_are_frozen_in_mid_run_are_named(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says no more than that something does not require a gradient."""
    calls = iter(range(10**6))

    def frozen(predict, erasers, *args, **kwargs):
        for p in erasers.parameters():
            p.requires_grad_(next(calls) < 2 * len(erasers.parameters()))
        return student_backward(predict, erasers, *args, **kwargs)

    monkeypatch.setattr("trainer.loop.student_backward", frozen)
    with pytest.raises(Unhealthy, match="^backward.. .no weight was changed.: frozen-eraser .adapters, block 0") as raised:
        train(tiny_config(), {})
    assert "does not require grad" in str(raised.value.__context__)
    assert json.loads((tiny_config().output.out / FINDINGS).read_text())["findings"][-1]["code"] == "frozen-eraser"


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("anew", [False, True])
def test_erasers_that_are_taken_out_in_mid_run_are_said_to_be_missing(tiny_config: Make, alpha: float, anew: bool) -> None:
    """With others in their place, too: those would train, and not be what the run saves."""
    subject = prepare(tiny_config(loss__alpha=alpha))
    with subject.assembly, pytest.raises(Unhealthy, match=r".no weight was changed.: student-without-erasers .student, block 0"), Health(subject) as health:
        one_step(subject, health, 0)
        subject.assembly.erasers.undo()
        if anew:
            Erasers(subject.assembly.blocks, 4)
        one_step(subject, health, 1)


def test_an_error_that_no_pass_explains_stays_as_it_is(tiny_config: Make) -> None:
    with pytest.raises(RuntimeError, match="^element 0 of tensors does not require grad"), Health(prepare(tiny_config())):
        torch.ones(()).backward()


def test_judge_explains_the_first_update_and_warns_later() -> None:
    sound = {"step": 0, "loss": 1.0, "lr": 1e-3,
             "blocks": {"gradient": [1.0, 1.0], "update": [0.1, 0.1], "eraser": [0.0, 0.0], "residual": [2.0, 2.0]}}
    judge = Judge()
    assert judge.see(sound) == []  # `up` is zero before the first update
    assert [f.code for f in judge.see(sound)] == ["no-op-adapter"]
    stuck = sound | {"blocks": sound["blocks"] | {"update": [0.0, 0.0]}}
    assert [f.code for f in Judge().see(stuck)] == ["weights-never-move"]
    assert Judge().see(stuck | {"skipped": True}) == []
    assert [f.code for f in Judge().see(stuck | {"lr": 0.0})] == ["weights-never-move"]  # no schedule comes to zero
    for eraser, diverged in (([20.0, 19.0], []), ([1.0, 21.0], [("eraser-diverged", "warning", 1, 10.5)])):
        found = Judge().see(sound | {"blocks": sound["blocks"] | {"eraser": eraser}})
        assert [(f.code, f.severity, f.block, f.evidence["eraser_over_residual"]) for f in found] == diverged


@pytest.mark.parametrize("expected, seconds, says", [
    (1.0, [9.0] * 9, False), (1.0, [3.1] * 10, True), (1.0, [3.0] * 10, False), (1.0, [99.0] * 4 + [1.0] * 20, False), (1.0, [1.0] * 9 + [9.0] * 6, True),
    (None, [9.0] * 20, False)])
def test_judge_warns_of_steps_that_take_far_longer_than_predicted(expected: float | None, seconds: list[float], says: bool) -> None:
    judge = Judge(expected)
    record = {"step": 0, "loss": 1.0, "lr": 1e-3, "blocks": {"gradient": [1.0], "update": [0.1], "eraser": [1.0], "residual": [2.0]}}
    for step, value in enumerate(seconds):
        found = judge.see(record | {"step": step, "seconds": value, "phase_seconds": {"teacher": 0.3 * value, "waiting for transfers": 0.7 * value}})
    judge.see(record)  # of a step whose time is not known yet
    assert [(f.code, f.severity, f.evidence["seconds"] > 3 * expected, f.evidence["longest_phase"]) for f in found] == says * [
        ("slow-steps", "warning", True, "waiting for transfers")]


@pytest.mark.parametrize("change, code, block", [
    ({"prediction_norms": {"teacher": 1.0, "student": math.nan}, "loss": math.nan}, "non-finite-activation", None),
    ({"loss": math.inf}, "non-finite-loss", None), ({}, "non-finite-gradient", 1)])
def test_what_a_record_says_by_itself_is_the_first_that_is_not_finite(change: dict, code: str, block: int | None) -> None:
    record = {"step": 4, "loss": 1.0, "gradient_norm": math.nan, "prediction_norms": {"teacher": 1.0, "student": 1.0},
              "blocks": {"gradient": [math.nan, math.nan, 1.0]}}
    found = non_finite(record | change, second_pass="finite")
    assert (found.code, found.block, found.evidence["step"], found.evidence["second_pass"]) == (code, block, 5, "finite")


@pytest.mark.slow
def test_cost_on_a_block_of_real_size() -> None:
    """One block of CogVideoX-2b, 9 frames of 480x720: the reductions against forward and backward. The best of three."""
    from bench.health_cost import measure

    assert any(measure(num_tokens=4276)["share"] < 0.005 for _ in range(3))
