"""N steps, a stop, N more: bit for bit what 2N steps give. And what ends a run at once."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import ppo
import runs
import sac
from networks import check_update

ROOT = Path(sac.__file__).parent
SCRIPTS = {"sac": sac, "ppo": ppo}
TASKS = ["Walker2d-v3", "HalfCheetah-v3", "Ant-v3", "Humanoid-v3", "Pendulum-v1"]
STORAGES = [{}, {"quant_m": 2}, {"quant_m": 2, "pack": True}]
N = 126  # a multiple of 3 envs' steps and of PPO's rollouts; Pendulum's episodes end at 200
SMALL = {
    # The buffer wraps before N, also as three rings.
    "sac": {"learning_starts": 20, "buffer_size": 90, "batch_size": 16},
    "ppo": {"n_steps": 42, "batch_size": 32, "n_epochs": 2},
}
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def losses_are_logged_often(monkeypatch):
    monkeypatch.setattr(sac, "LOG_EVERY", 50)


def make_args(name: str, folder: Path, **changes):
    fixed = {"hidden": 8, "eval_episodes": 1, "run_dir": str(folder), "total_timesteps": 2 * N}
    if name == "ppo":
        fixed["n_steps"] = 42 // changes.get("num_envs", 1)
    return SCRIPTS[name].Args(**{**SMALL[name], **fixed, **changes})


def digest(*values) -> str:
    """SHA-256 of nested tensors, arrays and plain values: equal only if all are, bit for bit."""
    sha256 = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value):
                add(key), add(value[key])
        elif isinstance(value, (list, tuple)):
            sha256.update(f"{len(value)} of".encode())
            for part in value:
                add(part)
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            value = torch.as_tensor(value).contiguous()
            sha256.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.view(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha256.update(repr(value).encode())

    add(values)
    return sha256.hexdigest()


def left_behind(name: str, trained: dict, folder: Path) -> dict[str, str]:
    """Hashes of all that training left: what is equal, and what is not, has a name."""
    result = trained["result"]
    told = ("global_step", "return_last_tenth", "evaluation", "clip_fraction", "max_abs_obs")
    found = {key: digest(result[key]) for key in told}
    # Logged values, not when and how fast they were.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for tag in set(events.Tags()["scalars"]) - {"charts/SPS"}:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
        found[tag] = digest([(event.step, event.value) for event in events.Scalars(tag)])
    adams = trained["adams"] if name == "sac" else [trained["adam"]]
    assert len(found) >= 15  # all the losses are among them
    found["adams"] = digest([adam.state() for adam in adams])
    if name == "sac":
        found |= {
            "target": digest(trained["target"].tensors),
            "buffer": digest(trained["buffer"].state()),
        }
        found["alpha"] = digest(trained["log_alpha"])
    else:
        buffer = trained["buffer"]
        arrays = {array: getattr(buffer, array) for array in buffer.layout}
        found |= {"log_std": digest(trained["log_std"]), "buffer": digest(arrays, buffer.state())}
    return found


def in_one_go(name: str, folder: Path, **changes) -> dict[str, str]:
    trained = SCRIPTS[name].main(make_args(name, folder, run_name="whole", **changes))
    return left_behind(name, trained, folder / "whole")


def in_two(name: str, folder: Path, **changes) -> dict[str, str]:
    first = {"total_timesteps": N, "checkpoint_every": N, "run_name": "halves", **changes}
    SCRIPTS[name].main(make_args(name, folder, **first))
    torch.manual_seed(0)  # a new process would begin with another state, too
    trained = SCRIPTS[name].main(make_args(name, folder, run_name="halves", resume=True, **changes))
    return left_behind(name, trained, folder / "halves")


# --- Exact resume --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("storage", STORAGES, ids=["float64", "m=2", "packed"])
@pytest.mark.parametrize("env", TASKS)
def test_n_steps_and_n_more_are_2n_steps_bit_for_bit(env, storage, num_envs, name, tmp_path):
    changes = {"env": env, "num_envs": num_envs, **storage}
    whole = in_one_go(name, tmp_path, **changes)
    assert in_two(name, tmp_path, **changes) == whole
    assert "adams" in whole and "buffer" in whole


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sac", {"quant_m": 2, "drop_constant": True, "pack": True}),
        ("sac", {"drop_constant": True, "num_envs": 3}),
        ("sac", {"quant_m": 1, "quant_b": 1.0, "quant_act": True}),  # clamps
        ("sac", {"storage": "bfloat16", "train_freq": 7, "gradient_steps": 2}),
        ("sac", {"storage": "float8_e4m3fn", "learning_starts": 150}),  # random actions go on
        ("ppo", {"quant_m": 1, "quant_b": 1.0, "quant_act": True, "ent_coef": 0.1}),
        ("ppo", {"storage": "float16", "num_envs": 2}),
    ],
    ids=str,
)
def test_other_settings_resume_exactly_too(name, changes, tmp_path, monkeypatch):
    monkeypatch.setattr("columns.LiveColumns.WATCHED", 30)
    changes = {"env": "Walker2d-v3", **changes}
    assert in_two(name, tmp_path, **changes) == in_one_go(name, tmp_path, **changes)


@both
@pytest.mark.parametrize("env", ["Walker2d-v3", "Pendulum-v1"])  # short episodes, and long ones
def test_many_stops_change_nothing_and_checkpoints_along_the_way_neither(name, env, tmp_path):
    args = {"env": env, "num_envs": 2, "quant_m": 2}
    whole = in_one_go(name, tmp_path, **args)
    for stop in (1, 43, 100, 180, 2 * N):  # PPO stops at the end of the rollout
        args |= {"run_name": "many", "checkpoint_every": 17, "total_timesteps": stop}
        trained = SCRIPTS[name].main(make_args(name, tmp_path, **args, resume=stop > 1))
    assert left_behind(name, trained, tmp_path / "many") == whole


def test_episodes_that_went_on_across_the_stop_are_logged_whole(tmp_path):
    in_two("sac", tmp_path, env="Pendulum-v1")
    events = EventAccumulator(str(tmp_path / "halves")).Reload()
    assert [event.step for event in events.Scalars("charts/episodic_length")] == [200]
    assert [event.value for event in events.Scalars("charts/episodic_length")] == [200.0]


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


class HalfRepeatable(Unrepeatable):
    """Every second one can be: it draws from np_random."""

    made = 0

    def __init__(self):
        HalfRepeatable.made += 1
        self.good = HalfRepeatable.made % 2 == 0

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.chance = self.np_random if self.good else self.chance
        return (self.chance.normal(size=3) if self.good else obs), info


@both
@pytest.mark.parametrize("kind", [Unrepeatable, HalfRepeatable])
def test_an_env_that_does_not_replay_begins_anew_and_says_so_once(
    name, kind, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(envs, "make", lambda _: kind())
    HalfRepeatable.made = 0
    common = {"num_envs": 2, "run_name": "run", "eval_episodes": 0}
    if name == "sac":
        common["buffer_size"] = 1000
    first = make_args(name, tmp_path, total_timesteps=N, checkpoint_every=N, **common)
    SCRIPTS[name].main(first)
    capfd.readouterr()
    HalfRepeatable.made = 0
    trained = SCRIPTS[name].main(make_args(name, tmp_path, resume=True, **common))
    err = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    anew = "[0, 1]" if kind is Unrepeatable else "[0]"
    assert len(err) == 1 and f"env {anew} did not replay" in err[0]
    assert "a new episode begins" in err[0]

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    lengths = [(e.step, e.value) for e in events.Scalars("charts/episodic_length")]
    # N = 126: 63 steps of each env, the second episodes are 13 steps old. An env that replays ends
    # them at 200, one that begins anew at 226; then the whole episode counts, not 13 + 50.
    expected = [(100, 50.0), (226, 50.0)] if kind is Unrepeatable else None
    expected = expected or [(100, 50.0), (200, 50.0), (226, 50.0)]
    assert lengths == expected
    if name == "sac":  # each episode has a final row, the one that was cut off as well
        finals = [3, 3] if kind is Unrepeatable else [3, 2]
        assert trained["buffer"].fill.tolist() == [126 + 1 + n for n in finals]


@both
def test_an_episode_too_long_to_replay_begins_anew(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("envs._VectorEnv.LONGEST", N - 1)
    changes = {"env": "Pendulum-v1", "run_name": "halves"}
    first = {"total_timesteps": N, "checkpoint_every": N}
    SCRIPTS[name].main(make_args(name, tmp_path, **first, **changes))
    saved = runs.load(tmp_path / "halves" / "checkpoint.pt")["state"]
    assert saved["envs"][0]["start"] is None and len(saved["envs"][0]["actions"]) == 0
    SCRIPTS[name].main(make_args(name, tmp_path, resume=True, **changes))
    assert "env [0] did not replay" in capfd.readouterr().err


@both
def test_a_finished_run_is_not_trained_again_but_evaluated_if_that_was_missed(
    name, tmp_path, monkeypatch, capfd
):
    changes = {"env": "Walker2d-v3", "run_name": "run", "checkpoint_every": 1000}
    SCRIPTS[name].main(make_args(name, tmp_path, **changes))
    with pytest.raises(SystemExit) as refused:
        SCRIPTS[name].main(make_args(name, tmp_path, resume=True, **changes))
    assert refused.value.code == 2 and "is finished" in capfd.readouterr().err
    whole = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed in the evaluation
    again = SCRIPTS[name].main(make_args(name, tmp_path, resume=True, **changes))["result"]
    assert whole["return_last_tenth"] is not None
    for key in set(whole) - {"ms_per_step", "rss_bytes", "peak_rss_bytes", "args"}:
        assert again[key] == whole[key], key


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@both
def test_what_was_trained_is_saved_if_the_end_fails(name, tmp_path, monkeypatch):
    """As when result.json does not fit on the disk, or the output is a pipe that was closed."""
    whole = in_one_go(name, tmp_path, env="Walker2d-v3")
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="No space left") as stopped,
    ):
        patch.setattr(runs.Run, "finish", no_space)
        in_one_go(name, tmp_path / "again", env="Walker2d-v3")
    assert "saved as of step 252; resume with: " in stopped.value.code
    args = make_args(name, tmp_path / "again", env="Walker2d-v3", run_name="whole", resume=True)
    trained = SCRIPTS[name].main(args)
    found = left_behind(name, trained, tmp_path / "again" / "whole")
    assert {key for key in whole if found[key] != whole[key]} <= {"buffer"}  # PPO's is not saved


def test_a_warning_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.tqdm, "write", no_space)
    args = make_args("sac", tmp_path, env="Pendulum-v1", quant_m=1, quant_b=2.0)
    assert sac.main(args)["result"]["clamped"]


# --- Determinism ---------------------------------------------------------------------------------


@both
def test_the_same_seed_gives_the_same_run_and_another_one_another(name, tmp_path):
    changes = {"env": "Walker2d-v3", "quant_m": 2}
    first, again, other = (
        in_one_go(name, tmp_path / str(i), seed=seed, **changes) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first["adams"] != other["adams"] and first["evaluation"] != other["evaluation"]


THREADS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import test_resume
threads = int(sys.argv[4])
torch.set_num_threads(threads)
hidden = int(sys.argv[5])
args = test_resume.make_args(sys.argv[3], test_resume.Path(sys.argv[6]), env="Humanoid-v3",
    quant_m=2, hidden=hidden, eval_episodes=0, batch_size=64,
    **({} if sys.argv[3] == "sac" else {"n_steps": 84}))
trained = test_resume.SCRIPTS[sys.argv[3]].main(args)
adams = trained["adams"] if sys.argv[3] == "sac" else [trained["adam"]]
print(torch.get_num_threads(), test_resume.digest([adam.state() for adam in adams]))
"""


