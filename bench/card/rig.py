"""The trainer's own step, built without files, text encoder or run directory, so that a cell can be measured.

Transformer, erasers, memory plan, teacher, losses, loss scaler and optimizer are the objects of a run, put together as
`trainer.assemble` and `trainer.loop` do; only the weights and embeddings are random.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.card.gauge import Gauge
from memory.optimizers import update_norms
from memory.plan import MemoryPlan
from memory.timeline import BACKWARD, FORWARD, OPTIMIZER, TEACHER
from trainer.assemble import Assembly, latent_shape, open_backbone, resolve_dtype
from trainer.backbones.cogvideox import CogVideoX
from trainer.clock import PhaseClock
from trainer.config import TrainConfig, replaced
from trainer.erasers import Erasers
from trainer.health import Health
from trainer.inspection import Subject
from trainer.losses import Samples, lockstep_backward, student_backward
from trainer.prompts import Embeddings
from trainer.rehearse import PROMPTS

Peer = Callable[[nn.Module, nn.ModuleList, torch.device], None]
_backbones: dict[str, CogVideoX] = {}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration to measure."""

    model: str
    frames: int
    side: tuple[int, int] | None = None
    """Height and width in pixels; None: the model's own."""
    plan: MemoryPlan = field(default_factory=MemoryPlan)
    rank: int = 128
    batch_size: int = 1
    student_only: bool = False
    """The teacher's sample is cached and nothing is preserved: a step is one student pass, forward and backward."""

    def config(self) -> TrainConfig:
        """The training run's settings. All three losses are trained, unless the student's pass is looked at alone."""
        height, width = self.side or (None, None)
        values = {"model.model": self.model, "model.weights": "random", "model.frames": self.frames,
                  "model.height": height, "model.width": width, "optim.rank": self.rank, "data.batch_size": self.batch_size, "memory": self.plan}
        if self.student_only:
            values |= {"data.pool": 1, "data.latents": "noise", "loss.beta": 0.0}
        return replaced(TrainConfig(), values)

    def name(self) -> str:
        """Model, size, and what differs from the plain plan."""
        plain, plan = MemoryPlan(), self.plan
        words = [self.model, f"{self.frames}f"] + ([f"{self.side[0]}x{self.side[1]}"] if self.side else [])
        words += [f"{k}={getattr(plan, k)}" for k in MemoryPlan.__dataclass_fields__ if getattr(plan, k) != getattr(plain, k)]
        words += [f"rank={self.rank}"] * (self.rank != 128) + [f"batch={self.batch_size}"] * (self.batch_size > 1)
        return " ".join(words + ["student only"] * self.student_only)


def backbone_of(cell: Cell) -> CogVideoX:
    """The backbone of a cell; its configuration is built once a process."""
    if cell.model not in _backbones:
        _backbones[cell.model] = open_backbone(cell.config().model)
    return _backbones[cell.model]


def _close_ranks(transformer: nn.Module, slots: Sequence[torch.Tensor], gauge: Gauge) -> None:
    """Lay what has stayed on the device side by side, as where weights are loaded on the host and only those that stay are sent."""
    stayed = [tensor for tensor in (*transformer.parameters(), *transformer.buffers(), *slots) if tensor.device == gauge.device]
    for tensor in stayed:
        tensor.data = tensor.data.cpu()
    gauge.release()
    for tensor in stayed:
        tensor.data = tensor.data.to(gauge.device)


