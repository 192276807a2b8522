"""Tables of what was measured on cards."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from bench.card.session import goal_row
from bench.markdown import load, markdown, step_seconds, without_figures
from bench.provenance import of_cards
from memory.cards import GIB

PARTS = ("offload", "minimum", "peaks", "short", "speed", "health", "cap", "feasibility", "choice")


def results(*parts: str) -> list[tuple[str, dict[str, Any]]]:
    """(part, result) of every card that has been measured, card after card. Raises FileNotFoundError if there is none."""
    folders = sorted({path.parent for part in parts for path in of_cards(part)})
    found = [(part, json.loads(path.read_text())) for folder in folders for part in parts if (path := folder / f"{part}.json").exists()]
    if not found:
        raise FileNotFoundError(2, "no card has been measured", f"{parts[0]}.json")
    return found


_HEADLINE = (
    ("speed", "5b 49f", "5b, 49 frames: all blocks on the card, checkpointed"), ("minimum", "5b 49f adamw8bit", "5b, 49 frames: the least memory"),
    ("speed", "5b 49f filling the card", "5b, 49 frames: the planner's plan for the whole card"),
    ("minimum", "1.5 81f adamw8bit", "1.5-5b, 81 frames: the least memory"),
    ("offload", "5b-17f all resident", "5b, 17 frames: all blocks on the card, checkpointed"),
    ("offload", "5b-17f ring, boundaries on host", "5b, 17 frames: blocks and their inputs on the host"),
    ("offload", "5b-17f diffusers group offload, block level, streams", "5b, 17 frames: diffusers' group offload, blocks, streams"),
    ("offload", "5b-17f torch save_on_cpu", "5b, 17 frames: torch's `save_on_cpu`"),
    ("offload", "2b-17f ring, boundaries on host", "2b, 17 frames: blocks and their inputs on the host"),
    ("offload", "2b-17f sequential, layer by layer", "2b, 17 frames: sequential offload, layer by layer"),
    ("minimum", "2b 17f adamw8bit", "2b, 17 frames: the least memory"),
    ("speed", "naive 2b 17f", "2b, 17 frames: the naive recipe (two copies, float32, joint graphs)"))


_FIRST = ("minimum", "1.5 81f adamw8bit")


def headline() -> str:
    """A few cells for those who want to know what it does, of the card of which most is known."""
    found, cells, notes = results("speed", "minimum", "offload", "peaks"), {}, []
    counts = Counter(result["card"] for _, result in found)
    card = max(found, key=lambda entry: (counts[entry[1]["card"]], entry[1]["provenance"]["date"]))[1]["card"]
    found = [(part, result) for part, result in found if result["card"] == card]
    by_part = dict(found)
    for part, result in found:
        cells |= {(part, name): cell for name, cell in result["cells"].items()} if part != "peaks" else {}
    first = _first_step(by_part.get("minimum", {}))
    rows = [[label + ", first step *" * bool(first and (part, name) == _FIRST),
             _bytes(cells[part, name])[0], step_seconds(cells[part, name])] for part, name, label in _HEADLINE if (part, name) in cells]
    seconds = {key: cell["step_seconds"] for key, cell in cells.items() if "step_seconds" in cell}
    for part, name, of, base, text in (
            ("minimum", "5b 49f adamw8bit", "speed", "5b 49f", "The least memory takes {:.1%} longer than all on the card, of the 5b at 49 frames."),
            ("offload", "5b-49f ring", "offload", "5b-49f all resident", "Streaming alone added {:.1%} to the student's pass there.")):
        if (part, name) in seconds and (of, base) in seconds:
            notes.append(text.format(seconds[part, name] / seconds[of, base] - 1))
    planned = [cell for cell in by_part.get("peaks", {}).get("cells", ()) if "allocated_error" in cell]
    if planned:
        off = [max(abs(cell[f"{kind}_error"]) for cell in planned) for kind in ("allocated", "reserved")]
        notes.append(f"Peaks of {len(planned)} plans were predicted within {off[0]:.2%} (allocated) and {off[1]:.1%} (reserved).")
    text = markdown(["a step of all three losses", "allocated at peak", "seconds"], rows) + (f"\n{' '.join(notes)}\n" if notes else "")
    if first:
        text += f"\n\\* before the optimizer had its state: {first / GIB:.2f} GiB after that (predicted).\n"
    return text + _source(found)


def _first_step(minimum: dict[str, Any]) -> int | None:
    """What a later step is predicted to allocate, where a cell's one step came before the optimizer's state."""
    predicted = minimum.get("predicted_allocated_bytes", {}).get("1.5 81f")
    measured = minimum.get("cells", {}).get(_FIRST[1], {}).get("allocated_bytes")
    return predicted if predicted and measured and measured < 0.995 * predicted else None


def goals() -> str:
    """What every part was to reach, and what it did."""
    found = results(*PARTS)
    rows = [[_of(found, result, name), *figures] for part, result in found for name, *figures in (goal_row(part, g) for g in result["goals"])]
    return markdown(["", "measured", "wanted", ""], rows) + _source(found)


def offload() -> str:
    """Ours beside resident blocks and beside peers: seconds and bytes of a step."""
    found = results("offload")
    rows = [[_of(found, result, name), *_bytes(cell), step_seconds(cell, result["cells"].get(f"{name.split()[0]} all resident"))]
            for _, result in found for name, cell in result["cells"].items()]
    beside = [o["to device hidden seconds"] / o["to device seconds"] for _, result in found if (o := result["overlap"]).get("to device seconds")]
    record = f"\nBy the profiler's record {min(beside):.1%} of the time of copies to the card lies beside a kernel.\n" if beside else ""
    return markdown(["a step of", "allocated", "reserved", "seconds"], rows) + record + _source(found)


def steps() -> str:
    """The smallest, the fastest, and what changes a step."""
    found = results("minimum", "speed", "cap")
    rows = [[_of(found, result, f"{part}: {name}"), *_bytes(cell), step_seconds(cell, result["cells"].get(" ".join(name.split()[:2]) + " plain"))]
            for part, result in found for name, cell in result["cells"].items()]
    repeats: dict[str, list[float]] = {}
    for name, cell in chain.from_iterable(result["cells"].items() for _, result in found):
        if len(times := cell.get("all_step_seconds", ())) > 1:
            repeats.setdefault(name.split()[0], []).append(max(times) / min(times) - 1)
    apart = "; ".join(f"the {model} by {statistics.median(shares):.1%} in the median and {max(shares):.1%} at most" for model, shares in repeats.items())
    note = f"\nRepeats of a step differ: of {apart}.\n" if apart else ""
    return markdown(["a step of", "allocated", "reserved", "seconds"], rows) + note + _source(found)


def peaks() -> str:
    """Allocated and reserved peaks against the simulator's, by model and size."""
    found, rows = results("peaks"), []
    emulated = {(result["card"], cell["settings"]): cell["measured"] for part, result in results("peaks", "emulated") if part == "emulated"
                for cell in result["peaks"]["cells"]}
    for _, result in found:
        ran = [cell for cell in result["cells"] if "allocated_error" in cell]
        for label, cells in _by_size(ran):
            sizes = [cell["measured"]["allocated_bytes"] / GIB for cell in cells]
            rows.append([_of(found, result, label), str(len(cells)), f"{min(sizes):.2f} to {max(sizes):.2f} GiB" if len(sizes) > 1 else f"{sizes[0]:.2f} GiB",
                         *(f"{max((cell[f'{kind}_error'] for cell in cells), key=abs):+.{digits}%}" for kind, digits in (("allocated", 3), ("reserved", 1)))])
    replayed = [snapshot for _, result in found for snapshot in result["snapshots"].values() if "num_requests" in snapshot]
    requests, alike = (sum(s[key] for s in replayed) for key in ("num_requests", "num_placed_alike"))
    twins = [(cell["measured"], twin) for _, result in found for cell in result["cells"] if (twin := emulated.get((result["card"], cell["settings"])))]
    equal = sum(all(real.get(key) == twin.get(key) is not None for key in ("allocated_bytes", "reserved_bytes")) for real, twin in twins)
    fitted = [fit for _, result in found if (fit := result["fit"]["reserved_bytes"])["num_checked"]]
    fit = " ".join(f"With a constant fitted to the card ({f['offset_bytes'] / 2**20:+.0f} MiB, the median of what {f['num_fitted']} plans "
                   f"reserve more than predicted) reserved bytes of the other {f['num_checked']} are off by {f['largest_error_with_offset']:.2%} at most, without it by "
                   f"{f['largest_error']:.2%}." for f in fitted)
    return markdown(["steps of", "plans", "measured at peak", "predicted: allocated off by at most", "reserved"], rows) + (
        f"\nOf {requests:,} requests in {len(replayed)} recorded runs the simulator serves {alike:,} at the address that the card's allocator chose. "
        f"Of {len(twins)} plans that ran on the emulated card too, by the program of that day, {equal} have the same allocated and reserved bytes there, "
        f"to the byte. {fit}\n"
        + _source(found))


