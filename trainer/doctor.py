"""`run.py doctor`: is this machine fit to train, and if not, what would make it so?

Looks at one thing after another and never stops at the first trouble. Heavy imports wait inside the checks, so that a
missing package is a finding and not a traceback. What no card has run here says so: without one, its checks are absent.
"""

import contextlib
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

from memory.cards import GIB, Card, detect
from memory.exhaustion import card_lost, driver_failed, exhausted, first_line, workaround
from memory.host import available_host_bytes, host_limit_bytes, machine_bytes, under_wsl
from memory.nvml import CardUnreadable, ask_driver
from trainer.cache import cache_directory
from trainer.config import ModelConfig
from trainer.errors import TrainerError, UsageError
from trainer.run_files import nearest

LEAST_HOST_BYTES = 4 * GIB  # interpreter and libraries take about 3
LEAST_DISK_BYTES = 2 * GIB  # two checkpoints of the 5b at rank 128 and one being written
LEAST_MODEL_BYTES = 22 * GIB  # what is downloaded of the published 5b, and a little
LEAST_LINK_SHARE = 0.6  # of what the card's kind of link reaches
_COPIED_BYTES = 256 << 20
_LOST = "look at nvidia-smi and dmesg; a card that fell off the bus comes back with a restart"
_PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

Status = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    fix: str = ""
    """What to do about a warning or a problem."""
    values: dict[str, Any] = field(default_factory=dict)
    """The same as plain numbers, for programs."""
    exit_code: int = 0
    """Of a problem, as the table of exit codes has it."""


class Unfit(TrainerError):
    """The doctor found a problem; its exit code is that of the first."""

    def __init__(self, problems: list[Check]):
        super().__init__(f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(c.name for c in problems)}")
        self.exit_code = problems[0].exit_code


def examine() -> list[Check]:
    """All checks, in the order in which trouble spreads: what is installed, the card, the host, the disk, the model."""
    checks = [python(), *packages()]
    card, found = the_card()
    checks += [found, *host(card), *disk()]
    if not any(check.status == "problem" and check.name in ("torch", "diffusers", "transformers", "card") for check in checks):
        for name, look in (("kernels", kernels), ("8-bit Adam", eight_bit), ("link", lambda: link(card))) if card else ():
            try:
                checks.append(look())
            except RuntimeError as e:
                checks.append(_refused(name, e))
        checks.append(bundled_model())
    return checks


def python() -> Check:
    fine = sys.version_info >= (3, 11)
    return Check(name="python", status="ok" if fine else "problem", found=f"{platform.python_version()} on {platform.system()} "
                 f"{platform.machine()}{' under WSL' * under_wsl()}", fix="" if fine else "use Python 3.11 or newer: make PYTHON=python3.12", exit_code=2)


def packages() -> Iterator[Check]:
    """What pyproject.toml asks for, and what is there."""
    for wanted in _wanted():
        name, least = re.match(r"([\w.-]+)(?:>=([\w.]+))?", wanted).groups()
        try:
            version = metadata.version(name)
            if version is None:  # what is left of a package
                raise metadata.PackageNotFoundError(name)
        except metadata.PackageNotFoundError:
            yield Check(name=name, status="problem", found="not installed", fix=f"pip install '{wanted}'", exit_code=2)
            continue
        old = least is not None and _numbers(version) < _numbers(least)
        yield Check(name=name, status="problem" if old else "ok", found=version, exit_code=2,
                    fix=f"pip install --upgrade '{wanted}'" if old else "", values={"version": version})


def _wanted() -> list[str]:
    if _PYPROJECT.exists():
        return tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]
    return [line for line in metadata.requires("eraser-trainer") or () if ";" not in line]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0]))


def the_card() -> tuple[Card | None, Check]:
    """The card that training would take; None where there is none or it does not answer."""
    try:
        card = detect()
    except CardUnreadable as e:
        return None, Check(name="card", status="problem", found=str(e), exit_code=6,
                           fix=_LOST)
    if card.is_cpu:
        return None, Check(name="card", status="note", found="none: training runs on the CPU, which the bundled model is small "
                           "enough for", fix="with a card in the machine: install its driver and a torch built for CUDA, and look at "
                           "CUDA_VISIBLE_DEVICES")
    import torch

    from trainer.assemble import has_kernels, kernels_text, why_unused

    values = {"name": card.name, "label": card.label, "capacity_bytes": card.capacity_bytes, "usable_bytes": card.usable_bytes,
              "used_by_others_bytes": card.used_by_others_bytes, "built_for_cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return None, Check(name="card", status="problem", found=f"{card.label} is there, but torch cannot use it", values=values, exit_code=2,
                           fix=why_unused())
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as e:
        return None, _refused("card", e)
    values |= {"compute_capability": f"{major}.{minor}", "driver": _driver(),
               "dtypes": [d for d in ("float32", "bfloat16", "float16", "float8") if card.supports(d)]}
    if not has_kernels((major, minor)):
        return None, Check(name="card", status="problem", found=f"{card.label} is there, but torch has no kernels for it", values=values, exit_code=2,
                           fix=kernels_text((major, minor)))
    crowded = card.used_by_others_bytes > card.capacity_bytes // 4
    return card, Check(
        name="card", status="warning" if crowded else "ok", values=values,
        found=f"{card.label}, {card.capacity_bytes / GIB:.1f} GiB ({card.used_by_others_bytes / GIB:.1f} held by others), compute "
              f"{major}.{minor}, {' '.join(values['dtypes'])}; driver {values['driver']}, torch for CUDA {torch.version.cuda}",
        fix="other processes hold much of the card: end them, or plan for what is left" if crowded else "")


