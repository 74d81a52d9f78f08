"""support/machine.py: limits of a faked machine, amounts of memory, and this process."""

import resource
import types

import numpy as np
import psutil
import pytest
import torch

from support import machine
from support.machine import free_memory, parse_bytes

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A machine with 8000 bytes available, no cgroup files and no rlimits; fields to change."""
    fake = types.SimpleNamespace(
        available=8000, rlimits={}, used={"vms": 300, "data": 200}, root=tmp_path / "cgroup"
    )
    fake.proc = tmp_path / "proc_cgroup"

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def getrlimit(limit):
        return fake.rlimits.get(limit, resource.RLIM_INFINITY), resource.RLIM_INFINITY

    def process():
        return types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(**fake.used))

    fake.write = write
    monkeypatch.setattr(machine, "PROC_CGROUP", fake.proc)
    monkeypatch.setattr(machine, "CGROUP_ROOT", fake.root)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: types.SimpleNamespace(available=fake.available)
    )
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    return fake


def test_free_memory_of_this_machine():
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


def test_free_memory_without_limits(fake):
    assert free_memory(CPU) == 8000


def test_free_memory_of_a_gpu_is_what_its_driver_says(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5000, 9000))
    assert free_memory(torch.device("cuda")) == 5000


@pytest.mark.parametrize("folder", ["a/b", "a", ""])
def test_cgroup_v2_limit_at_any_level_binds(fake, folder):
    fake.proc.write_text("0::/a/b\n")
    for level in ("a/b", "a", ""):
        fake.write(fake.root / level / "memory.max", "max\n")
        fake.write(fake.root / level / "memory.current", "900\n")
    fake.write(fake.root / folder / "memory.max", "3000\n")
    assert free_memory(CPU) == 2100
    fake.write(fake.root / folder / "memory.stat", "inactive_anon 7\ninactive_file 400\n")
    assert free_memory(CPU) == 2500  # page cache can be reclaimed


@pytest.mark.parametrize("folder", ["docker/x", ""])  # "" is what a container sees
def test_cgroup_v1_limit(fake, folder):
    fake.proc.write_text("9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n")
    group = fake.root / "memory" / folder
    fake.write(group / "memory.limit_in_bytes", "3000\n")
    fake.write(group / "memory.usage_in_bytes", "900\n")
    fake.write(group / "memory.stat", "inactive_file 1\ntotal_inactive_file 400\n")
    assert free_memory(CPU) == 2500


def test_cgroup_of_another_hierarchy_is_no_limit(fake):
    fake.proc.write_text("4:cpu:/a\n")
    fake.write(fake.root / "memory/a/memory.limit_in_bytes", "1\n")
    fake.write(fake.root / "memory/a/memory.usage_in_bytes", "0\n")
    assert free_memory(CPU) == 8000


def test_usage_beyond_the_limit_leaves_nothing(fake):
    fake.proc.write_text("0::/\n")
    fake.write(fake.root / "memory.max", "100\n")
    fake.write(fake.root / "memory.current", "900\n")
    assert free_memory(CPU) == 0


def test_rlimits_bind(fake):
    fake.rlimits[resource.RLIMIT_AS] = 5300
    assert free_memory(CPU) == 5000
    fake.rlimits[resource.RLIMIT_DATA] = 4200
    assert free_memory(CPU) == 4000
    fake.available = 3999
    assert free_memory(CPU) == 3999


def test_resident_grows_with_what_is_written():
    before = machine.resident()
    kept = np.ones(40_000_000, np.uint8)
    assert 35e6 < machine.resident() - before < 60e6
    assert machine.peak_resident() >= before + 35e6
    del kept


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("750MB", 750_000_000),
        ("1.2GB", 1_200_000_000),
        ("1.001kB", 1001),  # 1000.9999999999999 in floating point
        ("700MiB", 700 * 2**20),
        ("0.5 GiB", 2**29),
        (" 2 tb ", 2 * 10**12),
        (".5kib", 512),
        ("12B", 12),
        ("123456", 123_456),
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "MB", ".", "nan", "inf", "-1", "-750MB", "0", "0MB", "0.4", "1e9", "7.5.0MB", "5iB"),
        *("750 M B", "750MBs", "750M", "1,000", "0x10", "1_000", "1\n2", "\u0667MB", "9" * 99),
    ],
)
def test_parse_bytes_refuses_in_one_line(text):
    with pytest.raises(ValueError, match=r"no amount of memory; 750MB.*700MiB") as caught:
        parse_bytes(text)
    assert "\n" not in str(caught.value)


def test_mb_has_one_digit_from_10_mb_on():
    assert [machine.mb(n) for n in (9_999_000, 10_000_000, 3_084_400_000)] == [
        *("9.999", "10.0", "3,084.4")
    ]
