"""What tables in documents are made of."""

import json
from typing import Any

from bench.provenance import RESULTS


def load(name: str) -> dict[str, Any]:
    """A committed result by name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: list[str], rows: list[list[str]], *, words: bool = False) -> str:
    """A table whose first column is text and whose others are figures, or `words` like the first."""
    rule = ["---"] + ["---" if words else "--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)) + "\n"


def sized(cell: str) -> str:
    """The name of a predicted cell in words: of "cogvideox-2b-17", "cogvideox-2b, 17 frames"."""
    return "{}, {} frames".format(*cell.rsplit("-", 1))


def without_figures(cell: dict[str, Any]) -> str:
    """Why a measured cell has none, in the words of the error."""
    return cell.get("out_of_memory") or cell.get("failed") or ""


def step_seconds(cell: dict[str, Any], base: dict[str, Any] | None = None) -> str:
    """Seconds of a measured step, and by how much they differ from those of `base`; nothing without a measurement."""
    if "step_seconds" not in cell:
        return ""
    against = f" ({cell['step_seconds'] / base['step_seconds'] - 1:+.1%})" if base and base is not cell and "step_seconds" in base else ""
    return f"{cell['step_seconds']:.3f} s{against}"


def folded(summary: str, table: str) -> str:
    """A long table, of which a reader sees the summary until it is opened."""
    return f"<details><summary>{summary}</summary>\n\n{table}\n</details>\n"
