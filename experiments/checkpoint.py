"""What a checkpoint with a full replay buffer of Humanoid-v3 costs: bytes, seconds, memory.

    python experiments/checkpoint.py                  # m = 2, packed and as int16
    python experiments/checkpoint.py --rows 10000

One process saves what `sac.py` saves, a fresh one loads it. Memory is by how much the anonymous
resident memory grows meanwhile, at its peak. Every page of the buffer is resident before, so at
loading, too, a copy of it would show in full; pages of the file that is read are not anonymous.
"""

import argparse
import csv
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
import runs
import sac
from buffers import PER_ROW, ReplayBuffer
from envs import make_vector
from networks import MLP, Adam
from quantize import Codec, FixedPoint, Packed

STORAGES = (Packed(2), FixedPoint(2))
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


def fresh(codec: Codec, rows: int) -> tuple[dict, list[np.ndarray], dict]:
    """As in `sac.py`: parts with `state` and `load`, the buffer's arrays as bytes, other state."""
    envs, device, hidden = make_vector("Humanoid-v3", 1), torch.device("cpu"), (64, 64)
    envs.reset(seed=0)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    actor = MLP(sac.uniform(1, obs_dim, *hidden, 2 * act_dim), "relu")
    critic = MLP(sac.uniform(2, obs_dim + act_dim, *hidden, 1), "relu")
    critic_adam = Adam(critic.tensors, 0)
    buffer = ReplayBuffer(codec, rows, 1, obs_dim, act_dim, device, seed=0)
    parts = {"actor": Adam([*actor.tensors, torch.zeros(())], 0), "critic": critic_adam}
    parts["buffer"] = buffer
    others = {"target": critic_adam.params.clone(), "clamp": codec.clamp.state()}
    others |= {"envs": envs.episodes(), "rng": runs.rng_state(device, envs.action_space)}
    arrays = [buffer.obs.array, *(torch.as_tensor(getattr(buffer, name)) for name in PER_ROW)]
    return parts, [array.view(-1).view(torch.uint8).numpy() for array in arrays], others


def save(codec: Codec, rows: int, path: Path) -> tuple[dict, list[int]]:
    """In a process of its own: fill a buffer, save it. Returns figures and the rows' CRC-32."""
    parts, arrays, others = fresh(codec, rows)
    buffer, rng = parts["buffer"], np.random.default_rng(0)
    for array, most in zip(arrays, (256, 256, 256, 2, 2), strict=True):  # two are of bools
        for start in range(0, len(array), CHUNK):
            part = array[start : start + CHUNK]
            part[:] = rng.integers(most, size=len(part), dtype=np.uint8)
    buffer.head[:], buffer.fill[:] = buffer.rows - 1, buffer.rows
    buffer.size = int(np.count_nonzero(buffer.is_start))
    seconds, grown = measure(
        lambda: runs.save(path, {key: part.state() for key, part in parts.items()} | others)
    )
    figures = {"bytes": path.stat().st_size, "bytes of the buffer": buffer.nbytes}
    figures |= {"save s": f"{seconds:.2f}", "growth at saving": grown}
    return figures, [zlib.crc32(array) for array in arrays]


def load(codec: Codec, rows: int, path: Path) -> tuple[dict, list[int]]:
    """In a process of its own: verify that file and copy it into an empty buffer; as `save`."""
    parts, arrays, _ = fresh(codec, rows)
    parts["buffer"].touch()

    def resume() -> None:
        saved = runs.load(path)
        for key, part in parts.items():
            part.load(saved[key])

    seconds, grown = measure(resume)
    figures = {"load s": f"{seconds:.2f}", "growth at loading": grown}
    return figures, [zlib.crc32(array) for array in arrays]


def main(argv: list[str] | None = None) -> None:
    """Measure every storage, print a line for each and write --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the buffer")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/checkpoint.csv")
    args, lines = parser.parse_args(argv), []
    versions = " ".join(f"{name} {version}" for name, version in runs.VERSIONS.items())
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
        lines.append(line | {"versions": versions, "machine": runs.provenance()["machine"]})
        print(", ".join(f"{name}: {value}" for name, value in lines[-1].items()), flush=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
