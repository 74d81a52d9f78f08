"""support/envs.py: the -v3 tasks against v3's published formulas and Gymnasium's v4 classes."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.humanoid_v4 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.utils.env_checker import check_env

from support import envs

TASKS = ["Walker2d-v3", "HalfCheetah-v3", "Ant-v3", "Humanoid-v3"]
ROOT = Path(envs.__file__).parent.parent


class Step(NamedTuple):
    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool


def random_actions(env: gym.Env, steps: int, seed: int = 0) -> np.ndarray:
    low, high = env.action_space.low, env.action_space.high
    shape = (steps, *low.shape)
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def rollout(env: gym.Env, actions: np.ndarray, seed: int = 0) -> Iterator[Step]:
    """The steps of a run over as many episodes as it takes."""
    env.reset(seed=seed)
    for action in actions:
        step = Step(*env.step(action)[:4])
        yield step
        if step.terminated or step.truncated:
            env.reset()


# --- Spaces and observations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "obs_dim", "act_dim", "limit"),
    [
        ("Walker2d-v3", 17, 6, 1.0),
        ("HalfCheetah-v3", 17, 6, 1.0),
        ("Ant-v3", 111, 8, 1.0),
        ("Humanoid-v3", 376, 17, 0.4),
    ],
)
def test_dimensions(env_id, obs_dim, act_dim, limit):
    env = envs.make(env_id)
    obs, _ = env.reset(seed=0)
    assert env.spec.id == env_id
    assert env.observation_space.shape == obs.shape == (obs_dim,)
    assert obs.dtype == np.float64
    bound = np.full(act_dim, limit, np.float32)
    assert env.action_space == Box(-bound, bound)


@pytest.mark.parametrize("env_id", TASKS)
def test_random_actions_stay_within_the_papers_bound(env_id):
    env = envs.make(env_id)
    obs = np.array([step.obs for step in rollout(env, random_actions(env, 3000))])
    assert 1 < np.abs(obs).max() < 128
    if env_id in ("Ant-v3", "Humanoid-v3"):
        assert not obs[:, -84:].any()  # cfrc_ext
        assert obs[:, :-84].any(axis=1).all()


@pytest.mark.parametrize("env_id", TASKS)
def test_same_seed_and_actions_same_steps(env_id):
    def run(seed: int) -> np.ndarray:
        env = envs.make(env_id)
        steps = rollout(env, random_actions(env, 100), seed)
        return np.array([[*obs, reward] for obs, reward, *_ in steps])

    assert np.array_equal(run(seed=1), run(seed=1))
    assert not np.array_equal(run(seed=1), run(seed=2))


@pytest.mark.parametrize(
    ("env_id", "v4", "columns"),
    [
        ("Walker2d-v3", Walker2dEnv, 17),
        ("HalfCheetah-v3", HalfCheetahEnv, 17),
        ("Ant-v3", AntEnv, 27),
        ("Humanoid-v3", HumanoidEnv, 292),
    ],
)
def test_dynamics_are_those_of_v4(env_id, v4, columns):
    """All but the contact forces, which v4 does compute."""
    env, reference = envs.make(env_id), v4()
    actions = random_actions(env, 300)
    contact = 0.0
    for ours, theirs in zip(rollout(env, actions), rollout(reference, actions), strict=True):
        assert np.array_equal(ours.obs[:columns], theirs.obs[:columns])
        assert ours[1:] == theirs[1:]
        assert not env.unwrapped.data.cfrc_ext.any()
        contact = max(contact, np.abs(reference.data.cfrc_ext).max())
    assert contact > 100


# --- Rewards and ends ----------------------------------------------------------------------------


def walker_reward(data, before, action):
    return (data.qpos[0] - before["qpos"][0]) / 0.008 + 1 - 1e-3 * np.sum(action**2)


def cheetah_reward(data, before, action):
    return (data.qpos[0] - before["qpos"][0]) / 0.05 - 0.1 * np.sum(action**2)


def ant_reward(data, before, action):
    torso = 1  # body 0 is the world; v3 reads the body's position, not qpos
    return (data.xpos[torso, 0] - before["xpos"][torso, 0]) / 0.05 + 1 - 0.5 * np.sum(action**2)


def humanoid_reward(data, before, action):
    mass = data.model.body_mass / data.model.body_mass.sum()
    velocity = mass @ (data.xipos[:, 0] - before["xipos"][:, 0]) / 0.015
    return 1.25 * velocity + 5 - 0.1 * np.sum(action**2)


def walker_falls(qpos):
    return not (0.8 < qpos[1] < 2.0 and -1.0 < qpos[2] < 1.0)


def cheetah_falls(qpos):
    return False


def ant_falls(qpos):
    return not 0.2 <= qpos[2] <= 1.0


def humanoid_falls(qpos):
    return not 1.0 < qpos[2] < 2.0


@pytest.mark.parametrize(
    ("env_id", "expected_reward", "falls"),
    [
        ("Walker2d-v3", walker_reward, walker_falls),
        ("HalfCheetah-v3", cheetah_reward, cheetah_falls),
        ("Ant-v3", ant_reward, ant_falls),
        ("Humanoid-v3", humanoid_reward, humanoid_falls),
    ],
)
def test_reward_and_termination_are_those_of_v3(env_id, expected_reward, falls):
    env = envs.make(env_id)
    data = env.unwrapped.data
    terminations = 0
    env.reset(seed=0)
    for action in random_actions(env, 1500):
        before = {name: getattr(data, name).copy() for name in ("qpos", "xpos", "xipos")}
        _, reward, terminated, truncated, _ = env.step(action)
        expected = expected_reward(data, before, action.astype(np.float64))
        assert reward == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert terminated == falls(data.qpos)
        terminations += terminated
        if terminated or truncated:
            env.reset()
    assert (terminations > 0) == (env_id != "HalfCheetah-v3")


@pytest.mark.parametrize(
    ("env_id", "axis", "height", "terminates"),
    [
        ("Walker2d-v3", 1, 1.95, False),
        ("Walker2d-v3", 1, 2.05, True),
        ("HalfCheetah-v3", 1, 9.0, False),
        ("Ant-v3", 2, 0.95, False),
        ("Ant-v3", 2, 1.05, True),
        ("Humanoid-v3", 2, 1.95, False),
        ("Humanoid-v3", 2, 2.05, True),
    ],
)
def test_too_high_terminates(env_id, axis, height, terminates):
    env = envs.make(env_id)
    env.reset(seed=0)
    simulator = env.unwrapped
    qpos, qvel = simulator.data.qpos.copy(), np.zeros_like(simulator.data.qvel)
    qpos[axis] = height
    simulator.set_state(qpos, qvel)
    assert env.step(np.zeros(env.action_space.shape))[2] == terminates


def test_half_cheetah_is_truncated_at_step_1000():
    env = envs.make("HalfCheetah-v3")
    steps = list(rollout(env, random_actions(env, 2000)))
    assert [i for i, step in enumerate(steps, 1) if step.truncated] == [1000, 2000]
    assert not any(step.terminated for step in steps)


@pytest.mark.parametrize("env_id", TASKS)
def test_time_limit_and_gymnasiums_own_checks(env_id):
    env = envs.make(env_id)
    assert env.spec.max_episode_steps == 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(minimum|maximum) value is -?infinity")
        check_env(env.unwrapped, skip_render_check=True)


# --- Silence -------------------------------------------------------------------------------------

MAKE_ALL = """
import gymnasium
before = dict(gymnasium.registry)
from support import envs
assert before == gymnasium.registry, "importing support.envs registers"
for env_id in envs.V3_TASKS:
    env = envs.make(env_id)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
