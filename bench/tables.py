"""The tables of README.md, MEMORY.md, FORGETTING.md and RELIABILITY.md, made from the committed results.

    python -m bench.tables           rewrite the tables between `<!-- table: NAME -->` and `<!-- end -->`
    python -m bench.tables --check   exit 1 if a document differs from its results

A figure in a table is made by a function of `TABLES` or not at all.
"""

import argparse
import re
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

from bench import others, predicted
from bench.card import tables as card
from bench.emulated import tables as emulated
from bench.erasure import VARIANTS, summary
from bench.markdown import folded, load, markdown, sized
from bench.provenance import ROOT
from trainer.findings import CODES, Code

DOCUMENTS = ("README.md", "MEMORY.md", "FORGETTING.md", "RELIABILITY.md")
MARK = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _source(result: dict[str, Any]) -> str:
    p = result["provenance"]
    where = p["card"] or f"{p['num_cores']} CPU cores"
    return f"\nMeasured by `{p['command']}` on {where}, torch {p['versions']['torch']}, {p['date']}.\n"


def _percent(rate: float) -> str:
    return f"{rate:.1%}".replace(".0%", "%")


def _change(rate: dict[str, Any]) -> str:
    return f"{_percent(rate['before'])} → {_percent(rate['after'])}"


def _worst(evaluation: dict[str, Any], *, of_target: bool = False) -> dict[str, Any]:
    """Of what should stay as it was, the rate that fell most: of all but the target, or of the target's other attributes."""
    return max((r for r in evaluation["preserved"] if r["kind"].startswith("target-") is of_target), key=lambda r: r["before"] - r["after"])


def main_run() -> str:
    """Target, synonyms, and the rest, before and after, for one concept of each kind."""
    result, rows = load("main"), []
    for run in result["runs"].values():
        e = run["evaluation"]
        worst, motion = _worst(e), e["motion"]["after"] / e["motion"]["before"] - 1
        rows.append([f"`{run['flags']}`", _change(e["target"]), _change(e["synonyms"]), f"{_change(worst)} ({worst['name']})",
                     _change(_worst(e, of_target=True)), f"{motion:+.1%}", f"{run['seconds']:.0f} s"])
    header = ["erased", "detected", "its synonyms", "worst preserved", "its other attributes, worst", "motion", "whole run"]
    return markdown(header, rows) + _source(result)


def pretrained() -> str:
    """Accuracy of the bundled model."""
    result = load("pretrained")
    rows = [[kind, _percent(r["rate"]), " to ".join(_percent(v) for v in r["interval"])]
            for kind, r in result["accuracy"].items()]
    return markdown(["shown as the caption says", f"of {result['num_videos']} videos", "95 %"], rows) + _source(result)


def rater() -> str:
    """One row an eraser, measured by the rule and by CLIP."""
    result, rows = load("rater"), []
    for concept, run in result["runs"].items():
        raters = run["rule"], run["clip"]
        rows.append([concept, *(_change(e["target"]) for e in raters), *(_change(_worst(e)) for e in raters)])
    return markdown(["erased", "detected: by the rule", "by CLIP", "worst preserved: by the rule", "by CLIP"], rows) + _source(result)


def erasure() -> str:
    """One row a variant of the method."""
    result, rows = load("erasure"), []
    for name in VARIANTS:
        if name in result["variants"]:
            v = result["variants"][name]
            s = summary(v["evaluation"])
            rows.append([f"`{name}`", *(_percent(s[k]) for k in (
                "target", "synonyms", "preserved_mean", "preserved_worst", "target_other_worst", "motion"))])
    header = ["variant", "target", "synonyms", "preserved, mean", "preserved, worst", "target's other attributes, worst", "motion"]
    return markdown(header, rows) + _source(result)


def projection() -> str:
    """One row a run of forgetting in a projection; the null-space projection's figures in brackets."""
    result, rows = load("projection"), []
    for name, run in result["runs"].items():
        encoder, forgotten, target = name.split("/")
        e, b = run["evaluation"], run["evaluation"]["baseline"]
        other = {r["name"]: r["after"] for r in b["preserved"]}
        worst, theirs = (max(r["before"] - after(r) for r in e["preserved"]) for after in (
            lambda r: r["after"], lambda r: other[r["name"]]))
        words = f"{_percent(e['synonyms']['after'])} ({_percent(b['synonyms'])})" if e["synonyms"] else ""
        rows.append([encoder, forgotten, target, f"{_change(e['target'])} ({_percent(b['target'])})",
                     words, f"{_change(e['preserved_mean'])} ({_percent(b['preserved_mean'])})",
                     f"{100 * worst:.1f} ({100 * theirs:.1f})", f"{run['seconds']:.0f} s"])
    header = ["encoder", "forgotten", "target", "its accuracy (null space)", "in other words", "preserved, mean", "largest loss, points", "whole run"]
    return markdown(header, rows) + _unmoved(result) + _source(result)


def _unmoved(result: dict[str, Any]) -> str:
    """Why a class that reached its target is still nearest to itself, where that is so."""
    notes = []
    for name, run in result["runs"].items():
        encoder, forgotten, target = name.split("/")
        e = run["evaluation"]
        if e["target"]["after"] > 0.05 and e.get("target_nearest") == forgotten:
            said = next(c["target"] for c in e["leak"] if (c["edited"], c["deepstack"]) == ("main merger", "cut"))
            fall = next(iter(e["distance"].values()))["after"]["forget_fall"]
            notes.append(f"\n{encoder}, {forgotten}, {target}: the distance to the target fell by {_percent(fall)}, but of all class means it is "
                         f"{forgotten}'s own that lies nearest to that target, so nearest-class accuracy cannot fall; with DeepStack cut the language "
                         f"model names the class in {_percent(said)} of the pictures.\n")
    return "".join(notes)


