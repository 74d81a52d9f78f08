"""Learning curves: from runs to two CSV files, and from those to lines, bands and intervals.

`runs.csv` has one row per run, `curves.csv` one per run and bin of steps: the mean return of the
episodes that ended in it, and no row where none did. Both are small enough to be committed;
figures and tables are made from them alone. compare.py and figures.py are the commands,
intervals.py has the statistics.
"""

import argparse
import ast
import csv
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import intervals
from intervals import LEAST_SEEDS
from support import arguments, drawing
from tables import spans, write_csv

BINS = 60  # of the longest run, or up to twice as many
RETURN, SETTINGS = "charts/episodic_return", "hyperparameters/text_summary"
NO_DIFFERENCE = {"seed", *arguments.MAY_DIFFER}  # what makes no other experiment
KEY = ["algo", "env", "method", "seed"]  # what identifies a run
CURVES = [*KEY, "step", "episodic_return", "episodes"]
RUNS = [*KEY, "steps", "return_last_tenth", "eval_mean", "eval_std", "eval_episodes", "max_abs_obs"]
RUNS += ["clip_fraction", "first_ratio_error", "torch", "gymnasium", "mujoco", "numpy", "machine"]
CAPTIONS = {  # by whether they are robust
    False: "Mean and, from three seeds on, standard deviation",
    True: f"Interquartile mean and, from {LEAST_SEEDS} seeds on, its 95% bootstrap interval",
}
Curves = dict[str, dict[str, dict[int, dict[int, float]]]]  # panel, method, seed, step: return
Seed = tuple[int, list[tuple[int, float, int]]]  # steps, [(right edge, mean return, episodes)]
Bins = dict[str, dict[str, dict[int, Seed]]]  # panel, method, seed


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


