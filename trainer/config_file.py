"""Settings on disk: the TOML that people write and the JSON that runs do, each value in the type that its setting's annotation asks for."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from memory.advice import flag_of
from trainer.config import TrainConfig, composed, leaves, replaced
from trainer.errors import UsageError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path",
          tuple[str, ...]: "a list of texts", tuple[int, ...]: "a list of whole numbers"}


def read_text(path: Path, flag: str) -> str:
    """The text of the file that a flag names. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UsageError(f"{flag} {path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{flag} {path}: is not UTF-8 (byte {e.start}: {e.reason}); save it as UTF-8") from e
    if "\0" in text:  # Latin letters in UTF-16 without a mark at its beginning
        raise UsageError(f"{flag} {path}: is not UTF-8 (it holds null bytes); save it as UTF-8")
    return text


def read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file by dotted path. Unknown names and values of another type are refused."""
    text = read_text(path, "--config")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # TOMLDecodeError, a number of thousands of digits, brackets in brackets
        raise UsageError(f"--config {path}: not valid TOML ({e})") from e
    known, found = leaves(TrainConfig()), {}
    sections = {path.split(".")[0] for path in known}
    for section, values in table.items():
        is_table = isinstance(values, dict) and (values or section in sections)  # an empty one is looked at by its name
        for name, value in (values.items() if is_table else ((None, values),)):
            dotted = section if name is None else f"{section}.{name}"
            if dotted not in known:
                raise UsageError(f"--config {path}: there is no setting {dotted}; {_instead_of(dotted, known)}")
            if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, list) else [value])):
                raise UsageError(f"--config {path}: {dotted} = {value!r} holds a null byte; take it out")
            try:
                found[dotted] = _setting(value, dotted)
            except TypeError as e:
                raise UsageError(f"--config {path}: {e}") from e
    return found


def _instead_of(dotted: str, known: Iterable[str]) -> str:
    section, _, name = dotted.rpartition(".")
    if not section and name in ("profile", "resume", "on_oom", "on-oom"):
        return f"{flag_of(name)} is a flag only"
    spelled = name.replace("-", "_")
    near = [k for k in known if k.split(".")[1] == spelled] or difflib.get_close_matches(dotted, known, n=1, cutoff=0.8)
    if near:
        return f"did you mean {near[0]}?"
    inside, sections = [k for k in known if k.startswith(f"{section}.")], dict.fromkeys(k.split(".")[0] for k in known)
    if inside:
        return f"there are {', '.join(inside)}"
    near = difflib.get_close_matches(section or name, sections, n=1)
    return f"did you mean the section [{near[0]}]?" if near else f"sections are {', '.join(sections)}"


SEPARATORS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}
"""By a table's ending: what separates its columns, and the word for it."""
JSON = (".json", ".jsonl")


def require_list(path: Path, flag: str, what: str) -> None:
    """Raises UsageError where the ending tells of no plain list: a table's columns would be taken for one line, its head for another."""
    if path.suffix.lower() in (*SEPARATORS, *JSON):
        kind = "JSON" if path.suffix.lower() in JSON else "a table"
        raise UsageError(f"{flag} {path}: is {kind}; write a text file, with one {what} a line")


def read_lines(path: Path, flag: str, what: str) -> list[str]:
    """The lines of a text file that are not empty, stripped. Raises UsageError where there are none, in words for `what` each names."""
    lines = [composed(line) for line in read_text(path, flag).split("\n") if line.strip()]  # not splitlines(): it cuts at U+2028 and others
    if not lines:
        raise UsageError(f"{flag} {path}: holds no {what}; write one a line")
    return lines


def as_json(config: Any) -> dict[str, Any]:
    """Plain nested values, for config.json and checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `as_json`. Raises UsageError for a setting that there is not, TypeError for a value of another type."""
    flat = {f"{section}.{name}": value for section, settings in values.items() for name, value in settings.items() if value is not None}
    if unknown := sorted(flat.keys() - leaves(TrainConfig()).keys()):
        raise UsageError(f"there is no setting {unknown[0]}; another version may have had it")
    return replaced(TrainConfig(), {dotted: _setting(value, dotted) for dotted, value in flat.items()})


def _setting(value: Any, dotted: str) -> Any:
    section, name = dotted.split(".")
    return typed(value, typing.get_type_hints(typing.get_type_hints(TrainConfig)[section])[name], dotted)


def typed(value: Any, hint: Any, name: str) -> Any:
    """The value of a setting, of TOML or JSON, in the type that an annotation asks for. Raises TypeError with what that is, in words."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option)
        if type(value) is option or origin is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            with suppress(OverflowError):  # more digits than a float has
                return float(value)
        if option is Path and isinstance(value, str) and value:
            return Path(value)
        if origin is tuple and isinstance(value, list) and all(type(item) is typing.get_args(option)[0] for item in value):
            return tuple(value)
    option = options[0]  # the other one is None
    wanted = f"one of {', '.join(map(repr, typing.get_args(option)))}" if typing.get_origin(option) is Literal else _WORDS[option]
    raise TypeError(f"{name} = {value!r} is not {wanted}")
