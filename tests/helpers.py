"""What the tests of whole runs share: the scripts, and what a run leaves behind."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo
import sac
from support import checkpoints

SCRIPTS = {"sac": sac, "ppo": ppo}
TIMING = ("ms_per_step", "rss_bytes", "peak_rss_bytes", "args")  # of a result, not of what it says


def refused(script, args, capfd) -> str:
    """The line with which a run of sac or ppo stops, as with exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        script.main(args)
    line = str(stopped.value.code)  # what Python prints on stderr, before it exits with 1
    assert "\n" not in line and "Traceback" not in capfd.readouterr().err
    return line


def hashed(value) -> str:
    """SHA-256 of nested tensors and plain values: equal only if all are, bit for bit."""
    sha256 = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value):
                add(key), add(value[key])
        elif isinstance(value, (list, tuple)):
            sha256.update(f"{len(value)} of".encode())
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor):
            sha256.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if value.numel():
                sha256.update(value.contiguous().view(-1).view(torch.uint8).numpy())
        else:
            sha256.update(repr(value).encode())

    add(value)
    return sha256.hexdigest()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every tag as TensorBoard reads them; of the speed none."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in set(events.Tags()["scalars"]) - {"charts/SPS"}:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        steps = [step for step, _ in found[tag]]
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
    return found


def saved_step(folder: Path) -> int:
    """global_step of the checkpoint in a run's folder."""
    return checkpoints.load(folder / "checkpoint.pt")["global_step"]


def left_behind(folder: Path) -> dict:
    """All that a finished run with a checkpoint left: hashes of its parts, and what it logged."""
    parts = checkpoints.load(folder / "checkpoint.pt")["parts"]
    result = json.loads((folder / "result.json").read_text())
    assert not list(folder.glob("*.part")) and len(parts) > 4
    return {
        **{name: hashed(part) for name, part in parts.items()},
        "weights.pt": hashed(torch.load(folder / "weights.pt", weights_only=True)),
        "result": {key: value for key, value in result.items() if key not in TIMING},
        "scalars": scalars(folder),
    }
