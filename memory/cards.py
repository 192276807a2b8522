"""Cards: a name, a size or what is in this machine -> capacity, rates, and the fixed costs of having a context.

Importable without torch. All figures are from `cards.toml`; those that no datasheet states are named in
`Card.assumed`. Rates are per second, sizes in bytes, one `G` of a rate is 1e9.
"""

import difflib
import math
import os
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from memory import environment
from memory.host import available_host_bytes, host_bytes
from memory.nvml import BF16_SINCE, CardUnreadable, Reading, read_nvml, read_torch

_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # GB/s one way that a generation of PCIe names
_REACHED = 0.79  # of that, by a pinned copy, as in cards.toml (assumed)
GIB = 1 << 30
_MIB = 1 << 20
_ASSUMED = (
    "usable_bytes",
    "context_bytes",
    "matmul_fraction",
    "attention_fraction",
    "attention_backward_fraction",
    "flash_fraction",
    "flash_backward_fraction",
    "memory_fraction",
    "host_link_bandwidth",
)
_OLD = {(7, 0): "volta", (7, 5): "turing"}  # those before that have tensor cores
_BOOST = 0.8  # of the highest clock that NVML names, what datasheets call boost (0.74 to 0.86; one and the same of cards for data centres)
_NO_TENSOR_CORES = re.compile(r"\bgtx\b|\bmx\d|\bt\d{3,4}\b")  # of Turing; those before Volta have none either
_BOOSTS = re.compile(rf"geforce|titan|quadro|\brtx\b|{_NO_TENSOR_CORES.pattern}")
_LAPTOP = re.compile(r"laptop|mobile|max-q design")  # fewer cores, less power and often less memory than the desktop's of that number
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)", re.IGNORECASE)


class UnknownCard(ValueError):
    """No card of that name; the message suggests the nearest."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One device as the planner sees it."""

    name: str
    """Key in cards.toml, or the size that was asked for."""
    label: str
    """The vendor's name."""
    architecture: str
    capacity_bytes: int
    """What the driver reports."""
    usable_bytes: int
    """What a process may get of it, its own context included, other processes' share not."""
    bf16: bool
    fp16: bool
    fp8: bool
    tensor_rate: float
    """Dense 16-bit multiply-adds with fp32 accumulation, FLOP/s."""
    fp32_rate: float
    """FLOP/s without tensor cores."""
    memory_bandwidth: float
    """Device memory, bytes/s."""
    host_link_bandwidth: float
    """What a pinned copy over the host link reaches, one way, bytes/s."""
    matmul_fraction: float
    """Share of `tensor_rate` that large matrix products reach; the nominal clock may be exceeded."""
    attention_fraction: float
    """Share of `tensor_rate` that the 16-bit attention which torch picks reaches on its way forward."""
    attention_backward_fraction: float
    """The same on its way back."""
    flash_fraction: float
    """Share that FlashAttention-2 reaches on its way forward: what torch picks unless it prefers cuDNN's."""
    flash_backward_fraction: float
    """The same on its way back."""
    memory_fraction: float
    """Share of `memory_bandwidth` that element-wise work and norms of a model reach, launches and uneven shapes included."""
    context_bytes: int
    """CUDA context: outside the allocator, inside the card."""
    cublas_workspace_bytes: int
    """What cuBLAS keeps of the caching allocator's memory in a process that trains."""
    source: str
    """Where the rates are from."""
    assumed: tuple[str, ...] = _ASSUMED
    """Fields that nobody measured and no datasheet states."""
    used_by_others_bytes: int = 0
    """Already held by other processes, and so not usable (`auto` only)."""
    host_bytes: int | None = None
    """Host memory available; None where nobody said (a card by name)."""
    unified: bool = False
    """Whether it shares the host's memory, so that nothing is gained by moving anything there."""

    @property
    def is_cpu(self) -> bool:
        return self.architecture == "cpu"

    def supports(self, dtype: str) -> bool:
        """Whether kernels for `dtype` ("float32", "bfloat16", "float16", "float8") run natively."""
        return {"float32": True, "bfloat16": self.bf16, "float16": self.fp16, "float8": self.fp8}[dtype]

    @property
    def available_bytes(self) -> int:
        """What the caching allocator may reserve: usable, less the context. Negative: not even that fits."""
        return self.usable_bytes - self.context_bytes


