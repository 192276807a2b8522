"""What the words of a command line mean: settings from defaults, a file or a run, and flags; complaints in the user's words.

Heavy imports wait until a run's configuration has to be read.
"""

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import tyro

from memory.advice import flag_of
from memory.cards import Card, UnknownCard, detect, lookup
from memory.nvml import CardUnreadable
from memory.plan import MemoryPlan, PlanError
from trainer import config as settings
from trainer.commands import PlanCommand, TrainCommand
from trainer.config import TrainConfig
from trainer.config_file import read_toml
from trainer.errors import CheckpointError, UsageError

_FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def in_flags(error: Exception) -> str:
    """What is wrong with a memory plan, by flags in place of its fields: memory/ knows none. A field is the first word,
    or stands before = and a value, or has an underscore."""
    flags = {f.name: flag_of(f.name) for f in fields(MemoryPlan)}
    text = re.sub(r"^(\w+) is ", r"\1 = ", str(error))
    return re.sub(r"^\w+|\w+(?= = )|\w+_\w+", lambda word: flags.get(word[0], word[0]), text).replace(" = ", " ")


def parse(kind: type, argv: Sequence[str], command: str, default: Any = None, *, named: str | None = None) -> Any:
    """The settings that `argv` asks a command for. `named`: the flag whose value may stand alone (`positional`)."""
    argv = positional(argv, named) if named else argv
    program, complaint = f"run.py {command}".strip(), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(kind, args=list(argv), prog=program, default=default, config=_FLAT, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        said = _unboxed(complaint.getvalue())
        if said == f"{named} is missing":
            said += f"; {named[2:].upper()} stands first, or after {named}"
        raise UsageError(f"{said}; python {program} --help says more") from e
    if unknown and not unknown[0].startswith("-"):
        raise UsageError(_superfluous(unknown[0], argv, parsed, program))
    if unknown:
        options = [_flag(path) for path in settings.leaves(parsed)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"python {program} --help lists them all"
        raise UsageError(f"there is no option {unknown[0]}; {hint}")
    _require_text(parsed)
    needed = {_flag(f.name) for f in fields(kind) if f.default is f.default_factory is MISSING}
    for flag in (_flag(path) for path, value in settings.leaves(parsed).items() if isinstance(value, Path)):
        early(argv, flag, needed=flag in needed, named=flag == named)  # an empty path would be the current directory
    return parsed


def _require_text(parsed: Any) -> None:
    """Raises UsageError for words whose bytes are no UTF-8. Paths may be of any bytes."""
    for path, value in settings.leaves(parsed).items():
        for word in value if isinstance(value, tuple) else (value,):
            if isinstance(word, str) and word != (shown := word.encode(errors="replace").decode()):
                raise UsageError(f"{_flag(path)} {shown}: is not UTF-8; run it from a terminal, or a script, that is")


def _superfluous(word: str, argv: Sequence[str], parsed: Any, program: str) -> str:
    """What is wrong with a word that belongs to no option."""
    words = ["", *itertools.chain.from_iterable(given.split("=", 1) if given.startswith("--") else [given] for given in argv)]
    switches = {_flag(path) for path, value in settings.leaves(parsed).items() if isinstance(value, bool)}
    for before in (before for before, after in itertools.pairwise(words) if after == word):
        flag = re.sub("^--no-", "--", before)
        if flag in switches:
            return f"{before} {word}: it takes no value; say {flag} or --no-{flag[2:]}"
    return f"{word!r} is one word too many (quotes keep words together); python {program} --help says what it takes"


def _flag(path: str) -> str:
    """What sets a setting: --resident-blocks of memory.resident_blocks."""
    return flag_of(path.split(".")[-1])


def _unboxed(text: str) -> str:
    """The complaint in one of tyro's boxes, in one line: what follows its title, up to a line drawn across."""
    lines = [re.sub(r"^[\s│╭╰]*[─-]*(?=\s|$)\s*|[\s│╮╯─]*$", "", line) for line in text.strip().splitlines()]
    said = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    complaint = " ".join(said).removeprefix("Error parsing ").rstrip(".")
    for pattern, words in _PLAIN.items():
        complaint = re.sub(pattern, words, complaint)
    return complaint


# The parser's and Python's own words -> what they mean.
_PLAIN = {r"invalid literal for int\(\) with base 10: (.*)": r"\1 is not a whole number",
          r"could not convert string to float: (.*)": r"\1 is not a number",
          r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]": r"\1 is not a whole number",
          r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]": r"\1 is not a number",
          r"Could not find valid parse for arguments: \[(.*)\]": r"whole numbers only, not \1",
          r"Missing from .*?: (--\S+) .*": r"\1 is missing",
          r"Missing value for argument '(--\S+)'\..*": r"\1: its value is missing",
          r"invalid choice '(.*)' for argument '(--\S+)'\. Expected one of \((.*)\)": r"\2 \1: one of \3"}


