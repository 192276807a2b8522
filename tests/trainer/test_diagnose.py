"""Findings as data: codes, the pre-flight's bill, and `diagnose` from a run, a file and settings."""

import copy
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import tracing
from trainer.assemble import open_backbone
from trainer.checkpoint import STATE
from trainer.cli import main
from trainer.config import TrainConfig, replaced
from trainer.diagnose import diagnose_eraser, diagnose_path, diagnose_run, diagnose_settings, prepare
from trainer.eraser_files import WEIGHTS, save_released
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, InputOutputError
from trainer.findings import CODES, Bill, Unhealthy, finding, from_json, earlier_findings, print_bill
from trainer.inspection import Fingerprint, adapter_findings
from trainer.loop import train
from trainer.manifest import MANIFEST, write_manifest
from trainer.optimizer_state import export_optimizer
from trainer.preflight import CHECKED, Preflight
from trainer.run_files import CONFIG, FINDINGS, METRICS, read_metrics

Make = Callable[..., TrainConfig]
KEYS = {"code", "severity", "phase", "block", "module", "evidence", "cause", "fix"}


def test_codes_are_kebab_case_and_say_cause_and_fix() -> None:
    for code, known in CODES.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", code), code
        assert known.severity in ("fatal", "warning", "expected") and known.cause and known.fix


@pytest.mark.parametrize("code, spoil", [("frozen-eraser", lambda p: p.requires_grad_(False)), ("half-precision-adapters", lambda p: p.data.half())])
def test_a_fix_that_is_code_can_be_run_as_it_stands(code: str, spoil: Callable, tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    for parameter in subject.assembly.erasers.parameters():
        parameter.data = spoil(parameter).data
    assert [f.code for f in adapter_findings(subject)] == [code]
    exec(re.search(r"for p in .*?(?=,|$)", CODES[code].fix)[0], {"erasers": subject.assembly.erasers})
    assert not list(adapter_findings(subject))


def test_findings_import_no_torch() -> None:
    code = "import sys, trainer.findings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_finding_goes_through_json_and_back() -> None:
    found = finding("dead-gelu", "student", block=2, module="x", largest=float("nan"), count=3)
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert set(plain) == KEYS and plain["evidence"] == {"largest": "nan", "count": 3}
    assert from_json(plain) == replace(found, evidence=plain["evidence"])


@pytest.mark.parametrize("damage", [{"evidence": 3}, {"evidence": None}, {"module": 1}, {"block": "1"}, {"code": ["x"]}, {"new": 1}])
def test_a_finding_of_other_types_is_left_out_of_a_run_that_goes_on(damage: dict, caplog: pytest.LogCaptureFixture) -> None:
    sound = finding("dead-gelu", "student").as_json()
    assert [f.severity for f in earlier_findings({"findings": [sound | damage, sound]})] == ["warning"] and len(caplog.records) == 1


@pytest.mark.parametrize("content", [{"findings": None}, {"findings": 3}, {"findings": {"a": 1}}, {"findings": [None]}, {}])
def test_findings_that_are_none_are_none(content: dict) -> None:
    assert earlier_findings(content) == []


def test_what_is_fatal_takes_the_place_of_a_warning_alone() -> None:
    warned = finding("eraser-diverged", "training", severity="warning", block=1)
    fatal, again = finding("eraser-diverged", "student", block=1), finding("eraser-diverged", "backward", block=1)
    assert Bill(findings=(warned,)).with_findings([fatal, again, warned]).findings == (fatal,)


def test_evidence_of_which_nothing_is_known_is_left_out() -> None:
    assert str(finding("eraser-diverged", "training", step=2, at=None)).count("step 2. Fix:") == 1


def test_a_bill_that_is_piped_or_narrow_is_whole() -> None:
    embedding = finding("non-finite-embedding", "embeddings", prompt="x")
    out = io.StringIO()
    print_bill(Bill(findings=(embedding,)), out)
    assert embedding.fix in out.getvalue()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    print_bill(Bill(findings=(embedding,)), out)
    cells = "".join(line.split("│")[3].strip() for line in out.getvalue().splitlines() if line.count("│") == 4)
    assert embedding.fix.replace(" ", "") in cells.replace(" ", "") and "…" not in cells


def test_a_bill_is_healthy_with_expected_findings_only() -> None:
    expected = Bill(findings=(finding("zero-down-gradient", "backward"),))
    warned = expected.with_findings([finding("no-op-adapter", "student")])
    fatal = warned.with_findings([finding("dead-gelu", "student", block=1), finding("dead-gelu", "student", block=1)])
    assert expected.healthy and not warned.healthy and not warned.fatal
    assert [f.code for f in fatal.findings] == ["zero-down-gradient", "no-op-adapter", "dead-gelu"]
    with pytest.raises(Unhealthy, match="here: dead-gelu .student, block 1.*Fix: ") as raised:
        fatal.raise_if_fatal("here")
    assert raised.value.exit_code == 4 and len(raised.value.findings) == 3


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bill_is_shown(as_json: bool) -> None:
    bill, out = Bill(findings=(finding("wiped-attention", "weights", block=1, value=0.0),), checked=("this",)), io.StringIO()
    print_bill(bill, out, as_json=as_json)
    if as_json:
        shown = json.loads(out.getvalue())
        assert set(shown) == {"healthy", "findings", "checked"} and not shown["healthy"]
        assert set(shown["findings"][0]) == KEYS
    else:
        assert "wiped-attention" in out.getvalue() and "Not healthy" in out.getvalue() and "block 1" in out.getvalue()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_preflight_leaves_no_trace(optimizer: str, tiny_config: Make) -> None:
    subject = prepare(tiny_config(memory__optimizer=optimizer))
    weights, random = subject.assembly.erasers.state_dict(), torch.get_rng_state()
    export = partial(export_optimizer, subject.optimizer, dict(subject.assembly.erasers.named_parameters()))
    tensors, before = export()
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    rates = [group["lr"] for group in subject.optimizer.param_groups]
    bill = Preflight(subject).run()
    assert bill.healthy and bill.checked == CHECKED
    assert all(torch.equal(t, weights[n]) for n, t in subject.assembly.erasers.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in subject.assembly.erasers.parameters())
    tensors, after = export()
    assert held and all(torch.equal(tensor, held[name]) for name, tensor in tensors.items()) and after == before
    assert [g["lr"] for g in subject.optimizer.param_groups] == rates
    assert subject.teacher.latents.state_dict() == {} and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.NAdam, torch.optim.SGD])
