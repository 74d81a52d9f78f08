"""N steps, a stop, N more: bit for bit what 2N steps give. And what ends a run at once."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import SCRIPTS, left_behind, scalars

import sac
from support import checkpoints, envs, runs

ROOT = Path(sac.__file__).parent
TASKS = ["Walker2d-v3", "HalfCheetah-v3", "Ant-v3", "Humanoid-v3", "Pendulum-v1"]
N = 126  # a multiple of 3 envs' steps and of PPO's rollouts; Pendulum's episodes end at 200
SMALL = {
    # The buffer wraps before N, also as three rings.
    "sac": {"learning_starts": 20, "buffer_size": 90, "batch_size": 16},
    "ppo": {"batch_size": 32, "n_epochs": 2},
}
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def losses_are_logged_often(monkeypatch):
    monkeypatch.setattr(sac, "LOG_EVERY", 50)


def make_args(name: str, folder: Path, **changes):
    fixed = {"hidden": 8, "eval_episodes": 1, "run_dir": str(folder), "total_timesteps": 2 * N}
    fixed |= {"checkpoint_every": N}
    if name == "ppo":
        fixed["n_steps"] = 42 // changes.get("num_envs", 1)
    return SCRIPTS[name].Args(**{**SMALL[name], **fixed, **changes})


def train(name: str, folder: Path, run_name: str, **changes) -> dict:
    """Run a script to its end; what it left behind."""
    SCRIPTS[name].main(make_args(name, folder, run_name=run_name, **changes))
    return left_behind(folder / run_name)


def in_one_go(name: str, folder: Path, **changes) -> dict:
    return train(name, folder, "whole", **changes, checkpoint_every=2 * N)


def in_two(name: str, folder: Path, **changes) -> dict:
    train(name, folder, "halves", **changes, total_timesteps=N)
    torch.manual_seed(0)  # a new process would begin with another state, too
    return train(name, folder, "halves", **changes, resume=True)


# --- Exact resume --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("env", TASKS)
@pytest.mark.parametrize(
    ("storage", "num_envs"),
    [({}, 1), ({"quant_m": 2}, 3), ({"quant_m": 2, "pack": True}, 1)],
    ids=["float64", "m=2 of 3 envs", "packed"],
)
def test_n_steps_and_n_more_are_2n_steps_bit_for_bit(env, storage, num_envs, name, tmp_path):
    changes = {"env": env, "num_envs": num_envs, **storage}
    whole = in_one_go(name, tmp_path, **changes)
    assert in_two(name, tmp_path, **changes) == whole
    assert {"buffer", "envs", "progress"} < whole.keys() and len(whole["scalars"]) >= 10


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sac", {"eager": True, "quant_m": 2}),
        ("sac", {"quant_m": 2, "drop_constant": True, "pack": True, "num_envs": 3}),
        ("sac", {"quant_m": 1, "quant_b": 1.0, "quant_act": True, "num_envs": 3}),  # clamps
        ("sac", {"storage": "bfloat16", "train_freq": 7, "gradient_steps": 2}),
        ("sac", {"storage": "float8_e4m3fn", "learning_starts": 150}),  # random actions go on
        ("ppo", {"eager": True, "quant_m": 2}),
        ("ppo", {"quant_m": 1, "quant_b": 1.0, "quant_act": True, "ent_coef": 0.1}),
        ("ppo", {"storage": "float16", "num_envs": 3}),
    ],
    ids=str,
)
def test_other_settings_resume_exactly_too(name, changes, tmp_path, monkeypatch):
    monkeypatch.setattr("support.columns.LiveColumns.WATCHED", 30)
    changes = {"env": "Walker2d-v3", **changes}
    assert in_two(name, tmp_path, **changes) == in_one_go(name, tmp_path, **changes)


@both
def test_a_run_cannot_go_on_eagerly_that_began_recorded(name, tmp_path, capfd):
    changes = {"env": "Pendulum-v1", "run_name": "run", "total_timesteps": N}
    SCRIPTS[name].main(make_args(name, tmp_path, **changes))
    with pytest.raises(SystemExit):
        train(name, tmp_path, "run", env="Pendulum-v1", resume=True, eager=True)
    assert "--eager was False there and is True here" in capfd.readouterr().err


@both
def test_many_stops_change_nothing_and_checkpoints_along_the_way_neither(name, tmp_path):
    changes = {"env": "Walker2d-v3", "num_envs": 2, "quant_m": 2}
    whole = in_one_go(name, tmp_path, **changes)
    for stop in (1, 43, 100, 180, 2 * N):  # PPO stops at the end of the rollout
        more = {"checkpoint_every": 17, "total_timesteps": stop, "resume": stop > 1}
        found = train(name, tmp_path, "many", **changes, **more)
    assert found == whole


def test_episodes_that_went_on_across_the_stop_are_logged_whole(tmp_path):
    logged = in_two("sac", tmp_path, env="Pendulum-v1")["scalars"]
    assert logged["charts/episodic_length"] == [(200, 200.0)]


class Unrepeatable(gym.Env):
    """Its observations come from a generator that nobody can set back."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))
    chance = np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.chance.normal(size=3), {}

    def step(self, action):
        self.steps += 1
        return self.chance.normal(size=3), 1.0, self.steps == 50, False, {}


