"""experiments/checkpoint.py on a small buffer, and what its committed measurement must show."""

import csv

import numpy as np
import torch

import checkpoint
from quantize import Packed

MOST_GROWTH = 64e6  # bytes; glibc keeps as much of what is freed


def test_growth_is_seen_while_it_lasts():
    def grow():
        np.ones(20_000_000).sum()  # 160 MB, given back at once

    seconds, grown = checkpoint.measure(grow)
    assert seconds > 0 and 150e6 < grown < 200e6


def test_what_is_measured_is_saved_and_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "STORAGES", (Packed(2),))
    checkpoint.main(["--rows", "5000", "--out", str(tmp_path / "checkpoint.csv")])
    assert "growth at loading" in capsys.readouterr().out
    (line,) = csv.DictReader((tmp_path / "checkpoint.csv").open())
    buffer = checkpoint.ReplayBuffer(
        Packed(2), 5000, 1, **checkpoint.HUMANOID, device=torch.device("meta"), seed=0
    )
    assert int(line["bytes of the buffer"]) == buffer.nbytes
    assert 0 < int(line["bytes"]) - buffer.nbytes < 10e6


def test_a_million_rows_take_at_most_800_mb_and_no_copy():
    lines = [*csv.DictReader((checkpoint.ROOT / "experiments/results/checkpoint.csv").open())]
    assert int(lines[0]["bytes"]) < 800e6 and "packed" in lines[0]["storage"]
    for line in lines:
        assert line["rows"] == "1000000"
        assert max(int(line[f"growth at {when}"]) for when in ("saving", "loading")) < MOST_GROWTH
