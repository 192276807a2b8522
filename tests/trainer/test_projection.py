"""The loss as documented, the best weights, the acceptance rule, and going on where a run stopped."""

import math

import pytest
import torch

from projection_models import problem, settings
from trainer.checkpoint import latest_checkpoint, save_checkpoint
from trainer.findings import Unhealthy
from trainer.lora import Lora
from trainer.projection import Run
from trainer.projection_problem import Problem


def finish(run: Run) -> list[dict]:
    records = []
    while not run.finished:
        records.append(run.advance())
    return records


def test_loss_is_three_frobenius_norms_neither_squared_nor_averaged():
    p, config = problem(), settings(lambda_forget=1.2, lambda_preserve=0.3, lambda_weight=0.7)
    lora = Lora(p.layer, rank=3, alpha=6.0, seed=0)
    with torch.no_grad():
        lora.B.normal_(generator=torch.Generator().manual_seed(3))
    A, B = lora.A.detach().double(), lora.B.detach().double()
    W, b, change = p.layer.weight.double(), p.layer.bias.double(), 2.0 * B @ A  # alpha / rank = 2
    norm = lambda rows: math.sqrt(sum(float(v) ** 2 for row in rows for v in row))  # noqa: E731
    new, old = (lambda x: x.double() @ (W + change).T + b), (lambda x: x.double() @ W.T + b)
    expected = {"forget": 1.2 * norm(p.target.double() - new(p.forget)), "preserve": 0.3 * norm(old(p.preserve) - new(p.preserve)),
                "weight": 0.7 * norm(change)}
    terms = p.terms(lora.update(), 1.2, config)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-5)


def test_scale_of_the_lora_is_inside_of_the_weight_term():
    p, config = problem(), settings(lambda_weight=1.0)
    weights = []
    for alpha in (1.0, 10.0):
        lora = Lora(p.layer, rank=3, alpha=alpha, seed=0)
        with torch.no_grad():
            lora.B.fill_(1.0)
        weights.append(p.terms(lora.update(), 1.0, config)["weight"].item())
    assert weights[1] == pytest.approx(10 * weights[0])


def test_first_step_is_finite_though_two_norms_start_at_zero():
    run = Run({"head": problem()}, settings(steps=2))
    first = run.advance()
    assert first["preserve"] == first["weight"] == 0
    assert math.isfinite(first["gradient_norm"]) and first["gradient_norm"] > 0


def test_best_weights_have_the_lowest_loss_seen_and_include_the_update():
    run = Run({"head": problem()}, settings(lr=0.2))  # so coarse that the last loss is not the lowest
    p = run.problem
    losses = [record["loss"] for record in finish(run)]
    assert losses[-1] > min(losses)
    (update,) = run.updates().values()
    assert p.terms(update, 1.3, settings())["loss"].item() == pytest.approx(min(losses), rel=1e-6)
    assert update.abs().max() > 0 and torch.linalg.matrix_rank(update) <= 3


def test_what_the_last_step_made_counts():
    run = Run({"head": problem()}, settings(steps=1, max_attempts=1))
    (record,) = finish(run)
    (update,) = run.updates().values()
    assert update.any() and run.attempts[-1]["loss"] < record["loss"]
    assert run.problem.terms(update, run.attempts[-1]["lambda_forget"], run.config)["loss"].item() == pytest.approx(run.attempts[-1]["loss"])


def test_a_separable_class_is_forgotten_and_the_rest_kept():
    run = Run({"head": problem()}, settings())
    p = run.problem
    finish(run)
    (update,) = run.updates().values()
    assert [a["accepted"] for a in run.attempts] == [True]
    assert p.distance(update) < 0.3 * p.distance()
    assert (p.preserve @ update.T).norm() < 0.1 * p.layer(p.preserve).norm()


