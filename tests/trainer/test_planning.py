"""Forecasts of runs on the tiny pipelines: phases, verdicts, JSON, and what is refused."""

import json
import re
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from bench.planning import regret
from memory.assess import assess
from memory.cards import GIB, lookup
from memory.fake import FakeMode
from memory.plan import MemoryPlan
from memory.ranking import SEARCHED
from memory.timeline import pinned_bytes, shown
from trainer import forecast_text, phases, planning
from trainer.backbones.cogvideox import CogVideoX, enable_tiles
from trainer.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig, replaced
from trainer.diagnose import prepare
from trainer.errors import DoesNotFit, UsageError
from trainer.memory_file import MemoryForecast
from trainer.rehearse import peak_beyond


@pytest.fixture
def forecast(tiny_config):
    return planning.forecast(tiny_config(), lookup("4090"))


def test_forecast_of_a_tiny_run_fits_and_offloads_nothing(forecast):
    plan = forecast.result.best.plan
    assert plan.resident_blocks is None and plan.boundaries == "device" and plan.feed_forward_chunks == 1
    assert {"load", "teacher", "student forward", "student backward", "optimizer", "encode prompts", "sample", "decode",
            "save"} <= set(forecast.chosen.by_phase)


def test_json_has_the_promised_keys_and_sums(forecast):
    content = json.loads(json.dumps(forecast_text.as_json(forecast, {})))
    assert {"model", "card", "capacity_bytes", "fits", "settings", "predicted", "step_seconds", "alternatives"} <= content.keys()
    predicted = content["predicted"]
    assert sum(predicted["by_category"].values()) == predicted["step_peak_bytes"]
    assert predicted["peak_bytes"] == max(predicted["by_phase"].values())
    assert content["settings"].keys() == MemoryPlan.__dataclass_fields__.keys()


def test_phases_have_the_names_that_a_run_gives_them(forecast, capsys):
    forecast_text.print_forecast(forecast, {}, explain=False)
    output, content = capsys.readouterr().out, forecast_text.as_json(forecast, {})
    in_a_run = MemoryForecast(forecast.card, forecast.chosen)(forecast.config)["predicted"]["peak_bytes_by_phase"]
    assert {"load", *in_a_run} == set(content["predicted"]["by_phase"]) and {"student", "backward"} <= set(in_a_run)
    assert all(re.search(rf"│ {phase} +│", output) for phase in in_a_run)
    least = planning.forecast_as_given(forecast.config, replace(lookup("4090"), usable_bytes=0))
    assert least.reason.endswith(("GiB more on the card in student", "GiB more on the card in backward"))


def test_a_plan_says_that_it_is_predicted_and_how_far_times_may_be_off(forecast, capsys):
    forecast_text.print_forecast(forecast, {}, explain=False)
    output = " ".join(capsys.readouterr().out.split())
    assert "(all figures predicted" in output and "times that others measured differ" in output


def test_a_plan_says_what_its_sizes_are_of(forecast, capsys):
    for card, rest in ((forecast.card, f"CUDA's own context {forecast.card.context_bytes / GIB:.2f} GiB, host memory"), (lookup("cpu"), "all else")):
        forecast_text.print_forecast(replace(forecast, card=card), {}, explain=False)
        output = " ".join(capsys.readouterr().out.split())
        assert f"GiB, {rest} {forecast.chosen.host_bytes / GIB:.2f} GiB" in output


def test_a_step_takes_what_its_host_takes_to_launch_it_at_least(forecast, capsys):
    num_operators, by_bound = 3400, forecast.chosen.time.by_bound | {"memory traffic": 0.0016}
    chosen = replace(forecast.chosen, time=replace(forecast.chosen.time, by_bound=by_bound, num_operators=num_operators))
    found = replace(forecast, result=replace(forecast.result, best=chosen), config=replaced(forecast.config, {"optim.steps": 400}))
    for card, said in ((found.card, "68.0 ms a step (its host gives the card 3,400 operators, 20 µs for each assumed); 400 steps take 0:28 "),
                       (lookup("cpu"), f"{1e3 * chosen.time.seconds:.1f} ms a step (largest part: memory traffic); 400 steps take 0:01 ")):  # its own host
        forecast_text.print_forecast(replace(found, card=card), {}, explain=True)
        output = " ".join(capsys.readouterr().out.split())
        assert said in output and "memory traffic 1.6 ms" in output


