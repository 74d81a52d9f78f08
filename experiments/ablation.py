"""Storages side by side: bytes, rounding error, collisions and ms/step.

    python experiments/ablation.py states    # trains one float64 SAC on each of the paper's tasks
    python experiments/ablation.py errors    # of the states in runs/states
    python experiments/ablation.py speed     # wants an idle machine
    python experiments/ablation.py table     # Markdown, from the committed CSV files alone

Two states collide if they share s_q, which is all that the networks learn from. To collisions the
paper ascribes that SAC fails at m = 1: tuples (s_q, a) that repeat with another reward. Returns are
what `./run.sh ablate-m` and `./run.sh ablate-storage` are for.
"""

import argparse
import csv
import json
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sac
from buffers import ReplayBuffer
from curves import Parser, optional, read_csv
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed
from speed import PPO_ROLLOUT, child, ratio
from support import envs
from support.networks import Actor

STATES, OUT = Path("runs/states"), Path("runs/ablation")
# codec, flags of sac.py
STORAGES = {name: (Float(dtype), ["--storage", name]) for name, dtype in STORAGE_DTYPES.items()}
STORAGES |= {f"m={m}": (FixedPoint(m), ["--quant-m", str(m)]) for m in range(4)}
STORAGES |= {f"m={m} packed": (Packed(m), ["--quant-m", str(m), "--pack"]) for m in range(4)}
ARRAYS = ["obs", "action", "reward", "next_obs", "terminated", "first", "visited"]
SHOWN = {  # column of errors.csv: its head and format in the table
    "bits": ("bits", ".0f"),
    "bytes": ("bytes", ".0f"),
    "rms": ("RMS error", ".1e"),
    "worst": ("worst", ".1e"),
    "relative": ("error / std", ".1e"),
    "relative_worst": ("worst column", ".1e"),
    "clamped": ("clamped", ".2%"),
    "colliding": ("colliding", ".3%"),
    "colliding_first": ("of them first", ".0%"),
    "colliding_rollout": ("within 2,048", ".3%"),
    "colliding_action": ("with action", ".3%"),
    "spread_obs": ("spread of s", ".3f"),
    "spread_reward": ("of r", ".3f"),
    "spread_next": ("of s'", ".3f"),
}
ERRORS = ["task", "storage", "max_abs", "states", "distinct", *SHOWN]
SPEED = ["round", "task", "storage", "ms_per_step", "threads", "torch", "machine"]
LEGEND = """
bytes: of a stored observation. ms/step: of SAC, median of the rounds (median of their ratios to
float64). Errors: on the observations that a trained float64 SAC acts on, after decoding to float32,
clamping included: RMS and worst over all values; error / std: a column's RMS error over its
standard deviation, in the median column and the worst one; clamped: share of the values.
Collisions: of the states that this SAC stored in training. colliding: share whose s_q occurs more
than once; of them first: first in an episode; within 2,048: share whose s_q occurs more than once
in the same 2,048 transitions, as many as PPO's rollout holds; with action: together with the same
action. Spread: standard deviation within equal s_q over that of all stored transitions, so what
equal s_q hide on the scale of the whole data, 0 if nothing; of the raw s, reward r and raw next
s'."""


# --- States --------------------------------------------------------------------------------------


