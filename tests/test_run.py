"""run.sh with stand-ins for Python and the requirements: sets up once, repairs, removes no venv."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Enough of Python for run.sh. `-m venv` makes a link to it, `-m pip` fails where pip-fails exists.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && ln -s "$(readlink -f "$0")" "$3/bin/python" ;;
"-m pip") echo "${{0#$PWD/}} $*" >>pip-calls; ! cat pip-fails 2>/dev/null ;;
-c*) exec {sys.executable} "$@" ;;
*) echo "${{0#$PWD/}} $*"; exit "${{CODE:-3}}" ;;
esac
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with run.sh, whose only Python is the stand-in."""
    for name in ("house/tests", "house/experiments", "house/.ci", "bin", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run.sh", ".ci/run"):
        shutil.copy(ROOT / name, tmp_path / "house" / name)
    for name in ("requirements.txt", "tests/requirements.txt", "experiments/requirements.txt"):
        (tmp_path / "house" / name).write_text(f"# {name}\n")
    for name in ("sac.py", "x.py"):
        (tmp_path / "house" / name).touch()
    (tmp_path / "house/tests/install_system.sh").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "house/tests/install_system.sh").chmod(0o755)
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "house"


def run(script: Path | str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def pip_calls(house: Path) -> list[str]:
    calls = house / "pip-calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_with_the_real_python(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    (tmp_path / "sac.py").write_text("import sys; print(sys.prefix, sys.argv); sys.exit(3)\n")
    first = run(tmp_path / "run.sh", "sac.py", "--env", "Ant-v3")
    assert first.returncode == 3, first.stderr
    assert first.stdout == f"{tmp_path / '.venv'} ['sac.py', '--env', 'Ant-v3']\n"
    (python,) = (tmp_path / ".venv/bin").glob("python3.*")
    for name in ("python", "python3", python.name):
        (tmp_path / ".venv/bin" / name).unlink()
        (tmp_path / ".venv/bin" / name).symlink_to("/no/such/python")
    again = run(tmp_path / "run.sh", "sac.py", "--env", "Ant-v3")
    assert (again.returncode, again.stdout) == (3, first.stdout), again.stderr


def test_sets_up_once_then_passes_the_command_line_and_exit_code_on(house):
    first = run(house / "run.sh", "sac.py", "--env", "Ant v3")
    assert (first.returncode, first.stdout) == (3, ".venv/bin/python sac.py --env Ant v3\n")
    assert "installing requirements.txt" in first.stderr
    again = run(house / "run.sh")
    assert again.stdout == ".venv/bin/python sac.py --env Humanoid-v3 --quant-m 2\n"
    assert again.stderr == ""
    assert len(pip_calls(house)) == 1


def test_peers_have_an_environment_of_their_own(house):
    done = run(house / "run.sh", "experiments/peers.py", "--help")
    assert done.stdout == ".venv-bench/bin/python experiments/peers.py --help\n"
    (call,) = pip_calls(house)
    assert call.startswith(".venv-bench/bin/python") and call.endswith(
        "experiments/requirements.txt"
    )
    assert not (house / ".venv").exists()


def test_changed_requirements_are_installed_again(house):
    run(house / "run.sh")
    (house / "requirements.txt").write_text("other\n")
    assert "installing requirements.txt" in run(house / "run.sh").stderr
    assert run(house / "run.sh").stderr == ""


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_from_any_folder_through_links_with_cdpath(house, script):
    """CDPATH sends `cd house` to a folder of that name elsewhere, and prints where it went."""
    other = house.parent / "elsewhere"
    for name in ("house", ".ci", "real"):
        (other / name).mkdir()
    (other / "link").symlink_to(house / script)
    (other / "linked").symlink_to(house)
    (house / ".venv/bin").mkdir(parents=True)
    (house / ".venv/bin/ruff").symlink_to("/bin/true")
    environment = os.environ | {"CDPATH": str(other)}
    arguments = ["x.py"] if script == "run.sh" else []
    for command, folder in (
        (str(house / script), other),
        (str(other / "link"), house.parent),
        (f"linked/{script}", other),
        (f"house/{script}", house.parent),
        (f"./{script}", house),
    ):
        done = run(command, *arguments, cwd=folder, env=environment)
        assert done.stdout.startswith(".venv/bin/python "), (command, done.stderr)
    assert len(pip_calls(house)) == 1
    assert sorted(path.name for path in other.iterdir()) == [
        ".ci",
        "house",
        "link",
        "linked",
        "real",
    ]


def test_a_failed_setup_says_so_and_leaves_no_venv_behind(house):
    (house / "pip-fails").write_text("no-such-package\n")
    failed = run(house / "run.sh")
    assert failed.returncode not in (0, 3)
    assert failed.stdout == "no-such-package\n"
    assert failed.stderr.splitlines()[-1].startswith("run.sh: setting up .venv failed")
    assert not (house / ".venv").exists()


def test_without_locks_a_failed_setup_keeps_what_another_may_be_filling(house):
    (house.parent / "bin/flock").write_text("#!/bin/sh\nexit 1\n")
    (house.parent / "bin/flock").chmod(0o755)
    (house / "pip-fails").touch()
    failed = run(house / "run.sh")
    assert failed.returncode == 1
    said = "run.sh: installing requirements.txt into .venv failed, see above"
    assert failed.stderr.splitlines()[-1] == said
    assert (house / ".venv/bin/python").exists()
    (house / "pip-fails").unlink()
    assert run(house / "run.sh").returncode == 3


def test_of_two_setups_at_once_one_installs(house):
    """The stand-in's pip waits until both are at the lock, or would both install."""
    notes = house / "flock-calls"
    flock = f'#!/bin/sh\necho >>{notes}\nexec {shutil.which("flock")} "$@"\n'
    (house.parent / "bin/flock").write_text(flock)
    (house.parent / "bin/flock").chmod(0o755)
    slow = PYTHON.replace("; ! cat pip-fails", "; until [ -e go ]; do sleep 0.05; done; ! cat no")
    (house.parent / "bin/python3").write_text(slow)
    notes.touch()
    both = [subprocess.Popen([house / "run.sh"], stderr=subprocess.DEVNULL) for _ in range(2)]
    while len(notes.read_text()) < 2 > len(pip_calls(house)):
        assert [process.poll() for process in both] == [None, None]
        time.sleep(0.05)
    (house / "go").touch()
    assert [process.wait() for process in both] == [3, 3]
    assert len(pip_calls(house)) == 1


def test_a_failed_update_keeps_the_venv_that_worked(house):
    run(house / "run.sh")
    stamp = (house / ".venv/requirements.txt.stamp").read_text()
    (house / "pip-fails").touch()
    (house / "requirements.txt").write_text("other\n")
    assert "installing requirements.txt into .venv failed" in run(house / "run.sh").stderr
    assert (house / ".venv/requirements.txt.stamp").read_text() == stamp
    (house / "pip-fails").unlink()
    assert run(house / "run.sh").returncode == 3


@pytest.mark.parametrize("pip_fails", [False, True])
def test_a_venv_whose_python_is_gone_is_repaired_and_never_removed(house, pip_fails):
    run(house / "run.sh")
    python = house / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    (house / ".venv/mine").touch()
    if pip_fails:
        (house / "pip-fails").touch()
        failed = run(house / "run.sh")
        assert failed.returncode == 1 and "failed, see above" in failed.stderr
        (house / "pip-fails").unlink()
    assert run(house / "run.sh").returncode == 3
    assert (house / ".venv/mine").exists()


def test_without_python_it_is_one_line(house):
    (house.parent / "bin/python3").unlink()
    names = ("bash", "readlink", "cat", "cmp", "env", "flock")
    for name in names:
        (house.parent / "bin" / name).symlink_to(shutil.which(name))
    environment = os.environ | {"PATH": str(house.parent / "bin")}
    done = run(house / "run.sh", env=environment)
    assert (done.returncode, done.stderr) == (1, "run.sh: Python 3.11 or newer is needed\n")


# --- The figures ---------------------------------------------------------------------------------


def listed(figure: str, **variables: str) -> list[str]:
    done = run(ROOT / "run.sh", figure, "--list", env={"PATH": os.environ["PATH"], **variables})
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.splitlines()


def test_each_figure_lists_its_command_lines():
    counts = {"fig2": 1, "fig3": 15, "fig4": 160, "sb3": 36, "table1": 1, "ablate-m": 64}
    for figure, count in (counts | {"ablate-storage": 96}).items():
        lines = listed(figure)
        assert len(set(lines)) == len(lines) == count, figure
        assert all(line.startswith("./run.sh ") for line in lines)
    fig4 = listed("fig4")
    for algo, m, steps in (("ppo", 1, 1_000_000), ("sac", 2, 500_000)):
        for seed in range(1, 11):
            for task in ("HalfCheetah-v3", "Walker2d-v3", "Ant-v3", "Humanoid-v3"):
                line = f"./run.sh {algo}.py --env {task} --seed {seed} --total-timesteps {steps}"
                line += f" --checkpoint-every {steps // 10} --run-dir runs/paper"
                assert {line, f"{line} --quant-m {m}"} <= set(fig4)
    assert len(set(listed("fig3", SEEDS="1")) & set(fig4)) == 2  # trained once, for both


def test_variables_narrow_a_list():
    narrow = {"SEEDS": "4 5", "STEPS": "300", "TASKS": "Ant-v3 Pendulum-v1", "ALGOS": "ppo"}
    lines = listed("fig4", **narrow)
    assert len(lines) == 8
    assert lines[-1] == (
        "./run.sh ppo.py --env Pendulum-v1 --seed 5 --total-timesteps 300 --checkpoint-every 30 "
        "--run-dir runs/paper --quant-m 1"
    )
    assert "--rounds 2 " in listed("table1", ROUNDS="2")[0]
    assert listed("fig2", OUT="there") == ["./run.sh memory.py --plot there/fig2.png"]
    assert listed("fig3", SEEDS=" 0  1 ", TASKS="Ant-v3") == [
        line.replace("Humanoid", "Ant").replace("--seed 2", f"--seed {seed}")
        for seed in (0, 1)
        for line in listed("fig3", SEEDS="2")
    ]


def test_a_folder_with_spaces_is_one_word_of_a_line():
    assert shlex.split(listed("fig2", OUT="my figures")[0])[2:] == [
        "--plot",
        "my figures/fig2.png",
    ]
    (line,) = listed("table1", OUT="my figures", ALGOS="ppo", TASKS="Ant-v3 Humanoid-v3")
    words = shlex.split(line)
    assert words[-2:] == ["--out", "my figures/table1.csv"]
    assert words[2:6] == ["--cells", "ppo-64-Ant-v3", "ppo-64-Humanoid-v3", "--variants"]


@pytest.mark.parametrize(
    ("variables", "words", "why"),
    [
        ({"SEEDS": "1 two"}, ["fig4"], 'SEEDS="1 two" is no list of numbers'),
        ({"SEEDS": "1 02"}, ["fig4"], 'SEEDS="1 02" is no list of numbers'),
        ({"STEPS": "1e6"}, ["fig4", "--list"], 'STEPS="1e6" is no number from 1 on'),
        ({"STEPS": "1 2"}, ["fig4", "--list"], 'STEPS="1 2" is no number from 1 on'),
        ({"STEPS": "08"}, ["fig4", "--list"], 'STEPS="08" is no number from 1 on'),
        ({"STEPS": "08"}, ["reproduce"], 'STEPS="08" is no number from 1 on'),
        ({"ROUNDS": "0"}, ["table1", "--list"], 'ROUNDS="0" is no number from 1 on'),
        ({"JOBS": "-1"}, ["fig3"], 'JOBS="-1" is no number from 1 on'),
        ({"ALGOS": "sac td3"}, ["fig4"], "ALGOS: td3 is neither ppo nor sac"),
        ({}, ["fig5"], "fig5 is neither a command (see ./run.sh help) nor a file"),
        ({}, ["fig4", "--lst"], "fig4 takes --list, --draw or nothing, not --lst"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(house, variables, words, why):
    done = run(house / "run.sh", *words, env=os.environ | variables)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"run.sh: {why}\n", "")
    assert not (house / ".venv").exists()


def test_a_task_of_slurm_is_one_line_of_the_list(house):
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "3", "SEEDS": "1"}
    done = run(house / "run.sh", "fig4", env=environment)
    assert done.stdout == ".venv/bin/python experiments/jobs.py --exec\n"
    done = run(house / "run.sh", "fig4", env=environment | {"SLURM_ARRAY_TASK_ID": "16"})
    assert (done.returncode, done.stderr) == (
        2,
        "run.sh: fig4 has 16 lines, so use --array=0-15\n",
    )


def test_a_figure_is_trained_then_drawn(house):
    """In place of run.sh, so that a signal reaches the queue: the stand-in's code is 3."""
    done = run(house / "run.sh", "fig3", env=os.environ | {"JOBS": "2"})
    queue = ".venv/bin/python experiments/jobs.py --jobs 2 --then ./run.sh fig3 --draw\n"
    assert (done.stdout, done.returncode) == (queue, 3)
    drawn = run(house / "run.sh", "fig3", "--draw", env=os.environ | {"OUT": "here"})
    figures = ".venv/bin/python experiments/figures.py fig3 --out here\n"
    assert (drawn.stdout, drawn.returncode) == (figures, 3)
    assert run(house / "run.sh", "sb3", "--draw").returncode == 0


def test_fig4_is_drawn_with_stable_baselines3(house):
    python = house.parent / "bin/python3"
    python.write_text(PYTHON.replace('exit "${CODE:-3}"', "cat"))
    drawn = run(house / "run.sh", "fig4", "--draw", env=os.environ | {"SEEDS": "1"})
    assert drawn.stdout.splitlines()[1:] == [*listed("fig4", SEEDS="1"), *listed("sb3", SEEDS="1")]


@pytest.mark.parametrize("command", ["play", "compare"])
def test_short_names_of_commands(house, command):
    done = run(house / "run.sh", command, "runs/a b", "--out", "x")
    assert done.stdout == f".venv/bin/python experiments/{command}.py runs/a b --out x\n"


@pytest.mark.parametrize("word", ["help", "--help", "-h"])
def test_help_is_the_head_of_run_sh(house, word):
    done = run(house / "run.sh", word)
    head = (ROOT / "run.sh").read_text().split("#SBATCH")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert done.returncode == 0 and not (house / ".venv").exists()


def test_options_of_python_are_passed_on(house):
    assert run(house / "run.sh", "-m", "x").stdout == ".venv/bin/python -m x\n"


def test_reproduce_goes_on_after_a_failure_but_not_after_a_signal(house):
    done = run(house / "run.sh", "reproduce")
    lines = done.stdout.splitlines()
    queues = [line.split("./run.sh ")[1] for line in lines if "jobs.py" in line]
    figures = ["fig2", "fig3", "sb3", "fig4", "ablate-m", "ablate-storage", "table1"]
    assert queues == [f"{figure} --draw" for figure in figures]
    assert done.returncode == 1 and "scaling.py" in lines[-1] and len(lines) == 14
    assert run(house / "run.sh", "reproduce", env=os.environ | {"CODE": "0"}).returncode == 0
    stopped = run(house / "run.sh", "reproduce", env=os.environ | {"CODE": "130"})
    assert stopped.returncode == 130 and len(stopped.stdout.splitlines()) == 1


def test_reproduce_puts_each_figure_where_the_pages_look(house):
    """The stand-in prints where each is to go."""
    python = house.parent / "bin/python3"
    python.write_text(PYTHON.replace('echo "${0#$PWD/} $*"; exit', 'echo "$OUT"; cat; exit'))
    done = run(house / "run.sh", "reproduce", stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "experiments/results",
        "./run.sh memory.py --plot experiments/results/fig2.png",
    ]
    assert {"experiments/results/fig3", "experiments/results/table1"} <= set(lines)
