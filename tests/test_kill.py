"""Killed, interrupted or out of disk at any moment: what is lost is a few steps, and no more.

Most trainings here are forks of pytest: what a script does, but without its seconds of imports.
"""

import errno
import io
import itertools
import logging
import mmap
import multiprocessing
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import SCRIPTS, left_behind, saved_step

import sac
from support import arguments, checkpoints, envs, errors, runs

ROOT = Path(sac.__file__).parent
FORKS = multiprocessing.get_context("fork")
SEED = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
EVERY = 100  # steps from one checkpoint to the next
ENDLESS = 10**6
SMALL = {
    "sac": {"num_envs": 2, "learning_starts": 40, "buffer_size": 1000, "batch_size": 16},
    "ppo": {"n_steps": 50, "batch_size": 25, "n_epochs": 1},
}
both = pytest.mark.parametrize("name", SCRIPTS)

# Written by a fork and read by pytest: the first and the last step where training could have been
# saved, whether something has happened, whether a replaced checkpoint still takes space.
TOLD = np.frombuffer(mmap.mmap(-1, 32), np.int64)
BEGAN, STEP, FLAG, HELD = range(4)


# --- Processes -----------------------------------------------------------------------------------


class Child:
    """A process: a fork in which `what` is all that happens, or a command in ROOT."""

    def __init__(self, what: Callable[[], None] | list, folder: Path):
        self.folder, TOLD[:] = folder, -1
        if callable(what):
            self.process = FORKS.Process(target=self._become, args=(what,), daemon=True)
            self.process.start()
        else:
            with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
                env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
                self.process = subprocess.Popen(what, cwd=ROOT, stdout=out, stderr=err, env=env)

    def _become(self, job: Callable[[], None]) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        # Away with what pytest has put in the way of stderr.
        threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__
        logging.root.handlers.clear()
        job()

    @property
    def code(self) -> int | None:
        """Its exit code, minus the signal that killed it, or None while it runs."""
        return self.process.exitcode if hasattr(self.process, "exitcode") else self.process.poll()

    def until(self, condition: Callable[[], bool], ended: bool = False) -> None:
        for _ in range(6000):
            if condition():
                return
            assert ended or self.code is None, f"it ended with {self.code}: {self.err}"
            time.sleep(0.01)
        pytest.fail(f"nothing happened for a minute; {self.out} {self.err}")

    def end(self, number: int = 0) -> int:
        """Send it a signal, if any, and return its exit code."""
        if number:
            os.kill(self.process.pid, number)
        self.until(lambda: self.code is not None, ended=True)
        return self.code

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


@pytest.fixture
def start(tmp_path):
    """Makes a `Child` of what it is called with; none of them survives the test."""
    children = []

    def start(what: Callable[[], None] | list, folder: Path = tmp_path) -> Child:
        children.append(Child(what, folder))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.end()


@pytest.fixture(autouse=True)
def losses_are_logged_often(monkeypatch):
    monkeypatch.setattr(sac, "LOG_EVERY", 50)


# --- Runs ----------------------------------------------------------------------------------------


def make_args(name: str, folder: Path, **changes):
    common = {"env": "Walker2d-v3", "hidden": 8, "eval_episodes": 1, "run_dir": str(folder)}
    common |= {"run_name": "run", "checkpoint_every": EVERY}
    return SCRIPTS[name].Args(**{**common, **SMALL[name], **changes})


def before_saving(act: Callable[[runs.Run], None]) -> None:
    """Call act(run) whenever the run could be saved. Forks patch without undoing it."""
    goes_on = runs.Run.goes_on
    runs.Run.goes_on = lambda run: (act(run), goes_on(run))[1]


def train(name: str, args) -> None:
    """What the script does. Tells its steps."""

    def tell(run: runs.Run) -> None:
        # What a predecessor left half-written is gone.
        assert TOLD[BEGAN] >= 0 or not list(run.folder.path.glob("checkpoint.*.part"))
        step = run.progress.global_step
        TOLD[BEGAN], TOLD[STEP] = (step if TOLD[BEGAN] < 0 else TOLD[BEGAN]), step
        if step % EVERY == 0 and "checkpoint.pt (deleted)" in Path("/proc/self/maps").read_text():
            TOLD[HELD] = step

    before_saving(tell)
    with errors.command(f"{name}.py"):
        SCRIPTS[name].main(args)


def training(name: str, folder: Path, **changes) -> Callable[[], None]:
    return lambda: train(name, make_args(name, folder, **changes))


