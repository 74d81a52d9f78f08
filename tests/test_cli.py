"""What a user meets at the command line of sac.py and ppo.py: names, refusals, results."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import memory
import ppo
import sac

ROOT = Path(sac.__file__).parent
SCRIPTS = {"sac": sac, "ppo": ppo}
TINY = {
    "sac": {"total_timesteps": 60, "learning_starts": 40, "buffer_size": 500, "batch_size": 16},
    "ppo": {"total_timesteps": 64, "n_steps": 64, "batch_size": 32, "n_epochs": 1},
}
both = pytest.mark.parametrize("name", SCRIPTS)


def tiny(name: str, tmp_path: Path, **changes):
    common = {"env": "Pendulum-v1", "hidden": 8, "eval_episodes": 0, "run_dir": str(tmp_path)}
    return SCRIPTS[name].Args(**{**common, **TINY[name], **changes})


# --- Refusals: one line, exit code 2, nothing created --------------------------------------------

BAD = [
    ({"env": "Humanoid-v33"}, "Humanoid-v3"),  # the closest names
    ({"env": "CartPole-v1"}, "Discrete(2)"),
    ({"env": "FrozenLake-v1"}, "Discrete(16)"),
    ({"env": "test/Image-v0"}, "(8, 8, 3)"),
    ({"env": "test/Dict-v0"}, "Dict"),
    ({"quant_m": -1}, "--quant-m -1"),
    ({"quant_m": 8}, "--quant-b 21 fits"),
    ({"quant_m": 2, "quant_b": 0.0}, "--quant-b 0"),
    ({"quant_m": 2, "quant_b": -127.0}, "--quant-b -127"),
    ({"quant_b": 0.0}, "--quant-b 0"),
    ({"env": ".:x-v0"}, "unknown --env"),
    ({"env": "a:b:c"}, "unknown --env"),
    ({"seed": 10**23}, "--seed 1000"),
    ({"run_dir": "x" * 300}, "too long"),
    ({"run_name": "x" * 300}, "too long"),
    ({"quant_m": 2, "storage": "float16"}, "--storage"),
    ({"device": "cuda:99"}, "--device cuda:99"),
    ({"device": "abacus"}, "--device abacus"),
    ({"device": "meta"}, "--device meta"),
    ({"batch_size": 100_000}, "--batch-size 100000"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"total_timesteps": 0}, "--total-timesteps 0"),
    ({"num_envs": 0}, "--num-envs 0"),
    ({"hidden": -1}, "--hidden -1"),
    ({"seed": -1}, "--seed -1"),
    ({"gamma": 1.5}, "--gamma 1.5"),
    ({"learning_rate": float("nan")}, "--learning-rate nan"),
    ({"pack": True}, "--pack"),
    ({"pack": True, "storage": "float16"}, "--pack"),
    ({"pack": True, "quant_m": 2, "storage": "float16"}, "--storage float16"),
]
WHOLE = {"buffer_size": sac.Args.buffer_size}  # not told
BAD_BUDGETS = [  # of sac.py
    ({"memory_budget": "1GB"}, "drop --buffer-size"),
    ({"memory_budget": "1GB", "drop_constant": True, **WHOLE}, "--drop-constant"),
    ({"memory_budget": "5kB", **WHOLE}, "the least is "),
    ({"memory_budget": "500 TB", **WHOLE}, "are free"),
    *(
        ({"memory_budget": text, **WHOLE}, repr(text))
        for text in ("", "lots", "0", "0MB", "-5MB", "1XB", "1e9", "nan", "inf", "1/2GB", "1 2MB")
    ),
]


class Odd(gym.Env):
    """Spaces that the scripts cannot use, and observations that they must refuse."""

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, obs_space=None, nan_at=None, truncated=False):
        self.observation_space = obs_space or gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.nan_at, self.truncated, self.steps = nan_at, truncated, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        obs = np.zeros(3)
        if self.steps == self.nan_at:
            obs[1] = np.nan
        return obs, 1.0, False, self.truncated and self.steps == self.nan_at, {}


@pytest.fixture(autouse=True)
def odd_environments():
    image = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    gym.register("test/Image-v0", lambda: Odd(image), disable_env_checker=True)
    gym.register("test/Dict-v0", lambda: Odd(gym.spaces.Dict(a=image)), disable_env_checker=True)
    yield
    for name in ("Image", "Dict"):
        del gym.registry[f"test/{name}-v0"]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [(name, *bad) for name in SCRIPTS for bad in BAD] + [("sac", *bad) for bad in BAD_BUDGETS],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line_and_creates_nothing(name, changes, said, tmp_path, capfd):
    with pytest.raises(SystemExit) as error:
        SCRIPTS[name].main(tiny(name, tmp_path, **{"run_dir": str(tmp_path / "runs"), **changes}))
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert error.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"{name}.py: error: "), captured.err
    assert said in lines[0]
    assert not captured.out
    assert not list(tmp_path.iterdir())


@both
def test_a_buffer_beyond_free_memory_is_refused_with_what_would_fit(
    name, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3_000)
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(tiny(name, tmp_path / "runs", total_timesteps=10, hidden=2))
    message = capfd.readouterr().err
    flag = {"sac": "buffer-size", "ppo": "n-steps"}[name]
    fits = int(re.search(rf"--{flag} (\d+)", message)[1])
    assert message.count("\n") == 1 and fits < 500
    changes = {flag.replace("-", "_"): fits, "batch_size": min(16, fits)}
    SCRIPTS[name].main(tiny(name, tmp_path / "runs", total_timesteps=10, hidden=2, **changes))


def test_the_least_budget_that_a_refusal_names_is_enough_and_a_byte_less_is_not(tmp_path, capfd):
    def run(budget: int) -> dict:
        return sac.main(tiny("sac", tmp_path / "runs", memory_budget=str(budget), **WHOLE))

    with pytest.raises(SystemExit):
        run(5_000)
    message = capfd.readouterr().err
    least, rows = map(
        int, re.search(r"least is (\d+) bytes, for --buffer-size (\d+)", message).groups()
    )
    with pytest.raises(SystemExit):
        run(least - 1)
    assert not list(tmp_path.iterdir())
    assert run(least)["buffer"].rows == rows + 1 == TINY["sac"]["batch_size"] + 1


@both
def test_an_explicit_run_name_that_exists_is_refused_and_left_alone(name, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("data")
    with pytest.raises(SystemExit) as error:
        SCRIPTS[name].main(tiny(name, tmp_path, run_name="mine"))
    message = capfd.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and "mine" in message
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


@both
def test_a_run_folder_that_cannot_be_made_is_refused(name, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(tiny(name, tmp_path / "file"))
    assert capfd.readouterr().err.count("\n") == 1


@both
def test_from_the_shell_errors_exit_2_without_a_traceback(name, tmp_path):
    for arguments, one_line in (
        (["--env", "Humanoid-v2"], True),  # Gymnasium warns of outdated ids by itself
        (["--env", "CartPole-v0"], True),
        (["--quant-m", "two"], False),  # tyro's box
    ):
        done = subprocess.run(
            [sys.executable, ROOT / f"{name}.py", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and done.stderr.strip() and not done.stdout
        assert not one_line or done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize("nan_at", [50, 64])  # 64: the last step of PPO's rollout
@pytest.mark.parametrize("truncated", [False, True])
def test_nan_names_the_column(name, nan_at, truncated, tmp_path, monkeypatch):
    monkeypatch.setattr(envs, "make", lambda _: Odd(nan_at=nan_at, truncated=truncated))
    args = tiny(name, tmp_path)
    args.total_timesteps = 64
    with pytest.raises(SystemExit, match=r"nan or inf in observation columns \[1\]"):
        SCRIPTS[name].main(args)


@both
def test_nan_from_the_shell_is_one_line_naming_the_environment(name, tmp_path):
    code = "import gymnasium, numpy, runpy, sys; from test_cli import Odd; sys.argv = sys.argv[1:];"
    code += "gymnasium.register('Odd-v0', lambda: Odd(nan_at=5), disable_env_checker=True);"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / f"{name}.py", "--env", "Odd-v0", "--run-dir", tmp_path],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    expected = f"{name}.py: error: Odd-v0 returned nan or inf in observation columns [1]"
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(expected)


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
def test_a_run_prints_its_footprint_first_and_leaves_result_and_logs(name, tmp_path, capfd):
    args = tiny(name, tmp_path, quant_m=2, eval_episodes=2, run_name="run", num_envs=2)
    args.total_timesteps = 1200
    returned = SCRIPTS[name].main(args)["result"]
    out = capfd.readouterr().out
    assert out.index("memory: buffer") < out.index("ms/step")
    assert "float64 baseline" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == returned
    assert result["args"]["quant_m"] == 2 and len(result["evaluation"]) == 2
    assert result["storage"].startswith("int16")
    assert set(result["versions"]) == {"torch", "gymnasium", "mujoco", "numpy"}
    assert result["return_last_tenth"] is None or result["return_last_tenth"] < 0
    assert result["peak_rss_bytes"] > 50e6 and result["ms_per_step"] > 0
    assert 50e6 < result["rss_bytes"] < 1.01 * result["peak_rss_bytes"]  # the kernel counts loosely
    assert 5 < result["max_abs_obs"] <= 8.1  # Pendulum's angular velocity reaches 8

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    expected = {
        "charts/episodic_return", "charts/SPS", "memory/buffer_bytes",
        "quant/clip_fraction", "quant/max_abs_obs",
    }  # fmt: skip
    expected |= {"losses/first_ratio_error"} if name == "ppo" else {"losses/qf_loss"}
    assert expected <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag  # also with two envs that end in the same step
    (buffer_bytes, *_) = {event.value for event in events.Scalars("memory/buffer_bytes")}
    assert buffer_bytes == result["buffer_bytes"]


@both
def test_clamping_is_reported_once_with_columns_and_a_bound(name, tmp_path, capfd):
    args = tiny(name, tmp_path, quant_m=1, quant_b=2.0)
    args.total_timesteps = 2100
    result = SCRIPTS[name].main(args)["result"]
    captured = capfd.readouterr()
    text = captured.out + captured.err
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
        obs = np.array([0, 0, -300.5 * (self.step_count == 10)])
        return obs, 1.0, False, self.step_count == 20, {}


@both
@pytest.mark.parametrize("pack", [False, True])
def test_telemetry_counts_what_was_stored_and_what_was_clamped(
    name, pack, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(envs, "make", lambda _: Spike())
    monkeypatch.setattr(sac, "LOG_EVERY", 64)
    args = tiny(name, tmp_path, quant_m=2, pack=pack, quant_act=pack, run_name="run")
    args.total_timesteps = 128
    result = SCRIPTS[name].main(args)["result"]
    text = "".join(capfd.readouterr())

    # At step t, SAC has stored t observations and the first ones of episodes; PPO what it acted on.
    first = {"sac": lambda t: 1 + t // 20, "ppo": lambda t: 0}[name]
    spikes = {64: 3, 128: 6}  # after steps 10, 30, 50, 70, 90, 110
    expected = {t: count / (3 * (t + first(t))) for t, count in spikes.items()}
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    fractions = {event.step: event.value for event in events.Scalars("quant/clip_fraction")}
    assert fractions == pytest.approx(expected)
    largest = {event.step: event.value for event in events.Scalars("quant/max_abs_obs")}
    assert largest == {64: 300.5, 128: 300.5}
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
    args = tiny("sac", tmp_path, num_envs=3)
    buffer = sac.main(args)["buffer"]
    args.total_timesteps = 60  # 20 steps of each env
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
    buffer, value_of = trained["buffer"], trained["value_function"].in_numpy()
    for number, length in enumerate((3, 4, 5)):
        for t in range(20):
            episode, step = divmod(t, length)
            assert buffer.obs[t, number].tolist() == [number, episode, step]
            end = step + 1 == length
            assert buffer.ends[t, number] == end
            reward = number + 1.0
            if end and number == 1:  # truncated and not terminated
                final = np.array([[number, episode, length]], np.float32)
                reward += args.gamma * value_of(final).item()
            assert buffer.rewards[t, number].item() == pytest.approx(reward, abs=1e-5)


@both
def test_returns_are_logged_and_summed_up_per_env(name, counting, tmp_path):
    args = tiny(name, tmp_path, num_envs=3, run_name="run", eval_episodes=1)
    args.total_timesteps = 192  # 64 steps of each env
    result = SCRIPTS[name].main(args)["result"]
    ends = {}  # global_step: returns of the episodes that end there
    for number, length in enumerate((3, 4, 5)):
        for t in range(length, 65, length):
            ends.setdefault(3 * t, []).append(length * (number + 1.0))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    logged = {e.step: e.value for e in events.Scalars("charts/episodic_return")}
    assert logged == pytest.approx({step: np.mean(rets) for step, rets in ends.items()})
    last = [ret for step, rets in ends.items() if step > 0.9 * 192 for ret in rets]
    assert result["return_last_tenth"] == pytest.approx(np.mean(last))
    assert result["evaluation"] == [3.0]  # a fourth env, number 0


# --- The README ----------------------------------------------------------------------------------


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_the_readmes_commands_parse():
    checked = 0
    for command in readme_commands():
        words = command[1:] if command[0] in ("python", "./run.sh") else command
        if "--help" in words:
            continue
        if words and words[0] in ("sac.py", "ppo.py", "memory.py"):
            module = {"sac.py": sac, "ppo.py": ppo, "memory.py": memory}[words[0]]
            tyro.cli(module.Args, args=words[1:])
            checked += 1
        elif words and words[0].endswith(".py"):
            assert (ROOT / words[0]).exists()
    assert checked >= 4


@both
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as done:
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for field in SCRIPTS[name].Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text


def test_evaluate_caps_an_episode_that_never_ends(monkeypatch):
    monkeypatch.setattr(envs, "make", lambda env_id: Odd())
    assert envs.evaluate("endless", lambda obs: np.zeros(1), episodes=1, seed=0) == [10_000.0]
