"""The emulated card's library: built with the C++ compiler of this machine, preloaded into a Python of its own.

What card.cpp does not define and torch's libraries ask for becomes a function that does nothing and succeeds.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from memory.cards import Card
from trainer.cache import cache_directory

DEFAULT_CARD = "rtx-4090"
_SOURCE = Path(__file__).with_name("card.cpp")
_REPLACED = re.compile(r"_*(cuda|cu[A-Z]|cublas|cudnn)(?!File)")
_CALLED = re.compile(r"\bcu[A-Z]\w+(?=\()")
_PRODUCT = re.compile(r"cublas.*(gemm|Gemm|Matmul$)")
_CAPABILITY = {"volta": 70, "turing": 75, "ampere": 80, "ada": 89, "hopper": 90, "blackwell-sxm": 100, "blackwell": 120}
_FILES = ("libcuda.so.1", "libnvidia-ml.so.1")  # what is looked for by name, besides being preloaded


class CannotEmulate(RuntimeError):
    """Something that the emulation is built from is not here."""


def built() -> Path:
    """The library, made anew where its source or torch has changed. Raises CannotEmulate."""
    import torch

    if torch.version.cuda is None:
        raise CannotEmulate(f"torch {torch.__version__} is built without CUDA; install a build with it (pip install torch, on Linux)")
    compiler, reader = shutil.which("g++") or shutil.which("c++"), shutil.which("nm")
    if not compiler or not reader:
        raise CannotEmulate("a C++ compiler and nm are needed (on Debian: apt-get install g++)")
    key = hashlib.sha256(_SOURCE.read_bytes() + Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = cache_directory("emulated") / key
    library = folder / _FILES[0]
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    card, rest, stubs = folder / "card.o", folder / "rest.o", folder / "rest.cpp"
    _run(compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *_headers(), "-c", _SOURCE, "-o", card)
    wanted = {name for path in _libraries(Path(torch.__file__).parent) for name in _symbols(reader, "--undefined-only", "-D", path)}
    wanted |= {name for path in _driver_of_triton() for name in _CALLED.findall(path.read_text())}
    missing = sorted(name for name in wanted - set(_symbols(reader, "--defined-only", card)) if _REPLACED.match(name))
    lines = [f'API int {name}() {{ {"emulated_card_product(); " * bool(_PRODUCT.match(name))}return 0; }}' for name in missing]
    declared = '#define API extern "C" __attribute__((visibility("default")))\nAPI void emulated_card_product();'
    stubs.write_text("\n".join([declared, *lines]) + "\n")
    _run(compiler, "-O2", "-fPIC", "-fvisibility=hidden", "-c", stubs, "-o", rest)
    for name in reversed(_FILES):  # the one that is looked for above comes last
        _run(compiler, "-shared", card, rest, "-o", folder / name, f"-Wl,-soname,{name}", "-ldl")
    return library


def environment(card: Card, gib: float) -> dict[str, str]:
    """Variables under which a Python of this installation has `card`, with `gib` GiB of memory. Raises CannotEmulate."""
    capability = _CAPABILITY.get(card.architecture) or _CAPABILITY.get(card.architecture.split("-")[0])
    if capability is None:
        raise CannotEmulate(f"{card.name} ({card.architecture}) is not emulated; one of {', '.join(_CAPABILITY)} is, such as rtx-4090")
    library = built()
    # What is computed here is worth nothing: no embedding and no compiled kernel of it may be found in a run elsewhere.
    caches = {name: str(library.parent / "cache") for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    return caches | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
            "EMULATED_CARD_NAME": f"Emulated {card.label.removeprefix('NVIDIA ')}", "EMULATED_CARD_MIB": str(int(gib * 1024)),
            "EMULATED_CARD_CONTEXT_MIB": str(card.context_bytes >> 20), "EMULATED_CARD_CAPABILITY": str(capability)}


def _headers() -> list[str]:
    """Flags that name CUDA's and cuDNN's headers: those that torch brings along, then what they include, which Triton has."""
    wanted = ("cuda_runtime_api.h", "cudnn_backend.h")
    folders = [folder for root in _folders("nvidia") for folder in root.glob("*/include") if any((folder / name).exists() for name in wanted)]
    folders += [root / "backends/nvidia/include" for root in _folders("triton")]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include")
    return [f"-I{folder}" for folder in folders]


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(root) for root in spec.submodule_search_locations] if spec else []


def _libraries(torch_folder: Path) -> list[Path]:
    return [*(torch_folder / "lib").glob("lib*.so"), *(path for root in _folders("bitsandbytes") for path in root.glob("*cuda*.so"))]


def _driver_of_triton() -> list[Path]:
    """Sources, compiled when Triton first looks for a card; they ask for the driver's functions."""
    return [path for root in _folders("triton") for path in (root / "backends/nvidia").glob("driver.*")]


def _symbols(reader: str, *arguments: str | Path) -> list[str]:
    """Names without the version of the library that they are expected from."""
    listed = subprocess.run([reader, *map(str, arguments)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip() and not line.endswith(":")]


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        wrong = [line for line in done.stderr.splitlines() if "error" in line]
        raise CannotEmulate(f"{Path(command[0]).name} failed: {wrong[0] if wrong else done.stderr.strip()}")