def test_the_preflight_leaves_no_trace_in_another_optimizer(kind: type, tiny_config: Make) -> None:
    """Zeros are not what their state begins with."""
    subject = prepare(tiny_config())
    subject = replace(subject, optimizer=kind(subject.assembly.erasers.parameters(), lr=1e-3))
    before = copy.deepcopy(subject.optimizer.state_dict())
    assert Preflight(subject).run().healthy and subject.optimizer.state_dict() == before


@pytest.mark.parametrize("blocks", [(0, 1), (1,)])
def test_erasers_that_were_wiped_are_said_to_be(tiny_config: Make, blocks: tuple[int, ...]) -> None:
    """As by to_empty() after they were put in. Their units are at zero, and not below GELU's range."""
    subject = prepare(tiny_config())
    for block in blocks:
        for parameter in subject.assembly.erasers.adapters[block].parameters():
            parameter.data.zero_()
    with subject.assembly:
        (found,) = Preflight(subject).run().findings
    assert (found.code, found.phase, found.block, found.severity) == ("wiped-weights", "adapters", blocks[0], "fatal")
    assert found.module == f"transformer_blocks.{blocks[0]}.attn1.adapter.down.weight" and found.evidence == {"num_blocks": len(blocks), "value": 0.0}


def test_too_high_a_learning_rate_is_told_the_models_own(tiny_config: Make) -> None:
    def fix(**overrides: str) -> str:
        bill = diagnose_settings(tiny_config(optim__lr=1.0, **overrides))
        return next(f.fix for f in bill.findings if f.code == "learning-rate-too-high")

    assert fix() == "--lr 1e-4" and fix(model__model="shapes", data__concept="red", data__prompts=None, data__preserve=()) == "--lr 0.003"


@pytest.mark.parametrize("module, code, advised", [("patch_embed.proj", "non-finite-activation", "copy the model again"),
                                                   ("proj_out", "non-finite-target", "a lower --eta; ")])
