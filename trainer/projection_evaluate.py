"""Is the class gone from the projection's outputs, and are the others where they were?

CLIP: zero-shot accuracy on pictures, each assigned to the class whose text embedding has the highest cosine; without
pictures, each text is assigned to the class whose original embedding is nearest. Qwen3-VL: each picture is assigned to
the class whose mean in the original merger space is nearest; and the language model is asked.
Chance is one over the number of classes.

Legend: N examples, D input width, E output width.
"""

import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memory.exhaustion import exhausted, first_line
from trainer.nullspace import null_space_update
from trainer.projection_config import ForgetConfig
from trainer.projection_encoders import load_part, load_tokenizer
from trainer.projection_examples import Split, of_class
from trainer.projection_problem import Case, Problem
from trainer.projection_qwen import MAIN_MERGER, answers, deepstack_cut, edited
from trainer.prompts import word
from trainer.rates import rates
from trainer.run_directory import resuming
from trainer.run_files import EVALUATION, write_json
from trainer.shapes import world

logger = logging.getLogger(__name__)
Assigned = list[tuple[str, str]]  # (the example's class, the class that it is assigned to)


def evaluate_forgetting(run_dir: Path, config: ForgetConfig, case: Case, problems: Mapping[str, Problem],
                        updates: Mapping[str, Tensor], *, attempts: Sequence[Mapping[str, Any]], device: torch.device,
                        started: float) -> dict[str, Any]:
    """Measure before and after, and the closed-form baseline beside it; write RUN/evaluation.json and return it.

    `started`: time.monotonic() when the run began, for its seconds.
    """
    closed = {name: null_space_update(p.forget.cpu(), p.preserve.cpu(), (p.target - p.layer(p.forget)).cpu(), rank=config.rank)
              for name, p in problems.items()}
    assign = _Nearest(case) if case.embeddings is None else _ZeroShot(case)
    found = {when: assign(edit) for when, edit in (("before", {}), ("after", updates), ("baseline", closed))}
    measure = "zero-shot" if case.embeddings is not None else f"nearest class in {_SPACES[config.encoder]} space"
    result = {"concept": case.forget, "encoder": config.encoder, "measure": measure, "chance": 1 / (1 + len(case.kept)),
              **_rows(case, found), "synonyms": None, "distance": {}, "motion": None, "num_videos": None}  # there are none
    if result["target"]["before"] <= result["chance"]:
        logger.warning("%.0f%% of the examples of %r are taken for it before it is forgotten, no more than by chance (%.0f%%): the rates say "
                       "little; do they show it, and is that what the encoder calls it?", 100 * result["target"]["before"], case.forget,
                       100 * result["chance"])
    if case.embeddings is None:
        # A perfect edit ends at the target: whether that counts as gone is a matter of where the class means lie.
        result["target_nearest"] = assign.classes(problems[assign.layer.name].target.cpu()[None])[0]
    else:
        before, after, other = (assign.unseen(edit) for edit in ({}, updates, closed))
        words = [w for kind in world.ATTRIBUTES.values() for name, ws in kind.items() if name in case.forget.split() for w in ws[1:]]
        result["synonyms"] = {"names": words if config.model == "shapes" else [], **_rate(before, after)}
        result["baseline"]["synonyms"] = _rate(before, other)["after"]
    for name, problem in problems.items():
        for label, edit in (("after", updates), ("baseline", closed)):
            old, change = problem.distance().item(), edit[name].to(problem.forget)
            result["distance"].setdefault(name, {})[label] = {
                "forget_fall": 1 - problem.distance(change).item() / old if old else 0.0,
                "preserved_rms": (problem.preserve @ change.t()).square().mean().sqrt().item()}
    result["distance"]["preserved_rms"] = result["distance"][next(iter(problems))]["after"]["preserved_rms"]
    result |= {"attempts": list(attempts), "accepted": all({a["layer"]: a["accepted"] for a in attempts}.values()),  # of each layer the last
               "num_images": sum(row["num_images"] for row in (result["target"], *result["preserved"])),
               "seeds": [config.seed, config.seed]}
    if config.encoder == "qwen3-vl" and config.num_answers:
        write_json(run_dir / EVALUATION, result | {"seconds": time.monotonic() - started})  # whatever becomes of the rest
        try:
            result["leak"] = leak(config, case, updates, closed, device)
        except (RuntimeError, MemoryError) as e:
            if not exhausted(e):
                raise
            logger.warning("the language model was not asked: it does not fit there (%s); %s --device cpu asks it on the CPU",
                           first_line(e), resuming(run_dir))
    result["seconds"] = time.monotonic() - started
    write_json(run_dir / EVALUATION, result)
    return result


