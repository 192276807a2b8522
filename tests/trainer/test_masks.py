"""Concept masks: exact, from the attention that the model really computes, in bounded memory."""

import gc
import math
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_erasers import Model
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from memory.guidance import predict_pair
from trainer.errors import UsageError
from trainer.masks import ConceptMapProcessor, ConceptMaps, attention_with_lse, concept_map, concept_mask, prompt_columns
from trainer.prompts import PromptSet

COLUMNS = [torch.tensor([2, 3]), torch.tensor([5])]  # positions of the concept's tokens, by sample


@pytest.fixture
def model(backbone):
    return Model(backbone)


def _brute_force(model, text):
    """(blocks, B, N): the full softmax of every block in fp64, from the inputs that reach its attention."""
    from diffusers.models.embeddings import apply_rotary_emb

    maps, handles = [], []

    def reference(attn, args, kwargs):
        h, e, rotary = kwargs["hidden_states"], kwargs["encoder_hidden_states"], kwargs["image_rotary_emb"]
        length = e.shape[1]
        x = torch.cat([e, h], 1)
        q, k = (proj(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for proj in (attn.to_q, attn.to_k))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rotary is not None:
            q = torch.cat([q[:, :, :length], apply_rotary_emb(q[:, :, length:], rotary)], 2)
            k = torch.cat([k[:, :, :length], apply_rotary_emb(k[:, :, length:], rotary)], 2)
        full = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)  # (B, A, S, S)
        maps.append(torch.stack([full[b, :, length:, picked].sum(-1).mean(0) for b, picked in enumerate(COLUMNS)]))

    for block in model.blocks:
        handles.append(block.attn1.register_forward_pre_hook(reference, with_kwargs=True))
    with torch.no_grad():
        model.predict(model.inputs[0], model.inputs[1], text)
    for handle in handles:
        handle.remove()
    return torch.stack(maps)


def test_capturing_changes_no_bit_of_the_output_and_is_gone_after(model):
    processors = [block.attn1.processor for block in model.blocks]
    with ConceptMaps(model.blocks, COLUMNS).captured():
        assert torch.equal(model.run(), model.before)
    assert [block.attn1.processor for block in model.blocks] == processors


def test_attention_output_of_the_processor_equals_stock_bitwise(model):
    attention = model.blocks[0].attn1
    rotary = model.backbone.rotary(model.shape, "cpu")
    h, e = torch.randn(2, model.num_tokens, 32), torch.randn(2, model.backbone.text_length, 32)
    with torch.no_grad():
        stock = attention(hidden_states=h, encoder_hidden_states=e, image_rotary_emb=rotary)
        attention.processor = ConceptMapProcessor(COLUMNS)
        ours = attention(hidden_states=h, encoder_hidden_states=e, image_rotary_emb=rotary)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours))


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_maps_equal_the_brute_force_softmax_in_both_guidance_modes(model, mode):
    """After QK-norm and RoPE, and of the conditional pass only. Also: block 0's map is block 0's alone."""
    x, t, text = model.inputs
    expected = _brute_force(model, text)
    captured = ConceptMaps(model.blocks, COLUMNS)
    processors = captured.processors
    with torch.no_grad(), captured.captured():
        predict_pair(model.predict, x, t, text, torch.zeros_like(text), mode=mode)
    maps = torch.stack([p.map for p in processors])
    assert maps.dtype == torch.float32 and maps.shape == (2, 2, model.num_tokens)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-9)
    assert processors[0].map.data_ptr() != processors[1].map.data_ptr()
    assert not torch.equal(processors[0].map, processors[1].map)


def test_masking_does_not_write_into_the_maps():
    """A running average that starts as an alias of block 0's map would change it."""
    maps = [torch.rand(2, 6) for _ in range(3)]
    kept = [m.clone() for m in maps]
    concept_mask(maps, threshold=0.5)
    assert all(torch.equal(a, b) for a, b in zip(maps, kept))