def card_names() -> list[str]:
    """Names that `lookup` knows, in the file's order."""
    return list(_table()["cards"])


def lookup(profile: str) -> Card:
    """The card for `profile`: a name ("4090", "RTX 3060", "a100-80gb"), any size ("8gb"), or "auto".

    Raises: UnknownCard, with the nearest names.
    """
    text = profile.strip().lower()
    if text == "auto":
        return detect()
    if text == "cpu":
        return _cpu()
    size = _SIZE.fullmatch(text)
    if size:
        return _of_size(float(size[1]))
    keys = {_squash(name): name for name in card_names()}
    wanted = _squash(text)
    if wanted in keys:
        return _named(keys[wanted])
    # "a100" or "v100" name a family: take its smallest member.
    family = [name for key, name in keys.items() if wanted and re.fullmatch(re.escape(wanted) + r"\d+gb", key)]
    if family:
        return _named(min(family, key=lambda name: _table()["cards"][name]["mib"]))
    if re.fullmatch(r"\d{1,3}", text):
        raise UnknownCard(f"unknown card {profile!r}; did you mean {text}gb, a size?")
    alike = difflib.get_close_matches(wanted, keys, n=10, cutoff=0.4)
    # A name begins with what matters: of "4090ti" the 4090 is nearer than the 4070ti, whatever letters are alike.
    alike.sort(key=lambda key: (-len(os.path.commonprefix([wanted, key])), not wanted.startswith(key)))
    near = [keys[key] for key in alike[:3]]
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(card_names())}."
    raise UnknownCard(f"unknown card {profile!r}; {hint} A size (24gb) or auto works too.")


def size_bytes(text: str) -> int | None:
    """Bytes of a size such as "64gb" (of 2**30); None if it is none."""
    size = _SIZE.fullmatch(text.strip())
    num_bytes = float(size[1]) * GIB if size else math.inf
    return int(num_bytes) if num_bytes < 2**63 else None


def size_text(num_bytes: float) -> str:
    """Bytes for a message, in GiB or MiB."""
    scale, unit = size_unit(num_bytes)
    return f"{num_bytes / scale:.2f} {unit}"


def size_unit(num_bytes: float) -> tuple[int, str]:
    """(bytes, name) of the unit in which memory of that size is read best."""
    return (GIB, "GiB") if num_bytes >= GIB // 10 else (_MIB, "MiB")


def detect(index: int = 0) -> Card:
    """The card in this machine, with what other processes hold now; the host itself if there is none. Raises CardUnreadable."""
    reading, own_context = _reading(index)
    if reading is None:
        return _cpu()
    card, available = _of_reading(reading), available_host_bytes()
    usable, others = _usable(reading.total_bytes), max(0, reading.others_bytes - own_context * card.context_bytes)
    if unified := card.unified or reading.integrated:  # what others hold the host knows, who can do without its cached files
        usable, others = min(usable, available), 0
    return replace(card, capacity_bytes=reading.total_bytes, usable_bytes=max(0, usable - others), used_by_others_bytes=others, host_bytes=available,
                   unified=unified, host_link_bandwidth=min(card.host_link_bandwidth, _slot_bandwidth(card, reading.slot)))


def _slot_bandwidth(card: Card, slot: tuple[int, int] | None) -> float:
    """What a pinned copy reaches over PCIe of that generation and so many lanes; no limit where neither is known, or the link is another."""
    links, (generation, lanes) = _table()["links"], slot or (0, 0)
    if card.host_link_bandwidth > links["pcie5-x16"]["effective"] * 1e9 or generation not in _LANE or lanes < 1:
        return math.inf
    known = links.get(f"pcie{generation}-x{lanes}")
    return 1e9 * (known["effective"] if known else _REACHED * _LANE[generation] * lanes)


