"""Options of benchmarks: a wrong value is told in a line, before anything is measured."""

import sys

import pytest

import run


@pytest.mark.parametrize("words, said", [
    (["projection", "--encoders", "vit"], "error: --encoders vit: one of clip, qwen3-vl"),
    (["projection", "--forget", "red dog"], "error: --forget red dog: one of red circle, "),
    (["pretrained", "--num-videos", "0"], "error: --num-videos 0: must be 1 or more"),
    (["pretrained", "--num-steps", "-1"], "error: --num-steps -1: must be 1 or more"),
    (["main_run", "--only", "green"], "error: --only green: one of red, "),
])
def test_a_wrong_value_is_usage(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py", "bench", *words, "--out", str(tmp_path)])
    assert run.main() == 2
    assert capsys.readouterr().err.startswith(said)
