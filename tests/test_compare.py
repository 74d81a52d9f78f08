"""experiments/compare.py on made-up runs: groups, panels, tables, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from made import episodes, log, run, sb3, unfinished

import compare
import curves


def rows(capsys, *words: object) -> list[list[str]]:
    """The table that it prints, without its head."""
    capsys.readouterr()
    compare.main([*map(str, words)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def fails(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        compare.main([*map(str, words)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: error: ")
    return line


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_runs_that_differ_in_their_seeds_are_one_group(tmp_path, capsys, out):
    for seed in (1, 2, 3):
        run(tmp_path / "runs", seed=seed)
        run(tmp_path / "runs", m=1, seed=seed, ends=episodes(20_000, offset=10 + seed))
    base, rounded = rows(capsys, tmp_path / "runs", "--out", out)
    mean = np.mean([step / 64 for step in range(700, 20_001, 700) if step > 18_000]) + 2
    assert base == ["Ant-v3", "no --quant-m", "1 to 3", "20,000", f"{mean:.0f} ± 1", "", ""]
    assert rounded[1:6] == ["--quant-m 1", "1 to 3", "20,000", f"{mean + 10:.0f} ± 1", "+10"]
    low, high = (float(number) for number in rounded[6].split(" to "))
    assert low < 10 < high and high - low < 5
    names = {path.name for path in out.iterdir()}
    assert names == {"returns.png", "returns.pdf", "table.md", "runs.csv", "curves.csv"}
    written = curves.read_bins(out, lambda row: row["env"])
    assert written["Ant-v3"].keys() == {"no --quant-m", "--quant-m 1"}


def test_groups_are_named_by_whatever_differs_and_tasks_have_panels(tmp_path, capsys, out):
    for env in ("Ant-v3", "Pendulum-v1"):
        run(tmp_path, "sac", m=2, env=env, gamma=0.9, tag="new")
        run(tmp_path, "sac", m=2, env=env, name=f"{env}-2")
    found = [row[:2] for row in rows(capsys, tmp_path, "--out", out)]
    groups = ["no --tag, --gamma 0.99", "--tag new, --gamma 0.9"]
    assert found == [[env, group] for env in ("Ant-v3", "Pendulum-v1") for group in groups]


def test_by_makes_panels_of_what_else_differs(tmp_path, capsys, out):
    for i, (gamma, m) in enumerate([(0.9, None), (0.99, None), (0.9, 1), (0.99, 1)]):
        run(tmp_path, gamma=gamma, m=m, name=str(i))
    found = rows(capsys, tmp_path, "--by", "gamma", "--out", out)
    assert [row[:2] for row in found] == [
        ["Ant-v3, no --quant-m", "--gamma 0.9"],
        ["Ant-v3, no --quant-m", "--gamma 0.99"],
        ["Ant-v3, --quant-m 1", "--gamma 0.9"],
        ["Ant-v3, --quant-m 1", "--gamma 0.99"],
    ]
    assert [bool(row[5]) for row in found] == [False, True] * 2  # each against its panel's first


def test_algorithms_are_compared_without_what_only_one_has(tmp_path, capsys, out):
    run(tmp_path)
    run(tmp_path, "sac")
    sb3(tmp_path)
    found = [row[1] for row in rows(capsys, tmp_path, "--out", out)]
    assert found == ["ppo, ours", "ppo, sb3", "sac, ours"]


def test_runs_still_training_are_compared_as_far_as_all_have_come(tmp_path, capsys, out):
    run(tmp_path, total=40_000)
    unfinished(run(tmp_path, m=1))
    base, rounded = rows(capsys, tmp_path, "--out", out)
    assert base[3] == rounded[3] == "19,600"
    shown = np.mean([1 + s / 64 for s in range(700, 40_001, 700) if 0.9 * 19_600 < s <= 19_600])
    assert base[4] == rounded[4] == f"{shown:.0f}"
    assert rounded[5:] == ["+0", "-"]  # one seed each says nothing of an interval


def test_interquartile_means(tmp_path, capsys, out):
    for m, ret in ((None, 0.0), (1, 10.0)):
        for seed, outlier in enumerate((0, 1, 1, 2, 1000)):
            ends = [(step, ret + outlier) for step in range(100, 20_001, 100)]
            run(tmp_path, m=m, seed=seed, ends=ends)
    base, rounded = rows(capsys, tmp_path, "--iqm", "--out", out)
    assert (base[4], rounded[4], rounded[5]) == ("1", "11", "+10")


def test_a_setting_of_zero_is_not_off(tmp_path, capsys, out):
    """0 == False: it would tie with what is off, and a folder's name would choose the reference."""
    for m in (0, 2, None):
        run(tmp_path, "sac", m=m, name=f"a-{m}")
    groups = [row[1] for row in rows(capsys, tmp_path, "--out", out)]
    assert groups == ["no --quant-m", "--quant-m 0", "--quant-m 2"]


def test_seeds_without_an_episode_in_the_last_tenth_are_not_named(tmp_path, capsys, out):
    run(tmp_path, seed=1)
    run(tmp_path, seed=2)
    run(tmp_path, seed=3, ends=[(100, 1.0)])
    ((_, _, seeds, *_),) = rows(capsys, tmp_path, "--out", out)
    assert seeds == "1 to 2"


def test_of_one_experiment_twice_the_longer_run_is_taken(tmp_path, capsys, out):
    shorter, longer = run(tmp_path, total=10_000), run(tmp_path, name="again")
    compare.main([str(tmp_path), "--out", str(out)])
    text, err = capsys.readouterr()
    assert (
        err == f"compare.py: left out {shorter}: {longer} is the same experiment, and no shorter\n"
    )
    assert "| 20,000 |" in text and len(curves.read_runs(out)) == 1


def test_the_run_that_cuts_a_table_short_is_named(tmp_path, capsys, out):
    run(tmp_path, total=40_000)
    short = unfinished(run(tmp_path, m=1))
    compare.main([str(tmp_path), "--out", str(out)])
    told = f"compare.py: Ant-v3: only the first 19,600 steps, as many as {short} has\n"
    assert capsys.readouterr().err == told


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, capsys, out):
    run(tmp_path)
    foreign = log(tmp_path / "foreign", {}, episodes(1000))
    compare.main([str(tmp_path), "--out", str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compare.py: left out {foreign}: ")


def test_files_beside_the_runs_are_passed_over(tmp_path, capsys, out):
    """As `runs/Ant*` names them, where jobs.py has trained."""
    folder = run(tmp_path)
    (beside := folder.with_name(f"{folder.name}.log")).touch()
    compare.main([str(folder), str(beside), "--out", str(out)])
    assert capsys.readouterr().err == ""
    assert "no run in" in fails(capsys, beside, "--out", out / "none")


def test_bad_input_is_one_line(tmp_path, capsys, out):
    first = run(tmp_path / "runs")
    assert "no setting of these runs" in fails(capsys, first, "--by", "gama", "--out", out)
    assert "there is no folder" in fails(capsys, tmp_path / "absent", "--out", out)
    assert "the following arguments" in fails(capsys)
    assert not out.exists()
    (tmp_path / "file").touch()
    assert "file" in fails(capsys, first, "--out", tmp_path / "file/out")