def stored(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """Transitions of one env's float64 ring that has not come round, oldest first.

    Returns:
        obs, next_obs (N, n) float64, action (N, k), reward (N,) float32, terminated (N,) bool, and
        first (N,) bool: obs is the first of its episode.
    """
    rows = np.flatnonzero(buffer.is_start.numpy())
    obs = buffer.obs.array.numpy()
    return {
        "obs": obs[rows],
        "action": buffer.actions.numpy()[rows],
        "reward": buffer.rewards.numpy()[rows],
        "next_obs": obs[rows + 1],
        "terminated": buffer.terminated.numpy()[rows],
        "first": np.diff(rows, prepend=-2) > 1,  # between episodes lies a final row
    }


@torch.inference_mode()
def visit(actor: Actor, env_id: str, count: int, seed: int) -> np.ndarray:
    """(count, n) float64: what the policy sees while it acts, stochastically as in training."""
    env = envs.make(env_id)
    low, high = env.action_space.low, env.action_space.high
    torch.manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    visited = np.empty((count, len(obs)), np.float64)
    for row in visited:
        row[:] = obs
        mean, log_std = actor(torch.from_numpy(obs)[None].to(torch.float32))
        action = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
        action = low + (action[0].numpy() + 1) / 2 * (high - low)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return visited


def states(args: argparse.Namespace) -> None:
    """Train SAC in float64 on each task; write OUT/TASK.npz and, beside it, the run's folder."""
    for env_id in args.env:
        envs.make(env_id).close()  # refuse a bad name now, not after the trainings before it
    for env_id in args.env:
        settings = sac.Args(
            env=env_id,
            seed=args.seed,
            total_timesteps=args.steps,
            # An episode of T steps takes T + 1 rows: nothing is overwritten.
            buffer_size=max(sac.Args.buffer_size, 2 * args.steps),
            eval_episodes=0,
            run_dir=str(args.out),
        )
        trained = sac.main(settings)
        arrays = stored(trained["buffer"])
        arrays["visited"] = visit(trained["actor"], env_id, args.visits, args.seed + 20_000)
        np.savez(path := args.out / f"{env_id.replace('/', '-')}.npz", **arrays)
        print(f"wrote {path}: {len(arrays['obs']):,} transitions")


def load(path: Path) -> dict[str, np.ndarray]:
    """What `states` wrote. Raises ValueError for any other file."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in ARRAYS}
    except (KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not what `states` wrote: {error}") from None


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


def spread(values: np.ndarray, groups: np.ndarray, sizes: np.ndarray) -> float:
    """How much values (N, k) differ within groups, relative to how much all of them differ.

    The pooled variance within groups over the variance of all rows, averaged over the columns that
    vary; of that the root. Groups of one row have no say in it; nan if there are no others.
    """
    values = values[:, np.ptp(values, axis=0) > 0].astype(np.float64)
    freedom = len(groups) - len(sizes)
    if not freedom or not values.size:
        return np.nan
    in_order = values[np.argsort(groups, kind="stable")]
    means = np.add.reduceat(in_order, np.cumsum(sizes) - sizes) / sizes[:, None]
    within = ((values - means[groups]) ** 2).sum(axis=0) / freedom
    return np.sqrt((within / values.var(axis=0, ddof=1)).mean())


def collisions(codec: Codec, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Columns of errors.csv on equal s_q among the states of all stored transitions. See LEGEND."""
    s_q = restore(codec, arrays["obs"])
    rollout = np.arange(len(s_q), dtype=np.float32)[:, None] // PPO_ROLLOUT

    def repeated(groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return sizes[groups] > 1

    found = group(s_q)
    colliding = repeated(*found)
    return {
        "states": len(s_q),
        "distinct": len(found[1]),
        "colliding": colliding.mean(),
        "colliding_first": arrays["first"][colliding].mean() if colliding.any() else np.nan,
        "colliding_rollout": repeated(*group(rollout, s_q)).mean(),
        "colliding_action": repeated(*group(s_q, arrays["action"])).mean(),
        "spread_obs": spread(arrays["obs"], *found),
        "spread_reward": spread(arrays["reward"][:, None], *found),
        "spread_next": spread(arrays["next_obs"], *found),
    }


def write(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write a CSV file, and its folder: floats to six digits, nan as an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            cells = [row[column] for column in columns]
            shown = [f"{c:.6g}" if isinstance(c, float) else c for c in cells]
            writer.writerow("" if c == "nan" else c for c in shown)


def errors(args: argparse.Namespace) -> None:
    """Write OUT/errors.csv: one row per task and storage."""
    paths, rows = sorted(args.states.glob("*.npz")), []
    if not paths:
        raise ValueError(f"no .npz file in {args.states}; `states` makes them")
    for path in paths:
        arrays = load(path)
        for name, (codec, _) in STORAGES.items():
            row = {"task": path.stem, "storage": name}
            row |= rounding(codec, arrays["visited"]) | collisions(codec, arrays)
            rows.append(row)
            print(f"{path.stem}, {name}: RMS {row['rms']:.2g}, colliding {row['colliding']:.2%}")
    write(args.out / "errors.csv", ERRORS, rows)


# --- Speed ---------------------------------------------------------------------------------------


def train(env_id: str, steps: int, flags: list[str], cores: int) -> dict:
    """The result.json of a run of SAC, in a process of its own. RuntimeError if it fails."""
    command = [sys.executable, ROOT / "sac.py", "--env", env_id, "--total-timesteps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        child([*command, *flags, "--eval-episodes", "0", "--run-dir", folder], cores)
        (path,) = Path(folder).glob("*/result.json")
        return json.loads(path.read_text())


def speed(args: argparse.Namespace) -> None:
    """Write OUT/speed.csv, after each round: one row per run of SAC.

    As in speed.py, the order moves on by one from round to round.
    """
    names, rows = [*STORAGES], []
    for number in range(1, args.rounds + 1):
        first = (number - 1) % len(names)
        for env_id in args.env:
            for name in names[first:] + names[:first]:
                result = train(env_id, args.steps, STORAGES[name][1], args.cores)
                row = {"round": number, "task": env_id, "storage": name}
                rows.append(result | row | {"torch": result["versions"]["torch"]})
                print(f"round {number}, {env_id}, {name}: {result['ms_per_step']:.3f} ms/step")
        write(args.out / "speed.csv", SPEED, rows)


# --- Table ---------------------------------------------------------------------------------------


def read(path: Path, columns: list[str], numbers: dict) -> list[dict[str, str]]:
    """Rows as text, none where there is no file. Raises ValueError for other columns."""
    return read_csv(path, columns, numbers) if path.exists() else []


def markdown(corner: str, lines: dict[str, dict[str, str]]) -> None:
    """Print {line: {column: cell}} as a table; a column joins where it first occurs."""
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    print(f"\n| {' | '.join([corner, *columns])} |\n{'|---' * (len(columns) + 1)}|")
    for name, line in lines.items():
        print(f"| {' | '.join([name, *(line.get(column) or '-' for column in columns)])} |")


def measured(rows: list[dict[str, str]], timings: list[dict[str, str]]) -> dict:
    """{task: {storage: {head: cell}}} of errors.csv and speed.csv."""
    tables = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        tables[row["task"]][row["storage"]] = {
            head: row[column] and f"{float(row[column]):{form}}"
            for column, (head, form) in SHOWN.items()
        }
    times = defaultdict(dict)  # task, storage: round: ms/step
    for row in timings:
        times[row["task"], row["storage"]][row["round"]] = float(row["ms_per_step"])
    for (task, storage), each in times.items():
        relative = ratio(each, times.get((task, "float64"), {}))
        shown = f"{median(each.values()):.2f}" + (f" ({relative:.2f}x)" if relative else "")
        tables[task][storage]["ms/step"] = shown
    return tables


def table(args: argparse.Namespace) -> None:
    """Print, from the CSV files alone, a Markdown table per task."""
    errors_rows = read(args.results / "errors.csv", ERRORS, dict.fromkeys(SHOWN, optional))
    timings = read(args.results / "speed.csv", SPEED, {"ms_per_step": float})
    tables = measured(errors_rows, timings)
    if not tables:
        raise ValueError(f"no CSV file in {args.results}")
    for task, storages in tables.items():
        markdown(task, storages)
    print(LEGEND)


# --- Command line --------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An option's whole number of at least 1. Raises ValueError for anything else."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> None:
    """Run one of the four commands. SystemExit with code 2 and one line for bad input."""
    parser = Parser(prog="ablation.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run, out, numbers in (
        (states, STATES, {"steps": 100_000, "visits": 20_000, "seed": 1}),
        (speed, OUT, {"rounds": 4, "steps": 1500, "cores": 1}),
        (errors, OUT, {}),
        (table, None, {}),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
        for name, default in numbers.items():
            command.add_argument(f"--{name}", type=positive, default=default)
        if numbers:
            command.add_argument("--env", nargs="+", default=[*envs.V3_TASKS], metavar="ENV")
        if out:
            command.add_argument("--out", type=Path, default=out)
    commands.choices["errors"].add_argument("--states", type=Path, default=STATES)
    commands.choices["table"].add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"ablation.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
