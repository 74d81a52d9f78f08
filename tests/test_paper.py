"""experiments/paper.py and storages.py: the paper's figures, and other libraries' buffers."""

import json
import math

import pytest

import memory
from experiments import paper
from memory import Args, allocated, total
from quantize import Packed
from support import envs

M = memory.PAPER_M


@pytest.mark.parametrize(
    ("task", "ppo", "sac"),
    [  # PAPER.md
        ("Walker2d-v3", 11_085, 17_614),
        ("HalfCheetah-v3", 11_085, 17_614),
        ("Ant-v3", 23_249, 36_178),
        ("Humanoid-v3", 57_763, 89_380),
    ],
)
def test_parameter_counts(task, ppo, sac):
    assert paper.parameters("ppo", *paper.TASKS[task], hidden=64) == ppo
    assert paper.parameters("sac", *paper.TASKS[task], hidden=64) == sac


def test_tasks_are_those_of_envs():
    assert set(paper.TASKS) == set(envs.V3_TASKS)
    for task, dims in paper.TASKS.items():
        env = envs.make(task)
        assert (*env.observation_space.shape, *env.action_space.shape) == dims
        env.close()


def test_fig2_ratios():
    cells = paper.fig2(M, 127)
    ratios = {algo: [c["ratio"] for c in cells if c["algo"] == algo] for algo in ("ppo", "sac")}
    assert ratios["ppo"] == pytest.approx([2.11, 2.11, 3.65, 4.16], abs=0.005)  # PAPER.md
    assert ratios["sac"] == pytest.approx([2.63, 2.63, 3.74, 3.95], abs=0.005)
    assert [f"{r:.1f}" for r in (ratios["ppo"][0], ratios["ppo"][-1])] == ["2.1", "4.2"]
    assert [f"{r:.1f}" for r in (ratios["sac"][0], ratios["sac"][-1])] == ["2.6", "3.9"]
    assert {(c["algo"], c["bits"]) for c in cells} == {("ppo", 12), ("sac", 15)}
    assert all(c["model_of_q"] < 0.02 for c in cells if c["algo"] == "sac")  # Sec. V-B


def test_eq1_and_eq3_by_hand():
    sizes = dict(obs_dim=17, act_dim=6, hidden=64)
    rollout = 2048 * (17 * 12 / 8 + 4 * (6 + 7))
    assert total(paper.ledger("ppo", 12, **sizes, steps=2048)) == 4 * 11_085 + rollout  # eq. 1
    replay = 1_000_000 * (17 * 15 / 8 + 4 * (6 + 2))
    assert total(paper.ledger("sac", 15, **sizes, steps=10**6)) == 4 * 17_614 + replay  # eq. 3


def test_humanoid_sac_is_just_under_750_in_mib_only():
    humanoid = paper.fig2(M, 127)[-1]
    b, q = total(humanoid["B"]), total(humanoid["Q"])
    assert b / 1e6 == pytest.approx(3084.4, abs=0.05)
    assert q / 1e6 == pytest.approx(781.4, abs=0.05)
    assert q / 2**20 == pytest.approx(745.2, abs=0.05)
    targets = 4 * (148_262 - 89_380)
    assert (q + targets) / 2**20 == pytest.approx(745.4, abs=0.05)  # PAPER.md's counts targets


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [  # PAPER.md
        ((391, 16, 8_300, 1.3e6), (27.09, 95.42, 95.83, 91.45)),
        ((112, 8, 100_000, 2.3e6), (96.8, 97.68, 92.56, 90.41)),
        ((112, 8, 1_000_000, 2.3e6), (968.0, 99.76, 92.56, 92.34)),
    ],
)
def test_worked_examples(inputs, expected):
    assert tuple(paper.worked_example(*inputs).values()) == pytest.approx(expected, abs=0.005)
    assert inputs in [example[1] for example in paper.WORKED_EXAMPLES]


def test_results_and_slips_are_printed(capsys):
    memory.main(Args())
    out = capsys.readouterr().out
    for text in ("4.16x", "3.95x", "745.2 MiB", "781.4 MB", "27.09 (27)", "91.45 (92)", "968 MB"):
        assert text in out


def test_json_parses_and_is_alone(capsys, tmp_path):
    memory.main(Args(json=True, plot=tmp_path / "new/f.pdf"))
    report = json.loads(capsys.readouterr().out)
    assert len(report["fig2"]) == 8
    assert report["plot"].endswith("f.pdf")
    assert len(report["worked_examples"]) == 3


def test_plot_writes_a_png_and_a_pdf(tmp_path, capsys):
    path = tmp_path / "fig2.png"
    memory.main(Args(plot=path))
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1432, 520)  # two printed columns, 200 dots to the inch
    assert (tmp_path / "fig2.pdf").read_bytes().startswith(b"%PDF")
    assert str(path) in capsys.readouterr().out


# ---- other libraries' buffers ----


def layouts(capsys, **given):
    """The rows of --layouts, and what is printed."""
    memory.main(Args(layouts=True, **given))
    out = capsys.readouterr().out
    memory.main(Args(layouts=True, json=True, **given))
    return json.loads(capsys.readouterr().out)["rows"], out


def test_layouts_are_those_of_peers_md(capsys):
    rows, out = layouts(capsys, env="Humanoid-v3", live_columns=257)
    megabytes = [6016, 3008, 3008, 1504, 3008, 752, 752, 706, 514, 482]
    assert [row["bytes per observation"] for row in rows] == megabytes
    assert [row["observations"] / 1e6 for row in rows] == pytest.approx(megabytes, abs=0.01)
    assert [row["rest"] / 1e6 for row in rows] == pytest.approx([80] * 4 + [74] * 6, abs=0.01)
    assert [row["total"] for row in rows] == [row["observations"] + row["rest"] for row in rows]
    times_less = [row["times less"] for row in rows]
    assert times_less[3:8:4] == pytest.approx([6096 / 1584, 7.815], abs=0.01)
    sizes = dict(obs_dim=376, act_dim=17, hidden=64, num_envs=1, batch_size=256)
    ledger = allocated("sac", Packed(2), **sizes, buffer_size=1_000_000, live_columns=257)
    assert rows[-1]["total"] == ledger["buffer observations"] + ledger["buffer rest"]
    assert all(row["layout"] in out and memory.mb(row["total"]) in out for row in rows)
    assert "7.38x" in out


def test_layouts_of_any_robot(capsys):
    (first, *_, last), _ = layouts(capsys, obs_dim=5, act_dim=1, buffer_size=100)
    assert first["total"] == 100 * (2 * 5 * 8 + 4 * (1 + 3))
    assert last["total"] == 101 * (2 * math.ceil(5 * 15 / 16) + 4 + 4 + 2)
