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

Nothing here lists arrays or layers: `allocated` builds the real buffer and the real networks on
torch's "meta" device, whose tensors have shapes and dtypes but no memory, and adds up their bytes.
A network that you add to a script has to be added to `learning`, too.
"""

import json
import math
import sys
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from buffers import ReplayBuffer, RolloutBuffer
from quantize import Codec, FixedPoint, Float, Packed, make_codec
from support import networks
from support.arguments import check_ranges, flag
from support.errors import command
from support.machine import free_memory, mb, parse_bytes

Ledger = dict[str, int]  # row name -> bytes

SIZED_BY = {"ppo": "n_steps", "sac": "buffer_size"}  # the argument that sizes the buffer
PAPER_M = {"ppo": 1, "sac": 2}  # decimals kept, Sec. V-B
PAPER_BATCH = {"ppo": 64, "sac": 256}  # Table II
PAPER_B = 127


# ---- the allocated ledger ----


@cache
def learning(algo: str, obs_dim: int, act_dim: int, hidden: int) -> Ledger:
    """Bytes of networks, gradients and Adam, all in float32."""

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        if algo == "ppo":
            n, targets = count(networks.ActorCritic(obs_dim, act_dim, hidden)), {}
        else:
            actor = networks.Actor(obs_dim, act_dim, hidden)
            critic = networks.Critic(obs_dim, act_dim, hidden)
            n = count(actor, critic) + 1  # log_alpha is one more
            targets = {"target networks": 4 * count(critic)}
    # Adam keeps a mean and a square of every gradient.
    return {"networks": 4 * n, **targets, "gradients": 4 * n, "Adam moments": 8 * n}


def allocated(
    algo: str,
    codec: Codec,
    *,
    obs_dim: int,
    act_dim: int,
    hidden: int,
    num_envs: int,
    batch_size: int,
    n_steps: int = 0,
    buffer_size: int = 0,
    live_columns: int | None = None,
    late_columns: int = 0,
) -> Ledger:
    """Bytes of every persistent tensor of `ppo.py` or `sac.py`, and of one decoded minibatch.

    The first two rows sum to the buffer's `nbytes`.

    Args:
        algo: ppo or sac.
        codec, obs_dim, act_dim, hidden, num_envs, batch_size: as in the script.
        n_steps, buffer_size: likewise; ppo has the first and sac the second.
        live_columns: with --drop-constant, how many columns change in the first rows. The ledger is
            of the buffer once it stores only these or, if that is more, before.
        late_columns: how many more change for the first time after that.

    Raises:
        ValueError: more bytes than a 64-bit number can count.
    """
    sizes = (num_envs, obs_dim, act_dim, torch.device("meta"))
    try:
        if algo == "ppo":
            buffer = RolloutBuffer(codec, n_steps, *sizes, seed=0)
            acting = {"rollout noise": 2 * buffer.actions.nbytes}  # and log_std, for each action
        else:
            acting = {}
            drop_constant = live_columns is not None
            buffer = ReplayBuffer(codec, buffer_size, *sizes, seed=0, drop_constant=drop_constant)
        learned = learning(algo, obs_dim, act_dim, hidden)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        smaller = f"lower --hidden or {flag(SIZED_BY[algo])}"
        raise ValueError(f"these sizes take more than 9 EB of memory; {smaller}") from None
    obs = buffer.obs.nbytes
    rest = buffer.nbytes - obs
    if live_columns is not None:
        obs = buffer.obs.bytes_when(live_columns, late_columns)
    ledger = {"buffer observations": obs, "buffer rest": rest, **acting, **learned}
    return ledger | {"decoded batch": buffer.batch_bytes(batch_size)}


def total(ledger: Ledger) -> int:
    """Bytes of all rows."""
    return sum(ledger.values())


# ---- does it fit ----


def largest_within(algo: str, codec: Codec, limit: int, at_most: int = 10**12, **sizes: int) -> int:
    """The largest buffer_size (sac) or n_steps (ppo) up to at_most that is within limit bytes.

    0 if not even 1 is.
    """

    def needed(n: int) -> int:
        return total(allocated(algo, codec, **sizes | {SIZED_BY[algo]: n}))

    n = 1
    while n < at_most and needed(n) <= limit:
        n = min(2 * n, at_most)
    return bisect_right(range(1, n + 1), limit, key=needed)


def largest(algo: str, codec: Codec, budget: int, **sizes: int) -> int:
    """The largest buffer_size (sac) or n_steps (ppo) whose allocated ledger is within budget.

    Args:
        algo: ppo or sac.
        codec, sizes: arguments of `allocated`, but for that one.
        budget: bytes.

    Raises:
        ValueError: not even one batch fits; one line with the least budget.
    """
    knob, n = SIZED_BY[algo], largest_within(algo, codec, budget, **sizes)
    least = math.ceil(sizes["batch_size"] / (sizes["num_envs"] if algo == "ppo" else 1))
    if n < least:
        needed = total(allocated(algo, codec, **sizes, **{knob: least}))
        raise ValueError(
            f"a budget of {budget:,} bytes holds no batch; the least is {needed} bytes, "
            f"for {flag(knob)} {least}"
        )
    return n


def buffer_size(args: Any, codec: Codec, device: torch.device, **sizes: int) -> int:
    """Rows of SAC's buffer: --buffer-size, or as many as --memory-budget holds.

    Args:
        args: those of `sac.py`.
        codec, sizes: arguments of `allocated`, but for buffer_size.
        device: where the buffer will be.

    Raises:
        ValueError: one line, if the budget is no amount, more than is free, or below one batch.
    """
    if args.memory_budget is None:
        return args.buffer_size
    budget, free = parse_bytes(args.memory_budget), free_memory(device)
    if budget > free:
        raise ValueError(
            f"--memory-budget {args.memory_budget} is more than the {mb(free)} MB "
            "of memory that are free"
        )
    return largest("sac", codec, budget, **sizes)


def codec_flags(codec: Codec, bound: bool = False) -> str:
    """What asks `ppo.py` and `sac.py` for a codec; bound: say --quant-b even if the default."""
    if not isinstance(codec, FixedPoint):
        return "" if codec.dtype == torch.float64 else f"--storage {codec.name}"
    flags = [f"--quant-m {codec.m}"]
    if bound or codec.b != PAPER_B:
        flags.append(f"--quant-b {codec.b:.10g}")
    if isinstance(codec, Packed):
        flags.append("--pack")
    return " ".join(flags)


def check_fits(algo: str, codec: Codec, free: int, **sizes: int) -> None:
    """Refuse a run that cannot fit.

    Args:
        algo, codec, sizes: arguments of `allocated`.
        free: bytes to fit in.

    Raises:
        ValueError: one line with what is needed, what is free and which flags would fit.
    """
    needed = total(allocated(algo, codec, **sizes))
    if needed <= free:
        return
    knob, given_bound = SIZED_BY[algo], isinstance(codec, FixedPoint) and codec.b != PAPER_B
    choices = [codec, FixedPoint(PAPER_M[algo], PAPER_B), Packed(PAPER_M[algo], PAPER_B)]
    if isinstance(codec, FixedPoint):
        choices.insert(1, Packed(codec.m, codec.b))
    options, held = [], 0
    for choice in choices:
        n = largest_within(algo, choice, free, at_most=sizes[knob], **sizes)
        if n > held:
            words = [f"{flag(knob)} {n}"] if n < sizes[knob] else []
            if choice is not codec:
                words = [codec_flags(choice, given_bound), *words, f"in place of {codec.name}"]
            options.append(" ".join(words))
            held = n
    remedy = f"not even {flag(knob)} 1 fits; lower --hidden or --batch-size"
    if options:
        remedy = f"what fits: {', or '.join(options)}"
    raise ValueError(
        f"this run needs {mb(needed)} MB of memory and {mb(free)} MB are free; {remedy}"
    )


def footprint(ledger: Ledger, baseline: Ledger) -> str:
    """One line for before training: an *allocated* ledger next to that of the float64 baseline."""
    whole, other = total(ledger), total(baseline)
    obs, batch = ledger["buffer observations"], ledger["decoded batch"]
    noise = ledger.get("rollout noise", 0)
    buffer = obs + ledger["buffer rest"]
    compared = f"float64 baseline {mb(other)} MB, {other / whole:.1f}x as much"
    if ledger == baseline:
        compared = "this is the float64 baseline"
    return (
        f"memory: buffer {mb(buffer)} MB (observations {mb(obs)} MB) + networks, gradients, Adam "
        f"{mb(whole - buffer - noise - batch)} MB + {'batch and noise' if noise else 'batch'} "
        f"{mb(noise + batch)} MB = {mb(whole)} MB; {compared}"
    )


def plan(
    algo: str, codec: Codec, device: torch.device, drop_constant: bool = False, **sizes: int
) -> str:
    """What `ppo.py` and `sac.py` print before training: the `footprint`.

    With drop_constant (sac) only what cannot fit even if no column ever changes is refused, and
    the footprint is the most that the run can take.

    Raises:
        ValueError: it does not fit; one line, see `check_fits`.
    """
    free, baseline = free_memory(device), allocated(algo, Float(), **sizes)
    if not drop_constant:
        check_fits(algo, codec, free, **sizes)
        return footprint(allocated(algo, codec, **sizes), baseline)
    if (needed := total(allocated(algo, codec, **sizes, live_columns=0))) > free:
        raise ValueError(
            f"even if no column ever changes this run needs {mb(needed)} MB of memory, and "
            f"{mb(free)} MB are free; a smaller --buffer-size takes less"
        )
    # A late column takes whole codes. Only one column that is packed alone can take more than that.
    n = sizes["obs_dim"]
    ledgers = (allocated(algo, codec, **sizes, live_columns=k, late_columns=n - k) for k in (0, 1))
    bound = max(ledgers, key=total)
    line = f"{footprint(bound, baseline)}; with --drop-constant that is the most it can take"
    return f"{line}, and only {mb(free)} MB are free" if total(bound) > free else line


def columns_found(nbytes: int, live: np.ndarray, device: torch.device) -> str:
    """One line for a run with --drop-constant: nbytes of its buffer, live (n,) bool."""
    return (
        f"memory: {live.sum()} of {len(live)} columns have changed; the buffer takes "
        f"{mb(nbytes)} MB, {mb(free_memory(device))} MB are free"
    )


# ---- the command line ----


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
    buffer_size: int = 1_000_000
    """SAC: rows of the replay buffer, all envs together."""
    n_steps: int = 2048
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
    """Draw the paper's Fig. 2, always of its own tasks: fig2.png, for example, and fig2.pdf."""