def _reading(index: int) -> tuple[Reading | None, bool]:
    """What is known of card `index`, and whether a context of this process is in it."""
    try:
        if reading := read_nvml(index):
            return reading, False
    except CardUnreadable:
        if (reading := read_torch(index)) is None:
            raise
        return reading, True
    return read_torch(index), True


@cache
def _table() -> dict:
    return tomllib.loads((Path(__file__).parent / "cards.toml").read_text())


def _squash(name: str) -> str:
    """Spelling that compares: "GeForce RTX 4090" and "4090" and "rtx-4090" are one."""
    return re.sub(r"geforce|nvidia|tesla|rtx|gpu|[^a-z0-9]", "", name.lower())


def _usable(capacity_bytes: int) -> int:
    """What `cudaMemGetInfo` calls total is less than the driver's figure: about 0.3 GiB and 0.3 % (assumed)."""
    return int(capacity_bytes * 0.997) - int(0.3 * GIB)


def _named(name: str) -> Card:
    return _of_row(name, _table()["cards"][name])


def _of_row(name: str, row: dict[str, Any]) -> Card:
    kind = _table()["architectures"][row["architecture"]]
    link = _table()["links"][row["link"]]
    capacity = row["mib"] * _MIB
    return Card(
        name=name,
        label=row["label"],
        architecture=row["architecture"],
        capacity_bytes=capacity,
        usable_bytes=_usable(capacity),
        bf16=kind["bf16"],
        fp16=kind["fp16"],
        fp8=kind["fp8"],
        tensor_rate=row["tensor"] * 1e12,
        fp32_rate=row["fp32"] * 1e12,
        memory_bandwidth=row["bandwidth"] * 1e9,
        host_link_bandwidth=link["effective"] * 1e9,
        matmul_fraction=row.get("matmul", kind["matmul"]),
        attention_fraction=kind.get("cudnn", kind["flash"]),
        attention_backward_fraction=kind.get("cudnn_backward", kind["flash_backward"]),
        flash_fraction=kind["flash"],
        flash_backward_fraction=kind["flash_backward"],
        memory_fraction=_table()["element_wise"],
        context_bytes=kind["context_mib"] * _MIB,
        cublas_workspace_bytes=environment.cublas_workspace_bytes(kind["cublas_kib"]),
        source=row["source"],
        assumed=_assumed_of(row, kind, link),
        unified=row.get("unified", False),
    )


def _assumed_of(row: dict[str, Any], kind: dict[str, Any], link: dict[str, Any]) -> tuple[str, ...]:
    way = "cudnn" if "cudnn" in kind else "flash"
    sources = {"context_bytes": "context_mib", "memory_fraction": "element_wise", "flash_fraction": "flash", "flash_backward_fraction": "flash_backward",
               "attention_fraction": way, "attention_backward_fraction": f"{way}_backward"}
    known = {field for field, key in sources.items() if key in kind.get("known", ())}
    told = {"matmul_fraction": "matmul" in row, "host_link_bandwidth": link.get("measured", False)}
    return tuple(field for field in _ASSUMED if field not in known and not told.get(field))


def _of_size(gib: float, label: str | None = None, table: str = "typical") -> Card:
    """A card that is known by its size; `table`, of cards.toml, says whose rates it has."""
    typical = [name for limit, name in _table()[table].items() if 0 < gib <= int(limit)]
    if not typical:
        raise UnknownCard(f"a card of {gib:g} GiB does not exist; try 8gb.")
    model = _named(typical[0])
    capacity = int(gib * GIB)
    return replace(
        model,
        name=f"{gib:g}gb",
        label=f"{label or f'{gib:g} GB'} (assumed rates of {model.label})",
        capacity_bytes=capacity,
        usable_bytes=_usable(capacity),
        assumed=_ASSUMED + ("tensor_rate", "fp32_rate", "memory_bandwidth"),
    )


