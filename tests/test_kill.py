"""Killed, interrupted or out of disk at any moment: what is lost is a few steps, and no more.

Most trainings here are forks of pytest: what a script does, but without its 3 s of imports.
"""

import contextlib
import ctypes
import errno
import io
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from test_resume import left_behind

import envs
import ppo
import runs
import sac

ROOT = Path(sac.__file__).parent
SCRIPTS = {"sac": sac, "ppo": ppo}
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
# saved, bytes of a checkpoint that was cut short, whether something has happened, and whether a
# checkpoint that was replaced still takes space.
TOLD = np.frombuffer(mmap.mmap(-1, 40), np.int64)
BEGAN, STEP, BYTES, FLAG, HELD = range(5)


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

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(6000):
            if condition():
                return
            assert self.code is None, f"it ended with {self.code}: {self.err}"
            time.sleep(0.01)
        pytest.fail(f"nothing happened for a minute; {self.out} {self.err}")

    def end(self, number: int = 0) -> int:
        """Send it a signal, if any, and return its exit code."""
        if number:
            os.kill(self.process.pid, number)
        for _ in range(6000):
            if self.code is not None:
                return self.code
            time.sleep(0.01)
        return pytest.fail(f"it still runs after a minute; {self.out} {self.err}")

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


def before_saving(act: Callable[[runs.Run, int], None]) -> None:
    """Call act(run, step) whenever the run could be saved. Forks patch without undoing it."""
    goes_on = runs.Run.goes_on

    def act_first(run: runs.Run, step: int) -> bool:
        act(run, step)
        return goes_on(run, step)

    runs.Run.goes_on = act_first


def train(name: str, args) -> None:
    """What the script does. Tells its steps, and writes left.json beside the run."""

    def tell(run: runs.Run, step: int) -> None:
        # What a predecessor left half-written is gone.
        assert TOLD[BEGAN] >= 0 or not list(run.place.folder.glob("checkpoint.*.part"))
        TOLD[BEGAN], TOLD[STEP] = (step if TOLD[BEGAN] < 0 else TOLD[BEGAN]), step
        if step % EVERY == 0 and "checkpoint.pt (deleted)" in Path("/proc/self/maps").read_text():
            TOLD[HELD] = step

    before_saving(tell)
    with runs.command(f"{name}.py"):
        trained = SCRIPTS[name].main(args)
    write_left_behind(name, trained, Path(args.run_dir))


def write_left_behind(name: str, trained: dict, folder: Path) -> None:
    logging.disable()  # TensorBoard's reader tells of the steps that were repeated
    left = left_behind(name, trained, folder / "run")
    (folder / "left.json").write_text(json.dumps(left))
    logging.disable(logging.NOTSET)


def training(name: str, folder: Path, **changes) -> Callable[[], None]:
    return lambda: train(name, make_args(name, folder, **changes))


