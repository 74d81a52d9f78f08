"""A run's folder, log, progress bar, checkpoints and signals, so that a script can just train.

    folder = find_folder("sac.py", args, device)                # created, or found to resume
    with Run("sac.py", args, device, folder, actor=actor, buffer=buffer, envs=envs, ...) as run:
        while run.goes_on():                    # saves a checkpoint when one is due
            ...
            run.advance(reward, done)           # counts the step, logs episodes that ended
            run.log({"losses/qf_loss": loss})
        run.finish(buffer, best_action)         # evaluates, sums up

The keywords of `Run` name everything that the next step depends on: it is saved, and restored
before `Run` returns. To have something of your own saved, add it there.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from support import arguments, checkpoints
from support.envs import evaluate
from support.errors import EnvironmentFault, machine_fault, refusing, say
from support.folders import VERSIONS, Folder, unlock, written_with
from support.folders import find_folder as find_folder
from support.log import Log
from support.machine import peak_resident, resident
from support.progress import Progress
from support.recording import StaleRecording

ROOT = Path(__file__).parent.parent
EVALUATION_SEED = 10_000  # added to --seed: that of the first evaluation episode


# --- What a result depends on ---------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """Turn --device into a device: "auto" is cuda if there is one, else cpu.

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # .item() refuses "meta", which holds no data
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(
            f"--device {name} is not available on this machine; cpu and auto always are"
        ) from None
    return torch.device(name)


DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color")  # not as the user has set it


