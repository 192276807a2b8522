"""`run.py diagnose`: findings from a run directory, from a weights file, or from a pre-flight of given settings."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from trainer.assemble import assemble, embed_prompts, open_training
from trainer.checkpoint import latest_checkpoint
from trainer.config import TrainConfig, leaves
from trainer.eraser_files import WEIGHTS, EraserFile, load_eraser
from trainer.errors import CheckpointError, InputOutputError
from trainer.findings import Bill, Finding, finding, from_json
from trainer.inspection import Subject
from trainer.lora import WEIGHTS as LORA, load_updates
from trainer.preflight import Preflight
from trainer.projection_config import read_forget_config
from trainer.projection_health import unsound
from trainer.records import Judge, non_finite
from trainer.run_directory import read_config, read_content, resuming
from trainer.run_files import CONFIG, FINDINGS, MEMORY, METRICS, nested, read_bytes, read_metrics, read_object

logger = logging.getLogger(__name__)


def diagnose_path(path: Path) -> Bill:
    """The bill of a run directory or of an eraser file. Raises CheckpointError for anything else."""
    if any((path / name).is_file() for name in (CONFIG, FINDINGS)):  # a run that the pre-flight stopped has no config
        return diagnose_run(path)
    return diagnose_eraser(path)


def diagnose_run(run_dir: Path) -> Bill:
    """What the run itself found, what its metrics say, and its eraser. Raises CheckpointError for a file that is damaged,
    InputOutputError for one that cannot be read."""
    checked, bill = _whole(run_dir), Bill()
    try:
        found, written = read_bytes(run_dir / FINDINGS) if (run_dir / FINDINGS).exists() else None, read_metrics(run_dir)
    except OSError as e:
        raise InputOutputError(f"{e.filename}: cannot be read ({e.strerror})") from e
    if found is None:
        logger.warning("%s: there is no %s, which a run writes before its first step: it was removed, or the disk was full then; what the run itself "
                       "found is not known", run_dir, FINDINGS)
    else:
        try:
            content = json.loads(found)
            bill = Bill(findings=tuple(from_json(f) for f in content["findings"]))
            checked += [f"during the run: {line}" for line in content["checked"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{run_dir / FINDINGS} cannot be read ({e})") from e
    records = [record for record in written if "blocks" in record]
    try:
        judge = Judge(nested(read_object(run_dir / MEMORY), "predicted", "step_seconds"))
        bill = bill.with_findings(_judged(records, judge, named=bool(bill.fatal)))
        if records:
            checked.append(f"{METRICS}: {len(records)} steps, loss terms, gradients, updates and erasers by block")
        elif written:  # a run of `forget`, which has no blocks
            checked.append(f"{METRICS}: {len(written)} steps, loss terms and gradients")
            bill = bill.with_findings(unsound(code, step=record["step"] + 1) for record in written
                                      for name, code in (("loss", "non-finite-loss"), ("gradient_norm", "non-finite-gradient"))
                                      if not math.isfinite(record.get(name, 0.0)))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise CheckpointError(f"{run_dir / METRICS} is not what a run writes ({e!r})") from e
    if (run_dir / WEIGHTS).is_file():
        eraser = diagnose_eraser(run_dir)
        bill, checked = bill.with_findings(eraser.findings), [*checked, *eraser.checked]
    return Bill(findings=bill.findings, checked=tuple(checked))


def _whole(run_dir: Path) -> list[str]:
    """What was checked of the files that the run would go on from, and of its LoRA. Raises CheckpointError for one that is damaged."""
    checked = []
    if (run_dir / CONFIG).exists():
        content = read_content(run_dir)
        config = read_forget_config(run_dir) if content.get("command") == "forget" else read_config(run_dir)[0]
        absent = [path for path, value in leaves(config).items() if value is not None and nested(content, "config", *path.split(".")) is None]
        defaults = f"; {len(absent)} are not there, and taken at their defaults: {', '.join(absent)}" if absent else ""
        checked.append(f"{CONFIG}: settings, all known{defaults}")
    steps = [int(p.name[5:]) for p in (run_dir / "ckpt").glob("step-*") if p.name[5:].isdecimal()]
    if sound := latest_checkpoint(run_dir, rename_bad=False):  # it says what is wrong with those that it passes over
        if sound.step < max(steps, default=0):
            raise CheckpointError(f"{run_dir}: the checkpoint of step {max(steps)} is damaged; {resuming(run_dir)} would go on "
                                  f"from step {sound.step}")
        checked.append(f"{sound.path.relative_to(run_dir)}: every byte is what was written")
    if (run_dir / LORA).is_file():
        checked.append(f"{LORA}: a LoRA of {', '.join(load_updates(run_dir))}")
    if (run_dir / CONFIG).exists() and not sound and not any((run_dir / name).is_file() for name in (WEIGHTS, LORA)):
        logger.warning("%s: nothing was saved so far, no checkpoint and no weights", run_dir)
    return checked


def _judged(records: Sequence[dict], judge: Judge, *, named: bool) -> list[Finding]:
    """`named`: the run itself said what stopped it, of which a record that is not finite only shows what followed."""
    found = []
    for record in records:
        gradients = () if record.get("skipped") else record["blocks"]["gradient"]
        if not all(map(math.isfinite, [record["loss"], *gradients])):
            found += [] if named else [non_finite(record)]
        else:
            found += judge.see(record)
    return found


def diagnose_eraser(path: Path) -> Bill:
    """The bill of saved weights: finite, stored in float32, doing something in every block."""
    file = load_eraser(path)
    found = []
    for name, tensor in file.state.items():
        if not torch.isfinite(tensor).all():
            block = int(name.split(".")[0])
            found.append(finding("non-finite-weight", "adapters", block=block, module=name, num_elements=tensor.numel(),
                                 num_non_finite=int((~torch.isfinite(tensor)).sum()), file=file.path.name))
            break
    idle = [i for i in range(file.num_blocks)
            if not file.state[f"{i}.up.weight"].any() and not file.state[f"{i}.up.bias"].any()]
    if idle:
        found.append(finding("no-op-adapter", "adapters", block=idle[0], module=f"{idle[0]}.up", num_blocks=len(idle),
                             of_blocks=file.num_blocks, largest_up_weight=0.0))
    found += _stored(file)
    return Bill(findings=tuple(found), checked=(
        f"{file.path.name}: {file.num_blocks} blocks of width {file.width} and rank {file.rank}; whether all is finite, "
        f"{'stored in float32, ' if file.path.suffix == '.safetensors' else ''}and every block's `up` away from zero",))


def _stored(file: EraserFile) -> list[Finding]:
    """Half precision on disk has rounded the weights for good; only our own layout says how it is stored."""
    if file.path.suffix != ".safetensors":
        return []
    with safe_open(file.path, framework="pt") as f:
        dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}
    halves = [name for name, dtype in dtypes.items() if dtype != "F32"]
    if not halves:
        return []
    found = finding("half-precision-adapters", "adapters", severity="warning", block=int(halves[0].split(".")[0]), module=halves[0],
                    dtype=dtypes[halves[0]], num_parameters=len(halves))
    return [replace(found, cause="the file holds rounded weights: a run writes float32, and something converted them",
                    fix="take the file that the run wrote; all that reads this one makes float32 of it, without what was rounded away")]


def diagnose_settings(config: TrainConfig) -> Bill:
    """The bill of the pre-flight that a training run with these settings would begin with."""
    subject = prepare(config)
    with subject.assembly:
        return Preflight(subject).run()


def prepare(config: TrainConfig) -> Subject:
    """The parts of a training step, as the training loop has them. Raises UsageError for what cannot be trained."""
    backbone, prompts, columns = open_training(config)
    embeddings = embed_prompts(backbone, config.model, config.memory, prompts.texts)
    assembly = assemble(backbone, config.model, config.memory, rank=config.optim.rank, seed=config.optim.seed)
    return Subject.of(config, backbone, assembly, prompts, embeddings.to(assembly.device), columns)
