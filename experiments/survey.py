"""Which m and b suit a robot: the range of its observations, and what clamping and rounding lose.

    python experiments/survey.py --env Humanoid-v5 --steps 20000

A column counts as fine at m if its RMS rounding error is at most `FINE` of its standard deviation.
The m recommended is the smallest at which every varying column is fine, if int16 can hold that;
else the largest that it can, if `ENOUGH` of them are fine there. The bound stays if nothing lies
beyond it, and grows to hold everything if that takes no wider type; otherwise it is yours to
choose. Either way the printed commands say what they cost.
"""

import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quantize import FixedPoint, bits, quantize, stored_bits
from support.envs import VectorEnv
from support.errors import EnvironmentFault
from tables import spans

DECIMALS = range(4)
# 10% of the deviation is 1% of the variance. On Walker2d-v3 one column of 17 is not fine at m = 1,
# the height of the torso, and PPO lost two fifths of its return there, at m = 2 nothing that ten
# seeds show (docs/learning.md). All of Humanoid-v3's columns would take int32.
FINE, ENOUGH = 0.1, 0.8


@dataclass
class Args:
    """Look at a robot's observations and recommend decimals m and bound b for storing them."""

    env: str = "Humanoid-v3"
    """Gymnasium id of the robot."""
    steps: int = 20_000
    """Observations to look at, under uniformly random actions."""
    quant_b: float = 127.0
    """Clamp bound to look at, symmetric."""
    seed: int = 1
    """Seed of the environment and of the actions."""


# --- Look ----------------------------------------------------------------------------------------


def collect(envs: VectorEnv, steps: int, seed: int) -> np.ndarray:
    """The observations that a buffer would store under random actions, final ones included.

    Args:
        envs: a single environment.
        steps: how many observations.
        seed: of the environment and of the actions.

    Returns:
        (steps, n) float64.

    Raises:
        ValueError: so many have no room.
        EnvironmentFault: see there.
    """
    envs.action_space.seed(seed)
    try:
        seen = np.empty((steps, envs.single_observation_space.shape[0]), np.float64)
    except (MemoryError, ValueError) as error:
        raise ValueError(f"--steps {steps} is too many: {error}") from None
    seen[0] = envs.reset(seed=seed)[0]
    ended = False
    for i in range(1, steps):
        if ended:
            seen[i], ended = envs.reset()[0], False
        else:
            seen[i], _, terminated, truncated, _ = envs.step(envs.action_space.sample())
            ended = terminated[0] or truncated[0]
    return seen


@dataclass
class Column:
    """One column of the observations; the errors are those of rounding alone, after the clamp.

    Attributes:
        low, high: smallest and largest value, before the clamp.
        beyond: share of the values beyond the bound.
        std: standard deviation after the clamp; 0 if nothing varies then.
        rms, worst: root mean square and largest rounding error, for each m of `DECIMALS`.
    """

    low: float
    high: float
    beyond: float
    std: float
    rms: list[float]
    worst: list[float]

    @property
    def peak(self) -> float:
        return max(-self.low, self.high)

    def fine(self, m: int, limit: float = FINE) -> bool:
        return self.rms[m] <= limit * self.std


def look_at(values: np.ndarray, b: float) -> Column:
    """Describe a column's (steps,) values under the bound b."""
    clamped = np.clip(values, -b, b)
    errors = [np.abs(quantize(values, m, b) - clamped) for m in DECIMALS]
    return Column(
        low=float(values.min()),
        high=float(values.max()),
        beyond=float(np.mean(np.abs(values) > b)),
        std=float(clamped.std()) if np.ptp(clamped) else 0.0,  # std of equal values may be 1e-17
        rms=[float(np.sqrt(np.mean(error**2))) for error in errors],
        worst=[float(error.max()) for error in errors],
    )


def magnitude(column: Column) -> float:
    """The smallest of 1, 10, 100, ... that bounds the column; 0 if it is constant."""
    limit = 1.0
    while column.peak > limit:
        limit *= 10
    return limit if column.low < column.high else 0.0


