"""Learning curves: from TensorBoard runs to two CSV files, and from those to figures and a table.

    python experiments/plot.py collect runs/learning --out experiments/results
    python experiments/plot.py draw --results experiments/results

The CSV files are committed and the runs are not, so `draw`, and `table`, which prints the final
returns in Markdown, need no training. `runs.csv` has one row per run, `curves.csv` one per run and
bin of BIN steps: the mean return of the episodes that ended in it, and no row where none did.
"""

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BIN = 5_000  # environment steps
TIME_LIMIT = 1_000  # steps of the longest episode of the four tasks
TAG = "charts/episodic_return"
SB3_NAME = re.compile(r"(?P<env>.+)__sb3-(?P<algo>ppo|sac)__seed(?P<seed>\d+)")  # see peers.py
SB3_ROLLOUT = {"ppo": 2048, "sac": 1}  # steps at a time: SB3 finishes the last one, as we do
MAY_DIFFER = {"quant_m", "storage", "pack", "drop_constant", "memory_budget"}
MAY_DIFFER |= {"seed", "device", "eval_episodes", "run_dir", "run_name"}
KEY = ["algo", "env", "method", "seed"]  # what identifies a run
CURVES = [*KEY, "step", "episodic_return", "episodes"]
RUNS = [*KEY, "steps", "return_last_tenth", "eval_mean", "eval_std", "eval_episodes", "max_abs_obs"]
RUNS += ["clip_fraction", "first_ratio_error", "torch", "gymnasium", "mujoco", "numpy", "machine"]
PANELS = {  # algo: the paper's decimals for it, tasks
    "ppo": ("m=1", ["HalfCheetah-v3", "Walker2d-v3", "Ant-v3", "Humanoid-v3"]),
    "sac": ("m=2", ["HalfCheetah-v3", "Walker2d-v3", "Humanoid-v3"]),
}
BLUE = {"color": "#1667c4", "linestyle": "-"}
STYLES = {  # method: label, line
    "float64": ("float64", {"color": "black", "linestyle": "-"}),
    "m=1": ("rounded to 1 decimal (m=1)", BLUE),
    "m=2": ("rounded to 2 decimals (m=2)", BLUE),
    "SB3": ("Stable-Baselines3", {"color": "#e07b00", "linestyle": (0, (3.5, 1.2))}),
}
CAPTION = (
    "Mean over seeds; shaded: from the lowest to the highest seed; thin: each seed, of 3 or fewer. "
    f"Returns in training, averaged in bins of {BIN:,} steps, then running mean of 3 bins."
)
BANDS_STEPS = 300_000  # of PPO's training, which the bands are for
BANDS = {"HalfCheetah-v3": "0 to 2500", "Walker2d-v3": "330 to 2000"}
BANDS |= {"Ant-v3": "50 to 200", "Humanoid-v3": "345 to 390"}
FOOTNOTE = """
Training return over the last tenth of the steps: mean ± sample standard deviation over seeds.
Rounded: m = 1 for PPO, m = 2 for SAC. Expected: our judgement, not itself published, of PPO without
normalisation at 300,000 steps. Humanoid and Ant (with real contact forces): from the runs of
Stable-Baselines3 in `Kallinteris-Andreas/gymnasium-mujuco-v5-envs-validation`. HalfCheetah and
Walker2d: at least as in `openai/spinningup` and `LQNew/Continuous_Control_Benchmark`, at most as in
`thu-ml/tianshou`, which normalises. Nothing is published for SAC with 64-64 networks."""


