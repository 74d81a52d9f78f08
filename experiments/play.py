"""Plays the policy of a run, finished or still training: returns of episodes, a video, stills.

    python experiments/play.py runs/Walker2d-v3__sac__seed-1
    python experiments/play.py runs/Walker2d-v3__sac__seed-1 --episodes 1 --video walk.mp4

It acts and evaluates as the script did that trained it: with the run's own seed the returns are
those in its result.json, bit for bit. How to act is not written again here. `main` of sac.py or
ppo.py builds its networks and `best_action`, with all that you have changed there; only the run
that it enters is another one, see `Over`.

A run that is training is not disturbed: its folder is only read, without its lock. Its checkpoint
is replaced as a whole, so what is read is one or the other.
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import av
import gymnasium as gym
import matplotlib.image
import numpy as np
import torch
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo
import sac
from support import arguments, checkpoints, envs, errors, runs

SCRIPTS = {"sac.py": sac, "ppo.py": ppo}
FOLLOWS = "track"  # name of the camera that goes along, in the models of Gymnasium's robots
STILLS, APART = 6, 0.2  # how many, and seconds from one to the next
DRAWS = """
import mujoco
context = mujoco.GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 150)
"""


@dataclass
class Args:
    """Play the policy of a run without exploring, as the evaluation after training does."""

    run: tyro.conf.Positional[Path]
    """folder of the run, e.g. runs/Walker2d-v3__sac__seed-1"""
    episodes: int = 10
    """episodes, each of at most 10,000 steps"""
    seed: int | None = None
    """of the first reset; None is the evaluation's own, the run's --seed + 10,000"""
    video: Path | None = None
    """.mp4 that shows the first episode"""
    stills: Path | None = None
    """.png with a strip of stills from the first second of the first episode"""


def check(args: Args) -> None:
    """Raise ValueError with one clear line for what is wrong with the arguments."""
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes} is too few; at least 1 is needed")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; it must be 0 or more")
    for name, path, suffix in (("video", args.video, ".mp4"), ("stills", args.stills, ".png")):
        if path and path.suffix != suffix:
            raise ValueError(f"--{name} {path} must end in {suffix}")
        if path and path.is_dir():
            raise ValueError(f"--{name} {path} is a folder; a file is needed")


# --- The policy ----------------------------------------------------------------------------------


@dataclass
class Saved:
    """The state of a run that a file holds.

    Attributes:
        file: which.
        step: global_step.
        script, args: "sac.py" or "ppo.py", and its Args.
        parts: states by name; in weights.pt of the networks, in checkpoint.pt of all parts.
        evaluation: the returns in result.json that belong to it.
    """

    file: Path
    step: int
    script: str
    args: Any
    parts: dict
    evaluation: list[float]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error while a file is read into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # whatever is made of a file that is damaged, or none of ours
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be used: {' '.join(why.split())}") from None


def read_result(run: Path) -> Saved:
    """What a finished run left. Raises ValueError, one line."""
    with reading(run / "result.json"):
        result = json.loads((run / "result.json").read_text())
        step, script, evaluation = (
            result["global_step"],
            result["algo"] + ".py",
            result["evaluation"],
        )
        args = SCRIPTS[script].Args(**result["args"])
        arguments.check_ranges(args)
    with reading(run / "weights.pt"):
        parts = {**torch.load(run / "weights.pt", map_location="cpu", weights_only=True)}
    return Saved(run / "weights.pt", step, script, args, parts, evaluation)


def read_checkpoint(run: Path) -> Saved:
    """The last checkpoint of a run. Raises ValueError, one line."""
    with reading(run / "checkpoint.pt"):
        saved = checkpoints.load(run / "checkpoint.pt")
        script = saved["script"]
        args = SCRIPTS[script].Args(**saved["args"])
        return Saved(run / "checkpoint.pt", saved["global_step"], script, args, saved["parts"], [])


def read(run: Path) -> Saved:
    """The newest state of a run: a finished one may have been trained further since.

    Raises:
        ValueError: one line; there is none, or a file is damaged.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    found = []
    if (run / "weights.pt").is_file() and (run / "result.json").is_file():
        found.append(read_result(run))
    if (run / "checkpoint.pt").is_file():
        found.append(read_checkpoint(run))
    if not found:
        raise ValueError(
            f"{run} holds no policy: neither the weights.pt and result.json of a finished run nor "
            "a checkpoint.pt (training with --checkpoint-every N saves one every N steps)"
        )
    return max(found, key=lambda saved: saved.step)  # if equal the first, which has an evaluation


