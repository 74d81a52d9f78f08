"""Checks, names and command lines that are made from a script's `Args`.

A new field of `Args` needs nothing here: it enters the run's name and can be given on the command
line, and a run is resumed only with the value that it began with. RANGES is for those that can be
out of range.
"""

import re
import shlex
import shutil
import sys
import unicodedata
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

COUNTS = ("total_timesteps", "hidden", "batch_size", "buffer_size", "n_steps", "n_epochs")
AMOUNTS = ("eval_episodes", "checkpoint_every", "learning_starts", "clip_coef", "vf_coef")
RANGES = {  # smallest and largest value of a field
    **dict.fromkeys((*COUNTS, "train_freq", "gradient_steps"), (1, 10**12)),
    **dict.fromkeys((*AMOUNTS, "ent_coef", "max_grad_norm"), (0, 10**12)),
    **dict.fromkeys(("learning_rate", "gamma", "tau", "gae_lambda"), (0, 1)),
    "num_envs": (1, 10_000),
    "seed": (0, 2**32 - 1),
    "target_entropy": (-(10**12), 10**12),
}
# A run may go on with another value of these; devices are compared by their kind, in folders.py.
MAY_DIFFER = ("total_timesteps", "eval_episodes", "checkpoint_every", "resume")
MAY_DIFFER += ("device", "run_dir", "run_name")


def flag(field: str) -> str:
    """A field of `Args` as it is written on the command line: "quant_m" -> "--quant-m"."""
    return f"--{field.replace('_', '-')}"


def check_ranges(args: Any) -> None:
    """Raise ValueError, one line, for the first field outside its range or with unreadable text."""
    for name, value in asdict(args).items():
        if isinstance(value, str) and {"Cc", "Cs"} & set(map(unicodedata.category, value)):
            raise ValueError(f"{flag(name)} {value!a} has characters that cannot be printed")
        low, high = RANGES.get(name, (None, None))
        if None not in (low, value) and not low <= value <= high:
            raise ValueError(
                f"{flag(name)} {value} is out of range; it must be from {low} to {high}"
            )


def run_name(script: str, args: Any) -> str:
    """Name of a run: environment, algorithm, every argument unlike its default, seed."""
    changed = [
        f"{field.name.replace('_', '-')}-{getattr(args, field.name)}"
        for field in fields(args)
        if field.name not in ("env", "seed", *MAY_DIFFER)
        and getattr(args, field.name) != field.default
    ]
    words = [args.env, script.removesuffix(".py"), *changed, f"seed-{args.seed}"]
    return re.sub("/", "-", "__".join(words))


def command_line(script: str, args: Any, **changes: Any) -> str:
    """The command that starts `script` with args, some of them changed; defaults are left out."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    words = [python, sys.argv[0] if Path(sys.argv[0]).name == script else script]
    for field in fields(args):
        value = changes.get(field.name, getattr(args, field.name))
        if value == field.default:
            continue
        if value is True:
            words.append(flag(field.name))
        elif str(value).startswith("-"):  # would be taken for a flag of its own
            words.append(f"{flag(field.name)}={value}")
        else:
            words += [flag(field.name), str(value)]
    return shlex.join(words)


def differences(then: dict, now: dict) -> list[str]:
    """What two runs' arguments differ in, beside MAY_DIFFER, each as "--hidden was 8 there ..."."""
    absent = "no flag"
    return [
        f"{flag(name)} was {then.get(name, absent)} there and is {now.get(name, absent)} here"
        for name in then | now
        if name not in MAY_DIFFER and then.get(name, absent) != now.get(name, absent)
    ]