def test_what_others_hold_of_a_card_is_said(tiny_config):
    card, held = lookup("4090"), int(23.25 * GIB)
    crowded = planning.forecast(tiny_config(), replace(card, usable_bytes=card.usable_bytes - held, used_by_others_bytes=held))
    assert planning.verdict(crowded).endswith("it would if other processes did not hold 23.25 GiB, which nvidia-smi shows")
    beside = planning.forecast(tiny_config(), replace(card, usable_bytes=card.usable_bytes - 2 * GIB, used_by_others_bytes=2 * GIB))
    assert f"of {card.usable_bytes / GIB - 2:.2f} GiB usable beside the 2.00 GiB of other processes" in planning.verdict(beside)


@pytest.mark.parametrize("fits, plan, hinted", [(True, MemoryPlan(), True), (True, MemoryPlan(checkpoint="none"), False), (False, MemoryPlan(), False)],
                         ids=["recomputes", "keeps all", "does not fit"])
def test_what_the_host_has_is_asked_for_where_it_would_help(forecast, capsys, fits, plan, hinted):
    chosen = replace(forecast.chosen, plan=plan)
    result = replace(forecast.result, best=chosen if fits else None, smallest=chosen, near_misses=(forecast.chosen,))
    forecast_text.print_forecast(replace(forecast, result=result), {}, explain=False)
    assert ("--host 64gb: faster plans" in capsys.readouterr().out) == hinted


def test_a_plan_says_what_is_not_predicted_of_compiled_blocks(tiny_config, capsys):
    found = planning.forecast(tiny_config(memory__compile=True), lookup("4090"))
    forecast_text.print_forecast(found, {}, explain=False)
    assert "predicted, as if no block were compiled, but for 6% that compiled ones reserve more;" in " ".join(capsys.readouterr().out.split())


def test_an_explanation_says_from_which_time_an_operator_on_the_host_is_the_limit(forecast, capsys):
    for explain, card in ((True, forecast.card), (False, forecast.card), (True, lookup("cpu"))):  # a CPU is its own host
        forecast_text.print_forecast(replace(forecast, card=card), {}, explain=explain)
        output, time = " ".join(capsys.readouterr().out.split()), forecast.chosen.time
        said = f"host: about {time.num_operators:,.0f} operators a step, most of them one kernel; it is the limit where it takes more than"
        assert (f"{said} {1e6 * time.seconds / time.num_operators:,.0f} µs for each" in output) == (explain and not card.is_cpu)


@pytest.mark.parametrize("name", ["4090", "h200", "8gb", "cpu"])
def test_an_explanation_says_what_is_assumed_and_of_which_size(forecast, capsys, name):
    card = lookup(name)
    forecast_text.print_forecast(replace(forecast, card=card), {}, explain=True)
    [said] = re.findall("not measured: (.*) rates: ", " ".join(capsys.readouterr().out.split()))
    assert f"usable memory {card.usable_bytes / GIB:.2f} GiB" in said and said.count(", ") == len(card.assumed) - 1
    for field, words in (("memory_fraction", f"element-wise work {card.memory_fraction:.0%} of the bandwidth"),
                         ("tensor_rate", f"tensor rate {card.tensor_rate / 1e12:.3g} TFLOP/s"),
                         ("host_link_bandwidth", f"host link {card.host_link_bandwidth / 1e9:.3g} GB/s")):
        assert (words in said) == (field in card.assumed)


def test_a_plan_prints_the_command_and_origins_as_they_are(tiny_config, capsys):
    config = tiny_config(data__concept="a [/b] [ball]", data__prompts=None)
    found = planning.forecast(config, lookup("4090"))
    forecast_text.print_forecast(found, {"data.concept": "flag", "memory.checkpoint": "file [a].toml"}, explain=False)
    output = capsys.readouterr().out
    assert "--concept 'a [/b] [ball]'" in output.splitlines()[-1] and "file [a].toml" in output