class Over:
    """Stands in for `runs.Run`: a run with the networks of `saved`, over before its first step.

    Raises:
        ValueError: one line; the networks that `main` built are not those that were saved.
    """

    def __init__(self, saved: Saved, *_: Any, **parts: Any):
        networks = {k: part for k, part in parts.items() if isinstance(part, torch.nn.Module)}
        unlike = f"{saved.file} does not fit {saved.script}, which was changed since it was trained"
        others = saved.parts.keys() - parts.keys() - {"torch_rng", "cuda_rng"}
        for name in others | (networks.keys() - saved.parts.keys()):
            raise ValueError(f"{unlike}: only one of them has '{name}' among its parts")
        for name, network in networks.items():
            try:
                network.load_state_dict(saved.parts[name])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{unlike}: {' '.join(str(error).split())}") from None

    def __enter__(self) -> "Over":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def goes_on(self) -> bool:
        return False

    def finish(self, buffer: Any, best_action: Callable, **more: Any) -> Callable:
        """Hand out what `runs.Run` would evaluate."""
        return best_action


def policy_of(saved: Saved) -> Callable[[np.ndarray], np.ndarray]:
    """The script's `best_action`: observation (n,) -> action (k,).

    Its `main` runs, with `Over` as the run, and no folder.

    Raises:
        ValueError: one line, see `Over`.
    """
    # One environment and the smallest buffer that `main` allows: neither is used.
    fewer = {"num_envs": 1, "device": "cpu" if saved.args.device == "cpu" else "auto"}
    if saved.script == "sac.py":
        fewer |= {"buffer_size": saved.args.batch_size, "memory_budget": None}
    else:
        fewer |= {"n_steps": saved.args.n_steps * saved.args.num_envs}
    instead = {"find_folder": lambda *_: None, "Run": partial(Over, saved)}
    with mock.patch.multiple(runs, **instead), contextlib.redirect_stdout(None):
        act = SCRIPTS[saved.script].main(replace(saved.args, **fewer))["result"]
    saved.parts = {}  # those of a checkpoint are its file, which would stay on the disk
    return act


# --- The camera ----------------------------------------------------------------------------------


def find_gl() -> str | None:
    """What MuJoCo can draw with here: egl, osmesa, or with a display glfw; None if nothing.

    Each is tried in a process of its own: after one has failed, PyOpenGL refuses the others.
    """
    for gl in ("egl", "osmesa", "glfw"):
        environment = os.environ | {"MUJOCO_GL": gl}
        words, quiet = [sys.executable, "-c", DRAWS], {"capture_output": True, "check": False}
        if subprocess.run(words, env=environment, **quiet).returncode == 0:
            return gl
    return None


def set_up_camera(env_id: str, env: gym.Env) -> dict[str, str]:
    """What to make an environment with so that it can be drawn; env is one that was made without.

    Raises:
        ValueError: one line; it cannot be drawn, or not on this machine.
    """
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise ValueError(f"{env_id} cannot be drawn: it has no render_mode 'rgb_array'")
    options = {"render_mode": "rgb_array"}
    if isinstance(env.unwrapped, MujocoEnv):
        if "MUJOCO_GL" not in os.environ:
            if (gl := find_gl()) is None:
                raise ValueError(
                    f"{env_id} cannot be drawn without OpenGL: neither EGL nor OSMesa works here "
                    "(on Debian: apt-get install libegl1, or libosmesa6)"
                )
            os.environ["MUJOCO_GL"] = gl
        model = env.unwrapped.model
        if FOLLOWS in [model.camera(i).name for i in range(model.ncam)]:
            options["camera_name"] = FOLLOWS  # else HalfCheetah and Ant run out of the picture
    return options


def first_frame(env_id: str, options: dict[str, str]) -> np.ndarray:
    """An image of an environment, (height, width, 3) uint8.

    Raises:
        ValueError: one line; there is none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of GLFW, before the error
            env = envs.make(env_id, **options)
            env.reset(seed=0)
            frame = np.asarray(env.render())
            env.close()
    except Exception as error:  # of the environment's code, OpenGL, pygame
        why = " ".join(str(error).split()) or type(error).__name__
        gl = f" (MUJOCO_GL is {os.environ['MUJOCO_GL']})" if "MUJOCO_GL" in os.environ else ""
        raise ValueError(f"{env_id} cannot be drawn{gl}: {why}") from None
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"{env_id} draws {frame.dtype} of shape {frame.shape}, no RGB image")
    return frame


@contextlib.contextmanager
def writing(name: str, path: Path) -> Iterator[BinaryIO]:
    """Open the file of --video or --stills, which gets its name when all is written.

    Raises:
        ValueError: one line; it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(checkpoints.replacing(path))
        except OSError as error:
            raise ValueError(f"--{name} {path} cannot be written: {error.strerror}") from None
        yield file