def never_stopped(name: str, folder: Path, total: int) -> dict:
    """What a run leaves that was saved at its beginning and end only."""
    changes = {"total_timesteps": total, "checkpoint_every": 10**12}
    SCRIPTS[name].main(make_args(name, folder / "never", **changes))
    return left_behind(folder / "never" / "run")


def assert_as_if_never_stopped(name: str, folder: Path, total: int) -> None:
    """Weights, buffer, returns and logs are those of such a run bit for bit; all files whole."""
    left = never_stopped(name, folder, total)
    assert left_behind(folder / "run") == left
    assert len(left["scalars"]["charts/episodic_return"]) > 5
    assert left["result"]["global_step"] == total


# --- SIGKILL -------------------------------------------------------------------------------------


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while(moment: str, countdown: int, share: float) -> None:
    """Let this process kill itself when it saves its countdown-th checkpoint from now on.

    Args:
        moment: while "writing" it, after that share of it; or when it is "written", but under
            another name yet; or has "replaced" its predecessor.
    """
    save, replace, write = checkpoints.save, os.replace, torch.save

    def write_in_part(content, file):
        whole = io.BytesIO()
        write(content, whole)
        file.write(whole.getvalue()[: int(share * whole.tell())])
        file.flush()
        die()

    def save_last(path, content):
        nonlocal countdown
        countdown -= 1
        if countdown == 0 and moment == "writing":
            torch.save = write_in_part
        elif countdown == 0:
            os.replace = lambda *paths: die(replace(*paths) if moment == "replaced" else None)
        save(path, content)

    checkpoints.save = save_last


MOMENTS = {
    "sac": 4 * ["anywhere"] + 2 * ["writing"] + ["written", "replaced"],
    "ppo": 7 * ["anywhere"] + 4 * ["writing"] + ["written", "replaced"],
}


def test_twenty_kills_are_tested():
    assert sum(map(len, MOMENTS.values())) > 20


@both
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(name, start, tmp_path):
    print(f"KILL_SEED={SEED} draws the same moments again")
    rng, run, saved = np.random.default_rng(SEED), tmp_path / "run", 0
    checkpoint = run / "checkpoint.pt"
    for moment in rng.permutation(MOMENTS[name]).tolist():
        countdown, share, delay = int(rng.integers(2, 5)), rng.random(), rng.uniform(0, 0.5)
        go_on = training(name, tmp_path, total_timesteps=ENDLESS, resume=checkpoint.exists())

        def job(moment=moment, countdown=countdown, share=share, go_on=go_on) -> None:
            if moment != "anywhere":
                die_while(moment, countdown, share)
            go_on()

        child = start(job)
        if moment == "anywhere":
            child.until(checkpoint.exists)  # what was killed before has nothing to resume
            time.sleep(delay)
        code = child.end(signal.SIGKILL if moment == "anywhere" else 0)
        print(f"{moment} {countdown=} {share=:.3f} {delay=:.3f} {saved=} {TOLD=} {child.out[:150]}")
        assert code == -signal.SIGKILL, child.err
        assert TOLD[BEGAN] in (-1, saved) and TOLD[HELD] == -1
        before, saved = saved, saved_step(run)
        assert before <= saved and TOLD[STEP] - saved <= EVERY
        assert moment != "replaced" or TOLD[STEP] == saved > before
    total = saved + 150
    last = start(training(name, tmp_path, total_timesteps=total, resume=True))
    assert last.end() == 0, last.err
    assert last.out.startswith(f"{run} from step {saved} on ") or not saved
    assert_as_if_never_stopped(name, tmp_path, total)


# --- A full disk ---------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file that takes `room` bytes and then behaves as on a full disk."""

    room = 0

    def write(self, data) -> int:
        fits = memoryview(data)[: self.room - self.tell()]
        if not len(fits):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fits)


