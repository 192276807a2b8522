"""The command line: commands, and how settings are put together. Heavy imports wait until a command runs."""

import contextlib
import difflib
import gc
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from memory.cards import Card, CardUnreadable, UnknownCard, detect, lookup, size_bytes
from trainer import config as settings
from trainer.commands import DiagnoseCommand, DoctorCommand, ExportCommand, ForgetCommand, PlanCommand, ReportCommand, TrainCommand
from trainer.config import EvaluateConfig, GenerateConfig, TrainConfig
from trainer.errors import DoesNotFit, UsageError
from trainer.projection_config import ForgetConfig, read_forget_config

_FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def main(argv: Sequence[str]) -> None:
    """Run one command line; raises what goes wrong."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train, "generate": _generate, "evaluate": _evaluate, "report": _report, "export": _export, "forget": _forget,
        "diagnose": _diagnose, "plan": _plan, "doctor": _doctor}
    if argv and not argv[0].startswith("-"):
        if argv[0] not in commands:
            raise UsageError(f"there is no command {argv[0]!r}; {', '.join(commands)} are (without one, run.py trains)")
        commands[argv[0]](argv[1:])
    else:
        _train(argv)


def _parse(kind: type, argv: Sequence[str], command: str, default: Any = None) -> Any:
    program, complaint = f"run.py {command}".strip(), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(kind, args=list(argv), prog=program, default=default, config=_FLAT, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        raise UsageError(f"{_unboxed(complaint.getvalue())}; {program} --help says more") from e
    if unknown:
        options = ["--" + path.split(".")[-1].replace("_", "-") for path in settings.leaves(parsed)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{program} --help lists them all"
        raise UsageError(f"there is no option {unknown[0]}; {hint}")
    return parsed


def _unboxed(text: str) -> str:
    """The complaint in one of tyro's boxes, in one line: what follows its title, up to a line drawn across."""
    lines = [re.sub(r"^[\s│╭╰]*[─-]*(?=\s|$)\s*|[\s│╮╯─]*$", "", line) for line in text.strip().splitlines()]
    said = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return " ".join(said).removeprefix("Error parsing ").rstrip(".")


