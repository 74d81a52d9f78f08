"""TensorBoard's log of a run, which survives stops, a full disk and a clock that is set back."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter


class Log:
    """Writes scalars. When the disk is full it warns once and stops, until `open` is called again.

    Args:
        folder: where the files are.
        warn: prints a line.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.folder, self.warn, self.step = folder, warn, 0
        self.writer: SummaryWriter | None = None
        self.excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        # TensorBoard reads files in the order of their names, which begin with the time. Numbers in
        # its place keep those of earlier processes first, also if the clock was set back.
        for number, file in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
            file.rename(file.with_name(re.sub(r"\d+", f"{number:010}", file.name, count=1)))

    def open(self, saved_step: int | None) -> None:
        """Begin a new file, unless one is open.

        Args:
            saved_step: step of the checkpoint that the run goes on from. What was logged after it
                is void, and will be logged again.
        """
        if self.writer is None:
            with self._stopping():
                after = None if saved_step is None else saved_step + 1
                self.writer = SummaryWriter(str(self.folder), purge_step=after)

    def add(self, scalars: dict[str, float | torch.Tensor], step: int) -> None:
        """Write the value of each tag at a step."""
        self.step = step
        if self.writer:
            with self._stopping():
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, torch.as_tensor(value).item(), step)

    def add_table(self, title: str, rows: dict) -> None:
        """Write names and values as a table, under TensorBoard's "Text"."""
        if self.writer:
            lines = "".join(f"|{name}|{value}|\n" for name, value in rows.items())
            with self._stopping():
                self.writer.add_text(title, f"|name|value|\n|-|-|\n{lines}")

    def flush(self) -> None:
        """Hand everything to the operating system: a killed process loses none of it."""
        if self.writer:
            with self._stopping():
                self.writer.flush()

    def close(self) -> None:
        if self.writer:
            with contextlib.suppress(OSError):
                self.writer.close()
        threading.excepthook = self.excepthook

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop to log if there is an OSError."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.warn(f"TensorBoard's log ends at step {self.step}: {error.strerror}")

    def _thread_failed(self, args: Any) -> None:
        """Print no traceback of TensorBoard's own thread; the next `add` raises what it met."""
        of_log = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (of_log and isinstance(args.exc_value, OSError)):
            self.excepthook(args)