@both
def test_runs_agree_across_processes_for_each_number_of_threads(name, tmp_path):
    """Two threads may add up in another order than one: so each is held against itself."""

    def run(number: int, threads: int, hidden: int) -> list[str]:
        words = [ROOT, ROOT / "tests", name, threads, hidden, tmp_path / str(number)]
        code = [sys.executable, "-c", THREADS, *map(str, words)]
        done = subprocess.run(code, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1].split()

    # Large enough for set_threads to leave the number of threads alone,
    first, again = run(1, 2, 256), run(2, 2, 256)
    assert first == again and first[0] == "2"
    assert run(3, 1, 256) == run(4, 1, 256)
    # and so small that it takes one: then the number asked for does not matter.
    assert run(5, 1, 8) == run(6, 2, 8)


# --- Numbers stay finite -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        (float("nan"), [0.0, 1.0]),
        (float("inf"), [0.0, 1.0]),
        (1.0, [0.0, float("nan")]),
        (1.0, [float("-inf"), float("inf")]),
        (1.0, [1e20, 0.0]),  # its square, which Adam keeps, is inf
    ],
)
def test_check_update_refuses_what_would_spread(loss, gradient):
    with pytest.raises(FloatingPointError, match="at step 7 the loss of us is"):
        check_update("us", torch.tensor(loss), torch.tensor(gradient), 7)


