"""Two million steps of SAC on a cheap task: do memory, speed and open files stay where they are?

    python experiments/soak.py           # half an hour: table, runs/soak.csv and soak.png
    python experiments/soak.py --draw    # table and chart again, from soak.csv alone

This process runs `sac.main` with a buffer of 10,000 rows, which wraps 200 times, and 20 checkpoints
in a temporary folder. Its environment takes a sample of the process every --every steps and appends
it to --out at once, so a run that is stopped leaves what it has; resumed it cannot be. Warm-up is
the first tenth of the steps. Speed is that of the median window between two samples, of the first
tenth after warm-up and of the last. A busy machine slows the wall clock, and through its caches CPU
time as well: so every hundred steps a fixed piece of work is timed, and steps per piece judge the
speed, which are those in as much CPU time as the piece took in the same window. Linux only.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

from checkpoint import anonymous
from curves import read_csv
from speed import ROOT, Parser, cpu, markdown

sys.path.insert(0, str(ROOT))
import sac
from support import drawing
from support.machine import resident

SETTINGS = {"quant_m": 2, "buffer_size": 10_000, "batch_size": 32, "hidden": 32}
SETTINGS |= {"checkpoint_every": 100_000, "eval_episodes": 0}
MEASURED = ["step", "wall_seconds", "cpu_seconds", "pieces_seconds", "pieces"]
MEASURED += ["rss_bytes", "rss_anon_bytes", "file_handles"]
COLUMNS = [*MEASURED, "torch", "cpu"]
PIECE_EVERY = 100  # steps
MOST_GROWTH, LEAST_SPEED = 5e6, 0.95  # bytes, share of the first speed


class Cheap(gym.Env):
    """Two columns that follow the actions, two of noise; one of these ends the episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, sampler: "Sampler"):
        self.sampler = sampler

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.obs = 0.1 * self.np_random.standard_normal(4)
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple:
        self.sampler.count()
        self.obs = 0.9 * self.obs + 0.3 * self.np_random.standard_normal(4)
        self.obs[:2] += 0.3 * action
        return self.obs, -float(self.obs @ self.obs), bool(self.obs[3] > 1.9), False, {}


class Sampler:
    """Appends a row of COLUMNS to a file after every so many calls of `count`."""

    def __init__(self, file: TextIO, every: int):
        self.file, self.every, self.step = file, every, 0
        self.about = [torch.__version__, cpu()]
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow(COLUMNS)
        self.start = time.perf_counter(), time.process_time()
        self.pieces, self.pieces_seconds = 0, 0.0
        self.x, self.weight = torch.ones(2, 32, 32), torch.ones(2, 32, 32) / 32

    def piece(self) -> None:
        """Work like that of training, and always the same, in CPU time."""
        start, x = time.process_time(), self.x
        for _ in range(20):
            x = torch.bmm(x, self.weight).relu_()
        self.pieces_seconds += time.process_time() - start
        self.pieces += 1

    def count(self) -> None:
        self.step += 1
        if self.step % PIECE_EVERY == 0:
            self.piece()
        if self.step % self.every == 0:
            now = time.perf_counter(), time.process_time()
            seconds = [t - start for t, start in zip(now, self.start, strict=True)]
            row = [self.step, *(f"{t:.4f}" for t in (*seconds, self.pieces_seconds)), self.pieces]
            row += [resident(), anonymous(), file_handles()]
            self.writer.writerow(row + self.about)
            self.file.flush()


def file_handles() -> int:
    """Descriptors that are open now, --out among them.

    TensorBoard's thread opens its log anew for each write, and closes it. A sample may catch that,
    so this is the least of three that are 2 ms apart; a leaked descriptor would be in all three.
    """
    found = []
    for _ in range(3):
        found.append(len(os.listdir("/proc/self/fd")) - 1)  # without the one that lists them
        time.sleep(0.002)
    return min(found)


def train(args: argparse.Namespace) -> None:
    """Run sac.main and leave the samples in --out. SystemExit as from sac.main."""
    with open(args.out, "w", newline="") as file, tempfile.TemporaryDirectory() as folder:
        sampler = Sampler(file, args.every)
        about = {"max_episode_steps": 200, "disable_env_checker": True}  # then truncated
        gym.register("Cheap-v0", lambda: Cheap(sampler), **about)
        try:
            sac.main(sac.Args("Cheap-v0", total_timesteps=args.steps, run_dir=folder, **SETTINGS))
        finally:
            del gym.registry["Cheap-v0"]


def read(path: Path) -> dict[str, np.ndarray]:
    """The measured columns of --out. Raises OSError, or ValueError for what is no such file."""
    rows = read_csv(path, COLUMNS)
    if len(rows) < 10:
        raise ValueError(f"{path} holds {len(rows)} samples; at least 10 are needed")
    print(f"\n{path}: {rows[-1]['cpu']}, torch {rows[-1]['torch']}")
    return {name: np.array([float(row[name]) for row in rows]) for name in MEASURED}


