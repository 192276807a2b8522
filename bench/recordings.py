"""What cards did, as others recorded it, against the simulator.

    python -m bench.recordings [--clones DIR]      into bench/results/recordings.json

Public repositories hold histories of CUDA's caching allocator (`torch.cuda.memory._dump_snapshot`). Each is replayed: the simulator
gets the requests and has to serve them at the addresses that the card's allocator chose. Of two whole training steps of a
transformer, which ran without autocast, the code is beside them: that program runs on fake tensors, and what is predicted for it stands
beside what was recorded.

Clones are made in DIR as OWNER/NAME, or used where they are. The traced program (commit below) is imported from its clone and needs
`pip install einops einx jaxtyping`. Pickles are read without any class being looked up.
"""

import argparse
import gc
import hashlib
import importlib
import importlib.util
import io
import pickle
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.provenance import program, write_result
from memory.allocator import replay
from memory.environment import cublas_workspace_bytes
from memory.fake import FakeMode
from memory.simulate import recording
from memory.snapshots import replay_snapshot
from trainer.cache import cache_directory

_STEPS = "results/medium_{}_training_memory_snapshot.pickle"
_LOGS = "memory_files/memory_ctx{}.pickle"
SOURCES: dict[str, tuple[str, str, tuple[str, ...]]] = {  # repository: (commit, what runs, files)
    "Wedsonlin/assignment2-systems": (
        "87b086417ea831f54f7535eb3680f90da0952722", "language model: training steps, generation", (
            *map(_STEPS.format, (128, 256, 512, 1024)),
            *(f"results/medium_{n}_inference_memory_snapshot.pickle" for n in (128, 256, 512, 1024)))),
    "kkaitlyn111/cs336-a2-systems": (
        "c1272e189aa1b8ab6b0a02e08f3f2be1ae122c39", "larger language model: training steps, forward passes", (
            *map(_LOGS.format, ("128_forward", "128_forward_mixed", "128_fullstep", "128_fullstep_", "256_forward_", "256_forward_mixed",
                                "256_fullstep_", "512_forward_", "512_forward_mixed", "512_fullstep_")),
            "cs336_systems/memory_logs/memory_ctx128_forward.pickle")),
    "cranberrii/ftcourse": ("a8cedf28ee118bdd0d50773780885e0e3a4bf027", "LoRA training of a Llama", ("memory_snapshot.pickle",)),
    "shreyansh26/MLSys-Experiments": (
        "b63fb8c71bc0019205404d1b979a519ee8a748d0", "a linear layer, from the first allocation on", (
            "model_memory_usage/profile_grad.pkl", "model_memory_usage/profile_no_grad.pkl")),
    "JasperSolt/EoR_NN": ("10cd0b497ace3272c4a808c774480f3a15b7fb4f", "convolutional network", ("snapshot.pickle",)),
    "silmont2000/assignment2-systems": ("75d09aad44d65bcf350114d4beaf1d3a7cde42db",
                                       "attention forward and back, from the first allocation on; a model's forward pass", (
        "mem_snapshot.pickle", "memory_forward_bf16_128.pickle", "memory_forward_fp32_128.pickle")),
}  # fmt: skip
TRACED = "Wedsonlin/assignment2-systems"
TRACED_TOKENS = (128, 256)  # the other two steps ran under CUDA's autocast, which a CPU does not have
_WARM_UP = 5  # steps before the recorded one


class _Plain(pickle.Unpickler):
    """Numbers, strings, lists and dicts."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"a recording has no business with {module}.{name}")


def clone_of(repository: str, clones: Path) -> Path:
    """A clone in which commits can be read; made without its files if there is none."""
    path = clones / repository
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"https://github.com/{repository}"
        subprocess.run(["git", "clone", "--quiet", "--filter=blob:none", "--no-checkout", url, str(path)], check=True)
    return path


def _git(clone: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(clone), *words], check=True, stdout=subprocess.PIPE).stdout


def replayed(content: bytes) -> dict[str, Any]:
    """A recording against the simulator's answers to the same requests."""
    snapshot = _Plain(io.BytesIO(content)).load()
    found = replay_snapshot(snapshot)
    workspaces = [entry["size"] for entry in snapshot["device_traces"][0]
                  if entry["action"] == "alloc" and any("orkspace" in frame["name"] for frame in entry.get("frames", ()))]
    return {"sha256": hashlib.sha256(content).hexdigest(), "num_events": found.num_events, "num_requests": found.num_requests,
            "num_placed_alike": found.num_placed_alike, "num_unmatched": found.num_unmatched,
            "workspaces_bytes": workspaces,
            "recorded_peak_allocated_bytes": found.simulated.peak_allocated_bytes if found.num_placed_alike == found.num_requests else None,
            "recorded_peak_reserved_bytes": found.recorded_peak_reserved_bytes,
            "simulated_peak_reserved_bytes": found.simulated.peak_reserved_bytes}


