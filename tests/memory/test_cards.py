"""The card table and how a profile finds its card."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from memory import cards
from memory.cards import GIB, UnknownCard, card_names, detect, lookup
from memory.nvml import CardUnreadable, Reading, driver_cuda


@pytest.fixture(autouse=True)
def _all_cards_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_table_is_complete_and_plausible():
    assert len(card_names()) >= 30
    for name in card_names():
        card = lookup(name)
        assert card.name == name and card.label and card.source
        assert 5 * GIB < card.available_bytes < card.usable_bytes < card.capacity_bytes < 200 * GIB
        assert 2e13 < card.tensor_rate < 3e15, name
        assert 5e12 < card.fp32_rate <= card.tensor_rate / 1.9, name  # tensor cores at least double fp32
        assert 2e11 < card.memory_bandwidth < 1e13
        assert 1e10 < card.host_link_bandwidth < 4e11
        assert 0 < card.flash_backward_fraction < card.flash_fraction <= card.attention_fraction <= 1 and 0.5 < card.matmul_fraction < 1.2
        assert (card.attention_fraction > card.flash_fraction) == (card.architecture in ("hopper", "hopper-cut", "blackwell-sxm")), name
        assert card.flash_backward_fraction <= card.attention_backward_fraction <= 1
        assert card.supports("float32") and card.fp16
        assert card.bf16 or card.architecture in ("turing", "volta")
        assert "usable_bytes" in card.assumed and ("context_bytes" in card.assumed) == (card.architecture != "hopper"), name


def test_tensor_rates_are_what_their_generation_makes_of_the_fp32_rate():
    """Since Ampere, GeForce cards multiply with fp32 accumulation at half the rate of workstation cards of the same chip."""
    times = {"ampere": 2, "ada": 2, "blackwell": 2, "ampere-pro": 4, "ada-pro": 4, "blackwell-pro": 4}
    for card in map(lookup, set(card_names()) - {"a30", "a10g"}):  # the A100's kind of chip; one that is cut
        if card.architecture in times:
            assert card.tensor_rate / card.fp32_rate == pytest.approx(times[card.architecture], rel=0.015), card.name


@pytest.mark.parametrize(
    "profile, name",
    [
        ("4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("GeForce RTX 4090", "rtx-4090"),
        (" rtx-4090 ", "rtx-4090"),
        ("4090-48gb", "rtx-4090-48gb"),
        ("4090d", "rtx-4090-d"),
        ("4090 laptop", "rtx-4090-laptop"),
        ("NVIDIA GeForce RTX 3070 Ti Laptop GPU", "rtx-3070ti-laptop"),
        ("A100", "a100-40gb"),
        ("a100-80gb", "a100-80gb"),
        ("v100", "v100-16gb"),
        ("H20", "h20"),
        ("h200", "h200"),
        ("6000 ada", "rtx-6000-ada"),
    ],
)
def test_names_are_found_however_they_are_spelt(profile, name):
    assert lookup(profile).name == name


@pytest.mark.parametrize("size, gib", [("2gb", 2), ("24gb", 24), ("24 GB", 24), ("7.5gib", 7.5), ("96g", 96), ("500gb", 500)])
def test_any_size_is_a_card(size, gib):
    card = lookup(size)
    assert card.capacity_bytes == int(gib * GIB)
    assert 0 < card.available_bytes < card.capacity_bytes
    assert {"tensor_rate", "matmul_fraction"} <= set(card.assumed)


@pytest.mark.parametrize("profile, suggestion", [("4009", "rtx-4090"), ("h2000", "h200"), ("rtx 3060 tj", "rtx-3060ti")])
def test_unknown_names_suggest_the_nearest(profile, suggestion):
    with pytest.raises(UnknownCard, match=f"did you mean .*{suggestion}"):
        lookup(profile)


@pytest.mark.parametrize("profile, first", [("4090ti", "rtx-4090"), ("4090-24gb", "rtx-4090"), ("h200nvl", "h200"),
                                            ("4060ti-8gb", "rtx-4060ti"), ("a100-40", "a100-40gb"),
                                            ("rtx 4070 tis", "rtx-4070ti-super"), ("rxt4090", "rtx-4090"), ("4009", "rtx-4090")])
def test_of_names_that_are_alike_the_one_that_begins_alike_comes_first(profile, first):
    with pytest.raises(UnknownCard, match=f"did you mean {first}, "):
        lookup(profile)


@pytest.mark.parametrize("profile", ["", "zzzzzzzzz", "0gb", "-5gb", "100000000gb"])
def test_nonsense_is_refused(profile):
    with pytest.raises(UnknownCard):
        lookup(profile)


@pytest.mark.parametrize(
    "label, mib, name",
    [
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", 49140, "rtx-4090-48gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx-4070ti-super"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060ti-16gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A10G", 23028, "a10g"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA H20", 97871, "h20"),
        ("NVIDIA H200", 143771, "h200"),
        ("Tesla V100-SXM2-32GB", 32768, "v100-32gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "rtx-pro-6000"),
        ("NVIDIA GeForce RTX 2070 SUPER", 8192, "rtx-2070-super"),
        ("NVIDIA GeForce RTX 2080 Ti", 11264, "rtx-2080ti"),
        ("NVIDIA RTX PRO 4000 Blackwell", 24467, "rtx-pro-4000"),
        ("NVIDIA RTX 4500 Ada Generation", 24570, "rtx-4500-ada"),
        ("NVIDIA TITAN RTX", 24576, "titan-rtx"),
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA Something New", 36000, "35gb"),
    ],
)
def test_the_card_in_the_machine_is_recognised(monkeypatch, label, mib, name):
    capability = {"turing": (7, 5), "volta": (7, 0)}.get(lookup(name).architecture, (8, 6))
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading(label, capability, mib << 20, 3 * GIB))
    card = lookup("auto")
    assert card.name == name
    assert card.label.startswith(label) and card.capacity_bytes == mib << 20
    assert card.used_by_others_bytes == 3 * GIB
    assert card.available_bytes == card.usable_bytes - card.context_bytes and card.usable_bytes + 3 * GIB < mib << 20
    assert card.host_bytes > 0


@pytest.mark.parametrize("label, capability, mib, rates_of", [
    ("Quadro RTX 4000", (7, 5), 8192, "rtx-2060"), ("Quadro RTX 5000", (7, 5), 16384, "rtx-2080ti"),
    ("Quadro RTX 8000", (7, 5), 49152, "titan-rtx"), ("NVIDIA TITAN V", (7, 0), 12288, "rtx-2080ti"),
    ("NVIDIA TITAN Xp", (6, 1), 12288, "rtx-2080ti"), ("Tesla P40", (6, 1), 24576, "titan-rtx")])
def test_a_card_from_before_ampere_has_no_bf16_whatever_its_size(monkeypatch, label, capability, mib, rates_of):
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading(label, capability, mib << 20, 0))
    card, rates = detect(), lookup(rates_of)
    assert card.fp16 and not card.bf16 and not card.fp8 and card.name not in card_names() and card.capacity_bytes == mib << 20
    assert card.memory_bandwidth == rates.memory_bandwidth and card.label == f"{label} (assumed rates of {rates.label})"
    assert card.tensor_rate == (rates.tensor_rate if capability >= (7, 0) else rates.fp32_rate)


@pytest.mark.parametrize("name, label, capability, cores, clock, memory_clock, wires", [  # clocks as nvidia-smi -q names them of these cards
    ("rtx-4090", "NVIDIA GeForce RTX", (8, 9), 16384, 3105, 10501, 384), ("rtx-3090", "NVIDIA GeForce RTX", (8, 6), 10496, 2100, 9751, 384),
    ("rtx-6000-ada", "NVIDIA RTX", (8, 9), 18176, 3105, 10001, 384), ("rtx-a4000", "NVIDIA RTX", (8, 6), 6144, 2100, 7001, 256),
    ("t4", "Tesla", (7, 5), 2560, 1590, 5001, 256), ("v100-16gb", "Tesla", (7, 0), 5120, 1530, 877, 4096)])
def test_rates_of_a_card_that_is_not_listed_follow_from_its_cores_clocks_and_bus(monkeypatch, name, label, capability, cores, clock, memory_clock, wires):
    listed, info = lookup(name), SimpleNamespace(total=21 * GIB, reserved=0, free=21 * GIB)
    nvml = fake_nvml(nvmlDeviceGetName=lambda handle: f"{label} of tomorrow", nvmlDeviceGetCudaComputeCapability=lambda handle: capability,
                     nvmlDeviceGetMemoryInfo=lambda handle, version: info,
                     nvmlDeviceGetNumGpuCores=lambda handle: cores, nvmlDeviceGetMemoryBusWidth=lambda handle: wires,
                     nvmlDeviceGetMaxClockInfo=lambda handle, kind: {1: clock, 2: memory_clock}[kind])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    card = detect()
    assert card.name == "21gb" and card.label == f"{label} of tomorrow (rates computed from its cores and clocks)"
    assert card.capacity_bytes == 21 * GIB and card.architecture == listed.architecture
    assert (card.fp32_rate, card.tensor_rate) == (pytest.approx(listed.fp32_rate, rel=0.08), pytest.approx(listed.tensor_rate, rel=0.08))
    assert card.memory_bandwidth == pytest.approx(listed.memory_bandwidth, rel=0.005)
    assert {"tensor_rate", "fp32_rate", "matmul_fraction"} <= set(card.assumed) and "memory_bandwidth" not in card.assumed
    nvml.nvmlDeviceGetNumGpuCores = lambda handle: 0  # the driver does not know
    assert "(assumed rates of " in detect().label


@pytest.mark.parametrize("rates", [(5.4e12, 288e9), None])
@pytest.mark.parametrize("label, has", [("NVIDIA GeForce GTX 1660 Ti", False), ("NVIDIA T1000 8GB", False), ("Quadro T2000", False),
                                        ("NVIDIA GeForce MX450", False), ("Quadro RTX 4000", True), ("Tesla T40", True)])
def test_turing_without_tensor_cores_has_the_rate_of_its_other_cores(monkeypatch, label, has, rates):
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading(label, (7, 5), 8 * GIB, 0, rates=rates))
    card = detect()
    assert card.name == "8gb" and (card.tensor_rate > card.fp32_rate) == has
    assert rates is None or has or card.tensor_rate == pytest.approx(0.8 * rates[0])


def test_every_kind_of_card_that_is_not_listed_is_like_one_that_is():
    for capability, alike in cards._table()["alike"].items():
        old = tuple(map(int, capability.split("."))) < (8, 0)
        assert [lookup(name).bf16 for name in alike.values()] == [not old, not old]


@pytest.mark.parametrize("label, mib, name, compute, memory", [
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9728, "a100-80gb", 1 / 7, 0.11875),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096, "a100-40gb", 3 / 7, 0.490625),
    ("NVIDIA H100 80GB HBM3 MIG 1c.7g.80gb", 81559, "h100", 1 / 7, 1), ("NVIDIA A30 MIG 2g.12gb", 12032, "a30", 2 / 4, 0.48958)])
def test_a_slice_has_its_share_of_the_cards_rates(monkeypatch, label, mib, name, compute, memory):
    info = SimpleNamespace(total=mib << 20, reserved=0, free=mib << 20)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetName=lambda handle: label,
                                                         nvmlDeviceGetMemoryInfo=lambda handle, version: info))
    card, whole = detect(), lookup(name)
    assert card.name == name and card.label == label and card.capacity_bytes == mib << 20
    assert card.tensor_rate / whole.tensor_rate == card.fp32_rate / whole.fp32_rate == pytest.approx(compute)
    assert card.memory_bandwidth / whole.memory_bandwidth == pytest.approx(memory, rel=1e-4)


@pytest.mark.parametrize("visible", [None, "0", "GPU-8932f930"])
@pytest.mark.parametrize("divided", [True, False])
def test_of_a_divided_card_the_first_slice_is_taken_unless_another_is_named(monkeypatch, visible, divided):
    nvml = fake_nvml(nvmlDeviceGetMigMode=lambda handle: [divided, 1], nvmlDeviceGetMigDeviceHandleByIndex=lambda handle, index: f"slice {index}",
                     nvmlDeviceGetName=lambda handle: "NVIDIA A30 MIG 2g.12gb" if handle == "slice 0" else "NVIDIA A30")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (" MIG " in detect().label) == divided


def test_what_others_hold_may_be_more_than_is_usable(monkeypatch):
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading("NVIDIA GeForce RTX 4090", (8, 9), 24564 << 20, 24564 << 20))
    assert detect().usable_bytes == 0 and detect().available_bytes < 0


@pytest.mark.parametrize("label, mib, name", [
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "rtx-4090-laptop"), ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", 16384, "rtx-3080ti-laptop"),
    ("NVIDIA GeForce RTX 3080 Laptop GPU", 8192, "rtx-3080-laptop"), ("NVIDIA GeForce RTX 4050 Laptop GPU", 6141, "6gb"),
    ("NVIDIA GeForce RTX 3080 with Max-Q Design", 8192, "8gb")])
def test_a_laptops_card_is_not_the_desktops(monkeypatch, label, mib, name):
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading(label, (8, 9), mib << 20, 0))
    card = detect()
    assert card.name == name and card.label.startswith(label) and card.capacity_bytes == mib << 20
    assert ("(assumed rates of" in card.label) == ("tensor_rate" in card.assumed) == name.endswith("gb")
    assert card.tensor_rate < lookup("4090").tensor_rate / 2


def test_a_card_of_less_than_half_a_gib_is_one_that_holds_nothing(monkeypatch):
    monkeypatch.setattr(cards, "read_nvml", lambda index: Reading("NVIDIA GeForce GT 710", (3, 5), 256 << 20, 0))
    card = lookup("auto")
    assert card.name == "0.25gb" and card.capacity_bytes == 256 << 20 and card.available_bytes < 0


def test_without_a_card_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(cards, "read_nvml", lambda index: None)
    card = detect()
    assert card.is_cpu and card.context_bytes == 0
    assert 0 < card.available_bytes <= card.capacity_bytes


class FakeNvml(SimpleNamespace):
    class NVMLError(Exception):
        pass


def fake_nvml(**overrides):
    nvml = FakeNvml(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA H20",
        nvmlDeviceGetCudaComputeCapability=lambda handle: [9, 0],
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUUID=lambda handle: f"GPU-8932f93{handle}-d72c",
        nvmlMemory_v2=2,
        NVML_DEVICE_MIG_ENABLE=1,
        nvmlDeviceGetMigMode=raising,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlDeviceGetNumGpuCores=raising,
        nvmlDeviceGetMaxPcieLinkGeneration=raising,
        nvmlDeviceGetMaxPcieLinkWidth=raising,
        nvmlDeviceGetCurrPcieLinkGeneration=lambda handle: 1,  # it saves power
        nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 1,
        nvmlDeviceGetMemoryInfo=lambda handle, version: SimpleNamespace(total=96 * GIB, reserved=GIB, free=85 * GIB),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=4 * GIB),
            SimpleNamespace(pid=-1, usedGpuMemory=None),
        ],
    )
    vars(nvml).update(overrides)
    return nvml


def raising(*args, **more):
    raise FakeNvml.NVMLError("gone")


def test_what_this_process_holds_is_not_counted_against_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    card = detect()
    assert card.name == "h20" and card.used_by_others_bytes == 6 * GIB  # of 96, 85 are free, 1 the driver's, 4 ours


def test_a_driver_that_does_not_list_processes_is_no_reason_to_refuse_its_card(monkeypatch):
    """As under WSL: what this process holds cannot be told from what others do."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetComputeRunningProcesses=raising))
    card = detect()
    assert card.name == "h20" and card.used_by_others_bytes == 10 * GIB


