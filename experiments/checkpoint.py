"""What a checkpoint with a full replay buffer of Humanoid-v3 costs: bytes, seconds, memory.

    python experiments/checkpoint.py                  # m = 2, packed and as int16
    python experiments/checkpoint.py --rows 10000

One process saves buffer, networks and Adam, as `sac.py` does, a fresh one loads them. Memory is by
how much the anonymous resident memory grows meanwhile, at its peak. Every page of the buffer is
resident before, so at loading, too, a copy of it would show in full; pages of the file that is read
are not anonymous.
"""

import argparse
import re
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from buffers import ReplayBuffer
from quantize import Codec, FixedPoint, Packed
from support import checkpoints, runs
from support.networks import Actor, Adam, Critic, flatten
from tables import write_csv

STORAGES = (Packed(2), FixedPoint(2))
HUMANOID = {"obs_dim": 376, "act_dim": 17}
CHUNK = 1 << 20  # bytes


def anonymous() -> int:
    """Bytes of this process's anonymous resident memory."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(call: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and how many bytes `anonymous` grew at its peak; looked at every millisecond."""
    done, before, seen = threading.Event(), anonymous(), []

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        call()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return seconds, max([*seen, anonymous()]) - before


def make_parts(codec: Codec, rows: int) -> dict:
    """What `sac.py` saves, but for the counters and the random generators."""
    critic, target = (Critic(**HUMANOID, hidden=64) for _ in range(2))
    actor = Actor(**HUMANOID, hidden=64)
    adams = {"actor_adam": Adam(flatten(actor), 3e-4), "critic_adam": Adam(flatten(critic), 3e-4)}
    buffer = ReplayBuffer(codec, rows, 1, **HUMANOID, device=torch.device("cpu"), seed=0)
    return {"buffer": buffer, "actor": actor, "critic": critic, "target": target} | adams


def rows_of(buffer: ReplayBuffer) -> list[np.ndarray]:
    """The bytes of the buffer's arrays, (N,) uint8 each."""
    arrays = buffer.obs.array, buffer.actions, buffer.rewards, buffer.terminated, buffer.is_start
    return [array.view(-1).view(torch.uint8).numpy() for array in arrays]


def save(codec: Codec, rows: int, path: Path) -> tuple[dict, list[int]]:
    """In a process of its own: fill a buffer, save it. Returns figures and the rows' CRC-32."""
    parts, rng = make_parts(codec, rows), np.random.default_rng(0)
    buffer = parts["buffer"]
    for array, most in zip(rows_of(buffer), (256, 256, 256, 2, 2), strict=True):  # two are of bools
        for start in range(0, len(array), CHUNK):
            part = array[start : start + CHUNK]
            part[:] = rng.integers(most, size=len(part), dtype=np.uint8)
    buffer.head[0], buffer.fill[0] = buffer.ring - 1, buffer.ring
    buffer.size = int(np.count_nonzero(buffer.is_start))
    seconds, grown = measure(
        lambda: checkpoints.save(
            path, {name: checkpoints.state_of(part) for name, part in parts.items()}
        )
    )
    figures = {"bytes": path.stat().st_size, "bytes of the buffer": buffer.nbytes}
    figures |= {"save s": f"{seconds:.2f}", "growth at saving": grown}
    return figures, [zlib.crc32(array) for array in rows_of(buffer)]


def load(codec: Codec, rows: int, path: Path) -> tuple[dict, list[int]]:
    """In a process of its own: verify that file and copy it into an empty buffer; as `save`."""
    parts = make_parts(codec, rows)
    parts["buffer"].touch()

    def resume() -> None:
        saved = checkpoints.load(path)
        for name, part in parts.items():
            checkpoints.restore(part, saved[name])

    seconds, grown = measure(resume)
    figures = {"load s": f"{seconds:.2f}", "growth at loading": grown}
    return figures, [zlib.crc32(array) for array in rows_of(parts["buffer"])]


def main(argv: list[str] | None = None) -> None:
    """Measure every storage, print a line for each and write --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the buffer")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/checkpoint.csv")
    args, lines = parser.parse_args(argv), []
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        open(args.out, "a").close()  # fail now rather than after the work
    except OSError as error:
        parser.exit(2, f"checkpoint.py: error: {error}\n")
    about = runs.provenance()
    versions = " ".join(f"{name} {version}" for name, version in about["versions"].items())
    for codec in STORAGES:
        line = {"storage": codec.name, "rows": args.rows}
        with tempfile.TemporaryDirectory() as folder:
            crcs = []
            for step in (save, load):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    job = process.submit(step, codec, args.rows, Path(folder, "checkpoint.pt"))
                    figures, crc = job.result()
                line |= figures
                crcs.append(crc)
        assert crcs[0] == crcs[1], "what was loaded is not what was saved"
        lines.append(line | {"versions": versions, "machine": about["machine"]})
        write_csv(args.out, lines[0], lines)
        print(", ".join(f"{name}: {value}" for name, value in lines[-1].items()), flush=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
