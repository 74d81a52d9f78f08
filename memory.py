"""What models and buffers cost in memory, for any robot, before anything is allocated.

    python memory.py                                   # the paper's Fig. 2 and Sec. III, recomputed
    python memory.py --env Humanoid-v3 --quant-m 2     # one robot: the ledgers side by side
    python memory.py --env Humanoid-v3 --quant-m 2 --pack --measure    # and what a process takes
    python memory.py --env Humanoid-v3 --budget 750MB  # the largest buffer in each storage
    python memory.py --env Humanoid-v3 --layouts       # other libraries' replay buffers
    python memory.py --obs-dim 391 --act-dim 16 --control-hz 50

Three ledgers are never mixed. *paper* is what *Just Round* (Grossman & Plancher, ICRA 2023) counts:
networks and buffer (Eq. 1 for PPO, Eq. 3 for SAC), with 64 bits or Eq. 6's bits per observed value.
*allocated* is every persistent tensor of `ppo.py` and `sac.py`, to the byte, and one decoded
minibatch; activations come and go and are not counted. Both are dicts of row name -> bytes.
*measured* is the resident memory of a real process. 1 MB is 10^6 bytes.
"""

import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import tyro

from buffers import Layout, layout_bytes, replay_layout, rollout_layout, rows_per_env
from columns import LiveColumns
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed, bits, make_codec

Ledger = dict[str, int]

TASKS = {  # Sec. V: obs_dim, act_dim
    "Walker2d-v3": (17, 6),
    "HalfCheetah-v3": (17, 6),
    "Ant-v3": (111, 8),
    "Humanoid-v3": (376, 17),
}
PAPER_B = 127
PAPER_M = {"ppo": 1, "sac": 2}  # decimals kept, Sec. V-B
PAPER_STEPS = {"ppo": 2048, "sac": 1_000_000}  # transitions in the buffer, Table II
PAPER_BATCH = {"ppo": 64, "sac": 256}  # Table II
PAPER_RATIOS = {"ppo": "2.1x to 4.2x", "sac": "2.6x to 3.9x"}  # Sec. V-B
# float32 scalars per transition. SAC: reward, done. PPO's are not listed; seven reproduce Fig. 2.
PAPER_SCALARS = {"ppo": 7, "sac": 2}
WORKED_EXAMPLES = (  # Sec. III: obs_dim, act_dim, transitions, model bytes -> its MB and percents
    ("III-A", (391, 16, 8_300, 1.3e6), ("27", "95", "96", "92")),
    ("III-B", (112, 8, 1_000_000, 2.3e6), ("96.8", "97.7", "92.5", "90.4")),
    ("III-B", (112, 8, 100_000, 2.3e6), ("96.8", "97.7", "92.5", "90.4")),  # footnote 2
)
# Why an allocated row differs from the paper's; the fields are those of `robot_report`.
_ROW = "{row:,} bytes a row, {columns} x {bits} bits{words}, against the paper's {paper_row:,g}"
_TRAINING = {
    "gradients": "the paper counts none; one float32 per parameter",
    "Adam moments": "the paper counts none; two float32 per parameter",
    "decoded batch": "the paper counts none; one minibatch in float32",
}
WHY = {
    "ppo": {
        "buffer observations": _ROW,
        "buffer rest": "5 float32 scalars and a 1-byte flag per transition against the paper's 7",
        "networks": "the same",
        **_TRAINING,
    },
    "sac": {
        "buffer observations": _ROW + "; {rows:,} rows for {steps:,} transitions: each env's "
        "newest observation has a row of its own",
        "buffer rest": "two 1-byte flags against the paper's float32 done; 24 bytes per env",
        "networks": "log_alpha, which Eq. 3 leaves out",
        "target networks": "Eq. 3 counts none; a copy of both Q networks",
        **_TRAINING,
    },
}
# Replay buffers of other libraries: name, copies of an observation, bytes a value, note. Action,
# reward, done and timeout are float32.
PEERS = (
    ("Stable-Baselines3, SBX: float64", 2, 8, "obs and next_obs"),
    ("Stable-Baselines3, optimize_memory_usage: float64", 1, 8, "one copy, wrong at time-outs"),
    ("CleanRL, LeanRL: float32", 2, 4, "obs and next_obs"),
    ("Just Round as released: uint16", 2, 2, "obs and next_obs"),
)
KNOB = {"ppo": "n_steps", "sac": "buffer_size"}  # the flag that sizes the buffer
MOST = 10**12  # of any size; the scripts take no more
COARSE = 100_000_000  # bytes; below this a measurement says little
NOISY = "; below 100 MB temporary tensors and the libraries' noise, a few MB, exceed 3%"
PROC_CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


# ---- networks and buffers: the allocated ledger ----


def mlp_parameters(sizes: list[int]) -> int:
    """Weights and biases of a chain of Linear layers of these widths, input and output included."""
    return sum((n_in + 1) * n_out for n_in, n_out in pairwise(sizes))


def ppo_parameters(obs_dim: int, act_dim: int, hidden: int) -> int:
    """Parameters of PPO's separate actor, with its log_std vector, and critic."""
    actor = mlp_parameters([obs_dim, hidden, hidden, act_dim]) + act_dim
    return actor + mlp_parameters([obs_dim, hidden, hidden, 1])


