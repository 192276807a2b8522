"""Teacher and student on one backbone: the formulas, and gradients that equal those of the joint loss."""

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import FRAMES, SIDE
from diffusers import CogVideoXDDIMScheduler
from test_erasers import shake

from memory.plan import MemoryPlan, apply_plan
from trainer.assemble import masking_blocks
from trainer.backbones.cogvideox import BOUNDARY_NAMES
from trainer.config import LossConfig
from trainer.erasers import Erasers
from trainer.latents import NoiseLatents, TrajectoryLatents
from trainer.losses import Samples, Teacher, lockstep_backward, mean_squared_error, student_backward
from trainer.masks import prompt_columns
from trainer.prompts import Embeddings, PromptSet
from trainer.shapes.pretrain import SCHEDULER

PROMPTS = PromptSet("red", ("a red circle moving left", "the square is red and goes up", "one red ball flies down"),
                    ("a circle moving left", "the square goes up", "one ball flies down"),
                    (("blue", ("a blue circle moving left",)), ("green", ("a green square moving up",))))
CPU = torch.device("cpu")


class Setup:
    """A teacher on a tiny backbone, and the pieces that it is made of."""

    def __init__(self, backbone, *, latents="trajectory", loss=LossConfig(), guidance="sequential", preserve=True,
                 trajectory_guidance=1.0, seed=0):
        self.loss = loss
        shape = (2, *backbone.latent_shape(FRAMES, SIDE, SIDE))
        transformer = backbone.load_transformer(dtype=torch.float32)
        self.predict = backbone.predictor(transformer, shape[1:])
        self.frozen = {n: p.clone() for n, p in transformer.named_parameters()}
        self.transformer = transformer
        self.erasers = Erasers(backbone.blocks(transformer), 4)
        shake(self.erasers)
        texts = sorted({*PROMPTS.prompts, *PROMPTS.safe, *PROMPTS.preserved, ""})
        self.embeddings = Embeddings(backbone.text_encoder.encode(texts, dtype=torch.float32), texts)

        def make(stream):
            common = dict(scheduler=CogVideoXDDIMScheduler(**SCHEDULER), shape=shape, seed=seed, stream=stream, device=CPU)
            return NoiseLatents(**common) if latents == "noise" else TrajectoryLatents(**common, num_steps=3)

        columns = prompt_columns(backbone, PROMPTS) if loss.alpha else None
        self.teacher = Teacher(self.predict, self.erasers, list(transformer.transformer_blocks), loss=loss,
                               prompts=PROMPTS, embeddings=self.embeddings, columns=columns, latents=make("target"),
                               preserved_latents=make("preserved") if preserve else None, seed=seed, guidance=guidance,
                               trajectory_guidance=trajectory_guidance)

    def backward(self, sample, **more):
        self.erasers.zero_grad()
        terms = student_backward(self.predict, self.erasers, sample, self.loss, **more)
        return terms, self.gradients()

    def gradients(self):
        return {n: p.grad.clone() for n, p in self.erasers.named_parameters()}

    def joint(self, sample):
        """The three terms written out, in one graph, differentiated once."""
        self.erasers.zero_grad()
        outputs = []
        handles = [a.register_forward_hook(lambda m, args, out: outputs.append(out)) for a in self.erasers.adapters]
        unlearn = ((self.predict(sample.latents, sample.timestep, sample.text) - sample.target) ** 2).mean()
        for handle in handles:
            handle.remove()
        loc = sum(((o * (1 - sample.mask)[..., None]) ** 2).mean() for o in outputs) / len(outputs)
        pre = ((self.predict(sample.preserved_latents, sample.preserved_timestep, sample.preserved_text)
                - sample.preserved_target) ** 2).mean()
        (unlearn + self.loss.alpha * loc + self.loss.beta * pre).backward()
        return dict(unlearn=unlearn, loc=loc, pre=pre), self.gradients()


@pytest.fixture
def setup(backbone):
    return Setup(backbone, loss=LossConfig(alpha=0.7, beta=0.3, mask_threshold=0.3))


def test_sequential_backward_gives_the_gradients_of_the_joint_loss(setup):
    sample = setup.teacher.sample(0)
    expected_terms, expected = setup.joint(sample)
    terms, found = setup.backward(sample)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["loss"], terms["unlearn"] + 0.7 * terms["loc"] + 0.3 * terms["pre"])
    assert 0 < sample.mask.mean() < 1


def test_scale_is_a_factor_of_the_gradient_and_not_of_the_terms(setup):
    sample = setup.teacher.sample(0)
    terms, whole = setup.backward(sample)
    for scale in (0.25, torch.tensor(0.25)):
        scaled_terms, scaled = setup.backward(sample, scale=scale)
        assert all(torch.equal(terms[n], scaled_terms[n]) for n in terms)
        for name in whole:
            torch.testing.assert_close(scaled[name], whole[name] * 0.25, rtol=1e-5, atol=1e-9)


