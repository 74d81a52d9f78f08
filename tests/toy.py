"""A tiny training script that has every kind of part a run can have. It takes milliseconds."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from buffers import ClampCount
from quantize import Float
from support import arguments, envs, errors, runs

CPU = torch.device("cpu")


@dataclass
class Args:
    """Those fields of sac.py's that runs need, and a new one."""

    env: str = "Pendulum-v1"
    seed: int = 1
    total_timesteps: int = 1000
    num_envs: int = 1
    device: str = "cpu"
    eval_episodes: int = 0
    run_dir: str = "runs"
    run_name: str | None = None
    checkpoint_every: int = 0
    resume: bool = False
    learning_rate: float = 0.01
    sharpness: float = 3.0


class Average:
    """A part such as a user may add."""

    def __init__(self):
        self.mean, self.count = np.zeros(3), 0

    def add(self, obs: np.ndarray) -> None:
        self.count += 1
        self.mean += (obs.mean(0) - self.mean) / self.count

    def state_dict(self) -> dict:
        return {"mean": torch.from_numpy(self.mean.copy()), "count": self.count}

    def load_state_dict(self, saved: dict) -> None:
        self.mean[:], self.count = saved["mean"], saved["count"]


def make_parts(args: Args) -> dict:
    """All that the next step depends on."""
    vector = envs.VectorEnv(args.env, args.num_envs)
    vector.reset(seed=args.seed)
    vector.action_space.seed(args.seed)
    torch.manual_seed(args.seed)
    network = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate)
    return {
        "network": network,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5),
        "temperature": torch.ones((), requires_grad=True),
        "average": Average(),
        "noise_rng": torch.Generator().manual_seed(args.seed),
        "sampling_rng": np.random.default_rng(args.seed),
        "envs": vector,
        "action_rng": vector.action_space.np_random,
        "progress": runs.Progress(args.num_envs),
    }


def train(args: Args, inside=lambda run: None, more: dict | None = None, without=()) -> dict:
    """Run the script; `inside` is called before every step, `more` are further parts."""
    with errors.refusing("toy.py"):
        arguments.check_ranges(args)
        device = runs.find_device(args.device)
        folder = runs.find_folder("toy.py", args, device)
    parts = make_parts(args) | (more or {})
    for name in without:
        del parts[name]
    vector, network = parts["envs"], parts["network"]
    codec = Float(torch.float64)
    buffer = SimpleNamespace(nbytes=0, codec=codec, clamped=ClampCount(codec))
    with runs.Run("toy.py", args, device, folder, **parts) as run:
        while run.goes_on():
            inside(run)
            obs, reward, terminated, truncated, _ = vector.step(vector.action_space.sample())
            if (done := terminated | truncated).any():
                vector.reset(options={"reset_mask": done})
            run.advance(reward, done)
            parts["average"].add(obs)
            noise = torch.randn(3, generator=parts["noise_rng"]) + torch.randn(3)
            noise *= parts["sampling_rng"].random() * parts["average"].mean.sum()
            loss = (network(noise) - parts["temperature"]).square().mean() / args.sharpness
            parts["optimizer"].zero_grad()
            loss.backward()
            parts["optimizer"].step()
            parts["scheduler"].step()
            with torch.no_grad():
                parts["temperature"].mul_(0.99)
            run.log({"losses/loss": loss})
        result = run.finish(buffer, lambda obs: vector.single_action_space.low)
    return {"result": result, **parts}
