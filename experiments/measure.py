"""What a real process takes: `python memory.py --env Humanoid-v3 --quant-m 2 --measure`.

The script runs as a user would run it, up to its first updates and with every page of its buffer
written to; it says itself how much memory it took (`rss_bytes` in result.json).
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from support.arguments import flag

ROOT = Path(__file__).resolve().parent.parent


def measure(
    env: str, algo: str, codec_flags: str, allocated: Callable[[int], int], **sizes: int
) -> dict[str, int]:
    """Run the script with the smallest buffer and with the one asked for.

    Args:
        env: Gymnasium id.
        algo: ppo or sac.
        codec_flags: how observations are stored, as flags of the script.
        allocated: buffer_size (sac) or n_steps (ppo) -> bytes of the allocated ledger.
        sizes: num_envs, hidden, batch_size, and buffer_size or n_steps.

    Returns:
        Bytes: "resident" when training ends; its "peak"; "interpreter", its own and its
        libraries', which is what the small run has beyond its allocated ledger; "total", what is
        resident beyond that, to compare with the allocated total.

    Raises:
        ValueError: the buffer holds no batch, or the script fails; then with its last line.
    """
    knob, per_size = ("n_steps", sizes["num_envs"]) if algo == "ppo" else ("buffer_size", 1)
    size, least = sizes[knob], math.ceil(sizes["batch_size"] / per_size)
    if size < least:
        raise ValueError(f"--measure runs {algo}.py, whose {flag(knob)} is at least {least}")
    same = {"env": env} | {name: sizes[name] for name in ("num_envs", "hidden", "batch_size")}

    def run(n: int) -> dict:
        if algo == "ppo":  # one whole rollout
            return _run(algo, codec_flags, same, n_steps=n, total_timesteps=1, n_epochs=1)
        batch = sizes["batch_size"]
        short = dict(learning_starts=batch, total_timesteps=batch + 50)
        # With a budget the script writes to every page of its buffer at the start.
        return _run(algo, codec_flags, same, memory_budget=allocated(n), **short)

    own = run(least)["rss_bytes"] - allocated(least)
    result = run(size)
    now, peak = result["rss_bytes"], result["peak_rss_bytes"]
    # The kernel counts the peak less exactly than what is resident now.
    return dict(resident=now, peak=max(now, peak), interpreter=own, total=now - own)


def _run(algo: str, codec_flags: str, same: dict, **others: int) -> dict:
    """result.json of one run on the CPU, with one thread and without evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = dict(run_dir=folder, run_name="measured", device="cpu", eval_episodes=0)
        command = [sys.executable, str(ROOT / f"{algo}.py"), *codec_flags.split()]
        for name, value in {**same, **others, **fixed}.items():
            command += [flag(name), str(value)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=one_thread, capture_output=True, text=True)
        if run.returncode:
            *_, line = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise ValueError(f"--measure failed; {line}")
        return json.loads(Path(folder, "measured", "result.json").read_text())
