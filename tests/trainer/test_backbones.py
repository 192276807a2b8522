"""The backbone against diffusers' own pipeline: shapes, predictions, text, decoding."""

import gc
import inspect
import json
import shutil
import weakref
from unittest.mock import Mock

import huggingface_hub
import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import FRAMES, SIDE, build_pipeline

from memory.plan import MemoryPlan
from trainer.assemble import named_scheduler, open_training, resolve_dtype
from trainer.backbones import published, text_encoder
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.location import config_hash
from trainer.backbones.text_encoder import TextEncoder
from trainer.errors import CheckpointError, NonFinite, UsageError
from trainer.planning import workload


@pytest.mark.parametrize("name, num_parameters", [("cogvideox-2b", 1_693_783_872), ("cogvideox-5b", 5_570_283_072)])
def test_published_configurations_have_the_published_size(name, num_parameters):
    opened = CogVideoX(name, weights="random")
    with torch.device("meta"):
        model = opened._build_transformer()
    assert sum(p.numel() for p in model.parameters()) == num_parameters


@pytest.mark.parametrize("frames, tokens", [(49, 17_776), (17, 6_976), (9, 4_276)])
def test_token_counts_at_480_by_720(frames, tokens):
    opened = CogVideoX("cogvideox-2b", weights="random")
    assert opened.num_tokens(opened.latent_shape(frames, 480, 720)) == tokens


def test_published_1_5_pads_its_latent_frames_to_its_temporal_patch():
    opened = CogVideoX("cogvideox1.5-5b", weights="random")
    assert opened.default_size() == (81, 768, 1360)
    shape = opened.latent_shape(81, 768, 1360)
    assert shape == (22, 16, 96, 170)
    assert opened.token_grid(shape) == (11, 48, 85)


def test_a_small_1_5_is_taken_no_larger_than_its_positions(tmp_path):
    opened = CogVideoX(str(build_pipeline(tmp_path, "1.5")))
    size = opened.default_size()
    assert size == (81, 32, 32) and opened.token_grid(opened.latent_shape(*size)) == (11, 4, 4)


@pytest.mark.parametrize("size, flag, works", [
    ((48, 480, 720), "--frames 48", "49 would work"),
    ((13, 480, 720), "--frames 13", "would work"),  # the VAE decodes 4 latent frames to 16 frames
    ((0, 480, 720), "--frames 0", "9 would work"),
    ((49, 481, 720), "--height 481", "480 would work"),
    ((49, 480, 8), "--width 8", "16 would work"),
])
def test_impossible_sizes_name_the_flag_and_what_works(size, flag, works):
    with pytest.raises(UsageError, match=f"{flag}.*{works}"):
        CogVideoX("cogvideox-2b", weights="random").latent_shape(*size)


@pytest.mark.parametrize("height, width, flag", [(1440, 2416, "width"), (2416, 2400, "height")])
def test_1_5_names_the_size_beyond_its_positions(height, width, flag):
    opened = CogVideoX("cogvideox1.5-5b", weights="random")
    assert opened.rotary(opened.latent_shape(9, 1440, 2400), "cpu")[0].shape == (2 * 90 * 150, 64)
    with pytest.raises(UsageError, match=f"--{flag} 2416: this model has positions for 2400 pixels at most"):
        opened.latent_shape(9, height, width)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_decoder_returns_the_frames_that_were_asked_for(backbone, frames):
    shape = backbone.latent_shape(frames, SIDE, SIDE)
    video = backbone.decoder(frames, dtype=torch.float32)(torch.randn(2, *shape))
    assert video.shape == (2, 3, frames, SIDE, SIDE)
    assert video.dtype == torch.float32 and video.min() >= 0 and video.max() <= 1


def test_a_decoder_that_gives_nan_is_said_and_not_shown_as_black(sincos, monkeypatch):
    load = type(sincos).load_vae

    def damaged(self, **how):
        vae = load(self, **how)
        next(vae.decoder.parameters()).data.view(-1)[0] = torch.nan
        return vae

    monkeypatch.setattr(type(sincos), "load_vae", damaged)
    with pytest.raises(NonFinite, match="the VAE gives NaN"):
        sincos.decoder(1, dtype=torch.float32)(torch.randn(1, *sincos.latent_shape(1, SIDE, SIDE)))


