"""experiments/curves.py on made-up runs with known returns."""

import csv
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import VERSIONS, episodes, log, run, sb3, unfinished
from matplotlib.figure import Figure

import curves
import intervals
from support import drawing

LOOK = {"color": "black"}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(out: Path, *folders: Path) -> None:
    """The CSV files of some runs, whose methods are called by their m."""
    found = [curves.read_run(folder) for folder in folders]
    rows = [curves.row_of(each, f"m={each.settings.get('quant_m')}") for each in found]
    pairs = zip(found, rows, strict=True)
    curves.write(out, rows, [each for run, row in pairs for each in curves.bins_of(run, row, 200)])


# ---- runs ----


def test_a_run_is_read_as_it_was_written(tmp_path):
    found = curves.read_run(run(tmp_path, "sac", m=2, seed=7, tag="my|own", gamma=1e-3))
    kinds = {"algo": "sac", "quant_m": 2, "storage": None, "pack": False, "gamma": 1e-3}
    assert found.settings.items() >= (kinds | {"tag": "my|own", "lib": "ours"}).items()
    assert list(zip(found.steps, found.returns, strict=True)) == episodes(20_000, offset=7)
    assert found.end == 20_000 and found.result["max_abs_obs"] == 12.5


def test_a_run_that_is_still_training_has_come_as_far_as_its_last_episode(tmp_path):
    found = curves.read_run(unfinished(run(tmp_path)))
    assert found.end == 700 * (20_000 // 700) and found.result == {}


def test_every_event_is_read(tmp_path):
    """TensorBoard's reader keeps 10,000 scalars unless told otherwise."""
    ends = [(step, 1.0) for step in range(1, 10_501)]
    assert len(curves.read_run(run(tmp_path, ends=ends, total=10_500)).steps) == 10_500


@pytest.mark.parametrize("width", [1, 1000, 5000])
def test_last_tenth_and_curve_match_loops(tmp_path, width):
    found, ends = curves.read_run(run(tmp_path, seed=3)), episodes(20_000, offset=3)
    for end in (20_000, 10_000):
        late = [ret for step, ret in ends if 0.9 * end < step <= end]
        assert found.last_tenth(end) == pytest.approx(statistics.mean(late))
    assert found.last_tenth(600) is None
    cut = found.until(10_000)
    assert cut.end == 10_000 and list(zip(cut.steps, cut.returns, strict=True)) == ends[:14]
    assert found.until(10**9).end == 20_000
    beyond = dataclasses.replace(found, end=20_480)  # by the last rollout
    assert beyond.until(20_000).result == found.result
    row = curves.row_of(cut, "m=1")
    of_its_end = ("eval_mean", "eval_episodes", "max_abs_obs", "clip_fraction", "first_ratio_error")
    assert not any(row.get(name) for name in of_its_end)
    assert row["machine"] and row["torch"]
    naive = {}
    for edge in range(width, 20_001, width):
        if inside := [ret for step, ret in ends if edge - width < step <= edge]:
            naive[edge] = pytest.approx(sum(inside) / len(inside))
    assert found.curve(width) == naive


def test_what_is_no_run_is_said(tmp_path):
    broken = run(tmp_path, seed=2)
    (broken / "result.json").write_text("{}")
    for folder, why in {
        tmp_path / "absent": "no such folder",
        log(tmp_path / "other", {"lr": 1}, episodes(20_000)): "of another program",
        unfinished(run(tmp_path, ends=[])): "no episode has ended",
        broken: "result.json is damaged",
    }.items():
        with pytest.raises(ValueError, match=why):
            curves.read_run(folder)
    (tmp_path / "empty").mkdir()
    for roots in ([tmp_path / "absent"], [tmp_path / "empty"]):
        with pytest.raises(ValueError, match=roots[0].name):
            curves.find_runs(roots)


@given(st.integers(1, 10**8))
def test_a_bin_is_a_round_number_and_there_are_60_to_150(longest):
    width = curves.bin_width(longest)
    assert str(width).strip("0") in ("1", "2", "5")
    assert width == 1 or 60 <= longest / width <= 150


# ---- CSV files ----


def test_curves_csv(tmp_path):
    folders = [run(tmp_path, seed=seed) for seed in (2, 10, 1)]
    write(tmp_path / "out", *folders, run(tmp_path, m=1))
    rows = read(tmp_path / "out/curves.csv")
    assert list(rows[0]) == curves.CURVES
    keys = [(row["method"], row["seed"]) for row in rows]
    expected = [("m=1", "1"), ("m=None", "1"), ("m=None", "2"), ("m=None", "10")]
    assert list(dict.fromkeys(keys)) == expected  # seeds as numbers, not as text
    for row in rows:
        edge = int(row["step"])
        inside = [
            ret for step, ret in episodes(20_000, offset=int(row["seed"])) if 0 <= edge - step < 200
        ]
        assert float(row["episodic_return"]) == pytest.approx(statistics.mean(inside), rel=1e-5)
        assert row["episodes"] == str(len(inside))


def test_runs_csv(tmp_path):
    write(tmp_path / "out", run(tmp_path, m=1))
    (row,) = read(tmp_path / "out/runs.csv")
    assert list(row) == curves.RUNS
    last = [1 + step / 64 for step in range(700, 20_001, 700) if step > 18_000]
    assert float(row["return_last_tenth"]) == pytest.approx(statistics.mean(last), rel=1e-5)
    assert float(row["eval_mean"]) == 104
    assert float(row["eval_std"]) == pytest.approx(statistics.pstdev([100, 102, 110]), rel=1e-5)
    assert {name: row[name] for name in VERSIONS} == VERSIONS
    exact = {"steps": "20000", "eval_episodes": "3", "max_abs_obs": "12.5", "seed": "1"}
    exact |= {"clip_fraction": "0.125", "first_ratio_error": "0.25", "algo": "ppo", "env": "Ant-v3"}
    assert row.items() >= (exact | {"machine": "Linux, 2 cores"}).items()


def test_what_a_run_lacks_is_an_empty_cell(tmp_path):
    ours = run(tmp_path, "sac", m=2, ends=[(500, 7.0)])
    result = json.loads((ours / "result.json").read_text()) | {"evaluation": []}
    (ours / "result.json").write_text(json.dumps(result))
    write(tmp_path / "out", ours, sb3(tmp_path, seed=4))
    theirs, mine = sorted(read(tmp_path / "out/runs.csv"), key=lambda row: row["algo"])
    for column in ("return_last_tenth", "eval_mean", "eval_std", "first_ratio_error"):
        assert mine[column] == ""
    assert {name for name, cell in theirs.items() if not cell} >= {"eval_mean", "torch", "machine"}


def test_reading_back_leaves_out_the_bin_in_which_training_ended(tmp_path):
    ends = [(200, 1.0), (10_230, 99.0)]
    whole, part = run(tmp_path, ends=ends, total=10_240), run(tmp_path, seed=2, ends=ends[1:])
    unfinished(part)
    write(tmp_path / "out", whole, part)
    found = curves.read_bins(tmp_path / "out", lambda row: row["env"])
    seeds = {1: (10_240, [(200, 1.0, 1), (10_400, 99.0, 1)]), 2: (10_230, [(10_400, 99.0, 1)])}
    assert found == {"Ant-v3": {"m=None": seeds}}
    assert curves.curves_of(seeds) == {1: {200: 1.0}}  # of seed 2 there is none


@pytest.mark.parametrize("end", [20_000, 40_000])
def test_returns_are_those_of_the_last_tenth(tmp_path, end):
    write(tmp_path / "out", run(tmp_path, total=40_000), run(tmp_path, seed=5, total=900))
    seeds = curves.read_bins(tmp_path / "out", lambda row: row["env"])["Ant-v3"]["m=None"]
    late = [ret for s, ret in episodes(40_000, offset=1) if 0.9 * end < s <= end]
    found = curves.late_returns(seeds, end)
    assert found[1] == pytest.approx(statistics.mean(late), rel=1e-5)
    assert found[5] == pytest.approx(700 / 64 + 5, rel=1e-5)  # its last one


def test_there_is_a_return_wherever_a_bin_is_complete():
    """Of 57,000 steps in bins of 10,000 none ends within the last tenth."""
    seeds = {1: (57_000, [(edge, float(edge), 1) for edge in range(10_000, 70_000, 10_000)])}
    assert curves.late_returns(seeds, 57_000) == {1: 50_000}
    assert curves.late_returns(seeds, 9_000) == {}


def test_bad_csvs(tmp_path):
    with pytest.raises(OSError, match=r"runs\.csv"):
        curves.read_runs(tmp_path)
    for text, why in (("a,b\n1,2\n", "other columns"), (",".join(curves.RUNS) + "\nppo\n", "seed")):
        (tmp_path / "runs.csv").write_text(text)
        with pytest.raises(ValueError, match=why):
            curves.read_runs(tmp_path)
    (tmp_path / "runs.csv").write_text(",".join(curves.RUNS) + "\n")
    (tmp_path / "curves.csv").write_text(",".join(curves.CURVES) + "\nppo,A,m=1,1,10,2.5,0\n")
    with pytest.raises(ValueError, match=r"curves\.csv, line 2: episodes '0' is no number"):
        curves.read_bins(tmp_path, lambda row: row["env"])


# ---- text ----


def test_seeds_as_text():
    assert curves.spans({3, 1, 2, 7, 9, 10}, " to ") == "1 to 3, 7, 9 to 10"
    assert curves.spans([4], "-") == "4"


# ---- drawing ----


def drawn(seeds: list[dict], robust: bool = False) -> tuple:
    axes = Figure().subplots()
    line = curves.draw_method(axes, seeds, LOOK, robust)
    return line, axes.collections


def test_lines_are_means_of_running_means_and_bands_standard_deviations():
    first, second = {5: 0.0, 10: 3.0, 15: 6.0}, {5: 4.0, 15: 8.0, 20: 10.0}
    line, (band,) = drawn([first, second, first])
    smooth = [[1.5, 3.0, 4.5], [6.0, (6 + 22 / 3) / 2, 22 / 3]]  # 10 lies between 5 and 15
    smooth.append(smooth[0])
    assert [*line.get_xdata()] == [5, 10, 15]  # not beyond what both have
    assert [*line.get_ydata()] == pytest.approx(np.mean(smooth, 0))
    heights = band.get_paths()[0].vertices[:, 1]
    half = np.std(smooth, 0, ddof=1)
    assert heights.max() == pytest.approx((np.mean(smooth, 0) + half).max())
    assert heights.min() == pytest.approx((np.mean(smooth, 0) - half).min())


def test_robust_lines_are_interquartile_means_and_bands_their_intervals():
    values = [0.0, 1.0, 2.0, 3.0, 1000.0]
    line, (band,) = drawn([{5: value} for value in values], robust=True)
    assert [*line.get_ydata()] == [2.0]
    heights = band.get_paths()[0].vertices[:, 1]
    low, high = intervals.bootstrap(intervals.iqm, values)
    assert (heights.min(), heights.max()) == pytest.approx((low, high))
    assert not drawn([{5: value} for value in values[1:]], robust=True)[1]  # too few


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_have_no_band(count):
    line, bands = drawn([{5: 1.0, 10: 3.0}] * count)
    assert not bands and [*line.get_ydata()] == [2.0, 2.0]


def test_a_figure_is_a_png_and_a_pdf_always_the_same(tmp_path):
    lines = [{"A": {"x": {1: {5: 1.0, 10: 2.0}, 2: {5: 0.0, 10: 1.0}}, "unknown": {1: {5: 0.0}}}}]
    looks = {"x": ("a label that is far too long for a figure as narrow as a column " * 3, LOOK)}
    for name in ("first", "second"):
        curves.draw(lines, looks, tmp_path / f"{name}.png")
    for ending, head in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        first, second = ((tmp_path / f"{n}{ending}").read_bytes() for n in ("first", "second"))
        assert first == second and first.startswith(head)
    width = int.from_bytes((tmp_path / "first.png").read_bytes()[16:20], "big")
    assert width == drawing.COLUMN * 200
    with pytest.raises(ValueError, match="nothing to draw"):
        curves.draw(lines, {"y": looks["x"]}, tmp_path / "none.png")
