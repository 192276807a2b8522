"""The parts of a training step (`Subject`), and what can be seen of them without running anything: weights, embeddings, ownership."""

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memory.optimizers import make_optimizer
from memory.precision import make_scaler
from memory.sharding import whole
from memory.standing import allocate_standing
from trainer.assemble import Assembly, masking_blocks
from trainer.backbones.cogvideox import CogVideoX
from trainer.config import SHAPES, TrainConfig
from trainer.distributed import rows_of
from trainer.findings import Finding, finding
from trainer.latents import make_latents
from trainer.losses import Teacher
from trainer.prompts import Embeddings, PromptSet


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is examined: a training step's parts. `optimizer`: the one of a run, or in a loop of one's own several, each with its parameters."""

    config: TrainConfig
    native_dtype: torch.dtype
    assembly: Assembly
    teacher: Teacher
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, config: TrainConfig, backbone: CogVideoX, assembly: Assembly, prompts: PromptSet, embeddings: Embeddings,
           columns: dict[str, Tensor] | None) -> "Subject":
        """All that a step needs, made for a transformer that is in place."""
        shape = (config.data.batch_size, *assembly.latent_shape)
        latents, preserved = (make_latents(config, backbone.scheduler(), shape, stream, assembly.device)
                              for stream in ("target", "preserved"))
        teacher = Teacher(
            assembly.predict, assembly.erasers, [assembly.blocks[i] for i in masking_blocks(backbone, config.loss)],
            loss=config.loss, prompts=prompts, embeddings=embeddings, columns=columns, latents=latents,
            preserved_latents=preserved if config.loss.beta > 0 else None, seed=config.optim.seed,
            guidance=config.memory.guidance, trajectory_guidance=config.data.trajectory_guidance)
        optimizer = make_optimizer(assembly.erasers.parameters(), kind=config.memory.optimizer, lr=config.optim.lr,
                                   weight_decay=config.optim.weight_decay)
        for stream in filter(None, (teacher.latents, teacher.preserved_latents)):
            stream.allocate()
        allocate_standing(optimizer, assembly.device)
        return cls(config=config, native_dtype=backbone.native_dtype, assembly=assembly, teacher=teacher, optimizer=optimizer,
                   scaler=make_scaler(assembly.dtype, assembly.device))

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self.optimizer] if isinstance(self.optimizer, torch.optim.Optimizer) else self.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def teacher_copy(self, *, of_rank: int | None = None) -> Teacher:
        """A teacher that makes samples without moving the run's own trajectories: on the rows of process `of_rank`, by default of this one."""
        teacher, rows = copy.copy(self.teacher), rows_of(self.config.data.batch_size, of_rank)
        teacher.latents, teacher.preserved_latents = (
            stream and stream.apart(rows) for stream in (teacher.latents, teacher.preserved_latents))
        return teacher

    def fitted(self, found: Finding) -> Finding:
        """`found` with a fix for these settings: one that does not advise what is set already."""
        fix = next((fix for code, applies, fix in _FITTING if code == found.code and applies(self)), found.fix)
        return replace(found, fix=fix)


def _computes_in(dtype: torch.dtype) -> Callable[[Subject], bool]:
    return lambda subject: subject.assembly.dtype == dtype


def _has_low_eta(subject: Subject) -> bool:
    return subject.config.loss.eta <= 5


_COPY = "if that is ordinary, a weight of the model is damaged: copy it again"
_FITTING: Sequence[tuple[str, Callable[[Subject], bool], str]] = (
    ("non-finite-activation", _computes_in(torch.float32), "if the largest input is huge, a weight before this module is damaged: copy the model "
        "again; along a trajectory, a lower --trajectory-guidance may help"),
    ("non-finite-loss", _computes_in(torch.float32), f"a lower --lr; {_COPY}"),
    ("non-finite-gradient", _computes_in(torch.float32), "look at hooks on gradients and at custom autograd functions; if there are none, a weight "
        "of the model is damaged: copy it again"),
    ("non-finite-gradient", _computes_in(torch.bfloat16), "--dtype float32; look at hooks on gradients and at custom autograd functions"),
    ("non-finite-target", _has_low_eta, f"a lower --eta; {_COPY}"),
    ("eta-too-large", _has_low_eta, "a lower --eta"),
    ("learning-rate-too-high", lambda subject: subject.config.model.model == "shapes", f"--lr {SHAPES['optim.lr']:g}"),
)
"""(code, where it applies, the fix there): others than in CODES."""


def adapter_name(name: str) -> str:
    """An eraser's parameter, such as `3.up.weight`, in the transformer's names."""
    block, leaf = name.split(".", 1)
    return f"transformer_blocks.{block}.attn1.adapter.{leaf}"


def own_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The transformer's parameters by name, without those of erasers in it: what is to be frozen."""
    return {name: p for name, p in transformer.named_parameters() if ".attn1.adapter." not in name}


def block_of(name: str) -> int | None:
    """The block's index in a name such as `transformer_blocks.3.attn1.to_q.weight`."""
    return int(name.split(".")[1]) if name.startswith("transformer_blocks.") else None


