"""Inputs of a layer: what the hook sees, the cache, and what transformers' models look like."""

import gc
import weakref

import pytest
import torch

from memory.plan import MemoryPlan
from trainer import projection_features
from trainer.errors import CheckpointError, NonFinite, UsageError
from trainer.projection_encoders import ClipText, ClipVision, QwenVision, locate, read_layer
from trainer.projection_evaluate import says
from trainer.projection_examples import Example
from trainer.projection_features import features, inputs_of
from trainer.projection_qwen import answers, deepstack_cut, edited
from trainer.shapes.pictures import CLASSES, picture

CPU = torch.device("cpu")
HOW = dict(plan=MemoryPlan(), device=CPU, batch_size=3)
MAIN = "model.visual.merger.linear_fc2"


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eraser-trainer" / "features"


@pytest.fixture
def shown():
    return [Example(name, "train", picture(name, 0, "test", 0)) for name in CLASSES[:5]]


def test_clip_features_give_the_models_own_embeddings(encoders, private_cache):
    from transformers import AutoTokenizer, CLIPModel

    texts = ["", "a red circle", "the square that is blue", "an unheard of word"]
    tower = ClipText(encoders["clip"])
    inputs = features(tower, [Example("x", "train", t) for t in texts], **HOW)["text_projection"]
    tokens = AutoTokenizer.from_pretrained(encoders["clip"])(texts, padding=True, return_tensors="pt")
    whole = CLIPModel.from_pretrained(encoders["clip"])
    with torch.no_grad():
        expected = whole.get_text_features(**tokens).pooler_output
    assert torch.allclose(read_layer(encoders["clip"], "text_projection")[0](inputs), expected, atol=1e-5)


def test_texts_that_clip_does_not_read_to_their_end_are_told(encoders, private_cache, caplog):
    tower = ClipText(encoders["clip"])
    features(tower, [Example("x", "train", "a red circle")], **HOW)
    assert not caplog.messages
    features(tower, [Example("x", "train", text) for text in ("a red circle", 100 * "red ")], **HOW)
    most = tower.load().config.max_position_embeddings
    assert caplog.messages == [f"1 of 2 texts are longer than what CLIP reads, {most} tokens, and end there, as {15 * 'red '!r}"]