def traced(num_tokens: int) -> dict[str, Any]:
    """Predicted peaks of the recorded program, from its first allocation to the end of the recorded step."""
    # Initialisation would ask for values.
    with FakeMode(), patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        models = [importlib.import_module("cs336_basics.model").BasicsTransformerLM(
            vocab_size=10_000, context_length=num_tokens, d_model=1024, num_layers=24, num_heads=16, d_ff=4096)]
        num_parameters = sum(p.numel() for p in models[0].parameters())
        with recording() as recorder:
            _train(models.pop(), num_tokens)
            gc.collect()  # so that nothing stands throughout: what is made, when it was made, counts
    events, sizes = recorder.trace().device_events()
    workspaces = [cublas_workspace_bytes() // 2] * 2
    stats = replay([len(sizes), len(sizes) + 1, *events], [*sizes, *workspaces])
    return {"num_parameters": num_parameters, "predicted_peak_allocated_bytes": stats.peak_allocated_bytes,
            "predicted_peak_reserved_bytes": stats.peak_reserved_bytes}


def _train(model: torch.nn.Module, num_tokens: int) -> None:
    """What the recorded program does from moving its model to the card on, to the end of the recorded step."""
    cross_entropy = importlib.import_module("cs336_basics.nn_utils").cross_entropy
    model._apply(torch.clone)
    optimizer = importlib.import_module("cs336_basics.optimizer").AdamW(model.parameters())
    shapes = ((_WARM_UP, 4, num_tokens), (1, 4, num_tokens)) * 2
    warm_inputs, inputs, warm_targets, targets = (torch.randint(0, 10_000, shape) for shape in shapes)
    for tokens, wanted in zip(warm_inputs, warm_targets):
        output = model(tokens)
        loss = cross_entropy(output, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del output, loss
    output = model(inputs[0])
    loss = cross_entropy(output, targets[0])
    loss.backward()
    optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(prog=program(), description=__doc__.split("\n\n")[0])
    parser.add_argument("--clones", type=Path, default=cache_directory("recordings"), help="where clones are or go (%(default)s)")
    clones = parser.parse_args().clones
    if missing := [name for name in ("einops", "einx", "jaxtyping") if importlib.util.find_spec(name) is None]:
        print(f"error: the traced program needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    try:
        write_result("recordings", compared(clones), in_parts=True)  # the clones are there or not
    except subprocess.CalledProcessError as e:
        print(f"error: exit status {e.returncode} of {shlex.join(e.cmd)}", file=sys.stderr)
        return 6
    return 0


def compared(clones: Path) -> dict[str, Any]:
    """Every recording, and the two steps that are traced."""
    rows, traces = [], []
    for repository, (commit, runs, paths) in SOURCES.items():
        clone = clone_of(repository, clones)
        for path in paths:
            row = replayed(_git(clone, "cat-file", "blob", f"{commit}:{path}"))
            rows.append({"repository": repository, "commit": commit, "runs": runs, "path": path, **row})
            print(f"{repository} {path}: {row['num_placed_alike']} of {row['num_requests']} requests served alike", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        program = _git(clone_of(TRACED, clones), "archive", SOURCES[TRACED][0], "cs336-basics/cs336_basics")
        tarfile.open(fileobj=io.BytesIO(program)).extractall(folder, filter="data")
        sys.path.insert(0, f"{folder}/cs336-basics")
        for num_tokens in TRACED_TOKENS:
            recorded = next(row for row in rows if row["path"] == _STEPS.format(num_tokens))
            traces.append({"repository": TRACED, "num_tokens": num_tokens, **traced(num_tokens),
                           **{key: value for key, value in recorded.items() if key.startswith("recorded")}})
            print(traces[-1], flush=True)
    return {"recordings": rows, "traced": traces}


if __name__ == "__main__":
    sys.exit(main())
