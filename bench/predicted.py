"""Tables of what is predicted or computed for the published models: nothing in them was measured."""

from collections.abc import Callable
from typing import Any

from bench.markdown import folded, load, markdown, sized
from memory.cards import GIB


def rank() -> str:
    """Bytes by rank, dtype and optimizer, and the documents' own figures."""
    result, rows = load("rank"), []
    whats = ("fp16_bytes", "train_fp16_bytes", "fp32_bytes", "train_adamw_bytes", "train_adamw8bit_bytes")
    for model, m in result["models"].items():
        for rank, costs in m["ranks"].items():
            document = result["document"].get(rank) if model.startswith("documents") else None
            says = f"{document['params'] / 1e6:.1f} M, {document['fp16_bytes'] / 1e6:.0f} / {document['train_bytes'] / 1e6:.0f} MB" if document else ""
            rows.append([f"{model}, {m['num_blocks']} x {m['width']}", rank, f"{costs['params']:,}",
                         *(f"{costs[what] / 1e6:.1f}" for what in whats), says])
    header = ["model", "rank", "parameters", "fp16 weights, MB", "fp16 in training", "fp32 weights", "fp32, AdamW", "fp32, 8-bit AdamW",
              "the document says"]
    return markdown(header, rows) + f"\nComputed exactly by `{result['provenance']['command']}`; in training: weights, gradients, state.\n"


def overlap() -> str:
    """A block's computation over its weights' transfer, for every listed card: above 1, streaming hides."""
    result = load("overlap")
    cells, rows = result["cells"], []
    for card in next(iter(cells.values()))["cards"]:
        found = [cell["cards"][card] for cell in cells.values()]
        rows.append([card, *(f"{1e3 * c['compute_seconds']:.1f} ms: " + " / ".join(
            f"{ratio:.1f}" for ratio in c["compute_over_transfer"].values()) for c in found)])
    transfers = {name.split()[0]: f"{cell['block_bytes'] / 2**20:.0f} MiB, " + " / ".join(
        f"{1e3 * seconds:.1f}" for seconds in cell["transfer_seconds"].values()) + " ms" for name, cell in cells.items()}
    sizes = "; ".join(f"{model}: {text}" for model, text in transfers.items())
    loads = ", ".join(f"{name} {times:.1f}" for name, times in result["loads"].items())
    header = ["card", *(f"{name.replace('cogvideox', '').strip('-')} frames" for name in cells)]
    return (folded(f"{len(rows)} cards", markdown(header, rows))
            + f"\nA cell: a block's forward pass, over its transfer by PCIe 3 / 4 / 5. A block's weights and their "
            f"transfers: {sizes}.\nHow often the streamed weights cross the link, counted: {loads} times.\n"
            f"Predicted, not measured, by `{result['provenance']['command']}`.\n")


def feasibility() -> str:
    """Fits or not, peak and step time, by model, frames and card; naive / planned."""
    result, rows = load("feasibility"), []
    for name, cell in result["cells"].items():
        for kind, found in cell.items():
            with_host = kind not in ("naive", "planned")
            rows.append([f"{sized(name)}, {kind}", *(_hosted(found[c], cell["planned"][c]) if with_host else _feasible(found[c]) for c in result["cards"])])
    return markdown(["", *result["cards"]], rows) + _predicted(result)


def cards() -> str:
    """Peak and step time of the planner's plans, a row a card."""
    result = load("feasibility")
    plans = [cell["planned"] for cell in result["cells"].values()]
    # An h20 is the card that stands for 96gb.
    rows = [[f"`{card}`", *(_feasible(plan[card]) for plan in plans)] for card in result["cards"] if card != "h20"]
    header = ["`--profile`", *(sized(name).removeprefix("cogvideox").removeprefix("-") for name in result["cells"])]
    least = max(load(name)["minimum"]["cells"]["5b 49f adamw8bit"]["allocated_bytes"] for name in ("emulated", "emulated-h100"))
    note = (f"\nAt the least, with all streamed and recomputed that can be, steps of the 5b at 49 frames allocate {least / GIB:.2f} GiB "
            "(`python -m bench.emulated`, the larger of two cards).\n")
    return markdown(header, rows) + note + _predicted(result)


