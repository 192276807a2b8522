"""Erasers on disk: our layout and the released one, and files that are neither."""

import json
import os
import pickle
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_erasers import RANK, Model, shake

from trainer.cli import main
from trainer.eraser_files import (DESCRIPTION, RELEASED_CONFIG, RELEASED_WEIGHTS, WEIGHTS, apply_eraser, load_eraser,
                                  save_eraser, save_released)
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, InputOutputError, UsageError


@pytest.fixture
def saved(sincos, tmp_path):
    """(directory, erasers, model): an eraser in our layout."""
    model = Model(sincos)
    erasers = model.inject()
    save_eraser(tmp_path / "eraser", erasers, base_model=sincos.identity(), training={"data": {"concept": "red"}})
    return tmp_path / "eraser", erasers, model


def test_round_trip_is_bitwise_and_says_where_it_comes_from(saved, sincos):
    directory, erasers, _ = saved
    for path in (directory, directory / WEIGHTS, str(directory)):
        file = load_eraser(path)
        assert file.state.keys() == erasers.state_dict().keys()
        assert all(torch.equal(file.state[n], t) for n, t in erasers.state_dict().items())
        assert (file.rank, file.width, file.num_blocks) == (RANK, 32, 2)
        assert file.base_model == sincos.identity() and file.training == {"data": {"concept": "red"}}
    assert sorted(p.name for p in directory.iterdir()) == [DESCRIPTION, WEIGHTS]
    assert (directory / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_released_layout_both_ways(saved, tmp_path):
    directory, erasers, _ = saved
    released = tmp_path / "released"
    save_released(released, load_eraser(directory).state, RANK)
    content = torch.load(released / RELEASED_WEIGHTS, weights_only=True)
    assert list(content) == ["transformer_blocks.0.attn1.adapter", "transformer_blocks.1.attn1.adapter"]
    assert list(content["transformer_blocks.1.attn1.adapter"]) == ["down.weight", "down.bias", "up.weight", "up.bias"]
    assert json.loads((released / RELEASED_CONFIG).read_text()) == {"eraser_type": "adapter", "eraser_rank": RANK}
    file = load_eraser(released)
    assert all(torch.equal(file.state[n], t) for n, t in erasers.state_dict().items())
    assert file.base_model is None and file.training is None


def test_released_file_of_a_plain_state_dict_per_block_loads(tmp_path):
    """Written as the public code does it: `module.state_dict()` of ordinary modules, in 16 bit, more than 10 blocks."""
    blocks = {}
    for i in range(12):
        layers = torch.nn.ModuleDict({"down": torch.nn.Linear(32, RANK), "up": torch.nn.Linear(RANK, 32)}).half()
        blocks[f"transformer_blocks.{i}.attn1.adapter"] = layers.state_dict()
    torch.save(blocks, tmp_path / RELEASED_WEIGHTS)
    (tmp_path / RELEASED_CONFIG).write_text(json.dumps({"eraser_type": "adapter", "eraser_rank": RANK, "more": 1}))
    file = load_eraser(tmp_path)
    assert (file.num_blocks, file.rank, file.width) == (12, RANK, 32)
    assert all(t.dtype == torch.float32 for t in file.state.values())
    assert torch.equal(file.state["11.up.weight"], blocks["transformer_blocks.11.attn1.adapter"]["up.weight"].float())


def test_into_a_stock_pipeline_and_out_again(saved, sincos):
    from diffusers import CogVideoXPipeline

    directory, _, model = saved
    pipeline = CogVideoXPipeline.from_pretrained(sincos.directory)
    with torch.no_grad():
        def run():
            x, t, text = model.inputs
            return pipeline.transformer(x, text, t, return_dict=False)[0]

        before, keys = run(), list(pipeline.transformer.state_dict())
        erasers = apply_eraser(pipeline.transformer, directory)
        assert (run() - model.run()).abs().max() < 1e-5 < (run() - before).abs().max()
        erasers.undo()
        assert torch.equal(run(), before)
    assert list(pipeline.transformer.state_dict()) == keys


def test_eraser_of_another_model_is_refused(saved, pipelines):
    from trainer.backbones.cogvideox import CogVideoX

    directory, _, _ = saved
    other = CogVideoX(str(pipelines["5b"]))
    transformer = other.load_transformer(dtype=torch.float32)
    with pytest.raises(CheckpointError, match="made for .*2b, not for .*5b"):
        apply_eraser(transformer, directory, base_model=other.identity())
    assert not hasattr(transformer.transformer_blocks[0].attn1, "adapter")


def test_eraser_of_another_geometry_is_refused(sincos, tmp_path):
    model = Model(sincos)
    state = {f"{i}.{leaf}": torch.zeros(shape) for i in range(3) for leaf, shape in (
        ("down.weight", (2, 16)), ("down.bias", (2,)), ("up.weight", (16, 2)), ("up.bias", (16,)))}
    save_released(tmp_path, state, 2)
    with pytest.raises(CheckpointError, match="3 blocks of width 16.*2 of width 32"):
        apply_eraser(model.transformer, tmp_path)


def test_into_a_transformer_of_four_bits(saved, sincos):
    """Its weights are packed, and their shape is not the layer's."""
    directory, erasers, model = saved
    erasers.undo()
    for block in model.blocks:
        plain = block.attn1.to_v
        block.attn1.to_v = bitsandbytes.nn.Linear4bit(32, 32, compute_dtype=torch.float32)
        block.attn1.to_v.load_state_dict(plain.state_dict())
        block.attn1.to_v.to("cpu")
    assert model.blocks[0].attn1.to_v.weight.shape != (32, 32)
    before = model.run()
    apply_eraser(model.transformer, directory)
    assert (model.run() - before).abs().max() > 0.01


def test_what_is_no_transformer_is_refused(saved, sincos):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(sincos.directory)
    for other in (pipeline, pipeline.vae):
        with pytest.raises(UsageError, match=rf"{type(other).__name__} is no CogVideoX transformer.*pipe.transformer"):
            apply_eraser(other, saved[0])


@pytest.mark.parametrize("kind, config", [("LTXVideoTransformer3DModel", {"cross_attention_dim": 32}),
                                          ("CogView4Transformer2DModel", {"text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8})])
def test_another_model_of_the_same_geometry_is_refused(saved, tmp_path, kind, config):
    """Its attention has the name of CogVideoX's, and an exported eraser does not say for which model it is."""
    import diffusers

    transformer = getattr(diffusers, kind)(num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, **config)
    save_released(tmp_path / "released", saved[1].state_dict(), RANK)
    for path in (saved[0], tmp_path / "released"):
        with pytest.raises(UsageError, match=f"^{kind} is no CogVideoX transformer"):
            apply_eraser(transformer, path)


def test_a_transformer_that_descends_from_cogvideox_is_taken(saved):
    from diffusers import ConsisIDTransformer3DModel

    transformer = ConsisIDTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16,
        max_text_seq_length=8, sample_width=4, sample_height=4, sample_frames=9, is_train_face=False, use_rotary_positional_embeddings=False)
    dice = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 3, 4, 4, 4, generator=dice), torch.randn(1, 8, 16, generator=dice)
    with torch.no_grad():
        before = transformer(x, text, torch.tensor([500]), return_dict=False)[0]
        apply_eraser(transformer, saved[0])
        assert (transformer(x, text, torch.tensor([500]), return_dict=False)[0] - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_stock_transformer_of_the_same_geometry_and_another_configuration_is_a_warning(saved, pipelines, caplog, kind):
    """The 5b and the 1.5-5B have as many blocks of the same width."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(pipelines[kind] / "transformer")
    transformer.register_to_config(quantization_config={"load_in_4bit": True})
    apply_eraser(transformer, saved[0])
    assert ("configured in another way" in caplog.text) == (kind != "2b")


@pytest.mark.parametrize("layout", ["ours", "released"])
def test_an_eraser_that_holds_nan_is_refused(saved, sincos, layout):
    """A stock pipeline would write black videos."""
    directory, erasers, _ = saved
    with torch.no_grad():
        erasers.adapters[1].up.bias[3] = float("nan")
    if layout == "ours":
        save_eraser(directory, erasers, base_model=sincos.identity(), training={})
    else:
        save_released(directory := directory / "released", erasers.state_dict(), RANK)
    with pytest.raises(CheckpointError, match="1.up.bias holds NaN or infinity, and so would every video; copy it again, or let `python run.py diagnose .*` look at it"):
        apply_eraser(Model(sincos).transformer, directory)
    with pytest.raises(CheckpointError, match="1.up.bias holds NaN or infinity"):  # nor is it handed to anybody
        main(["export", str(directory), "--out", str(directory / "out")])
    assert not (directory / "out").exists()


def test_an_eraser_that_was_never_trained_is_a_warning(saved, sincos, caplog):
    directory, _, _ = saved
    apply_eraser(Model(sincos).transformer, directory)
    assert not caplog.text
    save_eraser(directory, Model(sincos).inject(trained=False), base_model=sincos.identity(), training={})
    apply_eraser((model := Model(sincos)).transformer, directory)
    assert "eraser.safetensors: was never trained: it changes nothing" in caplog.text and torch.equal(model.run(), model.before)


def test_the_directory_one_is_in(saved, monkeypatch):
    monkeypatch.chdir(saved[0])
    assert load_eraser(".").path == Path(WEIGHTS)  # a path without a name


def test_nothing_there(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')  # a model's
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no eraser there; name a run directory"):
            load_eraser(path)


def test_a_run_that_was_killed_has_none_yet(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}}')
    with pytest.raises(CheckpointError, match=f"no eraser there yet.*python run.py --resume {tmp_path}$"):
        load_eraser(tmp_path)


def test_a_run_of_forget_holds_another_thing(tmp_path):
    lora, other = tmp_path / "adapter_model.safetensors", tmp_path / "elsewhere" / "adapter_model.safetensors"
    other.parent.mkdir()
    for file in (lora, other):
        save_file({"base_model.model.text_projection.lora_A.weight": torch.zeros(1, 2)}, file)
    (tmp_path / "config.json").write_text('{"command": "forget"}')
    for path in (tmp_path, lora):
        with pytest.raises(CheckpointError, match=f"^{tmp_path} is a run of forget: it holds a LoRA, which peft loads, and no eraser; `python run.py diagnose "):
            load_eraser(path)
    with pytest.raises(CheckpointError, match=f"^{other}: holds no eraser"):
        load_eraser(other)


@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_truncated_files(saved, tmp_path, kept):
    directory, _, _ = saved
    save_released(tmp_path / "released", load_eraser(directory).state, RANK)
    for file in (directory / WEIGHTS, tmp_path / "released" / RELEASED_WEIGHTS):
        data = file.read_bytes()
        file.write_bytes(data[:int(kept * len(data)) if isinstance(kept, float) else kept])
        with pytest.raises(CheckpointError, match=file.name) as raised:
            load_eraser(file)
        assert raised.value.exit_code == 5 and "\n" not in str(raised.value)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused_and_not_executed(tmp_path):
    (tmp_path / RELEASED_CONFIG).write_text('{"eraser_type": "adapter", "eraser_rank": 4}')
    fired = tmp_path / "fired"
    for write in (lambda f: torch.save({"transformer_blocks.0.attn1.adapter": _Bomb(fired)}, f),
                  lambda f: f.write_bytes(pickle.dumps(_Bomb(fired)))):
        write(tmp_path / RELEASED_WEIGHTS)
        with pytest.raises(CheckpointError, match="not a released eraser"):
            load_eraser(tmp_path)
        assert not fired.exists()


@pytest.mark.parametrize("content", [
    [1, 2], {}, {"a": 1}, {1: {"down.weight": torch.ones(2, 2)}}, torch.ones(3), "text", None,
    {"transformer_blocks.0.attn1.adapter": {"down.weight": torch.ones(2, 3), "down.bias": 5, "up.weight": "x", "up.bias": []}},
    {"transformer_blocks.0.attn1.adapter": {"down.weight": torch.ones(2)}},
    {"transformer_blocks.0.attn1.adapter": {"down.weight": torch.ones(2, 3)}},
    {"transformer_blocks.1.attn1.adapter": {"down.weight": torch.ones(2, 3)}},
], ids=repr)
def test_foreign_pt_files(tmp_path, content):
    torch.save(content, tmp_path / RELEASED_WEIGHTS)
    (tmp_path / RELEASED_CONFIG).write_text('{"eraser_type": "adapter", "eraser_rank": 2}')
    with pytest.raises(CheckpointError):
        load_eraser(tmp_path)


def test_of_several_in_a_directory_each_has_its_own_description(saved):
    directory, _, _ = saved
    shutil.copy(directory / WEIGHTS, directory / "circle.safetensors")
    with pytest.raises(CheckpointError, match="circle.json"):
        load_eraser(directory / "circle.safetensors")
    (directory / "circle.json").write_text((directory / DESCRIPTION).read_text().replace('"red"', '"circle"'))
    assert load_eraser(directory / "circle.safetensors").training["data"]["concept"] == "circle"


@pytest.mark.parametrize("description, weights", [(DESCRIPTION, WEIGHTS), (RELEASED_CONFIG, RELEASED_WEIGHTS)])
def test_the_description_in_place_of_the_weights(saved, description, weights):
    directory, erasers, _ = saved
    save_released(directory, erasers.state_dict(), RANK)
    with pytest.raises(CheckpointError, match=f"{description}: is the description; name the weights beside it, .*/{weights}, or the directory"):
        load_eraser(directory / description)


def test_foreign_safetensors(saved):
    directory, _, _ = saved
    save_file({"model.weight": torch.ones(2, 2)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no eraser"):
        load_eraser(directory)
    shutil.copy(directory / DESCRIPTION, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="not safetensors"):
        load_eraser(directory / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_fractions_are_refused(saved, tmp_path, dtype):
    """Rounded to integers, an eraser does nothing."""
    directory, erasers, _ = saved
    state = erasers.state_dict() | {"1.up.weight": erasers.state_dict()["1.up.weight"].to(dtype)}
    save_released(tmp_path / "released", state, RANK)
    save_file(state, directory / WEIGHTS)
    for path in (tmp_path / "released", directory):
        with pytest.raises(CheckpointError, match=f"1.up.weight is stored in {str(dtype)[6:]}; name the eraser as it was before that"):
            load_eraser(path)


@pytest.mark.parametrize("description", [
    None, "", "[]", "{", "{}", '{"rank": 5}', '{"rank": "4"}', '{"rank": 4, "base_model": 3}',
    '{"rank": 4, "base_model": {"name": "x"}}', '{"rank": 4, "training": []}', '{"rank": 4, "training": {"data": 1}}',
    '{"rank": 4, "training": {"data": {"concept": 1}}}'])
def test_description_that_is_absent_or_wrong(saved, description):
    directory, _, _ = saved
    (directory / DESCRIPTION).unlink()
    if description is not None:
        (directory / DESCRIPTION).write_text(description)
    with pytest.raises(CheckpointError, match="eraser"):
        load_eraser(directory)


@pytest.fixture(scope="module")
def released_bytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("released")
    erasers = {f"{leaf}": torch.ones(shape) for leaf, shape in (
        ("0.down.weight", (2, 3)), ("0.down.bias", (2,)), ("0.up.weight", (3, 2)), ("0.up.bias", (3,)))}
    save_released(directory, erasers, 2)
    return directory, (directory / RELEASED_WEIGHTS).read_bytes()


@settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_flipped_bytes_of_a_released_file_load_or_are_refused(released_bytes, data):
    """Whatever a damaged pickle makes the reader raise arrives as a CheckpointError."""
    directory, content = released_bytes
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (directory / RELEASED_WEIGHTS).write_bytes(bytes(damaged))
    try:
        load_eraser(directory)
    except CheckpointError as e:
        assert e.exit_code == 5


@pytest.mark.parametrize("save", [lambda d, e: save_eraser(d, e, base_model={"name": "x", "config_hash": "y"}, training={}),
                                  lambda d, e: save_released(d, e.state_dict(), RANK)], ids=["ours", "released"])
def test_unwritable_directory(saved, tmp_path, save):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputOutputError, match="cannot be written"):
        save(tmp_path / "file" / "below", saved[1])
    with pytest.raises(InputOutputError, match="--out") as raised:
        save_released(tmp_path / "file", saved[1].state_dict(), RANK)
    assert str(raised.value) == f"--out {tmp_path / 'file'}: cannot be written (File exists); choose another directory"


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    (tmp_path / "eraser.safetensors").touch()
    monkeypatch.setattr("trainer.eraser_files.os.access", lambda path, mode: False)  # root may read anything
    with pytest.raises(InputOutputError, match="eraser.safetensors: cannot be read .Permission denied.$"):
        load_eraser(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_full_disk_leaves_the_former_eraser_whole(saved, monkeypatch, error):
    """safetensors reports a full disk by an exception of its own."""
    directory, erasers, _ = saved
    before = load_eraser(directory)
    shake(erasers)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(InputOutputError, match="No space left.*what was trained is saved: once there is room, python run.py --resume .* writes it"):
        save_eraser(directory, erasers, base_model={"name": "x", "config_hash": "y"}, training={})
    assert all(torch.equal(before.state[n], t) for n, t in load_eraser(directory).state.items())


def test_whoever_may_read_new_files_may_read_an_eraser(saved):
    directory, erasers, _ = saved
    for umask in (0o077, 0o002):
        before = os.umask(umask)
        try:
            save_eraser(directory, erasers, base_model={"name": "x", "config_hash": "y"}, training={})
        finally:
            os.umask(before)
        assert all((directory / name).stat().st_mode & 0o777 == 0o666 & ~umask for name in (WEIGHTS, DESCRIPTION))


def test_a_failed_export_leaves_the_former_one_whole(saved, tmp_path, full_disk, monkeypatch):
    eraser, tmp_path = load_eraser(saved[0]), tmp_path / "released"
    save_released(tmp_path, eraser.state, eraser.rank)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with full_disk(), pytest.raises(InputOutputError, match="cannot be written .File too large.; choose another directory"):
        save_released(tmp_path, eraser.state, eraser.rank)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def fail(path, *args, **kwargs):
        path.open("w").close()  # what is left of a file for which there was no room
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)  # there is room for the weights alone
    with pytest.raises(InputOutputError, match="No space left"):
        save_released(tmp_path, eraser.state, eraser.rank)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loaded_eraser_can_train_on(saved, sincos):
    directory, _, _ = saved
    model = Model(sincos)
    erasers = apply_eraser(model.transformer, directory, base_model=sincos.identity())
    assert isinstance(erasers, Erasers)
    model.predict(*model.inputs).square().mean().backward()
    assert all(p.grad is not None for p in erasers.parameters())


def test_blocks_that_diffusers_streams_already_are_refused(sincos, saved):
    """Group offload with a stream copies a block's weights when it is asked for; no stream is to be had here."""
    transformer = sincos.load_transformer(dtype=torch.float32)
    transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    apply_eraser(transformer, saved[0]).undo()
    transformer.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading").group.stream = object()
    with pytest.raises(UsageError, match=r"offloaded with a stream.*apply the eraser first, then enable_group_offload\(\)"):
        apply_eraser(transformer, saved[0])