assert before == gymnasium.registry, "envs.make registers"
"""


def test_a_fresh_process_registers_nothing_and_prints_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", MAKE_ALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # no MUJOCO_LOG.TXT


@pytest.mark.parametrize("env_id", TASKS)
def test_making_is_silent(env_id, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = envs.make(env_id)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# --- What make refuses ---------------------------------------------------------------------------


def test_a_module_that_cannot_be_imported_is_named():
    with pytest.raises(ValueError, match=r"^cannot make 'no_such_module:Ant-v3': No module named"):
        envs.make("no_such_module:Ant-v3")


@pytest.mark.parametrize(
    ("env_id", "close"),
    [
        ("Humanoid-v33", "Humanoid-v3"),
        ("humanoid-v3", "Humanoid-v3"),
        ("Walker-v3", "Walker2d-v3"),
        ("Pendulum-v99", "Pendulum-v1"),
        ("HalfCheeta-v5", "HalfCheetah-v5"),
        ("ALE/Humanoid-v3", "Humanoid-v3"),
        ("", "Humanoid-v3"),
    ],
)
def test_unknown_id_names_close_ones(env_id, close):
    with pytest.raises(ValueError, match=f"unknown --env '{env_id}'; closest: .*{close}") as error:
        envs.make(env_id)
    assert "\n" not in str(error.value)


def test_close_names_are_named_once():
    """Gymnasium's registry has the four names too."""
    with pytest.raises(ValueError, match="closest: ") as error:
        envs.make("Humanoid-v33")
    names = str(error.value).split("closest: ")[1].split(", ")
    assert len(names) == len(set(names)) == 3


