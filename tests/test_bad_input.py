"""Bad command lines and environments of sac.py and ppo.py: one line that names the culprit.

Bad input exits with code 2 before anything is created; a fault during a run exits with code 1, and
the last good state is saved. The lines run in this process as the scripts run them; only what shows
in a process of its own, exit codes and what libraries print by themselves, is run in one.
"""

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
import tyro
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from helpers import SCRIPTS, hashed
from odd import Odd

import memory
import sac
from support import checkpoints, errors
from support.folders import LOCK, lock, unlock

ROOT = Path(sac.__file__).parent
COMMON = "--env Pendulum-v1 --hidden 8 --total-timesteps 64 --eval-episodes 1"
BASE = {  # what each line starts with, so that a line that is not refused ends soon
    "sac": f"{COMMON} --learning-starts 90 --buffer-size 500 --batch-size 16",
    "ppo": f"{COMMON} --n-steps 64 --batch-size 32 --n-epochs 1",
}
both = pytest.mark.parametrize("name", SCRIPTS)
NAN, INF = float("nan"), float("inf")


def run(name: str, line: str) -> dict:
    """What `python NAME.py LINE` does, in this process."""
    with errors.command(f"{name}.py"):
        return SCRIPTS[name].main(tyro.cli(SCRIPTS[name].Args, args=shlex.split(line)))


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All that is in a folder, but for what is locked."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


# --- Command lines -------------------------------------------------------------------------------

S = "--buffer-size 1000000"  # sac.py's default, so not given; with a budget it must not be
LONG = "x" * 300  # more than the 255 bytes of a name
BOTH, SAC, PPO = ("sac", "ppo"), ("sac",), ("ppo",)

