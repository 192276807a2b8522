"""Where training latents come from: no video is needed.

*noise*: x_0 ~ N(0, 1), noised to a random timestep. *trajectory*: start at noise and walk the sampler's timesteps
with the teacher's own predictions, training at each. Both are functions of (seed, step); a trajectory's current
latents are state, saved with the run. Both draw for the whole batch; of several processes, each trains on its rows and
holds no others.

A trajectory's tensors outlive a step, in the same two buffers all along: each time elsewhere they would scatter the memory between,
and a step would need more of it than the one before. For the same reason `allocate` makes them before the first step.
Legend: B batch, b rows of this process, F latent frames, C latent channels, H W latent size.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.diffusion import Sampler
from trainer.distributed import gather_rows, rows_of
from trainer.errors import CheckpointError, UsageError
from trainer.seeding import generator, noise, to_device

SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler")
"""Whose steps are functions of their arguments: others remember the steps before, or draw from generators that no seed reaches."""


@dataclass
class NoiseLatents:
    """x_t = add_noise(x_0, ε, t) with x_0, ε ~ N(0, 1) and t uniform, anew at every step."""

    scheduler: Any
    shape: tuple[int, ...]  # (B, F, C, H, W)
    seed: int
    stream: str
    device: torch.device
    rows: slice = field(default_factory=lambda: slice(None))
    advances: ClassVar[bool] = False
    """Whether a step's latents follow from those of the step before."""

    def prompt_index(self, step: int) -> int:
        """Which batch of prompts a step uses."""
        return step

    def first_needed(self, step: int) -> int:
        """The step from which `at` and `advance` must run to arrive at `step`."""
        return step

    def allocate(self) -> None:
        """Nothing is held from step to step."""

    def apart(self, rows: slice) -> "NoiseLatents":
        """The same latents, of these rows."""
        return replace(self, rows=rows)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """x_t (b,F,C,H,W) fp32 and t (b,) of a step."""
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (self.shape[0],),
                          generator=generator(self.seed, f"{self.stream}-timestep", step))
        x0 = noise(self.shape, self.seed, f"{self.stream}-x0", step)
        eps = noise(self.shape, self.seed, f"{self.stream}-noise", step)
        x = self.scheduler.add_noise(x0[self.rows], eps[self.rows], t[self.rows])
        return to_device(x, self.device), to_device(t[self.rows], self.device)

    def advance(self, step: int, velocity: Tensor) -> None:
        """Noise latents have no successor."""

    def state_dict(self) -> dict[str, Tensor]:
        """Noise latents have no state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@dataclass
class TrajectoryLatents:
    """The teacher's sampling trajectory: step s is denoising step s mod T of trajectory s div T."""

    scheduler: Any
    shape: tuple[int, ...]  # (B, F, C, H, W)
    seed: int
    stream: str
    device: torch.device
    num_steps: int
    rows: slice = field(default_factory=lambda: slice(None))
    advances: ClassVar[bool] = True
    _latents: Tensor | None = field(default=None, init=False)  # (b, F, C, H, W)
    _next: int = field(default=0, init=False)
    _buffers: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self._sampler = Sampler(self.scheduler, self.num_steps, self.device)

    def prompt_index(self, step: int) -> int:
        """Which batch of prompts a step uses: the same along one trajectory."""
        return step // self.num_steps

    def first_needed(self, step: int) -> int:
        """The step from which `at` and `advance` must run to arrive at `step`."""
        return step if self._latents is not None and self._next == step else step - step % self.num_steps

    def allocate(self) -> None:
        """Make the buffers of what is held from step to step; the first step does if nobody has."""
        shape = (len(range(self.shape[0])[self.rows]), *self.shape[1:])
        names = ("latents", "memory") if self._sampler.is_two_step else ("latents",)
        self._buffers = {name: [torch.empty(shape, device=self.device) for _ in range(2)] for name in names}

    def apart(self, rows: slice) -> "TrajectoryLatents":
        """The same trajectory, of as many rows, to be walked without moving this one. Before this one's first step it uses its buffers."""
        other = copy.copy(self)
        other.rows, other._sampler = rows, copy.deepcopy(self._sampler)
        if self._latents is not None:
            other._buffers = {}
        return other

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """x_t (b,F,C,H,W) fp32 and t (b,) of a step. Steps come in order; each but a first needs `advance` before.

        x_t is good until `advance` has been called for the next step.
        """
        trajectory, index = divmod(step, self.num_steps)
        if index == 0:
            start = noise(self.shape, self.seed, f"{self.stream}-start", trajectory)
            self._arrive(step, to_device(start[self.rows], self.device) * self.scheduler.init_noise_sigma)
        if self._latents is None or self._next != step:
            raise RuntimeError(f"{self.stream} trajectory stands at step {self._next}, not {step}: every step has to "
                               "advance it once, in order")
        return self._latents, self._sampler.timesteps[index].expand(len(self._latents))

    def advance(self, step: int, velocity: Tensor) -> None:
        """Move to the next timestep by the scheduler's own step."""
        trajectory, index = divmod(step, self.num_steps)
        # A stochastic scheduler's draws are a row's own: the same, whatever process the row is in.
        dice = [generator(self.seed, f"{self.stream}-step", trajectory, index, row)
                for row in range(self.shape[0])[self.rows]]
        self._arrive(step + 1, self._sampler.step(velocity.float(), index, self._latents, dice))

    def _arrive(self, step: int, latents: Tensor) -> None:
        """Stand at `step` with these latents, and with the memory that the sampler has by now."""
        self._latents, self._next = self._settled("latents", step, latents), step
        if self._sampler.memory is not None:
            self._sampler.memory = self._settled("memory", step, self._sampler.memory)

    def _settled(self, name: str, step: int, value: Tensor) -> Tensor:
        """`value` in its buffer of that step."""
        if not self._buffers:
            self.allocate()
        return self._buffers[name][step % 2].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole batch's, good as long as what `at` returns. Of several processes, all must call it."""
        if self._latents is None:
            return {}
        state = {f"{self.stream}.latents": gather_rows(self._latents), f"{self.stream}.next": torch.tensor(self._next)}
        if self._sampler.memory is not None:
            state[f"{self.stream}.memory"] = gather_rows(self._sampler.memory)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if f"{self.stream}.latents" not in state:
            raise CheckpointError(f"the checkpoint holds no {self.stream} trajectory; it was made with other --latents")
        memory, next_step = state.get(f"{self.stream}.memory"), int(state[f"{self.stream}.next"])
        due = self._sampler.is_two_step and next_step % self.num_steps > 0
        if memory is None and due or memory is not None and not self._sampler.is_two_step:
            raise CheckpointError(f"the checkpoint's {self.stream} trajectory is another scheduler's; go on with the model that it began with")
        self._sampler.memory = None if memory is None else memory[self.rows].to(self.device)
        self._arrive(next_step, state[f"{self.stream}.latents"][self.rows].to(self.device))


Latents = NoiseLatents | TrajectoryLatents


def make_latents(config: TrainConfig, scheduler: Any, shape: tuple[int, ...], stream: str,
                 device: torch.device) -> Latents:
    """The latents that the settings ask for, those of this process' rows; `shape` is the whole batch's.

    `scheduler` must not be shared. Streams differ in their randomness. Raises UsageError for one that cannot be trained with.
    """
    if type(scheduler).__name__ not in SCHEDULERS:
        raise UsageError(f"the model's scheduler is a {type(scheduler).__name__}, which only `generate` can use; for training, name one of "
                         f"{', '.join(SCHEDULERS)} in a copy of the model, in model_index.json and scheduler/scheduler_config.json")
    common = dict(scheduler=scheduler, shape=shape, seed=config.optim.seed, stream=stream, device=device,
                  rows=rows_of(shape[0]))
    if config.data.latents == "noise":
        return NoiseLatents(**common)
    return TrajectoryLatents(**common, num_steps=config.data.trajectory_steps)