def test_settings_given_are_predicted_as_given(tiny_config):
    config = tiny_config(memory__resident_blocks=1, memory__boundaries="host")
    found = planning.forecast(config, lookup("4090"), ["resident_blocks", "boundaries"])
    assert (found.chosen.plan.resident_blocks, found.chosen.plan.boundaries) == (1, "host")


@pytest.mark.parametrize("settings", [{"guidance": "batched", "num_keep_everything": 1}, {"checkpoint": "every:2"}], ids=str)
def test_blocks_that_keep_what_was_given_are_planned_though_they_are_not_all_alike(settings):
    """With inputs on the host, what a block's visit is like depends on what the block after the next one keeps, and beyond."""
    config = TrainConfig(data=DataConfig(batch_size=2), loss=LossConfig(beta=0.0), optim=OptimConfig(rank=512), memory=MemoryPlan(**settings))
    found = planning.forecast(config, replace(lookup("h200"), usable_bytes=int(1.07 * GIB)), settings)
    assert found.result.num_unknown == 0
    full = assess(planning.workload(config), found.chosen.plan, found.card)
    assert found.chosen.prediction == full.prediction and found.chosen.time == full.time


@pytest.mark.slow
@pytest.mark.parametrize("model, frames, card", [("cogvideox-5b", 49, "8gb"), ("cogvideox1.5-5b", 81, "16gb")])
def test_no_faster_plan_is_missed_where_some_attention_is_recomputed(model, frames, card):
    """Feed-forwards in chunks, which come last, free memory for more attention outputs and cost such blocks nothing."""
    assert regret(model, frames, card) == 0