REFUSED = [  # scripts, command line, what the one line says
    # Out of range; all ranges are in test_arguments.py.
    (BOTH, "--quant-m -1", "--quant-m -1 is negative"),
    (BOTH, "--quant-m 8", "--quant-b 21 fits"),
    (BOTH, "--quant-m 10", "--quant-m is at most 9"),
    (BOTH, "--quant-m 2 --quant-b nan", "--quant-b nan is not a bound"),
    (BOTH, "--total-timesteps 0", "--total-timesteps 0 is out of range; it must be from 1 to"),
    (BOTH, "--num-envs 1000000", "it must be from 1 to 10000"),
    (BOTH, "--seed 100000000000000000000000", "--seed 1000"),
    (BOTH, "--learning-rate nan", "--learning-rate nan"),
    (SAC, "--tau 2", "--tau 2.0 is out of range; it must be from 0 to 1"),
    (SAC, "--target-entropy nan", "--target-entropy nan"),
    (PPO, "--n-steps 0", "--n-steps 0"),
    # More than the machine has.
    (BOTH, "--hidden 1000000000", "lower --hidden or --batch-size"),
    (SAC, "--buffer-size 1000000000000", "what fits: --buffer-size "),
    (PPO, "--n-steps 1000000000000", "what fits: --n-steps "),
    (SAC, f"--memory-budget 5kB {S}", "the least is "),
    (SAC, f"--memory-budget '500 TB' {S}", "are free"),
    (SAC, f"--memory-budget lots {S}", "'lots'"),
    (SAC, f"--memory-budget=-5MB {S}", "'-5MB'"),
    # Contradictions.
    (BOTH, "--pack", "--pack packs fixed-point codes and does nothing without --quant-m"),
    (BOTH, "--quant-m 2 --storage float16", "drop one"),
    (BOTH, "--quant-b 100", "--quant-b 100 does nothing without --quant-m"),
    (SAC, "--memory-budget 1GB", "drop --buffer-size"),
    (SAC, f"--memory-budget 1GB --drop-constant {S}", "--drop-constant"),
    (SAC, "--batch-size 501", "--batch-size 501 is larger than --buffer-size 500"),
    (PPO, "--batch-size 65", "--batch-size 65 is larger than the buffer: --n-steps 64"),
    # Devices: absent, unknown, without data, of a module that torch lacks.
    (BOTH, "--device cuda:99", "--device cuda:99"),
    (BOTH, "--device meta", "--device meta"),
    (BOTH, "--device hpu", "--device hpu is not available"),
    # Environments that cannot be made.
    (BOTH, "--env Humanoid-v33", "Humanoid-v3"),  # the closest names
    (BOTH, "--env ''", "unknown --env ''"),
    (BOTH, "--env nosuch:X-v0", "No module named 'nosuch'"),
    (BOTH, "--env broken:X-v0", "broken:X-v0"),  # the module raises
    (BOTH, "--env CartPole-v1", "Discrete(2)"),
    # Folders that cannot be made.
    (BOTH, "--run-dir file", "cannot create file/"),
    (BOTH, "--run-dir /proc/sub", "cannot create /proc/sub/"),
    (BOTH, f"--run-dir {LONG}", "too long"),
    (BOTH, f"--run-dir new --run-name {LONG}/sub", "too long"),
    (BOTH, f"--run-dir new --run-name {'é' * 200}", "too long"),  # 400 bytes
    (BOTH, "--run-name ''", "--run-name is empty; leave it out for a derived name"),
    (BOTH, "--run-dir . --run-name file", "exists; choose another --run-name"),
    # Nothing to resume, or another run.
    (BOTH, "--resume --gamma 0.9", "--resume: runs holds no checkpoint of a run with these"),
    (BOTH, f"--resume --run-name {LONG}", "too long"),
    (BOTH, "--resume --run-name bare", "--resume: runs/bare has no checkpoint to go on"),
    (BOTH, "--resume --run-name finished", "is finished; --total-timesteps beyond 64 trains"),
    (BOTH, "--resume --run-name busy", "another process is training runs/busy"),
    (BOTH, "--resume --run-name truncated", "runs/truncated/checkpoint.pt cannot be used: it"),
    (SAC, "--resume --run-name other", "it was written with script ppo.py, this is script sac.py"),
    (PPO, "--resume --run-name other", "it was written with script sac.py, this is script ppo.py"),
    (BOTH, "--resume --run-name stopped --hidden 9", "--hidden was 8 there and is 9 here"),
    (BOTH, "--resume --run-name stopped --eager", "--eager was False there and is True here"),
    # Text.
    (BOTH, "--run-name caf\udce9", r"--run-name 'caf\udce9' has characters that cannot be printed"),
    (BOTH, "--run-dir 'two\nlines'", r"--run-dir 'two\nlines' has characters that cannot"),
    (BOTH, "--env 'Pendulum-v1\x1b[31m'", "--env 'Pendulum-v1\\x1b[31m' has characters"),
]

