"""Erasers on one frozen backbone: injected, switched, localised, taken out."""

import copy
from functools import partial

import pytest
import torch
from tiny_pipelines import FRAMES, SIDE
from torch.utils.checkpoint import checkpoint

from memory.plan import MemoryPlan, apply_plan
from trainer.erasers import AdapterEraser, Erasers, Localisation, _Localised
from trainer.errors import UsageError

RANK = 4


class Model:
    """A frozen transformer with a predictor, inputs, and what it predicted before anything was done to it."""

    def __init__(self, backbone, *, dtype=torch.float32):
        self.backbone, self.shape = backbone, backbone.latent_shape(FRAMES, SIDE, SIDE)
        self.transformer = backbone.load_transformer(dtype=dtype)
        self.blocks = backbone.blocks(self.transformer)
        self.predict = backbone.predictor(self.transformer, self.shape)
        dice = torch.Generator().manual_seed(1)
        self.inputs = (torch.randn(2, *self.shape, generator=dice), torch.tensor([300, 700]),
                       torch.randn(2, backbone.text_length, backbone.text_width, generator=dice))
        self.names = list(self.transformer.state_dict())
        self.before = self.run()
        self.num_tokens = backbone.num_tokens(self.shape) - backbone.text_length

    @torch.no_grad()
    def run(self):
        return self.predict(*self.inputs)

    def inject(self, *, trained: bool = True) -> Erasers:
        erasers = Erasers(self.blocks, RANK)
        if trained:
            shake(erasers)
        return erasers


@torch.no_grad()
def shake(erasers: Erasers) -> None:
    """Weights as if trained: a fresh eraser changes nothing."""
    dice = torch.Generator().manual_seed(2)
    for parameter in erasers.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=dice)


@pytest.fixture
def model(backbone):
    return Model(backbone)


def test_new_erasers_change_nothing(model):
    erasers = model.inject(trained=False)
    assert torch.equal(model.run(), model.before)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in erasers.parameters())


def test_switched_off_they_are_the_teacher_bitwise_and_on_they_are_not(model):
    erasers = model.inject()
    assert not torch.equal(model.run(), model.before)
    with erasers.switched(False):
        assert torch.equal(model.run(), model.before)
        with erasers.switched(True):
            assert not torch.equal(model.run(), model.before)
        assert not erasers.enabled
    assert erasers.enabled


def test_switch_returns_after_an_exception(model):
    erasers = model.inject()
    with pytest.raises(ZeroDivisionError), erasers.switched(False):
        1 / 0
    assert erasers.enabled


def offload_layers(module):
    """As accelerate does it (enable_sequential_cpu_offload): weights are on meta but while their layer runs. A stand-in."""
    def bring(layer, args):
        layer._parameters.update(layer.kept)

    def leave(layer, args, output):
        layer._parameters.update({n: torch.nn.Parameter(p.to("meta"), requires_grad=False) for n, p in layer.kept.items()})

    for layer in module.modules():
        if own := {n: p for n, p in layer._parameters.items() if p is not None}:
            layer.kept = own
            layer.register_forward_pre_hook(bring)
            layer.register_forward_hook(leave)
            leave(layer, (), None)


