"""experiments/survey.py against naive loops, hand arithmetic, the codecs, and made-up robots."""

import math
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import FixedPoint, Packed
from support import envs

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))
import survey  # noqa: E402
from survey import Args, Column, column_groups, look_at  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


class Robot(gym.Env):
    """Columns uniform in middle +- span; the fourth observation is at the upper ends.

    Episodes take 1, 2, 3, ... steps and end by turns truncated and terminated.
    """

    log: list = []  # noqa: RUF012 - of the latest robot made
    actions: list = []  # noqa: RUF012

    def __init__(self, middles=(3, 0, 0, 0), spans=(0, 0.01, 5000, 30), nan_at=None):
        self.middles, self.spans, self.nan_at = np.array(middles), np.array(spans), nan_at
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (len(spans),), np.float64)
        self.action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([3, 1]))
        self.length = 0
        Robot.log, Robot.actions = [], []

    def observe(self):
        obs = self.middles + self.spans * self.np_random.uniform(-1, 1, len(self.spans))
        if len(self.log) == 3:
            obs[:] = self.middles + self.spans
        if len(self.log) == self.nan_at:
            obs[1] = np.nan
        self.log.append(obs.copy())
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length = self.length + 1
        return self.observe(), {}

    def step(self, action):
        assert self.left > 0, "stepped beyond the end"
        self.left -= 1
        self.actions.append(action)
        terminated, truncated = (self.left == 0 and self.length % 2 == odd for odd in (0, 1))
        return self.observe(), 0.0, terminated, truncated, {}


@pytest.fixture
def robot():
    """Registers a Robot with the given arguments; returns its id."""
    env_id = "Robot-v0"

    def register(**kwargs):
        gym.registry.pop(env_id, None)
        gym.register(env_id, lambda: Robot(**kwargs), disable_env_checker=True)
        return env_id

    yield register
    gym.registry.pop(env_id, None)


def column(std=1.0, rms=(0.0,) * 4, low=-1.0, high=1.0, beyond=0.0):
    return Column(low=low, high=high, beyond=beyond, std=std, rms=list(rms), worst=list(rms))


# --- Collecting ----------------------------------------------------------------------------------


def collect(steps: int, seed: int, env_id: str = "Robot-v0") -> np.ndarray:
    return survey.collect(envs.VectorEnv(env_id, 1), steps, seed)


@pytest.mark.parametrize("steps", [2, 3, 17, 400])
def test_collect_keeps_every_observation_in_order(steps, robot):
    robot()
    seen = collect(steps, seed=5)
    assert seen.dtype == np.float64
    np.testing.assert_array_equal(seen, Robot.log)  # resets and final observations included


def test_collect_is_seeded(robot):
    robot()
    first, again, other = (collect(50, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first[:3, 1:] != other[:3, 1:]).all()
    assert len(np.unique(first[:, 1])) == 50  # episodes differ


def test_actions_are_uniform_and_seeded(robot):
    robot()
    collect(3000, seed=5)
    actions = np.array(Robot.actions)
    assert np.quantile(actions[:, 0], [0, 0.5, 1]) == pytest.approx([-2, 0.5, 3], abs=0.15)
    assert np.quantile(actions[:, 1], [0, 0.25, 1]) == pytest.approx([0, 0.25, 1], abs=0.05)
    collect(3000, seed=5)
    np.testing.assert_array_equal(actions, Robot.actions)


@pytest.mark.parametrize("nan_at", [0, 4])
def test_collect_refuses_nan(nan_at, robot):
    robot(nan_at=nan_at)
    with pytest.raises(envs.EnvironmentFault, match=r"^Robot-v0 returned nan .* columns \[1\]"):
        collect(10, seed=1)
    assert len(Robot.log) == nan_at + 1  # at once


# --- One column ----------------------------------------------------------------------------------


def test_column_by_hand():
    got = look_at(np.array([0.0, 0.25, 0.5, -200.0]), b=100)
    assert (got.low, got.high, got.peak, got.beyond) == (-200, 0.5, 200, 0.25)
    assert got.std == pytest.approx(math.sqrt((0.25**2 + 0.5**2 + 100**2) / 4 - (99.25 / 4) ** 2))
    assert got.worst == pytest.approx([0.5, 0.05, 0, 0])  # ties to even: 0.5 -> 0, 0.25 -> 0.2
    assert got.rms == pytest.approx([math.sqrt((0.25**2 + 0.5**2) / 4), 0.025, 0, 0])


@pytest.mark.parametrize("b", [1, 20.05, 127])
def test_column_is_what_plain_loops_say(b):
    rng = np.random.default_rng(3)
    values = [*rng.normal(2, 100, 500).tolist(), b, -b, np.nextafter(b, 2 * b), 0.0]
    got = look_at(np.array(values), b)
    assert (got.low, got.high) == (min(values), max(values))
    assert got.beyond == sum(abs(v) > b for v in values) / len(values)
    clamped = [min(max(v, -b), b) for v in values]
    mean = sum(clamped) / len(values)
    assert got.std == pytest.approx(math.sqrt(sum((c - mean) ** 2 for c in clamped) / len(values)))
    for m in range(4):
        errors = [abs(round(c * 10**m) / 10**m - c) for c in clamped]
        assert got.worst[m] == pytest.approx(max(errors), abs=1e-12)
        assert got.rms[m] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(values)))
        assert got.fine(m) == (got.rms[m] <= 0.1 * got.std)
        assert got.fine(m, 0.01) == (got.rms[m] <= 0.01 * got.std)