def even(frame: np.ndarray) -> np.ndarray:
    """(height, width, 3), without its last row or column where their number is odd."""
    height, width, _ = frame.shape
    return np.ascontiguousarray(frame[: height // 2 * 2, : width // 2 * 2])


@contextlib.contextmanager
def filming(file: BinaryIO, frame: np.ndarray, fps: float) -> Iterator[Callable]:
    """Make an MP4 of frames like `frame`, (height, width, 3) uint8; yields what appends one."""
    with av.open(file, "w", format="mp4") as video:
        stream = video.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, _ = even(frame).shape
        stream.pix_fmt = "yuv420p"  # what every player knows; colours at half the resolution

        def append(frame: np.ndarray) -> None:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(even(frame), format="rgb24")))

        yield append
        video.mux(stream.encode())  # what the encoder still holds


def strip_of(stills: list[np.ndarray]) -> np.ndarray:
    """Stills side by side, at half their size: (height, width, 3) uint8."""
    strip = np.concatenate([even(still) for still in stills], axis=1)
    height, width, _ = strip.shape
    return strip.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).astype(np.uint8)


# --- The command ---------------------------------------------------------------------------------


def play(args: Args) -> list[float]:
    """Read, evaluate, and write what was asked for; return the returns.

    Raises:
        ValueError, EnvironmentFault: one line.
    """
    check(args)
    saved = read(args.run)
    env_id = saved.args.env
    env = envs.make(env_id)
    env.close()
    act, fps = policy_of(saved), env.metadata.get("render_fps", 30)
    seed = saved.args.seed + runs.EVALUATION_SEED if args.seed is None else args.seed
    errors.say(f"{saved.file}: {saved.script} on {env_id} after {saved.step:,} steps")
    with contextlib.ExitStack() as stack:
        files = {  # opened before anything takes time
            name: stack.enter_context(writing(name, path))
            for name, path in (("video", args.video), ("stills", args.stills))
            if path
        }
        options, append, stills, moments = {}, None, [], set()
        if files:
            options = set_up_camera(env_id, env)
            frame = first_frame(env_id, options)
        if args.video:
            append = stack.enter_context(filming(files["video"], frame, fps))
        if args.stills:
            moments = {round(i * APART * fps) for i in range(STILLS)}
        bar = stack.enter_context(tqdm(unit="step", dynamic_ncols=True, disable=None, leave=False))

        def watch(episode: int, step: int, env: envs.VectorEnv) -> None:
            bar.update()
            if episode == 0 and (append or step in moments):
                (frame,) = env.render()
                if append:
                    append(frame)
                if step in moments:
                    stills.append(frame)

        returns = envs.evaluate(env_id, act, args.episodes, seed, watch, **options)
        if args.stills:
            matplotlib.image.imsave(files["stills"], strip_of(stills), format="png")
    report(returns, saved.evaluation if args.seed is None else [])
    for path in filter(None, (args.video, args.stills)):
        errors.say(f"wrote {path}")
    return returns


def report(returns: list[float], expected: list[float]) -> None:
    """Print the returns, and whether they are those expected, as many as both have."""
    for episode, value in enumerate(returns, 1):
        errors.say(f"episode {episode}: return {value:.1f}")
    spread = f", standard deviation (n - 1) {np.std(returns, ddof=1):.1f}" if returns[1:] else ""
    errors.say(f"mean return {np.mean(returns):.1f}{spread}")
    if both := min(len(returns), len(expected)):
        if returns[:both] == expected[:both]:
            errors.say("bit for bit what result.json has")
        else:
            print(
                "warning: result.json has other returns: code, versions or machine have changed",
                file=sys.stderr,
            )


def main(args: Args) -> list[float]:
    """Play; return the returns. SystemExit with code 2 and one line for bad input."""
    with errors.refusing("play.py"):
        return play(args)


if __name__ == "__main__":
    with errors.command("play.py"):
        main(tyro.cli(Args))
