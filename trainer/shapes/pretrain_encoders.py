"""Train the bundled encoders from nothing, into directories in transformers' layout.

    python -m trainer.shapes.pretrain_encoders --out trainer/shapes/encoders

1. clip: a small CLIPModel learns which caption of the shapes world belongs to which picture.
2. qwen3-vl: a small Qwen3VLForConditionalGeneration with DeepStack learns to name colour and shape of a picture.

Classes, layers and files are those of the published models, so the code that loads those loads these.
Legend: B batch, L tokens of a sequence, K pictures of the pool, D width of the shared space.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel, Qwen2Tokenizer, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trainer.projection_qwen import QUESTION, conversation
from trainer.shapes import world
from trainer.shapes.pictures import CLASSES, NOTHING, captions, picture, training_caption

TEXT_LENGTH = 24
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True, kw_only=True)
class PretrainEncoders:
    """Train the bundled encoders."""

    out: Path = Path("trainer/shapes/encoders")
    """Directory to write: OUT/clip and OUT/qwen3-vl."""
    stages: tuple[Literal["clip", "qwen3-vl"], ...] = ("clip", "qwen3-vl")
    """Which encoders to train."""
    seed: int = 0
    """Seed of weights, pictures and captions."""
    clip_steps: int = 1000
    """Steps of the CLIP model, batch 64."""
    tower_steps: int = 1200
    """Steps of the Qwen3-VL's vision tower alone, batch 64."""
    qwen_steps: int = 700
    """Steps of the whole Qwen3-VL after that, batch 32."""
    num_pictures: int = 200
    """Pictures a class, drawn and preprocessed once."""


def _byte_pairs(texts: list[str], suffix: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in which every word of `texts` is one token, and any other word is several.

    CLIP marks the end of a word by the suffix </w>; Qwen marks its beginning by the space before it.
    """
    alphabet, marks = sorted(pre_tokenizers.ByteLevel.alphabet()), {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**marks))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*([pre_tokenizers.Whitespace()] if suffix else []), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, show_progress=False, initial_alphabet=alphabet, **marks))
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = [*alphabet, *(c + suffix for c in alphabet), *sorted(learned["vocab"], key=learned["vocab"].get)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, [tuple(pair) for pair in learned["merges"]]


def clip_tokenizer() -> CLIPTokenizer:
    """The world's words, in CLIP's layout: end of text at the end of every caption, and as padding."""
    vocabulary, merges = _byte_pairs([c for name in CLASSES for c in captions(name)], "</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def clip_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH, projection_dim=64, **ids)
    vision = dict(image_size=world.SIZE, patch_size=4, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                  num_attention_heads=4, projection_dim=64)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size={"height": world.SIZE, "width": world.SIZE})


def qwen_tokenizer() -> Qwen2Tokenizer:
    """The world's words with and without a space before them, in Qwen's layout with its chat marks."""
    texts = ["user\n", "assistant\n", QUESTION, *(answer(name) for name in (*CLASSES, NOTHING))]
    vocabulary, merges = _byte_pairs([*texts, *(f" {t}" for t in texts)])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", model_max_length=128)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT)}, replace_extra_special_tokens=False)
    return tokenizer


def qwen_model(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """Two of the four vision blocks feed DeepStack, as a few of the published models' 24 or 27 do."""
    ids = dict(zip(CHAT, tokenizer.convert_tokens_to_ids(list(CHAT))))
    vision = dict(depth=4, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=4, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=96, num_position_embeddings=64, deepstack_visual_indexes=[1, 2])
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=3,
                num_key_value_heads=3, head_dim=32, max_position_embeddings=128, pad_token_id=ids["<|endoftext|>"],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                                 "mrope_interleaved": True})
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"]))
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def qwen_processor() -> Qwen2VLImageProcessorPil:
    pixels = world.SIZE**2
    return Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2,
                                    size={"shortest_edge": pixels, "longest_edge": pixels})


def answer(name: str) -> str:
    """What the language model says of a picture."""
    return f"a {name}" if name != NOTHING else "nothing"


class _Fit:
    """AdamW with a one-cycle learning rate and clipped gradients, and a line now and then."""

    def __init__(self, model: nn.Module, num_steps: int, *, lr: float, extra: tuple[nn.Parameter, ...] = ()):
        self.model, self.num_steps, self.started = model, num_steps, time.monotonic()
        self.optimizer = torch.optim.AdamW([*model.parameters(), *extra], lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, num_steps, pct_start=0.1, final_div_factor=100)

    def step(self, index: int, loss: Tensor, accuracy: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if index % 100 == 0 or index == self.num_steps - 1:
            print(f"{type(self.model).__name__} {index + 1}/{self.num_steps}  {time.monotonic() - self.started:.0f} s  "
                  f"loss {loss.item():.4f}  accuracy {accuracy.item():.3f}", flush=True)


def _pool(config: PretrainEncoders, processor, pixels_of) -> tuple[list[str], Tensor]:
    """(names, preprocessed pictures (K, …)) of all classes and of nothing."""
    names = [name for name in (*CLASSES, NOTHING) for _ in range(config.num_pictures)]
    drawn = [picture(name, config.seed, "pretraining", i) for i, name in enumerate(names)]
    return names, torch.cat([pixels_of(processor(images=drawn[i:i + 100], return_tensors="pt"), min(100, len(drawn) - i))
                             for i in range(0, len(drawn), 100)])


def train_clip(config: PretrainEncoders, out: Path) -> None:
    """Contrastive over pictures and captions; those of one class all belong together."""
    torch.manual_seed(config.seed)
    chance, tokenizer, processor = random.Random(config.seed), clip_tokenizer(), clip_processor()
    model = clip_model(tokenizer).train()
    names, pixels = _pool(config, processor, lambda inputs, count: inputs["pixel_values"])
    fit = _Fit(model, config.clip_steps, lr=2e-3)
    for step in range(config.clip_steps):
        chosen = [chance.randrange(len(names)) for _ in range(64)]
        said = [training_caption(names[i], chance) for i in chosen]
        text = tokenizer(said, padding=True, truncation=True, return_tensors="pt")
        similar = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixels[chosen]).logits_per_image
        together = torch.tensor([[names[i] == names[j] for j in chosen] for i in chosen])  # (B, B)
        shares = together / together.sum(1, keepdim=True)
        loss = (F.cross_entropy(similar, shares) + F.cross_entropy(similar.t(), shares)) / 2
        fit.step(step, loss, together[torch.arange(64), similar.argmax(1)].float().mean())
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)  # 100, as published
    _save(out, model, tokenizer, processor)


