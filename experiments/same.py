"""Do identical trainings end with the same weights? Counts, each in a process of its own.

    python experiments/same.py --runs 200                        # a quarter of an hour
    python experiments/same.py --runs 200 --root ../before       # of another checkout

The training is short, with networks so large that two threads share their products.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "--env Humanoid-v3 --quant-m 2 --hidden 256 --batch-size 64 --total-timesteps 252"
TRAINING += " --buffer-size 300 --eval-episodes 0"


def weights(root: Path) -> str:
    """Hash of the networks that one training with two threads ends with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, root / "sac.py", *TRAINING.split(), "--run-dir", folder]
        two = os.environ | {"OMP_NUM_THREADS": "2"}
        subprocess.run(command, env=two, capture_output=True, check=True)
        (file,) = Path(folder).glob("*/weights.pt")
        networks = torch.load(file, weights_only=True)
    values = [value for name in sorted(networks) for value in networks[name].values()]
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in values)).hexdigest()[:12]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to train with")
    args = parser.parse_args(argv)
    counts = Counter(weights(args.root) for _ in range(args.runs))
    for name, count in counts.most_common():
        print(f"{count} of {args.runs} end with {name}")


if __name__ == "__main__":
    main()
