"""Weights go from safetensors shards straight into place."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.weights import assign
from trainer.errors import CheckpointError, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def _shard(directory):
    """Split the one weights file of a component into two with an index, as diffusers lays large models out."""
    whole = load_file(directory / WEIGHTS)
    names = sorted(whole)
    parts = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
             "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: whole[n].clone() for n in members}, directory / file, metadata={"format": "pt"})
    (directory / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {n: file for file, members in parts.items() for n in members}}
    (directory / INDEX).write_text(json.dumps(index))
    return parts


def _same(ours: nn.Module, stock: nn.Module) -> None:
    expected = {**dict(stock.named_parameters(remove_duplicate=False)), **dict(stock.named_buffers())}
    found = {**dict(ours.named_parameters(remove_duplicate=False)), **dict(ours.named_buffers())}
    assert found.keys() == expected.keys()
    stored = stock.state_dict().keys()
    for name, tensor in found.items():
        # diffusers leaves the sin-cos table, which is not stored, in float64 until the module is cast
        assert tensor.dtype == expected[name].dtype or name not in stored, name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        assert not tensor.requires_grad
    assert not ours.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2b", "5b-bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_transformer_equals_from_pretrained_bitwise(copied, kind, dtype, sharded):
    from diffusers import CogVideoXTransformer3DModel

    directory = copied(kind)
    stock = CogVideoXTransformer3DModel.from_pretrained(directory / "transformer", torch_dtype=dtype)
    if sharded:
        _shard(directory / "transformer")
    _same(CogVideoX(str(directory)).load_transformer(dtype=dtype), stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_text_encoder_equals_from_pretrained_bitwise_with_its_tied_weight(sincos, dtype):
    from transformers import T5EncoderModel

    ours = sincos.text_encoder.load(dtype=dtype)
    _same(ours, T5EncoderModel.from_pretrained(sincos.directory / "text_encoder", torch_dtype=dtype))
    assert ours.encoder.embed_tokens.weight is ours.shared.weight
    planned = sincos.text_encoder.fake(dtype=dtype)
    assert {n: p.dtype for n, p in planned.named_parameters()} == {n: p.dtype for n, p in ours.named_parameters()}


@pytest.mark.parametrize("names", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]], ids=len)
def test_a_tied_weight_may_be_stored_by_its_other_name_or_by_both(copied, names):
    from transformers import T5EncoderModel

    model = CogVideoX(str(copied("2b")))
    place = model.directory / "text_encoder"
    tensors = load_file(place / "model.safetensors")
    words = tensors.pop("shared.weight")
    save_file({**tensors, **{name: words.clone() for name in names}}, place / "model.safetensors", metadata={"format": "pt"})
    ours = model.text_encoder.load(dtype=torch.float32)
    _same(ours, T5EncoderModel.from_pretrained(place))
    assert ours.encoder.embed_tokens.weight is ours.shared.weight and torch.equal(ours.shared.weight, words)


def test_vae_equals_from_pretrained_bitwise(sincos):
    from diffusers import AutoencoderKLCogVideoX

    _same(sincos.load_vae(dtype=torch.float32), AutoencoderKLCogVideoX.from_pretrained(sincos.directory / "vae"))


def test_missing_tensor_is_named(copied):
    directory = copied("2b") / "transformer"
    tensors = load_file(directory / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{directory} lacks proj_out.bias of .*; copy the model again"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


def test_superfluous_tensor_is_named(copied):
    directory = copied("2b") / "transformer"
    save_file(load_file(directory / WEIGHTS) | {"surplus.weight": torch.zeros(1)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="surplus.weight"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


def test_tensor_of_another_shape_is_named(copied):
    directory = copied("2b") / "transformer"
    save_file(load_file(directory / WEIGHTS) | {"proj_out.bias": torch.zeros(3)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"^{directory / WEIGHTS}: proj_out.bias has shape \(3,\), .*; copy the model again"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


def test_missing_shard_is_named(copied):
    directory = copied("2b") / "transformer"
    last = list(_shard(directory))[-1]
    (directory / last).unlink()
    with pytest.raises(CheckpointError, match=last):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kept", [0, 6, 0.9])
def test_truncated_shard_is_named(copied, which, kept):
    directory = copied("2b") / "transformer"
    file = directory / list(_shard(directory))[which]
    data = file.read_bytes()
    file.write_bytes(data[:kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read.*copy the model again"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_single_file_is_named(copied, kept):
    directory = copied("2b") / "transformer"
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read"):
        CogVideoX(str(directory.parent))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_named(copied, content):
    directory = copied("2b") / "transformer"
    _shard(directory)
    (directory / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index.json"):
        CogVideoX(str(directory.parent))


def test_of_several_variants_the_plain_one_is_read_and_one_alone_is_read_as_it_is(copied):
    directory = copied("2b") / "transformer"
    whole = load_file(directory / WEIGHTS)
    save_file({n: t.half() for n, t in whole.items()}, directory / WEIGHTS.replace(".s", ".fp16.s"))
    assert CogVideoX(str(directory.parent)).native_dtype == torch.float32
    (directory / WEIGHTS).unlink()
    assert CogVideoX(str(directory.parent)).native_dtype == torch.float16
    (directory / WEIGHTS.replace(".s", ".fp16.s")).rename(directory / WEIGHTS)
    parts = _shard(directory)
    index = (directory / INDEX).read_text()
    for file in parts:
        (directory / file).rename(directory / file.replace("model-", "model.fp16-"))
    (directory / INDEX).unlink()
    (directory / INDEX.replace(".json", ".fp16.json")).write_text(index.replace("model-", "model.fp16-"))
    loaded = CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float16)
    assert all(torch.equal(p, whole[n].half()) for n, p in loaded.named_parameters())


def test_component_without_weights_says_so(copied):
    directory = copied("2b") / "transformer"
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="expected one .safetensors file or an index, found none"):
        CogVideoX(str(directory.parent))
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, directory / name)
    with pytest.raises(CheckpointError, match="found a.safetensors, b.safetensors; copy the model again"):
        CogVideoX(str(directory.parent))


def test_weights_are_found_beside_other_files(copied):
    directory = copied("2b") / "transformer"
    whole = load_file(directory / WEIGHTS)
    for name in ("eraser.safetensors", "diffusion_pytorch_model copy.safetensors"):
        save_file({"x": torch.zeros(1)}, directory / name)
    loaded = CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)
    assert all(torch.equal(p, whole[n]) for n, p in loaded.named_parameters())


def test_the_native_dtype_is_that_of_the_large_weights(copied):
    directory = copied("2b") / "transformer"
    whole = load_file(directory / WEIGHTS)
    first = min(whole)
    save_file({name: t if name == first else t.bfloat16() for name, t in whole.items()}, directory / WEIGHTS)
    assert CogVideoX(str(directory.parent)).native_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, stored", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_of_8_bits_are_refused(copied, dtype, stored):
    directory = copied("2b") / "transformer"
    whole = load_file(directory / WEIGHTS)
    save_file({name: t.to(dtype) for name, t in whole.items()}, directory / WEIGHTS)
    with pytest.raises(UsageError, match=f"the weights of transformer are stored in {stored}; name the model as it was in 16 or 32 bits"):
        CogVideoX(str(directory.parent))
    first = min(whole)
    save_file({name: t.to(torch.int8) if name == first else t for name, t in whole.items()}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: {first} is stored in int8"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


def test_a_pipeline_that_was_saved_with_erasers_in_it_says_what_to_do(copied):
    directory = copied("2b") / "transformer"
    whole = load_file(directory / WEIGHTS)
    save_file({**whole, "transformer_blocks.0.attn1.adapter.down.bias": torch.zeros(4)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds .*attn1.adapter.down.bias, which .*; save the pipeline anew after erasers.undo\(\)"):
        CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)


_MEASURED = """
import gc, resource, sys, threading
from pathlib import Path
import torch
from torch import nn
from trainer.backbones.weights import assign