def column_groups(env: gym.Env, columns: list[Column]) -> dict[str, list[int]]:
    """Indices of the columns by group: as the environment names them, else by their largest |s|.

    Gymnasium's v5 MuJoCo tasks have `observation_structure`, name -> number of columns, in order.
    """
    sizes = dict(getattr(env.unwrapped, "observation_structure", {}))
    sizes.pop("skipped_qpos", None)  # counts what is not observed
    names = [name for name, size in sizes.items() for _ in range(size)]
    order = range(len(columns))
    if len(names) != len(columns):
        limits = [magnitude(column) for column in columns]
        names = [f"|s| <= {limit:g}" if limit else "constant" for limit in limits]
        order = sorted(order, key=limits.__getitem__)
    groups: dict[str, list[int]] = {}
    for i in order:
        groups.setdefault(names[i], []).append(i)
    return groups


# --- Recommend -----------------------------------------------------------------------------------


def fine_share(columns: list[Column], m: int, limit: float = FINE) -> float:
    """Share of the varying columns that are fine at m; 1 if none varies."""
    fine = [column.fine(m, limit) for column in columns if column.std]
    return sum(fine) / len(fine) if fine else 1.0


def storage_width(m: int, b: float) -> int | None:
    """Bits of the integer type of `FixedPoint(m, b)`; None beyond int32, which it refuses."""
    return next((width for width in (8, 16, 32) if stored_bits(m, b) <= width), None)


def recommend_m(columns: list[Column], b: float) -> int | None:
    """The smallest m within int16 at which all columns are fine, else the largest with enough.

    If int16 has none with enough, the smallest within int32; None if there is none either.
    """
    enough = [m for m in DECIMALS if storage_width(m, b) and fine_share(columns, m) >= ENOUGH]
    narrow = [m for m in enough if storage_width(m, b) <= 16]
    all_fine = [m for m in narrow if fine_share(columns, m) == 1]
    return next(iter(all_fine[:1] + narrow[-1:] + enough[:1]), None)


def round_up(peak: float) -> int:
    """The next integer of two digits and zeros: 3612.7 -> 3700. Exact, so never below `peak`."""
    whole = math.ceil(peak)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // unit) * unit


# --- Print ---------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def ranges(indices: list[int], width: int = 40) -> str:
    """Indices as "0-21, 45", in at most `width` characters."""
    return textwrap.shorten(spans(indices, "-"), width, placeholder=" ...")


