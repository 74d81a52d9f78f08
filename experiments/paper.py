"""The paper's own arithmetic, recomputed: Eq. 1 and 3, Fig. 2, and the examples of Sec. III.

"The paper" is Grossman & Plancher, "Just Round" (ICRA 2023). It counts networks and buffer, nothing
else: observations stored once, actions, scalars and weights in float32. `python memory.py` prints
all of this; a ledger is a dict of row name -> bytes.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from buffers import rows_per_env
from quantize import Codec, FixedPoint, Packed, bits
from support.machine import mb

TASKS = {  # Sec. V: obs_dim, act_dim
    "Walker2d-v3": (17, 6),
    "HalfCheetah-v3": (17, 6),
    "Ant-v3": (111, 8),
    "Humanoid-v3": (376, 17),
}
STEPS = {"ppo": 2048, "sac": 1_000_000}  # transitions in the buffer, Table II
# float32 scalars per transition. SAC: reward, done. PPO's are not listed; seven reproduce Fig. 2.
SCALARS = {"ppo": 7, "sac": 2}
RATIOS = {"ppo": "2.1x to 4.2x", "sac": "2.6x to 3.9x"}  # what Sec. V-B says of Fig. 2
WORKED_EXAMPLES = (  # Sec. III: obs_dim, act_dim, transitions, model bytes -> its MB and percents
    ("III-A", (391, 16, 8_300, 1.3e6), ("27", "95", "96", "92")),
    ("III-B", (112, 8, 1_000_000, 2.3e6), ("96.8", "97.7", "92.5", "90.4")),
    ("III-B", (112, 8, 100_000, 2.3e6), ("96.8", "97.7", "92.5", "90.4")),  # footnote 2
)
# Why a row of what this program allocates differs from the paper's; `compare` fills in the braces.
OBSERVATIONS = (
    "{row:,} bytes a row, {columns} x {bits} bits{words}, against the paper's {paper_row:,g}"
)
TRAINING = {
    "gradients": "the paper counts none; one float32 per parameter",
    "Adam moments": "the paper counts none; two float32 per parameter, 4 bytes per Adam",
    "decoded batch": "the paper counts none; one minibatch in float32",
}
WHY = {
    "ppo": {
        "buffer observations": OBSERVATIONS,
        "buffer rest": "5 float32 scalars and a 1-byte flag per transition against the paper's 7",
        "rollout noise": "the paper counts none; noise and log_std of every action, in float32",
        "networks": "the same",
        **TRAINING,
    },
    "sac": {
        "buffer observations": OBSERVATIONS + "; {rows:,} rows for {steps:,} transitions: each "
        "env's newest observation has a row of its own",
        "buffer rest": "two 1-byte flags against the paper's float32 done",
        "networks": "log_alpha, which Eq. 3 leaves out",
        "target networks": "Eq. 3 counts none; a copy of both Q networks",
        **TRAINING,
    },
}


def parameters(algo: str, obs_dim: int, act_dim: int, hidden: int) -> int:
    """Weights and biases of the paper's networks, each with two hidden layers.

    PPO has a policy with a log_std per action and a value function; SAC has a policy with two
    outputs per action and two Q networks.
    """

    def network(inputs: int, outputs: int) -> int:
        return sum((n + 1) * m for n, m in pairwise((inputs, hidden, hidden, outputs)))

    if algo == "ppo":
        return network(obs_dim, act_dim) + act_dim + network(obs_dim, 1)
    return network(obs_dim, 2 * act_dim) + 2 * network(obs_dim + act_dim, 1)


def ledger(
    algo: str, obs_bits: int, *, obs_dim: int, act_dim: int, hidden: int, steps: int
) -> dict[str, int]:
    """Bytes as the paper counts them: Eq. 1 for ppo, Eq. 3 for sac.

    Args:
        algo: ppo or sac.
        obs_bits: bits per observed value; 64 is the baseline, `quantize.bits(m, b)` the method.
        obs_dim, act_dim, hidden: sizes.
        steps: transitions in the buffer.
    """
    return {
        "buffer observations": math.ceil(steps * obs_dim * obs_bits / 8),
        "buffer rest": 4 * steps * (act_dim + SCALARS[algo]),
        "networks": 4 * parameters(algo, obs_dim, act_dim, hidden),
    }


def compare(
    algo: str,
    codec: Codec,
    allocated: dict[str, dict[str, int]],
    sizes: dict[str, int],
    live_columns: int | None,
    hz: float | None,
) -> dict:
    """The paper's ledgers beside the allocated ones, and why these differ row by row.

    Args:
        algo, codec: what is stored how.
        allocated: "baseline", in float64, and "codec" -> ledger.
        sizes: obs_dim, act_dim, hidden, num_envs, and n_steps or buffer_size.
        live_columns: how many columns are stored; None is all.
        hz: observations per second, if known.
    """
    obs_dim, num_envs = sizes["obs_dim"], sizes["num_envs"]
    if algo == "ppo":
        rows = steps = sizes["n_steps"] * num_envs
    else:
        steps = sizes["buffer_size"]
        rows = num_envs * rows_per_env(steps, num_envs)
    fixed = isinstance(codec, FixedPoint)
    paper_bits = bits(codec.m, codec.b) if fixed else codec.bits_per_value
    dims = {name: sizes[name] for name in ("obs_dim", "act_dim", "hidden")}
    ledgers = {
        name: ledger(algo, n, **dims, steps=steps)
        for name, n in (("baseline", 64), ("codec", paper_bits))
    }
    columns = obs_dim if live_columns is None else live_columns
    counts = dict(paper_bits=paper_bits, bits=codec.bits_per_value, columns=columns, steps=steps)
    counts["words"] = " in whole 16-bit words" if isinstance(codec, Packed) else ""
    counts |= dict(rows=rows, row=row_bytes(codec, columns), paper_row=paper_bits * obs_dim / 8)
    differences = {
        row: dict(bytes=n - ledgers["codec"].get(row, 0), why=WHY[algo][row].format(**counts))
        for row, n in allocated["codec"].items()
    }
    sent = dict(baseline=8 * obs_dim, codec=row_bytes(codec, obs_dim), paper=counts["paper_row"])
    rates = {name: hz * n for name, n in sent.items()} if hz else None
    report = dict(**counts, paper=ledgers, allocated=allocated, bytes_per_second=rates)
    return report | dict(allocated_minus_paper=differences)


def row_bytes(codec: Codec, n: int) -> int:
    """Bytes of the stored row of n values."""
    width, dtype = codec.row(n)
    return width * dtype.itemsize


def fig2(decimals: dict[str, int], b: float) -> list[dict]:
    """The paper's Fig. 2, a cell per algorithm and task.

    Args:
        decimals: ppo and sac -> m, the decimals kept.
        b: clamp bound.

    Returns:
        For each cell its sizes, the ledgers B (64 bits) and Q (quantised), B / Q, and shares.
    """
    cells = []
    for algo, m in decimals.items():
        for task, (obs_dim, act_dim) in TASKS.items():
            sizes = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=64, steps=STEPS[algo])
            baseline, quantised = (ledger(algo, n, **sizes) for n in (64, bits(m, b)))
            whole, small = sum(baseline.values()), sum(quantised.values())
            cells.append(
                dict(algo=algo, task=task, m=m, bits=bits(m, b), **sizes)
                | dict(B=baseline, Q=quantised, ratio=whole / small)
                | dict(obs_of_b=baseline["buffer observations"] / whole)
                | dict(model_of_q=quantised["networks"] / small)
            )
    return cells


def worked_example(obs_dim: int, act_dim: int, steps: int, model: float) -> dict[str, float]:
    """Sec. III: a buffer of s, a, r in 64-bit floats, in MB, and three shares in percent.

    Args:
        obs_dim, act_dim, steps: sizes.
        model: bytes of the networks.
    """
    obs, buffer = 8 * steps * obs_dim, 8 * steps * (obs_dim + act_dim + 1)
    everything = buffer + model
    return {
        "buffer, MB": buffer / 1e6,
        "buffer/total, %": 100 * buffer / everything,
        "obs/buffer, %": 100 * obs / buffer,
        "obs/total, %": 100 * obs / everything,
    }


def report(decimals: dict[str, int], b: float) -> dict:
    """Fig. 2 and Sec. III recomputed, and notes on what does not come out as printed."""
    cells, notes = fig2(decimals, b), []
    for algo, m in decimals.items():
        ratios = [cell["ratio"] for cell in cells if cell["algo"] == algo]
        span = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
        notes.append(f"{algo.upper()}, m={m}: {span}; the paper says {RATIOS[algo]}.")
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
    a, wrong, right = ([*example["recomputed"].values()] for example in examples)
    notes += [
        f"III-A: 92% should be {a[3]:.2f}%; 92% takes a model of at most {mb(most)} MB, and the "
        f"text has {model / 1e6} MB.",
        f"III-B: 96.8MB, 97.7% and 90.4% belong to {examples[2]['steps']:,} samples, in line with "
        f"footnote 2; the text's 1e6 give {wrong[0]:.0f} MB, {wrong[1]:.2f}% and {wrong[3]:.2f}%.",
        f"III-B: 92.5% is {right[2]:.2f}% cut off, not rounded. No s' or done is counted.",
    ]
    return dict(fig2=cells, worked_examples=examples, notes=notes)


def page(report: dict) -> list:
    """What `memory.py` prints of a `report`: lines, and tables as lists of rows."""
    fig2 = [["", "m", "bits", "B, MB", "Q, MB", "B/Q", "observations in B", "model in Q"]]
    for cell in report["fig2"]:
        totals = [mb(sum(cell[key].values())) for key in "BQ"]
        shares = [f"{cell['obs_of_b']:.1%}", f"{cell['model_of_q']:.2%}"]
        name = f"{cell['algo'].upper()} {cell['task']}"
        fig2.append([name, str(cell["m"]), str(cell["bits"]), *totals, f"{cell['ratio']:.2f}x"])
        fig2[-1] += shares
    examples = [["", "samples", *report["worked_examples"][0]["recomputed"]]]
    for example in report["worked_examples"]:
        pairs = zip(example["recomputed"].values(), example["paper"], strict=True)
        results = [f"{value:.2f} ({claim})" for value, claim in pairs]
        examples.append([example["section"], f"{example['steps']:,}", *results])
    return [
        "Fig. 2: B 64-bit observations, Q quantised; 64x64 networks in float32\n",
        fig2,
        "\nSec. III: s, a, r in 64-bit floats; in brackets what the paper says\n",
        examples,
        "\n- ".join(["", *report["notes"]]),
    ]


def plot(cells: list[dict], path: Path) -> None:
    """Draw Fig. 2 into path: memory of B and Q per task, the model in black under the buffer.

    Args:
        cells: from `fig2`.
        path: where to, ending in .png or .pdf; both are written.

    Raises:
        ValueError: another ending.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure  # only here: it takes time to load

    from support import drawing

    drawing.check_path(path, "--plot")
    with drawing.style():
        figure = Figure(figsize=(drawing.PAGE, 2.6))
        for axes, algo in zip(figure.subplots(1, 2), STEPS, strict=True):
            draw_panel(axes, [cell for cell in cells if cell["algo"] == algo], drawing.BLUE)
        drawing.save(figure, path)


