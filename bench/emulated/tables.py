"""Tables of what was seen on the emulated card."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from bench.card.feasibility import came_to
from bench.card.session import goal_row
from bench.markdown import folded, load, markdown, step_seconds, without_figures
from bench.provenance import RESULTS
from memory.cards import GIB


def peaks() -> str:
    """Predicted peaks of whole steps, and what torch's CUDA build then allocated and reserved, with the kernels of two cards."""
    results = _by_card()
    columns = [{cell["settings"]: [f"{cell['measured'][f'{kind}_bytes'] / GIB:.3f} GiB ({cell[f'{kind}_error']:+{digits}%})"
                                   for kind, digits in (("allocated", ".3"), ("reserved", ".1"))]
                for cell in result["peaks"]["cells"] if "allocated_error" in cell} for result in results]
    rows = [[settings, *(text for column in columns for text in column.get(settings, ["", ""]))] for settings in dict.fromkeys(chain(*columns))]
    cards = [result["card"].removeprefix("Emulated ") for result in results]
    header = ["a step of", *(f"{card}: {kind} (predicted: off by)" for card in cards for kind in ("allocated at peak", "reserved"))]
    replayed = [s for result in results for s in result["peaks"]["snapshots"].values()]
    requests, alike = (sum(s[key] for s in replayed) for key in ("num_requests", "num_placed_alike"))
    ran = [cell for result in results for cell in result["peaks"]["cells"] if "reserved_error" in cell]
    off = [abs(cell["predicted"]["reserved_bytes"] - cell["measured"]["reserved_bytes"]) for cell in ran]
    grown = max(cell["measured"]["grown_bytes"] for cell in ran)
    return folded(f"{len(rows)} kinds of steps", markdown(header, rows)) + (
        f"\nReserved bytes are off by {max(off) / 2**20:.0f} MiB at most, the allocator takes 20 at a time, and in {off.count(0)} of {len(off)} cells by none; "
        f"no second step reserves more than {grown / 2**20:.0f} MiB more than the first. Expandable segments: of {requests:,} requests of "
        f"{len(replayed)} recorded runs, the simulator serves {alike:,} at the address that torch's allocator chose.{_drawn(results)}\n"
        + _missed(*(result for result in results if "drawn" in result), part="drawn") + _source(*results, parts=("peaks", "drawn")))


def _drawn(results: list[dict[str, Any]]) -> str:
    """Of plans drawn at random, by how much the prediction is off."""
    cells = [cell for result in results if "drawn" in result for cell in result["drawn"]["cells"]]
    ran = [cell for cell in cells if "reserved_error" in cell]
    if not ran:
        return ""
    allocated, reserved = (max(abs(cell[f"{kind}_error"]) for cell in ran) for kind in ("allocated", "reserved"))
    return (f" {len(ran)} of {len(cells)} steps whose plan, size, rank and batch were drawn at random, of models cut to a few blocks, ran: "
            f"allocated is off by {allocated:.3%} at most, reserved by {reserved:.2%}.")


def _by_card() -> list[dict[str, Any]]:
    return [load(name) for name in ("emulated", *(path.stem for path in sorted(RESULTS.glob("emulated-*.json"))))]


def caps() -> str:
    """Plans under the caps they were made for, the smallest peaks, and where the naive recipe breaks."""
    result = load("emulated")
    rows = [[f"three steps of the planner's plan: {_short(name)}", f"{cell['cap_bytes'] / GIB:.2f} GiB", *_outcome(cell)]
            for name, cell in result["feasibility"]["cells"].items()]
    rows += [[f"the naive recipe: {_short('2b 17f ' + name)}", f"{cell['cap_bytes'] / GIB:.2f} GiB", came_to(cell), ""]
             for name, cell in result["feasibility"]["naive"].items()]
    rows += [[f"the smallest: {name}", "none", *_outcome(cell)] for name, cell in result["minimum"]["cells"].items()]
    return markdown(["what ran", "reservable", "", "allocated / reserved"], rows) + _source(result, parts=("feasibility", "minimum"))


def _short(name: str) -> str:
    """"5b 49f rtx-4090-48gb-24gb" as "5b 49f for 24gb": whose rates the plan was made with is of no matter here."""
    return f"{' '.join(name.split()[:-1])} for {name.rsplit('-', 1)[1]}"


def _outcome(cell: dict[str, Any]) -> list[str]:
    if "allocated_bytes" not in cell:
        return [without_figures(cell), ""]
    return ["runs", f"{cell['allocated_bytes'] / GIB:.2f} / {cell['reserved_bytes'] / GIB:.2f} GiB"]