def sac_parameters(obs_dim: int, act_dim: int, hidden: int) -> tuple[int, int]:
    """Parameters of SAC's actor, with its mean and log_std heads, and of *one* Q network."""
    actor = mlp_parameters([obs_dim, hidden, hidden, 2 * act_dim])
    return actor, mlp_parameters([obs_dim + act_dim, hidden, hidden, 1])


def allocated_ppo(
    codec: Codec,
    *,
    obs_dim: int,
    act_dim: int,
    hidden: int,
    n_steps: int,
    num_envs: int,
    batch_size: int,
) -> Ledger:
    """Bytes of every persistent tensor of `ppo.py`; the buffer's two rows sum to its `nbytes`."""
    parameters = ppo_parameters(obs_dim, act_dim, hidden)
    batch = min(batch_size, n_steps * num_envs)
    return {
        **_buffer_rows(rollout_layout(codec, n_steps, num_envs, obs_dim, act_dim)),
        "networks": 4 * parameters,
        "gradients": 4 * parameters,
        # mean and square, one vector each for all parameters; the number of steps is Python's.
        "Adam moments": 8 * parameters,
        "decoded batch": 4 * batch * (obs_dim + act_dim + 3),  # log_prob, advantage, ret
    }


def allocated_sac(
    codec: Codec,
    *,
    obs_dim: int,
    act_dim: int,
    hidden: int,
    buffer_size: int,
    num_envs: int,
    batch_size: int,
    live_columns: int | None = None,
    late_columns: int = 0,
) -> Ledger:
    """Bytes of every persistent tensor of `sac.py`; the buffer's two rows sum to its `nbytes`.

    Args:
        codec, obs_dim, act_dim, hidden, buffer_size, num_envs, batch_size: as in `sac.py`.
        live_columns: with --drop-constant, how many columns change in the first rows. The ledger is
            that of the settled buffer or, if that is more, of the watch over its first rows.
        late_columns: how many more change for the first time after the watch.
    """
    buffer_sizes = codec, buffer_size, num_envs, obs_dim, act_dim
    buffer = _buffer_rows(replay_layout(*buffer_sizes))
    if live_columns is not None:
        layout = replay_layout(*buffer_sizes, live_columns)
        rows, _ = layout["obs"][0]
        watched = min(rows // num_envs, math.ceil(LiveColumns.WATCHED / num_envs)) * num_envs
        watch = {"obs": ((watched, obs_dim), codec.dtype)}
        blocks = {"obs": layout["obs"], "late": ((rows, late_columns), codec.dtype)}
        layout |= max(blocks, watch, key=layout_bytes)
        buffer["buffer observations"] = layout_bytes(layout) - buffer["buffer rest"]
    actor, critic = sac_parameters(obs_dim, act_dim, hidden)
    parameters = actor + 2 * critic + 1  # log_alpha
    return {
        **buffer,
        "networks": 4 * parameters,
        "target networks": 4 * 2 * critic,
        "gradients": 4 * parameters,
        # mean and square; the numbers of steps are Python's.
        "Adam moments": 8 * parameters,
        # obs, next_obs, action, reward in float32; terminated is a byte.
        "decoded batch": batch_size * (4 * (2 * obs_dim + act_dim + 1) + 1),
    }


def dropping_at_most(codec: Codec, **sizes: int) -> Ledger:
    """The largest that `allocated_sac` can be with --drop-constant, whatever changes when."""
    n = sizes["obs_dim"]
    columns = (dict(live_columns=k, late_columns=n - k) for k in range(n + 1))
    return max((allocated_sac(codec, **sizes, **live) for live in columns), key=total)


def _buffer_rows(layout: Layout) -> Ledger:
    obs = layout_bytes({"obs": layout["obs"]})
    return {"buffer observations": obs, "buffer rest": layout_bytes(layout) - obs}


def total(ledger: Ledger) -> int:
    """Bytes of all rows."""
    return sum(ledger.values())


LEDGERS = {"ppo": allocated_ppo, "sac": allocated_sac}


# ---- does it fit ----


def mb(n: float) -> str:
    """Bytes as decimal MB, without the unit."""
    return f"{n / 1e6:,.{1 if n >= 1e7 else 3}f}"


def footprint(ledger: Ledger, baseline: Ledger) -> str:
    """One line for before training: an *allocated* ledger next to that of the float64 baseline."""
    whole, other = total(ledger), total(baseline)
    obs, batch = ledger["buffer observations"], ledger["decoded batch"]
    buffer = obs + ledger["buffer rest"]
    if ledger == baseline:
        compared = "this is the float64 baseline"
    else:
        compared = f"float64 baseline {mb(other)} MB, {other / whole:.1f}x as much"
    return (
        f"memory: buffer {mb(buffer)} MB (observations {mb(obs)} MB) + networks, gradients, Adam "
        f"{mb(whole - buffer - batch)} MB + batch {mb(batch)} MB = {mb(whole)} MB; {compared}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes this process may still allocate on device.

    On the CPU the least that the machine, its cgroups and its rlimits leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([psutil.virtual_memory().available, *_cgroup_room(), *_rlimit_room()]))


def _cgroup_room() -> Iterator[int]:
    """What each memory cgroup of this process leaves, v1 or v2. No file means no limit."""
    for line in _text(PROC_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # v1
            mount, cache = CGROUP_ROOT / "memory", "total_inactive_file "
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:  # v2
            mount, cache = CGROUP_ROOT, "inactive_file "
            limit_file, usage_file = "memory.max", "memory.current"
        else:
            continue
        # Ancestors' limits bind too. In a container the path may be the host's and not exist here;
        # then the mount's own files are the container's.
        group = mount / path.lstrip("/")
        for level in (group, *group.parents):
            limit, usage = (_text(level / name).strip() for name in (limit_file, usage_file))
            if level.is_relative_to(mount) and limit.isdigit() and usage.isdigit():  # not "max"
                stat = _text(level / "memory.stat").splitlines()
                # Usage counts page cache, whose inactive part the kernel takes back when pressed.
                reclaimable = sum(int(row.split()[1]) for row in stat if row.startswith(cache))
                yield int(limit) - int(usage) + reclaimable


def _rlimit_room() -> Iterator[int]:
    used = psutil.Process().memory_info()
    for limit, name in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - getattr(used, name)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


AMOUNT = re.compile(r"(\d{0,15}\.?\d{1,15})\s*(?:(?:([kmgt])(i?))?b)?", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of e.g. 750MB, 1.2GB, 0.5 GiB or 123456. Raises ValueError on anything else, and 0."""
    if found := AMOUNT.fullmatch(text.strip()):
        number, prefix, binary = found.groups(default="")
        power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
        if n := int(Decimal(number) * (1024 if binary else 1000) ** power):
            return n
    raise ValueError(f"{text!r} is no amount of memory; 750MB, 1.2GB, 700MiB and 123456 are")


def peak_resident() -> int:
    """Most bytes that have been resident in this process."""
    # Not getrusage's ru_maxrss where it can be helped: a process inherits that from its parent.
    if found := re.search(r"VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status"))):
        return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def largest(algo: str, codec: Codec, budget: int, **sizes: int) -> int:
    """The largest buffer_size (sac) or n_steps (ppo) whose allocated ledger is within budget.

    Args:
        algo: ppo or sac.
        codec, sizes: arguments of `allocated_ppo` or `allocated_sac`, but for that one.
        budget: bytes.

    Raises:
        ValueError: not even one batch fits; one line with the least budget.
    """
    allocated, knob, least = LEDGERS[algo], KNOB[algo], _least(algo, **sizes)
    n = _most(allocated, codec, budget, MOST, knob, sizes)
    if n < least:
        needed = total(allocated(codec, **sizes, **{knob: least}))
        raise ValueError(
            f"a budget of {budget:,} bytes holds no batch; the least is {needed} bytes, "
            f"for {_flag(knob)} {least}"
        )
    return n


def _least(algo: str, *, num_envs: int, batch_size: int, **_: int) -> int:
    """The smallest buffer that `ppo.py` or `sac.py` accepts: one batch."""
    return math.ceil(batch_size / num_envs) if algo == "ppo" else batch_size


def _most(
    allocated: Callable[..., Ledger], codec: Codec, limit: int, at_most: int, knob: str, sizes: dict
) -> int:
    """The largest knob up to at_most whose ledger is within limit bytes; 0 if none is."""
    values = range(1, min(limit, at_most) + 1)  # a step takes a byte or more
    return bisect_right(values, limit, key=lambda n: total(allocated(codec, **sizes | {knob: n})))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def codec_flags(codec: Codec, bound: bool = False) -> str:
    """What asks `ppo.py` and `sac.py` for a codec; bound: say --quant-b even if the default."""
    if not isinstance(codec, FixedPoint):
        return "" if codec.dtype == torch.float64 else f"--storage {codec.name}"
    flags = [f"--quant-m {codec.m}"]
    if bound or codec.b != PAPER_B:
        flags.append(f"--quant-b {codec.b:.10g}")
    return " ".join(flags + ["--pack"] * isinstance(codec, Packed))


def check_fits(allocated: Callable[..., Ledger], codec: Codec, free: int, **sizes: int) -> None:
    """Refuse a run that cannot fit: `check_fits(allocated_sac, codec, free, **sizes)`.

    Args:
        allocated: `allocated_ppo` or `allocated_sac`.
        codec, sizes: its arguments.
        free: bytes to fit in.

    Raises:
        ValueError: one line with what is needed, what is free and which flags would fit.
    """
    needed = total(allocated(codec, **sizes))
    if needed <= free:
        return
    algo = "sac" if "buffer_size" in sizes else "ppo"
    knob, smaller = KNOB[algo], [kind(PAPER_M[algo], PAPER_B) for kind in (FixedPoint, Packed)]
    if fixed := isinstance(codec, FixedPoint):
        smaller.insert(0, Packed(codec.m, codec.b))
    options, most = [], 0
    for choice in (codec, *smaller):
        n = _most(allocated, choice, free, sizes[knob], knob, sizes)
        if n > most:
            words = [f"{_flag(knob)} {n}"] if n < sizes[knob] else []
            if choice is not codec:
                flags = codec_flags(choice, bound=fixed and codec.b != PAPER_B)
                words = [flags, *words, f"in place of {codec.name}"]
            options.append(" ".join(words))
            most = n
    remedy = f"not even {_flag(knob)} 1 fits; lower --hidden or --batch-size"
    if options:
        remedy = f"what fits: {', or '.join(options)}"
    raise ValueError(
        f"this run needs {mb(needed)} MB of memory and {mb(free)} MB are free; {remedy}"
    )


def plan(
    algo: str, codec: Codec, device: torch.device, drop_constant: bool = False, **sizes: int
) -> str:
    """What `ppo.py` and `sac.py` print before training: `check_fits`, then the `footprint`.

    With drop_constant (sac) only what cannot fit even if no column ever changes is refused, and
    the footprint is that of `dropping_at_most`.
    """
    allocated, free = LEDGERS[algo], free_memory(device)
    baseline = allocated(Float(), **sizes)
    if not drop_constant:
        check_fits(allocated, codec, free, **sizes)
        return footprint(allocated(codec, **sizes), baseline)
    if (least := total(allocated(codec, **sizes, live_columns=0))) > free:
        raise ValueError(
            f"even if no column ever changes this run needs {mb(least)} MB of memory, and "
            f"{mb(free)} MB are free; a smaller --buffer-size takes less"
        )
    bound = dropping_at_most(codec, **sizes)
    line = f"{footprint(bound, baseline)}; with --drop-constant that is the most it can take"
    return line + f", and only {mb(free)} MB are free" * (total(bound) > free)


def settled(nbytes: int, live: np.ndarray, device: torch.device) -> str:
    """One line for a run with --drop-constant: nbytes of its buffer, live (n,) bool."""
    return (
        f"memory: {live.sum()} of {len(live)} columns have changed; the buffer takes "
        f"{mb(nbytes)} MB, {mb(free_memory(device))} MB are free"
    )


# ---- the paper ledger ----


def paper_ledger(
    algo: str, obs_bits: int, *, obs_dim: int, act_dim: int, hidden: int, steps: int
) -> Ledger:
    """Bytes as the paper counts them: Eq. 1 for ppo, Eq. 3 for sac.

    Observations are stored once; actions, scalars and parameters are float32.

    Args:
        algo: ppo or sac.
        obs_bits: per observed value; 64 is the baseline, `quantize.bits(m, b)` the method.
        obs_dim, act_dim, hidden: sizes.
        steps: transitions in the buffer.
    """
    if algo == "ppo":
        parameters = ppo_parameters(obs_dim, act_dim, hidden)  # eq. 1
    else:
        actor, critic = sac_parameters(obs_dim, act_dim, hidden)
        parameters = actor + 2 * critic  # eq. 3
    return {
        "buffer observations": math.ceil(steps * obs_dim * obs_bits / 8),
        "buffer rest": 4 * steps * (act_dim + PAPER_SCALARS[algo]),
        "networks": 4 * parameters,
    }


def fig2() -> list[dict]:
    """The paper's Fig. 2, a cell per algorithm and task: the ledgers of B and Q, B / Q, shares."""
    cells = []
    for algo, m in PAPER_M.items():
        for task, (obs_dim, act_dim) in TASKS.items():
            sizes = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=64, steps=PAPER_STEPS[algo])
            b, q = (paper_ledger(algo, n, **sizes) for n in (64, bits(m, PAPER_B)))
            cell = dict(algo=algo, task=task, m=m, bits=bits(m, PAPER_B), **sizes, B=b, Q=q)
            obs_of_b = b["buffer observations"] / total(b)
            shares = dict(obs_of_b=obs_of_b, model_of_q=q["networks"] / total(q))
            cells.append(dict(**cell, ratio=total(b) / total(q), **shares))
    return cells


def worked_example(obs_dim: int, act_dim: int, steps: int, model: float) -> dict[str, float]:
    """Sec. III: a buffer of s, a, r in 64-bit floats, in MB, and three shares in percent."""
    obs, buffer = 8 * steps * obs_dim, 8 * steps * (obs_dim + act_dim + 1)
    everything = buffer + model
    return {
        "buffer, MB": buffer / 1e6,
        "buffer/total, %": 100 * buffer / everything,
        "obs/buffer, %": 100 * obs / buffer,
        "obs/total, %": 100 * obs / everything,
    }


def paper_report() -> dict:
    """Fig. 2 and Sec. III recomputed, and notes on what does not come out as printed."""
    cells, notes = fig2(), []
    for algo, m in PAPER_M.items():
        ratios = [cell["ratio"] for cell in cells if cell["algo"] == algo]
        span = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
        notes.append(f"{algo.upper()}, m={m}: {span}; the paper says {PAPER_RATIOS[algo]}.")
    notes[-1] += f" Sec. V-C repeats PPO's 4.2x for SAC, whose best is {max(ratios):.1f}x."
    humanoid = [total(cells[-1][key]) for key in "BQ"]
    mega, mebi = (" -> ".join(f"{n / unit:,.1f}" for n in humanoid) for unit in (1e6, 2**20))
    notes.append(
        f"Humanoid-v3 SAC: {mebi} MiB, which is {mega} MB. The paper's 3GB -> just under 750MB "
        "holds in MiB only, while Sec. III counts in decimal MB."
    )
    below = [cell for cell in cells if cell["obs_of_b"] < 0.9]
    notes.append(
        "Observations are 'over 90%' of the total (Sec. I), but not for "
        + ", ".join(f"{c['algo'].upper()} {c['task']} ({c['obs_of_b']:.1%})" for c in below)
        + "."
    )
    examples = [
        dict(section=section, steps=inputs[2], recomputed=worked_example(*inputs), paper=claims)
        for section, inputs, claims in WORKED_EXAMPLES
    ]
    obs_dim, act_dim, steps, model = WORKED_EXAMPLES[0][1]
    most = 8 * steps * (obs_dim / 0.915 - (obs_dim + act_dim + 1))  # 91.5% rounds to 92%
    a, b, b_right = ([*example["recomputed"].values()] for example in examples)
    notes += [
        f"III-A: 92% should be {a[3]:.2f}%; 92% takes a model of at most {mb(most)} MB, and the "
        f"text has {model / 1e6} MB.",
        f"III-B: 96.8MB, 97.7% and 90.4% belong to {examples[2]['steps']:,} samples, in line with "
        f"footnote 2; the text's 1e6 give {b[0]:.0f} MB, {b[1]:.2f}% and {b[3]:.2f}%.",
        f"III-B: 92.5% is {b_right[2]:.2f}% cut off, not rounded. No s' or done is counted.",
    ]
    return dict(ledger_unit="bytes", fig2=cells, worked_examples=examples, notes=notes)


# ---- any robot: the ledgers side by side ----


@dataclass
class Args:
    """What models and buffers of a robot cost in memory; without one, the paper's own tables."""

    env: str | None = None
    """Gymnasium id that gives dimensions and control rate. Without any robot: the paper's four."""
    obs_dim: int | None = None
    """Values in an observation, in place of --env."""
    act_dim: int | None = None
    """Values in an action, in place of --env."""
    control_hz: float | None = None
    """Observations per second, for the bandwidth they take; default: the environment's."""
    algo: Literal["ppo", "sac"] = "sac"
    """Algorithm."""
    quant_m: int | None = None
    """Decimals kept; default: the paper's (PPO 1, SAC 2) unless --storage is given."""
    quant_b: float = PAPER_B
    """Clamp bound, symmetric."""
    storage: Literal["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"] | None = None
    """Store this float type in place of fixed point."""
    pack: bool = False
    """Store fixed point in the bits it needs: 8, 12, 15, 18 for m = 0, 1, 2, 3."""
    live_columns: int | None = None
    """SAC: with --drop-constant, columns that ever change; a run says it, 257 for Humanoid-v3."""
    measure: bool = False
    """Run the real script up to its first updates and set what is resident beside; takes --env."""
    budget: str | None = None
    """Print the largest buffer of every storage within this, e.g. 750MB, and its command."""
    layouts: bool = False
    """SAC: print what other libraries' replay buffers take beside ours."""
    buffer_size: int = PAPER_STEPS["sac"]
    """SAC: rows of the replay buffer, all envs together."""
    n_steps: int = PAPER_STEPS["ppo"]
    """PPO: steps per env and rollout."""
    num_envs: int = 1
    """Environments."""
    hidden: int = 64
    """Width of the two hidden layers."""
    batch_size: int | None = None
    """Transitions per minibatch; default: the paper's (PPO 64, SAC 256)."""
    json: bool = False
    """Print everything as one JSON object, in bytes."""
    plot: Path | None = None
    """Draw the paper's Fig. 2, always of its own four tasks, into this file, e.g. fig2.png."""


IDLE = {  # a choice -> what it does not look at
    "--algo ppo": "buffer_size live_columns layouts",
    "--algo sac": "n_steps",
    "--budget": "quant_m storage pack control_hz buffer_size n_steps measure layouts",
    "--layouts": "quant_m quant_b storage pack control_hz hidden batch_size measure",
}


def check_args(args: Args) -> None:
    """Raise ValueError where arguments contradict each other or make no sense."""
    names = [field.name for field in fields(Args)]
    given = [name for name in names if getattr(args, name) != getattr(Args, name)]
    if args.env is not None and {"obs_dim", "act_dim"} & set(given):
        raise ValueError("--env and --obs-dim/--act-dim exclude each other; drop one")
    if (args.obs_dim is None) != (args.act_dim is None):
        raise ValueError("--obs-dim and --act-dim belong together; give both")
    if args.measure and args.env is None:
        raise ValueError("--measure runs the real script and needs --env")
    idle = [_flag(name) for name in given if name not in ("json", "plot")]
    if args.env is None and args.obs_dim is None and idle:
        raise ValueError(f"{idle[0]} needs a robot: --env, or --obs-dim and --act-dim")
    for choice in (f"--algo {args.algo}", *map(_flag, given)):
        for name in IDLE.get(choice, "").split():
            if name in given:
                raise ValueError(f"{_flag(name)} does nothing with {choice}; drop one")
    if args.measure and args.live_columns is not None:
        raise ValueError(
            "--live-columns depend on the data: see buffer_bytes in a run's result.json"
        )
    sizes = "obs_dim act_dim control_hz buffer_size n_steps num_envs hidden batch_size"
    for name in sizes.split():
        value = getattr(args, name)
        if value is not None and not 0 < value <= MOST:
            raise ValueError(f"{_flag(name)} {value} must be positive and at most {MOST}")


def find_robot(args: Args) -> tuple[int, int, float | None]:
    """obs_dim, act_dim and observations per second, if known, of the robot that args name."""
    obs_dim, act_dim, hz = args.obs_dim, args.act_dim, args.control_hz
    if args.env is not None:
        import envs  # only here: it loads MuJoCo

        env = envs.make(args.env)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        dt = getattr(env.unwrapped, "dt", None)  # seconds per step
        hz = hz or (1 / dt if dt else None)
        env.close()
    if args.live_columns is not None and not 0 <= args.live_columns <= obs_dim:
        raise ValueError(f"--live-columns {args.live_columns} must be from 0 to {obs_dim}")
    return obs_dim, act_dim, hz


def robot_report(args: Args) -> dict:
    """The ledgers for one robot, in float64 and in the codec asked for, and why they differ."""
    algo, (obs_dim, act_dim, hz) = args.algo, find_robot(args)
    m = PAPER_M[algo] if args.quant_m is None and args.storage is None else args.quant_m
    codec = make_codec(m, args.quant_b, args.storage, args.pack)
    dims = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=args.hidden)
    sizes = dict(num_envs=args.num_envs, batch_size=args.batch_size or PAPER_BATCH[algo])
    sizes[KNOB[algo]] = getattr(args, KNOB[algo])
    steps = args.n_steps * args.num_envs if algo == "ppo" else args.buffer_size
    dropped = {} if args.live_columns is None else {"live_columns": args.live_columns}
    paper_bits = bits(codec.m, codec.b) if isinstance(codec, FixedPoint) else codec.bits
    stored = {"baseline": (64, Float(), {}), "codec": (paper_bits, codec, dropped)}
    paper, ours = {}, {}
    for key, (n, kind, live) in stored.items():
        paper[key] = paper_ledger(algo, n, **dims, steps=steps)
        ours[key] = LEDGERS[algo](kind, **dims, **sizes, **live)
    columns = dropped.get("live_columns", obs_dim)
    words = " in whole 16-bit words" * isinstance(codec, Packed)
    counts = dict(paper_bits=paper_bits, bits=codec.bits, columns=columns, words=words, steps=steps)
    counts["rows"] = steps if algo == "ppo" else args.num_envs * rows_per_env(steps, args.num_envs)
    counts |= dict(row=row_bytes(codec, columns), paper_row=paper_bits * obs_dim / 8)
    differences = {
        row: dict(bytes=n - paper["codec"].get(row, 0), why=WHY[algo][row].format(**counts))
        for row, n in ours["codec"].items()
    }
    sent = dict(baseline=8 * obs_dim, codec=row_bytes(codec, obs_dim), paper=counts["paper_row"])
    rates = {name: hz * n for name, n in sent.items()} if hz else None
    measured = measure(args.env, algo, codec, **dims, **sizes) if args.measure else None
    report = dict(ledger_unit="bytes", robot=args.env, algo=algo, **dims, **sizes, **dropped)
    report |= dict(
        codec=codec.name, **counts, paper=paper, allocated=ours, allocated_minus_paper=differences
    )
    return dict(report, measured=measured, control_hz=hz, bytes_per_second=rates)


def row_bytes(codec: Codec, n: int) -> int:
    """Bytes of the stored row of n values."""
    width, dtype = codec.row(n)
    return width * dtype.itemsize


# ---- the measured ledger ----


def measure(env: str, algo: str, codec: Codec, **sizes: int) -> dict[str, int]:
    """Run the real script with the smallest buffer and with this one, up to the first updates.

    Returns:
        Bytes: "resident" when training ends; its "peak"; "interpreter", its own and its
        libraries', which is what the small run has beyond its allocated ledger; "total", what is
        resident beyond that, to compare with the allocated total.

    Raises:
        ValueError: the buffer holds no batch, or the script fails; then with its last line.
    """
    knob, least = KNOB[algo], _least(algo, **sizes)
    if sizes[knob] < least:
        raise ValueError(f"--measure runs {algo}.py, whose {_flag(knob)} is at least {least}")
    small = sizes | {knob: least}
    own = _run(env, algo, codec, **small)["rss_bytes"] - total(LEDGERS[algo](codec, **small))
    result = _run(env, algo, codec, **sizes)
    now, peak = result["rss_bytes"], result["peak_rss_bytes"]
    # The kernel counts the peak less exactly than what is resident now.
    return dict(resident=now, peak=max(now, peak), interpreter=own, total=now - own)


def _run(env: str, algo: str, codec: Codec, **sizes: int) -> dict:
    """result.json of a short run on the CPU that has written to every page of its buffer."""
    flags = f"{codec_flags(codec)} --device cpu --eval-episodes 0 --run-name measured"
    for name in ("num_envs", "hidden", "batch_size"):
        flags += f" {_flag(name)} {sizes[name]}"
    if algo == "sac":  # with --memory-budget it touches the buffer at the start
        ledger, batch = total(allocated_sac(codec, **sizes)), sizes["batch_size"]
        flags += f" --memory-budget {ledger} --learning-starts {batch}"
        flags += f" --total-timesteps {batch + 50}"
    else:  # one whole rollout
        flags += f" --n-steps {sizes['n_steps']} --total-timesteps 1 --n-epochs 1"
    script = Path(__file__).with_name(f"{algo}.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--env", env, "--run-dir", folder, *flags.split()]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=one_thread, capture_output=True, text=True)
        if run.returncode:
            *_, line = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise ValueError(f"--measure failed; {line}")
        return json.loads(Path(folder, "measured", "result.json").read_text())


