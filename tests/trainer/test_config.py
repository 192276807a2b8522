"""Settings: defaults < bundled model < TOML < flags, each with its origin; JSON there and back."""

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.plan import MemoryPlan, PlanError
from trainer import loop
from trainer.arguments import fixed, parse, resolve
from trainer.commands import DiagnoseCommand, ExportCommand, ReportCommand, TrainCommand
from trainer.config import SHAPES, TrainConfig, leaves, replaced
from trainer.config_file import as_json, from_json, read_toml
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.projection_config import ForgetCommand, ForgetConfig, read_forget_config
from trainer.run_directory import make_run_directory, probe, read_config, write_config
from trainer.video_config import EvaluateConfig, GenerateConfig


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "c.toml").write_text(text)
        return tmp_path / "c.toml"

    return write


def test_bundled_model_has_its_own_defaults():
    command, origins = resolve([])
    config = command.settings
    assert command.resume is None and config == replaced(TrainConfig(), SHAPES)
    assert {path for path, origin in origins.items() if origin == "bundled model"} == set(SHAPES)
    assert set(origins) == set(leaves(config)) and origins["optim.clip"] == "default"


@pytest.mark.parametrize("argv", [["--model", "dir/model"], ["--model=dir/model"]])
def test_another_model_has_the_published_defaults(argv):
    command, origins = resolve(argv)
    config = command.settings
    assert config.optim == TrainConfig().optim and config.optim.rank == 128 and config.optim.lr == 1e-4
    assert origins["model.model"] == "flag" and "bundled model" not in origins.values()


def test_precedence_and_origins(toml):
    path = toml("[optim]\nrank = 7\nlr = 2e-3\n[data]\npreserve = ['a', 'b']\n[output]\nevaluate = false\n")
    command, origins = resolve(["--config", str(path), "--lr", "5e-4", "--no-force-dtype", "--batch-size=3"])
    config = command.settings
    assert (config.optim.rank, config.optim.lr, config.optim.steps, config.optim.clip) == (7, 5e-4, SHAPES["optim.steps"], 1.0)
    assert config.data.preserve == ("a", "b") and config.output.evaluate is False and config.data.batch_size == 3
    assert {p: origins[p] for p in ("optim.rank", "optim.lr", "optim.steps", "optim.clip", "model.force_dtype", "data.batch_size")} == {
        "optim.rank": f"file {path}", "optim.lr": "flag", "optim.steps": "bundled model", "optim.clip": "default",
        "model.force_dtype": "flag", "data.batch_size": "flag"}


def test_model_named_in_the_file_decides_the_defaults(toml):
    config = resolve(["--config", str(toml("[model]\nmodel = 'dir/model'\n"))])[0].settings
    assert config.optim.rank == 128 and config.model.model == "dir/model"


def test_resume_takes_the_runs_settings(tmp_path):
    saved = replaced(TrainConfig(), {"optim.rank": 9, "output.out": tmp_path})
    write_config(tmp_path, saved, {"optim.rank": "flag"})
    command, origins = resolve(["--resume", str(tmp_path), "--save-every", "5"])
    config = command.settings
    assert command.resume == tmp_path and config == replaced(saved, {"output.save_every": 5})
    assert {p: origins[p] for p in ("optim.rank", "optim.lr", "output.save_every")} == {
        "optim.rank": "flag", "optim.lr": f"run {tmp_path}", "output.save_every": "flag"}


def test_a_resumed_run_is_planned_anew_where_a_profile_is_given(tmp_path):
    before = {"memory.resident_blocks": "flag", "memory.boundaries": "profile rtx-4090", "memory.kept": "step-down at step 3",
              "memory.checkpoint": "default", "optim.rank": "file a.toml"}
    saved = MemoryPlan(resident_blocks=3, boundaries="host", kept="host", num_keep_attention=2)
    write_config(tmp_path, replaced(TrainConfig(), {"memory": saved}), dict.fromkeys(leaves(TrainConfig()), "default") | before)
    command, origins = resolve(["--resume", str(tmp_path)])
    assert command.settings.memory == saved and {path: origins[path] for path in before} == before
    command, origins = resolve(["--resume", str(tmp_path), "--profile", "8gb"])
    assert command.settings.memory == MemoryPlan(resident_blocks=3, num_keep_attention=2)
    assert fixed(origins) == ["resident_blocks"] and origins["optim.rank"] == "file a.toml"


@pytest.mark.parametrize("then, now", [("shapes", "dir/copy"), ("dir/copy", "shapes")])
def test_prompts_are_made_for_the_model_that_a_run_began_with(tmp_path, then, now):
    write_config(tmp_path, replaced(TrainConfig(), {"model.model": then}), {})
    with pytest.raises(CheckpointError, match=f"cannot resume: --model was '{then}' and is '{now}' now.*; go on with the --model that it began with"):
        resolve(["--resume", str(tmp_path), "--model", now])