def anonymous_bytes():  # memory of this process that no file backs
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * resource.getpagesize()

def watch():
    while not done.wait(0.0005):
        readings.append(anonymous_bytes())

with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
readings, done, watcher = [], threading.Event(), threading.Thread(target=watch)
gc.collect()
before = anonymous_bytes()
watcher.start()
assign(model, Path(sys.argv[1]), dtype=torch.float32)
readings.append(anonymous_bytes())
done.set()
watcher.join()
print(max(readings) - before)
"""


def test_loading_holds_about_one_copy_of_the_model_in_host_memory(tmp_path):
    """Measured in a process of its own, whose heap has no room left over, while bfloat16 is loaded as float32."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
    size = 4 * sum(p.numel() for p in model.parameters())
    save_file(model.to(torch.bfloat16).state_dict(), tmp_path / "model.safetensors")
    command = [sys.executable, "-c", _MEASURED, str(tmp_path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * size < grown < 1.2 * size


def test_device_and_dtype_of_integer_buffers_stay(tmp_path):
    model = nn.Module()
    model.register_buffer("table", torch.arange(5))
    model.weight = nn.Parameter(torch.ones(2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    empty = nn.Module()
    empty.register_buffer("table", torch.empty(5, dtype=torch.long, device="meta"))
    empty.weight = nn.Parameter(torch.empty(2, device="meta"))
    assign(empty, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(empty.table, torch.arange(5)) and empty.weight.dtype == torch.bfloat16


def test_a_complete_variant_serves_where_the_plain_shards_did_not_come(copied):
    directory = copied("2b") / "transformer"
    _shard(directory)
    index = (directory / INDEX).read_text()
    for file in sorted(set(json.loads(index)["weight_map"].values())):
        (directory / file).rename(directory / file.replace("model-", "model.fp16-"))
    (directory / INDEX.replace(".json", ".fp16.json")).write_text(index.replace("model-", "model.fp16-"))
    assert CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)
    (directory / INDEX).write_text(index.replace("model-", "model.fp16-"))
    (directory / INDEX.replace(".json", ".fp16.json")).write_text("{")
    assert CogVideoX(str(directory.parent)).load_transformer(dtype=torch.float32)  # of an index that is not taken nothing is asked
    (directory / INDEX.replace(".json", ".fp16.json")).unlink()
    next(directory.glob("*fp16-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="the index names .* which is not there"):
        CogVideoX(str(directory.parent))


def test_a_quantised_model_is_refused_by_name(copied):
    directory = copied("2b")
    file = directory / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UsageError, match="transformer is quantised; name the model as it was before that"):
        CogVideoX(str(directory))