@both
def test_an_env_that_does_not_replay_begins_anew_and_says_so_once(
    name, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(envs, "make", lambda _: Unrepeatable())
    changes = {"num_envs": 2, "eval_episodes": 0}
    if name == "sac":
        changes["buffer_size"] = 1000
    train(name, tmp_path, "run", total_timesteps=N, **changes)
    capfd.readouterr()
    left = train(name, tmp_path, "run", resume=True, **changes)
    (err,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert err.endswith("env [0, 1] did not replay to where it was; a new episode begins there")

    # N = 126: 63 steps of each env, the second episodes are 13 steps old and will not count. Those
    # that begin then end 50 steps later.
    assert left["scalars"]["charts/episodic_length"] == [(100, 50.0), (226, 50.0)]
    if name == "sac":  # each episode has a final row, the one that was broken off as well
        saved = checkpoints.load(tmp_path / "run" / "checkpoint.pt")["parts"]["buffer"]
        assert list(saved["fill"]) == [126 + 1 + 3, 126 + 1 + 3]


@both
def test_an_episode_too_long_to_replay_begins_anew(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(envs.VectorEnv, "LONGEST", N - 1)
    in_two(name, tmp_path, env="Pendulum-v1")
    assert "env [0] did not replay" in capfd.readouterr().err


@both
def test_a_finished_run_is_not_trained_again_but_evaluated_if_that_was_missed(
    name, tmp_path, capfd
):
    changes = {"env": "Walker2d-v3", "checkpoint_every": 1000}
    whole = train(name, tmp_path, "run", **changes)
    with pytest.raises(SystemExit) as refused:
        train(name, tmp_path, "run", resume=True, **changes)
    assert refused.value.code == 2 and "is finished" in capfd.readouterr().err
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed in the evaluation
    assert train(name, tmp_path, "run", resume=True, **changes) == whole


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@both
def test_what_was_trained_is_saved_if_the_end_fails(name, tmp_path, monkeypatch):
    """As when result.json does not fit on the disk, or the output is a pipe that was closed."""
    changes = {"env": "Walker2d-v3", "checkpoint_every": 0}
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="No space left") as stopped,
    ):
        patch.setattr(runs.Run, "finish", no_space)
        train(name, tmp_path, "run", **changes)
    assert "saved as of step 252; resume with: " in stopped.value.code
    again = train(name, tmp_path, "run", **changes, resume=True)
    assert again == in_one_go(name, tmp_path, env="Walker2d-v3")


def test_a_warning_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.tqdm, "write", no_space)
    args = make_args("sac", tmp_path, env="Pendulum-v1", quant_m=1, quant_b=2.0)
    assert sac.main(args)["result"]["clamped"]


# --- Determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@both
def test_the_same_seed_gives_the_same_run_and_another_one_another(name, eager, tmp_path):
    changes = {"env": "Walker2d-v3", "quant_m": 2, "eager": eager}
    first, again, other = (
        in_one_go(name, tmp_path / str(i), seed=seed, **changes) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first["weights.pt"] != other["weights.pt"]
    assert first["result"]["evaluation"] != other["result"]["evaluation"]


THREADS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import test_resume
name, threads, hidden, folder = sys.argv[3], *map(int, sys.argv[4:6]), test_resume.Path(sys.argv[6])
torch.set_num_threads(threads)
own = {"n_steps": 64, "total_timesteps": 64} if name == "ppo" else {"total_timesteps": 30}
left = test_resume.train(name, folder, "run", env="Humanoid-v3", quant_m=2, hidden=hidden,
    eval_episodes=0, batch_size=64, **own)
print(torch.get_num_threads(), left["weights.pt"], left["progress"])
"""


@both
def test_runs_agree_across_processes_for_each_number_of_threads(name, tmp_path):
    """Two threads may add up in another order than one: so each is held against itself."""

    def run(number: int, threads: int, hidden: int) -> tuple[str, ...]:
        words = [ROOT, ROOT / "tests", name, threads, hidden, tmp_path / str(number)]
        code = [sys.executable, "-c", THREADS, *map(str, words)]
        done = subprocess.run(code, capture_output=True, text=True, check=True)
        return tuple(done.stdout.splitlines()[-1].split())

    # Large enough for the number of threads to be left alone. A run in 40 once came out otherwise.
    (found,) = {run(number, 2, 256) for number in range(20)}
    assert found[0] == "2"
    # and so small that one is taken: then the number asked for does not matter.
    assert run(20, 1, 8) == run(21, 2, 8)


# --- Numbers stay finite -------------------------------------------------------------------------


class Bonanza(gym.Env):
    """A reward of 1e25 at the 100th step, whose squared error is beyond float32."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(3), {}

    def step(self, action):
        self.steps += 1
        return np.full(3, self.steps / 1000), 1e25 if self.steps == 100 else 1.0, False, False, {}


@both
@pytest.mark.parametrize("every", [0, 42])
def test_a_loss_beyond_float32_stops_the_run_and_names_the_last_good_checkpoint(
    name, every, tmp_path, monkeypatch
):
    monkeypatch.setattr(envs, "make", lambda _: Bonanza())
    with pytest.raises(SystemExit) as stopped:
        train(name, tmp_path, "run", checkpoint_every=every, batch_size=32)
    message = stopped.value.code
    # SAC meets it as soon as it is drawn; PPO after the rollout of steps 85 to 126.
    step = int(message.split("at step ")[1].split()[0])
    assert 100 <= step < 126 if name == "sac" else step == 126
    assert f"{name}.py: error: at step " in message and "inf" in message
    path = tmp_path / "run" / "checkpoint.pt"
    if every:
        assert "saved as of step 84; resume with: " in message
        assert checkpoints.load(path)["global_step"] == 84
    else:
        assert "no checkpoint was saved" in message and not path.exists()
    assert not (tmp_path / "run" / "result.json").exists()
    assert max(step for step, _ in scalars(tmp_path / "run")["losses/entropy"]) <= step