def test_what_is_set_already_is_not_advised(tiny_config: Make, module: str, code: str, advised: str) -> None:
    """As after a huge weight in a model of float32."""
    subject = prepare(tiny_config())
    with torch.no_grad():
        subject.assembly.transformer.get_submodule(module).weight.mul_(1e20)
    with subject.assembly:
        (found,) = Preflight(subject).run().fatal
    assert found.code == code and advised in found.fix and "--dtype" not in found.fix and "--eta 5" not in found.fix
    assert subject.fitted(finding("non-finite-loss", "student")).fix.startswith("a lower --lr; ")
    assert "--dtype" not in subject.fitted(finding("non-finite-gradient", "backward")).fix
    bfloat16 = replace(subject, assembly=replace(subject.assembly, dtype=torch.bfloat16))
    assert bfloat16.fitted(finding("non-finite-gradient", "backward")).fix.startswith("--dtype float32; ")
    far = replace(subject, config=replaced(subject.config, {"loss.eta": 50.0}))
    assert far.fitted(finding("eta-too-large", "teacher")).fix == "--eta 5" != subject.fitted(finding("eta-too-large", "teacher")).fix


def test_a_failure_that_no_check_explains_is_not_hidden(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr("trainer.preflight.student_backward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        diagnose_settings(tiny_config())


@pytest.mark.parametrize("where", ["attention", "norms"])
def test_a_failure_inside_of_attention_is_its_own(tiny_config: Make, where: str) -> None:
    subject = prepare(tiny_config())

    def fail(*args) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("no kernel for this")

    if where == "attention":
        subject.assembly.blocks[1].attn1.to_q.register_forward_pre_hook(fail)
    else:
        subject.assembly.transformer.requires_grad_(True)
    with subject.assembly, pytest.raises(RuntimeError, match="no kernel for this" if where == "attention" else "norms of queries and keys require a gradient"):
        Preflight(subject).run()


def test_an_optimizer_that_would_train_the_model_itself_is_named_before_it_takes_a_step(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    layer = subject.assembly.blocks[1].ff.requires_grad_(True).net[2]
    before = layer.weight.detach().clone()
    trained = [p for p in subject.assembly.transformer.parameters() if p.requires_grad]
    with subject.assembly:
        found = Preflight(replace(subject, optimizer=torch.optim.AdamW(trained))).run().fatal
        assert [(f.code, f.phase, f.block, f.evidence["num_parameters"]) for f in found] == [("frozen-weights-changed", "optimizer", 1, 4)]
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("where", ["taken out", "others put in", "in another model"])
def test_erasers_that_are_not_in_the_model_that_runs_are_said_to_be_missing(tiny_config: Make, where: str) -> None:
    subject = prepare(config := tiny_config())
    if where != "in another model":
        subject.assembly.erasers.undo()
        if where == "others put in":  # as by a notebook's cell that runs a second time
            Erasers(subject.assembly.blocks, 4)
    else:
        backbone = open_backbone(config.model)
        predict = backbone.predictor(backbone.load_transformer(dtype=torch.float32), subject.assembly.latent_shape)
        subject = replace(subject, assembly=replace(subject.assembly, predict=predict))
    with subject.assembly:
        assert [(f.code, f.block) for f in Preflight(subject).run().fatal] == [("student-without-erasers", 0)]


def test_latents_that_the_scheduler_loses_are_said_before_the_first_step(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.diffusion.Sampler.step", lambda self, velocity, index, latents, generator=None: latents / 0)
    assert [(f.code, f.phase) for f in diagnose_settings(tiny_config()).fatal] == [("non-finite-latents", "latents")]


def test_a_video_of_one_token_is_not_taken_for_wiped_attention(tiny_config: Make) -> None:
    backbone = open_backbone(tiny_config().model)
    side = backbone.spatial_ratio * backbone.config.patch_size
    config = tiny_config(model__frames=1, model__height=side, model__width=side)
    assert torch.Size(backbone.token_grid(backbone.latent_shape(1, side, side))).numel() == 1
    assert "wiped-attention" not in [f.code for f in diagnose_settings(config).findings]


def test_a_fresh_lora_is_not_taken_for_wiped(tiny_config: Make) -> None:
    subject = prepare(tiny_config())
    to_q = subject.assembly.blocks[1].attn1.to_q
    to_q.register_module("lora_B", torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2, bias=False)}).requires_grad_(False))
    to_q.lora_B["default"].weight.zero_()
    assert not Fingerprint(subject).findings()
    subject.assembly.transformer.patch_embed.pos_embedding.zero_()
    assert [(f.code, f.module) for f in Fingerprint(subject).findings()] == [("wiped-weights", "patch_embed.pos_embedding")]


def test_diagnose_looks_at_the_very_step_that_training_takes(tiny_config: Make) -> None:
    config = tiny_config(optim__steps=1)
    subject = prepare(config)
    preflight = Preflight(subject)
    preflight.run()
    record = read_metrics(train(config, {}))[0]
    assert preflight.terms == {name: record[name] for name in preflight.terms}


@pytest.fixture
def run_dir(tiny_config: Make) -> Path:
    return train(tiny_config(optim__steps=2), {})


def test_a_sound_run_and_its_eraser_are_healthy(run_dir: Path) -> None:
    bill = diagnose_path(run_dir)
    assert bill.healthy and any("2 steps" in line for line in bill.checked) and any("eraser" in line for line in bill.checked)
    assert diagnose_path(run_dir / WEIGHTS).healthy


def test_settings_that_are_not_there_are_named(run_dir: Path) -> None:
    content = json.loads((run_dir / CONFIG).read_text())
    del content["config"]["output"], content["config"]["optim"]["rank"]
    (run_dir / CONFIG).write_text(json.dumps(content))
    (line,) = (line for line in diagnose_run(run_dir).checked if line.startswith(CONFIG))
    assert line.startswith("config.json: settings, all known; ")
    assert " are not there, and taken at their defaults: optim.rank, output.save_every, " in line


def test_findings_that_may_not_be_read_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / FINDINGS).touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read anything
    with pytest.raises(InputOutputError, match=f"{FINDINGS}: cannot be read .Permission denied.$"):
        diagnose_path(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, METRICS, FINDINGS])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    with pytest.raises((CheckpointError, InputOutputError), match=f"{name}.*not a regular file"):
        diagnose_path(run_dir)


