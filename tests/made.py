"""Runs that were never trained: folders as the scripts leave them, with returns that are known."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

VERSIONS = {"torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "3.14.0", "numpy": "2.4.6"}
Episodes = list[tuple[int, float]]  # (last step, return)


def episodes(total: int, length: int = 700, offset: float = 0.0) -> Episodes:
    """Ends every `length` steps with a return that grows with the step."""
    return [(step, offset + step / 64) for step in range(length, total + 1, length)]


def log(folder: Path, settings: dict, ends: Episodes) -> Path:
    """A folder with the settings and the episodes as TensorBoard has them."""
    with SummaryWriter(str(folder)) as writer:
        lines = "".join(f"|{name}|{value}|\n" for name, value in settings.items())
        writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{lines}")
        writer.add_scalar("charts/SPS", -1.0, 1)
        for step, ret in ends:
            writer.add_scalar("charts/episodic_return", ret, step)
    return folder


def run(root: Path, algo="ppo", m=None, seed=1, env="Ant-v3", ends=None, total=20_000, **changes):
    """A finished run of ours. `changes` replace settings; name= is that of its folder."""
    ends = episodes(total, offset=seed) if ends is None else ends
    name = changes.pop("name", f"{env}__{algo}__quant-m-{m}__seed-{seed}")
    settings = {"algo": algo, "env": env, "quant_m": m, "storage": None, "pack": False}
    settings |= {"drop_constant": False, "tag": None, "seed": seed, "gamma": 0.99}
    settings |= {"buffer_size": 1_000_000} if algo == "sac" else {"n_steps": 2048}
    settings |= {"total_timesteps": total, "run_dir": str(root)} | changes
    folder = log(root / name, settings, ends)
    result = {
        "algo": algo,
        "global_step": total,
        "clip_fraction": 0.125,
        "max_abs_obs": 12.5,
        "evaluation": [100.0, 102.0, 110.0],
        "args": settings,
        "versions": VERSIONS,
        "machine": "Linux, 2 cores",
    }
    if algo == "ppo":
        result["first_ratio_error"] = 0.25
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def unfinished(folder: Path) -> Path:
    """The same run, still training."""
    (folder / "result.json").unlink()
    return folder


def sb3(root: Path, algo="ppo", seed=1, env="Ant-v3", total=20_480, m=None) -> Path:
    """A finished run of Stable-Baselines3, as peers.py leaves it."""
    settings = {"lib": "sb3", "algo": algo, "env": env, "hidden": 64, "seed": seed}
    settings |= {"total_timesteps": total, "run_dir": str(root), "quant_m": m}
    rounded = "" if m is None else f"__quant-m-{m}"
    folder = root / f"{env}__sb3-{algo}{rounded}__seed{seed}"
    log(folder, settings, episodes(total, 900))
    (folder / "result.json").write_text(json.dumps({"global_step": total, "versions": {}}))
    return folder
