"""Stable-Baselines3 on `envs.py`'s tasks: the float64 reference that our curves are held against.

    python experiments/sb3.py --algo sac --env Walker2d-v3 --seed 1 --total-timesteps 100000

Runs in a virtual environment of its own (`requirements-bench.txt`; `run.sh reproduce` makes it).
SB3's defaults, but for SAC's 64-64 networks, the paper's, for which nothing is published. Writes
the same `charts/episodic_return` tag as our scripts, so `plot.py` reads both the same way.
"""

import argparse
import sys
import time
from pathlib import Path

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs


class LogEpisodes(BaseCallback):
    """Writes every finished episode's raw return at its last environment step."""

    def __init__(self, writer: SummaryWriter):
        super().__init__()
        self.writer = writer

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.writer.add_scalar(
                    "charts/episodic_return", info["episode"]["r"], self.num_timesteps
                )
        return True


def main(args: argparse.Namespace) -> None:
    env = Monitor(envs.make(args.env))
    name = f"{args.env}__sb3-{args.algo}__seed{args.seed}"
    folder = Path(args.run_dir) / name
    folder.mkdir(parents=True)  # never two runs in one folder
    writer = SummaryWriter(str(folder))
    if args.algo == "sac":
        model = SAC("MlpPolicy", env, seed=args.seed, policy_kwargs={"net_arch": [64, 64]})
    else:
        model = PPO("MlpPolicy", env, seed=args.seed, device="cpu")
    start = time.perf_counter()
    model.learn(args.total_timesteps, callback=LogEpisodes(writer))
    writer.close()
    ms = (time.perf_counter() - start) / args.total_timesteps * 1000
    print(f"{name}: {args.total_timesteps:,} steps, {ms:.4f} ms/step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algo", choices=["ppo", "sac"], required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--run-dir", default="runs")
    main(parser.parse_args())
