"""The command line: commands. Heavy imports wait until a command runs."""

import gc
import json
import logging
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memory.advice import flag_of
from memory.cards import Card, size_bytes
from memory.host import available_host_bytes
from memory.plan import PlanError
from trainer import config as settings
from trainer.arguments import chosen_card, early, fixed, given, in_flags, parse, positional, refuse_out, resolve
from trainer.commands import DiagnoseCommand, DoctorCommand, ExportCommand, PlanCommand, ReportCommand, TrainCommand
from trainer.config import TrainConfig
from trainer.errors import DoesNotFit, UsageError
from trainer.video_config import EvaluateConfig, GenerateConfig

if TYPE_CHECKING:
    from memory.assess import Assessment

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run one command line; raises what goes wrong."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train, "generate": _generate, "evaluate": _evaluate, "report": _report, "export": _export, "forget": _forget,
        "diagnose": _diagnose, "plan": _plan, "doctor": _doctor}
    command = _train
    if argv and not argv[0].startswith("-"):
        if argv[0] not in commands:
            raise UsageError(f"there is no command {argv[0]!r}; there are {', '.join(commands)} and bench (without one, run.py trains)")
        command, argv = commands[argv[0]], argv[1:]
    try:
        command(argv)
    except PlanError as e:
        raise UsageError(in_flags(e)) from e


def _card_here(command: TrainCommand) -> Card:
    """The card that is meant, with this machine's host memory: whatever card is planned for, the run is here."""
    card = chosen_card(command.profile, command.settings.model.device)
    return card if card.host_bytes is not None else replace(card, host_bytes=available_host_bytes())


def _planned(command: TrainCommand, origins: dict[str, str], card: Card, argv: Sequence[str]) -> tuple[TrainConfig, "Assessment | None"]:
    """The settings with the planner's memory plan, and what it predicts. On the CPU, and when a run goes on, there is a planner
    only where --profile is given."""
    config = command.settings
    if "profile" not in given(argv) and (card.is_cpu or command.resume):
        return config, None
    from trainer.assemble import chosen_device
    from trainer.distributed import shared
    from trainer.planning import planned

    chosen_device(config.model.device)  # the run's, whatever card is planned for: said before the planner's minutes
    config, chosen, assessment = planned(config, card, fixed(origins))
    origins |= {f"memory.{name}": f"profile {card.name}" for name in chosen}
    return shared(lambda: config), assessment  # every process the same plan


def _will_measure(config: TrainConfig) -> bool:
    """Whether a run is measured when it is done. Where it cannot be, that is said before the minutes that it takes."""
    if config.model.model != "shapes" or not config.output.evaluate:
        return False
    from trainer.by_rule import require_measurable

    try:
        require_measurable(config.data.concept, config.model)
    except UsageError as e:
        print(f"will not be measured: {e}", file=sys.stderr)
        return False
    return True


def _require_trainable(command: TrainCommand, resume: Path | None, card: Card) -> None:
    """Refuse what can be refused before the planner's minutes. `resume`: the run that goes on, by --resume or started again by torchrun."""
    from trainer.assemble import trainable_prompts
    from trainer.distributed import divided, num_ranks, on_main
    from trainer.metrics import require_tensorboard
    from trainer.planning import require_sense
    from trainer.run_directory import require_place
    from trainer.state import require_kept

    config = command.settings
    if command.resume:
        require_kept(command.resume, config)
    elif resume is None:
        on_main(require_place, config.output.out)
    trainable_prompts(config)
    if config.output.tensorboard:
        require_tensorboard()
    divided(config.data.batch_size, num_ranks(), "processes", kept=command.resume is not None)
    if config.memory.num_shards not in (1, num_ranks()):
        raise UsageError(f"--num-shards {config.memory.num_shards}: all processes of a run share its blocks, here {num_ranks()}; start "
                         f"with torchrun --nproc-per-node={config.memory.num_shards} -- run.py …, or say --num-shards 1")
    if not command.resume and not card.is_cpu:
        require_sense(config)