@pytest.mark.parametrize("value", [0.1, 500.0, -500.3, 0.0])
def test_constant_column(value):
    got = look_at(np.full(20_000, value), b=127)
    assert got.low == got.high == value
    assert got.std == 0
    assert got.beyond == (abs(value) > 127)


def test_column_that_the_clamp_makes_constant():
    assert np.full(20_000, 127.3).std() > 0  # rounding in the mean
    got = look_at(np.linspace(200, 300, 20_000), b=127.3)
    assert (got.std, got.beyond) == (0, 1)
    assert got.low < got.high


# --- Groups --------------------------------------------------------------------------------------


V5 = sorted(name for name in gym.registry if name.endswith("-v5"))


@pytest.mark.parametrize("env_id", [*V5, *envs.V3_TASKS])
def test_groups_partition_the_columns(env_id):
    env = envs.make(env_id)
    columns = [look_at(values, 127) for values in collect(20, 1, env_id).T]
    groups = column_groups(env, columns)
    assert all(groups.values())
    indices = list(chain(*groups.values()))
    assert sorted(indices) == list(range(len(columns)))
    assert all(group == sorted(group) for group in groups.values())
    structure = getattr(env.unwrapped, "observation_structure", None)
    if structure:
        named = {name: n for name, n in structure.items() if n and name != "skipped_qpos"}
        assert {name: len(group) for name, group in groups.items()} == named
        assert indices == sorted(indices)
    else:
        assert all(name == "constant" or name.startswith("|s| <= 1") for name in groups)
    env.close()


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "Hopper-v5", "Swimmer-v5", "HalfCheetah-v5"])
def test_groups_hold_what_they_are_named_after(env_id):
    vector = envs.VectorEnv(env_id, 1)
    env, obs = vector.envs[0], survey.collect(vector, 60, seed=1)[-1]
    groups = column_groups(env, [column()] * len(obs))
    assert {"qpos", "qvel"} <= set(groups)
    for name, indices in groups.items():
        source = getattr(env.unwrapped.data, name).ravel()[-len(indices) :]
        np.testing.assert_array_equal(obs[indices], np.clip(source, -1e4, 1e4), err_msg=name)
    env.close()


def test_groups_by_magnitude():
    peaks = [1000.0, 0.01, 1.0, np.nextafter(1, 2), 10.0, 1000.5, -10.5, 1e6]
    columns = [column(low=min(0, peak), high=max(0, peak)) for peak in peaks]
    columns += [column(low=3, high=3), column(low=0, high=0), column(low=-2, high=0.5)]
    assert list(column_groups(Robot(), columns).items()) == [
        ("constant", [8, 9]),
        ("|s| <= 1", [1, 2]),
        ("|s| <= 10", [3, 4, 10]),
        ("|s| <= 100", [6]),
        ("|s| <= 1000", [0]),
        ("|s| <= 10000", [5]),
        ("|s| <= 1e+06", [7]),
    ]


@pytest.mark.parametrize(
    ("structure", "groups"),
    [
        ({"skipped_qpos": 2, "qpos": 1, "none": 0, "qvel": 3}, {"qpos": [0], "qvel": [1, 2, 3]}),
        ({"qvel": 3, "qpos": 1}, {"qvel": [0, 1, 2], "qpos": [3]}),
        ({"skipped_qpos": 1, "qpos": 3}, {"|s| <= 1": [0, 1, 2, 3]}),  # one short
        ({"qpos": 5}, {"|s| <= 1": [0, 1, 2, 3]}),
        ({}, {"|s| <= 1": [0, 1, 2, 3]}),
    ],
)
def test_groups_follow_a_structure_only_if_it_fits(structure, groups):
    env = Robot()
    env.observation_structure = structure.copy()
    assert column_groups(env, [column()] * 4) == groups
    assert env.observation_structure == structure