def test_check_update_lets_finite_numbers_pass():
    check_update("us", torch.tensor(-1e30), torch.tensor([1e18, -1e18, 0.0]), 7)


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
    args = make_args(name, tmp_path, run_name="run", checkpoint_every=every, batch_size=32)
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main(args)
    message = stopped.value.code
    # SAC meets it as soon as it is drawn; PPO after the rollout of steps 85 to 126.
    step = int(message.split("at step ")[1].split()[0])
    assert 100 <= step < 126 if name == "sac" else step == 126
    assert f"{name}.py: error: at step " in message and "is inf" in message
    path = tmp_path / "run" / "checkpoint.pt"
    if every:
        assert "saved as of step 84; resume with: " in message
        saved = runs.load(path)["state"]
        assert saved["global_step"] == 84
        adam = saved["actor" if name == "sac" else "adam"]
        assert adam["vectors"].isfinite().all()
    else:
        assert "no checkpoint was saved" in message and not path.exists()
    assert not (tmp_path / "run" / "result.json").exists()


BROKEN = [
    ("sac", "critic_loss_gradient", "the critics"),
    ("sac", "alpha_loss_gradient", "actor and alpha"),
    ("sac", "squash_gradient", "actor and alpha"),
    ("sac", "actor_loss", "actor and alpha"),  # only the loss: its gradient does not show it
    ("ppo", "gaussian_log_prob", "the values"),  # and so the ratio
    ("ppo", "gaussian_log_prob_gradient", "the values"),
    ("ppo", "value_loss_gradient", "the values"),
    ("ppo", "value_loss", "the values"),
]


@pytest.mark.parametrize(("name", "function", "whose"), BROKEN)
def test_nan_in_any_loss_or_gradient_stops_at_that_update(
    name, function, whose, tmp_path, monkeypatch
):
    module, calls = SCRIPTS[name], []
    right = getattr(module, function)

    def wrong(*arguments):
        calls.append(1)
        result = right(*arguments)
        if len(calls) < 3:
            return result
        bad = [part * float("nan") for part in (result if isinstance(result, tuple) else [result])]
        return tuple(bad) if isinstance(result, tuple) else bad[0]

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(SystemExit, match=f"the loss of {whose} is .*nan"):
        module.main(make_args(name, tmp_path, env="Pendulum-v1"))
    assert len(calls) == 3  # the third one was the last
