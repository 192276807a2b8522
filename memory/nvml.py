"""The card in this machine, as NVML knows it: with neither torch nor a context of CUDA's. Where NVML is not there, as in containers without the
driver's utilities, or does not tell, as of a card that shares the host's memory, as torch knows it."""

import os
from itertools import takewhile
from typing import Any, NamedTuple

BF16_SINCE = (8, 0)  # compute capability


class CardUnreadable(RuntimeError):
    """There is a card, but its driver does not answer."""


class Reading(NamedTuple):
    """What a card says of itself."""

    label: str
    capability: tuple[int, int]
    total_bytes: int
    others_bytes: int
    """Held by other processes."""
    integrated: bool = False
    """Whether its memory is the host's."""
    slot: tuple[int, int] | None = None
    """Generation and lanes of PCIe that it and where it sits have in common, if that is known."""
    rates: tuple[float, float] | None = None
    """FLOP/s without tensor cores at its highest clock and bytes/s of its memory, if they are known."""


def read_nvml(index: int) -> Reading | None:
    """Card `index`; None: no driver or no card.

    Raises: CardUnreadable, when there is a card but the driver does not answer for it.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no library: there is no card to plan for
        return None
    try:
        handle = _handle(pynvml, index)
        if handle is None:
            return None
        name = pynvml.nvmlDeviceGetName(handle)
        label = name.decode() if isinstance(name, bytes) else name
        # A slice's handle is not a card's; no card before Ampere can be split.
        capability = BF16_SINCE if " MIG " in label else tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        processes, slot, rates = _processes(pynvml, handle), _slot(pynvml, handle), _rates(pynvml, handle)
    except pynvml.NVMLError as error:
        raise CardUnreadable(f"card {index} does not answer ({error}); name it instead, e.g. --profile 4090") from error
    finally:
        pynvml.nvmlShutdown()
    ours = sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid())
    # What the driver reserves for itself is nobody's; `memory.cards` knows of it.
    others = max(0, memory.total - memory.free - memory.reserved - ours)
    return Reading(label, capability, memory.total, others, slot=slot, rates=rates)


def ask_driver(question: str) -> Any | None:
    """What a function of NVML that takes nothing says of this machine's driver; None: no driver, or it does not say."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        answer = getattr(pynvml, question)()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return answer


def driver_cuda() -> str | None:
    """The newest CUDA that this machine's driver supports, such as "12.4", if it says so."""
    version = ask_driver("nvmlSystemGetCudaDriverVersion_v2")
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def read_torch(index: int) -> Reading | None:
    """Card `index`, or None: no card that torch can use. Makes a context of CUDA's, which counts as held by others."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    card, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
    return Reading(card.name, (card.major, card.minor), total, max(0, total - free - torch.cuda.memory_reserved(index)), bool(card.is_integrated))


def _processes(pynvml: Any, handle: Any) -> list[Any]:
    """What runs on a card, as far as the driver says: under WSL and on some virtual cards it does not."""
    try:
        return pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return []


def _slot(pynvml: Any, handle: Any) -> tuple[int, int] | None:
    """As `Reading.slot`. What is the case now is less where the card saves power, and more where a virtual machine's port says less than there is."""
    try:
        return (max(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
                max(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle), pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)))
    except pynvml.NVMLError:
        return None


def _rates(pynvml: Any, handle: Any) -> tuple[float, float] | None:
    """As `Reading.rates`: each core multiplies and adds, and memory moves two bits a clock and wire."""
    try:
        cores, wires = pynvml.nvmlDeviceGetNumGpuCores(handle), pynvml.nvmlDeviceGetMemoryBusWidth(handle)
        core, memory = (pynvml.nvmlDeviceGetMaxClockInfo(handle, clock) for clock in (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM))  # MHz
    except pynvml.NVMLError:
        return None
    rates = 2e6 * cores * core, 2e6 * memory * wires / 8
    return rates if all(rates) else None


def _handle(pynvml: Any, index: int) -> Any | None:
    """NVML's handle of the card that is `index` to torch, if it sees one: NVML itself does not look at CUDA_VISIBLE_DEVICES."""
    count, names = pynvml.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = map(str, range(count)) if names is None else map(str.strip, names.split(","))
    # What is no card ends the list: with "" and "-1" there is none.
    visible = list(takewhile(lambda name: name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < count), listed))
    if index >= len(visible):
        return None
    name = visible[index]
    if name.isdigit():
        return _first_slice(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(name)))
    for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(count)):  # CUDA takes as much of a UUID as tells cards apart
        if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(name):
            return _first_slice(pynvml, handle)
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _first_slice(pynvml: Any, handle: Any) -> Any:
    """What CUDA takes of a card that is divided, where no slice is named; else the card. Not tried on one that is."""
    try:
        divided = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # it cannot be divided
        return handle
    return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0) if divided else handle
