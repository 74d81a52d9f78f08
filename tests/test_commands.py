"""Every command of the README and of docs/ runs, made short by a table of rules.

They run in the order of the pages, each once, in a folder that has the committed results, a
finished run wherever a command names one, and the files that a page tells to write. `./run.sh` is
the real one with a stand-in for Python, which notes what it should start; that is run, too.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import pytest
from test_docs import LANGUAGE, PAGES, commands, words_of
from test_play import Clock

ROOT = Path(__file__).parent.parent
RESULTS = Path("experiments/results")

# A command, without `python`, takes the words of every rule whose pattern it begins with. Where two
# set the same option, the last one counts. A script that no rule knows fails by name.
RULES = [
    (r"(sac|ppo)\.py", "--total-timesteps 120 --eval-episodes 0"),
    (r"sac\.py(?!.*--memory-budget)", "--buffer-size 1000"),
    (r"sac\.py.*--memory-budget", "--memory-budget 9MB"),
    (r"ppo\.py", "--n-steps 70 --n-epochs 1"),
    (r".*--resume", "--total-timesteps 130"),  # beyond the run that it goes on with
    (r"memory\.py", ""),
    (r"memory\.py.*--measure", "--buffer-size 1000"),
    (r"\./run\.sh (fig\d|sb3|table1|ablate-\S+)", "--list"),
    (r"experiments/play\.py", "--episodes 1"),
    (r"experiments/survey\.py", "--steps 50"),
    (r"experiments/(figures|compare)\.py", ""),
    (r"experiments/ablation\.py (errors|table)", ""),
    (r"experiments/budget\.py", f"--rows 1000 --steps 60 --out {RESULTS}/budget.csv"),
    (r"experiments/checkpoint\.py", f"--rows 1000 --out {RESULTS}/checkpoint.csv"),
    (r"experiments/soak\.py", f"--steps 1000 --every 100 --out {RESULTS}/soak.csv"),
    (r"experiments/speed\.py(?!.*--out)", f"--out {RESULTS}/speed.csv"),
    (r"experiments/speed\.py", "--cores 1 --rounds 1 --cells sac-64-Walker2d-v3 --variants floor"),
    # Each of its measurements takes seconds, and no option leaves one alone.
    (r"experiments/scaling\.py", f"--draw --out {RESULTS}/scaling.csv"),
]
# What runs these very tests, takes hours, needs another environment or OpenGL, which test_play.py
# looks for, or compares runs long enough for an episode; git's are in test_hacks.py.
NOT_RUN = [r"\./run\.sh (test|reproduce)\b.*", r"\./run\.sh experiments/peers\.py --help"]
NOT_RUN += [r"\./run\.sh compare '?runs/\w+\*'?"]  # of the lines before it
NOT_RUN += [r"sbatch .*"]  # but see test_slurm.py
NOT_RUN += [r"python experiments/play\.py runs/stills .*"]
NOT_RUN += [r"source \.venv/bin/activate", r"git .*", r"tensorboard --logdir \S+"]
PYTHON = f"""#!{sys.executable}
import shlex, sys
if sys.argv[1] != "-c":  # with which run.sh asks whether it works
    print(shlex.join(sys.argv[1:]), file=open("started", "a"))
"""


def is_run(line: str) -> bool:
    return not any(re.fullmatch(pattern, line) for pattern in NOT_RUN)


def added(line: str) -> list[str]:
    """The words of each rule that knows a command."""
    return [words for pattern, words in RULES if re.match(pattern, line)]


def shortened(line: str) -> list[str]:
    """Words of a command that takes seconds. Raises ValueError if no rule knows it."""
    if not (rules := added(line)):
        raise ValueError(f"no rule of RULES makes this short: {line}")
    return shlex.split(" ".join([line, *rules]))


def started(words: list[str]) -> list[str]:
    """What a command of a page has Python run: a line each, without `python`."""
    if words[0] == "python":
        return [shlex.join(words[1:])]
    line, note = shlex.join(words), Path("started")
    note.write_text("")
    command = shlex.split(" ".join([line, *added(line)]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return note.read_text().splitlines()


def files_told(page: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every block of Python that begins with `# name.py`."""
    for language, code in LANGUAGE.findall(page.read_text()):
        if language == "python" and (named := re.match(r"# (\w+\.py)\n", code)):
            yield named[1], code


