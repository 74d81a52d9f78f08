"""What a run is besides learning: its folder, its checkpoints, and whatever may end it early.

    with Run("sac.py", args, device, place, state, anew) as run:
        while run.goes_on(global_step):    # saves state(), a dict, whenever a checkpoint is due
            ...
            run.log("losses/qf_loss", loss, global_step)

A checkpoint is one file: what `torch.save` writes of tensors and plain Python values, streamed
without a copy, and the SHA-256 of that. It takes its predecessor's place when all of it is on disk.
No simulator is saved: the running episodes are replayed, see `envs.py`.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import EnvironmentFault
from quantize import Clamp

FORMAT = 1  # of checkpoints; raise it when what `state` returns changes its meaning
DIGEST = hashlib.sha256().digest_size  # bytes at a checkpoint's end
VERSIONS = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}
FORGED = "it holds other things than a checkpoint of this program, or code"
# What may differ between a run and its resumption; not in the names of runs, either.
MAY_DIFFER = (
    "total_timesteps",
    "eval_episodes",
    "run_dir",
    "run_name",
    "checkpoint_every",
    "resume",
)


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` once all is on disk, or leaves no trace."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashing:
    """A file that only `torch.save` writes to. Keeps the SHA-256, and why a write failed."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data: memoryview) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch would only tell of an unexpected position
            raise

    def flush(self) -> None:
        self.file.flush()


