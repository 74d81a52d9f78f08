"""run.sh with stand-ins for the requirements: sets up once, passes on, cleans up a failure."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def house(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    (tmp_path / "sac.py").write_text("import sys; print(sys.prefix, sys.argv); sys.exit(3)\n")
    return tmp_path


def run(house: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(house / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_sets_up_once_then_passes_the_command_line_and_exit_code_on(house):
    first = run(house, "sac.py", "--env", "Ant-v3")
    assert first.returncode == 3
    assert first.stdout == f"{house / '.venv'} ['sac.py', '--env', 'Ant-v3']\n"
    assert "installing requirements.txt" in first.stderr
    again = run(house)
    assert "'--env', 'Humanoid-v3', '--quant-m', '2'" in again.stdout
    assert again.stderr == ""


def test_a_failed_setup_says_so_and_leaves_no_venv_behind(house):
    (house / "requirements.txt").write_text("./no-such-package\n")
    failed = run(house)
    assert failed.returncode not in (0, 3)
    assert "no-such-package" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("run.sh: setting up .venv failed")
    assert not (house / ".venv").exists()


def test_a_failed_update_keeps_the_venv_that_worked(house):
    run(house)
    (house / "requirements.txt").write_text("./no-such-package\n")
    assert run(house).returncode not in (0, 3)
    assert (house / ".venv/bin/python").exists()
    (house / "requirements.txt").write_text("# nothing\n")
    assert run(house).returncode == 3
