"""Readers of files, given anything: they understand it or refuse it with an error that knows its exit code."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from memory.plan import PlanError
from trainer.config import DataConfig, TrainConfig, leaves, replaced
from trainer.config_file import read_toml
from trainer.errors import CheckpointError, UsageError
from trainer.prompts import collect
from trainer.run_directory import read_config
from trainer.run_files import CONFIG, METRICS, read_metrics

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=10)
NAMES = sorted(leaves(TrainConfig()))
SECTIONS = sorted({name.split(".")[0] for name in NAMES})


def _written(directory: Path, name: str, content: bytes) -> Path:
    (directory / name).write_bytes(content)
    return directory / name


@SETTINGS
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), suffix=st.sampled_from(["txt", "csv", "CSV"]))
@example(content=b"\xef\xbb\xbfprompt\n\"a\n", suffix="csv")
@example(content=b"prompt,prompt\nred,\x00\n", suffix="csv")
@example(content=b"prompt\r\r\n", suffix="csv")
def test_prompt_files(tmp_path, content, suffix):
    path = _written(tmp_path, f"prompts.{suffix}", content)
    try:
        found = collect(DataConfig(prompts=path, preserve_file=path if suffix == "txt" else None), bundled=False)
    except UsageError as e:
        assert str(e).startswith("--pr") and "\n" not in str(e)
        return
    assert found.prompts and all(prompt.strip() and prompt == prompt.strip() for prompt in found.prompts)
    assert len(found.safe) == len(found.prompts)


@SETTINGS
@given(rows=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=5))
def test_what_a_csv_writer_writes_is_read(tmp_path, rows):
    import csv

    path = tmp_path / "prompts.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([("prompt", "safe"), *rows])
    try:
        found = collect(DataConfig(prompts=path), bundled=False)
    except UsageError:
        return
    assert len(found.prompts) <= len(rows)


@SETTINGS
@given(content=st.binary(max_size=120) | st.text(max_size=120).map(str.encode))
@example(content=b"a = " + b"[" * 5000)
@example(content=b"optim.rank = " + b"9" * 5000)
@example(content=b"optim = 3")
def test_toml_files(tmp_path, content):
    path = _written(tmp_path, "settings.toml", content)
    try:
        found = read_toml(path)
    except UsageError as e:
        assert f"--config {path}" in str(e)
        return
    assert set(found) <= set(NAMES)


def _toml(value: object) -> str:
    """A TOML literal; JSON's strings, numbers and lists are TOML's."""
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


@SETTINGS
@given(name=st.sampled_from(NAMES), value=st.integers(-3, 300) | st.floats(allow_nan=False, allow_infinity=False, width=16) | st.booleans()
       | st.text("abc:0123", max_size=6) | st.lists(st.integers(0, 9), max_size=3))
def test_any_value_of_any_setting_is_taken_as_it_is_or_refused(tmp_path, name, value):
    section, field = name.split(".")
    path = _written(tmp_path, "settings.toml", f"[{section}]\n{field} = {_toml(value)}\n".encode())
    try:
        found = read_toml(path)
        config = replaced(TrainConfig(), found)
    except (ValueError, PlanError) as e:
        assert str(e)
        return
    except UsageError as e:
        assert str(e)
        return
    read = leaves(config)[name]
    assert read == (tuple(value) if isinstance(value, list) else Path(value) if isinstance(read, Path) else value)


@SETTINGS
@given(content=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode())
       | st.dictionaries(st.sampled_from(SECTIONS), JSON, max_size=3).map(lambda v: json.dumps({"config": v}).encode()))
@example(content=b'{"config": ' + b"[" * 5000)
def test_settings_of_a_run(tmp_path, content):
    _written(tmp_path, CONFIG, content)
    try:
        config, _ = read_config(tmp_path)
    except CheckpointError as e:
        assert "not a run directory" in str(e)
        return
    assert isinstance(config, TrainConfig)


@SETTINGS
@given(lines=st.lists(st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode()), max_size=6))
@example(lines=[b"[" * 5000, b'{"step": 1}'])
def test_metrics(tmp_path, lines):
    _written(tmp_path, METRICS, b"\n".join(lines))
    assert all(isinstance(record, dict) for record in read_metrics(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_every_default_comes_back_from_toml(tmp_path, name):
    default = leaves(TrainConfig())[name]
    if default is None:
        return  # TOML has no word for it: leave the line out
    section, field = name.split(".")
    path = _written(tmp_path, "settings.toml", f"[{section}]\n{field} = {_toml(default)}\n".encode())
    assert read_toml(path) == {name: default}
