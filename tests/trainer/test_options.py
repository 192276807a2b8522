"""The command line as it is promised: every option of every command stands in options.txt, and nothing else.

    python tests/trainer/test_options.py      write options.txt anew, after a change that is meant
"""

import ast
import contextlib
import inspect
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from memory import plan
from trainer import commands, config, projection_config, video_config

FROZEN = Path(__file__).parent / "options.txt"
COMMANDS = ("train", "plan", "generate", "evaluate", "report", "diagnose", "doctor", "export", "forget")
_OPTION = re.compile(r"^[│ ] (--[a-z].*?)(?:\s{2,}.*)?[│ ]*$")


def options() -> list[str]:
    """`command --option TYPE`, one a line, as --help shows them."""
    from trainer import cli

    found = []
    for command in COMMANDS:
        shown = io.StringIO()
        # One column, and room for the longest list of choices.
        with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        lines = [f"{command} {match[1].strip()}" for line in shown.getvalue().splitlines() if (match := _OPTION.match(line))]
        assert lines, f"{command} --help shows no option: {shown.getvalue()}"
        found += lines
    return found


def test_every_command_is_frozen():
    from trainer import cli

    known = set(re.findall(r'"(\w+)": _\w+', inspect.getsource(cli.main)))
    assert known == set(COMMANDS), "name the new command in COMMANDS above"


def test_options_are_those_promised():
    now, frozen = options(), FROZEN.read_text().splitlines()
    new, gone = sorted(set(now) - set(frozen)), sorted(set(frozen) - set(now))
    assert not new and not gone, (
        f"the command line changed. New: {new}. Gone: {gone}. Runs and scripts of users name these options: if the change is "
        f"meant, run `python tests/trainer/{Path(__file__).name}` and commit {FROZEN.name}")


@pytest.mark.parametrize("module", [config, projection_config, video_config, commands, plan])
def test_help_breaks_where_a_sentence_ends(module):
    """What shows them begins a new line where a field's docstring does."""
    found = [statement.value.value for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ClassDef)
             for statement in node.body[1:] if isinstance(statement, ast.Expr)]
    assert found and not [line for text in found for line in text.splitlines()[:-1] if not line.endswith(".")]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    FROZEN.write_text("\n".join(options()) + "\n")
    print(FROZEN)
