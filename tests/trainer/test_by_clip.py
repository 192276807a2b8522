"""What the bundled CLIP sees: of rendered videos every rate is known beforehand, and generated ones take the whole way."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from projection_models import save_encoder
from test_erasers import shake

from trainer import by_clip as module
from trainer import cli
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.location import BUNDLED as SHAPES
from trainer.by_clip import labelled_prompts
from trainer.config import DataConfig, ModelConfig, TrainConfig
from trainer.eraser_files import load_eraser, save_eraser, save_released
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, UsageError
from trainer.evaluate import evaluate
from trainer.projection_encoders import BUNDLED
from trainer.prompts import UNSEEN, collect
from trainer.report import write_report
from trainer.run_directory import write_config
from trainer.shapes import world
from trainer.state import _digest
from trainer.video_config import EvaluateConfig

CPU = ModelConfig(device="cpu")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _run(directory: Path, model: str, seed: int = 0, **data) -> Path:
    """A run's directory with an eraser that does something, another one with another seed."""
    backbone = CogVideoX(model)
    erasers = Erasers(backbone.blocks(backbone.load_transformer(dtype=torch.float32)), 4, seed=seed)
    shake(erasers)
    config = TrainConfig(model=ModelConfig(model=model), data=DataConfig(**data))
    save_eraser(directory, erasers, base_model=backbone.identity(), training={"data": data})
    write_config(directory, config, {})
    return directory


@pytest.fixture
def published(pipelines, tmp_path) -> Path:
    """A run of a model whose videos no rule reads."""
    return _run(tmp_path / "run", str(pipelines["2b"]), concept="red", instead="yellow", preserve=("green", "blue", "a purple square"))


@pytest.fixture
def rendered(pipelines, tmp_path, monkeypatch) -> Path:
    """A run whose videos are drawn: without the eraser what the prompt says; with it a green shape where red was asked for."""
    def scene(label: str) -> world.Scene:
        return world.Scene(**{"colour": "blue", "shape": "circle", "direction": "left"} | dict([world.kind_of(label)]))

    def drawn(config, backbone, model, plan, embeddings, chosen, eraser):
        return [tuple(world.render(scene(label), torch.Generator().manual_seed(i))[None] for label in (case.label, "green" * (case.label == "red") or case.label))
                for i, case in enumerate(chosen)]

    monkeypatch.setattr(module, "_latents", drawn)
    monkeypatch.setattr(CogVideoX, "decoder", lambda self, *args, **how: lambda video: video)
    return _run(tmp_path / "run", str(pipelines["2b"]), concept="red", preserve=("green", "blue", "yellow", "purple"))


def _config(run: Path, **more) -> EvaluateConfig:
    return EvaluateConfig(**dict(run=run, rater="shapes", num_videos=4, num_steps=2, guidance_scale=1.0, model=CPU) | more)


def test_rates_of_a_perfect_eraser(rendered):
    result = evaluate(_config(rendered, num_videos=8))
    target = result["target"]
    assert (target["before"], target["after"], target["num_videos"], result["chance"]) == (1.0, 0.0, 8, 0.2)
    assert target["cosine"]["after"] < target["cosine"]["before"] - 0.1
    assert [(row["name"], row["num_videos"], row["before"], row["after"]) for row in result["preserved"]] == [
        (name, 2, 1.0, 1.0) for name in ("green", "blue", "yellow", "purple")]
    assert result["distance"]["preserved_rms"] == 0.0 and result["rater"] == "shapes"


def test_what_differs_in_capitals_only_is_one_thing_to_a_rater(rendered):
    result = evaluate(_config(rendered, preserve=("Green", "green", "blue", "BLUE")))
    assert [(row["name"], row["num_videos"], row["before"]) for row in result["preserved"]] == [("Green", 2, 1.0), ("blue", 2, 1.0)]
    assert result["chance"] == 1 / 3


def test_what_the_rater_does_not_see_is_said(rendered, caplog):
    evaluate(_config(rendered, concept="left", preserve=("right", "up", "down")))
    assert "for 'left': its rates say little about it" in caplog.text
    caplog.clear()
    evaluate(_config(rendered))
    assert "say little" not in caplog.text


