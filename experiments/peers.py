"""Stable-Baselines3 and SBX on the tasks of support/envs.py, in float64: what ours is held against.

    ./run.sh experiments/peers.py --lib sb3 --algo sac --env Walker2d-v3 --total-timesteps 100000

Runs in a virtual environment of its own, .venv-bench, which run.sh makes. Both libraries' defaults
are the paper's Table II, as ours are; given are only the networks, two hidden layers of --hidden
each. With --quant-m, Stable-Baselines3's PPO learns from rounded observations, by a few lines that
share nothing with our buffers. Logs `charts/episodic_return` and `charts/SPS` where our scripts do,
and leaves a result.json, so that compare.py, figures.py and speed.py read both the same way. What
still differs from ours: both take statistics of every minibatch, ours of the last one; SBX's PPO
clips the gradients of policy and value function apart and starts from other weights.
"""

import argparse
import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from stable_baselines3.common.buffers import RolloutBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.monitor import Monitor
except ModuleNotFoundError as error:
    print(f"peers.py: error: {error}; ./run.sh experiments/peers.py installs it", file=sys.stderr)
    sys.exit(2)
import numpy as np
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import envs, errors, folders
from support.checkpoints import replacing

LIBRARIES = {  # --lib: module, packages whose versions are printed
    "sb3": ("stable_baselines3", ("stable-baselines3", "torch")),
    "sbx": ("sbx", ("sbx-rl", "jax", "stable-baselines3", "torch")),
}
LOG_EVERY = 1000  # steps between two entries of the speed, for SAC, as in sac.py


class Rounded(RolloutBuffer):
    """Keeps m decimals of each observation in [-127, 127], as the paper does (Eq. 4, 5)."""

    def __init__(self, *args: Any, m: int, **options: Any):
        super().__init__(*args, **options)
        self.m = m

    def add(self, obs: np.ndarray, *rest: Any) -> None:
        super().add(np.round(np.clip(obs, -127, 127), self.m), *rest)


class Log(BaseCallback):
    """Writes every finished episode's raw return at its last step, and the speed where ours do."""

    def __init__(self, writer: SummaryWriter, algo: str):
        super().__init__()
        self.writer, self.algo, self.start = writer, algo, time.perf_counter()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.writer.add_scalar(
                    "charts/episodic_return", info["episode"]["r"], self.num_timesteps
                )
        if self.algo == "sac" and self.num_timesteps % LOG_EVERY == 0:
            self.log_speed()
        return True

    def _on_rollout_start(self) -> None:
        if self.algo == "ppo" and self.num_timesteps:  # an update has just ended
            self.log_speed()

    def _on_training_end(self) -> None:
        if self.algo == "ppo":
            self.log_speed()

    def log_speed(self) -> None:
        speed = self.num_timesteps / (time.perf_counter() - self.start)
        self.writer.add_scalar("charts/SPS", speed, self.num_timesteps)


def main(args: argparse.Namespace) -> None:
    rounded = args.quant_m is not None
    if rounded and ((args.lib, args.algo) != ("sb3", "ppo") or args.quant_m < 0):
        with errors.refusing("peers.py"):
            raise ValueError("--quant-m, at least 0, goes only with --lib sb3 --algo ppo")
    env = Monitor(envs.make(args.env))
    m = f"__quant-m-{args.quant_m}" if rounded else ""
    name = f"{args.env}__{args.lib}-{args.algo}{m}__seed{args.seed}"
    folder = Path(args.run_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    with errors.refusing("peers.py"):
        folders.lock(folder)
        if [*folder.glob("events.*")]:  # never two runs in one folder
            raise ValueError(f"{folder} exists; choose another --run-dir")
    writer = SummaryWriter(str(folder))
    settings = "".join(f"|{key}|{value}|\n" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{settings}")
    module, packages = LIBRARIES[args.lib]
    options = {"seed": args.seed, "policy_kwargs": {"net_arch": [args.hidden, args.hidden]}}
    if (args.lib, args.algo) == ("sb3", "ppo"):
        options["device"] = "cpu"  # SB3 warns that it is slower on a GPU
    if rounded:
        options |= {"rollout_buffer_class": Rounded, "rollout_buffer_kwargs": {"m": args.quant_m}}
    model = getattr(import_module(module), args.algo.upper())("MlpPolicy", env, **options)
    model.set_logger(Logger(None, []))  # silent, and no temporary folder
    start = time.perf_counter()
    model.learn(args.total_timesteps, callback=Log(writer, args.algo))
    writer.close()
    ms = (time.perf_counter() - start) / args.total_timesteps * 1000
    versions = {package: version(package) for package in packages}
    result = {"global_step": model.num_timesteps, "ms_per_step": ms, "versions": versions}
    with replacing(folder / "result.json") as file:
        file.write(json.dumps(result | {"args": vars(args)}, indent=2).encode() + b"\n")
    print(f"{name}: {args.total_timesteps:,} steps, {ms:.4f} ms/step")
    print(", ".join(f"{package} {number}" for package, number in versions.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", choices=LIBRARIES, required=True)
    parser.add_argument("--algo", choices=["ppo", "sac"], required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--quant-m", type=int, help="decimals that SB3's PPO keeps; default all")
    parser.add_argument("--hidden", type=int, default=64, help="width of both hidden layers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--run-dir", default="runs")
    main(parser.parse_args())