def _train(argv: Sequence[str]) -> None:
    command, origins = resolve(argv)
    config, card = command.settings, _card_here(command)
    from trainer.distributed import joined, num_ranks
    from trainer.loop import train
    from trainer.memory_file import MemoryForecast
    from trainer.planning import forecast_as_given, require_room, require_sense
    from trainer.recovery import train_in_memory
    from trainer.run_directory import program, restarted_run

    with joined(config.model.device) as rank:
        resume = command.resume or restarted_run(config)
        _require_trainable(command, resume, card)
        config, assessment = _planned(command, origins, card, argv)
        if not command.resume and card.is_cpu:
            assessment = assessment or forecast_as_given(config, card)
            require_sense(config, assessment)
            require_room(config, card, assessment)  # where memory runs out, the system ends the process without a word
        measures = not rank and _will_measure(config)
        if config.optim.warmup > config.optim.steps and origins["optim.warmup"] != "default" and not command.resume:
            logger.warning("--warmup %d: the run ends after %d --steps, at %.2g of --lr", config.optim.warmup, config.optim.steps,
                           config.optim.steps / config.optim.warmup)
        run_dir = train_in_memory(partial(train, forecast=MemoryForecast(card, assessment)), config, origins, card=card,
                                  resume=resume, step_down=command.on_oom == "step-down", command=(*program(num_ranks()), *argv))
    if not rank:  # the first process speaks for all
        _after_training(run_dir, resumed=command.resume is not None, measures=measures)


def _after_training(run_dir: Path, *, resumed: bool, measures: bool) -> None:
    """Say what the run has left, and measure it."""
    from trainer.run_directory import read_config
    from trainer.run_files import EVALUATION

    config, content = read_config(run_dir)
    untouched = resumed and content["first_step"] >= config.optim.steps
    if untouched:
        more = "--steps asks for more" if config.optim.schedule == "constant" else f"a {config.optim.schedule} schedule ends there"
        print(f"nothing was left to train: {run_dir} has its {config.optim.steps} steps; {more}", file=sys.stderr)
    evaluating = shlex.join(["python", "run.py", "evaluate", str(run_dir)])  # to be pasted
    print(f"eraser: {run_dir / 'eraser.safetensors'}")
    print(f"run: {run_dir}", flush=True)  # whatever becomes of the measurement
    if measures and untouched and (run_dir / EVALUATION).exists():
        print(f"nothing was left to measure: {run_dir / EVALUATION} is there; {evaluating} measures anew", file=sys.stderr)
    elif measures:
        _measure(EvaluateConfig(run=run_dir, model=config.model))
    elif config.output.evaluate and config.model.model != "shapes" and config.model.weights != "random":
        print(f"whether it erases: {evaluating} --rater openai/clip-vit-large-patch14", file=sys.stderr)


def _plan(argv: Sequence[str]) -> None:
    if "resume" in given(argv):
        raise UsageError("--resume: plan looks at new runs; `report RUN` shows what a run was predicted to need, and --resume RUN --profile NAME "
                         "(without plan) plans it anew and goes on")
    command, origins = resolve(argv, PlanCommand)
    gc.disable()  # a tenth of the time, and nothing to collect
    try:
        _forecast(command, origins)
    finally:
        gc.enable()


def _forecast(command: PlanCommand, origins: dict[str, str]) -> None:
    from trainer import forecast_text, planning

    config = command.settings
    if command.cards > config.data.batch_size and origins["data.batch_size"] == "default":  # the least that can be divided
        config, origins["data.batch_size"] = settings.replaced(config, {"data.batch_size": command.cards}), "flag"
    card, device = chosen_card(command.profile, config.model.device), config.model.device
    if command.profile != "auto" and device != "auto" and card.is_cpu != (device == "cpu"):
        raise UsageError(f"--device {device} beside --profile {command.profile}: the plan is for the latter, and training would run on the "
                         "former; leave one of the two out")
    if command.host:
        free = size_bytes(command.host)
        own = {"capacity_bytes": free, "usable_bytes": free} if card.unified else {}
        card = replace(card, host_bytes=free, **own)
    found = planning.forecast(config, card, fixed(origins), num_cards=command.cards)
    if command.json:
        print(json.dumps(forecast_text.as_json(found, origins), indent=2))
    else:
        forecast_text.print_forecast(found, origins, explain=command.explain)
    if found.result.best is None:
        raise DoesNotFit(planning.verdict(found))
    if card.is_cpu and (command.profile, device) == ("auto", "auto") and found.chosen.time.seconds > planning.LONG_STEP:
        print("there is no CUDA card here, so this is planned for the CPU; --profile 4090, say, plans for a card", file=sys.stderr)


