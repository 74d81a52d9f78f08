"""Milliseconds per environment step of the training loop: ours, Stable-Baselines3's and SBX's.

    python experiments/speed.py           # about an hour: tables, results/speed.csv and speed.png
    python experiments/speed.py --draw    # tables and chart again, from speed.csv alone
    python experiments/speed.py --rounds 1 --cells ppo-64-Walker2d-v3 --out speed.csv

Every measurement is a process of its own on --cores cores of the CPU. What counts are the same
steps for all: of SAC those after the 1,000th, of PPO the whole rollouts with their updates after
the first, so that imports, set-up and SBX's compiling are over (`s to window` tells how long all
that took). A round runs each cell's variants in turn: float64 and rounded one after the other,
which of them first alternates, and the others in an order that moves on by one from round to
round. Machines drift, so ratios are formed within a round and their median is taken. The floor
is the time of `env.step` alone plus that of the bare matrix products of acting and learning.
Wants an idle machine; the peers get a virtual environment of their own, .venv-bench.
"""

import argparse
import csv
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
from matplotlib.figure import Figure
from plot import Parser, optional, read_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs

PPO_ROLLOUT, PPO_BATCH, PPO_EPOCHS, SAC_BATCH = 2048, 64, 10, 256  # defaults of all three
CELLS = {  # algo-hidden-task: most ms per step that we aim for
    "sac-64-Walker2d-v3": 1.0,
    "sac-64-Humanoid-v3": 2.4,
    "sac-256-Walker2d-v3": 4.5,
    "sac-256-Humanoid-v3": 9.0,
    "ppo-64-Walker2d-v3": 0.22,
    "ppo-64-Humanoid-v3": 0.40,
}
TABLE_I = [f"{algo}-64-{task}" for algo in ("sac", "ppo") for task in envs.V3_TASKS]  # the paper's
TABLE_I_GOAL = 1.02  # rounded / float64, in the median of the eight cells
CELL_GOALS = {"sac-64-Humanoid-v3": 0.999}  # "below 1.00"
DECIMALS = {"sac": "2", "ppo": "1"}  # the paper's m
PEERS = ["SB3", "SBX"]
OURS = ["float64", "rounded", "packed"]
VARIANTS = [*PEERS, *OURS, "floor"]
RATIOS = {"float64": None, "SB3": 0.5, "faster peer": 0.75, "floor": 2.0}  # of ours to it, at most
COLUMNS = ["round", "cell", "hidden", "variant", "ms_per_step", "seconds_to_window", "cores"]
COLUMNS += ["versions", "cpu", "failed"]
BENCH = ROOT / ".venv-bench"
COLORS = {"SB3": "#e07b00", "SBX": "#f2b766", "float64": "black", "rounded": "#1667c4"}
COLORS |= {"packed": "#7fb0e6", "floor": "0.75"}


# --- The floor -----------------------------------------------------------------------------------

Shape = tuple[int, int, int, int]  # count, rows, inner, cols: count x (rows, inner) @ (inner, cols)


def forward(count: int, batch: int, inputs: int, hidden: int, outputs: int) -> list[Shape]:
    """Products of `count` networks with two hidden layers."""
    sizes = (inputs, hidden), (hidden, hidden), (hidden, outputs)
    return [(count, batch, *size) for size in sizes]


def products(algo: str, obs_dim: int, act_dim: int, hidden: int, batch: int) -> list[Shape]:
    """The matrix products of one update, in their order."""

    def weights(count: int, inputs: int, outputs: int) -> list[Shape]:
        sizes = (hidden, outputs), (hidden, hidden), (inputs, hidden)
        return [(count, rows, batch, cols) for rows, cols in sizes]

    def hiddens(count: int, outputs: int) -> list[Shape]:
        return [(count, batch, outputs, hidden), (count, batch, hidden, hidden)]

    if algo == "ppo":
        return [
            *forward(1, batch, obs_dim, hidden, act_dim),  # policy,
            *forward(1, batch, obs_dim, hidden, 1),  # value function,
            *hiddens(1, act_dim),  # and back through both; nobody asks for the inputs' gradient
            *weights(1, obs_dim, act_dim),
            *hiddens(1, 1),
            *weights(1, obs_dim, 1),
        ]
    pair = obs_dim + act_dim
    return [
        *forward(1, 2 * batch, obs_dim, hidden, 2 * act_dim),  # actor, on s and s' at once
        *forward(2, batch, pair, hidden, 1),  # target critics
        *forward(2, batch, pair, hidden, 1),  # critics,
        *hiddens(2, 1),  # and back through them
        *weights(2, pair, 1),
        *forward(2, batch, pair, hidden, 1),  # critics on the actor's own actions,
        *hiddens(2, 1),  # and back through them, to these actions only
        (2, batch, hidden, act_dim),
        *hiddens(1, 2 * act_dim),  # back through the actor, on s
        *weights(1, obs_dim, 2 * act_dim),
    ]


