"""What the command line says when something is wrong, word for word: messages.txt is what users see.

    UPDATE_MESSAGES=1 python -m pytest tests/trainer/test_messages.py      write it anew, after a change that is meant
"""

import os
import re
from pathlib import Path

from test_cli import WRONG, call, settings  # noqa: F401  fixtures

from memory.meter import PhasePeak
from memory.plan import MemoryPlan
from memory.advice import next_cheaper
from trainer.recovery import Failure, described

FROZEN = Path(__file__).parent / "messages.txt"
OTHERS = [
    ["frobnicate"], ["generate", "--prompt", "x"], ["generate", "--prompt", "x", "--no-eraser", "--out", "x.gif"],
    ["generate", "--prompt", "x", "--no-eraser", "--fpss", "3"], ["generate", "--prompt", "x", "--eraser", "{tmp}/absent"],
    ["evaluate", "{tmp}/absent"], ["evaluate", "{tmp}/absent", "--guidance-scale", "x"], ["export", "{tmp}/absent", "--out", "{tmp}/x"], ["report", "{tmp}/absent"],
    ["diagnose", "{tmp}/absent"], ["plan", "--profile", "rtx9999"], ["plan", "--profile", "24"], ["forget", "--guidance", "batched"], ["--resume", "{tmp}/absent", "--config", "x.toml"],
    ["--config", "{tmp}/unknown.toml"], ["--config", "{tmp}/typed.toml"], ["--config", "{tmp}/broken.toml"], ["--concept", " "],
    ["--beta", "-1"], ["--mask-threshold", "2"], ["--lr", "nan"], ["--pool", "3"], ["--guidance", "none"], ["--on-oom", "retry"]]


def _out_of_memory() -> str:
    gib = 1 << 30
    peaks = {"teacher": PhasePeak(allocated_bytes=5 * gib, reserved_bytes=6 * gib, host_bytes=2 * gib, num_visits=4),
             "backward": PhasePeak(allocated_bytes=7 * gib, reserved_bytes=8 * gib, host_bytes=2 * gib, num_visits=3)}
    failure = Failure(phase="backward", whose="device", said="CUDA out of memory. Tried to allocate 2.00 GiB", requested_bytes=2 * gib,
                      step=3, run_dir=Path("runs/red-1"), saved_step=3, peaks=peaks)
    advice = next_cheaper(MemoryPlan(), 42, needed_bytes=lambda plan: 7 * gib if plan.resident_blocks is None else 5 * gib)
    return described(failure, advice, advice.command(["python", "run.py", "--resume", "runs/red-1"])) + "\n"


def test_messages_are_those_that_users_know(settings, prompts, call, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    for name, content in {"empty.txt": "\n", "unknown.toml": "[optim]\nrnak = 3\n", "typed.toml": "[optim]\nrank = 'x'\n",
                          "broken.toml": "[optim\n"}.items():
        (tmp_path / name).write_text(content)
    model = str(Path(settings[settings.index("--model") + 1]))
    said = []
    for flags, full in [(flags, True) for flags, _, _ in WRONG.values()] + [(flags, False) for flags in OTHERS]:
        argv = [flag.format(tmp=tmp_path) for flag in flags]
        code, out, lines = call(*(settings if full else []), *argv)
        text = "\n".join(lines).replace(str(tmp_path), "TMP").replace(str(prompts.parent), "TMP").replace(model, "MODEL")
        assert out == "" and "Traceback" not in text
        said.append(f"$ run.py {' '.join(flags).replace('{tmp}', 'TMP')}\n[{code}] {text}\n")
    now = "\n".join([*said, "out of memory in training\n[3] error: " + _out_of_memory()])
    now = re.sub(r"[ \t]+$", "", now, flags=re.MULTILINE)
    if os.environ.get("UPDATE_MESSAGES"):
        FROZEN.write_text(now)
    assert now == FROZEN.read_text(), "messages changed; if that is meant, run it with UPDATE_MESSAGES=1 and commit messages.txt"