def _of_reading(reading: Reading) -> Card:
    """The listed card that NVML's name means; where the name is not listed, one of that size and generation with what NVML knows of its rates."""
    label, capability, total_bytes = reading[:3]
    whole, _, profile = label.lower().partition(" mig ")
    words = [word for word in re.split(r"[^a-z0-9]+", whole) if _squash(word)]
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    rows = _table()["cards"]
    bases = {name: _squash(re.sub(r"-\d+gb$", "", name)) for name in rows}
    old = capability < BF16_SINCE
    # By its name alone, a TITAN V or a TITAN Xp would be a TITAN RTX.
    found = [name for name in rows if bases[name] in runs and name.endswith("-laptop") == bool(_LAPTOP.search(whole))
             and (not old or rows[name]["architecture"] == _OLD.get(capability))]
    if found:
        # Of a slice, the memory says nothing of the card's, but the name does where there are two.
        size = re.search(r"(\d+)gb", whole) if profile else None
        mib = int(size[1]) * 1024 if size else total_bytes / _MIB
        # "RTX 4070 Ti SUPER" also contains "4070": the longest name wins, then the nearest size.
        card = replace(_named(min(found, key=lambda name: (-len(bases[name]), abs(rows[name]["mib"] - mib)))), label=label)
        return _slice(card, profile, total_bytes) if profile else card
    gib = round(total_bytes / GIB) or total_bytes / GIB
    if reading.rates and (alike := _table()["alike"].get("{}.{}".format(*capability))):
        card = _computed(f"{gib:g}gb", label, alike["geforce" if "geforce" in whole else "other"], *reading.rates)
    else:
        card = _of_size(gib, label, "typical_old" if old else "typical")
    without = capability < min(_OLD) or capability == (7, 5) and _NO_TENSOR_CORES.search(whole)
    return replace(card, tensor_rate=card.fp32_rate) if without else card


def _computed(name: str, label: str, alike: str, highest_rate: float, bandwidth: float) -> Card:
    """A card whose name is not listed, of the kind of a listed one, with the rates that follow from its cores, clocks and memory bus."""
    row = _table()["cards"][alike]
    fp32 = highest_rate * (_BOOST if _BOOSTS.search(label.lower()) else 1) / 1e12
    row = {key: row[key] for key in ("architecture", "link", "mib")} | {
        "label": f"{label} (rates computed from its cores and clocks)", "source": "computed from what its driver says of cores, clocks and memory bus",
        "tensor": fp32 * row["tensor"] / row["fp32"], "fp32": fp32, "bandwidth": bandwidth / 1e9}
    card = _of_row(name, row)
    return replace(card, assumed=(*card.assumed, "tensor_rate", "fp32_rate"))


def _slice(card: Card, profile: str, total_bytes: int) -> Card:
    """A MIG slice: "2g.10gb" computes with 2 of the card's 7 parts (an A30's 4), "1c.2g.10gb" with 1; bandwidth goes with memory."""
    share = int(profile[0]) / (4 if card.name == "a30" else 7)
    return replace(card, tensor_rate=card.tensor_rate * share, fp32_rate=card.fp32_rate * share,
                   memory_bandwidth=card.memory_bandwidth * min(1, total_bytes / card.capacity_bytes))


def _cpu() -> Card:
    total, available = host_bytes()
    return Card(
        name="cpu",
        label="this machine's CPU",
        architecture="cpu",
        capacity_bytes=total,
        usable_bytes=available,
        bf16=True,
        fp16=True,
        fp8=False,
        tensor_rate=1e11,
        fp32_rate=1e11,
        memory_bandwidth=2e10,
        host_link_bandwidth=1e10,
        matmul_fraction=0.5,
        attention_fraction=0.3,
        attention_backward_fraction=0.3,
        flash_fraction=0.3,
        flash_backward_fraction=0.3,
        memory_fraction=0.5,
        context_bytes=0,
        cublas_workspace_bytes=0,
        source="assumed; plans for a CPU are for trying things out",
        assumed=_ASSUMED + ("tensor_rate", "fp32_rate", "memory_bandwidth"),
        host_bytes=available,
        unified=True,
    )
