"""What is trained for a layer: inputs, target and loss.

    L = λ_f ‖target − new(F)‖ + λ_p ‖old(P) − new(P)‖ + λ_w ‖s B A‖

F and P are the layer's inputs for what is forgotten and what is kept; all norms are Frobenius norms, neither squared
nor averaged; s is the LoRA's scale. CLIP and Qwen3-VL differ in encoder, layer and target alone.

Legend: N forgotten rows, M preserved rows, D input width, E output width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UsageError
from trainer.lora import Layer
from trainer.projection_config import ForgetConfig
from trainer.projection_encoders import ClipText, ClipVision, QwenVision, Tower, embedded, load_tokenizer, locate, read_layer, require_language_model
from trainer.projection_examples import Example, classes, images, of_class, texts
from trainer.projection_features import features
from trainer.seeding import noise


@dataclass(frozen=True)
class Case:
    """What a run is about: classes, examples, and the inputs of the layers that are edited."""

    tower: Tower
    forget: str
    kept: tuple[str, ...]
    examples: list[Example]
    inputs: Mapping[str, Tensor]
    """By layer name, (examples, D), float32 on the host."""
    layers: Mapping[str, Layer]
    dtype: torch.dtype
    """What the layers are stored in."""
    pictures: list[Example]
    """What CLIP's zero-shot accuracy is measured on; may be empty."""
    embeddings: Tensor | None
    """Of those pictures, (pictures, E), normalised."""

    def digest(self) -> str:
        """Identifies what is trained on."""
        digest = hashlib.sha256()
        for example in self.examples:
            if example.split == "train":
                digest.update(f"{example.name}\0".encode() + example.digest())
        return digest.hexdigest()[:16]

    def rows(self, name: str, *, forgotten: bool) -> Tensor:
        """The inputs (N, D) of a layer to train on, of the class to forget or of those to keep."""
        members = [i for i, e in enumerate(self.examples) if e.split == "train" and (e.name == self.forget) == forgotten]
        return self.inputs[name][members]


@dataclass(frozen=True)
class Problem:
    """What is trained for one layer: F (N, D), P (M, D) and the target (E,)."""

    layer: Layer
    forget: Tensor
    preserve: Tensor
    target: Tensor

    def distance(self, update: Tensor | None = None) -> Tensor:
        """‖target − new(F)‖."""
        return torch.linalg.vector_norm(self.target - self.layer(self.forget, update))

    def terms(self, update: Tensor, lambda_forget: float, config: ForgetConfig) -> dict[str, Tensor]:
        """The loss and its three weighted terms, for an update (E, D) that includes the LoRA's scale."""
        # The difference of new and old outputs is the update applied to the input: no cancellation.
        found = {"forget": lambda_forget * self.distance(update),
                 "preserve": config.lambda_preserve * torch.linalg.vector_norm(self.preserve @ update.t()),
                 "weight": config.lambda_weight * torch.linalg.vector_norm(update)}
        return {"loss": sum(found.values()), **found}


def prepare(config: ForgetConfig, device: torch.device) -> Case:
    """Read or compute the inputs; the encoder has come and gone when this returns."""
    directory = locate(config.encoder, config.model, whole=config.images is not None)
    forget, kept = classes(config)
    if config.encoder == "clip":
        tower, examples = ClipText(directory), texts(config, forget, kept)
    else:
        tower, examples = QwenVision.of(directory, config.mergers), images(config, forget, kept)
    read = {name: read_layer(directory, name) for name in tower.layer_names}
    layers = {name: layer for name, (layer, _) in read.items()}
    for layer in layers.values():
        if config.rank > min(layer.weight.shape):
            raise UsageError(f"--rank {config.rank}: {layer.name} is {' x '.join(map(str, layer.weight.shape))}; "
                             f"at most {min(layer.weight.shape)}")
    if config.encoder == "qwen3-vl" and config.num_answers:  # what it takes to ask would be missed only after training
        load_tokenizer(directory)
        require_language_model(directory)
    inputs = features(tower, examples, plan=config.memory, device=device, batch_size=config.batch_size)
    _require_told_apart(inputs[tower.layer_names[0]], examples, forget, kept)
    pictures, embeddings = _measured_pictures(config, directory, forget, kept, device)
    _, dtype = read[tower.layer_names[0]]
    return Case(tower, forget, kept, examples, inputs, layers, dtype, pictures, embeddings)


def _measured_pictures(config: ForgetConfig, directory: Path, forget: str, kept: tuple[str, ...],
                       device: torch.device) -> tuple[list[Example], Tensor | None]:
    pictures = images(config, forget, kept) if config.encoder == "clip" else []
    if not pictures:
        return [], None
    tower = ClipVision(directory)
    (name,) = tower.layer_names
    seen = features(tower, pictures, plan=config.memory, device=device, batch_size=config.batch_size)[name]
    return pictures, embedded(tower, seen)


def _require_told_apart(inputs: Tensor, examples: list[Example], forget: str, kept: tuple[str, ...]) -> None:
    rows = {name: inputs[of_class(examples, name, "train")] for name in (forget, *kept)}
    for name in kept:
        if torch.equal(rows[name], rows[forget]):
            raise UsageError(f"the encoder sees no difference between {forget!r}, which is to be forgotten, and {name!r}; are texts or "
                             "pictures of both the same, or is its tokenizer that of another model?")


def make_problem(case: Case, name: str, config: ForgetConfig, device: torch.device) -> Problem:
    """One layer's problem, on the device."""
    layer = case.layers[name]
    forget, preserve = (case.rows(name, forgotten=f) for f in (True, False))
    kind = {"clip": "empty", "qwen3-vl": "random"}[config.encoder] if config.target == "auto" else config.target
    if kind == "empty":
        (empty,) = layer(case.inputs[name][of_class(case.examples, "", "empty")])
        target = empty / torch.linalg.vector_norm(empty)
    elif kind == "random":
        # A unit vector would have nothing to do with the outputs: the scale is theirs.
        outputs = layer(torch.cat([forget, preserve]))
        direction = noise((outputs.shape[1],), config.seed, f"target/{name}")
        target = direction / torch.linalg.vector_norm(direction) * torch.linalg.vector_norm(outputs, dim=1).mean()
    else:
        target = layer(preserve).mean(0)
    return Problem(layer.to(device), forget.to(device), preserve.to(device), target.to(device))
