"""What models and buffers cost in memory, for any robot, before anything is allocated.

    python memory.py                                   # the paper's Fig. 2 and Sec. III, recomputed
    python memory.py --env Humanoid-v3 --quant-m 2     # one robot: paper and allocated side by side
    python memory.py --obs-dim 391 --act-dim 16 --control-hz 50

Two ledgers, each a dict of row name -> bytes, are never mixed. *paper* is what *Just Round*
(Grossman & Plancher, ICRA 2023) counts: networks and buffer (Eq. 1 for PPO, Eq. 3 for SAC), with
64 bits or Eq. 6's bits per observed value. *allocated* is every persistent tensor of `ppo.py` and
`sac.py`, to the byte, and one decoded minibatch; activations come and go and are not counted.
1 MB is 10^6 bytes.
"""

import json
import math
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro

from buffers import Layout, layout_bytes, replay_layout, rollout_layout
from quantize import Codec, FixedPoint, Float, bits, make_codec

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
_TRAINING = {
    "gradients": "the paper counts none; one float32 per parameter",
    "Adam moments": "the paper counts none; two float32 per parameter",
    "decoded batch": "the paper counts none; one minibatch in float32",
}
WHY = {
    "ppo": {
        "buffer observations": "{bits} bits a value against the paper's {paper_bits}",
        "buffer rest": "5 float32 scalars and a 1-byte flag per transition against the paper's 7",
        "networks": "the same",
        **_TRAINING,
    },
    "sac": {
        "buffer observations": "{bits} bits a value against the paper's {paper_bits}; {rows:,} "
        "rows for {steps:,} transitions: each env's newest observation has a row of its own",
        "buffer rest": "two 1-byte flags against the paper's float32 done; 24 bytes per env",
        "networks": "log_alpha, which Eq. 3 leaves out",
        "target networks": "Eq. 3 counts none; a copy of both Q networks",
        **_TRAINING,
    },
}
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
        # exp_avg and exp_avg_sq, and one float32 step: all parameters are one flat tensor.
        "Adam moments": 8 * parameters + 4,
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
) -> Ledger:
    """Bytes of every persistent tensor of `sac.py`; the buffer's two rows sum to its `nbytes`."""
    actor, critic = sac_parameters(obs_dim, act_dim, hidden)
    parameters = actor + 2 * critic + 1  # log_alpha
    return {
        **_buffer_rows(replay_layout(codec, buffer_size, num_envs, obs_dim, act_dim)),
        "networks": 4 * parameters,
        "target networks": 4 * 2 * critic,
        "gradients": 4 * parameters,
        # exp_avg and exp_avg_sq; a float32 step for actor with alpha and one for the critics.
        "Adam moments": 8 * parameters + 4 * 2,
        # obs, next_obs, action, reward in float32; terminated is a byte.
        "decoded batch": batch_size * (4 * (2 * obs_dim + act_dim + 1) + 1),
    }


def _buffer_rows(layout: Layout) -> Ledger:
    obs = layout_bytes({"obs": layout["obs"]})
    return {"buffer observations": obs, "buffer rest": layout_bytes(layout) - obs}


# ---- does it fit ----


def mb(n: float) -> str:
    """Bytes as decimal MB, without the unit."""
    return f"{n / 1e6:,.{1 if n >= 1e7 else 3}f}"