def times() -> str:
    """Seconds of a step against the planner's, by model and size."""
    result = load("times")
    rows = [[f"{label}, {card}", str(len(cells)), " to ".join(f"{edge(cell['measured_seconds'] for cell in cells):.2f}" for edge in (min, max)) + " s",
             f"{min((cell['error'] for cell in cells), key=abs):+.1%}", f"{statistics.median(cell['error'] for cell in cells):+.1%}",
             f"{max((cell['error'] for cell in cells), key=abs):+.1%}"]
            for card in dict.fromkeys(cell["card"] for cell in result["cells"])
            for label, cells in _by_size([cell for cell in result["cells"] if cell["card"] == card])]
    return markdown(["steps of", "plans", "measured", "predicted: off by at least", "median", "at most"], rows) + (
        f"\nPredicted by `{result['provenance']['command']}`, {result['provenance']['date']}.\n")


def norms() -> str:
    """What the operator for norms and rotations of queries and keys changes."""
    found = results("probe")
    result = found[0][1]
    alone = [next(op["us"] / op["n"] for op in result["before"]["5b 49f"]["operators"] if op["op"] == name and "48, 64]" in op["shapes"])
             for name in ("aten::native_layer_norm", "aten::native_layer_norm_backward")]
    ours = result["norm_rotate"]["microseconds"]["48h 17776t rows 32 warps 4"]
    rows = [[f"5b, 49 frames: queries, {way}", f"{before:.0f} µs, the norm alone", f"{ours[f'{way}_us']:.0f} µs, norm and rotation",
             f"{ours[f'{short}_TBps']:.1f} TB/s"] for way, before, short in zip(("forward", "backward"), alone, ("fw", "bw"))]
    for name in ("5b 49f", "5b 17f", "2b 17f"):
        before, after = (result["student_only"][f"{name} {kind}"]["step_seconds"] for kind in ("torch", "kernels"))
        rows.append([f"{name.replace(' ', ', ').replace('f', ' frames')}: the student's pass, forward and backward",
                     f"{before:.3f} s", f"{after:.3f} s", f"{after / before - 1:+.1%}"])
    errors = result["norm_rotate"]["errors"]["bfloat16"]
    rows.append(["off from float64, bfloat16: forward / backward", *(f"{errors[kind]:.2e} / {errors[kind + ' backward']:.2e}" for kind in ("torch", "kernel")), ""])
    return markdown(["", "torch's operators", "`eraser::norm_rotate`", ""], rows) + (
        f"\nMeasured on {result['provenance']['card']}, torch {result['provenance']['versions']['torch']}, {result['provenance']['date']} "
        "(`probe.json` beside the suite's results, by scripts that were not kept).\n")