# ---- the largest buffer within a budget, and other libraries' buffers ----


def storages(quant_b: float, live_columns: int | None) -> Iterator[tuple[Codec, int | None]]:
    """Every float type, 0 to 3 decimals and these packed; fixed point also with live_columns."""
    for dtype in STORAGE_DTYPES.values():
        yield Float(dtype), None
    for m in range(4):
        if m and quant_b * 10**m >= 2**24:
            return  # so many decimals of so large a number are beyond float32
        for codec in (FixedPoint(m, quant_b), Packed(m, quant_b)):
            if isinstance(codec, Packed) and codec.bits == 8 * codec.dtype.itemsize:
                continue  # nothing to pack
            yield from ((codec, live) for live in dict.fromkeys([None, live_columns]))


def budget_report(args: Args) -> dict:
    """The largest buffer of each storage whose allocated ledger is within --budget."""
    algo, knob, budget = args.algo, KNOB[args.algo], parse_bytes(args.budget)
    obs_dim, act_dim, _ = find_robot(args)
    defaults = dict(num_envs=1, hidden=64, batch_size=PAPER_BATCH[algo])  # of the scripts
    chosen = {name: getattr(args, name) or default for name, default in defaults.items()}
    words = [f"python {algo}.py", f"--env {args.env or 'YOUR-ENV'}"]
    words += [f"{_flag(name)} {n}" for name, n in chosen.items() if n != defaults[name]]
    sizes = dict(obs_dim=obs_dim, act_dim=act_dim, **chosen)
    rows = []
    for codec, live in storages(args.quant_b, args.live_columns):
        dropped, columns = ({}, obs_dim) if live is None else ({"live_columns": live}, live)
        try:
            n = largest(algo, codec, budget, **sizes, **dropped)
            size = f"{_flag(knob)} {n}" + " --drop-constant" * bool(dropped)
            if algo == "sac" and not dropped:
                size = f"--memory-budget {''.join(args.budget.split())}"
            command = " ".join(filter(None, [*words, codec_flags(codec), size]))
        except ValueError:
            n, command = 0, "does not fit"
        stored = {"storage": codec.name, "bits": codec.bits, "columns": columns}
        rows.append(stored | {knob: n, "command": command})
    if not any(row[knob] for row in rows):
        raise ValueError(f"--budget {args.budget}: {budget:,} bytes hold no batch in any storage")
    note = (
        f"{mb(budget)} MB for buffer, networks, gradients, Adam and one batch; the interpreter and "
        "its libraries\ncome on top, about 300 MB: see --measure. "
        f"The paper's m is {PAPER_M[algo]} for {algo.upper()}."
    )
    if args.live_columns is not None:
        note += f"\n--drop-constant: if no other column changes after row {LiveColumns.WATCHED:,}."
    report = dict(ledger_unit="bytes", robot=args.env, algo=algo, **sizes, budget=budget)
    return dict(report, rows=rows, note=note)


