"""Storages side by side: bytes, rounding error and collisions.

    python experiments/ablation.py errors runs/paper/Ant-v3__sac__*    # of what these runs stored
    python experiments/ablation.py table     # Markdown, from errors.csv alone

To collisions the paper ascribes that SAC fails at m = 1: two tuples (s_q, a) that repeat with
another reward (Sec. V-B). `./run.sh ablate-m` and `ablate-storage` compare returns, speed.py time.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from buffers import CPU, ReplayBuffer
from curves import Parser, markdown, optional, read_csv
from figures import method
from play import read_checkpoint, reading
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed, make_codec
from support import envs
from tables import write_csv

OUT = Path("runs/ablation")
LEAST_STATES = 100
STORAGES = {name: Float(dtype) for name, dtype in STORAGE_DTYPES.items()}
STORAGES |= {f"m={m}": FixedPoint(m) for m in range(4)}
STORAGES |= {f"m={m} packed": Packed(m) for m in range(4)}
SHOWN = {  # column of errors.csv: its head and format in the table
    "bits": ("bits", ".0f"),
    "bytes": ("bytes", ".0f"),
    "rms": ("RMS error", ".1e"),
    "worst": ("worst", ".1e"),
    "relative": ("error / std", ".1e"),
    "relative_worst": ("worst column", ".1e"),
    "clamped": ("clamped", ".2%"),
    "states": ("states", ",.0f"),
    "colliding": ("colliding", ".3%"),
    "conflicting": ("conflicting", ".3%"),
}
ERRORS = ["task", "method", "seed", "storage", "max_abs", "distinct", *SHOWN]
LEGEND = """
bytes: of a stored observation. Errors: of the last tenth of the states that a float64 run stored,
after decoding to float32, clamping included: RMS and worst over all values; error / std: a
column's RMS error over its standard deviation, in the median column and the worst one; clamped:
share of the values. A run that stored rounded states has none of these. colliding: share of all
stored states, as many as states says, whose s_q, all that the networks learn from, occurs more
than once; conflicting: together with the same action and another reward, the paper's collision."""


# --- What runs have stored -----------------------------------------------------------------------


def stored(run: Path) -> tuple[dict, Codec, dict[str, np.ndarray]]:
    """All transitions of a run of SAC, from its last checkpoint, oldest first.

    Returns:
        Its settings, the codec that it stored with, and obs (N, n) as stored, decoded unless it is
        float64, action (N, k) and reward (N,) float32.

    Raises:
        ValueError: one line; there is no checkpoint, or one that does not hold all.
    """
    saved = read_checkpoint(run)
    if saved.script != "sac.py":
        raise ValueError(f"{run} is of {saved.script}, which keeps no transitions")
    args = saved.args
    codec = make_codec(args.quant_m, args.quant_b, args.storage, args.pack)
    if args.num_envs > 1:
        raise ValueError(f"{run} has --num-envs {args.num_envs}; only runs of one env are read")
    if codec.name == "float64" and args.drop_constant:
        raise ValueError(f"{run} has --drop-constant, from which float64 reads back as float32")
    env = envs.make(args.env)
    sizes = env.observation_space.shape[0], env.action_space.shape[0], CPU
    env.close()
    buffer = ReplayBuffer(codec, args.buffer_size, 1, *sizes, args.seed, args.drop_constant)
    with reading(saved.file):
        buffer.load_state_dict(saved.parts["buffer"])
    rows = np.flatnonzero(buffer.is_start.numpy())
    if len(rows) < saved.parts["progress"]["global_step"]:
        raise ValueError(f"{run} has overwritten what it stored first; --buffer-size was too small")
    if len(rows) < LEAST_STATES:
        raise ValueError(f"{run} has stored {len(rows)} transitions; {LEAST_STATES} are needed")
    arrays = {
        "obs": buffer.obs.get(rows).numpy(),
        "action": buffer.actions.numpy()[rows],
        "reward": buffer.rewards.numpy()[rows],
    }
    if codec.name == "float64":
        arrays["obs"] = buffer.obs.array.numpy()[rows]
    return {"lib": "ours", "algo": "sac"} | asdict(args), codec, arrays


