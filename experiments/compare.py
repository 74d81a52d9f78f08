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

import curves
import intervals
from curves import Run
from support import arguments, drawing
from tables import spans

COLORS = [drawing.BLACK, drawing.BLUE, drawing.ORANGE, drawing.GREEN, "#d1495b", "#7b4fa3"]
ABREAST = 4  # panels
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
    off = [value is None or value is False for value in values]  # 0 == False, but is not off
    return [
        (0, 0) if is_off else (1 + isinstance(value, str), value)
        for value, is_off in zip(values, off, strict=True)
    ]


def group(runs: list[Run], by: list[str] | None) -> dict[str, dict[str, dict[int, Run]]]:
    """{panel: {group: {seed: run}}}, in the order in which they are shown.

    Of two runs that are one experiment with one seed the longer is taken.

    Raises:
        ValueError: `by` names no setting.
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
        seeds, seed = panels[panel][label(run, by) or run.settings["algo"]], run.settings["seed"]
        shorter, longer = sorted([run, seeds.get(seed, run)], key=lambda run: run.end)
        seeds[seed] = longer
        if shorter is not longer:
            why = f"{longer.folder} is the same experiment, and no shorter"
            print(f"compare.py: left out {shorter.folder}: {why}", file=sys.stderr)
    return panels


def table(panels: dict[str, dict[str, dict[int, Run]]], robust: bool) -> list[list[str]]:
    """Returns of every group in the last tenth, and what they differ by from the first group's."""
    statistic = "interquartile mean" if robust else "return"
    lines = [["task", "group", "seeds", "steps", statistic, "minus the first", "95% interval"]]
    for panel, groups in panels.items():
        runs = [run for seeds in groups.values() for run in seeds.values()]
        shortest = min(runs, key=lambda run: run.end)
        if any(run.end > 1.1 * shortest.end for run in runs):
            cut = f"{panel}: only the first {shortest.end:,} steps, as many as {shortest.folder}"
            print(f"compare.py: {cut} has", file=sys.stderr)
        reference = None
        for name, seeds in groups.items():
            returns = {seed: run.last_tenth(shortest.end) for seed, run in seeds.items()}
            returns = {seed: mean for seed, mean in returns.items() if mean is not None}
            each, against = [*returns.values()], ("", "")
            if reference is None:
                reference = each
            else:
                against = intervals.difference(each, reference, robust)
            shown = f"{intervals.iqm(each):.0f}" if robust and each else intervals.spread(each)
            steps = f"{shortest.end:,}"
            lines.append([panel, name, spans(returns, " to "), steps, shown, *against])
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


def read(roots: list[Path]) -> list[Run]:
    """All runs that can be read; the others are named. Raises ValueError if there is none."""
    runs = []
    for folder in curves.find_runs(roots):
        try:
            runs.append(curves.read_run(folder))
        except ValueError as error:
            print(f"compare.py: left out {folder}: {error}", file=sys.stderr)
    if not runs:
        raise ValueError("none of these runs can be read")
    return runs


def draw(
    panels: dict[str, dict[str, dict[int, Run]]], width: int, path: Path, robust: bool
) -> None:
    """Curves of every panel's groups, in bins of `width` steps."""
    rows, names = [], dict.fromkeys(name for groups in panels.values() for name in groups)
    for i, (panel, groups) in enumerate(panels.items()):
        lines = {name: {s: r.curve(width) for s, r in of.items()} for name, of in groups.items()}
        if i % ABREAST == 0:
            rows.append({})
        rows[-1][panel] = {name: {s: c for s, c in of.items() if c} for name, of in lines.items()}
    looks = {}
    for i, name in enumerate(names):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else ":"}
        looks[name] = name, style
    curves.draw(rows, looks, path, robust)


def compare(args: argparse.Namespace) -> str:
    """Read, draw, write; return the table and where everything is."""
    runs = read(args.runs)
    found, by = differing(runs), args.by and [name.replace("-", "_") for name in args.by]
    panels = group(runs, by)
    text = curves.markdown(table(panels, args.iqm))
    runs = [run for of in panels.values() for seeds in of.values() for run in seeds.values()]
    width, rows, bins = curves.bin_width(max(run.end for run in runs)), [], []
    for run in runs:
        rows.append(curves.row_of(run, label(run, found)))
        bins += curves.bins_of(run, rows[-1], width)
    curves.write(args.out, rows, bins)
    draw(panels, width, args.out / "returns.png", args.iqm)
    (args.out / "table.md").write_text(text + "\n")
    training = sum(not run.result for run in runs)
    state = f", {training} of them unfinished" if training else ""
    files = "returns.png, returns.pdf, table.md and CSV files"
    return f"{text}\n{len(runs)} runs{state}; wrote {files} to {args.out}"


if __name__ == "__main__":
    main()