def layouts_report(args: Args) -> dict:
    """Replay buffers for --buffer-size transitions: those of other libraries, then ours."""
    obs_dim, act_dim, _ = find_robot(args)
    sizes = dict(obs_dim=obs_dim, act_dim=act_dim, num_envs=args.num_envs)
    sizes["buffer_size"] = steps = args.buffer_size
    layouts = []  # name, bytes per observation, those of the buffer's two rows, note
    for name, copies, itemsize, note in PEERS:
        n = copies * itemsize * obs_dim
        layouts.append((name, n, n * steps, 4 * (act_dim + 3) * steps, note))
    fixed = [FixedPoint(PAPER_M["sac"], PAPER_B), Packed(PAPER_M["sac"], PAPER_B)]
    ours = [(codec, None) for codec in (Float(), Float(torch.float16), *fixed)]
    if args.live_columns is not None:
        ours += [(codec, args.live_columns) for codec in fixed]
    for codec, live in ours:
        ledger = allocated_sac(codec, **sizes, hidden=1, batch_size=1, live_columns=live)
        n = row_bytes(codec, obs_dim if live is None else live)
        note = "one copy" if live is None else f"one copy, {live} columns"
        buffer = ledger["buffer observations"], ledger["buffer rest"]
        flag = "" if live is None else ", --drop-constant"
        layouts.append((f"ours: {codec.name}{flag}", n, *buffer, note))
    stock, rows = sum(layouts[0][2:4]), []
    for name, n, obs, rest, note in layouts:
        row = {"layout": name, "bytes per observation": n, "observations": obs, "rest": rest}
        rows.append(row | {"total": obs + rest, "times less": stock / (obs + rest), "note": note})
    note = (
        "rest: actions, rewards and ends, in float32 in the first four; times less: than the first"
    )
    report = dict(ledger_unit="bytes", robot=args.env, algo="sac", **sizes)
    return dict(report, rows=rows, note=note)


