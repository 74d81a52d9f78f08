"""The house: what lies at the top level, how long rooms may be, and that imports point one way."""

import ast
import subprocess
from pathlib import Path

import pytest

import sac

ROOT = Path(sac.__file__).parent
SCRIPTS = {"sac", "ppo"}
FOLDERS = (".", "support", "experiments", "examples")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))
TOP = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "run.sh", ".gitignore"}
TOP |= {"sac.py", "ppo.py", "quantize.py", "buffers.py", "memory.py"}
TOP |= {".ci", "docs", "examples", "experiments", "support", "tests"}
LINES = {"sac.py": 350, "ppo.py": 320, "quantize.py": 250}  # at most; 450 in any other room
LINES["examples"] = 80  # each file there
FOLLOWED = ("sac.py", "buffers.py", "quantize.py", "support/networks.py")


def name_of(path: Path) -> str:
    """support/envs.py -> support.envs, experiments/plot.py -> plot: so they import each other."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("experiments.")


def imported_by(path: Path) -> set[str]:
    """The files of this project that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = {name.removeprefix("experiments.") for name in found}
    return names & {name_of(file) for file in FILES}


ARROWS = {name_of(path): imported_by(path) for path in FILES}


def reach(name: str) -> set[str]:
    """All that an import of `name` may bring along."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(ARROWS[each] for each in new)) - found
    return found - {name}


def test_the_arrows_are_found():
    assert {"memory", "buffers", "support.runs"} <= ARROWS["sac"]
    assert "storages" in ARROWS["memory"]  # inside a function
    assert "support.packing" in reach("ppo")


@pytest.mark.parametrize("name", ARROWS)
def test_imports_make_no_circle(name):
    assert not {other for other in reach(name) if name in reach(other)}


def test_imports_point_from_the_scripts_to_the_codecs():
    assert reach("quantize") <= {"support.packing"}
    support = {name for name in ARROWS if name.startswith("support.")}
    for name in support:
        assert reach(name) <= support | {"quantize"}, name
    assert reach("buffers") <= support | {"quantize"}
    assert not reach("memory") & SCRIPTS
    examples = {name for name in ARROWS if name.startswith("examples.")}
    assert {"memory", "buffers", "quantize"} <= set.intersection(*map(reach, examples))
    for name in ARROWS:
        assert not reach(name) & examples, name


def test_the_top_level_is_what_the_reader_came_for():
    listed = ["git", "-C", ROOT, "ls-files"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    tracked = {line.split("/")[0] for line in done.stdout.splitlines()}
    present = {path.name for path in ROOT.iterdir()}
    assert (tracked or TOP) == TOP <= present  # of a copy without git only that all is there


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_are_small(path):
    room = path.relative_to(ROOT)
    most = LINES.get(str(room), LINES.get(str(room.parent), 450))
    assert len(path.read_text().splitlines()) <= most


def test_sac_can_be_followed_in_four_files():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in FOLLOWED) <= 1200