@pytest.mark.parametrize("missing", ["all", "half", "the last byte"])
def test_a_checkpoint_for_which_no_space_is_left_is_told_of_once_and_made_up_for(
    missing, tmp_path, monkeypatch, capfd
):
    save, seen = checkpoints.save, []

    def save_on_full_disk(path: Path, content: dict) -> None:
        step = content["global_step"]
        if not 200 <= step < 400:
            return save(path, content)
        save(tmp_path / "whole", content)
        size = (tmp_path / "whole").stat().st_size
        room = {"all": 0, "half": size // 2, "the last byte": size - 1}
        monkeypatch.setattr(FullDisk, "room", room[missing])
        with monkeypatch.context() as patch:
            opened = lambda part, mode: io.BufferedRandom(FullDisk(part, mode))  # noqa: E731
            patch.setattr(checkpoints, "open", opened, raising=False)
            with pytest.raises(OSError, match="No space left") as error:
                save(path, content)
        assert not list(tmp_path.rglob("*.part"))
        seen.append((step, saved_step(path.parent)))
        raise error.value

    monkeypatch.setattr(checkpoints, "save", save_on_full_disk)
    sac.main(make_args("sac", tmp_path, total_timesteps=600))
    assert seen == [(200, 100), (300, 100)]
    assert capfd.readouterr().err == (
        "warning: no checkpoint of step 200 could be saved: No space left on device; the last one "
        "is of step 100\n"
    )
    assert_as_if_never_stopped("sac", tmp_path, 600)


def test_with_no_space_for_logs_training_goes_on_and_so_do_they_later(start, tmp_path):
    def limit_files(size: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def fill_and_free(run: runs.Run) -> None:
        if run.progress.global_step == 300:
            run.tensorboard.flush()
            (log,) = run.folder.path.glob("events.*")
            limit_files(log.stat().st_size + 10)
        elif run.progress.global_step == 600:
            limit_files(-1)

    def job() -> None:
        before_saving(fill_and_free)
        train("sac", make_args("sac", tmp_path, total_timesteps=1000))

    child = start(job)
    assert child.end() == 0, child.err
    left, found = never_stopped("sac", tmp_path, 1000), left_behind(tmp_path / "run")
    tag = "charts/episodic_return"
    mine, logged = (set(each.pop("scalars")[tag]) for each in (found, left))
    assert mine < logged and all(300 < step <= 600 for step, _ in logged - mine)
    assert found == left
    checkpoint, log = child.err.splitlines()
    assert checkpoint.startswith(
        "warning: no checkpoint of step 300 could be saved: File too large"
    )
    assert re.fullmatch(r"warning: TensorBoard's log ends at step \d+: File too large", log)


# --- Signals -------------------------------------------------------------------------------------


def how_it_went_on(child: Child, name: str, number: int) -> tuple[int, list[str]]:
    """The step in the one line of a run that ended by a signal, and the command there."""
    told = rf"{name}\.py: {signal.Signals(number).name}, saved as of step (\d+); resume with: "
    waits = rf"(\n{name}\.py: finishing .*\n)?"  # unless it may end at once
    line = re.fullmatch(rf"{waits}{told}(.* {name}\.py .*)\n", child.err)
    assert line, child.err
    return int(line[2]), shlex.split(line[3])


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("sac", (signal.SIGTERM, signal.SIGINT)), ("ppo", (signal.SIGINT,))],
)
def test_from_the_shell_a_signal_saves_and_the_command_it_tells_resumes(
    name, numbers, start, tmp_path
):
    args = make_args(name, tmp_path, eval_episodes=0)
    command = shlex.split(arguments.command_line(f"{name}.py", args))
    run, began = tmp_path / "run", 0
    for number in numbers:
        child = start(command)  # as it was printed
        child.until(lambda: (run / "checkpoint.pt").exists() and saved_step(run) > began)  # noqa: B023
        assert child.end(number) == 128 + number
        first = child.out.splitlines()[0]
        assert first.startswith(f"{run} {f'from step {began} ' if began else ''}on ")
        step, command = how_it_went_on(child, name, number)
        assert saved_step(run) == step > began
        began = step


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_without_checkpoints_saves_one_and_changes_nothing(name, number, start, tmp_path):
    child = start(training(name, tmp_path, total_timesteps=600, checkpoint_every=0))
    child.until(lambda: TOLD[STEP] >= 100)
    assert child.end(number) == 128 + number
    step, command = how_it_went_on(child, name, number)
    assert saved_step(tmp_path / "run") == step == TOLD[STEP]
    args = tyro.cli(SCRIPTS[name].Args, args=command[2:])
    child = start(lambda: train(name, args))
    assert child.end() == 0 and TOLD[BEGAN] == step and not child.err
    assert_as_if_never_stopped(name, tmp_path, 600)


