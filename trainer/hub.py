"""Models from the Hugging Face hub: first what describes them, and their weights once that is found to be what is needed."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from memory.exhaustion import first_line
from trainer.backbones.weights import read_index
from trainer.errors import UsageError

_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, vocabularies
_PLAIN = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # transformers' name, diffusers'
_ANY = "*.safetensors"


def is_hub_id(model: str) -> bool:
    """Whether it names a model of the hub: owner/name, and no such path here."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def fetch_description(hub_id: str, *, named: str) -> Path:
    """The directory of a model of the hub in the local cache, all but the weights. `named`: the flag by which the user did, and its value.
    Raises UsageError."""
    return _fetch(hub_id, _DESCRIPTION, None, named)


def fetch_weights(hub_id: str, directory: Path, *, named: str, parts: Sequence[str] = ("",)) -> None:
    """Complete what `fetch_description` returned by the weights in `parts`, as "vae/": gigabytes. Raises UsageError, and
    CheckpointError for an index that is none.

    Of a part in several variants the plain one comes, if there is one. Weights elsewhere in the repository stay there.
    """
    revision = directory.name  # as the cache names it
    _fetch(hub_id, [name for part in parts for name in _plain_files(directory, part)], revision, named,
           whole=lambda: all(has_weights(directory, part) for part in parts))
    without = [part for part in parts if not has_weights(directory, part)]
    if without:
        _fetch(hub_id, [part + _ANY for part in without], revision, named)
    for part in without:
        if not has_weights(directory, part):
            raise UsageError(f"{named}: no {part}{_ANY} of {hub_id} on the hub, or in the cache where the hub is not reached; "
                             "weights of another kind: load them with diffusers or transformers, save_pretrained(DIR), and name DIR")


def read_header(hub_id: str, directory: Path, part: str) -> dict[str, tuple[list[int], str]] | None:
    """Shape and dtype, as safetensors writes it, by tensor of a file with the weights of a part, as "vae/", which stays on the hub; None
    where there is no plain variant, or the hub does not answer."""
    from huggingface_hub import parse_safetensors_file_metadata

    for name in _plain_files(directory, part)[:len(_PLAIN)]:
        with suppress(Exception):
            tensors = parse_safetensors_file_metadata(hub_id, name, revision=directory.name).tensors
            return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return None


def has_weights(directory: Path, part: str) -> bool:
    """Whether all that the index of a part names is here; without one, any weights."""
    names = _indexed(directory, part)
    return all((directory / part / name).is_file() for name in names) if names else any((directory / part).glob(_ANY))


def _plain_files(directory: Path, part: str) -> list[str]:
    """The weights of a part without variants, by what its description says."""
    return [part + name for name in _indexed(directory, part) or _PLAIN]


def _indexed(directory: Path, part: str) -> list[str]:
    """The files that the index of a part names; none without one."""
    index = next((directory / part).glob("*.safetensors.index.json"), None)
    return sorted(set(read_index(index).values())) if index else []


def _fetch(hub_id: str, patterns: Sequence[str], revision: str | None, named: str, *, whole: Callable[[], bool] = lambda: True) -> Path:
    """`whole`: whether all that is needed is here, so that the hub was not."""
    from huggingface_hub import snapshot_download

    def download(**where: bool) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), **where))

    try:
        return download()
    except Exception as e:  # a connection that breaks off raises what the HTTP library has for it, and that is not always the same one
        if revision:  # it may all be in the cache, without the list of its files, for which a known revision asks the hub first
            with suppress(Exception):
                found = download(local_files_only=True)
                if whole():
                    return found
        what = "no such directory, and the hub did not give it" if named.endswith(f" {hub_id}") else f"the hub did not give {hub_id}"
        raise UsageError(f"{named}: {what} ({_refusal(e)}); name a local directory, or shapes") from e


def _refusal(error: Exception) -> str:
    """Why the hub did not give a model."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):  # also where it may not be read
        return "it has none of that name for you; a private or gated one needs HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "it is not in the cache, and " + ("HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached; HF_ENDPOINT may name a mirror")
    if isinstance(error, HFValidationError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}; files that have come are kept, and the same command goes on with the rest"
