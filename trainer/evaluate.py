"""Is the concept gone, and is the rest still there? Every video is generated twice from the same noise: with the erasers off (before) and
on (after). What videos show, a rule reads on the bundled model, and a CLIP model on any.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from memory.cards import Card
from trainer import by_clip, by_rule
from trainer.assemble import chosen_device, is_bundled, require_real
from trainer.eraser_files import load_eraser
from trainer.errors import InputOutputError, UsageError
from trainer.lock import RunLock
from trainer.run_directory import probe
from trainer.run_files import CONFIG, EVALUATION, PICTURES, nested, write_json
from trainer.shapes import world
from trainer.video import contact_sheet
from trainer.video_config import EvaluateConfig

_BUNDLED = {"num_videos": 64, "num_steps": 16, "guidance_scale": 1.0}
_OTHERS = {"num_videos": 8, "num_steps": 50, "guidance_scale": 6.0}  # a video takes minutes; as `generate`


def evaluate(config: EvaluateConfig, card: Card | None = None) -> dict[str, Any]:
    """Measure a run or an eraser file and write evaluation.json, a sheet of samples beside it; returns the content. With a rater, as many
    blocks are resident as `card` holds; None: as configured."""
    require_real(config.memory)
    chosen_device(config.model.device)  # or it would be said after all that is said before videos are made
    eraser = load_eraser(config.run)
    model, directory = eraser.model(config.model), eraser.path.parent
    own = nested(eraser.training, "data", "concept")
    concept = config.concept or own
    if concept is None:
        raise UsageError(f"{config.run} does not say which concept it erases; name it with --concept")
    usual = _BUNDLED if config.rater is None or is_bundled(model) else _OTHERS
    config = replace(config, **{name: value for name, value in usual.items() if getattr(config, name) is None})
    try:
        probe(directory)  # before minutes of measuring
    except OSError as e:
        raise InputOutputError(f"{directory / EVALUATION} cannot be written ({e.strerror}); measure a copy of {eraser.path.name} and its "
                               "description in a place that can be") from e
    with RunLock(directory) if (directory / CONFIG).is_file() else nullcontext():  # a run that goes on would make another eraser meanwhile
        if config.rater is None:
            result, sheet = by_rule.measured(config, model, concept, own=own)
        else:
            result, sheet = by_clip.measured(config, model, concept, card, eraser=eraser)
        result = {"concept": concept, **result, **{name: getattr(config, name) for name in usual}}
        write_json(directory / EVALUATION, result)
        contact_sheet(directory / PICTURES, sheet, advice="make room there")
    return result


def print_table(result: dict[str, Any]) -> None:
    """The evaluation as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rater = result.get("rater")
    by = f" ({rater}, zero-shot, chance {result['chance']:.1%})" if rater else ""
    table = Table(title=Text(f"erased: {result['concept']}{by}; videos that show what is named, before and after"), title_justify="left")
    for column, justify in (("", "left"), ("kind", "left"), ("videos", "right"), ("before", "right"), ("after", "right"),
                            ("after, 95 %", "right"), *[("cosine", "right")] * bool(rater)):
        table.add_column(column, justify=justify)

    def add(label: str, kind: str, row: dict[str, Any], style: str | None = None) -> None:
        low, high = row["after_interval"]
        cosine = ["{before:.3f} → {after:.3f}".format(**row["cosine"])] if rater else []
        table.add_row(Text(label), kind, str(row["num_videos"]), f"{row['before']:.1%}", f"{row['after']:.1%}",
                      f"{low:.1%} to {high:.1%}", *cosine, style=style)

    add(result["target"]["name"], "target" if rater else f"target {world.kind_of(result['concept'])[0]}", result["target"], "bold")
    if synonyms := result["synonyms"]:
        add(", ".join(synonyms["names"]), "synonyms", synonyms, "bold")
    for row in result["preserved"]:
        add(row["name"], row["kind"], row)
    if motion := result["motion"]:
        table.add_row("motion", "pixels a video", "", f"{motion['before']:.1f}", f"{motion['after']:.1f}")
    if distance := result["distance"]:
        table.add_row("distance of preserved videos", "RMS of 0..1", "", "", f"{distance['preserved_rms']:.3f}")
    Console(width=None if Console().is_terminal else 100).print(table)
