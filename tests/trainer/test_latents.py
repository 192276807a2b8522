"""Training latents: functions of (seed, step), and trajectories that the scheduler really advances."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from trainer.config import DataConfig, OptimConfig, TrainConfig
from trainer.errors import CheckpointError, UsageError
from trainer.latents import NoiseLatents, TrajectoryLatents, make_latents
from trainer.seeding import generator, noise, order
from trainer.shapes.pretrain import SCHEDULER

SHAPE = (2, 3, 4, 4, 4)
CPU = torch.device("cpu")
NUM_STEPS = 5
KINDS = [CogVideoXDDIMScheduler, CogVideoXDPMScheduler]


def _velocity(step: int) -> torch.Tensor:
    """Stands in for the teacher."""
    return noise(SHAPE, 99, "velocity", step)


def _trajectory(kind, *, seed: int = 3, stream: str = "target") -> TrajectoryLatents:
    return TrajectoryLatents(scheduler=kind(**SCHEDULER), shape=SHAPE, seed=seed, stream=stream, device=CPU,
                             num_steps=NUM_STEPS)


def _walk(latents, steps) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seen = []
    for step in steps:
        x, t = latents.at(step)
        seen.append((x.clone(), t))
        latents.advance(step, _velocity(step))
    return seen


def test_ddim_trajectory_equals_a_hand_written_loop_bitwise():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    seen = _walk(_trajectory(CogVideoXDDIMScheduler), range(2 * NUM_STEPS))
    for trajectory in range(2):
        scheduler.set_timesteps(NUM_STEPS)
        x = noise(SHAPE, 3, "target-start", trajectory) * scheduler.init_noise_sigma
        for index, t in enumerate(scheduler.timesteps):
            step = trajectory * NUM_STEPS + index
            assert torch.equal(seen[step][0], x) and seen[step][1].tolist() == [t, t]
            x = scheduler.step(_velocity(step), t, x, return_dict=False)[0]


def test_dpm_trajectory_equals_a_hand_written_loop_bitwise():
    scheduler = CogVideoXDPMScheduler(**SCHEDULER)
    seen = _walk(_trajectory(CogVideoXDPMScheduler), range(2 * NUM_STEPS))
    for trajectory in range(2):
        scheduler.set_timesteps(NUM_STEPS)
        x, old = noise(SHAPE, 3, "target-start", trajectory) * scheduler.init_noise_sigma, None
        for index, t in enumerate(scheduler.timesteps):
            step = trajectory * NUM_STEPS + index
            assert torch.equal(seen[step][0], x), (trajectory, index)
            before = scheduler.timesteps[index - 1] if index else None
            x, old = scheduler.step(_velocity(step), old, t, before, x, return_dict=False,
                                    generator=[generator(3, "target-step", trajectory, index, row) for row in range(2)])


@pytest.mark.parametrize("kind", KINDS)
def test_latents_really_move_along_the_trajectory(kind):
    """The published mistake is a step that is skipped: every timestep then trains on the same pure noise."""
    seen = [x for x, _ in _walk(_trajectory(kind), range(NUM_STEPS))]
    for a, b in zip(seen, seen[1:]):
        assert (a - b).abs().mean() > 1e-3


def test_a_perfect_teacher_brings_the_latents_to_its_video():
    """With the true velocity of one x_0 the trajectory ends there, its spread falling from 1 to that of x_0."""
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    latents, x0 = _trajectory(CogVideoXDDIMScheduler), 0.1 * torch.ones(SHAPE)
    spread = []
    for step in range(NUM_STEPS):
        x, t = latents.at(step)
        spread.append(x.std().item())
        alpha = scheduler.alphas_cumprod[t[0]]
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        latents.advance(step, alpha.sqrt() * eps - (1 - alpha).sqrt() * x0)
    assert spread == sorted(spread, reverse=True) and spread[0] > 0.9
    torch.testing.assert_close(latents._latents, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_outlives_a_step_lies_where_it_lay_two_steps_before_and_a_sample_stays_until_the_next_is_made(kind):
    latents, places = _trajectory(kind), []
    for step in range(2 * NUM_STEPS + 1):
        x, _ = latents.at(step)
        as_drawn = x.clone()
        latents.advance(step, _velocity(step))
        assert torch.equal(x, as_drawn)
        places.append({name: tensor.data_ptr() for name, tensor in latents.state_dict().items() if "next" not in name})
    assert all(places[step] == places[step - 2] != places[step - 1] for step in range(2, len(places)))
    assert places[0].keys() == ({"target.latents", "target.memory"} if kind is CogVideoXDPMScheduler else {"target.latents"})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_outlives_a_step_is_made_in_one_if_it_was_made_before(kind):
    latents = _trajectory(kind)
    latents.allocate()
    made = {buffer.data_ptr() for buffers in latents._buffers.values() for buffer in buffers}
    assert len(made) == (4 if kind is CogVideoXDPMScheduler else 2)
    for step in range(NUM_STEPS):
        x, _ = latents.at(step)
        latents.advance(step, _velocity(step))
        held = {x.data_ptr()} | {tensor.data_ptr() for name, tensor in latents.state_dict().items() if "next" not in name}
        assert held <= made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_before", [0, 2])
def test_a_trajectory_walked_apart_does_not_move_this_one_and_takes_its_memory_only_while_that_is_free(kind, num_before):
    alone, latents = _trajectory(kind), _trajectory(kind)
    latents.allocate()
    for each in (alone, latents):
        _walk(each, range(num_before))
    apart = latents.apart(slice(None))
    first = apart.first_needed(num_before)
    found = _walk(apart, range(first, NUM_STEPS))
    assert (apart._buffers is latents._buffers) == (num_before == 0)
    for (x, t), (y, u), (z, v) in zip(found[num_before - first:], _walk(latents, range(num_before, NUM_STEPS)), _walk(alone, range(num_before, NUM_STEPS))):
        assert torch.equal(x, y) and torch.equal(y, z) and torch.equal(t, u) and torch.equal(u, v)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_an_advance_raises(kind):
    latents = _trajectory(kind)
    latents.at(0)
    with pytest.raises(RuntimeError, match="target trajectory stands at step 0, not 1.*advance it once, in order"):
        latents.at(1)
    with pytest.raises(RuntimeError, match="not 2"):
        _trajectory(kind).at(2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_resumes_in_the_middle_of_a_trajectory_bitwise(kind):
    straight = _walk(_trajectory(kind), range(8))
    first, second = _trajectory(kind), _trajectory(kind)
    _walk(first, range(3))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(saved)
    for (x, t), (y, u) in zip(straight[3:], _walk(second, range(3, 8))):
        assert torch.equal(x, y) and torch.equal(t, u)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_what_they_are_in_the_whole_and_hold_no_others(kind):
    whole, part = _trajectory(kind), _trajectory(kind)
    part.rows = slice(1, 2)
    for step in range(2 * NUM_STEPS):
        (x, _), (y, _) = whole.at(step), part.at(step)
        assert torch.equal(x[1:], y) and y.untyped_storage().nbytes() == y.nbytes
        whole.advance(step, _velocity(step))
        part.advance(step, _velocity(step)[1:])
    noises = _noise_latents()
    x, t = noises.at(3)
    noises.rows = slice(1, 2)
    y, u = noises.at(3)
    assert torch.equal(x[1:], y) and torch.equal(t[1:], u) and y.untyped_storage().nbytes() == y.nbytes


def test_state_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="no target trajectory.*other --latents"):
        _trajectory(CogVideoXDDIMScheduler).load_state_dict({})


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_trajectory_begins_its_state_holds_no_memory(kind):
    first, second = _trajectory(kind), _trajectory(kind)
    first.at(0)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(_walk(_trajectory(kind), range(3)), _walk(second, range(3))))


@pytest.mark.parametrize("then, now", [KINDS, KINDS[::-1]])
def test_the_trajectory_of_another_scheduler_is_refused(then, now):
    first = _trajectory(then)
    _walk(first, range(3))
    with pytest.raises(CheckpointError, match="checkpoint's target trajectory is another scheduler's; go on with the model"):
        _trajectory(now).load_state_dict(first.state_dict())


def test_trajectory_says_from_where_a_step_can_be_reached():
    latents = _trajectory(CogVideoXDDIMScheduler)
    assert [latents.first_needed(s) for s in (0, 3, 5, 7)] == [0, 0, 5, 5]
    _walk(latents, range(3))
    assert [latents.first_needed(s) for s in (2, 3, 4)] == [0, 3, 0]


def _noise_latents(*, seed: int = 3, stream: str = "target") -> NoiseLatents:
    return NoiseLatents(CogVideoXDDIMScheduler(**SCHEDULER), SHAPE, seed, stream, CPU)


def test_noise_latents_are_functions_of_seed_step_and_stream():
    x, t = _noise_latents().at(4)
    other = _noise_latents()
    other.at(0)
    assert torch.equal(x, other.at(4)[0]) and torch.equal(t, other.at(4)[1])
    for differs in (_noise_latents().at(5), _noise_latents(seed=4).at(4), _noise_latents(stream="preserved").at(4)):
        assert not torch.equal(x, differs[0]) and not torch.equal(t, differs[1])


def test_noise_latents_are_add_noise_of_normal_values_at_uniform_timesteps():
    latents = _noise_latents()
    xs, ts = zip(*(latents.at(step) for step in range(300)))
    assert abs(torch.stack(xs).std().item() - 1) < 0.02  # x_0 and ε both N(0, 1): so is every mixture
    t = torch.cat(ts).float()
    assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 40
    assert t.min() < 20 and t.max() > 980
    x0, eps = noise(SHAPE, 3, "target-x0", 7), noise(SHAPE, 3, "target-noise", 7)
    assert torch.equal(xs[7], latents.scheduler.add_noise(x0, eps, ts[7]))


def test_settings_choose_the_kind():
    for name, kind in (("noise", NoiseLatents), ("trajectory", TrajectoryLatents)):
        config = TrainConfig(data=DataConfig(latents=name, trajectory_steps=7), optim=OptimConfig(seed=11))
        made = make_latents(config, CogVideoXDDIMScheduler(**SCHEDULER), SHAPE, "target", CPU)
        assert type(made) is kind and made.seed == 11
    assert made.num_steps == 7


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("latents", ["noise", "trajectory"])
def test_a_scheduler_that_cannot_be_trained_with_is_refused(kind, latents):
    config = TrainConfig(data=DataConfig(latents=latents))
    with pytest.raises(UsageError, match=f"scheduler is a {kind.__name__}, which only `generate` can use; for training, name one of CogVideoXDDIM"):
        make_latents(config, kind(), SHAPE, "target", CPU)


def test_order_visits_every_prompt_once_an_epoch_and_reshuffles():
    visits = [p for index in range(6) for p in order(5, 5, 0, "prompts", index)]
    for epoch in range(6):
        assert sorted(visits[5 * epoch:5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(visits[5 * e:5 * e + 5]) for e in range(6)}) > 1
    one_by_one = [p for index in range(30) for p in order(5, 1, 0, "prompts", index)]
    assert one_by_one == visits  # the batch size cuts the same sequence elsewhere
    assert order(5, 5, 1, "prompts", 0) != order(5, 5, 0, "prompts", 0) or order(5, 5, 1, "prompts", 1) != order(5, 5, 0, "prompts", 1)


def test_generators_leave_the_global_one_alone_and_differ_by_purpose():
    before = torch.get_rng_state()
    a, b, c = noise((4,), 0, "a", 1), noise((4,), 0, "b", 1), noise((4,), 0, "a", 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a, noise((4,), 0, "a", 1))
    assert not torch.equal(noise((4,), 1, "a", 11), noise((4,), 1, "a", 1, 1))