def draw_panel(axes: Any, cells: list[dict], color: str) -> None:
    """Fig. 2's bars of one algorithm, into matplotlib's axes."""
    positions = [3 * i + j for i in range(len(cells)) for j in range(2)]
    ledgers = [cell[key] for cell in cells for key in "BQ"]
    model = [ledger["networks"] / 1e6 for ledger in ledgers]
    buffer = [(sum(ledger.values()) - ledger["networks"]) / 1e6 for ledger in ledgers]
    axes.bar(positions, model, 0.9, color="black", label="model")
    drawn = axes.bar(positions, buffer, 0.9, bottom=model, color=color, label="buffer")
    ratios = [text for cell in cells for text in ("", f"{cell['ratio']:.1f}x")]
    axes.bar_label(drawn, ratios, padding=2)
    axes.set_xticks(positions, ["B", "Q"] * len(cells))
    names = axes.secondary_xaxis(-0.09)
    tasks = [cell["task"].removesuffix("-v3") for cell in cells]
    names.set_xticks([3 * i + 0.5 for i in range(len(cells))], tasks)
    names.spines["bottom"].set_visible(False)
    for axis in (axes, names):
        axis.tick_params(axis="x", length=0)
    axes.set_title(f"{cells[0]['algo'].upper()}, m={cells[0]['m']}")
    axes.set_ylabel("memory, MB")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")
