"""experiments/plot.py on synthetic runs with known returns."""

import csv
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import plot

VERSIONS = {"torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3.14.0", "numpy": "2.4.6"}
Episodes = list[tuple[int, float]]  # (last step, return)


def episodes(total: int, length: int, offset: float = 0.0) -> Episodes:
    """Ends every `length` steps with a return that grows with the step."""
    return [(step, offset + step / 64) for step in range(length, total + 1, length)]


def log(folder: Path, ends: Episodes) -> Path:
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("hyperparameters", "|argument|value|")
        writer.add_scalar("charts/SPS", -1.0, 1)
        for step, ret in ends:
            writer.add_scalar("charts/episodic_return", ret, step)
    return folder


def ours(root: Path, algo="ppo", m=None, seed=1, env="Ant-v3", ends=None, total=20_000, **changes):
    """A finished run of ours. `changes` replace entries of its args."""
    ends = episodes(total, 700, seed) if ends is None else ends
    folder = log(root / f"{env}__{algo}__m-{m}__seed-{seed}", ends)
    args = {"env": env, "seed": seed, "quant_m": m, "quant_b": 127.0, "storage": None}
    args |= {"total_timesteps": total, "quant_act": False, "run_name": None} | changes
    last = [ret for step, ret in ends if step > 0.9 * total]
    result = {
        "algo": algo,
        "global_step": total,
        "storage": (args["storage"] or "float64") if m is None else f"int16 (m={m}, b=127)",
        "clip_fraction": 0.125,
        "max_abs_obs": 12.5,
        "return_last_tenth": sum(last) / len(last) if last else None,
        "evaluation": [100.0, 102.0, 110.0],
        "args": args,
        "versions": VERSIONS,
        "machine": "Linux, 2 cores, 1 threads",
    }
    if algo == "ppo":
        result["first_ratio_error"] = 0.25
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def sb3(root: Path, algo="ppo", seed=1, env="Ant-v3", ends=None) -> Path:
    return log(root / f"{env}__sb3-{algo}__seed{seed}", ends or episodes(20_480, 900))


def collect(*roots: Path, out: Path) -> None:
    short = ["--sb3-ppo-steps", "20000", "--sb3-sac-steps", "20000"]
    plot.main(["collect", *map(str, roots), "--out", str(out), *short])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys, *argv: object) -> str:
    """The one line that a command with bad input leaves on stderr, besides runs left out."""
    with pytest.raises(SystemExit) as exit_info:
        plot.main([*map(str, argv)])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if not line.startswith("plot.py: left out ")]
    return line


@pytest.fixture
def results(tmp_path) -> Path:
    """CSV files of three methods on PPO's Ant: three seeds, one, and one."""
    runs = tmp_path / "runs"
    for seed in (1, 2, 10):
        ours(runs, seed=seed)
    ours(runs, m=1, storage=None)
    sb3(tmp_path / "elsewhere" / "deeper")
    collect(runs, tmp_path / "elsewhere", out=tmp_path / "results")
    return tmp_path / "results"


# ---- bins ----


def test_bins_match_a_naive_loop():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(60_000, 80, replace=False)) + 1
    steps[:4] = 1, 4999, 5000, 5001  # both sides of an edge
    steps = np.sort(steps)
    steps = steps[(steps <= 20_000) | (steps > 30_000)]  # two bins without an episode
    returns = rng.normal(size=len(steps))
    naive = []
    for edge in range(5000, 65_001, 5000):
        inside = [r for s, r in zip(steps, returns, strict=True) if edge - 5000 < s <= edge]
        if inside:
            naive.append((edge, pytest.approx(sum(inside) / len(inside)), len(inside)))
    actual = plot.bin_returns(steps, returns)
    assert actual == naive
    assert {25_000, 30_000}.isdisjoint(edge for edge, _, _ in actual)
    assert sum(count for _, _, count in actual) == len(steps)


def test_every_event_is_read(tmp_path):
    """TensorBoard's reader keeps 10,000 scalars unless told otherwise."""
    ends = [(step, 1.0) for step in range(1, 10_501)]
    ours(tmp_path / "runs", ends=ends, total=10_500)
    collect(tmp_path / "runs", out=tmp_path)
    assert [row["episodes"] for row in read(tmp_path / "curves.csv")] == ["5000", "5000", "500"]


# ---- collect ----


def test_curves_csv(results):
    rows = read(results / "curves.csv")
    assert list(rows[0]) == plot.CURVES
    keys = [(row["method"], row["seed"]) for row in rows]
    expected = [("SB3", "1"), ("float64", "1"), ("float64", "2"), ("float64", "10"), ("m=1", "1")]
    assert list(dict.fromkeys(keys)) == expected  # seeds as numbers, not as text
    seed_2 = [row for row in rows if (row["method"], row["seed"]) == ("float64", "2")]
    assert [row["step"] for row in seed_2] == ["5000", "10000", "15000", "20000"]
    first = [2 + step / 64 for step in range(700, 5001, 700)]
    assert float(seed_2[0]["episodic_return"]) == pytest.approx(statistics.mean(first), rel=1e-5)
    assert seed_2[0]["episodes"] == str(len(first))
    assert {row["algo"] for row in rows} == {"ppo"}
    assert {row["env"] for row in rows} == {"Ant-v3"}