def runs() -> str:
    """Whole runs under the caps their plans were made for: what each phase allocated, beside what was predicted."""
    result, phases = load("emulated"), ("encode prompts", "pre-flight", "sample", "decode")
    rows = []
    for run_of, run in result["runs"]["runs"].items():
        cells = [""] * (len(phases) + 3)
        if "phases" in run:
            step = max((peak for name, peak in run["phases"].items() if name not in (*phases, "load")), key=lambda peak: peak["allocated_bytes"])
            cells = [*(_beside(peak["allocated_bytes"], peak["predicted_bytes"], 2) for peak in (*map(run["phases"].get, phases), step)),
                     _beside(run["reserved_bytes"], run["predicted_reserved_bytes"], 1), _video(run["video"])]
        rows.append([run_of, f"{run['cap_bytes'] / GIB:.2f} GiB", *cells,
                     f"ends, retries: {run['num_retries']}" if "phases" in run else _outcome(run)[0]])
    header = ["a run of", "reservable", *phases, "steps", "reserved in all", "a video with it: reserved", ""]
    return (markdown(header, rows) + "\nAllocated at peak, in brackets by how much the prediction is off. A video (`generate`): with as many blocks on the "
            "card as are said to fit. Segments fixed: the allocator's do not grow; rests of up to a MiB then count as allocated.\n"
            + _source(result, parts=("runs",)))


def _video(made: dict[str, Any]) -> str:
    if "reserved_bytes" not in made:
        return _outcome(made)[0]
    resident = "all" if made["resident_blocks"] is None else made["resident_blocks"]
    return f"{made['reserved_bytes'] / GIB:.2f} GiB, {resident} blocks on the card"


def _beside(seen: int, predicted: int, digits: int) -> str:
    return f"{seen / GIB:.2f} GiB ({predicted / seen - 1:+.{digits}%})"


def steps() -> str:
    """What the host gives the card to do in a step."""
    result = load("emulated")
    rows = [[step["settings"], f"{step['num_kernels']:,.0f}", f"{step['num_products']:,.0f}", f"{step['host_seconds']:.2f} s",
             f"{step['bytes_to_card'] / GIB:.2f} / {step['bytes_to_host'] / GIB:.2f} GiB", f"{step['num_waits']:.0f}",
             f"{step['num_pageable_copies']:.0f}", f"{step['num_driver_allocations']}"] for step in result["steps"]]
    header = ["a step of", "kernels", "of cuBLAS", f"the host needs for it ({result['provenance']['num_cores']} cores)", "to the card / to the host",
              "waits of the host", "copies of pageable memory", "driver allocations, steps 3 to 5"]
    return markdown(header, rows) + _source(result, parts=("steps",))


def compiled() -> str:
    """Peaks of steps with compiled blocks, beside those predicted for blocks as they are, with the kernels of two cards."""
    results = [result for result in _by_card() if "compiled" in result]
    columns = [{cell["settings"].replace(" compile=True", ""): _compiled_peaks(cell) for cell in result["compiled"]["cells"]} for result in results]
    cards = [result["card"].removeprefix("Emulated ") for result in results]
    rows = [[settings, *(column.get(settings, "") for column in columns)] for settings in columns[0]]
    header = ["compiled, a step of", *(f"{card}: allocated / reserved (predicted: off by)" for card in cards)]
    return markdown(header, rows) + _missed(*results, part="compiled") + _source(*results, parts=("compiled",))


def _compiled_peaks(cell: dict[str, Any]) -> str:
    measured, predicted = cell["measured"], cell["predicted"]
    if "allocated_bytes" not in measured:
        return "fails"
    allocated, reserved = (f"{measured[key] / GIB:.2f} GiB ({predicted[key] / measured[key] - 1:+.1%})" for key in ("allocated_bytes", "reserved_bytes"))
    return f"{allocated} / {reserved}"