def summarise(data: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Of memory: after warm-up, growth to the end, largest growth. Of speed: first tenth after
    warm-up, last tenth, ratio. Of file handles, after warm-up: fewest, most, most - fewest."""
    step = data["step"]
    tenth, warm, found = step[-1] / 10, step >= step[-1] / 10, {}
    for name in ("rss_bytes", "rss_anon_bytes"):
        size = data[name][warm]
        found[name] = size[0], size[-1] - size[0], size.max() - size[0]
    piece = np.diff(data["pieces_seconds"]) / np.diff(data["pieces"])  # CPU seconds of one
    for name, unit in (("piece", piece), ("cpu_seconds", 1), ("wall_seconds", 1)):
        seconds = data["wall_seconds" if name == "wall_seconds" else "cpu_seconds"]
        speeds, end = np.diff(step) / np.diff(seconds) * unit, step[1:]
        first = np.median(speeds[(end > tenth) & (end <= 2 * tenth)])
        last = np.median(speeds[end > 9 * tenth])
        found[name] = first, last, last / first
    handles = data["file_handles"][warm]
    found["file_handles"] = handles.min(), handles.max(), np.ptp(handles)
    return found


def report(data: dict[str, np.ndarray]) -> None:
    """Print the tables, then whether each limit was held."""
    found, minutes = summarise(data), data["wall_seconds"][-1] / 60
    print(f"{data['step'][-1]:,.0f} steps in {minutes:.1f} minutes, the first tenth is warm-up")
    memory = [["resident memory, MB", "after warm-up", "growth to the end", "largest growth"]]
    for label, name in (("whole", "rss_bytes"), ("anonymous", "rss_anon_bytes")):
        memory.append([label, *(f"{size / 1e6:.2f}" for size in found[name])])
    speed = [["steps per", "first tenth after warm-up", "last tenth", "ratio"]]
    for label, name in (
        ("piece of fixed work", "piece"),
        ("second of CPU time", "cpu_seconds"),
        ("second", "wall_seconds"),
    ):
        first, last, ratio = found[name]
        speed.append([label, f"{first:.4g}", f"{last:.4g}", f"{ratio:.3f}"])
    markdown(memory)
    markdown(speed)
    fewest, most, spread = found["file_handles"]
    growth = max(found["rss_bytes"][2], found["rss_anon_bytes"][2])
    print(f"\nfile handles after warm-up: {fewest:.0f} to {most:.0f}\n")
    for limit, held in {
        f"resident memory grows by less than {MOST_GROWTH / 1e6:g} MB": growth < MOST_GROWTH,
        f"steps per piece of fixed work do not fall by more than {1 - LEAST_SPEED:.0%}": (
            found["piece"][2] >= LEAST_SPEED
        ),
        "file handles are constant": spread == 0,
    }.items():
        print(f"{'held' if held else 'missed'}: {limit}")


def draw(data: dict[str, np.ndarray], path: Path) -> None:
    """Memory, speed and file handles over the steps, side by side; warm-up is shaded."""
    step, wall, cpu_time, pieces_time, pieces, whole, anonymous, handles = data.values()
    sizes = (
        (whole, "resident", drawing.BLUE),
        (anonymous, "private (anonymous)", drawing.LIGHT_BLUE),
    )
    steps, work = np.diff(step), np.diff(pieces_time) / np.diff(pieces)
    with drawing.style():
        figure = Figure(figsize=(drawing.PAGE, 2.2))
        left, middle, right = figure.subplots(1, 3)
        for size, label, color in sizes:
            after = size[step >= step[-1] / 10][0] / 1e6
            left.plot(step, size / 1e6 - after, color=color, label=f"{label}, {after:.0f} MB")
        left.axhline(MOST_GROWTH / 1e6, color="black", ls=":", lw=1, label="limit")
        left.set_title("memory, MB since warm-up")
        middle.plot(step[1:], steps / np.diff(wall), color="0.75", label="wall clock")
        middle.plot(step[1:], steps / np.diff(cpu_time), color=drawing.BLUE, label="CPU time")
        even = steps / np.diff(cpu_time) * work / np.median(work)
        middle.plot(step[1:], even, color="#d1495b", label="CPU time, by fixed work")
        middle.set_title("steps per second, by")
        right.plot(step, handles, color=drawing.BLUE)
        right.set_title("file handles")
        for axes in (left, middle, right):
            axes.axvspan(0, step[-1] / 10, color="0.94", lw=0)
            axes.set_xlim(0, step[-1])
            axes.set_ylim(bottom=None if axes is left else 0, top=1.25 * axes.dataLim.y1)
            axes.set_xlabel("steps (shaded: warm-up)")
            axes.locator_params(axis="x", nbins=4)
            drawing.thousands(axes)
        left.legend(loc="center right", fontsize=7)
        middle.legend(loc="lower right", fontsize=7)
        drawing.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Train unless told not to, then print and draw what is in --out."""
    parser = Parser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--every", type=int, default=20_000, help="steps between two samples")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/soak.csv")
    parser.add_argument("--draw", action="store_true", help="train nothing, read --out")
    args = parser.parse_args(argv)
    if args.every < PIECE_EVERY or args.steps < 10 * args.every:
        parser.error("--every must be at least 100, --steps at least 10 times --every")
    try:
        if not args.draw:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            anonymous()  # fail now where there is no /proc
            train(args)
        report(data := read(args.out))
        draw(data, chart := args.out.with_suffix(".png"))
        print(f"wrote {chart}, from {args.out}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
