"""The command line: help at once, and one clear line and the right exit code for every wrong input."""

import json
import re
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import FRAMES, SIDE

import run
from memory.nvml import Reading
from memory.plan import PlanError
from trainer import arguments, assemble, cli, planning
from trainer.arguments import chosen_card, positional, resolve
from trainer.assemble import chosen_device
from trainer.config import replaced
from trainer.errors import DoesNotFit, InputOutputError, Interrupted, TrainerError, UsageError
from trainer.findings import Bill
from trainer.lock import RunLock

ROOT = Path(__file__).parents[2]


def _python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)


def _seconds(*argv: str) -> tuple[float, subprocess.CompletedProcess]:
    """Processor time, not the clock: other processes may have the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _python(*argv)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize("command", [[], ["generate"], ["evaluate"], ["export"]], ids=lambda c: "".join(c) or "train")
def test_help_answers_at_once(command):
    """Within five times the import of the parser alone, half a second where that takes 0.1 s: machines differ. The best of a few."""
    parser, answers = [], []
    while len(answers) < 5 and not (answers and min(answers) < 5 * min(parser)):
        parser.append(_seconds("-c", "import tyro")[0])
        seconds, done = _seconds("run.py", *command, "--help")
        assert done.returncode == 0 and done.stderr == ""
        assert "run.py" in done.stdout and "--memory." not in done.stdout
        answers.append(seconds)
    assert min(answers) < 5 * min(parser), (answers, parser)


def test_help_imports_no_torch():
    code = ("import sys; from trainer.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "bad = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules); assert not bad, bad")
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["doctor"], ["bench", "published"]])
def test_a_python_without_what_is_needed_is_named(command):
    done = _python("-S", "run.py", *command)  # without its packages
    assert done.returncode == 2
    assert re.fullmatch(r"error: \w+ is not installed for .*; `make run` or .* then: \. \.venv/bin/activate\n", done.stderr), done.stderr


def test_every_setting_has_a_help_text(capsys):
    from trainer.config import TrainConfig, leaves

    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for path in leaves(TrainConfig()):
        assert "--" + path.split(".")[1].replace("_", "-") in shown, path
    assert "bench" in shown


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line as `python run.py` would; returns (exit code, stdout, the lines that complain)."""
    def run_it(*argv) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, argv)])
        try:
            code = run.main()
        except SystemExit as e:
            code = e.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run_it


@pytest.fixture
def settings(prompts, tmp_path, pipelines) -> list[str]:
    """Flags of a run of one step on a tiny model."""
    return ["--model", str(pipelines["2b"]), "--prompts", str(prompts), "--preserve", "a blue circle",
            "--rank", "4", "--steps", "1", "--trajectory-steps", "2", "--sample-steps", "1", "--device", "cpu",
            "--out", str(tmp_path / "run")]


@pytest.fixture
def trained(settings, call, tmp_path) -> Path:
    code, out, said = call(*settings)
    assert code == 0 and out.splitlines()[-1] == f"run: {tmp_path / 'run'}"
    assert said[-1] == f"whether it erases: python run.py evaluate {tmp_path / 'run'} --rater openai/clip-vit-large-patch14"
    return tmp_path / "run"


def _sizes(pipelines) -> list[str]:
    return ["--model", str(pipelines["2b"]), "--frames", str(FRAMES), "--height", str(SIDE), "--width", str(SIDE),
            "--device", "cpu", "--num-steps", "1"]


def test_train_generate_and_export(trained, call, pipelines, tmp_path):
    code, out, _ = call("generate", "--eraser", trained, "--prompt", "a red circle", "--out", tmp_path / "x.mp4",
                        "--compare", *_sizes(pipelines))
    assert code == 0 and out.split() == [str(tmp_path / "x.mp4"), str(tmp_path / "x-compare.png")]
    code, out, _ = call("generate", "--eraser", trained, "--prompt", "a red circle", "--out", tmp_path / "z.png", "--num-steps", "1")
    assert code == 0 and (tmp_path / "z.png").is_file()  # as it was trained, on the CPU or a card
    code, out, _ = call("export", trained, "--out", tmp_path / "released")
    assert code == 0 and (tmp_path / "released" / "eraser_weights.pt").is_file()
    code, _, _ = call("generate", "--eraser", tmp_path / "released", "--prompt", "a red circle", "--out",
                      tmp_path / "y.png", *_sizes(pipelines))
    assert code == 0 and (tmp_path / "y.png").is_file()


