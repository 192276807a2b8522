"""`run.py forget` from its command line: what it leaves, going on, and wrong input."""

import json
import re
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import call  # noqa: F401  fixture

from trainer import cli, projection, projection_evaluate
from trainer.checkpoint import Saver, latest_checkpoint
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.errors import CheckpointError, Interrupted, NonFinite, TrainerError, UsageError
from trainer.findings import Bill, Unhealthy, finding
from trainer.projection_config import ForgetConfig, read_forget_config
from trainer.projection_examples import classes, images, open_picture
from trainer.run_directory import write_config
from trainer.run_files import CONFIG, read_metrics
from trainer.shapes.pictures import picture

FAST = ["--steps", "6", "--max-attempts", "1", "--save-every", "2", "--monitor", "off", "--device", "cpu"]


@pytest.fixture
def folders(tmp_path):
    """Five pictures each of a class to forget and of two to keep."""
    for where, names in (("forget", ["red circle"]), ("keep", ["blue square", "green triangle"])):
        for name in names:
            folder = tmp_path / where / (name if where == "keep" else "")
            folder.mkdir(parents=True)
            for i in range(5):
                picture(name, 0, "folder", i).save(folder / f"{i}.png")
    return tmp_path


def clip(encoders, out, *more: str) -> list[str]:
    return ["forget", "--encoder", "clip", "--model", str(encoders["clip"]), "--forget", "cat", "--preserve", "dog", "car",
            "--out", str(out), *FAST, *more]


def qwen(encoders, folders, *more: str) -> list[str]:
    return ["forget", "--encoder", "qwen3-vl", "--model", str(encoders["qwen3-vl"]), "--forget-images", str(folders / "forget"),
            "--preserve-images", str(folders / "keep"), "--out", str(folders / "run"), *FAST, *more]


def test_clip_run_leaves_a_lora_a_merged_layer_and_an_evaluation(encoders, tmp_path, capsys):
    run = tmp_path / "run"
    main(clip(encoders, run, "--merge", "--target", "mean"))
    result = json.loads((run / "evaluation.json").read_text())
    assert {"concept", "target", "synonyms", "preserved", "motion", "distance", "num_videos", "seeds", "num_images"} <= set(result)
    assert result["concept"] == result["target"]["name"] == "cat" and result["chance"] == pytest.approx(1 / 3)
    assert [row["name"] for row in result["preserved"]] == ["dog", "car"]
    for row in (result["target"], *result["preserved"]):
        assert row["num_images"] == 2 and row["after_interval"][0] <= row["after"] <= row["after_interval"][1]
    assert 0 <= result["baseline"]["target"] <= 1
    tensors = load_file(run / "adapter_model.safetensors")
    update = tensors["base_model.model.text_projection.lora_B.weight"] @ tensors["base_model.model.text_projection.lora_A.weight"]
    stored = load_file(encoders["clip"] / "model.safetensors")["text_projection.weight"]
    assert torch.allclose(load_file(run / "merged.safetensors")["text_projection.weight"], stored + update, atol=1e-6)
    assert [r["step"] for r in read_metrics(run)] == list(range(6))
    out = capsys.readouterr().out
    assert f"run: {run}" in out and "cat" in out


def test_an_attempt_that_was_too_short_is_not_said_to_push_too_little(encoders, tmp_path, caplog):
    """No λ_f moves the class in six small steps; --steps and --lr do."""
    run = [*clip(encoders, tmp_path / "run"), "--acceptance", "0.9"]
    main(run)
    assert "more --steps or a higher --lr would help" in caplog.text
    caplog.clear()
    main([*clip(encoders, tmp_path / "other"), "--acceptance", "0.9", "--lambda-forget", "100"])
    assert "the distance to the target fell by" in caplog.text
    caplog.clear()
    main([*clip(encoders, tmp_path / "more"), "--acceptance", "0.9", "--steps", "600", "--save-every", "600"])
    assert "the distance to the target fell by" not in caplog.text


def test_a_run_saves_on_its_way(encoders, tmp_path, monkeypatch):
    saved, save = [], Saver.save

    def note(saver, step, **more):
        saved.append((step, more.get("final", False)))
        save(saver, step, **more)

    monkeypatch.setattr(Saver, "save", note)
    main(clip(encoders, tmp_path / "run"))
    assert saved == [(2, False), (4, False), (6, False), (6, True)]