def test_clip_vision_features_give_the_models_own_embeddings(encoders, private_cache, shown):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    inputs = features(ClipVision(encoders["clip"]), shown, **HOW)["visual_projection"]
    pixels = CLIPImageProcessorPil.from_pretrained(encoders["clip"])([e.content for e in shown], return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(encoders["clip"]).get_image_features(**pixels).pooler_output
    assert torch.allclose(read_layer(encoders["clip"], "visual_projection")[0](inputs), expected, atol=1e-5)


def _tokens(features) -> torch.Tensor:
    """(tokens, width): newer transformers have a tensor for every picture."""
    return features if isinstance(features, torch.Tensor) else torch.cat(features)


def test_qwen_features_give_the_mean_of_the_mergers_outputs(encoders, private_cache, shown):
    from transformers import Qwen3VLForConditionalGeneration

    tower = QwenVision.of(encoders["qwen3-vl"], "all")
    inputs = features(tower, shown, **HOW)
    model, pixels = Qwen3VLForConditionalGeneration.from_pretrained(encoders["qwen3-vl"]), tower.preprocess([e.content for e in shown])
    with torch.no_grad():
        out = model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
    main = torch.stack([tokens.mean(0) for tokens in out.pooler_output])
    assert torch.allclose(read_layer(encoders["qwen3-vl"], MAIN)[0](inputs[MAIN]), main, atol=1e-5)
    for i, tokens in enumerate(out.deepstack_features):
        name = f"model.visual.deepstack_merger_list.{i}.linear_fc2"
        expected = _tokens(tokens).view(len(shown), -1, main.shape[-1]).mean(1)
        assert torch.allclose(read_layer(encoders["qwen3-vl"], name)[0](inputs[name]), expected, atol=1e-5)


def test_what_the_installed_transformers_has_under_visual(encoders):
    """The three open questions: the last block's name, the merger's structure, D and E; DeepStack's mergers included."""
    tower = QwenVision.of(encoders["qwen3-vl"], "all")
    visual, vision = tower.load(), tower.load().config
    h, D, E = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2, vision.out_hidden_size
    assert [name for name, _ in visual.merger.named_children()] == ["norm", "linear_fc1", "act_fn", "linear_fc2"]
    assert isinstance(visual.merger.act_fn, torch.nn.GELU) and visual.merger.act_fn.approximate == "none"
    assert tuple(visual.merger.norm.normalized_shape) == (h,)
    for merger in (visual.merger, *visual.deepstack_merger_list):
        assert (merger.linear_fc1.weight.shape, merger.linear_fc2.weight.shape) == ((D, D), (E, D))
        assert merger.linear_fc2.bias is not None
    assert all(tuple(m.norm.normalized_shape) == (D,) for m in visual.deepstack_merger_list)
    seen = {}
    handles = [visual.blocks[vision.depth - 1].register_forward_hook(lambda m, a, out: seen.update(last=out)),
               visual.merger.register_forward_pre_hook(lambda m, args: seen.update(merger=args[0]))]
    for i, index in enumerate(vision.deepstack_visual_indexes):
        handles += [visual.blocks[index].register_forward_hook(lambda m, a, out, i=i: seen.update({f"block{i}": out})),
                    visual.deepstack_merger_list[i].register_forward_pre_hook(lambda m, args, i=i: seen.update({f"deep{i}": args[0]}))]
    tower.run(visual, [picture("red circle", 0, "test", 0)], CPU)
    assert torch.equal(seen["last"], seen["merger"]) and seen["last"].shape[-1] == h
    assert torch.equal(seen["block0"], seen["deep0"]) and torch.equal(seen["block1"], seen["deep1"])


def test_hooks_are_removed_and_others_stay():
    layer, calls = torch.nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(RuntimeError, match="inside"), inputs_of({"layer": layer}) as seen:
        layer(torch.ones(1, 2))
        raise RuntimeError("inside")
    layer(torch.ones(1, 2))
    assert len(seen["layer"]) == 1 and len(calls) == 2 and len(layer._forward_pre_hooks) == 1


def test_batches_make_no_difference_and_nothing_records_a_graph(encoders, private_cache, shown):
    tower = QwenVision.of(encoders["qwen3-vl"], "main")
    one, all_at_once = (projection_features.compute(tower, shown, plan=MemoryPlan(), device=CPU, batch_size=b)[MAIN] for b in (1, 5))
    assert torch.allclose(one, all_at_once, atol=1e-6) and not one.requires_grad


def test_the_cache_spares_the_encoder_and_knows_damage(encoders, private_cache, shown, monkeypatch):
    tower = QwenVision.of(encoders["qwen3-vl"], "main")
    first = features(tower, shown, **HOW)
    loads = []
    monkeypatch.setattr(QwenVision, "load", lambda self, load=QwenVision.load: loads.append(1) or load(self))
    assert torch.equal(features(tower, shown, **HOW)[MAIN], first[MAIN]) and not loads
    features(tower, shown[:4], **HOW)
    assert len(loads) == 1  # other pictures are another entry
    for file in private_cache.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(features(tower, shown, **HOW)[MAIN], first[MAIN]) and len(loads) == 2


def test_a_cache_that_cannot_be_written_is_done_without(encoders, shown, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert features(QwenVision.of(encoders["qwen3-vl"], "main"), shown, **HOW)[MAIN].isfinite().all()
    assert "not cached" in caplog.text


def test_the_encoder_is_gone_when_the_features_are_there(encoders, private_cache, shown, monkeypatch):
    alive = []

    def load(self, load=QwenVision.load):
        part = load(self)
        alive.append(weakref.ref(part))
        return part

    monkeypatch.setattr(QwenVision, "load", load)
    features(QwenVision.of(encoders["qwen3-vl"], "all"), shown, **HOW)
    gc.collect()
    assert alive[0]() is None


def test_streamed_blocks_give_the_same(encoders, private_cache, shown):
    tower = QwenVision.of(encoders["qwen3-vl"], "main")
    whole, streamed = (projection_features.compute(tower, shown, plan=plan, device=CPU, batch_size=5)[MAIN]
                       for plan in (MemoryPlan(), MemoryPlan(resident_blocks=1)))
    assert torch.equal(whole, streamed)


def test_a_nan_in_the_encoder_is_said(encoders, private_cache, shown, monkeypatch):
    def load(self, load=QwenVision.load):
        part = load(self)
        part.merger.norm.weight.data[0] = float("nan")
        return part

    monkeypatch.setattr(QwenVision, "load", load)
    with pytest.raises(NonFinite, match="merger.linear_fc2 is not finite"):
        features(QwenVision.of(encoders["qwen3-vl"], "main"), shown, **HOW)
    assert not private_cache.exists()


def test_wrong_models_are_refused_with_advice(encoders, tmp_path):
    with pytest.raises(UsageError, match="type 'qwen3_vl'.*use --encoder qwen3-vl"):
        locate("clip", str(encoders["qwen3-vl"]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="type 'llama'.*clip or clip_text_model is needed"):
        locate("clip", str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    with pytest.raises(UsageError, match="no model in transformers' layout there .config.json: it names no model_type."):
        locate("clip", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    assert locate("clip", str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="type 'clip_text_model'; clip is needed; a text tower alone sees no pictures"):
        locate("clip", str(tmp_path), whole=True)
    with pytest.raises(UsageError, match="no model in transformers' layout"):
        locate("clip", str(tmp_path / "absent"))


def test_an_encoder_of_the_hub_is_looked_at_before_its_weights_come(encoders, hub):
    calls = hub({"some/clip": encoders["clip"], "some/qwen": encoders["qwen3-vl"]})
    tower = ClipText(locate("clip", "some/clip"))
    assert [patterns for _, _, patterns in calls][1:] == [["model.safetensors", "diffusion_pytorch_model.safetensors"]]
    assert tower.load() is not None
    with pytest.raises(UsageError, match="use --encoder qwen3-vl"):
        locate("clip", "some/qwen")
    assert len(calls) == 3


def test_a_model_without_weights_is_refused(encoders, tmp_path):
    for file in encoders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match="cannot be"):
        ClipText(tmp_path).load()


def test_edits_are_taken_back_to_the_bit_and_cutting_deepstack_leaves_no_hook(encoders, shown):
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    model, tokenizer = (kind.from_pretrained(encoders["qwen3-vl"]) for kind in (Qwen3VLForConditionalGeneration, AutoTokenizer))
    tower = QwenVision.of(encoders["qwen3-vl"], "all")
    pixels = [tower.preprocess([e.content]) for e in shown]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyError), edited(model, {MAIN: torch.ones_like(before[f"{MAIN}.weight"])}):
        assert torch.equal(model.get_submodule(MAIN).weight, before[f"{MAIN}.weight"] + 1)
        raise KeyError
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with deepstack_cut(model), torch.no_grad():
        out = model.get_image_features(pixels[0]["pixel_values"], pixels[0]["image_grid_thw"])
    assert all(not _tokens(f).any() for f in out.deepstack_features) and out.pooler_output[0].any()
    assert all(not m._forward_hooks for m in model.model.visual.deepstack_merger_list)
    with torch.no_grad():
        together = answers(model, tokenizer, pixels, "What is this?", batch_size=5, max_new_tokens=3)
        assert together == [answers(model, tokenizer, [p], "What is this?", batch_size=1, max_new_tokens=3)[0] for p in pixels]


@pytest.mark.parametrize("text, name, said", [
    ("a red circle", "red_circle", True), ("Golf balls.", "golf ball", True), ("a football", "ball", False), ("a redwood circle", "red circle", False)])
def test_a_class_is_named_by_its_words(text, name, said):
    assert says(text, name) == said
