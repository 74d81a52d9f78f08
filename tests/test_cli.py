"""What a user meets at the command line of sac.py and ppo.py: names, results, warnings, help."""

import itertools
import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import SCRIPTS, scalars

import ppo
import sac
from support import envs

ROOT = Path(sac.__file__).parent
TINY = {
    "sac": {"total_timesteps": 60, "learning_starts": 40, "buffer_size": 500, "batch_size": 16},
    "ppo": {"total_timesteps": 64, "n_steps": 64, "batch_size": 32, "n_epochs": 1},
}
both = pytest.mark.parametrize("name", SCRIPTS)


def tiny(name: str, tmp_path: Path, **changes):
    common = {"env": "Pendulum-v1", "hidden": 8, "eval_episodes": 0, "run_dir": str(tmp_path)}
    return SCRIPTS[name].Args(**{**common, **TINY[name], **changes})


# --- Runs ----------------------------------------------------------------------------------------


@both
def test_the_name_tells_what_differs_and_a_second_run_gets_the_next_number(name, tmp_path):
    for _ in range(3):
        SCRIPTS[name].main(tiny(name, tmp_path, quant_m=1, gamma=0.9, seed=4))
    names = sorted(path.name for path in tmp_path.iterdir())
    base = names[0]
    assert names == [base, f"{base}-2", f"{base}-3"]
    assert base.startswith(f"Pendulum-v1__{name}__quant-m-1__") and base.endswith("__seed-4")
    assert "gamma-0.9" in base and "total" not in base and str(tmp_path) not in base


@both
def test_a_run_prints_its_footprint_first_and_leaves_result_weights_and_logs(name, tmp_path, capfd):
    changes = {"quant_m": 2, "eval_episodes": 2, "run_name": "run", "num_envs": 2}
    args = tiny(name, tmp_path, **changes, total_timesteps=1200)
    returned = SCRIPTS[name].main(args)["result"]
    out, folder = capfd.readouterr().out, tmp_path / "run"
    assert out.index("memory: buffer") < out.index("ms/step")
    assert "float64 baseline" in out
    result = json.loads((folder / "result.json").read_text())
    assert result == returned
    assert result["args"]["quant_m"] == 2 and len(result["evaluation"]) == 2
    assert result["storage"].startswith("int16")
    assert set(result["versions"]) == {"torch", "gymnasium", "mujoco", "numpy"}
    assert {"git_commit", "git_clean", "machine", "threads"} < set(result)
    assert result["return_last_tenth"] is None or result["return_last_tenth"] < 0
    assert result["peak_rss_bytes"] > 50e6 and result["ms_per_step"] > 0
    assert 50e6 < result["rss_bytes"] < 1.01 * result["peak_rss_bytes"]  # the kernel counts loosely
    assert 5 < result["max_abs_obs"] <= 8.1  # Pendulum's angular velocity reaches 8
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert {"ppo": "actor_critic", "sac": "actor"}[name] in weights
    assert all(t.isfinite().all() for network in weights.values() for t in network.values())

    logged = scalars(folder)  # steps increase also with two envs that end in the same step
    assert {"charts/episodic_return", "quant/clip_fraction", "quant/max_abs_obs"} < set(logged)
    assert {"ppo": "losses/first_ratio_error", "sac": "losses/qf_loss"}[name] in logged
    assert {nbytes for _, nbytes in logged["memory/buffer_bytes"]} == {result["buffer_bytes"]}


@both
def test_clamping_is_reported_once_with_columns_and_a_bound(name, tmp_path, capfd):
    args = tiny(name, tmp_path, quant_m=1, quant_b=2.0, total_timesteps=2100)
    result = SCRIPTS[name].main(args)["result"]
    text = "".join(capfd.readouterr())
    assert text.count("warning: ") == 1
    assert "columns [2]" in text  # the angular velocity; cosine and sine stay within 1
    assert 2 < int(re.search(r"a bound of (\d+) would", text)[1]) <= 8
    assert 0 < result["clip_fraction"] < 1