def footprint(ledger: Ledger, baseline: Ledger) -> str:
    """One line for before training: an *allocated* ledger next to that of the float64 baseline."""
    total, other = sum(ledger.values()), sum(baseline.values())
    obs, batch = ledger["buffer observations"], ledger["decoded batch"]
    buffer = obs + ledger["buffer rest"]
    if ledger == baseline:
        compared = "this is the float64 baseline"
    else:
        compared = f"float64 baseline {mb(other)} MB, {other / total:.1f}x as much"
    return (
        f"memory: buffer {mb(buffer)} MB (observations {mb(obs)} MB) + networks, gradients, Adam "
        f"{mb(total - buffer - batch)} MB + batch {mb(batch)} MB = {mb(total)} MB; {compared}"
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


def check_fits(allocated: Callable[..., Ledger], codec: Codec, free: int, **sizes: int) -> None:
    """Refuse a run that cannot fit: `check_fits(allocated_sac, codec, free, **sizes)`.

    Args:
        allocated: `allocated_ppo` or `allocated_sac`.
        codec, sizes: its arguments.
        free: bytes to fit in.

    Raises:
        ValueError: one line with what is needed, what is free and which flags would fit.
    """
    needed = sum(allocated(codec, **sizes).values())
    if needed <= free:
        return
    algo, knob = ("sac", "buffer_size") if "buffer_size" in sizes else ("ppo", "n_steps")
    flag = f"--{knob.replace('_', '-')}"

    def largest(codec: Codec) -> int:
        """The largest buffer that fits, at most the one asked for; 0 if none does."""
        at_most = range(1, min(sizes[knob], free) + 1)  # a step takes a byte or more
        return bisect_right(
            at_most, free, key=lambda n: sum(allocated(codec, **{**sizes, knob: n}).values())
        )

    options = [f"{flag} {n}"] if (n := largest(codec)) else []
    smaller = FixedPoint(PAPER_M[algo], PAPER_B)
    if smaller.bits < codec.bits and (n := largest(smaller)):
        bound = f" --quant-b {PAPER_B}" if getattr(codec, "b", PAPER_B) != PAPER_B else ""
        size = f" {flag} {n}" if n < sizes[knob] else ""
        options.append(f"--quant-m {smaller.m}{bound}{size} in place of {codec.name}")
    raise ValueError(
        f"this run needs {mb(needed)} MB of memory and {mb(free)} MB are free; "
        + (f"what fits: {', or '.join(options)}" if options else f"not even {flag} 1 fits")
    )


def plan(algo: str, codec: Codec, device: torch.device, **sizes: int) -> str:
    """What `ppo.py` and `sac.py` print before training: `check_fits`, then the `footprint`."""
    allocated = {"ppo": allocated_ppo, "sac": allocated_sac}[algo]
    check_fits(allocated, codec, free_memory(device), **sizes)
    return footprint(allocated(codec, **sizes), allocated(Float(), **sizes))


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
            q_bits = bits(m, PAPER_B)
            b, q = (paper_ledger(algo, obs_bits, **sizes) for obs_bits in (64, q_bits))
            total_b, total_q = sum(b.values()), sum(q.values())
            shares = dict(
                obs_of_b=b["buffer observations"] / total_b, model_of_q=q["networks"] / total_q
            )
            cell = dict(algo=algo, task=task, m=m, bits=q_bits, **sizes)
            cells.append(dict(**cell, B=b, Q=q, ratio=total_b / total_q, **shares))
    return cells


def worked_example(obs_dim: int, act_dim: int, steps: int, model: float) -> dict[str, float]:
    """Sec. III: a buffer of s, a, r in 64-bit floats, in MB, and three shares in percent."""
    obs, buffer = 8 * steps * obs_dim, 8 * steps * (obs_dim + act_dim + 1)
    total = buffer + model
    return {
        "buffer, MB": buffer / 1e6,
        "buffer/total, %": 100 * buffer / total,
        "obs/buffer, %": 100 * obs / buffer,
        "obs/total, %": 100 * obs / total,
    }


def paper_report() -> dict:
    """Fig. 2 and Sec. III recomputed, and notes on what does not come out as printed."""
    cells, notes = fig2(), []
    for algo, m in PAPER_M.items():
        ratios = [cell["ratio"] for cell in cells if cell["algo"] == algo]
        span = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
        notes.append(f"{algo.upper()}, m={m}: {span}; the paper says {PAPER_RATIOS[algo]}.")
    notes[-1] += f" Sec. V-C repeats PPO's 4.2x for SAC, whose best is {max(ratios):.1f}x."
    humanoid = [sum(cells[-1][key].values()) for key in "BQ"]
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


# ---- any robot: both ledgers side by side ----


@dataclass
class Args:
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


def check_args(args: Args) -> None:
    """Raise ValueError where arguments contradict each other or make no sense."""
    flags = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(Args)}
    given = [name for name in flags if getattr(args, name) != getattr(Args, name)]
    if args.env is not None and {"obs_dim", "act_dim"} & set(given):
        raise ValueError("--env and --obs-dim/--act-dim exclude each other; drop one")
    if (args.obs_dim is None) != (args.act_dim is None):
        raise ValueError("--obs-dim and --act-dim belong together; give both")
    idle = [flags[name] for name in given if name not in ("json", "plot")]
    if args.env is None and args.obs_dim is None and idle:
        raise ValueError(f"{idle[0]} needs a robot: --env, or --obs-dim and --act-dim")
    other, unused = ("sac", "buffer_size") if args.algo == "ppo" else ("ppo", "n_steps")
    if unused in given:
        raise ValueError(f"{flags[unused]} belongs to --algo {other}; drop it")
    sizes = ("obs_dim", "act_dim", "control_hz", "buffer_size", "n_steps", "num_envs", "hidden")
    for name in (*sizes, "batch_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flags[name]} {value} must be positive")


