"""The trainer's blocks against diffusers' own."""

import logging
import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils._python_dispatch import TorchDispatchMode

from memory.checkpointing import checkpoint_blocks
from memory.compiling import compile_blocks
from trainer.backbones import lean
from trainer.backbones.attention import LeanProcessor
from trainer.backbones.cogvideox import CogVideoX
from trainer.masks import ConceptMapProcessor


def _block(dtype: torch.dtype, **more) -> CogVideoXBlock:
    torch.manual_seed(0)
    block = CogVideoXBlock(dim=64, num_attention_heads=2, attention_head_dim=32, time_embed_dim=16, **more)
    for norm in (block.norm1.norm, block.norm2.norm):  # a new norm's weight and bias would hide what is done with them
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return block.requires_grad_(False).to(dtype)


def _passed(block: CogVideoXBlock, *, batch: int = 2, rounded: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Video and text after the block, and the gradients of what went in. `rounded`: to what inputs are rounded first."""
    dice, dtype = torch.Generator().manual_seed(1), block.norm1.linear.weight.dtype
    video, text, timestep = (torch.randn(batch, *size, generator=dice).to(rounded).to(dtype) for size in ((24, 64), (5, 64), (16,)))
    angles = torch.rand(24, 16, generator=dice).repeat_interleave(2, -1) * 6
    out = block(video.requires_grad_(), text.requires_grad_(), timestep, (angles.cos(), angles.sin()))
    return [*out, *torch.autograd.grad(sum(o.float().square().mean() for o in out), (video, text))]


@pytest.mark.parametrize("batch", [1, 3, lean.MANY_SAMPLES + 1])
@pytest.mark.parametrize("more", [{}, {"norm_elementwise_affine": False}], ids=str)
def test_outputs_and_gradients_are_those_of_diffusers_to_rounding(batch, more):
    block = _block(torch.float32, **more)
    expected = _passed(block, batch=batch)
    lean.make_lean([block])
    for ours, theirs in zip(_passed(block, batch=batch), expected):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


class _Copies(TorchDispatchMode):
    """Operators that only copy: of one tensor joined with none, too."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_) or func is torch.ops.aten.cat.default and len(args[0]) == 1:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_of_one_sample_nothing_is_copied_forth_or_back():
    block = _block(torch.float32)
    lean.make_lean([block])
    video, text = torch.randn(1, 24, 64, requires_grad=True), torch.randn(1, 5, 64, requires_grad=True)
    with _Copies() as copies:
        out = block(video, text, torch.randn(1, 16))
        torch.autograd.grad(out, (video, text), [torch.randn_like(o) for o in out])
    assert not copies.found


class _Products(TorchDispatchMode):
    """Shapes of the weights that linear layers multiply with; their backward multiplies without a bias."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.found.append(tuple(args[2].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", ["inputs", "attention"])
def test_recomputation_of_a_block_ends_before_its_last_product(keep):
    block = _block(torch.float32)
    lean.make_lean([block])
    video, text, timestep = torch.randn(2, 24, 64, requires_grad=True), torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 16)
    checkpointing = checkpoint_blocks([block], [keep])
    with _Products() as forward:
        out = block(video, text, timestep)
    with _Products() as backward:
        sum(o.square().sum() for o in out).backward()
    assert checkpointing.num_recomputes == [1]
    assert forward.found == [*backward.found, (256, 64)] and (64, 256) in backward.found


def _num_linear(run: Callable[[], None]) -> int:
    """How many linear layers Python ran to their end: of compiled code it sees none."""
    found = []
    sys.setprofile(lambda frame, event, arg: event == "c_return" and found.append(arg))
    try:
        run()
    finally:
        sys.setprofile(None)
    return found.count(F.linear)


@pytest.mark.parametrize("keep", ["inputs", "attention"])
def test_so_does_that_of_a_compiled_one(keep):
    block = _block(torch.float32)
    lean.make_lean([block])
    video, text, timestep = torch.randn(2, 24, 64, requires_grad=True), torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 16)
    compilation, out = compile_blocks([block], device=torch.device("cpu"), backend="aot_eager"), []
    checkpointing = checkpoint_blocks([block], [keep])
    sum(o.square().sum() for o in block(video, text, timestep)).backward()  # compiles
    assert _num_linear(lambda: out.extend(block(video, text, timestep))) == 2  # the feed-forward's
    assert _num_linear(lambda: sum(o.square().sum() for o in out).backward()) == 1
    assert checkpointing.num_recomputes == [2]
    checkpointing.undo()
    compilation.undo()


def test_hooks_on_an_output_that_has_no_gradient_are_not_called():
    block, seen = _block(torch.float32), []
    lean.make_lean([block])
    video, text = block(torch.randn(1, 24, 64, requires_grad=True), torch.randn(1, 5, 64, requires_grad=True), torch.randn(1, 16))
    text.register_hook(seen.append)
    video.sum().backward()
    assert not seen


def test_a_gate_may_be_trained_too():
    gradients = []
    for make in (lambda blocks: None, lean.make_lean):
        block = _block(torch.float32)
        make([block])
        block.norm2.linear.requires_grad_(True)
        out = block(torch.ones(1, 24, 64).cumsum(1), torch.ones(1, 5, 64).cumsum(1), torch.ones(1, 16))
        gradients.append(torch.autograd.grad(sum(o.square().mean() for o in out), block.norm2.linear.weight)[0])
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)


def test_every_module_is_called():
    """Hooks, such as those that fetch a layer's weights, come to all of them."""
    block, called = _block(torch.float32), set()
    lean.make_lean([block])
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    _passed(block)
    own = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    assert own and own <= called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_they_are_no_further_from_the_truth(dtype):
    ours = _block(dtype)
    lean.make_lean([ours])
    true, theirs, found = (_passed(block, rounded=dtype) for block in (_block(dtype).float(), _block(dtype), ours))
    for exact, stock, lean_ in zip(true, theirs, found):
        off = [torch.linalg.vector_norm(each.float() - exact) / torch.linalg.vector_norm(exact) for each in (stock, lean_)]
        assert lean_.dtype == dtype and off[1] < 1.1 * off[0] < 0.05


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5"])
def test_a_transformer_predicts_and_learns_as_diffusers_does(pipelines, kind):
    backbone = CogVideoX(str(pipelines[kind]))
    shape, results = backbone.latent_shape(9, 32, 32), []
    for stock in (False, True):
        if stock:
            with patch.object(lean, "make_lean"):
                model = backbone.load_transformer(dtype=torch.float32)
        else:
            model = backbone.load_transformer(dtype=torch.float32)
        assert {type(block) for block in model.transformer_blocks} == {CogVideoXBlock if stock else lean.LeanBlock}
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        text = torch.randn(2, backbone.text_length, backbone.text_width, generator=torch.Generator().manual_seed(2))
        v = backbone.predictor(model, shape)(x, torch.tensor([500, 20]), text)
        results.append((v, torch.autograd.grad(v.square().sum(), x)[0]))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_arguments_that_no_processor_takes_are_ignored_as_by_diffusers(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # for those who read the log: it says so on stderr itself
    block = _block(torch.float32)
    lean.make_lean([block])
    video, text = torch.randn(1, 24, 64), torch.randn(1, 5, 64)
    expected = block.attn1(video, text)
    assert all(map(torch.equal, expected, block.attn1(video, text, colour="red")))
    assert "['colour'] are not expected by LeanProcessor" in caplog.text


@pytest.mark.parametrize("processor", [LeanProcessor, lambda: ConceptMapProcessor([torch.tensor([1])])], ids=["lean", "concept map"])
def test_a_mask_is_refused_as_none_is_heeded(processor):
    block = _block(torch.float32)
    lean.make_lean([block])
    block.attn1.processor = processor()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 29\).*leave it out"):
        block(torch.randn(1, 24, 64), torch.randn(1, 5, 64), torch.randn(1, 16), attention_kwargs={"attention_mask": torch.ones(1, 29)})
