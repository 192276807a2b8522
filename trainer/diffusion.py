"""Walking a diffusion schedule: sampling, and the single steps that training trajectories advance by.

Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memory.guidance import guide, predict_pair
from memory.plan import GuidanceMode
from trainer.backbones import Predict
from trainer.errors import UsageError
from trainer.seeding import to_device


class Sampler:
    """A diffusers scheduler as a function of the step's index.

    DPM-Solver++ is a two-step method (`is_two_step`): `memory` is the previous step's estimate of x_0, None before the first step.
    """

    def __init__(self, scheduler: Any, num_steps: int, device: torch.device | str = "cpu"):
        kind, predicted = type(scheduler).__name__, scheduler.config.get("prediction_type")
        if predicted != "v_prediction":
            raise UsageError(f"the model's {kind} has prediction_type {predicted}; velocities (v_prediction) are what "
                             "a CogVideoX predicts and an eraser is trained on")
        if num_steps > scheduler.config.num_train_timesteps:
            raise UsageError(f"{num_steps} denoising steps: the model's scheduler has {scheduler.config.num_train_timesteps} at most; lower "
                             "--num-steps, in training --sample-steps or --trajectory-steps")
        scheduler.set_timesteps(num_steps, device=device)
        # Read once: a step must not wait for the device. For some counts diffusers adds a last one of -1; there are more than were asked
        # for where a scheduler looks at a step twice.
        self._values = [value for value in scheduler.timesteps.tolist() if value >= 0]
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps[:len(self._values)]
        self.memory: Tensor | None = None
        self.is_two_step = kind == "CogVideoXDPMScheduler"
        self._takes = frozenset(inspect.signature(scheduler.step).parameters)

    def step(self, velocity: Tensor, index: int, latents: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """x at the next timestep from x at `timesteps[index]` and its velocity, in the latents' dtype."""
        if not self.is_two_step:
            more = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in self._takes}  # as the pipeline does
            return self.scheduler.step(velocity, self._values[index], latents, **more, return_dict=False)[0].to(latents.dtype)
        before = self._values[index - 1] if index else None
        new, self.memory = dpm_step(self.scheduler, velocity, self.memory if index else None, self._values[index], before, latents, generator)
        return new.to(latents.dtype)


def scheduler_hash(scheduler: Any) -> str:
    """Identifies a diffusers scheduler by its class and what its configuration has that is not as usual there, so that a later version of
    diffusers, which knows more arguments, finds the same."""
    usual = {name: argument.default for name, argument in inspect.signature(type(scheduler).__init__).parameters.items()}
    config = {name: value for name, value in sorted(scheduler.config.items()) if not name.startswith("_") and value != usual.get(name)}
    return hashlib.sha256(f"{type(scheduler).__name__} {json.dumps(config, default=str)}".encode()).hexdigest()[:16]


def dpm_step(scheduler: Any, velocity: Tensor, old: Tensor | None, timestep: int, timestep_back: int | None, latents: Tensor,
             generator: torch.Generator | list[torch.Generator] | None = None) -> tuple[Tensor, Tensor]:
    """CogVideoXDPMScheduler's step for velocities, to the bit: (x at the next timestep, estimate of x_0).

    The scheduler's own sends noise of a host generator to the device from pageable memory, and so waits for all that the device
    has to do; here it goes through pinned memory.
    """
    from diffusers.utils.torch_utils import randn_tensor

    def draw() -> Tensor:
        where = latents.device if generator is None else torch.device("cpu")
        return randn_tensor(latents.shape, generator=generator, device=where, dtype=latents.dtype)

    alphas, last = scheduler.alphas_cumprod, timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    here = alphas[timestep]
    there = alphas[last] if last >= 0 else scheduler.final_alpha_cumprod
    back = None if timestep_back is None else alphas[timestep_back]
    estimate = here**0.5 * latents - (1 - here)**0.5 * velocity
    h, r, _, _ = scheduler.get_variables(here, there, back)
    factors = scheduler.get_mult(h, r, here, there, back)
    spread = (1 - there)**0.5 * (1 - (-2 * h).exp())**0.5
    noise, pointed = draw(), estimate
    if old is not None and last >= 0:  # two steps' estimates, and a second draw, as the scheduler has it: the first stays on the host
        noise, pointed = draw(), factors[2] * estimate - factors[3] * old
    if generator is not None:
        noise = to_device(noise, latents.device)
    return factors[0] * latents - factors[1] * pointed + spread * noise, estimate


@torch.no_grad()
def sample(predict: Predict, scheduler: Any, noise: Tensor, text: Tensor, empty: Tensor | None, *, num_steps: int,
           guidance_scale: float = 1.0, guidance: GuidanceMode = "batched", generator: list[torch.Generator] | None = None,
           check: Callable[[int], None] = lambda index: None) -> Tensor:
    """Latents (B,F,C,H,W) from noise of that shape, text (B,L,D) and the empty prompt's text (B,L,D) or None: unguided.

    The same computation as CogVideoXPipeline's loop. `check(index)` runs before each denoising step and may raise.
    """
    sampler = Sampler(scheduler, num_steps, noise.device)
    latents = noise * scheduler.init_noise_sigma
    for index, t in enumerate(sampler.timesteps):
        check(index)
        model_input = scheduler.scale_model_input(latents, t)
        timestep = t.expand(latents.shape[0])
        mode = guidance if empty is not None else "none"
        v, v_empty = predict_pair(predict, model_input, timestep, text, empty, mode=mode)
        velocity = guide(v.float(), None if v_empty is None else v_empty.float(), guidance_scale)
        latents = sampler.step(velocity, index, latents, generator)
    return latents
