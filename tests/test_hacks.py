"""docs/hacks.md: every patch applies, trains, survives being stopped, and does what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "docs" / "hacks").glob("*.patch"))
PAGE = ROOT / "docs" / "hacks.md"


def changed_lines(patch: str) -> int:
    """Lines of a diff that are new or changed."""
    return len(re.findall(r"^\+(?!\+\+ )", patch, re.MULTILINE))


def test_the_page_shows_what_the_patches_do():
    page = PAGE.read_text()
    sections = page.split("\n## ")[3:]
    titles, counts = [], []
    for section in sections:
        title, text = section.split("\n", 1)
        (name,) = re.findall(r"\(\[patch\]\(hacks/(.*)\.patch\)\)", text.replace("\n", " "))
        lines = (ROOT / "docs" / "hacks" / f"{name}.patch").read_text().splitlines()
        for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
            assert set(block.splitlines()) <= set(lines), title
        titles.append(title)
        counts.append(changed_lines("\n".join(lines)))
    rows = re.findall(r"^\| (\d+) \| \[(.*)\]\(#(.*)\) \| (\d+) \|", page, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(PATCHES) + 1))
    slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
    assert [slug for _, _, slug, _ in rows] == slugs
    assert [int(count) for *_, count in rows] == counts
    assert len(rows) == len(PATCHES) >= 12
    assert max(counts[:5]) <= 3
    assert max(counts) <= 30


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_hack(patch, tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("support", "docs/hacks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    apply = ["git", "apply", f"docs/hacks/{patch.name}"]  # as the page says
    subprocess.run(apply, cwd=tmp_path, env=os.environ | {"GIT_DIR": "none"}, check=True)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "hacked.py", patch.stem],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