def _measure(config: EvaluateConfig, by_flag: Collection[str] = ()) -> None:
    from trainer.evaluate import evaluate, print_table
    from trainer.generate import as_trained
    from trainer.run_files import EVALUATION, PICTURES

    config = as_trained(config, config.run, by_flag, of_its_size=config.rater is not None)  # a rule is for the model's own size
    print_table(evaluate(config, None if "resident_blocks" in by_flag else chosen_card("auto", config.model.device)))
    directory = config.run if config.run.is_dir() else config.run.parent
    print(f"evaluation: {directory / EVALUATION}\npictures: {directory / PICTURES}")


def _evaluate(argv: Sequence[str]) -> None:
    _measure(parse(EvaluateConfig, argv, "evaluate", named="--run"), given(argv))


def _generate(argv: Sequence[str]) -> None:
    config = parse(GenerateConfig, argv, "generate")
    from trainer.generate import as_trained, generate

    config = as_trained(config, config.eraser, given(argv))
    generate(config, chosen_card("auto", config.model.device), fill="resident_blocks" not in given(argv),
             written=partial(print, flush=True))  # what an interruption leaves is named, too


def _report(argv: Sequence[str]) -> None:
    command = parse(ReportCommand, argv, "report", named="--run")
    from trainer.report import write_report

    print(write_report(command.run, command.out))


def _export(argv: Sequence[str]) -> None:
    command = parse(ExportCommand, argv, "export", named="--eraser")
    from trainer.eraser_files import load_eraser, save_released

    eraser = load_eraser(command.eraser)
    eraser.require_finite()  # nobody could apply it
    save_released(command.out, eraser.state, eraser.rank)
    print(command.out)


def _forget(argv: Sequence[str]) -> None:
    from trainer.projection_config import ForgetCommand, ForgetConfig, read_forget_config

    resume = early(argv, "--resume")
    if resume:
        refuse_out(argv)
    base = read_forget_config(settings.expanded(resume)) if resume else ForgetConfig()
    command = parse(ForgetCommand, argv, "forget", ForgetCommand(settings=base))
    origins = {path: "flag" if path.split(".")[-1] in given(argv) else f"run {resume}" if resume else "default"
               for path in settings.leaves(command.settings)}
    if "num_images" in given(argv) and not command.settings.draws_pictures:
        raise UsageError(f"--num-images {command.settings.num_images}: counts pictures of the bundled world, and none are drawn here; leave it out")
    from trainer.projection import forget
    from trainer.projection_evaluate import print_forgetting
    from trainer.run_files import EVALUATION

    run_dir, result = forget(command.settings, origins, resume=command.resume)
    print_forgetting(result)
    print(f"lora: {run_dir / 'adapter_model.safetensors'}\nevaluation: {run_dir / EVALUATION}\nrun: {run_dir}")


def _diagnose(argv: Sequence[str]) -> None:
    as_json = "--json" in argv
    argv = positional([word for word in argv if word != "--json"], "--target", last=False)
    if "target" in given(argv) and (beside := given(argv) & {path.split(".")[-1] for path in settings.leaves(TrainCommand())}):
        raise UsageError(f"{flag_of(min(beside))}: `diagnose RUN` looks at what is there, and takes no settings; leave one of the two out")
    if {"--target", "--help", "-h"} & {word.split("=", 1)[0] for word in argv}:
        target, config = parse(DiagnoseCommand, argv, "diagnose").target, None
    else:
        if "on_oom" in given(argv):
            raise UsageError("--on-oom: diagnose looks at one step and goes on from none; leave it out")
        if "resume" in given(argv):
            raise UsageError("--resume: diagnose goes on with no run; `diagnose RUN` looks at one")
        run, origins = resolve(argv)
        config, _ = _planned(run, origins, _card_here(run), argv)
    from trainer.diagnose import diagnose_path, diagnose_settings
    from trainer.findings import print_bill

    bill = diagnose_path(target) if config is None else diagnose_settings(config)
    print_bill(bill, sys.stdout, as_json=as_json)
    bill.raise_if_fatal("diagnosis")


def _doctor(argv: Sequence[str]) -> None:
    command = parse(DoctorCommand, argv, "doctor")
    from trainer.doctor import examine, raise_if_unfit, show

    checks = examine()
    show(checks, sys.stdout, as_json=command.json)
    raise_if_unfit(checks)
