"""CSV files, lists of numbers, and the reports of memory.py: pages of lines and tables."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.checkpoints import replacing
from support.machine import mb

Page = list[str | list[list[str]]]  # a table is a list of rows, the first one its heading

SETTINGS = ("obs_dim", "act_dim", "hidden", "buffer_size", "n_steps", "live_columns", "num_envs")
COARSE = 100_000_000  # bytes; below this a measurement says little


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    """Write all of a CSV file or nothing, and its folder: floats to six digits, nan as no value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {k: f"{x:.6g}" if isinstance(x, float | np.floating) else x for k, x in row.items()}
        writer.writerow({k: "" if x == "nan" else x for k, x in shown.items()})
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def spans(numbers: Iterable[int], to: str) -> str:
    """{1, 2, 3, 5} -> "1 to 3, 5" where `to` is " to "."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}{to}{b}" if b > a else f"{a}" for a, b in found)


def show(page: Page) -> None:
    """Print a page. In tables, columns of words go to the left, columns of numbers to the right."""
    for part in page:
        if isinstance(part, str):
            print(part)
            continue
        columns = []
        for column in zip(*part, strict=True):
            width, words = max(map(len, column)), column[1][:1].isalpha()
            columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in column])
        for row in zip(*columns, strict=True):
            print("  ".join(row).rstrip())


def settings(report: dict) -> str:
    """The heading of a report on one robot."""
    names = [name for name in (*SETTINGS, "batch_size") if name in report]
    sizes = ", ".join(f"{name} {report[name]:,}" for name in names)
    return f"{report['robot'] or 'robot'}, {report['algo'].upper()}: {sizes}\n"


def robot(report: dict) -> Page:
    """The ledgers of one robot, the reasons for their differences, and the bandwidth."""
    codec, measured = report["codec"], report["measured"]
    ledgers = [*report["paper"].values(), *report["allocated"].values()]
    heads = ["paper: 64-bit", f"{report['paper_bits']}-bit", "allocated: float64", codec]
    table = [["MB", *heads]]
    for row in report["allocated"]["codec"]:
        table.append([row, *(mb(ledger[row]) if row in ledger else "-" for ledger in ledgers)])
    totals = [sum(ledger.values()) for ledger in ledgers]
    table.append(["total", *map(mb, totals)])
    table.append(
        ["ratio", "", f"{totals[0] / totals[1]:.2f}x", "", f"{totals[2] / totals[3]:.2f}x"]
    )
    page: Page = [settings(report), table]
    if measured:
        column = {"MB": "measured", "total": mb(measured["total"])}
        for row in table:
            row.append(column.get(row[0], ""))
        for name in ("interpreter", "resident", "peak"):
            table.append([name, "", "", "", "", mb(measured[name])])
        off = measured["total"] - totals[-1]
        line = f"\nmeasured - allocated, bytes: {off:+,} ({off / totals[-1]:+.2%})"
        if totals[-1] < COARSE:
            line += "; below 100 MB temporary tensors and the libraries' noise, a few MB, exceed 3%"
        page.append(line)
    page.append(f"\nallocated - paper, bytes ({codec}):")
    for row, difference in report["allocated_minus_paper"].items():
        page.append(f"  {row:20}{difference['bytes']:+15,}  {difference['why']}")
    if rates := report["bytes_per_second"]:
        page.append(
            f"\nobservations sent off the robot at {report['control_hz']:.4g} Hz, bytes/s: "
            f"{rates['baseline']:,.0f} in float64, {rates['codec']:,.0f} in {codec}, "
            f"{rates['paper']:,.0f} in {report['paper_bits']} bits"
        )
    return page


def rows(report: dict) -> Page:
    """A report with "rows" as one table, a column for each key, and its note."""
    in_mb = ("observations", "rest", "total")
    formats = {int: "{:,}", float: "{:.2f}x", str: "{}"}
    table = [[f"{key}, MB" if key in in_mb else key for key in report["rows"][0]]]
    for row in report["rows"]:
        cells = row.items()
        table.append([mb(n) if key in in_mb else formats[type(n)].format(n) for key, n in cells])
    return [settings(report), table, f"\n{report['note']}"]