def test_config_beside_resume_is_not_ignored(toml, tmp_path):
    write_config(tmp_path, TrainConfig(), {})
    with pytest.raises(UsageError, match="--config beside --resume"):
        resolve(["--resume", str(tmp_path), "--config", str(toml("[optim]\nrank = 3\n"))])


@pytest.mark.parametrize("text, near", [
    ("[optim]\nrnak = 4\n", "optim.rnak; did you mean optim.rank"),
    ("[optimiser]\nrank = 4\n", "optimiser.rank; did you mean optim.rank"),
    ("[optm]\n# rank = 4\n", r"optm; did you mean the section \[optim\]"),
    ("[[optim]]\nrank = 4\n", r"optim; did you mean the section \[optim\]"),
    ("model = 'cogvideox-5b'\n", "model; did you mean model.model"),
    ("profile = '24gb'\n", "profile; --profile is a flag only"),
    ("[optim]\nlearning_rate = 1e-4\n", "optim.learning_rate; there are optim.rank, .*optim.lr"),
    ("[data]\nprompt = 'x'\n", "data.prompt; did you mean data.prompts"),
    ("rank = 4\n", "rank; did you mean optim.rank"),
    ("[memory]\nguidence = 'batched'\n", "memory.guidence; did you mean memory.guidance"),
])
def test_unknown_toml_key_suggests_the_nearest(toml, text, near):
    with pytest.raises(UsageError, match=f"there is no setting {near}"):
        read_toml(toml(text))


@pytest.mark.parametrize("text, message", [
    ("[optim]\nrank = '4'\n", "optim.rank = '4' is not a whole number"),
    ("[optim]\nrank = 4.0\n", "optim.rank = 4.0 is not a whole number"),
    ("[optim]\nrank = true\n", "optim.rank = True is not a whole number"),
    ("[optim]\nlr = '1e-4'\n", "optim.lr = '1e-4' is not a number"),
    ("[optim]\nlr = true\n", "optim.lr = True is not a number"),
    ("[output]\nevaluate = 'false'\n", "output.evaluate = 'false' is not true or false"),
    ("[output]\nevaluate = 0\n", "output.evaluate = 0 is not true or false"),
    ("[data]\npreserve = 'blue'\n", "data.preserve = 'blue' is not a list of texts"),
    ("[data]\npreserve = ['blue', 3]\n", "data.preserve"),
    ("[data]\nlatents = 'noisy'\n", "data.latents = 'noisy' is not one of 'trajectory', 'noise'"),
    ("[data]\nprompts = 5\n", "data.prompts = 5 is not a path"),
    ("[output]\nout = ''\n", "output.out = '' is not a path"),
    ("[model]\nframes = '9'\n", "model.frames = '9' is not a whole number"),
    ("[model.model]\nname = 'x'\n", "model.model"),
    ("[optim\n", "not valid TOML"),
    ('[data]\nprompts = "a\\u0000b"\n', r"data.prompts = 'a\\x00b' holds a null byte"),
    ('[data]\npreserve = ["a\\u0000b"]\n', "data.preserve = .* holds a null byte"),
    ("[optim]\0\n", "is not UTF-8 .it holds null bytes.; save it as UTF-8"),
])
def test_wrong_toml_values_are_refused(toml, text, message):
    with pytest.raises(UsageError, match=f"--config .*{message}"):
        read_toml(toml(text))


@pytest.mark.parametrize("text, message", [("[optim]\nlr = nan\n", "--lr nan: must be above 0"),
                                           ("[memory]\nresident_blocks = -1\n", "--resident-blocks -1; an integer, at least 0")])
def test_impossible_toml_values_name_the_file(toml, text, message):
    with pytest.raises(UsageError, match=f"^--config .*c.toml: {message}"):
        resolve(["--config", str(toml(text))])


@pytest.mark.parametrize("text, flags, section, values", [
    ("[data]\npool = 12\n", ["--trajectory-steps", "6"], "data", {"pool": 12, "trajectory_steps": 6}),
    ("[memory]\nkept = 'host'\n", ["--num-keep-attention", "1"], "memory", {"kept": "host", "num_keep_attention": 1}),
    ("[memory]\ncheckpoint = 'none'\nboundaries = 'host'\n", ["--checkpoint", "all"], "memory", {"checkpoint": "all", "boundaries": "host"})])
