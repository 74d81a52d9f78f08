"""Errors that a user can meet, each as one line instead of a traceback.

    with command("sac.py"):              # around the whole script
        with refusing("sac.py"):         # around what checks the input
            check(args)

`refusing` ends with exit code 2 and says what was wrong; `command` is for all that is no fault of
the input: Ctrl-C, a full disk, too little memory.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import torch


class EnvironmentFault(Exception):
    """An environment raised, or returned what cannot be learned from: one line with its name."""


unread: list[str] = []  # what could not be printed


def say(message: str) -> None:
    """Print a line. A run goes on if nobody reads it: a closed pipe, a file on a full disk."""
    try:
        print(message)
    except OSError:
        unread.append(message)


@contextlib.contextmanager
def refusing(script: str) -> Iterator[None]:
    """Turn bad input (ValueError, EnvironmentFault) into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, EnvironmentFault) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def command(script: str) -> Iterator[None]:
    """Wrap a whole script: Ctrl-C, a full disk or lack of memory ends it without a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it is closed
        stream.reconfigure(errors="backslashreplace")  # for accents on an ASCII terminal
    unread.clear()
    try:
        yield
        print(end="", flush=True)  # fails here rather than when Python ends
        if unread:
            raise SystemExit(1)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # whoever reads the output has read enough
        raise SystemExit(1) from None
    except Exception as error:
        why = machine_fault(error)
        if why is None:
            raise
        raise SystemExit(f"{script}: error: {why}") from None
    finally:
        _discard_unwritable()


def _discard_unwritable() -> None:
    """Drop what could not be written to stdout: Python would try again, and exit with code 120."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def machine_fault(error: BaseException | None) -> str | None:
    """One line for an error that means lack of memory or a failing disk; None for any other."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(error):  # torch's RuntimeError on a CPU
        return f"out of memory: {error}; `python memory.py --budget` tells what fits"
    return str(error) if isinstance(error, OSError) else None