def _by_size(cells: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Cells by model and frames, in order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        model, frames = cell["settings"].split()[:2]
        groups.setdefault(f"{model.removeprefix('cogvideox-')}, {frames.removesuffix('f')} frames", []).append(cell)
    return sorted(groups.items(), key=lambda group: (group[0].split(",")[0], int(group[0].split()[1])))


def _of(found: list[tuple[str, dict[str, Any]]], result: dict[str, Any], text: str) -> str:
    """A row's label; with its card where there are several."""
    return text if len({r["card"] for _, r in found}) == 1 else f"{text}, {result['card']}"


def _bytes(cell: dict[str, Any]) -> list[str]:
    if "allocated_bytes" not in cell:
        return [without_figures(cell), ""]
    return [f"{cell[f'{kind}_bytes'] / GIB:.2f} GiB" for kind in ("allocated", "reserved")]


def _source(found: list[tuple[str, dict[str, Any]]]) -> str:
    by_card: dict[str, list[str]] = {}
    for part, result in found:
        p = result["provenance"]
        by_card.setdefault(f"{p['card']}, torch {p['versions']['torch']}", []).append(f"{part} {p['date']}, {p['commit']}")
    return "\nMeasured by `python -m bench.card` on " + "; on ".join(f"{card} ({'; '.join(parts)})" for card, parts in by_card.items()) + ".\n"


TABLES: dict[str, Callable[[], str]] = {"card": headline, "card-goals": goals, "card-offload": offload, "card-steps": steps, "card-peaks": peaks,
                                       "card-times": times, "card-norms": norms}
