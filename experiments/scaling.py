"""What time and bytes do as the replay buffer, the observation and the number of envs grow.

    python experiments/scaling.py           # minutes: tables, runs/scaling.csv and scaling.png
    python experiments/scaling.py --draw    # tables and chart again, from scaling.csv alone

The time of `ReplayBuffer.sample(256)` is the median of many calls on a buffer in which every row
has been written; the storages follow each other at every size, in an order that moves on by one
from round to round. The time per transition is that of the whole training loop on Walker2d-v3, in
a process of its own and after warm-up, as in speed.py. Wants an idle machine.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curves import read_csv
from speed import DECIMALS, PPO_ROLLOUT, ROOT, Parser, cpu, markdown, train

sys.path.insert(0, str(ROOT))
from buffers import ReplayBuffer
from quantize import FixedPoint, Float, Packed
from support import drawing
from support.machine import free_memory
from tables import write_csv

STORAGES = {"float64": Float(), "int16, m=2": FixedPoint(2), "packed, m=2": Packed(2)}
HUMANOID, ACT_DIM, BATCH, SAMPLES = 376, 17, 256, 1000
SAC_STEPS, PPO_ROLLOUTS = 4000, 3  # of each training
PANELS = {  # panel: what grows, its values
    "rows": (f"rows, {HUMANOID} columns", [10**4, 10**5, 10**6, 10**7]),
    "columns": ("columns, 100,000 rows", [17, 111, 376, 1000, 4000]),
    "envs": ("envs, Walker2d-v3", [1, 2, 4, 8, 16]),
}
LOOPS = {f"{algo.upper()}, m={m}": algo for algo, m in DECIMALS.items()}
COLUMNS = ["round", "panel", "x", "series", "unit", "time", "bytes", "cores", "torch", "cpu"]
COLORS = {"float64": drawing.BLACK, "int16, m=2": drawing.BLUE, "packed, m=2": drawing.LIGHT_BLUE}
COLORS |= {"SAC, m=2": drawing.BLUE, "PPO, m=1": drawing.ORANGE}
BLOCK = 1000  # different rows, again and again: what they hold does not change the time


def make_buffer(storage: str, rows: int, obs_dim: int, device: str) -> ReplayBuffer:
    codec = STORAGES[storage]
    return ReplayBuffer(codec, rows, 1, obs_dim, ACT_DIM, torch.device(device), seed=1)


def filled_buffer(storage: str, rows: int, obs_dim: int) -> ReplayBuffer:
    """As `rows` calls of `add` leave it within one episode: every page resident."""
    buffer, codec = make_buffer(storage, rows, obs_dim, "cpu"), STORAGES[storage]
    obs = np.random.default_rng(1).uniform(-10, 10, (BLOCK, obs_dim))
    block = codec.pack(codec.encode(obs))
    for part in buffer.obs.array.split(BLOCK):
        part[:] = block[: len(part)]
    buffer.actions[:], buffer.rewards[:], buffer.terminated[:] = 1, 1, False
    buffer.is_start[:-1] = True
    buffer.head[0], buffer.fill[0], buffer.size = buffer.ring - 1, buffer.ring, buffer.ring - 1
    return buffer


def time_sample(buffer: ReplayBuffer) -> float:
    """Median microseconds of a call."""
    took = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        buffer.sample(BATCH)
        took.append(time.perf_counter() - start)
    return 1e6 * median(took)


def time_loop(algo: str, num_envs: int, cores: int) -> float:
    """Milliseconds per transition, from the first to the last event of `charts/SPS`."""
    steps = SAC_STEPS if algo == "sac" else PPO_ROLLOUTS * PPO_ROLLOUT * num_envs
    command = [sys.executable, ROOT / f"{algo}.py", "--env", "Walker2d-v3", "--device", "cpu"]
    command += ["--quant-m", DECIMALS[algo], "--num-envs", str(num_envs), "--eval-episodes", "0"]
    marks, _ = train([*command, "--total-timesteps", str(steps)], cores)
    first, last = min(marks), max(marks)
    return 1000 * (marks[last] - marks[first]) / (last - first)


def measure(panel: str, x: int, series: str, cores: int) -> dict | None:
    """Columns of scaling.csv; None for a buffer that does not fit into free memory."""
    if panel == "envs":
        return {"unit": "ms per transition", "time": f"{time_loop(LOOPS[series], x, cores):.4f}"}
    rows, obs_dim = (x, HUMANOID) if panel == "rows" else (100_000, x)
    size = make_buffer(series, rows, obs_dim, "meta").nbytes
    if size > 0.9 * free_memory(torch.device("cpu")):
        print(f"left out, {size / 1e9:.1f} GB are more than is free")
        return None
    us = time_sample(filled_buffer(series, rows, obs_dim))
    return {"unit": f"us per sample({BATCH})", "time": f"{us:.2f}", "bytes": size}


def run_rounds(args: argparse.Namespace) -> None:
    """Measure, and write --out after every round."""
    torch.set_num_threads(args.cores)
    machine = {"cores": args.cores, "torch": torch.__version__, "cpu": cpu()}
    rows = []
    for number in range(1, args.rounds + 1):
        for panel in args.panels:
            names = [*LOOPS] if panel == "envs" else [*STORAGES]
            first = (number - 1) % len(names)
            for x in PANELS[panel][1]:
                for series in names[first:] + names[:first]:
                    print(f"round {number}, {x:,} {panel}, {series}: ", end="", flush=True)
                    if found := measure(panel, x, series, args.cores):
                        print(f"{found['time']} {found['unit']}")
                        row = {"round": number, "panel": panel, "x": x, "series": series}
                        rows.append(row | found | machine)
        write_csv(args.out, COLUMNS, rows)


def collect(rows: list[dict[str, str]]) -> dict:
    """{panel: {series: {x: (median time, bytes)}}}, as measured."""
    times, sizes = defaultdict(list), {}
    for row in rows:
        key = row["panel"], row["series"], int(row["x"])
        times[key].append(float(row["time"]))
        sizes[key] = int(row["bytes"] or 0)
    found = defaultdict(lambda: defaultdict(dict))
    for (panel, series, x), each in times.items():
        found[panel][series][x] = median(each), sizes[panel, series, x]
    return found


def report(rows: list[dict[str, str]]) -> None:
    """Print a table for each panel, then how the time of sampling grows with the rows."""
    found, unit = collect(rows), {row["panel"]: row["unit"] for row in rows}
    for panel, lines in found.items():
        table = [[f"{unit[panel]}, by {PANELS[panel][0]}", *lines]]
        for x in sorted(set().union(*lines.values())):
            cells = (lines[series].get(x) for series in lines)
            table.append([f"{x:,}", *map(show, cells)])
        markdown(table)
    print()
    for series, line in found["rows"].items():
        first, last = min(line), max(line)
        grown = line[last][0] / line[first][0]
        print(f"{series}: sampling from {last:,} rows takes {grown:.2f}x of that from {first:,}")


def show(cell: tuple[float, int] | None) -> str:
    """Time and megabytes."""
    if cell is None:
        return "left out"
    took, size = cell
    return f"{took:.1f}, {size / 1e6:,.1f} MB" if size else f"{took:.3f}"


def tick(x: int) -> str:
    """376, 4k, or a power of ten: short, as they stand close on a logarithmic axis."""
    if x >= 10**4:
        return f"$10^{len(str(x)) - 1}$"
    return f"{x // 1000}k" if x >= 1000 else str(x)


def draw_panel(axes: Axes, panel: str, lines: dict[str, dict[int, tuple[float, int]]]) -> None:
    """Times as lines with dots; bytes dotted, on an axis of their own at the right."""
    title, values = PANELS[panel]
    right = None if panel == "envs" else axes.twinx()
    for series, line in lines.items():
        xs, style = sorted(line), {"color": COLORS[series]}
        axes.plot(xs, [line[x][0] for x in xs], "o-", label=series, markersize=3, **style)
        if right:
            right.plot(xs, [line[x][1] for x in xs], ":", lw=1.2, **style)
    axes.set_xscale("log")
    axes.set_xticks(values, map(tick, values))
    axes.minorticks_off()
    axes.set_xlabel(title)
    axes.set_ylabel("ms per transition" if panel == "envs" else f"µs per sample({BATCH})")
    if panel == "columns":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if right:
        right.set_yscale("log")
        right.set_ylabel("bytes of the buffer, dotted")
    corner = {"rows": "lower right", "columns": "upper left", "envs": "center right"}[panel]
    axes.legend(loc=corner, fontsize=7)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """The panels that were measured, side by side."""
    found, last = collect(rows), rows[-1]
    rounds = len({row["round"] for row in rows})
    with drawing.style():
        figure = Figure(figsize=(drawing.PAGE, 2.5))
        grid = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (panel, lines) in zip(grid, found.items(), strict=True):
            draw_panel(axes, panel, lines)
        machine = f"{last['cpu']}, {last['cores']} core(s), median of {rounds} rounds"
        figure.suptitle(machine, fontsize=8)
        drawing.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure unless told not to, then print and draw what is in --out."""
    parser = Parser(prog="scaling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=[*PANELS], metavar="PANEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/scaling.csv")
    parser.add_argument("--draw", action="store_true", help="measure nothing, read --out")
    args = parser.parse_args(argv)
    most = len(os.sched_getaffinity(0))
    if args.rounds < 1 or not 1 <= args.cores <= most:
        parser.error(f"--rounds must be at least 1, --cores from 1 to {most}")
    try:
        if not args.draw:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            open(args.out, "a").close()  # fail now rather than after the first round
            run_rounds(args)
        rows = read_csv(args.out, COLUMNS, {"x": int, "time": float})
        if not rows:
            raise ValueError(f"{args.out} holds no measurement")
        report(rows)
        draw(rows, chart := args.out.with_suffix(".png"))
        print(f"wrote {chart}, from {args.out}")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