def _refused(name: str, error: Exception) -> Check:
    """A check that was not made: memory has run out, as on a card that others fill, or the card or its driver does not answer."""
    full = exhausted(error) is not None
    fix = "end what else holds memory of the card, which nvidia-smi shows, or of the host" if full else _LOST
    return Check(name=name, status="problem", found=f"cannot be tried ({first_line(error)})", exit_code=3 if full else 6,
                 fix=f"export {without[1]}" if (without := workaround(error)) else fix)


def kernels() -> Check:
    """Whether Triton's kernels work on this card: without them a step takes up to a fifth longer."""
    import torch

    from trainer.backbones import norm_rotate

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work = norm_rotate.working_kernels(torch.device("cuda", torch.cuda.current_device())) is not None
    why = str(said[-1].message) if said else "Triton is not installed, or does not know this card"
    return Check(name="kernels", status="ok" if work else "warning", values={"triton": work},
                 found="Triton's norm and rotate queries and keys, as torch's operators do" if work else why,
                 fix="" if work else "install the triton of this torch, and a C compiler with Python's headers (apt install gcc python3-dev)")


def eight_bit(device: str = "cuda") -> Check:
    """Whether bitsandbytes can take a step there."""
    import torch

    from memory.optimizers import create_state, make_optimizer
    from memory.plan import PlanError

    try:
        create_state(make_optimizer([torch.nn.Parameter(torch.zeros(4096, device=device))], kind="adamw8bit", lr=1e-3))
    except (PlanError, ImportError) as e:
        return Check(name="8-bit Adam", status="warning", found=first_line(e))
    return Check(name="8-bit Adam", status="ok", found="takes a step")


def _driver() -> str:
    version = ask_driver("nvmlSystemGetDriverVersion")
    return "unknown" if version is None else version.decode() if isinstance(version, bytes) else version


def host(card: Card | None) -> Iterator[Check]:
    """Memory of the host, the container's limit, and how much may be locked."""
    total, available = machine_bytes(), available_host_bytes()
    limit = host_limit_bytes()
    short = available < LEAST_HOST_BYTES
    bound = f", container limited to {limit / GIB:.1f}" if limit is not None else ""
    yield Check(name="host memory", status="warning" if short else "ok", found=f"{available / GIB:.1f} GiB available of "
                f"{total / GIB:.1f}{bound}", values={"total_bytes": total, "available_bytes": available, "limit_bytes": limit},
                fix=f"less than {LEAST_HOST_BYTES // GIB} GiB: close other programs, or raise the container's limit" if short else "")
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = None if soft == resource.RLIM_INFINITY else soft
    said = "unlimited" if locked is None else f"{locked / 2**20:,.0f} MiB"
    yield Check(name="locked memory", status="note" if locked is not None else "ok", values={"limit_bytes": locked},
                found=f"ulimit -l: {said}" + ("" if locked is None else "; CUDA's pinned memory is not counted there"))
    if card is not None:
        yield _pinned(available)


def _pinned(available: int) -> Check:
    """Whether a GiB of host memory can be pinned, as streaming blocks needs it."""
    import torch

    size = min(GIB, available // 4)
    try:
        torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as e:
        return Check(name="pinned memory", status="warning", found=f"{size / GIB:.1f} GiB cannot be pinned: {first_line(e)}",
                     fix="raise the container's memory limit; under WSL, its setting memory=. A run that is refused more names a plan that pins less")
    return Check(name="pinned memory", status="ok", found=f"{size / GIB:.1f} GiB can be pinned", values={"tried_bytes": size})


def disk() -> Iterator[Check]:
    """Room for runs, for the cache of embeddings and for published models, and whether they can be written."""
    places = [("disk for runs", Path("runs"), LEAST_DISK_BYTES, "choose another directory: --out DIR")]
    try:
        places.append(("disk for the cache", cache_directory("embeddings"), LEAST_DISK_BYTES, "set XDG_CACHE_HOME"))
    except UsageError as e:
        yield Check(name="disk for the cache", status="problem", found=str(e), fix="set XDG_CACHE_HOME", exit_code=2)
    with contextlib.suppress(ImportError):
        from huggingface_hub.constants import HF_HUB_CACHE

        places.append(("disk for models", Path(HF_HUB_CACHE), LEAST_MODEL_BYTES, "set HF_HOME (--model DIR needs nothing there)"))
    for name, directory, least, elsewhere in places:
        try:
            there = nearest(directory.absolute())
            free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK) and there.is_dir()
        except OSError as e:  # a name that is too long, or one that may not be looked at
            yield Check(name=name, status="problem", found=f"{directory} cannot be looked at ({e.strerror})", exit_code=6, fix=elsewhere)
            continue
        values = {"path": str(there), "free_bytes": free, "writable": writable}
        if not writable:
            yield Check(name=name, status="warning" if name == "disk for models" else "problem", found=f"{there} cannot be written",
                        values=values, exit_code=6, fix=elsewhere)
        else:
            short = free < least
            yield Check(name=name, status="warning" if short else "ok", found=f"{free / GIB:.1f} GiB free in {there}", values=values,
                        fix=f"less than {least // GIB} GiB: make room there, or {elsewhere}" if short else "")


