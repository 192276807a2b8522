"""The memory of a training step, predicted: the step itself, on fake tensors."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memory.optimizers import make_optimizer
from memory.simulate import recording
from trainer.lora import Layer, Lora
from trainer.projection_config import ForgetConfig
from trainer.projection_problem import Problem


def predict_step(problem: Problem, config: ForgetConfig) -> dict[str, int]:
    """Largest number of live bytes in each phase of a step of `problem`, of which only the shapes count.

    Phases: load (what stands throughout), forward, backward, optimizer. What an allocator adds is not in it.
    """
    layer, rows = problem.layer, (problem.forget, problem.preserve, problem.target)
    with FakeTensorMode():
        weight, bias, *shaped = (None if t is None else torch.empty(t.shape) for t in (layer.weight, layer.bias, *rows))
        fake = Problem(Layer(layer.name, weight, bias), *shaped)
        lora = Lora(fake.layer, rank=config.rank, alpha=config.alpha, seed=config.seed)
        optimizer = make_optimizer(lora.parameters(), kind=config.memory.optimizer, lr=config.lr)
        with recording(device=layer.weight.device.type) as recorder:
            recorder.adopt([t for t in (weight, bias, *shaped) if t is not None], "weights")
            recorder.adopt_model(lora)
            with recorder.phase("forward"):
                loss = fake.terms(lora.update(), config.lambda_forget, config)["loss"]
            with recorder.phase("backward"):
                loss.backward()
            with recorder.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            del loss
        return dict(recorder.trace().prediction().by_phase)