def test_a_signal_that_was_ignored_still_is(start, tmp_path):
    """As the shell has it for Ctrl-C of what runs in the background."""

    def job() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        train("sac", make_args("sac", tmp_path, total_timesteps=600, checkpoint_every=0))

    child = start(job)
    child.until(lambda: TOLD[STEP] >= 100)
    assert child.end(signal.SIGINT) == 0 and not child.err


def test_a_signal_between_any_two_lines_that_decide_whether_to_go_on_is_obeyed(start, tmp_path):
    def signal_before_line(last: int, folder: Path) -> None:
        code, lines = runs.Run.goes_on.__code__, 0

        def trace(frame, event, _):
            nonlocal lines
            lines += event == "line"
            if event == "line" and lines == last:
                TOLD[FLAG] = frame.f_lineno
                os.kill(os.getpid(), signal.SIGTERM)
            return trace

        sys.settrace(lambda frame, *_: trace if frame.f_code is code else None)
        train("ppo", make_args("ppo", folder, total_timesteps=100))

    for last in itertools.count(1):
        folder = tmp_path / str(last)
        child = start(lambda last=last, folder=folder: signal_before_line(last, folder))
        code = child.end()
        if TOLD[FLAG] < 0:
            break
        assert code == 128 + signal.SIGTERM, f"before line {TOLD[FLAG]}: {child.err}"
        assert how_it_went_on(child, "ppo", signal.SIGTERM)[0] == saved_step(folder / "run")
    assert last > 10 and code == 0


class Stuck(gym.Wrapper):
    """Tells by TOLD[FLAG] when it is stepped for the n-th time, which takes a minute."""

    steps = 0

    def step(self, action):
        Stuck.steps += 1
        if Stuck.steps == Stuck.last:
            TOLD[FLAG] = 1
            time.sleep(60)
        return super().step(action)


def stuck_training(last: int, name: str, folder: Path, **changes) -> Callable[[], None]:
    make = envs.make

    def job() -> None:
        envs.make, Stuck.last = lambda env_id: Stuck(make(env_id)), last
        train(name, make_args(name, folder, **changes))

    return job


@both
def test_a_signal_while_evaluating_ends_at_once_and_the_evaluation_is_made_up_for(
    name, start, tmp_path
):
    changes = {"total_timesteps": 500, "checkpoint_every": EVERY if name == "sac" else 0}
    child = start(stuck_training(500 + 3, name, tmp_path, **changes))
    child.until(lambda: TOLD[FLAG] == 1)
    assert child.end(signal.SIGTERM) == 128 + signal.SIGTERM
    step, command = how_it_went_on(child, name, signal.SIGTERM)
    assert step == saved_step(tmp_path / "run") == 500
    assert not (tmp_path / "run" / "result.json").exists()
    args = tyro.cli(SCRIPTS[name].Args, args=command[2:])
    child = start(lambda: train(name, args))
    assert child.end() == 0 and TOLD[BEGAN] == 500 and not child.err
    assert_as_if_never_stopped(name, tmp_path, 500)


@both
def test_a_second_signal_kills_at_once(name, start, tmp_path):
    child = start(stuck_training(340, name, tmp_path))
    child.until(lambda: TOLD[FLAG] == 1)
    os.kill(child.process.pid, signal.SIGTERM)
    for _ in range(100):  # it waits for the environment
        time.sleep(0.001)
        assert child.code is None
    assert child.end(signal.SIGINT) == -signal.SIGINT
    assert "another signal kills" in child.err and saved_step(tmp_path / "run") == 300
    child = start(training(name, tmp_path, total_timesteps=500, resume=True))
    assert child.end() == 0 and TOLD[BEGAN] == 300


# --- Two processes -------------------------------------------------------------------------------


def test_a_run_that_is_being_trained_cannot_be_resumed_beside_that(start, tmp_path):
    first = start(training("sac", tmp_path, run_name=None))
    first.until(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    (run,) = (path.parent for path in tmp_path.glob("*/checkpoint.pt"))
    (tmp_path / "second").mkdir()
    for run_name in (None, run.name):
        go_on = training("sac", tmp_path, run_name=run_name, resume=True)
        second = start(go_on, tmp_path / "second")
        assert second.end() == 2 and not second.out
        assert second.err == f"sac.py: error: --resume: another process is training {run}\n"
    # Not by its steps: on a busy machine they run ahead of the checkpoint that is being written.
    first.until(lambda: saved_step(run) > 0)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    third = start(training("sac", tmp_path, run_name=run.name, resume=True))
    third.until(lambda: TOLD[BEGAN] > 0)