UNPARSED = [  # the same, but what tyro finds, which takes a box of several lines to say it
    (BOTH, "--quant-m two", "--quant-m"),
    (BOTH, "--storage float7", "--storage"),
    (BOTH, "--resume --run-name", "--run-name"),  # without a value
    (BOTH, "--resume yes", "yes"),  # with one
    (BOTH, "--nonsense 1", "--nonsense"),
    (SAC, "--n-steps 5", "--n-steps"),  # of ppo.py
    (PPO, "--buffer-size 5", "--buffer-size"),  # of sac.py
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """For each script a folder to be run in, with what its command lines speak of."""
    made = {name: tmp_path_factory.mktemp(name) for name in SCRIPTS}
    locks = []
    for name, folder in made.items():
        (folder / "file").write_text("precious")
        (folder / "broken.py").write_text("raise RuntimeError('no licence')")
        root = folder / "runs"
        run(name, f"{BASE[name]} --run-dir {root} --run-name finished --checkpoint-every 64")
        whole = (root / "finished/checkpoint.pt").read_bytes()
        contents = {"stopped": whole, "busy": whole, "truncated": whole[:-99], "empty": b""}
        for run_name, content in contents.items():
            (root / run_name).mkdir()
            (root / run_name / "checkpoint.pt").write_bytes(content)
        locks.append(lock(root / "busy"))
        (root / "bare").mkdir()
        (root / "bare" / "precious").write_text("data")
    for name, other in (("sac", "ppo"), ("ppo", "sac")):
        shutil.copytree(made[other] / "runs/stopped", made[name] / "runs/other")
    yield made
    for each in locks:
        unlock(each)


def one_by_one(rows: list[tuple]) -> list[tuple]:
    """Rows with one script each."""
    return [(name, *row) for names, *row in rows for name in names]


@pytest.mark.parametrize(
    ("name", "line", "said", "one_line"),
    [(*row, True) for row in one_by_one(REFUSED)] + [(*row, False) for row in one_by_one(UNPARSED)],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_command_line_is_refused_and_leaves_no_trace(
    name, line, said, one_line, folders, monkeypatch, capfd
):
    folder = folders[name]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as for a script that lies in it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = snapshot(folder)
    refused(name, f"{BASE[name]} {line}", said, capfd, one_line)
    assert snapshot(folder) == before


def refused(name, line, said, capfd, one_line=True):
    capfd.readouterr()
    with pytest.raises(SystemExit) as error:
        run(name, line)
    out, err = capfd.readouterr()
    assert error.value.code == 2 and not out
    assert said in err and "Traceback" not in err
    assert not one_line or re.fullmatch(rf"{name}\.py: error: .*\n", err), err


@both
def test_a_buffer_beyond_free_memory_is_refused_with_what_would_fit(
    name, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3_000)
    line = f"{BASE[name]} --run-dir {tmp_path / 'runs'} --total-timesteps 10 --hidden 2"
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
        line = f"{BASE['sac']} --run-dir {tmp_path / 'runs'} --memory-budget {budget} {S}"
        return run("sac", line)["result"]

    with pytest.raises(SystemExit):
        train(5_000)
    said = re.search(r"least is (\d+) bytes, for --buffer-size (\d+)", capfd.readouterr().err)
    least, rows = map(int, said.groups())
    with pytest.raises(SystemExit):
        train(least - 1)
    assert not list(tmp_path.iterdir())
    assert train(least)["buffer_size"] == rows == 16  # a batch


SHELL = [  # script, arguments, exit code, what is said, in one line?
    ("sac.py", "--env Humanoid-v2", 2, "try Humanoid-v5", True),  # Gymnasium would warn by itself
    ("ppo.py", "--quant-m two", 2, "--quant-m", False),  # tyro's box
    ("sac.py", "--env bad:Odd-v0", 1, "Odd-v0 returned nan or inf in observation columns", True),
]


@pytest.mark.parametrize(("script", "line", "code", "said", "one_line"), SHELL)
def test_from_the_shell_errors_are_one_line_and_an_exit_code(
    script, line, code, said, one_line, tmp_path
):
    (tmp_path / "bad.py").write_text(
        "import gymnasium, odd\n"
        "entry = lambda: odd.Odd('obs', 5, [0, float('nan'), 0])\n"
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


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A command line of bash in a folder, in which $RUN begins a short training."""
    run = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}"
    variables = {**os.environ, "RUN": run, **variables}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command.replace('$RUN', run)}"],
        cwd=folder, env=variables, capture_output=True, check=False,
    )  # fmt: skip


def test_output_that_nobody_reads_does_not_end_a_run(tmp_path):
    (tmp_path / "late.py").write_text(  # after step 200 --drop-constant tells of a third column
        "import gymnasium, odd\n"
        "class Late(odd.Odd):\n"
        "    def reset(self, **_): return super().reset()[0] * [1, 1, 0], {}\n"
        "    def step(self, _):\n"
        "        obs, *rest = super().step(0)\n"
        "        return obs * [1, 1, self.steps > 200], *rest\n"
        "entry = lambda: Late(length=20)\n"
        "gymnasium.register('Late-v0', entry, disable_env_checker=True)\n"
    )
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests")))
    line = (
        f"{BASE['sac']} --env late:Late-v0 --drop-constant --total-timesteps 300 --run-name piped"
    )
    done = shell(f"$RUN/sac.py {line} | head -1", tmp_path, PYTHONUNBUFFERED="1", PYTHONPATH=path)
    assert done.stdout.startswith(b"runs/piped on cpu") and done.stderr == b""
    assert (tmp_path / "runs/piped/result.json").exists() and done.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["memory.py", f"sac.py {BASE['sac']} --run-name full"])
def test_a_full_output_is_one_line_and_exit_code_1(command, unbuffered, tmp_path):
    done = shell(f"$RUN/{command} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    said = f"{command.split()[0]}: error: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr.decode()) == (1, said)
    assert command == "memory.py" or (tmp_path / "runs/full/result.json").exists()


def test_accents_are_printed_on_a_terminal_that_knows_none(tmp_path):
    line = f"{BASE['ppo']} --run-name café"
    done = shell(f"$RUN/ppo.py {line}", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"runs/caf\xe9 on cpu" in done.stdout
    assert (tmp_path / "runs/café/result.json").exists()


# --- Environments that are refused ----------------------------------------------------------------

UNUSABLE = [  # Odd's arguments, what the line says; all unsuitable spaces are in test_envs.py
    ((), {"obs_space": Discrete(16)}, "Discrete(16)"),
    ((), {"act_space": Box(-np.inf, np.inf, (2,))}, "finite bounds are needed"),
    (("make", 1, RuntimeError("no licence")), {}, "test/Odd-v0"),
    (("make", 1, OSError(2, "none")), {}, "test/Odd-v0"),
    (("reset", 1, ([0, NAN, 0], {})), {}, "returned nan or inf in observation columns [1]"),
    (("reset", 1, (np.zeros(2), {})), {}, "returned"),
    (("reset", 1, np.zeros(3)), {}, "raised ValueError in envs.py, line "),  # as in Gym of old
    (("reset", 1, RuntimeError("no licence")), {}, "raised RuntimeError in odd.py, line "),
    (("reset", 1, KeyError("two\nlines")), {}, "raised KeyError in odd.py, line "),
]


@pytest.fixture
def register(monkeypatch) -> Callable:
    """A function that makes test/Odd-v0 be what its argument returns."""

    def register(make: Callable[[], gym.Env]) -> None:
        spec = EnvSpec("test/Odd-v0", make, disable_env_checker=True)
        monkeypatch.setitem(gym.registry, "test/Odd-v0", spec)

    return register


@both
@pytest.mark.parametrize(("odd", "spaces", "said"), UNUSABLE, ids=lambda value: repr(value)[:40])
def test_an_environment_that_cannot_be_used_is_refused(
    name, odd, spaces, said, register, tmp_path, monkeypatch, capfd
):
    register(lambda: Odd(*odd, **spaces))
    monkeypatch.chdir(tmp_path)
    refused(name, f"{BASE[name]} --env test/Odd-v0", said, capfd)
    assert not list(tmp_path.iterdir())


@both
def test_spaces_that_are_missing_or_differ_between_environments_are_refused(
    name, register, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    register(gym.Env)
    refused(name, f"{BASE[name]} --env test/Odd-v0", "has observations None", capfd)
    bounds = iter((1.0, 2.0))
    register(lambda: Odd(act_space=Box(-(b := next(bounds)), b, (1,))))
    refused(name, f"{BASE[name]} --env test/Odd-v0 --num-envs 2", "cannot be used: ", capfd)
    assert not list(tmp_path.iterdir())


# --- Faults during the run ------------------------------------------------------------------------

WHERE = " in odd.py, line "
FAULTS = [  # which env; step or reset; what of it; what it is or raises; what the line says
    # In step 100 the episode is truncated, step 101 is in the middle of an episode and a rollout.
    ("only", 100, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
    ("only", 101, "obs", [0, 1e300, 0], "observation columns [1]"),
    ("only", 101, "obs", [0, -INF, NAN], "returned nan or inf in observation columns [1, 2]"),
    ("only", 128, "obs", [0, 0, NAN], "in observation columns [2]"),  # last of a rollout
    ("only", 101, "obs", np.zeros(4), "returned"),
    ("only", 101, "obs", ["a", "b", "c"], "returned"),
    ("only", 101, "obs", None, "returned"),
    ("only", 101, "reward", NAN, "returned the reward nan, which is no finite float32"),
    ("only", 101, "reward", 1e300, "returned the reward 1e+300, which is no finite float32"),
    ("only", 101, "reward", None, "raised TypeError in envs.py, line "),
    ("only", 101, "step", (np.zeros(3), 1.0, False, {}), "expected 5, got 4"),  # Gym of old
    ("only", 101, "step", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("only", 65, "step", ValueError("two\nlines"), f"raised ValueError{WHERE}"),  # first of one
    ("only", 1, "step", ZeroDivisionError(), f"raised ZeroDivisionError{WHERE}"),
    ("only", 101, "step", SystemExit(3), f"raised SystemExit{WHERE}"),
    ("only", 6, "reset", OSError(28, "no space"), f"raised OSError{WHERE}"),
    ("only", 6, "reset", ([0, NAN, 0], {}), "returned nan or inf in observation columns [1]"),
    ("second of 3", 101, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
    ("second of 3", 101, "step", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("second of 3", 6, "reset", RuntimeError("it fell"), f"raised RuntimeError{WHERE}"),
    ("evaluated", 7, "obs", [0, NAN, 0], "returned nan or inf in observation columns [1]"),
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
        made.append(Odd(*((part, at, what) if len(made) == faulty else ()), length=LENGTH))
        return made[-1]

    register(make)
    monkeypatch.chdir(tmp_path)
    line = f"{BASE[name]} --env test/Odd-v0 --num-envs {count} --total-timesteps {128 * count}"
    with pytest.raises(SystemExit) as error:
        run(name, line)
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
    assert left == {LOCK, "checkpoint.pt"}

    register(lambda: Odd(length=LENGTH))
    python, script, *words = shlex.split(command)
    assert (python, script) == (sys.executable, f"{name}.py")
    result = run(name, shlex.join(words))["result"]
    out, err = capfd.readouterr()
    assert f"{folder} from step {step} " in out
    assert result["global_step"] == 128 * count and len(result["evaluation"]) == 1
    # Only an episode that had not begun begins anew.
    assert bool(err) == (part == "reset" and which != "evaluated" and name == "sac"), err
    assert (folder / "result.json").exists() and len(list(Path("runs").iterdir())) == 1


def test_after_a_fault_ppo_takes_the_rollout_again_with_other_noise(
    register, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = f"{BASE['ppo']} --env test/Odd-v0 --checkpoint-every 64 --total-timesteps"
    register(lambda: Odd(length=LENGTH))
    run("ppo", f"{line} 64 --run-name before")
    register(lambda: Odd("step", 101, RuntimeError("it fell"), length=LENGTH))
    with pytest.raises(SystemExit):
        run("ppo", f"{line} 128 --run-name fell")
    before, fell = (
        checkpoints.load(Path(f"runs/{name}/checkpoint.pt")) for name in ("before", "fell")
    )
    assert before["global_step"] == fell["global_step"] == 64
    for name, part in before["parts"].items():
        same = hashed(part) == hashed(fell["parts"][name])
        assert same == (name != "torch_rng"), name


@both
def test_a_fault_in_closing_costs_nothing(name, register, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register(lambda: Odd("close", 1, RuntimeError("still open"), length=LENGTH))
    result = run(name, f"{BASE[name]} --env test/Odd-v0 --total-timesteps 128")["result"]
    assert result["global_step"] == 128 and len(result["evaluation"]) == 1