@pytest.mark.parametrize("visible, index, handle", [
    (None, 1, 1), ("2", 0, 2), ("3,1", 1, 1), ("0, GPU-5ebe", 1, "GPU-5ebe"), ("GPU-8932f932", 0, 2), ("MIG-1/2/0", 0, "MIG-1/2/0")])
def test_the_card_asked_is_the_one_that_torch_takes(monkeypatch, visible, index, handle):
    asked = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=lambda: 4,
                                                         nvmlDeviceGetName=lambda handle: asked.append(handle) or "NVIDIA H20"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect(index).name == "h20" and asked == [handle]


@pytest.mark.parametrize("visible, index", [("", 0), ("-1", 0), ("NoDevFiles", 0), ("4", 0), ("2", 1), ("1,-1,2", 1), (None, 4)])
def test_where_torch_sees_no_card_a_run_is_planned_for_the_cpu(monkeypatch, visible, index):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=lambda: 4))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(torch.cuda._parse_visible_devices()) <= index or visible == "4"  # which torch compares with what is there
    assert detect(index).is_cpu


def test_no_driver_means_no_card(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=raising))
    assert detect().is_cpu


@pytest.mark.parametrize("nvml, newest", [(fake_nvml(nvmlSystemGetCudaDriverVersion_v2=lambda: 12040), "12.4"), (fake_nvml(nvmlInit=raising), None),
                                          (fake_nvml(nvmlSystemGetCudaDriverVersion_v2=raising), None), (None, None)])
