"""What a run needs on a card: the run's own phases as a workload for `memory.search`. Everything here is predicted."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from memory.assess import MARGIN, Assessment, Workload, assess
from memory.cards import GIB, Card, card_names, lookup
from memory.plan import MemoryPlan, is_checkpointed, resolve_keeps
from memory.ranking import SEARCHED, SearchResult
from memory.search import search
from memory.timeline import pinned_bytes
from memory.timing import LAUNCH_S
from trainer.assemble import chosen_device, collect_prompts, latent_shape, masking_blocks, open_backbone, require_guidance, resolve_dtype
from trainer.backbones import published
from trainer.backbones.cogvideox import CogVideoX
from trainer.beside import Beside
from trainer.config import ModelConfig, TrainConfig
from trainer.distributed import divided, num_ranks
from trainer.errors import DoesNotFit, UsageError
from trainer.live_view import seconds_text
from trainer.phases import phases_around
from trainer.prompts import PromptSet
from trainer.rehearse import num_rehearsed, rehearse, teacher_share
from trainer.several_cards import assess_sharded, card_share, faster, host_share

LONG_STEP = 600.0
"""Seconds that no step of a run that somebody waits for takes."""


@dataclass(frozen=True)
class Forecast:
    """What a search said for a card."""

    card: Card
    config: TrainConfig
    result: SearchResult
    num_cards: int = 1
    sharded: SearchResult | None = None
    """With blocks divided among the cards, if that was looked at."""
    unsharded: SearchResult | None = None
    """With every card on its own, if there are several."""

    def by_placement(self) -> dict[str, Assessment]:
        """The best, or else the smallest, plan of every way in which several cards may hold the frozen blocks."""
        if self.num_cards == 1:
            return {}
        results = {"divided among the cards": self.sharded, "each card on its own": self.unsharded}
        return {name: result.best or result.smallest for name, result in results.items() if result}

    @property
    def chosen(self) -> Assessment:
        """The fastest plan that fits, or, if none does, the one that needs least."""
        return self.result.best or self.result.smallest

    @property
    def step_seconds(self) -> float:
        """What a step of that takes: of a card's at least what its host takes to launch it."""
        return step_seconds(self.chosen, self.card)

    @property
    def host_may_help(self) -> bool:
        """Whether plans were left out that keep on the host what the best one recomputes, as nobody said what the host has."""
        best = self.result.best
        return bool(self.card.host_bytes is None and not self.card.unified and best and self.result.near_misses
                    and is_checkpointed(resolve_keeps(best.plan, _opened(self.config.model).num_blocks)))


def without_weights(config: TrainConfig) -> TrainConfig:
    """A published model is planned from its published configuration: what cannot be is refused before a download of hours."""
    model = config.model
    names = {hub_id: name for name, hub_id in published.HUB_IDS.items()} | {name: name for name in published.TRANSFORMERS}
    if model.weights == "random" or model.model not in names or Path(model.model).exists():
        return config
    return replace(config, model=replace(model, model=names[model.model], weights="random"))


def workload(config: TrainConfig, *, num_cards: int | None = None) -> Workload:
    """A run as `memory.search` sees it, on one of `num_cards`; None: of as many as train together now.

    Traces and needs are remembered: they are the same for every card, and for runs that differ in what neither depends on.

    Raises UsageError for settings that cannot be.
    """
    num_cards, prompts = num_cards or num_ranks(), collect_prompts(config)
    backbone = _opened(config.model)
    latent_shape(backbone, config.model)
    masking_blocks(backbone, config.loss)
    resolve_dtype(backbone, config.memory, insist=config.model.force_dtype)
    require_guidance(config)
    run = _looked_at(config)

    def trace(plan: MemoryPlan, num_blocks: int) -> tuple:
        return rehearse, backbone, run, plan, num_blocks, num_cards

    def phases(plan: MemoryPlan) -> tuple:  # of the plan's fields, these matter
        return phases_around, backbone, run, MemoryPlan(dtype=plan.dtype, guidance=plan.guidance, num_shards=plan.num_shards,
                                                        feed_forward_chunks=plan.feed_forward_chunks)

    return Workload(
        num_blocks=backbone.num_blocks, repeats=config.optim.accumulation / num_rehearsed(config),
        teacher_share=teacher_share(config),
        host_bytes=Workload.host_bytes + _embedded_bytes(backbone, prompts, config) + _pooled_bytes(backbone, config, num_cards),
        trace=lambda plan, num_blocks: _calls(trace(plan, num_blocks)), phases=lambda plan: _calls(phases(plan)),
        prepare=lambda traces, plans: _calls.announce([*(trace(*wanted) for wanted in traces[:2]), *map(phases, plans),
                                                       *(trace(*wanted) for wanted in traces[2:])]))


