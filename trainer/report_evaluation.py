"""Parts of a report's page that say what an evaluation measured, of an eraser or of a run of `forget`."""

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from trainer.charts import interval, number
from trainer.page import note, section, table
from trainer.projection_config import WOULD_HELP
from trainer.run_directory import resuming
from trainer.run_files import RunFiles


def evaluation(files: RunFiles) -> str:
    """Rates before and after, with their intervals; of a run that is not measured, how to."""
    result = files.evaluation
    if "target" not in result:
        how = (f"python run.py evaluate {shlex.quote(str(files.path))} does it; of other models than the bundled one it wants a --rater, "
               "a CLIP model that looks at the videos.")
        if files.forgets:
            how = f"{resuming(files.path)} does it at its end."
        elif not (files.path / "eraser.safetensors").exists():  # as of a run that was killed, or that a fatal finding stopped
            how = "There is no eraser.safetensors yet."
        return section("Is it gone, and is the rest still there?", note(f"Not measured. {how}"))
    synonyms, rater = result.get("synonyms", {}), result.get("rater")
    measured = result.get("measure")  # of a run of `forget`, whose examples are no videos
    rows = [(f"<b>{escape(str(result['target'].get('name')))}</b>", "target", result["target"])]
    if synonyms:
        rows.append((f"<b>{escape(', '.join(synonyms.get('names', [])) or 'other wordings')}</b>", "synonyms", synonyms))
    rows += [(escape(str(r.get("name"))), escape(str(r.get("kind"))), r) for r in result.get("preserved", [])]
    counted, baseline = "examples" if measured else "videos", _baseline(result)
    axis = "before ○\u2003after ●\u20030 to 100 %"
    rates = table(("", "kind", counted, "before", "after", "after, 95 %", *["null space"] * bool(baseline), axis), [
        (name, kind, escape(str(row["num_images" if measured else "num_videos"])), f"{row['before']:.1%}", f"{row['after']:.1%}",
         "{:.1%} to {:.1%}".format(*row["after_interval"]), *[f"{rate:.1%}" for rate in baseline[i:i + 1]],
         interval(row["before"], row["after"], *row["after_interval"]))
        for i, (name, kind, row) in enumerate(rows)], numbers=range(2, 6 + bool(baseline)))
    rest = []
    if motion := result.get("motion"):
        rest.append(f"Motion a video: {motion['before']:.1f} pixels before, {motion['after']:.1f} after.")
    if "preserved_rms" in result.get("distance", {}):
        what, unit = ("outputs", "RMS") if measured else ("videos", "RMS of 0..1")
        rest.append(f"Preserved {what} moved by {result['distance']['preserved_rms']:.3f} ({unit}).")
    if measured:
        how = f"Accuracy without and with the update: {measured}, chance {result['chance']:.1%}."
        how += " Null space: with an update in closed form instead, without training." if baseline else ""
    else:
        how = "Share of videos that show what their prompt says, from the same noise without and with the eraser"
        how += f", as {rater} sees them: zero-shot, chance {result['chance']:.1%}." if rater else "."
    return section("Is it gone, and is the rest still there?", note(how), rates, note(" ".join(rest)))


def _baseline(result: Mapping[str, Any]) -> list[float]:
    """Rates after the update in closed form, in the order of the table's rows; empty where none was measured."""
    found = result.get("baseline")
    if not found:
        return []
    synonyms = [found["synonyms"]] if result.get("synonyms") else []
    return [found["target"], *synonyms, *(r["after"] for r in found["preserved"])]


def answers(files: RunFiles) -> str:
    """What the language model still says, of a run of `forget` that has asked it; nothing for other runs."""
    asked = files.evaluation.get("leak", [])
    if not asked:
        return ""
    rows = [(escape(str(r["edited"])), escape(str(r["deepstack"])), f"{r['target']:.1%}", "{:.1%} to {:.1%}".format(*r["target_interval"]),
             f"{r['preserved']:.1%}", escape(", ".join(f"{text} ({count})" for text, count in r["said"].items()))) for r in asked]
    return section("What the language model says", note(
        f"Of {asked[0]['num_target']} pictures of the forgotten class and {asked[0]['num_preserved']} of what is preserved, those whose class it "
        f"names, asked “{files.setting('question')}”. Through DeepStack pictures reach it past the main merger."),
        table(("mergers edited", "DeepStack", "forgotten class named", "95 %", "preserved named", "of the forgotten class it says most"), rows,
              numbers=(2, 3, 4)))


def attempts(files: RunFiles) -> str:
    """What each attempt of a run of `forget` came to; nothing for other runs."""
    made = files.evaluation.get("attempts", [])
    if not made:
        return ""
    rows = [(f"<code>{escape(str(a['layer']))}</code>", f"{a['lambda_forget']:.2f}", number(a["loss"]), number(a["distance_before"]),
             number(a["distance_after"]), f"{a['fall']:.1%}", "yes" if a["accepted"] else "no") for a in made]
    return section("Attempts", note(
        "Accepted is an attempt that brings the class near enough to its target; " + (
            "the last one of every layer was." if files.evaluation.get("accepted") else
            f"where none was, the last one is kept. {WOULD_HELP}")),
        table(("layer", "λ_f", "lowest loss", "distance before", "after", "fall", "accepted"), rows, numbers=(1, 2, 3, 4, 5)))
