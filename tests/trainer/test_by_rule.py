"""What the rule counts: on rendered videos every rate is known beforehand."""

import pytest
import torch

from trainer import by_rule as module
from trainer.backbones.location import BUNDLED
from trainer.by_rule import require_measurable, scene_prompts
from trainer.config import ModelConfig
from trainer.errors import UsageError
from trainer.shapes import world


def _words(prompt: str) -> set[str]:
    return set(prompt.split())


@pytest.mark.parametrize("concept", ["red", "circle", "left", "crimson", "Red"])
def test_cases_are_balanced_and_say_what_their_group_promises(concept):
    attribute, name = world.kind_of(concept)
    chosen = scene_prompts(concept, 64, 5)
    groups = {g: [c for c in chosen if c.group == g] for g in ("target", "synonyms", "preserved")}
    assert len(groups["target"]) == len(groups["synonyms"]) == 64
    assert len(groups["preserved"]) == 64 * (len(world.ATTRIBUTES[attribute]) - 1)
    training = {p for p, _ in world.erasure_pairs(concept)}
    synonyms = set(world.ATTRIBUTES[attribute][name][1:])
    for case in chosen:
        shown = {world.kind_of(w) for w in case.prompt.split() if any(w in ws for n in world.ATTRIBUTES.values() for ws in n.values())}
        assert shown == {(k, getattr(case.scene, k)) for k in world.ATTRIBUTES}
        if case.group == "target":
            assert case.prompt in training and getattr(case.scene, attribute) == name
        elif case.group == "synonyms":
            assert _words(case.prompt) & synonyms and name not in _words(case.prompt)
        else:
            assert getattr(case.scene, attribute) != name
    for kind in world.ATTRIBUTES:  # every value of the other attributes about equally often
        if kind != attribute:
            counts = [sum(getattr(c.scene, kind) == v for c in groups["target"]) for v in world.ATTRIBUTES[kind]]
            assert max(counts) - min(counts) <= len(world.ATTRIBUTES["shape"]) * len(world.ATTRIBUTES["direction"])
            assert min(counts) > 0


def test_cases_prefer_captions_that_pretraining_did_not_see():
    chosen = scene_prompts("red", 64, 0)
    plain = [c for c in chosen if c.group != "target"]
    assert sum(world.held_out(c.prompt) for c in plain) > 0.9 * len(plain)


def test_cases_are_a_function_of_the_seed():
    assert scene_prompts("red", 10, 1) == scene_prompts("red", 10, 1) != scene_prompts("red", 10, 2)


def test_rows_of_the_table_have_enough_videos():
    """At least `num_videos` in every row, those of a single colour, shape and direction included."""
    chosen = scene_prompts("red", 64, 0)
    kept = [c for c in chosen if c.group == "preserved"]
    for kind, names in world.ATTRIBUTES.items():
        for name in names:
            count = sum(getattr(c.scene, kind) == name for c in kept)
            assert count >= 64 or (kind, name) == ("colour", "red"), (kind, name, count)


def _rendered(chosen, when: str, *, seed: int) -> torch.Tensor:
    """What a perfect eraser of red would make: the same, but green where red was asked for."""
    videos = []
    for i, case in enumerate(chosen):
        colour = "green" if when == "after" and case.scene.colour == "red" else case.scene.colour
        scene = world.Scene(colour, case.scene.shape, case.scene.direction)
        videos.append(world.render(scene, torch.Generator().manual_seed(seed + i)))
    return torch.stack(videos)


def _table(videos, chosen):
    found = {when: [world.detect(v) for v in clip] for when, clip in videos.items()}
    return module._table("red", chosen, found, videos)


def test_rates_of_a_perfect_eraser():
    chosen = scene_prompts("red", 12, 0)
    result = _table({when: _rendered(chosen, when, seed=3) for when in ("before", "after")}, chosen)
    for group in ("target", "synonyms"):
        assert (result[group]["before"], result[group]["after"]) == (1.0, 0.0)
    names = {(row["name"], row["kind"]) for row in result["preserved"]}
    expected = {(v, k) for k, vs in world.ATTRIBUTES.items() for v in vs} - {("red", "colour")}
    assert names == expected | {("shape of red prompts", "target-shape"), ("direction of red prompts", "target-direction")}
    for row in result["preserved"]:
        assert row["before"] == row["after"] == 1.0
        assert 0 < row["after_interval"][0] < row["after_interval"][1] == pytest.approx(1.0)
    assert result["motion"]["before"] == pytest.approx(result["motion"]["after"]) and result["motion"]["before"] > 8
    assert result["distance"]["preserved_rms"] == 0.0


def test_frozen_videos_lose_their_motion_and_their_directions():
    chosen = scene_prompts("red", 12, 0)
    before = _rendered(chosen, "before", seed=3)
    result = _table({"before": before, "after": before[:, :, :1].expand_as(before)}, chosen)
    assert result["motion"]["after"] < 0.1 and result["distance"]["preserved_rms"] > 0.02
    rows = {row["name"]: row for row in result["preserved"]}
    assert rows["left"]["after"] == 0.0 and rows["circle"]["after"] == 1.0


def test_videos_destroyed_by_the_eraser_show_in_the_rows_of_the_target():
    chosen = scene_prompts("red", 12, 0)
    before = _rendered(chosen, "before", seed=3)
    result = _table({"before": before, "after": torch.zeros_like(before)}, chosen)
    assert result["target"]["after"] == 0.0
    assert all(row["after"] == 0.0 for row in result["preserved"])


@pytest.mark.parametrize("concept, size, message", [
    ("giraffe", {}, "--concept giraffe: without --rater, only what the bundled model knows"), ("red", {"height": 64}, "--height 64: only videos of 9 frames of 32 x 32"),
    ("red", {"frames": 1}, "--frames 1: only videos of 9 frames")])
def test_what_the_rule_cannot_see_is_refused_at_once(concept, size, message):
    with pytest.raises(UsageError, match=message):
        require_measurable(concept, ModelConfig(**size))
    require_measurable("crimson", ModelConfig(width=32))


def test_another_model_is_not_measured_and_a_copy_of_the_bundled_one_is(pipelines):
    with pytest.raises(UsageError, match="--model .*2b: only videos of the bundled model"):
        require_measurable("red", ModelConfig(model=str(pipelines["2b"])))
    require_measurable("red", ModelConfig(model=str(BUNDLED)))
