"""How much each storage holds, and what other libraries' replay buffers take beside ours.

`python memory.py --env Humanoid-v3 --budget 750MB` prints the first, `--layouts` the second;
memory.py hands its own functions in.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed
from support.arguments import flag
from support.columns import LiveColumns
from support.machine import mb, parse_bytes

# Name, copies of an observation, bytes a value, note. Action, reward, done and timeout are float32.
OTHERS = (
    ("Stable-Baselines3, SBX: float64", 2, 8, "obs and next_obs"),
    ("Stable-Baselines3, optimize_memory_usage: float64", 1, 8, "one copy, wrong at time-outs"),
    ("CleanRL, LeanRL: float32", 2, 4, "obs and next_obs"),
    ("Just Round as released: uint16", 2, 2, "obs and next_obs"),
)


def storages(quant_b: float, live_columns: int | None) -> Iterator[tuple[Codec, int | None]]:
    """Every float type, 0 to 3 decimals and these packed; fixed point also with live_columns."""
    for dtype in STORAGE_DTYPES.values():
        yield Float(dtype), None
    for m in range(4):
        if m and quant_b * 10**m >= 2**24:
            return  # so many decimals of so large a number are beyond float32
        whole, packed = FixedPoint(m, quant_b), Packed(m, quant_b)
        for codec in (whole, packed) if packed.bits_per_value < whole.bits_per_value else (whole,):
            yield from ((codec, live) for live in dict.fromkeys([None, live_columns]))


def budget(args: Any, sizes: dict[str, int], largest: Callable, codec_flags: Callable) -> dict:
    """The largest buffer of each storage whose allocated ledger is within --budget.

    Args:
        args: `memory.Args`.
        sizes: obs_dim, act_dim, hidden, num_envs, batch_size.
        largest, codec_flags: those of memory.py.

    Raises:
        ValueError: nothing fits, or the budget is no amount of memory.
    """
    algo, limit = args.algo, parse_bytes(args.budget)
    knob, m = ("n_steps", 1) if algo == "ppo" else ("buffer_size", 2)
    words = [f"python {algo}.py", f"--env {args.env or 'YOUR-ENV'}"]
    for name in ("num_envs", "hidden", "batch_size"):
        if getattr(args, name) != getattr(type(args), name):
            words.append(f"{flag(name)} {sizes[name]}")
    rows = []
    for codec, live in storages(args.quant_b, args.live_columns):
        columns = {} if live is None else {"live_columns": live}
        try:
            n = largest(algo, codec, limit, **sizes, **columns)
        except ValueError:
            n, command = 0, "does not fit"
        else:
            size = f"{flag(knob)} {n}"
            if live is not None:
                size += " --drop-constant"
            elif algo == "sac":
                size = f"--memory-budget {''.join(args.budget.split())}"
            command = " ".join(filter(None, [*words, codec_flags(codec), size]))
        row = {"storage": codec.name, "bits": codec.bits_per_value}
        row["columns"] = sizes["obs_dim"] if live is None else live
        rows.append(row | {knob: n, "command": command})
    if not any(row[knob] for row in rows):
        raise ValueError(f"--budget {args.budget}: {limit:,} bytes hold no batch in any storage")
    note = (
        f"{mb(limit)} MB for buffer, networks, gradients, Adam and one batch; the interpreter and "
        "its libraries\ncome on top, about 300 MB: see --measure. "
        f"The paper's m is {m} for {algo.upper()}."
    )
    if args.live_columns is not None:
        note += f"\n--drop-constant: if no other column changes after row {LiveColumns.WATCHED:,}."
    report = dict(robot=args.env, algo=algo, **sizes, budget=limit)
    return dict(report, rows=rows, note=note)


def layouts(args: Any, sizes: dict[str, int], allocated: Callable) -> dict:
    """Replay buffers for --buffer-size transitions: those of other libraries, then ours.

    Args:
        args: `memory.Args`.
        sizes: obs_dim, act_dim, hidden, num_envs, batch_size.
        allocated: that of memory.py.
    """
    obs_dim, act_dim, steps = sizes["obs_dim"], sizes["act_dim"], args.buffer_size
    found = []  # name, bytes per observation, of all observations and of the rest, note
    for name, copies, itemsize, note in OTHERS:
        n = copies * itemsize * obs_dim
        found.append((name, n, n * steps, 4 * (act_dim + 3) * steps, note))
    fixed = [FixedPoint(2, 127), Packed(2, 127)]  # the paper's for SAC
    ours = [(codec, None) for codec in (Float(), Float(torch.float16), *fixed)]
    if args.live_columns is not None:
        ours += [(codec, args.live_columns) for codec in fixed]
    for codec, live in ours:
        ledger = allocated("sac", codec, **sizes, buffer_size=steps, live_columns=live)
        name, note = f"ours: {codec.name}", "one copy"
        if live is not None:
            name, note = f"{name}, --drop-constant", f"one copy, {live} of {obs_dim} columns"
        width, dtype = codec.row(obs_dim if live is None else live)
        buffer = ledger["buffer observations"], ledger["buffer rest"]
        found.append((name, width * dtype.itemsize, *buffer, note))
    stock, rows = sum(found[0][2:4]), []
    for name, n, obs, rest, note in found:
        row = {"layout": name, "bytes per observation": n, "observations": obs, "rest": rest}
        rows.append(row | {"total": obs + rest, "times less": stock / (obs + rest), "note": note})
    note = (
        "rest: actions, rewards and ends, in float32 in the first four; times less: than the first"
    )
    report = dict(robot=args.env, algo="sac", obs_dim=obs_dim, act_dim=act_dim)
    report |= dict(num_envs=sizes["num_envs"], buffer_size=steps, rows=rows, note=note)
    return report
