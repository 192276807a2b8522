"""`run.py report RUN`: what a run was, in one HTML file that needs nothing else, no network either."""

import base64
import io
import json
import logging
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from memory.cards import GIB, size_text, size_unit
from trainer.charts import bars, heat_map, line_chart, number, share_bar, stacked_area
from trainer.config import TrainConfig, leaves
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.findings import evidence_text
from trainer.page import note, section, side_by_side, table
from trainer.projection_config import ForgetConfig
from trainer.report_evaluation import answers, attempts, evaluation
from trainer.run_directory import resuming
from trainer.run_files import PICTURES, RunFiles, nested, read_bytes, write_whole

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_PICTURE_WIDTH = 1600  # as wide as a page shows it; the sheets of large videos are several times that
_CURVES = {"loss": "L, the whole", "unlearn": "L_unlearn", "loc": "L_loc", "pre": "L_pre", "forget": "L_forget",
           "preserve": "L_preserve", "weight": "L_weight",
           "gradient_norm": "Gradient norm", "lr": "Learning rate"}
_NORMS = {"gradient": "Gradient norm by block", "update": "Update norm by block", "weight": "Weight norm by block",
          "eraser": "Eraser output by block", "residual": "Residual stream by block"}
logger = logging.getLogger(__name__)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`, and return its path.

    Raises CheckpointError if `run` is no run directory, InputOutputError if the file cannot be written.
    """
    files, out = RunFiles.read(run), out or run / REPORT
    if out.name in ("", "-"):  # a page is for a browser, not for a pipe
        raise UsageError(f"--out {out}: name a file, such as {REPORT}")
    builders = (_tiles, _unfinished, _findings, evaluation, answers, attempts, _pictures, _losses, _norms, _time, _memory, _settings)
    page = string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_title(files), subtitle=_subtitle(files), body="\n".join(_built(builder, files) for builder in builders))
    try:
        if not out.parent.exists():
            out.parent.mkdir(parents=True)
        write_whole(out, page.encode(errors="replace").decode())  # the run's name may be no text
    except OSError as e:
        raise InputOutputError(f"{out} cannot be written ({e.strerror}); choose another --out") from e
    return out


def _built(builder: Callable[[RunFiles], str], files: RunFiles) -> str:
    """A section, or a note where the run's files are not what they should be: the rest can still be read."""
    try:
        return builder(files)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        logger.warning("%s: a part of the report cannot be shown (%s: %s)", files.path, type(e).__name__, e)
        title = builder.__name__.strip("_").capitalize()
        return section(title, note(f"Cannot be shown: {type(e).__name__}: {e}"))


def _title(files: RunFiles) -> str:
    if files.forgets:  # the settings need not name the class
        named = files.config.get("concept"), files.evaluation.get("concept"), files.setting("forget")  # older runs lack the first
        verb, concept = "Forgetting", next(filter(None, named), None)
    else:
        verb, concept = "Erasing", files.setting("data.concept")
    return escape(f"{verb} {concept}" if concept else f"Run {files.path.resolve().name}")


def _subtitle(files: RunFiles) -> str:
    if files.forgets:
        name, rank = f"{files.setting('encoder')}, {files.setting('model')}", files.setting("rank")
    else:
        name = files.setting("model.model") or nested(files.config, "base_model", "name") or "unknown model"
        rank = files.setting("optim.rank")
    return escape(f"{name} · rank {rank or '?'} · run {files.path.resolve().name}")


def _tiles(files: RunFiles) -> str:
    done, planned = files.num_steps(), files.setting("optim.steps")
    shown = [("Steps", f"{done} of {planned}" if planned else str(done))]
    if target := files.evaluation.get("target"):
        concept, measure, rater = (files.evaluation.get(name, "") for name in ("concept", "measure", "rater"))
        shown.append((f"Examples of “{concept}” taken for it ({measure})" if measure else
                      f"Videos that show “{concept}”" + f", by {rater}" * bool(rater),
                      f"{target['before']:.0%} → {target['after']:.0%}"))
    losses = [r["loss"] for r in files.records if "loss" in r]
    if losses:
        finite = [loss for loss in losses[-20:] if math.isfinite(loss)]  # NaN has no place in an order
        shown.append(("Loss, median of the last 20 steps", number(median(finite or losses[-1:]))))
    seconds = [r["seconds"] for r in files.records[3:] if "seconds" in r]
    if seconds:
        scale, unit = _time_unit(seconds)
        shown.append((f"{unit} a step, median", f"{scale * median(seconds):.3g}"))
        if predicted := nested(files.memory, "predicted", "step_seconds"):
            shown.append((f"{unit} a step, predicted", f"{scale * predicted:.3g}"))
    if measured := _measured_peak(files):
        shown.append((f"Peak memory, measured ({measured[0]})", size_text(measured[1])))
    if predicted := files.memory.get("predicted", {}).get("peak_bytes"):
        which = "predicted (tensors alone)" if measured and measured[0] == "process" else "predicted"
        shown.append((f"Peak memory, {which}", size_text(predicted)))
    return '<div class="tiles">' + "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b></div>" for label, value in shown) + "</div>"


def _unfinished(files: RunFiles) -> str:
    """How a run with steps left goes on; nothing for one that a fatal finding stopped, which has a fix of its own."""
    left = "target" not in files.evaluation if files.forgets else files.num_steps() < (files.setting("optim.steps") or 0)
    if not left or any(f.get("severity") == "fatal" for f in files.findings.get("findings", [])):
        return ""
    from trainer.checkpoint import latest_checkpoint  # which imports torch

    with suppress(CheckpointError, InputOutputError):  # none is good, or can be read; diagnose says why
        if checkpoint := latest_checkpoint(files.path, rename_bad=False):
            return note(f"This run is not at its end. Unless it is still running, {resuming(files.path)} goes on from step "
                        f"{checkpoint.step}.")
    return ""


def _findings(files: RunFiles) -> str:
    found, checked = files.findings.get("findings", []), files.findings.get("checked", [])
    if not files.findings:
        return section("Findings", note("This run has no findings.json: nothing was checked."))
    severe = [f for f in found if f.get("severity") != "expected"]
    parts = [] if severe else ['<p class="good">● Healthy.</p>']
    if found:
        parts.append(table(("Finding", "Where", "Evidence", "Cause", "Fix"), [
            (f'<b class="{escape(str(f.get("severity")))}">{escape(str(f.get("code")))}</b><br>'
             f'{escape(str(f.get("severity")))}', escape(_where(f)), escape(evidence_text(f.get("evidence") or {})),
             re.sub("`(.+?)`", r"<code>\1</code>", escape(str(f.get("cause", "")))), f"<code>{escape(str(f.get('fix', '')))}</code>") for f in found], stacked=True))
    if checked:
        items = "".join(f"<li>{escape(str(c))}</li>" for c in checked)
        parts.append(f"<details><summary>What was checked ({len(checked)})</summary><ul>{items}</ul></details>")
    return section("Findings", *parts)


def _where(finding: Mapping[str, Any]) -> str:
    block = finding.get("block")
    parts = (finding.get("phase"), f"block {block}" if block is not None else None, finding.get("module"))
    return ", ".join(str(part) for part in parts if part)


def _pictures(files: RunFiles) -> str:
    """Samples; nothing for runs of `forget`, which make no videos."""
    if files.forgets:
        return ""
    ends = dict.fromkeys(files.samples[:1] + files.samples[-1:])
    chosen = [(f"Sample at step {int(path.stem.removeprefix('step-'))}", path) for path in ends]
    if (sheet := files.path / PICTURES).exists():
        chosen.insert(0, ("Before and after, from the same noise", sheet))
    figures = [figure for caption, path in chosen if (figure := _figure(caption, path))]
    return section("Samples", side_by_side(figures, "No sample can be read." if chosen else "No samples in this run directory."))


def _figure(caption: str, path: Path) -> str:
    from PIL import Image

    try:
        data = read_bytes(path)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width > _PICTURE_WIDTH:
                picture.thumbnail((_PICTURE_WIDTH, picture.height))
                picture.save(smaller := io.BytesIO(), "PNG")
                data = smaller.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        logger.warning("%s: left out of the report (%s)", path, e)
        return ""
    return (f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{escape(caption)}" '
            f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>')


def _losses(files: RunFiles) -> str:
    charts = [line_chart(label, points, smooth=1 if key == "lr" else 20) for key, label in _CURVES.items()
              if (points := files.series(key))]
    return section("Losses", side_by_side(charts, "No records."))


def _norms(files: RunFiles) -> str:
    """Norms by block; nothing for runs of `forget`, which train none."""
    if files.forgets:
        return ""
    maps = []
    for key, label in _NORMS.items():
        measured = [(r["step"] + 1, r["blocks"][key]) for r in files.records if r.get("blocks", {}).get(key)]
        if measured:
            maps.append(heat_map(label, [step for step, _ in measured], [norms for _, norms in measured]))
    return section("Norms by block over time", *maps or [note("No norms by block in the records.")],
                    note("First block at the bottom, last at the top. Red is zero, magenta is not finite.") if maps else "")


def _time(files: RunFiles) -> str:
    splits = [r["phase_seconds"] for r in files.records if r.get("phase_seconds")][3:]
    charts = []
    if splits:
        names = dict.fromkeys(name for s in splits for name in s)
        charts.append(share_bar("Share of a step, without the first three",
                                {name: sum(s.get(name, 0.0) for s in splits) for name in names}))
    if points := files.series("seconds"):
        scale, unit = _time_unit([seconds for _, seconds in points])
        charts.append(line_chart(f"{unit} a step", [(step, scale * seconds) for step, seconds in points]))
    return section("Step time", side_by_side(charts, "No records."))


def _time_unit(seconds: Sequence[float]) -> tuple[float, str]:
    """(units a second, the unit's name) in which steps of that time are read best, as in the live view."""
    return (1.0, "Seconds") if median(seconds) >= 0.1 else (1e3, "Milliseconds")


def _measured_peak(files: RunFiles) -> tuple[str, float] | None:
    """(what was measured, bytes): on a card what was allocated at most, otherwise the process."""
    by_phase = files.measured_peaks()
    if by_phase:
        return _measured_kind(files), max(by_phase.values())
    for key, label in (("reserved_bytes", "reserved"), ("process_bytes", "process")):
        if points := files.series("memory", key):
            return label, max(value for _, value in points)
    return None


def _measured_kind(files: RunFiles) -> str:
    """What peaks by phase are of."""
    return "allocated" if files.series("memory", "allocated_bytes") else "process"


def _memory(files: RunFiles) -> str:
    predicted, parts, charts = files.memory.get("predicted", {}), [], []
    if timeline := predicted.get("timeline"):
        parts.append(stacked_area("One step by category, predicted",
                                  [dict(zip(predicted["categories"], values)) for _, values in timeline],
                                  [phase for phase, _ in timeline]))
    rows: dict[str, dict[str, float]] = {}
    for label, peaks in (("predicted", predicted.get("peak_bytes_by_phase", {})),
                         (f"measured ({_measured_kind(files)})", files.measured_peaks())):
        for phase, value in peaks.items():
            rows.setdefault(phase, {})[label] = value
    if rows:
        charts.append(bars("Peak by phase, predicted and measured", rows))
    for key, label in (("allocated_bytes", "Allocated"), ("reserved_bytes", "Reserved"),
                       ("device_used_bytes", "Whole device"), ("process_bytes", "Host memory of the process")):
        if points := files.series("memory", key):
            scale, unit = size_unit(max(value for _, value in points))
            charts.append(line_chart(f"{label}, measured", [(x, y / scale) for x, y in points], unit=unit, zero=True))
    parts.append(side_by_side(charts, "Nothing was measured."))
    if needed := predicted.get("needed_bytes"):
        card, budget = str(files.memory.get("card")), files.memory.get("budget_bytes", 0)
        besides = "interpreter and libraries (assumed)" if card == "cpu" else "what the allocator reserves and the card's context"
        parts.append(note(f"Predicted for {card}: {needed / GIB:.2f} GiB of {budget / GIB:.2f} GiB usable, {besides} included."))
    if rows and _measured_kind(files) == "process":
        parts.append(note("Without a card the whole process is measured, interpreter and libraries included; by phase, what is predicted "
                          "are the run's own tensors."))
    if not predicted:
        parts.append(note("No prediction is stored with this run."))
    return section("Memory", *parts)


def _settings(files: RunFiles) -> str:
    config, origins = files.config.get("config", {}), files.config.get("origins", {})
    if not config:
        return section("Settings", note("config.json is missing or damaged."))
    defaults, found, rows = leaves(ForgetConfig() if files.forgets else TrainConfig()), {}, []
    for name, value in config.items():
        found |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    for path, value in found.items():
        known = path in defaults and json.dumps(value) == json.dumps(defaults[path], default=str)
        rows.append(f'<tr{"" if known else " class=set"}><td><code>{escape(path)}</code></td>'
                    f"<td><code>{escape(json.dumps(value, ensure_ascii=False))}</code></td>"
                    f"<td>{escape(str(origins.get(path, 'default')))}</td></tr>")
    facts = {k: v for k, v in files.config.items() if k not in ("config", "origins")}
    return section("Settings", "<table class=settings><tr><th>setting</th><th>value</th><th>from</th></tr>", *rows, "</table>",
                    note("Bold: not the default."),
                    f"<details><summary>Facts about the run</summary><pre><code>"
                    f"{escape(json.dumps(facts, indent=2, ensure_ascii=False))}</code></pre></details>")
