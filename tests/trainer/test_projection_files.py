"""PEFT's layout, the merged layer, and the closed-form baseline."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from projection_models import problem
from trainer.errors import CheckpointError, InputOutputError
from trainer.lora import Layer, Lora, load_updates, save_lora, save_merged
from trainer.nullspace import null_space_update


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return torch.randn(3, 24, generator=chance), torch.randn(12, 3, generator=chance)


def test_names_and_shapes_are_those_of_peft(tmp_path, pair):
    save_lora(tmp_path, {"model.visual.merger.linear_fc2": pair}, alpha=6.0, base_model="somewhere")
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), json.loads((tmp_path / "adapter_config.json").read_text())
    stem = "base_model.model.model.visual.merger.linear_fc2"
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {f"{stem}.lora_A.weight": (3, 24), f"{stem}.lora_B.weight": (12, 3)}
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["lora_alpha"] == 6.0
    assert config["target_modules"] == ["model.visual.merger.linear_fc2"]
    assert not (config["fan_in_fan_out"] or config["use_rslora"] or config["use_dora"])


def test_an_update_reads_back_with_its_scale(tmp_path, pair):
    save_lora(tmp_path, {"head": pair}, alpha=6.0, base_model="somewhere")
    assert torch.allclose(load_updates(tmp_path)["head"], 2 * pair[1] @ pair[0])


def test_a_damaged_file_is_refused(tmp_path, pair):
    save_lora(tmp_path, {"head": pair}, alpha=6.0, base_model="somewhere")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        load_updates(tmp_path)


@pytest.mark.parametrize("damage", [{"lora_alpha": 10**400}, {"lora_alpha": "6"}, {"r": 0}, {"r": None}], ids=["huge", "text", "zero", "none"])
def test_damaged_settings_are_refused(tmp_path, pair, damage):
    save_lora(tmp_path, {"head": pair}, alpha=6.0, base_model="somewhere")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    with pytest.raises(CheckpointError, match="not a LoRA in PEFT's layout"):
        load_updates(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_an_input_output_error(tmp_path, pair, monkeypatch, error):
    """safetensors reports a full disk by an exception of its own."""
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(InputOutputError, match="adapter_model.safetensors cannot be written .*No space left.*once .* python run.py forget --resume .* writes it"):
        save_lora(tmp_path, {"head": pair}, alpha=6.0, base_model="somewhere")
    with pytest.raises(InputOutputError, match="merged.safetensors cannot be written .*No space left"):
        save_merged(tmp_path, {"head": problem().layer}, {"head": pair[1] @ pair[0]}, torch.float32)
    assert not list(tmp_path.iterdir())


def test_what_cannot_take_its_place_is_removed_again(tmp_path, pair):
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(InputOutputError, match="adapter_config.json cannot be written .Is a directory.; what was trained is saved"):
        save_lora(tmp_path, {"head": pair}, alpha=6.0, base_model="somewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_merged_layer_has_the_update_and_the_models_dtype(tmp_path):
    p = problem()
    lora = Lora(p.layer, rank=3, alpha=3.0, seed=0)
    with torch.no_grad():
        lora.B.fill_(0.1)
    update = lora.update().detach()
    merged = load_file(save_merged(tmp_path, {"head": p.layer}, {"head": update}, torch.bfloat16))
    assert torch.equal(merged["head.weight"], (p.layer.weight + update).bfloat16())
    assert torch.equal(merged["head.bias"], p.layer.bias.bfloat16())


def test_a_new_lora_changes_nothing_and_begins_as_a_linear_layer_does():
    layer = Layer("head", torch.zeros(64, 400), None)
    lora = Lora(layer.to("cpu"), rank=50, alpha=1.0, seed=0)
    assert not lora.update().any() and lora.A.shape == (50, 400)
    bound, A = 400 ** -0.5, lora.A.detach()
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.mean().abs() < 0.02 * bound and A.std() == pytest.approx(bound / 3 ** 0.5, rel=0.02)  # uniform


def test_rank_beyond_the_layer_is_refused():
    with pytest.raises(ValueError, match="rank 13 is more than head's 12"):
        Lora(problem().layer, rank=13, alpha=1.0, seed=0)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_null_space_projection_reaches_the_target_and_leaves_what_is_kept(rank):
    p = problem()
    forget, residual = p.forget[:6], p.target - p.layer(p.forget[:6])  # six rows in six free directions: solvable exactly
    update = null_space_update(forget, p.preserve, residual, rank=rank, energy=1.0)
    assert torch.linalg.matrix_rank(update, rtol=1e-5) <= rank
    assert (p.preserve @ update.T).abs().max() < 1e-5
    missed = (p.layer(forget, update) - p.target).norm()
    assert missed < 1e-3 if rank >= 6 else 0.01 < missed < residual.norm()


def test_null_space_projection_changes_nothing_where_nothing_is_free():
    p = problem(separable=False)  # 40 preserved rows span all 24 directions
    update = null_space_update(p.forget, p.preserve, p.target - p.layer(p.forget), rank=5, energy=1.0)
    assert update.abs().max() == 0
