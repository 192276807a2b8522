"""What the planner says of several cards, on tiny models of random weights; nothing needs a second process."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from memory.assess import assess
from memory.cards import lookup
from memory.plan import SHARDING_BUFFERS, MemoryPlan, PlanError
from memory.ranking import CHUNKS
from trainer import cli
from trainer.assemble import open_backbone
from trainer.errors import UsageError
from trainer.forecast_text import as_json, command, print_forecast
from trainer.planning import forecast, workload
from trainer.rehearse import rehearse
from trainer.several_cards import assess_sharded, faster, sharded_plans

NUM_BLOCKS, RANK = 12, 32
CARD = "4090"


@pytest.fixture
def traced(tiny_config):
    """A rehearsed step on 12 blocks, or fewer."""
    config = tiny_config(data__batch_size=4, optim__rank=RANK)
    backbone = open_backbone(config.model)

    def trace(num_cards: int = 1, batch_size: int = 4, num_blocks: int = NUM_BLOCKS, **plan):
        chosen = replace(config, data=replace(config.data, batch_size=batch_size))
        return rehearse(backbone, chosen, MemoryPlan(**plan), num_blocks=num_blocks, num_cards=num_cards)

    return trace


def test_each_card_holds_its_part_and_a_few_whole_blocks(traced):
    whole, streamed = traced(4, num_blocks=6), traced(4, num_blocks=6, resident_blocks=0, offload_buffers=SHARDING_BUFFERS)
    sharded = traced(4, num_blocks=6, num_shards=4)
    blocks = streamed.standing_bytes("weights", "pinned")
    rest = whole.standing_bytes("weights", "device") - sum(
        s.num_bytes for s in whole.storages if s.category == "weights" and s.block is not None)
    assert sharded.standing_bytes("weights", "pinned") == 0
    assert sharded.standing_bytes("weights", "device") == rest + blocks // 4
    buffers = sharded.standing_bytes("transfer buffers", "device")
    assert buffers == streamed.standing_bytes("transfer buffers", "device") == SHARDING_BUFFERS * blocks // 6
    assert sharded.prediction().peak_bytes < whole.prediction().peak_bytes


def test_one_of_several_cards_has_its_rows_and_reduces_once(traced):
    one_of_four, alone = traced(4, num_blocks=3), traced(1, num_blocks=3, batch_size=1)
    assert one_of_four.prediction().by_phase["student forward"] == alone.prediction().by_phase["student forward"]
    flat = 4 * 3 * (2 * 32 * RANK + 32 + RANK)  # all gradients in one float32 buffer; width 32
    assert [sum(s.num_bytes == flat for s in trace.storages) for trace in (one_of_four, alone)] == [1, 0]


def test_gathering_takes_the_link_less_the_own_part(tiny_config):
    run, card = workload(tiny_config(), num_cards=2), replace(lookup(CARD), host_link_bandwidth=1.0)
    link = {name: assess(run, plan, card).time.by_bound["host link"] for name, plan in
            {"sharded": MemoryPlan(num_shards=2), "streamed": MemoryPlan(resident_blocks=0)}.items()}
    assert link["sharded"] == pytest.approx(link["streamed"] / 2, rel=0.01)


def test_forecast_compares_the_ways_to_hold_blocks(tiny_config):
    config, card = tiny_config(memory__checkpoint="none"), lookup(CARD)
    found = forecast(config, card, ["checkpoint"], num_cards=2)  # given, so that little is searched
    ways = found.by_placement()
    assert set(ways) == {"divided among the cards", "each card on its own"} and found.chosen in ways.values()
    assert found.chosen.time.seconds == min(way.time.seconds for way in ways.values())
    said = as_json(found, {})
    assert said["num_cards"] == 2 and said["command"].startswith("torchrun --nproc-per-node=2 -- run.py")
    assert {name: way["settings"]["num_shards"] for name, way in said["by_placement"].items()} == {
        "divided among the cards": 2, "each card on its own": 1}
    divided = forecast(replace(config, memory=MemoryPlan(num_shards=2)), card, ["num_shards"], num_cards=2)
    assert divided.chosen.plan.num_shards == 2 and divided.unsharded is None
    assert "--num-shards 2" in command(config, divided.chosen.plan, {}, 2)
    none = forecast(replace(config, memory=MemoryPlan(num_shards=2)), replace(card, usable_bytes=card.context_bytes), ["num_shards"], num_cards=2)
    assert none.result.best is None and all(miss.time.seconds < none.chosen.time.seconds for miss in none.result.near_misses)
    alone = forecast(config, card, ["checkpoint"])
    assert as_json(alone, {})["num_cards"] == 1 and alone.sharded is None and not alone.by_placement()


@pytest.mark.parametrize("fits, num_tried, smallest, near", [(3, 3, 2, [1, 0]), (4, 4, 3, [2, 0]), (None, 4, 3, [2, 1, 0])])
def test_of_divided_blocks_the_first_plan_that_fits_is_taken(monkeypatch, fits, num_tried, smallest, near):
    """Plans by number, from 0, with the seconds and the bytes that they are said to need."""
    seconds, needs = [1.0, 3.0 if fits == 4 else 1.5, 1.8, 2.0], [9, 8, 7, 6]
    answers = iter(SimpleNamespace(number=i, fits=fits == i + 1, needed_bytes=needs[i], time=SimpleNamespace(seconds=seconds[i])) for i in range(4))
    monkeypatch.setattr("trainer.several_cards.assess", lambda *args, **more: next(answers))
    found = assess_sharded(SimpleNamespace(num_blocks=NUM_BLOCKS), lookup(CARD), MemoryPlan(), 2, ())
    assert (found.best and found.best.number) == (fits and fits - 1) and found.smallest.number == smallest
    assert found.num_candidates == num_tried and [miss.number for miss in found.near_misses] == near


def _found(seconds, needed_bytes, *, fits):
    one = SimpleNamespace(time=SimpleNamespace(seconds=seconds), needed_bytes=needed_bytes)
    return SimpleNamespace(best=one if fits else None, smallest=one)


def test_of_two_searches_the_faster_plan_that_fits_is_taken_or_what_needs_least():
    slow, fast = _found(2.0, 1, fits=True), _found(1.0, 9, fits=True)
    large, small = _found(0.5, 8, fits=False), _found(3.0, 7, fits=False)
    for one, two, better in ((slow, fast, fast), (large, slow, slow), (large, small, small)):
        assert faster(one, two) is better and faster(two, one) is better


@pytest.mark.parametrize("given, tried", [
    ({}, [{"num_keep_attention": NUM_BLOCKS}, {}, {"boundaries": "host"}, {"boundaries": "host", "feed_forward_chunks": CHUNKS}]),
    ({"num_keep_everything": 5}, [{}, {"boundaries": "host"}, {"boundaries": "host", "feed_forward_chunks": CHUNKS}]),
    ({"num_keep_everything": NUM_BLOCKS}, [{}]),
    ({"checkpoint": "none"}, [{}]),
    ({"checkpoint": "every:2"}, [{}, {"boundaries": "host"}, {"boundaries": "host", "feed_forward_chunks": CHUNKS}]),
], ids=str)
def test_what_contradicts_the_settings_given_is_not_tried(given, tried):
    plans = sharded_plans(MemoryPlan(**given), NUM_BLOCKS, 2, list(given))
    assert plans == [MemoryPlan(num_shards=2, **given, **recipe) for recipe in tried]


def test_settings_given_that_contradict_each_other_are_named():
    with pytest.raises(PlanError, match="num_keep_everything 13 .* exceed the 12 blocks"):
        sharded_plans(MemoryPlan(num_keep_everything=13), NUM_BLOCKS, 2, ["num_keep_everything"])


def test_what_does_not_go_together_is_refused(tiny_config):
    config, card = tiny_config(), lookup(CARD)
    with pytest.raises(UsageError, match="--batch-size 2 cannot be divided among 3 cards.*use --batch-size 3"):
        forecast(config, card, num_cards=3)
    with pytest.raises(UsageError, match="--num-shards 2.*--cards 2"):
        forecast(replace(config, memory=MemoryPlan(num_shards=2)), card, ["num_shards"])
    for number in ("0", "100000"):
        with pytest.raises(UsageError, match=f"--cards {number}: from 1 to 1024"):
            cli.main(["plan", "--cards", number])


def test_how_blocks_are_divided_is_planned_unless_somebody_says(tiny_config, capsys):
    for num_cards, origins, origin in ((2, {}, "planned"), (2, {"memory.num_shards": "flag"}, "flag"), (1, {}, "default")):
        found = forecast(tiny_config(memory__checkpoint="none"), lookup(CARD), ["checkpoint"], num_cards=num_cards)
        print_forecast(found, origins, explain=False)
        row = next(line for line in capsys.readouterr().out.splitlines() if "num_shards" in line)
        assert origin in row


def test_command_line(pipelines, capsys):
    cli.main(["plan", "--profile", CARD, "--model", str(pipelines["5b"]), "--cards", "2", "--json", "--concept", "red"])
    said = json.loads(capsys.readouterr().out)
    assert said["num_cards"] == 2 and "--batch-size 2" in said["command"]  # the least that two can share
