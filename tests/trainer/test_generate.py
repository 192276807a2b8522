"""`generate` without an eraser is diffusers' own pipeline; with one, it is not."""

import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipelines import FRAMES, SIDE
from test_erasers import shake

from memory.assess import Workload, assess
from memory.cards import GIB, lookup
from memory.plan import MemoryPlan, apply_plan
from memory.timeline import pinned_bytes
from trainer import generate as module
from trainer.assemble import assemble, named_scheduler, open_backbone
from trainer.cli import main
from trainer.config import ModelConfig, OptimConfig, TrainConfig
from trainer.config_file import as_json
from trainer.diffusion import sample
from trainer.eraser_files import save_eraser
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, DoesNotFit, InputOutputError, NonFinite, UsageError
from trainer.phases import fit_to_generate
from trainer.planning import workload
from trainer.run_directory import write_config
from trainer.video import contact_sheet, spread
from trainer.video_config import GenerateConfig

PROMPT, SEED, NUM_STEPS = "a red circle moving left", 11, 3


def _config(directory, out, **more) -> GenerateConfig:
    model = ModelConfig(model=str(directory), frames=FRAMES, height=SIDE, width=SIDE, device="cpu")
    return GenerateConfig(**dict(prompt=(PROMPT,), out=out, no_eraser=True, seed=SEED, num_steps=NUM_STEPS, model=model) | more)


@pytest.fixture
def written(monkeypatch):
    """Videos (3, T, H, W) by file name, caught on their way to mp4."""
    videos = {}
    monkeypatch.setattr(module, "write_mp4", lambda path, video, *, fps: videos.update({path.name: video}))
    return videos


def _stock(backbone, scheduler: str, scale: float, **more) -> torch.Tensor:
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(backbone.directory)
    pipeline.scheduler = named_scheduler(backbone, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(PROMPT, num_frames=FRAMES, height=SIDE, width=SIDE, num_inference_steps=NUM_STEPS,
                     guidance_scale=scale, max_sequence_length=backbone.text_length, output_type="np",
                     generator=torch.Generator().manual_seed(SEED), **more).frames[0]
    return torch.from_numpy(np.asarray(video)).permute(3, 0, 1, 2)


def test_a_scheduler_that_cannot_be_trained_with_generates_wherever_that_is(backbone, written, tmp_path, monkeypatch):
    """Without a card, and --device auto, what training would take there is asked for first."""
    model = shutil.copytree(backbone.directory, tmp_path / "model")
    for file, name in (("model_index.json", "scheduler"), ("scheduler/scheduler_config.json", "_class_name")):
        content = json.loads((model / file).read_text())
        content[name] = ["diffusers", "DPMSolverMultistepScheduler"] if name == "scheduler" else "DPMSolverMultistepScheduler"
        (model / file).write_text(json.dumps(content))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto = ModelConfig(model=str(model), frames=FRAMES, height=SIDE, width=SIDE)
    module.generate(_config(model, tmp_path / "x.mp4", model=auto))
    assert torch.isfinite(written["x.mp4"]).all()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("guidance, scale", [("batched", 6.0), ("sequential", 6.0), ("batched", 1.0)])
def test_without_eraser_equals_the_stock_pipeline(backbone, written, tmp_path, scheduler, guidance, scale):
    module.generate(_config(backbone.directory, tmp_path / "x.mp4", scheduler=scheduler, guidance_scale=scale,
                            memory=MemoryPlan(guidance=guidance)))
    difference = (written["x.mp4"] - _stock(backbone, scheduler, scale)).abs().max()
    assert difference <= 1e-5


def test_guidance_none_equals_the_stock_pipeline_without_guidance(sincos, written, tmp_path):
    module.generate(_config(sincos.directory, tmp_path / "x.mp4", guidance_scale=1.0, memory=MemoryPlan(guidance="none")))
    assert (written["x.mp4"] - _stock(sincos, "model", 1.0)).abs().max() <= 1e-5


def test_guidance_none_with_a_scale_is_refused(sincos, tmp_path):
    """A scale that would silently have no effect."""
    with pytest.raises(UsageError, match="--guidance none.*--guidance-scale 1"):
        _config(sincos.directory, tmp_path / "x.mp4", guidance_scale=6.0, memory=MemoryPlan(guidance="none"))


@pytest.mark.parametrize("plan", [MemoryPlan(resident_blocks=0), MemoryPlan(resident_blocks=1, feed_forward_chunks=3)],
                         ids=["streamed", "half-streamed-chunked"])
def test_memory_plan_changes_nothing_in_generation(sincos, written, tmp_path, plan):
    for name, chosen in (("plain.mp4", MemoryPlan()), ("planned.mp4", plan)):
        module.generate(_config(sincos.directory, tmp_path / name, memory=chosen))
    torch.testing.assert_close(written["planned.mp4"], written["plain.mp4"], rtol=0, atol=1e-5)


@pytest.fixture
def eraser(sincos, tmp_path):
    erasers = Erasers(sincos.blocks(sincos.load_transformer(dtype=torch.float32)), 4)
    shake(erasers)
    save_eraser(tmp_path / "eraser", erasers, base_model=sincos.identity(), training={"data": {"concept": "red"}})
    return tmp_path / "eraser"


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(resident_blocks=0)], ids=["plain", "streamed"])
def test_eraser_changes_the_video_and_compare_shows_both(sincos, written, eraser, tmp_path, monkeypatch, plan):
    shown = {}

    def sheet(path, rows):
        shown.update(rows)
        contact_sheet(path, rows)

    monkeypatch.setattr(module, "contact_sheet", sheet)
    paths = module.generate(_config(sincos.directory, tmp_path / "x.mp4", no_eraser=False, eraser=eraser, compare=True,
                                    memory=plan))
    module.generate(_config(sincos.directory, tmp_path / "plain.mp4"))
    assert torch.equal(shown[f"after: {PROMPT}"], spread(written["x.mp4"]))
    assert torch.equal(shown[f"before: {PROMPT}"], spread(written["plain.mp4"]))
    assert (written["x.mp4"] - written["plain.mp4"]).abs().max() > 1e-3
    assert [p.name for p in paths] == ["x.mp4", "x-compare.png"] and paths[1].stat().st_size > 500