def test_where_the_run_is_has_been_said_whatever_becomes_of_its_measurement(settings, call, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_will_measure", lambda config: True)
    monkeypatch.setattr(cli, "_measure", Mock(side_effect=KeyboardInterrupt))
    code, out, _ = call(*settings)
    assert code == 130 and out.splitlines() == [f"eraser: {tmp_path / 'run' / 'eraser.safetensors'}", f"run: {tmp_path / 'run'}"]


def test_train_is_also_a_command_and_resume_takes_a_directory(trained, call):
    code, out, _ = call("train", "--resume", trained, "--steps", "2")
    assert code == 0 and out.splitlines()[-1] == f"run: {trained}"
    code, _, lines = call("--resume", trained, "--lr", "0.5")
    assert code == 5 and "--lr was" in lines[-1]
    code, _, lines = call("--resume", trained)
    assert code == 0 and f"nothing was left to train: {trained} has its 2 steps; --steps asks for more" in lines
    for flags, name in ((["--frames", "17"], "--frames was"), (["--height", "32"], "--height was"), (["--rank", "5"], "--rank was 4"),
                        (["--dtype", "bfloat16"], "--dtype was")):
        code, _, lines = call("--resume", trained, "--steps", "3", *flags)
        assert code == 5 and name in lines[-1]
    code, _, lines = call("--resume", trained, "--out", "elsewhere")
    assert code == 2 and "--out beside --resume" in lines[-1]


def test_a_finished_run_is_not_measured_again(trained, call, monkeypatch):
    monkeypatch.setattr(cli, "_will_measure", lambda config: True)
    monkeypatch.setattr(cli, "_measure", measure := Mock())
    call("--resume", trained)
    assert measure.call_count == 1
    (trained / "evaluation.json").write_text("{}")
    code, _, lines = call("--resume", trained)
    assert code == 0 and measure.call_count == 1
    assert f"nothing was left to measure: {trained / 'evaluation.json'} is there; python run.py evaluate {trained} measures anew" in lines
    call("--resume", trained, "--steps", "2")
    assert measure.call_count == 2


def test_commands_to_paste_hold_names_with_spaces(settings, call, tmp_path, monkeypatch):
    run_dir = tmp_path / "my run"
    code, _, said = call(*settings, "--out", run_dir)
    assert code == 0 and said[-1] == f"whether it erases: python run.py evaluate '{run_dir}' --rater openai/clip-vit-large-patch14"
    (run_dir / "evaluation.json").write_text("{}")
    monkeypatch.setattr(cli, "_will_measure", lambda config: True)
    _, _, said = call("--resume", run_dir)
    assert said[-1].endswith(f"python run.py evaluate '{run_dir}' measures anew")
    weights = load_file(run_dir / "eraser.safetensors")
    weights[min(weights)][0] = float("nan")
    save_file(weights, run_dir / "eraser.safetensors")
    code, _, said = call("export", run_dir, "--out", tmp_path / "released")
    assert code == 5 and f"`python run.py diagnose '{run_dir / 'eraser.safetensors'}'`" in said[-1]
    (run_dir / "config.json").write_text('{"command": "forget"}')
    code, _, said = call("export", run_dir, "--out", tmp_path / "released")
    assert code == 5 and f"`python run.py diagnose '{run_dir}'`" in said[-1]


WRONG = {
    "unknown concept word": (["--concept", "giraffe"], 2, "'giraffe' is not a word of the prompt 'a red circle moving left' (number 1 of --prompts"),
    "empty prompt file": (["--prompts", "{tmp}/empty.txt"], 2, "holds no prompt; write one a line"),
    "missing prompt file": (["--prompts", "{tmp}/absent.txt"], 2, "absent.txt: cannot be read (No such file or directory)"),
    "missing file of what to keep": (["--preserve-file", "{tmp}/absent.txt"], 2, "absent.txt: cannot be read (No such file or directory)"),
    "missing model": (["--model", "{tmp}/absent"], 2, "is not there; name a directory in diffusers' layout"),
    "rank that is no whole number": (["--rank", "1.5"], 2, "--rank: '1.5' is not a whole number"),
    "size that is no whole number": (["--frames", "x"], 2, "--frames: 'x' is not a whole number"),
    "blocks that are no whole numbers": (["--mask-blocks", "1", "x"], 2, "--mask-blocks: whole numbers only, not '1', 'x'"),
    "rate that is no number": (["--lr", "x"], 2, "--lr: 'x' is not a number"),
    "rank of 67 bits": (["--rank", "99999999999999999999"], 2, "--rank 99999999999999999999: must fit 32 bits"),
    "value of a flag without one": (["--evaluate", "false"], 2, "--evaluate false: it takes no value; say --evaluate or --no-evaluate"),
    "the same after =": (["--no-evaluate=true"], 2, "--evaluate or --no-evaluate"),
    "safe prompts that are not used": (["--instead", "blue", "--anchor", "empty"], 2, "--instead blue: --anchor empty uses no safe prompts"),
    "guidance of no trajectory": (["--latents", "noise", "--trajectory-guidance", "6"], 2, "--trajectory-guidance 6.0: --latents noise follows no"),
    "processes that are not there": (["--num-shards", "2"], 2, "here 1; start with torchrun --nproc-per-node=2"),
    "mask of everything": (["--mask-threshold", "0"], 2, "--mask-threshold 0.0: above 0 and at most 1; --alpha 0"),
    "rank 0": (["--rank", "0"], 2, "--rank 0: must be 1 or more"),
    "frames": (["--frames", "12"], 2, "--frames 12: this VAE makes 8k+1 frames; 9 would work"),
    "height": (["--height", "20"], 2, "--height 20: must be a multiple of 8; 16 would work"),
    "unknown option": (["--rnak", "4"], 2, "there is no option --rnak; did you mean --rank?"),
    "unwritable output": (["--out", "{tmp}/empty.txt/run"], 6, "cannot be written"),
    "unknown device": (["--device", "gpu"], 2, "--device gpu: auto, cpu or cuda would work"),
    "unknown card": (["--profile", "rtx9999"], 2, "--profile rtx9999: unknown card"),
    "missing settings file": (["--config", "{tmp}/absent.toml"], 2, "absent.toml: cannot be read (No such file or directory)"),
    "contradicting plan": (["--checkpoint", "none", "--boundaries", "host"], 2, "--boundaries host, but no block"),
    "plan that is unknown": (["--checkpoint", "some"], 2, "--checkpoint 'some'; one of all, none"),
    "more kept than there is": (["--num-keep-attention", "9"], 2, "--num-keep-attention 9 exceed the 2 blocks that --checkpoint all names"),
    "impossible plan": (["--checkpoint", "first:9"], 2, "the model has 2 blocks"),
    "more resident blocks than there are": (["--resident-blocks", "3"], 2, "--resident-blocks 3, but the model has 2 blocks"),
    "block that is not there": (["--mask-blocks", "1", "2"], 2, "--mask-blocks 2:"),
    "more denoising steps than the scheduler has": (["--sample-steps", "5000"], 2, "5000 denoising steps"),
    "more steps of a trajectory": (["--trajectory-steps", "5000"], 2, "5000 denoising steps"),
    "guidance that is no number": (["--guidance-scale", "nan"], 2, "--guidance-scale nan: must be 0 or more, and finite"),
    "seed of 67 bits": (["--seed", "99999999999999999999"], 2, "--seed 99999999999999999999: must fit 64 bits"),
    "device of another kind": (["--device", "mps"], 2, "--device mps: auto, cpu or cuda would work"),
    "name that is too long": (["--out", "{tmp}/" + 300 * "x"], 6, "cannot be written"),
    "missing run": (["--resume", "{tmp}/absent"], 5, "absent: not a run directory (there is no config.json)"),
}


@pytest.mark.parametrize("flags, expected, message", WRONG.values(), ids=WRONG)
def test_wrong_input_gives_one_clear_line_and_writes_nothing(settings, call, tmp_path, flags, expected, message):
    (tmp_path / "empty.txt").write_text("\n")
    present = sorted(tmp_path.rglob("*"))
    code, out, lines = call(*settings, *(f.format(tmp=tmp_path) for f in flags))
    text = " ".join(line.strip("│╭╮╰╯─ ") for line in lines)
    assert code == expected and out == "" and message in text, (code, lines)
    if text.startswith("error:"):  # the rest is the parser's own box
        assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == present


@pytest.mark.parametrize("damage, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:200]), "damaged or not safetensors"),
    (lambda f: f.write_bytes(b""), "damaged or not safetensors"),
    (lambda f: f.unlink(), "no eraser there"),
    (lambda f: f.write_bytes(b"not an eraser at all"), "damaged or not safetensors")],
    ids=["truncated", "empty", "missing", "foreign"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_damaged_eraser_files(sincos, call, pipelines, tmp_path, damage, message, command):
    from trainer.eraser_files import save_eraser
    from trainer.erasers import Erasers

    erasers = Erasers(sincos.blocks(sincos.load_transformer(dtype=torch.float32)), 4)
    damage(save_eraser(tmp_path / "e", erasers, base_model=sincos.identity(), training={}))
    argv = {"generate": ["generate", "--eraser", tmp_path / "e", "--prompt", "x", "--out", tmp_path / "o.mp4", *_sizes(pipelines)],
            "evaluate": ["evaluate", tmp_path / "e"], "export": ["export", tmp_path / "e", "--out", tmp_path / "o"]}
    code, out, lines = call(*argv[command])
    assert code == 5 and out == "" and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize("argv, message", [
    (["frobnicate"], "there is no command 'frobnicate'; there are train, generate"),
    (["generate", "--prompt", "x"], "--eraser is missing"),
    (["generate", "--prompt", "x", "--no-eraser", "--out", "x.gif"], "must end in .mp4 or .png"),
    (["generate", "--prompt", "x", "--no-eraser", "--guidance", "none"], "--guidance-scale 1"),
    (["generate", "--prompt", "x", "--no-eraser", "--num-steps", "0"], "--num-steps 0"),
    (["generate", "--prompt", "x", "--no-eraser", "--fps", "0"], "--fps 0: from 1 to 1000"),
    (["generate", "--prompt", "x", "--no-eraser", "--compare"], "--compare shows what an eraser changes"),
    (["generate", "--prompt", "x", "--no-eraser", "--guidance-scale", "inf"], "--guidance-scale inf"),
    (["diagnose", "--guidance", "none"], "--guidance none: training needs the anchor"),
    (["diagnose", "--backbone-copies", "2"], "--backbone-copies 2"),
    (["diagnose", "--preserve", "red"], "--preserve red: that is what is to be erased"),
    (["plan", "--profile", "24gb", "--cards", "2", "--num-shards", "3"], "--num-shards 3: blocks are divided among the cards of a run, here 2"),
    (["plan", "--batch-size", "99999999999999999999"], "--batch-size 99999999999999999999: must fit 32 bits"),
    (["diagnose", "runs/a", "--rank", "4"], "--rank: `diagnose RUN` looks at what is there, and takes no settings"),
    (["diagnose", "--on-oom", "stop"], "--on-oom: diagnose looks at one step"),
    (["diagnose", "--resume", "runs/a"], "--resume: diagnose goes on with no run; `diagnose RUN` looks at one"),
    (["plan", "--resume", "runs/a"], "--resume: plan looks at new runs; `report RUN` shows what a run was predicted to need, and --resume RUN"),
    (["--lr"], "error: --lr: its value is missing; python run.py --help says more"),
    (["report", "--run"], "error: --run: its value is missing; python run.py report --help says more"),
    (["generate", "--prompt", "x", "--no-eraser", "--scheduler", "euler"], "error: --scheduler euler: one of 'model', 'ddim', 'dpm'; python run.py generate"),
    (["--weights=foo"], "error: --weights foo: one of 'stored', 'random'; python run.py --help says more"),
    (["export", "somewhere"], "error: --out is missing; python run.py export --help says more"),
    (["evaluate", "--num-videos", "2", "runs/a", "--concept", "blue"], "error: --run is missing; RUN stands first, or after --run; python run.py"),
    (["export", "--out", "x"], "error: --eraser is missing; ERASER stands first, or after --eraser; python run.py export --help says more"),
    (["report", "a", "b"], "error: 'b' is one word too many (quotes keep words together); python run.py report --help says what it takes"),
    (["generate", "--no-eraser", "--prompt", "x", "--seed", "1", "2"], "'2' is one word too many (quotes keep words together)"),
    (["generate", "--no-eraser", "--prompt", "x", "--backbone-copies", "2"], "--backbone-copies 2 and --text-encoder-resident exist for planning"),
    (["evaluate", "runs/a", "--text-encoder-resident"], "--backbone-copies 2 and --text-encoder-resident exist for planning"),
    (["evaluate", "runs/a", "runs/a"], "'runs/a' is one word too many (quotes"),
    (["plan", "--explain", "yes"], "--explain yes: it takes no value; say --explain or --no-explain"),
    (["--resume", ""], "--resume: an empty value; name one, or leave it out"),
    (["--config=", "--steps", "3"], "--config: an empty value"),
    (["diagnose", ""], "--target: an empty value; name one, or leave it out"),
    (["generate", "--prompt", "x", "--eraser", ""], "--eraser: an empty value"),
    (["plan", "--prompts", ""], "--prompts: an empty value"),
    (["forget", "--out="], "--out: an empty value"),
    (["plan", "--device", "cuda"], "--device cuda: there is no CUDA card here (python run.py doctor says what is missing); use --device cpu, or plan for"),
    (["plan", "--profile", "cpu", "--device", "cuda"], "--device cuda beside --profile cpu: the plan is for the latter"),
    (["plan", "--profile", "4090", "--device", "cpu"], "--device cpu beside --profile 4090: the plan is for the latter"),
    (["--model", "cogvideox-2c"], "--model cogvideox-2c: is not there; did you mean cogvideox-2b?"),
    (["diagnose", "--model", "./absent"], "--model ./absent: is not there; name a directory"),
    (["plan", "--device", "cuda:x"], "--device cuda:x: auto, cpu or cuda would work"),
    (["generate", "--prompt", "x", "--no-eraser", "--fpss", "3"], "there is no option --fpss; did you mean --fps?"),
])
def test_usage_of_other_commands(call, argv, message):
    code, out, lines = call(*argv)
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("argv, name", [(["report", ""], "RUN"), (["evaluate", "--run="], "RUN"), (["export", "", "--out", "x"], "ERASER"),
                                        (["export", "x", "--out", ""], "--out")])
def test_what_has_no_default_is_not_said_to_be_left_out(call, argv, name):
    assert call(*argv) == (2, "", [f"error: {name}: an empty value; name one"])


@pytest.mark.parametrize("argv", [["report"], ["diagnose"], ["evaluate"], ["generate", "--prompt", "x", "--eraser"], ["export", "--out", "x", "--eraser"],
                                  ["--resume"], ["forget", "--resume"]])
def test_a_run_that_was_killed_while_it_was_set_up(call, tmp_path, argv):
    with RunLock(tmp_path / "run"):
        pass
    code, _, lines = call(*argv, str(tmp_path / "run"))
    assert (code, len(lines)) == (5, 1) and "still being set up, or was killed while it was; if it is gone, start it again" in lines[0]


@pytest.mark.parametrize("argv", [["generate", "--no-eraser", "--prompt", "x", "a r\udce9d circle"], ["--preserve", "a r\udce9d circle"],
                                  ["plan", "--concept=a r\udce9d circle"], ["forget", "--forget", "a r\udce9d circle"]])
def test_words_that_are_no_utf_8(call, argv):
    code, out, lines = call(*argv)
    flag = argv[-1].partition("=")[0] if "=" in argv[-1] else next(word for word in reversed(argv) if word.startswith("--"))
    assert code == 2 and out == "" and len(lines) == 1 and f"error: {flag} a r?d circle: is not UTF-8" in lines[0]


def test_a_place_that_is_taken_is_told_before_the_planners_minutes(call, settings, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"config": {}}')
    monkeypatch.setattr("trainer.planning.forecast_as_given", None)  # not reached
    code, out, lines = call(*settings, "--out", tmp_path)
    assert code == 5 and out == "" and f"{tmp_path} holds a run already" in lines[-1]


def test_unwritable_video_leaves_nothing(call, pipelines, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, lines = call("generate", "--no-eraser", "--prompt", "x", "--out", tmp_path / "file" / "x.mp4", *_sizes(pipelines))
    assert code == 6 and out == "" and "choose another --out" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error, code, word", [(torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "out of memory"),
                                               (MemoryError(), 3, "out of memory"),
                                               (KeyboardInterrupt(), 130, "interrupted")])
def test_exit_codes_of_what_happens_on_the_way(call, monkeypatch, error, code, word):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "main", fail)
    found, out, lines = call()
    assert found == code and out == "" and len(lines) == 1 and word in lines[0]