STORED = ("quant_m", "storage", "pack", "control_hz", "measure")
NOT_READ = {  # a choice -> the arguments that it does not look at
    "--algo ppo": ("buffer_size", "live_columns", "layouts"),
    "--algo sac": ("n_steps",),
    "--budget": (*STORED, "buffer_size", "n_steps", "layouts"),
    "--layouts": (*STORED, "quant_b", "hidden", "batch_size"),
    "--measure": ("live_columns",),
}


def check_args(args: Args) -> None:
    """Raise ValueError, one line, where arguments contradict each other or make no sense."""
    given = [f.name for f in fields(Args) if getattr(args, f.name) != f.default]
    if args.env is not None and {"obs_dim", "act_dim"} & set(given):
        raise ValueError("--env and --obs-dim/--act-dim exclude each other; drop one")
    if (args.obs_dim is None) != (args.act_dim is None):
        raise ValueError("--obs-dim and --act-dim belong together; give both")
    if args.measure and args.env is None:
        raise ValueError("--measure runs the real script and needs --env")
    robots = [name for name in given if name not in ("json", "plot")]
    if args.env is None and args.obs_dim is None and robots:
        raise ValueError(f"{flag(robots[0])} needs a robot: --env, or --obs-dim and --act-dim")
    for choice in (f"--algo {args.algo}", *map(flag, given)):
        for name in NOT_READ.get(choice, ()):
            if name in given:
                raise ValueError(f"{flag(name)} does nothing with {choice}; drop one")
    check_ranges(args)
    for name in ("obs_dim", "act_dim", "control_hz"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 10**6:
            raise ValueError(f"{flag(name)} {value} must be positive and at most a million")


def find_robot(args: Args) -> tuple[dict[str, int], float | None]:
    """Sizes for `allocated`, without the buffer's, and observations per second if known."""
    obs_dim, act_dim, hz = args.obs_dim, args.act_dim, args.control_hz
    if args.env is not None:
        from support import envs  # only here: it loads MuJoCo

        env = envs.make(args.env)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        dt = getattr(env.unwrapped, "dt", None)  # seconds per step
        hz = hz or (1 / dt if dt else None)
        env.close()
    if args.live_columns is not None and not 0 <= args.live_columns <= obs_dim:
        raise ValueError(f"--live-columns {args.live_columns} must be from 0 to {obs_dim}")
    sizes = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=args.hidden, num_envs=args.num_envs)
    return sizes | dict(batch_size=args.batch_size or PAPER_BATCH[args.algo]), hz