def null_space_column(html: str) -> list[str]:
    (table,) = (t for t in re.findall(r"<table>.*?</table>", html) if "null space" in t)
    return [re.findall(r"<td.*?>(.*?)</td>", line)[6] for line in table.split("<tr>")[2:]]


def baseline(run) -> list[str]:
    found = json.loads((run / "evaluation.json").read_text())["baseline"]
    return [f"{rate:.1%}" for rate in (found["target"], *[found[name] for name in ("synonyms",) if name in found], *(r["after"] for r in found["preserved"]))]


def test_report_and_diagnosis_know_a_run_of_forget(encoders, tmp_path, capsys):
    run = tmp_path / "run"
    main(clip(encoders, run))
    assert json.loads((run / "findings.json").read_text())["healthy"]
    assert {"encode", "forward", "backward", "optimizer"} == set(read_metrics(run)[-1]["peak_bytes_by_phase"])
    main(["diagnose", str(run)])
    out = capsys.readouterr().out
    assert "Healthy." in out and "6 steps, loss terms and gradients" in out and "frozen weights: compared bit by bit" in out
    main(["report", str(run)])
    html = (run / "report.html").read_text()
    assert "nearest class in text space" in html and "L_preserve" in html and "Nothing was measured" not in html
    assert "Forgetting cat" in html and f"clip, {encoders['clip']} · rank 5 · run run" in html
    assert not any(word in html for word in ("Videos", "Samples", "Norms", "What the language model says"))
    assert "Examples of “cat” taken for it (nearest class in text space)" in html and "Attempts" in html and "<td>no</td>" in html
    assert "Milliseconds a step, median" in html and "Seconds a step" not in html
    assert null_space_column(html) == baseline(run)
    bold, all_names = (set(re.findall(rf"<tr{kind}><td><code>(.*?)</code>", html)) for kind in (" class=set", "(?: class=set)?"))
    assert {"lr", "lambda_weight", "memory.dtype"} <= all_names - bold and {"model", "forget", "steps", "preserve"} <= bold
    records = (run / "metrics.jsonl").read_text().splitlines()
    bad = json.loads(records[-1]) | {"gradient_norm": float("nan")}
    (run / "metrics.jsonl").write_text("\n".join([*records[:-1], json.dumps(bad)]) + "\n")
    with pytest.raises(TrainerError, match="non-finite-gradient"):
        main(["diagnose", str(run)])


def test_damaged_layers_and_inputs_stop_a_run_before_it_begins():
    from projection_models import problem
    from trainer.projection_health import examine

    assert examine({"head": problem()}).healthy
    for damage, code in ((lambda p: p.layer.weight.fill_(0.5), "wiped-weights"),
                         (lambda p: p.layer.weight[0].fill_(float("nan")), "non-finite-weight"),
                         (lambda p: p.preserve[1].fill_(float("inf")), "non-finite-activation")):
        damaged = problem()
        damage(damaged)
        assert [f.code for f in examine({"head": damaged}).fatal] == [code]


@pytest.mark.parametrize(("flag", "value", "code"), [("--lr", "1e30", "non-finite-loss"), ("--alpha", "1e30", "non-finite-gradient")])
def test_what_is_not_finite_has_a_fix_that_forget_knows(encoders, tmp_path, flag, value, code):
    with pytest.raises(Unhealthy, match=f"{code}.*Fix: a lower --lr, --alpha or --lambda-forget"):
        main(clip(encoders, tmp_path / "run", flag, value))
    assert "--dtype" not in (tmp_path / "run" / "findings.json").read_text()


def test_what_a_full_disk_does_not_take_is_said_all_the_same(encoders, tmp_path, monkeypatch, caplog):
    def advance(run, phase, advance=projection.Run.advance):
        (tmp_path / "run" / ".findings.json.part").mkdir(exist_ok=True)  # in the way of what is written first
        return advance(run, phase)

    monkeypatch.setattr(projection.Run, "advance", advance)
    with pytest.raises(Unhealthy, match="non-finite-loss"):
        main(clip(encoders, tmp_path / "run", "--lr", "1e30"))
    assert "findings.json cannot be written" in caplog.text
    (tmp_path / "other" / ".findings.json.part").mkdir(parents=True)
    monkeypatch.setattr(projection, "examine", lambda problems: Bill(findings=(finding("wiped-weights", "weights"),)))
    with pytest.raises(Unhealthy, match="before training .*wiped-weights"):
        main(clip(encoders, tmp_path / "other"))