@pytest.mark.parametrize("one_by_one, num_calls", [(True, 2), (False, 1)])
def test_larger_videos_are_decoded_in_tiles_on_every_device(backbone, monkeypatch, one_by_one, num_calls):
    sizes, tiled_decode = [], AutoencoderKLCogVideoX.tiled_decode
    monkeypatch.setattr(AutoencoderKLCogVideoX, "tiled_decode", lambda vae, z, **more: sizes.append(z.shape) or tiled_decode(vae, z, **more))
    frames, channels, _, width = backbone.latent_shape(1, SIDE, SIDE)
    latents = torch.randn(2, frames, channels, 136 // backbone.spatial_ratio, width)  # a tile is 128 pixels high
    assert backbone.decoder(1, dtype=torch.float32, one_by_one=one_by_one)(latents).shape == (2, 3, 1, 136, SIDE)
    assert len(sizes) == num_calls


def test_decoder_equals_the_pipelines_decoding(pipelines, backbone):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(backbone.directory)
    shape = backbone.latent_shape(FRAMES, SIDE, SIDE)
    latents = torch.randn(1, *shape)
    ours = backbone.decoder(FRAMES, dtype=torch.float32)(latents)
    with torch.no_grad():
        stock = pipeline.decode_latents(latents[:, backbone.num_padding_frames((FRAMES - 1) // 4 + 1):])
    assert torch.equal(ours, (stock / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("frames, height", [(FRAMES, SIDE), (17, SIDE), (FRAMES, 24)])
def test_prediction_equals_the_stock_transformer(backbone, frames, height):
    from diffusers import CogVideoXPipeline

    shape = backbone.latent_shape(frames, height, SIDE)
    x, t, text = torch.randn(2, *shape), torch.tensor([17, 901]), torch.randn(2, backbone.text_length, 16)
    predict = backbone.predictor(backbone.load_transformer(dtype=torch.float32), shape)
    pipeline = CogVideoXPipeline.from_pretrained(backbone.directory)
    rotary = None
    if pipeline.transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(height, SIDE, shape[0], torch.device("cpu"))
    with torch.no_grad():
        stock = pipeline.transformer(x, text, t, image_rotary_emb=rotary, return_dict=False)[0]
        torch.testing.assert_close(predict(x, t, text), stock, rtol=1e-5, atol=1e-5)


def test_positions_of_another_size_are_made_once(sincos, monkeypatch):
    """Diffusers makes them anew in every forward at another size than the configured one."""
    shape = sincos.latent_shape(17, SIDE, SIDE)
    assert 17 != sincos.config.sample_frames
    transformer = sincos.load_transformer(dtype=torch.float32)
    predict = sincos.predictor(transformer, shape)
    at_once = sincos.load_transformer(dtype=torch.float32, latent_shape=shape)
    making = Mock(wraps=transformer.patch_embed._get_positional_embeddings)
    for each in (transformer, at_once):
        monkeypatch.setattr(each.patch_embed, "_get_positional_embeddings", making)
    x, t, text = torch.randn(1, *shape), torch.tensor([17]), torch.randn(1, sincos.text_length, 16)
    assert torch.equal(predict(x, t, text), sincos.predictor(at_once, shape)(x, t, text))
    assert making.call_count == 0


def test_prediction_with_ofs_equals_the_stock_transformer(pipelines):
    from diffusers import CogVideoXTransformer3DModel

    opened = CogVideoX(str(pipelines["1.5-ofs"]))
    shape = opened.latent_shape(FRAMES, SIDE, SIDE)
    x, t, text = torch.randn(2, *shape), torch.tensor([17, 901]), torch.randn(2, opened.text_length, 16)
    predict = opened.predictor(opened.load_transformer(dtype=torch.float32), shape)
    stock = CogVideoXTransformer3DModel.from_pretrained(opened.directory / "transformer").eval()
    with torch.no_grad():
        expected = stock(x, text, t, image_rotary_emb=opened.rotary(shape, "cpu"), ofs=x.new_full((1,), 2.0),
                         return_dict=False)[0]
        torch.testing.assert_close(predict(x, t, text), expected, rtol=1e-5, atol=1e-5)


def test_prediction_in_bfloat16_equals_the_stock_transformer(pipelines):
    from diffusers import CogVideoXTransformer3DModel

    opened = CogVideoX(str(pipelines["5b-bf16"]))
    shape = opened.latent_shape(FRAMES, SIDE, SIDE)
    x, t, text = torch.randn(1, *shape), torch.tensor([500]), torch.randn(1, opened.text_length, 16)
    predict = opened.predictor(opened.load_transformer(dtype=opened.native_dtype), shape)
    stock = CogVideoXTransformer3DModel.from_pretrained(opened.directory / "transformer", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        ours = predict(x, t, text)
        expected = stock.eval()(x.bfloat16(), text.bfloat16(), t, image_rotary_emb=opened.rotary(shape, "cpu"),
                                return_dict=False)[0]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoded_prompts_equal_the_pipelines_bitwise(backbone, dtype, stream):
    from diffusers import CogVideoXPipeline

    prompts = ["a red circle moving left", "", "something that this tokenizer must spell letter by letter"]
    pipeline = CogVideoXPipeline.from_pretrained(backbone.directory, torch_dtype=dtype)
    with torch.no_grad():
        stock = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=backbone.text_length)
    assert torch.equal(backbone.text_encoder.encode(prompts, dtype=dtype, stream=stream), stock)


def test_prompts_that_the_model_does_not_read_to_their_end_are_told(sincos, caplog):
    sincos.text_encoder.encode(["red"], dtype=torch.float32)
    assert not caplog.messages
    sincos.text_encoder.encode(["red", 40 * "red "], dtype=torch.float32)
    assert caplog.messages == ["1 of 2 prompts are longer than what the model reads, "
                               f"{sincos.text_length} tokens, and end there, as {15 * 'red '!r}"]


@pytest.mark.parametrize("stream, times", [(True, 1), (False, 0), (None, 0)])
def test_the_text_encoder_is_streamed_where_that_is_asked_for(sincos, monkeypatch, stream, times):
    streaming = Mock(wraps=text_encoder.offload_blocks)
    monkeypatch.setattr(text_encoder, "offload_blocks", streaming)
    sincos.text_encoder.encode(["a red circle"], dtype=torch.float32, stream=stream)
    assert streaming.call_count == times  # on the CPU not by itself


def test_the_text_encoders_bias_has_its_rows_together(sincos, monkeypatch):
    """torch's fused attention on a card takes no other, and what it falls back to holds attention matrices in float32."""
    biases, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*args, attn_mask, **more):
        biases.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    sincos.text_encoder.encode(["a red circle"], dtype=torch.float32)
    assert biases and all(bias.is_contiguous() and bias.any() for bias in biases)


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_encoder_is_gone_when_its_prompts_are_encoded(sincos, monkeypatch, stream):
    loaded = []

    def noted(self, **where):
        encoder = load(self, **where)
        loaded.extend(map(weakref.ref, encoder.modules()))
        return encoder

    load = TextEncoder.load
    monkeypatch.setattr(TextEncoder, "load", noted)
    gc.disable()  # nothing may depend on when the collector happens to come by
    try:
        sincos.text_encoder.encode(["a red circle"], dtype=torch.float32, stream=stream)
        assert loaded and not any(module() is not None for module in loaded)
    finally:
        gc.enable()


@pytest.mark.gpu
def test_the_text_encoder_leaves_no_gaps_on_the_card(sincos):
    """What stays there for all of training comes next, and is to lie side by side."""
    torch.cuda.empty_cache()
    reserved = []
    for _ in range(2):  # the workspaces of matrix products stay from the first
        sincos.text_encoder.encode(["a red circle"], dtype=torch.float32, device="cuda")
        reserved.append(torch.cuda.memory_reserved())
    torch.cuda.empty_cache()
    assert reserved == [torch.cuda.memory_reserved()] * 2


def test_tokenizer_of_a_sentencepiece_model_alone(copied):
    """As the published repositories have it: spiece.model and no tokenizer.json."""
    model = copied("5b")
    directory = model / "tokenizer"
    shutil.rmtree(directory)
    directory.mkdir()
    with (directory / "spiece.model").open("wb") as written:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"a {colour} ball rolls {where}" for colour in ("red", "green") for where in ("up", "down")] * 50),
            model_writer=written, vocab_size=28, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    prompt = "a red ball"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model")).encode(prompt)
    backbone = CogVideoX(str(model))
    assert backbone.text_encoder.token_ids(backbone.text_encoder.tokenizer(), [prompt])[0, :len(pieces) + 2].tolist() == [*pieces, 1, 0]


@pytest.mark.parametrize("name, hub_id", published.HUB_IDS.items())
def test_a_published_name_is_its_hub_id(name, hub_id, monkeypatch, pipelines):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **_: asked.append(model) or str(pipelines["5b"]))
    assert CogVideoX(name).directory == pipelines["5b"] and set(asked) == {hub_id}


def test_encoding_in_batches_of_two_changes_nothing_but_rounding(sincos):
    prompts = ["a red circle", "a blue square", "", "a green triangle", "the ball"]
    torch.testing.assert_close(sincos.text_encoder.encode(prompts, dtype=torch.float32, batch_size=2),
                               sincos.text_encoder.encode(prompts, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_native_dtype_is_read_from_the_stored_weights(pipelines, sincos):
    assert sincos.native_dtype == torch.float32
    assert CogVideoX(str(pipelines["5b-bf16"])).native_dtype == torch.bfloat16
    assert CogVideoX("cogvideox-2b", weights="random").native_dtype == torch.float16


def test_float16_on_a_bf16_native_model_is_refused_unless_insisted(pipelines):
    opened = CogVideoX(str(pipelines["5b-bf16"]))
    with pytest.raises(UsageError, match=r"--dtype float16.*bf16-native.*--dtype bfloat16 \(on a card without it float32\), or --force-dtype"):
        resolve_dtype(opened, MemoryPlan(dtype="float16"), insist=False)
    assert resolve_dtype(opened, MemoryPlan(dtype="float16"), insist=True) == torch.float16
    assert resolve_dtype(opened, MemoryPlan(dtype="float32"), insist=False) == torch.float32


def test_identity_belongs_to_the_configuration_not_to_the_place(copied, sincos, pipelines):
    assert CogVideoX(str(copied("2b"))).identity()["config_hash"] == sincos.identity()["config_hash"]
    assert CogVideoX(str(pipelines["5b"])).identity()["config_hash"] != sincos.identity()["config_hash"]


def test_identity_survives_an_argument_that_a_later_diffusers_adds(sincos, monkeypatch):
    config, init = vars(sincos.config), CogVideoXTransformer3DModel.__init__
    before, now = config_hash(config), inspect.signature(init)
    added = inspect.Parameter("window", inspect.Parameter.KEYWORD_ONLY, default=1)
    monkeypatch.setattr(init, "__signature__", now.replace(parameters=[*now.parameters.values(), added]), raising=False)
    assert [config_hash(config | {"window": size}) == before for size in (1, 2)] == [True, False]


@pytest.mark.parametrize("name, known", [("cogvideox-2b", "e60c729c744c8d24"), ("cogvideox-5b", "7bd7c94ba7cdb353")])
def test_erasers_that_were_made_are_still_of_their_model(name, known):
    assert CogVideoX(name, weights="random").identity()["config_hash"] == known


def test_schedulers_by_name_share_the_models_schedule(backbone):
    own = backbone.scheduler()
    for name, kind in (("model", type(own).__name__), ("ddim", "CogVideoXDDIMScheduler"), ("dpm", "CogVideoXDPMScheduler")):
        made = named_scheduler(backbone, name)
        assert type(made).__name__ == kind
        assert torch.equal(made.alphas_cumprod, own.alphas_cumprod)


def test_missing_directory_says_what_would_work(tmp_path):
    with pytest.raises(UsageError, match="is not there.*hub id, or shapes"):
        CogVideoX(str(tmp_path / "nothing"))


def test_file_instead_of_a_directory_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a directory"):
        CogVideoX(str(tmp_path / "file"))


@pytest.mark.parametrize("part", ["vae", "model_index.json"])
def test_incomplete_directory_names_what_it_lacks(copied, part):
    directory = copied("2b")
    path = directory / part
    path.rename(directory / "elsewhere")
    with pytest.raises(UsageError, match=f"lacks {part}"):
        CogVideoX(str(directory))


@pytest.mark.parametrize("part", ["transformer/config.json", "vae/config.json", "model_index.json"])
def test_damaged_configuration_is_named(copied, part):
    file = copied("2b") / part
    file.write_text(file.read_text()[:-9])
    with pytest.raises(UsageError, match=f"^{file} cannot be read .*; copy the model again$"):
        CogVideoX(str(file.parents[part.count("/")]))


@pytest.mark.parametrize("part, name, message", [
    ("transformer/config.json", "WanTransformer3DModel", "transformer is a WanTransformer3DModel; CogVideoXTransformer3DModel is needed"),
    ("vae/config.json", "AutoencoderKLWan", "vae is a AutoencoderKLWan; AutoencoderKLCogVideoX is needed"),
    ("model_index.json", "WanPipeline", "the pipeline is a WanPipeline; CogVideoXPipeline is needed"),
    ("model_index.json", "CogVideoXVideoToVideoPipeline", None), ("transformer/config.json", None, None), ("model_index.json", None, None)])
def test_a_model_of_another_class_is_refused(copied, part, name, message):
    directory = copied("2b")
    content = json.loads((directory / part).read_text()) | {"_class_name": name}
    (directory / part).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    if message is None:
        CogVideoX(str(directory))
    else:
        with pytest.raises(UsageError, match=f"^--model {directory}: {message}$"):
            CogVideoX(str(directory))


def test_an_image_to_video_model_is_refused(copied):
    directory = copied("5b")
    file = directory / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 8}))
    with pytest.raises(UsageError, match="takes 8 latent channels and predicts 4, as for image to video"):
        CogVideoX(str(directory))


@pytest.mark.parametrize("name", ["nobody/no-model-at-all", "not a/hub id"])
def test_hub_id_without_network_is_a_usage_error(name):
    with pytest.raises(UsageError, match="the hub did not give it.*local directory"):
        CogVideoX(name)


def _not_found():
    return RepositoryNotFoundError("404 Client Error", response=Mock())


@pytest.mark.parametrize("error, why", [(None, "not in the cache, and HF_HUB_OFFLINE is set"), (_not_found(), "none of that name for you"),
                                        (OSError(28, "No space left on device"), "OSError: .*No space left on device; .* the same command goes on"),
                                        (type("ReadTimeout", (Exception,), {})("timed out"), "ReadTimeout: timed out; files that have come are kept")], ids=str)
def test_why_the_hub_does_not_give_a_model_is_said(monkeypatch, error, why):
    if error is not None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    with pytest.raises(UsageError, match=f"^--model nobody/no-model: .*{why}"):
        CogVideoX("nobody/no-model")


def test_a_model_of_the_hub_is_looked_at_before_its_weights_come(copied, hub):
    source = copied("5b")
    calls = hub({"some/one": source})
    opened = CogVideoX("some/one")
    assert opened.directory.name == "revision" and opened.name == "some/one"
    opened.load_transformer(dtype=torch.float32)
    assert [patterns for _, _, patterns in calls] == [["*.json", "*.txt", "*.model", "*.jinja"], [
        f"{part}/{name}.safetensors" for part in ("transformer", "vae", "text_encoder") for name in ("model", "diffusion_pytorch_model")]]
    assert calls[1][:2] == ("some/one", "revision")  # of what was looked at, whatever the hub has by now

    file = source / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 8}))
    calls.clear()
    with pytest.raises(UsageError, match="as for image to video"):
        CogVideoX("some/one")
    (source / "model_index.json").write_text('{"_class_name": "LatteDiffusionPipeline"}')
    with pytest.raises(UsageError, match="the pipeline is a LatteDiffusionPipeline"):
        CogVideoX("some/one")
    assert len(calls) == 2  # neither of them came to weights


