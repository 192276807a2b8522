import pytest
import torch
from tiny_transformer import assert_equal, make_tiny

from memory.guidance import guide, predict_pair


def make_predict(tiny):
    calls = []

    def predict(latents, timestep, embeds):
        calls.append((latents.shape[0], timestep.shape[0], embeds.shape[0]))
        return tiny.model(latents, embeds, timestep, image_rotary_emb=tiny.rotary, return_dict=False)[0]

    return predict, calls


def run(tiny, mode):
    predict, calls = make_predict(tiny)
    with torch.no_grad():
        pair = predict_pair(predict, tiny.latents, tiny.timestep, tiny.embeds[:1], tiny.embeds[1:], mode=mode)
    return pair, calls


def test_passes(tiny):
    assert run(tiny, "batched")[1] == [(2, 2, 2)]
    assert run(tiny, "sequential")[1] == [(1, 1, 1)] * 2
    (conditional, unconditional), calls = run(tiny, "none")
    assert calls == [(1, 1, 1)] and unconditional is None
    assert torch.equal(conditional, run(tiny, "sequential")[0][0])


def test_one_batch_of_two_gives_the_same_up_to_rounding(tiny):
    batched, sequential = run(tiny, "batched")[0], run(tiny, "sequential")[0]
    assert_equal(batched, sequential, 1e-5)
    assert not torch.allclose(sequential[0], sequential[1])


def test_guide():
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(conditional, unconditional, 6.0).item() == 13.0
    assert guide(conditional, unconditional, 1.0).item() == 3.0
    # The teacher's negative guidance with eta: v0 - eta (v - v0).
    assert guide(conditional, unconditional, -7.0).item() == 1.0 - 7.0 * (3.0 - 1.0)
    assert guide(conditional, None, 6.0) is conditional


def test_refusals():
    tiny = make_tiny()
    predict, _ = make_predict(tiny)
    with pytest.raises(ValueError, match="guidance is 'both'; one of batched"):
        predict_pair(predict, tiny.latents, tiny.timestep, tiny.embeds[:1], tiny.embeds[1:], mode="both")
    with pytest.raises(ValueError, match="guidance sequential needs the embedding of the empty prompt"):
        predict_pair(predict, tiny.latents, tiny.timestep, tiny.embeds[:1], None, mode="sequential")