def link(card: Card) -> Check:
    """Bandwidth between host and card, measured with pinned memory."""
    import torch

    pinned = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    to_card = _COPIED_BYTES / _best_seconds(lambda: there.copy_(pinned, non_blocking=True), torch.cuda.synchronize)
    to_host = _COPIED_BYTES / _best_seconds(lambda: pinned.copy_(there, non_blocking=True), torch.cuda.synchronize)
    slow = to_card < LEAST_LINK_SHARE * card.host_link_bandwidth
    return Check(name="link", status="warning" if slow else "ok", found=f"{to_card / 1e9:.1f} GB/s to the card, {to_host / 1e9:.1f} back "
                 f"({card.host_link_bandwidth / 1e9:.0f} expected)",
                 values={"to_card_bytes_per_second": to_card, "to_host_bytes_per_second": to_host},
                 fix="the card may sit in a slot with fewer lanes, or share them; streaming blocks will cost more than planned" if slow else "")


def _best_seconds(work: Callable[[], object], wait: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def bundled_model() -> Check:
    """One prompt through the bundled model: text encoder, two denoising steps, decoder."""
    started = time.perf_counter()
    try:
        finite, shape = _generate_once()
    except Exception as e:  # whatever it is, it is what was asked for
        if exhausted(e) or card_lost(e) or driver_failed(e) or workaround(e):
            return _refused("bundled model", e)
        return Check(name="bundled model", status="problem", found=f"does not run ({type(e).__name__}: {first_line(e)})",
                     fix="git checkout trainer/shapes/pipeline, or train it anew: make pretrain", exit_code=getattr(e, "exit_code", 5))
    seconds = time.perf_counter() - started
    if not finite:
        return Check(name="bundled model", status="problem", found="its video holds NaN or infinity", exit_code=4,
                     fix="python run.py diagnose says where it begins; make pretrain trains it anew")
    frames, height, width = shape
    return Check(name="bundled model", status="ok", found=f"runs: {frames} frames of {width}x{height} in {seconds:.1f} s, two steps",
                 values={"seconds": seconds})


def _generate_once() -> tuple[bool, tuple[int, int, int]]:
    """(whether all values are finite, (frames, height, width)) of a video of two denoising steps."""
    import torch

    from memory.plan import MemoryPlan
    from trainer.assemble import assemble, embed_prompts, open_backbone
    from trainer.generate import generate_latents

    model = ModelConfig()
    backbone = open_backbone(model)
    prompt = "a red circle moving left"
    embeddings = embed_prompts(backbone, model, MemoryPlan(), [prompt])
    with assemble(backbone, model, MemoryPlan()) as assembly:
        latents = generate_latents(assembly.predict, backbone.scheduler(), embeddings.to(assembly.device), [prompt], [0],
                                   assembly.latent_shape, num_steps=2, guidance_scale=1.0)
    video = backbone.decoder(backbone.default_size()[0], dtype=assembly.dtype, device=assembly.device)(latents)[0]  # (3, T, H, W)
    return bool(torch.isfinite(video).all()), tuple(video.shape[1:])


def show(checks: list[Check], stream: TextIO, *, as_json: bool = False) -> None:
    """The checks as a table, with a fix under what needs one; or as JSON."""
    if as_json:
        healthy = all(check.status != "problem" for check in checks)
        print(json.dumps({"healthy": healthy, "checks": [asdict(check) for check in checks]}, indent=2), file=stream)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        fix = f"\n[bold]→ {escape(check.fix)}[/bold]" if check.fix else ""
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", check.name, escape(check.found) + fix)
    Console(file=stream, highlight=False, width=None if stream.isatty() else 10**4).print(table)


def raise_if_unfit(checks: list[Check]) -> None:
    """Unfit if there is a problem."""
    problems = [check for check in checks if check.status == "problem"]
    if problems:
        raise Unfit(problems)
