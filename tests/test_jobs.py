"""experiments/jobs.py: the queue behind ./run.sh fig4, with real trainings and with stand-ins."""

import argparse
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import curves
import figures
import jobs
import peers
from support import folders

ROOT = Path(__file__).parent.parent
SMALL = "--env Pendulum-v1 --hidden 8 --eval-episodes 0 --checkpoint-every 100"
SAC = f"./run.sh sac.py {SMALL} --batch-size 8 --buffer-size 2000"


def line(folder: Path, seed: int = 1, steps: int = 250, more: str = "") -> str:
    return f"{SAC} --seed {seed} --total-timesteps {steps} --run-dir {folder} {more}".strip()


def queue(lines: list[str], count: int = 1) -> jobs.Queue:
    """A queue that has run all of these lines as far as it could."""
    made = jobs.Queue([jobs.parse(each) for each in lines], count)
    try:
        made.run()
    except SystemExit as stopped:
        made.code = stopped.code
    else:
        made.code = None
    return made


def weights(folder: Path) -> list[bytes]:
    state = torch.load(folder / "weights.pt", weights_only=True)["actor"]
    return [value.numpy().tobytes() for value in state.values()]


def trained(job: jobs.Job) -> int:
    """How many times its command was started."""
    return job.log.read_text().count("$ ") if job.log.exists() else 0


def test_the_folder_of_a_line_is_the_one_that_its_run_makes(tmp_path, capsys):
    done = queue([line(tmp_path, more="--quant-m 2 --tag mine")])
    (job,) = done.jobs
    assert job.finished and done.finished == [job]
    assert folders.trained_steps(job.folder) == 250
    assert {path.name for path in tmp_path.iterdir()} == {job.folder.name, job.log.name}
    assert "trained; 0 evaluation episodes follow" in job.log.read_text()
    assert capsys.readouterr().err.endswith("jobs.py: 1 of 1 done\n")


@pytest.mark.parametrize("m", [None, 1])
def test_the_folder_of_a_peer(tmp_path, m):
    """The queue knows it before it is made, and finds the run finished."""
    flags = (
        f"--lib sb3 --algo ppo --env Pendulum-v1 --seed 3 --total-timesteps 7 --run-dir {tmp_path}"
    )
    flags += "" if m is None else f" --quant-m {m}"
    job = jobs.parse(f"./run.sh experiments/peers.py {flags}")
    assert job.settings["lib"] == "sb3" and job.steps == 7 and not job.finished
    given = {
        "lib": "sb3",
        "algo": "ppo",
        "env": "Pendulum-v1",
        "quant_m": m,
        "hidden": 8,
        "seed": 3,
    }
    peers.main(argparse.Namespace(**given, total_timesteps=7, run_dir=str(tmp_path)))
    assert job.finished
    found = curves.read_run(job.folder)
    assert found.settings["quant_m"] == m and found.end == 2048
    assert figures.method(found.settings) == figures.method(job.settings)


def test_only_the_ppo_of_stable_baselines3_is_rounded(tmp_path, capsys):
    for lib, algo, m in (("sb3", "sac", 1), ("sbx", "ppo", 1), ("sb3", "ppo", -1)):
        given = {"lib": lib, "algo": algo, "env": "Pendulum-v1", "quant_m": m, "hidden": 8}
        with pytest.raises(SystemExit) as stopped:
            peers.main(argparse.Namespace(**given, seed=1, run_dir=str(tmp_path)))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(
            "peers.py: error: --quant-m, at least 0, goes only"
        )
    assert not [*tmp_path.iterdir()]


def test_stable_baselines3_learns_from_what_was_rounded_and_acts_on_the_rest():
    seen = []
    buffer = {"rollout_buffer_class": peers.Rounded, "rollout_buffer_kwargs": {"m": 1}}
    model = PPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, **buffer)
    model.policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    model.learn(64)
    raw = np.concatenate(seen)
    assert len(raw) == 64  # a forward pass for each step
    np.testing.assert_allclose(model.rollout_buffer.observations, np.round(raw, 1), atol=1e-6)
    assert np.abs(raw * 10 - np.round(raw * 10)).max() > 0.1
    model.rollout_buffer.reset()
    model.rollout_buffer.add(np.full((1, 3), -300.07), *np.zeros((3, 1, 1)), *torch.zeros(2, 1))
    assert (model.rollout_buffer.observations[0] == -127).all()


