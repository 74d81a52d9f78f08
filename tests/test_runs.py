"""support/runs.py and folders.py: which run is resumed, what is refused, what is saved and logged.

The script that is run here is toy.py; sac.py and ppo.py follow in test_resume.py and test_kill.py.
"""

import errno
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoints import same, signed

from support import checkpoints, folders, runs
from support.envs import EnvironmentFault
from support.recording import StaleRecording

STEPS = 64  # at which the checkpoint was saved


def make_args(folder: Path, **changes) -> toy.Args:
    named = {"run_dir": str(folder), "run_name": "run", "resume": True, "num_envs": 2}
    return toy.Args(**{"total_timesteps": STEPS + 4, **named, **changes})


def train(folder: Path, *, inside=lambda run: None, more=None, without=(), **changes) -> dict:
    return toy.train(make_args(folder, **changes), inside, more, without)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    """The checkpoint of an unfinished run."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, total_timesteps=STEPS, resume=False, checkpoint_every=STEPS)
    return (folder / "run" / "checkpoint.pt").read_bytes()


def plant(folder: Path, file: bytes) -> Path:
    """A run's folder that holds a checkpoint and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint.pt").write_bytes(file)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """But for the one that is locked."""
    files = [path for path in folder.iterdir() if path.name != folders.LOCK]
    return {path.name: path.read_bytes() for path in files}


def find(args) -> folders.Folder:
    """`find_folder`, with the lock released again."""
    folder = folders.find_folder("toy.py", args, toy.CPU)
    folders.unlock(folder.lock)
    return folder


def refusal(args) -> str:
    with pytest.raises(ValueError) as error:
        find(args)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


def assert_unlocked(folder: Path) -> None:
    folders.unlock(folders.lock(folder))