def test_dtypes_of_a_model_of_the_hub_are_read_off_the_headers_of_its_weights(copied, hub, tiny_config):
    source = copied("5b-bf16")
    encoder = source / "text_encoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(encoder).items()}, encoder)
    calls = hub({"some/one": source})
    opened = CogVideoX("some/one")
    for _ in range(2):
        assert (opened.native_dtype, opened.stored_dtype("text_encoder")) == (torch.bfloat16, torch.float16)
    assert [file for _, revision, file in calls[1:] if revision == "revision"] == [
        "transformer/model.safetensors", "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    workload(tiny_config(model__model="some/one"))
    assert not [*opened.directory.rglob("*.safetensors")]

    encoder.rename(encoder.with_name("model.fp16.safetensors"))  # whose name the hub would have to be asked for
    assert CogVideoX("some/one").stored_dtype("text_encoder") == torch.float16
    calls.clear()
    assert CogVideoX("some/one").native_dtype == torch.bfloat16 and len(calls) == 1  # it is here now


def test_of_a_model_of_the_hub_only_the_weights_that_are_read_come(copied, hub, tmp_path):
    """Shards by their index; the plain variant; another where there is no plain one; nothing that lies elsewhere."""
    source = copied("5b")
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    half = len(tensors) // 2
    weight_map = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, weights.with_name(shard))
        weight_map |= dict.fromkeys(names, shard)
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights.rename(source / "all_in_one.safetensors")
    shutil.copy(source / "all_in_one.safetensors", weights.with_name("pytorch_lora_weights.safetensors"))
    vae = source / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    encoder = source / "text_encoder" / "model.safetensors"
    encoder.rename(encoder.with_name("model.fp16.safetensors"))
    hub({"some/one": source})
    opened = CogVideoX("some/one")
    opened.fetch()
    came = sorted(str(file.relative_to(opened.directory)) for file in opened.directory.rglob("*.safetensors"))
    assert came == ["text_encoder/model.fp16.safetensors", *(f"transformer/{shard}" for shard in sorted(set(weight_map.values()))),
                    "vae/diffusion_pytorch_model.safetensors"]
    loaded = opened.load_transformer(dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_cache_without_lists_of_files_serves_where_the_hub_is_not_reached(pipelines, tmp_path, monkeypatch):
    """As older versions of huggingface_hub fill it, and as it may be copied between machines."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--some--one", "a" * 40
    shutil.copytree(pipelines["5b"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    opened = CogVideoX("some/one")
    assert opened.directory == cached / "snapshots" / commit
    opened.load_transformer(dtype=torch.float32)

    (opened.directory / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    said = "the hub cannot be reached|files that have come are kept|HF_HUB_OFFLINE"
    if int(huggingface_hub.__version__.split(".")[0]) > 1:  # gives what the cache has, and says nothing
        said = "no vae/.* on the hub, or in the cache where the hub is not reached"
    with pytest.raises(UsageError, match=said):
        CogVideoX("some/one").fetch()


@pytest.mark.parametrize("missing", [1, 2])
def test_a_download_that_broke_off_is_no_damaged_model(copied, hub, monkeypatch, missing):
    source = copied("5b")
    whole = source / "transformer" / "diffusion_pytorch_model.safetensors"
    shard = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    with safe_open(whole, framework="pt") as f:
        names = list(f.keys())
        for number in (0, 1):
            save_file({name: f.get_tensor(name) for name in names[number::2]}, whole.with_name(shard[number]))
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps({"weight_map": {name: shard[i % 2] for i, name in enumerate(names)}}))
    whole.unlink()
    hub({"some/one": source})
    opened = CogVideoX("some/one")
    real = huggingface_hub.snapshot_download

    def breaking(hub_id, *, revision, allow_patterns, local_files_only=False):
        directory = real(hub_id, revision=revision, allow_patterns=[p for p in allow_patterns if not p.endswith(shard[missing - 1])])
        if not local_files_only:
            raise ConnectionError("peer closed connection")
        return directory

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaking)
    with pytest.raises(UsageError, match="peer closed connection; files that have come are kept, and the same command goes on with the rest"):
        opened.fetch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", real)
    opened.fetch()
    opened.load_transformer(dtype=torch.float32)


def test_sizes_are_refused_before_weights_of_the_hub_come(copied, hub, tiny_config):
    calls = hub({"some/one": copied("5b")})
    for refuse in (open_training, workload):
        with pytest.raises(UsageError, match="--frames 10: this VAE makes"):
            refuse(tiny_config(model__model="some/one", model__frames=10))
    assert {tuple(patterns) for _, _, patterns in calls} == {("*.json", "*.txt", "*.model", "*.jinja")}


def test_a_model_of_the_hub_without_safetensors_is_refused(copied, hub):
    source = copied("5b")
    (source / "vae" / "diffusion_pytorch_model.safetensors").rename(source / "vae" / "diffusion_pytorch_model.bin")
    hub({"some/one": source})
    with pytest.raises(UsageError, match=r"^--model some/one: no vae/\*\.safetensors of some/one on the hub.*save_pretrained\(DIR\)"):
        CogVideoX("some/one").fetch()


def test_a_model_of_learned_positions_is_refused(copied):
    directory = copied("5b")
    file = directory / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_learned_positional_embeddings": True}))
    with pytest.raises(UsageError, match="the transformer has learned positions, as for image to video"):
        CogVideoX(str(directory))


def test_a_published_name_is_the_hubs_whatever_lies_under_its_id(copied, hub, monkeypatch, tmp_path):
    shutil.copytree(copied("2b"), tmp_path / published.HUB_IDS["cogvideox-2b"])
    monkeypatch.chdir(tmp_path)
    calls = hub({published.HUB_IDS["cogvideox-2b"]: tmp_path / "copy-2b"})
    assert CogVideoX("cogvideox-2b").directory.name == "revision" and len(calls) == 1
    assert CogVideoX(published.HUB_IDS["cogvideox-2b"]).directory.name != "revision" and len(calls) == 1


def test_unreadable_configuration_is_a_usage_error(copied):
    directory = copied("2b")
    (directory / "vae" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json cannot be read"):
        CogVideoX(str(directory))


def test_random_weights_know_the_published_names_only():
    with pytest.raises(UsageError, match="--weights random knows cogvideox-2b"):
        CogVideoX("shapes", weights="random")


def test_random_transformer_runs_and_is_a_function_of_the_seed(monkeypatch):
    from trainer.backbones import published

    small = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=4,
                 time_embed_dim=16, text_embed_dim=16, sample_width=4, sample_height=4, sample_frames=9,
                 max_text_seq_length=6)
    monkeypatch.setitem(published.TRANSFORMERS, "cogvideox-2b", small)
    opened = CogVideoX("cogvideox-2b", weights="random")
    shape = (3, 4, 4, 4)
    text = opened.text_encoder.encode(["a", "b"], dtype=torch.float32)
    outputs = []
    for _ in range(2):
        predict = opened.predictor(opened.load_transformer(dtype=torch.float32), shape)
        with torch.no_grad():
            outputs.append(predict(torch.ones(2, *shape), torch.tensor([5, 5]), text))
    assert torch.equal(*outputs) and outputs[0].std() > 0
    assert not torch.equal(outputs[0][0], outputs[0][1])  # another prompt, another prediction
    assert opened.text_encoder.tokenizer() is None and opened.text_encoder.fingerprint() is None


@pytest.mark.parametrize("damage, part", [
    (lambda d: (d / "scheduler/scheduler_config.json").unlink(), "scheduler"),
    (lambda d: (d / "scheduler/scheduler_config.json").write_text("["), "scheduler"),
    (lambda d: (d / "model_index.json").write_text('{"scheduler": null}'), "model_index.json"),
    (lambda d: (d / "model_index.json").write_text('{"scheduler": ["diffusers", "NoScheduler"]}'), "model_index.json"),
    (lambda d: (d / "text_encoder/config.json").write_text("[]"), "text_encoder"),
    (lambda d: (d / "text_encoder/config.json").unlink(), "text_encoder"),
    (lambda d: (d / "text_encoder/config.json").write_text('{"num_layers": "x"}'), "text_encoder"),
    (lambda d: (d / "tokenizer/tokenizer.json").unlink(), "tokenizer"),
    (lambda d: (d / "tokenizer/tokenizer.json").write_text("{"), "tokenizer"),
    (lambda d: (d / "tokenizer/tokenizer_config.json").write_text("[]"), "tokenizer"),
    (lambda d: (d / "transformer/config.json").write_text("[]"), "transformer"),
    (lambda d: (d / "transformer/config.json").write_text('{"patch_size": "2"}'), "copy"),
    (lambda d: (d / "vae/config.json").write_text('{"block_out_channels": 3}'), "copy"),
])
def test_a_damaged_part_is_named(copied, damage, part):
    directory = copied("2b")
    damage(directory)
    with pytest.raises((UsageError, CheckpointError), match=part):
        opened = CogVideoX(str(directory))
        opened.scheduler(), opened.text_encoder.tokenizer(), opened.text_encoder.encode(["a red circle"], dtype=torch.float32)


def test_fingerprint_sees_a_change_anywhere_in_the_text_encoder(copied):
    directory = copied("2b")
    weights = directory / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + bytes(300_000))  # past one sample, below 64 of them
    before = CogVideoX(str(directory)).text_encoder.fingerprint()
    content = bytearray(weights.read_bytes())
    for place in (len(content) - 1, len(content) // 2, 0):
        changed = bytearray(content)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert CogVideoX(str(directory)).text_encoder.fingerprint() != before, place
