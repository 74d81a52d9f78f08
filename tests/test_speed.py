"""experiments/speed.py, floor.py, scaling.py on made-up measurements: nothing asserts a time."""

import csv
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from torch.utils.tensorboard import SummaryWriter

import floor
import ppo
import sac
import scaling
import speed

CELL = "sac-64-Walker2d-v3"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(text: str, first: str) -> dict[tuple[str, str], dict[str, str]]:
    """The Markdown table whose head begins with these words: {first two cells: {head: cell}}."""
    lines = [[c.strip() for c in line[1:-1].split("|")] for line in text.splitlines()]
    (start,) = (i for i, line in enumerate(lines) if " | ".join(line).startswith(first))
    head, found = lines[start], {}
    for line in lines[start + 2 :]:
        if len(line) != len(head):
            break
        found[line[0], line[1]] = dict(zip(head, line, strict=True))
    return found


def fails(capsys, script, *argv: object) -> str:
    """The one line that bad input leaves on stderr, before anything is measured."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(script, "run_rounds", lambda args: pytest.fail("measures"))
        script.main([*map(str, argv)])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write(path: Path, times: dict[tuple[str, str], list[float | str]]) -> Path:
    """speed.csv: of each cell and variant the ms of every round, or why it failed."""
    rows = []
    for (cell, variant), each in times.items():
        for number, ms in enumerate(each, 1):
            row = {"round": number, "cell": cell, "hidden": 64, "variant": variant, "cores": 1}
            row |= {"failed": ms} if isinstance(ms, str) else {"ms_per_step": ms}
            if variant not in ("floor", ms):
                row["seconds_to_window"] = 10 * number
            rows.append(row | {"versions": f"of {variant}", "cpu": "Abacus"})
    speed.write_csv(path, speed.COLUMNS, rows)
    return path


# ---- the floor ----


@pytest.mark.parametrize("n, k, h, b", [(17, 6, 64, 256), (376, 17, 256, 32), (3, 1, 5, 2)])
def test_operations_of_an_update_match_the_formula(n, k, h, b):
    def operations(algo):
        return sum(2 * np.prod(shape) for shape in floor.products(algo, n, k, h, b))

    actor, critic = n * h + h * h + h * 2 * k, (n + k) * h + h * h + h  # weights
    sac = 2 * b * actor + 3 * 2 * b * critic  # forward: actor on two batches, 3 times two critics
    sac += b * (2 * actor - n * h)  # back: twice the forward, less the gradient by the inputs
    sac += 2 * b * (2 * critic - (n + k) * h)
    sac += 2 * b * (critic - n * h)  # to the actions: no weights, and none of the observation
    assert operations("sac") == 2 * sac
    policy, value = n * h + h * h + h * k, n * h + h * h + h
    assert operations("ppo") == 2 * b * (3 * (policy + value) - 2 * n * h)


@pytest.mark.parametrize("cell, networks", [("sac-64-Walker2d-v3", 1), ("ppo-64-Walker2d-v3", 2)])
def test_the_floor_adds_up_what_a_step_needs(monkeypatch, cell, networks):
    asked = []
    monkeypatch.setattr(floor, "time_products", lambda shapes: asked.append(shapes) or 1e6)
    ms = floor.floor(cell, steps=3)
    acting, learning = sorted(asked, key=len)
    assert len(acting) == 3 * networks and {shape[1] for shape in acting} == {1}
    batch = {"sac": 256, "ppo": 64}[cell[:3]]
    assert learning == floor.products(cell[:3], 17, 6, 64, batch)
    updates = {"sac": 1, "ppo": 320 / 2048}[cell[:3]]
    assert ms == pytest.approx(1e9 * (1 + updates), rel=1e-6)  # besides, a few ms in the env


def test_products_are_timed():
    assert floor.time_products([(2, 3, 4, 5), (2, 3, 4, 1), (1, 1, 2, 3)], repeats=3) > 0


# ---- one measurement ----


@pytest.fixture
def logged(monkeypatch):
    """Instead of running commands, write events: {step: seconds after the start}. Commands."""
    commands, marks = [], {}

    def child(command, cores):
        commands.append([*map(str, command)])
        folder = Path(command[command.index("--run-dir") + 1]) / "run"
        now = 1e9
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar("charts/episodic_return", 1.0, 7, walltime=now)
            for step, seconds in marks.items():
                writer.add_scalar("charts/SPS", 1.0, step, walltime=now + seconds)
        return "a line\nthe versions\n"

    monkeypatch.setattr(speed.time, "time", lambda: 1e9)
    monkeypatch.setattr(speed, "child", child)
    return commands, marks


def test_the_window_is_from_the_thousandth_step_to_the_last(logged, monkeypatch):
    monkeypatch.setattr(speed, "PEERS_PYTHON", Path(sys.executable))
    commands, marks = logged
    marks |= {1000: 9.0, 2000: 11.5, 3000: 13.0}
    found = speed.measure(CELL, "SBX", 1, None)
    expected = {"ms_per_step": "2.0000", "seconds_to_window": "9.00", "versions": "the versions"}
    assert found == expected
    assert commands[0][0] == sys.executable and "sbx" in commands[0]


def test_the_window_of_ppo_begins_with_its_second_rollout(logged):
    _, marks = logged
    marks |= {2048 * i: 3.0 + 1.024 * i for i in range(1, 9)}
    found = speed.measure("ppo-64-Ant-v3", "rounded", 1, None)
    assert (found["ms_per_step"], found["seconds_to_window"]) == ("0.5000", "4.02")


@pytest.mark.parametrize("steps", [(1001, 2000, 3000), (1000, 2000), ()])
def test_another_window_is_refused(logged, steps):
    _, marks = logged
    marks |= dict.fromkeys(steps, 1.0)
    with pytest.raises(RuntimeError, match="not at 1000 and 3000"):
        speed.measure(CELL, "float64", 1, None)


@pytest.mark.parametrize("cell, steps", [("sac-256-Humanoid-v3", 2000), ("ppo-64-Ant-v3", 16384)])
def test_our_variants_are_one_flag_apart(logged, cell, steps):
    commands, marks = logged
    marks |= dict.fromkeys((1000, 2000, 2048, 16384), 1.0)
    algo, hidden, env = cell.split("-", 2)
    parsed = {}
    for variant in ("float64", "rounded", "packed"):
        speed.measure(cell, variant, 1, None)
        assert commands[-1][1] == str(speed.ROOT / f"{algo}.py")
        args = {"sac": sac, "ppo": ppo}[algo].Args
        parsed[variant] = vars(tyro.cli(args, args=commands[-1][2:]))
        parsed[variant].pop("run_dir")
    m = {"sac": 2, "ppo": 1}[algo]
    assert parsed["rounded"] == parsed["float64"] | {"quant_m": m}
    assert parsed["packed"] == parsed["rounded"] | {"pack": True}
    base = parsed["float64"]
    for variant in speed.STORAGES:
        speed.measure(cell, variant, 1, None)
        other = vars(tyro.cli(args, args=commands[-1][2:]))
        (changed,) = (name for name in base if other[name] != base[name])
        name, value = ("quant_m", int(variant[2:])) if "=" in variant else ("storage", variant)
        assert (changed, other[changed]) == (name, value)
    assert (base["env"], base["hidden"], base["total_timesteps"]) == (env, int(hidden), steps)
    assert base["quant_m"] is None and base["storage"] is None and base["num_envs"] == 1


def test_before_is_the_rounded_run_of_another_checkout(logged, tmp_path):
    commands, marks = logged
    marks |= {1000: 1.0, 3000: 2.0}
    for variant in ("rounded", "before"):
        found = speed.measure(CELL, variant, 1, tmp_path)
    ours, before = (command[:-1] for command in commands)  # but for --run-dir
    assert before == [ours[0], str(tmp_path / "sac.py"), *ours[2:]]
    assert found["versions"].startswith(f"{tmp_path.name}, torch ")


def test_a_child_has_its_cores_and_no_more(monkeypatch):
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
    for name in names:
        monkeypatch.setenv(name, "7")
    code = f"import os; print(len(os.sched_getaffinity(0)), [*map(os.environ.get, {names})])"
    assert speed.child([sys.executable, "-c", code], 1) == "1 ['1', '1', '1', '']\n"


@pytest.mark.parametrize(
    "code, line",
    [
        ("import sys; sys.exit('first\\nlast')", "last"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.write(2, b'word\\n'); os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_a_child_that_fails_says_so_in_one_line(code, line):
    with pytest.raises(RuntimeError) as error:
        speed.child([sys.executable, "-c", code], 1)
    assert str(error.value) == line


# ---- rounds ----


@pytest.mark.parametrize("cell", [CELL, "ppo-64-Ant-v3"])
def test_every_round_runs_every_variant_and_what_is_compared_side_by_side(cell):
    orders = [speed.order(cell, number, speed.VARIANTS) for number in range(1, 11)]
    ours = ["float64", "rounded", "before"]
    expected = speed.VARIANTS if cell in speed.CELLS else ours
    assert all(sorted(order) == sorted(expected) for order in orders)
    for other, step in (("float64", 1), ("before", -1)):
        steps = [order.index("rounded") - order.index(other) for order in orders]
        assert steps == [step, -step] * 5
    firsts = {order[0] for order in orders}
    assert firsts == {"float64", "before"} | ({*expected} - {*ours})


def test_variants_take_turns_in_being_the_first():
    some = ["float64", "m=0", "float16"]
    orders = [speed.order(CELL, number, some) for number in range(1, 4)]
    assert all(sorted(order) == sorted(some) for order in orders)
    assert {order[0] for order in orders} == {*some}
    assert speed.order("ppo-64-Ant-v3", 2, ["floor", "m=0"]) == []  # it has none of them


def test_a_failing_peer_is_a_row_with_its_last_line(tmp_path, capsys, monkeypatch):
    python, out = tmp_path / "python", tmp_path / "speed.csv"
    python.write_text("#!/bin/sh\necho first >&2; echo No module named sbx >&2; exit 1\n")
    python.chmod(0o755)
    options = ["--cells", CELL, "--variants", "SBX", "--rounds", 2, "--out", out]
    for path, why in (
        (python, "No module named sbx"),
        (tmp_path / "absent", "not installed; `./run.sh experiments/peers.py --help` does that"),
    ):
        monkeypatch.setattr(speed, "PEERS_PYTHON", path)
        speed.main([*map(str, options)])
        assert [(row["ms_per_step"], row["failed"]) for row in read(out)] == [("", why)] * 2
        shown = table(capsys.readouterr().out, "cell | variant")
        assert shown[CELL, "SBX"]["note"] == f"2 of 2 failed: {why}"
        assert [*shown] == [(CELL, "SBX")]
    assert (tmp_path / "speed.png").exists()


def test_an_interrupted_run_keeps_its_rounds(tmp_path, monkeypatch):
    asked = []

    def measure(cell, variant, cores, against):
        asked.append(variant)
        if len(asked) > 3:
            raise KeyboardInterrupt
        return {"ms_per_step": f"{len(asked)}"}

    monkeypatch.setattr(speed, "measure", measure)
    options = ["--cells", CELL, "--variants", "float64", "rounded", "--rounds", "5"]
    with pytest.raises(KeyboardInterrupt):
        speed.main([*options, "--out", str(tmp_path / "speed.csv")])
    rows = read(tmp_path / "speed.csv")
    assert [(row["round"], row["variant"]) for row in rows] == [("1", "float64"), ("1", "rounded")]
    assert list(rows[0]) == speed.COLUMNS and rows[0]["cpu"] and rows[0]["cores"] == "1"
    asked.clear()
    monkeypatch.setattr(speed, "measure", lambda *_: asked.append(1) or {"ms_per_step": "7"})
    for _ in range(2):  # the second finds nothing to measure
        speed.main([*options, "--resume", "--out", str(tmp_path / "speed.csv")])
    rounds = read(tmp_path / "speed.csv")
    assert len(asked) == 8 and rounds[:2] == rows
    assert [row["round"] for row in rounds] == [str(n) for n in (1, 2, 3, 4, 5) for _ in range(2)]


def test_resuming_measures_what_failed_and_what_is_asked_for_newly(tmp_path, monkeypatch):
    asked, out = [], write(tmp_path / "speed.csv", {(CELL, "float64"): [1, "broken", 3]})
    monkeypatch.setattr(
        speed, "measure", lambda cell, variant, *_: asked.append(variant) or {"ms_per_step": "7"}
    )
    options = ["--cells", CELL, "--rounds", "3", "--resume", "--out", str(out)]
    speed.main([*options, "--variants", "float64", "m=2"])
    assert sorted(asked) == ["float64"] * 3 + ["m=2"] * 3  # a pair is measured at one time
    found = [(row["variant"], row["round"], row["ms_per_step"]) for row in read(out)]
    pairs = [(name, number, "7") for name in ("float64", "m=2") for number in "123"]
    assert sorted(found) == pairs and not any(row["failed"] for row in read(out))
    speed.main([*options, "--variants", "float64", "m=2"])
    assert len(asked) == 6


def test_only_cells_that_were_run_are_drawn(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(speed, "draw_cell", lambda axes, cell, times: drawn.append(cell))
    draw(capsys, write(tmp_path / "speed.csv", {("ppo-64-Ant-v3", "rounded"): [1]}))
    draw(capsys, write(tmp_path / "speed.csv", {(CELL, "float64"): ["broken"]}))
    assert drawn == ["ppo-64-Ant-v3", CELL]


# ---- tables ----


def draw(capsys, path: Path) -> str:
    capsys.readouterr()
    before = path.read_bytes()
    speed.main(["--draw", "--out", str(path)])
    assert path.read_bytes() == before
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def test_ratios_are_medians_of_the_rounds_ratios(tmp_path, capsys):
    times = {"SB3": [4, 8, 6], "SBX": [5, 5, 8], "float64": [2, 1, 3], "rounded": [1, 2, 3]}
    times |= {"packed": [9, 9, 9], "floor": [1, 0.5, 1]}
    path = write(tmp_path / "speed.csv", {(CELL, name): each for name, each in times.items()})
    shown = table(draw(capsys, path), "cell | variant")
    assert {variant for _, variant in shown} == {*times}
    faster = [4, 5, 6]  # of each round
    for name, each in times.items():
        line = shown[CELL, name]
        assert float(line["ms per step"]) == statistics.median(each)
        assert (float(line["min"]), float(line["max"])) == (min(each), max(each))
        for head, others, goal in (
            ("/ float64", times["float64"], None),
            ("/ SB3", times["SB3"], 0.5),
            ("/ faster peer", faster, 1.0),
            ("/ floor", times["floor"], None),
        ):
            ratio = statistics.median(a / b for a, b in zip(each, others, strict=True))
            words = [f"{ratio:.3f}"]
            if name in speed.OURS and goal:
                words.append("reached" if ratio <= goal else "missed")
            assert line[head].split() == words
        assert line["note"] == ""
        assert line["s to window"] == ("-" if name == "floor" else "20.0")


def test_large_networks_need_only_be_faster_than_the_peers(tmp_path, capsys):
    cell = "sac-256-Humanoid-v3"
    times = {(cell, "float64"): [9], (cell, "SB3"): [10], (cell, "SBX"): [11]}
    shown = table(draw(capsys, write(tmp_path / "speed.csv", times)), "cell | variant")
    line = shown[cell, "float64"]
    assert (line["/ SB3"], line["/ faster peer"]) == ("0.900", "0.900 reached")


def test_a_round_that_failed_does_not_count(tmp_path, capsys):
    times = {(CELL, "float64"): [2, 4, 8], (CELL, "SB3"): [4, "broken", 32]}
    shown = table(draw(capsys, write(tmp_path / "speed.csv", times)), "cell | variant")
    assert shown[CELL, "SB3"]["/ float64"] == "3.000"  # of 2 and 4
    assert shown[CELL, "SB3"]["note"] == "1 of 3 failed: broken"
    assert shown[CELL, "float64"]["/ faster peer"] == "-"  # there is one peer only


@pytest.mark.parametrize("last, verdict", [(0.97, "reached"), (1.2, "missed")])
def test_table_i(tmp_path, capsys, last, verdict):
    slower = ["sac-64-Humanoid-v3", "ppo-64-Ant-v3", "ppo-64-Humanoid-v3"]
    ratios = [1.03, 1.01, 1.05, 1.02, 1.04]
    each = {cell: ratios if cell in slower else [last] * 5 for cell in speed.TABLE_I}
    base = [1, 2, 4, 2, 2]
    times = {(cell, "float64"): base for cell in each}
    times |= {
        (cell, "rounded"): [a * b for a, b in zip(ratios, base, strict=True)]
        for cell, ratios in each.items()
    }
    shown = table(draw(capsys, write(tmp_path / "speed.csv", times)), "cell | float64")
    assert len(speed.TABLE_I) == 8 and len(shown) == 9
    ratios = {cell: line["ratio"] for (cell, _), line in shown.items()}
    assert ratios[CELL] == f"{last:.3f}" and ratios["ppo-64-Ant-v3"] == "1.030"
    middle = shown["median of 8 of the 8 cells", ""]
    assert middle["ratio"] == f"{last:.3f} {verdict}" and middle["goal"] == "<= 1.02"
    assert middle["95% interval"] == f"{last:.3f} to {last:.3f}"
    assert shown["ppo-64-Ant-v3", "2.000"]["95% interval"] == "1.010 to 1.050"


def test_ratios_to_another_checkout(tmp_path, capsys):
    times = {(cell, "before"): [2, 4] for cell in speed.CELLS}
    times |= {(cell, "rounded"): [2, 4] for cell in speed.CELLS}
    times[CELL, "rounded"] = [2.4, 4.8]
    text = draw(capsys, write(tmp_path / "speed.csv", times))
    assert (CELL, "before") in table(text, "cell | variant")
    shown = table(text, "cell | before, ms")
    assert shown[CELL, "3.000"]["ratio"] == "1.200 missed"
    assert shown[CELL, "3.000"]["goal"] == "<= 1.12"
    middle = shown["median of 6 of the 6 cells", ""]
    assert (middle["ratio"], middle["goal"]) == ("1.000 reached", "<= 1.05")


def test_fewer_than_all_cells_reach_no_goal(tmp_path, capsys):
    times = {(CELL, "float64"): [1], (CELL, "rounded"): [0.5]}
    shown = table(draw(capsys, write(tmp_path / "speed.csv", times)), "cell | float64")
    middle = shown["median of 1 of the 8 cells", ""]
    assert (middle["ratio"], middle["95% interval"], middle["goal"]) == ("0.500", "-", "-")


def test_interval():
    assert speed.interval(np.full((8, 5), 1.25)) == (1.25, 1.25)
    assert speed.interval(np.array([[1.0, 2.0]])) == (1, 2)  # each in a quarter of the draws
    # Every draw of rounds gives both cells' medians the mean 2: the rounds are the same for all.
    assert speed.interval(np.array([[1.0, 3.0], [3.0, 1.0]])) == (2, 2)
    ratios = np.random.default_rng(0).normal(size=(1, 9))
    low, high = speed.interval(ratios)
    assert ratios.min() < low < np.median(ratios) < high < ratios.max()


# ---- scaling ----


@pytest.mark.parametrize("storage", scaling.STORAGES)
def test_a_filled_buffer_is_full_and_written(storage):
    buffer = scaling.filled_buffer(storage, rows=2500, obs_dim=9)
    assert buffer.nbytes == scaling.make_buffer(storage, 2500, 9, "meta").nbytes
    assert buffer.size == 2500 == np.count_nonzero(buffer.is_start)
    assert buffer.obs.array.view(-1, buffer.obs.array.shape[-1]).any(1).all()
    batch = buffer.sample(256)
    assert len(batch.obs.unique(dim=0)) > 200
    drawn = buffer._draw(20_000)
    assert (drawn.min(), drawn.max()) == (0, 2499)
    assert (buffer.obs.get(np.array([2500])) != 0).any()  # the next of the last


def run_scaling(tmp_path, *options: object) -> list[dict[str, str]]:
    scaling.main([*map(str, options), "--out", str(tmp_path / "scaling.csv")])
    return read(tmp_path / "scaling.csv")


def test_storages_take_turns_and_what_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    sizes = {"rows": ("rows", [100, 1000]), "columns": ("columns", []), "envs": ("envs", [1])}
    monkeypatch.setattr(scaling, "PANELS", sizes)
    monkeypatch.setattr(scaling, "time_sample", lambda buffer: float(buffer.size))
    monkeypatch.setattr(scaling, "free_memory", lambda device: 1.5e6)
    options = ["--panels", "rows", "--rounds", 2]
    rows = run_scaling(tmp_path, *options)
    small, large = [[row["series"] for row in rows if row["x"] == x] for x in ("100", "1000")]
    assert small == [*scaling.STORAGES, "int16, m=2", "packed, m=2", "float64"]
    assert large == [*scaling.STORAGES][1:] * 2
    said = capsys.readouterr().out
    assert said.count("left out, 0.0 GB are more than is free") == 2
    assert "int16, m=2: sampling from 1,000 rows takes 10.00x of that from 100" in said
    lines = table(said, "us per sample(256), by rows")
    ((_, shown),) = ((key, line) for key, line in lines.items() if key[0] == "1,000")
    assert shown["float64"] == "left out" and shown["int16, m=2"] == "1000.0, 0.8 MB"


def test_loops_are_timed_between_the_first_and_the_last_event(tmp_path, monkeypatch, capsys):
    parsed = []

    def train(command, cores):
        script = {"sac.py": sac, "ppo.py": ppo}[command[1].name]
        parsed.append(tyro.cli(script.Args, args=[*map(str, command[2:])]))
        return {1008: 5.0, 2016: 6.0, 3024: 9.032}, ""

    monkeypatch.setattr(scaling, "train", train)
    rows = run_scaling(tmp_path, "--panels", "envs", "--rounds", 1)
    assert {row["time"] for row in rows} == {"2.0000"} and len(rows) == 10
    for row, args in zip(rows, parsed, strict=True):
        assert str(args.num_envs) == row["x"]
        assert args.quant_m == (1 if isinstance(args, ppo.Args) else 2)
    totals = [args.total_timesteps for args in parsed if isinstance(args, ppo.Args)]
    assert totals == [3 * 2048 * n for n in (1, 2, 4, 8, 16)]
    assert table(capsys.readouterr().out, "ms per transition")["16", "2.000"]
    before = (tmp_path / "scaling.csv").read_bytes()
    run_scaling(tmp_path, "--draw")
    assert before == (tmp_path / "scaling.csv").read_bytes()
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


# ---- bad input ----


@pytest.mark.parametrize(
    "argv",
    [
        ["--rounds", "0"],
        ["--cores", "0"],
        ["--cores", "100000"],
        ["--cells", "sac-64-Nowhere-v3"],
        ["--variants", "float7"],
        ["--against", "/no/such/checkout"],
        ["--draw", "--out", "/no/such/speed.csv"],
        ["--out", "/proc/speed.csv"],
        ["--nonsense"],
    ],
)
def test_bad_options_of_speed(capsys, argv):
    assert fails(capsys, speed, *argv).startswith("speed.py: error: ")


@pytest.mark.parametrize(
    "argv",
    [
        ["--rounds", "0"],
        ["--cores", "100000"],
        ["--panels", "depth"],
        ["--draw", "--out", "/no/such/scaling.csv"],
    ],
)
def test_bad_options_of_scaling(capsys, argv):
    assert fails(capsys, scaling, *argv).startswith("scaling.py: error: ")


@pytest.mark.parametrize("script", [speed, scaling])
def test_bad_csvs(tmp_path, capsys, script):
    path = tmp_path / "some.csv"
    path.write_text("a,b\n1,2\n")
    assert "has other columns" in fails(capsys, script, "--draw", "--out", path)
    path.write_text(",".join(script.COLUMNS) + "\n")
    assert "holds no measurement" in fails(capsys, script, "--draw", "--out", path)
    path.write_text(",".join(script.COLUMNS) + "\n" + ",".join(["x"] * len(script.COLUMNS)) + "\n")
    assert fails(capsys, script, "--draw", "--out", path).count("error") == 1