def test_a_lora_that_no_step_made_better_is_said_with_what_helps(encoders, tmp_path):
    main(clip(encoders, tmp_path / "run", "--lr", "100"))
    (found,) = json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
    assert found["code"] == "no-op-adapter" and found["fix"].startswith("--lr 0.01") and "injected" not in found["cause"]


def test_a_frozen_layer_that_changes_ends_it_and_is_still_told_after_resuming(encoders, tmp_path, monkeypatch):
    def change(self, updates=projection.Run.updates):
        self.problems[0].layer.weight[0, 0] += 1
        return updates(self)

    with monkeypatch.context() as patch:
        patch.setattr(projection.Run, "updates", change)
        with pytest.raises(Unhealthy, match="after training: frozen-weights-changed .weights, text_projection.weight.: .*largest change 1"):
            main(clip(encoders, tmp_path / "run"))
    main(["forget", "--resume", str(tmp_path / "run")])
    (found,) = json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
    assert (found["code"], found["severity"]) == ("frozen-weights-changed", "warning") and found["evidence"]["stopped_an_earlier_start"]


def test_clip_is_measured_on_pictures_where_there_are_some(encoders, tmp_path, caplog):
    for name in ("cat", "dog", "car"):
        (tmp_path / "shown" / name).mkdir(parents=True)
        for i in range(3):
            picture("red circle", 0, name, i).save(tmp_path / "shown" / name / f"{i}.png")
    main(clip(encoders, tmp_path / "run", "--images", str(tmp_path / "shown")))
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["target"]["num_images"] == 3 and result["synonyms"]["num_images"] == 3
    main(["report", str(tmp_path / "run")])
    column = null_space_column((tmp_path / "run" / "report.html").read_text())
    assert column == baseline(tmp_path / "run") and len(column) == 4
    assert result["target"]["before"] == 0 and "0% of the examples of 'cat' are taken for it before it is forgotten, no more than by chance (33%)" in caplog.text


def test_qwen_run_edits_every_merger_and_measures_the_leak(encoders, folders):
    main(qwen(encoders, folders))
    result = json.loads((folders / "run" / "evaluation.json").read_text())
    assert result["target"]["num_images"] == 1 and result["concept"] == "forget"
    layers = ["merger", "deepstack_merger_list.0", "deepstack_merger_list.1"]
    assert set(result["distance"]) == {f"model.visual.{name}.linear_fc2" for name in layers} | {"preserved_rms"}
    assert len(load_file(folders / "run" / "adapter_model.safetensors")) == 6
    assert [(row["edited"], row["deepstack"]) for row in result["leak"]] == [
        ("none", "whole"), ("none", "cut"), ("main merger", "whole"), ("main merger", "cut"), ("all mergers", "whole"),
        ("main merger, null space", "whole"), ("main merger, null space", "cut"), ("all mergers, null space", "whole")]
    assert all(row["num_target"] == 1 and row["num_preserved"] == 2 for row in result["leak"])
    main(["report", str(folders / "run")])
    html = (folders / "run" / "report.html").read_text()
    assert html.index("What the language model says") < html.index("Of 1 pictures of the forgotten class and 2 of what is preserved")
    assert html.count("<td>main merger, null space</td>") == 2 and "Cannot be shown" not in html


def test_where_the_language_model_does_not_fit_the_rest_is_measured(encoders, folders, monkeypatch, caplog):
    def fail(*_):
        assert json.loads((folders / "run" / "evaluation.json").read_text())["target"]  # whatever becomes of this process
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(projection_evaluate, "leak", fail)
    main(qwen(encoders, folders))
    assert "leak" not in json.loads((folders / "run" / "evaluation.json").read_text())
    assert f"; python run.py forget --resume {folders / 'run'} --device cpu" in caplog.text


def _without(directory, *names):
    for name in names:
        (directory / name).unlink()


