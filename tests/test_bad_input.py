"""Bad command lines and bad environments: one line that names the culprit, nothing half-made.

Bad input exits with code 2 before anything is created; a fault during a run exits with code 1, and
the last good state is saved. The lines run in this process as the scripts run them; only what shows
in a process of its own, exit codes and what libraries print by themselves, is run in one.
"""

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

import memory
import ppo
import runs
import sac
import survey

ROOT = Path(sac.__file__).parent
sys.path.append(str(ROOT / "experiments"))
import ablation  # noqa: E402
import plot  # noqa: E402
import speed  # noqa: E402

ARGUED = {"sac": sac, "ppo": ppo, "memory": memory, "quantize": survey}  # through tyro
OTHERS = {"plot": plot, "ablation": ablation, "speed": speed}
BASE = {  # what each line starts with, so that a line that is not refused ends soon
    "sac": "--env Pendulum-v1 --hidden 8 --total-timesteps 64 --eval-episodes 1 "
    "--learning-starts 90 --buffer-size 500 --batch-size 16",
    "ppo": "--env Pendulum-v1 --hidden 8 --total-timesteps 64 --eval-episodes 1 "
    "--n-steps 64 --batch-size 32 --n-epochs 1",
    "quantize": "--env Pendulum-v1 --steps 50",
}
both = pytest.mark.parametrize("name", ["sac", "ppo"])
NAN, INF = float("nan"), float("inf")


def run(program: str, line: str, base: bool = True) -> dict | None:
    """What `python PROGRAM.py LINE` does, in this process."""
    words = shlex.split(f"{BASE.get(program, '') if base else ''} {line}")
    if program in OTHERS:
        return OTHERS[program].main(words)
    with runs.command(f"{program}.py"):
        return ARGUED[program].main(tyro.cli(ARGUED[program].Args, args=words))


class Odd(gym.Env):
    """Nothing wrong with it, but for what is asked for.

    Args:
        part: what goes wrong: the "obs" or "reward" of a step, all that "step" or "reset" gives,
            "make" or "close".
        at: in which step, reset, ..., counted from 1 since the env was made.
        what: is raised, if it is an exception, or given instead.
        length: of an episode, which is then truncated; None is endless.
    """

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    action_space = Box(-1, 1, (1,))

    def __init__(self, part="", at=0, what=None, *, length=None, obs_space=None, act_space=None):
        self.part, self.at, self.what, self.length = part, at, what, length
        self.observation_space = obs_space or Odd.observation_space
        self.action_space = act_space or Odd.action_space
        self.steps = self.resets = self.closes = self.episode_steps = 0
        self.odd("make", 1, None)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.episode_steps = self.resets + 1, 0
        self.obs = self.np_random.uniform(-1, 1, self.observation_space.shape)
        return self.odd("reset", self.resets, (self.obs, {}))

    def step(self, action):
        self.steps, self.episode_steps = self.steps + 1, self.episode_steps + 1
        self.obs = 0.9 * self.obs + 0.1 * np.sum(action)
        obs, reward = self.odd("obs", self.steps, self.obs), self.odd("reward", self.steps, 1.0)
        truncated = self.episode_steps == self.length
        return self.odd("step", self.steps, (obs, reward, False, truncated, {}))

    def close(self):
        self.closes += 1
        self.odd("close", self.closes, None)

    def odd(self, part, count, fine):
        if (part, count) != (self.part, self.at):
            return fine
        if isinstance(self.what, Exception):
            raise self.what.with_traceback(None)
        return self.what


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- Command lines -------------------------------------------------------------------------------

S = "--buffer-size 1000000"  # sac.py's default, so not given; with a budget it must not be
ROBOT = "--obs-dim 3 --act-dim 1"  # of memory.py
LONG = "x" * 300  # more than the 255 bytes of a name