def test_two_half_passes_accumulate_to_the_mean_of_their_gradients(setup):
    samples = [setup.teacher.sample(step).parked() for step in range(2)]
    separate = [setup.backward(s)[1] for s in samples]
    setup.erasers.zero_grad()
    for s in samples:
        student_backward(setup.predict, setup.erasers, s, setup.loss, scale=0.5)
    for name, gradient in setup.gradients().items():
        torch.testing.assert_close(gradient, (separate[0][name] + separate[1][name]) / 2, rtol=1e-4, atol=1e-8)


def test_a_masking_block_named_twice_counts_once(sincos):
    assert list(masking_blocks(sincos, LossConfig(mask_blocks=(1, 1, 0)))) == [1, 0] and list(masking_blocks(sincos, LossConfig())) == [0, 1]


def test_weights_of_zero_leave_their_terms_out(backbone):
    setup = Setup(backbone, loss=LossConfig(alpha=0.0, beta=0.0), preserve=False)
    sample = setup.teacher.sample(0)
    assert sample.mask is None and sample.preserved_target is None
    terms, found = setup.backward(sample)
    assert set(terms) == {"unlearn", "loss"} and torch.equal(terms["loss"], terms["unlearn"])
    setup.erasers.zero_grad()
    F.mse_loss(setup.predict(sample.latents, sample.timestep, sample.text), sample.target).backward()
    assert all(torch.equal(found[n], g) for n, g in setup.gradients().items())


@pytest.mark.parametrize("anchor", ["safe", "empty"])
@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_target_is_the_published_formula_with_erasers_off(backbone, anchor, guidance):
    setup = Setup(backbone, loss=LossConfig(eta=3.0, anchor=anchor), guidance=guidance)
    sample = setup.teacher.sample(0)
    rows = [next(p for p in PROMPTS.prompts if torch.equal(setup.embeddings([p])[0], text)) for text in sample.text]
    anchors = [PROMPTS.safe[PROMPTS.prompts.index(p)] if anchor == "safe" else "" for p in rows]
    with torch.no_grad(), setup.erasers.switched(False):
        v = setup.predict(sample.latents, sample.timestep, sample.text)
        v_anchor = setup.predict(sample.latents, sample.timestep, setup.embeddings(anchors))
        expected_pre = setup.predict(sample.preserved_latents, sample.preserved_timestep, sample.preserved_text)
    torch.testing.assert_close(sample.target, v_anchor - 3.0 * (v - v_anchor), rtol=1e-5, atol=1e-5)
    assert torch.equal(sample.preserved_target, expected_pre)
    assert {tuple(sample.text.shape), tuple(sample.preserved_text.shape)} == {(2, 16, 16)}


def test_teacher_leaves_no_gradients_no_graph_and_the_erasers_on(setup):
    setup.erasers.zero_grad()
    sample = setup.teacher.sample(0)
    assert all(p.grad is None for p in setup.erasers.parameters()) and setup.erasers.enabled
    for value in vars(sample).values():
        assert not value.requires_grad and value.grad_fn is None


def test_frozen_weights_get_no_gradient_and_do_not_move(setup):
    setup.backward(setup.teacher.sample(0))
    for name, parameter in setup.transformer.named_parameters():
        if ".adapter." not in name:
            assert parameter.grad is None and torch.equal(parameter, setup.frozen[name])


def test_samples_are_functions_of_seed_and_step(backbone):
    """Made by another teacher, with a trained student beside it, in the same order."""
    one, two = Setup(backbone), Setup(backbone)
    other = Setup(backbone, seed=1)
    for step in range(4):
        a = one.teacher.sample(step)
        shake(two.erasers)
        b = two.teacher.sample(step)
        for name, value in vars(a).items():
            assert torch.equal(value, getattr(b, name)), (step, name)
        assert not torch.equal(a.latents, other.teacher.sample(step).latents)


def test_trajectory_advances_by_the_teachers_prediction(backbone):
    setup = Setup(backbone)
    first, second = setup.teacher.sample(0).parked(), setup.teacher.sample(1)
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(3)
    with torch.no_grad(), setup.erasers.switched(False):
        v = setup.predict(first.latents, first.timestep, first.text)
        expected = scheduler.step(v, scheduler.timesteps[0], first.latents, return_dict=False)[0]
    torch.testing.assert_close(second.latents, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.text, second.text)  # one prompt along one trajectory


def test_trajectory_with_guidance_advances_by_the_guided_prediction(backbone):
    setup = Setup(backbone, trajectory_guidance=4.0)
    first, second = setup.teacher.sample(0).parked(), setup.teacher.sample(1)
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(3)
    with torch.no_grad(), setup.erasers.switched(False):
        v = setup.predict(first.latents, first.timestep, first.text)
        u = setup.predict(first.latents, first.timestep, setup.embeddings(["", ""]))
        expected = scheduler.step(u + 4.0 * (v - u), scheduler.timesteps[0], first.latents, return_dict=False)[0]
    torch.testing.assert_close(second.latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, passes", [
    ({}, ["concept", "anchor", "preserved", "empty", "preserved empty"]),
    ({"loss": LossConfig(anchor="empty")}, ["concept", "anchor", "preserved", "preserved empty"]),
    ({"latents": "noise"}, ["concept", "anchor", "preserved"])], ids=["guided", "by the anchor", "noise"])