def _made_of_nan(directory, name="visual_projection.weight"):
    weights = load_file(directory / "model.safetensors")
    weights[name][0, 0] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _tower_alone(directory):
    weights = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if ".visual." in name}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("encoder", "damage", "error", "message"), [
    ("clip", lambda d: _without(d, "tokenizer.json", "tokenizer_config.json"), CheckpointError, "no tokenizer there"),
    ("clip", lambda d: (d / "tokenizer.json").write_text("{}"), CheckpointError, "tokenizer cannot be loaded"),
    ("clip", lambda d: _without(d, "preprocessor_config.json"), CheckpointError, "preprocessor_config.json cannot be loaded"),
    ("clip", _made_of_nan, NonFinite, "visual_projection .* makes NaN"),
    ("clip", lambda d: _made_of_nan(d, "text_model.encoder.layers.0.mlp.fc2.weight"), NonFinite, "weights are damaged, or .*copy the model again"),
    ("qwen3-vl", lambda d: _without(d, "preprocessor_config.json"), CheckpointError, "preprocessor_config.json cannot be loaded"),
    ("qwen3-vl", lambda d: _without(d, "tokenizer.json", "tokenizer_config.json"), CheckpointError, "no tokenizer there"),
    ("qwen3-vl", _tower_alone, CheckpointError, "has no weights of the language model.*or --num-answers 0 does not ask it")])
def test_a_damaged_encoder_is_said_before_training(encoders, folders, tmp_path, encoder, damage, error, message):
    model = shutil.copytree(encoders[encoder], tmp_path / "model")
    damage(model)
    shown = shutil.copytree(folders / "keep" / "blue square", folders / "shown" / "cat")
    for name in ("dog", "car"):
        shutil.copytree(shown, folders / "shown" / name)
    words = qwen({encoder: model}, folders) if encoder == "qwen3-vl" else clip({encoder: model}, folders / "run", "--images", str(folders / "shown"))
    with pytest.raises(error, match=message):
        main(words)
    assert not (folders / "run").exists()


def test_classes_that_the_encoder_does_not_tell_apart_are_refused(encoders, folders):
    shutil.copytree(folders / "forget", folders / "keep" / "disc")
    with pytest.raises(UsageError, match="no difference between 'forget', which is to be forgotten, and 'disc'"):
        main(qwen(encoders, folders))


def test_pictures_are_seen_as_the_camera_was_held(tmp_path):
    upright, exif = picture("red circle", 0, "camera", 0).resize((64, 32)), Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert list(open_picture(tmp_path / "turned.png").getdata()) == list(upright.getdata())


def test_large_pictures_are_seen_and_too_large_ones_are_to_be_made_smaller(tmp_path, monkeypatch):
    picture("red circle", 0, "poster", 0).save(tmp_path / "poster.png")  # 32 pixels square
    for limit in (32 * 32, 600):  # from the limit on Pillow warns, from twice that it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert open_picture(tmp_path / "poster.png").size == (32, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UsageError, match=r"poster.png: more than 1,000 pixels; make it smaller, or leave it out$"):
        open_picture(tmp_path / "poster.png")


def test_grey_of_16_bits_is_seen_as_that_of_8(tmp_path):
    grey = picture("red circle", 0, "scanner", 0).convert("L")
    Image.frombytes("I;16", grey.size, bytes(value for value in grey.tobytes() for _ in range(2))).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as deep:
        assert deep.mode.startswith("I") and deep.getextrema()[1] == 257 * grey.getextrema()[1]
    assert list(open_picture(tmp_path / "deep.png").getdata()) == list(grey.convert("RGB").getdata())


def test_pictures_at_another_place_are_the_same_run(encoders, folders):
    main(qwen(encoders, folders, "--mergers", "main", "--num-answers", "0"))
    words = ["forget", "--resume", str(folders / "run")]
    for name, flag in (("forget", "--forget-images"), ("keep", "--preserve-images")):
        shutil.copytree(folders / name, folders / "moved" / name)
        words += [flag, str(folders / "moved" / name)]
    main(words)


def test_main_merger_alone(encoders, folders):
    main(qwen(encoders, folders, "--mergers", "main", "--num-answers", "0", "--forget", "disc"))
    result = json.loads((folders / "run" / "evaluation.json").read_text())
    assert list(result["distance"]) == ["model.visual.merger.linear_fc2", "preserved_rms"] and "leak" not in result
    assert result["concept"] == "disc"


