"""experiments/figures.py on made-up runs: what each figure shows, pairs, and what it refuses."""

import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from made import episodes, run, sb3, unfinished

import curves
import figures
import jobs
from buffers import ReplayBuffer
from quantize import Float, Packed
from support import drawing

ROOT = Path(__file__).parent.parent


def lines_of(figure: str, root: Path, **variables: str) -> list[str]:
    """What `./run.sh FIGURE --list` prints, its runs under root."""
    command = [ROOT / "run.sh", figure, "--list"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return [line.replace("runs/paper", str(root)) for line in done.stdout.splitlines()]


def train(lines: list[str], offset=lambda settings: 0.0) -> None:
    """Leave a run for each line: its returns grow with the step, beginning at offset + seed."""
    for line in lines:
        job = jobs.parse(line)
        words = line.split()
        given = dict(zip(words[2::2], words[3::2], strict=True))
        m, size = given.get("--quant-m"), int(given.get("--buffer-size", 1_000_000))
        if "--lib" in given:
            sb3(job.folder.parent, given["--algo"], int(given["--seed"]), given["--env"], m=m)
            continue
        settings = {"m": m and int(m), "seed": int(given["--seed"]), "env": given["--env"]}
        if words[1] == "sac.py":
            settings["buffer_size"] = size
        if "--storage" in given:
            settings["storage"] = given["--storage"]
        ends = episodes(20_000, offset=offset(settings) + settings["seed"])
        algo = words[1].removesuffix(".py")
        run(job.folder.parent, algo, ends=ends, name=job.folder.name, **settings)


def make(monkeypatch, capsys, figure: str, lines: list[str], out: Path) -> tuple[str, str]:
    """What `figures.py FIGURE` prints, given these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    capsys.readouterr()
    figures.main([figure, "--out", str(out)])
    return capsys.readouterr()


def cells(text: str) -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith(" --")]


def test_fig4_shows_both_algorithms_on_the_four_tasks(tmp_path, monkeypatch, capsys):
    lines = lines_of("fig4", tmp_path / "runs", SEEDS="1 2 10", STEPS="20000")
    assert len(lines) == 48
    train(lines, lambda settings: 0.0 if settings["m"] is None else 100.0)
    narrow = {"SEEDS": "1", "TASKS": "Ant-v3", "ALGOS": "ppo", "STEPS": "20000"}
    theirs = lines_of("sb3", tmp_path / "runs", **narrow)
    train(theirs)
    out, err = make(monkeypatch, capsys, "fig4", lines + theirs, tmp_path / "out")
    assert err == ""
    found = cells(out)
    tasks = ["HalfCheetah-v3", "Walker2d-v3", "Ant-v3", "Humanoid-v3"]
    panels = [f"{algo}, {task}" for algo in ("PPO", "SAC") for task in tasks]
    split = [row[:4] for row in found].index(["task", "method", "return", "reference"])
    assert list(dict.fromkeys(row[0] for row in found[1:split])) == panels
    assert ["PPO, Ant-v3", "SB3", "1"] in [row[:3] for row in found]
    mean = np.mean([s / 64 for s in range(700, 20_001, 700) if s > 18_000]) + 13 / 3
    assert ["SAC, Ant-v3", "m=2", "1 to 2, 10", "20,000", f"{mean + 100:.0f} ± 5"] in found
    differences = {(*row[:2], row[3]): row[5:] for row in found[split + 1 :]}
    steps, count, shift, _, *unknown = differences["PPO, Walker2d-v3", "m=1", "float64"]
    assert (steps, count, shift) == ("20,000", "3 and 3", "+100") and unknown == ["-"] * 3
    assert ("PPO, Walker2d-v3", "m=2", "float64") not in differences
    for name in ("fig4.png", "fig4.pdf", "fig4.md", "runs.csv", "curves.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 300
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    figures.main(["fig4", "--draw", "--out", str(tmp_path / "out")])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_fig3_holds_equal_memory_against_each_other(tmp_path, monkeypatch, capsys):
    lines = lines_of("fig3", tmp_path / "runs", SEEDS="1 2")
    assert len(lines) == 10
    train(lines, lambda settings: settings["buffer_size"] / 1000)
    out, _ = make(monkeypatch, capsys, "fig3", lines, tmp_path / "out")
    methods = {row["method"] for row in curves.read_runs(tmp_path / "out")}
    assert methods == set(figures.FIGURES["fig3"])
    *_, first, second = cells(out)
    task = "SAC, Humanoid-v3"
    assert first[:4:3] + first[1:8:6] == [task, "float64, 250k rows", "m=2", "+750"]
    assert second[:4:3] + second[1:8:6] == [task, "float64, 100k rows", "m=2, 400k rows", "+300"]


def test_what_five_seeds_of_two_tasks_say_together(tmp_path, monkeypatch, capsys):
    variables = {"SEEDS": "1 2 3 4 5", "TASKS": "Ant-v3 Walker2d-v3", "ALGOS": "ppo"}
    variables["STEPS"] = "20000"
    lines = [
        each for name in ("fig4", "sb3") for each in lines_of(name, tmp_path / "r", **variables)
    ]
    train(lines, lambda settings: 0.0 if settings["m"] is None else 100.0)
    out, _ = make(monkeypatch, capsys, "fig4", lines, tmp_path / "out")
    *_, head, ours, theirs, rounded = cells(out)
    assert head[4:] == ["difference of IQMs", "95% interval", "P(higher)", "95% of P"]
    assert ours[:4] == ["PPO, 2", "m=1", "float64", "20,000"]
    assert ours[6:] == ["1.00", "1.00 to 1.00"]
    returns = [ret for step, ret in episodes(20_000) if step > 18_000]
    expected = 100 / (np.mean(returns) + 3)
    assert float(ours[4].rstrip("%")) / 100 == pytest.approx(expected, abs=0.001)
    assert theirs[1:3] == ["SB3", "float64"] and rounded[1:4] == ["SB3, m=1", "SB3", "20,000"]
    assert rounded[4] == "+0.0%" and rounded[6] == "0.50"
    each = [
        row for row in cells(out) if row[:4:3] == ["PPO, Ant-v3", "float64"] and row[1] == "m=1"
    ]
    low, high = (int(number) for number in each[0][9].split(" to "))
    assert low < 100 < high and each[0][10:] == [
        f"{100 / np.std([1, 2, 3, 4, 5], ddof=1):.1f}",
        "1.00",
    ]


@pytest.mark.parametrize("figure", ["ablate-m", "ablate-storage"])
def test_ablations_show_every_storage_that_is_listed(figure, tmp_path, monkeypatch, capsys):
    lines = lines_of(figure, tmp_path / "runs", SEEDS="1", TASKS="Ant-v3")
    train(lines)
    make(monkeypatch, capsys, figure, lines, tmp_path / "out")
    rows = curves.read_runs(tmp_path / "out")
    assert len(rows) == len(lines)
    assert {row["method"] for row in rows} == set(figures.FIGURES[figure])


def test_what_has_not_been_trained_is_counted(tmp_path, monkeypatch, capsys):
    lines = lines_of("fig4", tmp_path / "runs", SEEDS="1", TASKS="Ant-v3")
    train(lines[:2])
    unfinished(jobs.parse(lines[0]).folder)
    theirs = lines_of("sb3", tmp_path / "runs", SEEDS="1", TASKS="Ant-v3")
    _, err = make(monkeypatch, capsys, "fig4", lines + theirs, tmp_path / "out")
    assert err.splitlines() == [
        "figures.py: 2 of the runs have not begun",
        "figures.py: 1 of the runs are unfinished",
    ]


def test_results_of_several_machines_add_up(tmp_path, monkeypatch, capsys):
    narrow = {"SEEDS": "1 2", "TASKS": "Ant-v3", "ALGOS": "sac"}
    lines = lines_of("fig4", tmp_path / "runs", STEPS="20000", **narrow)
    train(lines)
    make(monkeypatch, capsys, "fig4", lines, tmp_path / "at-once")
    for machine in (lines[:2], lines[2:]):
        shutil.rmtree(tmp_path / "runs")
        train(machine)
        make(monkeypatch, capsys, "fig4", lines, tmp_path / "out")
    for name in ("runs.csv", "curves.csv", "fig4.png"):
        one, other = (tmp_path / folder / name for folder in ("out", "at-once"))
        assert one.read_bytes() == other.read_bytes()
    make(monkeypatch, capsys, "fig4", lines[2:], tmp_path / "out")  # what is not listed stays
    assert (tmp_path / "out/runs.csv").read_bytes() == (tmp_path / "at-once/runs.csv").read_bytes()


def test_methods_of_different_lengths_are_compared_as_far_as_both_have_come(
    tmp_path, monkeypatch, capsys
):
    """Returns that only grow with the steps must not differ because one has more of them."""
    narrow = {"SEEDS": "1", "TASKS": "Ant-v3", "ALGOS": "sac", "STEPS": "40000"}
    lines = lines_of("fig4", tmp_path / "runs", **narrow)
    for line in lines:
        ends, name = episodes(40_000, offset=1), jobs.parse(line).folder.name
        m = 2 if "--quant-m" in line else None
        run(tmp_path / "runs", "sac", m=m, ends=ends, total=40_000, name=name)
    (theirs,) = lines_of("sb3", tmp_path / "runs", **narrow)
    train([theirs])  # for half as long
    text, _ = make(monkeypatch, capsys, "fig4", [*lines, theirs], tmp_path / "out")
    float64, rounded, sb3, equal, behind = (row for row in cells(text) if row[0] != "task")
    assert float64[3:] == rounded[3:] and (float64[3], sb3[3]) == ("40,000", "20,480")
    assert float(float64[4]) > float(sb3[4]) + 250
    assert equal[2] == equal[4] == rounded[4] and equal[5:8] == ["40,000", "1 and 1", "+0"]
    assert behind[1] == "SB3" and behind[5] == "20,480" and abs(float(behind[7])) < 15
    shorter = lines_of("fig4", tmp_path / "runs", **narrow | {"STEPS": "10000"})
    make(monkeypatch, capsys, "fig4", shorter, tmp_path / "short")
    assert {row["steps"] for row in curves.read_runs(tmp_path / "short")} == {"10000"}


def test_memory_in_the_labels_of_fig3_is_what_the_buffers_take():
    device, sizes = torch.device("meta"), {"obs_dim": 376, "act_dim": 17, "num_envs": 1}
    for name, (label, _) in figures.FIGURES["fig3"].items():
        rows = int(re.match(r"(\d+)(k|M)", label)[1]) * (1000 if "k rows" in label else 10**6)
        codec = Packed(2) if name.startswith("m=2") else Float()
        buffer = ReplayBuffer(codec, rows, **sizes, device=device, seed=1)
        assert f"{buffer.nbytes / 1e6:,.0f} MB" in label


def test_float64_is_black_and_rounded_blue_as_in_the_paper():
    for figure, looks in figures.FIGURES.items():
        assert looks["float64"][1]["color"] == "black"
        assert looks["m=2"][1]["color"] == drawing.BLUE, figure
        assert len({(label, str(style)) for label, style in looks.values()}) >= len(looks) - 1


def test_two_runs_for_one_line_of_a_figure_are_refused(tmp_path, monkeypatch, capsys):
    (line, _) = lines_of("fig4", tmp_path / "runs", SEEDS="1", TASKS="Ant-v3", ALGOS="ppo")
    with pytest.raises(SystemExit):
        make(monkeypatch, capsys, "fig4", [line, f"{line} --hidden 256"], tmp_path / "out")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("would be the same line of the figure") and "hidden-256" in said


def test_runs_with_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    lines = lines_of("fig4", tmp_path / "runs", SEEDS="1", TASKS="Ant-v3", ALGOS="ppo")
    folders = [jobs.parse(line).folder for line in lines]
    run(tmp_path / "runs", name=folders[0].name)
    run(tmp_path / "runs", m=1, name=folders[1].name, gamma=0.9)
    with pytest.raises(SystemExit) as stopped:
        make(monkeypatch, capsys, "fig4", lines, tmp_path / "out")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("differ in gamma") and all(str(folder) in line for folder in folders)
    assert not (tmp_path / "out").exists()


def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch, capsys):
    for figure, lines, why in (
        ("fig4", lines_of("fig4", tmp_path, SEEDS="1"), "none of these runs has been trained"),
        ("fig5", [], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            make(monkeypatch, capsys, figure, lines, tmp_path / "out")
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("figures.py: error: ") and why in line


@pytest.mark.parametrize("folder", ["fig4", "fig4-short", "ablate-m"])
def test_the_committed_tables_are_those_of_their_csvs(folder):
    results, figure = ROOT / "experiments/results" / folder, folder.removesuffix("-short")
    table = figures.table(figure, curves.read_bins(results, figures.panel))
    assert (results / f"{figure}.md").read_text() == table + "\n"
