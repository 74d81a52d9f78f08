"""A buffer of a million Humanoid-v3 rows inside a hard limit of 1.2 GB.

    python experiments/budget.py                  # packed, whole int16 and float64, one by one
    python experiments/budget.py --limit 1GB --steps 2000

Each storage is a run of `sac.py` whose buffer is resident from the start (--memory-budget). The
kernel enforces the limit: a memory cgroup of its own (v2 or v1, wants root), which kills a process
that goes beyond it, else RLIMIT_DATA, which refuses it more private memory. Neither counts the
library pages that other processes have loaded; the peak resident memory that is printed does.
RLIMIT_AS would not do: torch reserves far more address space than it uses.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import memory
from quantize import Codec, FixedPoint, Float, Packed
from support.machine import parse_bytes
from tables import write_csv

STORAGES = (Packed(2), FixedPoint(2), Float())
HUMANOID = {"obs_dim": 376, "act_dim": 17, "hidden": 64, "num_envs": 1, "batch_size": 256}
COLUMNS = ["storage", "limit", "enforced by", "allocated", "outcome", "peak resident", "said"]


def make_cgroup(limit: int) -> Path | None:
    """A memory cgroup below this process's own, limited to that many bytes; None if not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount = Path("/sys/fs/cgroup/memory")
            knobs = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
        elif not controllers:
            mount, knobs = Path("/sys/fs/cgroup"), {"memory.max": limit, "memory.swap.max": 0}
        else:
            continue
        group = mount / path.lstrip("/") / f"just-round-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                there = [knob for knob in knobs if (group / knob).exists()]
                for knob in there:  # without the one for swap, the process would be swapped out
                    (group / knob).write_text(str(knobs[knob]))
                if there:  # else the memory controller is in the other hierarchy
                    return group
            except OSError:
                pass
            group.rmdir()
    return None


@contextmanager
def limited(limit: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What enforces the limit in bytes, and what a child calls to come under it."""
    if sys.platform != "linux":
        raise ValueError("no cgroup and no RLIMIT_DATA to enforce a limit with; Linux has both")
    if group := make_cgroup(limit):
        try:
            yield "cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
        finally:
            group.rmdir()
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def run(codec: Codec, limit: int, args: argparse.Namespace) -> list:
    """Train under the limit: COLUMNS from "enforced by" on."""
    ledger = memory.allocated("sac", codec, **HUMANOID, buffer_size=args.rows)
    allocated = sum(ledger.values())
    command = [sys.executable, ROOT / "sac.py", "--env", "Humanoid-v3"]
    command += memory.codec_flags(codec).split()
    command += ["--memory-budget", str(allocated), "--total-timesteps", str(args.steps)]
    command += ["--eval-episodes", "0", "--run-name", "run"]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    with limited(limit) as (enforced_by, come_under), tempfile.TemporaryDirectory() as folder:
        command += ["--run-dir", folder]
        child = subprocess.run(command, preexec_fn=come_under, check=False, **options)
        if child.returncode == 0:
            result = json.loads(Path(folder, "run", "result.json").read_text())
            assert result["buffer_bytes"] == ledger["buffer observations"] + ledger["buffer rest"]
            return [enforced_by, allocated, "trained", result["peak_rss_bytes"], ""]
    outcome = {-9: "killed", 2: "refused"}.get(child.returncode, f"exit code {child.returncode}")
    return [enforced_by, allocated, outcome, "", (child.stderr.splitlines() or [""])[-1]]


def main(argv: list[str] | None = None) -> None:
    """Run every storage, print a line for each and write --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", default="1.2GB", help="on each whole process")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the buffer")
    parser.add_argument("--steps", type=int, default=3000, help="to train for")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/budget.csv")
    args = parser.parse_args(argv)
    rows = []
    try:
        limit = parse_bytes(args.limit)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        open(args.out, "a").close()  # fail now rather than after the runs
        for codec in STORAGES:
            cells = [codec.name, limit, *run(codec, limit, args)]
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
            write_csv(args.out, COLUMNS, rows)
            print(", ".join(f"{head}: {x}" for head, x in rows[-1].items()))
    except (ValueError, OSError) as error:
        parser.exit(2, f"budget.py: error: {error}\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
