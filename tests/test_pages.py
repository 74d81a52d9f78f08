"""docs/glossary.md, faq.md, equations.md: they name what there is, all of it, and as it is."""

import ast
import csv
import io
import json
import re
from collections import defaultdict
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from helpers import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_commands import files_told
from test_docs import prose

import memory
import survey
from support.envs import VectorEnv, evaluate, make

ROOT = Path(__file__).parent.parent
GLOSSARY, FAQ, EQUATIONS = (ROOT / f"docs/{name}.md" for name in ("glossary", "faq", "equations"))
SMALL = {"total_timesteps": 1000, "hidden": 8, "batch_size": 8, "eval_episodes": 1}
ONLY = {"sac": {"learning_starts": 980, "buffer_size": 1000}, "ppo": {"n_epochs": 1}}


def tables(page: Path) -> dict[str, list[list[str]]]:
    """{heading: rows of its table}, each as its cells."""
    found = defaultdict(list)
    for section in prose(page).split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        for row in [line for line in lines if line.startswith("|")][2:]:
            found[heading].append([cell.strip() for cell in row.split("|")[1:-1]])
    return found


# --- The glossary --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCRIPTS)
def logged(request, tmp_path_factory) -> tuple[str, Path]:
    """Name of a script, and the folder of a short run of it."""
    folder = str(tmp_path_factory.mktemp(request.param))
    settings = SMALL | ONLY[request.param] | {"env": "Pendulum-v1", "run_dir": folder}
    script = SCRIPTS[request.param]
    script.main(script.Args(**settings, run_name="run"))
    return request.param, Path(folder, "run")


def named(heading: str, script: str) -> set[str]:
    """What the first column of a table lists for a script."""
    rows = tables(GLOSSARY)[heading]
    assert all(all(row) for row in rows)
    assert {row[1] for row in rows} <= {"both", "SAC", "PPO"}
    names = [row[0].strip("`") for row in rows if row[1] in ("both", script.upper())]
    assert len(set(names)) == len(names)
    return set(names)


def test_the_glossary_has_every_tag_and_no_other(logged):
    script, folder = logged
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert named("TensorBoard", script) == set(tags["scalars"])
    assert tags["tensors"] == ["hyperparameters/text_summary"]  # how TensorBoard stores a text
    assert "`hyperparameters`" in GLOSSARY.read_text()


def test_the_glossary_has_every_key_of_the_result(logged):
    script, folder = logged
    result = json.loads((folder / "result.json").read_text())
    assert named("result.json", script) == set(result)


def test_the_glossary_knows_what_the_peers_log():
    tree = ast.walk(ast.parse((ROOT / "experiments/peers.py").read_text()))
    constants = {node.value for node in tree if isinstance(node, ast.Constant)}
    logged = {text for text in constants if re.fullmatch(r"\w+/\w+", str(text))}
    (sentence,) = re.findall(r"^`peers\.py` logs (.*)$", prose(GLOSSARY), re.M)
    assert set(re.findall(r"`(.*?)`", sentence)) == logged


# --- The questions -------------------------------------------------------------------------------


def results(name: str) -> list[dict[str, str]]:
    with open(ROOT / "experiments/results" / name, newline="") as file:
        return list(csv.DictReader(file))


def error_of(storage: str, column: str) -> float:
    """From errors.csv, of Humanoid-v3."""
    rows = results("ablation/errors.csv")
    key = "Humanoid-v3", "float64", storage
    (row,) = (row for row in rows if (row["task"], row["method"], row["storage"]) == key)
    return float(row[column])


def returns(name: str, algo: str, method: str, env: str = "HalfCheetah-v3") -> list[float]:
    """Of every seed, from a runs.csv."""
    key = (algo, env, method)
    rows = [row for row in results(name) if (row["algo"], row["env"], row["method"]) == key]
    return [float(row["return_last_tenth"]) for row in rows]


@cache
def layouts() -> dict[str, float]:
    """Megabytes of each layout that `python memory.py --env Humanoid-v3 --layouts` prints."""
    with redirect_stdout(io.StringIO()) as printed:
        memory.main(memory.Args(env="Humanoid-v3", layouts=True, json=True))
    return {row["layout"]: row["total"] / 1e6 for row in json.loads(printed.getvalue())["rows"]}


def largest_of_humanoid_v5() -> float:
    """|s| in the first 3,100 of the 20,000 observations that survey.py looks at by default."""
    seen = survey.collect(VectorEnv("Humanoid-v5", 1), 3100, survey.Args.seed)
    return np.abs(seen).max()


FIGURES = {  # as an answer quotes it: where it comes from
    "0.024": lambda: error_of("m=1", "rms"),
    "0.0024": lambda: error_of("m=2", "rms"),
    "0.0018": lambda: error_of("float16", "rms"),
    "0.031": lambda: error_of("float16", "worst"),
    "0.005": lambda: error_of("m=2", "worst"),
    "752": lambda: error_of("m=2", "bytes"),
    "706": lambda: error_of("m=2 packed", "bytes"),
    "318": lambda: mean(returns("ablate-m/runs.csv", "sac", "m=0")),
    "998": lambda: mean(returns("fig4/runs.csv", "ppo", "m=1", "Walker2d-v3")),
    "1675": lambda: mean(returns("ablate-m/runs.csv", "ppo", "m=2", "Walker2d-v3")),
    "1735": lambda: mean(returns("fig4/runs.csv", "ppo", "float64", "Walker2d-v3")),
    "1798": lambda: mean(returns("ablate-m/runs.csv", "sac", "float64")),
    "287": lambda: min(returns("fig4-short/runs.csv", "ppo", "m=1")),
    "779": lambda: max(returns("fig4-short/runs.csv", "ppo", "m=1")),
    "127": lambda: SCRIPTS["sac"].Args.quant_b,
    "120": lambda: max(
        float(row["max_abs_obs"] or 0)
        for name in ("fig4", "fig4-short", "ablate-m")
        for row in results(f"{name}/runs.csv")
    ),
    "6,096": lambda: max(layouts().values()),
    "3,082": lambda: layouts()["ours: float64"],
    "3,613": largest_of_humanoid_v5,
}
TRAINED = {"5,000", "-400", "-5"}  # of the robot, see its test