class _StopAfter:
    """In place of StopFlag: asks to stop when it was looked at a number of times."""

    signal_number = signal.SIGTERM

    def __init__(self, count: int):
        self.left = count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_an_interrupted_run_goes_on_to_the_same_end(encoders, tmp_path, monkeypatch):
    main(clip(encoders, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(projection, "StopFlag", lambda: _StopAfter(3))
        with pytest.raises(Interrupted, match="stopped at step 3 and saved; go on with python run.py forget --resume ") as caught:
            main(clip(encoders, tmp_path / "half"))
    assert caught.value.exit_code == 143 and not (tmp_path / "half" / "evaluation.json").exists()
    main(["forget", "--resume", str(tmp_path / "half")])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lost = ("seconds", "phase_seconds", "memory", "peak_bytes_by_phase")
    records = [[{k: v for k, v in r.items() if k not in lost} for r in read_metrics(tmp_path / name)] for name in ("half", "whole")]
    assert records[0] == records[1]


def test_a_run_that_was_interrupted_is_titled_by_its_class(encoders, folders, monkeypatch):
    monkeypatch.setattr(projection, "StopFlag", lambda: _StopAfter(3))
    with pytest.raises(Interrupted):
        main(qwen(encoders, folders))
    main(["report", str(folders / "run")])
    assert "<title>Forgetting forget" in (folders / "run" / "report.html").read_text()


def test_a_run_may_be_interrupted_before_its_first_step_again_and_again(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "StopFlag", lambda: _StopAfter(0))
    for words in (clip(encoders, tmp_path / "run"), ["forget", "--resume", str(tmp_path / "run")]):
        with pytest.raises(Interrupted, match="stopped at step 0 and saved"):
            main(words)


def test_a_run_that_goes_on_shows_the_steps_of_all_its_attempts(encoders, tmp_path, monkeypatch):
    main(clip(encoders, tmp_path / "run", "--acceptance", "0.9", "--max-attempts", "3"))
    shown = []
    monkeypatch.setattr(projection.Monitor, "close", lambda monitor: shown.append((monitor.done, monitor.num_steps)))
    main(["forget", "--resume", str(tmp_path / "run")])
    assert set(shown) == {(18, 18)}


def test_a_run_killed_before_its_first_checkpoint_begins_anew(encoders, tmp_path, monkeypatch, caplog):
    main(clip(encoders, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(projection.Saver, "save", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(clip(encoders, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="cannot resume: --rank was"):
        main(["forget", "--resume", str(tmp_path / "run"), "--rank", "3"])
    main(["forget", "--resume", str(tmp_path / "run")])
    assert caplog.text.count("run ended before its first checkpoint: it begins anew, and arrives at the same") == 1
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    shutil.rmtree(tmp_path / "run" / "ckpt")  # lost later
    with pytest.raises(CheckpointError, match="there is no checkpoint; start again"):
        main(["forget", "--resume", str(tmp_path / "run")])


def test_a_resumed_run_keeps_what_it_trains_on(encoders, tmp_path):
    main(clip(encoders, tmp_path / "run"))
    for flag, value, said in (("--lr", "0.5", "--lr was 0.01"), ("--dtype", "bfloat16", "--dtype was 'native'"),
                              ("--optimizer", "adamw8bit", "--optimizer was 'adamw'")):
        with pytest.raises(CheckpointError, match=f"cannot resume: {said} and is .?{value}.? now"):
            main(["forget", "--resume", str(tmp_path / "run"), flag, value])
    before = (tmp_path / "run" / "findings.json").read_bytes()
    (tmp_path / "run" / "findings.json").write_text("kept")
    with pytest.raises(CheckpointError, match="cannot resume: --rank was"):
        main(["forget", "--resume", str(tmp_path / "run"), "--rank", "3"])
    assert (tmp_path / "run" / "findings.json").read_text() == "kept"  # refused before anything is written
    (tmp_path / "run" / "findings.json").write_bytes(before)
    with pytest.raises(CheckpointError, match="absent: not a run directory"):
        main(["forget", "--resume", str(tmp_path / "absent")])
    with pytest.raises(CheckpointError, match="holds a run already; go on with it by python run.py forget --resume"):
        main(clip(encoders, tmp_path / "run"))
    newest = latest_checkpoint(tmp_path / "run").path
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="the checkpoint of step 6 is damaged; python run.py forget --resume .* would go on from step 4"):
        main(["diagnose", str(tmp_path / "run")])


@pytest.mark.parametrize(("config", "facts", "words", "message"), [
    (ForgetConfig(), {"command": "forget"}, [], "is a run of forget; go on with it by `python run.py forget --resume"),
    (TrainConfig(), {}, ["forget"], "is a training run; go on with it by `python run.py --resume")])
def test_a_run_of_the_other_command_is_said(tmp_path, config, facts, words, message):
    write_config(tmp_path, config, {}, **facts)
    with pytest.raises(CheckpointError, match=message):
        main([*words, "--resume", str(tmp_path)])


@pytest.mark.parametrize("values", [{"rank": 2.5}, {"steps": True}, {"target": "no"}, {"preserve": "abc"}, {"preserve": [1]},
                                    {"lr": 10**400}, {"forget": " "}, {"memory": {"dtype": 3}}])
def test_settings_of_a_run_have_their_types(tmp_path, values):
    write_config(tmp_path, ForgetConfig(), {}, command="forget")
    assert read_forget_config(tmp_path) == ForgetConfig()
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(content | {"config": content["config"] | values}))
    with pytest.raises(CheckpointError, match="not a run of `forget`"):
        read_forget_config(tmp_path)


def test_brackets_in_brackets_are_no_run(tmp_path):
    (tmp_path / CONFIG).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_forget_config(tmp_path)


def test_out_of_memory_names_flags_that_forget_has(call, monkeypatch):  # noqa: F811
    def fail(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cli, "main", fail)
    code, _, (line,) = call("forget")
    assert code == 3 and "--batch-size" in line and "--device cpu" in line and "--frames" not in line


def test_other_examples_are_not_resumed(encoders, tmp_path):
    keep = tmp_path / "keep.txt"
    keep.write_text("bird\n")
    main(clip(encoders, tmp_path / "run", "--preserve-file", str(keep)))
    keep.write_text("fish\n")
    with pytest.raises(CheckpointError, match="the texts or pictures are not those that the run began with"):
        main(["forget", "--resume", str(tmp_path / "run")])


def test_another_model_is_not_resumed(encoders, tmp_path):
    model = shutil.copytree(encoders["clip"], tmp_path / "model")
    main(clip({"clip": model}, tmp_path / "run"))
    shutil.copytree(encoders["qwen3-vl"], tmp_path / "other")
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="not the one that the run began with"):
        main(["forget", "--resume", str(tmp_path / "run")])


def _empty(folders):
    shutil.rmtree(folders / "forget")
    (folders / "forget").mkdir()


def _broken(folders):
    path = folders / "keep" / "blue square" / "1.png"
    path.write_bytes(path.read_bytes()[:80])


def _text(folders):
    (folders / "forget" / "2.png").write_text("not a picture")


def _lonely(folders):
    for i in range(1, 5):
        (folders / "forget" / f"{i}.png").unlink()


def _same(folders):
    shutil.copytree(folders / "forget", folders / "keep" / "forget")


def _absent(folders):
    shutil.rmtree(folders / "keep")


def _thin(folders):
    Image.new("RGB", (900, 1)).save(folders / "keep" / "blue square" / "0.png")


def _dangling(folders):
    (folders / "keep" / "blue square" / "zz.png").symlink_to(folders / "nowhere")


@pytest.mark.parametrize(("damage", "message"), [
    (_thin, "the encoder does not take the picture .*blue square/0.png .*; leave it out"),
    (_dangling, "blue square/zz.png: not a picture that can be read .No such file or directory.; remove it"),
    (_empty, "--forget-images .*: has no pictures"), (_broken, "blue square/1.png: not a picture that can be read"),
    (_text, "forget/2.png: not a picture"), (_lonely, "the class 'forget' has one picture; at least two"),
    (_same, "has a folder 'forget', the class to forget"), (_absent, "--preserve-images .*: cannot be read")])
def test_wrong_pictures_are_one_clear_line(encoders, folders, damage, message):
    damage(folders)
    with pytest.raises(UsageError, match=message) as caught:
        main(qwen(encoders, folders))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (folders / "run" / "config.json").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["--forget", "red pentagon"], "does not know it; it knows red circle"),
    (["--preserve", "pink circle"], "--preserve pink circle: the bundled encoder does not know it"),
    (["--forget", "red circle", "--preserve", "red circle"], "among the classes to preserve"),
    (["--forget", "Red circle ", "--preserve", "red circle"], "Red circle: the bundled encoder does not know it"),
    (["--preserve", "blue square", " "], "--preserve: an empty class names nothing"),
    (["--feed-forward-chunks", "4"], "--feed-forward-chunks is for training erasers; the encoder runs forward only, and obeys --dtype"),
    (["--boundaries", "host"], "--boundaries is for training erasers"), (["--num-keep-attention", "1"], "--num-keep-attention is for training"),
    (["--resume", "elsewhere"], "--out beside --resume"),
    (["--encoder", "qwen3-vl", "--target", "empty"], "an image has no empty string"),
    (["--encoder", "qwen3-vl", "--preserve", "red circle"], "--preserve is not for --encoder qwen3-vl"),
    (["--encoder", "clip", "--forget-images", "x"], "--forget-images is not for --encoder clip"),
    (["--mergers", "main"], "--mergers is not for --encoder clip"), (["--num-answers", "0"], "--num-answers is not for --encoder clip"),
    (["--forget", ""], "--forget is empty; name the class to forget"), (["--forget", " "], "--forget is empty"),
    (["--preserve-file", "absent.txt"], "--preserve-file absent.txt: cannot be read"),
    (["--preserve-file", "keep.CSV"], "--preserve-file keep.CSV: is a table; write a text file, with one class a line"),
    (["--rank", "0"], "--rank 0: must be 1 or more"), (["--rank", "500"], "--rank 500: text_projection is"),
    (["--acceptance", "1"], "--acceptance 1.0: from 0 to below 1"), (["--model", "absent"], "no model in transformers' layout")])
