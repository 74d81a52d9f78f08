"""The paper's learning curves: Fig. 3, Fig. 4, and storages side by side.

    ./run.sh fig4 --list | python experiments/figures.py fig4 --out runs/fig4    # from the runs
    python experiments/figures.py fig4 --out experiments/results/fig4 --draw     # from CSV files

The first reads the runs that the command lines on its input train, as far as they have come, and
writes runs.csv and curves.csv to --out, where rows of other runs stay. Both then draw FIGURE.png
and .pdf there and write a table of returns, FIGURE.md. `./run.sh fig4` does all of it.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import curves
import intervals
import jobs
from support.drawing import BLACK, BLUE, GREEN, LIGHT_BLUE, LIGHT_GREEN, ORANGE
from tables import spans

FLOAT64 = ("float64", {"color": BLACK})
SB3 = ("Stable-Baselines3", {"color": ORANGE, "linestyle": (0, (3.5, 1.2))})
DASHED = {"linestyle": (0, (3, 1.5))}
# Of each figure the methods, as `method` names them: label and line, the reference first.
FIGURES = {
    # The paper's colours: by memory, rounded solid, float64 dashed. --pack stores the same codes.
    "fig3": {
        "float64": ("1M rows, float64: 3,082 MB", {"color": BLACK} | DASHED),
        "m=2": ("1M rows, m=2: 780 MB with --pack", {"color": BLUE}),
        "float64, 250k rows": ("250k rows, float64: 771 MB", {"color": LIGHT_BLUE} | DASHED),
        "m=2, 400k rows": ("400k rows, m=2: 312 MB with --pack", {"color": GREEN}),
        "float64, 100k rows": ("100k rows, float64: 308 MB", {"color": LIGHT_GREEN} | DASHED),
    },
    "fig4": {
        "float64": FLOAT64,
        "m=1": ("rounded (PPO: m=1, SAC: m=2)", {"color": BLUE}),
        "m=2": ("rounded (PPO: m=1, SAC: m=2)", {"color": BLUE}),
        "SB3": SB3,
        "SB3, m=1": ("Stable-Baselines3, m=1", {"color": "#d1495b"} | DASHED),
    },
    "ablate-m": {
        "float64": FLOAT64,
        "m=2": ("m=2", {"color": BLUE}),
        "m=1": ("m=1", {"color": GREEN}),
        "m=0": ("m=0", {"color": "#d1495b"}),
    },
    "ablate-storage": {
        "float64": FLOAT64,
        "m=1": ("rounded (PPO: m=1, SAC: m=2)", {"color": BLUE}),
        "m=2": ("rounded (PPO: m=1, SAC: m=2)", {"color": BLUE}),
        "float32": ("float32", {"color": "0.6"}),
        "float16": ("float16", {"color": ORANGE}),
        "bfloat16": ("bfloat16", {"color": "#7b4fa3"}),
        "float8_e4m3fn": ("float8_e4m3fn", {"color": "#d1495b"}),
    },
}
PAIRS = {  # what is subtracted from what, if not the first method from every other
    # As in the paper at equal memory.
    "fig3": [("m=2", "float64, 250k rows"), ("m=2, 400k rows", "float64, 100k rows")],
    "fig4": [("m=1", "float64"), ("m=2", "float64"), ("SB3", "float64"), ("SB3, m=1", "SB3")],
    "ablate-m": [("m=2", "float64"), ("m=1", "float64"), ("m=0", "float64"), ("m=2", "m=1")],
}
TASKS = ["HalfCheetah-v3", "Walker2d-v3", "Ant-v3", "Humanoid-v3"]  # the paper's order
Cells = dict[tuple[str, str, str, int], tuple[np.ndarray, np.ndarray]]
VARIED = curves.NO_DIFFERENCE | {"quant_m", "storage", "pack", "drop_constant", "buffer_size"}


def method(settings: dict) -> str:
    """How a run stores what it learns from: "float64", "m=2", "float64, 250k rows", "SB3"."""
    m, size = settings.get("quant_m"), settings.get("buffer_size", 1_000_000)
    if settings["lib"] != "ours":
        return settings["lib"].upper() + ("" if m is None else f", m={m}")
    name = (settings["storage"] or "float64") if m is None else f"m={m}"
    name += ", packed" if settings["pack"] else ""
    return name if size == 1_000_000 else f"{name}, {size / 1000:g}k rows"


def collect(lines: list[str], out: Path) -> None:
    """Add what the command lines have trained to runs.csv and curves.csv, as far as it has come.

    Of a run that was trained for longer than its line says, the rest is left out. Rows of other
    runs, which stand there from before, stay: several machines may train.

    Raises:
        ValueError: nothing has been trained, or runs have settings that make them unlike.
    """
    listed = {}
    for job in map(jobs.parse, lines):
        if (other := listed.setdefault(key_of(job.settings), job)).folder != job.folder:
            raise ValueError(
                f"{other.folder} and {job.folder} would be the same line of the figure"
            )
    width = curves.bin_width(max((job.steps for job in listed.values()), default=0))
    rows, bins, alike, unfinished, absent = [], [], {}, 0, set()
    for key, job in listed.items():
        try:
            run = curves.read_run(job.folder).until(job.steps)
        except ValueError as error:
            absent.add(key)
            if job.folder.exists():
                print(f"figures.py: left out {job.folder}: {error}", file=sys.stderr)
            continue
        settings = {k: v for k, v in run.settings.items() if k not in VARIED}
        folder, others = alike.setdefault((*key[:2], settings["lib"]), (run.folder, settings))
        if changed := {name for name, _ in settings.items() ^ others.items()}:
            raise ValueError(f"{folder} and {run.folder} differ in {', '.join(sorted(changed))}")
        rows.append(curves.row_of(run, method(run.settings)))
        bins += curves.bins_of(run, rows[-1], width)
        unfinished += not run.result
    new, kept = {key_of(row) for row in rows}, set()
    if (out / "runs.csv").exists():
        before = [row for row in curves.read_runs(out) if key_of(row) not in new]
        kept = {key_of(row) for row in before}
        rows += before
        before = curves.read_csv(out / "curves.csv", curves.CURVES)
        bins += [row for row in before if key_of(row) in kept]
    if not rows:
        raise ValueError("none of these runs has been trained yet")
    missing = sum(not key[2].startswith("SB3") for key in absent - kept)
    for count, what in (
        (missing, "have not begun"),
        (unfinished, "are unfinished"),
        (len(kept), f"stood in {out} before"),
    ):
        if count:
            print(f"figures.py: {count} of the runs {what}", file=sys.stderr)
    curves.write(out, rows, bins)


def key_of(settings: dict) -> tuple[str, str, str, int]:
    """What identifies a run, from its settings or from its row in a CSV file."""
    how = settings["method"] if "method" in settings else method(settings)
    return settings["algo"], settings["env"], how, int(settings["seed"])


def panel(row: dict[str, str]) -> str:
    return f"{row['algo'].upper()}, {row['env']}"


def place(name: str) -> tuple:
    """Sorts panels: PPO above SAC, tasks in the paper's order."""
    algo, env = name.split(", ", 1)
    return algo, TASKS.index(env) if env in TASKS else len(TASKS), env