def test_a_long_model_is_predicted_as_given_from_short_traces(monkeypatch):
    monkeypatch.setattr(planning, "rehearse", traced := Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        planning.forecast_as_given(TrainConfig(model=ModelConfig(model="cogvideox-2b"), data=DataConfig(preserve=("blue",))), lookup("cpu"))
    assert traced.call_args.args[3] == 5  # blocks, of 30: each takes a quarter of a second


@pytest.mark.parametrize("share, passes", [(0.1, "lockstep"), (1.0, "sequential")])
def test_passes_walk_together_where_inputs_on_the_host_wait_for_the_link(share, passes):
    """All blocks are on the card; what one pass stores hides behind what another computes."""
    card = lookup("h200")
    slow = replace(card, host_link_bandwidth=share * card.host_link_bandwidth)
    config = TrainConfig(model=ModelConfig(model="cogvideox-2b", weights="random", frames=9), data=DataConfig(preserve=("blue",)),
                         memory=MemoryPlan(boundaries="host"))
    found = planning.forecast(config, slow, {"boundaries", "resident_blocks", "checkpoint"})
    assert found.chosen.plan == MemoryPlan(boundaries="host", passes=passes)


@pytest.mark.parametrize("settings", [
    {}, {"memory__passes": "lockstep"}, {"memory__passes": "lockstep", "memory__resident_blocks": 0, "memory__boundaries": "host"}], ids=str)
def test_accumulated_passes_take_their_time_and_find_gradients_there(tiny_config, settings):
    card = lookup("4090")
    once, twice = (planning.forecast(tiny_config(optim__rank=64, optim__accumulation=n, **settings), card, SEARCHED).chosen for n in (1, 2))
    often = planning.forecast_as_given(tiny_config(optim__rank=64, optim__accumulation=6, memory=twice.plan), card)
    assert 1.9 * once.time.seconds < twice.time.seconds < 2 * once.time.seconds
    assert often.time.seconds - twice.time.seconds == pytest.approx(2 * (2 * twice.time.seconds - 2 * once.time.seconds), rel=0.05)
    assert once.prediction.peak_bytes < twice.prediction.peak_bytes and often.prediction == twice.prediction


def test_the_command_gives_all_that_was_given_and_leaves_the_planner_what_it_chose():
    config = TrainConfig(loss=LossConfig(eta=2.0), memory=MemoryPlan(checkpoint="all"))
    plan = MemoryPlan(resident_blocks=3)
    origins = {"loss.eta": "file a.toml", "optim.rank": "bundled model", "memory.checkpoint": "flag", "memory.passes": "default"}
    assert forecast_text.command(config, plan, origins) == "python run.py --eta 2.0 --resident-blocks 3 --checkpoint all"
    published = replace(config, model=ModelConfig(model="cogvideox-2b"), data=DataConfig(concept="golf", preserve=("tennis",)))
    given = {"model.model": "flag", "data.concept": "flag", "data.preserve": "flag"}
    assert forecast_text.command(published, MemoryPlan(), given) == "python run.py --model cogvideox-2b --concept golf --preserve tennis"
    unsaid = replace(published, data=DataConfig())
    assert forecast_text.command(unsaid, MemoryPlan(), {"model.model": "flag"}) == "python run.py --model cogvideox-2b --concept WORD --preserve WORD"


def test_a_published_name_without_weights_is_planned_from_its_configuration():
    for model in ("cogvideox-5b", "THUDM/CogVideoX-5b"):
        planned = planning.without_weights(TrainConfig(model=ModelConfig(model=model))).model
        assert (planned.model, planned.weights) == ("cogvideox-5b", "random")
    for model in ("shapes", "/nowhere"):
        config = TrainConfig(model=ModelConfig(model=model))
        assert planning.without_weights(config) is config


def test_settings_that_cannot_be_are_one_line(tiny_config):
    for changes, words in (({"memory__guidance": "none"}, "--guidance none"), ({"model__frames": 48}, "--frames 48"),
                           ({"loss__mask_blocks": (1, 2)}, "--mask-blocks 2: .* has blocks 0 to 1")):
        with pytest.raises(UsageError, match=words):
            planning.forecast(tiny_config(**changes), lookup("4090"))
    with pytest.raises(UsageError, match="has no bfloat16"):
        planning.check_card(tiny_config(memory__dtype="bfloat16"), replace(lookup("t4"), bf16=False))


def test_of_a_cpu_the_verdict_names_no_card(tiny_config):
    found = planning.forecast(tiny_config(), replace(lookup("cpu"), usable_bytes=2**20))
    step = found.chosen.prediction.by_phase  # decode allocates more, and the step reserves more
    assert planning.verdict(found).endswith(f"more of this machine's memory in {shown(max(step, key=step.get))}; "
                                            "4 GiB free would do")


def test_processes_that_share_one_memory_have_a_part_of_it_each(tiny_config, monkeypatch):
    cpu, config = lookup("cpu"), tiny_config(data__batch_size=2)
    parts = [planning.forecast(config, cpu, num_cards=count).card.usable_bytes for count in (1, 2)]
    assert parts == [cpu.usable_bytes, cpu.usable_bytes // 2]
    needed = planning.forecast(config, cpu, num_cards=2).chosen.needed_bytes
    short = replace(cpu, usable_bytes=int(1.9 * needed))
    assert [planning.forecast(config, short, num_cards=count).result.best is None for count in (1, 2)] == [False, True]
    monkeypatch.setattr(planning, "num_ranks", lambda: 2)
    assert not planning.forecast_as_given(config, short).fits
    assert planning.forecast(config, lookup("4090"), num_cards=2).card.usable_bytes == lookup("4090").usable_bytes


def test_where_the_host_is_the_limit_the_data_say_so_too(tiny_config):
    found = planning.forecast(tiny_config(), lookup("4090"))
    data = forecast_text.as_json(found, {})
    assert data["step_seconds"] == found.step_seconds == found.chosen.time.launching > found.chosen.time.seconds


def test_where_the_host_is_short_too_that_is_said(tiny_config):
    found = planning.forecast(tiny_config(), replace(lookup("4090"), host_bytes=2**30))
    assert found.result.best is None and found.chosen.fits_card
    assert planning.verdict(found).endswith("GiB more of host memory; 4 GiB free would do")
    smaller = "; a smaller --batch-size with as much more --accumulation needs less"
    for num_samples, host_bytes, more in ((1, None, ""), (2, 2**40, smaller), (1, 2**30, ", and of host memory 4 GiB free would do")):
        found = planning.forecast(tiny_config(data__batch_size=num_samples), replace(lookup("4090"), usable_bytes=lookup("4090").context_bytes, host_bytes=host_bytes))
        assert not found.chosen.fits_card and planning.verdict(found).endswith("the smallest listed card that would do: rtx-2060" + more)


def test_a_card_that_would_do_has_room_for_its_own_context_too(forecast):
    """The smallest card of its generation with 80 GB has less than a half GiB beyond a need that is reckoned with an RTX 4090's context."""
    h100 = lookup("h100-pcie")
    needed = int(h100.usable_bytes * (1 - planning.MARGIN)) - (h100.context_bytes - forecast.card.context_bytes) // 2
    smallest = replace(forecast.chosen, needed_bytes=needed)
    assert planning.smallest_card(replace(forecast, result=replace(forecast.result, smallest=smallest))) == "a100-80gb"


@pytest.mark.parametrize("changes", [{"model__frames": 80_000_001}, {"data__batch_size": 2**30}, {"model__height": 160_000, "model__width": 160_000}],
                         ids=str)
def test_what_no_plan_could_fit_is_refused_before_a_step_is_traced(tiny_config, monkeypatch, changes):
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("traced"))
    for forecast in (planning.forecast, planning.forecast_as_given):
        with pytest.raises(DoesNotFit, match="does not fit GeForce RTX 4090: what one attention reads and writes is .* GiB; fewer --frames"):
            forecast(tiny_config(**changes), lookup("4090"))


def test_on_a_card_without_room_for_anything_the_smallest_plan_is_named(tiny_config):
    assert "the smallest plan needs" in planning.verdict(planning.forecast(tiny_config(), lookup("0.1gb")))


def test_the_embeddings_of_many_prompts_are_in_the_hosts_memory(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,safe\n" + "".join(f"a red ball {i},a ball {i}\n" for i in range(4000)))
    config = TrainConfig(model=ModelConfig(model="cogvideox-5b"))
    config = replace(config, data=replace(config.data, preserve=("blue",)))
    few = planning.workload(planning.without_weights(config)).host_bytes
    many = planning.workload(planning.without_weights(replace(config, data=replace(config.data, prompts=file)))).host_bytes
    assert few == 3 * GIB + 32 * 2**20  # eleven rows, pinned by powers of two
    assert many == 3 * GIB + 16 * GIB  # 8,006 of 1.77 MiB
    assert 8 * GIB < 8006 * 226 * 4096 * 2 < 16 * GIB


def test_a_text_encoder_in_its_files_dtype_takes_nothing_of_the_host(pipelines):
    backbone = CogVideoX(str(pipelines["2b"]))
    config = backbone.text_encoder.config()
    block_bytes = {dtype: sum(p.nbytes for p in backbone.text_encoder.fake(dtype=dtype).encoder.block.parameters())
                   for dtype in (torch.float32, torch.bfloat16)}
    mapped, converted = (phases._encoding_bytes(backbone, dtype)["host_bytes"] for dtype in (torch.float32, torch.bfloat16))
    assert backbone.stored_dtype("text_encoder") == torch.float32 and mapped < 2 * 4 * config.vocab_size * config.d_model
    assert converted > block_bytes[torch.bfloat16]


@pytest.mark.parametrize("dtype, converted", [("native", False), ("float32", False), ("bfloat16", True)])
def test_a_model_that_streams_is_on_the_host_as_a_whole_when_it_is_read_and_converted(dtype, converted):
    """However many of its blocks go to the card afterwards; what is not converted is mapped."""
    needs = planning.workload(TrainConfig()).phases(MemoryPlan(dtype=dtype))
    need = next(need for need in needs if need.name == "read weights")
    whole = phases._transformer_bytes(planning._opened(TrainConfig().model), torch.bfloat16)
    assert need.of_streaming and not need.with_backbone and need.host_bytes == (whole if converted else 0)


def test_samples_are_planned_with_the_feed_forwards_in_the_chunks_of_the_plan():
    """A sample is what the teacher does, but for the little that it keeps."""
    data = replace(TrainConfig().data, batch_size=1)
    whole, chunks = (planning.forecast_as_given(TrainConfig(data=data, memory=plan), lookup("h200")).by_phase
                     for plan in (MemoryPlan(), MemoryPlan(feed_forward_chunks=8)))
    assert chunks["teacher"] < whole["teacher"]
    assert 0 < whole["teacher"] - whole["sample"] == chunks["teacher"] - chunks["sample"] < 2**16


@pytest.mark.parametrize("blocks", [(0,), (2, 3), (5,)])
def test_some_blocks_that_make_the_mask_are_planned_as_if_all_did(blocks):
    plan = MemoryPlan(resident_blocks=2, num_keep_attention=2, boundaries="host")
    few, all_of_them = (planning.forecast(TrainConfig(loss=LossConfig(mask_blocks=b), memory=plan), lookup("0.5gb"), SEARCHED).chosen
                        for b in (blocks, ()))
    assert few.prediction == all_of_them.prediction and few.by_phase == all_of_them.by_phase and few.time == all_of_them.time


@pytest.mark.parametrize("frames, height, width", [(9, 64, 96), (17, 64, 96), (13, 32, 100), (9, 16, 16)])  # tiles are 32 x 48 latents; the last ones smaller
def test_one_tile_stands_for_all(pipelines, frames, height, width):
    backbone, num_frames = CogVideoX(str(pipelines["2b"])), (frames - 1) // 4 + 1
    predicted = phases._decoding_bytes(backbone, torch.float32, frames, (num_frames, 4, height, width))
    with FakeMode(), torch.no_grad():
        vae = backbone.fake_vae(dtype=torch.float32)
        enable_tiles(vae)
        video = torch.empty(1, 4, num_frames, height, width)
        actual = peak_beyond([vae], lambda: vae.decode(video)) + sum(p.nbytes for p in vae.parameters())
    assert predicted == pytest.approx(actual, rel=0.01)


@pytest.mark.parametrize("settings", [{}, {"loss__alpha": 0.0}, {"loss__beta": 0.0}, {"memory__dtype": "bfloat16"}], ids=str)
def test_a_pools_samples_are_counted_on_the_host(tiny_config, settings):
    """A few hundred of the 2b's at 49 frames take 10 GiB."""
    subject = prepare(tiny_config(**settings))
    with subject.assembly:
        sample = vars(subject.teacher.sample(0).parked())
    one = sum(pinned_bytes(tensor.nbytes) for tensor in sample.values() if tensor is not None)
    none, some, all_ = (planning.workload(tiny_config(data__pool=pool, optim__steps=3, optim__accumulation=4, **settings)).host_bytes
                        for pool in (0, 8, 40))
    assert (some - none, all_ - none) == (8 * one, 12 * one)  # there are no more than passes


def test_runs_that_differ_in_what_no_trace_sees_share_one(tiny_config, monkeypatch):
    run = {"data__pool": 4, "memory__passes": "lockstep", "optim__accumulation": 2}
    config = tiny_config(**run)
    other = tiny_config(**run | {
        "data__pool": 8, "optim__accumulation": 3, "optim__steps": 9, "optim__lr": 1e-3, "optim__warmup": 1, "optim__schedule": "cosine",
        "optim__weight_decay": 0.1, "optim__clip": 0.5, "optim__seed": 7, "data__concept": "blue", "data__prompts": None, "data__preserve": ("green",),
        "output__save_every": 1, "output__sample_every": 2, "output__sample_steps": 3, "output__sample_prompts": ()})
    first, second = traces = [planning.rehearse(planning._opened(c.model), c, config.memory) for c in (config, other)]
    assert first == second
    monkeypatch.setattr(planning, "rehearse", lambda *_: traces.append(first) or first)
    for c in (config, other, *(replaced(config, change) for change in (
            {"optim.rank": 5}, {"data.batch_size": 1}, {"data.latents": "noise"}, {"loss.beta": 0.0}, {"data.pool": 0}, {"optim.accumulation": 1}))):
        planning.forecast_as_given(c, lookup("4090"))
    assert len(traces) == 2 + 1 + 6


def test_a_pool_spares_the_teachers_time(tiny_config):
    seconds = {}
    for pool, steps in ((0, 50), (5, 50), (50, 50), (100, 50)):
        config = tiny_config(data__pool=pool, data__latents="noise", optim__steps=steps)
        seconds[pool] = planning.forecast(config, lookup("4090"), SEARCHED).chosen.time.seconds
    teacher = seconds[0] - seconds[5]
    assert seconds[0] == seconds[50] == seconds[100] > seconds[5] > 0 and 0.1 < teacher / seconds[0] < 0.6
