"""Sampling is diffusers' own loop, whatever the guidance mode."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    TCDScheduler,
)

from trainer import diffusion
from trainer.diffusion import Sampler, sample, scheduler_hash
from trainer.errors import UsageError
from trainer.shapes.pretrain import SCHEDULER

SHAPE = (2, 3, 4, 4, 4)
TEXT, EMPTY = torch.ones(2, 6, 8), torch.zeros(2, 6, 8)


class Predict:
    """A cheap stand-in for a transformer that depends on all its inputs and counts its rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, latents, timestep, text):
        self.rows.append(len(latents))
        return torch.tanh(latents * (1 + timestep.view(-1, 1, 1, 1, 1) / 1000)) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


def _dice():
    return [torch.Generator().manual_seed(s) for s in (5, 6)]


def _expected(kind, scale):
    scheduler, predict, dice = kind(**SCHEDULER), Predict(), _dice()
    scheduler.set_timesteps(4)
    x, old = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), None
    for i, t in enumerate(scheduler.timesteps):
        c, u = predict(x, t.expand(2), TEXT), predict(x, t.expand(2), EMPTY)
        v = u + scale * (c - u)
        if kind is CogVideoXDDIMScheduler:
            x = scheduler.step(v, t, x, return_dict=False)[0]
        else:
            x, old = scheduler.step(v, old, t, scheduler.timesteps[i - 1] if i else None, x, generator=dice,
                                    return_dict=False)
    return x


def _ours(kind, scale, mode, **more):
    predict = Predict()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    empty = None if scale == 1.0 else EMPTY
    return sample(predict, kind(**SCHEDULER), noise, TEXT, empty, num_steps=4, guidance_scale=scale, guidance=mode,
                  generator=_dice(), **more), predict.rows


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("scale, mode, rows", [(4.0, "batched", [4] * 4), (4.0, "sequential", [2] * 8),
                                               (1.0, "batched", [2] * 4), (1.0, "sequential", [2] * 4)])
def test_sampling_equals_a_hand_written_loop(kind, scale, mode, rows):
    latents, seen = _ours(kind, scale, mode)
    torch.testing.assert_close(latents, _expected(kind, scale), rtol=0, atol=1e-6)
    assert seen == rows


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, TCDScheduler])
def test_a_scheduler_that_looks_at_a_step_twice_and_one_with_a_randomness_of_its_own_go_as_in_the_pipeline(kind):
    def made():
        scheduler = kind.from_config(SCHEDULER | {"rescale_betas_zero_snr": False, "timestep_spacing": "linspace"})
        return scheduler, torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    scheduler, latents = made()
    scheduler.set_timesteps(4)
    latents, predict = latents * scheduler.init_noise_sigma, Predict()
    more = CogVideoXPipeline.prepare_extra_step_kwargs(SimpleNamespace(scheduler=scheduler), _dice(), 0.0)
    for t in scheduler.timesteps:
        v = predict(scheduler.scale_model_input(latents, t), t.expand(len(latents)), TEXT).float()
        latents = scheduler.step(v, t, latents, **more, return_dict=False)[0]
    scheduler, noise = made()
    ours = sample(Predict(), scheduler, noise, TEXT, None, num_steps=4, generator=_dice())
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_scheduler_that_draws_draws_from_each_videos_own_generator(kind):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scheduler = kind.from_config(SCHEDULER | {"rescale_betas_zero_snr": False})
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        results.append(sample(Predict(), scheduler, noise, TEXT, None, num_steps=4, generator=_dice()))
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_the_schedulers_own_to_the_bit(kind, dtype):
    sampler, theirs = Sampler(kind(**SCHEDULER), 4), kind(**SCHEDULER)
    theirs.set_timesteps(4)
    (mine, dice), old = (_dice(), _dice()), None
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    for i, t in enumerate(theirs.timesteps):
        v = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        if kind is CogVideoXDDIMScheduler:
            expected = theirs.step(v, t, x, return_dict=False)[0]
        else:
            expected, old = theirs.step(v, old, t, theirs.timesteps[i - 1] if i else None, x, generator=dice, return_dict=False)
            old = old.clone()
        x = sampler.step(v, i, x, mine)
        assert torch.equal(x, expected.to(dtype))


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_there_are_as_many_timesteps_as_were_asked_for_and_none_below_zero(kind):
    """For 61 and others diffusers rounds one more into being, of -1: a step as if from pure noise, at the end."""
    for num_steps in range(1, 1001):
        timesteps = Sampler(kind(**SCHEDULER), num_steps).timesteps
        assert len(timesteps) == num_steps and timesteps.min() >= 0
    with pytest.raises(UsageError, match="1001 denoising steps: .* 1000 at most; lower --num-steps"):
        Sampler(kind(**SCHEDULER), 1001)