class Nasty(BaseException):
    def __str__(self):
        raise RuntimeError


def unprintable() -> Exception:
    return type("Unprintable", (KeyError,), {"__str__": lambda self: 1 / 0})()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no licence\nfor you"), "no licence;"),
        (RuntimeError("\x1b[31mred\r"), "[31mred;"),  # without its escape character
        (RuntimeError(), "RuntimeError;"),
        (SystemExit(0), "SystemExit;"),
        (Nasty(), "Nasty;"),
        (unprintable(), "Unprintable;"),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line(error, said):
    def construct():
        raise error

    gym.register("Tiny-v0", construct)
    try:
        with pytest.raises(ValueError, match="cannot make 'Tiny-v0': ") as caught:
            envs.make("Tiny-v0")
    finally:
        del gym.registry["Tiny-v0"]
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_a_module_that_exits_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "exits.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="cannot make 'exits:Ant-v3': SystemExit"):
        envs.make("exits:Ant-v3")


@pytest.mark.filterwarnings("ignore:.*Hopper-v3 is out of date")
def test_known_id_that_cannot_be_made_says_why_and_names_others():
    """Gymnasium has Hopper-v3 in its registry, but only to say that it is gone."""
    with pytest.raises(ValueError, match=r"cannot make 'Hopper-v3': .*; try .*Hopper-v5") as error:
        envs.make("Hopper-v3")
    assert "\n" not in str(error.value)
    assert "Hopper-v3" not in str(error.value).rsplit("; try ", 1)[1]


class Tiny(gym.Env):
    """Spaces and nothing else."""

    closed = 0

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def close(self):
        Tiny.closed += 1


VECTOR, ACTION = Box(-1, 1, (3,)), Box(-1, 1, (2,))


@pytest.fixture
def make_tiny():
    """envs.make on an env with the given spaces."""
    env_id = "Tiny-v0"

    def make(observation_space: gym.Space, action_space: gym.Space) -> gym.Env:
        gym.register(env_id, lambda: Tiny(observation_space, action_space))
        return envs.make(env_id)

    yield make
    del gym.registry[env_id]


def test_other_ids_are_passed_on(make_tiny):
    env = make_tiny(VECTOR, ACTION)
    assert isinstance(env.unwrapped, Tiny)


@pytest.mark.filterwarnings("ignore:.*maximum and minimum values are equal")
@pytest.mark.parametrize(
    ("observation_space", "action_space", "found"),
    [
        (Discrete(5), ACTION, "observations Discrete(5)"),
        (Box(0, 255, (8, 8, 3), np.uint8), ACTION, "observations Box(0, 255, (8, 8, 3), uint8)"),
        (Dict(a=VECTOR), ACTION, "observations Dict("),
        (Box(-1, 1, ()), ACTION, "observations Box(-1.0, 1.0, (), float32)"),
        (VECTOR, Discrete(4), "actions Discrete(4)"),
        (VECTOR, Box(-1, 1, (2, 2)), "actions Box(-1.0, 1.0, (2, 2), float32)"),
        (VECTOR, Box(-np.inf, np.inf, (2,)), "actions Box(-inf, inf, (2,), float32)"),
        (VECTOR, Box(0, np.inf, (2,)), "actions Box(0.0, inf, (2,), float32)"),
        (VECTOR, Box(-1.7e308, 1.7e308, (2,), np.float64), "finite bounds are needed"),
        (VECTOR, Box(0, 0, (2,)), "low must be below high"),
        (Box(-1, 1, (3,), np.longdouble), ACTION, "numbers of at most 64 bits are needed"),
    ],
)
def test_unsuitable_spaces_are_refused_and_named(make_tiny, observation_space, action_space, found):
    closed = Tiny.closed
    with pytest.raises(ValueError, match="--env 'Tiny-v0' has") as error:
        make_tiny(observation_space, action_space)
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert Tiny.closed == closed + 1