def refused(capfd, folder: Path, **changes) -> str:
    """Why `train` refuses to resume: the one line on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        train(folder, **changes)
    out, err = capfd.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1, err
    assert_unlocked(folder / "run")
    start = f"toy.py: error: --resume: {folder / 'run' / 'checkpoint.pt'} cannot be used: "
    assert err.startswith(start), err
    return err.removeprefix(start).rstrip("\n")


# --- Checkpoints that cannot be used --------------------------------------------------------------


def damage(rng: random.Random, data: bytes) -> bytes:
    """One of eight accidents."""
    n, size = len(data), rng.choice((1, 16, 512, 4096))
    a, b, kind = rng.randrange(n), rng.randrange(n), rng.randrange(8)
    flipped = bytes([data[a] ^ 1 << rng.randrange(8)])
    return [
        data[:a] + flipped + data[a + 1 :],
        data[:a],
        data[:a] + data[a + size :],
        data[:b] + data[a : a + size] + data[b:],
        data[:a] + bytes(size) + data[a + size :],
        data + rng.randbytes(size),
        data + data,
        rng.randbytes(size),
    ][kind]


def test_300_random_corruptions_are_refused_and_change_nothing(saved, tmp_path):
    rng, args, count = random.Random(0), make_args(tmp_path), 0
    folder = plant(tmp_path / "run", saved)
    assert find(args).saved["global_step"] == STEPS
    while count < 300:
        damaged = damage(rng, saved)
        if damaged == saved:  # zeros that were zeroed
            continue
        count += 1
        (folder / "checkpoint.pt").write_bytes(damaged)
        assert f"{folder / 'checkpoint.pt'} cannot be used: it " in refusal(args)
        assert files_in(folder) == {"checkpoint.pt": damaged}
        assert_unlocked(folder)


def forge(file: bytes, change) -> bytes:
    """A checkpoint that was changed by `change`, with the SHA-256 that it then has."""
    content = torch.load(io.BytesIO(file), weights_only=True)
    content = change(content) or content
    forged = io.BytesIO()
    torch.save(content, forged)
    return signed(forged.getvalue())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [c],
        lambda c: c.pop("format") and None,
        lambda c: c.pop("parts") and None,
        lambda c: c.update(args=3),
        lambda c: c["parts"]["progress"].pop("global_step") and None,
        lambda c: c["parts"]["progress"].update(finished="x"),
        lambda c: c["parts"].update(noise_rng=1.5),
        lambda c: c["parts"].update(average=[1, 2]),
    ],
)
def test_what_only_a_forger_would_do_is_one_generic_line(change, saved, tmp_path, capfd):
    plant(tmp_path / "run", forge(saved, change))
    assert refused(capfd, tmp_path) == checkpoints.NOT_OURS


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(saved, tmp_path, capfd):
    plant(tmp_path / "run", saved)
    said = "it was trained with other arguments: "
    assert refused(capfd, tmp_path, seed=2) == f"{said}--seed was 1 there and is 2 here"
    assert refused(capfd, tmp_path, num_envs=1, sharpness=2.0) == (
        f"{said}--num-envs was 2 there and is 1 here, --sharpness was 3.0 there and is 2.0 here"
    )
    for key, then in {"script": "sac.py", "device": "cuda", "format": 1, "torch": "2.0"}.items():
        plant(tmp_path / "run", forge(saved, lambda c: c.update({key: then})))  # noqa: B023
        now = {"script": "toy.py", "device": "cpu", "format": 3, "torch": torch.__version__}[key]
        assert refused(capfd, tmp_path) == f"it was written with {key} {then}, this is {key} {now}"


@pytest.mark.parametrize("library", ["torch", "gymnasium", "mujoco", "numpy"])
def test_the_version_of_every_library_is_compared(library, saved, tmp_path, monkeypatch):
    plant(tmp_path / "run", saved)
    then = folders.VERSIONS[library]
    monkeypatch.setitem(folders.VERSIONS, library, "99.9")
    expected = f"it was written with {library} {then}, this is {library} 99.9"
    assert refusal(make_args(tmp_path)).endswith(expected)


def test_missing_and_further_parts_are_refused_by_name(saved, tmp_path, capfd):
    plant(tmp_path / "run", saved)
    before = files_in(tmp_path / "run")
    more = {"more": {"target": torch.zeros(3)}}
    assert refused(capfd, tmp_path, **more) == "it has no 'target' among its parts, unlike this run"
    without = {"without": ["action_rng"]}
    assert (
        refused(capfd, tmp_path, **without)
        == "it has 'action_rng' among its parts, unlike this run"
    )
    assert files_in(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("network", torch.nn.Linear(3, 2), "size mismatch for weight"),
        (
            "network",
            torch.nn.Sequential(torch.nn.Linear(3, 1)),
            'Missing key(s) in state_dict: "0.',
        ),
        ("temperature", torch.zeros(2), "its shape is () there, (2,) here"),
        ("optimizer", torch.optim.Adam([torch.zeros(1)], 0.1), "doesn't match the size"),
        ("noise_rng", torch.zeros(7), "its shape is (5056,) there, (7,) here"),
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_named(name, part, said, saved, tmp_path, capfd):
    plant(tmp_path / "run", saved)
    line = refused(capfd, tmp_path, more={name: part})
    assert line.startswith(f"its {name} does not fit: ") and said in line


def test_what_may_differ_may_differ_and_folders_may_move(saved, tmp_path):
    plant(tmp_path / "elsewhere" / "renamed", saved)
    changes = {"total_timesteps": STEPS + 40, "checkpoint_every": 16, "device": "auto"}
    result = train(tmp_path / "elsewhere", run_name="renamed", **changes)["result"]
    assert result["global_step"] == STEPS + 40


# --- The run's folder -----------------------------------------------------------------------------


class Runs:
    """Runs of the same arguments in a folder, each with a checkpoint or a result as is told."""

    def __init__(self, folder: Path, file: bytes):
        self.folder, self.file, self.clock = folder, file, itertools.count()
        self.base = find(make_args(folder, run_name=None, resume=False)).path.name
        shutil.rmtree(folder / self.base)

    def add(self, suffix: str, result: str | None = None, file: bytes | None = None) -> None:
        """The newest so far."""
        folder = plant(self.folder / (self.base + suffix), file or self.file)
        now = 1e9 + next(self.clock)
        os.utime(folder / "checkpoint.pt", (now, now))
        if result is not None:
            (folder / "result.json").write_text(result)

    def args(self, **changes) -> toy.Args:
        return make_args(self.folder, **{"run_name": None, **changes})

    def taken(self, **changes) -> str:
        """The suffix of the run that --resume takes."""
        return find(self.args(**changes)).path.name.removeprefix(self.base)

    def refused(self, **changes) -> str:
        return refusal(self.args(**changes))


@pytest.fixture
def some(saved, tmp_path):
    return Runs(tmp_path, saved)


def test_new_runs_get_the_next_free_number_and_are_locked(some):
    args = some.args(resume=False)
    found = [folders.find_folder("toy.py", args, toy.CPU) for _ in range(3)]
    assert [f.path.name for f in found] == [some.base, f"{some.base}-2", f"{some.base}-3"]
    for folder in found:
        assert folder.saved is None and str(folder) == str(folder.path)
        with pytest.raises(ValueError, match=f"another process is training {folder.path}"):
            folders.lock(folder.path)
        folders.unlock(folder.lock)
        assert_unlocked(folder.path)


def test_the_lock_is_one_that_nfs_has(some, monkeypatch, capfd):
    """None of a folder, and of a file only if it is open for writing."""
    flock = fcntl.flock

    def flock_of_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    folder = folders.find_folder("toy.py", some.args(resume=False), toy.CPU)
    with pytest.raises(ValueError, match=f"another process is training {folder.path}"):
        folders.lock(folder.path)
    folders.unlock(folder.lock)
    assert capfd.readouterr() == ("", "")


def test_a_file_system_without_locks_is_told_of(some, monkeypatch, capfd):
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    path = find(some.args(resume=False)).path
    assert capfd.readouterr().err == (
        f"warning: nothing keeps a second process from training {path}, as its file system has "
        "no locks: No locks available\n"
    )


def test_a_folder_that_cannot_be_written_to_is_refused(some, monkeypatch):
    some.add("")
    (some.folder / some.base / folders.LOCK).mkdir()  # root may write everywhere else
    path = some.folder / some.base
    assert some.refused() == f"--resume: cannot train in {path}: Is a directory"


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(some):
    folder = folders.find_folder("toy.py", some.args(resume=False), toy.CPU)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    try:
        time.sleep(1)  # it lets go as soon as it runs
        folders.unlock(folder.lock)  # as at the end of the parent
        assert_unlocked(folder.path)
    finally:
        child.kill()
        child.join()


def test_a_child_that_an_environment_forks_can_be_ended(tmp_path):
    children = []

    def inside(run):
        if not children:
            fork = multiprocessing.get_context("fork")
            children.append(fork.Process(target=time.sleep, args=(60,), daemon=True))
            children[0].start()
            time.sleep(1)
            children[0].terminate()
            children[0].join(10)

    train(tmp_path, resume=False, inside=inside)
    assert children[0].exitcode == -signal.SIGTERM


def test_the_loser_of_two_runs_with_one_name_is_told_so(some, monkeypatch):
    (some.folder / "mine").mkdir()  # by the winner, a moment ago
    lock = folders.lock(some.folder / "mine")
    told = f"another process is training {some.folder / 'mine'}"
    assert some.refused(run_name="mine", resume=False) == told
    plant(some.folder / "mine", some.file)  # which has begun by now
    assert some.refused(run_name="mine", resume=False) == told
    folders.unlock(lock)


def test_a_link_to_nothing_is_named(some):
    for link in ("runs", "a/b"):
        (some.folder / link).parent.mkdir(exist_ok=True)
        (some.folder / link).symlink_to("nowhere")
        for run_name in (None, "mine"):
            changes = {"run_dir": str(some.folder / link), "run_name": run_name}
            told = some.refused(resume=False, **changes)
            assert told.startswith("cannot create ") and told.endswith("is a link to nothing")
            assert str(some.folder / link) in told


def test_the_unfinished_run_that_was_saved_last_is_taken(some):
    for suffix in ("-2", "", "-10", "-3"):
        some.add(suffix)
        assert some.taken() == suffix
    os.utime(some.folder / some.base / "checkpoint.pt")
    assert some.taken() == ""
    assert str(find(some.args())) == f"{some.folder / some.base} from step {STEPS}"


def test_finished_runs_are_skipped_until_more_steps_are_asked_for(some):
    done = f'{{"global_step": {STEPS + 4}}}'
    some.add("")
    some.add("-2", done)
    some.add("-3", done)
    assert some.taken() == ""
    assert some.taken(total_timesteps=STEPS + 5) == "-3"
    (some.folder / some.base / "result.json").write_text(done)
    message = f"-3 is finished; --total-timesteps beyond {STEPS + 4} trains it further"
    assert message in some.refused()


NO_RESULTS = [
    "",
    "{",
    "[]",
    "{}",
    "3",
    '{"global_step": null}',
    "\x00",
    "[" * 200_000,
    '{"global_step": 1e999}',
]


@pytest.mark.parametrize("result", NO_RESULTS, ids=lambda text: text[:9])
def test_a_result_that_is_none_does_not_make_a_run_finished(some, result):
    some.add("", result)
    assert some.taken() == ""


def test_names_that_only_look_alike_are_other_runs(some):
    some.add("")
    for suffix in ("1", "1-2", "-2-3", "-x", "-", "-2x", ".old", " ", "\n"):
        some.add(suffix)
    for name in (f"x{some.base}", some.base.upper(), some.base[:-1]):
        plant(some.folder / name, some.file)
    (some.folder / f"{some.base}-4").write_text("a file")
    (some.folder / f"{some.base}-5").mkdir()
    (some.folder / f"{some.base}-6" / "checkpoint.pt").mkdir(parents=True)
    (some.folder / f"{some.base}-7").symlink_to("nowhere")
    assert some.taken() == ""
    assert some.refused(seed=2).endswith("or its --run-name")


def test_no_run_at_all_is_one_line(some):
    message = f"--resume: {some.folder} holds no checkpoint of a run with these arguments"
    assert some.refused().startswith(message)
    absent = some.refused(run_dir=str(some.folder / "absent"))
    assert f"{some.folder / 'absent'} holds no checkpoint" in absent
    assert not list(some.folder.iterdir())


def test_an_explicit_name_is_taken_and_no_other(some):
    some.add("")
    plant(some.folder / "mine", some.file)
    assert some.taken(run_name="mine") == "mine"
    assert "there is no folder" in some.refused(run_name="yours")
    (some.folder / "empty").mkdir()
    assert "empty has no checkpoint to go on from" in some.refused(run_name="empty")
    (some.folder / "mine" / "result.json").write_text(f'{{"global_step": {STEPS + 4}}}')
    assert "mine is finished" in some.refused(run_name="mine")
    assert some.taken() == ""


def test_an_existing_name_is_refused_without_resume_unless_it_is_empty(some):
    plant(some.folder / "mine", some.file)
    again = {"run_name": "mine", "resume": False}
    assert "exists; add --resume to go on with it, or" in some.refused(**again)
    (some.folder / "mine" / "checkpoint.pt").rename(some.folder / "mine" / "log")
    assert some.refused(**again).endswith("exists; choose another --run-name")
    (some.folder / "mine" / "log").unlink()
    (some.folder / "mine" / folders.LOCK).touch()  # as of a run that was stopped before it began
    assert find(some.args(**again)).path == some.folder / "mine"


def test_a_run_in_training_is_left_alone(some):
    some.add("")
    some.add("-2")
    lock = folders.lock(some.folder / f"{some.base}-2")
    assert "another process is training" in some.refused()  # rather than an older one taken
    assert "another process is training" in some.refused(run_name=f"{some.base}-2")
    folders.unlock(lock)
    assert some.taken() == "-2"


def test_a_damaged_checkpoint_is_refused_rather_than_an_older_run_taken(some):
    some.add("")
    some.add("-2", file=some.file[:-1])
    assert f"{some.base}-2/checkpoint.pt cannot be used: it is damaged" in some.refused()
    assert_unlocked(some.folder / f"{some.base}-2")


# --- What a run saves -----------------------------------------------------------------------------


def final_parts(folder: Path) -> dict:
    return checkpoints.load(folder / "run" / "checkpoint.pt")["parts"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_kind_of_part_is_saved_and_restored_bit_for_bit(tmp_path):
    """Among them a scheduler, a torch and a numpy generator, and a class of one's own."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, total_timesteps=500, resume=False, checkpoint_every=500)
    for stop in (2, 250, 251, 500):
        train(halves, total_timesteps=stop, resume=stop > 2, checkpoint_every=100)
        torch.manual_seed(0)  # a new process would begin with another state, too
    parts = final_parts(whole)
    assert same(final_parts(halves), parts)
    assert parts["average"]["count"] == 250 and len(parts["progress"]["finished"]) == 4
    assert scalars(halves) == scalars(whole)
    weights = [torch.load(f / "run" / "weights.pt", weights_only=True) for f in (whole, halves)]
    assert list(weights[0]) == ["network"] and list(weights[0]["network"]) == ["weight", "bias"]
    assert all(torch.equal(weights[0]["network"][k], weights[1]["network"][k]) for k in ("weight",))
    assert torch.equal(weights[0]["network"]["bias"], parts["network"]["bias"])