def plain(value: Any, name: str) -> Any:
    """The same in tensors and plain Python values, which are all that `load` takes.

    Raises:
        TypeError: what cannot be said so, by name. Of an array `torch.from_numpy(a.copy())` can.
    """
    if isinstance(value, dict):
        return {key: plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if type(value) not in (torch.Tensor, int, float, str, bool, type(None)):
        raise TypeError(f"{name} is {type(value)}, which a checkpoint cannot hold")
    return value


def save(path: Path, content: dict) -> None:
    """Write a checkpoint, or leave the file of that name as it was.

    Tensors are streamed from their storages, each of them whole: of a part of a tensor the caller
    makes one with a storage of its own, as `columns.stored` does without a copy.

    Raises:
        OSError: it cannot be written; no space is left, for example.
        TypeError: see `plain`.
    """
    content = plain(content, "it")
    with replacing(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(content, hashing)
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(hashing.sha256.digest())


def load(path: Path) -> dict:
    """What `save` wrote; its tensors are read from the file when they are first used.

    Raises:
        ValueError: what is wrong with it, about "it": damaged, not ours, or more than data.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            digest = hashlib.sha256(memoryview(data)[:-DIGEST]).digest()
            whole = digest == data[-DIGEST:]
    except (OSError, ValueError) as error:  # mmap: of an empty file
        raise ValueError(f"it cannot be read: {error}") from None
    if not whole:
        raise ValueError("it is damaged: its SHA-256 is not that of its content")
    try:  # weights_only: a checkpoint from a stranger must not run code
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever torch makes of a file that was forged
        raise ValueError(FORGED) from None
    if not isinstance(content, dict):
        raise ValueError(FORGED)
    return content


def check_like(saved: Any, now: Any, name: str) -> None:
    """Raise ValueError naming what in a checkpoint is of another kind than `now`, what is here.

    Keys, types, dtypes and the lengths of vectors must agree, and no int may be negative. The rest
    is for those to judge who load it: lists, tables, and what is None or empty now.
    """
    if now is None or (now == {} and isinstance(saved, dict)):
        return
    shown = [
        f"{part.dtype} {tuple(part.shape)}" if isinstance(part, torch.Tensor) else f"{type(part)}"
        for part in (saved, now)
    ]
    fits = type(saved) is type(now)
    if fits and isinstance(now, torch.Tensor):
        fits = saved.dtype == now.dtype
        fits &= saved.shape == now.shape or now.ndim > 1 or now.numel() == 0
    if not fits:
        raise ValueError(f"{name} is {shown[0]} there and {shown[1]} here")
    if isinstance(now, int) and not 0 <= saved < 2**128:  # of a random generator's state
        raise ValueError(f"{name} is {'below 0' if saved < 0 else 'too large'}")
    if isinstance(now, dict):
        for key in saved.keys() ^ now.keys():
            raise ValueError(f"{name} has {'no ' if key in now else 'a '}{key}, other than here")
        for key, part in now.items():
            check_like(saved[key], part, f"{name}[{key!r}]")


# --- Command line ---------------------------------------------------------------------------------


@contextlib.contextmanager
def command(script: str) -> Iterator[None]:
    """Around a whole program: what may end it before a `Run` has begun, as one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        why = _of_the_machine(error)
        if why is None:
            raise
        raise SystemExit(f"{script}: error: {why}") from None


def _of_the_machine(error: BaseException | None) -> str | None:
    """What the machine could not give, as one line; None if the error is another one."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's
        return f"out of memory: {error}; `python memory.py --budget` tells what fits"
    return str(error) if isinstance(error, OSError) else None


@contextlib.contextmanager
def refusing(script: str) -> Iterator[None]:
    """Turn bad input, ValueError or EnvironmentFault, into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, EnvironmentFault) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def find_device(name: str) -> torch.device:
    """Raise ValueError for a device that torch does not know or that is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # .item() refuses "meta", which holds no data
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(
            f"--device {name} is not available on this machine; cpu and auto always are"
        ) from None
    return torch.device(name)


def provenance() -> dict:
    """What a result depends on besides its arguments."""
    return {
        "versions": VERSIONS,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def command_line(script: str, args: Any, **changes: Any) -> str:
    """The command that gives `args`, a dataclass, with changes; defaults are left out."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, sys.argv[0] if Path(sys.argv[0]).name == script else script]
    for field in fields(args):
        value = changes.get(field.name, getattr(args, field.name))
        if value != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            if str(value).startswith("-"):  # a name that would be taken for a flag
                words.append(f"{flag}={value}")
            else:
                words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def same_run(content: dict, script: str, args: Any, device: torch.device) -> None:
    """Raise ValueError naming what differs if a checkpoint is not of the run that is asked for."""
    header = {"format": FORMAT, "script": script, "versions": VERSIONS, "device": "", "args": {}}
    check_like(content, {**header, "seconds": 0.0, "state": {}}, "it")
    if not 0 <= content["state"]["global_step"] <= 10**12:
        raise ValueError(f"its step {content['state']['global_step']} is no --total-timesteps")
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']}; this program has {FORMAT}")
    if content["script"] != script:
        raise ValueError(f"it was written by {content['script']}, this is {script}")
    for name, now in VERSIONS.items():
        if content["versions"][name] != now:
            raise ValueError(
                f"it was written with {name} {content['versions'][name]} and this is {now}; "
                f"install {name}=={content['versions'][name]} to resume exactly"
            )
    if content["device"] != device.type:
        raise ValueError(f"it was trained on {content['device']} and this is {device.type}")
    then = content["args"]
    differing = [
        f"--{name.replace('_', '-')} was {then.get(name, 'no flag')} there and is {now} here"
        for name, now in asdict(args).items()
        if then.get(name, "no flag") != now and name not in (*MAY_DIFFER, "device")
    ]
    if differing:
        raise ValueError(f"it was trained with other arguments: {', '.join(differing)}")


def rng_state(device: torch.device, *spaces: gym.Space) -> dict:
    """The random numbers to come: torch's, and those of spaces that are sampled from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "spaces": [space.np_random.bit_generator.state for space in spaces],
    }


def set_rng_state(saved: dict, device: torch.device, *spaces: gym.Space) -> None:
    """Undo `rng_state`."""
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)
    for space, state in zip(spaces, saved["spaces"], strict=True):
        space.np_random.bit_generator.state = state


# --- The run's folder -----------------------------------------------------------------------------


class Place(NamedTuple):
    """A run's folder, the lock that keeps a second process out of it, and what was saved there."""

    folder: Path
    lock: int
    saved: dict | None  # None for a new run; `Run` empties its state

    def __str__(self) -> str:
        return f"{self.folder}" + (
            f" from step {self.saved['state']['global_step']}" if self.saved else ""
        )

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.pt"

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what takes from a checkpoint: raises ValueError, one line, if it does not fit."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch, about a forgery
                yield
        except Exception as error:
            os.close(self.lock)
            if isinstance(error, EnvironmentFault):
                raise
            why = str(error) if type(error) is ValueError else f"{FORGED} ({error!r})"
            why = re.sub(r"[^ -~]+", " ", why)  # a forger's text: one line, no control codes
            raise ValueError(f"--resume: {self.path} cannot be used: {why}") from None


def find_place(script: str, args: Any, device: torch.device) -> Place:
    """Create the run's folder, or with --resume find the one to go on with and load it.

    The folder is --run-name, or a name derived from env, seed and what differs from the defaults,
    with the next free -2, -3, ... To resume: of these the one saved last that is unfinished.

    Raises:
        ValueError: one line; no such folder can be made or gone on with.
    """
    algo = script.removesuffix(".py")
    changed = [
        f"{field.name.replace('_', '-')}-{getattr(args, field.name)}"
        for field in fields(args)
        if field.name not in ("env", "seed", "device", *MAY_DIFFER)
        and getattr(args, field.name) != field.default
    ]
    name = "__".join([args.env.replace("/", "-"), algo, *changed, f"seed-{args.seed}"])
    if args.run_name == "":
        raise ValueError("--run-name is empty; leave it out for a derived name")
    for part in Path(args.run_dir, args.run_name or name).parts:
        if len(os.fsencode(part)) > 255:  # of most file systems; mkdir would first make the parents
            raise ValueError(f"{part} is too long; choose a shorter --run-dir or --run-name")
    if not args.resume:
        return _create(args, name)
    if args.run_name:
        folders = [Path(args.run_dir, args.run_name)]
    else:
        numbered = re.compile(re.escape(name) + r"(-\d+)?")
        found = Path(args.run_dir).glob("*/checkpoint.pt")
        mine = [path for path in found if numbered.fullmatch(path.parent.name)]
        folders = [path.parent for path in sorted(mine, key=os.path.getmtime, reverse=True)]
    if not folders:
        raise ValueError(
            f"--resume: {args.run_dir} holds no checkpoint of a run with these arguments; "
            "repeat those it began with, or name its folder with --run-name"
        )
    problems = [_unfit(folder, args.total_timesteps) for folder in folders]
    if None not in problems:
        raise ValueError(f"--resume: {problems[0]}")
    folder = folders[problems.index(None)]  # the one saved last, also if it is being trained
    place = Place(folder, _lock(folder), None)
    with place.reading():
        saved = load(place.path)
        same_run(saved, script, args, device)
    return place._replace(saved=saved)


def _create(args: Any, name: str) -> Place:
    """A new folder for --run-name, or for `name` with the next free number."""
    for number in itertools.count(1):
        derived = name if number == 1 else f"{name}-{number}"
        folder = Path(args.run_dir, args.run_name or derived)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if args.run_name and folder.is_dir() and not any(folder.iterdir()):
                break  # of a run that was stopped before it began
            if args.run_name:
                can_go_on = not _unfit(folder, args.total_timesteps)
                remedy = "add --resume to go on with it, or " if can_go_on else ""
                raise ValueError(f"{folder} exists; {remedy}choose another --run-name") from None
        except OSError as error:
            raise ValueError(f"cannot create {folder}: {error.strerror}") from None
    return Place(folder, _lock(folder), None)


def _unfit(folder: Path, total_timesteps: int) -> str | None:
    """Why a run cannot be resumed, as a clause; None if it can."""
    if not (folder / "checkpoint.pt").is_file():
        return (
            f"{folder} has no checkpoint to go on from (--checkpoint-every N saves them); choose "
            "another --run-name"
        )
    try:
        done = json.loads((folder / "result.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not of ours: unfinished
        done = -1
    if isinstance(done, int) and done >= total_timesteps:
        return f"{folder} is finished; --total-timesteps beyond {done} trains it further"
    return None


def _lock(folder: Path) -> int:
    """Lock a folder until the descriptor that is returned is closed, at the latest by our end."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"--resume: another process is training {folder}") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


# --- The run --------------------------------------------------------------------------------------


class Run:
    """Logs, progress bar, checkpoints, signals and faults of one run, as a context manager.

    Ctrl-C and SIGTERM let the current step (PPO: rollout and update) finish; then the run is saved
    and exits with code 130 or 143. A second signal kills. A fault of the environment saves the last
    good state and exits with code 1. Either says in one line how to resume.

    Args:
        script: "sac.py" or "ppo.py".
        args: its Args.
        device: what is trained on.
        place: from `find_place`.
        state: returns what the next step depends on, tensors and plain Python values, among them
            "global_step"; called between two steps, and after a fault of the environment.
        anew: (num_envs,) bool, the envs that begin an episode.

    Attributes:
        bar: tqdm's progress bar.
    """

    def __init__(
        self,
        script: str,
        args: Any,
        device: torch.device,
        place: Place,
        state: Callable[[], dict],
        anew: np.ndarray,
    ):
        self.script, self.args, self.device = script, args, device
        self.place, self.state, self.anew = place, state, anew
        saved = place.saved or {"seconds": 0.0, "state": {}}
        self.saved_step: int | None = saved["state"].get("global_step")
        self.step, self.seconds_before = self.saved_step or 0, saved["seconds"]
        self.next_save = self._after(self.step) if place.saved else 0  # a new run at once
        saved["state"].clear()  # its tensors are the file, and would keep its place on disk
        self.signal: int | None = None
        self.at_once = False  # whether a signal ends the run without waiting for `goes_on`
        self.failing = self.clamping = False  # whether that was said

    def __enter__(self) -> "Run":
        plain(self.state(), "state()")  # raises now rather than when it is to be saved
        self.start = time.perf_counter()
        total = self.args.total_timesteps
        self.bar = tqdm(
            total=total, initial=self.step, unit="step", dynamic_ncols=True, disable=None
        )
        Path(self.place.folder, "checkpoint.pt.part").unlink(missing_ok=True)  # if it was killed
        # TensorBoard reads the logs in the order of their names, which begin with the time. A clock
        # may have been set back, so the old ones are numbered instead.
        for number, log in enumerate(self._logs()):
            log.rename(log.with_name(re.sub(r"\d+", f"{number:010}", log.name, count=1)))
        self.excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        self._open_log()
        if self.saved_step is None:
            rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(self.args).items())
            if self.writer:
                self.writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}")
        elif self.anew.any():
            anew = np.flatnonzero(self.anew).tolist()
            self.warn(f"env {anew} did not replay to where it was; a new episode begins there")
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as it is in the background
                    self.handlers[number] = signal.signal(number, self._signalled)
        return self

    @property
    def seconds(self) -> float:
        """Since the beginning, without the time between a stop and its resumption."""
        return self.seconds_before + time.perf_counter() - self.start

    def goes_on(self, step: int) -> bool:
        """Whether to train on from `step`. Saves a checkpoint if one is due, and at the end.

        Raises:
            SystemExit: a signal came.
        """
        self.step, ends = step, step >= self.args.total_timesteps
        due = self.args.checkpoint_every and step >= self.next_save
        keeps = self.args.checkpoint_every or self.saved_step is not None
        if due or (ends and keeps):
            self._save()
        self.at_once = ends  # evaluation, which changes nothing that is saved
        if self.signal:  # looked at last: none that came meanwhile is missed
            raise SystemExit(128 + self.signal)
        return not ends

    def log(self, tag: str, value: float, step: int) -> None:
        """Add a scalar to TensorBoard's log, or warn once that this is not possible."""
        if self.writer:
            try:
                self.writer.add_scalar(tag, value, step)
            except OSError as error:
                self._log_failed(error)

    def log_episodes(self, returns: np.ndarray, lengths: np.ndarray, step: int) -> None:
        """Log the episodes that ended at `step`, as their mean: so steps increase in every tag."""
        self.log("charts/episodic_return", float(returns.mean()), step)
        self.log("charts/episodic_length", float(lengths.mean()), step)
        self.bar.set_postfix(episodic_return=f"{returns.mean():.0f}", refresh=False)

    def warn_of_clamping(self, clamp: Clamp) -> None:
        """Say once that values of observations were clamped."""
        if clamp.clipped and not self.clamping:
            self.clamping = True
            self.warn(f"so far {clamp.report()}")

    def warn(self, message: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        with contextlib.suppress(OSError):  # stderr may be a file on a disk that is full
            self.bar.write(f"warning: {message}", file=sys.stderr)

    def finish(self, result: dict) -> None:
        """Say how the run went and write result.json, which marks the run as finished."""
        trained, evaluation = result["return_last_tenth"], result["evaluation"]
        shown = "no episode ended in it" if trained is None else f"{trained:.1f}"
        print(f"mean return over the last tenth of training: {shown}")
        if evaluation:
            mean = np.mean(evaluation)
            print(f"mean return of {len(evaluation)} deterministic episodes: {mean:.1f}")
        print(
            f"{result['ms_per_step']:.2f} ms/step, buffer {result['buffer_bytes'] / 1e6:,.1f} MB "
            f"when full, whole process {result['peak_rss_bytes'] / 1e6:,.0f} MB at its peak, "
            f"max |obs| {result['max_abs_obs']:.4g}\n"
            f"{result['clamped'] or 'no value was clamped'}"
        )
        path = self.place.folder / "result.json"
        with replacing(path) as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")
        print(f"wrote {path}")

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        trained, self.at_once = self.at_once, False
        self.bar.close()
        if isinstance(error, EnvironmentFault | SystemExit) or (error and trained):
            self._save()
        if self.writer:
            with contextlib.suppress(OSError):
                self.writer.close()
        os.close(self.place.lock)
        threading.excepthook = self.excepthook
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, SystemExit):
            name = signal.Signals(self.signal).name
            print(f"{self.script}: {name}, {self._remains()}", file=sys.stderr)
        elif isinstance(error, SystemExit):
            self._fail(f"{self.args.env} called sys.exit({error.code!r}), after step {self.step}")
        elif isinstance(error, EnvironmentFault):
            self._fail(f"{self.args.env} {error}, after step {self.step}")
        elif isinstance(error, FloatingPointError):
            self._fail(str(error))
        elif why := _of_the_machine(error):
            self._fail(why)

    def _fail(self, message: str) -> None:
        raise SystemExit(f"{self.script}: error: {message}; {self._remains()}") from None

    def _remains(self) -> str:
        """What is left of the run, and how to go on."""
        if self.saved_step is None:
            return "no checkpoint was saved (--checkpoint-every N saves one every N steps)"
        name = self.args.run_name or self.place.folder.name
        command = command_line(self.script, self.args, resume=True, run_name=name)
        return f"saved as of step {self.saved_step}; resume with: {command}"

    def _signalled(self, number: int, _: Any) -> None:
        self.signal = number
        for handled in self.handlers:
            signal.signal(handled, signal.SIG_DFL)
        if self.at_once:
            raise SystemExit(128 + number)
        what = "this rollout and its update" if self.script == "ppo.py" else "this step"
        told = f"\n{self.script}: finishing {what}, then saving; another signal kills\n"
        with contextlib.suppress(OSError):
            os.write(2, told.encode())  # print may not be interrupted by another print

    def _after(self, step: int) -> int:
        """The first step after this one at which a checkpoint is due."""
        every = self.args.checkpoint_every
        return (step // every + 1) * every if every else 0

    def _save(self) -> None:
        """Write a checkpoint of this step unless there is one; if that fails, warn once."""
        self.next_save = self._after(self.step)
        if self.step == self.saved_step:
            return
        content = {
            "format": FORMAT,
            "script": self.script,
            "versions": VERSIONS,
            "device": self.device.type,
            "args": asdict(self.args),
            "seconds": self.seconds,
            "state": self.state(),
        }
        self.step = content["state"]["global_step"]
        try:
            self._flush_log()
            save(self.place.path, content)
        except (OSError, TypeError) as error:
            if not self.failing:
                why = error.strerror if isinstance(error, OSError) else error
                kept = "none" if self.saved_step is None else f"of step {self.saved_step}"
                self.warn(
                    f"no checkpoint of step {self.step} could be saved: {why}; the last "
                    f"one is {kept}"
                )
            self.failing = True
            return
        self.failing, self.saved_step = False, self.step
        if self.writer is None:
            self._open_log()

    def _logs(self) -> list[Path]:
        return sorted(self.place.folder.glob("events.out.tfevents.*"))

    def _open_log(self) -> None:
        """A new file of TensorBoard's, which voids what was logged after the last checkpoint."""
        after = None if self.saved_step is None else self.saved_step + 1
        self.writer = None
        try:
            self.writer = SummaryWriter(str(self.place.folder), purge_step=after)
        except OSError as error:
            self._log_failed(error)

    def _flush_log(self) -> None:
        """Bring what was logged to disk: it must not lag behind a checkpoint."""
        if self.writer:
            try:
                self.writer.flush()
                for log in self._logs():
                    _sync(log)
            except OSError as error:
                self._log_failed(error)

    def _thread_failed(self, args: Any) -> None:
        """Without a traceback: `add_scalar` raises again what TensorBoard's thread met."""
        of_log = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (of_log and isinstance(args.exc_value, OSError)):
            self.excepthook(args)

    def _log_failed(self, error: OSError) -> None:
        self.writer = None
        self.warn(f"TensorBoard's log ends at step {self.step}: {error.strerror}")