REFUSED = [  # programs, command line, what the one line says
    # Out of range.
    ("sac ppo", "--quant-m -1", "--quant-m -1 is negative"),
    ("sac ppo", "--quant-m 8", "--quant-b 21 fits"),
    ("sac ppo", "--quant-m 10", "--quant-m is at most 9"),
    ("sac ppo", "--quant-m 2 --quant-b 0", "--quant-b 0"),
    ("sac ppo", "--quant-m 2 --quant-b -127", "--quant-b -127"),
    ("sac ppo", "--quant-m 2 --quant-b nan", "--quant-b nan is not a bound"),
    ("sac ppo", "--quant-m 2 --quant-b inf", "--quant-b inf is not a bound"),
    ("sac ppo", "--total-timesteps 0", "--total-timesteps 0 is out of range; it must be from 1 to"),
    ("sac ppo", "--total-timesteps 1000000000001", "it must be from 1 to 1000000000000"),
    ("sac ppo", "--num-envs 0", "--num-envs 0"),
    ("sac ppo", "--num-envs 1000000", "it must be from 1 to 10000"),
    ("sac ppo", "--hidden -1", "--hidden -1"),
    ("sac ppo", "--batch-size 0", "--batch-size 0"),
    ("sac ppo", "--seed -1", "--seed -1"),
    ("sac ppo", "--seed 100000000000000000000000", "--seed 1000"),
    ("sac ppo", "--gamma 1.5", "--gamma 1.5 is out of range; it must be from 0 to 1"),
    ("sac ppo", "--gamma inf", "--gamma inf"),
    ("sac ppo", "--learning-rate nan", "--learning-rate nan"),
    ("sac ppo", "--learning-rate -0.1", "--learning-rate -0.1"),
    ("sac ppo", "--eval-episodes -1", "--eval-episodes -1"),
    ("sac ppo", "--checkpoint-every -1", "--checkpoint-every -1 is out of range; it must be from"),
    ("sac", "--buffer-size 0", "--buffer-size 0"),
    ("sac", "--learning-starts -1", "--learning-starts -1"),
    ("sac", "--train-freq 0", "--train-freq 0"),
    ("sac", "--gradient-steps 0", "--gradient-steps 0"),
    ("sac", "--tau 2", "--tau 2.0"),
    ("sac", "--target-entropy nan", "--target-entropy nan"),
    ("ppo", "--n-steps 0", "--n-steps 0"),
    ("ppo", "--n-epochs 0", "--n-epochs 0"),
    ("ppo", "--gae-lambda -1", "--gae-lambda -1"),
    ("ppo", "--clip-coef nan", "--clip-coef nan"),
    ("ppo", "--vf-coef -1", "--vf-coef -1"),
    ("ppo", "--ent-coef -1", "--ent-coef -1"),
    ("ppo", "--max-grad-norm -1", "--max-grad-norm -1"),
    # More than the machine has.
    ("sac ppo", "--hidden 1000000000", "lower --hidden or --batch-size"),
    ("sac", "--buffer-size 1000000000000", "what fits: --buffer-size "),
    ("ppo", "--n-steps 1000000000000", "what fits: --n-steps "),
    ("sac", f"--memory-budget 5kB {S}", "the least is "),
    ("sac", f"--memory-budget '500 TB' {S}", "are free"),
    # No amounts of memory.
    *(
        ("sac", f"--memory-budget '{text}' {S}", repr(text))
        for text in ("", "lots", "0", "0MB", "1XB", "1e9", "nan", "inf", "1/2GB", "1 2MB")
    ),
    ("sac", f"--memory-budget=-5MB {S}", "'-5MB'"),
    # Contradictions.
    ("sac ppo", "--pack", "--pack packs fixed-point codes and does nothing without --quant-m"),
    ("sac ppo", "--pack --storage float16", "--pack"),
    ("sac ppo", "--quant-m 2 --storage float16", "drop one"),
    ("sac ppo", "--quant-m 2 --pack --storage float16", "--storage float16"),
    ("sac ppo", "--quant-b 100", "--quant-b 100 does nothing without --quant-m"),
    ("sac", "--memory-budget 1GB", "drop --buffer-size"),
    ("sac", f"--memory-budget 1GB --drop-constant {S}", "--drop-constant"),
    ("sac", "--batch-size 501", "--batch-size 501 is larger than --buffer-size 500"),
    ("ppo", "--batch-size 65", "--batch-size 65 is larger than the buffer: --n-steps 64"),
    # Devices: absent, unknown, without data, of a module that torch lacks.
    ("sac ppo", "--device cuda:99", "--device cuda:99"),
    ("sac ppo", "--device abacus", "--device abacus"),
    ("sac ppo", "--device meta", "--device meta"),
    ("sac ppo", "--device ''", "--device"),
    ("sac ppo", "--device hpu", "--device hpu is not available"),
    # Environments that cannot be made.
    ("sac ppo memory quantize", "--env Humanoid-v33", "Humanoid-v3"),  # the closest names
    ("sac ppo memory quantize", "--env ''", "unknown --env ''"),
    ("sac ppo", "--env .:x-v0", "unknown --env"),
    ("sac ppo", "--env a:b:c", "unknown --env"),
    ("sac ppo memory quantize", "--env nosuch:X-v0", "No module named 'nosuch'"),
    ("sac ppo memory quantize", "--env broken:X-v0", "broken:X-v0"),  # the module raises
    ("sac ppo", "--env CartPole-v1", "Discrete(2)"),
    ("sac ppo", "--env FrozenLake-v1", "Discrete(16)"),
    # Folders that cannot be made.
    ("sac ppo", "--run-dir file", "cannot create file/"),
    ("sac ppo", "--run-dir file/sub", "cannot create file/sub/"),
    ("sac ppo", "--run-dir /proc/sub", "cannot create /proc/sub/"),
    ("sac ppo", f"--run-dir {LONG}", "too long"),
    ("sac ppo", f"--run-name {LONG}", "too long"),
    ("sac ppo", f"--run-dir new1 --run-name {LONG}", "too long"),
    ("sac ppo", f"--run-dir new2 --run-name {LONG}/sub", "too long"),
    ("sac ppo", f"--run-dir new3 --run-name {'é' * 200}", "too long"),  # 400 bytes
    ("sac ppo", "--run-name finished", "exists; choose another --run-name"),
    ("sac ppo", "--run-name stopped", "exists; add --resume to go on with it, or choose another"),
    ("sac ppo", "--run-name bare", "exists; choose another --run-name"),
    ("sac ppo", "--run-dir . --run-name file", "exists; choose another --run-name"),
    # Nothing to resume.
    ("sac ppo", "--resume --gamma 0.9", "--resume: runs holds no checkpoint of a run with these"),
    ("sac ppo", "--resume --run-dir absent", "--resume: absent holds no checkpoint"),
    ("sac ppo", "--resume --run-dir file", "--resume: file holds no checkpoint"),
    ("sac ppo", f"--resume --run-dir {LONG}", "too long"),
    ("sac ppo", "--resume --run-name absent", "--resume: runs/absent has no checkpoint to go on"),
    ("sac ppo", f"--resume --run-name {LONG}", "too long"),
    ("sac ppo", "--resume --run-name bare", "--resume: runs/bare has no checkpoint to go on"),
    ("sac ppo", "--resume --run-name finished", "is finished; --total-timesteps beyond 64 trains"),
    ("sac ppo", "--resume --run-name busy", "another process is training runs/busy"),
    # Checkpoints that cannot be used.
    ("sac ppo", "--resume --run-name truncated", "runs/truncated/checkpoint.pt cannot be used: it"),
    ("sac ppo", "--resume --run-name flipped", "it is damaged: its SHA-256 is not that of its"),
    ("sac ppo", "--resume --run-name empty", "it cannot be read"),
    ("sac ppo", "--resume --run-name forged", "it holds other things than a checkpoint"),
    ("sac", "--resume --run-name other", "it was written by ppo.py, this is sac.py"),
    ("ppo", "--resume --run-name other", "it was written by sac.py, this is ppo.py"),
    # Checkpoints of another run.
    ("sac ppo", "--resume --run-name stopped --hidden 9", "--hidden was 8 there and is 9 here"),
    ("sac ppo", "--resume --run-name stopped --quant-m 1", "--quant-m was None there and is 1"),
    ("sac ppo", "--resume --run-name stopped --seed 2", "--seed was 1 there and is 2 here"),
    ("sac ppo", "--resume --run-name stopped --batch-size 8", "--batch-size was "),
    ("sac ppo", "--resume --run-name stopped --num-envs 2", "--num-envs was 1 there and is 2"),
    (
        "sac ppo",
        "--resume --run-name stopped --env MountainCarContinuous-v0",
        "--env was Pendulum-v1 there and is MountainCarContinuous-v0 here",
    ),
    # The tools; more of theirs in test_memory.py, test_survey.py, test_plot.py and so on.
    ("memory", f"{ROBOT} --hidden {'9' * 400}", "--hidden 9"),
    ("memory", f"{ROBOT} --buffer-size {'9' * 400}", "--buffer-size 9"),
    ("memory", f"--obs-dim {'9' * 400} --act-dim 1", "--obs-dim 9"),
    ("memory", f"{ROBOT} --control-hz inf", "--control-hz inf"),
    ("memory", f"{ROBOT} --quant-m 2 --quant-b 1e300", "--quant-b 21474836 fits"),
    ("memory", f"{ROBOT} --pack --storage float16", "--pack"),
    ("memory", "--plot /proc/fig2.png", "/proc/fig2.png"),
    ("memory", f"--plot {LONG}.png", "too long"),
    ("memory", "--plot file/fig2.png", "there is no folder file"),
    ("quantize", f"--steps 1{'0' * 15}", "--steps 1000"),
    ("quantize", f"--steps 1{'0' * 30}", "--steps 1000"),
    ("quantize", "--quant-b 0", "--quant-b 0"),
    ("plot", "", "required: {collect,draw,table}"),
    ("plot", "paint", "invalid choice: 'paint'"),
    ("plot", "collect", "required: roots"),
    ("plot", "collect . --sb3-ppo-steps many", "--sb3-ppo-steps"),
    ("plot", "collect absent", "no such folder: absent"),
    ("plot", "collect file", "no such folder: file"),
    ("plot", "table --results absent", "absent/runs.csv"),
    ("plot", "table --results binary", "binary/runs.csv is no CSV file"),
    ("plot", "table --results steps", "steps/runs.csv, line 2: steps 'many'"),
    ("plot", "draw --results steps", "steps/runs.csv, line 2: steps 'many'"),
    ("plot", "table --results returns", "returns/runs.csv, line 2: return_last_tenth 'high'"),
    ("ablation", "table --results steps", "steps/runs.csv, line 2: steps 'many'"),
    ("ablation", "table --results absent", "no CSV file in absent"),
    ("ablation", "states --steps 0", "--steps"),
    ("ablation", "states --env Ant-v33", "Ant-v3"),
    ("ablation", "errors --states absent", "no .npz file in absent"),
    ("speed", "--draw --out speed.csv", "speed.csv, line 2: ms_per_step 'slow'"),
    ("speed", "--draw --out absent.csv", "absent.csv"),
    ("speed", "--rounds 0", "--rounds"),
]