class Unsavable:
    def state_dict(self):
        return {"x": [np.zeros(3)]}


def test_a_part_that_cannot_be_saved_is_told_before_training(tmp_path):
    with pytest.raises(TypeError, match=r"^it\['parts'\]\['mine'\]\['x'\]\[0\] is a ndarray"):
        train(tmp_path, resume=False, more={"mine": Unsavable()})


def test_a_checkpoint_is_saved_at_every_multiple_that_is_passed(tmp_path, monkeypatch):
    save, steps = checkpoints.save, []
    spy = lambda path, content: (save(path, content), steps.append(content["global_step"]))  # noqa: E731
    monkeypatch.setattr(checkpoints, "save", spy)
    train(tmp_path, resume=False, checkpoint_every=25, total_timesteps=110)
    assert steps == [0, 26, 50, 76, 100, 110]
    train(tmp_path, checkpoint_every=50, total_timesteps=160)
    assert steps[6:] == [150, 160]
    train(tmp_path, checkpoint_every=0, total_timesteps=170)  # what has one keeps it up to date
    assert steps[8:] == [170]


@pytest.mark.parametrize("copies", [False, True])
def test_a_fault_saves_what_was_before_the_rollout_if_that_was_copied(copies, tmp_path):
    def fall(run):
        if run.progress.global_step == 20 and copies:
            run.snapshot()
            run.goes_on = lambda: True  # until the rollout is over
        if run.progress.global_step == 26:
            raise EnvironmentFault("fell")

    good = 20 if copies else 26
    with pytest.raises(SystemExit, match=f"fell, after step {good}; saved as of step"):
        train(tmp_path, resume=False, inside=fall)
    content = checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    assert content["global_step"] == content["parts"]["progress"]["global_step"] == good
    assert content["parts"]["average"]["count"] == good / 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("the loss is nan"), "at step 26 the loss is nan"),
        (StaleRecording("critic_loss gives other"), "at step 26 critic_loss gives other"),
        (MemoryError("no 8 GB"), "out of memory: no 8 GB; `python memory.py --budget` tells what"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8"), "out of memory: Default"),
        (torch.OutOfMemoryError("CUDA"), "out of memory: CUDA"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("every", [0, 10])
def test_other_faults_are_one_line_that_names_the_last_checkpoint(every, error, said, tmp_path):
    def fail(run):
        if run.progress.global_step == 26:
            raise error

    with pytest.raises(SystemExit) as end:
        train(tmp_path, resume=False, checkpoint_every=every, inside=fail)
    assert end.value.code.startswith(f"toy.py: error: {said}") and "\n" not in end.value.code
    kept = (
        "saved as of step 20; resume with: " if every else "no checkpoint was saved (--checkpoint"
    )
    assert f"; {kept}" in end.value.code
    assert_unlocked(tmp_path / "run")


def test_an_error_in_changed_code_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, resume=False, inside=lambda run: 1 / 0)
    assert_unlocked(tmp_path / "run")


# --- Progress, log, provenance --------------------------------------------------------------------


def test_progress_counts_steps_and_averages_what_ended_together():
    progress, ends = runs.Progress(2), {2: [True, False], 3: [True, True], 20: [False, True]}
    told = {}
    for t in range(1, 21):
        told[t] = progress.advance(np.array([1.0, 10.0]), np.array(ends.get(t, [False, False])))
    assert progress.global_step == 40
    assert {t: ended for t, ended in told.items() if ended} == {
        2: (2.0, 2.0),  # env 0 after 2 steps
        3: ((1 + 30) / 2, (1 + 3) / 2),
        20: (170.0, 17.0),
    }
    assert progress.last_tenth() == 170
    assert progress.episode_return.tolist() == [17.0, 0.0]
    progress.restart(np.array([True, False]))
    assert progress.episode_return.tolist() == [0, 0] and progress.episode_length.tolist() == [0, 0]
    again = runs.Progress(2)
    again.load_state_dict(progress.state_dict())
    assert again.finished == progress.finished and again.global_step == 40
    assert runs.Progress(3).last_tenth() is None


def test_steps_increase_in_every_tag_also_when_the_clock_was_set_back(tmp_path):
    straight = tmp_path / "straight"
    train(straight, resume=False, total_timesteps=800)
    for name, stop in (("9999999999", 400), ("9999999998", 500), (None, 800)):

        def fail(run, stop=stop):  # after logging what --resume must void
            if run.progress.global_step == stop + 50:
                raise FloatingPointError("stop")

        changes = {"checkpoint_every": 100, "total_timesteps": 800, "resume": stop > 400}
        if name is None:
            train(tmp_path, **changes)
            continue
        with pytest.raises(SystemExit):
            train(tmp_path, inside=fail, **changes)
        newest = max((tmp_path / "run").glob("events.*"), key=lambda log: log.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:-5])  # as if killed while it wrote
        newest.rename(newest.with_name(f"events.out.tfevents.{name}.host.1.0"))
    found = scalars(tmp_path)
    assert found == scalars(straight) and len(found["charts/episodic_return"]) == 2
    for values in found.values():
        assert all(a < b for (a, _), (b, _) in itertools.pairwise(values))