@pytest.mark.parametrize("error, waits, speaks", [
    (UsageError("no"), True, True), (TrainerError("no"), True, True), (Interrupted("no", 2), False, False), (InputOutputError("no"), False, True)])
def test_of_several_processes_the_first_says_what_is_wrong(call, monkeypatch, error, waits, speaks):
    """torchrun ends the others while they wait; where it does not, the first one is well, and they say it."""
    waited = []
    monkeypatch.setattr(run.time, "sleep", waited.append)
    monkeypatch.setattr(cli, "main", Mock(side_effect=error))
    for number, run_id in (("0", "x"), ("1", None)):  # the latter was not started by torchrun
        monkeypatch.setenv("LOCAL_RANK", number)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id) if run_id else monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert call()[2][0].endswith(": no") and not waited
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    code, _, lines = call()
    assert (code, bool(waited), bool(lines)) == (error.exit_code, waits, speaks)


def test_an_interruption_before_anything_is_imported(call, monkeypatch):
    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "trainer.cli", Importing())
    assert call() == (130, "", ["interrupted"])


def test_a_bug_is_not_dressed_up(call, monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(ZeroDivisionError):
        call()


def test_origins_name_flags_only_where_they_were_given():
    _, origins = resolve(["--no-evaluate", "--rank=3", "--resident-blocks", "2"])
    assert {p for p, o in origins.items() if o == "flag"} == {"output.evaluate", "optim.rank", "memory.resident_blocks"}


def test_diagnose_examines_what_the_planner_chose_for_the_card_in_this_machine(monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.cli.available_host_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr("trainer.planning.planned", lambda config, card, fixed: (
        replaced(config, {"memory.checkpoint": "none"} if card.host_bytes == 3 * 2**30 else {}), ["checkpoint"], None))
    monkeypatch.setattr("trainer.diagnose.diagnose_settings", lambda config: seen.append(config.memory.checkpoint) or Bill())
    for flags in (["--device", "cpu"], ["--profile", "8gb"]):
        cli.main(["diagnose", *flags])
    assert seen == ["all", "none"]


def test_a_rate_that_never_arrives_is_said(settings, call, caplog):
    assert call(*settings, "--warmup", "1000")[0] == 0
    assert "--warmup 1000: the run ends after 1 --steps, at 0.001 of --lr" in caplog.text
    caplog.clear()
    assert call("--resume", settings[-1], "--warmup", "1001")[0] == 5
    assert "--warmup" not in caplog.text


def test_what_a_run_keeps_is_told_before_anything_is_loaded(settings, call, monkeypatch, tmp_path):
    assert call(*settings)[0] == 0
    monkeypatch.setattr("trainer.loop.train", None)  # not reached
    (tmp_path / "dog.txt").write_text("a dog\n")
    for flags, why in ((["--prompts", str(tmp_path / "dog.txt")], f"the prompts (--prompts {tmp_path / 'dog.txt'}) are not those that"),
                       (["--concept", "dog"], "--concept was 'red' and is 'dog' now"), (["--rank", "5"], "--rank was 4 and is 5 now")):
        code, _, said = call("--resume", settings[-1], *flags)
        assert code == 5 and f"cannot resume: {why}" in said[-1]


@pytest.mark.parametrize("command", [[], ["forget", "--steps", "1"]])
def test_an_optimizer_that_cannot_work_is_told_before_anything_is_loaded(settings, call, monkeypatch, tmp_path, command):
    def refuse(kind, device):
        raise PlanError(f"{kind} cannot work on {device.type}")

    for module in ("trainer.loop", "trainer.projection"):
        monkeypatch.setattr(f"{module}.require_usable", refuse)
    monkeypatch.setattr("trainer.loop.embed_prompts", None)  # not reached
    monkeypatch.setattr("trainer.projection.prepare", None)
    out = ["--out", str(tmp_path / "run")]
    code, _, said = call(*(command + out if command else [*settings[:-2], *out]), "--optimizer", "adamw8bit")
    assert (code, said[-1]) == (2, "error: adamw8bit cannot work on cpu") and not (tmp_path / "run").exists()


def test_the_card_is_the_one_that_the_device_names(monkeypatch):
    monkeypatch.setattr(arguments, "detect", lambda index: SimpleNamespace(name=f"card {index}", is_cpu=False))
    monkeypatch.setattr(arguments, "lookup", lambda profile: SimpleNamespace(name=profile, is_cpu=profile == "cpu"))
    assert [chosen_card(*words).name for words in (("auto",), ("auto", "cuda"), ("auto", "cuda:1"), ("auto", "cpu"), ("4090", "cuda:1"))] == [
        "auto", "auto", "card 1", "cpu", "4090"]
    with pytest.raises(UsageError, match="--device cpu:0: auto, cpu or cuda would work"):  # it would be planned for card 0
        chosen_card("auto", "cpu:0")


def test_a_card_by_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert chosen_device("cuda:1") == torch.device("cuda:1") == current.pop() and chosen_device("cuda").index is None
    with pytest.raises(UsageError, match="--device cuda:2: there are 2 cards here"):
        chosen_device("cuda:2")
    assert not current


BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch for CUDA 13, and what is compiled for later ones


@pytest.mark.parametrize("capability, built, fits", [
    ((7, 0), BUILT, False), ((6, 1), BUILT, False), ((7, 5), BUILT, True), ((8, 7), BUILT, True), ((8, 9), BUILT, True), ((10, 3), BUILT, True),
    ((12, 1), BUILT, True), ((13, 0), BUILT, True), ((13, 0), BUILT[:-1], False), ((7, 0), ["sm_70", "sm_90a"], True), ((11, 0), ["gfx1100"], True)])
def test_a_card_without_kernels_is_refused_before_anything_is_loaded(monkeypatch, capability, built, fits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(assemble, "read_nvml", lambda index: Reading("Some card", capability, 1, 0))
    monkeypatch.setattr(assemble, "_require_kernels", assemble._require_kernels.__wrapped__)  # each time anew
    if fits:
        assert chosen_device("cuda").type == "cuda"
        return
    with pytest.raises(UsageError, match=rf"^Some card is there, but torch .* has no kernels for compute capability {capability[0]}\.{capability[1]}, only for sm_75 "):
        chosen_device("auto")


def test_what_is_looked_at_may_stand_last():
    for argv, words in ((["RUN", "--seed", "3"], ["--run", "RUN", "--seed", "3"]), (["--seed", "3", "RUN"], ["--seed", "3", "--run", "RUN"]),
                        (["--seed=3", "RUN"], ["--seed=3", "--run", "RUN"]), (["--run", "A", "B"], ["--run", "A", "B"]),
                        (["--seed", "3"], ["--seed", "3"]), (["--compile", "RUN"], ["--compile", "RUN"]), ([], [])):
        assert positional(argv, "--run") == words
    assert positional(["--preserve", "a", "b"], "--target", last=False) == ["--preserve", "a", "b"]


def test_of_a_flag_given_twice_the_last_one_counts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(f"[data]\nconcept = '{name}'\n")
    command, origins = arguments.resolve(["--config", str(tmp_path / "a.toml"), f"--config={tmp_path / 'b.toml'}"])
    assert command.settings.data.concept == "b" and origins["data.concept"] == f"file {tmp_path / 'b.toml'}"
    plain = arguments.resolve([])
    assert arguments.resolve(["--model", str(tmp_path), "--model", "shapes"])[0].settings == plain[0].settings


def test_unknown_option_of_another_command():
    with pytest.raises(UsageError, match="--help lists them all"):
        cli.main(["evaluate", "somewhere", "--zzzzzz"])


def test_the_hosts_memory_is_a_size_and_reaches_the_planner(monkeypatch):
    seen = []

    def forecast(config, card, fixed, *, num_cards):
        seen.append(card.host_bytes if not card.is_cpu else (card.host_bytes, card.usable_bytes))
        raise DoesNotFit("seen")

    monkeypatch.setattr("trainer.planning.forecast", forecast)
    for words in ([], ["--host", "64gb"], ["--host", "1.5 GiB"]):
        with pytest.raises(DoesNotFit, match="seen"):
            cli.main(["plan", "--profile", "4090", *words])
    assert seen == [None, 64 * 2**30, 3 * 2**29]
    with pytest.raises(DoesNotFit, match="seen"):
        cli.main(["plan", "--profile", "cpu", "--host", "8gb"])
    assert seen[-1] == (8 * 2**30, 8 * 2**30)  # a CPU has one memory
    for wrong in ("foo", "0gb", "64"):
        with pytest.raises(UsageError, match=f"--host {wrong}: a size such as 64gb"):
            cli.main(["plan", "--profile", "4090", "--host", wrong])


NARROW = ["--checkpoint", "none"]  # a search of a trace or two


def test_a_plan_that_does_not_fit_is_no_command(capsys):
    said = {}
    for size in ("0.1gb", "24gb"):
        with nullcontext() if size == "24gb" else pytest.raises(DoesNotFit):
            cli.main(["plan", "--profile", size, *NARROW])
        said[size] = capsys.readouterr().out
    assert "python run.py" in said["24gb"] and "python run.py" not in said["0.1gb"]


def test_what_nothing_runs_is_planned_without_a_command(capsys):
    cli.main(["plan", "--profile", "24gb", "--backbone-copies", "2", *NARROW])
    assert "fits 24 GB" in (said := capsys.readouterr().out) and "python run.py" not in said
    cli.main(["plan", "--profile", "24gb", "--text-encoder-resident", "--json", *NARROW])
    assert json.loads(capsys.readouterr().out)["command"] is None


def test_no_command_is_planned_that_training_would_refuse(call, tmp_path):
    (tmp_path / "p.txt").write_text("a green circle\n")
    code, out, said = call("plan", "--profile", "4090", "--prompts", tmp_path / "p.txt")
    assert code == 2 and not out and "'red' is not a word of the prompt 'a green circle' (number 1 of" in said[-1]
    assert "python run.py" in call("plan", "--profile", "4090", "--prompts", tmp_path / "p.txt", "--alpha", "0", *NARROW)[1]


def test_the_benchmarks_are_listed():
    done = _python("run.py", "bench")
    lines = {line.split()[2]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0 and {"card", "peaks", "emulated", "main_run"} <= lines.keys() and "The suite for one card" in lines["card"]


def test_what_does_not_fit_the_hosts_memory_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.loop.assemble", None)  # not reached
    with pytest.raises(DoesNotFit, match=r"shapes does not fit this machine's CPU: this plan needs .* in optimizer; \d+ GiB free would do, and --profile auto"):
        cli.main(["--rank", "100000000", "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "run")])


def test_prompts_are_read_before_a_plan_is_looked_for(call, monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.planning.planned", None)  # not reached
    code, _, said = call("--model", "cogvideox-2b", "--profile", "4090", "--device", "cpu", "--prompts", str(tmp_path / "absent.txt"))
    assert code == 2 and "absent.txt" in said[-1]


@pytest.mark.parametrize("code, argv, why", [
    (2, ["--profile", "4090", "--frames", "9"], "nothing to preserve"),
    (2, ["--prompts", "{tmp}/tennis.txt", "--preserve", "tennis"], "'golf' is not a word of the prompt 'people play tennis'"),
    (3, ["--profile", "8gb", "--batch-size", "64", "--preserve", "tennis"], "does not fit"),
    (2, ["--profile", "4090", "--frames", "9", "--height", "481", "--preserve", "tennis"], "--height 481"),
    (2, ["--profile", "4090", "--frames", "9", "--preserve", "tennis", "--checkpoint", "all", "--boundaries", "device", "--feed-forward-chunks", "1"],
     "the hub did not give THUDM/CogVideoX-2b (it is not in the cache, and HF_HUB_OFFLINE is set)"),
], ids=["prompts", "words", "memory", "size", "all well"])
def test_what_cannot_be_is_refused_before_a_model_is_downloaded(call, monkeypatch, tmp_path, code, argv, why):
    from huggingface_hub.errors import OfflineModeIsEnabled

    download = Mock(side_effect=OfflineModeIsEnabled("no"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "tennis.txt").write_text("people play tennis\n")
    got, _, said = call("--model", "cogvideox-2b", "--concept", "golf", "--device", "cpu", *(word.format(tmp=tmp_path) for word in argv))
    assert got == code and why in said[-1]
    assert download.called == ("hub" in why)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
@pytest.mark.parametrize("command", [[], ["diagnose"]], ids=["train", "diagnose"])
def test_a_card_that_is_not_there_is_told_before_a_plan_is_looked_for(call, monkeypatch, command):
    monkeypatch.setattr("trainer.planning.planned", None)  # not reached
    code, _, said = call(*command, "--profile", "4090", "--device", "cuda")
    assert code == 2 and "--device cuda: there is no CUDA card here; use --device cpu" in said[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_a_card_that_torch_cannot_use_is_said_once(monkeypatch, caplog):
    """As where the driver is older than torch: the bundled model trains on the CPU all the same."""
    monkeypatch.setattr("trainer.assemble.read_nvml", lambda index: Reading("Some card", (8, 9), 2**34, 0))
    monkeypatch.setattr("trainer.assemble.why_unused", lambda: "the driver is old")
    assert [chosen_device("auto").type, chosen_device("auto").type] == ["cpu", "cpu"]
    assert caplog.messages == ["torch cannot use the Some card here: the driver is old"]
    with pytest.raises(UsageError, match="--device cuda: torch cannot use the Some card here: the driver is old; use --device cpu"):
        chosen_device("cuda")
    assert chosen_device("cpu").type == "cpu" and len(caplog.messages) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
@pytest.mark.parametrize("profile", [[], ["--profile", "4090"]], ids=["auto", "4090"])
def test_a_machine_whose_card_is_not_seen_does_not_train_for_weeks(call, monkeypatch, profile):
    monkeypatch.setattr("memory.cards.host_bytes", lambda: (2**36, 2**36))
    monkeypatch.setattr("trainer.cli.available_host_bytes", lambda: 2**36)
    download, search = Mock(), Mock(side_effect=planning.planned)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(planning, "planned", search)
    words = ["--model", "cogvideox-2b", "--frames", "9", "--concept", "golf", "--preserve", "tennis", *profile]
    code, _, said = call(*words)
    assert code == 2 and not download.called and not search.called
    assert re.search(r"no CUDA card here, and on the CPU a step of training cogvideox-2b takes about \d\d minutes \(predicted\)", said[-1])
    download.side_effect = FileNotFoundError("asked")
    assert "asked" in call(*words, "--device", "cpu")[2][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_a_plan_of_weeks_says_how_to_plan_for_a_card(settings, call, monkeypatch):
    words = ["plan", *settings[:settings.index("--device")]]
    assert call(*words)[2] == []
    monkeypatch.setattr(planning, "LONG_STEP", 0.0)
    assert call(*words)[2] == ["there is no CUDA card here, so this is planned for the CPU; --profile 4090, say, plans for a card"]
    assert call(*words, "--device", "cpu")[2] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_a_machine_whose_card_is_not_seen_does_not_generate_for_days(call, monkeypatch, tmp_path):
    monkeypatch.setattr("memory.cards.host_bytes", lambda: (2**36, 2**36))
    download = Mock(side_effect=FileNotFoundError("asked"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = ["generate", "--model", "cogvideox-2b", "--frames", "9", "--prompt", "golf", "--no-eraser", "--out", str(tmp_path / "x.mp4")]
    code, _, said = call(*words)
    assert code == 2 and not download.called
    assert re.search(r"no CUDA card .* \d\d minutes \(predicted\); .* --device cpu generates nevertheless", said[-1])
    assert "asked" in call(*words, "--device", "cpu")[2][-1]