def test_runs_csv_of_ours(results):
    (row,) = [row for row in read(results / "runs.csv") if row["method"] == "m=1"]
    assert list(row) == plot.RUNS
    last = [1 + step / 64 for step in range(700, 20_001, 700) if step > 18_000]
    assert float(row["return_last_tenth"]) == pytest.approx(statistics.mean(last), rel=1e-5)
    assert float(row["eval_mean"]) == 104
    assert float(row["eval_std"]) == pytest.approx(statistics.pstdev([100, 102, 110]), rel=1e-5)
    assert {name: row[name] for name in VERSIONS} == VERSIONS
    exact = {"steps": "20000", "eval_episodes": "3", "max_abs_obs": "12.5", "seed": "1"}
    exact |= {"clip_fraction": "0.125", "first_ratio_error": "0.25", "algo": "ppo", "env": "Ant-v3"}
    assert row.items() >= (exact | {"machine": "Linux, 2 cores, 1 threads"}).items()


def test_runs_csv_of_sb3(results):
    """What its folder and events say, and nothing else; its last rollout of 2048 is finished."""
    (row,) = [row for row in read(results / "runs.csv") if row["method"] == "SB3"]
    assert row["steps"] == "20480"
    last = [step / 64 for step in range(900, 20_481, 900) if step > 18_432]
    assert float(row["return_last_tenth"]) == pytest.approx(statistics.mean(last), rel=1e-5)
    known = {"algo", "env", "method", "seed", "steps", "return_last_tenth"}
    assert {name for name, cell in row.items() if cell} == known


def test_what_a_run_lacks_is_an_empty_cell(tmp_path):
    folder = ours(tmp_path / "runs", algo="sac", m=2, ends=[(500, 7.0)])
    result = json.loads((folder / "result.json").read_text()) | {"evaluation": []}
    (folder / "result.json").write_text(json.dumps(result))
    collect(tmp_path / "runs", out=tmp_path)
    (row,) = read(tmp_path / "runs.csv")
    for column in ("return_last_tenth", "eval_mean", "eval_std", "first_ratio_error"):
        assert row[column] == ""
    assert row["eval_episodes"] == "0"


def test_collecting_again_changes_no_byte(results, tmp_path):
    before = [(results / name).read_bytes() for name in ("curves.csv", "runs.csv")]
    collect(tmp_path / "elsewhere", tmp_path / "runs", tmp_path / "runs", out=results)
    assert before == [(results / name).read_bytes() for name in ("curves.csv", "runs.csv")]


def test_unfinished_and_foreign_runs_are_named_and_left_out(tmp_path, capsys):
    runs = tmp_path / "runs"
    ours(runs)
    left_out = {
        (ours(runs, seed=2) / "result.json"): "unfinished",
        (ours(runs, seed=3) / "result.json"): "not a result.json of ours",
        sb3(runs, seed=4, ends=episodes(19_000, 1000)) / "x": "19,000 of 20,480",
        sb3(runs, seed=5, algo="sac", ends=episodes(18_900, 900)) / "x": "18,900 of 20,000",
        log(runs / "Ant-v3__sb3-ppo__seed6", []) / "x": "unfinished",
        log(runs / "something", episodes(20_000, 1000)) / "x": "unfinished",
    }
    broken, empty, *_ = left_out
    broken.unlink()
    empty.write_text("{}")
    collect(runs, out=tmp_path)
    assert len(read(tmp_path / "runs.csv")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(left_out)
    for path, reason in left_out.items():
        (line,) = [line for line in lines if f"{path.parent}: " in line]
        assert line.startswith("plot.py: left out ")
        assert reason in line


def test_sb3_is_finished_up_to_one_episode_before_its_end(tmp_path):
    sb3(tmp_path / "runs", ends=episodes(19_480, 974))
    collect(tmp_path / "runs", out=tmp_path)
    assert len(read(tmp_path / "runs.csv")) == 1


@pytest.mark.parametrize("make", [ours, sb3])
def test_the_same_run_twice_is_refused(tmp_path, capsys, make):
    folders = [make(tmp_path / name) for name in ("first", "second")]
    line = fails(
        *(capsys, "collect", *(folder.parent for folder in folders)),
        *("--out", tmp_path / "out", "--sb3-ppo-steps", 20_000),
    )
    assert line.startswith("plot.py: error: ppo Ant-v3 ")
    assert all(str(folder) in line for folder in folders)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"quant_act": True}, {"total": 10_000}, {"new_option": 1}])