def test_flags_may_complete_a_file(toml, text, flags, section, values):
    """What is wrong with the file is said in flags, which are looked at before it is refused."""
    path = toml(text)
    with pytest.raises(UsageError, match=f"^--config {path}: --"):
        resolve(["--config", str(path)])
    command, origins = resolve(["--config", str(path), *flags])
    assert {name: getattr(getattr(command.settings, section), name) for name in values} == values
    assert {origins[f"{section}.{name}"] for name in values} == {f"file {path}", "flag"}
    with pytest.raises(UsageError, match=f"^--config {path}: --"):
        resolve(["--config", str(path), "--rank", "4"])


def test_toml_integers_serve_as_floats_and_none_stays_unset(toml):
    assert read_toml(toml("[loss]\neta = 7\n[model]\nframes = 9\n[memory]\nresident_blocks = 2\n")) == {
        "loss.eta": 7.0, "model.frames": 9, "memory.resident_blocks": 2}


@pytest.mark.parametrize("values, message", [
    ({"optim.rank": 0}, "--rank 0: must be 1 or more"), ({"optim.steps": 0}, "--steps 0"),
    ({"optim.lr": 0.0}, "--lr 0.0: must be above 0, and finite"), ({"optim.lr": float("nan")}, "--lr nan"),
    ({"optim.lr": float("inf")}, "--lr inf"), ({"loss.eta": float("inf")}, "--eta inf"),
    ({"optim.accumulation": 0}, "--accumulation 0"), ({"loss.eta": -1.0}, "--eta -1.0"),
    ({"optim.weight_decay": -0.1}, "--weight-decay -0.1"),
    ({"loss.alpha": float("nan")}, "--alpha nan"), ({"loss.mask_threshold": 1.5}, "--mask-threshold 1.5"),
    ({"loss.mask_blocks": (-1,)}, "--mask-blocks -1"),
    ({"data.concept": " "}, "--concept is empty"), ({"data.pool": 7, "data.trajectory_steps": 4}, "--pool 7.*multiple"),
    ({"optim.rank": 10**20}, "--rank 10*: must fit 32 bits"), ({"data.batch_size": 2**62}, "--batch-size 4.*: must fit 32 bits"),
    ({"model.frames": 10**20}, "--frames 10*: must fit 32 bits"), ({"optim.steps": 10**20}, "--steps 10*: must fit 64 bits"),
    ({"data.batch_size": 0}, "--batch-size 0"), ({"output.save_every": 0}, "--save-every 0"),
    ({"data.trajectory_guidance": float("nan")}, "--trajectory-guidance nan"),
    ({"optim.warmup": -1}, "--warmup -1"), ({"optim.clip": -0.5}, "--clip -0.5"), ({"optim.seed": 2**63}, "--seed 9.*: must fit 64 bits"),
    ({"output.sample_every": -1}, "--sample-every -1"), ({"output.sample_steps": 0}, "--sample-steps 0"),
    ({"output.guidance_scale": -1.0}, "--guidance-scale -1.0"),
])
def test_impossible_values_name_their_flag(values, message):
    with pytest.raises(UsageError, match=message):
        replaced(TrainConfig(), values)


