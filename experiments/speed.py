"""Milliseconds per environment step of the training loop: float64, rounded, packed, and SB3's.

    python experiments/speed.py                              # table, and results/speed.csv
    python experiments/speed.py --rounds 2 --steps-sac 400 --steps-ppo 2048 --out speed.csv

Every measurement is a fresh process on the CPU. A round runs each cell's variants in turn, in an
order that moves on by one from round to round, so that drift of the machine hits all alike. The
clocks of our scripts and of `sb3.py` both start after imports and set-up and stop before any
evaluation. Wants an idle machine, and for SB3 an environment of its own, see SB3_INSTALL.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs
from buffers import ReplayBuffer
from quantize import FixedPoint, Float, Packed

GOALS = {  # algo-task: most ms/step that we aim for
    "sac-Humanoid-v3": 4.0,
    "sac-Walker2d-v3": 2.2,
    "ppo-Walker2d-v3": 0.35,
    "ppo-Humanoid-v3": None,
}
RATIO_GOAL = 1.03  # rounded over float64
PACKED_GOAL = 1.07  # packed over rounded, SAC
DECIMALS = {"sac": "2", "ppo": "1"}  # the paper's m
PPO_ROLLOUT = 2048  # both PPOs finish the last one, but sb3.py divides by the steps asked for
VARIANTS = ["float64", "rounded", "packed", "SB3"]
SB3_INSTALL = "python3 -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.txt"
COLUMNS = ["round", "cell", "variant", "ms_per_step", "threads", "torch", "cpu"]
HEADER = ["cell", "variant", "ms/step", "min", "max", "/float64", "/rounded", "/SB3", "goal"]
LINE = "{:<16} {:<8} {:>8} {:>8} {:>8} {:>9} {:>9} {:>7}  {}"
FILLED = 200_000  # of the buffers' million rows; the others never become resident


def run_once(cell: str, variant: str, args: argparse.Namespace) -> float:
    """ms/step of one training run. Raises RuntimeError with one line if there is none to report."""
    algo, env_id = cell.split("-", 1)
    steps = str(args.steps_sac if algo == "sac" else args.steps_ppo)
    command = [sys.executable, ROOT / f"{algo}.py", "--eval-episodes", "0", "--run-name", "run"]
    if variant in ("rounded", "packed"):
        command += ["--quant-m", DECIMALS[algo], *["--pack"] * (variant == "packed")]
    elif variant == "SB3":
        command = [args.sb3_python, ROOT / "experiments/sb3.py", "--algo", algo]
        if not shutil.which(args.sb3_python):
            raise RuntimeError(f"not installed: {SB3_INSTALL}")
    variables = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    variables["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        command += ["--env", env_id, "--total-timesteps", steps, "--run-dir", folder]
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            raise RuntimeError(f"failed: {lines[-1] if lines else f'exit code {run.returncode}'}")
        if variant != "SB3":
            return json.loads(Path(folder, "run", "result.json").read_text())["ms_per_step"]
    lines = run.stdout.strip().splitlines() or [""]
    if not (match := re.search(r" steps, ([\d.]+) ms/step$", lines[-1])):
        raise RuntimeError(f"failed: its last line is {lines[-1]!r}")
    return float(match[1])


def measure(args: argparse.Namespace) -> tuple[dict, dict]:
    """Run all rounds and write --out after each.

    Returns:
        {(cell, variant): {round: ms/step}} and, of runs that failed, {(cell, variant): [line]}.
    """
    times, failures, rows = defaultdict(dict), defaultdict(list), [COLUMNS]
    versions = dict.fromkeys(VARIANTS, torch.__version__)
    if shutil.which(args.sb3_python):
        command = [args.sb3_python, "-c", "import torch; print(torch.__version__)"]
        versions["SB3"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    cpu = found[1] if found else platform.processor()
    for number in range(1, args.rounds + 1):
        first = (number - 1) % len(VARIANTS)
        for cell in args.cells:
            for variant in VARIANTS[first:] + VARIANTS[:first]:
                print(f"round {number}, {cell}, {variant}: ", end="", flush=True)
                try:
                    ms = run_once(cell, variant, args)
                except RuntimeError as error:
                    failures[cell, variant].append(str(error))
                    print(error)
                    continue
                print(f"{ms:.3f} ms/step")
                times[cell, variant][number] = ms
                where = [args.threads, versions[variant], cpu]
                rows.append([number, cell, variant, f"{ms:.4f}", *where])
        with open(args.out, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    return times, failures


def ratio(ours: dict[int, float], other: dict[int, float]) -> float | None:
    """Median, over the rounds that have both, of the ratio."""
    both = ours.keys() & other.keys()
    return median(ours[number] / other[number] for number in both) if both else None


def report(cells: list[str], times: dict, failures: dict) -> None:
    """Print the table."""
    print("\n/float64, /rounded and /SB3 are medians of the rounds' ratios")
    print(LINE.format(*HEADER))
    for cell in cells:
        base, rounded, sb3 = (times[cell, name] for name in ("float64", "rounded", "SB3"))
        for variant in VARIANTS:
            mine, failed = times[cell, variant], failures[cell, variant]
            if not mine:
                print(f"{cell:<16} {variant:<8} {failed[-1]}")
                continue
            ms, to_base, to_rounded = median(mine.values()), ratio(mine, base), ratio(mine, rounded)
            numbers = [ms, min(mine.values()), max(mine.values()), to_base, to_rounded]
            shown = ["-" if x is None else f"{x:.3f}" for x in (*numbers, ratio(mine, sb3))]
            goals = [(ms, GOALS[cell], " ms")] if variant != "SB3" else []
            goals += [(to_base, RATIO_GOAL, "x")] if variant == "rounded" else []
            if variant == "packed" and cell.startswith("sac"):
                goals.append((to_rounded, PACKED_GOAL, "x"))
            notes = [
                f"<= {goal}{unit} {'reached' if value <= goal else 'missed'}"
                for value, goal, unit in goals
                if None not in (value, goal)
            ]
            notes += [f"{len(failed)} of the runs {failed[-1]}"] if failed else []
            print(LINE.format(cell, variant, *shown, ", ".join(notes)))


def time_buffers(threads: int, samples: int = 2000) -> None:
    """Print us per gather of 2 x 256 rows and per sample(256) of Humanoid-v3, storages by turns."""
    torch.set_num_threads(threads)
    env, device = envs.make("Humanoid-v3"), torch.device("cpu")
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    rng = np.random.default_rng(1)
    obs = rng.uniform(-10, 10, (FILLED // 20, obs_dim))
    buffers, took = {}, defaultdict(list)
    for codec in (Float(), FixedPoint(2), Packed(2), FixedPoint(1), Packed(1)):
        buffer = ReplayBuffer(codec, 1_000_000, 1, obs_dim, act_dim, device, seed=1)
        # What 200,000 calls of `add` would leave behind: one episode, its head open.
        for part in buffer.obs.array[:FILLED].split(len(obs)):
            part[:] = codec.pack(codec.encode(obs))
        buffer.actions[:FILLED], buffer.rewards[:FILLED], buffer.terminated[:FILLED] = 1, 1, False
        buffer.is_start[: FILLED - 1] = True
        buffer.head[:], buffer.fill[:], buffer.size = FILLED - 1, FILLED, FILLED - 1
        buffers[codec.name] = buffer
    for _ in range(samples):
        index = torch.from_numpy(rng.integers(FILLED, size=512))
        for name, buffer in buffers.items():
            start = time.perf_counter()
            buffer.obs.get(index)
            middle = time.perf_counter()
            buffer.sample(256)
            took[name].append((1e6 * (middle - start), 1e6 * (time.perf_counter() - middle)))
    print(f"\nbuffers of 1,000,000 Humanoid-v3 rows, {FILLED:,} of them filled, medians in us")
    for name, buffer in buffers.items():
        gather, sample = (median(times) for times in zip(*took[name], strict=True))
        print(
            f"{name:<27} 2 x 256 rows decoded {gather:6.1f}, sample(256) {sample:6.1f}, "
            f"{buffer.nbytes:>13,} bytes"
        )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"speed.py: error: {message}\n")  # one line, without the usage


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write. SystemExit with code 2 and one line for bad input."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps-sac", type=int, default=3000, help="of each SAC run")
    parser.add_argument("--steps-ppo", type=int, default=16384, help="of each PPO run")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--cells", nargs="+", choices=GOALS, default=list(GOALS), metavar="CELL")
    parser.add_argument("--sb3-python", type=Path, default=ROOT / ".venv-bench/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/speed.csv")
    args = parser.parse_args(argv)
    if min(args.rounds, args.steps_sac, args.steps_ppo, args.threads) < 1:
        parser.error("--rounds, --steps-sac, --steps-ppo and --threads must be at least 1")
    if args.steps_ppo % PPO_ROLLOUT:
        parser.error(f"--steps-ppo must be a multiple of {PPO_ROLLOUT}, one rollout")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        open(args.out, "a").close()  # fail now rather than after the first round
    except OSError as error:
        parser.error(f"cannot write {args.out}: {error.strerror}")
    report(args.cells, *measure(args))
    print(f"wrote {args.out}")
    time_buffers(args.threads)


if __name__ == "__main__":
    main()
