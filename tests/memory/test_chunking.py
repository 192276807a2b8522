import pytest
import torch
from tiny_transformer import assert_equal, make_tiny, plain_run
from torch import nn
from torch.nn import functional as F

from memory.checkpointing import checkpoint_blocks
from memory.chunking import chunk_feed_forwards
from memory.plan import MemoryPlan, apply_plan


class FeedForward(nn.Module):
    def __init__(self, width=16, out=16, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(4 * width, out))

    def forward(self, hidden):
        return self.net(hidden)


def make(**settings):
    torch.manual_seed(0)
    return FeedForward(**settings).requires_grad_(False).eval()


def run(module, hidden):
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return output.detach(), *torch.autograd.grad((output * weights).sum(), hidden)


@pytest.mark.parametrize("num_chunks", [2, 3, 7, 40])
@pytest.mark.parametrize("out", [16, 5])
def test_same_result_and_gradient(num_chunks, out):
    module, hidden = make(out=out), torch.randn(2, 30, 16)
    expected = run(module, hidden)
    with torch.no_grad():
        expected_output = module(hidden)
    handle = chunk_feed_forwards([module], num_chunks)
    assert_equal(run(module, hidden), expected, 1e-6)
    with torch.no_grad():
        assert_equal([module(hidden)], [expected_output], 1e-6)
    handle.undo()
    assert_equal(run(module, hidden), expected)
    assert "forward" not in module.__dict__


class LargestOutput(torch.utils._python_dispatch.TorchDispatchMode):
    """The most tokens of the hidden layer in any tensor made."""

    num_tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape[-1:] == (64,) and output.dim() > 1:
            self.num_tokens = max(self.num_tokens, output.numel() // 64)
        return output


def test_the_hidden_layer_exists_one_chunk_at_a_time():
    module = make()
    chunk_feed_forwards([module], 5)
    with LargestOutput() as largest:
        run(module, torch.randn(1, 100, 16))
    # The 16 rows of a transposed weight are below a chunk of 20 tokens.
    assert largest.num_tokens == 20


def test_backward_keeps_the_input_and_no_hidden_layer():
    module = make()
    chunk_feed_forwards([module], 4)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        module(torch.randn(1, 100, 16, requires_grad=True))
    assert sorted(shapes) == sorted([(1, 100, 16), *(tuple(p.shape) for p in module.parameters())])


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts linear layers by the width that they go to; their backward multiplies without a bias."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.counts[args[2].shape[1]] = self.counts.get(args[2].shape[1], 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_backward_computes_each_hidden_layer_once_and_nothing_else(checkpointed):
    module, hidden = make(), torch.randn(1, 100, 16, requires_grad=True)
    chunk_feed_forwards([module], 4)
    if checkpointed:
        checkpoint_blocks([module], ["inputs"])
    with Products() as forward:
        output = module(hidden)
    with Products() as backward:
        output.sum().backward()
    assert forward.counts == {64: 4, 16: 4} and backward.counts == {64: 4}


class Scaled(FeedForward):
    def forward(self, hidden):
        return super().forward(hidden).tanh()


class Tied(FeedForward):
    def forward(self, hidden):
        return self.net(self.net(hidden))


@pytest.mark.parametrize("kind", [Scaled, Tied])
def test_a_last_layer_is_computed_where_its_values_are_needed(kind):
    torch.manual_seed(0)
    module, hidden = kind().requires_grad_(False).eval(), torch.randn(2, 30, 16)
    expected = run(module, hidden)
    chunk_feed_forwards([module], 3)
    assert_equal(run(module, hidden), expected, 1e-6)


@pytest.mark.parametrize("checkpoint", ["all", "none"])
def test_finds_its_weights_under_offload(checkpoint):
    """When backward recomputes a chunk, the parameters point to the host and hold what the test put there."""
    tiny = make_tiny("rope")
    plan = MemoryPlan(resident_blocks=0, feed_forward_chunks=2, checkpoint=checkpoint)
    apply_plan(tiny.model, tiny.blocks, plan, device="cpu", feed_forwards=tiny.feed_forwards)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    for ff in tiny.feed_forwards:
        for parameter in ff.parameters():
            parameter.data = torch.full_like(parameter.data, torch.nan)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in tiny.gradients())


def test_active_dropout_is_refused():
    module = make(dropout=0.1)
    chunk_feed_forwards([module], 2)
    module(torch.randn(1, 4, 16))
    module.train()
    with pytest.raises(RuntimeError, match="cannot replay dropout"):
        module(torch.randn(1, 4, 16))


def test_autocast_is_refused_where_backward_follows():
    module, hidden = make(), torch.randn(1, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(hidden)
        chunk_feed_forwards([module], 2)
        assert torch.equal(module(hidden), expected)
        with pytest.raises(RuntimeError, match="autocast"):
            module(hidden.requires_grad_())


def test_the_whole_model_stays_close(kind):
    tiny = make_tiny(kind)
    chunk_feed_forwards(tiny.feed_forwards, 9)
    assert_equal([tiny.step()], [plain_run(kind)[0]], 1e-6)
    assert_equal(tiny.gradients(), plain_run(kind)[1], 2e-6)


def test_hooks_of_the_feed_forward_see_all_chunks_once():
    module, hidden = make(), torch.randn(2, 30, 16)
    module.register_forward_hook(lambda module, args, output: 2 * output)
    expected = run(module, hidden)
    chunk_feed_forwards([module], 3)
    assert_equal(run(module, hidden), expected, 1e-6)
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    run(module, hidden)
    assert seen == [30]


def test_the_mode_is_the_modules_own():
    class Functional(nn.Module):
        def forward(self, hidden):
            return F.dropout(hidden, 0.5, self.training)

    module, hidden = Functional(), torch.ones(1, 6, 4)
    chunk_feed_forwards([module], 2)
    for training in (True, False):
        module.train(training)
        with torch.no_grad():
            assert torch.equal(module(hidden), hidden) != training


def test_refusals():
    with pytest.raises(ValueError, match="matched nothing"):
        chunk_feed_forwards([], 2)
    with pytest.raises(ValueError, match="num_chunks is 1; at least 2"):
        chunk_feed_forwards([make()], 1)
    with pytest.raises(ValueError, match="net.0.weight is trainable"):
        chunk_feed_forwards([FeedForward()], 2)
    module = make()
    chunk_feed_forwards([module], 2)
    with pytest.raises(RuntimeError, match="already"):
        chunk_feed_forwards([module], 2)