def test_a_directory_is_no_place_for_a_video(sincos, tmp_path, monkeypatch):
    (tmp_path / "x.mp4").mkdir()
    monkeypatch.setattr(module, "assemble", None)  # not reached
    with pytest.raises(InputOutputError, match="--out .*x.mp4: is a directory; name a file in it, as .*x.mp4/x.mp4"):
        module.generate(_config(sincos.directory, tmp_path / "x.mp4"))


@pytest.mark.parametrize("out", ["file/x.mp4", "/proc/x.mp4"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_sampled(sincos, tmp_path, written, monkeypatch, out):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "assemble", None)  # not reached
    with pytest.raises(InputOutputError, match=r"--out .*x.mp4: cannot be written \("):
        module.generate(_config(sincos.directory, tmp_path / out))


def test_what_is_refused_makes_no_directory(sincos, tmp_path):
    config = _config(sincos.directory, tmp_path / "new" / "x.mp4")
    for wrong in (dict(no_eraser=False, eraser=tmp_path / "nothing"), dict(model=replace(config.model, frames=10))):
        with pytest.raises((CheckpointError, UsageError)):
            module.generate(replace(config, **wrong))
    assert not (tmp_path / "new").exists()


def test_erasers_are_where_blocks_compute(sincos, eraser, tmp_path, written, monkeypatch):
    """A plan moves what is not streamed to the device: erasers that come after it would stay with the blocks on the host."""
    def applied(transformer, blocks, plan, **more):
        assert all(hasattr(block.attn1, "adapter") for block in blocks)
        return apply_plan(transformer, blocks, plan, **more)

    monkeypatch.setattr("trainer.backbones.cogvideox.apply_plan", applied)
    module.generate(_config(sincos.directory, tmp_path / "x.mp4", no_eraser=False, eraser=eraser, memory=MemoryPlan(resident_blocks=0)))
    assert "x.mp4" in written


def test_an_eraser_of_another_model_is_refused_before_a_download(eraser, pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.backbones.cogvideox.CogVideoX.fetch", None)  # not reached
    with pytest.raises(CheckpointError, match="made for .*2b, not for .*5b"):
        module.generate(_config(pipelines["5b"], tmp_path / "x.mp4", no_eraser=False, eraser=eraser))


def test_eraser_brings_its_own_base_model(eraser, written, tmp_path, monkeypatch):
    model = ModelConfig(frames=FRAMES, height=SIDE, width=SIDE, device="cpu")
    monkeypatch.setattr("trainer.backbones.location.BUNDLED", tmp_path / "not-there")
    module.generate(_config("shapes", tmp_path / "x.mp4", no_eraser=False, eraser=eraser, model=model))
    assert "x.mp4" in written


def test_a_run_gives_its_sizes_and_its_plan_where_flags_do_not(sincos, eraser, tmp_path):
    run = GenerateConfig(prompt=(PROMPT,), eraser=tmp_path)
    model = ModelConfig(model=str(sincos.directory), frames=FRAMES, height=SIDE, device="cuda:1")
    trained = TrainConfig(model=model, memory=MemoryPlan(resident_blocks=0, guidance="batched", feed_forward_chunks=2))
    assert module.as_trained(run, run.eraser, ()) == run  # an export, which says nothing of a run
    write_config(tmp_path, trained, {}, base_model={}, first_step=0)
    found = module.as_trained(run, run.eraser, {"eraser", "resident_blocks"})
    assert found == replace(run, model=replace(model, device="auto"), memory=MemoryPlan(feed_forward_chunks=2))
    assert module.as_trained(run, run.eraser, {"model", "height"}) == replace(  # which lies elsewhere
        run, model=ModelConfig(frames=FRAMES), memory=MemoryPlan(resident_blocks=0, feed_forward_chunks=2))
    assert module.as_trained(replace(run, eraser=eraser), eraser, ()) == replace(run, eraser=eraser)
    description = json.loads((eraser / "eraser.json").read_text())
    (eraser / "eraser.json").write_text(json.dumps(description | {"training": as_json(trained)}))
    (eraser / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')  # a model's, which lies there too
    for named in (eraser, eraser / "eraser.safetensors"):  # a file says it, too
        found = module.as_trained(replace(run, eraser=named), named, {"resident_blocks"})
        assert found.model == replace(model, device="auto") and found.memory == MemoryPlan(feed_forward_chunks=2)
    other = as_json(trained) | {"memory": {"checkpoint": "newest"}}  # of another version, as which it says nothing
    (eraser / "eraser.json").write_text(json.dumps(description | {"training": other}))
    assert module.as_trained(run, eraser, ()) == run


def test_a_run_of_forget_is_no_eraser(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}, "command": "forget"}')
    with pytest.raises(CheckpointError, match="is a run of forget: it holds a LoRA, which peft loads, and no eraser"):
        module.as_trained(GenerateConfig(prompt=(PROMPT,), eraser=tmp_path), tmp_path, ())


def test_eraser_of_another_model_is_refused_before_anything_is_written(eraser, pipelines, written, tmp_path):
    with pytest.raises(CheckpointError, match="not for"):
        module.generate(_config(pipelines["5b"], tmp_path / "x.mp4", no_eraser=False, eraser=eraser))
    assert not written


def test_several_prompts_make_numbered_videos_each_of_its_own_seed(sincos, written, tmp_path, monkeypatch):
    other = "a blue square moving up"
    batches, decoder = [], type(sincos).decoder
    monkeypatch.setattr(module, "sample", lambda predict, scheduler, noise, *rest, **more: batches.append(len(noise)) or sample(
        predict, scheduler, noise, *rest, **more))

    def counting(self, *args, **how):
        decode = decoder(self, *args, **how)
        return lambda latents: batches.append(len(latents)) or decode(latents)

    monkeypatch.setattr(type(sincos), "decoder", counting)
    paths = module.generate(_config(sincos.directory, tmp_path / "x.mp4", prompt=(other, PROMPT), seed=SEED - 1))
    assert batches == [1, 1, 1, 1]  # as much memory as one takes, and one video
    assert [p.name for p in paths] == ["x-0.mp4", "x-1.mp4"]
    module.generate(_config(sincos.directory, tmp_path / "alone.mp4"))
    torch.testing.assert_close(written["x-1.mp4"], written["alone.mp4"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_the_steps_of_all_videos_on_a_terminal(sincos, eraser, written, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    module.generate(_config(sincos.directory, tmp_path / "x.mp4", no_eraser=False, eraser=eraser, compare=True))
    captured = capsys.readouterr()
    assert (f"{2 * NUM_STEPS}/{2 * NUM_STEPS}" in captured.err, captured.err == "", captured.out) == (terminal, not terminal, "")


def test_latents_do_not_depend_on_the_batch_size(backbone):
    shape = backbone.latent_shape(FRAMES, SIDE, SIDE)
    predict = backbone.predictor(backbone.load_transformer(dtype=torch.float32), shape)
    from trainer.prompts import Embeddings

    texts = ["", "a red circle", "a blue square", "a green ball"]
    embeddings = Embeddings(backbone.text_encoder.encode(texts, dtype=torch.float32), texts)
    made = [module.generate_latents(predict, backbone.scheduler(), embeddings, texts[1:], [1, 2, 3], shape, num_steps=3,
                                    guidance_scale=4.0, batch_size=size) for size in (1, 2, 3)]
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(made[2], made[0], rtol=0, atol=1e-4)


def test_what_is_not_finite_is_no_video(sincos, written, tmp_path):
    with pytest.raises(NonFinite, match="the generated latents hold NaN or infinity"):
        module.generate(_config(sincos.directory, tmp_path / "x.mp4", guidance_scale=1e308))
    assert not written


def test_png_is_a_contact_sheet(sincos, tmp_path):
    from PIL import Image

    [path] = module.generate(_config(sincos.directory, tmp_path / "deep" / "x.png"))
    with Image.open(path) as sheet:
        assert sheet.size[0] > 400


@pytest.mark.parametrize("compare", [False, True])
def test_what_is_made_is_written_before_the_next_is_begun(sincos, eraser, tmp_path, monkeypatch, compare):
    """Hours of videos are not lost with the last of them."""
    make, begun, said = module.generate_latents, [], []

    def interrupted(predict, scheduler, embeddings, prompts, *args, **more):
        begun.append(prompts[0])
        if len(set(begun)) == 3:
            raise KeyboardInterrupt
        return make(predict, scheduler, embeddings, prompts, *args, **more)

    monkeypatch.setattr(module, "generate_latents", interrupted)
    prompts = (PROMPT, "a blue circle", "a red square")
    with pytest.raises(KeyboardInterrupt):
        module.generate(_config(sincos.directory, tmp_path / "x.png", prompt=prompts, no_eraser=False, eraser=eraser, compare=compare),
                        written=lambda path: said.append(path.name))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(said) == ["x-0.png", "x-1.png", *["x-compare.png"] * compare]


def test_videos_of_several_prompts_are_those_of_each(sincos, written, tmp_path):
    prompts = (PROMPT, "a blue circle")
    paths = module.generate(_config(sincos.directory, tmp_path / "x.mp4", prompt=prompts))
    assert [p.name for p in paths] == ["x-0.mp4", "x-1.mp4"]
    for i, prompt in enumerate(prompts):
        module.generate(_config(sincos.directory, tmp_path / "one.mp4", prompt=(prompt,), seed=SEED + i))
        assert torch.equal(written["one.mp4"], written[f"x-{i}.mp4"])


def test_fewer_blocks_are_resident_where_one_video_is_decoded_before_the_next_is_made(monkeypatch):
    monkeypatch.setattr("trainer.phases._decoding_bytes", lambda *_: GIB // 2)
    config, backbone = TrainConfig(optim=OptimConfig(rank=1)), open_backbone(ModelConfig())
    block = sum(p.nbytes for p in backbone.blocks(backbone.load_transformer(dtype=torch.float32))[0].parameters())
    card = replace(_card(0.5), cublas_workspace_bytes=0)
    card = replace(card, usable_bytes=int((GIB // 2 + 4.5 * block) * 1.06 / 0.97))
    alone, beside = (fit_to_generate(backbone, config, card, beside=beside).resident_blocks for beside in (False, True))
    assert alone is None and beside is not None


def _card(gib: float):
    return replace(lookup("4090"), usable_bytes=int(gib * GIB), context_bytes=0)


@pytest.mark.parametrize("resident", [0, 3, None])
def test_as_many_blocks_are_resident_as_fit(monkeypatch, resident):
    """On a card that holds what the planner says of sampling with so many, and little more."""
    monkeypatch.setattr("trainer.phases._decoding_bytes", lambda *_: 0)  # of so small a model the largest phase
    config = TrainConfig(optim=OptimConfig(rank=1))
    plan, card = replace(config.memory, resident_blocks=resident), replace(_card(1.0), cublas_workspace_bytes=0)
    needed = assess(workload(config), plan, card).by_phase["sample"]
    assert fit_to_generate(open_backbone(config.model), config, replace(card, usable_bytes=int(1.01 * needed * 1.06 / 0.97))) == plan


def test_what_streams_must_fit_the_host(monkeypatch):
    monkeypatch.setattr("trainer.phases._decoding_bytes", lambda *_: 0)
    config = TrainConfig(optim=OptimConfig(rank=1))
    backbone, card = open_backbone(config.model), replace(_card(1.0), cublas_workspace_bytes=0)
    needed = assess(workload(config), replace(config.memory, resident_blocks=0), card).by_phase["sample"]
    blocks = backbone.blocks(backbone.load_transformer(dtype=torch.float32))
    host_bytes = Workload.host_bytes + len(blocks) * pinned_bytes(sum(p.nbytes for p in blocks[0].parameters()))
    card = replace(card, usable_bytes=int(1.01 * needed * 1.06 / 0.97), host_bytes=host_bytes)
    assert fit_to_generate(backbone, config, card).resident_blocks == 0
    with pytest.raises(DoesNotFit, match="a video needs 0.00 GiB more of host memory"):
        fit_to_generate(backbone, config, replace(card, host_bytes=host_bytes - 1))


def test_on_the_cpu_nothing_streams_whatever_the_run_did_on_its_card(sincos):
    plan = MemoryPlan(resident_blocks=0, feed_forward_chunks=2)
    assert fit_to_generate(sincos, TrainConfig(memory=plan), lookup("cpu")) == replace(plan, resident_blocks=None)


def test_what_cannot_be_made_is_said_before_weights_are_read(sincos, eraser, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "embed_prompts", None)
    with pytest.raises(DoesNotFit, match=r"does not fit GeForce RTX 4090: a video needs .* more on the card in sample \(predicted\); fewer --frames"):
        module.generate(_config(sincos.directory, tmp_path / "x.mp4", no_eraser=False, eraser=eraser), _card(0.001))


def test_a_card_decides_what_streams_unless_a_flag_does(sincos, eraser, tmp_path, written, monkeypatch):
    plans = []
    monkeypatch.setattr(module, "assemble", lambda backbone, model, plan, **more: [plans.append(plan), assemble(backbone, model, plan, **more)][1])
    monkeypatch.setattr("trainer.cli.chosen_card", lambda profile, device: _card(1.0 if device == "auto" else 0.0))
    words = ["generate", "--model", str(sincos.directory), "--eraser", str(eraser), "--prompt", PROMPT, "--out", str(tmp_path / "x.mp4"),
             "--frames", str(FRAMES), "--height", str(SIDE), "--width", str(SIDE), "--num-steps", "1"]
    main(words)
    main([*words, "--resident-blocks", "1", "--device", "cpu"])
    assert [plan.resident_blocks for plan in plans] == [None, 1]


@pytest.mark.parametrize("gib, num_sampled", [(1.0, [1, 2]), (0.0, [2, 2])])
def test_where_the_decoder_does_not_fit_beside_the_blocks_of_a_flag_it_waits(sincos, eraser, tmp_path, written, monkeypatch, gib, num_sampled):
    make, load, sampled, at_decoding = module.generate_latents, type(sincos).load_vae, [], []
    monkeypatch.setattr(module, "generate_latents", lambda *args, **more: [sampled.append(1), make(*args, **more)][1])
    monkeypatch.setattr(type(sincos), "load_vae", lambda self, **how: [at_decoding.append(len(sampled)), load(self, **how)][1])
    monkeypatch.setattr("trainer.cli.chosen_card", lambda profile, device: _card(gib))
    main(["generate", "--model", str(sincos.directory), "--eraser", str(eraser), "--prompt", PROMPT, "a blue circle", "--out", str(tmp_path / "x.mp4"),
          "--frames", str(FRAMES), "--height", str(SIDE), "--width", str(SIDE), "--num-steps", "1", "--resident-blocks", "1", "--device", "cpu"])
    assert at_decoding == num_sampled


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(resident_blocks=1, feed_forward_chunks=2, passes="lockstep")], ids=["resident", "streamed"])
def test_the_transformer_is_gone_when_videos_are_decoded(sincos, eraser, tmp_path, written, monkeypatch, plan):
    load, decoder, weights = type(sincos).load_transformer, type(sincos).load_vae, []

    def load_transformer(self, **how):
        transformer = load(self, **how)
        weights.extend(map(weakref.ref, transformer.parameters()))
        return transformer

    def load_vae(self, **how):
        assert weights and not any(reference() is not None for reference in weights)
        return decoder(self, **how)

    monkeypatch.setattr(type(sincos), "load_transformer", load_transformer)
    monkeypatch.setattr(type(sincos), "load_vae", load_vae)
    module.generate(_config(sincos.directory, tmp_path / "x.mp4", no_eraser=False, eraser=eraser, memory=plan))
    assert "x.mp4" in written