def test_a_run_without_what_it_found_itself_is_said_to_be(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (FINDINGS, METRICS):
        (run_dir / name).unlink()
    bill = diagnose_run(run_dir)
    assert "there is no findings.json, which a run writes before its first step" in caplog.text
    assert not any(METRICS in line for line in bill.checked)


def test_a_run_that_saved_nothing_is_said_to_have(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("ckpt", "eraser.safetensors"):
        diagnose_run(run_dir)
        assert not caplog.records
        shutil.rmtree(run_dir / name) if name == "ckpt" else (run_dir / name).unlink()
    assert diagnose_run(run_dir).healthy
    assert caplog.messages == [f"{run_dir}: nothing was saved so far, no checkpoint and no weights"]


def test_what_a_run_found_and_measured_is_told_again(run_dir: Path) -> None:
    (run_dir / FINDINGS).write_text(json.dumps(Bill(findings=(finding("dead-gelu", "training", severity="warning", block=1),)).as_json()))
    records = read_metrics(run_dir)
    records[1]["blocks"]["gradient"] = [0.5, float("nan")]
    (run_dir / METRICS).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [(f.code, f.block) for f in diagnose_run(run_dir).findings] == [("dead-gelu", 1), ("non-finite-gradient", 1)]
    records[1]["skipped"] = True  # float16 tries loss scales, and nothing came of that step
    (run_dir / METRICS).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [f.code for f in diagnose_run(run_dir).findings] == ["dead-gelu"]
    records[1]["loss"] = float("inf")
    (run_dir / METRICS).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert diagnose_run(run_dir).findings[1].code == "non-finite-loss"
    named = Bill(findings=(finding("eraser-diverged", "student", block=1),))  # which is why the loss is not finite
    (run_dir / FINDINGS).write_text(json.dumps(named.as_json()))
    assert [f.code for f in diagnose_run(run_dir).findings] == ["eraser-diverged"]
    huge = records[0]["blocks"] | {"eraser": [10**400, 1.0]}  # beyond a float
    for damaged in ({"blocks": 3}, records[0] | {"blocks": {"gradient": [None, 1.0]}}, records[0] | {"blocks": huge}):
        (run_dir / METRICS).write_text(json.dumps({"step": 0, "loss": 1.0, **damaged}) + "\n")
        with pytest.raises(CheckpointError, match="metrics.jsonl is not what a run writes"):
            diagnose_run(run_dir)
    for damaged in ({}, {"findings": [finding("dead-gelu", "student").as_json() | {"evidence": 3}], "checked": []}):
        (run_dir / FINDINGS).write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="findings.json"):
            diagnose_run(run_dir)


def test_damage_to_what_a_run_goes_on_from_is_no_health(run_dir: Path) -> None:
    assert {"config.json: settings, all known", "ckpt/step-000002: every byte is what was written"} <= set(diagnose_run(run_dir).checked)
    newest = run_dir / "ckpt" / "step-000002"
    older = shutil.copytree(newest, run_dir / "ckpt" / "step-000001")
    (older / MANIFEST).unlink()
    (older / STATE).write_text("{}")
    write_manifest(older, 1)
    adapter = newest / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    present = sorted(run_dir.rglob("*"))
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 is damaged; python run.py --resume .* would go on from step 1"):
        diagnose_path(run_dir)
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is good"):
        diagnose_path(run_dir)
    assert {p for p in present if older not in (p, *p.parents)} == set(run_dir.rglob("*"))  # nothing was renamed
    (run_dir / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a run directory .config.json"):
        diagnose_path(run_dir)


@pytest.mark.parametrize("spoil, code, block", [
    (lambda name, t: t.fill_(float("nan")) if name == "1.down.bias" else t, "non-finite-weight", 1),
    (lambda name, t: torch.zeros_like(t) if name.startswith("1.up") else t, "no-op-adapter", 1),
    (lambda name, t: t.half() if name.startswith("1.") else t, "half-precision-adapters", 1),
], ids=["NaN", "zero", "half"])
def test_a_spoilt_eraser_file_is_named(spoil: Callable, code: str, block: int, run_dir: Path) -> None:
    file = run_dir / WEIGHTS
    save_file({name: spoil(name, t) for name, t in load_file(file).items()}, file)
    assert [(f.code, f.block) for f in diagnose_eraser(file).findings] == [(code, block)]


def test_a_file_in_half_precision_has_a_fix_for_files(run_dir: Path) -> None:
    file = run_dir / WEIGHTS
    save_file({name: t.half() for name, t in load_file(file).items()}, file)
    (found,) = diagnose_eraser(file).findings
    assert "the file holds rounded weights" in found.cause and "take the file that the run wrote" in found.fix


@pytest.mark.parametrize("left", ["weight", "bias"])
def test_an_eraser_that_does_something_by_one_tensor_alone_is_none_without_effect(left: str, run_dir: Path) -> None:
    file = run_dir / WEIGHTS
    save_file({name: t if not name.startswith("1.up") or name.endswith(left) else torch.zeros_like(t) for name, t in load_file(file).items()}, file)
    assert diagnose_eraser(file).healthy


def test_what_was_looked_at_of_a_spoilt_eraser_is_not_said_to_be_sound(run_dir: Path) -> None:
    file = run_dir / "eraser.safetensors"
    state = load_file(file)
    save_file({name: torch.zeros_like(tensor) for name, tensor in state.items()}, file)
    (checked,) = diagnose_eraser(file).checked
    assert checked.endswith("whether all is finite, stored in float32, and every block's `up` away from zero")


def test_a_target_is_bad_where_the_mean_of_its_squares_is() -> None:
    for num_elements, bad in ((10, False), (1000, True)):
        first = tracing._First()
        tracing._check_target(first, torch.full((num_elements,), 1e18), "target")
        assert (first.found is not None) == bad


def test_an_untrained_eraser_in_the_released_layout(tiny_config: Make, tmp_path: Path) -> None:
    erasers = prepare(tiny_config()).assembly.erasers
    save_released(tmp_path / "released", erasers.state_dict(), erasers.rank)
    assert [f.code for f in diagnose_path(tmp_path / "released").findings] == ["no-op-adapter"]


def test_the_command_prints_json_and_fails_with_the_finding(tiny_config: Make, capsys: pytest.CaptureFixture) -> None:
    model = tiny_config().model.model
    flags = ["--model", model, "--prompts", str(tiny_config().data.prompts), "--beta", "0", "--rank", "4", "--device", "cpu"]
    for words in (["--json", *flags], [*flags, "--json"]):
        main(["diagnose", *words])
        assert json.loads(capsys.readouterr().out)["healthy"]
    main(["diagnose", *flags, "--lr", "5"])
    assert "learning-rate-too-high" in capsys.readouterr().out
    with pytest.raises(Unhealthy, match="non-finite-target"):
        main(["diagnose", "--json", *flags, "--eta", "3e38"])
    shown = json.loads(capsys.readouterr().out)
    assert not shown["healthy"] and shown["findings"][0]["code"] == "non-finite-target"


def test_the_command_on_a_file(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    main(["diagnose", str(run_dir / WEIGHTS), "--json"])
    assert json.loads(capsys.readouterr().out)["healthy"]
    with pytest.raises(CheckpointError, match="no eraser there"):
        main(["diagnose", str(run_dir / "nowhere")])
