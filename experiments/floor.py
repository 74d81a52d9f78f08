"""The time that a training step cannot go below: `env.step` and the bare matrix products.

    python experiments/floor.py sac-64-Walker2d-v3    # milliseconds per step

`speed.py` measures it beside the trainings. The products are those of acting and of learning, each
as fast as torch computes it by itself, without activations, losses, Adam, or a buffer.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import envs

PPO_BATCH, PPO_EPOCHS, SAC_BATCH = 64, 10, 256  # defaults of our scripts, SB3 and SBX
Shape = tuple[int, int, int, int]  # count, rows, inner, cols: count x (rows, inner) @ (inner, cols)


def forward(count: int, batch: int, inputs: int, hidden: int, outputs: int) -> list[Shape]:
    """Products of `count` networks with two hidden layers."""
    sizes = (inputs, hidden), (hidden, hidden), (hidden, outputs)
    return [(count, batch, *size) for size in sizes]


def products(algo: str, obs_dim: int, act_dim: int, hidden: int, batch: int) -> list[Shape]:
    """The matrix products of one update, in their order."""

    def weights(count: int, inputs: int, outputs: int) -> list[Shape]:
        sizes = (hidden, outputs), (hidden, hidden), (inputs, hidden)
        return [(count, rows, batch, cols) for rows, cols in sizes]

    def hiddens(count: int, outputs: int) -> list[Shape]:
        return [(count, batch, outputs, hidden), (count, batch, hidden, hidden)]

    if algo == "ppo":
        return [
            *forward(1, batch, obs_dim, hidden, act_dim),  # policy,
            *forward(1, batch, obs_dim, hidden, 1),  # value function,
            *hiddens(1, act_dim),  # and back through both; nobody asks for the inputs' gradient
            *weights(1, obs_dim, act_dim),
            *hiddens(1, 1),
            *weights(1, obs_dim, 1),
        ]
    pair = obs_dim + act_dim
    return [
        *forward(1, 2 * batch, obs_dim, hidden, 2 * act_dim),  # actor, on s and s' at once
        *forward(2, batch, pair, hidden, 1),  # target critics
        *forward(2, batch, pair, hidden, 1),  # critics,
        *hiddens(2, 1),  # and back through them
        *weights(2, pair, 1),
        *forward(2, batch, pair, hidden, 1),  # critics on the actor's own actions,
        *hiddens(2, 1),  # and back through them, to these actions only
        (2, batch, hidden, act_dim),
        *hiddens(1, 2 * act_dim),  # back through the actor, on s
        *weights(1, obs_dim, 2 * act_dim),
    ]


@torch.inference_mode()
def time_products(shapes: list[Shape], repeats: int = 300) -> float:
    """Median seconds for all products, one after the other, into results that are there before."""
    calls = []
    for count, rows, inner, cols in shapes:
        a, b = torch.randn(count, rows, inner), torch.randn(count, inner, cols)
        out = torch.empty(count, rows, cols)
        if inner == 1:  # an outer product is no matrix product's work
            calls.append((torch.mul, a, b, out))
        elif count > 1 and cols > 1:
            calls.append((torch.bmm, a, b, out))
        else:  # two products with one column are faster one by one than batched
            calls += [(torch.mm, *each) for each in zip(a, b, out, strict=True)]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for multiply, a, b, out in calls:
            multiply(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def floor(cell: str, steps: int = 1000) -> float:
    """Milliseconds per step of `env.step` (its median) and of the matrix products alone."""
    algo, hidden, env_id = cell.split("-", 2)
    env, hidden = envs.make(env_id), int(hidden)
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    env.action_space.seed(1)
    env.reset(seed=1)
    seconds = []
    for _ in range(steps):
        action = env.action_space.sample()
        start = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        seconds.append(time.perf_counter() - start)
        if terminated or truncated:
            env.reset()
    if algo == "sac":
        outputs, batch, updates_per_step = [2 * act_dim], SAC_BATCH, 1
    else:
        outputs, batch, updates_per_step = [act_dim, 1], PPO_BATCH, PPO_EPOCHS / PPO_BATCH
    acting = [shape for count in outputs for shape in forward(1, 1, obs_dim, hidden, count)]
    update = time_products(products(algo, obs_dim, act_dim, hidden, batch))
    return 1000 * (median(seconds) + time_products(acting) + updates_per_step * update)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell", help="algorithm, hidden units and task, as in sac-64-Walker2d-v3")
    cell = parser.parse_args().cell
    try:
        print(floor(cell))
    except ValueError as error:
        parser.exit(2, f"floor.py: error: {cell}: {error}\n")
