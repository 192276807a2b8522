import json

import bitsandbytes
import pytest
import torch
from torch import nn

from trainer.checkpoint import latest_checkpoint, save_checkpoint
from trainer.errors import CheckpointError
from trainer.optimizer_state import export_optimizer, import_optimizer

# bitsandbytes warns once per optimizer that pages need a card; the state is the same without them.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "adamw 8-bit": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2),
    "adamw 8-bit paged": lambda params: bitsandbytes.optim.PagedAdamW8bit(params, lr=1e-2),
}


def make(kind, reverse=False):
    """Two matrices, one above and one below the 4,096 elements from which bitsandbytes uses 8 bits, and one without gradients."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"down": nn.Linear(96, 64), "up": nn.Linear(64, 8, bias=False), "idle": nn.Linear(2, 2)})
    params = dict(model.named_parameters())
    rest = [params["up.weight"], *model["idle"].parameters()]
    groups = [{"params": list(model["down"].parameters())}, {"params": rest, "weight_decay": 0.1}]
    return params, OPTIMIZERS[kind](groups[::-1] if reverse else groups)


def step(params, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for name, param in params.items():
        if not name.startswith("idle"):
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def assert_bitwise(params, optimizer, other_params, other_optimizer):
    for name in params:
        assert torch.equal(params[name], other_params[name]), name
        state, other = optimizer.state.get(params[name], {}), other_optimizer.state.get(other_params[name], {})
        assert set(state) == set(other)
        for key, value in state.items():
            assert type(value) is type(other[key])
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype and torch.equal(value, other[key]), f"{name}.{key}"
            else:
                assert value == other[key]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bitwise_through_a_checkpoint(tmp_path, kind, reverse):
    params, optimizer = make(kind)
    for number in range(10):
        step(params, optimizer, number)
    tensors, description = export_optimizer(optimizer, params)
    save_checkpoint(tmp_path, 10, tensors={"adapter": params, "optimizer": tensors}, state={"optimizer_state": description})

    found = latest_checkpoint(tmp_path)
    resumed_params, resumed = make(kind, reverse)  # the order of the parameters does not matter, their names do
    with torch.no_grad():
        for name, tensor in found.tensors("adapter").items():
            resumed_params[name].copy_(tensor)
    import_optimizer(resumed, resumed_params, found.tensors("optimizer"), found.state["optimizer_state"])
    assert_bitwise(params, optimizer, resumed_params, resumed)
    for number in range(10, 20):
        step(params, optimizer, number)
        step(resumed_params, resumed, number)
    assert_bitwise(params, optimizer, resumed_params, resumed)
    if "8-bit" in kind:
        assert resumed.state[resumed_params["down.weight"]]["state1"].dtype == torch.uint8
        assert resumed.state[resumed_params["up.weight"]]["state1"].dtype == torch.float32


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_import_into_a_used_optimizer_copies_in_place(kind):
    params, optimizer = make(kind)
    step(params, optimizer, 0)
    tensors, description = export_optimizer(optimizer, params)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = {name: tensor.data_ptr() for name, tensor in export_optimizer(optimizer, params)[0].items()}
    step(params, optimizer, 1)
    import_optimizer(optimizer, params, tensors, json.loads(json.dumps(description)))
    now = export_optimizer(optimizer, params)
    assert {name: tensor.data_ptr() for name, tensor in now[0].items()} == kept
    assert all(torch.equal(tensors[name], tensor) for name, tensor in now[0].items()) and now[1] == description


def test_state_that_was_not_saved_is_dropped():
    params, optimizer = make("adamw")
    tensors, description = export_optimizer(optimizer, params)
    assert tensors == {} and description["scalars"] == {}
    step(params, optimizer, 0)
    import_optimizer(optimizer, params, tensors, description)
    assert export_optimizer(optimizer, params)[1] == description


def test_moments_keep_their_dtype_whatever_the_parameters_is():
    """`Optimizer.load_state_dict` would round the fp32 moments of a bf16 parameter."""
    params = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimizer = torch.optim.AdamW(params.values())
    moments = {"w.step": torch.tensor(3.0), "w.exp_avg": torch.full((4,), 1.0001), "w.exp_avg_sq": torch.full((4,), 1.0001)}
    import_optimizer(optimizer, params, moments, {"parameters": ["w"], "scalars": {"w": {}}})
    assert torch.equal(optimizer.state[params["w"]]["exp_avg"], moments["w.exp_avg"])


def test_what_differs_is_named():
    params, optimizer = make("adamw 8-bit")
    step(params, optimizer, 0)
    tensors, description = export_optimizer(optimizer, params)

    def refused(changed_tensors, changed_description, match, kind="adamw 8-bit"):
        other_params, other = make(kind)
        with pytest.raises(CheckpointError, match=match):
            import_optimizer(other, other_params, changed_tensors, changed_description)

    refused(tensors, {**description, "parameters": [*description["parameters"], "new"]}, "new is only in the checkpoint")
    refused(tensors, {**description, "parameters": description["parameters"][1:]}, "down.weight is only in this run")
    refused({**tensors, "idle.weight.state1": torch.ones(1)}, description, "idle.weight.state1 belongs to no parameter")
    refused({name: t for name, t in tensors.items() if name != "up.weight.state2"}, description, "state2 is missing from the checkpoint")
    refused({**tensors, "up.weight.extra": torch.ones(1)}, description, "extra is not part of this optimizer's state")
    refused({**tensors, "up.weight.state1": torch.ones(3)}, description, r"up.weight.state1 is \(3,\) torch.float32")
    refused({**tensors, "up.weight.state1": tensors["up.weight.state1"].half()}, description, "torch.float16 in the checkpoint")
    refused(tensors, {}, "does not describe")
    refused(tensors, description, "shape", kind="adamw")  # absmax1 has not the shape of its parameter
    with pytest.raises(ValueError, match="has no name"):
        export_optimizer(optimizer, {})
