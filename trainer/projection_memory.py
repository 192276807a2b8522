"""The memory of a training step, predicted: the step itself, on fake tensors."""

from pathlib import Path

import torch

from memory.fake import FakeMode
from memory.optimizers import make_optimizer
from memory.simulate import recording
from memory.timeline import CATEGORIES, Trace
from trainer.lora import Layer, Lora
from trainer.memory_file import thinned
from trainer.projection_config import ForgetConfig
from trainer.projection_problem import Problem
from trainer.rehearse import with_8bit_state
from trainer.run_files import MEMORY, write_json


def predict_step(problem: Problem, config: ForgetConfig) -> Trace:
    """What lives when in a step of `problem`, of which only the shapes count.

    Phases: load (what stands throughout), forward, backward, optimizer. What an allocator adds is not in it.
    """
    layer, rows = problem.layer, (problem.forget, problem.preserve, problem.target)
    with FakeMode():
        weight, bias, *shaped = (None if t is None else torch.empty(t.shape) for t in (layer.weight, layer.bias, *rows))
        fake = Problem(Layer(layer.name, weight, bias), *shaped)
        lora = Lora(fake.layer, rank=config.rank, alpha=config.alpha, seed=config.seed)
        optimizer = make_optimizer(lora.parameters(), kind="adamw", lr=config.lr)
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
        trace = recorder.trace()
    return trace if config.memory.optimizer == "adamw" else with_8bit_state(trace)


def keep_prediction(run_dir: Path, trace: Trace) -> None:
    """Write RUN/memory.json, in the form that trainer/memory_file.py describes."""
    by_phase = trace.prediction().by_phase
    content = {"predicted": {"peak_bytes": max(by_phase.values()), "peak_bytes_by_phase": dict(by_phase),
                             "categories": list(CATEGORIES), "timeline": thinned(trace)}}
    write_json(run_dir / MEMORY, content, indent=None)
