"""Runs the command lines that stand on its input, several at a time, and goes on where it stopped.

    ./run.sh fig4 --list | python experiments/jobs.py --jobs 2 --then ./run.sh fig4 --draw

A training that has finished is skipped, one that has a checkpoint is resumed. One that fails is
told of at the end, and keeps neither the others nor --then from running. Ctrl-C and SIGTERM let the
running ones save themselves; the same command goes on with them. Several machines may work on one
list in a shared folder: what another one trains is left to it. What a run prints is in the .log
beside its folder. The exit code is 0 only if all are finished.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo
import sac
from curves import Parser
from support import arguments, folders

SCRIPTS = {"sac.py": sac.Args, "ppo.py": ppo.Args}
PEERS = "experiments/peers.py"
POLL = 0.2  # seconds between two looks at what runs
# Time of a step, and of a command that trains nothing, in that of a step of PPO. Rough: they only
# serve to tell the time left.
COSTS = {"sac.py": 8, "ppo.py": 1, PEERS: 10}
COMMAND = 10**6  # some minutes, as Table I


@dataclass(eq=False)
class Job:
    """A command line, and the run that it trains.

    Attributes:
        line: as it was given.
        folder: of its run; None of a command that trains none.
        settings: of its run, as its log will have them.
        steps: that the run is to be trained for.
        cost: of a step, in any unit.
        done: steps so far.
        process: once it was started.
        told: how many signals were passed on to it.
        reason: why it failed.
    """

    line: str
    folder: Path | None = None
    settings: dict = field(default_factory=dict)
    steps: int = 1
    cost: int = COMMAND
    done: int = 0
    process: subprocess.Popen | None = None
    told: int = 0
    reason: str = ""
    logs: dict[Path, EventFileLoader] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where its output goes."""
        name = self.folder or Path("runs", re.sub(r"\W+", "-", self.line).strip("-")[:200])
        return name.with_name(f"{name.name}.log")

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to the end; a command that trains none always runs."""
        return self.folder is not None and folders.trained_steps(self.folder) >= self.steps

    @property
    def words(self) -> list[str]:
        """The command that is to be run now."""
        words = shlex.split(self.line)
        if self.folder and words[1] in SCRIPTS:
            words += ["--run-name", self.folder.name]  # never a second folder for one run
            words += ["--resume"] if (self.folder / "checkpoint.pt").exists() else []
        return words

    def clear(self) -> None:
        """Empty its folder if it was killed before its first checkpoint.

        Raises:
            folders.InUse: another process is training it.
            ValueError, OSError: the folder cannot be written to.
        """
        if self.folder is None or not self.folder.exists():
            return
        lock = folders.lock(self.folder)
        try:
            if any((self.folder / name).exists() for name in ("checkpoint.pt", "result.json")):
                return
            for left in ("events.out.tfevents.*", "*.part"):
                for file in self.folder.glob(left):
                    file.unlink()
        finally:
            folders.unlock(lock)

    def start(self, threads: int) -> None:
        """Run the command in the background. Raises OSError, and what `clear` does."""
        self.clear()
        words = self.words
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            self.process = subprocess.Popen(
                words,
                env=environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches it once, through this program
            )

    def advance(self) -> int:
        """Read on in the log of the run; how much further it is, in the unit of `cost`."""
        before = self.done
        for file in self.folder.glob("events.out.tfevents.*") if self.folder else ():
            loader = self.logs.setdefault(file, EventFileLoader(str(file)))
            for event in loader.Load():
                self.done = max(self.done, min(event.step, self.steps))
        return (self.done - before) * self.cost

    def pass_on(self, signals: int) -> None:
        """See to it that the process has been told of so many signals, of each once."""
        while self.process and self.told < signals:
            self.told += 1
            self.process.terminate()

    def last_words(self) -> str:
        """The last line that it printed."""
        try:
            lines = self.log.read_text(errors="replace").split("\n")
        except OSError as error:
            return str(error)
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def trained_elsewhere(self) -> bool:
        """Whether another process trains its run, or did when this one began and so gave up."""
        if self.folder is None or not self.folder.exists():
            return False
        if "another process is training" in self.last_words():
            return True
        try:
            folders.unlock(folders.lock(self.folder))
        except ValueError as error:
            return isinstance(error, folders.InUse)
        return False


def environment(threads: int) -> dict[str, str]:
    """Variables of a process that is to take so many threads, and to print lines as they come."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONUNBUFFERED": "1"}


def parse(line: str) -> Job:
    """What a command line trains. Raises ValueError if it is none of run.sh."""
    words = shlex.split(line)
    if len(words) < 2 or words[0] != "./run.sh":
        raise ValueError(f"{line!r} is no command line that begins with ./run.sh")
    script = words[1]
    if script in SCRIPTS:
        args = tyro.cli(SCRIPTS[script], args=words[2:])
        name = args.run_name or arguments.run_name(script, args)
        settings = {"algo": script.removesuffix(".py"), "lib": "ours"} | asdict(args)
        folder = Path(args.run_dir, name)
        return Job(line, folder, settings, args.total_timesteps, COSTS[script])
    if script == PEERS:
        given = zip(words[2::2], words[3::2], strict=True)
        settings = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given}
        for name in ("lib", "algo", "env", "seed", "total_timesteps", "run_dir"):
            if name not in settings:
                raise ValueError(f"{line!r} lacks {arguments.flag(name)}")
        m = f"__quant-m-{settings['quant_m']}" if "quant_m" in settings else ""
        name = f"{{env}}__{{lib}}-{{algo}}{m}__seed{{seed}}".format(**settings)
        steps = int(settings["total_timesteps"])
        return Job(line, Path(settings["run_dir"], name), settings, steps, COSTS[PEERS])
    return Job(line)


