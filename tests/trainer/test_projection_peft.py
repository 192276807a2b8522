"""PEFT itself loads what a run of `forget` leaves. Skipped where it is not installed; nothing else needs it."""

import pytest
import torch
from projection_models import save_encoder

from trainer.cli import main
from trainer.lora import load_updates
from trainer.projection_qwen import edited

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

FAST = ["--steps", "30", "--max-attempts", "1", "--monitor", "off", "--device", "cpu", "--alpha", "10"]


def test_clip(tmp_path):
    from transformers import CLIPModel, CLIPTextModelWithProjection

    encoder = save_encoder(tmp_path / "clip", "clip")
    main(["forget", "--model", str(encoder), "--forget", "cat", "--preserve", "dog", "car", "--out", str(tmp_path / "run"), *FAST])
    updates = load_updates(tmp_path / "run")
    assert updates["text_projection"].any()
    ids = torch.arange(10).view(2, 5)
    for kind in (CLIPModel, CLIPTextModelWithProjection):
        model = kind.from_pretrained(encoder).eval()
        read = (lambda m: m.get_text_features(ids).pooler_output) if kind is CLIPModel else (lambda m: m(ids).text_embeds)
        with torch.no_grad():
            before = read(model)
            with edited(model, updates):
                expected = read(model)
            actual = read(peft.PeftModel.from_pretrained(model, tmp_path / "run").base_model.model)
        assert torch.allclose(actual, expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-3)


def test_every_merger_of_qwen3_vl(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    from trainer.shapes.pictures import picture

    for folder, name in (("forget", "red circle"), ("keep", "blue square")):
        (tmp_path / folder).mkdir()
        for i in range(4):
            picture(name, 0, "peft", i).save(tmp_path / folder / f"{i}.png")
    encoder = save_encoder(tmp_path / "qwen", "qwen3-vl")
    main(["forget", "--encoder", "qwen3-vl", "--model", str(encoder), "--forget-images", str(tmp_path / "forget"),
          "--preserve-images", str(tmp_path / "keep"), "--num-answers", "0", "--out", str(tmp_path / "run"), *FAST])
    updates = load_updates(tmp_path / "run")
    model = Qwen3VLForConditionalGeneration.from_pretrained(encoder).eval()
    values, grid = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 8, 8]])

    def read() -> torch.Tensor:
        seen = model.model.visual(values, grid_thw=grid)
        return torch.stack([seen.pooler_output, *seen.deepstack_features])

    with torch.no_grad():
        before = read()
        with edited(model, updates):
            expected = read()
        peft.PeftModel.from_pretrained(model, tmp_path / "run")
        actual = read()
    assert len(updates) == 3 and torch.allclose(actual, expected, atol=1e-4)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, expected))
