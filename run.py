"""Parse, dispatch, and turn exceptions into exit codes: 0 done, 1 bug, 2 usage, 3 does not fit or out of memory,
4 non-finite, 5 checkpoint, 6 input/output, 129/130/143 interrupted after saving."""

import ast
import contextlib
import errno
import io
import logging
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from memory import environment

# What a file system may refuse, and what would work.
_INPUT_OUTPUT = (dict.fromkeys((errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO), "choose a place that can be written and has room")
                 | dict.fromkeys((errno.EACCES, errno.EPERM), "choose a place that you may read and write, or have its permissions changed")
                 | dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "name another path"))


PATIENCE = 10  # seconds in which torchrun ends the other processes when one has failed


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # of kernels that are not used; memory.optimizers says what it lacks
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    environment.prepare()  # before torch is imported
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a file that does not take all letters
        sys.stdout.reconfigure(errors="replace")
    try:
        return _leave(_guarded(_bench if sys.argv[1:2] == ["bench"] else _train))
    except ModuleNotFoundError as e:
        if not e.name or find_spec(e.name.partition(".")[0]):
            raise
        return _say(2, f"error: {e.name} is not installed for {sys.executable}; `make run` or `make test` once installs all that is needed "
                    "into .venv, then: . .venv/bin/activate")


def _bench() -> int:
    """Run a benchmark by name: nothing imports them. `peaks` is a suite of pytest-benchmark."""
    words, here = sys.argv[2:], Path(__file__).parent / "bench"
    known = {"peaks": here / "test_peaks.py"} | {name: here / name / "__main__.py" for name in ("card", "emulated")}
    known |= {f.stem: f for f in here.glob("*.py") if "\nif __name__" in f.read_text(encoding="utf-8")}
    if not words or words[0] in ("-h", "--help"):
        for name in sorted(known):
            print(f"run.py bench {name:12}", ast.get_docstring(ast.parse(known[name].read_text(encoding="utf-8"))).splitlines()[0])
        return 0
    if words[0] not in known:
        return _say(2, f"error: bench {words[0]}: one of {', '.join(sorted(known))}")
    if words[0] == "peaks":
        import pytest

        return pytest.main([str(known["peaks"]), "--benchmark-enable", *words[1:]])
    sys.argv[1:3] = []
    runpy.run_module(f"bench.{words[0]}", run_name="__main__", alter_sys=True)
    return 0


def _train() -> int:
    """Any other command."""
    from trainer.cli import main as run

    run(sys.argv[1:])
    return 0


def _guarded(command: Callable[[], int]) -> int:
    """Its exit code, and that of what it raises, said in a line."""
    try:
        from memory.exhaustion import card_lost, exhausted, first_line, workaround
        from memory.plan import PlanError
        from trainer.errors import InputOutputError, TrainerError
    except KeyboardInterrupt:
        return _say(130, "interrupted")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except SystemExit as e:  # the parser's: --help, or a value that it refuses and has said why
        if isinstance(e.__context__, BrokenPipeError):  # or rich's, which says so and ends
            return 6
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except TrainerError as e:
        if not isinstance(e, InputOutputError) and _another_speaks(wait=e.exit_code < 128):  # that another is lost, each says
            return e.exit_code
        return _say(e.exit_code, f"{'interrupted' if e.exit_code > 128 else 'error'}: {e}")
    except PlanError as e:
        return _say(2, f"error: {e}")
    except KeyboardInterrupt:
        return _say(130, "interrupted")
    except BrokenPipeError:  # whoever read our output has seen enough
        return 6
    except Exception as e:
        if isinstance(e, OSError) and e.errno in _INPUT_OUTPUT:
            return _say(6, f"error: {e.filename or 'output'}: {e.strerror}; {_INPUT_OUTPUT[e.errno]}")
        if card_lost(e):
            return _say(6, f"error: the card is lost ({first_line(e)}); what is saved is good: go on with python run.py "
                        f"{'forget ' * (sys.argv[1:2] == ['forget'])}--resume RUN once nvidia-smi shows it again")
        if without := workaround(e):
            what, setting = without
            return _say(6, f"error: {what} ({first_line(e)}); put {setting} before the command")
        if not (whose := exhausted(e)):
            raise
        return _say(3, f"error: out of memory on the {whose} ({first_line(e)}); {_less_memory(whose)}")


def _less_memory(whose: str) -> str:
    """What would need less of the memory that ran out."""
    forgets = sys.argv[1:2] == ["forget"]
    less = "a smaller --batch-size" if forgets else "fewer --frames, a smaller --height and --width"
    if whose == "host":
        return f"{less} and, beside a card, a larger --resident-blocks need less; or close what else uses it"
    if forgets:
        return f"{less}, --resident-blocks 0 or --device cpu needs less"
    return f"{less} or --resident-blocks 0 need less; python run.py plan says how much"


def _another_speaks(*, wait: bool) -> bool:
    """Whether the first of the processes that torchrun started on this machine has said what all of them would. With `wait` this one holds
    back until torchrun ends it, and speaks up where that one did not fail. Without: an interruption, upon which all have agreed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK") == "0":
        return False
    if wait:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(PATIENCE)
    return not wait


def _say(exit_code: int, message: str) -> int:
    """The message on stderr, if anybody listens there, and the code."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    return exit_code


def _leave(exit_code: int) -> int:
    """The code. Streams that nobody reads any more are closed here: Python's own attempt would end in 120 and a complaint."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            exit_code = exit_code or 6
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