def test_runs_with_other_settings_are_refused(tmp_path, capsys, change):
    folders = ours(tmp_path), ours(tmp_path, m=1, **change)
    line = fails(capsys, "collect", tmp_path, "--out", tmp_path / "out")
    assert all(str(folder) in line for folder in folders)
    assert "total_timesteps" in line if "total" in change else next(iter(change)) in line
    assert not (tmp_path / "out").exists()


def test_nothing_to_collect(tmp_path, capsys):
    assert "no such folder" in fails(capsys, "collect", tmp_path / "absent")
    line = fails(capsys, "collect", tmp_path, "--out", tmp_path / "out")
    assert f"no finished run in {tmp_path}" in line
    assert not (tmp_path / "out").exists()


# ---- draw ----


def test_draw_makes_pngs_from_the_csvs_alone(results, tmp_path):
    for name in ("curves.csv", "runs.csv"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    plot.main(["draw", "--results", str(tmp_path)])
    png = (tmp_path / "learning_ppo.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert not (tmp_path / "learning_sac.png").exists()  # no run of it


def test_lines_average_the_seeds_that_have_the_bin():
    axes = plot.Figure().subplots()
    curves = [{5000: 0.0, 10_000: 3.0, 15_000: 6.0}, {5000: 4.0, 15_000: 8.0, 20_000: 10.0}]
    line = plot.draw_method(axes, curves, plot.STYLES["SB3"][1])
    first = {5000: 1.5, 10_000: 3.0, 15_000: 4.5}  # running mean over 3 bins
    second = {5000: 4.0, 15_000: 9.0, 20_000: 9.0}
    assert [*line.get_xdata()] == [5000, 10_000, 15_000, 20_000]
    assert [*line.get_ydata()] == [2.75, 3.0, 6.75, 9.0]
    each = [dict(zip(*thin.get_data(), strict=True)) for thin in axes.lines if thin is not line]
    assert each == [first, second]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.5, 9.0)


def test_the_bin_in_which_training_ended_is_not_drawn(tmp_path, monkeypatch):
    ours(tmp_path, ends=[(5000, 1.0), (10_000, 1.0), (10_240, 99.0)], total=10_240)
    collect(tmp_path, out=tmp_path)
    drawn = []
    real = plot.draw_method
    monkeypatch.setattr(plot, "draw_method", lambda a, c, s: drawn.append(c) or real(a, c, s))
    plot.main(["draw", "--results", str(tmp_path)])
    assert drawn == [[{5000: 1.0, 10_000: 1.0}]]


@pytest.mark.parametrize("command", ["draw", "table"])
def test_bad_csvs(tmp_path, capsys, command):
    assert "runs.csv" in fails(capsys, command, "--results", tmp_path)
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    assert "has other columns" in fails(capsys, command, "--results", tmp_path)
    (tmp_path / "runs.csv").write_text(",".join(plot.RUNS) + "\nppo\n")
    assert fails(capsys, command, "--results", tmp_path).startswith("plot.py: error: ")


# ---- table ----


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+", text.split(":")[-1])]


def test_table(results, capsys):
    capsys.readouterr()
    plot.main(["table", "--results", str(results)])
    header, rule, row, *_ = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 9
    algo, env, steps, seeds, float64, *others = (c.strip() for c in row[1:-1].split("|"))
    rounded, other, expected = others
    assert (algo, env, steps, expected) == ("PPO", "Ant-v3", "20,000 or 20,480", "-")
    assert seeds == "3"
    base = statistics.mean(step / 64 for step in range(700, 20_001, 700) if step > 18_000)
    each = [base + seed for seed in (1, 2, 10)]
    shown = [statistics.mean(each), statistics.stdev(each)]
    assert numbers(float64) == [round(number) for number in shown]
    assert "±" in float64 and "±" not in rounded
    assert numbers(rounded) == [round(base + 1)]
    last = statistics.mean(step / 64 for step in range(900, 20_481, 900) if step > 18_432)
    assert numbers(other) == [round(last)]


def test_bands_stand_beside_the_steps_that_they_are_for(tmp_path, capsys):
    for env, total in (("Humanoid-v3", 301_056), ("Walker2d-v3", 100_352)):
        ours(tmp_path, env=env, ends=[(total, 1.0)], total=total)
    ours(tmp_path, "sac", env="Humanoid-v3", ends=[(300_000, math.pi)], total=300_000)
    collect(tmp_path, out=tmp_path)
    capsys.readouterr()
    plot.main(["table", "--results", str(tmp_path)])
    rows = [[c.strip() for c in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    expected = {(row[1], row[2]): row[8] for row in rows[2:] if len(row) > 8}
    assert expected == {
        ("PPO", "Humanoid-v3"): "345 to 390",
        ("PPO", "Walker2d-v3"): "-",
        ("SAC", "Humanoid-v3"): "-",
    }
