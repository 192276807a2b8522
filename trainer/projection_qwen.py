"""Qwen3-VL's language model: asking it about pictures, with mergers edited and with DeepStack cut.

What transformers 5.17 has under `model.visual` (modeling_qwen3_vl.py), and what the method needs to know of it:

* the last block is `blocks[depth - 1]`, width h; no norm follows it, the merger has its own;
* `merger` is `norm` (width h), `linear_fc1` (4h → 4h with spatial_merge_size 2), `act_fn` (GELU), `linear_fc2` (4h → E,
  with a bias): E is `vision_config.out_hidden_size`, the language model's width, D = 4h is linear_fc2's input;
* `deepstack_merger_list[i]` has the same parts, its norm after the merge (width 4h); it is fed by block
  `deepstack_visual_indexes[i]` and added to the image tokens after the language model's layer i. An edit of `merger` leaves it alone.

Legend: B pictures, L tokens of a conversation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

QUESTION = "What is this?"
MAIN_MERGER = "model.visual.merger.linear_fc2"
DEEPSTACK_MERGER = "model.visual.deepstack_merger_list.{}.linear_fc2"


def conversation(tokenizer: Any, question: str, *, num_image_tokens: int) -> Tensor:
    """Token ids (1, L) of a question about one picture, in the form of Qwen3-VL's chat template."""
    text = ("<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * num_image_tokens
            + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
    return tokenizer(text, return_tensors="pt").input_ids


def answers(model: nn.Module, tokenizer: Any, inputs: Sequence[Mapping[str, Tensor]], question: str, *, batch_size: int,
            max_new_tokens: int = 16) -> list[str]:
    """What the model answers, greedily, about each preprocessed picture (`pixel_values`, `image_grid_thw` of one)."""
    merged = model.config.vision_config.spatial_merge_size ** 2
    lengths = [int(i["image_grid_thw"].prod()) // merged for i in inputs]
    said: dict[int, str] = {}
    for length in sorted(set(lengths)):  # conversations of one length need no padding
        members = [i for i, n in enumerate(lengths) if n == length]
        asked = conversation(tokenizer, question, num_image_tokens=length)
        for start in range(0, len(members), batch_size):
            part = members[start:start + batch_size]
            ids = asked.expand(len(part), -1).to(model.device)  # (B, L)
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=torch.cat([inputs[i]["pixel_values"] for i in part]).to(model.device),
                image_grid_thw=torch.cat([inputs[i]["image_grid_thw"] for i in part]).to(model.device),
                do_sample=False, max_new_tokens=max_new_tokens)
            said |= zip(part, tokenizer.batch_decode(tokens[:, ids.shape[1]:], skip_special_tokens=True))
    return [said[i] for i in range(len(inputs))]


@contextmanager
def edited(model: nn.Module, updates: Mapping[str, Tensor]) -> Iterator[None]:
    """Add updates (E, D) to the weights of linear layers, by name; afterwards the weights are what they were, to the bit."""
    weights = {name: model.get_submodule(name).weight for name in updates}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, update in updates.items():
            weights[name].copy_(weights[name].float() + update.to(weights[name].device))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


@contextmanager
def deepstack_cut(model: nn.Module) -> Iterator[None]:
    """Within: the DeepStack mergers give zeros, so images reach the language model through the main merger alone."""
    handles = [merger.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
               for merger in model.model.visual.deepstack_merger_list]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
