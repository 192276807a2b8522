"""Plans for several cards of one machine: each has its rows of the batch and reduces gradients; frozen blocks are whole on each
card, streamed to each from the host, or divided among the cards. Everything here is predicted.
"""

from collections.abc import Collection
from dataclasses import replace

from memory.assess import Workload, assess
from memory.cards import Card
from memory.plan import MemoryPlan, resolve_keeps, varied
from memory.ranking import CHUNKS, SEARCHED, SearchResult


def host_share(card: Card, num_cards: int) -> int | None:
    """Host memory that one of the cards' processes may take; None where it is not known."""
    return None if card.host_bytes is None else card.host_bytes // num_cards


def card_share(card: Card, num_cards: int) -> Card:
    """What one of the cards' processes sees of it: where card and host share one memory, its part."""
    return replace(card, usable_bytes=card.usable_bytes // num_cards) if card.unified else card


def sharded_plans(base: MemoryPlan, num_blocks: int, num_cards: int, fixed: Collection[str]) -> list[MemoryPlan]:
    """Plans with divided blocks, from the fastest to the most frugal; fields named in `fixed` are as in `base`.

    Raises PlanError where they contradict each other or the model; what contradicts them is left out.
    """
    recipes = ({"num_keep_attention": num_blocks}, {}, {"boundaries": "host"}, {"boundaries": "host", "feed_forward_chunks": CHUNKS})
    free = {name: getattr(MemoryPlan(), name) for name in SEARCHED if name not in fixed}
    plain = replace(base, **free, num_shards=num_cards)
    resolve_keeps(plain, num_blocks)
    plans = [varied(plain, num_blocks, **{k: v for k, v in recipe.items() if k in free}) for recipe in recipes]
    return list(dict.fromkeys(filter(None, plans)))


def assess_sharded(run: Workload, card: Card, base: MemoryPlan, num_cards: int, fixed: Collection[str]) -> SearchResult:
    """The first of `sharded_plans` that fits each of the cards."""
    best, misses = None, []
    for plan in sharded_plans(base, run.num_blocks, num_cards, fixed):
        found = assess(run, plan, card, host_bytes=host_share(card, num_cards))
        if found.fits:
            best = found
            break
        misses.append(found)
    tried = len(misses) + found.fits
    smallest = min([found, *misses], key=lambda a: a.needed_bytes)
    near = [miss for miss in misses if miss.time.seconds < (best or smallest).time.seconds]
    return SearchResult(best=best, near_misses=tuple(sorted(near, key=lambda a: a.needed_bytes)), smallest=smallest, num_candidates=tried,
                        num_unknown=0, num_replays=tried, num_traces=tried)


def faster(one: SearchResult, two: SearchResult) -> SearchResult:
    """The result with the faster plan that fits; if none does, that which needs least."""
    return min(one, two, key=lambda result: (0, result.best.time.seconds) if result.best else (1, result.smallest.needed_bytes))