def test_every_line_of_run_sh_is_understood():
    for figure in ("fig2", "fig3", "fig4", "sb3", "table1", "ablate-m", "ablate-storage"):
        command = [ROOT / "run.sh", figure, "--list"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parsed = [jobs.parse(each) for each in text.splitlines()]
        found = [job.folder for job in parsed if job.folder]
        assert len(set(found)) == len(found) == (len(parsed) if "ps" in text else 0)
        assert {job.steps for job in parsed if job.folder} <= {500_000, 1_000_000}


def test_finished_runs_are_skipped_and_longer_ones_go_on(tmp_path):
    lines = [line(tmp_path, seed) for seed in (1, 2)]
    first = queue(lines, count=2)
    again = queue(lines)
    assert [trained(job) for job in again.jobs] == [1, 1] and len(again.finished) == 2
    longer = queue([line(tmp_path, 1, 400)])
    assert folders.trained_steps(longer.jobs[0].folder) == 400
    assert "--resume" in longer.jobs[0].log.read_text()
    queue([line(tmp_path / "at-once", 1, 400)])
    assert weights(first.jobs[0].folder) == weights(
        tmp_path / "at-once" / first.jobs[0].folder.name
    )


def test_a_failed_run_is_told_of_and_stops_nothing_else(tmp_path, monkeypatch, capsys):
    bad = line(tmp_path, seed=1).replace("Pendulum-v1", "Pendulums-v1")
    lines = [bad, line(tmp_path, seed=2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as stopped:
        jobs.main(["--then", sys.executable, "-c", f"open('{tmp_path}/then', 'w')"])
    assert stopped.value.code == 1 and (tmp_path / "then").exists()
    err = capsys.readouterr().err
    assert f"jobs.py: failed: {bad}\n  sac.py: error: unknown --env 'Pendulums-v1'" in err
    assert str(jobs.parse(bad).log) in err and "jobs.py: 1 of 2 done" in err


def test_what_another_process_trains_is_left_to_it(tmp_path, capsys):
    job = jobs.parse(line(tmp_path))
    job.folder.mkdir()
    lock = folders.lock(job.folder)
    done = queue([line(tmp_path), line(tmp_path, seed=2)])
    folders.unlock(lock)
    assert len(done.finished) == 1 and trained(job) == 0
    assert f"another process is training {job.folder}\n" in capsys.readouterr().err
    assert len(queue([line(tmp_path)]).finished) == 1


def test_what_another_machine_has_finished_meanwhile_is_not_trained_again(tmp_path):
    made = jobs.Queue([jobs.parse(line(tmp_path))], 1)
    queue([line(tmp_path)])
    made.run()
    assert len(made.finished) == 1 and trained(made.jobs[0]) == 1


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    job = jobs.parse(line(tmp_path))
    job.folder.mkdir()
    (job.folder / "events.out.tfevents.1.host").write_bytes(b"")
    (job.folder / "checkpoint.pt.part").write_bytes(b"half of it")
    assert len(queue([line(tmp_path)]).finished) == 1
    assert len([*job.folder.glob("events*")]) == 1


def test_what_a_user_keeps_in_a_folder_is_not_touched(tmp_path):
    job = jobs.parse(line(tmp_path))
    job.folder.mkdir()
    (job.folder / "mine.txt").touch()
    done = queue([line(tmp_path)])
    assert done.failed and "exists" in done.failed[0].last_words()
    assert (job.folder / "mine.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_saves_its_runs_and_the_same_command_goes_on(number, tmp_path):
    """Ctrl-C reaches the runs once: a second signal would kill them."""
    rarely = "--checkpoint-every 500"
    lines = [line(tmp_path / "runs", seed, 2000, rarely) for seed in (1, 2)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, ROOT / "experiments/jobs.py", "--jobs", "1"]
    command += ["--then", "touch", tmp_path / "then"]
    process = subprocess.Popen(command, process_group=0, **pipes)
    process.stdin.write("\n".join(lines) + "\n")
    process.stdin.close()
    first, second = (jobs.parse(each) for each in lines)
    while not (first.folder / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    said = process.stderr.read()
    assert process.wait() == 128 + number
    assert "jobs.py: stopped; the same command goes on" in said and "failed" not in said
    assert re.search(r"saved as of step \d+; resume with", first.last_words())
    assert not second.folder.exists() and not (tmp_path / "then").exists()
    done = queue(lines, count=2)
    assert len(done.finished) == 2 and [trained(job) for job in done.jobs] == [2, 1]
    (straight,) = queue([line(tmp_path / "straight", 1, 2000, rarely)]).jobs
    assert weights(first.folder) == weights(straight.folder)


def test_progress_is_read_from_the_logs(tmp_path):
    job = jobs.parse(line(tmp_path, steps=900))
    assert job.advance() == 0
    queue([line(tmp_path, steps=450)])  # two episodes of 200 steps
    assert job.advance() == 400 * job.cost and job.done == 400
    assert job.advance() == 0


def test_one_line_in_place_of_the_program(tmp_path, monkeypatch):
    """As a task of SLURM: the script itself gets the signals, with as many threads as it may."""
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *what: started.append(what))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    job = jobs.parse(line(tmp_path))
    jobs.become(job)
    ((program, words, environment),) = started
    assert program == "./run.sh" and environment["OMP_NUM_THREADS"] == "3"
    assert words == [*shlex.split(job.line), "--run-name", job.folder.name]
    queue([line(tmp_path)])
    jobs.become(job)
    assert len(started) == 1
    jobs.become(jobs.parse(line(tmp_path, steps=300)))
    assert started[1][1][-1] == "--resume"
    lock = folders.lock(job.folder)
    with pytest.raises(SystemExit, match="another process is training"):
        jobs.become(jobs.parse(line(tmp_path, steps=300)))
    folders.unlock(lock)


# --- With a stand-in for run.sh -------------------------------------------------------------------

# run.sh NAME: notes its threads, and does what the script NAME says.
STAND_IN = """#!/bin/bash
echo "begins $OMP_NUM_THREADS" >>notes
source ./"$1"
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A function that writes a script for the stand-in and returns its job."""
    (tmp_path / "run.sh").write_text(STAND_IN)
    (tmp_path / "run.sh").chmod(0o755)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def job(name: str, script: str = "") -> jobs.Job:
        (tmp_path / name).write_text(script)
        return jobs.parse(f"./run.sh {name}")

    return job


def begun(folder: Path) -> list[str]:
    return (folder / "notes").read_text().splitlines()


def main(monkeypatch, lines: list[str], *argv: str) -> int:
    """The exit code of jobs.py."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as end:
        jobs.main(list(argv))
    return end.value.code


class Terminal(io.StringIO):
    """What is written to a terminal of 100 columns."""

    def isatty(self) -> bool:
        return True


def test_two_at_once_share_the_cores(house, tmp_path, monkeypatch):
    """Each of the first two ends only when both have begun, so that one at a time would fail."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    wait = "for _ in {1..400}; do [ -e here-$((3 - $2)) ] && return; sleep 0.05; done; return 1"
    for number in (1, 2):
        house(f"pair{number}", f"set -- x {number}; touch here-{number}; {wait}")
    house("third")
    made = jobs.Queue([jobs.parse(f"./run.sh {name}") for name in ("pair1", "pair2", "third")], 2)
    start, at_once = jobs.Job.start, []

    def start_and_count(job: jobs.Job, threads: int) -> None:
        at_once.append(len(made.running))
        start(job, threads)

    monkeypatch.setattr(jobs.Job, "start", start_and_count)
    made.run()
    assert len(made.finished) == 3
    assert begun(tmp_path) == ["begins 4"] * 3
    assert max(at_once) == 2


def test_what_two_queues_start_at_once_has_not_failed(house, monkeypatch, tmp_path, capsys):
    """The child of one finds the folder locked, as the other one was quicker."""
    found = {name: house(name, f"echo {name} said no; return 2") for name in ("a", "b", "c")}
    for name, job in found.items():
        job.folder = tmp_path / "runs" / name
        job.folder.mkdir(parents=True)
    result = f"echo '{{\"global_step\": 1}}' >{found['a'].folder}/result.json; return 2"
    (tmp_path / "a").write_text(result)  # finished by another one meanwhile
    locks = []
    start = jobs.Job.start

    def start_and_be_late(job: jobs.Job, threads: int) -> None:
        start(job, threads)
        if job is found["b"]:
            locks.append(folders.lock(job.folder))

    monkeypatch.setattr(jobs.Job, "start", start_and_be_late)
    made = jobs.Queue(list(found.values()), 1)
    made.run()
    folders.unlock(*locks)
    assert [made.finished, made.elsewhere, made.failed] == [[job] for job in found.values()]
    assert found["c"].reason.startswith("c said no; see ")
    assert not found["a"].trained_elsewhere()
    found["a"].log.write_text("sac.py: error: another process is training it\n")
    assert found["a"].trained_elsewhere()  # what it met, though that has ended by now


def test_the_exit_code_is_0_only_if_all_are_finished(house, tmp_path, monkeypatch):
    for name, script in (("good", ""), ("bad", "return 7")):
        house(name, script)
    good, bad = "./run.sh good", "./run.sh bad"
    assert main(monkeypatch, [good]) == 0
    assert main(monkeypatch, [good, bad], "--then", "touch", "drawn") == 1
    assert (tmp_path / "drawn").exists()
    assert main(monkeypatch, [good], "--then", "false") == 1
    job = jobs.parse(line(tmp_path / "runs"))
    job.folder.mkdir(parents=True)
    lock = folders.lock(job.folder)
    assert main(monkeypatch, [job.line]) == 1
    folders.unlock(lock)


def test_a_line_that_stands_there_twice_is_run_once(house, tmp_path, monkeypatch, capsys):
    house("once")
    assert main(monkeypatch, ["./run.sh once", " ./run.sh once "]) == 0
    assert len(begun(tmp_path)) == 1 and "1 of 1 done" in capsys.readouterr().err


def test_one_that_cannot_start_is_failed_and_the_others_run(house, tmp_path, monkeypatch, capsys):
    house("no-log"), house("good"), house("no-process")
    jobs.parse("./run.sh no-log").log.mkdir(parents=True)
    popen = subprocess.Popen

    def start(words: list[str], **options) -> subprocess.Popen:
        if "no-process" in words:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(words, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    closed = jobs.parse(line(tmp_path / "runs"))
    (closed.folder / folders.LOCK).mkdir(parents=True)  # cannot be opened for writing
    lines = ["./run.sh no-log", "./run.sh no-process", closed.line, "./run.sh good"]
    assert main(monkeypatch, lines, "--jobs", "1") == 1
    err = capsys.readouterr().err
    assert "failed: ./run.sh no-log\n  [Errno 21] Is a directory" in err
    assert "failed: ./run.sh no-process\n  [Errno 11] Resource temporarily unavailable" in err
    assert f"\n  cannot train in {closed.folder}" in err and "1 of 4 done" in err


def test_an_error_of_the_queue_leaves_nothing_running(house, monkeypatch):
    made = jobs.Queue([job := house("long", "exec sleep 20")], 1)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jobs.Job, "advance", lambda job: 1 / 0 if job.process else 0)
    with pytest.raises(ZeroDivisionError):
        made.run()
    assert job.process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_one_starts_reaches_it_once(house, monkeypatch):
    made = jobs.Queue([job := house("long", "exec sleep 20")], 1)
    told, popen = [], subprocess.Popen

    def start(*words, **options) -> subprocess.Popen:
        process = popen(*words, **options)
        process.terminate = lambda: told.append(1) or process.kill()
        signal.raise_signal(signal.SIGTERM)  # before the queue has the process
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(SystemExit) as end:
        made.run()
    assert end.value.code == 143 and told == [1] and job.process.returncode == -signal.SIGKILL
    assert not made.failed


def test_without_a_terminal_each_run_that_ends_is_a_line(house, capsys):
    made = jobs.Queue([house("good"), house("bad", "return 1")], 1)
    made.began -= 12 * 60
    made.run()
    assert capsys.readouterr().err.splitlines()[:2] == [
        "jobs.py: 1 of 2 done, 12 min: ./run.sh good",
        "jobs.py: 1 of 2 done, 12 min: failed: ./run.sh bad",
    ]


def test_the_bar_moves_and_ends_with_all_done(house, tmp_path, monkeypatch):
    """For what it trains, for what fails, and for what another machine has finished meanwhile."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    other = house("other")
    other.folder, other.steps = tmp_path / "runs/other", 5
    result = f"mkdir -p {other.folder}; echo '{{\"global_step\": 5}}' >{other.folder}/result.json"
    made = jobs.Queue([house("one", result), other, house("bad", "return 1"), house("last")], 1)
    made.run()
    shown = re.findall(r"(\d+)% \|.*?\| (\d) of 4 done", sys.stderr.getvalue())
    assert shown[0] == ("0", "0") and shown[-1] == ("100", "3")
    assert made.finished == [made.jobs[0], other, made.jobs[3]] and not other.process
    assert [int(percent) for percent, _ in shown] == sorted(int(percent) for percent, _ in shown)


@pytest.mark.parametrize(
    ("text", "argv", "why"),
    [
        ("python sac.py", [], "begins with ./run.sh"),
        ("./run.sh", [], "begins with ./run.sh"),
        ("./run.sh experiments/peers.py --lib sb3", [], "lacks --algo"),
        ("", ["--jobs", "0"], "--jobs 0 must be at least 1"),
        ("", ["--jobs", "x"], "invalid int"),
        ("", ["--exec"], "--exec runs exactly one line, not 0"),
        ("./run.sh a.py\n./run.sh b.py", ["--exec"], "--exec runs exactly one line, not 2"),
    ],
)
def test_bad_input_is_one_line(text, argv, why, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    with pytest.raises(SystemExit) as stopped:
        jobs.main(argv)
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("jobs.py: error: ") and why in said