def test_a_scheduler_of_something_else_than_velocities_is_refused():
    with pytest.raises(UsageError, match="CogVideoXDDIMScheduler has prediction_type epsilon"):
        Sampler(CogVideoXDDIMScheduler(**SCHEDULER | {"prediction_type": "epsilon"}), 4)
    with pytest.raises(UsageError, match="the model's FlowMatchEulerDiscreteScheduler has prediction_type None"):
        Sampler(FlowMatchEulerDiscreteScheduler(), 4)


def test_check_runs_before_every_step_and_may_stop():
    class Stop(Exception):
        pass

    seen = []

    def check(index):
        seen.append(index)
        if index == 2:
            raise Stop

    with pytest.raises(Stop):
        _ours(CogVideoXDDIMScheduler, 1.0, "batched", check=check)
    assert seen == [0, 1, 2]


def test_dpm_forgets_the_former_sample():
    """The second use of a sampler must not begin with the first one's estimate."""
    noise, v = torch.randn(SHAPE), torch.randn(SHAPE)
    results = []
    sampler = Sampler(CogVideoXDPMScheduler(**SCHEDULER), 4)
    for _ in range(2):
        x = noise
        for index in range(4):
            x = sampler.step(v, index, x, _dice())
        results.append(x)
    assert torch.equal(*results)


def test_of_two_draws_the_one_that_is_used_is_sent_to_the_device(monkeypatch):
    sent = []
    monkeypatch.setattr(diffusion, "to_device", lambda tensor, device: sent.append(tensor) or tensor)
    sampler, x, dice = Sampler(CogVideoXDPMScheduler(**SCHEDULER), 4), torch.randn(SHAPE), _dice()
    for index in range(4):
        x = sampler.step(torch.randn(SHAPE), index, x, dice)
    drawn = _dice()
    draws = [torch.cat([torch.randn(1, *SHAPE[1:], generator=die) for die in drawn]) for _ in range(6)]
    assert len(sent) == 4 and all(map(torch.equal, sent, (draws[0], draws[2], draws[4], draws[5])))  # the first and last steps draw once


def test_latents_keep_their_dtype():
    sampler = Sampler(CogVideoXDPMScheduler(**SCHEDULER), 4)
    x = torch.randn(SHAPE).bfloat16()
    for index in range(4):
        x = sampler.step(torch.randn(SHAPE), index, x, _dice())
        assert x.dtype == torch.bfloat16


def test_a_scheduler_is_known_by_its_class_and_what_is_unusual_in_its_configuration():
    usual = CogVideoXDDIMScheduler(**SCHEDULER)
    said = CogVideoXDDIMScheduler(**SCHEDULER, sample_max_value=1.0)  # as it is anyway
    said.register_to_config(_diffusers_version="0.1")
    assert scheduler_hash(said) == scheduler_hash(usual) != scheduler_hash(CogVideoXDPMScheduler(**SCHEDULER))
    assert scheduler_hash(usual) != scheduler_hash(CogVideoXDDIMScheduler(**SCHEDULER | {"snr_shift_scale": 9.0}))