# --- Storage -------------------------------------------------------------------------------------


BOUNDS = [1, 1.2, 8, 12.7, 12.8, 127, 127.5, 128, 327.67, 327.68, 3276.7, 4000, 32767, 40_000]
BOUNDS += [2_147_483.647, 2_147_483.648, 2**31 - 1, 2**31 - 0.5, 2**31, 10**12, 10**300]


@pytest.mark.filterwarnings("ignore:float32 cannot show")
@pytest.mark.parametrize("n", [1, 17, 376])
@pytest.mark.parametrize("b", BOUNDS)
def test_storage_is_that_of_the_codecs(b, n):
    for m in range(4):
        cells = survey.storage_cells(m, b, n)
        try:
            plain, packed = FixedPoint(m, b), Packed(m, b)
        except ValueError:
            assert [cells[name] for name in ("type", "bytes", "packed")] == ["none", "-", "-"]
            continue
        assert f"torch.{cells['type']}" == str(plain.dtype)
        assert int(cells["codes to"].replace(",", "")) == plain.encode(np.array([b])).item()
        assert int(cells["bits"]) == packed.bits_per_value
        for name, codec in (("bytes", plain), ("packed", packed)):
            width, dtype = codec.row(n)
            assert int(cells[name].replace(",", "")) == width * dtype.itemsize


def test_storage_of_humanoid_by_hand():
    rows = [list(survey.storage_cells(m, 127, 376).values()) for m in range(4)]
    assert rows == [
        ["127", "8", "8", "int8", "376", "376"],
        ["1,270", "12", "12", "int16", "752", "564"],
        ["12,700", "15", "15", "int16", "752", "706"],  # 352.5 words
        ["127,000", "18", "18", "int32", "1,504", "846"],
    ]


# --- Recommending --------------------------------------------------------------------------------


def spread(*fine_from):
    """A column per argument: fine from that m on."""
    return [column(rms=[0.11] * m + [0.1] * (4 - m)) for m in fine_from]


@pytest.mark.parametrize(
    ("columns", "m"),
    [
        (spread(0, 0, 0, 0, 1), 1),  # every column
        (spread(0, 0, 0, 1, 2), 2),
        (spread(0, 0, 0, 0, 3), 2),  # the most that int16 holds, where 80% are fine
        (spread(0, 0, 0, 3, 3), 3),
        (spread(3), 3),
        (spread(3, 3, 3, 3, 4), 3),
        (spread(0, 0, 0, 4, 4), None),
        (spread(1, 1) + [column(std=0, rms=[0.3] * 4)] * 8, 1),  # constants do not count
        ([column(std=0, rms=[0.3] * 4)], 0),
    ],
)
def test_recommended_m(columns, m):
    assert survey.recommend_m(columns, 127) == m


def test_recommended_m_fits_int32():
    assert survey.recommend_m(spread(3), 2_147_483) == 3
    assert survey.recommend_m(spread(3), 2_147_484) is None
    assert survey.recommend_m(spread(2), 2_147_484) == 2


def test_fine_share_counts_what_varies():
    columns = [*spread(0, 1, 2), column(std=0, rms=[0.3] * 4)]
    assert [survey.fine_share(columns, m) for m in range(4)] == [1 / 3, 2 / 3, 1, 1]
    assert [survey.fine_share(columns, m, 0.11) for m in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("peak", "bound"),
    [
        *[(3612.7, 3700), (5000.0, 5000), (np.nextafter(5000, 6000), 5100), (127.2, 130)],
        *[(1.0, 1), (1.5, 2), (9.5, 10), (99.0, 99), (99.5, 100), (991.0, 1000)],
    ],
)
def test_round_up(peak, bound):
    assert survey.round_up(peak) == bound


@given(st.floats(1, 1e300))
def test_rounded_bound_holds_and_is_near(peak):
    bound = survey.round_up(peak)
    assert bound >= peak
    assert len(str(bound).rstrip("0")) <= 2
    assert bound <= max(math.ceil(peak), 1.1 * peak)


# --- Printing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([*range(22), 45], "0-21, 45"),
        ([7], "7"),
        ([0, 1, 3, 5, 6], "0-1, 3, 5-6"),
        ([*range(0, 40, 2)], "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ..."),
    ],
)
def test_ranges(indices, text):
    assert survey.ranges(indices) == text
    assert len(text) <= 40


def test_percent_never_hides_a_few():
    assert [survey.percent(p) for p in (0, 1e-7, 0.00189, 1)] == ["0%", "1e-05%", "0.189%", "100%"]


