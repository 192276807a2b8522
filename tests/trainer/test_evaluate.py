"""An evaluation from the run to its files."""

import errno
import json
import math
import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_erasers import shake

from memory.plan import MemoryPlan
from trainer import by_rule, cli
from trainer import evaluate as module
from trainer.backbones.cogvideox import CogVideoX
from trainer.by_rule import scene_prompts
from trainer.config import ModelConfig, TrainConfig
from trainer.eraser_files import save_eraser, save_released
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.evaluate import evaluate, print_table
from trainer.lock import RunLock
from trainer.run_directory import write_config
from trainer.video_config import EvaluateConfig


@pytest.fixture
def bundled(pipelines, monkeypatch) -> CogVideoX:
    """The tiny pipeline in place of the bundled model."""
    monkeypatch.setattr("trainer.backbones.location.BUNDLED", pipelines["2b"])
    return CogVideoX("shapes")


@pytest.fixture
def eraser(bundled, tmp_path):
    erasers = Erasers(bundled.blocks(bundled.load_transformer(dtype=torch.float32)), 4)
    shake(erasers)
    save_eraser(tmp_path / "run", erasers, base_model=bundled.identity(), training={"data": {"concept": "red"}})
    return tmp_path / "run"


def _config(run, **more) -> EvaluateConfig:
    return EvaluateConfig(**dict(run=run, num_videos=2, num_steps=2, model=ModelConfig(device="cpu")) | more)


def test_the_model_that_an_eraser_was_trained_on_is_measured(eraser, pipelines, tmp_path):
    """A copy of the bundled model, or one trained anew: its weights are not those of the bundled one."""
    made = shutil.copytree(pipelines["2b"], tmp_path / "made")
    weights = made / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights)
    original = evaluate(_config(eraser))["distance"]
    description = json.loads((eraser / "eraser.json").read_text())
    description["base_model"]["name"] = str(made)
    (eraser / "eraser.json").write_text(json.dumps(description))
    assert evaluate(_config(eraser))["distance"] == evaluate(_config(eraser, model=ModelConfig(model=str(made), device="cpu")))["distance"] != original


def test_a_run_that_goes_on_is_not_measured(eraser):
    (eraser / "config.json").write_text("{}")
    with RunLock(eraser), pytest.raises(CheckpointError, match="is in use by process"):
        evaluate(_config(eraser))
    assert not (eraser / "evaluation.json").exists()