class Scripted(gym.Env):
    """Rewards and ends of its own, a reused observation array, and float64 in a float32 space."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self):
        self.obs = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = self.np_random.normal(size=3)
        return self.obs, {}

    def step(self, action):
        self.obs[:] = self.np_random.normal(size=3) + action.sum()
        terminated, truncated = self.np_random.random(2) < 0.1
        return self.obs, float(self.obs[0]), terminated, truncated, {"unread": 1}


# --- Several environments ------------------------------------------------------------------------


@pytest.fixture
def vector_of(monkeypatch):
    """A VectorEnv, named "Odd-v0", of environments that a function makes."""

    def make_odd(kind, num_envs: int = 1) -> envs.VectorEnv:
        monkeypatch.setattr(envs, "make", lambda _: kind())
        return envs.VectorEnv("Odd-v0", num_envs)

    return make_odd


@pytest.mark.parametrize("num_envs", [1, 3])
def test_vector_env_steps_like_gymnasiums(vector_of, num_envs):
    """Bit for bit with SyncVectorEnv, masked resets included; what was returned stays as it was."""
    ours = vector_of(Scripted, num_envs)
    theirs = gym.vector.SyncVectorEnv(
        [Scripted] * num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )
    assert np.array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    assert ours.fresh.tolist() == [True] * num_envs
    rng, kept, ended = np.random.default_rng(0), [], 0
    for _ in range(300):
        action = rng.uniform(-1, 1, (num_envs, 2)).astype(np.float32)
        mine, plain = ours.step(action), theirs.step(action)
        for one, other in zip(mine[:4], plain[:4], strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        assert np.array_equal(ours.obs, mine[0])
        kept.append((mine[0], mine[0].copy()))
        done = mine[2] | mine[3]
        if done.any():
            ended += 1
            reset = [one.reset(options={"reset_mask": done})[0] for one in (ours, theirs)]
            assert np.array_equal(*reset)
            assert np.array_equal(ours.obs, reset[0]) and np.array_equal(ours.fresh, done)
            kept.append((reset[0], reset[0].copy()))
    assert ended > 20 * num_envs
    assert all(np.array_equal(obs, copy) for obs, copy in kept)


class Returns(gym.Env):
    """Always returns the same observation and reward."""

    action_space = ACTION

    def __init__(self, obs=(0, 0, 0), reward=0.0, dtype=np.float64):
        self.observation_space = Box(-1, 1, (3,), dtype)
        self.obs, self.reward = obs, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        return np.zeros(3), self.reward, False, False, {}


BAD = [np.zeros((1, 3)), np.zeros(2), np.zeros(()), np.zeros(3, np.complex128), None, "abc"]
BAD += [["a", "b", "c"], [[0], 0, 0], np.zeros(3, object)]


@pytest.mark.parametrize("bad", BAD)
def test_an_observation_of_another_shape_or_kind_is_refused(vector_of, bad):
    said = r"^Odd-v0 returned observations that are no float64 of shape \(3,\) but "
    with pytest.raises(envs.EnvironmentFault, match=said):
        vector_of(lambda: Returns(bad)).reset(seed=1)


@pytest.mark.parametrize("fine", [[0, 1, 2], (0.5, 0, 0), np.arange(3), np.ones(3, np.float32)])
def test_an_observation_is_converted_to_the_dtype_of_the_space(vector_of, fine):
    obs, _ = vector_of(lambda: Returns(fine)).reset(seed=1)
    assert obs.dtype == np.float64 and obs.tolist() == [list(map(float, fine))]


LARGEST = float(np.finfo(np.float32).max)
BEYOND = float(np.nextafter(LARGEST, np.inf))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("space_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_observations_that_are_finite_as_float32_pass(vector_of, dtype, space_dtype):
    """Also those whose sum of squares overflows."""
    vector = vector_of(lambda: Returns(dtype=space_dtype))
    most = min(float(np.finfo(kind).max) for kind in (dtype, space_dtype, np.float32))
    for values in ([most, -most, 1], [0, -most, most], [1, -0.5, 0], [-60_000, 0, 60_000]):
        vector.envs[0].obs = np.array(values, dtype)
        assert vector.reset()[0].tolist() == [values]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, BEYOND, -1e300])
@pytest.mark.parametrize("columns", [[0], [2], [0, 2]])
def test_observations_that_are_not_finite_as_float32_name_their_columns(
    vector_of, dtype, value, columns
):
    if np.isfinite(value) and dtype != np.float64:
        return  # it has no such values
    obs = np.ones(3, dtype)
    obs[columns] = value
    with pytest.raises(envs.EnvironmentFault) as fault:
        vector_of(lambda: Returns(obs, dtype=dtype)).reset(seed=1)
    said = f"Odd-v0 returned nan or inf in observation columns {columns} as float32"
    assert str(fault.value) == said


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf, BEYOND, np.float64(-1e300)])
def test_a_reward_that_is_no_finite_float32_is_refused(vector_of, reward):
    vector = vector_of(lambda: Returns(reward=reward))
    vector.reset(seed=1)
    with pytest.raises(envs.EnvironmentFault) as fault:
        vector.step(np.zeros((1, 2)))
    assert str(fault.value) == f"Odd-v0 returned the reward {reward}, which is no finite float32"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("it fell\nhard"), "RuntimeError in test_envs.py, line [0-9]+: it fell$"),
        (RuntimeError("\x1b[31mred"), r"RuntimeError in .*: \[31mred$"),
        (SystemExit(0), "SystemExit in .*: 0$"),
        (Nasty(), "Nasty in .*: Nasty$"),
        (unprintable(), "Unprintable in .*: Unprintable$"),
    ],
)
@pytest.mark.parametrize("method", ["reset", "step"])
def test_whatever_an_environment_raises_is_one_line(vector_of, error, said, method, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    vector = vector_of(Scripted)
    vector.reset(seed=1)
    monkeypatch.setattr(vector.envs[0], method, fail)
    with pytest.raises(envs.EnvironmentFault, match=f"^Odd-v0 raised {said}"):
        vector.step(np.zeros((1, 2))) if method == "step" else vector.reset()


@pytest.mark.parametrize("method", ["reset", "step"])
def test_ctrl_c_passes_through(vector_of, method, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    vector = vector_of(Scripted)
    monkeypatch.setattr(vector.envs[0], method, interrupt)
    with pytest.raises(KeyboardInterrupt):
        vector.step(np.zeros((1, 2))) if method == "step" else vector.reset()


# --- Replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [*envs.V3_TASKS, "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("stop", [1, 37, 250])
def test_a_replayed_env_goes_on_as_the_one_that_was_not_stopped(env_id, num_envs, stop):
    """Observations and rewards: Ant's and Humanoid's read positions that lag one step behind."""
    went_on, rng = envs.VectorEnv(env_id, num_envs), np.random.default_rng(0)
    space = went_on.single_action_space

    def step(vectors: list) -> list:
        actions = rng.uniform(space.low, space.high, (num_envs, *space.shape)).astype(np.float32)
        steps = [vector.step(actions)[:4] for vector in vectors]
        for vector, (_, _, terminated, truncated) in zip(vectors, steps, strict=True):
            if (terminated | truncated).any():
                vector.reset(options={"reset_mask": terminated | truncated})
        return steps

    went_on.reset(seed=5)
    for _ in range(stop):
        step([went_on])
    again = envs.VectorEnv(env_id, num_envs)
    obs, _ = again.reset(seed=5)
    before = obs.copy()
    again.load_state_dict(went_on.state_dict())
    assert not again.fresh.any()
    assert again.obs.tobytes() == went_on.obs.tobytes()
    assert np.array_equal(obs, before)  # which was the caller's to keep
    for _ in range(150):
        one, other = step([went_on, again])
        for a, b in zip(one, other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_a_saved_state_stays_as_it_was(vector_of):
    vector = vector_of(Scripted, 2)
    vector.reset(seed=1)
    vector.step(np.ones((2, 2), np.float32))
    saved = vector.state_dict()
    before = copy.deepcopy(saved)
    vector.step(np.zeros((2, 2), np.float32))
    vector.reset()
    for one, other in zip(saved["episodes"], before["episodes"], strict=True):
        assert one["start"] == other["start"]
        assert all(torch.equal(one[name], other[name]) for name in ("actions", "rewards", "obs"))


def test_a_step_that_fails_leaves_the_replay_where_it_was(vector_of, monkeypatch):
    """The first env steps, the second one raises: neither step counts."""
    vector = vector_of(Scripted, 2)
    obs, _ = vector.reset(seed=1)
    before = vector.state_dict()
    monkeypatch.setattr(vector.envs[1], "step", lambda action: 1 / 0)
    with pytest.raises(envs.EnvironmentFault, match=r"raised ZeroDivisionError in test_envs.py"):
        vector.step(np.zeros((2, 2), np.float32))
    assert np.array_equal(vector.obs, obs)
    for one, other in zip(before["episodes"], vector.state_dict()["episodes"], strict=True):
        assert one["start"] == other["start"] and len(other["actions"]) == 0
        assert torch.equal(one["obs"], other["obs"])


def test_an_env_whose_reset_failed_is_not_replayed(vector_of, monkeypatch):
    """Not the episode that ended before it, either."""
    vector = vector_of(Scripted, 2)
    vector.reset(seed=1)
    vector.step(np.zeros((2, 2), np.float32))
    with monkeypatch.context() as patch, pytest.raises(envs.EnvironmentFault):
        patch.setattr(vector.envs[1], "reset", lambda seed: 1 / 0)
        vector.reset(options={"reset_mask": np.array([False, True])})
    vector.load_state_dict(vector.state_dict())
    assert vector.fresh.tolist() == [False, True]


@pytest.mark.parametrize("what", ["reward", "end"])
def test_an_env_of_which_only_a_reward_or_an_end_differs_begins_anew(what, vector_of):
    """Its observations replay, but it has a memory that outlives the reset."""

    class Forgetful(Scripted):
        steps = 0

        def step(self, action):
            type(self).steps += 1
            odd = self.steps == 12  # the second step of the replay
            return np.zeros(3), float(odd and what == "reward"), odd and what == "end", False, {}

        def reset(self, *, seed=None, options=None):
            return np.zeros(3), {}

    one, other = vector_of(Forgetful), vector_of(Forgetful)
    one.reset(seed=1), other.reset(seed=1)
    for _ in range(10):
        one.step(np.zeros((1, 2)))
    saved = one.state_dict()
    other.load_state_dict(saved)
    assert other.fresh.tolist() == [True]
    other.load_state_dict(saved)
    assert other.fresh.tolist() == [False]


def test_an_env_with_a_generator_of_another_kind_is_not_replayed(vector_of):
    vector = vector_of(Scripted)
    vector.reset(seed=1)
    assert vector.state_dict()["episodes"][0]["start"] == 1
    vector.envs[0].unwrapped.np_random = np.random.Generator(np.random.MT19937(3))
    vector.reset()
    assert vector.state_dict()["episodes"][0]["start"] is None
    vector.load_state_dict(vector.state_dict())
    assert vector.fresh.all()


def test_an_episode_that_is_too_long_is_not_replayed(vector_of, monkeypatch):
    monkeypatch.setattr(envs.VectorEnv, "LONGEST", 5)
    vector = vector_of(Returns)
    vector.reset(seed=1)
    for steps in range(1, 8):
        vector.step(np.zeros((1, 2), np.float32))
        (episode,) = vector.state_dict()["episodes"]
        assert len(episode["actions"]) == len(episode["rewards"]) == (steps if steps < 6 else 0)
        assert episode["start"] == (1 if steps < 6 else None)


def test_the_state_of_other_envs_is_refused(vector_of):
    three, two = vector_of(Scripted, 3), vector_of(Scripted, 2)
    three.reset(seed=1), two.reset(seed=1)
    with pytest.raises(ValueError, match="it has 3 environments, this run has 2"):
        two.load_state_dict(three.state_dict())


# --- Evaluation ----------------------------------------------------------------------------------


def test_evaluation_is_the_return_of_whole_seeded_episodes():
    def act(obs):
        return -0.1 * obs[:6]

    env = envs.make("Walker2d-v3")
    returns = []
    for episode in range(3):
        obs, _ = env.reset(seed=7 if episode == 0 else None)
        returns.append(0.0)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[-1] += reward
            ended = terminated or truncated
    assert envs.evaluate("Walker2d-v3", act, episodes=3, seed=7) == returns
    assert envs.evaluate("Walker2d-v3", act, episodes=0, seed=7) == []


def test_an_episode_without_end_is_evaluated_for_10_000_steps(vector_of):
    vector_of(lambda: Returns(reward=0.5))  # in place of make
    assert envs.evaluate("Odd-v0", lambda obs: np.zeros(2), episodes=2, seed=1) == [5000.0] * 2


def test_an_env_that_cannot_be_made_twice_was_not_evaluated(monkeypatch):
    def make(env_id):
        raise ValueError("one at a time")

    monkeypatch.setattr(envs, "make", make)
    with pytest.raises(envs.EnvironmentFault, match=r"^Odd-v0 was not evaluated: one at a time"):
        envs.evaluate("Odd-v0", lambda obs: obs, episodes=1, seed=1)