def show(capsys, **args):
    survey.main(Args(**args))
    return capsys.readouterr().out


def commands(out):
    """(m, b) of each printed command."""
    found = re.findall(r"^python sac.py --env \S+ --quant-m (\d) --quant-b (\S+) ", out, re.M)
    return [(int(m), float(b)) for m, b in found]


def test_robot_with_a_column_that_reaches_5000(robot, capsys):
    out = show(capsys, env=robot(), steps=2000)
    seen = np.array(Robot.log)
    shares = np.mean(np.abs(seen) > 127, axis=0)
    assert f"b: {100 * shares.mean():.3g}% of the values lie beyond 127:\n" in out
    assert "   |s| <= 10000 reaches 5000, in 1 of 1 columns, 2\n" in out
    row = r"^(?:constant|\|s\| <= \d+) +(\d) +1 +([01]) +(\S+) +(\S+) +(\S+)$"
    spans = re.findall(row, out, re.M)
    assert [(i, constant) for i, constant, *_ in spans] == [*zip("0132", "1000", strict=True)]
    for i, _, *numbers in spans:
        low, high = seen[:, int(i)].min(), seen[:, int(i)].max()
        assert numbers == [f"{low:.5g}", f"{high:.5g}", f"{100 * shares[int(i)]:.3g}%"]
    # The column within 0.01 has a deviation of 0.0058 and needs an error of 0.00029: m = 3.
    assert "m = 3: 100% of the varying columns are fine, as all" in out
    assert "Recommended: 5000 holds it all and still takes int32" in out
    assert commands(out) == [(3, 5000), (3, 127)]
    assert np.abs(seen).max() == 5000