class Queue:
    """Runs what is not finished of a list of jobs, `count` at a time."""

    def __init__(self, jobs: list[Job], count: int):
        self.jobs, self.count = jobs, count
        self.threads = max(1, len(os.sched_getaffinity(0)) // count)
        self.finished = [job for job in jobs if job.finished]
        self.waiting = [job for job in jobs if job not in self.finished]
        self.running: list[Job] = []
        self.failed: list[Job] = []
        self.elsewhere: list[Job] = []  # trained by another process
        self.signals: list[int] = []
        self.began = time.monotonic()

    @property
    def count_done(self) -> str:
        return f"{len(self.finished)} of {len(self.jobs)} done"

    def run(self) -> None:
        """Run, and tell how it went.

        Raises:
            SystemExit: 130 or 143 after Ctrl-C or SIGTERM.
        """
        before = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}
        total = sum(job.steps * job.cost for job in self.waiting)
        already = sum(job.advance() for job in self.waiting)
        form = "{percentage:3.0f}% |{bar}| {desc}{elapsed} so far, {remaining} left"
        look = {"smoothing": 0, "bar_format": form, "dynamic_ncols": True, "disable": None}
        try:
            with tqdm(total=total, initial=already, **look) as bar:
                while self.running or (self.waiting and not self.signals):
                    self.fill(bar)
                    bar.set_description_str(f"{self.count_done}, ")
                    time.sleep(POLL)
                    for job in list(self.running):
                        bar.update(job.advance())
                        if job.process.poll() is not None:
                            self.reap(job, bar)
                bar.set_description_str(f"{self.count_done}, ")
        finally:
            left = [job for job in self.running if job.process]  # after an error here
            for job in left:
                job.pass_on(max(1, len(self.signals)))
            for job in left:
                job.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        self.report()

    def fill(self, bar: tqdm) -> None:
        """Start the next ones, as many as may run."""
        while self.waiting and not self.signals and len(self.running) < self.count:
            job = self.waiting.pop(0)
            self.running.append(job)  # before it starts: a signal may come while it does
            try:
                if job.finished:  # by now: by another machine
                    self.end(job, self.finished, bar)
                else:
                    job.start(self.threads)
            except folders.InUse:
                self.end(job, self.elsewhere, bar)
            except (OSError, ValueError) as error:
                job.reason = str(error)
                self.end(job, self.failed, bar)
            job.pass_on(len(self.signals))

    def stop(self, number: int, _: object) -> None:
        """Pass a signal on: the running ones save themselves."""
        self.signals.append(number)
        for job in self.running:
            job.pass_on(len(self.signals))

    def reap(self, job: Job, bar: tqdm) -> None:
        """Count a process that has ended. Of two queues that start one run, one sees it refused."""
        if job.process.returncode == 0 or job.finished:
            self.end(job, self.finished, bar)
        elif self.signals:  # it has saved itself
            self.running.remove(job)
        elif job.trained_elsewhere():
            self.end(job, self.elsewhere, bar)
        else:
            job.reason = f"{job.last_words()}; see {job.log}"
            self.end(job, self.failed, bar)

    def end(self, job: Job, among: list[Job], bar: tqdm) -> None:
        """Count a job among the finished ones, the failed ones or those trained elsewhere."""
        self.running.remove(job)
        among.append(job)
        rest = (job.steps - job.done) * job.cost
        if among is self.finished:
            bar.update(rest)
        else:
            bar.total -= rest  # it takes no more time
        if among is self.failed or (among is self.finished and bar.disable):  # no terminal
            minutes = (time.monotonic() - self.began) / 60
            told = "failed: " if among is self.failed else ""
            line = f"jobs.py: {self.count_done}, {minutes:.0f} min: {told}{job.line}"
            bar.write(line, file=sys.stderr)

    def report(self) -> None:
        lines = [f"another process is training {job.folder}" for job in self.elsewhere]
        lines += [f"failed: {job.line}\n  {job.reason}" for job in self.failed]
        lines.append(self.count_done)
        if self.signals:
            lines.append("stopped; the same command goes on")
        for line in lines:
            print(f"jobs.py: {line}", file=sys.stderr)
        if self.signals:
            raise SystemExit(128 + self.signals[0])


def become(job: Job) -> None:
    """Run a command in place of this program: signals reach it, and its exit code counts."""
    if job.finished:
        print(f"jobs.py: {job.folder} is finished", file=sys.stderr)
        return
    try:
        job.clear()
    except (OSError, ValueError) as error:
        raise SystemExit(f"jobs.py: {error}") from None
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    words = job.words
    os.execvpe(words[0], words, environment(threads))


def main(argv: list[str] | None = None) -> None:
    """SystemExit: 2 after bad input, 1 if a run is not finished, 130 or 143 after a signal."""
    parser = Parser(prog="jobs.py", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    parser.add_argument("--exec", action="store_true", help="run one line, as a task of SLURM does")
    parser.add_argument("--then", nargs=argparse.REMAINDER, help="command to run afterwards")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    try:
        lines = dict.fromkeys(map(str.strip, sys.stdin))  # one that stands there twice is one run
        jobs = [parse(line) for line in lines if line]
    except ValueError as error:
        parser.error(str(error))
    if args.exec and len(jobs) != 1:
        parser.error(f"--exec runs exactly one line, not {len(jobs)}")
    os.chdir(ROOT)  # which is what the lines mean by ./run.sh
    if args.exec:
        become(*jobs)
    else:
        queue = Queue(jobs, args.jobs)
        queue.run()
        drawn = subprocess.run(args.then, check=False).returncode if args.then else 0
        sys.exit(drawn or int(len(queue.finished) < len(jobs)))


if __name__ == "__main__":
    main()