@pytest.mark.parametrize("erasers_first", [True, False])
def test_erasers_act_where_layers_are_offloaded_before_or_after_them(sincos, erasers_first):
    expected = Model(sincos)
    expected.inject()
    model = Model(sincos)
    if erasers_first:
        model.inject()
        offload_layers(model.transformer.transformer_blocks)
    else:
        offload_layers(model.transformer.transformer_blocks)
        model.inject()
    assert torch.equal(model.run(), expected.run())


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # once `compile_blocks` ran in this process
def test_a_model_that_was_compiled_before_is_erased_too(sincos):
    """torch.compile does not look at hooks: its graph for the model without erasers must not be used again, nor that of others."""
    plain, model = Model(sincos), Model(sincos)
    expected = Model(sincos)
    expected.inject()
    try:
        for each in (plain, model):
            each.transformer.compile(backend="eager")
        assert torch.equal(model.run(), model.before)
        erasers = model.inject()
        assert torch.equal(model.run(), expected.run())
        with erasers.switched(False):
            assert torch.equal(model.run(), model.before)
        assert torch.equal(plain.run(), plain.before)
        erasers.undo()
        assert torch.equal(model.run(), model.before)
        model.inject()
        assert torch.equal(model.run(), expected.run())
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # once `compile_blocks` ran in this process
def test_stock_blocks_that_are_compiled_one_by_one_share_graphs():
    """Of more blocks than torch.compile makes graphs for one function the others would run as they are, or with fullgraph not at all."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    graphs, made, dice = [], 0, torch.Generator().manual_seed(3)
    blocks = [CogVideoXBlock(dim=32, num_attention_heads=2, attention_head_dim=16, time_embed_dim=16).eval() for _ in range(10)]
    shake(Erasers(blocks, RANK))
    inputs = [torch.randn(1, *shape, generator=dice) for shape in ((6, 32), (4, 32), (16,))]
    try:
        with torch.no_grad():
            for block in blocks:
                expected = block(*inputs)[0]
                block.compile(backend=backend)
                assert torch.equal(block(*inputs)[0], expected)
                made = made or len(graphs)  # by the first
    finally:
        torch.compiler.reset()
    assert len(graphs) == made > 0


def test_a_model_whose_erasers_find_no_room_is_as_it_was(sincos, monkeypatch):
    model, placed = Model(sincos), []

    def full(adapter, device):
        placed.append(adapter)
        if len(placed) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patches:
        patches.setattr("trainer.erasers.place", full)
        with pytest.raises(torch.OutOfMemoryError):
            Erasers(model.blocks, RANK)
    assert list(model.transformer.state_dict()) == model.names and torch.equal(model.run(), model.before)
    Erasers(model.blocks, RANK)


def test_what_stores_linear_layers_in_eight_bits_leaves_erasers_in_float32(sincos):
    model = Model(sincos)
    erasers = model.inject()
    weights, erased = erasers.state_dict(), model.run()
    model.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert all(p.dtype == torch.float32 for p in erasers.parameters())
    assert all(torch.equal(weights[name], p) for name, p in erasers.named_parameters()) and not torch.equal(model.run(), erased)


def test_erasers_made_in_inference_mode_can_be_trained(sincos):
    model = Model(sincos)
    with torch.inference_mode():
        erasers = model.inject()
    model.predict(*model.inputs).sum().backward()
    assert all(p.grad is not None for p in erasers.parameters())


def test_a_deep_copy_of_the_model_has_erasers_of_its_own(sincos):
    model = Model(sincos)
    erasers = model.inject()
    copied = copy.deepcopy(model.transformer)
    erased, predict = model.run(), sincos.predictor(copied, model.shape)
    with torch.no_grad():
        assert torch.equal(predict(*model.inputs), erased)
        with erasers.switched(False):
            assert torch.equal(predict(*model.inputs), erased)
        for block in copied.transformer_blocks:
            block.attn1.adapter.up.weight.zero_(), block.attn1.adapter.up.bias.zero_()
        assert torch.equal(predict(*model.inputs), model.before)
    assert torch.equal(model.run(), erased)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # once `compile_blocks` ran in this process
def test_a_deep_copy_and_its_model_share_no_graph_where_one_is_switched_off(sincos):
    """torch.compile looks at what modules hold, and not at which of two objects it is."""
    model = Model(sincos)
    erasers = model.inject()
    erased, blocks = model.run(), model.transformer.transformer_blocks
    copied = copy.deepcopy(model.transformer)
    predict = sincos.predictor(copied, model.shape)
    try:
        for block in (*blocks, *copied.transformer_blocks):
            block.compile(backend="eager")
        with erasers.switched(False), torch.no_grad():
            for _ in range(2):  # of either the graph is there when the other runs
                assert torch.equal(model.run(), model.before)
                assert torch.equal(predict(*model.inputs), erased)
    finally:
        torch.compiler.reset()


def _replica(module: torch.nn.Module) -> torch.nn.Module:
    """What DataParallel makes of a model for each card."""
    made = module._replicate_for_data_parallel()
    vars(made).update(module._parameters)
    for name, child in module._modules.items():
        made._modules[name] = child if child is None else _replica(child)
    return made


def test_switched_off_they_are_off_in_the_replicas_of_data_parallel_too(sincos):
    model = Model(sincos)
    erasers = model.inject()
    predict = sincos.predictor(_replica(model.transformer), model.shape)
    with torch.no_grad():
        assert torch.equal(predict(*model.inputs), model.run()) and not torch.equal(model.run(), model.before)
        with erasers.switched(False):
            assert torch.equal(predict(*model.inputs), model.before)


def test_undo_restores_outputs_names_hooks_and_attributes(model):
    hooks = [len(block.attn1._forward_hooks) for block in model.blocks]
    attributes = [set(vars(block.attn1)) for block in model.blocks]
    classes = [type(block.attn1) for block in model.blocks]
    erasers = model.inject()
    assert set(model.transformer.state_dict()) - set(model.names) == {
        f"transformer_blocks.{i}.attn1.adapter.{leaf}" for i in range(2)
        for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")}
    erasers.undo()
    assert torch.equal(model.run(), model.before)
    assert list(model.transformer.state_dict()) == model.names
    assert [len(block.attn1._forward_hooks) for block in model.blocks] == hooks
    assert [set(vars(block.attn1)) for block in model.blocks] == attributes
    assert [type(block.attn1) for block in model.blocks] == classes
    assert not any(hasattr(block.attn1, "adapter") for block in model.blocks)
    erasers.undo()  # a second time is harmless
    Erasers(model.blocks, RANK).undo()  # and the way is free


def test_number_of_parameters_and_width_come_from_the_module(model):
    erasers = model.inject(trained=False)
    width = model.blocks[0].attn1.to_v.weight.shape[-1]
    assert erasers.width == width == model.backbone.width == 32
    assert sum(p.numel() for p in erasers.parameters()) == 2 * (2 * width * RANK + RANK + width)


def test_published_sizes_of_an_eraser_follow_the_formula():
    with torch.device("meta"):
        assert sum(p.numel() for p in AdapterEraser(1920, 128).parameters()) == 2 * 1920 * 128 + 128 + 1920


def test_eraser_is_down_exact_gelu_up():
    eraser = AdapterEraser(6, 3)
    with torch.no_grad():
        eraser.up.weight.normal_()
        eraser.up.bias.normal_()
    h = torch.randn(2, 5, 6)
    z = h @ eraser.down.weight.T + eraser.down.bias
    expected = (0.5 * z * (1 + torch.erf(z / 2**0.5))) @ eraser.up.weight.T + eraser.up.bias
    torch.testing.assert_close(eraser(h), expected)


def test_weights_are_a_function_of_the_seed_and_leave_global_generators_alone(sincos, monkeypatch):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        states.append(Erasers(Model(sincos).blocks, RANK, seed=seed).state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["0.down.weight"], states[2]["0.down.weight"])
    assert not torch.equal(states[0]["0.down.weight"], states[0]["1.down.weight"])
    before, blocks, seeded = torch.get_rng_state(), Model(sincos).blocks, []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Erasers(blocks, RANK)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_erasers_are_float32_and_drawn_on_the_host_whatever_the_defaults_are(model):
    expected = model.inject(trained=False).state_dict()
    blocks = model.backbone.load_transformer(dtype=torch.float32).transformer_blocks
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # a card, in the script of someone who has one
            erasers = Erasers(blocks, RANK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in erasers.parameters())
    assert all(torch.equal(expected[name], p) for name, p in erasers.named_parameters())


def test_attention_output_gets_the_eraser_and_the_text_stream_does_not(model):
    attention = model.blocks[1].attn1
    seen = {}
    handle = attention.register_forward_hook(lambda m, a, out: seen.update(plain=out))
    erasers = model.inject()
    attention.register_forward_hook(lambda m, a, out: seen.update(erased=out))
    model.run()
    handle.remove()
    (h, e), (h_erased, e_erased) = seen["plain"], seen["erased"]
    assert e_erased is e
    with torch.no_grad():
        assert torch.equal(h_erased, h + erasers.adapters[1](h))


def test_injecting_twice_raises(model):
    model.inject()
    for blocks in (model.blocks, copy.deepcopy(model.blocks)):
        with pytest.raises(UsageError, match="erasers already; undo.* as in a copy, load the transformer again"):
            Erasers(blocks, RANK)


def test_no_blocks_and_rank_0_raise(model):
    with pytest.raises(UsageError, match="no transformer blocks"):
        Erasers([], RANK)
    with pytest.raises(UsageError, match="--rank 0.*rank 1 or more"):
        Erasers(model.blocks, 0)
    assert not any(hasattr(block.attn1, "adapter") for block in model.blocks)
    assert torch.equal(model.run(), model.before)


def test_16_bit_backbone_keeps_16_bit_activations_and_fp32_erasers(pipelines):
    from trainer.backbones.cogvideox import CogVideoX

    model = Model(CogVideoX(str(pipelines["5b-bf16"])), dtype=torch.bfloat16)
    erasers = model.inject()
    assert model.run().dtype == torch.bfloat16
    model.predict(*model.inputs).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0
               for p in erasers.parameters())


def _checkpointed(model: Model):
    """Non-reentrant recomputation of every block."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("forward_on", [True, False])