class Rig:
    """A run that is ready to step. Weights are drawn on the device, where that takes no time; what the plan streams goes to
    the host from there. Set it up before capping the device."""

    def __init__(self, cell: Cell, gauge: Gauge, *, peer: Peer | None = None, watched: bool = False, bare: bool = False,
                 around_student: Callable[[], AbstractContextManager] = nullcontext):
        """`peer`: what takes the place of the memory plan. `watched`: the health checks of a run around every step; `bare`: not even
        the norms of updates, for which a run holds a copy of the erasers meanwhile.
        `around_student`: a context in which the student's forward pass runs (peers)."""
        self.cell, self.gauge, self.bare, self.config = cell, gauge, bare, cell.config()
        config, device, backbone = self.config, gauge.device, backbone_of(cell)
        dtype, shape = resolve_dtype(backbone, config.memory, insist=True), latent_shape(backbone, config.model)
        transformer = backbone.load_transformer(dtype=dtype, device=device, latent_shape=shape)
        blocks = backbone.blocks(transformer)
        self.erasers = Erasers(blocks, config.optim.rank)
        self.applied = None if peer else backbone.apply(config.memory, transformer, device)
        if self.applied and self.applied.offload:
            _close_ranks(transformer, self.applied.offload.device_buffers, gauge)
        # The predictor places its position tables where the weights are: after they were moved, and before a peer takes them away.
        predict = self.predict = backbone.predictor(transformer, shape)
        if peer:
            peer(transformer, blocks, device)
        gauge.release()  # what setting up has left in the cache is no part of the cell
        names = sorted(PROMPTS.texts)
        table = torch.randn(len(names), backbone.text_length, backbone.text_width,
                            generator=torch.Generator().manual_seed(0)).to(dtype)
        subject = Subject.of(config, backbone, Assembly(transformer, blocks, predict, self.applied, self.erasers, device, dtype, shape), PROMPTS,
                             Embeddings(table, names).to(device), {"concept": torch.zeros(1, dtype=torch.int64)})
        self.samples, self.optimizer, self.scaler = Samples(subject.teacher, config.data.pool, device), subject.optimizer, subject.scaler
        self.health = Health(subject) if watched else None
        self.clock = PhaseClock(device, on_phase=gauge.phase)
        if self.applied:
            self.applied.count_waits(self.clock.waiting)

        def student(*args: Any) -> torch.Tensor:
            with around_student():
                return predict(*args)

        lockstep = self.applied and self.applied.lockstep
        self.student, self.together = (f and self.clock.around(f, during=FORWARD, after=BACKWARD) for f in (student, lockstep))
        self.num_steps, self.loss = 0, torch.zeros((), device=device)

    def step(self) -> None:
        """One optimizer step, as in `trainer.loop`. The host does not wait."""
        self.clock.phase(TEACHER)
        share = self.scaler.scale(torch.ones((), device=self.gauge.device))
        number, loss = self.num_steps, self.config.loss
        if self.together:
            terms = lockstep_backward(self.together, self.predict, self.erasers, self.samples.teacher, self.samples.drawn(number), loss, scale=share)
        else:
            terms = student_backward(self.student, self.erasers, self.samples(number), loss, scale=share)
        self.clock.phase(OPTIMIZER)
        self.scaler.unscale_(self.optimizer)
        if self.health is not None:
            self.health.apply(number, terms)
        else:
            parameters = self.erasers.parameters()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
            update = partial(self.scaler.step, self.optimizer)
            update() if self.bare else update_norms(parameters, update)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.end_step()
        self.loss.copy_(terms["loss"])  # a tensor that is kept would be one more every step
        self.num_steps += 1

    def run(self, num_steps: int, *, num_warm: int = 1) -> dict[str, Any]:
        """Median seconds a step, in all and by phase, and the peaks of the steps after `num_warm` others."""
        for _ in range(num_warm):
            self.step()
        before, counted = self._totals(), self.gauge.counters()
        self.gauge.begin()
        taken = []
        for _ in range(num_steps):
            self.step()
            self.gauge.synchronize()  # between steps only, so that each is read
            taken.append(self.clock.read())
        peaks, after = self.gauge.end(), self.gauge.counters()
        moved = {key: (value - before[key]) // num_steps for key, value in self._totals().items()}
        return {
            "settings": self.cell.name(), "step_seconds": statistics.median(step["seconds"] for step in taken),
            "seconds_by_phase": {name: statistics.median(step["phase_seconds"].get(name, 0.0) for step in taken)
                                 for name in taken[0]["phase_seconds"]},
            "num_steps": num_steps, "all_step_seconds": [step["seconds"] for step in taken], "peaks": peaks,
            "allocated_bytes": max(peak["allocated_bytes"] for peak in peaks.values()),
            "reserved_bytes": max(peak["reserved_bytes"] for peak in peaks.values()),
            "num_retries": after["num_retries"] - counted["num_retries"],
            "num_driver_allocations": after["num_driver_allocations"] - counted["num_driver_allocations"],
            "grown_bytes": after["reserved_bytes"] - counted["reserved_bytes"],
            "streamed_bytes": self._streamed_bytes(), "loss": float(self.loss), **{f"{key}_a_step": value for key, value in moved.items()},
        }

    def _streamed_bytes(self) -> int:
        """Weights that do not stay on the device."""
        offload = self.applied.offload if self.applied is not None else None
        return sum(master.nbytes for master in offload.host_buffers) if offload else 0

    def _totals(self) -> dict[str, int]:
        if self.applied is None:
            return {}
        return {name: getattr(self.applied, name) for name in ("num_recomputes", "num_loads", "bytes_streamed", "bytes_parked")}


@contextmanager
def rigged(cell: Cell, gauge: Gauge, **more: Any) -> Iterator[Rig]:
    """A rig, gone and given back at the end. The device is asked for what the cell itself holds only."""
    rig = Rig(cell, gauge, **more)
    try:
        yield rig
    finally:
        # Hooks and forwards refer to each other in circles; without this, nothing goes before the next collection.
        rig.__dict__.clear()
        if cell.plan.compile:
            torch._dynamo.reset()  # compiled code holds on to what it was compiled for


def measured(cell: Cell, gauge: Gauge, *, num_steps: int, num_warm: int = 1, cap: int | None = None, **more: Any) -> dict[str, Any]:
    """Set a cell up, run it under a cap (bytes the allocator may reserve), and take it down."""
    with rigged(cell, gauge, **more) as rig, gauge.capped(cap):
        return rig.run(num_steps, num_warm=num_warm)
