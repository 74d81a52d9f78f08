"""Milliseconds per environment step of the training loop: ours, Stable-Baselines3's and SBX's.

    python experiments/speed.py           # about an hour: tables, runs/speed.csv and speed.png
    python experiments/speed.py --draw --out experiments/results/speed.csv    # only from that file
    python experiments/speed.py --rounds 1 --cells ppo-64-Walker2d-v3 --out speed.csv
    python experiments/speed.py --against ../before    # and another checkout, as variant `before`
    python experiments/speed.py --cells sac-64-Humanoid-v3 --variants float64 float16 m=1 m=2

Every measurement is a process of its own on --cores cores of the CPU. What counts are the same
steps for all: of SAC those after the 1,000th, of PPO the whole rollouts with their updates after
the first, so that imports, set-up and SBX's compiling are over (`s to window` tells how long all
that took). A round runs each cell's variants in turn: float64, rounded and before one after the
other, in an order that alternates, and the others in an order that moves on by one from round to
round. Machines drift, so ratios are formed within a round and their median is taken. The floor
is what floor.py measures. Wants an idle machine. `./run.sh experiments/peers.py --help` installs
Stable-Baselines3 and SBX, into .venv-bench.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import curves
from curves import Parser, optional, read_csv
from intervals import LEAST_SEEDS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from quantize import STORAGE_DTYPES
from support import drawing, envs
from tables import write_csv

PPO_ROLLOUT = 2048  # steps between two updates of PPO, by default in all three
CELLS = [  # algo-hidden-task
    "sac-64-Walker2d-v3",
    "sac-64-Humanoid-v3",
    "sac-256-Walker2d-v3",
    "sac-256-Humanoid-v3",
    "ppo-64-Walker2d-v3",
    "ppo-64-Humanoid-v3",
]
TABLE_I = [f"{algo}-64-{task}" for algo in ("sac", "ppo") for task in envs.V3_TASKS]  # the paper's
DECIMALS = {"sac": "2", "ppo": "1"}  # the paper's m
PEERS = ["SB3", "SBX"]
OURS = ["float64", "rounded", "before", "packed"]
VARIANTS = [*PEERS, *OURS, "floor"]
STORAGES = {name: ["--storage", name] for name in STORAGE_DTYPES if name != "float64"}
STORAGES |= {f"m={m}": ["--quant-m", str(m)] for m in range(4)}  # variants if asked for
OTHERS = ["float64", "SB3", "faster peer", "floor"]  # what the first table divides by
COLUMNS = ["round", "cell", "hidden", "variant", "ms_per_step", "seconds_to_window", "cores"]
COLUMNS += ["versions", "cpu", "failed"]
PEERS_PYTHON = ROOT / ".venv-bench/bin/python"
COLORS = {"SB3": drawing.ORANGE, "SBX": "#f2b766", "float64": drawing.BLACK, "floor": "0.75"}
COLORS |= {"rounded": drawing.BLUE, "before": "#d1495b", "packed": drawing.LIGHT_BLUE}
COLORS |= dict.fromkeys(STORAGES, "0.5")
# What the ratios are meant to be at most: each cell's, by its hidden units, and their median.
GOALS = {"SB3": {"64": 0.5}, "faster peer": {"64": 1.0, "256": 1.0}}
BEFORE_GOALS = {"cell": 1.12, "median": 1.05}
TABLE_I_GOALS = {"cell": None, "median": 1.02}


# --- Measuring -----------------------------------------------------------------------------------


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.processor()


def child(command: list, cores: int) -> str:
    """What a command prints, run on that many cores. Raises RuntimeError with one line."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables = dict.fromkeys(names, str(cores)) | {"CUDA_VISIBLE_DEVICES": ""}
    mine = sorted(os.sched_getaffinity(0))[:cores]  # by which JAX sizes its pool of threads
    options = {"env": os.environ | variables, "capture_output": True, "text": True}
    try:
        run = subprocess.run(
            command, preexec_fn=lambda: os.sched_setaffinity(0, mine), check=True, **options
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        code = f"exit code {error.returncode}"  # negative: a signal, and no word about it
        raise RuntimeError(lines[-1] if lines and error.returncode > 0 else code) from None
    except OSError as error:
        raise RuntimeError(f"cannot run {command[0]}: {error.strerror}") from None
    return run.stdout


def train(command: list, cores: int) -> tuple[dict[int, float], str]:
    """Run a training script.

    Returns:
        {step: seconds since the start of the process} of its `charts/SPS` events, and what it
        printed. Ours and peers.py write them at the same steps: SAC at every 1,000th, PPO at the
        end of every update.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        said = child([*command, "--run-dir", folder], cores)
        (file,) = Path(folder).rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    speeds = events.Scalars("charts/SPS") if "charts/SPS" in events.Tags()["scalars"] else []
    return {event.step: event.wall_time - start for event in speeds}, said


def window(cell: str) -> tuple[int, int]:
    """The steps between which time is taken; training ends with the second."""
    algo, hidden, _ = cell.split("-", 2)
    if algo == "ppo":
        return PPO_ROLLOUT, 8 * PPO_ROLLOUT
    return 1000, 3000 if hidden == "64" else 2000


def commit(checkout: Path) -> str:
    """The version that git knows a folder by, or the folder's name."""
    describe = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude", "*"]
    run = subprocess.run(describe, capture_output=True, text=True, check=False)
    return run.stdout.strip() or checkout.name


def command_of(cell: str, variant: str, against: Path | None) -> list:
    """The training that is timed."""
    algo, hidden, env_id = cell.split("-", 2)
    if variant in PEERS:
        if not PEERS_PYTHON.exists():
            raise RuntimeError("not installed; `./run.sh experiments/peers.py --help` does that")
        peers = ROOT / "experiments/peers.py"
        command = [PEERS_PYTHON, peers, "--lib", variant.lower(), "--algo", algo]
    else:
        root = against if variant == "before" else ROOT
        command = [sys.executable, root / f"{algo}.py", "--device", "cpu", "--eval-episodes", "0"]
        rounded = ["--quant-m", DECIMALS[algo]]
        own = {"float64": [], "packed": [*rounded, "--pack"]} | STORAGES
        command += own.get(variant, rounded)
    _, last = window(cell)
    return [*command, "--env", env_id, "--hidden", hidden, "--total-timesteps", str(last)]


def measure(cell: str, variant: str, cores: int, against: Path | None) -> dict[str, str]:
    """Columns of speed.csv from one process. Raises RuntimeError with one line if it fails."""
    versions = f"torch {torch.__version__}"
    if variant == "floor":
        ms = float(child([sys.executable, ROOT / "experiments/floor.py", cell], cores))
        return {"ms_per_step": f"{ms:.4f}", "versions": versions}
    marks, said = train(command_of(cell, variant, against), cores)
    first, last = window(cell)
    if not {first, last} <= marks.keys():
        raise RuntimeError(f"charts/SPS is at steps {sorted(marks)}, not at {first} and {last}")
    if variant in PEERS:
        versions = said.splitlines()[-1]
    elif variant == "before":
        versions = f"{commit(against)}, {versions}"
    ms = 1000 * (marks[last] - marks[first]) / (last - first)
    to_window = f"{marks[first]:.2f}"
    return {"ms_per_step": f"{ms:.4f}", "seconds_to_window": to_window, "versions": versions}


def order(cell: str, number: int, variants: list[str]) -> list[str]:
    """Those of the variants that a cell has, in the order of a round, which is counted from 1."""
    ours = ["float64", "rounded", "before"]
    others = ["packed", *PEERS, "floor", *STORAGES] if cell in CELLS else []
    groups = [ours if number % 2 else ours[::-1], *([each] for each in others)]
    groups = [group for group in groups if {*group} & {*variants}]
    first = (number - 1) % max(1, len(groups))
    moved_on = groups[first:] + groups[:first]
    return [variant for group in moved_on for variant in group if variant in variants]


def run_rounds(args: argparse.Namespace, rows: list[dict]) -> None:
    """Measure, of the rounds, the cells that rows lack something of; write --out after each."""
    machine = {"cores": args.cores, "cpu": cpu()}
    variants = [name for name in args.variants if name != "before" or args.against]
    for number in range(1, args.rounds + 1):
        for cell in args.cells:
            names = order(cell, number, variants)
            there = [row for row in rows if (row["round"], row["cell"]) == (str(number), cell)]
            if {row["variant"] for row in there if row["ms_per_step"]} >= {*names}:
                continue
            # What is compared is measured one after the other: all of it again.
            rows[:] = [row for row in rows if row not in there or row["variant"] not in names]
            for variant in names:
                print(f"round {number}, {cell}, {variant}: ", end="", flush=True)
                row = {"round": str(number), "cell": cell, "hidden": cell.split("-")[1]}
                row |= {"variant": variant, **machine}
                try:
                    row |= measure(cell, variant, args.cores, args.against)
                    print(f"{row['ms_per_step']} ms per step")
                except RuntimeError as error:
                    row["failed"] = str(error)
                    print(error)
                rows.append(row)
        write_csv(args.out, COLUMNS, rows)


# --- Tables and chart ----------------------------------------------------------------------------

Times = dict[tuple[str, str], dict[str, float]]  # (cell, variant): {round: ms per step}


def read_times(rows: list[dict[str, str]]) -> Times:
    """What was measured, and per cell the faster of the two peers in each round that has both."""
    times = defaultdict(dict)
    for row in rows:
        if row["ms_per_step"]:
            times[row["cell"], row["variant"]][row["round"]] = float(row["ms_per_step"])
    for cell in CELLS:
        one, other = (times[cell, peer] for peer in PEERS)
        both = one.keys() & other.keys()
        times[cell, "faster peer"] = {number: min(one[number], other[number]) for number in both}
    return times


def ratio(ours: dict, other: dict) -> float | None:
    """Median, over the rounds that have both, of the ratio."""
    both = ours.keys() & other.keys()
    return median(ours[number] / other[number] for number in both) if both else None


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95% interval of the median over cells of the median over rounds: ratios (cells, rounds).

    Percentile bootstrap: rounds are drawn with replacement, the same ones for all cells.
    """
    rounds = ratios.shape[1]
    draws = np.random.default_rng(1).integers(rounds, size=(10_000, rounds))
    medians = np.median(np.median(ratios[:, draws], axis=-1), axis=0)
    return tuple(np.percentile(medians, [2.5, 97.5]))


def judged(value: float, goal: float | None) -> str:
    """The value, and where there is a goal what became of it."""
    if goal is None:
        return f"{value:.3f}"
    return f"{value:.3f} {'reached' if value <= goal else 'missed'}"


def peers_line(cell: str, variant: str, rows: list[dict[str, str]], times: Times) -> list[str]:
    """A line of the first table, from the variant's rows in that cell."""
    mine, hidden = times[cell, variant], cell.split("-")[1]
    failed = [row["failed"] for row in rows if row["failed"]]
    note = f"{len(failed)} of {len(rows)} failed: {failed[-1]}" if failed else ""
    if not mine:
        return [cell, variant, *["-"] * (len(OTHERS) + 4), note or "not measured"]
    ms = median(mine.values())
    shown = [f"{x:.3f}" for x in (ms, min(mine.values()), max(mine.values()))]
    for other in OTHERS:
        found = ratio(mine, times[cell, other])
        goal = GOALS.get(other, {}).get(hidden) if variant in OURS else None
        shown.append("-" if found is None else judged(found, goal))
    waits = [float(row["seconds_to_window"]) for row in rows if row["seconds_to_window"]]
    shown.append(f"{median(waits):.1f}" if waits else "-")
    return [cell, variant, *shown, note]


def peers_table(rows: list[dict[str, str]], times: Times) -> list[list[str]]:
    """Ours beside the peers and the floor, in those of CELLS that were run."""
    table = [["cell", "variant", "ms per step", "min", "max", *(f"/ {name}" for name in OTHERS)]]
    table[0] += ["s to window", "note"]
    for cell in CELLS:
        of_cell = [row for row in rows if row["cell"] == cell]
        for variant in asked(rows) if of_cell else []:
            of_variant = [row for row in of_cell if row["variant"] == variant]
            table.append(peers_line(cell, variant, of_variant, times))
    return table


def asked(rows: list[dict[str, str]]) -> list[str]:
    """The variants that were asked for."""
    names = {row["variant"] for row in rows}
    return [variant for variant in [*VARIANTS, *STORAGES] if variant in names]


def ratios_table(times: Times, other: str, cells: list[str], goals: dict) -> list[list[str]]:
    """Rounded / other in the cells that were measured, and the median of all of them."""
    table = [["cell", f"{other}, ms", "rounded, ms", "ratio", "95% interval", "goal"]]
    ratios = {}  # cell: {round: ratio}
    for cell in cells:
        base, rounded = times[cell, other], times[cell, "rounded"]
        if both := sorted(base.keys() & rounded.keys()):
            ratios[cell] = {number: rounded[number] / base[number] for number in both}
            shown = [f"{median(each[number] for number in both):.3f}" for each in (base, rounded)]
            table.append([cell, *shown, *summary([ratios[cell]], goals["cell"])])
    if ratios:
        goal = goals["median"] if len(ratios) == len(cells) else None
        name = f"median of {len(ratios)} of the {len(cells)} cells"
        table.append([name, "", "", *summary([*ratios.values()], goal)])
    return table


def summary(ratios: list[dict[str, float]], goal: float | None) -> list[str]:
    """Ratio, interval and goal for `ratios_table`: ratios are {round: ratio} of each cell."""
    rounds = sorted(set.intersection(*(set(each) for each in ratios)))
    middle = median(median(each.values()) for each in ratios)
    shown = "-"  # a bootstrap of fewer is far too narrow
    if len(rounds) >= LEAST_SEEDS:
        low, high = interval(np.array([[each[number] for number in rounds] for each in ratios]))
        shown = f"{low:.3f} to {high:.3f}"
    return [judged(middle, goal), shown, "-" if goal is None else f"<= {goal}"]


def markdown(table: list[list[str]]) -> None:
    """Print a table whose first line is its head; nothing if it has no other."""
    if len(table) > 1:
        print(f"\n{curves.markdown(table)}")


def report(rows: list[dict[str, str]]) -> None:
    """Print what was measured, and on what machine, as tables in Markdown."""
    times, rounds = read_times(rows), {row["round"] for row in rows}
    on = " and ".join(sorted({f"{row['cores']} core(s) of {row['cpu']}" for row in rows}))
    print(f"\n{len(rounds)} rounds on {on}; medians of ms and of the rounds' ratios")
    for name, variant in {
        "SB3": "SB3",
        "SBX": "SBX",
        "ours": "rounded",
        "before": "before",
    }.items():
        found = {row["versions"] for row in rows if row["variant"] == variant} - {""}
        print(f"{name}: {' and '.join(sorted(found)) or 'not measured'}")
    markdown(peers_table(rows, times))
    markdown(ratios_table(times, "float64", TABLE_I, TABLE_I_GOALS))
    markdown(ratios_table(times, "before", CELLS, BEFORE_GOALS))
    print(
        "\nfaster peer: of each round. Goals: with 64 hidden units at most 0.5 of SB3, always at\n"
        "most the faster peer. s to window: from the start of the process to the first step that\n"
        "counts. 95% interval: percentile bootstrap over rounds."
    )


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """A panel for each of CELLS: median ms per step of every variant, a line from min to max."""
    times, variants, cells = read_times(rows), asked(rows), {row["cell"] for row in rows}
    cells = [cell for cell in dict.fromkeys([*CELLS, *TABLE_I]) if cell in cells]
    last, rounds = rows[-1], len({row["round"] for row in rows})
    machine = f"{last['cpu']}, {last['cores']} core(s)"
    with drawing.style():
        figure = Figure(figsize=(drawing.PAGE, 0.4 + 1.6 * -(-len(cells) // 2)))
        grid = figure.subplots(-(-len(cells) // 2), 2, squeeze=False).flat
        for cell, axes in zip(cells, grid, strict=False):
            draw_cell(
                axes, cell, {variant: [*times[cell, variant].values()] for variant in variants}
            )
        for axes in grid:  # one that is left over
            axes.set_axis_off()
        figure.supylabel("ms per environment step", fontsize=8)
        figure.suptitle(f"{machine}, median of {rounds} rounds, line from min to max", fontsize=8)
        drawing.save(figure, path)


def draw_cell(axes: Axes, cell: str, times: dict[str, list[float]]) -> None:
    """A bar for each variant's times."""
    algo, hidden, task = cell.split("-", 2)
    axes.set_title(f"{algo.upper()} {hidden}-{hidden}, {task}")
    axes.set_xlim(-0.6, len(times) - 0.4)
    axes.margins(y=0.15)
    names = [f"ours\n{variant}" if variant in OURS else variant for variant in times]
    axes.set_xticks(range(len(times)), names, fontsize=7, rotation=45 if len(names) > 7 else 0)
    axes.tick_params(axis="x", length=0)
    for x, (variant, each) in enumerate(times.items()):
        if each:
            ms = median(each)
            spread = [[ms - min(each)], [max(each) - ms]]
            bars = axes.bar(x, ms, 0.75, color=COLORS[variant], yerr=spread, ecolor="0.5")
            axes.bar_label(bars, [f"{ms:.2f}"], padding=2, fontsize=7)
        else:
            where = {"transform": axes.get_xaxis_transform(), "rotation": 90}
            axes.text(x, 0.02, "no measurement", ha="center", color="0.5", fontsize=7, **where)


# --- Command line --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """SystemExit with code 2 and one line for bad input."""
    cells = [*dict.fromkeys([*CELLS, *TABLE_I])]
    parser = Parser(prog="speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="of every process")
    parser.add_argument("--cells", nargs="+", choices=cells, default=cells, metavar="CELL")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[*VARIANTS, *STORAGES],
        default=VARIANTS,
        metavar="VARIANT",
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, to time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/speed.csv")
    parser.add_argument("--resume", action="store_true", help="measure what --out lacks")
    parser.add_argument("--draw", action="store_true", help="measure nothing, read --out")
    args = parser.parse_args(argv)
    most = len(os.sched_getaffinity(0))
    if args.rounds < 1 or not 1 <= args.cores <= most:
        parser.error(f"--rounds must be at least 1, --cores from 1 to {most}")
    if args.against and not (args.against / "sac.py").exists():
        parser.error(f"--against {args.against}: no sac.py there")
    if args.against:
        args.against = args.against.resolve()
    return args


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file of ours. Raises as `read_csv`."""
    numbers = {"round": int, "ms_per_step": optional, "seconds_to_window": optional}
    return read_csv(path, COLUMNS, numbers)


def main(argv: list[str] | None = None) -> None:
    """Measure unless told not to, then print and draw what is in --out."""
    args = parse(argv)
    try:
        if not args.draw:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            before = args.resume and args.out.exists() and args.out.stat().st_size
            rows = read(args.out) if before else []
            open(args.out, "a").close()  # fail now rather than after the first round
            run_rounds(args, rows)
        if not (rows := read(args.out)):
            raise ValueError(f"{args.out} holds no measurement")
        report(rows)
        draw(rows, chart := args.out.with_suffix(".png"))
        print(f"wrote {chart}, from {args.out}")
    except (ValueError, OSError) as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
