"""experiments/ablation.py against loops over pairs, exact fractions, and a replayed run."""

import csv
import math
import shutil
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import ablation
import ppo
import sac
from support import envs


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main(*argv: object) -> None:
    ablation.main([*map(str, argv)])


def fails(capsys, *argv: object) -> str:
    """The one line that a command with bad input leaves on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        main(*argv)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def some_states(seed: int, n: int = 60) -> dict[str, np.ndarray]:
    """Arrays as `stored` returns them, in which rounding makes many states equal."""
    rng = np.random.default_rng(seed)
    return {
        "obs": rng.normal(scale=[0.4, 0.7, 0, 0.2], size=(n, 4)),
        "action": rng.integers(2, size=(n, 1)).astype(np.float32),
        "reward": rng.integers(2, size=n).astype(np.float32),
    }


def repeats(rows: list[tuple]) -> list[bool]:
    """Which rows are equal to another one; every pair compared."""
    pairs = ((i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j)
    found = {i for i, j in pairs if all(a == b for a, b in zip(rows[i], rows[j], strict=True))}
    return [i in found for i in range(len(rows))]


# ---- groups ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 4, 50])
def test_groups_match_a_comparison_of_every_pair(seed, levels):
    rows = np.random.default_rng(seed).integers(-levels, levels, (70, 2)).astype(np.float32)
    rows[rows == 0] *= np.float32(-1) ** np.arange((rows == 0).sum())  # half of them -0.0
    groups, sizes = ablation.group(rows)
    for i, j in combinations(range(len(rows)), 2):
        assert (groups[i] == groups[j]) == (rows[i] == rows[j]).all()
    assert (np.bincount(groups) == sizes).all() and sizes.sum() == len(rows)
    assert (sizes[groups] > 1).tolist() == repeats([*map(tuple, rows)])


# ---- rounding ----


@pytest.mark.parametrize("m", range(4))
def test_rounding_errors_match_exact_fractions(m):
    obs = np.random.default_rng(m).normal(scale=[1, 20, 0, 9], size=(60, 4))
    obs[3, 1], obs[5, 1] = 200.25, -127.0  # one value beyond the bound, one on it
    row = ablation.rounding(ablation.STORAGES[f"m={m}"], obs)
    exact = [[round(Fraction(min(max(s, -127.0), 127.0)), m) for s in line] for line in obs]
    errors = [
        [Fraction(float(np.float32(float(q)))) - Fraction(s) for q, s in zip(*lines, strict=True)]
        for lines in zip(exact, obs, strict=True)
    ]
    size, flat = obs.size, [abs(e) for line in errors for e in line]
    assert row["rms"] == pytest.approx(math.sqrt(sum(e * e for e in flat) / size))
    assert row["worst"] == pytest.approx(float(max(flat))) == pytest.approx(73.25)
    assert row["clamped"] == 1 / size and row["max_abs"] == 200.25
    relative = [
        math.sqrt(sum(line[column] ** 2 for line in errors) / len(obs)) / np.std(obs[:, column])
        for column in (0, 1, 3)  # 2 is constant
    ]
    assert row["relative"] == pytest.approx(sorted(relative)[1])
    assert row["relative_worst"] == pytest.approx(max(relative))


@pytest.mark.parametrize(
    ("name", "step"), [("float16", 2**-10), ("bfloat16", 2**-7), ("float8_e4m3fn", 2**-3)]
)
def test_floats_err_by_half_a_step_at_most(name, step):
    obs = np.linspace(1, 2, 4001)[:-1, None] * [1, 4]  # steps of 2^-k and 4 * 2^-k
    row = ablation.rounding(ablation.STORAGES[name], obs)
    assert row["worst"] == pytest.approx(4 * step / 2, rel=0.02)
    assert row["rms"] == pytest.approx(step * math.sqrt((1 + 16) / 2 / 12), rel=0.02)
    assert row["clamped"] == 0


def test_float64_errs_by_what_float32_cannot_show():
    obs = np.array([[0.1, 0.5]])
    expected = abs(float(np.float32(0.1)) - 0.1)
    for name in ("float64", "float32"):
        row = ablation.rounding(ablation.STORAGES[name], np.vstack([obs, -obs]))
        assert row["worst"] == expected > 0


def test_bytes_are_those_of_a_stored_row():
    names = ["float64", "float8_e4m3fn", *(f"m={m}{p}" for p in ("", " packed") for m in range(4))]
    obs = np.linspace(0, [1] * 17, 2)
    rows = [ablation.rounding(ablation.STORAGES[name], obs) for name in names]
    assert [row["bytes"] for row in rows] == [136, 17, 17, 34, 34, 68, 18, 26, 32, 40]
    assert [row["bits"] for row in rows] == [64, 8, 8, 16, 16, 32, 8, 12, 15, 18]


def test_what_is_restored_went_through_the_stored_row(monkeypatch):
    codec = ablation.STORAGES["m=2 packed"]
    zeros = torch.zeros(4, codec.row(5)[0], dtype=torch.int16)
    monkeypatch.setattr(codec, "pack", lambda codes: zeros)
    restored = ablation.restore(codec, np.ones((4, 5)))
    assert restored.shape == (4, 5) and restored.dtype == np.float32 and not restored.any()


# ---- collisions ----


@pytest.mark.parametrize("name", ["float64", "float8_e4m3fn", "m=0", "m=1", "m=2"])
@pytest.mark.parametrize("seed", range(3))
def test_collisions_match_a_comparison_of_every_pair(name, seed):
    arrays, codec = some_states(seed), ablation.STORAGES[name]
    s_q = [tuple(row) for row in codec.decode(codec.encode(arrays["obs"])).tolist()]
    pairs = [(*row, float(a)) for row, (a,) in zip(s_q, arrays["action"], strict=True)]
    tuples = list(zip(pairs, arrays["reward"].tolist(), strict=True))
    conflicts = [any(p == q and r != other for q, other in tuples) for p, r in tuples]
    row = ablation.collisions(codec, arrays)
    assert (row["states"], row["distinct"]) == (60, len(set(s_q)))
    assert row["colliding"] == sum(repeats(s_q)) / 60
    assert row["conflicting"] == sum(conflicts) / 60
    assert 0 < row["conflicting"] < row["colliding"] or name != "m=0"


# ---- what runs have stored ----


@pytest.fixture(scope="module")
def walkers(tmp_path_factory) -> dict[str, Path]:
    """Folders of short runs, by their flags."""
    found = {}
    for flags in (
        "",
        "--quant-m 1",
        "--quant-m 1 --pack --drop-constant",
        "--buffer-size 256",
        "--buffer-size 500",
    ):
        folder = tmp_path_factory.mktemp("run")
        args = ["--env", "Walker2d-v3", "--total-timesteps", "400", "--checkpoint-every", "400"]
        args += ["--hidden", "8", "--eval-episodes", "0", "--run-dir", str(folder), *flags.split()]
        sac.main(tyro.cli(sac.Args, args=args))
        (found[flags],) = folder.iterdir()
    return found


def test_replaying_the_stored_actions_gives_the_stored_states(walkers):
    """So obs, action and reward belong together, in order, across the ends of episodes."""
    settings, codec, arrays = ablation.stored(walkers[""])
    assert (settings["env"], settings["seed"], codec.name) == ("Walker2d-v3", 1, "float64")
    env, ends = envs.VectorEnv("Walker2d-v3", 1), 0
    obs, _ = env.reset(seed=1)
    for i in range(400):
        assert (arrays["obs"][i] == obs[0]).all()
        action = -1 + (arrays["action"][i : i + 1] + 1) / 2 * 2  # sac.py's float32 roundings
        obs, reward, terminated, truncated, _ = env.step(action)
        assert arrays["reward"][i] == np.float32(reward[0])
        if (done := terminated | truncated).any():
            obs, _ = env.reset(options={"reset_mask": done})
            ends += 1
    assert ends > 3 and len(arrays["obs"]) == 400 and arrays["obs"].dtype == np.float64


def test_what_a_rounded_run_stored_is_rounded(walkers):
    _, codec, plain = ablation.stored(walkers["--quant-m 1"])
    _, packed, other = ablation.stored(walkers["--quant-m 1 --pack --drop-constant"])
    assert (codec.bits_per_value, packed.bits_per_value) == (16, 12)
    assert all((plain[name] == other[name]).all() for name in plain)
    obs = plain["obs"]
    assert len(obs) == 400 and (np.round(obs * 10).astype(np.float32) / 10 == obs).all()
    first, _ = envs.VectorEnv("Walker2d-v3", 1).reset(seed=1)
    assert obs[0] == pytest.approx(first[0], abs=0.0501)


# ---- errors ----


def table(capsys, results: Path) -> list[list[str]]:
    capsys.readouterr()
    main("table", "--results", results)
    lines = capsys.readouterr().out.splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in rows if set("".join(row)) != {"-"}]


def test_errors_to_table(walkers, tmp_path, capsys):
    runs = [walkers[flags] for flags in ("", "--quant-m 1", "--quant-m 1 --pack --drop-constant")]
    main("errors", *runs, "--out", tmp_path)
    rows = read(tmp_path / "errors.csv")
    assert list(rows[0]) == ablation.ERRORS
    methods = ["float64"] * len(ablation.STORAGES) + ["m=1", "m=1, packed"]
    assert [row["method"] for row in rows] == methods
    assert [row["storage"] for row in rows] == [*ablation.STORAGES, "m=1", "m=1, packed"]
    for run, part in zip(runs, (rows[:-2], rows[-2:-1], rows[-1:]), strict=True):
        _, own, arrays = ablation.stored(run)
        for row in part:
            float64 = run == runs[0]
            codec = ablation.STORAGES[row["storage"]] if float64 else own
            again = ablation.collisions(codec, arrays)
            again |= ablation.rounding(codec, arrays["obs"][-40:]) if float64 else {"rms": None}
            for column, value in again.items():
                shown = float(row[column]) if row[column] else None
                assert shown == (value if value is None else pytest.approx(float(value), rel=1e-5))
    head, *lines = table(capsys, tmp_path)
    assert head[:4] == ["Walker2d-v3, seed 1", "bits", "bytes", "RMS error"]
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["m=2 packed"][:2] == ["15", "32"]
    assert by_name["trained with m=1"][:3] == ["-", "-", "-"]


# ---- table ----


def test_a_table_for_every_run_and_a_line_for_every_row(tmp_path, capsys):
    values = dict.fromkeys(ablation.ERRORS, 0.0) | {"rms": 0.00291, "colliding": 0.00482}
    values |= {"task": "A-v3", "method": "float64", "seed": 2, "storage": "m=2", "bits": 16}
    values |= {"bytes": 34, "relative": math.nan}
    trained = values | {"method": "m=1", "storage": "m=1", "rms": None}
    rows = [values, trained, values | {"seed": 3}, trained]
    ablation.write_csv(tmp_path / "errors.csv", ablation.ERRORS, rows)
    head, row, *others = table(capsys, tmp_path)
    cells = dict(zip(head, row, strict=True))
    expected = {"A-v3, seed 2": "m=2", "bits": "16", "bytes": "34", "RMS error": "2.9e-03"}
    expected |= {"colliding": "0.482%", "error / std": "-"}
    assert cells.items() >= expected.items()
    firsts = ["trained with m=1", "trained with m=1", "A-v3, seed 3", "m=2"]
    assert [line[0] for line in others] == firsts


# ---- bad input ----


def test_runs_without_all_their_transitions_are_refused(walkers, tmp_path, capsys):
    def refused(run: Path) -> str:
        line = fails(capsys, "errors", run, "--out", tmp_path / "out")
        assert line.startswith("ablation.py: error: ") and str(run) in line
        return line

    def left(script, **changes) -> Path:
        small = {"env": "Pendulum-v1", "run_dir": str(tmp_path), "run_name": "run", "hidden": 8}
        small |= {"total_timesteps": 120, "checkpoint_every": 120, "eval_episodes": 0}
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        script.main(script.Args(**small | changes))
        return tmp_path / "run"

    overwritten = "has overwritten what it stored first"
    assert overwritten in refused(walkers["--buffer-size 256"])
    assert overwritten in refused(
        left(sac, total_timesteps=3000, memory_budget="30KB", batch_size=9)
    )
    assert "No such file" in refused(tmp_path)
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes((walkers[""] / "checkpoint.pt").read_bytes()[:-1])
    assert "damaged" in refused(tmp_path)
    ppo_run = left(ppo, n_steps=60, batch_size=20, n_epochs=1)
    assert "is of ppo.py, which keeps no transitions" in refused(ppo_run)
    assert "has stored 99 transitions; 100 are" in refused(left(sac, total_timesteps=99))
    assert "--num-envs 2" in refused(left(sac, num_envs=2))
    assert "--drop-constant" in refused(left(sac, drop_constant=True))
    assert not (tmp_path / "out").exists()


def test_a_float64_run_with_a_smaller_buffer_has_all_rows(walkers, tmp_path):
    main("errors", walkers["--buffer-size 500"], "--out", tmp_path)
    rows = read(tmp_path / "errors.csv")
    assert [row["storage"] for row in rows] == [*ablation.STORAGES] and rows[0]["rms"]


def test_what_was_done_before_a_bad_run_is_kept(walkers, tmp_path, capsys):
    fails(capsys, "errors", walkers["--quant-m 1"], tmp_path, "--out", tmp_path / "out")
    assert len(read(tmp_path / "out/errors.csv")) == 1


def test_bad_csvs(tmp_path, capsys):
    assert "No such file" in fails(capsys, "table", "--results", tmp_path)

    (tmp_path / "errors.csv").write_text("a,b\n1,2\n")
    assert "has other columns" in fails(capsys, "table", "--results", tmp_path)
