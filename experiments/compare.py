"""Compare any runs, finished or still training: curves, CSV files and a table of differences.

    ./run.sh compare runs/Ant-v3*                            # grouped by whatever differs
    ./run.sh compare runs --by gamma --iqm --out runs/gammas

Runs that differ in their seeds alone are a group: one line. Tasks have a panel each; with --by only
those settings make groups, and others that differ make panels. The table compares the last tenth of
the steps that all runs of a panel have reached, and subtracts the panel's first group. --out gets
returns.png, returns.pdf, curves.csv, runs.csv and table.md.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import curves
from curves import Run
from support import arguments, drawing

COLORS = [drawing.BLACK, drawing.BLUE, drawing.ORANGE, drawing.GREEN, "#d1495b", "#7b4fa3"]
COLORS += [drawing.LIGHT_BLUE, drawing.LIGHT_GREEN, "#8c6d46", "0.6"]


def differing(runs: list[Run]) -> list[str]:
    """Settings that runs of one algorithm differ in, algorithm and library if there are several.

    Seeds, paths and the like make no other experiment, and tasks have panels of their own.
    """
    values = defaultdict(set)  # (name, program): values
    for run in runs:
        program = run.settings["algo"], run.settings["lib"]
        for name, value in run.settings.items():
            values[name, name not in ("algo", "lib") and program].add(repr(value))
    ignored = curves.NO_DIFFERENCE | {"env"}
    found = {name for (name, _), each in values.items() if len(each) > 1} - ignored
    return [
        name for name in dict.fromkeys(["algo", "lib", *(n for n, _ in values)]) if name in found
    ]


def label(run: Run, names: list[str]) -> str:
    """What a run is by these settings, as on its command line: "no --quant-m, --gamma 0.9"."""
    words = []
    for name in (name for name in names if name in run.settings):
        value, flag = run.settings[name], arguments.flag(name)
        if name in ("algo", "lib"):
            words.append(str(value))
        elif value is None or value is False:
            words.append(f"no {flag}")
        else:
            words.append(flag if value is True else f"{flag} {value}")
    return ", ".join(words)


def order(run: Run, names: list[str]) -> list[tuple]:
    """Sorts runs by these settings: what is off first, then numbers, then text."""
    values = [run.settings.get(name) for name in names]
    return [
        (value not in (None, False), isinstance(value, str), value or 0)
        if not isinstance(value, str)
        else (True, True, value)
        for value in values
    ]


def group(runs: list[Run], by: list[str] | None) -> dict[str, dict[str, dict[int, Run]]]:
    """{panel: {group: {seed: run}}}, in the order in which they are shown.

    Raises:
        ValueError: `by` names no setting, or a run is given twice.
    """
    found = differing(runs)
    for name in by or []:
        if all(name not in run.settings for run in runs):
            raise ValueError(f"--by {name} is no setting of these runs; {', '.join(found)} differ")
    by = found if by is None else by
    rest = [name for name in found if name not in by]
    panels = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs, key=lambda run: (order(run, ["env", *rest]), order(run, by))):
        panel = ", ".join(filter(None, [run.settings["env"], label(run, rest)]))
        seeds = panels[panel][label(run, by) or run.settings["algo"]]
        if other := seeds.get(run.settings["seed"]):
            raise ValueError(f"{other.folder} and {run.folder} are one experiment; leave one out")
        seeds[run.settings["seed"]] = run
    return panels


def table(panels: dict[str, dict[str, dict[int, Run]]], robust: bool) -> list[list[str]]:
    """Returns of every group in the last tenth, and what they differ by from the first group's."""
    head = ["task", "group", "seeds", "steps", "IQM" if robust else "return", "difference"]
    lines = [[*head, "its 95% interval"]]
    statistic = curves.iqm if robust else curves.mean
    for panel, groups in panels.items():
        end = min(run.end for seeds in groups.values() for run in seeds.values())
        reference = None
        for name, seeds in groups.items():
            returns = [run.last_tenth(end) for run in seeds.values()]
            returns = [each for each in returns if each is not None]
            shown = curves.spread(returns)
            if robust and returns:
                shown = f"{curves.iqm(np.array(returns)):.0f}"
            against = ("", "")
            if reference is None:
                reference = returns
            else:
                against = curves.difference(returns, reference, statistic)
            numbers = curves.seeds_of(seeds)
            lines.append([panel, name, numbers, f"{end:,}", shown, *against])
    return lines


def main(argv: list[str] | None = None) -> None:
    """SystemExit with code 2 and one line for bad input."""
    parser = curves.Parser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or that hold some")
    parser.add_argument(
        "--by", nargs="+", help="settings that make groups; default: all that differ"
    )
    parser.add_argument(
        "--iqm", action="store_true", help="interquartile mean and its 95%% interval"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args(argv)
    try:
        print(compare(args))
    except (ValueError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def compare(args: argparse.Namespace) -> str:
    """Read, draw, write; return the table and where everything is."""
    runs = []
    for folder in curves.find_runs(args.runs):
        try:
            runs.append(curves.read_run(folder))
        except ValueError as error:
            print(f"compare.py: left out {folder}: {error}", file=sys.stderr)
    if not runs:
        raise ValueError("none of these runs can be read")
    by = args.by and [name.replace("-", "_") for name in args.by]
    panels = group(runs, by)
    names = dict.fromkeys(name for groups in panels.values() for name in groups)
    looks = {
        name: (
            name,
            {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else ":"},
        )
        for i, name in enumerate(names)
    }
    width = curves.bin_width(runs)
    lines = {
        panel: {
            name: {seed: run.curve(width) for seed, run in seeds.items() if run.curve(width)}
            for name, seeds in groups.items()
        }
        for panel, groups in panels.items()
    }
    text, found = curves.markdown(table(panels, args.iqm)), differing(runs)
    rows = {}
    for run in runs:
        row = curves.row_of(run, label(run, found))
        rows[row["algo"], row["env"], row["method"], row["seed"]] = run, row
    curves.write(args.out, rows)
    curves.draw(lines, looks, args.out / "returns.png", robust=args.iqm)
    (args.out / "table.md").write_text(text + "\n")
    training = sum(not run.result for run in runs)
    state = f", {training} of them unfinished" if training else ""
    files = "returns.png, returns.pdf, table.md and CSV files"
    return f"{text}\n{len(runs)} runs{state}; wrote {files} to {args.out}"


if __name__ == "__main__":
    main()
