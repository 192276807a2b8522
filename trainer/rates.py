"""How often something is so, before and after, with an interval."""

import math
from collections.abc import Sequence
from typing import Any


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927): honest at 0 and 1, where the normal interval has no width."""
    z, p = 1.96, hits / count
    d = 1 + z * z / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / d), min(1.0, (middle + half) / d)


def rates(**hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits under each name, and under `{name}_interval` its interval."""
    row: dict[str, Any] = {}
    for name, found in hits.items():
        row |= {name: sum(found) / len(found), f"{name}_interval": wilson(sum(found), len(found))}
    return row
