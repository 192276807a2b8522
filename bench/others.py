"""Tables of what others recorded and published of their cards, against what is predicted for it."""

import math
from collections.abc import Callable
from typing import Any

from bench.markdown import load, markdown
from memory.cards import GIB


def recordings() -> str:
    """Requests of recorded histories that the simulator serves as the card did."""
    result, rows = load("recordings"), []
    for repository in dict.fromkeys(row["repository"] for row in result["recordings"]):
        found = [row for row in result["recordings"] if row["repository"] == repository]
        alike, requests, events = (sum(row[key] for row in found) for key in ("num_placed_alike", "num_requests", "num_events"))
        reserved = [row["recorded_peak_reserved_bytes"] for row in found]
        error = max(abs(row["simulated_peak_reserved_bytes"] / row["recorded_peak_reserved_bytes"] - 1) for row in found)
        workspaces = max((row["workspaces_bytes"] for row in found), key=len)
        rows.append([f"{repository}: {found[0]['runs']}", str(len(found)), f"{events:,}", f"{alike:,} of {requests:,}",
                     " to ".join(f"{b / GIB:.2f}" for b in sorted({min(reserved), max(reserved)})) + " GiB", f"{error:.2%}",
                     f"{len(workspaces)} of {workspaces[0] / 2**20:g} MiB" if workspaces else ""])
    return markdown(["recorded", "histories", "events", "requests served at the card's address", "reserved at peak", "largest error",
                     "cuBLAS workspaces, where they were taken in it"], rows) + _recorded(result)


def traced() -> str:
    """Recorded training steps, predicted from their program."""
    result, rows = load("recordings"), []
    for step in result["traced"]:
        pairs = [(step[f"recorded_peak_{kind}_bytes"], step[f"predicted_peak_{kind}_bytes"]) for kind in ("allocated", "reserved")]
        rows.append([f"{step['repository']}: {step['num_parameters'] / 1e6:.0f} M parameters, float32, AdamW, 4 x {step['num_tokens']} tokens",
                     *(f"{recorded / 2**20:,.0f} MiB → {predicted / 2**20:,.0f} MiB ({predicted / recorded - 1:+.2%})"
                       for recorded, predicted in pairs)])
    return markdown(["training step", "allocated at peak: recorded → predicted", "reserved"], rows) + _recorded(result)


def _recorded(result: dict[str, Any]) -> str:
    p = result["provenance"]
    return f"\nRecorded on cards by the repositories' authors, compared by `{p['command']}`, torch {p['versions']['torch']}, {p['date']}.\n"


def published_training() -> str:
    """Reserved bytes of LoRA training, a row for what was trained how, a column a rank."""
    result = load("published")
    rows: dict[tuple, dict[int, str]] = {}
    for row in result["training"]:
        kind = (row["model"], "checkpointed" if row["checkpointing"] else "not checkpointed", f"batch of {row['batch_size']}", row["optimizer"])
        rows.setdefault(kind, {})[row["rank"]] = f"{row['reserved_gib']:.2f} → {row['predicted_reserved_bytes'] / GIB:.2f} GiB ({row['error']:+.1%})"
    ranks = sorted({row["rank"] for row in result["training"]})
    return markdown(["LoRA training, 49 x 480 x 720, bfloat16, on an A100", *(f"rank {rank}: published → predicted" for rank in ranks)],
                    [[", ".join(kind), *(found.get(rank, "") for rank in ranks)] for kind, found in rows.items()]) + _published(result)


def published_decoding() -> str:
    """Allocated bytes of decoding beside the models."""
    result = load("published")
    rows = []
    for row in result["decoding"]:
        measured, *predicted = (row[key] for key in ("measured_bytes", "predicted_bytes", "predicted_without_copies_bytes"))
        rows.append([f"{row['model']}, {row['card']}", f"{measured / GIB:.2f} GiB", *(f"{p / GIB:.2f} GiB ({p / measured - 1:+.1%})" for p in predicted)])
    return markdown(["decoding 49 x 480 x 720 without tiles", "allocated at peak beside the models", "predicted",
                     "without the copies of convolutions"], rows) + _published(result)


def published_times() -> str:
    """Seconds of generations and steps."""
    result, rows = load("published"), []
    for row in result["generation"]:
        what = f"{row['steps']} steps" + " and decoding" * row["decoding"] if row["steps"] > 1 else "a step"
        what += ", {} x {} x {}".format(*row["size"]) if "size" in row else ""
        compiled = f"{row['compiled']:.3g} s ({row['compiled'] / row['seconds'] - 1:+.0%})" if "compiled" in row else ""
        rows.append([f"{row['model']}, {row['card']}: {what} ({row['source']})", f"{row['seconds']:.4g} s",
                     f"{row['predicted_seconds']:.4g} s ({row['error']:+.0%})", compiled])
    for row in result["training_step"]:
        rows.append([f"{row['model']}, {row['card']}: a training step, LoRA of rank {row['rank']}, checkpointed ({row['source']})", f"{row['seconds']:.4g} s",
                     f"{row['predicted_seconds']:.4g} s ({row['error']:+.0%})", ""])
    errors = [row["error"] for row in result["generation"] + result["training_step"]]
    note = f"\nErrors: {math.sqrt(sum(e * e for e in errors) / len(errors)):.0%} (root mean square).\n"
    return markdown(["", "published", "predicted", "published with torch.compile"], rows) + note + _published(result)


def published_shares() -> str:
    """What kernels reach of a card's tensor rate."""
    result = load("published")
    matmul = result["shares"]["matmul"]
    rows = [[row["card"], f"{matmul[row['card']]['share']:.0%}" if row["card"] in matmul else "", row.get("kernel", "FlashAttention-2"),
             f"{row['forward_share']:.0%}", f"{row['backward_share']:.0%}" if "backward" in row else "", f"{row['head']}, {row['tokens']:,} tokens"]
            for row in result["shares"]["attention"]]
    reports = sum(found["num_reports"] for found in matmul.values())
    return (markdown(["share of the tensor rate", "matrix products", "attention", "forward", "backward", "heads of"], rows)
            + f"\nMatrix products of {len(matmul)} cards, {reports} reports; all are in `bench/published.toml`.\n" + _published(result))


def _published(result: dict[str, Any]) -> str:
    p = result["provenance"]
    return f"\nMeasured and published by others (`bench/published.toml`), compared by `{p['command']}`, torch {p['versions']['torch']}, {p['date']}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "recordings": recordings, "traced": traced, "published-training": published_training, "published-decoding": published_decoding,
    "published-times": published_times, "published-shares": published_shares}