def test_wrong_settings_are_one_clear_line(encoders, tmp_path, monkeypatch, words, message):
    from trainer import projection_encoders

    monkeypatch.setattr(projection_encoders, "BUNDLED", encoders["clip"].parent)
    with pytest.raises(TrainerError, match=message) as caught:
        main(["forget", *words, "--out", str(tmp_path / "run"), *FAST])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["adamw8bit", "paged-adamw8bit"])
def test_8bit_optimizers_are_predicted_too(encoders, tmp_path, kind):
    main(clip(encoders, tmp_path / "run", "--steps", "3", "--optimizer", kind))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_folder_is_of_a_class_however_its_name_is_typed(folders):
    """Some systems write an é as two letters."""
    (folders / "keep" / "blue square").rename(folders / "keep" / "cafe\u0301")
    clip = ForgetConfig(model="DIR", forget="caf\u00e9", preserve=("green triangle",), images=folders / "keep")
    assert {e.name for e in images(clip, *classes(clip))} == {"caf\u00e9", "green triangle"}
    qwen = ForgetConfig(encoder="qwen3-vl", model="DIR", forget=" cafe\u0301", forget_images=folders / "forget", preserve_images=folders / "keep")
    with pytest.raises(UsageError, match="has a folder 'caf\u00e9', the class to forget"):
        classes(qwen)