def test_the_newest_cuda_that_a_driver_supports(monkeypatch, nvml, newest):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver_cuda() == newest


def test_a_card_that_does_not_answer_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=raising))
    with pytest.raises(CardUnreadable, match="--profile"):
        detect()


@pytest.mark.parametrize("label, generation, lanes, rate", [
    ("RTX 4090", 4, 16, 24.9), ("RTX 4090", 3, 16, 12.4), ("RTX 4090", 4, 8, 12.4), ("RTX 4090", 3, 4, 0.79 * 0.985 * 4), ("RTX 4090", 1, 1, 0.79 * 0.25),
    ("RTX 4090", 2, 1, 0.79 * 0.5), ("RTX 4090", 4, 4, 0.79 * 1.969 * 4), ("RTX 4090", 5, 16, 24.9), ("H20", 5, 16, 54.0), ("H20", 4, 16, 24.9),
    ("H20", 5, 4, 0.79 * 3.938 * 4), ("H20", 6, 4, 0.79 * 7.563 * 4), ("GH200 480GB", 5, 16, 340.0)])
def test_a_slot_may_be_slower_than_its_card(monkeypatch, label, generation, lanes, rate):
    """A riser, a slot of an older board, a box beside the computer. A link that is not PCIe has none of it."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetName=lambda handle: f"NVIDIA {label}",
                        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: generation, nvmlDeviceGetMaxPcieLinkWidth=lambda handle: lanes))
    assert detect().host_link_bandwidth == pytest.approx(rate * 1e9)


@pytest.mark.parametrize("says", [raising, lambda handle: 0], ids=["nothing", "zero"])
def test_a_slot_of_which_no_driver_speaks_is_no_limit(monkeypatch, says):
    names = ("nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth", "nvmlDeviceGetCurrPcieLinkWidth")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**dict.fromkeys(names, says)))
    assert detect().host_link_bandwidth == lookup("h20").host_link_bandwidth


def test_what_a_slot_does_now_is_believed_before_what_it_may(monkeypatch):
    """As where a virtual machine's port is said to be of the first generation."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 1, nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 1,
        nvmlDeviceGetCurrPcieLinkGeneration=lambda handle: 5, nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 16))
    assert detect().host_link_bandwidth == lookup("h20").host_link_bandwidth