def test_recompute_under_another_switch_state_raises(model, forward_on):
    erasers = model.inject()
    _checkpointed(model)
    x, t, text = model.inputs
    x.requires_grad_()
    with erasers.switched(forward_on):
        loss = model.predict(x, t, text).square().mean()
    with erasers.switched(not forward_on), pytest.raises(RuntimeError, match="same `with erasers.switched"):
        loss.backward()


def test_recompute_without_the_localisation_of_the_forward_pass_raises(model):
    erasers = model.inject()
    _checkpointed(model)
    with erasers.localised(Localisation(torch.zeros(2, model.num_tokens), 1.0)):
        loss = model.predict(*model.inputs).square().mean()
    with pytest.raises(RuntimeError, match="same `with erasers.localised"):
        loss.backward()


def test_recompute_under_the_same_state_gives_the_plain_gradients_bitwise(model):
    erasers = model.inject()
    gradients = []
    for prepare in (lambda: None, lambda: _checkpointed(model)):
        prepare()
        erasers.zero_grad()
        model.predict(*model.inputs).square().mean().backward()
        gradients.append([p.grad for p in erasers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_reentrant_recomputation_gives_the_plain_gradients_bitwise(model):
    """Its forward pass records no graph, and nothing says what it ran with."""
    erasers, (x, t, text), gradients = model.inject(), model.inputs, []
    x.requires_grad_()
    for reentrant in (True, False):
        for block in model.blocks:
            def forward(hidden_states, encoder_hidden_states, temb, run=type(block).forward.__get__(block), reentrant=reentrant, **more):
                return checkpoint(partial(run, **more), hidden_states, encoder_hidden_states, temb, use_reentrant=reentrant)

            block.forward = forward
        erasers.zero_grad()
        model.predict(x, t, text).square().mean().backward()
        gradients.append([p.grad for p in erasers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and any(g.any() for g in gradients[0])


@pytest.mark.parametrize("plan", [None, "all", "every:2"], ids=["plain", "checkpointed", "half"])
def test_localised_equals_autograd_on_an_explicit_joint_loss(model, plan):
    """L_loc written out on the erasers' collected outputs, in one graph with the other term."""
    erasers = model.inject()
    mask = (torch.rand(2, model.num_tokens, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    weight = 0.7
    outputs = []
    handles = [a.register_forward_hook(lambda m, args, out: outputs.append(out)) for a in erasers.adapters]
    main = model.predict(*model.inputs).square().mean()
    terms = [((o * (1 - mask).unsqueeze(-1)) ** 2).mean() for o in outputs]
    (main + weight * sum(terms) / len(terms)).backward()
    expected = [p.grad.clone() for p in erasers.parameters()]
    for handle in handles:
        handle.remove()
    erasers.zero_grad()

    if plan:
        apply_plan(model.transformer, model.blocks, MemoryPlan(checkpoint=plan), device="cpu")
    localisation = Localisation(mask, weight)
    with erasers.switched(True), erasers.localised(localisation):
        model.predict(*model.inputs).square().mean().backward()
    for (name, p), e in zip(erasers.named_parameters(), expected):
        torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-8, msg=name)
    for index, term in enumerate(terms):
        torch.testing.assert_close(localisation.terms[index], term.detach())
    torch.testing.assert_close(localisation.mean(), sum(terms).detach() / len(terms))


def test_localisation_alone_has_gradients_that_differ_from_none(model):
    """With weight 0 the plain gradient comes out: the term is attached by its weight and not otherwise."""
    erasers = model.inject()
    mask = torch.zeros(2, model.num_tokens)
    found = {}
    for weight in (0.0, 5.0):
        erasers.zero_grad()
        with erasers.localised(Localisation(mask, weight)):
            model.predict(*model.inputs).square().mean().backward()
        found[weight] = torch.cat([p.grad.flatten() for p in erasers.parameters()])
    erasers.zero_grad()
    model.predict(*model.inputs).square().mean().backward()
    assert torch.equal(found[0.0], torch.cat([p.grad.flatten() for p in erasers.parameters()]))
    assert (found[5.0] - found[0.0]).norm() > 0.1 * found[0.0].norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_localisation_is_rounded_once(dtype, device):
    """In 16 bits, too: it is added in float32 to the gradient that comes from outside."""
    generator = torch.Generator().manual_seed(0)
    o, gradient = (torch.randn(2, 6, 8, generator=generator).to(device, dtype) for _ in range(2))
    localisation = Localisation((torch.rand(2, 6, generator=generator) > 0.5).float().to(device), torch.tensor(30.0, device=device))
    leaf = o.clone().requires_grad_()
    _Localised.apply(leaf, localisation, 4, 5).backward(gradient)
    exact = gradient.double() + 30 * 2 / (5 * o.numel()) * o.double() * localisation.outside.unsqueeze(-1).square()
    assert ((leaf.grad.double() - exact).abs() <= 0.505 * torch.finfo(dtype).eps * exact.abs()).all()
    torch.testing.assert_close(localisation.terms[4], (o.float() * localisation.outside.unsqueeze(-1)).square().mean())


@pytest.mark.parametrize("samples, more", [(1, 0), (2, 1)])
def test_a_mask_of_another_size_is_refused(model, samples, more):
    """One for a single sample would be broadcast."""
    erasers = model.inject()
    with pytest.raises(ValueError, match=rf"the mask is \({samples}, {model.num_tokens + more}\), and the erasers' outputs are of \(2, "):
        localisation = Localisation(torch.zeros(samples, model.num_tokens + more), 1.0)
        with erasers.localised(localisation):
            model.predict(*model.inputs).square().mean().backward()


def test_a_localisation_asked_before_backward_says_when_to_ask(model):
    erasers = model.inject()
    localisation = Localisation(torch.zeros(2, model.num_tokens), 1.0)
    with erasers.localised(localisation):
        loss = model.predict(*model.inputs).square().mean()
        with pytest.raises(RuntimeError, match="gets its terms in backward.*only then ask for localisation.mean"):
            localisation.mean()
        loss.backward()
    assert localisation.mean() >= 0


def test_full_mask_costs_nothing(model):
    erasers = model.inject()
    localisation = Localisation(torch.ones(2, model.num_tokens), 1.0)
    with erasers.localised(localisation):
        model.predict(*model.inputs).square().mean().backward()
    assert len(localisation.terms) == len(erasers.adapters) and all(term == 0 for term in localisation.terms.values())


def test_state_dict_copies_and_loads_into_the_same_parameters(model):
    erasers = model.inject()
    state, objects = erasers.state_dict(), erasers.parameters()
    after = model.run()
    with torch.no_grad():
        for p in objects:
            p.zero_()
    assert state["0.down.weight"].abs().sum() > 0  # a copy, not a view
    erasers.load_state_dict(state)
    assert all(a is b for a, b in zip(erasers.parameters(), objects))
    assert torch.equal(model.run(), after)


@pytest.mark.parametrize("damage", [lambda s: s.pop("1.up.bias"), lambda s: s.update(extra=torch.ones(1)),
                                    lambda s: s.update({"0.down.weight": torch.ones(RANK + 1, 32)})])
def test_state_that_does_not_fit_changes_nothing(model, damage):
    erasers = model.inject()
    before, state = erasers.state_dict(), erasers.state_dict()
    damage(state)
    with pytest.raises(UsageError, match="2 blocks of width 32 and rank 4"):
        erasers.load_state_dict(state)
    assert all(torch.equal(before[n], t) for n, t in erasers.state_dict().items())