def test_evaluation_is_written_with_the_agreed_fields(eraser, capsys):
    result = evaluate(_config(eraser))
    assert json.loads((eraser / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert {"target", "synonyms", "preserved", "motion", "num_videos", "seeds"} <= result.keys()
    assert {"name", "before", "after"} <= result["target"].keys() and result["target"]["name"] == "red"
    assert {"before", "after"} <= result["synonyms"].keys()
    assert all({"name", "kind", "before", "after"} <= row.keys() for row in result["preserved"])
    assert result["num_videos"] == 2 and result["seeds"] == [1000, 1000 + 2 * 6 - 1]
    rates = [row[when] for row in (result["target"], result["synonyms"], *result["preserved"]) for when in ("before", "after")]
    assert all(0 <= r <= 1 for r in rates) and math.isfinite(result["distance"]["preserved_rms"])
    assert result["distance"]["preserved_rms"] > 0  # the eraser was really on
    assert (eraser / "before-after.png").stat().st_size > 1000
    print_table(result)
    table = capsys.readouterr().out
    assert "erased: red; videos that show what is named" in table and "crimson, scarlet" in table
    assert all(column in table for column in ("kind", "videos", "before", "after", "after, 95 %"))
    for row in result["preserved"]:
        assert row["name"] in table
    motion, distance = ([word for word in line.split() if word[0].isdigit()] for line in table.splitlines()
                        if line.strip(" │").startswith(("motion", "distance")))
    assert motion == [f"{result['motion'][when]:.1f}" for when in ("before", "after")]
    assert distance[-1] == f"{result['distance']['preserved_rms']:.3f}"


@pytest.mark.parametrize("flags, dtype", [([], "bfloat16"), (["--dtype", "float32"], "float32")])
def test_a_run_is_measured_by_its_own_plan_unless_flags_say_otherwise(eraser, flags, dtype):
    write_config(eraser, TrainConfig(model=ModelConfig(frames=17), memory=MemoryPlan(dtype="bfloat16")), {})
    cli.main(["evaluate", str(eraser), "--num-videos", "1", "--num-steps", "2", "--device", "cpu", *flags])
    result = json.loads((eraser / "evaluation.json").read_text())
    assert (result["dtype"], result["num_steps"], result["guidance_scale"]) == (dtype, 2, 1.0)


def test_the_sheet_shows_each_group_before_and_after(eraser, monkeypatch):
    sheets = []
    monkeypatch.setattr(module, "contact_sheet", lambda path, rows, advice: sheets.append((path, rows)))
    evaluate(_config(eraser))
    (path, rows), = sheets
    chosen = scene_prompts("red", 2, _config(eraser).seed)
    shown = [next(c.prompt for c in chosen if c.group == group) for group in ("target", "synonyms", "preserved")] + [chosen[-1].prompt]
    assert path == eraser / "before-after.png"
    assert [label for label, _ in rows] == [f"{when}: {prompt}" for prompt in shown for when in ("before", "after")]
    assert all(not torch.equal(before, after) for (_, before), (_, after) in zip(rows[::2], rows[1::2]))


def test_before_is_the_model_without_the_eraser(eraser, bundled, tmp_path):
    """An eraser that does nothing leaves before and after bitwise the same."""
    idle = Erasers(bundled.blocks(bundled.load_transformer(dtype=torch.float32)), 4)
    save_eraser(tmp_path / "idle", idle, base_model=bundled.identity(), training={"data": {"concept": "red"}})
    assert evaluate(_config(tmp_path / "idle"))["distance"]["preserved_rms"] == 0.0


def test_released_file_needs_the_concept(eraser, bundled, tmp_path):
    from trainer.eraser_files import load_eraser

    save_released(tmp_path / "released", load_eraser(eraser).state, 4)
    with pytest.raises(UsageError, match="does not say which concept it erases; name it with --concept"):
        evaluate(_config(tmp_path / "released"))
    assert evaluate(_config(tmp_path / "released", concept="crimson"))["target"]["name"] == "red"


def test_another_concept_than_the_runs_own_does_not_replace_its_evaluation(eraser, monkeypatch):
    monkeypatch.setattr(by_rule, "_measure", Mock(return_value=({}, [])))
    monkeypatch.setattr(module, "contact_sheet", lambda path, rows, advice: None)
    evaluate(_config(eraser, concept="crimson"))  # the same by another word
    (eraser / "evaluation.json").unlink()
    with pytest.raises(UsageError, match="--concept blue: .*run erases red; leave --concept out"):
        evaluate(_config(eraser, concept="blue"))
    assert not (eraser / "evaluation.json").exists()


def test_a_card_that_is_not_there_is_told_first(eraser, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: there is no CUDA card here"):
        evaluate(_config(eraser, model=ModelConfig(device="cuda")))
    assert "measuring" not in capsys.readouterr().err


def test_unknown_concept_and_missing_run(eraser, tmp_path):
    with pytest.raises(UsageError, match="--concept giraffe"):
        evaluate(_config(eraser, concept="giraffe"))
    with pytest.raises(CheckpointError, match="no eraser there"):
        evaluate(_config(tmp_path / "nothing"))
    assert not (eraser / "evaluation.json").exists()


def test_eraser_of_another_model_is_refused(eraser, pipelines, monkeypatch):
    monkeypatch.setattr("trainer.backbones.location.BUNDLED", pipelines["5b"])
    with pytest.raises(CheckpointError, match="made for shapes"):
        evaluate(_config(eraser))
    assert not (eraser / "evaluation.json").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(eraser, monkeypatch):
    monkeypatch.setattr(module, "probe", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    monkeypatch.setattr(by_rule, "assemble", None)  # not reached
    with pytest.raises(InputOutputError, match=r"evaluation.json cannot be written \(Permission denied\); measure a copy of eraser.safetensors"):
        evaluate(_config(eraser))


def test_an_unwritable_sheet_advises_what_evaluate_has(eraser, monkeypatch):
    monkeypatch.setattr(by_rule, "measured", lambda *args, **more: ({}, [("before", torch.rand(3, 2, 8, 8))]))
    (eraser / "before-after.png").mkdir()
    with pytest.raises(InputOutputError, match=r"before-after.png cannot be written \(.*\); make room there$"):
        evaluate(_config(eraser))


def test_unwritable_evaluation(eraser):
    (eraser / "evaluation.json").mkdir()
    with pytest.raises(InputOutputError, match="evaluation.json cannot be written"):
        evaluate(_config(eraser))


def test_a_run_that_cannot_be_measured_says_so_first_and_ends_well(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle moving left\n")
    cli.main(["--concept", "red circle", "--prompts", str(prompts), "--preserve", "green", "--steps", "1", "--batch-size", "1", "--sample-steps", "1",
              "--monitor", "plain", "--out", str(tmp_path / "run"), "--device", "cpu"])
    said = capsys.readouterr()
    assert said.err.startswith("will not be measured: --concept red circle") and "step" in said.err and f"run: {tmp_path / 'run'}" in said.out
