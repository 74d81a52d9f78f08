"""A figure's runs as an array of tasks on a real SLURM: none is trained twice, none is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm
import tyro
from helpers import left_behind, saved_step

import sac
from support import arguments

ROOT = Path(sac.__file__).parent
MISSING = slurm.missing()
WHY = f"SLURM is not installed (no {', '.join(MISSING)}); as root: tests/install_system.sh"
FIXED = {"TASKS": "Pendulum-v1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
DONE = ("COMPLETED", "0:0")  # a task's state and exit code
ALIVE = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if MISSING:
        pytest.skip(WHY)
    with slurm.cluster() as environment:
        yield environment


class House:
    """A copy of this project in a folder of its own, whose name has a space; runs are sent there.

    Attributes:
        path: of the copy.
        environment: in which its run.sh is called.
    """

    def __init__(self, path: Path, environment: dict[str, str]):
        self.path, self.environment = path, environment
        for name in ("support", "experiments"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("results"))
        for file in [*ROOT.glob("*.py"), ROOT / "run.sh", ROOT / "requirements.txt"]:
            shutil.copy(file, path)
        python = path / ".venv/bin/python"  # as if it had been set up before
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        stamp = (ROOT / "requirements.txt").read_text() * 2
        (path / ".venv/requirements.txt.stamp").write_text(stamp)

    def ask(self, *command: str | Path) -> str:
        """What a command prints, called from beside the house."""
        options = {"cwd": self.path.parent, "capture_output": True, "text": True}
        done = subprocess.run(command, env=self.environment, timeout=60, check=False, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def lines(self) -> list[list[str]]:
        """Words of the lines that `run.sh fig4 --list` prints."""
        listed = self.ask(self.path / "run.sh", "fig4", "--list")
        return [line.split() for line in listed.splitlines()]

    def folder(self, words: list[str]) -> Path:
        """Of the run that a line trains."""
        args = tyro.cli(sac.Args, args=words[2:])
        return self.path / args.run_dir / arguments.run_name(words[1], args)

    def send(self, array: str) -> str:
        """Send tasks of fig4; the number of the job."""
        output = f"--output={self.path}/%A_%a.out"
        run_sh = f"{self.path.name}/run.sh"  # as seen from beside it
        return self.ask("sbatch", "--parsable", output, f"--array={array}", run_sh, "fig4")

    def output(self, job: str, task: int) -> str:
        file = self.path / f"{job}_{task}.out"
        return file.read_text() if file.exists() else ""

    def shown(self, job: str, task: int, name: str) -> str:
        """What SLURM says of a task: its JobState, ExitCode, Restarts."""
        shown = self.ask("scontrol", "show", "job", f"{job}_{task}")
        return re.search(rf"\b{name}=(\S+)", shown)[1]

    def end(self, job: str, task: int) -> tuple[str, str]:
        """Wait for a task; its state and exit code."""
        self.until(lambda: self.shown(job, task, "JobState") not in ALIVE, job, task)
        return self.shown(job, task, "JobState"), self.shown(job, task, "ExitCode")

    def until(self, condition: Callable[[], bool], job: str, task: int) -> None:
        for _ in range(600):
            if condition():
                return
            time.sleep(0.1)
        queue = self.ask("squeue")
        pytest.fail(f"nothing happened for a minute: {self.output(job, task)}\n{queue}")


@pytest.fixture
def house(cluster, tmp_path) -> Callable[..., House]:
    """Makes a `House` with variables that narrow the list."""
    (tmp_path / "the house").mkdir()

    def house(**variables: str) -> House:
        return House(tmp_path / "the house", cluster | FIXED | variables)

    return house


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_task_trains_its_line_and_the_same_array_again_does_nothing(house):
    house = house(SEEDS="1", STEPS="300")
    count = len(house.lines)
    job = house.send(f"0-{count - 1}")
    for task in range(count):
        assert house.end(job, task) == DONE, house.output(job, task)
    expected = {house.folder(words) for words in house.lines}
    assert len(expected) == count == 4  # PPO, SAC; float64, rounded
    assert {path.parent for path in house.path.glob("runs/*/*/result.json")} == expected
    for words in house.lines:
        folder = house.folder(words)
        result = json.loads((folder / "result.json").read_text())
        assert f"{result['algo']}.py" == words[1]
        assert str(result["args"]["quant_m"]) == (words[-1] if "--quant-m" in words else "None")
        assert result["global_step"] >= 300
        assert len(list(folder.glob("events.*"))) == 1
    before = files(house.path / "runs")
    job = house.send("0,3")  # of each algorithm one
    for task in (0, 3):
        assert house.end(job, task) == DONE, house.output(job, task)
    assert files(house.path / "runs") == before


def test_a_task_that_is_preempted_ends_as_if_it_had_not_been(house):
    house = house(SEEDS="1", STEPS="3000", ALGOS="sac")
    words = house.lines[1]
    folder = house.folder(words)
    options = {"cwd": house.path, "env": house.environment, "stdout": subprocess.DEVNULL}
    never = subprocess.Popen([*words, "--run-dir", "never"], **options)  # the last --run-dir counts
    job = house.send("1")

    def trains(began: int) -> bool:
        """Whether the process of this number has saved more than it found."""
        found = re.findall(r"(?: from step (\d+))? on cpu", house.output(job, 1))
        return len(found) == began and saved_step(folder) > int(found[-1] or 0)

    house.until(lambda: (folder / "checkpoint.pt").exists() and trains(1), job, 1)
    house.ask("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true")
    house.until(lambda: trains(2), job, 1)
    house.ask("scontrol", "requeue", f"{job}_1")
    assert house.end(job, 1) == DONE, house.output(job, 1)
    assert house.shown(job, 1, "Restarts") == "2"
    stops = re.findall(r"SIGTERM, saved as of step (\d+);", house.output(job, 1))
    assert stops == re.findall(r" from step (\d+) on cpu", house.output(job, 1))
    assert 0 < int(stops[0]) < int(stops[1]) < 3000
    assert never.wait() == 0
    assert left_behind(folder) == left_behind(house.path / "never" / folder.name)
    assert list(folder.parent.iterdir()) == [folder]


def test_of_two_tasks_with_one_line_one_trains_and_the_other_says_so(house):
    house = house(SEEDS="1", STEPS="1500", ALGOS="sac")
    jobs = [house.send("0"), house.send("0")]
    ends = {house.end(job, 0)[0]: house.output(job, 0) for job in jobs}
    # Not COMPLETED: what waits for it with --dependency=afterok would not find a whole run.
    assert set(ends) == {"COMPLETED", "FAILED"}, ends
    folder = house.folder(house.lines[0])
    assert re.fullmatch(rf".*: another process is training .*{folder.name}\n", ends["FAILED"])
    assert json.loads((folder / "result.json").read_text())["global_step"] == 1500
    assert list(folder.parent.iterdir()) == [folder] and len(list(folder.glob("events.*"))) == 1


def test_the_arrays_of_the_page_have_a_task_for_each_line():
    page = (ROOT / "docs/cluster.md").read_text()
    found = re.findall(r"(?:SEEDS=(\d) )?sbatch --array=0-(\d+) run\.sh fig4", page)
    assert {seeds for seeds, _ in found} == {"", "1"}
    for seeds, last in found:
        environment = os.environ | {"SEEDS": seeds}
        listed = [ROOT / "run.sh", "fig4", "--list"]
        done = subprocess.run(listed, env=environment, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == int(last) + 1
