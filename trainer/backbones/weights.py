"""Weights from safetensors shards straight into place: construction on meta, one tensor at a time, no second copy."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trainer.errors import CheckpointError


def shards(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, for a diffusers or transformers component directory.

    A sharded index (`*.safetensors.index.json`) is honoured; otherwise the one `*.safetensors` file is read, beside others that of the
    libraries' name. Of several variants (`*.fp16.safetensors`, `*.safetensors.index.fp16.json`) it is the plain one, as `from_pretrained`
    takes it.
    """
    files = sorted(directory.glob("*.safetensors"))
    files = [file for file in files if re.match(r"(diffusion_pytorch_)?model[.-]", file.name)] or files
    plain = [file for file in files if file.name.count(".") == 1]
    indices, variants = (sorted(directory.glob(f"*.safetensors.index.{which}json")) for which in ("", "*."))
    if indices or variants and not plain:
        found = map(read_index, (*indices, *variants))  # one by one: of another than is taken nothing is asked
        files_by_name = first = next(found)
        if _missing(directory, first):
            files_by_name = next((names for names in found if not _missing(directory, names)), first)
        if missing := _missing(directory, files_by_name):
            raise CheckpointError(f"{directory}: the index names {missing[0]}, which is not there; copy the model again")
        return {name: directory / file for name, file in files_by_name.items()}
    files = plain or files
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{directory}: expected one .safetensors file or an index, found {found}; copy the model again, or let "
                              "the library that loads it write it, diffusers or transformers: save_pretrained(DIR)")
    with open_shard(files[0]) as f:
        return dict.fromkeys(f.keys(), files[0])


def _missing(directory: Path, files_by_name: dict[str, str]) -> list[str]:
    return sorted(file for file in set(files_by_name.values()) if not (directory / file).is_file())


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, by an index of shards. Raises CheckpointError if it is damaged."""
    try:
        return {name: str(Path(shard)) for name, shard in json.loads(file.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file} is not an index of weights ({e!r}); copy the model again") from e


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading on the host. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} cannot be read ({e}); copy the model again") from e


def assign(model: nn.Module, directory: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model built on meta its weights, frozen, in `dtype` (floating tensors only; `dtype_of`) on `device`.

    Peak memory beyond the model: one tensor in its stored dtype. Raises CheckpointError where a weight is
    missing, superfluous or of another shape.
    """
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    where = shards(directory)
    surplus = sorted(where.keys() - expected.keys())
    if surplus:
        advice = "save the pipeline anew after erasers.undo()" if ".adapter." in surplus[0] else "copy the model again"
        raise CheckpointError(f"{directory} holds {surplus[0]}, which {type(model).__name__} does not have; {advice}")
    files: dict[Path, list[str]] = {}
    for name, file in where.items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        with open_shard(file) as f:
            for name in names:
                _place(model, name, f.get_tensor(name), expected[name], dtype_of(model, name, dtype), device, file)
    if hasattr(model, "tie_weights"):
        model.tie_weights(missing_keys=expected.keys() - where.keys())  # to whichever of them the file has
    unset = [n for n, t in {**dict(model.named_parameters()), **_persistent_buffers(model)}.items() if t.is_meta]
    if unset:
        raise CheckpointError(f"{directory} lacks {unset[0]} of {type(model).__name__}; copy the model again")
    return model.requires_grad_(False).eval()


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a model in `dtype` is held in, as `from_pretrained` has it: T5's `wo` leaves float16's range."""
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype == torch.float16 and not set(name.split(".")).isdisjoint(wide) else dtype


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    persistent = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _place(model: nn.Module, name: str, tensor: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype,
           device: torch.device | str, file: Path) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(f"{file}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(expected.shape)}; "
                              "copy the model again")
    if tensor.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{file}: {name} is stored in {str(tensor.dtype).removeprefix('torch.')}; name the model as it was before that")
    tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def allocate(model: nn.Module, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model built on meta frozen weights without values."""
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                tensor = torch.empty(parameter.shape, dtype=dtype_of(model, f"{path}.{leaf}", dtype), device=device)
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model built on meta random weights: N(0, 0.02) matrices, unit norm gains, zero biases, frozen."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in allocate(model, dtype=dtype, device=device).named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model
