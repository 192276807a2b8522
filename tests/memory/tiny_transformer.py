"""The real transformer, tiny, with a small adapter a block, and a training step with two teacher and two student passes."""

import copy
import dataclasses
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from memory.lockstep import Lockstep, Pass

BOUNDARY_NAMES = ("hidden_states", "encoder_hidden_states")
NUM_BLOCKS = 5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Adapter(nn.Module):
    """h + up(gelu(down(h))), in float32 whatever the dtype of h."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, hidden):
        return self.up(nn.functional.gelu(self.down(hidden.float()))).to(hidden.dtype)


def _add_adapter(attention, args, output):
    hidden, text = output
    return hidden + attention.adapter(hidden), text


@dataclasses.dataclass
class Tiny:
    """A frozen backbone with adapters, and what a step needs."""

    model: nn.Module
    rotary: tuple | None
    latents: torch.Tensor
    embeds: torch.Tensor
    timestep: torch.Tensor

    @property
    def blocks(self):
        return self.model.transformer_blocks

    @property
    def feed_forwards(self):
        return [block.ff for block in self.blocks]

    @property
    def adapters(self):
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def frozen(self):
        return {name: tensor for name, tensor in self.model.state_dict().items() if "adapter" not in name}

    def predict(self, embeds):
        dtype = self.model.proj_out.weight.dtype
        out = self.model(
            self.latents.to(dtype), embeds.to(dtype), self.timestep, image_rotary_emb=self.rotary, return_dict=False
        )
        return out[0].float()

    def step(self):
        """Two teacher passes without gradient, two student passes with forward and backward each; the losses (2,)."""
        with torch.no_grad():
            targets = [self.predict(self.embeds[i : i + 1]) for i in (0, 1)]
        losses = []
        for i, target in enumerate(targets):
            # Far from the target, so that the gradients stand out from rounding.
            loss = (self.predict(self.embeds[1 - i : 2 - i]) + (i + 2) * target).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def step_in_lockstep(self):
        """`step`, all four passes block by block together; student passes share one backward."""
        teacher = [Pass(partial(self.predict, self.embeds[i : i + 1]), torch.no_grad) for i in (0, 1)]
        student = [Pass(partial(self.predict, self.embeds[1 - i : 2 - i]), nullcontext) for i in (0, 1)]
        *targets, first, second = Lockstep(self.model, self.blocks, BOUNDARY_NAMES)([*teacher, *student])
        losses = [(out + (i + 2) * target).square().mean() for i, (out, target) in enumerate(zip((first, second), targets))]
        sum(losses).backward()
        return torch.stack(losses).detach()

    def gradients(self):
        gradients = [parameter.grad for parameter in self.adapters]
        for parameter in self.adapters:
            parameter.grad = None
        return gradients


def _make(rotary: bool, num_blocks: int = NUM_BLOCKS) -> Tiny:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=num_blocks, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, sample_width=4, sample_height=4, sample_frames=9,
        max_text_seq_length=6, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    # The model's own initialisation has all block gates near 0, so that errors inside a block would not show.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6 if parameter.dim() > 1 else 0.1)
    model.requires_grad_(False).eval()
    for block in model.transformer_blocks:
        block.attn1.adapter = Adapter(32, 4)
        block.attn1.register_forward_hook(_add_adapter)
    tables = None
    if rotary:
        angles = torch.randn(3 * 2 * 2, 16)
        tables = (angles.cos(), angles.sin())
    return Tiny(model, tables, torch.randn(1, 3, 4, 4, 4), torch.randn(2, 6, 16), torch.tensor([500]))


_PROTOTYPES: dict = {}


def make_tiny(kind: str = "sincos", device: str = "cpu") -> Tiny:
    """A fresh model of the 2b kind ("sincos") or the 5b kind ("rope"), the same values every time.

    The model is on the CPU, as it is loaded; what a step feeds it is on `device`.
    """
    if kind not in _PROTOTYPES:
        _PROTOTYPES[kind] = _make(rotary=kind == "rope")
    tiny = copy.deepcopy(_PROTOTYPES[kind])
    tiny.rotary = tiny.rotary and tuple(table.to(device) for table in tiny.rotary)
    tiny.latents, tiny.embeds = tiny.latents.to(device), tiny.embeds.to(device)
    tiny.timestep = tiny.timestep.to(device)
    return tiny


def plain_run(kind: str, device: str = "cpu"):
    """Losses and adapter gradients of one step without any strategy; made once a kind and device."""
    key = ("plain", kind, device)
    if key not in _PROTOTYPES:
        tiny = make_tiny(kind, device)
        tiny.model.to(device)
        _PROTOTYPES[key] = (tiny.step(), tiny.gradients())
    return _PROTOTYPES[key]


def assert_equal(tensors, expected, tolerance: float = 0.0):
    """Bitwise for tolerance 0, else at most `tolerance` of the largest expected magnitude of each tensor."""
    for position, (tensor, reference) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.dtype == reference.dtype and tensor.shape == reference.shape
        error = (tensor - reference).abs().max().item()
        assert error <= tolerance * reference.abs().max().item(), f"tensor {position} is off by {error}"


def snapshot(model: nn.Module) -> dict:
    """All that a strategy could leave behind on a module: instance attributes and hooks."""
    return {
        name: (
            sorted(module.__dict__),
            [list(getattr(module, hooks)) for hooks in sorted(module.__dict__) if hooks.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
