"""experiments/ablation.py against loops over pairs, exact fractions, and replayed episodes."""

import csv
import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import ablation
from support import envs
from support.networks import Actor


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def codec_of(storage: str) -> ablation.Codec:
    return ablation.STORAGES[storage][0]


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
    """Arrays as `states` writes them, in which rounding makes many states equal."""
    rng = np.random.default_rng(seed)
    return {
        "obs": rng.normal(scale=[0.4, 0.7, 0, 0.2], size=(n, 4)),
        "action": rng.integers(2, size=(n, 1)).astype(np.float32),
        "reward": rng.normal(size=n).astype(np.float32),
        "next_obs": rng.normal(scale=[1, 20, 0, 0.2], size=(n, 4)),
        "terminated": rng.random(n) < 0.1,
        "first": rng.random(n) < 0.3,
        "visited": rng.normal(scale=[1, 20, 0, 9], size=(n, 4)),
    }


def repeats(rows: list[tuple]) -> list[bool]:
    """Which rows are equal to another one; every pair compared."""
    pairs = ((i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j)
    found = {i for i, j in pairs if all(a == b for a, b in zip(rows[i], rows[j], strict=True))}
    return [i in found for i in range(len(rows))]


def pooled(values: list[float], keys: list) -> float:
    """Variance within equal keys over the variance of all, with loops."""
    squares, freedom = 0.0, 0
    for key in set(keys):
        inside = [v for v, k in zip(values, keys, strict=True) if k == key]
        squares += sum((v - sum(inside) / len(inside)) ** 2 for v in inside)
        freedom += len(inside) - 1
    mean = sum(values) / len(values)
    return squares / freedom / (sum((v - mean) ** 2 for v in values) / (len(values) - 1))


# ---- groups and spreads ----


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


@pytest.mark.parametrize("seed", range(5))
def test_spread_matches_loops(seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(12, size=(40, 1)).astype(np.float32)
    values = (rng.normal(1e6, [1, 0, 100], (40, 3)) + keys * [0.1, 0, 9]).astype(np.float32)
    varying = values.T[[0, 2]].tolist()
    expected = [pooled(column, [*keys[:, 0]]) for column in varying]
    assert ablation.spread(values, *ablation.group(keys)) == pytest.approx(
        math.sqrt(sum(expected) / 2)
    )


def test_limits_of_the_spread():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(1000), 2)
    sizes = np.full(1000, 2)
    own, noise = rng.normal(size=(1000, 2)), rng.normal(size=(2000, 2))
    assert ablation.spread(own[groups], groups, sizes) == 0
    assert ablation.spread(noise, groups, sizes) == pytest.approx(1, abs=0.05)
    assert ablation.spread(own[groups] + noise, groups, sizes) == pytest.approx(0.5**0.5, abs=0.05)
    assert math.isnan(ablation.spread(noise, np.arange(2000), np.ones(2000, int)))  # none collide
    assert math.isnan(ablation.spread(np.ones((2000, 1)), groups, sizes))  # nothing varies


# ---- rounding ----


@pytest.mark.parametrize("m", range(4))
def test_rounding_errors_match_exact_fractions(m):
    obs = some_states(m)["visited"]
    obs[3, 1], obs[5, 1] = 200.25, -127.0  # one value beyond the bound, one on it
    row = ablation.rounding(codec_of(f"m={m}"), obs)
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
    row = ablation.rounding(codec_of(name), obs)
    assert row["worst"] == pytest.approx(4 * step / 2, rel=0.02)
    assert row["rms"] == pytest.approx(step * math.sqrt((1 + 16) / 2 / 12), rel=0.02)
    assert row["clamped"] == 0


def test_float64_errs_by_what_float32_cannot_show():
    obs = np.array([[0.1, 0.5]])
    expected = abs(float(np.float32(0.1)) - 0.1)
    for name in ("float64", "float32"):
        row = ablation.rounding(codec_of(name), np.vstack([obs, -obs]))
        assert row["worst"] == expected > 0


def test_bytes_are_those_of_a_stored_row():
    names = ["float64", "float8_e4m3fn", *(f"m={m}{p}" for p in ("", " packed") for m in range(4))]
    obs = np.linspace(0, [1] * 17, 2)
    rows = [ablation.rounding(codec_of(name), obs) for name in names]
    assert [row["bytes"] for row in rows] == [136, 17, 17, 34, 34, 68, 18, 26, 32, 40]
    assert [row["bits"] for row in rows] == [64, 8, 8, 16, 16, 32, 8, 12, 15, 18]


def test_what_is_restored_went_through_the_stored_row(monkeypatch):
    codec = codec_of("m=2 packed")
    zeros = torch.zeros(4, codec.row(5)[0], dtype=torch.int16)
    monkeypatch.setattr(codec, "pack", lambda codes: zeros)
    restored = ablation.restore(codec, np.ones((4, 5)))
    assert restored.shape == (4, 5) and restored.dtype == np.float32 and not restored.any()


# ---- collisions ----


@pytest.mark.parametrize("name", ["float64", "float8_e4m3fn", "m=0", "m=1", "m=2"])
@pytest.mark.parametrize("seed", range(3))
def test_collisions_match_a_comparison_of_every_pair(name, seed, monkeypatch):
    monkeypatch.setattr(ablation, "PPO_ROLLOUT", 20)
    arrays = some_states(seed)
    codec = codec_of(name)
    s_q = [tuple(row) for row in codec.decode(codec.encode(arrays["obs"])).tolist()]
    colliding = repeats(s_q)
    windows = [(i // 20, *row) for i, row in enumerate(s_q)]
    actions = [(*row, float(a)) for row, (a,) in zip(s_q, arrays["action"], strict=True)]
    row = ablation.collisions(codec_of(name), arrays)
    assert (row["states"], row["distinct"]) == (60, len(set(s_q)))
    assert row["colliding"] == sum(colliding) / 60
    assert row["colliding_rollout"] == sum(repeats(windows)) / 60
    assert row["colliding_action"] == sum(repeats(actions)) / 60
    assert row["colliding_action"] <= row["colliding"] >= row["colliding_rollout"]
    if not any(colliding):
        assert name != "m=0"
        spreads = ("colliding_first", "spread_obs", "spread_reward", "spread_next")
        assert all(math.isnan(row[column]) for column in spreads)
        return
    firsts = [first for first, hit in zip(arrays["first"], colliding, strict=True) if hit]
    assert row["colliding_first"] == sum(firsts) / len(firsts)
    assert row["spread_reward"] ** 2 == pytest.approx(pooled(arrays["reward"].tolist(), s_q))
    for column, array in (("spread_obs", "obs"), ("spread_next", "next_obs")):
        each = [pooled(arrays[array][:, i].tolist(), s_q) for i in (0, 1, 3)]
        assert row[column] ** 2 == pytest.approx(sum(each) / 3)


# ---- states ----


@pytest.fixture(scope="module")
def walker(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("states")
    main("states", "--env", "Walker2d-v3", "--steps", 200, "--visits", 150, "--out", out)
    return out


def test_replaying_the_stored_actions_gives_the_stored_states(walker):
    """So obs, action, reward, next_obs belong together, in order, across the ends of episodes."""
    arrays = ablation.load(walker / "Walker2d-v3.npz")
    env = envs.make_vector("Walker2d-v3", 1)
    obs, first = env.reset(seed=1)[0], True
    for i in range(200):
        assert (arrays["obs"][i] == obs[0]).all() and arrays["first"][i] == first
        action = -1 + (arrays["action"][i : i + 1] + 1) / 2 * 2  # sac.py's float32 roundings
        obs, reward, terminated, truncated, _ = env.step(action)
        assert (arrays["next_obs"][i] == obs[0]).all()
        assert arrays["reward"][i] == np.float32(reward[0])
        assert arrays["terminated"][i] == terminated[0]
        first = (terminated | truncated)[0]
        if first:
            obs, _ = env.reset(options={"reset_mask": terminated | truncated})
    assert arrays["first"].sum() > 3 and len(arrays["obs"]) == 200
    assert arrays["obs"].dtype == arrays["next_obs"].dtype == np.float64


def test_the_run_is_kept_beside_its_states_and_is_the_plain_float64_one(walker):
    (path,) = walker.glob("*/result.json")
    assert path.parent.name == "Walker2d-v3__sac__seed-1"
    result = json.loads(path.read_text())
    assert (result["storage"], result["global_step"]) == ("float64", 200)


class Constant:
    """An actor with one mean and log_std for everything, which remembers what it saw."""

    def __init__(self, mean: float, log_std: float):
        self.out, self.saw = (torch.tensor([[mean]]), torch.tensor([[log_std]])), []

    def __call__(self, obs):
        assert obs.dtype == torch.float32
        self.saw.append(obs[0].numpy())
        return self.out


def test_visited_is_what_the_policy_acts_on():
    actor = Constant(math.atanh(0.5), log_std=-20)  # in [-1, 1]; the noise is below float32's step
    visited = ablation.visit(actor, "Pendulum-v1", 450, seed=3)
    assert visited.dtype == np.float64 and (visited == np.array(actor.saw)).all()
    half = torch.tensor([math.atanh(0.5)]).tanh().numpy()
    assert half == pytest.approx(0.5)
    env = envs.make("Pendulum-v1")
    obs, _ = env.reset(seed=3)
    for i, row in enumerate(visited):
        assert (row == obs).all()
        obs, *_ = env.step(-2 + (half + 1) / 2 * 4)  # 1, half of the torque's bound of 2
        if i in (199, 399):
            obs, _ = env.reset()


def test_visiting_again_visits_the_same():
    actor = Actor(3, 1, 8)
    first, again = (ablation.visit(actor, "Pendulum-v1", 30, seed=3) for _ in range(2))
    assert (first == again).all() and len(np.unique(first, axis=0)) == 30


def test_visits_start_as_told_and_hold_whole_episodes(walker):
    visited = ablation.load(walker / "Walker2d-v3.npz")["visited"]
    assert visited.shape == (150, 17)
    start, _ = envs.make("Walker2d-v3").reset(seed=20_001)
    assert (visited[0] == start).all()
    # Walker2d starts with every speed within 0.005 of 0: once per episode, and no episode is short.
    starts = (np.abs(visited[:, 8:]) <= 0.005).all(axis=1)
    assert 1 < starts.sum() < 50


# ---- errors ----


def test_errors_csv(tmp_path):
    (tmp_path / "states").mkdir()
    for seed, task in enumerate(("B-v0", "A-v0")):
        arrays = some_states(seed)
        arrays["visited"][0] = 1e3  # beyond the bounds of fixed point and of float8
        np.savez(tmp_path / "states" / f"{task}.npz", **arrays)
    main("errors", "--states", tmp_path / "states", "--out", tmp_path)
    rows = read(tmp_path / "errors.csv")
    assert list(rows[0]) == ablation.ERRORS
    expected = [(task, name) for task in ("A-v0", "B-v0") for name in ablation.STORAGES]
    assert [(row["task"], row["storage"]) for row in rows] == expected
    for row in rows[: len(ablation.STORAGES)]:
        codec = codec_of(row["storage"])
        again = ablation.rounding(codec, arrays["visited"]) | ablation.collisions(codec, arrays)
        for column, value in again.items():
            shown = float(row[column]) if row[column] else math.nan
            assert shown == pytest.approx(float(value), rel=1e-5, nan_ok=True)
    assert float(rows[0]["clamped"]) == 0
    assert float(rows[-1]["clamped"]) == pytest.approx(4 / 240, rel=1e-5)  # of the visited alone


def test_states_to_table(walker, tmp_path, capsys):
    main("errors", "--states", walker, "--out", tmp_path)
    capsys.readouterr()
    main("table", "--results", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| Walker2d-v3 | bits | bytes | RMS error |")
    (line,) = [line for line in lines if line.startswith("| m=2 packed |")]
    assert line.split(" | ")[1:3] == ["15", "32"]


# ---- speed ----


def test_speed_csv_and_the_order_of_its_rounds(tmp_path, monkeypatch):
    asked = []

    def fake(env_id, *settings):
        asked.append(settings)
        about = {"threads": 5, "versions": {"torch": "2.13.0"}, "machine": env_id}
        return {"ms_per_step": len(asked)} | about

    monkeypatch.setattr(ablation, "train", fake)
    names = [*ablation.STORAGES]
    options = ["--rounds", 3, "--steps", 7, "--cores", 5]
    main("speed", "--env", "A-v0", "B-v0", *options, "--out", tmp_path)
    rows = read(tmp_path / "speed.csv")
    assert list(rows[0]) == ablation.SPEED
    expected = [
        (str(number), task, name)
        for number in (1, 2, 3)
        for task in ("A-v0", "B-v0")
        for name in names[number - 1 :] + names[: number - 1]
    ]
    assert [(row["round"], row["task"], row["storage"]) for row in rows] == expected
    assert [float(row["ms_per_step"]) for row in rows] == [*range(1, len(rows) + 1)]
    for row, settings in zip(rows, asked, strict=True):
        assert settings == (7, ablation.STORAGES[row["storage"]][1], 5)
        assert row["machine"] == row["task"]


@pytest.mark.parametrize("storage", ["float16", "m=2 packed"])
def test_flags_are_those_of_the_codec(storage):
    codec, flags = ablation.STORAGES[storage]
    result = ablation.train("Pendulum-v1", 60, flags, cores=1)
    assert (result["global_step"], result["threads"]) == (60, 1)
    assert result["storage"] == codec.name and result["ms_per_step"] > 0


def test_a_training_that_fails_is_one_line(tmp_path, capsys):
    line = fails(capsys, "speed", "--env", "Pendulum-v9", "--out", tmp_path)
    assert "Pendulum-v9" in line and "Traceback" not in line


# ---- table ----


def table(capsys, results: Path) -> list[list[str]]:
    capsys.readouterr()
    main("table", "--results", results)
    lines = capsys.readouterr().out.splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in rows if set(row) != {"---"}]


def test_speed_is_the_median_and_the_median_ratio(tmp_path, capsys):
    times = {"float64": [4, 1, 2], "m=2": [4, 3, 4], "m=1": [1, 2]}
    rows = [
        dict.fromkeys(ablation.SPEED, "")
        | {"round": i, "task": "A-v3", "storage": name, "ms_per_step": ms}
        for name, each in times.items()
        for i, ms in enumerate(each)
    ]
    ablation.write(tmp_path / "speed.csv", ablation.SPEED, rows)
    assert table(capsys, tmp_path) == [
        ["A-v3", "ms/step"],
        ["float64", "2.00 (1.00x)"],
        ["m=2", "4.00 (2.00x)"],
        ["m=1", "1.50 (1.12x)"],  # of two rounds: 1/4 and 2/1
    ]


def test_a_row_of_errors_beside_its_speed(tmp_path, capsys):
    values = dict.fromkeys(ablation.ERRORS, 0.0) | {"rms": 0.00291, "colliding": 0.00482}
    values |= {"task": "A-v3", "storage": "m=2", "bits": 16, "bytes": 34, "spread_obs": math.nan}
    ablation.write(tmp_path / "errors.csv", ablation.ERRORS, [values])
    timed = dict.fromkeys(ablation.SPEED, 1) | {"task": "A-v3", "storage": "m=2"}
    ablation.write(tmp_path / "speed.csv", ablation.SPEED, [timed])
    head, row = table(capsys, tmp_path)
    cells = dict(zip(head, row, strict=True))
    expected = {"A-v3": "m=2", "bits": "16", "bytes": "34", "RMS error": "2.9e-03"}
    expected |= {"colliding": "0.482%", "spread of s": "-", "ms/step": "1.00"}
    assert cells.items() >= expected.items()


# ---- bad input ----


def test_bad_states(tmp_path, capsys):
    assert f"no .npz file in {tmp_path}" in fails(capsys, "errors", "--states", tmp_path)
    arrays = some_states(0)
    del arrays["next_obs"]
    np.savez(path := tmp_path / "A-v0.npz", **arrays)
    assert "next_obs" in (line := fails(capsys, "errors", "--states", tmp_path))
    assert line.startswith(f"ablation.py: error: {path} is not what `states` wrote: ")
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"not an archive"):
        path.write_bytes(part)
        line = fails(capsys, "errors", "--states", tmp_path, "--out", tmp_path / "out")
        assert line.startswith("ablation.py: error: ")
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused_before_anything_is_trained(tmp_path, capsys):
    options = ["--steps", 20, "--visits", 20, "--out", tmp_path / "out"]
    line = fails(capsys, "states", "--env", "Pendulum-v1", "Ant-v33", *options)
    assert "Ant-v33" in line and "Ant-v3" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [["states", "--steps", "0"], ["speed", "--rounds", "-1"], ["speed", "--cores", "x"]]
)
def test_numbers_below_1(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(*argv)
    assert exit_info.value.code == 2
    assert f"argument {argv[1]}: invalid positive value: '{argv[2]}'" in capsys.readouterr().err


def test_bad_csvs(tmp_path, capsys):
    assert "no CSV file in" in fails(capsys, "table", "--results", tmp_path)

    (tmp_path / "errors.csv").write_text("a,b\n1,2\n")
    assert "has other columns" in fails(capsys, "table", "--results", tmp_path)