def early(argv: Sequence[str], flag: str, *, needed: bool = False, named: bool = False) -> str | None:
    """The value of a flag that other defaults depend on, before everything is parsed; of a flag given twice, the last one's. UsageError if it is
    empty. `needed`: it has no default. `named`: its value may stand alone (`positional`)."""
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == flag:
            value = following
        elif word.startswith(flag + "="):
            value = word.split("=", 1)[1]
    if value == "":  # as of a shell's variable that is not set
        raise UsageError(f"{flag[2:].upper() if named else flag}: an empty value; name one" + ("" if needed else ", or leave it out"))
    return value


def resolve(argv: Sequence[str], kind: type = TrainCommand) -> tuple[Any, dict[str, str]]:
    """A command (TrainCommand, PlanCommand) with its settings, and where each setting came from."""
    def parsed(base: TrainConfig) -> Any:
        return parse(kind, argv, "plan" if kind is PlanCommand else "", kind(settings=base))

    resume, toml, profile = early(argv, "--resume"), early(argv, "--config"), early(argv, "--profile")
    if profile:
        chosen_card(profile)
    if resume and toml:
        raise UsageError("--config beside --resume: a resumed run keeps its settings; give what may change as flags")
    if resume:
        base, origins = _of_run(settings.expanded(resume), planned_anew=profile is not None)
        refuse_out(argv)
    else:
        base, origins = _of_file(argv, toml, parsed)
    command, flags = parsed(base), given(argv)
    origins |= {path: "flag" for path in origins if path.split(".")[1] in flags}
    then, now = base.model.model, command.settings.model.model
    if resume and then != now and "shapes" in (then, now):
        raise CheckpointError(f"cannot resume: --model was {then!r} and is {now!r} now, and prompts are made in another way for shapes than for "
                              "other models, copies of it too; go on with the --model that it began with")
    data, loss = command.settings.data, command.settings.loss
    if data.instead and loss.anchor == "empty" and not resume:
        raise UsageError(f"--instead {data.instead}: --anchor empty uses no safe prompts; leave one of the two out")
    if data.latents == "noise" and data.trajectory_guidance != 1 and not resume:
        raise UsageError(f"--trajectory-guidance {data.trajectory_guidance}: --latents noise follows no trajectory; leave one of the two out")
    return command, origins


def _of_run(run_dir: Path, *, planned_anew: bool) -> tuple[TrainConfig, dict[str, str]]:
    """The settings of a run that goes on, and where each came from, as far as the run knows. `planned_anew`: what was planned is at its default."""
    from trainer.lock import refuse_unbegun
    from trainer.run_directory import read_config
    from trainer.run_files import CONFIG, nested

    if not (run_dir / CONFIG).exists():
        refuse_unbegun(run_dir)
        raise CheckpointError(f"--resume {run_dir}: not a run directory (there is no {CONFIG}); name the directory of a run, such as runs/red-1")
    config, content = read_config(run_dir)
    values = settings.leaves(config)
    origins = {path: str(nested(content, "origins", path) or f"run {run_dir}") for path in values}
    if planned_anew:
        planned = [path for path, origin in origins.items() if origin.startswith(("profile ", "step-down "))]
        origins |= dict.fromkeys(planned, "default")
        values = {path: value for path, value in values.items() if path not in planned}
    return settings.replaced(TrainConfig(), values), origins