def print_table(rows: list[list[str]]) -> None:
    """Print rows with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def print_groups(groups: dict[str, list[int]], columns: list[Column], b: float) -> None:
    """What each group spans, then what rounding does to it."""
    bounds = [["", "columns", "count", "constant", "min", "max", f"beyond +-{b:.10g}"]]
    errors = [["", *(head for m in DECIMALS for head in (f"m={m}: RMS", "worst", "fine"))]]
    for name, indices in groups.items():
        group = [columns[i] for i in indices]
        constant = sum(c.low == c.high for c in group)
        counts = [ranges(indices), str(len(group)), str(constant)]
        ends = [min(c.low for c in group), max(c.high for c in group)]
        beyond = percent(np.mean([c.beyond for c in group]))
        bounds.append([name, *counts, *(f"{end:z.5g}" for end in ends), beyond])
        errors.append([name])
        for m in DECIMALS:
            rms = np.sqrt(np.mean([c.rms[m] ** 2 for c in group]))
            fine = percent(fine_share(group, m)) if any(c.std for c in group) else "-"
            errors[-1] += [f"{rms:.2g}", f"{max(c.worst[m] for c in group):.2g}", fine]
    print_table(bounds)
    print("Errors of rounding to m decimals, after the clamp. Fine: share of the varying columns")
    print(f"whose RMS error is at most {FINE:.0%} of their standard deviation.\n")
    print_table(errors)


def storage_cells(m: int, b: float, n: int) -> dict[str, str]:
    """What one observation of n values takes; "packed" is with --pack."""
    stored, width = stored_bits(m, b), storage_width(m, b)
    return {
        "codes to": f"{round(b * 10**m):,}",
        "Eq. 6": f"{bits(m, b)}",
        "bits": f"{stored}",
        "type": f"int{width}" if width else "none",
        "bytes": f"{n * width // 8:,}" if width else "-",
        "packed": f"{2 * math.ceil(n * stored / 16):,}" if width else "-",
    }


def print_storage(columns: list[Column], b: float) -> None:
    """What an observation takes at each m, and the columns fine there by three measures."""
    n, rows = len(columns), []
    for m in DECIMALS:
        cells = {"": f"m={m}, b={b:.10g}", **storage_cells(m, b, n)}
        for limit in (FINE, FINE / 2, FINE / 10):
            cells[f"RMS<={limit:.0%} std"] = percent(fine_share(columns, m, limit))
        rows.append(cells)
    print(f"Storage of an observation of {n:,} values; in float64 it takes {8 * n:,} bytes.\n")
    print_table([[*rows[0]], *([*cells.values()] for cells in rows)])


def advise_m(columns: list[Column], b: float) -> int:
    """Print which m to take and why, or that none will do; return the one to go on with."""
    m = recommend_m(columns, b)
    if m is None:
        m = max(m for m in DECIMALS if storage_width(m, b))
        print(f"m: there is none up to 3 within int32 at which {ENOUGH:.0%} of the varying columns")
        print("   are fine; scale up those that span too little.")
    else:
        print(f"m = {m}: {percent(fine_share(columns, m))} of the varying columns are fine, as all")
        print(f"   should be if int16 can hold them, and {ENOUGH:.0%} if not.")
    varying = [i for i, column in enumerate(columns) if column.std]
    coarse = [i for i in varying if not columns[i].fine(m)]
    if coarse:
        print(f"   Not fine at m = {m}: {len(coarse)} of {len(varying)}, {ranges(coarse, 80)}")
    return m


def advise_b(groups: dict[str, list[int]], columns: list[Column], b: float, m: int) -> list[float]:
    """Print what lies beyond b and what to do about it; return the bounds to choose from."""
    peak = max(c.peak for c in columns)
    if peak <= b:
        print(f"b = {b:.10g}: nothing seen lies beyond; the largest |s| is {peak:.5g}.")
        return [b]
    print(f"b: {percent(np.mean([c.beyond for c in columns]))} of the values lie beyond {b:.10g}:")
    for name, indices in groups.items():
        outside = [i for i in indices if columns[i].peak > b]
        if outside:
            reached = max(columns[i].peak for i in outside)
            where = f"{len(outside)} of {len(indices)} columns, {ranges(outside, 60)}"
            print(f"   {name} reaches {reached:.5g}, in {where}")
    hold = round_up(peak)
    narrow, wide = storage_width(m, b), storage_width(m, hold)
    if wide is None:
        print(f"   Not even int32 holds it all at m = {m}: clamp, or scale these columns down.")
        return [b]
    if wide == narrow:
        print(f"   Recommended: {hold} holds it all and still takes int{wide}.")
    else:
        print(f"   Choose: {hold} holds it all in int{wide}; {b:.10g} clamps it in int{narrow}.")
    print(
        f"   m was judged under {b:.10g}: before taking {hold}, look again with --quant-b {hold}."
    )
    return [hold, b]


def print_advice(
    env_id: str, groups: dict[str, list[int]], columns: list[Column], b: float
) -> None:
    """What to take by the rules above, the commands that do so and what they cost."""
    m, rows = advise_m(columns, b), []
    for bound in advise_b(groups, columns, b, m):
        clamped = np.mean([c.beyond for c in columns]) if bound == b else 0.0
        command = f"python sac.py --env {env_id} --quant-m {m} --quant-b {bound:.10g}"
        cells = storage_cells(m, bound, len(columns))
        rows.append({"to run (or ppo.py)": command, "clamped": percent(clamped), **cells})
    print()
    print_table([[*rows[0]], *([*cells.values()] for cells in rows)])
    if constant := sum(c.low == c.high for c in columns):
        print(f"{constant} columns never changed; sac.py --drop-constant does not store these.")
    print("Random actions do not reach all that a trained policy does, nor does a single seed.")
    print("Training warns when it clamps.")


def main(args: Args) -> None:
    """Look, then print. One line on stderr, exit code 2 for bad input, 1 for a fault of the env."""
    try:
        if args.steps < 2:
            raise ValueError(f"--steps {args.steps} is too few; nothing varies in less than 2")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed} must not be negative")
        FixedPoint(0, args.quant_b)  # refuses what is no bound
        envs = VectorEnv(args.env, 1)
        seen = collect(envs, args.steps, args.seed)
    except EnvironmentFault as error:
        sys.exit(f"survey.py: error: {error}")
    except (ValueError, MemoryError) as error:
        print(f"survey.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    columns = [look_at(values, args.quant_b) for values in seen.T]
    groups = column_groups(envs.envs[0], columns)
    envs.close()
    print(f"{args.env}: {args.steps:,} observations under random actions, seed {args.seed}\n")
    print_groups(groups, columns, args.quant_b)
    print_storage(columns, args.quant_b)
    print_advice(args.env, groups, columns, args.quant_b)


if __name__ == "__main__":
    main(tyro.cli(Args))