def schedule() -> str:
    """Step times on the emulated card's clock, by card: the program's own order of kernels, copies and waits."""
    result = load("emulated")
    by_card = result["schedule"]["cards"]
    first = next(iter(by_card.values()))
    rows = [[name, _allocated(cell), *(_added(parts["offload"]["cells"], name, "all resident") for parts in by_card.values())]
            for name, cell in first["offload"]["cells"].items()]
    labels = {"plain": "plain", **{f"{size}gb{more}": f"the planner's plan for {size} GB{words}" for size in (24, 48, 96)
                                   for more, words in (("", ""), ("-host", ", kept on the host"))}}
    for kind in ("5b 49f", "2b 49f"):
        for ending, label in labels.items():
            found = [next(((cells, n) for n in cells if n.startswith(kind) and (n.endswith(f"-{ending}") or n == f"{kind} {ending}")), None)
                     for cells in (parts["cap"]["cells"] for parts in by_card.values())]
            if there := next(filter(None, found), None):
                # Where nothing is kept on the host, that would be the plan without.
                rows.append([f"{kind.replace(' ', '-')} {label}", _allocated(there[0][there[1]]), *(
                    _added(*each, "plain") if each else "the same" for each in found)])
    errors = [cell["predicted_step_seconds"] / cell["step_seconds"] - 1 for parts in by_card.values()
              for cell in (*parts["offload"]["cells"].values(), *parts["choice"]["chosen"].values()) if "predicted_step_seconds" in cell]
    choices = [parts["choice"] for parts in by_card.values()]
    regrets = [regret for choice in choices for regret in choice["regret"].values()]
    caps = " and ".join(name.rsplit("-", 1)[1].removesuffix("gb") for name in choices[0]["regret"])
    return markdown(["a step of", "allocated", *by_card], rows) + (
        f"\nIn brackets: against the group's first, all blocks resident and checkpointed. A step at 49 frames is the student's pass alone.\n"
        f"The planner's own time is off by {min(errors):+.1%} to {max(errors):+.1%} ({len(errors) // len(by_card)} plans, each at the rates of {len(by_card)} cards); "
        f"its choice under caps of {caps} GB takes "
        f"{abs(max(regrets)):.1%} {'longer at most' if max(regrets) > 0 else 'less at least'} than the fastest of a grid of "
        f"{len(choices[0]['grid'])} plans.\n" + _missed(result, part="schedule") + _source(result, parts=("schedule",)))


def buffers() -> str:
    """What a third buffer for streamed blocks is worth on the emulated card's clock, by card and cap."""
    result = load("emulated")
    by_card = result["buffers"]["cards"]
    rows = [[cap, *(_two_and_chosen(caps[cap]) for caps in by_card.values())] for cap in next(iter(by_card.values()))]
    cells = [cell for caps in by_card.values() for pair in caps.values() for cell in pair.values() if "step_seconds" in cell]
    errors = [cell["predicted_step_seconds"] / cell["step_seconds"] - 1 for cell in cells]
    return markdown(["5b, 17 frames, under", *by_card], rows) + (
        f"\nThe fastest plan with two buffers → the planner's. Predicted seconds of these {len(cells)} plans are off by {min(errors):+.1%} to {max(errors):+.1%}.\n"
        + _missed(result, part="buffers") + _source(result, parts=("buffers",)))


def _two_and_chosen(pair: dict[str, Any]) -> str:
    two, chosen = (cell.get("step_seconds") for cell in (pair["two"], pair["chosen"]))
    if two is None or chosen is None:
        return "fails"
    return f"{two:.3f} s → {chosen:.3f} s ({chosen / two - 1:+.1%}, {pair['chosen']['num_buffers']} buffers)"


def _allocated(cell: dict[str, Any]) -> str:
    return f"{cell['allocated_bytes'] / GIB:.2f} GiB" if "allocated_bytes" in cell else "fails"


def _added(cells: dict[str, dict[str, Any]], name: str, base: str) -> str:
    """Seconds of a cell, and by how much it differs from its group's plain one."""
    group = name.split()[0] if base == "all resident" else " ".join(name.split()[:2])
    return step_seconds(cells[name], cells[f"{group} {base}"]) or "fails"


def _missed(*results: dict[str, Any], part: str) -> str:
    """What a part was to reach and did not, in a line."""
    names = [result["card"].removeprefix("Emulated ") for result in results]
    missed = [f"{goal_row('', g)[0][2:]}{f' ({name})' * (len(names) > 1)}: {', '.join(goal_row('', g)[1:3])}" for name, result in zip(names, results)
              for g in result[part]["goals"] if g["reached"] is False]
    return f"\nMissed: {'; '.join(missed)}.\n" if missed else ""


def _source(*results: dict[str, Any], parts: Sequence[str]) -> str:
    made = [(result["card"], result["measured"][part]) for result in results for part in parts if part in result]
    cards = " and ".join(dict.fromkeys(f"torch {m['torch']} ({card})" for card, m in made))
    dates = " and ".join(sorted({m["date"] for _, m in made}))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(result["provenance"]["command"] for result in results))
    return f"\nNot measured on a card: {cards} on a card that computes nothing, by {commands}, {dates}.\n"


TABLES: dict[str, Callable[[], str]] = {"emulated-peaks": peaks, "emulated-caps": caps, "emulated-runs": runs,
                                       "emulated-steps": steps, "emulated-compiled": compiled, "emulated-schedule": schedule, "emulated-buffers": buffers}