def _values(hint) -> st.SearchStrategy:
    """Values of a setting's type; range checks are for the sections to make."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(_values(args[0]), max_size=3).map(tuple)
    if args:  # X | None
        return st.one_of(*(st.none() if a is type(None) else _values(a) for a in args))
    return {int: st.integers(0, 2**40), float: st.floats(0, 1e6), bool: st.booleans(), str: st.text(max_size=9),
            Path: st.text("abc/.é ", min_size=1, max_size=9).map(Path)}[hint]


@st.composite
def _configs(draw) -> TrainConfig:
    config = TrainConfig()
    for section, kind in typing.get_type_hints(TrainConfig).items():
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            try:
                config = replaced(config, {f"{section}.{f.name}": draw(_values(hints[f.name]))})
            except (UsageError, PlanError):
                pass
    return config


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(config=_configs())
def test_json_there_and_back(config):
    text = json.dumps(as_json(config))
    assert from_json(json.loads(text)) == config


def test_run_directories_are_numbered_by_concept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_run_directory(None, "Golf Ball!") == Path("runs/golf-ball-1")
    (tmp_path / "runs/golf-ball-7").mkdir()
    assert make_run_directory(None, "Golf Ball!") == Path("runs/golf-ball-8")


def test_directory_with_a_run_is_refused(tmp_path):
    write_config(make_run_directory(tmp_path / "a run", "red"), TrainConfig(), {})
    with pytest.raises(CheckpointError, match=f"holds a run already; go on with it by python run.py --resume '{tmp_path / 'a run'}', or"):
        make_run_directory(tmp_path / "a run", "red")


def test_a_place_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("loaded")

    def refused(out, error, match):
        with pytest.raises(error, match=match):
            loop.train(replaced(TrainConfig(), {"output.out": out}), {})

    monkeypatch.setattr(loop, "open_training", load)
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "b", InputOutputError, "Not a directory")
    (tmp_path / "config.json").touch()
    refused(tmp_path, CheckpointError, "holds a config.json that is no run's; choose another --out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what anybody but root is told of a directory of others
    refused(tmp_path / "a" / "b", InputOutputError, "--out .*: cannot be written .Permission denied.; choose another directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]


@pytest.mark.parametrize("values, message", [
    ({"num_steps": 0}, "--num-steps 0: must be 1 or more"), ({"seed": -2**63 - 1}, "--seed -9.*: must fit 64 bits"),
    ({"guidance_scale": -1.0}, "--guidance-scale -1.0: must be 0 or more"),
])
def test_impossible_samplings_name_their_flag(values, message):
    for kind, more in ((GenerateConfig, {"prompt": ("red",), "no_eraser": True}), (EvaluateConfig, {"run": Path("run")})):
        kind(**more)
        with pytest.raises(UsageError, match=f"^{message}"):
            kind(**more, **values)


@pytest.mark.parametrize("values, message", [
    ({"fps": 0}, "--fps 0: from 1 to 1000"), ({"fps": 1001}, "--fps 1001: from 1 to 1000"),
    ({"compare": True}, "--compare shows what an eraser changes"), ({"prompt": ()}, "--prompt is missing"),
])
def test_impossible_videos_name_their_flag(values, message):
    given = {"prompt": ("red",), "no_eraser": True, "fps": 1000}
    GenerateConfig(**given)
    with pytest.raises(UsageError, match=f"^{message}"):
        GenerateConfig(**given | values)


def test_a_text_is_not_taken_for_its_letters():
    for make, flag in ((lambda: replaced(TrainConfig(), {"data.preserve": "blue"}), "--preserve"),
                       (lambda: replaced(TrainConfig(), {"output.sample_prompts": "blue"}), "--sample-prompts"),
                       (lambda: GenerateConfig(prompt="blue", no_eraser=True), "--prompt"), (lambda: ForgetConfig(preserve="blue"), "--preserve"),
                       (lambda: EvaluateConfig(run=Path("run"), rater="shapes", preserve="blue"), "--preserve")):
        with pytest.raises(UsageError, match=rf"^{flag}: several texts, such as \('blue',\), and not the text 'blue'$"):
            make()


def test_an_evaluation_needs_a_video():
    with pytest.raises(UsageError, match="^--num-videos 0: must be 1 or more"):
        EvaluateConfig(run=Path("run"), num_videos=0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', '{"config": {"optim": {"rnak": 3}}}',
                                     '{"config": {"optim": {"rank": "4"}}}', '{"config": {"optim": {"rank": 0}}}',
                                     '{"config": {"nothing": {"rank": 1}}}', '{"config": {"memory": {"checkpoint": "some"}}}'])
def test_damaged_run_configuration_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a run directory") as raised:
        read_config(tmp_path)
    assert "\n" not in str(raised.value) and "--config" not in str(raised.value)


def test_a_models_directory_is_no_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    for read in (read_config, read_forget_config):
        with pytest.raises(CheckpointError, match=r"not a run directory \(its config.json holds no settings of a run\)$"):
            read(tmp_path)


def test_the_home_is_found_wherever_a_path_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replaced(TrainConfig(), {"output.out": Path("~/r"), "data.prompts": Path("~/p.txt"), "data.preserve_file": Path("~/k.txt")})
    assert (config.output.out, config.data.prompts, config.data.preserve_file) == (tmp_path / "r", tmp_path / "p.txt", tmp_path / "k.txt")
    for kind, *names in ((TrainCommand, "resume"), (ForgetCommand, "resume"), (DiagnoseCommand, "target"), (ReportCommand, "run", "out"),
                         (ExportCommand, "eraser", "out")):
        command = parse(kind, [f"--{name}=~/x" for name in names], "")  # a ~ that a shell leaves as it is
        assert {getattr(command, name) for name in names} == {tmp_path / "x"}
    (tmp_path / "c.toml").write_text("optim.rank = 7")
    assert resolve(["--config=~/c.toml"])[0].settings.optim.rank == 7
    for path in ("~nobody-of-that-name/x", "~nobody-of-that-name/x.txt"):
        with pytest.raises(UsageError, match="whose home that is"):
            replaced(TrainConfig(), {"output.out": Path(path)})


def test_two_may_look_at_one_place_at_once(monkeypatch, tmp_path):
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda file: (touch(file), file.unlink()))  # the other one was faster
    probe(tmp_path)
    assert not list(tmp_path.iterdir())