def test_a_run_is_generated_measured_and_reported(published, capsys):
    cli.main(["evaluate", str(published), "--rater", "shapes", "--num-videos", "3", "--num-steps", "2", "--device", "cpu"])
    said, result = capsys.readouterr(), json.loads((published / "evaluation.json").read_text())
    assert "erased: red (shapes, zero-shot, chance 20.0%); videos that show what is named" in said.out and "12 of 12 videos made, 0:00 left" in said.err
    assert (result["num_videos"], result["num_steps"], result["guidance_scale"], result["seeds"]) == (3, 2, 6.0, [1000, 1005])
    assert result["distance"]["preserved_rms"] > 0  # the eraser was really on
    assert [row["num_videos"] for row in (result["target"], *result["preserved"])] == [3, 1, 1, 1]
    assert (published / "before-after.png").stat().st_size > 1000
    page = write_report(published, None).read_text()
    assert "as shapes sees them: zero-shot, chance 20.0%" in page and "a purple square" in page


def test_an_eraser_that_does_nothing_changes_no_video(pipelines, tmp_path):
    run = _run(tmp_path / "run", str(pipelines["2b"]), concept="red", preserve=("green",))
    backbone = CogVideoX(str(pipelines["2b"]))
    save_eraser(run, Erasers(backbone.blocks(backbone.load_transformer(dtype=torch.float32)), 4), base_model=backbone.identity(), training={})
    result = evaluate(_config(run, concept="red"))
    assert result["distance"]["preserved_rms"] == 0.0
    assert all(row["cosine"]["before"] == row["cosine"]["after"] for row in (result["target"], *result["preserved"]))