def _of_file(argv: Sequence[str], toml: str | None, parsed: Callable[[TrainConfig], Any]) -> tuple[TrainConfig, dict[str, str]]:
    """The settings of a new run without its flags, and where each came from: the model's defaults, and a TOML file if there is one."""
    base, origins = TrainConfig(), dict.fromkeys(settings.leaves(TrainConfig()), "default")
    file = read_toml(settings.expanded(toml)) if toml else {}
    if (early(argv, "--model") or file.get("model.model", "shapes")) == "shapes":
        base = settings.replaced(base, settings.SHAPES)
        origins |= dict.fromkeys(settings.SHAPES, "bundled model")
    try:
        base = settings.replaced(base, file)
    except (UsageError, PlanError) as e:
        try:  # flags may supply what the file lacks, or replace what does not go together
            flags, said = given(argv), settings.leaves(parsed(base).settings)
            base = settings.replaced(base, file | {path: value for path, value in said.items() if path.split(".")[1] in flags})
        except (UsageError, PlanError):
            raise UsageError(f"--config {toml}: {in_flags(e)}") from e
    return base, origins | dict.fromkeys(file, f"file {toml}")


def refuse_out(argv: Sequence[str]) -> None:
    """UsageError for --out beside --resume."""
    if "out" in given(argv):
        raise UsageError("--out beside --resume: a run goes on in its own directory")


def given(argv: Sequence[str]) -> set[str]:
    """The settings that flags name."""
    return {word[2:].split("=", 1)[0].removeprefix("no-").replace("-", "_") for word in argv if word.startswith("--")}


def chosen_card(profile: str, device: str = "auto") -> Card:
    """The card that is meant; of this machine, the one that `device` names."""
    kind = re.fullmatch(r"auto|cpu|(cuda)(?::(\d+))?", device)
    if kind is None:
        raise UsageError(f"--device {device}: auto, cpu or cuda would work")
    try:
        if profile == "auto" and kind[2]:
            card = detect(int(kind[2]))
        else:
            card = lookup("cpu" if (profile, device) == ("auto", "cpu") else profile)
    except (UnknownCard, CardUnreadable) as e:
        raise UsageError(f"--profile {profile}: {e}") from e
    if (profile, kind[1]) == ("auto", "cuda") and card.is_cpu:
        raise UsageError(f"--device {device}: there is no CUDA card here (python run.py doctor says what is missing); use --device cpu, or plan "
                         "for another machine's: python run.py plan --profile 4090")
    return card


def fixed(origins: dict[str, str]) -> list[str]:
    """Fields of the memory plan that somebody chose: the planner leaves them."""
    return [path.removeprefix("memory.") for path, origin in origins.items()
            if path.startswith("memory.") and origin != "default"]


def positional(argv: Sequence[str], flag: str, *, last: bool = True) -> list[str]:
    """`evaluate RUN` is `evaluate --run RUN`. `last`: RUN may stand last as well, after flags that take one word each."""
    def is_flag(word: str) -> bool:
        return word.startswith("-")

    if argv and not is_flag(argv[0]):
        return [flag, *argv]
    ends_a_flag = len(argv) < 2 or (is_flag(argv[-2]) and "=" not in argv[-2])
    if last and not ends_a_flag and not is_flag(argv[-1]) and flag.removeprefix("--") not in given(argv):
        return [*argv[:-1], flag, argv[-1]]
    return list(argv)