class _Pooled:
    """One vector a picture, the mean of a merger's tokens, must point to its class' anchor: a loss for the vision tower.

    The published towers start from SigLIP-2, which is taught so. From answers alone a tower this small leaves the class to
    single tokens, and nothing that is one vector a picture could be forgotten. DeepStack's mergers are taught alike: the
    language model is then free to read the class from any of them.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration):
        visual = model.model.visual
        mergers = [visual.merger, *visual.deepstack_merger_list]
        self.anchors = nn.Parameter(torch.randn(len(mergers), len(CLASSES) + 1, model.config.text_config.hidden_size))
        self.merged: dict[int, Tensor] = {}  # of the step under way
        self.hooks = [merger.register_forward_hook(lambda module, args, output, i=i: self.merged.update({i: output}))
                      for i, merger in enumerate(mergers)]

    def loss(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy of the main merger) of the pictures that the tower has seen last; classes (B,)."""
        losses = []
        for i, anchors in reversed(list(enumerate(self.anchors))):
            pooled = self.merged.pop(i).unflatten(0, (len(classes), -1)).mean(1)  # (B, D)
            scores = 20 * F.linear(F.normalize(pooled, dim=1), F.normalize(anchors, dim=1))
            losses.append(F.cross_entropy(scores, classes))
        return torch.stack(losses).mean(), (scores.argmax(1) == classes).float().mean()


def train_qwen(config: PretrainEncoders, out: Path) -> None:
    """First the vision tower alone learns classes; then all of it learns next tokens of the answers beside them."""
    torch.manual_seed(config.seed)
    chance, tokenizer, processor = random.Random(config.seed), qwen_tokenizer(), qwen_processor()
    model = qwen_model(tokenizer).train()
    names, pixels = _pool(config, processor, lambda inputs, count: inputs["pixel_values"].unflatten(0, (count, -1)))
    grid, number = torch.tensor([[1, world.SIZE // 4, world.SIZE // 4]]), {name: i for i, name in enumerate((*CLASSES, NOTHING))}
    pooled = _Pooled(model)
    fit = _Fit(model.model.visual, config.tower_steps, lr=2e-3, extra=(pooled.anchors,))
    for step in range(config.tower_steps):
        chosen = [chance.randrange(len(names)) for _ in range(64)]
        model.model.visual(pixels[chosen].flatten(0, 1), grid_thw=grid.expand(64, -1))
        fit.step(step, *pooled.loss(torch.tensor([number[names[i]] for i in chosen])))
    asked = conversation(tokenizer, QUESTION, num_image_tokens=pixels.shape[1] // 4)
    fit = _Fit(model, config.qwen_steps, lr=1e-3, extra=(pooled.anchors,))
    for step in range(config.qwen_steps):
        chosen = [chance.randrange(len(names)) for _ in range(32)]
        answers = tokenizer([answer(names[i]) + "<|im_end|>" for i in chosen], padding=True, padding_side="right",
                            return_tensors="pt")
        ids = torch.cat([asked.expand(32, -1), answers.input_ids], 1)  # (B, L)
        mask = torch.cat([torch.ones_like(ids[:, :asked.shape[1]]), answers.attention_mask], 1)
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels[chosen].flatten(0, 1),
                       image_grid_thw=grid.expand(32, -1),
                       mm_token_type_ids=(ids == model.config.image_token_id).int()).logits
        logits, targets = logits[:, asked.shape[1] - 1:-1], answers.input_ids
        told = answers.attention_mask.bool()
        seen, _ = pooled.loss(torch.tensor([number[names[i]] for i in chosen]))
        loss = F.cross_entropy(logits[told], targets[told]) + seen
        fit.step(step, loss, ((logits.argmax(-1) == targets) | ~told).all(1).float().mean())
    for hook in pooled.hooks:
        hook.remove()
    _save(out, model, tokenizer, processor)


def _save(out: Path, model: PreTrainedModel, tokenizer, processor) -> None:
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)


def main(config: PretrainEncoders) -> None:
    stages = {"clip": train_clip, "qwen3-vl": train_qwen}
    for stage in config.stages:
        stages[stage](config, config.out / stage)


if __name__ == "__main__":
    main(tyro.cli(PretrainEncoders))
