"""Host memory within the limits of control groups."""

import pytest

from memory import host
from memory.cards import GIB
from memory.host import available_host_bytes, host_bytes, host_limit_bytes, machine_bytes

V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
UNLIMITED = {"": "max", "total_": 9223372036854771712}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 128 GiB with 100 left: function that adds a control group; `machine.lists(*lines)`: what the process is in."""
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_PROCESS", tmp_path / "process")
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "machine_bytes", lambda: 128 * GIB)
    (tmp_path / "meminfo").write_text(f"MemTotal: {128 << 20} kB\nMemAvailable: {100 << 20} kB\n")

    def group(path, files, limit, used, **stat):
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files[0]).write_text(f"{UNLIMITED[files[2]] if limit is None else limit * GIB}\n")
        (folder / files[1]).write_text(f"{used * GIB}\n")
        if stat:
            (folder / "memory.stat").write_text("".join(f"{files[2]}{name} {gib * GIB}\n" for name, gib in stat.items()))

    group.lists = lambda *lines: (tmp_path / "process").write_text("\n".join(lines) + "\n")
    return group


def test_page_cache_can_be_had_and_shared_memory_cannot(machine):
    machine.lists("0::/")
    machine("", V2, 64, 63, anon=2, file=61, shmem=7, inactive_file=50, active_file=4)
    assert available_host_bytes() == 55 * GIB


@pytest.mark.parametrize("inner, outer, left", [(None, 32, 22), (16, 64, 12), (48, 32, 22), (None, None, 100), (2, 64, 0)])
def test_the_limit_may_be_of_any_group_around(machine, inner, outer, left):
    machine.lists("0::/system.slice/slurmstepd.scope/job_7/step_0")
    machine("system.slice/slurmstepd.scope/job_7/step_0", V2, inner, 4)
    machine("system.slice/slurmstepd.scope/job_7", V2, outer, 10)
    assert available_host_bytes() == left * GIB
    assert host_limit_bytes() == min((limit * GIB for limit in (inner, outer) if limit), default=None)


def test_version_1_is_read_beside_others_and_its_unlimited_is_a_huge_number(machine):
    machine.lists("5:cpu,cpuacct:/user", "4:hugetlb,memory:/slurm/job_7", "0::/")
    machine("memory", V1, None, 90)
    machine("memory/slurm/job_7", V1, 32, 30, inactive_file=20)
    assert available_host_bytes() == 22 * GIB


@pytest.mark.parametrize("line, files, mount", [("0::/../docker/1f", V2, ""), ("4:memory:/docker/1f", V1, "memory")])
def test_a_container_that_sees_its_path_on_the_host_finds_its_own_group_at_the_root(machine, line, files, mount):
    machine.lists(line)
    machine(mount, files, 8, 5, inactive_file=1)
    assert available_host_bytes() == 4 * GIB


def test_what_says_nothing_is_no_limit(machine, tmp_path):
    machine.lists("", "0::/job", "")
    machine("job", V2, 32, 10)
    for name, content in (("memory.stat", "\nanon 7\n\n"), ("memory.current", ""), ("memory.max", "")):
        assert host_limit_bytes() == (None if (tmp_path / "groups" / "job" / "memory.current").read_text() == "" else 32 * GIB)
        (tmp_path / "groups" / "job" / name).write_text(content)
    assert host_limit_bytes() is None
    (tmp_path / "meminfo").write_text(f"MemTotal: {128 << 20} kB\n\n")  # of an old kernel
    assert available_host_bytes() == 128 * GIB


def test_without_control_groups_the_machine_is_the_limit(machine):
    assert available_host_bytes() == 100 * GIB


@pytest.mark.parametrize("limit, total", [(None, 128), (2, 2), (256, 128)])
def test_the_total_is_what_control_groups_allow(machine, limit, total):
    machine.lists("0::/job")
    machine("job", V2, limit, 1)
    assert host_bytes() == (total * GIB, min(100, total - 1) * GIB)
    assert host_limit_bytes() == (None if total == 128 else total * GIB)


def test_this_machines_is_known():
    total, available = host_bytes()
    assert 0 < available < total <= machine_bytes() < 1 << 50
