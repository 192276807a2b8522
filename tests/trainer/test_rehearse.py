"""The rehearsed step is the run's: what stands, what is freed, and what 8-bit state weighs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memory.activations
from memory.assess import Workload, assess
from memory.cards import lookup
from memory.optimizers import predict_state_bytes
from memory.plan import MemoryPlan, resolve_keeps
from memory.splice import Recipe
from trainer import phases
from trainer import rehearse as rehearsing
from trainer.assemble import open_backbone
from trainer.erasers import Erasers
from trainer.rehearse import rehearse, teacher_share


def test_what_stands_is_what_a_run_holds(tiny_config):
    config = tiny_config()
    backbone = open_backbone(config.model)
    trace = rehearse(backbone, config, config.memory)
    params = backbone.num_blocks * (2 * backbone.width * 4 + backbone.width + 4)
    assert trace.standing_bytes("adapters") == 4 * params
    numels = (backbone.width * 4, 4, backbone.width * 4, backbone.width) * backbone.num_blocks
    assert trace.standing_bytes("optimizer") == predict_state_bytes(numels, "adamw")
    births = [e for e in trace.events if e >= 0]
    assert sorted(births) == sorted(~e for e in trace.events if e < 0)  # a step frees all that it makes
    assert {"teacher", "student forward", "student backward", "optimizer"} <= {s.phase for s in trace.spans}


def test_a_second_backbone_costs_a_backbone_and_streaming_moves_weights_to_the_host(tiny_config):
    config = tiny_config()
    backbone = open_backbone(config.model)
    weights = rehearse(backbone, config, MemoryPlan()).standing_bytes("weights")
    twice = rehearse(backbone, config, MemoryPlan(backbone_copies=2)).standing_bytes("weights")
    streamed = rehearse(backbone, config, MemoryPlan(resident_blocks=0))
    assert 1.9 * weights <= twice <= 2 * weights
    assert streamed.standing_bytes("weights") < weights < streamed.standing_bytes("weights") + 1.1 * streamed.standing_bytes(
        "weights", "pinned")


def test_8bit_state_is_smaller(tiny_config):
    config = tiny_config(optim__rank=256)  # 8-bit states begin at 4,096 elements
    backbone = open_backbone(config.model)
    plain, small = (rehearse(backbone, config, replace(config.memory, optimizer=kind)) for kind in ("adamw", "adamw8bit"))
    assert small.standing_bytes("optimizer") < plain.standing_bytes("optimizer") / 2


def test_an_update_is_measured_by_a_copy_of_the_weights(tiny_config):
    config = tiny_config(optim__rank=256)
    trace = rehearse(open_backbone(config.model), config, config.memory)
    peaks, adapters = trace.peaks(), trace.standing_bytes("adapters")
    assert 2 * adapters <= peaks["optimizer"] - peaks["load"] <= 2.5 * adapters  # gradients, and what the weights were


@pytest.mark.parametrize("plan", [
    MemoryPlan(),
    MemoryPlan(resident_blocks=1, num_keep_attention=1, num_keep_everything=1, feed_forward_chunks=2),
    MemoryPlan(dtype="bfloat16", resident_blocks=0, boundaries="host", guidance="batched"),
], ids=["plain", "kept", "parked"])
def test_torchs_own_fake_tensors_leave_the_same_trace(tiny_config, monkeypatch, plan):
    config = tiny_config()
    backbone = open_backbone(config.model)
    traces = [rehearse(backbone, config, plan) for _ in range(2)]  # unknown, then known
    needs = phases.phases_around(backbone, config, plan)
    for module in (rehearsing, phases):
        monkeypatch.setattr(module, "FakeMode", FakeTensorMode)
    for remembered in filter(lambda f: hasattr(f, "cache_clear"), vars(phases).values()):
        remembered.cache_clear()
    assert traces == [rehearse(backbone, config, plan)] * 2
    assert needs == phases.phases_around(backbone, config, plan)


def test_saving_takes_the_host_weights_and_both_moments(tiny_config):
    config = tiny_config(optim__rank=64)
    backbone = open_backbone(config.model)
    erasers = Erasers(backbone.blocks(backbone.load_transformer(dtype=torch.float32)), 64, seed=0)
    held = 3 * sum(p.nbytes for p in erasers.parameters())
    (save,) = (need for need in phases.phases_around(backbone, config, config.memory) if need.name == "save")
    assert 0.95 * held <= save.host_bytes <= held  # without biases


@pytest.mark.parametrize("passes", ["sequential", "lockstep"])
@pytest.mark.parametrize("parked", [{"boundaries": "host"}, {"kept": "host", "checkpoint": "none"},
                                    {"boundaries": "host", "kept": "host", "num_keep_attention": 2}], ids=str)
def test_host_memory_of_parked_activations_is_told_without_a_trace(tiny_config, parked, passes, monkeypatch):
    """Student passes one by one use the same host memory; in lockstep each has its own."""
    monkeypatch.setitem(memory.activations.offload_activations.__kwdefaults__, "min_bytes", 0)
    config = tiny_config(model__model="shapes")  # of two blocks none is parked
    backbone, plan = open_backbone(config.model), MemoryPlan(passes=passes, **parked)
    trace, keeps = rehearse(backbone, config, plan), resolve_keeps(plan, backbone.num_blocks)
    held = sorted(s.num_bytes for s in trace.storages if (s.place, s.category) == ("pinned", "saved activations"))
    assert held and sorted(Recipe.of(trace, keeps).slabs(keeps)) == held


@pytest.mark.parametrize("passes", ["sequential", "lockstep"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_from_the_second_accumulated_pass_on_gradients_are_there_throughout(tiny_config, passes, beta):
    once, twice, often = (tiny_config(loss__beta=beta, optim__rank=64, optim__accumulation=n) for n in (1, 2, 5))
    backbone, plan = open_backbone(once.model), MemoryPlan(passes=passes)
    one, two = (rehearse(backbone, config, plan) for config in (once, twice))
    grads = one.standing_bytes("adapters")
    found = {phase: live["gradients"] for phase, _, live in two.timeline(rounded=False)}
    assert found["student backward"] == found["optimizer"] == grads
    assert grads in {live["gradients"] for phase, _, live in two.timeline(rounded=False) if phase == "teacher"}
    if not beta:
        assert two.peaks()["student forward"] - one.peaks()["student forward"] >= grads
    assert sum(len(span.work) for span in two.spans if span.phase == "optimizer") == sum(
        len(span.work) for span in one.spans if span.phase == "optimizer")
    assert 2 * len({span.visit.walk for span in one.spans if span.visit}) == len({span.visit.walk for span in two.spans if span.visit})
    assert rehearse(backbone, often, plan) == two  # later passes are like the second
    keeps = resolve_keeps(plan, backbone.num_blocks)
    assert Recipe.of(two, keeps).splice(keeps).peaks() == two.peaks()


def test_with_a_pool_the_teacher_is_apart_from_the_student_in_lockstep_too(tiny_config):
    def seconds(pool, passes):
        config = tiny_config(data__pool=pool, data__latents="noise", optim__steps=100)
        backbone = open_backbone(config.model)
        workload = Workload(num_blocks=backbone.num_blocks, trace=partial(rehearse, backbone, config), teacher_share=teacher_share(config))
        return assess(workload, MemoryPlan(passes=passes), lookup("h100")).time.seconds

    alone, together = (seconds(2, passes) for passes in ("sequential", "lockstep"))
    # What lockstep adds does not depend on how long a step takes: 2 % of what it took when its last products were recomputed.
    assert together == pytest.approx(alone, rel=0, abs=0.02 * 4.046e-6) and together < 0.8 * seconds(0, "lockstep")