# ---- output ----


def _table(rows: list[list[str]], text: Sequence[int] = (0,)) -> None:
    """Print rows with the columns in text to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def print_paper(report: dict) -> None:
    """`paper_report` as two tables and the notes."""
    print("Fig. 2: B 64-bit observations, Q quantised; 64x64 networks in float32\n")
    rows = [["", "m", "bits", "B, MB", "Q, MB", "B/Q", "observations in B", "model in Q"]]
    for cell in report["fig2"]:
        totals = [mb(total(cell[key])) for key in "BQ"]
        shares = [f"{cell['obs_of_b']:.1%}", f"{cell['model_of_q']:.2%}"]
        name = f"{cell['algo'].upper()} {cell['task']}"
        numbers = [str(cell["m"]), str(cell["bits"]), *totals, f"{cell['ratio']:.2f}x", *shares]
        rows.append([name, *numbers])
    _table(rows)
    print("\nSec. III: s, a, r in 64-bit floats; in brackets what the paper says\n")
    rows = [["", "samples", *report["worked_examples"][0]["recomputed"]]]
    for example in report["worked_examples"]:
        pairs = zip(example["recomputed"].values(), example["paper"], strict=True)
        results = [f"{value:.2f} ({claim})" for value, claim in pairs]
        rows.append([example["section"], f"{example['steps']:,}", *results])
    _table(rows)
    print("", *report["notes"], sep="\n- ")


def print_settings(report: dict) -> None:
    """The heading of a report on one robot."""
    sizes = "obs_dim act_dim hidden buffer_size n_steps live_columns num_envs batch_size"
    settings = [f"{name} {report[name]:,}" for name in sizes.split() if name in report]
    print(f"{report['robot'] or 'robot'}, {report['algo'].upper()}: {', '.join(settings)}\n")


def print_robot(report: dict) -> None:
    """`robot_report` as one table, the reasons for its differences and the bandwidth."""
    print_settings(report)
    heads = ["paper: 64-bit", f"{report['paper_bits']}-bit", "allocated: float64", report["codec"]]
    ledgers = [*report["paper"].values(), *report["allocated"].values()]
    rows = [["MB", *heads]]
    for row in report["allocated"]["codec"]:
        rows.append([row, *(mb(ledger[row]) if row in ledger else "-" for ledger in ledgers)])
    totals = [total(ledger) for ledger in ledgers]
    rows.append(["total", *map(mb, totals)])
    ratios = [f"{totals[i] / totals[i + 1]:.2f}x" for i in (0, 2)]
    rows.append(["ratio", "", ratios[0], "", ratios[1]])
    if measured := report["measured"]:
        column = {"MB": "measured", "total": mb(measured["total"])}
        rows = [[*row, column.get(row[0], "")] for row in rows]
        for name in ("interpreter", "resident", "peak"):
            rows.append([name, "", "", "", "", mb(measured[name])])
    _table(rows)
    if measured:
        off, note = measured["total"] - totals[-1], NOISY * (totals[-1] < COARSE)
        print(f"\nmeasured - allocated, bytes: {off:+,} ({off / totals[-1]:+.2%}){note}")
    print(f"\nallocated - paper, bytes ({report['codec']}):")
    for row, difference in report["allocated_minus_paper"].items():
        print(f"  {row:20}{difference['bytes']:+15,}  {difference['why']}")
    if rates := report["bytes_per_second"]:
        print(
            f"\nobservations sent off the robot at {report['control_hz']:.4g} Hz, bytes/s: "
            f"{rates['baseline']:,.0f} in float64, {rates['codec']:,.0f} in {report['codec']}, "
            f"{rates['paper']:,.0f} in {report['paper_bits']} bits"
        )


def print_rows(report: dict) -> None:
    """`budget_report` or `layouts_report`: its rows as one table, a column for each key."""
    print_settings(report)
    in_mb, (first, *_) = ("observations", "rest", "total"), report["rows"]
    table = [[f"{key}, MB" if key in in_mb else key for key in first]]
    for row in report["rows"]:
        formats = {int: "{:,}", float: "{:.2f}x", str: "{}"}
        cells = (mb(n) if key in in_mb else formats[type(n)].format(n) for key, n in row.items())
        table.append([*cells])
    _table(table, text=[i for i, n in enumerate(first.values()) if isinstance(n, str)])
    print(f"\n{report['note']}")


def plot_fig2(cells: list[dict], path: Path) -> None:
    """Draw Fig. 2 into path: memory of B and Q per task, the model in black under the buffer."""
    from matplotlib.figure import Figure  # only here; without pyplot it needs no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    endings = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"--plot {path}: the ending must be one of {', '.join(sorted(endings))}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")
    for ax, algo in zip(figure.subplots(1, 2), PAPER_M, strict=True):
        shown = [cell for cell in cells if cell["algo"] == algo]
        places = [3 * i + j for i in range(len(shown)) for j in range(2)]
        ledgers = [cell[key] for cell in shown for key in "BQ"]
        model = [ledger["networks"] / 1e6 for ledger in ledgers]
        buffer = [(total(ledger) - ledger["networks"]) / 1e6 for ledger in ledgers]
        ax.bar(places, model, 0.9, color="black", label="model")
        drawn = ax.bar(places, buffer, 0.9, bottom=model, color="tab:blue", label="buffer")
        ratios = [text for cell in shown for text in ("", f"{cell['ratio']:.1f}x")]
        ax.bar_label(drawn, ratios, padding=2)
        ax.set_xticks(places, ["B", "Q"] * len(shown))
        tasks = [cell["task"].removesuffix("-v3") for cell in shown]
        names = ax.secondary_xaxis(-0.06)
        names.set_xticks([3 * i + 0.5 for i in range(len(shown))], tasks)
        for axis in (ax, names):
            axis.tick_params(axis="x", length=0)
        names.spines["bottom"].set_visible(False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(title=f"{algo.upper()}, m={PAPER_M[algo]}", ylabel="memory, MB")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    """Compute, draw, then print. Bad input is one line on stderr, exit code 2 and nothing else."""
    try:
        check_args(args)
        if args.env is None and args.obs_dim is None:
            report, show = paper_report(), print_paper
        elif args.budget is not None:
            report, show = budget_report(args), print_rows
        elif args.layouts:
            report, show = layouts_report(args), print_rows
        else:
            report, show = robot_report(args), print_robot
        if args.plot:
            plot_fig2(fig2(), args.plot)
            report["plot"] = str(args.plot)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        print(json.dumps(report, indent=2))
        return
    show(report)
    if args.plot:
        print(f"\nFig. 2 is in {args.plot}")


if __name__ == "__main__":
    main(tyro.cli(Args))