def test_too_small_a_fall_raises_lambda_forget_and_trains_anew(caplog):
    run = Run({"head": problem(separable=False)}, settings(steps=5, acceptance=0.99, max_attempts=3, lambda_forget=1.0))
    records = finish(run)
    assert [a["lambda_forget"] for a in run.attempts] == pytest.approx([1.0, 1.05, 1.1])
    assert not any(a["accepted"] for a in run.attempts)
    assert "not by 99 %, in 3 attempts" in caplog.text
    assert [r["attempt"] for r in records] == [0] * 5 + [1] * 5 + [2] * 5
    assert records[0]["preserve"] == records[5]["preserve"] == 0  # each attempt begins with no update


def test_an_accepted_attempt_is_the_last():
    run = Run({"head": problem()}, settings(acceptance=0.2, max_attempts=5))
    finish(run)
    assert len(run.attempts) == 1 and run.attempts[0]["fall"] >= 0.2


def test_every_layer_is_trained():
    other = problem(bias=False)
    renamed = Problem(type(other.layer)("second", other.layer.weight, None), other.forget, other.preserve, other.target)
    run = Run({"head": problem(), "second": renamed}, settings(steps=20, max_attempts=1))
    records = finish(run)
    assert [r["layer"] for r in records] == ["head"] * 20 + ["second"] * 20
    assert set(run.updates()) == {"head", "second"}


def test_the_seed_decides_and_nothing_else():
    updates = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(updates))
        run = Run({"head": problem()}, settings(steps=20, max_attempts=1, seed=seed))
        finish(run)
        updates.append(run.updates()["head"])
    assert torch.equal(updates[0], updates[1]) and not torch.equal(updates[0], updates[2])


@pytest.mark.parametrize("stop_at", [7, 10, 25, 33])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, stop_at):
    other = problem(bias=False)
    problems = {"head": problem(separable=False),
                "second": Problem(type(other.layer)("second", other.layer.weight, None), other.forget, other.preserve, other.target)}
    config = settings(steps=10, acceptance=0.95, max_attempts=2)
    whole = Run(problems, config)
    expected = finish(whole)
    half = Run(problems, config)
    for _ in range(stop_at):
        half.advance()
    tensors, state = half.export()
    save_checkpoint(tmp_path, half.step, tensors=tensors, state=state)
    rest = Run(problems, config)
    rest.restore(latest_checkpoint(tmp_path), torch.device("cpu"))
    assert finish(rest) == expected[stop_at:]
    assert rest.attempts == whole.attempts
    assert all(torch.equal(rest.updates()[name], update) for name, update in whole.updates().items())


def test_a_nan_is_met_before_any_weight_moves():
    p = problem()
    p.forget[0, 0] = math.nan
    run = Run({"head": p}, settings())
    before = {name: t.clone() for name, t in run.lora.state_dict().items()}
    with pytest.raises(Unhealthy, match="^step 1 .no weight was changed.: non-finite-loss.*head") as caught:
        run.advance()
    assert caught.value.exit_code == 4
    assert all(torch.equal(before[name], t) for name, t in run.lora.state_dict().items())


def test_the_predicted_step_is_the_real_one():
    """The simulator's live bytes, against a recording of the same step on real tensors."""
    from memory.simulate import recording
    from trainer.projection_memory import predict_step

    p, config = problem(), settings()
    predicted = predict_step(p, config).prediction().by_phase
    lora = Lora(p.layer, rank=3, alpha=3.0, seed=0)
    with recording(device="cpu") as recorder:
        recorder.adopt([p.layer.weight, p.layer.bias, p.forget, p.preserve, p.target], "weights")
        recorder.adopt_model(lora)
        with recorder.phase("forward"):
            loss = p.terms(lora.update(), 1.3, config)["loss"]
        with recorder.phase("backward"):
            loss.backward()
        del loss
    measured = recorder.trace().prediction().by_phase
    moments = predicted["load"] - measured["load"]
    assert moments >= 2 * 4 * sum(t.numel() for t in lora.parameters())  # Adam's state stands beside
    for phase in ("forward", "backward"):
        assert predicted[phase] - moments == measured[phase]