def robot_report(args: Args) -> dict:
    """The ledgers for one robot, in float64 and in the codec asked for, beside the paper's."""
    from experiments import measure, paper

    algo, knob, (sizes, hz) = args.algo, SIZED_BY[args.algo], find_robot(args)
    sizes[knob] = getattr(args, knob)
    m = PAPER_M[algo] if args.quant_m is None and args.storage is None else args.quant_m
    codec = make_codec(m, args.quant_b, args.storage, args.pack)
    live = {} if args.live_columns is None else {"live_columns": args.live_columns}
    ours = {
        "baseline": allocated(algo, Float(), **sizes),
        "codec": allocated(algo, codec, **sizes, **live),
    }
    report = dict(robot=args.env, algo=algo, **sizes, **live)
    report |= dict(codec=codec.name, measured=None, control_hz=hz)
    report |= paper.compare(algo, codec, ours, sizes, args.live_columns, hz)
    if args.measure:
        report["measured"] = measure.measure(
            args.env,
            algo,
            codec_flags(codec),
            lambda n: total(allocated(algo, codec, **sizes | {knob: n})),
            **sizes,
        )
    return report


def main(args: Args) -> None:
    """Compute, draw, then print. Bad input is one line on stderr, exit code 2 and nothing else."""
    from experiments import paper, storages, tables

    try:
        check_args(args)
        if args.env is None and args.obs_dim is None:
            report, page = paper.report(PAPER_M, PAPER_B), paper.page
        elif args.budget is not None:
            sizes, _ = find_robot(args)
            report, page = storages.budget(args, sizes, largest, codec_flags), tables.rows
        elif args.layouts:
            sizes, _ = find_robot(args)
            report, page = storages.layouts(args, sizes, allocated), tables.rows
        else:
            report, page = robot_report(args), tables.robot
        if args.plot:
            paper.plot(paper.fig2(PAPER_M, PAPER_B), args.plot)
            report["plot"] = str(args.plot)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        print(json.dumps(report, indent=2))
        return
    tables.show(page(report))
    if args.plot:
        print(f"\nFig. 2 is in {args.plot.with_suffix('.png')} and, as PDF, beside it")


if __name__ == "__main__":
    with command("memory.py"):
        main(tyro.cli(Args))