@pytest.fixture
def torchs_card(monkeypatch):
    """A card that torch can use, of which 3 of 20 GiB are held, 1 of them by this process."""
    def make(name="NVIDIA GeForce RTX 4090", integrated=0):
        properties = SimpleNamespace(name=name, major=8, minor=9, is_integrated=integrated)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (17 * GIB, 20 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: GIB)

    return make


@pytest.mark.parametrize("nvml", [None, {"nvmlInit": raising}, {"nvmlDeviceGetMemoryInfo": raising}], ids=["not installed", "no library", "not supported"])
def test_where_nvml_does_not_tell_torch_does(monkeypatch, torchs_card, nvml):
    """As in containers without the driver's utilities; of memory that card and host share NVML says that it is not supported."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml and fake_nvml(**nvml))
    torchs_card()
    card, named = detect(), lookup("4090")
    assert (card.name, card.capacity_bytes, card.unified) == ("rtx-4090", 20 * GIB, False)
    assert card.used_by_others_bytes == 2 * GIB - named.context_bytes  # this process' context is in it


def test_a_card_that_torch_does_not_see_either_is_none(monkeypatch, torchs_card):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    torchs_card()
    assert detect(1).is_cpu and not detect(0).is_cpu
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    assert detect(0).is_cpu


@pytest.mark.parametrize("name, integrated", [("NVIDIA GB10", 1), ("Orin", 1), ("NVIDIA GB10", 0)])
def test_a_card_that_shares_the_hosts_memory_has_what_is_available_there(monkeypatch, torchs_card, name, integrated):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=raising))
    monkeypatch.setattr(cards, "available_host_bytes", lambda: 12 * GIB)
    torchs_card(name, integrated)
    card = detect()
    assert card.unified and card.usable_bytes == card.host_bytes == 12 * GIB and card.used_by_others_bytes == 0 and not card.is_cpu
    assert (card.name == "gb10") == (name == "NVIDIA GB10")


def test_cards_do_not_import_torch():
    program = "import sys, memory.cards; memory.cards.lookup('4090'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