def test_the_result_tells_where_it_comes_from(tmp_path):
    result = train(tmp_path, resume=False)["result"]
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["versions"]) == {"torch", "gymnasium", "mujoco", "numpy"}
    git = ["git", "-C", str(runs.ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert result["git_commit"] == (head.stdout.strip() or None)


def test_commit_and_changes_are_those_of_this_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)

    def git(*words):
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    def told() -> tuple:
        runs._git.cache_clear()
        found = runs.provenance()
        return found["git_commit"], found["git_clean"]

    try:
        assert told() == (None, None) and runs.code() == "no known commit"
        git("init")
        (tmp_path / "sac.py").write_text("a")
        git("add", "sac.py")
        git("commit", "-m", "first")
        commit, clean = told()
        assert re.fullmatch("[0-9a-f]{40}", commit) and clean is True
        assert runs.code() == f"commit {commit[:10]}"
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "log").write_text("untracked")
        assert told() == (commit, True)
        (tmp_path / "sac.py").write_text("b")
        assert told() == (commit, False)
        changed = runs.code()
        git("config", "diff.external", "false")  # a program that fails
        runs._git.cache_clear()
        assert runs.code() == changed
        assert re.fullmatch(f"commit {commit[:10]} with changes [0-9a-f]{{8}}", changed)
        (tmp_path / "sac.py").write_bytes(b"\xff")  # no UTF-8
        assert told() == (commit, False) and changed != runs.code() != f"commit {commit[:10]}"
    finally:
        runs._git.cache_clear()


def test_resuming_under_other_code_or_threads_says_so_and_goes_on(tmp_path, monkeypatch, capfd):
    """Either may give other digits."""
    parts = [("one", 1), ("one", 1), ("two", 1), ("two", 2)]
    told = [f"commit {commit}, torch threads: {threads}" for commit, threads in parts]
    for at, (commit, threads) in enumerate(parts):
        capfd.readouterr()
        monkeypatch.setattr(runs, "code", lambda commit=commit: f"commit {commit}")
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        steps = STEPS + 4 * at
        result = train(tmp_path, resume=at > 0, total_timesteps=steps, checkpoint_every=STEPS)
        assert result["result"]["global_step"] == steps
        said = f"warning: saved by {told[at - 1]}; goes on with {told[at]}\n"
        assert capfd.readouterr().err == (said if at > 1 else "")


def test_the_hyperparameters_are_in_the_log(tmp_path):
    args = make_args(tmp_path, resume=False)
    toy.train(args)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (text,) = events.Tensors("hyperparameters/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert all(f"|{name}|{value}|" in table for name, value in asdict(args).items())