def test_qk_norm_and_rope_matter(pipelines):
    """The brute-force reference is not blind: without either, the map is another."""
    from trainer.backbones.cogvideox import CogVideoX

    model = Model(CogVideoX(str(pipelines["5b"])))
    expected = _brute_force(model, model.inputs[2])
    attention = model.blocks[0].attn1
    weight = attention.norm_q.weight.detach().clone()
    for damaged in (True, False):
        if damaged:  # how long queries are, their norm alone decides
            attention.norm_q.weight.data.mul_(0.1)
        rotary = model.backbone.rotary(model.shape, "cpu") if damaged else None
        x = {}
        handle = attention.register_forward_pre_hook(lambda m, a, k: x.update(k), with_kwargs=True)
        model.run()
        handle.remove()
        processor = ConceptMapProcessor(COLUMNS)
        with torch.no_grad():
            processor(attention, x["hidden_states"], x["encoder_hidden_states"], image_rotary_emb=rotary)
        attention.norm_q.weight.data.copy_(weight)
        assert not torch.allclose(processor.map.double(), expected[0], rtol=1e-3)


def test_attention_with_lse_is_softmax_attention():
    q, k, v = torch.randn(3, 2, 2, 40, 16)
    out, lse = attention_with_lse(q, k, v)
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("picked", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
def test_a_card_takes_the_kernel_that_its_other_passes_take(picked, monkeypatch):
    """Without data: which operator runs, and that the log-sum-exp of each is brought into one shape."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args: SDPBackend.__members__[picked].value)
    q, k, v = torch.empty(3, 2, 2, 40, 16, device="meta", dtype=torch.float16)
    with Watch():
        out, lse = attention_with_lse(q, k, v)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    assert called[0].startswith(f"_scaled_dot_product_{picked.lower()}")


def test_attention_in_bfloat16_gives_a_map_near_the_fp32_one():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    columns = [torch.tensor([3])]
    maps = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = q.to(dtype), k.to(dtype), v.to(dtype)
        _, lse = attention_with_lse(a, b, c)
        maps.append(concept_map(a[:, :, 8:], b[:, :, :8], lse[:, :, 8:], columns))
    torch.testing.assert_close(maps[1], maps[0], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_map_of_16_bit_queries_and_keys_is_as_exact_as_these(dtype, device):
    """Their product is in float32."""
    q, k = (torch.randn(1, 3, n, 64, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in (50, 9))
    scores = q.double() @ k.double().mT / 8
    exact = (scores - 2).exp()[..., [2, 5]].mean(1).sum(-1)
    found = concept_map(q, k, torch.full((1, 3, 50), 2.0, device=device), [torch.tensor([2, 5], device=device)])
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_peak_memory_is_far_below_the_full_attention_matrix():
    """8,226 tokens: the full matrix of one head is 258 MiB, and of both 516; measured beyond q, k and v."""
    heads, length, tokens, width = 2, 226, 8000, 16
    q, k, v = torch.randn(3, 1, heads, length + tokens, width)
    columns = [torch.tensor([4, 5, 6])]
    readings, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            readings.append(_resident())

    concept_map(q[:, :, length:300], k[:, :, :length], q[:, :, length:300, 0], columns)  # first call loads libraries
    attention_with_lse(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    gc.collect()
    before, watcher = _resident(), threading.Thread(target=watch)
    watcher.start()
    _, lse = attention_with_lse(q, k, v)
    result = concept_map(q[:, :, length:], k[:, :, :length], lse[:, :, length:], columns)
    done.set()
    watcher.join()
    assert result.shape == (1, tokens) and len(readings) > 3
    assert max(readings) - before < 24 * 2**20


def test_frame_without_the_concept_stays_empty():
    """Normalised over the clip: the same little attention all over a frame is not a 1 somewhere in it."""
    frames, size = 3, 16
    maps = 0.01 + 0.001 * torch.rand(1, frames, size)
    maps[0, 0, 4:8] = 0.5
    maps[0, 2, 9:12] = 0.4
    mask = concept_mask([maps.flatten(1)], threshold=0.5).view(frames, size)
    assert mask[1].sum() == 0
    assert mask[0].nonzero().flatten().tolist() == [4, 5, 6, 7] and mask[2].nonzero().flatten().tolist() == [9, 10, 11]


def test_mask_is_the_thresholded_mean_of_blocks_normalised_per_sample():
    maps = [torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 9.0]]), torch.tensor([[0.0, 3.0, 2.0], [5.0, 7.0, 9.0]])]
    assert concept_mask(maps, threshold=0.5).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert concept_mask(maps, threshold=0.25).tolist() == [[0, 1, 1], [0, 1, 1]]


def test_flat_map_has_no_nan():
    assert not concept_mask([torch.full((1, 5), 0.2)], threshold=0.5).isnan().any()


def _prompts(concept: str, *prompts: str) -> PromptSet:
    return PromptSet(concept, prompts, ("",) * len(prompts), ())


def test_columns_are_the_positions_of_the_concepts_tokens(sincos):
    found = prompt_columns(sincos, _prompts("red", "a red circle moving left", "the square is red and goes up", "red red"))
    assert {p: c.tolist() for p, c in found.items()} == {
        "a red circle moving left": [1], "the square is red and goes up": [3], "red red": [0, 1]}


def test_concept_of_several_words_or_pieces(sincos):
    two = prompt_columns(sincos, _prompts("red circle", "a red circle moving left"))
    assert two["a red circle moving left"].tolist() == [1, 2]
    spelled = prompt_columns(sincos, _prompts("cat", "a cat and"))["a cat and"].tolist()
    assert len(spelled) >= 3 and spelled == list(range(1, 1 + len(spelled)))  # letter by letter


def test_columns_are_those_of_synonyms_too(sincos):
    text = "a red circle and a blue ring"
    found = prompt_columns(sincos, replace(_prompts("blue", text), synonyms=("circle", "red circle")))[text]
    assert set(found.tolist()) > {1, 2} and set(found.tolist()) == {
        int(i) for name in ("red circle", "blue") for i in prompt_columns(sincos, _prompts(name, text))[text]}


@pytest.mark.parametrize("prompt, words", [
    ('a "red" circle', "red"), ("a red, circle", "red"), ("redwood, reds", "reds"), ("the circled red's circle", "red")])
def test_columns_are_those_of_words_in_the_plural_too_and_beside_any_sign(sincos, prompt, words):
    columns, tokenizer = prompt_columns(sincos, _prompts("red", prompt))[prompt], sincos.text_encoder.tokenizer()
    spelled = tokenizer.decode(sincos.text_encoder.token_ids(tokenizer, [prompt])[0, columns], clean_up_tokenization_spaces=False)
    assert spelled.replace(" ", "").startswith(words.replace(" ", "")) and "wood" not in spelled and "circle" not in spelled


@pytest.mark.parametrize("concept, words, prompt", [("红色", "红色", "a 红色 circle"), ("red", "RED", "red A RED square")])
def test_words_that_the_tokenizer_does_not_know(sincos, concept, words, prompt):
    with pytest.raises(UsageError, match=f"the concept '{words}' has characters that the model's tokenizer does not know, in the prompt '{prompt}'"):
        prompt_columns(sincos, _prompts(concept, prompt))


@pytest.mark.parametrize("localised", [True, False])
def test_a_concept_that_the_model_never_reads_is_refused(sincos, localised):
    with pytest.raises(UsageError, match=r"'red' comes after the first \d+ tokens, .* shorten it"):
        prompt_columns(sincos, _prompts("red", "a " * 20 + "red"), localised=localised)


def test_without_localisation_a_prompt_need_not_hold_the_word(sincos):
    assert not len(prompt_columns(sincos, _prompts("crimson", "a red circle"), localised=False)["a red circle"])


def test_random_weights_have_some_column():
    from trainer.backbones.cogvideox import CogVideoX

    columns = prompt_columns(CogVideoX("cogvideox-2b", weights="random"), _prompts("anything", "a prompt"))
    assert len(columns["a prompt"]) == 1