def _early(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that other defaults depend on, before everything is parsed."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def resolve(argv: Sequence[str], kind: type = TrainCommand) -> tuple[Any, dict[str, str]]:
    """A command (TrainCommand, PlanCommand) with its settings, and where each setting came from."""
    resume, toml, profile = _early(argv, "--resume"), _early(argv, "--config"), _early(argv, "--profile")
    if profile:
        _card(profile)
    if resume and toml:
        raise UsageError("--config beside --resume: a resumed run keeps its settings; give what may change as flags")
    layers: list[tuple[str, dict[str, Any]]] = []
    if resume:
        from trainer.run_directory import read_config

        layers.append((f"run {resume}", settings.leaves(read_config(Path(resume))[0])))
        if "out" in _given(argv):
            raise UsageError("--out beside --resume: a run goes on in its own directory")
    else:
        file = settings.read_toml(Path(toml)) if toml else {}
        model = _early(argv, "--model") or file.get("model.model", "shapes")
        if model == "shapes":
            layers.append(("bundled model", settings.SHAPES))
        if toml:
            layers.append((f"file {toml}", file))
    base, origins = TrainConfig(), dict.fromkeys(settings.leaves(TrainConfig()), "default")
    for origin, values in layers:
        base = settings.replaced(base, values)
        origins |= dict.fromkeys(values, origin)
    command = _parse(kind, argv, "plan" if kind is PlanCommand else "", kind(settings=base))
    origins |= {path: "flag" for path in origins if path.split(".")[1] in _given(argv)}
    return command, origins


def _given(argv: Sequence[str]) -> set[str]:
    """The settings that flags name."""
    return {word[2:].split("=", 1)[0].removeprefix("no-").replace("-", "_") for word in argv if word.startswith("--")}


def _card(profile: str, device: str = "auto") -> Card:
    """The card that is meant; of this machine, the one that `device` names."""
    number = re.fullmatch(r"cuda:(\d+)", device)
    try:
        if profile == "auto" and number:
            return detect(int(number[1]))
        return lookup("cpu" if (profile, device) == ("auto", "cpu") else profile)
    except (UnknownCard, CardUnreadable) as e:
        raise UsageError(f"--profile {profile}: {e}") from e


def _fixed(origins: dict[str, str]) -> list[str]:
    """Fields of the memory plan that somebody chose: the planner leaves them."""
    return [path.removeprefix("memory.") for path, origin in origins.items()
            if path.startswith("memory.") and origin != "default"]


def _train(argv: Sequence[str]) -> None:
    command, origins = resolve(argv)
    config, card = command.settings, _card(command.profile, command.settings.model.device)
    from trainer.distributed import joined, rows_of, shared
    from trainer.loop import train
    from trainer.memory_file import Forecast
    from trainer.recovery import train_in_memory
    from trainer.run_directory import read_config, restarted_run

    with joined(config.model.device) as rank:
        rows_of(config.data.batch_size)
        assessment = None
        if "profile" in _given(argv) or not (card.is_cpu or command.resume):
            from trainer.planning import planned

            config, chosen, assessment = planned(config, card, _fixed(origins))
            config = shared(lambda: config)  # every process the same plan
            origins |= {f"memory.{name}": f"profile {card.name}" for name in chosen}
        run_dir = train_in_memory(partial(train, forecast=Forecast(card, assessment)), config, origins, card=card,
                                  resume=command.resume or restarted_run(config),
                                  step_down=command.on_oom == "step-down", command=("python", "run.py", *argv))
    if rank:
        return  # the first process speaks for all
    if config.model.model == "shapes" and config.output.evaluate:
        from trainer.evaluate import require_measurable

        try:
            require_measurable(config.data.concept, config.model)
        except UsageError as e:
            print(f"not measured: {e}", file=sys.stderr)
        else:
            _measure(EvaluateConfig(run=run_dir, model=config.model, memory=replace(read_config(run_dir)[0].memory, num_shards=1)))
    print(f"eraser: {run_dir / 'eraser.safetensors'}")
    print(f"run: {run_dir}")


def _plan(argv: Sequence[str]) -> None:
    command, origins = resolve(argv, PlanCommand)
    gc.disable()  # a tenth of the time, and nothing to collect
    try:
        _forecast(command, origins)
    finally:
        gc.enable()


def _forecast(command: PlanCommand, origins: dict[str, str]) -> None:
    from trainer import planning

    config = command.settings
    if command.cards > config.data.batch_size and origins["data.batch_size"] == "default":  # the least that can be divided
        config, origins["data.batch_size"] = settings.replaced(config, {"data.batch_size": command.cards}), "flag"
    card = _card(command.profile, config.model.device)
    if command.host:
        card = replace(card, host_bytes=size_bytes(command.host))
    found = planning.forecast(planning.without_weights(config), card, _fixed(origins), num_cards=command.cards)
    if command.json:
        print(json.dumps(planning.as_json(found, origins), indent=2))
    else:
        planning.print_forecast(found, origins, explain=command.explain)
    if found.result.best is None:
        raise DoesNotFit(planning.verdict(found))


def _measure(config: EvaluateConfig) -> None:
    from trainer.evaluate import EVALUATION, evaluate, print_table

    print_table(evaluate(config))
    directory = config.run if config.run.is_dir() else config.run.parent
    print(f"evaluation: {directory / EVALUATION}\npictures: {directory / 'before-after.png'}")


def _evaluate(argv: Sequence[str]) -> None:
    _measure(_parse(EvaluateConfig, _positional(argv, "--run"), "evaluate"))


def _generate(argv: Sequence[str]) -> None:
    config = _parse(GenerateConfig, argv, "generate")
    from trainer.generate import generate

    for path in generate(config):
        print(path)


def _report(argv: Sequence[str]) -> None:
    command = _parse(ReportCommand, _positional(argv, "--run"), "report")
    from trainer.report import write_report

    print(write_report(command.run, command.out))


def _export(argv: Sequence[str]) -> None:
    command = _parse(ExportCommand, _positional(argv, "--eraser"), "export")
    from trainer.eraser_files import load_eraser, save_released

    eraser = load_eraser(command.eraser)
    save_released(command.out, eraser.state, eraser.rank)
    print(command.out)


def _forget(argv: Sequence[str]) -> None:
    resume = _early(argv, "--resume")
    base = read_forget_config(Path(resume)) if resume else ForgetConfig()
    command = _parse(ForgetCommand, argv, "forget", ForgetCommand(settings=base))
    origins = {path: "flag" if path.split(".")[-1] in _given(argv) else f"run {resume}" if resume else "default"
               for path in settings.leaves(command.settings)}
    from trainer.projection import forget
    from trainer.projection_evaluate import EVALUATION, print_forgetting

    run_dir, result = forget(command.settings, origins, resume=command.resume)
    print_forgetting(result)
    print(f"lora: {run_dir / 'adapter_model.safetensors'}\nevaluation: {run_dir / EVALUATION}\nrun: {run_dir}")


def _diagnose(argv: Sequence[str]) -> None:
    argv = _positional(argv, "--target")
    if {"--target", "--help", "-h"} & {word.split("=", 1)[0] for word in argv}:
        command = _parse(DiagnoseCommand, argv, "diagnose")
        config = None
    else:
        command = DiagnoseCommand(json="--json" in argv)
        config = resolve([word for word in argv if word != "--json"])[0].settings
    from trainer.diagnose import diagnose_path, diagnose_settings
    from trainer.findings import print_bill

    bill = diagnose_path(command.target) if config is None else diagnose_settings(config)
    print_bill(bill, sys.stdout, as_json=command.json)
    bill.raise_if_fatal("diagnosis")


def _doctor(argv: Sequence[str]) -> None:
    command = _parse(DoctorCommand, argv, "doctor")
    from trainer.doctor import examine, raise_if_unfit, show

    checks = examine()
    show(checks, sys.stdout, as_json=command.json)
    raise_if_unfit(checks)


def _positional(argv: Sequence[str], flag: str) -> list[str]:
    """`evaluate RUN` is `evaluate --run RUN`."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else list(argv)