def test_what_is_hidden_is_no_picture_and_no_class(folders):
    config = ForgetConfig(encoder="qwen3-vl", model="DIR", forget_images=folders / "forget", preserve_images=folders / "keep")
    expected = images(config, *classes(config))
    (folders / "keep" / ".cache").mkdir()
    for folder in (folders / "forget", folders / "keep" / "blue square"):
        (folder / "._0.png").write_bytes(b"\0\5\x16\7")  # as a Mac leaves beside every file that it copies to another system
    assert images(config, *classes(config)) == expected


@pytest.mark.parametrize("words", [["--images", "x"], ["--encoder", "qwen3-vl", "--forget-images", "x"], ["--model", "x"]])
def test_a_number_of_pictures_beside_ones_own_is_refused(words):
    with pytest.raises(UsageError, match="--num-images 7: counts pictures of the bundled world, and none are drawn here; leave it out"):
        main(["forget", *words, "--num-images", "7"])


def test_a_class_without_a_folder_of_pictures_is_said(encoders, tmp_path):
    for name in ("dog", "car"):
        (tmp_path / "shown" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "shown" / name / "0.png")
    with pytest.raises(UsageError, match="has no folder 'cat'; it has car, dog$"):
        main(clip(encoders, tmp_path / "run", "--images", str(tmp_path / "shown")))
    (tmp_path / "shown" / "dog").rename(tmp_path / "shown" / "cat")
    with pytest.raises(UsageError, match="has no folder 'dog'; it has car, cat; --preserve NAMES keeps those alone"):
        main(clip(encoders, tmp_path / "run", "--images", str(tmp_path / "shown")))
    assert not (tmp_path / "run").exists()