def test_errors_of_the_groups(robot, capsys):
    out = show(capsys, env=robot(middles=[0] * 3, spans=[0.4, 0.2, 50]), steps=300)
    seen = np.array(Robot.log)
    table = out.split("standard deviation.\n\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [row[:11].strip() for row in table] == ["|s| <= 1", "|s| <= 100"]
    for row, group in zip(table, ([0, 1], [2]), strict=True):
        cells = row[11:].split()
        for m in range(4):
            errors = np.abs(np.round(seen[:, group], m) - seen[:, group])
            fine = np.sqrt((errors**2).mean(0)) <= 0.1 * seen[:, group].std(0)
            expected = [f"{np.sqrt((errors**2).mean()):.2g}", f"{errors.max():.2g}"]
            assert cells[3 * m : 3 * m + 3] == [*expected, f"{100 * fine.mean():.3g}%"]


def test_wider_type_is_the_readers_choice(robot, capsys):
    out = show(capsys, env=robot(middles=[0] * 3, spans=[1, 4999.5, 30]), steps=200)
    assert "Choose: 5000 holds it all in int32; 127 clamps it in int16" in out
    assert "m was judged under 127: before taking 5000, look again with --quant-b 5000" in out
    assert commands(out) == [(1, 5000), (1, 127)]
    rows = [line.split()[8:] for line in out.splitlines() if line.startswith("python")]
    assert rows[0] == ["0%", "50,000", "18", "17", "int32", "12", "8"]
    assert rows[1][1:] == ["1,270", "12", "12", "int16", "6", "6"]
    assert "Not fine at m = 1" not in out


def test_same_type_is_recommended(robot, capsys):
    out = show(capsys, env=robot(middles=[0] * 2, spans=[1, 140]), steps=200)
    assert "Recommended: 140 holds it all and still takes int16" in out
    assert commands(out) == [(1, 140), (1, 127)]


def test_beyond_int32_only_clamping_is_left(robot, capsys):
    out = show(capsys, env=robot(middles=[0] * 2, spans=[0.01, 5e6]), steps=200)
    assert "Not even int32 holds it all at m = 3" in out
    assert commands(out) == [(3, 127)]
    out = show(capsys, env=robot(middles=[0] * 2, spans=[0.01, 3e38]), steps=20)
    assert "|s| <= 1e+39 reaches 3e+38" in out
    assert commands(out) == [(3, 127)]


def test_within_the_bound_it_stays(robot, capsys):
    out = show(capsys, env=robot(middles=[0] * 2, spans=[1, 140]), steps=200, quant_b=140.0)
    assert "b = 140: nothing seen lies beyond; the largest |s| is 140.\n" in out
    assert commands(out) == [(1, 140)]


def test_bound_of_many_digits_is_not_shortened(robot, capsys):
    out = show(capsys, env=robot(), steps=20, quant_b=1_234_567.5)
    assert {b for _, b in commands(out)} == {1_234_567.5}


def test_column_that_spans_too_little(robot, capsys):
    out = show(capsys, env=robot(middles=[1.5, 2], spans=[1e-4, 3]), steps=200)
    assert "m: there is none up to 3 within int32 at which 80%" in out
    assert "Not fine at m = 3: 1 of 2, 0\n" in out
    assert commands(out) == [(3, 127)]


def test_nothing_varies(robot, capsys):
    out = show(capsys, env=robot(middles=[0.3, 2], spans=[0, 0]), steps=5)
    assert commands(out) == [(0, 127)]
    assert re.search(r"^constant +0-1 +2 +2 +0.3 +2 +0%$", out, re.M)
    assert "nan" not in out
    assert "Not fine" not in out


def test_what_the_clamp_makes_constant_is_not_called_constant(robot, capsys):
    out = show(capsys, env=robot(middles=[-5000], spans=[1]), steps=50)
    assert re.search(r"^\|s\| <= 10000 +0 +1 +0 +-5000\.\d +-4999 +100%$", out, re.M)
    assert "|s| <= 10000 reaches 5000." in out


def test_no_negative_zero(capsys):
    survey.print_groups({"zeros": [0]}, [look_at(np.full(3, -0.0), 127)], 127)
    assert "-0" not in capsys.readouterr().out


def test_storage_table_lets_the_reader_judge(capsys):
    columns = [column(rms=[rms] * 4) for rms in (0.1, 0.05, 0.05, 0.01)]
    survey.print_storage([*columns, column(std=0, rms=[1] * 4)], 127.0)
    out = capsys.readouterr().out
    assert re.findall(r"(\S+) +(\S+) +(\S+)$", out, re.M)[-4:] == [("100%", "75%", "25%")] * 4
    assert "an observation of 5 values; in float64 it takes 40 bytes" in out


@pytest.mark.parametrize(("b", "m"), [(2_147_483, 3), (2_147_484, 2)])
def test_advice_stays_within_int32(b, m, capsys):
    assert survey.advise_m(spread(3), b) == m
    assert capsys.readouterr().out.startswith("m = 3: 100%" if m == 3 else "m: there is none")


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "HumanoidStandup-v5", "Humanoid-v3"])
def test_humanoids_in_a_terminal(env_id, capsys):
    out = show(capsys, env=env_id, steps=300)
    assert max(map(len, out.splitlines())) <= 120
    assert out == show(capsys, env=env_id, steps=300)
    beyond = re.search(r"   cfrc_ext reaches (\S+), in \d+ of 78 columns", out)
    assert bool(beyond) == (env_id != "Humanoid-v3")
    if beyond:
        assert float(beyond[1]) > 1000
        assert commands(out)[0][1] >= float(beyond[1])
        assert out.count(" reaches ") == 1


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(env="Humanoid-v33"), "unknown --env 'Humanoid-v33'"),
        (dict(env="CartPole-v1"), "Discrete(2)"),
        (dict(steps=1), "--steps 1 "),
        (dict(steps=-5), "--steps -5 "),
        (dict(steps=10**15), "Unable to allocate"),
        (dict(seed=-1), "--seed -1 "),
        (dict(quant_b=0.5), "--quant-b 0.5 "),
        (dict(quant_b=-127.0), "--quant-b -127 "),
        (dict(quant_b=math.nan), "--quant-b nan "),
        (dict(quant_b=math.inf), "--quant-b inf "),
        (dict(quant_b=1e10), "--quant-b 1e+10 "),
    ],
)
def test_bad_input_is_one_line(bad, said, capsys):
    with pytest.raises(SystemExit) as caught:
        survey.main(Args(**{"env": "Pendulum-v1", **bad}))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("survey.py: error: ")
    assert said in err


def test_the_command(tmp_path):
    """As a user runs it, from a folder that is not the repository."""
    (tmp_path / "odd.py").write_text(
        "import gymnasium, test_survey\n"
        "gymnasium.register('Odd-v0', test_survey.Robot, kwargs=dict(nan_at=4))\n"
    )
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests")))

    def run(*words: str) -> tuple:
        done = subprocess.run(
            [sys.executable, ROOT / "experiments/survey.py", *words],
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--env", "Pendulum-v1", "--steps", "50")
    assert (code, err) == (0, "")
    assert out.startswith("Pendulum-v1: 50 observations under random actions, seed 1\n")
    said = "survey.py: error: odd:Odd-v0 returned nan or inf in observation columns [1] as float32"
    assert run("--env", "odd:Odd-v0", "--steps", "5") == (1, "", said + "\n")
    code, out, _ = run("--help")
    assert code == 0 and "recommend decimals m and bound b" in out
