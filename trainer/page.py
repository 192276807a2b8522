"""Parts of a report's page, as HTML."""

from collections.abc import Sequence
from html import escape


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def side_by_side(charts: Sequence[str], otherwise: str) -> str:
    """Charts beside each other, or a note if there are none."""
    return f'<div class="grid2">{"".join(f"<div>{c}</div>" for c in charts)}</div>' if charts else note(otherwise)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), stacked: bool = False) -> str:
    """Cells are HTML already. `stacked`: on a narrow screen those of a row stand below each other."""
    def cell(tag: str, i: int, content: str) -> str:
        return f'<{tag}{" class=num" if i in numbers else ""}>{content}</{tag}>'

    lines = ["".join(cell("td", i, c) for i, c in enumerate(row)) for row in rows]
    return (f"<table{' class=stacked' * stacked}><tr>" + "".join(cell("th", i, escape(h)) for i, h in enumerate(head)) + "</tr>"
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