def table(figure: str, found: curves.Bins) -> str:
    """Returns in the last tenth of the steps, their differences, and what all tasks say together.

    Of a method that is of the steps that all its seeds have reached, of a difference of those that
    both methods have. docs/learning.md explains the columns.
    """
    known = list(FIGURES[figure])
    pairs = PAIRS.get(figure) or [(each, known[0]) for each in known[1:]]
    lines, cells = [["task", "method", "seeds", "steps", "return"]], {}
    for name in sorted(found, key=place):
        seeds, ends = {}, {}
        for each in known:
            begun = curves.curves_of(found[name].get(each, {}))
            if begun:
                seeds[each] = {seed: found[name][each][seed] for seed in begun}
                ends[each] = min(end for end, _ in seeds[each].values())
                returns = curves.late_returns(seeds[each], ends[each])
                numbers, values = spans(returns, " to "), [*returns.values()]
                lines.append([name, each, numbers, f"{ends[each]:,}", intervals.spread(values)])
        for each, other in pairs:
            if each in seeds and other in seeds:
                end = min(ends[each], ends[other])
                both = (curves.late_returns(seeds[of], end).values() for of in (each, other))
                cells[name, each, other, end] = tuple(
                    np.array([*values], np.float64) for values in both
                )
    parts = [lines, differences(cells), over_tasks(cells)]
    return "\n\n".join(curves.markdown(part) for part in parts if len(part) > 1)


def differences(cells: Cells) -> list[list[str]]:
    """A line for each of {(panel, method, reference, steps): (returns, those of the reference)}."""
    lines = [["task", "method", "return", "reference", "its return", "steps", "n", "difference"]]
    lines[0] += ["95% interval", "bootstrap", "in s.d.", "P(higher)"]
    for (task, each, other, end), (a, b) in cells.items():
        line = [task, each, intervals.spread(a), other, intervals.spread(b), f"{end:,}"]
        line += [f"{len(a)} and {len(b)}", *intervals.difference(a, b)]
        around = intervals.bootstrap(intervals.mean_difference, a, b)
        line += [intervals.as_text(around), "-", "-"]
        if around and (apart := intervals.deviations(a, b)) is not None:
            line[-2:] = f"{apart:.1f}", f"{intervals.probability_higher(a, b):.2f}"
        lines.append(line)
    return lines


def over_tasks(cells: Cells) -> list[list[str]]:
    """The cells of an algorithm together, where all have seeds enough for an interval."""
    lines = [["tasks", "method", "reference", "steps", "difference of IQMs", "95% interval"]]
    lines[0] += ["P(higher)", "95% of P"]
    of_tasks = defaultdict(list)
    for (name, *key), cell in cells.items():
        of_tasks[name.split(", ")[0], *key].append(cell)
    for (algo, each, other, end), these in of_tasks.items():
        found = intervals.over_cells(these) if len(these) > 1 else None
        if found and found[0][1]:
            (iqm, around), (higher, about) = found
            line = [f"{algo}, {len(these)}", each, other, f"{end:,}", f"{iqm:+.1%}"]
            line += [intervals.as_text(around, "+.1%"), f"{higher:.2f}"]
            lines.append([*line, intervals.as_text(about, ".2f")])
    return lines


def main(argv: list[str] | None = None) -> None:
    """SystemExit with code 2 and one line for bad input."""
    parser = curves.Parser(prog="figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--draw", action="store_true", help="from --out's CSV files alone")
    args = parser.parse_args(argv)
    try:
        make(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def make(args: argparse.Namespace) -> None:
    if not args.draw:
        collect([line for line in map(str.strip, sys.stdin) if line], args.out)
    found, rows = curves.read_bins(args.out, panel), defaultdict(dict)
    for name in sorted(found, key=place):  # a row for each algorithm
        lines = {each: curves.curves_of(seeds) for each, seeds in found[name].items()}
        rows[name.split(",")[0]][name] = lines
    path = args.out / f"{args.figure}.png"
    curves.draw([*rows.values()], FIGURES[args.figure], path)
    text = table(args.figure, found)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\n\nwrote {args.figure}.png, .pdf, .md and the CSV files to {args.out}")


if __name__ == "__main__":
    main()