@functools.cache  # as it was at first: files may change while a run trains
def _git(*words: str) -> str | None:
    """What a git command says of this repository, None outside of one."""
    where = ["--no-optional-locks", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    command = ["git", *where, *words]
    try:
        options = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict:
    """What a result depends on besides its arguments: versions, code and machine."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": VERSIONS,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": None if changes is None else not changes,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def code() -> str:
    """The commit of this code and a hash of what differs from it, as a few words."""
    commit, changes = _git("rev-parse", "HEAD"), _git(*DIFF, "HEAD")
    if commit is None:
        return "no known commit"
    changed = hashlib.sha256(changes.encode()).hexdigest()[:8] if changes else None
    return f"commit {commit[:10]}" + (f" with changes {changed}" if changed else "")


def code_and_threads() -> str:
    """`code`, and the number of torch's threads: with another one sums get other last bits."""
    return f"{code()}, torch threads: {torch.get_num_threads()}"


# --- The run --------------------------------------------------------------------------------------


class Run:
    """One training run, as a context manager: log, progress bar, checkpoints, signals and faults.

    Ctrl-C and SIGTERM let the current step (PPO: rollout and update) finish; then the run is saved
    and exits with code 130 or 143. A second signal kills. If the environment fails, the last good
    state is saved and the exit code is 1. Either way one line says how to resume.

    Args:
        script: "sac.py" or "ppo.py".
        args: its Args.
        device: what is trained on.
        folder: from `find_folder`.
        parts: all that the next step depends on, by name; see `checkpoints.state_of`. `envs` and
            `progress` must be among them, torch's random generators are always. If the run is
            resumed, they are restored here.

    Attributes:
        bar: tqdm's progress bar.

    Raises:
        SystemExit: code 2 after one line on stderr, if the checkpoint does not fit the parts.
    """

    def __init__(
        self, script: str, args: Any, device: torch.device, folder: Folder, /, **parts: Any
    ):
        self.script, self.args, self.device, self.folder = script, args, device, folder
        self.progress: Progress = parts["progress"]
        self.parts = {**parts, "torch_rng": torch.default_generator}
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.parts["cuda_rng"] = torch.cuda.default_generators[index]
        self.saved_step: int | None = None
        self.seconds_before, self.next_save = 0.0, 0  # a new run is saved at once
        self.before: dict | None = None  # the state before this rollout, by `snapshot`
        self.noise_changed = False  # in it, since it was taken
        self.process = os.getpid()
        self.signal: int | None = None  # the first that came
        self.evaluating = False  # then a signal need not wait for `goes_on`
        self.warned_of_saving = self.warned_of_clamping = False
        self.code_before: str | None = None  # what the checkpoint was written by
        if folder.saved:
            with refusing(script), folder.reading():
                self._restore(folder.saved)
                self.code_before = "".join(filter(str.isprintable, str(folder.saved["code"])))
            folder.saved = None  # its tensors are the file, which would keep its space on the disk
        self.code = code_and_threads()  # as they are now; files may change while a run trains

    def _restore(self, saved: dict) -> None:
        """Set all parts to what was saved. Raises ValueError naming a part that does not fit."""
        for name in saved["parts"].keys() ^ self.parts.keys():
            has = "has no" if name in self.parts else "has"
            raise ValueError(f"it {has} '{name}' among its parts, unlike this run")
        for name, part in self.parts.items():
            try:  # out of inference mode, whose tensors could not be trained
                with torch.inference_mode(False), torch.no_grad():
                    checkpoints.restore(part, saved["parts"][name])
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"its {name} does not fit: {error}") from None
        self.saved_step, self.seconds_before = self.progress.global_step, saved["seconds"]
        self.next_save = self._next_save()
        self.progress.restart(self.parts["envs"].fresh)

    def __enter__(self) -> "Run":
        checkpoints.plain(self._state(), "it")  # raises now rather than when it is to be saved
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=self.args.total_timesteps,
            initial=self.progress.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=None,
        )
        Path(f"{self.folder.checkpoint}.part").unlink(missing_ok=True)  # if it was killed
        self.tensorboard = Log(self.folder.path, self.warn)
        self.tensorboard.open(self.saved_step)
        fresh = np.flatnonzero(self.parts["envs"].fresh).tolist()
        if self.saved_step is None:
            settings = {"algo": self.script.removesuffix(".py")} | asdict(self.args)
            self.tensorboard.add_table("hyperparameters", settings)
        elif self.code_before != self.code:
            self.warn(f"saved by {self.code_before}; goes on with {self.code}")
        if self.saved_step is not None and fresh:
            self.warn(f"env {fresh} did not replay to where it was; a new episode begins there")
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as it is in the background
                self.handlers[number] = signal.signal(number, self._signalled)
        return self

    @property
    def seconds(self) -> float:
        """Time since the beginning, without that between a stop and its resumption."""
        return self.seconds_before + time.perf_counter() - self.start

    def goes_on(self) -> bool:
        """Whether to train on. Saves a checkpoint if one is due, and at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM came since the last call.
        """
        self.before = None
        ends = self.progress.global_step >= self.args.total_timesteps
        due = self.args.checkpoint_every and self.progress.global_step >= self.next_save
        keeps = self.args.checkpoint_every or self.saved_step is not None
        if due or (ends and keeps):
            self._save()
        self.evaluating = ends  # which changes nothing that is saved
        if self.signal:  # looked at last: none that came meanwhile is missed
            raise KeyboardInterrupt
        return not ends

    def snapshot(self) -> None:
        """Copy the state of all parts: until the next `goes_on`, a fault saves this copy.

        For an algorithm that can be resumed only before a rollout, not within one.
        """
        self.before = copy.deepcopy(checkpoints.plain(self._state(), "it"))

    def advance(self, reward: np.ndarray, done: np.ndarray) -> None:
        """Count one step of every env, see `Progress.advance`, and log the episodes that ended."""
        ended = self.progress.advance(reward, done)
        self.bar.update(len(done))
        if ended:
            mean_return, mean_length = ended
            self.log({"charts/episodic_return": mean_return, "charts/episodic_length": mean_length})
            self.bar.set_postfix(episodic_return=f"{mean_return:.0f}", refresh=False)

    def log(self, scalars: dict[str, float | torch.Tensor]) -> None:
        """Write scalars, numbers or tensors (), by their tags to TensorBoard's log."""
        self.tensorboard.add(scalars, self.progress.global_step)

    def warn_of_clamping(self, clamped: Any) -> None:
        """Warn once if values were clamped. clamped: a `buffers.ClampCount`."""
        if clamped.clipped and not self.warned_of_clamping:
            self.warned_of_clamping = True
            self.warn(f"so far {clamped.report()}")

    def say(self, message: str) -> None:
        """Print a line that leaves the progress bar whole. A run goes on if nobody reads it."""
        with self.bar.external_write_mode():
            say(message)

    def warn(self, message: str) -> None:
        """Print a line on stderr, likewise."""
        with contextlib.suppress(OSError):  # stderr may be a file on a disk that is full
            self.bar.write(f"warning: {message}", file=sys.stderr)

    def finish(
        self, buffer: Any, best_action: Callable[[np.ndarray], np.ndarray], **more: Any
    ) -> dict:
        """Evaluate, print a summary, and write weights.pt and result.json.

        A folder with a result.json is that of a finished run.

        Args:
            buffer: of `buffers.py`; its bytes and what it clamped are part of the result.
            best_action: observation (n,) -> deterministic action (k,), for the evaluation.
            more: further entries of the result.

        Returns:
            The result, as in result.json.
        """
        self.bar.close()
        self.parts["envs"].close()
        trained, clamped, seconds = self.progress.last_tenth(), buffer.clamped, self.seconds
        self.say(f"trained; {self.args.eval_episodes} evaluation episodes follow")
        result = {
            "algo": self.script.removesuffix(".py"),
            "global_step": self.progress.global_step,
            "ms_per_step": 1000 * seconds / self.progress.global_step,
            "storage": buffer.codec.name,
            "buffer_bytes": buffer.nbytes,
            "rss_bytes": resident(),
            "peak_rss_bytes": peak_resident(),
            "clip_fraction": clamped.fraction,
            "max_abs_obs": clamped.max_abs,
            "clamped": clamped.report(),
            "return_last_tenth": trained,
            "evaluation": evaluate(
                self.args.env,
                best_action,
                self.args.eval_episodes,
                self.args.seed + EVALUATION_SEED,
            ),
            **more,
            "args": asdict(self.args),
            **provenance(),
        }
        shown = "no episode ended in it" if trained is None else f"{trained:.1f}"
        self.say(f"mean return over the last tenth of training: {shown}")
        if evaluation := result["evaluation"]:
            mean = np.mean(evaluation)
            self.say(f"mean return of {len(evaluation)} deterministic episodes: {mean:.1f}")
        self.say(
            f"{result['ms_per_step']:.2f} ms/step, buffer {buffer.nbytes / 1e6:,.1f} MB "
            f"when full, whole process {result['peak_rss_bytes'] / 1e6:,.0f} MB at its peak, "
            f"max |obs| {clamped.max_abs:.4g}\n"
            f"{result['clamped'] or 'no value was clamped'}"
        )
        with checkpoints.replacing(self.folder.path / "weights.pt") as file:
            networks = {k: v for k, v in self.parts.items() if isinstance(v, torch.nn.Module)}
            torch.save({name: network.state_dict() for name, network in networks.items()}, file)
        path = self.folder.path / "result.json"
        with checkpoints.replacing(path) as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")
        self.say(f"wrote {path}")
        return result

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        was_evaluating, self.evaluating = self.evaluating, False
        self.bar.close()
        if isinstance(error, EnvironmentFault) and self.before:
            # With the same random numbers the same rollout would meet the same fault again.
            self.before["parts"]["torch_rng"] = checkpoints.state_of(torch.default_generator)
            self.noise_changed = True
        if isinstance(error, EnvironmentFault | KeyboardInterrupt) or (error and was_evaluating):
            self._save()
        self.tensorboard.close()
        unlock(self.folder.lock)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, KeyboardInterrupt):
            name = signal.Signals(self.signal).name
            print(f"{self.script}: {name}, {self._how_to_resume()}", file=sys.stderr)
            raise SystemExit(128 + self.signal) from None
        if why := self._why(error):
            raise SystemExit(f"{self.script}: error: {why}; {self._how_to_resume()}") from None

    def _why(self, error: BaseException | None) -> str | None:
        """One line for an error that a user can meet; None for any other, as in changed code."""
        if isinstance(error, EnvironmentFault):
            return f"{error}, after step {self.step}"
        if isinstance(error, FloatingPointError | StaleRecording):
            return f"at step {self.progress.global_step} {error}"
        return machine_fault(error)

    def _how_to_resume(self) -> str:
        if self.saved_step is None:
            return "no checkpoint was saved (--checkpoint-every N saves one every N steps)"
        name = self.args.run_name or self.folder.path.name
        command = arguments.command_line(self.script, self.args, resume=True, run_name=name)
        return f"saved as of step {self.saved_step}; resume with: {command}"

    def _signalled(self, number: int, _: Any) -> None:
        if os.getpid() != self.process:  # one that an environment forked, which just ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        for handled in self.handlers:
            signal.signal(handled, signal.SIG_DFL)
        if self.evaluating:
            raise KeyboardInterrupt
        what = "this rollout and its update" if self.script == "ppo.py" else "this step"
        told = f"\n{self.script}: finishing {what}, then saving; another signal kills\n"
        with contextlib.suppress(OSError):
            os.write(2, told.encode())  # print may not be interrupted by another print

    @property
    def step(self) -> int:
        """global_step of what would be saved now."""
        return self.before["global_step"] if self.before else self.progress.global_step

    def _next_save(self) -> int:
        """The first step after this one at which a checkpoint is due."""
        every = self.args.checkpoint_every
        return (self.step // every + 1) * every if every else 0

    def _state(self) -> dict:
        parts = {name: checkpoints.state_of(part) for name, part in self.parts.items()}
        return {"global_step": self.progress.global_step, "parts": parts}

    def _save(self) -> None:
        """Write a checkpoint unless there is one of this step; if that fails, warn once."""
        step, self.next_save = self.step, self._next_save()
        if step == self.saved_step and not self.noise_changed:
            return
        run = {"args": asdict(self.args), "seconds": self.seconds, "code": self.code}
        content = written_with(self.script, self.device) | run | (self.before or self._state())
        self.tensorboard.flush()  # it must not lag behind the checkpoint
        try:
            checkpoints.save(self.folder.checkpoint, content)
        except (OSError, TypeError) as error:
            if not self.warned_of_saving:
                why = error.strerror if isinstance(error, OSError) else error
                kept = "none" if self.saved_step is None else f"of step {self.saved_step}"
                self.warn(
                    f"no checkpoint of step {step} could be saved: {why}; the last one is {kept}"
                )
            self.warned_of_saving = True
            return
        self.warned_of_saving, self.saved_step = False, step
        self.tensorboard.open(self.saved_step)  # unless it is: the disk may have been full
