"""Checkpoint files: the state of a run's parts, written so that no crash can spoil it.

    save(path, {"actor": state_of(actor), "rng": state_of(rng)})
    saved = load(path)
    restore(actor, saved["actor"])

A file is what `torch.save` writes, followed by the SHA-256 of that. It is written under another
name and renamed when all of it is on disk. It holds tensors and plain Python values only, so that
loading one from a stranger cannot run code.
"""

import contextlib
import copy
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

DIGEST = hashlib.sha256().digest_size  # bytes at the end of a file
PLAIN = (int, float, str, bool, type(None))
NOT_OURS = "it holds other things than a checkpoint of this program, or code"


def state_of(part: Any) -> Any:
    """What is to be saved of a part of a run.

    Args:
        part: a Tensor, a random generator of torch or numpy, or anything with state_dict() and
            load_state_dict(): networks, optimizers, schedulers, buffers, classes of your own.
    """
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part.state_dict()


def restore(part: Any, saved: Any) -> None:
    """Set a part to what `state_of` returned.

    Raises:
        ValueError, RuntimeError: that does not fit the part.
    """
    if isinstance(part, torch.Tensor):
        if saved.shape != part.shape:  # copy_ would broadcast
            raise ValueError(f"its shape is {tuple(saved.shape)} there, {tuple(part.shape)} here")
        part.data.copy_(saved)
    elif isinstance(part, torch.Generator):
        part.set_state(saved)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = saved
    elif isinstance(part, torch.optim.Optimizer):  # it keeps the tensors, and with them the file,
        part.load_state_dict(copy.deepcopy(saved))  # which would stay on disk when it is replaced
    else:
        part.load_state_dict(saved)


def plain(value: Any, name: str) -> Any:
    """A state with numpy's numbers as Python's and tuples as lists, ready to be saved.

    Raises:
        TypeError: naming what is neither a tensor nor a plain Python value.
    """
    if isinstance(value, dict):
        keys = [plain(key, f"{name}, at the key {key!r},") for key in value]
        parts = [plain(part, f"{name}[{key!r}]") for key, part in value.items()]
        return dict(zip(keys, parts, strict=True))
    if isinstance(value, list | tuple):
        return [plain(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if type(value) not in PLAIN:
        raise TypeError(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; "
            "a tensor is what it can, torch.from_numpy(array.copy()) for example"
        )
    return value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when all is written; after an error `path` is unchanged."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name outlives a power cut, too
    os.close(folder)


def save(path: Path, content: dict) -> None:
    """Write a checkpoint. Tensors are not copied, but each is written with its whole storage.

    Raises:
        OSError: it could not be written, for example because the disk is full.
        TypeError: see `plain`.
    """
    content = plain(content, "it")
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's, which hides why a write failed
            raise error.__context__ or error from None
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            file.write(hashlib.sha256(data).digest())


def load(path: Path) -> dict:
    """Read what `save` wrote; of its tensors only what is used is read into memory.

    Raises:
        ValueError: it is missing or damaged, or torch.load refuses it, as all that holds code.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            digest = hashlib.sha256(memoryview(data)[:-DIGEST]).digest()
            damaged = digest != data[-DIGEST:]
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ValueError(f"it cannot be read: {error}") from None
    if damaged:
        raise ValueError("it is damaged: its SHA-256 is not that of its content")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever is made of a file that is none of ours
        raise ValueError(NOT_OURS) from None