def answers() -> list[str]:
    return prose(FAQ).split("\n## ")[1:]


def test_there_are_ten_short_answers():
    assert len(answers()) == 10
    for answer in answers():
        question, *lines = answer.strip().splitlines()
        assert question.endswith("?")
        assert len([line for line in lines if line]) <= 5, question


def test_every_figure_of_the_answers_is_accounted_for():
    text = re.sub(r"`.*?`|\]\(.*?\)|\bm = \d|T \+ 1|hack 11|\w*-?v\d\b", "", " ".join(answers()))
    quoted = set(re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", text))
    assert {figure.rstrip(",") for figure in quoted} == FIGURES.keys() | TRAINED


@pytest.mark.parametrize("figure", FIGURES)
def test_figure(figure):
    decimals = len(figure.partition(".")[2])
    value = f"{FIGURES[figure]():,.{decimals}f}"
    assert value.replace(",", "") == figure.replace(",", "")


def test_overlaps_that_the_answers_claim():
    for algo, name, method in (
        ("sac", "ablate-m/runs.csv", "float16"),
        ("ppo", "fig4-short/runs.csv", "m=1"),
        ("sac", "fig4-short/runs.csv", "m=2"),
    ):
        ours, other = returns(name, algo, method), returns(name, algo, "float64")
        assert max(min(ours), min(other)) <= min(max(ours), max(other))


@pytest.mark.filterwarnings("ignore:.*A Box observation space m")
def test_the_robot_of_the_answers_learns(tmp_path, monkeypatch):
    ((name, code),) = files_told(FAQ)
    (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (env_id, *others) = set(re.findall(r"--env (\w+:\S+)", FAQ.read_text()))
    assert not others
    check_env(make(env_id).unwrapped)
    sac = SCRIPTS["sac"]
    small = {"total_timesteps": 2000, "batch_size": 64, "hidden": 32, "eval_episodes": 3}
    result = sac.main(sac.Args(env=env_id, quant_m=1, **small))["result"]
    rng = np.random.default_rng(1)
    random = mean(evaluate(env_id, lambda _: rng.uniform(-1, 1, 1), 50, seed=1))
    assert random == pytest.approx(-400, rel=0.15)
    assert mean(result["evaluation"]) > random / 10


# --- The equations -------------------------------------------------------------------------------


def functions(node: ast.AST, prefix: str = "") -> dict[str, ast.FunctionDef]:
    """Every function below a node by its dotted name, as in Class.method or main.inner."""
    found = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = prefix + child.name
            found |= {name: child} | functions(child, f"{name}.")
    return found


def cited(text: str) -> set[str]:
    """Equations that a text names: "SAC eq. 3, 5" -> {"SAC eq. 3", "SAC eq. 5"}."""
    found = re.findall(r"\b(SAC eq|PPO eq|GAE eq|Paper eq|Eq)\. (\d+(?:, \d+)*)", text)
    pairs = [(paper.replace("Paper eq", "Eq"), ns.split(", ")) for paper, ns in found]
    equations = {f"{paper}. {n}" for paper, ns in pairs for n in ns}
    return equations | set(re.findall(r"SAC appendix [A-Z]", text))


def on_the_page() -> dict[tuple[str, str], set[str]]:
    """{(file, function): numbers} of the tables."""
    found = defaultdict(set)
    for rows in tables(EQUATIONS).values():
        for number, mathematics, files, names in rows:
            assert mathematics
            for file in re.findall(r"\[`(.*?)`\]", files):
                for name in re.findall(r"`(.*?)`", names):
                    found[file, name] |= cited(number) or {number}
    return found


@cache
def in_file(file: str) -> dict[str, ast.FunctionDef]:
    return functions(ast.parse((ROOT / file).read_text()))


def test_every_function_of_the_page_exists():
    page = on_the_page()
    assert len(page) > 25
    assert not {(file, name) for file, name in page if name not in in_file(file)}


def test_every_equation_of_the_paper_is_on_the_page():
    numbers = set().union(*on_the_page().values())
    assert {f"Eq. {n}" for n in range(1, 7)} | {"Table I", "Table II"} <= numbers


@pytest.mark.parametrize("file", ["sac.py", "ppo.py", "quantize.py"])
def test_numbers_on_the_page_are_those_in_the_code(file):
    page, text = on_the_page(), (ROOT / file).read_text()
    for name, node in in_file(file).items():
        if name != "main":  # what it cites belongs to the functions inside
            assert cited(ast.get_source_segment(text, node)) <= page[file, name], name
    of_file = set().union(*(numbers for (where, _), numbers in page.items() if where == file))
    numbered = {number for number in of_file if re.fullmatch(r"(SAC|PPO|GAE) eq\. \d+", number)}
    assert numbered <= cited(text)


@pytest.mark.parametrize("file", ["sac.py", "ppo.py"])
def test_every_formula_of_the_scripts_is_on_the_page(file):
    def computes(node: ast.AST) -> bool:
        return isinstance(node, ast.FunctionDef) and "Tensor" in ast.unparse(node.args)

    formulas = {name for name, node in in_file(file).items() if computes(node) and "." not in name}
    assert len(formulas) >= 5
    assert formulas <= {name for where, name in on_the_page() if where == file}