def test_an_evaluation_that_was_interrupted_goes_on_and_serves_that_of_another_eraser(published, pipelines, tmp_path, monkeypatch, capsys):
    calls, generate = [], module.generate_latents

    def interrupted(predict, scheduler, embeddings, prompts, seeds, *args, **how):
        calls.append((prompts, seeds))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(predict, scheduler, embeddings, prompts, seeds, *args, **how)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    expected = evaluate(_config(published, num_videos=2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "generate_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(_config(published, num_videos=2))
    assert capsys.readouterr().err.endswith("3 videos are kept, and the same command goes on with the rest\n")
    assert evaluate(_config(published, num_videos=2)) == expected and len(calls) == 4 + 5
    assert "measuring 8 videos, half of them without the eraser\n3 of them are there from an earlier call\n" in capsys.readouterr().err
    other = _run(tmp_path / "another", str(pipelines["2b"]), concept="red", instead="yellow", preserve=("green", "blue", "a purple square"), seed=1)
    assert evaluate(_config(other, num_videos=2))["target"]["cosine"]["before"] == expected["target"]["cosine"]["before"]
    assert len(calls) == 9 + 4  # those with its own
    evaluate(_config(published, num_videos=2, seed=7))
    assert len(calls) == 13 + 8
    copy = Path(shutil.copytree(pipelines["2b"], tmp_path / "copy"))
    for name, num_made in (("CogVideoXDDIMScheduler", 0), ("DDIMScheduler", 8)):  # the class is what model_index.json says
        index = copy / "model_index.json"
        index.write_text(index.read_text().replace("CogVideoXDDIMScheduler", name))
        before = len(calls)
        evaluate(_config(published, num_videos=2, model=ModelConfig(model=str(copy), device="cpu")))
        assert len(calls) == before + num_made


def test_a_cache_that_cannot_be_written_is_told_once_and_measuring_goes_on(published, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert evaluate(_config(published, num_videos=2))["target"]["num_videos"] == 2
    place = tmp_path / "file" / "eraser-trainer" / "latents"
    assert [said for said in caplog.messages if said.startswith("videos")] == [
        f"videos are not cached in {place} (Not a directory); XDG_CACHE_HOME names another place"]


def test_prompts_are_in_wordings_that_training_did_not_have(published):
    chosen, labels = labelled_prompts(_config(published, num_videos=6), load_eraser(published).model(CPU), "red")
    assert labels == ["red", "yellow", "green", "blue", "a purple square"]
    assert [case.label for case in chosen] == ["red"] * 6 + ["green"] * 2 + ["blue"] * 2 + ["a purple square"] * 2
    assert len({case.prompt for case in chosen[:6]}) == 4 and "a video of red" not in {case.prompt for case in chosen}
    assert all(case.label in case.prompt for case in chosen)


def test_flags_name_other_prompts_and_other_things(published, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one\ntwo\nthree\nfour\n")
    chosen, labels = labelled_prompts(_config(published, prompts=file, preserve=("cyan",), num_videos=2), load_eraser(published).model(CPU), "crimson")
    assert labels == ["crimson", "yellow", "cyan"]
    assert [case.prompt for case in chosen[:2]] == ["one", "three"] and {case.label for case in chosen[2:]} == {"cyan"}


def test_files_of_a_run_that_are_gone_are_told_with_the_flags_that_evaluate_has(pipelines, tmp_path):
    run, model, mine = tmp_path / "run", ModelConfig(model=str(pipelines["2b"])), tmp_path / "mine.txt"
    run.mkdir()
    write_config(run, TrainConfig(model=model, data=DataConfig(prompts=Path("gone.txt"), preserve_file=Path("kept.txt"))), {})
    mine.write_text("something red\n")
    with pytest.raises(UsageError, match="run was trained with gone.txt, which is not there; --prompts names others$"):
        labelled_prompts(_config(run), model, "red")
    with pytest.raises(UsageError, match="run was trained with kept.txt, which is not there; --preserve names others$"):
        labelled_prompts(_config(run, prompts=mine), model, "red")
    assert labelled_prompts(_config(run, prompts=mine, preserve=("green",)), model, "red")[1] == ["red", "green"]
    with pytest.raises(UsageError, match="^--prompts .*absent.txt: cannot be read"):
        labelled_prompts(_config(run, prompts=tmp_path / "absent.txt", preserve=("green",)), model, "red")


@pytest.mark.parametrize("concept, shown", [("red", ("red", "crimson")), ("crimson", ("crimson",))])
def test_synonyms_of_a_run_are_measured_under_its_concept(pipelines, tmp_path, concept, shown):
    model = str(pipelines["2b"])
    run = _run(tmp_path / "run", model, concept="red", synonyms=("crimson",), preserve=("green",))
    chosen, labels = labelled_prompts(_config(run, concept=concept, num_videos=8), ModelConfig(model=model), concept)
    assert labels == [concept, "green"] and {case.label for case in chosen[:8]} == {concept}
    assert {case.prompt for case in chosen[:8]} == {t.format(name) for t in UNSEEN for name in shown}


@pytest.mark.parametrize("model, concept, message", [
    ("shapes", "circle", "^--concept circle: .*/run erases red; leave --concept out"), ("shapes", "crimson", None),
    ("2b", "green", "^--concept green: .*/run erases red and preserves green; leave --concept out"), ("2b", "scarlet", None)])
def test_another_concept_than_the_runs_own_is_not_measured_as_erased(pipelines, tmp_path, model, concept, message):
    model = str(pipelines.get(model, model))
    run = _run(tmp_path / "run", model, concept="red", preserve=("green", "blue"))
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        labelled_prompts(_config(run, concept=concept), ModelConfig(model=model), concept)


def test_prompts_that_were_edited_since_are_told(pipelines, tmp_path, caplog):
    run, file = tmp_path / "run", tmp_path / "p.txt"
    config = TrainConfig(model=ModelConfig(model=str(pipelines["2b"])), data=DataConfig(concept="red", prompts=file, preserve=("green",)))
    run.mkdir()
    file.write_text("a red circle moving left\n")
    write_config(run, config, {}, prompts=_digest(collect(config.data, bundled=False)))
    for text, told in (("a red circle moving left\n", False), ("a red circle\n", True)):
        file.write_text(text)
        labelled_prompts(_config(run), config.model, "red")
        assert ("were edited since it was trained" in caplog.text) == told


def test_the_prompts_of_a_run_are_not_taken_for_those_of_another_concept(pipelines, tmp_path):
    run, model, file = tmp_path / "run", ModelConfig(model=str(pipelines["2b"])), tmp_path / "p.txt"
    run.mkdir()
    file.write_text("a red circle moving left\n")
    write_config(run, TrainConfig(model=model, data=DataConfig(concept="red", prompts=file, preserve=("green",))), {})
    with pytest.raises(UsageError, match="--concept square: .*/run erases red, of which its prompts are .*/p.txt.; leave --concept out"):
        labelled_prompts(_config(run, concept="square"), model, "square")
    for concept, prompts in (("red circle", None), ("square", file)):  # what they do name, and those that a flag names
        assert labelled_prompts(_config(run, concept=concept, prompts=prompts), model, concept)[1][0] == concept


def test_many_preserved_prompts_are_spread_over(published):
    many = tuple(f"thing number {i}" for i in range(100))
    chosen, labels = labelled_prompts(_config(published, preserve=many, num_videos=4), load_eraser(published).model(CPU), "red")
    assert [case.label for case in chosen[4:]] == [many[i] for i in (0, 25, 50, 75)] and len(labels) == 102


def test_an_export_takes_all_from_flags(published, tmp_path):
    save_released(tmp_path / "released", load_eraser(published).state, 4)
    model = ModelConfig(model=json.loads((published / "eraser.json").read_text())["base_model"]["name"], device="cpu")
    with pytest.raises(UsageError, match="nothing that a video could show in place of 'red'; name related things by --preserve"):
        evaluate(_config(tmp_path / "released", concept="red", model=model))
    result = evaluate(_config(tmp_path / "released", concept="red", preserve=("green",), model=model))
    assert (result["chance"], result["target"]["num_videos"]) == (0.5, 4)


@pytest.mark.parametrize("model, usual", [("shapes", (64, 16, 1.0)), ("a copy of it", (64, 16, 1.0)), ("2b", (8, 50, 6.0))])
def test_the_usual_numbers_are_those_of_the_model(pipelines, tmp_path, monkeypatch, model, usual):
    name = {"shapes": model, "a copy of it": str(shutil.copytree(SHAPES, tmp_path / "copy")), "2b": str(pipelines["2b"])}[model]
    run = _run(tmp_path / "run", name, concept="red", preserve=("green",))
    asked = []
    monkeypatch.setattr(module, "measured", lambda config, model, concept, card, *, eraser: asked.append(config) or ({}, []))
    monkeypatch.setattr("trainer.evaluate.contact_sheet", lambda path, rows, advice: None)
    evaluate(EvaluateConfig(run=run, rater="shapes", model=ModelConfig(model=name)))
    assert (asked[0].num_videos, asked[0].num_steps, asked[0].guidance_scale) == usual


def test_a_card_decides_what_streams_unless_a_flag_does(published, monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.by_clip.opened", lambda model, plan, card, **how: seen.append((plan.resident_blocks, card)) or (_ for _ in ()).throw(UsageError("enough")))
    for flags in ((), ("--resident-blocks", "1")):
        with pytest.raises(UsageError, match="enough"):
            cli.main(["evaluate", str(published), "--rater", "shapes", "--device", "cpu", *flags])
    assert (seen[0][1].name, seen[1]) == ("cpu", (1, None))


@pytest.mark.parametrize("rater, error, message", [
    ("qwen3-vl", UsageError, r"--rater .*: a model of type 'qwen3_vl'; clip is needed$"),
    ("absent", UsageError, "--rater .*absent: no model in transformers' layout there"),
    ("no-preprocessor", CheckpointError, "preprocessor_config.json cannot be loaded")])
def test_a_rater_that_cannot_rate_is_refused_before_anything_is_generated(published, tmp_path, monkeypatch, rater, error, message):
    place = BUNDLED / rater if rater == "qwen3-vl" else tmp_path / "clip"
    if rater == "no-preprocessor":
        save_encoder(place, "clip")
        (place / "preprocessor_config.json").unlink()
    monkeypatch.setattr(module, "_latents", None)  # not reached
    with pytest.raises(error, match=message):
        evaluate(_config(published, rater=str(place if place.exists() else tmp_path / "absent")))
    assert not (published / "evaluation.json").exists()


@pytest.mark.parametrize("more, message", [
    ({"preserve": ("red",)}, "--preserve red: that is what is to be erased"),
    ({"model": ModelConfig(device="cpu", frames=2)}, "--frames 2: this VAE makes")])
def test_what_can_be_refused_is_before_a_rater_is_downloaded(published, monkeypatch, more, message):
    monkeypatch.setattr(module, "locate", None)  # not reached
    with pytest.raises(UsageError, match=message):
        evaluate(_config(published, **more))


def test_an_eraser_of_another_model_is_refused_before_anything_is_downloaded(published, pipelines, monkeypatch):
    monkeypatch.setattr(CogVideoX, "fetch", None)  # not reached
    monkeypatch.setattr(module, "locate", None)
    with pytest.raises(CheckpointError, match="made for .*2b, not for .*5b"):
        evaluate(_config(published, model=ModelConfig(model=str(pipelines["5b"]), device="cpu")))


@pytest.mark.parametrize("more, message", [
    ({"prompts": Path("x.txt")}, "--prompts: the rule that measures has prompts of its own"), ({"preserve": ("green",)}, "--preserve: the rule"),
    ({"rater": ""}, "--rater: an empty value"), ({"rater": "shapes", "num_steps": 0}, "--num-steps 0")])
def test_flags_without_effect_are_refused(more, message):
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(run=Path("run"), **more)


def test_a_model_that_no_rule_reads_is_told_of_the_rater(published):
    with pytest.raises(UsageError, match="measured by a rule; --rater openai/clip-vit-large-patch14, or another CLIP, measures others"):
        evaluate(_config(published, rater=None))
