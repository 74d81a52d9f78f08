"""The folder of a run: its name, its lock, and whether the run in it can be resumed."""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

from support import arguments, checkpoints
from support.errors import EnvironmentFault

LOCK = ".lock"  # the file in a run's folder that is locked
LOCKS: dict[int, os.stat_result] = {}  # file descriptors of those locked here
FORMAT = 3  # of checkpoints; raise it when the meaning of what is saved changes
VERSIONS = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}


class InUse(ValueError):
    """Another process is training in this folder."""


@dataclass
class Folder:
    """The folder of a run, locked.

    Attributes:
        path: where it is.
        lock: file descriptor; while it is open no other process can train in this folder.
        saved: what the checkpoint holds, None for a new run.
    """

    path: Path
    lock: int
    saved: dict | None = None

    def __str__(self) -> str:
        return f"{self.path}" + (f" from step {self.saved['global_step']}" if self.saved else "")

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn an error while the checkpoint is used into a ValueError of one line, and unlock."""
        try:
            yield
        except Exception as error:
            unlock(self.lock)
            if isinstance(error, EnvironmentFault):
                raise
            why = str(error) if isinstance(error, ValueError) else checkpoints.NOT_OURS
            why = " ".join(why.split())  # torch's messages have several lines
            raise ValueError(f"--resume: {self.checkpoint} cannot be used: {why}") from None


def find_folder(script: str, args: Any, device: torch.device) -> Folder:
    """Create the run's folder, or with --resume find it and load its checkpoint.

    It is --run-name, or else the name from `arguments.run_name`, with -2, -3, ... if that exists.
    To resume, it is the one of these that was saved last and is not finished.

    Raises:
        ValueError: one line; there is no such folder, or its checkpoint does not fit.
    """
    name = arguments.run_name(script, args) if args.run_name is None else args.run_name
    if not name:
        raise ValueError("--run-name is empty; leave it out for a derived name")
    for part in Path(args.run_dir, name).parts:
        if len(os.fsencode(part)) > 255:  # mkdir would say so only after making the parents
            raise ValueError(f"{part} is too long; choose a shorter --run-dir or --run-name")
    if not args.resume:
        return _create(args, name)
    if args.run_name:
        paths = [Path(args.run_dir, name)]
    else:
        numbered = re.compile(re.escape(name) + r"(-\d+)?")
        files = Path(args.run_dir).glob("*/checkpoint.pt")
        files = [file for file in files if numbered.fullmatch(file.parent.name)]
        paths = [file.parent for file in sorted(files, key=os.path.getmtime, reverse=True)]
    if not paths:
        raise ValueError(
            f"--resume: {args.run_dir} holds no checkpoint of a run with these arguments (with "
            "--checkpoint-every N a run keeps one); give those of another run, or its --run-name"
        )
    problems = [_why_not_resumable(path, args.total_timesteps) for path in paths]
    if None not in problems:
        raise ValueError(f"--resume: {problems[0]}")
    path = paths[problems.index(None)]  # the one saved last, even if it is being trained
    folder = Folder(path, lock(path, "--resume: "))
    with folder.reading():
        folder.saved = checkpoints.load(folder.checkpoint)
        for key, now in written_with(script, device).items():
            if folder.saved[key] != now:
                then = folder.saved[key]
                raise ValueError(f"it was written with {key} {then}, this is {key} {now}")
        if differing := arguments.differences(folder.saved["args"], asdict(args)):
            raise ValueError(f"it was trained with other arguments: {', '.join(differing)}")
    return folder


def written_with(script: str, device: torch.device) -> dict:
    """What a checkpoint must agree on with the program that loads it, besides arguments."""
    return {"format": FORMAT, "script": script, "device": device.type, **VERSIONS}


def _create(args: Any, name: str) -> Folder:
    """Make a new folder: --run-name, or `name` with the next free number."""
    for number in itertools.count(1):
        path = Path(args.run_dir, name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError as error:
            if not os.path.lexists(path):
                raise ValueError(
                    f"cannot create {path}: {error.filename} is a link to nothing"
                ) from None
            if args.run_name and path.is_dir() and set(os.listdir(path)) <= {LOCK}:
                break  # of a run that was stopped before it began
            if args.run_name:
                if (path / LOCK).exists():
                    unlock(lock(path))  # says so if another process is training it
                resumable = _why_not_resumable(path, args.total_timesteps) is None
                remedy = "add --resume to go on with it, or " if resumable else ""
                raise ValueError(f"{path} exists; {remedy}choose another --run-name") from None
        except OSError as error:
            raise ValueError(f"cannot create {path}: {error.strerror}") from None
    return Folder(path, lock(path))


def _why_not_resumable(path: Path, total_timesteps: int) -> str | None:
    """Why the run in a folder cannot be resumed, None if it can."""
    if not path.is_dir():
        return f"there is no folder {path}"
    if not (path / "checkpoint.pt").is_file():
        return (
            f"{path} has no checkpoint to go on from (--checkpoint-every N saves them); choose "
            "another --run-name"
        )
    done = trained_steps(path)
    if done < total_timesteps:
        return None
    return f"{path} is finished; --total-timesteps beyond {done} trains it further"


def trained_steps(path: Path) -> int:
    """Steps of the finished run in a folder, 0 if it was not finished."""
    try:
        return int(json.loads((path / "result.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def lock(path: Path, asked: str = "") -> int:
    """Lock a folder until `unlock`, or this process ends. asked: begins the message.

    What is locked is a file in it that is open for writing. Of a folder, and of a file that is only
    read, NFS has no locks that another machine would see.

    Raises:
        InUse: another process has locked it.
        ValueError: it cannot be written to.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{asked}cannot train in {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InUse(f"{asked}another process is training {path}") from None
    except OSError as error:
        told = f"warning: nothing keeps a second process from training {path}, as its file system"
        print(f"{told} has no locks: {error.strerror}", file=sys.stderr)
    LOCKS[descriptor] = os.fstat(descriptor)
    _give_children_no_locks()
    return descriptor


def unlock(lock: int) -> None:
    """Let other processes train in a folder again."""
    LOCKS.pop(lock, None)
    os.close(lock)


@functools.cache  # once per process
def _give_children_no_locks() -> None:
    """Else a process that an environment forks would keep them beyond its parent's end."""

    def close_all() -> None:
        for lock, locked in LOCKS.items():
            with contextlib.suppress(OSError):  # it may be closed, or another file's by now
                if os.path.samestat(os.fstat(lock), locked):
                    os.close(lock)
        LOCKS.clear()

    os.register_at_fork(after_in_child=close_all)
