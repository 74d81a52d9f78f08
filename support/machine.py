"""How much memory this machine leaves, and how much this process takes. 1 MB is 10^6 bytes."""

import re
import resource
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import psutil
import torch

PROC_CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
AMOUNT = re.compile(r"(\d{0,15}\.?\d{1,15})\s*(?:(?:([kmgt])(i?))?b)?", re.ASCII | re.IGNORECASE)


def mb(n: float) -> str:
    """Bytes as decimal MB, without the unit."""
    return f"{n / 1e6:,.{1 if n >= 1e7 else 3}f}"


def parse_bytes(text: str) -> int:
    """Bytes of e.g. 750MB, 1.2GB, 0.5 GiB or 123456. Raises ValueError on anything else, and 0."""
    if found := AMOUNT.fullmatch(text.strip()):
        number, prefix, binary = found.groups(default="")
        power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
        if n := int(Decimal(number) * (1024 if binary else 1000) ** power):
            return n
    raise ValueError(f"{text!r} is no amount of memory; 750MB, 1.2GB, 700MiB and 123456 are")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """The most bytes of this process that have been in memory at once."""
    # Not getrusage's ru_maxrss where it can be helped: a process inherits that from its parent.
    if found := re.search(r"VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status"))):
        return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on device.

    On the CPU it is the least of what the machine, its cgroups (v1 or v2) and its rlimits leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([psutil.virtual_memory().available, *_cgroup_room(), *_rlimit_room()]))


def _cgroup_room() -> Iterator[int]:
    """Bytes that each memory cgroup of this process leaves, v1 or v2. No file means no limit."""
    for line in _text(PROC_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # v1
            mount, cache = CGROUP_ROOT / "memory", "total_inactive_file "
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:  # v2
            mount, cache = CGROUP_ROOT, "inactive_file "
            limit_file, usage_file = "memory.max", "memory.current"
        else:
            continue
        # Ancestors' limits bind too. In a container the path may be the host's and not exist here;
        # then the mount's own files are the container's.
        group = mount / path.lstrip("/")
        for level in (group, *group.parents):
            limit, usage = (_text(level / name).strip() for name in (limit_file, usage_file))
            if level.is_relative_to(mount) and limit.isdigit() and usage.isdigit():  # not "max"
                stat = _text(level / "memory.stat").splitlines()
                # Usage counts page cache, whose inactive part the kernel takes back when pressed.
                reclaimable = sum(int(row.split()[1]) for row in stat if row.startswith(cache))
                yield int(limit) - int(usage) + reclaimable


def _rlimit_room() -> Iterator[int]:
    """Bytes that the rlimits on address space and on data leave."""
    used = psutil.Process().memory_info()
    for limit, taken in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - getattr(used, taken)


def _text(path: Path) -> str:
    """Content of a file; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