def non_finite_weight(subject: Subject) -> Finding | None:
    """The first parameter or buffer, in the model's order, that holds NaN or infinity."""
    transformer = subject.assembly.transformer
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor := whole(tensor.detach())).all():
            own = ".adapter." in name
            return finding("non-finite-weight", "adapters" if own else "weights", block=block_of(name), module=name,
                           num_non_finite=int((~torch.isfinite(tensor)).sum()), num_elements=tensor.numel(),
                           dtype=str(tensor.dtype))
    return None


def non_finite_embedding(subject: Subject) -> Finding | None:
    """The first prompt whose embedding holds NaN or infinity."""
    teacher = subject.teacher
    prompts = list(dict.fromkeys(teacher.prompts.texts))
    bad = [prompt for prompt in prompts if not torch.isfinite(teacher.embeddings.row(prompt)).all()]
    return finding("non-finite-embedding", "embeddings", prompt=repr(bad[0]), num_prompts=len(bad)) if bad else None


class Fingerprint:
    """Sums of the bit patterns of every frozen parameter and table, and what is wrong with them. One pass over the weights."""

    def __init__(self, subject: Subject):
        transformer = subject.assembly.transformer
        frozen = own_parameters(transformer)
        tables = {n: b for n, b in transformer.named_buffers() if b.is_floating_point() and b.ndim > 1}  # of positions
        self.tables, frozen = set(tables), frozen | tables
        sums, bounds = [], []
        for weight in (whole(p.detach()) for p in frozen.values()):
            sums.append(_bits(weight))
            bounds += [bound.double() for bound in torch.aminmax(weight)]
        self.sums, ranges = dict(zip(frozen, values(sums))), values(bounds)
        self.ranges = dict(zip(frozen, zip(ranges[::2], ranges[1::2])))
        self.finite = all(map(math.isfinite, ranges))
        self.dims = {name: p.ndim for name, p in frozen.items()}

    def findings(self) -> list[Finding]:
        """Wiped weights: constant matrices, and gains of zero. (Biases of zero are common, gains of one, and LoRAs whose B is zero.)"""
        found = {}
        for name, (low, high) in self.ranges.items():
            matrix = self.dims[name] > 1 and ".lora_B." not in name
            gain = self.dims[name] == 1 and name.endswith(".weight")
            if low == high and (matrix or (gain and low == 0)):
                code, block = "wiped-attention" if ".attn1." in name else "wiped-weights", block_of(name)
                found.setdefault((code, block), finding(code, "weights", block=block, module=name, value=low))
        return list(found.values())

    def digest(self) -> str:
        """Identifies the weights, whatever device they are on; without what is computed and not stored."""
        stored = sorted(bits for name, bits in self.sums.items() if name not in self.tables)
        return hashlib.sha256(repr(stored).encode()).hexdigest()[:16]

    def changed(self, now: "Fingerprint") -> list[str]:
        """Names of those whose bits differ."""
        return [name for name, bits in self.sums.items() if now.sums.get(name) != bits]


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.itemsize]).sum(dtype=torch.int64)


def values(scalars: Sequence[Tensor]) -> list[Any]:
    """Values of scalars on any devices, with one transfer a device."""
    found: dict[int, Any] = {}
    for device in {s.device for s in scalars}:
        here = [i for i, s in enumerate(scalars) if s.device == device]
        found |= zip(here, torch.stack([scalars[i] for i in here]).tolist())
    return [found[i] for i in range(len(scalars))]


def held(subject: Subject) -> set[int]:
    """Identities of the parameters that the optimizer moves."""
    return {id(p) for group in subject.param_groups for p in group["params"]}


def adapter_findings(subject: Subject) -> Iterator[Finding]:
    """Whether the erasers are in the model that runs; dtype, trainability and ownership of their parameters."""
    absent = [i for i, (block, adapter) in enumerate(zip(subject.assembly.blocks, subject.assembly.erasers.adapters))
              if block.attn1._modules.get("adapter") is not adapter]
    if absent:  # taken out, others put in their place, or of another model
        yield finding("student-without-erasers", "student", block=absent[0], module=f"transformer_blocks.{absent[0]}.attn1", num_blocks=len(absent))
    parameters = subject.assembly.erasers.named_parameters()
    owned = held(subject)
    strangers = [n for n, p in parameters if id(p) not in owned]
    checks = (
        ("half-precision-adapters", "adapters", [n for n, p in parameters if p.dtype != torch.float32]),
        ("frozen-eraser", "adapters", [n for n, p in parameters if not p.requires_grad]),
        (strangers and _ownership(subject), "optimizer", strangers),
    )
    for code, phase, names in checks:
        if names:
            yield finding(code, phase, block=int(names[0].split(".")[0]), module=adapter_name(names[0]),
                          num_parameters=len(names), num_parameters_in_all=len(parameters),
                          dtype=str(dict(parameters)[names[0]].dtype))


def _ownership(subject: Subject) -> str:
    """Why a parameter would not be in the optimizer: it holds as many of the same shapes, or it does not."""
    theirs = [p for group in subject.param_groups for p in group["params"]]
    ours = subject.assembly.erasers.parameters()
    same = Counter(tuple(p.shape) for p in theirs) == Counter(tuple(p.shape) for p in ours)
    return "replaced-parameters" if same else "not-in-optimizer"
