import pytest
import torch
from tiny_transformer import assert_equal, make_tiny, plain_run
from torch import nn
from torch.nn import functional as F

from memory.checkpointing import ATTENTION_OPS, checkpoint_blocks


class Block(nn.Module):
    """Attention and a dropout, on (B, heads, N, D)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, hidden):
        hidden = hidden + F.scaled_dot_product_attention(self.linear(hidden), hidden, hidden)
        return self.dropout(hidden)


def make_blocks(num_blocks=3, **settings):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(**settings) for _ in range(num_blocks)])


def gradients(blocks, seed=1):
    torch.manual_seed(seed)
    blocks(torch.randn(1, 2, 5, 8)).square().sum().backward()
    grads = [parameter.grad for parameter in blocks.parameters()]
    blocks.zero_grad()
    return grads


class CountAttention(torch.utils._python_dispatch.TorchDispatchMode):
    num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += func in ATTENTION_OPS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "num_recomputed"), [("inputs", 3), ("attention", 0)])
def test_kept_attention_is_not_run_again(keep, num_recomputed):
    blocks = make_blocks()
    expected = gradients(blocks)
    handle = checkpoint_blocks(blocks, [keep] * 3)
    loss = blocks(torch.randn(1, 2, 5, 8)).sum()
    with CountAttention() as count:
        loss.backward()
    assert count.num_calls == num_recomputed
    assert handle.num_recomputes == [1, 1, 1]
    blocks.zero_grad()
    assert_equal(gradients(blocks), expected)


def test_what_fails_in_forward_leaves_nothing_in_force():
    """Before torch 2.13 whatever was saved next, outside of blocks too, would be recomputed by the block that failed."""
    blocks = make_blocks()
    expected = gradients(blocks)
    handle = checkpoint_blocks(blocks, ["inputs", "attention", "inputs"])
    for block in blocks[:2]:
        failing = block.linear.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as held:
            gradients(blocks)
        failing.remove()
        scale = torch.full((3,), 2.0, requires_grad=True)
        scale.square().sum().backward()
        assert scale.grad.tolist() == [4.0] * 3 and held.value.__traceback__ is not None
        assert_equal(gradients(blocks), expected)
    assert handle.num_recomputes == [2, 2, 2]


def test_several_attentions_of_a_block_are_kept_apart():
    blocks = nn.Sequential(make_blocks(2), make_blocks(2))
    expected = gradients(blocks)
    checkpoint_blocks(blocks, ["attention"] * 2)
    assert_equal(gradients(blocks), expected)


@pytest.mark.parametrize("keep", ["inputs", "attention"])
@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_are_replayed_where_there_are_any(keep, training):
    blocks = make_blocks(dropout=0.5).train(training)
    expected = gradients(blocks)
    checkpoint_blocks(blocks, [keep] * 3)
    assert_equal(gradients(blocks), expected)


def test_random_numbers_that_no_module_of_a_block_draws_are_replayed_in_train_mode():
    class Functional(nn.Linear):
        def forward(self, hidden):
            return F.dropout(super().forward(hidden), 0.5, self.training).sin()

    blocks = nn.Sequential(Functional(8, 8), Functional(8, 8))
    expected = gradients(blocks)
    checkpoint_blocks(blocks, ["inputs"] * 2)
    assert_equal(gradients(blocks), expected)


def test_attention_that_drops_is_replayed_in_a_block_in_eval_mode():
    block = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)})
    block.forward = lambda x: block["attention"](x, x, x, need_weights=False)[0]
    block.eval()
    block["attention"].train()
    x = torch.randn(1, 5, 8)

    def gradient():
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        return torch.autograd.grad(block.forward(given).square().sum(), given)

    expected = gradient()
    checkpoint_blocks([block], ["inputs"])
    assert_equal(gradient(), expected)


def test_a_frozen_block_does_not_read_the_random_state(monkeypatch):
    blocks = make_blocks(dropout=0.5).eval()
    checkpoint_blocks(blocks, ["inputs"] * 3)
    state = torch.get_rng_state
    calls = []
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(1) or state())
    gradients(blocks)
    assert not calls
    blocks[1].dropout.train()
    gradients(blocks)
    assert calls


def test_dropout_whose_share_is_raised_later_is_replayed():
    blocks = make_blocks(dropout=0.0).eval()
    checkpoint_blocks(blocks, ["inputs"] * 3)
    plain = make_blocks(dropout=0.0).eval()
    for stack in (blocks, plain):
        stack[1].dropout.train().p = 0.5
    assert_equal(gradients(blocks), gradients(plain))


def test_free_without_gradient():
    blocks = make_blocks()
    handle = checkpoint_blocks(blocks, ["inputs", "attention", "everything"])
    with torch.no_grad(), CountAttention() as count:
        blocks(torch.randn(1, 2, 5, 8))
    assert count.num_calls == 3
    assert handle.num_recomputes == [0, 0, 0]


def test_saves_what_it_says():
    """Bytes saved for backward outside checkpoints: its inputs and no more."""
    tiny = make_tiny()
    saved = []

    def keep(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiny.predict(tiny.embeds[:1])
    num_plain = len(saved)
    saved.clear()
    checkpoint_blocks(tiny.blocks, ["inputs"] * 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiny.predict(tiny.embeds[:1])
    assert saved.count((1, 12, 32)) >= 5 and saved.count((1, 6, 32)) == 5
    assert len(saved) < num_plain / 3


def test_recomputation_stops_after_the_last_saved_tensor():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.num_ends = nn.Parameter(torch.ones(8)), 0

        def forward(self, hidden):
            hidden = (hidden * self.scale).exp()
            self.num_ends += 1
            return hidden + 1

    block = Tail()
    checkpoint_blocks([block], ["inputs"])
    block(torch.ones(8)).sum().backward()
    assert block.num_ends == 1


def test_attention_that_is_not_fused_is_told():
    blocks = make_blocks()
    checkpoint_blocks(blocks, ["attention"] * 3)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        pytest.raises(RuntimeError, match="block 0 is to keep its attention output, but no fused attention ran"),
    ):
        blocks(torch.randn(1, 2, 5, 8))


def test_changing_a_kept_output_in_place_is_told():
    class InPlace(Block):
        def forward(self, hidden):
            out = F.scaled_dot_product_attention(self.linear(hidden), hidden, hidden)
            with torch.no_grad():
                out.detach().mul_(2)
            return out

    block = InPlace()
    checkpoint_blocks([block], ["attention"])
    loss = block(torch.randn(1, 2, 5, 8)).sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_kept_attention_serves_one_backward():
    blocks = make_blocks(1)
    checkpoint_blocks(blocks, ["attention"])
    loss = blocks(torch.randn(1, 2, 5, 8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward only"):
        loss.backward()


def test_a_retained_graph_recomputes_again():
    blocks = make_blocks(1)
    handle = checkpoint_blocks(blocks, ["inputs"])
    loss = blocks(torch.randn(1, 2, 5, 8)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert handle.num_recomputes == [2]


def test_nothing_before_the_first_adapter_needs_a_backward():
    """Block 0's inputs carry no gradient; its adapter gets one all the same."""
    tiny = make_tiny()
    checkpoint_blocks(tiny.blocks, ["inputs"] * 5)
    seen = []
    tiny.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].requires_grad), with_kwargs=True
    )
    tiny.step()
    assert not any(seen)
    assert_equal(tiny.gradients(), plain_run("sincos")[1])


def test_refusals():
    with pytest.raises(ValueError, match="matched nothing: the sequence"):
        checkpoint_blocks([], [])
    with pytest.raises(ValueError, match="matched nothing: every block keeps everything"):
        checkpoint_blocks(make_blocks(), ["everything"] * 3)
    with pytest.raises(ValueError, match="2 choices for 3 blocks"):
        checkpoint_blocks(make_blocks(), ["inputs"] * 2)
    with pytest.raises(ValueError, match="not 'all'"):
        checkpoint_blocks(make_blocks(), ["all"] * 3)
    blocks = make_blocks()
    checkpoint_blocks(blocks, ["inputs"] * 3)
    with pytest.raises(RuntimeError, match="applied to this Block already"):
        checkpoint_blocks(blocks, ["inputs"] * 3)