def saved_step(folder: Path) -> int:
    return runs.load(folder / "run" / "checkpoint.pt")["state"]["global_step"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every tag, as TensorBoard reads them; of the speed steps only."""
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert all(a < b for a, b in itertools.pairwise(steps)), f"{tag}: {steps}"
        values = [0.0 if tag == "charts/SPS" else event.value for event in events.Scalars(tag)]
        found[tag] = list(zip(steps, values, strict=True))
    return found


def never_stopped(name: str, folder: Path, total: int) -> tuple[dict, dict]:
    """What a run leaves that was not even saved: hashes, and `scalars`."""
    args = make_args(name, folder / "never", total_timesteps=total, checkpoint_every=0)
    trained = SCRIPTS[name].main(args)
    return left_behind(name, trained, folder / "never" / "run"), scalars(folder / "never")


def assert_as_if_never_stopped(name: str, folder: Path, total: int) -> None:
    """Weights, buffer, returns and logs are those of such a run bit for bit; all files whole."""
    left, logged = never_stopped(name, folder, total)
    found = json.loads((folder / "left.json").read_text())
    if name == "ppo" and TOLD[BEGAN] == total:  # it had no rollout any more
        del found["buffer"], left["buffer"]
    assert found == left
    assert scalars(folder) == logged
    assert len(logged["charts/episodic_return"]) > 5
    assert json.loads((folder / "run" / "result.json").read_text())["global_step"] == total
    assert not list(folder.rglob("*.part"))


# --- SIGKILL -------------------------------------------------------------------------------------


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while(moment: str, countdown: int, share: float) -> None:
    """Let this process kill itself when it saves its countdown-th checkpoint from now on.

    Args:
        moment: while "writing" it, after that share of it; or when it is "written", but under
            another name yet; or has "replaced" its predecessor. Or after "renaming" the first log
            of a run that is resumed, or when the "result" is written, but under another name yet.
    """
    save, replace, rename, write = runs.save, os.replace, Path.rename, RecordWriter.write

    def write_in_part(self, data):
        room = int(TOLD[BYTES]) - self.file.tell()
        self.file.write(data[:room])
        if len(data) > room:
            self.file.flush()
            die()

    def replace_last(part, path):
        if moment == "replaced" or (moment == "result" and path.name != "result.json"):
            replace(part, path)
        if moment != "result" or path.name == "result.json":
            die()

    def save_last(path, content):
        nonlocal countdown
        countdown -= 1
        if countdown == 0 and moment == "writing":
            whole = io.BytesIO()
            torch.save(content, whole)
            TOLD[BYTES] = int(share * whole.tell())
            runs._Hashing.write = write_in_part
        elif countdown == 0:
            os.replace = replace_last
        save(path, content)

    if moment == "renaming":
        Path.rename = lambda path, to: die(rename(path, to))
    elif moment == "result":
        os.replace = replace_last
    elif moment in ("writing", "written", "replaced"):
        runs.save = save_last
        # A log that lags behind is waited for.
        RecordWriter.write = lambda log, data: (time.sleep(0.005), write(log, data))


MOMENTS = {  # between the first kill and the last one
    "sac": 5 * ["anywhere"] + 4 * ["writing"] + ["written", "replaced", "renaming"],
    "ppo": ["anywhere", "writing", "writing", "written", "replaced"],
}


def test_twenty_kills_are_tested():
    assert sum(2 + len(moments) for moments in MOMENTS.values()) > 20


@both
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(name, start, tmp_path):
    print(f"KILL_SEED={SEED} draws the same moments again")
    rng, checkpoint = np.random.default_rng(SEED), tmp_path / "run" / "checkpoint.pt"
    part, saved = checkpoint.with_name("checkpoint.pt.part"), 0
    for moment in ["anywhere", *rng.permutation(MOMENTS[name]).tolist(), "result"]:
        countdown, share, delay = int(rng.integers(1, 4)), rng.random(), rng.uniform(0, 0.5)
        total = saved + 150 if moment == "result" else ENDLESS
        go_on = training(name, tmp_path, total_timesteps=total, resume=checkpoint.exists())

        def job(moment=moment, countdown=countdown, share=share, go_on=go_on) -> None:
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
        if child.out and saved:
            assert child.out.splitlines()[0].startswith(f"{tmp_path / 'run'} from step {saved} on ")
        before, saved = saved, saved_step(tmp_path)
        assert before <= saved and TOLD[STEP] - saved <= EVERY
        if moment == "writing":
            assert part.stat().st_size == TOLD[BYTES] and TOLD[STEP] > saved
        elif moment == "written":
            assert runs.load(part)["state"]["global_step"] == TOLD[STEP] > saved
        elif moment == "replaced":
            assert not part.exists() and TOLD[STEP] == saved > before
        elif moment == "result":
            assert (tmp_path / "run" / "result.json.part").exists() and saved == total
    last = start(training(name, tmp_path, total_timesteps=total, resume=True))
    assert last.end() == 0, last.err
    assert saved_step(tmp_path) == total
    assert_as_if_never_stopped(name, tmp_path, total)


def records(log: bytes) -> list[int]:
    """Lengths of the records of a log: a length, its checksum, the data, their checksum."""
    lengths = []
    while sum(lengths) < len(log):
        lengths.append(16 + struct.unpack_from("<Q", log, sum(lengths))[0])
    return lengths


@both
def test_a_torn_log_reads_and_logs_keep_their_order_when_the_clock_goes_back(name, start, tmp_path):
    print(f"KILL_SEED={SEED} draws the same bytes again")
    rng, total, later = np.random.default_rng(SEED), 900, [9999999999, 9999999998]

    def job() -> None:
        log_episodes, episodes = runs.Run.log_episodes, []

        def die_after_logging(run, returns, lengths, step):
            log_episodes(run, returns, lengths, step)
            episodes.append(step)
            if len(episodes) > 3 and step > run.saved_step > TOLD[BEGAN]:
                run.writer.flush()
                die()

        if later:
            runs.Run.log_episodes = die_after_logging
        train(name, make_args(name, tmp_path, total_timesteps=total, resume=len(later) < 2))

    while later:
        assert start(job).end() == -signal.SIGKILL
        logs = sorted((tmp_path / "run").glob("events.*"), key=lambda log: log.stat().st_mtime_ns)
        log, torn = logs[-1].read_bytes(), tmp_path / "torn" / "run" / logs[-1].name
        *_, last = records(log)
        torn.parent.mkdir(parents=True, exist_ok=True)
        torn.write_bytes(log[:-last])
        whole = scalars(tmp_path / "torn")
        for cut in {1, 4, 5, last - 13, last - 12, last - 8, last - 1}:
            torn.write_bytes(log[:-cut])
            assert scalars(tmp_path / "torn") == whole
        torn.write_bytes(log)
        assert scalars(tmp_path / "torn") != whole
        torn.unlink()
        cut = int(rng.integers(1, last))
        logs[-1].write_bytes(log[:-cut])
        logs[-1].rename(logs[-1].with_name(f"events.out.tfevents.{later.pop(0)}.host.1.0"))
        scalars(tmp_path)
    assert start(job).end() == 0
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


@both
@pytest.mark.parametrize("missing", ["all", "half", "the last byte"])
def test_a_checkpoint_for_which_no_space_is_left_is_told_of_once_and_made_up_for(
    name, missing, tmp_path, monkeypatch, capfd
):
    save, seen = runs.save, []

    def save_on_full_disk(path: Path, content: dict) -> None:
        step = content["state"]["global_step"]
        if not 200 <= step < 400:
            return save(path, content)
        whole = io.BytesIO()
        torch.save(content, whole)
        size = whole.tell() + runs.DIGEST
        monkeypatch.setattr(
            FullDisk, "room", {"all": 0, "half": size // 2, "the last byte": size - 1}[missing]
        )
        with monkeypatch.context() as patch:
            opened = lambda part, mode: io.BufferedWriter(FullDisk(part, mode))  # noqa: E731
            patch.setattr(runs, "open", opened, raising=False)
            with pytest.raises(OSError, match="No space left") as error:
                save(path, content)
        assert not list(tmp_path.rglob("*.part"))
        seen.append((step, saved_step(tmp_path)))
        raise error.value

    monkeypatch.setattr(runs, "save", save_on_full_disk)
    args = make_args(name, tmp_path, total_timesteps=600)
    trained = SCRIPTS[name].main(args)
    assert seen == [(200, 100), (300, 100)]
    assert capfd.readouterr().err == (
        "warning: no checkpoint of step 200 could be saved: No space left on device; the last one "
        "is of step 100\n"
    )
    write_left_behind(name, trained, tmp_path)
    assert_as_if_never_stopped(name, tmp_path, 600)


CANNOT_MOUNT = 77


def mount_tmpfs(folder: Path, size: int) -> None:
    """An empty file system of that many bytes, which only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private = 0x20000, 0x10000000, 0x44000

    def call(function: str, *args) -> None:
        if getattr(libc, function)(*args):
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    try:
        ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
        if libc.unshare(new_namespace):  # not root
            call("unshare", new_namespace | new_user)
            Path("/proc/self/setgroups").write_text("deny")
            for file, number in ids.items():
                Path("/proc/self", file).write_text(f"0 {number} 1")
        folder.mkdir(exist_ok=True)
        call("mount", b"none", b"/", None, private, None)
        call("mount", b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode())
    except OSError as error:
        print(error, file=sys.stderr)
        raise SystemExit(CANNOT_MOUNT) from None


def reached_its_end(child: Child) -> bool:
    """False, with a warning, where no file system could be mounted."""
    if child.end() == CANNOT_MOUNT:
        warnings.warn(f"no tmpfs, so a full disk was only simulated: {child.err}", stacklevel=2)
        return False
    assert child.code == 0, child.err
    return True


WHY = {"RLIMIT_FSIZE": "File too large", "tmpfs": "No space left on device"}


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("full", WHY)
def test_with_no_space_for_checkpoints_training_ends_and_the_last_one_stays(full, start, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"

    def job() -> None:
        save = runs.save

        def limit_after_saving(path: Path, content: dict) -> None:
            save(path, content)
            if content["state"]["global_step"] == 200:
                limit_files(path.stat().st_size)

        if full == "tmpfs":
            mount_tmpfs(disk, 250_000)
        else:
            runs.save = limit_after_saving
        train("sac", make_args("sac", disk, total_timesteps=1000))
        shutil.copytree(disk, kept)

    child = start(job)
    if not reached_its_end(child):
        return
    told = rf"warning: no checkpoint of step (\d+) could be saved: {WHY[full]}; the last one is of "
    failed, last = map(int, re.fullmatch(rf"{told}step (\d+)\n", child.err).groups())
    assert last == saved_step(kept) == failed - EVERY < 900
    assert not list(kept.rglob("*.part"))
    assert json.loads((kept / "run" / "result.json").read_text())["global_step"] == 1000
    child = start(training("sac", kept, total_timesteps=1200, resume=True))
    assert child.end() == 0 and TOLD[BEGAN] == last and not child.err
    assert_as_if_never_stopped("sac", kept, 1200)


@pytest.mark.parametrize("full", WHY)
def test_with_no_space_for_logs_training_goes_on_and_so_do_they_later(full, start, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"

    def fill_and_free(run: runs.Run, step: int) -> None:
        if step == 300:
            run.writer.flush()
            limit_files(run._logs()[0].stat().st_size + 10 if full == "RLIMIT_FSIZE" else -1)
            with contextlib.suppress(OSError), open(disk / "filler", "wb", 0) as filler:
                while full == "tmpfs":
                    filler.write(bytes(4096))
        elif step == 600:
            limit_files(-1)
            (disk / "filler").unlink()

    def job() -> None:
        if full == "tmpfs":
            mount_tmpfs(disk, 2**20)
        before_saving(fill_and_free)
        train("sac", make_args("sac", disk, total_timesteps=1000))
        shutil.copytree(disk, kept)

    child = start(job)
    if not reached_its_end(child):
        return
    left, logged = never_stopped("sac", tmp_path, 1000)
    mine, tag = dict(scalars(kept)), "charts/episodic_return"
    missing = {step for step, _ in set(logged[tag]) - set(mine[tag])}
    assert set(mine[tag]) < set(logged[tag]) and missing
    assert all(300 < step <= 600 for step in missing)
    assert saved_step(kept) == 1000
    assert json.loads((kept / "left.json").read_text())["adams"] == left["adams"]
    assert not list(kept.rglob("*.part"))
    checkpoint, log = child.err.splitlines()
    assert checkpoint.startswith(
        f"warning: no checkpoint of step 300 could be saved: {WHY[full]}; "
    )
    assert re.fullmatch(rf"warning: TensorBoard's log ends at step \d+: {WHY[full]}", log)


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
    [("sac", (signal.SIGTERM, signal.SIGINT)), ("ppo", (signal.SIGINT, signal.SIGTERM))],
)
def test_from_the_shell_a_signal_saves_and_the_command_it_tells_resumes(
    name, numbers, start, tmp_path
):
    args = make_args(name, tmp_path, eval_episodes=0)
    command = shlex.split(runs.command_line(f"{name}.py", args))
    checkpoint, began = tmp_path / "run" / "checkpoint.pt", 0
    for number in numbers:
        child = start(command)  # as it was printed
        child.until(lambda: checkpoint.exists() and saved_step(tmp_path) > began)  # noqa: B023
        assert child.end(number) == 128 + number
        first = child.out.splitlines()[0]
        assert first.startswith(f"{tmp_path / 'run'} {f'from step {began} ' if began else ''}on ")
        step, command = how_it_went_on(child, name, number)
        assert saved_step(tmp_path) == step > began
        began = step


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_without_checkpoints_saves_one_and_changes_nothing(name, number, start, tmp_path):
    child = start(training(name, tmp_path, total_timesteps=600, checkpoint_every=0))
    child.until(lambda: TOLD[STEP] >= 100)
    assert child.end(number) == 128 + number
    step, command = how_it_went_on(child, name, number)
    assert saved_step(tmp_path) == step == TOLD[STEP]
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
        assert how_it_went_on(child, "ppo", signal.SIGTERM)[0] == saved_step(folder)
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
@pytest.mark.parametrize("every", [0, EVERY])
def test_a_signal_while_evaluating_ends_at_once_and_the_evaluation_is_made_up_for(
    name, every, start, tmp_path
):
    changes = {"total_timesteps": 500, "checkpoint_every": every}
    child = start(stuck_training(500 + 3, name, tmp_path, **changes))
    child.until(lambda: TOLD[FLAG] == 1)
    assert child.end(signal.SIGTERM) == 128 + signal.SIGTERM
    step, command = how_it_went_on(child, name, signal.SIGTERM)
    assert step == saved_step(tmp_path) == 500
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
    assert "another signal kills" in child.err and saved_step(tmp_path) == 300
    child = start(training(name, tmp_path, total_timesteps=500, resume=True))
    assert child.end() == 0 and TOLD[BEGAN] == 300
    assert_as_if_never_stopped(name, tmp_path, 500)


# --- Two processes -------------------------------------------------------------------------------


@both
def test_a_run_that_is_being_trained_cannot_be_resumed_beside_that(name, start, tmp_path):
    first = start(training(name, tmp_path, run_name=None))
    first.until(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    (run,) = (path.parent for path in tmp_path.glob("*/checkpoint.pt"))
    (tmp_path / "second").mkdir()
    for run_name in (None, run.name):
        go_on = training(name, tmp_path, run_name=run_name, resume=True)
        second = start(go_on, tmp_path / "second")
        assert second.end() == 2 and not second.out
        assert second.err == f"{name}.py: error: --resume: another process is training {run}\n"
    reached = TOLD[STEP]
    first.until(lambda: TOLD[STEP] > reached + EVERY)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    third = start(training(name, tmp_path, run_name=run.name, resume=True))
    third.until(lambda: TOLD[BEGAN] > 0)