def leak() -> str:
    """What the language model of the bundled Qwen3-VL still names, by what was edited and what was forgotten."""
    result = load("projection")
    runs = {name.split("/")[1]: r["evaluation"]["leak"] for name, r in result["runs"].items() if name.endswith("/random") and "leak" in r["evaluation"]}
    rows = [[cells[0]["edited"], cells[0]["deepstack"], *(f"{_percent(c['target'])} / {_percent(c['preserved'])}" for c in cells)]
            for cells in zip(*runs.values())]
    header = ["mergers edited", "DeepStack", *(f"{name}: forgotten / preserved class named" for name in runs)]
    return markdown(header, rows) + _source(result)


def codes() -> str:
    """Every finding that the watcher and `diagnose` know."""
    rows = [[f"`{code}`", *known] for code, known in CODES.items()]
    return folded(f"{len(CODES)} codes, with cause and fix", markdown(["code", *Code._fields], rows, words=True))


def faults() -> str:
    """What is named for every fault that was put in, and the false alarms of sound runs."""
    result = load("diagnosis")
    runs: dict[tuple[str, str], list[bool]] = {}
    for case in result["cases"]:
        if case["code"] != "healthy":
            runs.setdefault((case["fault"].split(", block ")[0], case["code"]), []).append(case["right"])
    rows = [[fault, f"`{code}`", f"{sum(right)} of {len(right)}"] for (fault, code), right in runs.items()]
    right = list(chain.from_iterable(runs.values()))
    summary = (f"{len(runs)} faults, {len(right)} times put in: {sum(right)} named right, with their block; "
               f"{result['num_healthy']} sound settings: {result['num_false_alarms']} false alarms")
    cost = load("health-cost")
    note = (f"\nThe norms that the watcher takes cost {cost['share']:.2%} of a block's forward and backward pass (2b, {cost['num_tokens']:,} "
            f"tokens, `{cost['provenance']['command']}` on {cost['provenance']['card'] or 'the CPU'}, {cost['provenance']['date']}).\n")
    return folded(summary, markdown(["put in", "named", "right, with its block"], rows)) + note + _source(result)


def planning() -> str:
    """Seconds of a search and of the whole process, how many plans were ranked, and what the chosen one loses to the best."""
    result, rows = load("planning"), []
    for name, cell in result["cells"].items():
        found = map(cell.get, result["cards"])
        rows.append([sized(name), *(f"{c['search_seconds']:.1f} s ({c['process_seconds']:.1f} s), {c['num_candidates']}, "
                                                    + ("none fits" if c["regret"] is None else f"{c['regret']:.1%}") for c in found)])
    return markdown(["search (whole process), candidates, regret", *result["cards"]], rows) + _source(result)


def blocks() -> str:
    """Peak of two blocks, predicted and measured, as they are and compiled. How long a CPU takes says nothing of a card."""
    result, rows = load("blocks"), []
    for name, cell in result["cells"].items():
        plain, found, expected = cell["as it is"], cell["compiled"], cell["predicted_bytes"]
        rows.append([name, f"{expected / 2**20:.2f} MiB", f"{plain['peak_bytes'] / 2**20:.2f} MiB ({plain['peak_bytes'] / expected - 1:+.3%})",
                     f"{found['peak_bytes'] / 2**20:.2f} MiB ({found['peak_bytes'] / expected - 1:+.3%})"])
    return markdown(["two blocks, what they keep", "predicted peak", "measured", "compiled"], rows) + _source(result)


def claims() -> str:
    """A verdict for every figure of the documents."""
    result = load("claims")
    rows = [[f"`{name}`", c["document"], c["claim"], c["verdict"], c["figure"]] for name, c in result["claims"].items()]
    return markdown(["id", "document", "claim", "verdict", "figure"], rows, words=True)


def reliability() -> str:
    """Every promise, its target and what was measured."""
    result = load("reliability")
    rows = [[r["test"], r["target"], r["figure"] if r["holds"] else f"**does not hold**: {r['figure']}"] for r in result["rows"].values()]
    summary = f"{len(rows)} promises, of which {sum(r['holds'] for r in result['rows'].values())} hold"
    return folded(summary, markdown(["test", "target", "measured"], rows, words=True)) + _source(result)


TABLES: dict[str, Callable[[], str]] = {
    "main": main_run, "pretrained": pretrained, "rater": rater, "erasure": erasure, "projection": projection, "leak": leak, "codes": codes,
    "faults": faults, "reliability": reliability, "planning": planning, "blocks": blocks, "claims": claims,
    **predicted.TABLES, **others.TABLES, **emulated.TABLES, **card.TABLES}


def rendered(text: str) -> str:
    """A document with every table made anew; one whose result is not there yet stays as it is."""
    def table(m: re.Match) -> str:
        try:
            return m[1] + TABLES[m["name"]]() + m[3]
        except FileNotFoundError as e:
            print(f"no result yet: {e.filename}", file=sys.stderr)
            return m[0]

    return MARK.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a table is not what its result says")
    check, different = parser.parse_args().check, []
    for path in (ROOT / name for name in DOCUMENTS):
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            different.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    print(f"changed: {', '.join(different) or 'nothing'}")
    return 1 if different and check else 0


if __name__ == "__main__":
    sys.exit(main())