@torch.inference_mode()
def time_products(shapes: list[Shape], repeats: int = 300) -> float:
    """Median seconds for all products, one after the other, into results that are there before."""
    calls = []
    for count, rows, inner, cols in shapes:
        a, b = torch.randn(count, rows, inner), torch.randn(count, inner, cols)
        out = torch.empty(count, rows, cols)
        if inner == 1:  # an outer product is no matrix product's work
            calls.append((torch.mul, a, b, out))
        elif count > 1 and cols > 1:
            calls.append((torch.bmm, a, b, out))
        else:  # two products with one column are faster one by one than batched
            calls += [(torch.mm, *each) for each in zip(a, b, out, strict=True)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for multiply, a, b, out in calls:
            multiply(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def floor(cell: str, steps: int = 1000) -> float:
    """Milliseconds per step of `env.step` (its median) and of the matrix products alone."""
    algo, hidden, env_id = cell.split("-", 2)
    env, hidden = envs.make(env_id), int(hidden)
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    env.action_space.seed(1)
    env.reset(seed=1)
    seconds = []
    for _ in range(steps):
        action = env.action_space.sample()
        start = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        seconds.append(time.perf_counter() - start)
        if terminated or truncated:
            env.reset()
    if algo == "sac":
        outputs, batch, updates_per_step = [2 * act_dim], SAC_BATCH, 1
    else:
        outputs, batch, updates_per_step = [act_dim, 1], PPO_BATCH, PPO_EPOCHS / PPO_BATCH
    acting = [shape for count in outputs for shape in forward(1, 1, obs_dim, hidden, count)]
    update = time_products(products(algo, obs_dim, act_dim, hidden, batch))
    return 1000 * (median(seconds) + time_products(acting) + updates_per_step * update)


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


def window(cell: str, args: argparse.Namespace) -> tuple[int, int]:
    """The steps between which time is taken; training ends with the second."""
    algo, hidden, _ = cell.split("-", 2)
    if algo == "ppo":
        return PPO_ROLLOUT, args.rollouts * PPO_ROLLOUT
    return 1000, args.steps_sac or (3000 if hidden == "64" else 2000)


def measure(cell: str, variant: str, args: argparse.Namespace) -> dict[str, str]:
    """Columns of speed.csv from one process. Raises RuntimeError with one line if it fails."""
    algo, hidden, env_id = cell.split("-", 2)
    versions = f"torch {torch.__version__}"
    if variant == "floor":
        ms = float(child([sys.executable, __file__, "--floor", cell], args.cores))
        return {"ms_per_step": f"{ms:.4f}", "versions": versions}
    first, last = window(cell, args)
    if variant in PEERS:
        if args.no_peers:
            raise RuntimeError(args.no_peers)
        command = [args.bench_python, ROOT / "experiments/peers.py", "--lib", variant.lower()]
        command += ["--algo", algo]
    else:
        command = [sys.executable, ROOT / f"{algo}.py", "--device", "cpu", "--eval-episodes", "0"]
        command += ["--quant-m", DECIMALS[algo]] if variant != "float64" else []
        command += ["--pack"] if variant == "packed" else []
    command += ["--env", env_id, "--hidden", hidden, "--total-timesteps", str(last)]
    marks, said = train(command, args.cores)
    if not {first, last} <= marks.keys():
        raise RuntimeError(f"charts/SPS is at steps {sorted(marks)}, not at {first} and {last}")
    if variant in PEERS:
        versions = said.splitlines()[-1]
    ms = 1000 * (marks[last] - marks[first]) / (last - first)
    to_window = f"{marks[first]:.2f}"
    return {"ms_per_step": f"{ms:.4f}", "seconds_to_window": to_window, "versions": versions}


def order(cell: str, number: int) -> list[str]:
    """The variants of a cell in the order of a round, which is counted from 1."""
    pair = ["float64", "rounded"] if number % 2 else ["rounded", "float64"]
    others = [["packed"], ["SB3"], ["SBX"], ["floor"]] if cell in CELLS else []
    groups = [pair, *others]
    first = (number - 1) % len(groups)
    return [variant for group in groups[first:] + groups[:first] for variant in group]


def install_peers() -> str:
    """Make .venv-bench. Returns why that failed, in one line, else nothing."""
    print(f"installing Stable-Baselines3 and SBX into {BENCH} (minutes, once)", flush=True)
    pip = [BENCH / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
    requirements = ROOT / "requirements-bench.txt"
    pins = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
    # torch by itself first: a dependency of the others must not choose another build of it.
    commands = [sys.executable, "-m", "venv", BENCH], [*pip, *pins], [*pip, "-r", requirements]
    try:
        for command in commands:
            child(command, cores=1)
    except BaseException as error:  # an interrupt too: a half-made environment would look finished
        shutil.rmtree(BENCH, ignore_errors=True)
        if isinstance(error, RuntimeError):
            return f"cannot be installed: {error}"
        raise
    return ""


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run_rounds(args: argparse.Namespace) -> None:
    """Measure, and write --out after every round."""
    machine = {"cores": args.cores, "cpu": cpu()}
    wanted = set(PEERS) & set(args.variants) and set(CELLS) & set(args.cells)
    args.no_peers = install_peers() if wanted and not args.bench_python.exists() else ""
    rows = []
    for number in range(1, args.rounds + 1):
        for cell in args.cells:
            for variant in (name for name in order(cell, number) if name in args.variants):
                print(f"round {number}, {cell}, {variant}: ", end="", flush=True)
                row = {"round": number, "cell": cell, "hidden": cell.split("-")[1]}
                row |= {"variant": variant, **machine}
                try:
                    row |= measure(cell, variant, args)
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


def verdict(value: float, goal: float) -> str:
    return "reached" if value <= goal else "missed"


def judged(value: float | None, goal: float | None, digits: int = 2) -> str:
    """The value, and where there is a goal what became of it."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" {verdict(value, goal)}" if goal else "")


def peers_line(cell: str, variant: str, rows: list[dict[str, str]], times: Times) -> list[str]:
    """A line of the first table, from the variant's rows in that cell."""
    mine, ours = times[cell, variant], variant in OURS
    failed = [row["failed"] for row in rows if row["failed"]]
    note = f"{len(failed)} of {len(rows)} failed: {failed[-1]}" if failed else ""
    if not mine:
        return [cell, variant, *["-"] * (len(RATIOS) + 5), note or "not measured"]
    ms = median(mine.values())
    shown = [f"{x:.3f}" for x in (ms, min(mine.values()), max(mine.values()))]
    for name, goal in RATIOS.items():
        shown.append(judged(ratio(mine, times[cell, name]), goal if ours else None))
    shown.append(f"{CELLS[cell]} {verdict(ms, CELLS[cell])}" if ours else "-")
    waits = [float(row["seconds_to_window"]) for row in rows if row["seconds_to_window"]]
    shown.append(f"{median(waits):.1f}" if waits else "-")
    return [cell, variant, *shown, note]


def peers_table(rows: list[dict[str, str]], times: Times) -> list[list[str]]:
    """Ours beside the peers and the floor, in those of CELLS that were run."""
    bounds = [f"/ {name}" + f" (<= {goal})" * bool(goal) for name, goal in RATIOS.items()]
    table = [["cell", "variant", "ms per step", "min", "max", *bounds]]
    table[0] += ["ms to reach", "s to window", "note"]
    for cell in CELLS:
        of_cell = [row for row in rows if row["cell"] == cell]
        for variant in VARIANTS if of_cell else []:
            of_variant = [row for row in of_cell if row["variant"] == variant]
            table.append(peers_line(cell, variant, of_variant, times))
    return table


def rounding_table(times: Times) -> list[list[str]]:
    """The paper's Table I: rounded / float64 in the cells that were measured, and their median."""
    table = [["cell", "float64, ms", "rounded, ms", "ratio", "95% interval", "goal"]]
    ratios = {}  # cell: {round: ratio}
    for cell in TABLE_I:
        base, rounded = times[cell, "float64"], times[cell, "rounded"]
        if both := sorted(base.keys() & rounded.keys()):
            ratios[cell] = {number: rounded[number] / base[number] for number in both}
            shown = [f"{median(each[number] for number in both):.3f}" for each in (base, rounded)]
            table.append([cell, *shown, *summary([ratios[cell]], CELL_GOALS.get(cell))])
    if ratios:
        goal = TABLE_I_GOAL if len(ratios) == len(TABLE_I) else None
        name = f"median of {len(ratios)} of the {len(TABLE_I)} cells"
        table.append([name, "", "", *summary([*ratios.values()], goal)])
    return table


def summary(ratios: list[dict[str, float]], goal: float | None) -> list[str]:
    """Columns of the second table: ratios are {round: ratio} of each cell."""
    rounds = sorted(set.intersection(*(set(each) for each in ratios)))
    middle = median(median(each.values()) for each in ratios)
    shown = "-"  # of one round there is nothing to resample
    if len(rounds) > 1:
        low, high = interval(np.array([[each[number] for number in rounds] for each in ratios]))
        shown = f"{low:.3f} to {high:.3f}"
    return [judged(middle, goal, digits=3), shown, "-" if goal is None else f"<= {goal}"]


def markdown(table: list[list[str]]) -> None:
    """Print a table whose first line is its head; nothing if it has no other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if len(table) > 1:
        print()
        for line in [table[0], ["-" * width for width in widths], *table[1:]]:
            print("|", " | ".join(map(str.ljust, line, widths)), "|")


def report(rows: list[dict[str, str]]) -> None:
    """Print what was measured, on what, as two tables in Markdown."""
    times, rounds = read_times(rows), {row["round"] for row in rows}
    on = " and ".join(sorted({f"{row['cores']} core(s) of {row['cpu']}" for row in rows}))
    print(f"\n{len(rounds)} rounds on {on}; medians of ms and of the rounds' ratios")
    for name, variants in {"SB3": ["SB3"], "SBX": ["SBX"], "ours": OURS}.items():
        found = {row["versions"] for row in rows if row["variant"] in variants} - {""}
        print(f"{name}: {' and '.join(sorted(found)) or 'not measured'}")
    markdown(peers_table(rows, times))
    markdown(rounding_table(times))
    print(
        "\nfaster peer: of each round. ms to reach: set on a faster machine, so that ratios count\n"
        "more. s to window: from the start of the process to the first step that counts.\n"
        "95% interval: percentile bootstrap over rounds."
    )


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """A panel for each of CELLS: median ms per step of every variant, a line from min to max."""
    times = read_times(rows)
    figure = Figure(figsize=(12, 6.4), dpi=120, layout="constrained")
    for axes, cell in zip(figure.subplots(2, 3).T.flat, CELLS, strict=True):
        algo, hidden, task = cell.split("-", 2)
        axes.set_title(f"{algo.upper()} {hidden}-{hidden}, {task}", fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.6, len(VARIANTS) - 0.4)
        axes.margins(y=0.1)
        names = [f"ours\n{name}" if name in OURS else name for name in VARIANTS]
        axes.set_xticks(range(len(VARIANTS)), names, fontsize=9)
        axes.tick_params(axis="x", length=0)
        for place, variant in enumerate(VARIANTS):
            if each := [*times[cell, variant].values()]:
                ms = median(each)
                spread = [[ms - min(each)], [max(each) - ms]]
                bars = axes.bar(place, ms, 0.75, color=COLORS[variant], yerr=spread, ecolor="0.5")
                axes.bar_label(bars, [f"{ms:.2f}"], padding=2, fontsize=10)
            else:
                where = {"transform": axes.get_xaxis_transform(), "rotation": 90}
                axes.text(place, 0.02, "no measurement", ha="center", color="0.5", **where)
    for axes in figure.axes[::3]:
        axes.set_ylabel("ms per environment step", fontsize=11)
    last = rows[-1]
    rounds = len({row["round"] for row in rows})
    figure.suptitle(
        f"{last['cpu']}, {last['cores']} core(s), median of {rounds} rounds, line from min to max",
        fontsize=12,
    )
    figure.savefig(path)


# --- Command line --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """SystemExit with code 2 and one line for bad input."""
    cells, python = [*dict.fromkeys([*CELLS, *TABLE_I])], BENCH / "bin/python"
    parser = Parser(prog="speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="of every process")
    parser.add_argument("--cells", nargs="+", choices=cells, default=cells, metavar="CELL")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT"
    )
    parser.add_argument("--steps-sac", type=int, help="of each run; 3000, with 256 units 2000")
    parser.add_argument("--rollouts", type=int, default=8, help="of each run of PPO, 2048 steps")
    parser.add_argument("--bench-python", type=Path, default=python, help="of the peers")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/speed.csv")
    parser.add_argument("--draw", action="store_true", help="measure nothing, read --out")
    parser.add_argument("--floor", choices=cells, metavar="CELL", help="print its floor, no more")
    args = parser.parse_args(argv)
    most = len(os.sched_getaffinity(0))
    if args.rounds < 1 or not 1 <= args.cores <= most:
        parser.error(f"--rounds must be at least 1, --cores from 1 to {most}")
    if args.steps_sac is not None and (args.steps_sac < 2000 or args.steps_sac % 1000):
        parser.error("--steps-sac must be a multiple of 1000, at least 2000")
    if args.rollouts < 2:
        parser.error("--rollouts must be at least 2: the first one is warm-up")
    if args.bench_python != python and not args.bench_python.exists():
        parser.error(f"--bench-python {args.bench_python}: no such file")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure unless told not to, then print and draw what is in --out."""
    args = parse(argv)
    if args.floor:
        print(floor(args.floor))
        return
    try:
        if not args.draw:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            open(args.out, "a").close()  # fail now rather than after the first round
            run_rounds(args)
        numbers = {"ms_per_step": optional, "seconds_to_window": optional}
        rows = read_csv(args.out, COLUMNS, numbers)
        if not rows:
            raise ValueError(f"{args.out} holds no measurement")
        report(rows)
        draw(rows, chart := args.out.with_suffix(".png"))
        print(f"wrote {chart}, from {args.out}")
    except (ValueError, OSError) as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