def test_the_teacher_is_asked_for_guidance_only_where_that_moves_something(sincos, options, passes):
    setup = Setup(sincos, trajectory_guidance=4.0, **options)
    assert list(setup.teacher.passes(setup.teacher.draw(0))) == passes


def _same(a, b) -> bool:
    return all(torch.equal(v, getattr(b, n)) for n, v in vars(a).items())


@pytest.mark.parametrize("latents", ["trajectory", "noise"])
def test_pool_gives_the_same_samples_and_pays_the_teacher_once(sincos, latents):
    plain, pooled = Setup(sincos, latents=latents), Setup(sincos, latents=latents)
    without, cached = Samples(plain.teacher, 0, CPU), Samples(pooled.teacher, 6, CPU)
    first = [cached(step) for step in range(6)]
    assert all(_same(a, without(step)) for step, a in enumerate(first))
    pooled.teacher.predict = None  # any further call of the teacher would fail
    assert all(_same(a, cached(6 + step)) for step, a in enumerate(first))


@pytest.mark.parametrize("latents", ["trajectory", "noise"])
@pytest.mark.parametrize("resumed_at", [1, 4, 6, 7, 11])
def test_pool_resumes_bitwise(sincos, latents, resumed_at):
    """A resumed run has an empty pool, and trajectories that stand where the checkpoint left them."""
    straight = Setup(sincos, latents=latents)
    cached = Samples(straight.teacher, 6, CPU)
    expected = [cached(step) for step in range(14)]
    before, after = Setup(sincos, latents=latents), Setup(sincos, latents=latents)
    earlier = Samples(before.teacher, 6, CPU)
    for step in range(resumed_at):
        earlier(step)
    for name in ("latents", "preserved_latents"):
        state = getattr(before.teacher, name).state_dict()
        if state:
            getattr(after.teacher, name).load_state_dict(state)
    later = Samples(after.teacher, 6, CPU)
    for step in range(resumed_at, 14):
        assert _same(later(step), expected[step]), step


@pytest.mark.parametrize("options", [
    {}, {"guidance": "batched"}, {"trajectory_guidance": 6.0}, {"latents": "noise"}, {"preserve": False, "loss": LossConfig(beta=0.0)},
    {"loss": LossConfig(alpha=0.0)}, {"loss": LossConfig(alpha=0.7, beta=0.3, mask_threshold=0.3, anchor="empty")},
], ids=str)
@pytest.mark.parametrize("pool", [0, 2])
@pytest.mark.parametrize("checkpoint", ["all", "none"])
def test_lockstep_learns_what_the_passes_one_by_one_learn(sincos, options, pool, checkpoint):
    """Terms and gradients of several steps, bit for bit, and trajectories that stand where they stood."""
    one_by_one, together = Setup(sincos, **options), Setup(sincos, **options)
    applied = [apply_plan(s.transformer, s.transformer.transformer_blocks, MemoryPlan(passes=passes, checkpoint=checkpoint),
                          device="cpu", boundary_names=BOUNDARY_NAMES)
               for s, passes in ((one_by_one, "sequential"), (together, "lockstep"))]
    samples, drawn = Samples(one_by_one.teacher, pool, CPU), Samples(together.teacher, pool, CPU)
    scale = torch.tensor(0.5)
    for step in range(4):
        terms, expected = one_by_one.backward(samples(step), scale=scale)
        together.erasers.zero_grad()
        found = lockstep_backward(applied[1].lockstep, together.predict, together.erasers, together.teacher, drawn.drawn(step), together.loss,
                                  scale=scale)
        assert found.keys() == terms.keys() and all(torch.equal(found[name], terms[name]) for name in terms), step
        assert not any(term.requires_grad for term in found.values())
        gradients = together.gradients()
        assert all(torch.equal(gradients[name], g) for name, g in expected.items()), step
    stands = pool or 4
    assert torch.equal(one_by_one.teacher.latents.at(stands)[0], together.teacher.latents.at(stands)[0])
    assert applied[1].num_recomputes == applied[0].num_recomputes and together.erasers.enabled


def test_a_loss_is_a_scalar_that_holds_nothing_else():
    v, target = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    loss, reference = mean_squared_error(v, target), F.mse_loss(v, target)
    assert loss.untyped_storage().nbytes() == 4 < reference.untyped_storage().nbytes()
    ours, theirs = (torch.autograd.grad(term, v)[0] for term in (loss, reference))
    assert torch.equal(loss, reference) and torch.equal(ours, theirs)