UNPARSED = [  # the same, but what tyro finds, which takes a box of several lines to say it
    ("sac ppo memory", "--quant-m two", "--quant-m"),
    ("sac ppo memory", "--hidden 8.5", "--hidden"),
    ("sac ppo", "--seed 1e3", "--seed"),
    ("sac ppo", "--gamma high", "--gamma"),
    ("sac ppo memory", "--quant-b 1,5", "--quant-b"),
    ("sac ppo memory", "--storage float7", "--storage"),
    ("sac ppo", "--checkpoint-every often", "--checkpoint-every"),
    ("sac ppo", "--resume --run-name", "--run-name"),  # without a value
    ("sac ppo", "--resume yes", "yes"),  # with one
    ("sac ppo memory quantize", "--nonsense 1", "--nonsense"),
    ("sac", "--n-steps 5", "--n-steps"),  # of ppo.py
    ("ppo", "--buffer-size 5", "--buffer-size"),  # of sac.py
    ("memory", "--algo dqn", "--algo"),
    ("quantize", "--steps many", "--steps"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """For each program a folder to be run in, with what its command lines speak of."""
    made = {name: tmp_path_factory.mktemp(name) for name in (*ARGUED, *OTHERS)}
    for folder in made.values():
        (folder / "file").write_text("precious")
        (folder / "broken.py").write_text("raise RuntimeError('no licence')")
    locks = []
    for name in ("sac", "ppo"):
        place = made[name] / "runs"
        run(name, f"--run-dir {place} --run-name finished --checkpoint-every 64")
        whole = (place / "finished/checkpoint.pt").read_bytes()
        torch.save({"format": Path()}, place / "forged.pt")
        forged = (place / "forged.pt").read_bytes()
        (place / "forged.pt").unlink()
        contents = {
            "stopped": whole,
            "busy": whole,
            "truncated": whole[: len(whole) // 2],
            "flipped": whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:],
            "empty": b"",
            "forged": forged + hashlib.sha256(forged).digest(),
        }
        for folder, content in contents.items():
            (place / folder).mkdir()
            (place / folder / "checkpoint.pt").write_bytes(content)
        locks.append(os.open(place / "busy", os.O_RDONLY))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
        (place / "bare").mkdir()
        (place / "bare" / "precious").write_text("data")
    for name, other in (("sac", "ppo"), ("ppo", "sac")):
        shutil.copytree(made[other] / "runs/stopped", made[name] / "runs/other")
    row = dict.fromkeys(plot.RUNS, "1")
    cells = {"steps": {"steps": "many"}, "returns": {"return_last_tenth": "high"}}
    for name in ("plot", "ablation"):
        for folder, change in cells.items():
            (made[name] / folder).mkdir()
            text = f"{','.join(plot.RUNS)}\n{','.join((row | change).values())}\n"
            (made[name] / folder / "runs.csv").write_text(text)
        (made[name] / "binary").mkdir()
        (made[name] / "binary/runs.csv").write_bytes(b"\x89PNG\r\n")
    row = dict.fromkeys(speed.COLUMNS, "1") | {"ms_per_step": "slow"}
    text = f"{','.join(row)}\n{','.join(row.values())}\n"
    (made["speed"] / "speed.csv").write_text(text)
    yield made
    for lock in locks:
        os.close(lock)


def one_by_one(rows: list[tuple]) -> list[tuple]:
    """Rows with one program each."""
    return [(program, *row) for programs, *row in rows for program in programs.split()]


@pytest.mark.parametrize(
    ("program", "line", "said", "one_line"),
    [(*row, True) for row in one_by_one(REFUSED)] + [(*row, False) for row in one_by_one(UNPARSED)],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_command_line_is_refused_and_leaves_no_trace(
    program, line, said, one_line, folders, monkeypatch, capfd
):
    folder = folders[program]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as for a script that lies in it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = snapshot(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as error:
        run(program, line)
    refused_in_one_line(program, said, error.value, capfd, one_line)
    assert snapshot(folder) == before


def refused_in_one_line(program, said, error, capfd, one_line=True):
    out, err = capfd.readouterr()
    assert error.code == 2 and not out
    assert said in err and "Traceback" not in err
    assert not one_line or re.fullmatch(rf"{program}\.py( \w+)?: error: .*\n", err), err


@both
def test_a_buffer_beyond_free_memory_is_refused_with_what_would_fit(
    name, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3_000)
    line = f"--run-dir {tmp_path / 'runs'} --total-timesteps 10 --hidden 2"
    with pytest.raises(SystemExit) as error:
        run(name, line)
    flag = {"sac": "--buffer-size", "ppo": "--n-steps"}[name]
    message = capfd.readouterr().err
    fits = int(re.search(rf"{flag} (\d+)", message)[1])
    assert error.value.code == 2 and message.count("\n") == 1 and fits < 64
    assert not list(tmp_path.iterdir())
    run(name, f"{line} {flag} {fits} --batch-size {min(16, fits)}")


def test_the_least_budget_that_a_refusal_names_is_enough_and_a_byte_less_is_not(tmp_path, capfd):
    def train(budget: int) -> dict:
        return run("sac", f"--run-dir {tmp_path / 'runs'} --memory-budget {budget} {S}")

    with pytest.raises(SystemExit):
        train(5_000)
    message = capfd.readouterr().err
    least, rows = map(
        int, re.search(r"least is (\d+) bytes, for --buffer-size (\d+)", message).groups()
    )
    with pytest.raises(SystemExit):
        train(least - 1)
    assert not list(tmp_path.iterdir())
    assert train(least)["buffer"].rows == rows + 1 == 16 + 1  # a batch


SHELL = [  # script, arguments, exit code, what is said, in one line?
    ("sac.py", "--env Humanoid-v2", 2, "try Humanoid-v5", True),  # Gymnasium would warn by itself
    ("ppo.py", "--env CartPole-v0", 2, "Discrete(2)", True),
    ("ppo.py", "--quant-m two", 2, "--quant-m", False),  # tyro's box
    ("sac.py", "--env odd:Odd-v0", 1, "Odd-v0 returned nan or inf in observation columns", True),
    ("experiments/plot.py", "collect absent", 2, "no such folder: absent", True),
]


@pytest.mark.parametrize(("script", "line", "code", "said", "one_line"), SHELL)
def test_from_the_shell_errors_are_one_line_and_an_exit_code(
    script, line, code, said, one_line, tmp_path
):
    (tmp_path / "odd.py").write_text(
        "import gymnasium, test_bad_input\n"
        "entry = lambda: test_bad_input.Odd('obs', 5, [0, float('nan'), 0])\n"
        "gymnasium.register('Odd-v0', entry, disable_env_checker=True)\n"
    )
    (tmp_path / "cwd").mkdir()
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, ROOT / script, *shlex.split(line)],
        cwd=tmp_path / "cwd", capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not one_line or done.stderr.count("\n") == 1, done.stderr
    assert code == 1 or (not done.stdout and not list((tmp_path / "cwd").iterdir()))


# --- Environments that are refused ----------------------------------------------------------------

IMAGE = Box(0, 255, (8, 8, 3), np.uint8)
UNSUITABLE = [  # to all programs, by their spaces: Odd's arguments, what the line says
    (dict(obs_space=IMAGE), "(8, 8, 3)"),
    (dict(obs_space=Dict(a=IMAGE)), "Dict"),
    (dict(obs_space=Discrete(16)), "Discrete(16)"),
    (dict(obs_space=MultiBinary(4)), "MultiBinary"),
    (dict(obs_space=Box(-1, 1, ())), "(), float32"),
    (dict(obs_space=Box(-1, 1, (0,))), "(0,)"),
    (dict(act_space=Discrete(2)), "Discrete(2)"),
    (dict(act_space=MultiDiscrete([2, 2])), "MultiDiscrete"),
    (dict(act_space=Box(-1, 1, (2, 2))), "(2, 2)"),
    (dict(act_space=Box(-1, 1, (0,))), "(0,)"),
    (dict(act_space=Box(-np.inf, np.inf, (2,))), "finite bounds are needed"),
    (dict(act_space=Box(np.float32([-1, 0]), np.float32([1, 0]))), "has actions"),  # low = high
]

FIRST = [  # to the scripts: what the first reset gives or raises, what the line says
    (([0, NAN, 0], {}), "returned nan or inf in observation columns [1]"),
    (([0, 0, INF], {}), "returned nan or inf in observation columns [2]"),
    ((np.zeros(2), {}), "returned observations that are no float64 of shape (3,)"),
    ((np.zeros((1, 3)), {}), "returned observations that are no float64 of shape (3,)"),
    ((np.zeros(3, complex), {}), "returned observations that are no float64"),
    ((["a", "b", "c"], {}), "returned observations that are no float64"),
    ((None, {}), "returned observations that are no float64"),
    (np.zeros(3), "raised ValueError in envs.py, line "),  # without infos, as in Gym of old
    (None, "raised TypeError in envs.py, line "),
    (RuntimeError("no licence"), "raised RuntimeError in test_bad_input.py, line "),
    (ValueError(), "raised ValueError in test_bad_input.py, line "),  # without a message
    (KeyError("two\nlines"), "raised KeyError in test_bad_input.py, line "),
]


@pytest.fixture
def register(monkeypatch) -> Callable:
    """A function that makes test/Odd-v0 be what its argument returns."""

    def register(make: Callable[[], gym.Env]) -> None:
        spec = EnvSpec("test/Odd-v0", make, disable_env_checker=True)
        monkeypatch.setitem(gym.registry, "test/Odd-v0", spec)

    return register


def refuses(program, said, tmp_path, monkeypatch, capfd):
    """Assert that test/Odd-v0 is refused."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(program, "--env test/Odd-v0")
    refused_in_one_line(program, said, error.value, capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ARGUED)
@pytest.mark.parametrize(("spaces", "said"), UNSUITABLE, ids=str)
def test_unsuitable_spaces_are_refused(
    program, spaces, said, register, tmp_path, monkeypatch, capfd
):
    register(lambda: Odd(**spaces))
    refuses(program, said, tmp_path, monkeypatch, capfd)


@both
@pytest.mark.parametrize(("what", "said"), FIRST, ids=lambda value: repr(value)[:40])
def test_a_fault_in_the_first_reset_is_refused(
    name, what, said, register, tmp_path, monkeypatch, capfd
):
    register(lambda: Odd("reset", 1, what))
    refuses(name, said, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("program", ARGUED)
@pytest.mark.parametrize("error", [RuntimeError("no licence"), OSError(2, "none"), ValueError()])
def test_an_environment_that_cannot_be_made_is_refused(
    program, error, register, tmp_path, monkeypatch, capfd
):
    register(lambda: Odd("make", 1, error))
    refuses(program, "test/Odd-v0", tmp_path, monkeypatch, capfd)


# --- Faults during the run ------------------------------------------------------------------------

WHERE = " in test_bad_input.py, line "
FAULTS = [  # which env; step or reset; what of it; what it is or raises; what the line says
    # In step 100 the episode is truncated, step 101 is in the middle of an episode and a rollout.
    ("only", 100, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
    ("only", 101, "obs", [0, 1e300, 0], "in observation columns [1] as float32"),
    ("only", 101, "obs", [INF, 0, 0], "returned nan or inf in observation columns [0]"),
    ("only", 101, "obs", [0, -INF, NAN], "returned nan or inf in observation columns [1, 2]"),
    ("only", 128, "obs", [0, 0, NAN], "in observation columns [2]"),  # last of a rollout
    ("only", 101, "obs", np.zeros(4), "returned observations that are no float64 of shape (3,)"),
    ("only", 101, "obs", np.zeros(()), "returned observations that are no float64 of shape (3,)"),
    ("only", 101, "obs", ["a", "b", "c"], "returned observations that are no float64"),
    ("only", 101, "obs", np.zeros(3, complex), "returned observations that are no float64"),
    ("only", 101, "obs", np.zeros(3, object), "returned observations that are no float64"),
    ("only", 101, "obs", None, "returned observations that are no float64"),
    ("only", 101, "reward", NAN, "returned the reward nan, which is no finite float32"),
    ("only", 101, "reward", -INF, "returned the reward -inf, which is no finite float32"),
    ("only", 101, "reward", 1e300, "returned the reward 1e+300, which is no finite float32"),
    ("only", 101, "reward", None, "raised TypeError in envs.py, line "),
    ("only", 101, "reward", np.zeros(2), "raised TypeError in envs.py, line "),
    ("only", 101, "step", (np.zeros(3), 1.0, False, {}), "expected 5, got 4"),  # Gym of old
    ("only", 101, "step", None, "raised TypeError in envs.py, line "),
    ("only", 101, "step", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("only", 65, "step", ValueError("two\nlines"), f"raised ValueError{WHERE}"),  # first of one
    ("only", 1, "step", ZeroDivisionError(), f"raised ZeroDivisionError{WHERE}"),
    ("only", 6, "reset", OSError(28, "no space"), f"raised OSError{WHERE}"),
    ("only", 6, "reset", ([0, NAN, 0], {}), "returned nan or inf in observation columns [1]"),
    ("only", 6, "reset", (np.zeros(2), {}), "returned observations that are no float64"),
    ("only", 6, "reset", None, "raised TypeError in envs.py, line "),
    ("second of 3", 101, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
    ("second of 3", 101, "reward", INF, "returned the reward inf, which is no finite float32"),
    ("second of 3", 101, "step", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("second of 3", 6, "reset", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("evaluated", 7, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
    ("evaluated", 7, "step", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("evaluated", 1, "reset", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("evaluated", 1, "make", RuntimeError("port in use"), "port in use"),
]
fault = pytest.mark.parametrize(
    ("which", "at", "part", "what", "said"), FAULTS, ids=lambda value: repr(value)[:40]
)
LENGTH = 20  # steps of an episode


@both
@fault
def test_a_fault_ends_the_run_in_one_line_and_mended_it_goes_on(
    name, which, at, part, what, said, register, tmp_path, monkeypatch, capfd
):
    count = 3 if which == "second of 3" else 1
    faulty = {"only": 0, "second of 3": 1, "evaluated": count}[which]
    made = []

    def make() -> Odd:
        made.append(Odd(*(part, at, what) * (len(made) == faulty), length=LENGTH))
        return made[-1]

    register(make)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(name, f"--env test/Odd-v0 --num-envs {count} --total-timesteps {128 * count}")
    message = error.value.code
    assert isinstance(message, str)  # which is exit code 1
    assert message.startswith(f"{name}.py: error: test/Odd-v0 ") and "\n" not in message
    assert said in message and not capfd.readouterr().err

    # Saved is what was good: of PPO the state before the rollout.
    good = LENGTH * (at - 1) if part == "reset" else at - 1
    good = {"sac": good, "ppo": good // 64 * 64}[name]
    if which == "evaluated":
        good = 128  # trained to the end
    step, command = re.search(r"saved as of step (\d+); resume with: (.*)", message).groups()
    assert int(step) == good * count
    (folder,) = Path("runs").iterdir()
    left = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    assert left == {"checkpoint.pt"}

    register(lambda: Odd(length=LENGTH))
    python, script, *words = shlex.split(command)
    assert (python, script) == (sys.executable, f"{name}.py")
    result = run(name, shlex.join(words), base=False)["result"]
    out, err = capfd.readouterr()
    assert f"{folder} from step {step} " in out
    assert result["global_step"] == 128 * count and len(result["evaluation"]) == 1
    # Only an episode that had not begun begins anew.
    assert bool(err) == (part == "reset" and which != "evaluated" and name == "sac"), err
    assert (folder / "result.json").exists() and len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize("name", ["sac", "ppo"])
def test_a_fault_in_closing_costs_nothing(name, register, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register(lambda: Odd("close", 1, RuntimeError("still open"), length=LENGTH))
    result = run(name, "--env test/Odd-v0 --total-timesteps 128")["result"]
    assert result["global_step"] == 128 and len(result["evaluation"]) == 1


@pytest.mark.parametrize(
    ("part", "what", "said"),
    [
        (part, what, said)
        for which, _, part, what, said in FAULTS
        # Which is nothing to it, as is a float64 that float32 cannot hold.
        if which == "only" and part != "reward" and "float32" not in said
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_fault_ends_the_survey_in_one_line(part, what, said, register, capfd):
    register(lambda: Odd(part, 5 if part != "reset" else 1, what))
    with pytest.raises(SystemExit) as error:
        run("quantize", "--env test/Odd-v0")
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message  # exit code 1
    assert message.startswith("quantize.py: error: test/Odd-v0 ")
    said = said.replace("envs.py", "survey.py")
    if "that are no float64" in said:
        said = "returned an observation that is "
    assert said in message
    assert capfd.readouterr() == ("", "")
