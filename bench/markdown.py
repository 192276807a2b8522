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


def folded(summary: str, table: str) -> str:
    """A long table, of which a reader sees the summary until it is opened."""
    return f"<details><summary>{summary}</summary>\n\n{table}\n</details>\n"