class Spike(gym.Env):
    """Zeros, but for column 2, which is -300.5 in the tenth step of an episode of 20."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.step_count = 0
        return np.zeros(3), {}

    def step(self, action):
        self.step_count += 1
        obs = np.array([0, 0, -300.5 if self.step_count == 10 else 0.0])
        return obs, 1.0, False, self.step_count == 20, {}


@both
@pytest.mark.parametrize("pack", [False, True])
def test_telemetry_counts_what_was_stored_and_what_was_clamped(
    name, pack, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(envs, "make", lambda _: Spike())
    monkeypatch.setattr(sac, "LOG_EVERY", 64)
    changes = {"quant_m": 2, "pack": pack, "quant_act": pack, "run_name": "run"}
    result = SCRIPTS[name].main(tiny(name, tmp_path, **changes, total_timesteps=128))["result"]
    text = "".join(capfd.readouterr())

    # At step t, SAC has stored t observations and the first ones of episodes; PPO what it acted on.
    first = {"sac": lambda t: 1 + t // 20, "ppo": lambda t: 0}[name]
    spikes = {64: 3, 128: 6}  # after steps 10, 30, 50, 70, 90, 110
    expected = {t: count / (3 * (t + first(t))) for t, count in spikes.items()}
    logged = scalars(tmp_path / "run")
    assert dict(logged["quant/clip_fraction"]) == pytest.approx(expected)
    assert logged["quant/max_abs_obs"] == [(64, 300.5), (128, 300.5)]
    assert result["clip_fraction"] == pytest.approx(expected[128])
    assert result["max_abs_obs"] == 300.5

    assert text.count("warning: ") == 1
    warning = re.search("warning: .*", text)[0]
    assert "beyond +-127 " in warning
    assert "in columns [2];" in warning
    assert "a bound of 301 would hold them" in warning


class Counting(gym.Env):
    """obs = (env's number, episode, step); reward = env's number + 1. Known ends, returns, lengths.

    Env 0 terminates after 3 steps, env 1 is truncated after 4, env 2 meets both after 5: in nearly
    every step some envs are done and others are not.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, number: int):
        self.number, self.episode, self.step_count = number, -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.number, self.episode, 0.0]), {}

    def step(self, action):
        self.step_count += 1
        done = self.step_count == 3 + self.number
        obs = np.array([self.number, self.episode, self.step_count], np.float64)
        return obs, self.number + 1.0, done and self.number != 1, done and self.number != 0, {}


@pytest.fixture
def counting(monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(envs, "make", lambda env_id: Counting(next(numbers) % 3))


def test_sac_stores_exactly_the_transitions_of_unequal_envs(counting, tmp_path):
    buffer = sac.main(tiny("sac", tmp_path, num_envs=3))["buffer"]  # 20 steps of each env
    expected = set()
    for number, length in enumerate((3, 4, 5)):
        for t in range(20):
            episode, step = divmod(t, length)
            terminated = step + 1 == length and number != 1
            expected.add((number, episode, step, number + 1, step + 1, terminated))
    batch = buffer.sample(5000)  # of 60: none is missed
    assert torch.equal(batch.obs[:, :2], batch.next_obs[:, :2])  # never across a reset
    columns = (*batch.obs.T, batch.reward, batch.next_obs[:, 2], batch.terminated)
    drawn = set(zip(*(column.tolist() for column in columns), strict=True))
    assert drawn == expected


def test_ppo_bootstraps_and_cuts_exactly_at_the_ends_of_unequal_envs(counting, tmp_path):
    args = tiny("ppo", tmp_path, num_envs=3, n_steps=20, batch_size=60, total_timesteps=60)
    args.learning_rate = 0.0  # the policy stays as it collected
    trained = ppo.main(args)
    buffer, actor_critic = trained["buffer"], trained["actor_critic"]
    for number, length in enumerate((3, 4, 5)):
        for t in range(20):
            episode, step = divmod(t, length)
            assert buffer.obs[t, number].tolist() == [number, episode, step]
            end = step + 1 == length
            assert buffer.ends[t, number] == end
            reward = number + 1.0
            if end and number == 1:  # truncated and not terminated
                final = torch.tensor([[number, episode, length]], dtype=torch.float32)
                reward += args.gamma * actor_critic(final)[2].item()
            assert buffer.rewards[t, number].item() == pytest.approx(reward, abs=1e-5)


@both
def test_returns_are_logged_and_summed_up_per_env(name, counting, tmp_path):
    changes = {"num_envs": 3, "run_name": "run", "eval_episodes": 1}
    result = SCRIPTS[name].main(tiny(name, tmp_path, **changes, total_timesteps=192))["result"]
    ends = {}  # global_step: returns of the episodes that end there, in 64 steps of each env
    for number, length in enumerate((3, 4, 5)):
        for t in range(length, 65, length):
            ends.setdefault(3 * t, []).append(length * (number + 1.0))
    logged = dict(scalars(tmp_path / "run")["charts/episodic_return"])
    assert logged == pytest.approx({step: np.mean(rets) for step, rets in ends.items()})
    last = [ret for step, rets in ends.items() if step > 0.9 * 192 for ret in rets]
    assert result["return_last_tenth"] == pytest.approx(np.mean(last))
    assert result["evaluation"] == [3.0]  # a fourth env, number 0


# --- Help -----------------------------------------------------------------------------------


@both
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as done:
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in SCRIPTS[name].Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