def _feasible(cell: dict[str, Any]) -> str:
    needed, seconds = cell.get("predicted", cell)["needed_bytes"], cell["step_seconds"]
    return f"{needed / GIB:.1f} GiB, {seconds:.{0 if seconds >= 100 else 1}f} s" if cell["fits"] else f"no: {needed / GIB:.1f} GiB"


def _hosted(cell: dict[str, Any], without: dict[str, Any]) -> str:
    if cell["settings"] == without["settings"]:
        return "the same"
    return f"{_feasible(cell)}, host {cell['predicted']['host_bytes'] / GIB:.0f} GiB"


def strategies() -> str:
    """Peak of the step and its time under each strategy, and against full checkpointing."""
    result = load("strategies")
    cells = result["cells"]
    rows = []
    for name in next(iter(cells.values())):
        row = [name]
        for cell in cells.values():
            here, base = cell.get(name), cell.get("checkpoint all")
            row.append("" if here is None or base is None else (
                f"{here['step_peak_bytes'] / GIB:.2f} GiB ({here['step_peak_bytes'] / base['step_peak_bytes'] - 1:+.0%}), "
                f"{here['step_seconds']:.2f} s ({here['step_seconds'] / base['step_seconds'] - 1:+.1%})"))
        rows.append(row)
    lost = [name for name in next(iter(cells.values())) if not name.startswith(("checkpoint all", "batch", "rank")) and all(
        cell[name]["step_peak_bytes"] > 0.98 * cell["checkpoint all"]["step_peak_bytes"]
        and cell[name]["step_seconds"] > 0.99 * cell["checkpoint all"]["step_seconds"] for cell in cells.values() if name in cell)]
    note = f"\nNot 2 % smaller nor 1 % faster than checkpointing alone: {'; '.join(lost)}.\n"
    return markdown(["strategy (change against checkpoint all)", *cells], rows) + note + _predicted(result)


def lean() -> str:
    """The trainer's blocks against diffusers', of the same step."""
    result, rows = load("lean"), []
    for name, cell in result["cells"].items():
        pairs = [(which["moved_bytes"] / 1e9, which["forward_peak_bytes"] / GIB, which["peak_bytes"] / GIB,
                  *(which["seconds"][card] for card in result["cards"])) for which in (cell["diffusers"], cell["ours"])]
        forms = ("{:.0f} GB", "{:.2f} GiB", "{:.2f} GiB", *("{:.2f} s" for _ in result["cards"]))
        rows.append([sized(name), *(f"{form.format(a)} → {form.format(b)}" for form, a, b in zip(forms, *pairs))])
    header = ["diffusers' blocks → ours", "moved by element-wise kernels", "peak of the student's forward", "peak of the step",
              *(f"computing, {card}" for card in result["cards"])]
    return markdown(header, rows) + _predicted(result)


def story() -> str:
    """The reproduction log, replayed."""
    result, rows = load("story"), []
    for name, v in result["variants"].items():
        cards = [("fits" if c["fits"] else f"breaks in {c['breaks_in'] or 'reserving'}") for c in v["cards"].values()]
        kinds = [f"{v['by_category'][k] / GIB:.1f}" for k in ("weights", "saved activations", "working set")]
        rows.append([name, f"{v['peak_bytes'] / GIB:.1f} GiB", *kinds, *cards])
    cards = list(next(iter(result["variants"].values()))["cards"])
    return markdown(["2b, 17 frames, fp32", "peak", "weights", "saved activations", "working set", *cards], rows) + _predicted(result)


def _predicted(result: dict[str, Any]) -> str:
    return f"\nPredicted, not measured, by `{result['provenance']['command']}`, torch {result['provenance']['versions']['torch']}, {result['provenance']['date']}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "rank": rank, "overlap": overlap, "feasibility": feasibility, "cards": cards, "strategies": strategies, "lean": lean, "story": story}