def _looked_at(config: TrainConfig) -> TrainConfig:
    """A run as its traces and phases see it: of prompts, the optimizer's schedule and what is written they see nothing."""
    plain, pool = TrainConfig(), config.data.trajectory_steps if config.data.pool else 0
    data = replace(config.data, prompts=None, concept=plain.data.concept, synonyms=(), preserve=(), preserve_file=None, pool=pool)
    return replace(config, memory=MemoryPlan(), data=data,
                   optim=replace(plain.optim, rank=config.optim.rank, accumulation=num_rehearsed(config)),
                   output=replace(plain.output, guidance_scale=config.output.guidance_scale))


def _embedded_bytes(backbone: CogVideoX, prompts: PromptSet, config: TrainConfig) -> int:
    """Of the host, what the embeddings of all prompts take."""
    distinct = {*prompts.texts, *config.output.sample_prompts}
    return pinned_bytes(len(distinct) * backbone.text_length * backbone.text_width * _dtype(config).itemsize)


def _pooled_bytes(backbone: CogVideoX, config: TrainConfig, num_cards: int) -> int:
    """Of the host, what a pool's samples take, as `trainer.losses.Sample` has them: the rows of one of `num_cards`."""
    shape, data = latent_shape(backbone, config.model), config.data
    latents = 4 * math.prod(shape)
    row = [latents, latents, 8, backbone.text_length * backbone.text_width * _dtype(config).itemsize]  # x_t, its target, t and text
    rows = row * (2 if config.loss.beta > 0 else 1) + [4 * (backbone.num_tokens(shape) - backbone.text_length)] * (config.loss.alpha > 0)
    count = min(data.pool, config.optim.steps * config.optim.accumulation)
    return count * sum(pinned_bytes(data.batch_size // num_cards * num_bytes) for num_bytes in rows)


_opened: Callable[[ModelConfig], CogVideoX] = lru_cache(maxsize=8)(open_backbone)
_calls = Beside(lambda call: call[0](*call[1:]))


def _dtype(config: TrainConfig) -> torch.dtype:
    return resolve_dtype(_opened(config.model), config.memory, insist=True)


def _dtype_name(config: TrainConfig) -> str:
    return str(_dtype(config)).removeprefix("torch.")


def check_card(config: TrainConfig, card: Card) -> None:
    """Raises UsageError where the card does not compute in the run's dtype."""
    name = _dtype_name(config)
    if not card.supports(name):
        raise UsageError(f"--profile {card.name}: {card.label} has no {name}; use --dtype float32"
                         + (" or --dtype float16 --force-dtype" if card.fp16 else ""))


def check_attention(config: TrainConfig, card: Card, num_cards: int) -> None:
    """Raises DoesNotFit where one attention is larger than the card, whatever the plan: a step of so many tokens takes long to trace."""
    backbone = _opened(config.model)
    num_tokens = backbone.num_tokens(latent_shape(backbone, config.model))
    # queries, keys, values and what comes of them
    num_bytes = 4 * config.data.batch_size // num_cards * num_tokens * backbone.width * _dtype(config).itemsize
    if num_bytes > max(GIB, card.usable_bytes):
        raise DoesNotFit(f"{config.model.model} does not fit {card.label}: what one attention reads and writes is {num_bytes / GIB:.0f} GiB; "
                         "fewer --frames, a smaller --height and --width or a smaller --batch-size need less")


def step_seconds(found: Assessment, card: Card) -> float:
    """What a step takes: of a card's at least what its host takes to launch it."""
    return found.time.seconds if card.is_cpu else max(found.time.seconds, found.time.launching)


def forecast(config: TrainConfig, card: Card, fixed: Collection[str] = (), *, num_cards: int | None = None) -> Forecast:
    """Search for the fastest plan of a run on `card`; fields of the memory plan named in `fixed` stay as configured.

    On one of `num_cards` such cards in a machine; None: of as many as train together now.
    Raises UsageError for settings that cannot be, on this card or at all; DoesNotFit where no plan needs to be looked at.
    """
    config, num_cards = without_weights(config), num_cards or num_ranks()
    run, card = workload(config, num_cards=num_cards), card_share(card, num_cards)
    check_card(config, card)
    divided(config.data.batch_size, num_cards, "cards")
    check_attention(config, card, num_cards)
    sharded = unsharded = None
    divisible = "resident_blocks" not in fixed and config.memory.passes == "sequential"
    if num_cards > 1 and divisible and (config.memory.num_shards > 1 or "num_shards" not in fixed):
        sharded = assess_sharded(run, card, config.memory, num_cards, fixed)
    if config.memory.num_shards == 1:
        unsharded = search(run, card, base=config.memory, fixed=[name for name in SEARCHED if name in fixed],
                           host_bytes=host_share(card, num_cards))
    if config.memory.num_shards not in (1, num_cards) or (sharded is None and unsharded is None):
        raise UsageError(f"--num-shards {config.memory.num_shards}: blocks are divided among the cards of a run, here "
                         f"{num_cards}; say --cards {config.memory.num_shards} (training: torchrun), no --resident-blocks and no --passes")
    result = faster(sharded, unsharded) if sharded and unsharded else sharded or unsharded
    return Forecast(card, config, result, num_cards, sharded, unsharded)


def forecast_as_given(config: TrainConfig, card: Card) -> Assessment:
    """What exactly the configured plan needs on `card`. Raises as `forecast` does."""
    config, card = without_weights(config), card_share(card, num_ranks())
    run = workload(config)
    check_card(config, card)
    check_attention(config, card, num_ranks())
    if config.memory.num_shards > 1:  # which no short trace tells
        return assess(run, config.memory, card)
    found = search(_alone(run), card, base=config.memory, fixed=SEARCHED)  # of one plan: short traces do, where its blocks are alike
    return found.best or found.smallest


def forecast_pinning(config: TrainConfig, card: Card, pinned_bytes: int, fixed: Collection[str]) -> Assessment | None:
    """The fastest plan of a run on `card` that pins no more than `pinned_bytes` of the host's memory, which is all that its `host_bytes`
    count; None if there is none. Fields named in `fixed` stay as configured. Raises as `forecast` does."""
    config = without_weights(config)
    if config.memory.num_shards > 1:
        return None
    run = _alone(workload(config))
    pinning = replace(run, host_bytes=run.host_bytes - Workload.host_bytes,
                      phases=lambda plan: tuple(replace(need, host_bytes=0) for need in run.phases(plan)))
    return search(pinning, card, base=config.memory, fixed=fixed, host_bytes=pinned_bytes).best


def _alone(run: Workload) -> Workload:
    """Without a fork: the run may have begun, and have threads."""
    return replace(run, prepare=lambda traces, phases: None)


def planned(config: TrainConfig, card: Card, fixed: Collection[str]) -> tuple[TrainConfig, list[str], Assessment]:
    """The config with the planner's memory settings, which settings it chose, and what it predicts. Raises DoesNotFit."""
    found = forecast(config, card, fixed)
    if found.result.best is None:
        raise DoesNotFit(verdict(found))
    chosen = [name for name in (*SEARCHED, "num_shards") if name not in fixed]
    return replace(config, memory=found.result.best.plan), chosen, found.result.best


def require_room(config: TrainConfig, card: Card, found: Assessment) -> None:
    """Raises DoesNotFit where the configured plan, which is `found` to need that, does not fit, and no other is looked for."""
    if not found.fits:
        raise DoesNotFit(f"{config.model.model} does not fit {card.label}: this plan {found.reason}; {_room(found, card)}, and "
                         f"--profile auto looks for a smaller plan")


def require_sense(config: TrainConfig, on_cpu: Assessment | None = None, *, what: str = "trains") -> None:
    """Raises UsageError where nobody asked for the CPU, and it would take weeks: a driver, or torch's build, is missing.

    `on_cpu`: what training takes there, if that is known. `what` the command does; a video takes longer than a step of training.
    """
    if config.model.device != "auto" or chosen_device("auto").type != "cpu":
        return
    try:
        seconds = (on_cpu or forecast_as_given(config, lookup("cpu"))).time.seconds
    except UsageError:  # what cannot be trained, as for its scheduler, may generate; and says itself what it cannot
        return
    if seconds > LONG_STEP:
        long = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
        raise UsageError(f"there is no CUDA card here, and on the CPU a step of training {config.model.model} takes about {long} (predicted); "
                         f"python run.py doctor says what is missing, --device cpu {what} nevertheless")


def _room(found: Assessment, card: Card) -> str:
    free = found.needed_bytes / (1 - MARGIN) if card.unified else found.host_bytes
    return f"{math.ceil(free / GIB)} GiB free would do"


def _step_text(found: Forecast) -> str:
    """How long a step takes, and what most of that is."""
    time = found.chosen.time
    if found.step_seconds > time.seconds:
        return f"{seconds_text(found.step_seconds)} a step (its host gives the card {time.num_operators:,.0f} operators, {1e6 * LAUNCH_S:.0f} µs for each assumed)"
    return f"{seconds_text(time.seconds)} a step (largest part: {time.bottleneck})"


def verdict(found: Forecast) -> str:
    """One sentence: whether it fits, and what would."""
    c, a, others = found.card, found.chosen, found.card.used_by_others_bytes
    if found.result.best:
        beside = f" beside the {others / GIB:.2f} GiB of other processes" if others else ""
        return (f"{found.config.model.model} fits {c.label}: predicted {a.needed_bytes / GIB:.2f} GiB of "
                f"{c.usable_bytes / GIB:.2f} GiB usable{beside}, {_step_text(found)}")
    room = _room(a, c) + f" for each of the {found.num_cards} cards' processes" * (found.num_cards > 1)
    if a.fits_card or c.unified:
        would_do = room
    elif others and a.needed_bytes <= (1 - MARGIN) * (c.usable_bytes + others):
        would_do = f"it would if other processes did not hold {others / GIB:.2f} GiB, which nvidia-smi shows"
    else:
        larger, host = smallest_card(found), host_share(c, found.num_cards)
        would_do = f"the smallest listed card that would do: {larger}"
        if larger != "none" and host is not None and a.host_bytes > host:
            would_do += f", and of host memory {room}"
        if found.config.data.batch_size > found.num_cards:
            would_do += "; a smaller --batch-size with as much more --accumulation needs less"
    return f"{found.config.model.model} does not fit {c.label}: the smallest plan {a.reason}; {would_do}"


def smallest_card(found: Forecast) -> str:
    """The listed card with least memory whose usable bytes hold the plan that needs least, and that card's own context and workspaces."""
    ours, cards = found.card.context_bytes + found.card.cublas_workspace_bytes, []
    for card in map(lookup, card_names()):
        needed = found.result.smallest.needed_bytes - ours + card.context_bytes + card.cublas_workspace_bytes
        if not card.unified and card.usable_bytes * (1 - MARGIN) >= needed and card.supports(_dtype_name(found.config)):
            cards.append(card)
    return min(cards, key=lambda card: card.capacity_bytes).name if cards else "none"
