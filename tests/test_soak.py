"""experiments/soak.py, short and on hand-written samples: nothing here asserts a time."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import soak
from tables import write_csv

STEADY = "held held held"


def write(path: Path, samples: int = 20, **changes: dict[int, float]) -> Path:
    """soak.csv of a steady run, 1,000 steps and one second a sample; changes: {sample: value}."""
    rows = []
    for i in range(1, samples + 1):
        row = {"step": 1000 * i, "wall_seconds": 2 * i, "cpu_seconds": i, "rss_bytes": 300e6}
        row |= {"pieces_seconds": 0.002 * i, "pieces": 2 * i}
        row |= {"rss_anon_bytes": 200e6, "file_handles": 7, "torch": "2", "cpu": "Abacus"}
        rows.append(row | {name: by[i] for name, by in changes.items() if i in by})
    write_csv(path, soak.COLUMNS, rows)
    return path


def verdicts(text: str) -> str:
    """Of memory, speed and file handles."""
    lines = text.splitlines()
    return " ".join(line.split(":")[0] for line in lines if line[:5] in ("held:", "misse"))


def fails(capsys, *argv: object) -> str:
    """The one line that bad input leaves on stderr."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(soak.sac, "main", lambda args: pytest.fail("trains"))
        soak.main([*map(str, argv)])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(soak.SETTINGS, "buffer_size", 300)
    monkeypatch.setitem(soak.SETTINGS, "checkpoint_every", 1000)
    path = tmp_path / "new" / "soak.csv"
    soak.main(["--steps", "3000", "--every", "300", "--out", str(path)])
    assert path.read_text().splitlines()[0].split(",") == soak.COLUMNS
    data = soak.read(path)
    assert data["step"].tolist() == [*range(300, 3001, 300)]
    for name in ("wall_seconds", "cpu_seconds"):
        assert (np.diff(data[name], prepend=0) > 0).all()
    assert (data["rss_bytes"] > data["rss_anon_bytes"]).all()
    assert (data["rss_anon_bytes"] > 0).all() and (data["file_handles"] >= 4).all()
    assert len(verdicts(capsys.readouterr().out).split()) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["soak.csv", "soak.pdf", "soak.png"]
    assert "Cheap-v0" not in gym.registry


def test_episodes_end_in_both_ways():
    class Uncounted:
        def count(self):
            pass

    env = gym.wrappers.TimeLimit(soak.Cheap(Uncounted()), 200)
    env.reset(seed=1)
    ends = set()
    for _ in range(5000):
        _, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        if terminated or truncated:
            ends.add("terminated" if terminated else "truncated")
            env.reset()
    assert ends == {"terminated", "truncated"}


# Of 20 samples the first is warm-up and the second ends it; speeds are of samples 3 and 4, 19, 20.
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, STEADY),
        ({"rss_bytes": {20: 304.9e6}}, STEADY),
        ({"rss_bytes": {20: 306e6}}, "missed held held"),
        ({"rss_bytes": {10: 306e6}}, "missed held held"),  # and was given back
        ({"rss_anon_bytes": {20: 206e6}}, "missed held held"),  # hidden by pages of files
        ({"rss_bytes": {1: 200e6}, "file_handles": {1: 6}}, STEADY),  # within warm-up
        ({"cpu_seconds": {19: 18 + 1 / 0.94, 20: 18 + 2 / 0.94}}, "held missed held"),
        ({"cpu_seconds": {19: 18 + 1 / 0.96, 20: 18 + 2 / 0.96}}, STEADY),
        ({"wall_seconds": {19: 50, 20: 70}}, STEADY),  # a busy machine,
        # of which the pieces tell: half as fast, and they too; only they, and it alone.
        ({"cpu_seconds": {19: 20, 20: 22}, "pieces_seconds": {19: 0.04, 20: 0.044}}, STEADY),
        ({"pieces_seconds": {19: 0.037, 20: 0.038}}, "held missed held"),
        ({"file_handles": {15: 8}}, "held held missed"),
    ],
)
def test_verdicts(tmp_path, capsys, changes, expected):
    path = write(tmp_path / "soak.csv", **changes)
    soak.main(["--draw", "--out", str(path)])
    assert verdicts(capsys.readouterr().out) == expected
    assert path.with_suffix(".png").stat().st_size > 1000


def test_summary(tmp_path):
    changes = {"rss_bytes": {2: 301e6, 10: 307e6, 20: 304e6}, "file_handles": {1: 5, 9: 9}}
    changes |= {"cpu_seconds": {19: 20, 20: 22}}
    found = soak.summarise(soak.read(write(tmp_path / "soak.csv", **changes)))
    assert found["rss_bytes"] == (301e6, 3e6, 6e6)
    assert found["rss_anon_bytes"] == (200e6, 0, 0)
    assert found["cpu_seconds"] == (1000, 500, 0.5)
    assert found["piece"] == pytest.approx((1, 0.5, 0.5))  # a piece takes a millisecond
    assert found["wall_seconds"] == (500, 500, 1)
    assert found["file_handles"] == (7, 9, 2)


def test_bad_input(tmp_path, capsys):
    out = "--out", tmp_path / "soak.csv"
    assert "--steps at least 10 times" in fails(capsys, *out, "--steps", 199_999)
    assert "--every must be at least 100," in fails(capsys, *out, "--every", 0)
    assert "No such file" in fails(capsys, *out, "--draw")
    write(out[1], samples=9)
    assert "holds 9 samples" in fails(capsys, *out, "--draw")
    out[1].write_text("a,b\n1,2\n")
    assert "other columns" in fails(capsys, *out, "--draw")
    assert "Is a directory" in fails(capsys, "--out", tmp_path)
