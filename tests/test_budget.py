"""experiments/budget.py: small buffers under real limits, by whatever may enforce them here."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import budget

ROWS = 200_000  # 156 MB packed, 617 MB in float64, beside some 0.37 GB for the libraries


@pytest.mark.parametrize("may_make_cgroups", [True, False])
def test_packed_trains_where_float64_is_refused(tmp_path, monkeypatch, may_make_cgroups):
    monkeypatch.setattr(budget, "STORAGES", (budget.Packed(2), budget.Float()))
    if not may_make_cgroups:
        monkeypatch.setattr(budget, "make_cgroup", lambda limit: None)
    out = tmp_path / "budget.csv"
    budget.main(
        ["--limit", "600MB", "--rows", str(ROWS), "--steps", "300", "--out", str(out)]
    )  # fmt: skip
    packed, float64 = csv.DictReader(out.open())
    if not may_make_cgroups:
        assert packed["enforced by"] == float64["enforced by"] == "RLIMIT_DATA"
    assert packed["outcome"] == "trained"
    assert int(packed["allocated"]) < int(packed["peak resident"]) < 600e6
    assert float64["outcome"] == "refused" and "MB of memory that are free" in float64["said"]


@pytest.mark.parametrize("may_make_cgroups", [True, False])
def test_the_kernel_stops_what_goes_beyond_the_limit(monkeypatch, may_make_cgroups):
    if not may_make_cgroups:
        monkeypatch.setattr(budget, "make_cgroup", lambda limit: None)
    codes = []
    with budget.limited(150_000_000) as (enforced_by, come_under):
        groups = list(Path("/sys/fs/cgroup").rglob(f"just-round-{os.getpid()}"))
        assert bool(groups) == (enforced_by == "cgroup")
        for megabytes in (50, 200):
            take = [sys.executable, "-c", f"print(len(bytearray({megabytes}_000_000)))"]
            child = subprocess.run(take, preexec_fn=come_under, capture_output=True, check=False)
            codes.append(child.returncode)
    assert codes == [0, -9 if enforced_by == "cgroup" else 1]
    assert not any(group.exists() for group in groups)


def test_a_bad_limit_is_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        budget.main(["--limit", "much"])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_measured_before_outlives_an_interrupted_start(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "budget.csv").write_text("before")
    monkeypatch.setattr(budget, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        budget.main(["--out", str(tmp_path / "budget.csv")])
    assert (tmp_path / "budget.csv").read_text() == "before"
