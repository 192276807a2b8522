"""Benchmarks take no words that they do not know: a measurement of minutes, and a committed result, would be lost to a slip."""

import re
import sys
from pathlib import Path

import pytest

import run
from bench import provenance

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted(f for f in (ROOT / "bench").glob("*.py") if "\nif __name__" in f.read_text()), ids=lambda f: f.stem)
def test_every_benchmark_looks_at_its_words(file):
    """And says by which command it was called, not where its file lies."""
    assert re.search(r"take_no_arguments\(__doc__\)|settings_of\(|ArgumentParser\(.*\bprog=", file.read_text())


@pytest.mark.parametrize("words, code, said", [(["bench", "tables", "--chekc"], 2, "unrecognized arguments: --chekc"),
                                               (["bench", "rank", "nonsense"], 2, "unrecognized arguments: nonsense"),
                                               (["bench", "rank", "--help"], 0, "python -m bench.rank"),
                                               (["bench", "rater", "--help"], 0, "usage: python -m bench.rater [-h]"),
                                               (["bench", "planning", "x"], 2, "unrecognized arguments: x"),
                                               (["bench", "main_run", "--only", "nonsense"], 2, "--only nonsense: one of red, "),
                                               (["bench", "projection", "--encoders", "vit"], 2, "--encoders vit: one of clip, "),
                                               (["bench", "projection", "--forget", "red dog"], 2, "--forget red dog: one of red circle, "),
                                               (["bench", "rater", "--num-videos", "0"], 2, "--num-videos 0: must be 1 or more"),
                                               (["bench", "rater", "--rater", "nope"], 2, "--rater nope: no model in transformers' layout there"),
                                               (["bench", "diagnosis", "--num-healthy", "-1"], 2, "--num-healthy -1: must be 0 or more"),
                                               (["bench", "pretrained", "--num-videos", "0"], 2, "--num-videos 0: must be 1 or more"),
                                               (["bench", "pretrained", "--num-steps", "-1"], 2, "--num-steps -1: must be 1 or more")])
def test_words_that_are_not_known_end_before_anything_is_measured(words, code, said, monkeypatch, capsys):
    results = {file: file.stat().st_mtime_ns for file in (ROOT / "bench" / "results").rglob("*.json")}
    monkeypatch.delitem(sys.modules, f"bench.{words[1]}", raising=False)  # as in a process of its own
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert run.main() == code and said in "".join(capsys.readouterr())
    assert {file: file.stat().st_mtime_ns for file in (ROOT / "bench" / "results").rglob("*.json")} == results


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = provenance.write_result("some", {"cells": [1]}, tmp_path)
    before = path.read_text()
    monkeypatch.setattr("trainer.run_files.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        provenance.write_result("some", {"cells": [2]}, tmp_path)
    assert path.read_text() == before