_SPACES = {"clip": "text", "qwen3-vl": "merger"}


class _ZeroShot:
    """CLIP: each picture goes to the class whose text embedding has the highest cosine."""

    def __init__(self, case: Case):
        self.case = case

    def __call__(self, updates: Mapping[str, Tensor]) -> Assigned:
        return self._assign(self._classes(updates), range(len(self.case.pictures)))

    def unseen(self, updates: Mapping[str, Tensor]) -> Assigned:
        """The forgotten class alone, named as training never named it: other words, other wordings."""
        vectors = self._classes(updates)
        vectors[0] = self._class(self.case.forget, updates, ("test", "synonyms"))
        return self._assign(vectors, [i for i, e in enumerate(self.case.pictures) if e.name == self.case.forget])

    def _classes(self, updates: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._class(name, updates, ("train",)) for name in (self.case.forget, *self.case.kept)])

    def _class(self, name: str, updates: Mapping[str, Tensor], splits: Sequence[Split]) -> Tensor:
        """The mean of a class' normalised text embeddings (E,), normalised."""
        (layer,) = self.case.layers.values()
        texts = layer(self.case.inputs[layer.name][of_class(self.case.examples, name, *splits)], updates.get(layer.name))
        return F.normalize(F.normalize(texts, dim=1).mean(0), dim=0)

    def _assign(self, vectors: Tensor, members: Sequence[int]) -> Assigned:
        names, chosen = (self.case.forget, *self.case.kept), (self.case.embeddings[list(members)] @ vectors.t()).argmax(1)
        return [(self.case.pictures[i].name, names[c]) for i, c in zip(members, chosen.tolist())]


class _Nearest:
    """Each example for measuring goes to the class whose mean original output is nearest to its new output; examples for training make the means."""

    def __init__(self, case: Case):
        self.case, self.names = case, (case.forget, *case.kept)
        self.layer = next(iter(case.layers.values()))
        inputs = case.inputs[self.layer.name]
        self.means = torch.stack([self.layer(inputs[of_class(case.examples, name, "train")]).mean(0) for name in self.names])  # (classes, E)
        self.members = [i for i, e in enumerate(case.examples) if e.split == "test"]

    def __call__(self, updates: Mapping[str, Tensor]) -> Assigned:
        outputs = self.layer(self.case.inputs[self.layer.name][self.members], updates.get(self.layer.name))
        return [(self.case.examples[i].name, name) for i, name in zip(self.members, self.classes(outputs))]

    def classes(self, outputs: Tensor) -> list[str]:
        """The nearest class of each output (N, E)."""
        return [self.names[c] for c in torch.cdist(outputs, self.means).argmin(1).tolist()]


@torch.no_grad()
def leak(config: ForgetConfig, case: Case, updates: Mapping[str, Tensor], closed: Mapping[str, Tensor],
         device: torch.device) -> list[dict[str, Any]]:
    """What the language model still says of the forgotten class: with mergers edited, and with DeepStack cut."""
    from transformers import Qwen3VLForConditionalGeneration

    asked = [case.examples[i] for name in (case.forget, *case.kept) for i in of_class(case.examples, name, "test")[:config.num_answers]]
    inputs = [case.tower.preprocess([e.content]) for e in asked]
    model = load_part(Qwen3VLForConditionalGeneration, case.tower.directory).to(device)
    tokenizer = load_tokenizer(case.tower.directory)
    main = {MAIN_MERGER: updates[MAIN_MERGER]}
    edits = {"none": {}, "main merger": main, "all mergers": updates, "main merger, null space": {MAIN_MERGER: closed[MAIN_MERGER]},
             "all mergers, null space": closed}
    table = []
    for edit, change in edits.items():
        if edit.startswith("all") and len(change) == 1:
            continue
        for cut in (False, True):
            if cut and edit.startswith("all"):
                continue  # what DeepStack's mergers say is cut anyway
            with edited(model, change), deepstack_cut(model) if cut else contextlib.nullcontext():
                said = answers(model, tokenizer, inputs, config.question, batch_size=config.batch_size)
            right = [says(text, e.name) for e, text in zip(asked, said)]
            ours = [r for r, e in zip(right, asked) if e.name == case.forget]
            theirs = [r for r, e in zip(right, asked) if e.name != case.forget]
            often = Counter(t for t, e in zip(said, asked) if e.name == case.forget).most_common(5)
            table.append({"edited": edit, "deepstack": "cut" if cut else "whole", **_interval("target", ours),
                          **_interval("preserved", theirs), "said": dict(often)})
    return table