# --- Rounding errors and collisions --------------------------------------------------------------


def restore(codec: Codec, obs: np.ndarray) -> np.ndarray:
    """s_q: (N, n) float64 observations, stored and read again, (N, n) float32."""
    rows = codec.pack(codec.encode(obs))
    return codec.decode(codec.unpack(rows, obs.shape[1])).numpy()


def rounding(codec: Codec, obs: np.ndarray) -> dict[str, float]:
    """Columns of errors.csv on bytes and on s_q - s, over (N, n) observations. See LEGEND."""
    error = restore(codec, obs) - obs
    width, dtype = codec.row(obs.shape[1])
    varies = np.ptp(obs, axis=0) > 0
    relative = np.sqrt((error**2).mean(axis=0))[varies] / obs.std(axis=0)[varies]
    return {
        "max_abs": np.abs(obs).max(),
        "bits": codec.bits_per_value,
        "bytes": width * dtype.itemsize,
        "rms": np.sqrt((error**2).mean()),
        "worst": np.abs(error).max(),
        "relative": np.median(relative),
        "relative_worst": relative.max(),
        "clamped": (np.abs(obs) > codec.b).mean(),
    }


def group(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group equal rows of float arrays (N, n_i) side by side.

    Returns:
        groups (N,), the number of each row's group, and sizes (G,), the rows in each group.
    """
    rows = np.hstack(parts) + 0.0  # turns -0.0 into 0.0, which has other bytes but is equal
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows[0].nbytes)))
    _, groups, sizes = np.unique(keys.ravel(), return_inverse=True, return_counts=True)
    return groups, sizes


def collisions(codec: Codec, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Columns of errors.csv on equal s_q among the states of all stored transitions. See LEGEND."""
    s_q = restore(codec, arrays["obs"])
    states, sizes = group(s_q)
    pairs, alike = group(s_q, arrays["action"])
    with_reward, same = group(pairs[:, None], arrays["reward"][:, None])
    return {
        "states": len(s_q),
        "distinct": len(sizes),
        "colliding": (sizes[states] > 1).mean(),
        "conflicting": (alike[pairs] > same[with_reward]).mean(),
    }


def errors(args: argparse.Namespace) -> None:
    """Write OUT/errors.csv: of float64 runs one row per storage, of others one."""
    rows = []
    for run in args.runs:
        settings, codec, arrays = stored(run)
        found = {"task": settings["env"], "method": method(settings), "seed": settings["seed"]}
        float64, last_tenth = codec.name == "float64", -(len(arrays["obs"]) // 10)
        of_codes = {}  # packed ones are the same
        for name, each in (STORAGES if float64 else {found["method"]: codec}).items():
            if (codes := name.removesuffix(" packed")) not in of_codes:
                of_codes[codes] = collisions(each, arrays)
            rows.append(found | {"storage": name} | of_codes[codes])
            if float64:
                rows[-1] |= rounding(each, arrays["obs"][last_tenth:])
        write_csv(args.out / "errors.csv", ERRORS, rows)
        print(f"wrote the rows of {run}, {len(arrays['obs']):,} states, to {args.out}/errors.csv")


# --- Table ---------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    """Print, from the CSV file alone, a Markdown table per run."""
    tables = defaultdict(lambda: [["", *(head for head, _ in SHOWN.values())]])
    for row in read_csv(args.results / "errors.csv", ERRORS, dict.fromkeys(SHOWN, optional)):
        name = row["storage"] if row["rms"] else f"trained with {row['method']}"
        cells = (
            f"{float(row[column]):{form}}" if row[column] else "-"
            for column, (_, form) in SHOWN.items()
        )
        tables[f"{row['task']}, seed {row['seed']}"].append([name, *cells])
    for corner, lines in tables.items():
        lines[0][0] = corner
        print(f"\n{markdown(lines)}")
    print(LEGEND)


# --- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run one of the two commands. SystemExit with code 2 and one line for bad input."""
    parser = Parser(prog="ablation.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run in (errors, table):
        command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
    commands.choices["errors"].add_argument("runs", type=Path, nargs="+", metavar="RUN")
    commands.choices["errors"].add_argument("--out", type=Path, default=OUT)
    commands.choices["table"].add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