def bin_returns(steps: np.ndarray, returns: np.ndarray) -> list[tuple[int, float, int]]:
    """[(right edge, mean return, episodes)] of the bins edge - BIN < step <= edge that have any."""
    edges = -(-steps // BIN) * BIN
    each = [(int(edge), returns[edges == edge]) for edge in np.unique(edges)]
    return [(edge, float(inside.mean()), len(inside)) for edge, inside in each]


def read_ours(path: Path) -> tuple[dict, dict]:
    """A row of runs.csv, and the settings that all runs of an algorithm on a task share."""
    result = json.loads(path.read_text())
    args, evaluation = result["args"], result["evaluation"]
    row = result | result["versions"] | {"env": args["env"], "seed": args["seed"]}
    row["method"] = result["storage"] if args["quant_m"] is None else f"m={args['quant_m']}"
    if args.get("pack"):
        row["method"] += " packed"
    row |= {"steps": result["global_step"], "eval_episodes": len(evaluation)}
    if evaluation:
        row |= {"eval_mean": np.mean(evaluation), "eval_std": np.std(evaluation)}
    return row, {name: value for name, value in args.items() if name not in MAY_DIFFER}


def read_sb3(name: re.Match, steps: np.ndarray, returns: np.ndarray, asked: int) -> dict:
    """A row of runs.csv. Raises ValueError where training did not get to its end."""
    rollout = SB3_ROLLOUT[name["algo"]]
    total = -(-asked // rollout) * rollout
    if steps[-1] < total - TIME_LIMIT:
        raise ValueError(f"unfinished: its last episode ended at step {steps[-1]:,} of {total:,}")
    row = name.groupdict() | {"method": "SB3", "steps": total}
    return row | {"return_last_tenth": returns[steps > 0.9 * total].mean()}


def read_run(folder: Path, sb3_steps: dict[str, int]) -> tuple[dict, dict | None, list]:
    """Row of runs.csv, shared settings, bins. Raises ValueError for a run to leave out."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: keep all
    events.Reload()
    scalars = events.Scalars(TAG) if TAG in events.Tags()["scalars"] else []
    steps, returns = np.array([(s.step, s.value) for s in scalars]).reshape(-1, 2).T
    steps, settings = steps.astype(int), None
    if (folder / "result.json").exists():
        try:
            row, settings = read_ours(folder / "result.json")
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a result.json of ours: {error!r}") from None
    elif not scalars or not (name := SB3_NAME.fullmatch(folder.name)):
        raise ValueError("unfinished: neither a result.json nor episodes of an SB3 run")
    else:
        row = read_sb3(name, steps, returns, sb3_steps[name["algo"]])
    return row, settings, bin_returns(steps, returns)


def collect(args: argparse.Namespace) -> None:
    """Write both CSV files. Raises ValueError for runs that must not stand side by side."""
    if absent := [str(root) for root in args.roots if not root.is_dir()]:
        raise ValueError(f"no such folder: {', '.join(absent)}")
    files = [path for root in args.roots for path in root.rglob("events.out.tfevents.*")]
    sb3_steps = {"ppo": args.sb3_ppo_steps, "sac": args.sb3_sac_steps}
    runs, references = {}, {}  # KEY: (folder, row, bins); algo, env: (folder, settings)
    for folder in sorted({path.resolve().parent for path in files}):
        try:
            row, settings, bins = read_run(folder, sb3_steps)
        except ValueError as error:
            print(f"plot.py: left out {folder}: {error}", file=sys.stderr)
            continue
        key = (row["algo"], row["env"], row["method"], int(row["seed"]))
        if key in runs:
            raise ValueError(f"{' '.join(map(str, key))} is both {runs[key][0]} and {folder}")
        runs[key] = folder, row, bins
        if settings:
            other, theirs = references.setdefault(key[:2], (folder, settings))
            if changed := {k for k, _ in settings.items() ^ theirs.items()}:
                raise ValueError(f"{other} and {folder} differ in {', '.join(sorted(changed))}")
    if not runs:
        raise ValueError(f"no finished run in {', '.join(map(str, args.roots))}")
    rows = [row for _, (_, row, _) in sorted(runs.items())]
    curves = [
        dict(zip(CURVES, (*key, *line), strict=True))
        for key, (_, _, bins) in sorted(runs.items())
        for line in bins
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, columns, lines in (("curves.csv", CURVES, curves), ("runs.csv", RUNS, rows)):
        with open(args.out / name, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for line in lines:
                cells = (line.get(column) for column in columns)
                writer.writerow(f"{c:.6g}" if isinstance(c, float) else c for c in cells)
    print(f"{args.out}: {len(rows)} runs in runs.csv, {len(curves)} bins in curves.csv")


def optional(text: str) -> float | None:
    """A number, or nothing where there is none."""
    return float(text) if text else None


def read_csv(
    path: Path, columns: list[str], numbers: dict[str, Callable] | None = None
) -> list[dict[str, str]]:
    """Rows as text; numbers: what must be able to read the cells of a column.

    Raises OSError, or ValueError for a file that our scripts did not write, naming what is wrong.
    """
    rows = []
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, restval="")
            if reader.fieldnames != columns:
                raise ValueError(f"{path} has other columns than {', '.join(columns)}")
            for row in reader:
                rows.append(row)
                for column, read in (numbers or {}).items():
                    try:
                        read(row[column])
                    except ValueError:
                        where = f"{path}, line {reader.line_num}: {column} {row[column]!r}"
                        raise ValueError(f"{where} is no number of the kind it should be") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    return rows


RUNS_NUMBERS = {"seed": int, "steps": int, "return_last_tenth": optional}
CURVES_NUMBERS = {"seed": int, "step": int, "episodic_return": float}


def draw_method(axes: Axes, curves: list[dict[int, float]], style: dict) -> Line2D:
    """Mean over seeds, range and, of few, each seed: curves are {step: return}, one per seed.

    Where a seed has no bin, the others alone count.
    """
    curves = [
        {s: np.mean([c[t] for t in (s - BIN, s, s + BIN) if t in c]) for s in sorted(c)}
        for c in curves
    ]
    steps = sorted(set().union(*curves))
    across = [[c[s] for c in curves if s in c] for s in steps]
    if len(curves) > 1:
        lowest, highest = [*map(min, across)], [*map(max, across)]
        axes.fill_between(steps, lowest, highest, color=style["color"], alpha=0.12, lw=0)
    for curve in curves if 1 < len(curves) <= 3 else []:
        axes.plot(curve.keys(), curve.values(), **style, lw=0.6, alpha=0.4)
    return axes.plot(steps, [*map(np.mean, across)], **style, lw=1.9)[0]


def draw(args: argparse.Namespace) -> None:
    """Write learning_ppo.png and learning_sac.png of the methods in STYLES."""
    runs = read_csv(args.results / "runs.csv", RUNS, RUNS_NUMBERS)
    end = {tuple(run[name] for name in KEY): int(run["steps"]) for run in runs}
    curves = defaultdict(lambda: defaultdict(dict))  # (algo, env, method): seed: step: return
    for row in read_csv(args.results / "curves.csv", CURVES, CURVES_NUMBERS):
        *group, seed = key = tuple(row[name] for name in KEY)
        if int(row["step"]) <= end.get(key, 0):  # else training ended inside the bin
            curves[tuple(group)][seed][int(row["step"])] = float(row["episodic_return"])
    for algo, (quantised, tasks) in PANELS.items():
        figure = Figure(figsize=(12, 3.7), dpi=120, layout="constrained")
        lines, counts = {}, defaultdict(set)
        for axes, env in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
            for method in ("float64", quantised, "SB3"):  # dashes on top hide nothing
                if seeds := curves.get((algo, env, method)):
                    lines[method] = draw_method(axes, [*seeds.values()], STYLES[method][1])
                    counts[method].add(len(seeds))
            axes.set_title(f"{algo.upper()}, {env}", fontsize=12)
            axes.set_xlabel("environment steps", fontsize=11)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.set_xlim(left=0)
            else:
                axes.set(xticks=[], yticks=[])
                axes.text(0.5, 0.5, "no run", ha="center", color="0.5")
        if not lines:
            continue
        labels = []
        for method in lines:
            seeds = " or ".join(map(str, sorted(counts[method])))
            labels.append(f"{STYLES[method][0]}, seeds: {seeds}")
        where = {"loc": "outside upper center", "ncols": 3, "frameon": False}
        figure.legend(list(lines.values()), labels, **where)
        figure.axes[0].set_ylabel("episodic return (sum of rewards)", fontsize=11)
        figure.supxlabel(CAPTION, fontsize=9, color="0.35")
        figure.savefig(path := args.results / f"learning_{algo}.png")
        print(path)


def cell(returns: list[float]) -> str:
    """Mean ± sample standard deviation over seeds, or what there is of it."""
    if len(returns) < 2:
        return f"{returns[0]:.0f}" if returns else "-"
    return f"{np.mean(returns):.0f} ± {np.std(returns, ddof=1):.0f}"


def table(args: argparse.Namespace) -> None:
    """Print the returns at the end of training as Markdown."""
    groups = defaultdict(lambda: defaultdict(list))
    for run in read_csv(args.results / "runs.csv", RUNS, RUNS_NUMBERS):
        group = groups[run["algo"], run["env"]]
        group["steps"].append(int(run["steps"]))
        group["seeds"].append(run["seed"])
        if run["return_last_tenth"]:  # else no episode ended then
            group[run["method"]].append(float(run["return_last_tenth"]))
    print("| algorithm | task | steps | seeds | float64 | rounded | Stable-Baselines3 | expected |")
    print("|---|---|---|---|---|---|---|---|")
    for (algo, env), group in sorted(groups.items()):
        steps, rounded = sorted(set(group["steps"])), PANELS[algo][0]
        known = algo == "ppo" and all(abs(count - BANDS_STEPS) < BIN for count in steps)
        print(
            f"| {algo.upper()} | {env} | {' or '.join(f'{count:,}' for count in steps)} "
            f"| {len(set(group['seeds']))} | {cell(group['float64'])} | {cell(group[rounded])} "
            f"| {cell(group['SB3'])} | {BANDS.get(env, '-') if known else '-'} |"
        )
    print(FOOTNOTE)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(argv: list[str] | None = None) -> None:
    """Run one of the three commands. SystemExit with code 2 and one line for bad input."""
    parser = Parser(prog="plot.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("collect", help="read runs, write curves.csv and runs.csv")
    command.add_argument("roots", nargs="+", type=Path, help="folders with runs at any depth")
    command.add_argument("--out", type=Path, default=Path("experiments/results"))
    for algo, steps in (("ppo", 300_000), ("sac", 100_000)):  # SB3's folders do not say
        command.add_argument(f"--sb3-{algo}-steps", type=int, default=steps, help="of SB3's runs")
    command.set_defaults(run=collect)
    for run in (draw, table):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("--results", type=Path, default=Path("experiments/results"))
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
