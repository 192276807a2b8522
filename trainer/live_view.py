"""What the live view shows, as a function of plain values: no clock, no thread, no terminal.

Everything is text with colour, and reads without colour too: a dead block is a 0 in the strip, an exploding one a !.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from trainer.findings import blocks_text

LEVELS = "▁▂▃▄▅▆▇█"
TERMS = ("loss", "unlearn", "loc", "pre")
PHASES = {"teacher": ("█", "cyan"), "student": ("▓", "blue"), "backward": ("▒", "magenta"), "optimizer": ("░", "yellow"),
          "waiting for transfers": ("╳", "red")}
# A block's norm against the median over blocks and recent steps. Healthy models spread over one or two decades.
DEAD, EXPLODING = 1e-4, 1e2
_LABEL = 9  # columns of the labels
_WIDE = 130  # columns from which two panes fit beside each other
_TREND = 20  # steps, or as many as a trajectory has

Row = tuple[str, Text]


def view(state: Mapping[str, Any], width: int) -> RenderableType:
    """The whole view, `width` columns wide. `state`: what `Monitor.state` returns."""
    inner = (width - 3) // 2 if width >= _WIDE else width
    room = inner - _LABEL - 1
    numbers = [*_losses(state, room), *_strips(state["records"], room)]
    machine = [*_step_time(state["records"], room), *_memory(state, room), *_peaks(state["records"], room),
               *_host(state)]
    across = width - _LABEL - 1
    top = _lines([*_progress(state, across), *_health(state["findings"], across)], width)
    if width < _WIDE:
        return Group(*top, *_lines(numbers, width), *_lines(machine, width))
    panes = zip_longest(_lines(numbers, inner), _lines(machine, inner), fillvalue=Text(" " * inner))
    return Group(*top, *(left + Text("   ") + right for left, right in panes))


def _lines(rows: Sequence[Row], width: int) -> list[Text]:
    """The rows, each exactly `width` columns wide. No table of rich's, which takes longer to draw: where the host is what limits training,
    training waits for that."""
    lines = []
    for name, text in rows:
        label = Text(name, "bold")
        label.truncate(_LABEL, overflow="ellipsis", pad=True)
        lines.append(Text.assemble(label, " ", text, no_wrap=True))
        lines[-1].truncate(width, overflow="ellipsis", pad=True)
    return lines


def _flow(label: str, parts: Sequence[Text], room: int) -> list[Row]:
    """The parts beside each other, in as many rows as they need."""
    lines: list[Text] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= room:
            lines[-1].append("  ").append_text(part)
        else:
            lines.append(part.copy())
    return [(label if i == 0 else "", line) for i, line in enumerate(lines)]


def pace(seconds: float) -> str:
    """2.5 as 2.50 s/step, 0.0015 as 1.5 ms/step."""
    return f"{seconds_text(seconds)}/step"


def seconds_text(seconds: float) -> str:
    """2.5 as 2.50 s, 0.0015 as 1.5 ms."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def duration(seconds: float) -> str:
    """42 as 0:42, 4000 as 1:06:40, 400000 as 4 d 15:06:40."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def gib(num_bytes: float) -> str:
    """Bytes in GiB, without the unit."""
    return f"{num_bytes / 2**30:.{2 if num_bytes < 10 * 2**30 else 1}f}"


def _progress(state: Mapping[str, Any], room: int) -> list[Row]:
    done, total = state["done"], max(1, state["num_steps"])
    predicted = state["facts"].get("predicted_step_seconds")
    beside = f" ({seconds_text(predicted)} predicted)" if predicted else ""
    speed = [pace(state["seconds_per_step"]) + beside] if state["seconds_per_step"] else []
    eta = f"ETA {duration(state['eta'])}" if state["eta"] is not None else "ETA after warm-up"
    if state["stopping"]:
        eta = "stopping: this step, then saving"
    left, share, more = f"{done}/{total} ", f" {done / total:.0%}", [*speed, eta, f"elapsed {duration(state['elapsed'])}"]
    right = "  ".join((share, *more))
    fits = len(left) + 4 + len(right) <= room
    bar = max(4, room - len(left) - len(right if fits else share))
    filled = min(bar, round(bar * done / total))
    line = Text.assemble(left, ("━" * filled, "green"), ("╌" * (bar - filled), "bright_black"), right if fits else share)
    return [(state["title"], line), *_flow("", [] if fits else list(map(Text, more)), room)]


def _health(findings: Sequence[Mapping[str, Any]] | None, room: int) -> list[Row]:
    """`findings`: as `Finding.as_json` has them; None if nothing was checked."""
    if findings is None:
        return [("health", Text("not checked", "bright_black"))]
    parts = []
    for f, name in trouble(findings):
        mark, style = ("✗", "bold red") if f["severity"] == "fatal" else ("▲", "yellow")
        part = Text.assemble((f"{mark} {name}", style), f" {f.get('cause', '')}".rstrip())
        part.truncate(room, overflow="ellipsis")
        parts.append(part)
    return _flow("health", parts or [Text("● healthy", "green")], room)


def trouble(findings: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """(finding, its code and where) of what is not as expected; what several blocks have is one, the first of them."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for f in findings:
        if f["severity"] != "expected":
            groups.setdefault((f["severity"], f["code"]), []).append(f)
    places = {key: sorted(f["block"] for f in group if f.get("block") is not None) for key, group in groups.items()}
    return [(group[0], key[1] + (f" in {blocks_text(places[key])}" if places[key] else "")) for key, group in groups.items()]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values' course in `width` characters at most, each the mean of its share; gaps where nothing is finite."""
    width = min(width, len(values))
    means = []
    for i in range(width):
        part = values[i * len(values) // width:(i + 1) * len(values) // width]
        finite = [v for v in part if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [m for m in means if m is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    step = (high - low) / (len(LEVELS) - 1) or 1.0
    return "".join(" " if m is None else LEVELS[round((m - low) / step)] for m in means)


def trend(values: Sequence[float], period: int = 1) -> tuple[str, str]:
    """(text, style): the mean of the last steps against that of as many before. `period`: the steps of a trajectory, along which losses
    differ by timestep; only whole trajectories are compared."""
    span = min(max(_TREND, period), len(values) // 2) // period * period
    if span < 3:
        return "", ""
    before, now = sum(values[-2 * span:-span]), sum(values[-span:])
    if not math.isfinite(now):
        return "not finite", "bold red"
    if not math.isfinite(before) or before <= 0:
        return "", ""
    change = now / before - 1
    arrow, style = ("→", "") if abs(change) < 0.02 else ("↘", "green") if change < 0 else ("↗", "yellow")
    return (f"{arrow} x{now / before:.3g}" if change > 9 else f"{arrow} {change:+.0%}"), style


def _losses(state: Mapping[str, Any], room: int) -> list[Row]:
    rows, records = [], state["records"]
    for name, label in (*zip(TERMS, TERMS), ("gradient_norm", "gradient")):
        values = [float(r[name]) for r in records if isinstance(r.get(name), int | float)]
        if values:
            text, style = trend(values, state["facts"].get("trajectory_steps", 1))
            value = (f"{values[-1]:10.3e} ", "" if math.isfinite(values[-1]) else "bold red")
            line = sparkline(values, min(60, max(room - 23, min(8, room - 11))))
            more = ["  ", (text, style)] if len(line) + len(text) + 13 <= room else []
            rows.append((label, Text.assemble(value, (line, "cyan"), *more)))
    return rows


def block_strip(history: Sequence[Sequence[float]]) -> tuple[Text, list[int], list[int]]:
    """(strip with a character a block, dead blocks, exploding blocks) of the newest norms in `history`."""
    ordinary = sorted(v for norms in history for v in norms if math.isfinite(v) and v > 0)
    reference = ordinary[len(ordinary) // 2] if ordinary else 1.0
    cells, dead, exploding = [], [], []
    for block, norm in enumerate(history[-1]):
        if not math.isfinite(norm) or norm > EXPLODING * reference:
            exploding.append(block)
            cells.append(("!", "bold white on magenta"))
        elif norm < DEAD * reference:
            dead.append(block)
            cells.append(("0", "bold white on red"))
        else:  # the middle of the scale is the reference, an end two decades away
            level = round((math.log10(norm / reference) / 2 + 1) / 2 * (len(LEVELS) - 1))
            cells.append((LEVELS[min(len(LEVELS) - 1, max(0, level))], "green"))
    return _joined(cells), dead, exploding


def _joined(cells: Sequence[tuple[str, str]]) -> Text:
    """(character, style) of each column. Columns of one style are one span: rich takes its time for each."""
    return Text.assemble(*(("".join(c for c, _ in run), style) for style, run in groupby(cells, itemgetter(1))))


def _strips(records: Sequence[Mapping[str, Any]], room: int) -> list[Row]:
    rows = []
    for key in ("gradient", "update"):
        history = [r["blocks"][key] for r in records[-4 * _TREND:] if r.get("blocks", {}).get(key)]
        if not history:
            continue
        strip, dead, exploding = block_strip(history)
        finite = [v for v in history[-1] if math.isfinite(v)]
        notes = [(f"exploding: {blocks_text(exploding)}", "bold magenta")] if exploding else []
        notes += [(f"dead: {blocks_text(dead)}", "bold red")] if dead else []
        if finite and not notes:
            notes = [(f"{min(finite):.0e} … {max(finite):.0e}", "bright_black")]
        lines = [strip[i:i + room] for i in range(0, len(strip), room)]
        rows += _flow(key + "s", [*lines, *(Text(text, style) for text, style in notes)], room)
    if rows:
        rows.insert(0, ("", Text("norm by block, first to last", "bright_black")))
    return rows


def _step_time(records: Sequence[Mapping[str, Any]], room: int) -> list[Row]:
    splits = [r["phase_seconds"] for r in records[-_TREND:] if r.get("phase_seconds")]
    total = sum(sum(s.values()) for s in splits)
    if not total:
        return []
    shares = {name: sum(s.get(name, 0.0) for s in splits) / total for name in {**PHASES, **splits[-1]}}
    shares = {name: share for name, share in shares.items() if share > 0}
    bar, legend, width, drawn = Text(), [], min(60, room), 0.0
    for name, share in shares.items():
        mark, style = PHASES.get(name, ("▚", "white"))
        bar.append(mark * (round((drawn + share) * width) - round(drawn * width)), style)
        drawn += share
        legend.append(Text.assemble((f"{mark} ", style), f"{name} {share:.0%}"))
    return [("step time", bar), *_flow("", legend, room)]


def _memory(state: Mapping[str, Any], room: int) -> list[Row]:
    m, facts, width = state["memory"], state["facts"], min(60, room)
    total = m.get("device_total_bytes")
    if not total:
        return _process_memory(m, width, room)
    allocated, reserved = m.get("allocated_bytes", 0), m.get("reserved_bytes", 0)
    used = max(m.get("device_used_bytes") or 0, reserved)

    def column(num_bytes: float) -> int:
        return min(width, round(num_bytes / total * width))

    cells = [("░", "bright_black")] * width
    for until, cell in ((used, ("▒", "white")), (reserved, ("▓", "cyan")), (allocated, ("█", "green"))):
        cells[:column(until)] = [cell] * column(until)
    legend = [Text.assemble(("█ ", "green"), f"allocated {gib(allocated)}"),
              Text.assemble(("▓ ", "cyan"), f"reserved {gib(reserved)}"),
              Text.assemble(("▒ ", "white"), f"device {gib(used)} of {gib(total)} GiB")]
    for key, mark, label, style in (("budget_bytes", "┃", "budget", "bold yellow"),
                                    ("predicted_peak_bytes", "◆", "predicted peak", "bold magenta")):
        if facts.get(key):
            cells[min(width - 1, column(facts[key]))] = (mark, style)
            legend.append(Text.assemble((f"{mark} ", style), f"{label} {gib(facts[key])} GiB"))
    return [("memory", _joined(cells)), *_flow("", legend, room)]


def _process_memory(m: Mapping[str, Any], width: int, room: int) -> list[Row]:
    process, total = m.get("process_bytes"), m.get("host_total_bytes")
    if not process:
        return []
    if not total:
        return [("memory", Text(f"process {gib(process)} GiB"))]
    used = total - m.get("host_available_bytes", total - process)
    mine, others = (min(width, round(x / total * width)) for x in (process, max(used, process)))
    bar = Text.assemble(("█" * mine, "green"), ("▒" * (others - mine), "white"),
                        ("░" * (width - others), "bright_black"))
    legend = [Text.assemble(("█ ", "green"), f"process {gib(process)}"),
              Text.assemble(("▒ ", "white"), f"host {gib(max(used, process))} of {gib(total)} GiB")]
    return [("memory", bar), *_flow("", legend, room)]


def _peaks(records: Sequence[Mapping[str, Any]], room: int) -> list[Row]:
    peaks = records[-1].get("peak_bytes_by_phase") if records else None  # of the run so far, not of one step
    if not peaks:
        return []
    highest = max(peaks, key=peaks.__getitem__)
    parts = [Text(f"{name} {gib(value)}", "bold" if name == highest else "") for name, value in peaks.items()]
    return _flow("peak", [*parts, Text("GiB")], room)


def _host(state: Mapping[str, Any]) -> list[Row]:
    m, rows = state["memory"], []
    if not m.get("device_total_bytes"):
        return rows
    if m.get("process_bytes"):
        free = f", {gib(m['host_available_bytes'])} GiB free" if m.get("host_available_bytes") else ""
        rows.append(("host", Text(f"process {gib(m['process_bytes'])} GiB{free}")))
    parts = [f"{m[key]:.0f} {unit}" for key, unit in (("temperature_celsius", "°C"), ("power_watts", "W"))
             if m.get(key) is not None]
    if parts:
        rows.append(("card", Text("  ".join(parts))))
    return rows
