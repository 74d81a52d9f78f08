"""envs.py: the four -v3 tasks against v3's published formulas and Gymnasium's v4 classes."""

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

import envs

TASKS = ["Walker2d-v3", "HalfCheetah-v3", "Ant-v3", "Humanoid-v3"]
ROOT = Path(envs.__file__).parent


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


# spaces and observations


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


# rewards and ends


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


# silence

MAKE_ALL = """
import gymnasium
before = dict(gymnasium.registry)
import envs
assert before == gymnasium.registry, "import envs registers"
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


# what make refuses


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


def test_vector_env_steps_like_gymnasiums(monkeypatch):
    """Bit for bit with SyncVectorEnv, masked resets included; what was returned stays as it was."""
    monkeypatch.setattr(envs, "make", lambda _: Scripted())
    ours = envs.make_vector("any", 3)
    theirs = gym.vector.SyncVectorEnv(
        [Scripted] * 3, autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )
    assert np.array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    rng, kept, ended = np.random.default_rng(0), [], 0
    for _ in range(300):
        action = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        mine, plain = ours.step(action), theirs.step(action)
        for one, other in zip(mine[:4], plain[:4], strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        kept.append((mine[0], mine[0].copy()))
        done = mine[2] | mine[3]
        if done.any():
            ended += 1
            reset = [one.reset(options={"reset_mask": done})[0][done] for one in (ours, theirs)]
            assert np.array_equal(*reset)
    assert ended > 50
    assert all(np.array_equal(obs, copy) for obs, copy in kept)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(2), np.zeros(3, np.complex128)])
def test_vector_env_refuses_an_observation_of_another_shape_or_kind(monkeypatch, bad):
    monkeypatch.setattr(envs, "make", lambda _: Scripted())
    vector = envs.make_vector("any", 1)
    vector.reset(seed=1)
    vector.envs[0].obs = np.zeros(3)
    vector.envs[0].step = lambda action: (bad, 0.0, False, False, {})
    with pytest.raises(envs.EnvironmentFault, match="returned observations that are no float32"):
        vector.step(np.zeros((1, 2), np.float32))


# --- Replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [*envs.V3_TASKS, "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("stop", [1, 37, 250])
def test_a_replayed_env_goes_on_as_the_one_that_was_not_stopped(env_id, num_envs, stop):
    """Observations and rewards: Ant's and Humanoid's read positions that lag one step behind."""
    went_on, rng = envs.make_vector(env_id, num_envs), np.random.default_rng(0)
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
    again = envs.make_vector(env_id, num_envs)
    again.reset(seed=5)
    saved = went_on.episodes()
    obs, anew = again.replay(saved)
    assert not anew.any()
    assert obs.tobytes() == np.stack([episode["obs"].numpy() for episode in saved]).tobytes()
    for _ in range(150):
        one, other = step([went_on, again])
        for a, b in zip(one, other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_a_step_that_fails_leaves_the_replay_where_it_was(monkeypatch):
    """The first env steps, the second one raises: neither step counts."""
    monkeypatch.setattr(envs, "make", lambda _: Scripted())
    vector = envs.make_vector("any", 2)
    vector.reset(seed=1)
    before = [{k: copy.deepcopy(v) for k, v in e.items()} for e in vector.episodes()]
    monkeypatch.setattr(vector.envs[1], "step", lambda action: 1 / 0)
    with pytest.raises(envs.EnvironmentFault, match=r"raised ZeroDivisionError in test_envs.py"):
        vector.step(np.zeros((2, 2), np.float32))
    for one, other in zip(before, vector.episodes(), strict=True):
        assert one["start"] == other["start"] and len(other["actions"]) == 0
        assert torch.equal(one["obs"], other["obs"])


@pytest.mark.parametrize("what", ["reward", "end"])
def test_an_env_of_which_only_a_reward_or_an_end_differs_begins_anew(what, monkeypatch):
    """Its observations replay, but it has a memory that outlives the reset."""

    class Forgetful(Scripted):
        steps = 0

        def step(self, action):
            type(self).steps += 1
            odd = self.steps == 12  # the second step of the replay
            return np.zeros(3), float(odd and what == "reward"), odd and what == "end", False, {}

        def reset(self, *, seed=None, options=None):
            return np.zeros(3), {}

    monkeypatch.setattr(envs, "make", lambda _: Forgetful())
    one, other = envs.make_vector("any", 1), envs.make_vector("any", 1)
    one.reset(seed=1), other.reset(seed=1)
    for _ in range(10):
        one.step(np.zeros((1, 2)))
    saved = one.episodes()
    assert other.replay(saved)[1].tolist() == [True]
    assert other.replay(saved)[1].tolist() == [False]


def test_an_env_with_a_generator_of_another_kind_is_not_replayed(monkeypatch):
    monkeypatch.setattr(envs, "make", lambda _: Scripted())
    vector = envs.make_vector("any", 1)
    vector.reset(seed=1)
    assert vector.episodes()[0]["start"] == 1
    vector.envs[0].unwrapped.np_random = np.random.Generator(np.random.MT19937(3))
    vector.reset()
    assert vector.episodes()[0]["start"] is None
    assert vector.replay(vector.episodes())[1].all()