def robot_report(args: Args) -> dict:
    """Both ledgers for one robot, in float64 and in the codec asked for, and why they differ."""
    algo, obs_dim, act_dim, hz = args.algo, args.obs_dim, args.act_dim, args.control_hz
    m = PAPER_M[algo] if args.quant_m is None and args.storage is None else args.quant_m
    codec = make_codec(m, args.quant_b, args.storage)
    if args.env is not None:
        import envs  # only here: it loads MuJoCo

        env = envs.make(args.env)
        obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
        dt = getattr(env.unwrapped, "dt", None)  # seconds per step
        hz = hz or (1 / dt if dt else None)
        env.close()
    dims = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=args.hidden)
    sizes = dict(num_envs=args.num_envs, batch_size=args.batch_size or PAPER_BATCH[algo])
    if algo == "ppo":
        allocated, steps = allocated_ppo, args.n_steps * args.num_envs
        sizes["n_steps"] = args.n_steps
    else:
        allocated, steps = allocated_sac, args.buffer_size
        sizes["buffer_size"] = args.buffer_size
    paper_bits = bits(codec.m, codec.b) if isinstance(codec, FixedPoint) else codec.bits
    paper = {
        "baseline": paper_ledger(algo, 64, **dims, steps=steps),
        "codec": paper_ledger(algo, paper_bits, **dims, steps=steps),
    }
    ours = {
        "baseline": allocated(Float(), **dims, **sizes),
        "codec": allocated(codec, **dims, **sizes),
    }
    counts = dict(paper_bits=paper_bits, bits=codec.bits, steps=steps)
    counts["rows"] = ours["codec"]["buffer observations"] * 8 // (codec.bits * obs_dim)
    differences = {
        row: dict(bytes=n - paper["codec"].get(row, 0), why=WHY[algo][row].format(**counts))
        for row, n in ours["codec"].items()
    }
    widths = dict(baseline=64, codec=codec.bits, paper=paper_bits)
    rates = {name: hz * obs_dim * width / 8 for name, width in widths.items()} if hz else None
    report = dict(ledger_unit="bytes", robot=args.env, algo=algo, **dims, **sizes, codec=codec.name)
    report |= dict(counts, paper=paper, allocated=ours, allocated_minus_paper=differences)
    return dict(report, control_hz=hz, bytes_per_second=rates)


# ---- output ----


def _table(rows: list[list[str]]) -> None:
    """Print rows with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_paper(report: dict) -> None:
    """`paper_report` as two tables and the notes."""
    print("Fig. 2: B 64-bit observations, Q quantised; 64x64 networks in float32\n")
    rows = [["", "m", "bits", "B, MB", "Q, MB", "B/Q", "observations in B", "model in Q"]]
    for cell in report["fig2"]:
        totals = [mb(sum(cell[key].values())) for key in "BQ"]
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


def print_robot(report: dict) -> None:
    """`robot_report` as one table, the reasons for its differences and the bandwidth."""
    sizes = ("obs_dim", "act_dim", "hidden", "buffer_size", "n_steps", "num_envs", "batch_size")
    settings = ", ".join(f"{name} {report[name]:,}" for name in sizes if name in report)
    print(f"{report['robot'] or 'robot'}, {report['algo'].upper()}: {settings}\n")
    heads = ("paper: 64-bit", f"{report['paper_bits']}-bit", "allocated: float64", report["codec"])
    ledgers = [
        report[name][key] for name in ("paper", "allocated") for key in ("baseline", "codec")
    ]
    rows = [["MB", *heads]]
    for row in report["allocated"]["codec"]:
        rows.append([row, *(mb(ledger[row]) if row in ledger else "-" for ledger in ledgers)])
    totals = [sum(ledger.values()) for ledger in ledgers]
    rows.append(["total", *map(mb, totals)])
    ratios = (f"{wide / narrow:.2f}x" for wide, narrow in (totals[:2], totals[2:]))
    rows.append(["ratio", "", next(ratios), "", next(ratios)])
    _table(rows)
    print(f"\nallocated - paper, bytes ({report['codec']}):")
    for row, difference in report["allocated_minus_paper"].items():
        print(f"  {row:20}{difference['bytes']:+15,}  {difference['why']}")
    if rates := report["bytes_per_second"]:
        print(
            f"\nobservations sent off the robot at {report['control_hz']:.4g} Hz, bytes/s: "
            f"{rates['baseline']:,.0f} in float64, {rates['codec']:,.0f} in {report['codec']}, "
            f"{rates['paper']:,.0f} in {report['paper_bits']} bits"
        )


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
        bars = [
            (3 * i + j, cell[key]) for i, cell in enumerate(shown) for j, key in enumerate("BQ")
        ]
        places = [place for place, _ in bars]
        model = [ledger["networks"] / 1e6 for _, ledger in bars]
        buffer = [
            sum(ledger.values()) / 1e6 - n for (_, ledger), n in zip(bars, model, strict=True)
        ]
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
    of_paper = args.env is None and args.obs_dim is None
    try:
        check_args(args)
        report = paper_report() if of_paper else robot_report(args)
        if args.plot:
            plot_fig2(fig2(), args.plot)
            report["plot"] = str(args.plot)
    except (ValueError, OSError) as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        print(json.dumps(report, indent=2))
        return
    (print_paper if of_paper else print_robot)(report)
    if args.plot:
        print(f"\nFig. 2 is in {args.plot}")


if __name__ == "__main__":
    main(tyro.cli(Args))