# --- Runs ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run logged, finished or not.

    Attributes:
        folder: where it is.
        settings: its arguments, "algo", and "lib": "ours", "sb3" or "sbx".
        steps, returns: int and float arrays of one length: every step with which an episode ended,
            and its return, or the mean return where several envs' ended at once.
        end: steps that it was trained for, so far.
        result: result.json, empty while it is unfinished.
    """

    folder: Path
    settings: dict
    steps: np.ndarray
    returns: np.ndarray
    end: int
    result: dict

    def curve(self, width: int) -> dict[int, float]:
        """{right edge of a bin: mean return}, without the bin in which training ended."""
        bins = bin_returns(self.steps, self.returns, width)
        return {edge: mean for edge, mean, _ in bins if edge <= self.end}

    def until(self, end: int) -> "Run":
        """What it was after `end` steps, if it was trained for longer.

        What its result tells of the policy at the end is left out then, unless the run was to end
        there: PPO's last rollout goes on beyond.
        """
        before = self.steps <= end
        cut = {"steps": self.steps[before], "returns": self.returns[before]}
        result = self.result
        if self.settings.get("total_timesteps", self.end) > end:
            result = {k: v for k, v in result.items() if k in ("versions", "machine")}
        return replace(self, end=min(self.end, end), result=result, **cut)

    def last_tenth(self, end: int) -> float | None:
        """Mean return of the episodes in the last tenth of the steps up to `end`; None if none."""
        late = self.returns[(self.steps > 0.9 * end) & (self.steps <= end)]
        return float(late.mean()) if len(late) else None


def find_runs(roots: Iterable[Path]) -> list[Path]:
    """Folders at any depth under roots that hold a log. Raises ValueError, one line, if none.

    Files among the roots are passed over: `runs/Ant*` also names what jobs.py keeps beside folders.
    """
    for root in roots:
        if not root.exists():
            raise ValueError(f"there is no folder {root}")
    found = {path.parent for root in roots for path in root.rglob("events.out.tfevents.*")}
    if not found:
        raise ValueError(f"no run in {', '.join(map(str, roots))}")
    return sorted(found)


def read_run(folder: Path) -> Run:
    """Read a run's log. Raises ValueError, one line, if it is none of ours or has no episode."""
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: keep all
    events.Reload()
    tags = events.Tags()
    if SETTINGS not in tags["tensors"]:
        raise ValueError("its log names no hyperparameters")
    table = events.Tensors(SETTINGS)[0].tensor_proto.string_val[0].decode()
    settings = {"lib": "ours"} | parse_table(table)
    if not {"algo", "env", "seed"} <= settings.keys():
        raise ValueError("its log is of another program, or of an older version of this one")
    if RETURN not in tags["scalars"]:
        raise ValueError("no episode has ended in it yet")
    scalars = [(event.step, event.value) for event in events.Scalars(RETURN)]
    steps, returns = np.array(scalars, np.float64).T
    end, result = int(steps[-1]), {}
    if (folder / "result.json").exists():
        try:
            result = json.loads((folder / "result.json").read_text())
            end = max(end, int(result["global_step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its result.json is damaged: {error!r}") from None
    return Run(folder, settings, steps.astype(np.int64), returns, end, result)


def parse_table(text: str) -> dict:
    """The settings in a table of TensorBoard, |name|value| in each line after the heading."""
    settings = {}
    for line in text.splitlines()[2:]:
        name, value = line.strip("|").split("|", 1)
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # text stands there without quotes
            settings[name] = value
    return settings


def bin_width(longest: int) -> int:
    """Steps of a bin, by those of the longest run: 1, 2 or 5 times a power of ten."""
    widths = [number * 10**power for power in range(9) for number in (1, 2, 5)]
    return max(width for width in widths if width == 1 or width * BINS <= longest)


def bin_returns(steps: np.ndarray, returns: np.ndarray, width: int) -> list[tuple[int, float, int]]:
    """[(right edge, mean return, episodes)] of bins edge - width < step <= edge that have any."""
    edges = -(-steps // width) * width
    each = [(int(edge), returns[edges == edge]) for edge in np.unique(edges)]
    return [(edge, float(inside.mean()), len(inside)) for edge, inside in each]


# --- CSV files -----------------------------------------------------------------------------------


def row_of(run: Run, method: str) -> dict:
    """A row of runs.csv."""
    settings, result = run.settings, run.result
    row = {"algo": settings["algo"], "env": settings["env"], "seed": settings["seed"]}
    row |= {"method": method, "steps": run.end} | result.get("versions", {})
    row["return_last_tenth"] = run.last_tenth(run.end)
    for name in ("max_abs_obs", "clip_fraction", "first_ratio_error", "machine"):
        row[name] = result.get(name)
    if evaluation := result.get("evaluation"):
        row |= {"eval_mean": np.mean(evaluation), "eval_std": np.std(evaluation)}
        row["eval_episodes"] = len(evaluation)
    return row


def bins_of(run: Run, row: dict, width: int) -> list[dict]:
    """The rows of curves.csv that belong to one of runs.csv."""
    key = {name: row[name] for name in KEY}
    bins = bin_returns(run.steps, run.returns, width)
    return [key | dict(zip(CURVES[len(KEY) :], each, strict=True)) for each in bins]


def write(out: Path, rows: list[dict], bins: list[dict]) -> None:
    """Write runs.csv and curves.csv to a folder, sorted."""

    def place(row: dict) -> tuple:
        return *(row[name] for name in KEY[:-1]), int(row["seed"]), int(row.get("step", 0))

    for name, columns, lines in (("curves.csv", CURVES, bins), ("runs.csv", RUNS, rows)):
        write_csv(out / name, columns, sorted(lines, key=place))


def optional(text: str) -> float | None:
    """A number, or nothing where there is none."""
    return float(text) if text else None


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ValueError for anything else."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


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


def read_runs(results: Path) -> list[dict[str, str]]:
    """runs.csv of a folder. Raises as `read_csv`."""
    numbers = {"seed": int, "steps": int, "return_last_tenth": optional}
    return read_csv(results / "runs.csv", RUNS, numbers)


def read_bins(results: Path, panel: Callable[[dict], str]) -> Bins:
    """What runs.csv and curves.csv of a folder hold. panel: row -> its name. Raises as `read_csv`.

    Returns:
        {panel: {method: {seed: (steps it was trained for, [(right edge, mean return, episodes)])}}}
    """
    found = defaultdict(lambda: defaultdict(dict))
    for run in read_runs(results):
        found[panel(run)][run["method"]][int(run["seed"])] = int(run["steps"]), []
    numbers = {"seed": int, "step": int, "episodic_return": float, "episodes": positive}
    for row in read_csv(results / "curves.csv", CURVES, numbers):
        _, bins = found[panel(row)][row["method"]].get(int(row["seed"]), (0, []))
        bins.append((int(row["step"]), float(row["episodic_return"]), int(row["episodes"])))
    return found


def curves_of(seeds: dict[int, Seed]) -> dict[int, dict[int, float]]:
    """{seed: {right edge: mean return}}, without the bin in which training ended."""
    found = {}
    for seed, (end, bins) in seeds.items():
        if curve := {edge: mean for edge, mean, _ in bins if edge <= end}:
            found[seed] = curve
    return found


def late_returns(seeds: dict[int, Seed], end: int) -> dict[int, float]:
    """{seed: mean return of the episodes in the last tenth of the steps up to `end`}.

    A bin counts if it ends in that tenth; where none does, the last one before `end`. A seed in
    which no episode ended before is left out.
    """
    found = {}
    for seed, (_, bins) in seeds.items():
        before = [each for each in sorted(bins) if each[0] <= end]
        late = [each for each in before if each[0] > 0.9 * end] or before[-1:]
        if late:
            _, means, counts = zip(*late, strict=True)
            found[seed] = float(np.average(means, weights=counts))
    return found


# --- As text --------------------------------------------------------------------------------------


def markdown(table: list[list[str]]) -> str:
    """A table whose first line is its head."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


# --- Drawing -------------------------------------------------------------------------------------


def smooth(curve: dict[int, float]) -> dict[int, float]:
    """Running mean over three bins, at either end over two."""
    steps, values = zip(*sorted(curve.items()), strict=True)
    return {step: np.mean(values[max(0, i - 1) : i + 2]) for i, step in enumerate(steps)}


def draw_method(axes: Axes, seeds: list[dict[int, float]], look: dict, robust: bool) -> Line2D:
    """A line and a band: seeds are {step: return}, one each.

    Only steps that every seed has got to are drawn; in a bin without an episode its neighbours
    count.
    """
    seeds = [smooth(seed) for seed in seeds]
    steps = [step for step in sorted(set().union(*seeds)) if step <= min(map(max, seeds))]
    values = np.array([np.interp(steps, [*seed], [*seed.values()]) for seed in seeds])  # (n, steps)
    middle, band = values.mean(0), None
    if robust:
        middle = intervals.iqm(values, 0)
        if len(seeds) >= LEAST_SEEDS:
            band = np.array([intervals.bootstrap(intervals.iqm, each) for each in values.T]).T
    elif len(seeds) > 2:  # of two it would be no more than where both lie
        half = values.std(0, ddof=1)
        band = middle - half, middle + half
    if band is not None:
        axes.fill_between(steps, *band, color=look["color"], alpha=0.15, lw=0)
    return axes.plot(steps, middle, **look)[0]


def draw(
    rows: list[Curves], looks: dict[str, tuple[str, dict]], path: Path, robust: bool = False
) -> None:
    """A panel for each key of curves, a line for each method in looks: {method: (label, style)}.

    Args:
        rows: what stands in each row of panels. A single panel is as wide as a printed column.
        path: ending in .png; the PDF lies beside it.
        robust: see `draw_method`.

    Raises:
        ValueError: there is nothing to draw.
    """
    rows = [
        {name: {m: of[m] for m in looks if of.get(m)} for name, of in row.items()} for row in rows
    ]
    rows = [{name: of for name, of in row.items() if of} for row in rows]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("nothing to draw: no episode has ended in these runs")
    columns, lines, seeds = max(map(len, rows)), {}, set()
    width = drawing.PAGE if columns > 1 else drawing.COLUMN
    letters = int(width * 13)  # about as many stand in a line
    labels = {method: textwrap.fill(label, letters - 5) for method, (label, _) in looks.items()}
    used = dict.fromkeys(labels[method] for row in rows for of in row.values() for method in of)
    longest = max(len(line) for label in used for line in label.splitlines())
    abreast = max(1, letters // (longest + 5))  # labels, with the line before each
    height = 0.6 + 0.17 * len(used) / abreast + (1.5 * len(rows) if columns > 1 else 2.2)
    with drawing.style():
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_of_row, row in zip(grid, rows, strict=True):
            for axes in axes_of_row[len(row) :]:
                axes.set_axis_off()
            for axes, (name, of) in zip(axes_of_row, row.items(), strict=False):
                for method, each in of.items():
                    line = draw_method(axes, [*each.values()], looks[method][1], robust)
                    lines[labels[method]] = line
                    seeds |= each.keys()
                counts = [len(each) for each in of.values()]  # as in the legend
                counts = counts if len({*counts}) > 1 else counts[:1]
                axes.set_title(textwrap.fill(name, letters // columns - 3))
                where = {"transform": axes.transAxes, "ha": "right", "color": "0.4", "fontsize": 7}
                axes.text(0.99, 0.03, f"n = {', '.join(map(str, counts))}", **where)
                axes.set_xlim(left=0)
                axes.grid()
                drawing.thousands(axes)
        several = f"{CAPTIONS[robust]} over n of the seeds {spans(seeds, ' to ')}"
        caption = several if len(seeds) > 1 else f"Seed {min(seeds)}"
        caption = textwrap.fill(f"{caption}; running mean of three bins.", letters)
        figure.supylabel("episodic return", fontsize=8)
        figure.supxlabel(f"environment steps\n{caption}", fontsize=8)
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=abreast)
        drawing.save(figure, path)
