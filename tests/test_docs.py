"""The README and docs/: what they promise is there, and what they tell to run can be run."""

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

import memory

ROOT = Path(__file__).parent.parent
README, MEMORY = ROOT / "README.md", ROOT / "docs/memory.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments/results/README.md"]
RUN_SH = (
    "test",
    "reproduce",
    "fig2",
    "fig3",
    "fig4",
    "sb3",
    "table1",
    "ablate-m",
    "ablate-storage",
)
LANGUAGE = re.compile(r"```(\w*)\n(.*?)```", flags=re.S)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return LANGUAGE.sub("", page.read_text())


def blocks(page: Path) -> list[list[str]]:
    """Paragraphs, headings, lists and tables of a page, each as its lines."""
    return [block.splitlines() for block in re.split(r"\n\s*\n", prose(page)) if block.strip()]


def cells(page: Path) -> list[str]:
    """All cells of the tables of a page, but for the names in the first column."""
    rows = [line for block in blocks(page) for line in block if line.startswith("|")]
    return [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[2:-1]]


def words_of(line: str) -> list[str]:
    """A line of a shell without its comment, and without the variables that it begins with."""
    return shlex.split(re.sub(r"^([A-Z]+=(\".*?\"|\S+) )+", "", line), comments=True)


def commands(page: Path) -> list[list[str]]:
    """Words of every `python ...` and `./run.sh ...` of a page, in blocks and in sentences."""
    text = page.read_text()
    scripts = [code for language, code in LANGUAGE.findall(text) if language == "bash"]
    lines = [line for code in scripts for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|\./run\.sh) [^`]*)`", prose(page))
    found = [words_of(line) for line in lines]
    return [words for words in found if words and words[0] in ("python", "./run.sh")]


def anchors(page: Path) -> set[str]:
    """What `#...` can point at: the headings, as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- Size ----------------------------------------------------------------------------------------


def test_the_readme_is_two_screens():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paragraphs_are_short(page):
    for block in blocks(page):
        items = "\n".join(block).split("\n- ")  # of a list each item counts by itself
        if not block[0].startswith("|"):
            assert max(len(item.splitlines()) for item in items) <= 5, block[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_cell_of_a_table_holds_at_most_one_result(page):
    for cell in cells(page):
        if len(cell.split()) < 8:  # longer ones are sentences
            text = re.sub(
                r"`[^`]*`|(±|to|and) [+-]?[\d.,]+|\[.*?\]\(.*?\)|\S*[A-Za-z]\S*|95%", "", cell
            )
            assert len(re.findall(r"\d[\d,.]*", text)) <= 1, cell


def test_the_tables_of_memory_are_what_memory_py_prints(capsys):
    robot = memory.Args(obs_dim=376, act_dim=17, layouts=True, live_columns=257, json=True)
    memory.main(robot)
    layouts = {row["layout"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    totals = [f"{row['total'] / 1e6:,.0f}" for row in layouts.values()]
    in_readme = re.findall(r"^\| .* \| \**([\d,]+)\** \| \**[\d.]+\** \|$", prose(README), re.M)
    in_docs = re.findall(r"\| \**([\d,]+)\** \| \**[\d.]+x\** \|$", prose(MEMORY), re.M)
    assert len(in_readme) == 6 and set(in_readme) < set(totals)
    assert in_docs == totals


def test_the_returns_of_learning_are_those_of_the_figures():
    """A row of its tables is one of the table that its section links to, columns left out."""

    def rows(text: str) -> list[list[str]]:
        lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
        return [row for row in lines if row and re.match("(PPO|SAC), ", row[0])]

    count = 0
    for section in (ROOT / "docs/learning.md").read_text().split("\n## "):
        links = re.findall(r"\]\(\.\./(experiments/results/[\w/-]+\.md)\)", section)
        committed = [row for link in links for row in rows((ROOT / link).read_text())]
        for row in rows(section):
            count += 1
            assert any(all(cell in rest for cell in row) for rest in map(iter, committed)), row
    assert count >= 7


# --- Links and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_file_map_names_what_is_there():
    named = set(re.findall(r"\| \[`([^`]+)`\]\(", README.read_text()))
    scripts = {path.name for path in ROOT.glob("*.py")}
    folders = {"support/", "examples/", "experiments/", "tests/"}
    assert scripts | folders <= named
    assert all((ROOT / name).exists() for name in named)


def test_every_result_and_how_it_was_made_is_listed():
    results = ROOT / "experiments/results"
    files = {
        str(p.relative_to(results)) for p in results.rglob("*") if p.suffix in (".csv", ".png")
    }
    text = (results / "README.md").read_text()
    above, table = text.split("\n|", 1)
    listed = set(re.findall(r"`([\w/-]+\.(?:csv|png))`", table))
    assert listed <= files
    # What only `./run.sh reproduce` makes, and is not committed yet.
    coming = {f"{name}/" for name in ("fig3", "table1", "ablate-storage")} | {"storages."}
    assert all(f"`{name}" in above for name in coming)
    assert all(any(name.startswith(each) for each in coming) for name in files - listed)


# --- Commands ------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A script has read its command line."""


@pytest.fixture
def stops_when_parsed(monkeypatch):
    """Scripts read their command line and stop there."""
    parse_args, cli = argparse.ArgumentParser.parse_args, tyro.cli

    def stopping(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    def stopping_tyro(args_class):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            cli(args_class)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping)
    monkeypatch.setattr(tyro, "cli", stopping_tyro)


def parses(words: list[str], monkeypatch) -> bool:
    """Whether a script takes the rest of its command line."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except Parsed:
        return True
    except SystemExit as end:
        return end.code == 0 and "--help" in words
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page, stops_when_parsed, monkeypatch):
    for words in commands(page):
        if words[0] == "./run.sh" and (len(words) == 1 or words[1] in RUN_SH):
            assert all((ROOT / word).exists() for word in words[2:] if word.endswith(".py"))
        elif words[0] == "./run.sh" and words[1] in ("play", "compare"):
            words = [f"experiments/{words[1]}.py", *words[2:]]
            assert parses(words, monkeypatch), " ".join(words)
        elif words[1:2] != ["-m"]:
            assert parses(words[1:], monkeypatch), " ".join(words)


def test_a_command_that_does_not_parse_is_found(stops_when_parsed, monkeypatch, capsys):
    assert not parses(["sac.py", "--quant-n", "2"], monkeypatch)
    assert not parses(["experiments/speed.py", "--steps-sac", "2"], monkeypatch)
    assert parses(["experiments/speed.py", "--rounds", "2"], monkeypatch)


def test_the_readmes_commands_are_found():
    assert len(commands(README)) >= 10
    assert all(commands(page) for page in PAGES)