def run(words: list[str]) -> tuple[int, str, str]:
    """Run a script in this process, which has torch already: exit code, stdout, stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str(ROOT / Path(words[0]).parent), *sys.path])
        patch.setattr(subprocess, "run", run_child)
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", run_threaded)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
                code = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=err)
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception:
                traceback.print_exc(file=err)
                code = 1
    return code, *(file.buffer.getvalue().decode() for file in (out, err))


real_run = subprocess.run


def run_child(command: list, **options) -> subprocess.CompletedProcess:
    """subprocess.run that runs our scripts in this process; its limits are not put on us."""
    words = [str(word) for word in command]
    if words[0] != sys.executable:
        return real_run(command, **options)
    script = Path(words[1]).relative_to(ROOT)
    done = subprocess.CompletedProcess(command, *run([str(script), *words[2:]]))
    if options.get("check"):
        done.check_returncode()
    return done


def run_threaded(workers: int, _) -> ThreadPoolExecutor:
    """ProcessPoolExecutor, but in this process."""
    return ThreadPoolExecutor(workers)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def entries() -> set[Path]:
    """What lies in the repository, but for Python's own caches."""
    found = (path for folder in (ROOT, ROOT / "experiments") for path in folder.iterdir())
    return {path for path in found if path.name != "__pycache__"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with run.sh and the committed results; `before`, another checkout, is beside it."""
    folder = tmp_path_factory.mktemp("pages") / "workplace"
    shutil.copytree(ROOT / RESULTS, folder / RESULTS)
    (folder.parent / "before").symlink_to(ROOT)
    shutil.copy(ROOT / "run.sh", folder)
    for script in ("sac.py", "ppo.py"):
        (folder / script).symlink_to(ROOT / script)
    for name in ("requirements.txt", "experiments/requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
        venv = folder / (".venv-bench" if "/" in name else ".venv")
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/python").write_text(PYTHON)
        (venv / "bin/python").chmod(0o755)
        installed = [ROOT / "requirements.txt", ROOT / name]
        stamp = venv / f"{name.replace('/', '-')}.stamp"
        stamp.write_text("".join(path.read_text() for path in installed))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Path]:
    """The folder of a short finished run, of an environment that is drawn without OpenGL."""
    folder = tmp_path_factory.mktemp("finished")
    gym.register("Clock-v0", Clock)
    words = ["sac.py", "--env", "Clock-v0", "--quant-m", "2", "--total-timesteps", "220"]
    words += ["--learning-starts", "200", "--buffer-size", "300", "--eval-episodes", "1"]
    words += ["--checkpoint-every", "220"]
    code, _, said = run([*words, "--run-dir", str(folder), "--run-name", "run"])
    assert code == 0, said
    yield folder / "run"
    del gym.registry["Clock-v0"]


@pytest.fixture
def in_workplace(workplace, finished, monkeypatch):
    """Be there; returns a function that runs a command and wants it to succeed."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)

    def works(words: list[str]) -> None:
        for option, word in itertools.pairwise(words):  # a run that it wants to read
            if re.match(r"runs/|RUN", word) and option != "--out" and not Path(word).exists():
                shutil.copytree(finished, word)
        code, _, said = run(words)
        assert code == 0, f"{shlex.join(words)}\n{said}"

    return works


ran: set[str] = set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_runs(page, in_workplace):
    before, left = contents(ROOT / RESULTS), entries()
    for name, code in files_told(page):
        Path(name).write_text(code)
    told = [words for words in commands(page) if is_run(shlex.join(words))]
    for line in (line for words in told for line in started(words)):
        if line not in ran:
            in_workplace(shortened(line))
            ran.add(line)
    assert contents(ROOT / RESULTS) == before
    assert entries() == left


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_else_is_told_to_run(page):
    scripts = [code for language, code in LANGUAGE.findall(page.read_text()) if language == "bash"]
    for line in "".join(scripts).replace("\\\n", " ").splitlines():
        words = words_of(line)
        if words and words[0] not in ("python", "./run.sh"):
            assert not is_run(shlex.join(words)), f"nothing runs this: {line}"


def test_a_command_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"makes this short: experiments/new\.py --big"):
        shortened("experiments/new.py --big")
    assert shortened("ppo.py --total-timesteps 300000")[-6:-4] == ["--eval-episodes", "0"]


def test_run_sh_is_followed_to_what_it_starts(in_workplace):
    assert started(["./run.sh"]) == ["sac.py --env Humanoid-v3 --quant-m 2"]
    assert started(["./run.sh", "ppo.py", "--seed", "2"]) == ["ppo.py --seed 2"]


def test_a_command_that_fails_is_named(in_workplace):
    with pytest.raises(AssertionError, match=r"quant-n(.|\n)*Unrecognized"):
        in_workplace(["sac.py", "--quant-n", "2"])
    Path("broken.py").write_text("raise SystemExit('no luck')")
    with pytest.raises(AssertionError, match=r"broken\.py\n *no luck"):
        in_workplace([str(Path("broken.py").resolve())])
    with pytest.raises(AssertionError, match="the ending must be"):
        in_workplace(["memory.py", "--plot", "memory.xyz"])
