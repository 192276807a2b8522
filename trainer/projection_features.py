"""The inputs of a linear layer, for many texts or pictures: computed once by the frozen encoder, cached on disk.

A hook on the layer itself sees them, so nothing needs to be known about what comes before it. The layer is affine:
the mean of its outputs over a picture's tokens is its output for the mean input, so one row a picture is kept.

Legend: N texts or pictures, D input width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memory.plan import MemoryPlan, apply_plan
from trainer.cache import cache_directory, recall, store
from trainer.errors import NonFinite
from trainer.projection_encoders import Tower, encoder_fingerprint, layer_of
from trainer.projection_examples import Example


_ROWS = 1  # what is cached: another number for another way to read pictures


@contextmanager
def inputs_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Within: what each layer is given, call by call. One hook a layer, removed again; other hooks are not touched."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [layer.register_forward_pre_hook(lambda module, args, seen=seen[name]: seen.append(args[0].detach()))
               for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features(tower: Tower, examples: Sequence[Example], *, plan: MemoryPlan, device: torch.device,
             batch_size: int) -> dict[str, Tensor]:
    """The inputs (N, D) of the tower's layers by name, float32 on the host: the mean over a picture's tokens.

    The encoder is loaded only if the cache lacks them, and gone on return. Raises NonFinite for NaN or infinity.
    """
    file = cache_directory("features") / f"{_key(tower, examples, plan)}.safetensors"
    tables = recall(file, *tower.layer_names)
    if tables is None:
        tables = compute(tower, examples, plan=plan, device=device, batch_size=batch_size)
        store({file: tables}, "the encoder's features")
    return tables


@torch.no_grad()
def compute(tower: Tower, examples: Sequence[Example], *, plan: MemoryPlan, device: torch.device,
            batch_size: int) -> dict[str, Tensor]:
    """`features`, computed now."""
    part = tower.load()
    rows: dict[str, list[Tensor]] = {name: [] for name in tower.layer_names}
    applied = apply_plan(part, tower.blocks(part), plan, device=device)
    try:
        for start in range(0, len(examples), batch_size):
            with inputs_of({name: layer_of(part, name) for name in tower.layer_names}) as seen:
                counts = tower.run(part, [e.content for e in examples[start:start + batch_size]], device)
            for name, calls in seen.items():
                rows[name] += [tokens.float().mean(0).cpu() for tokens in torch.cat(calls).split(counts)]
    finally:
        applied.undo()
    tables = {name: torch.stack(found) for name, found in rows.items()}  # (N, D)
    for name, table in tables.items():
        bad = (~torch.isfinite(table).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFinite(f"the input of {name} is not finite for {str(examples[bad[0]].content)!r} and {len(bad) - 1} others: the encoder's weights "
                            "are damaged, or precision is the cause; copy the model again, or take --dtype float32")
    return tables


def _key(tower: Tower, examples: Sequence[Example], plan: MemoryPlan) -> str:
    digest = hashlib.sha256(f"{_ROWS}\0{encoder_fingerprint(tower.directory)}\0{plan.dtype}\0{tower.layer_names}".encode())
    for example in examples:
        digest.update(example.digest())
    return digest.hexdigest()[:32]