def says(text: str, name: str) -> bool:
    """Whether a text names a class: golf_ball is "golf ball" or "Golf balls", and a football is no ball."""
    text, name = (re.sub(r"[\W_]+", " ", words).strip() for words in (text, name))
    return word(name).search(text) is not None


def _interval(label: str, hits: Sequence[bool]) -> dict[str, Any]:
    return {**rates(**{label: hits}), f"num_{label}": len(hits)}


def _rows(case: Case, found: Mapping[str, Assigned]) -> dict[str, Any]:
    """Target and preserved rows, their mean, and the same after the baseline."""
    def of(name: str, when: str) -> Assigned:
        return [pair for pair in found[when] if pair[0] == name]

    target = {"name": case.forget, **_rate(of(case.forget, "before"), of(case.forget, "after"))}
    preserved = [{"name": n, "kind": "class", **_rate(of(n, "before"), of(n, "after"))} for n in case.kept]
    baseline = [{"name": n, "after": _rate(of(n, "before"), of(n, "baseline"))["after"]} for n in case.kept]
    return {"target": target, "preserved": preserved,
            "preserved_mean": {when: sum(r[when] for r in preserved) / len(preserved) for when in ("before", "after")},
            "baseline": {"method": "null-space projection", "target": _rate([], of(case.forget, "baseline"))["after"],
                         "preserved": baseline, "preserved_mean": sum(r["after"] for r in baseline) / len(baseline)}}


def _rate(before: Assigned, after: Assigned) -> dict[str, Any]:
    """How often an example is assigned to its own class."""
    found = {when: [name == chosen for name, chosen in pairs] for when, pairs in (("before", before), ("after", after)) if pairs}
    return {"num_images": len(after), **rates(**found)}


def print_forgetting(result: Mapping[str, Any]) -> None:
    """The evaluation as tables on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 100)
    table = Table("", title_justify="left", title=Text(f"forgotten: {result['concept']} ({result['measure']}, chance {result['chance']:.1%})"))
    for column in ("examples", "before", "after", "after, 95 %", "null space"):
        table.add_column(column, justify="right")
    baseline = {r["name"]: r["after"] for r in result["baseline"]["preserved"]}
    rows = [(result["target"]["name"], result["target"], result["baseline"]["target"])]
    if result["synonyms"]:
        rows.append(("other words and wordings" if result["synonyms"]["names"] else "other wordings", result["synonyms"], result["baseline"]["synonyms"]))
    rows += [(row["name"], row, baseline[row["name"]]) for row in result["preserved"]]
    for label, row, other in rows:
        low, high = row["after_interval"]
        table.add_row(Text(label), str(row["num_images"]), f"{row['before']:.1%}", f"{row['after']:.1%}", f"{low:.1%} to {high:.1%}",
                      f"{other:.1%}")
    mean = result["preserved_mean"]
    table.add_row("preserved, mean", "", f"{mean['before']:.1%}", f"{mean['after']:.1%}", "", f"{result['baseline']['preserved_mean']:.1%}")
    console.print(table)
    if result.get("leak"):
        table = Table("mergers edited", "DeepStack", "forgotten class named", "preserved named", title="what the language model says",
                      title_justify="left")
        for row in result["leak"]:
            table.add_row(row["edited"], row["deepstack"], f"{row['target']:.1%}", f"{row['preserved']:.1%}")
        console.print(table)
