"""The command line of memory.py: its reports, --budget, --measure and what it refuses."""

import importlib
import json
import math
import re
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

import memory
from memory import Args, allocated, total
from quantize import STORAGE_DTYPES, FixedPoint, Packed, make_codec
from support.arguments import check_ranges

SAC = dict(obs_dim=376, act_dim=17, hidden=64, buffer_size=1_000_000, num_envs=1, batch_size=256)
PPO = dict(obs_dim=376, act_dim=17, hidden=64, n_steps=2048, num_envs=1, batch_size=64)


def script_args(algo, flags):
    """The Args that `sac.py` or `ppo.py` would have with these flags."""
    args = tyro.cli(importlib.import_module(algo).Args, args=flags)
    check_ranges(args)
    return args


def codec_of(args):
    return make_codec(args.quant_m, args.quant_b, args.storage, args.pack)


# ---- --budget ----


def report_of(args, capsys):
    """What --json prints."""
    memory.main(replace(args, json=True))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "args",
    [
        Args(env="Humanoid-v3", budget="750MB"),
        Args(env="Humanoid-v3", budget="0.5 GiB", live_columns=257, num_envs=3, hidden=256),
        Args(env="Humanoid-v3", budget="2.9MB", live_columns=0),  # below some, above others
        Args(env="Pendulum-v1", budget="1MB", algo="ppo", num_envs=3, batch_size=128),
        Args(obs_dim=11, act_dim=3, budget="20000000", quant_b=1000.5, live_columns=4),
        Args(obs_dim=11, act_dim=3, budget="2MB", algo="ppo", quant_b=1e7),
    ],
    ids=lambda args: f"{args.algo} {args.env} {args.budget}",
)
def test_budget_commands_are_those_of_the_largest_buffers(args, capsys):
    report, knob = report_of(args, capsys), memory.SIZED_BY[args.algo]
    obs_dim, act_dim, budget = report["obs_dim"], report["act_dim"], report["budget"]
    seen = set()
    for row in report["rows"]:
        if row["command"] == "does not fit":
            assert row[knob] == 0
            continue
        python, name, *flags = row["command"].split()
        assert (python, name) == ("python", f"{args.algo}.py")
        assert flags[:2] == ["--env", args.env or "YOUR-ENV"]
        run = script_args(args.algo, flags)
        codec = codec_of(run)
        assert (codec.name, codec.bits_per_value) == (row["storage"], row["bits"])
        if isinstance(codec, FixedPoint):
            assert codec.b == args.quant_b
        sizes = dict(obs_dim=obs_dim, act_dim=act_dim, hidden=run.hidden, num_envs=run.num_envs)
        sizes["batch_size"] = run.batch_size
        if getattr(run, "drop_constant", False):
            sizes["live_columns"] = row["columns"]
        n = getattr(run, knob)
        if getattr(run, "memory_budget", None) is not None:
            n = memory.largest("sac", codec, memory.parse_bytes(run.memory_budget), **sizes)
        assert n == row[knob]
        assert total(allocated(args.algo, codec, **sizes, **{knob: n})) <= budget
        assert total(allocated(args.algo, codec, **sizes, **{knob: n + 1})) > budget
        seen.add((codec.name, row["columns"]))
    assert len(seen) == sum(row[knob] > 0 for row in report["rows"])
    memory.main(args)
    out = capsys.readouterr().out
    assert all(row["command"] in out and row["storage"] in out for row in report["rows"])
    assert "libraries\ncome on top" in out
    assert ("does not fit" in out) == any(row[knob] == 0 for row in report["rows"])
    assert ("--drop-constant: if" in out) == (args.live_columns is not None)


def test_budget_tries_every_storage_once(capsys):
    def names(**given):
        report = report_of(Args(obs_dim=376, act_dim=17, budget="750MB", **given), capsys)
        return [(row["storage"], row["columns"]) for row in report["rows"]]

    floats = [(name, 376) for name in STORAGE_DTYPES]
    fixed = ["int8 (m=0, b=127)", "int16 (m=1, b=127)", "packed 12-bit (m=1, b=127)"]
    fixed += ["int16 (m=2, b=127)", "packed 15-bit (m=2, b=127)"]
    fixed += ["int32 (m=3, b=127)", "packed 18-bit (m=3, b=127)"]
    assert names() == floats + [(name, 376) for name in fixed]
    assert names(live_columns=9) == floats + [(name, n) for name in fixed for n in (376, 9)]
    wide = ["int32 (m=0, b=1e+07)", "packed 25-bit (m=0, b=1e+07)"]  # no decimal in a float32
    assert [name for name, _ in names(quant_b=1e7)] == [*STORAGE_DTYPES, *wide]


# ---- the measured ledger ----


def test_measured_agrees_with_allocated():
    args = Args(env="HalfCheetah-v3", buffer_size=2_500_000, pack=True, measure=True)
    report = memory.robot_report(args)
    measured, allocated = report["measured"], total(report["allocated"]["codec"])
    assert allocated > 150e6
    assert measured["total"] == pytest.approx(allocated, rel=0.03)
    assert measured["total"] + measured["interpreter"] == measured["resident"] <= measured["peak"]
    assert 100e6 < measured["interpreter"] < 1000e6
    assert measured["peak"] < measured["resident"] + 30e6


@pytest.fixture
def children(monkeypatch):
    """Children that only take 300 MB and their ledger; .args are what they were asked for."""
    fake = types.SimpleNamespace(args=[], returncode=0, stderr="")

    def run(command, **_):
        script = Path(command[1]).stem
        args = script_args(script, command[2:])
        fake.args.append(args)
        rss = 300_000_000 + int(getattr(args, "memory_budget", None) or 0)
        result = {"rss_bytes": rss, "peak_rss_bytes": rss + 7}
        (folder := Path(args.run_dir, args.run_name)).mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, fake.returncode, "", fake.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


def test_measure_runs_the_script_with_the_smallest_buffer_and_with_the_one_asked_for(children):
    codec, sizes = Packed(2, 50.5), {**SAC, "num_envs": 7, "batch_size": 1000}
    args = Args("Humanoid-v3", quant_m=2, quant_b=50.5, pack=True, num_envs=7, batch_size=1000)
    measured = memory.robot_report(replace(args, measure=True))["measured"]
    for args, n in zip(children.args, (1000, 1_000_000), strict=True):
        assert codec_of(args).name == codec.name
        assert (args.env, args.device, args.eval_episodes) == ("Humanoid-v3", "cpu", 0)
        assert (args.hidden, args.num_envs, args.batch_size) == (64, 7, 1000)
        assert args.learning_starts < args.total_timesteps < 2000
        needed = total(allocated("sac", codec, **{**sizes, "buffer_size": n}))
        assert int(args.memory_budget) == needed
        del sizes["buffer_size"]
        assert memory.largest("sac", codec, needed, **sizes) >= n  # rounded up to whole rings
        sizes["buffer_size"] = 1_000_000
    resident = 300_000_000 + needed
    assert measured == dict(
        resident=resident, peak=resident + 7, interpreter=300_000_000, total=needed
    )
    assert not Path(args.run_dir).exists()


def test_measure_runs_one_whole_rollout_of_ppo(children):
    args = Args("Walker2d-v3", algo="ppo", num_envs=3, n_steps=500, storage="float16")
    memory.robot_report(replace(args, measure=True))
    small, real = children.args
    assert (small.n_steps, real.n_steps) == (22, 500)  # 22 * 3 is the first to hold a batch of 64
    assert (real.total_timesteps, real.storage, real.quant_m) == (1, "float16", None)


def test_measured_is_printed_beside_the_others(children, capsys):
    args = Args(env="Humanoid-v3", measure=True)
    memory.main(args)
    out = capsys.readouterr().out
    assert re.search(r"^total .* 828\.5 +828\.5$", out, re.MULTILINE)
    assert re.search(r"^interpreter +300\.0$", out, re.MULTILINE)
    assert re.search(r"^resident +1,128\.5$", out, re.MULTILINE)
    assert re.search(r"^peak +1,128\.5$", out, re.MULTILINE)
    assert "measured - allocated, bytes: +0 (+0.00%)\n" in out
    memory.main(Args(env="Pendulum-v1", algo="ppo", measure=True))
    assert "below 100 MB temporary tensors" in capsys.readouterr().out
    args.json = True
    memory.main(args)
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert set(measured) == {"resident", "peak", "interpreter", "total"}


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("a warning\nsac.py: error: something is wrong\n", "sac.py: error: something is wrong"),
        ("", "exit code -9"),
    ],
)
def test_what_the_child_says_last_is_the_error(children, capsys, stderr, said):
    children.returncode, children.stderr = -9, stderr
    with pytest.raises(SystemExit):
        memory.main(Args(env="Humanoid-v3", measure=True))
    assert capsys.readouterr().err == f"memory.py: error: --measure failed; {said}\n"


# ---- the command ----


@pytest.mark.parametrize(
    "args",
    [
        Args(env="Humanoid-v3", quant_m=2),
        Args(env="Pendulum-v1", algo="ppo", num_envs=3),
        Args(obs_dim=391, act_dim=16, control_hz=50.0, storage="float16"),
        Args(obs_dim=5, act_dim=2, buffer_size=10, num_envs=4, quant_m=0, quant_b=1),
        Args(obs_dim=5, act_dim=2, buffer_size=10, num_envs=4, pack=True),
        Args(obs_dim=5, act_dim=2, algo="ppo", num_envs=4, pack=True),
        Args(env="Humanoid-v3", pack=True, live_columns=257),
        Args(obs_dim=5, act_dim=2, live_columns=0, storage="float32"),
    ],
)
def test_robot_mode_and_its_json(args, capsys):
    memory.main(args)
    text = capsys.readouterr().out
    args.json = True
    memory.main(args)
    report = json.loads(capsys.readouterr().out)
    ours, paper = report["allocated"]["codec"], report["paper"]["codec"]
    differences = report["allocated_minus_paper"]
    assert sum(d["bytes"] for d in differences.values()) == total(ours) - total(paper)
    assert all(row in text and d["why"] in text for row, d in differences.items())
    for ledger in (ours, paper, *(report[k]["baseline"] for k in ("allocated", "paper"))):
        assert memory.mb(total(ledger)) in text
    assert ("bytes/s" in text) == (report["bytes_per_second"] is not None)


def test_why_of_the_observations_counts_rows_and_their_words():
    def why(**given):
        report = memory.robot_report(Args(obs_dim=376, act_dim=17, **given))
        return report["allocated_minus_paper"]["buffer observations"]

    rows = "; 1,000,001 rows for 1,000,000 transitions"
    assert f"752 bytes a row, 376 x 16 bits, against the paper's 705{rows}" in why()["why"]
    packed = why(pack=True, num_envs=10, buffer_size=1000)
    words = "706 bytes a row, 376 x 15 bits in whole 16-bit words, against the paper's 705"
    assert f"{words}; 1,010 rows for 1,000 transitions" in packed["why"]
    assert packed["bytes"] == 1010 * 706 - 1000 * 705
    live = why(pack=True, live_columns=257)["why"]
    assert words.replace("706", "482").replace("376", "257") + rows in live
    ppo = why(algo="ppo", pack=True)
    assert ppo["why"] == words.replace("706", "564").replace("15", "12").replace("705", "564")
    assert ppo["bytes"] == 0


def test_robot_mode_is_the_same_from_env_and_from_dimensions():
    by_env = memory.robot_report(Args(env="Humanoid-v3"))
    by_dims = memory.robot_report(Args(obs_dim=376, act_dim=17))
    assert by_env["allocated"] == by_dims["allocated"]
    assert by_env["codec"].startswith("int16 (m=2")  # the paper's for SAC
    assert by_env["allocated"]["codec"] == allocated("sac", FixedPoint(2), **SAC)
    assert by_dims["bytes_per_second"] is None
    # 0.015 s per step: 376 values of 8, 2 and 15/8 bytes
    expected = {"baseline": 3008 / 0.015, "codec": 752 / 0.015, "paper": 705 / 0.015}
    assert by_env["bytes_per_second"] == pytest.approx(expected)
    by_ppo = memory.robot_report(Args(obs_dim=376, act_dim=17, algo="ppo"))
    assert by_ppo["codec"].startswith("int16 (m=1")
    assert by_ppo["allocated"]["codec"] == allocated("ppo", FixedPoint(1), **PPO)
    packed = memory.robot_report(Args(env="Humanoid-v3", pack=True))
    assert packed["allocated"]["codec"] == allocated("sac", Packed(2), **SAC)
    assert packed["bytes_per_second"]["codec"] == pytest.approx(706 / 0.015)
    live = memory.robot_report(Args(obs_dim=376, act_dim=17, live_columns=200))
    assert live["allocated"]["codec"] == allocated("sac", FixedPoint(2), **SAC, live_columns=200)
    assert live["allocated"]["baseline"] == by_dims["allocated"]["baseline"]


def test_explicit_control_rate_wins_over_the_environments():
    assert memory.robot_report(Args(env="Humanoid-v3", control_hz=10.0))["control_hz"] == 10


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(env="Humanoid-v3", obs_dim=3), "--env and --obs-dim"),
        (dict(env="Humanoid-v3", act_dim=3), "--env and --obs-dim"),
        (dict(obs_dim=3), "give both"),
        (dict(act_dim=3), "give both"),
        (dict(obs_dim=0, act_dim=3), "--obs-dim 0 must be positive"),
        (dict(obs_dim=3, act_dim=-1), "--act-dim -1 must be positive"),
        (dict(obs_dim=3, act_dim=1, control_hz=0.0), "--control-hz"),
        (dict(obs_dim=3, act_dim=1, control_hz=math.nan), "--control-hz"),
        (dict(obs_dim=3, act_dim=1, buffer_size=0), "--buffer-size 0"),
        (dict(obs_dim=3, act_dim=1, n_steps=-5, algo="ppo"), "--n-steps -5"),
        (dict(obs_dim=3, act_dim=1, num_envs=0), "--num-envs 0"),
        (dict(obs_dim=3, act_dim=1, hidden=0), "--hidden 0"),
        (dict(obs_dim=3, act_dim=1, batch_size=0), "--batch-size 0"),
        (dict(obs_dim=3, act_dim=1, quant_m=2, storage="float16"), "exclude each other"),
        (dict(obs_dim=3, act_dim=1, quant_m=-1), "--quant-m -1"),
        (dict(obs_dim=3, act_dim=1, n_steps=5), "--n-steps does nothing with --algo sac"),
        (dict(obs_dim=3, act_dim=1, algo="ppo", buffer_size=5), "does nothing with --algo ppo"),
        (dict(obs_dim=3, act_dim=1, algo="ppo", live_columns=2), "does nothing with --algo ppo"),
        (dict(obs_dim=3, act_dim=1, algo="ppo", layouts=True), "does nothing with --algo ppo"),
        (dict(obs_dim=3, act_dim=1, live_columns=4), "--live-columns 4 must be from 0 to 3"),
        (dict(obs_dim=3, act_dim=1, live_columns=-1), "--live-columns -1 must be from 0 to 3"),
        (dict(obs_dim=3, act_dim=1, pack=True, storage="float16"), "does nothing without"),
        (dict(obs_dim=3, act_dim=1, measure=True), "--measure runs the real script and needs"),
        (dict(env="Pendulum-v1", budget="1kB"), "1,000 bytes hold no batch in any storage"),
        (dict(measure=True), "--measure runs the real script and needs --env"),
        (
            dict(env="Humanoid-v3", measure=True, live_columns=9),
            "--live-columns does nothing with --measure",
        ),
        (dict(env="Humanoid-v3", measure=True, buffer_size=9), "--buffer-size is at least 256"),
        (dict(env="Pendulum-v1", algo="ppo", measure=True, n_steps=9), "--n-steps is at least 64"),
        (dict(obs_dim=3, act_dim=1, budget="much"), "'much' is no amount of memory"),
        (dict(obs_dim=3, act_dim=1, budget=""), "'' is no amount of memory"),
        (dict(obs_dim=3, act_dim=1, budget="1GB", quant_m=2), "--quant-m does nothing with --b"),
        (dict(obs_dim=3, act_dim=1, budget="1GB", buffer_size=2), "--buffer-size does nothing"),
        (dict(obs_dim=3, act_dim=1, budget="1GB", layouts=True), "--layouts does nothing with"),
        (dict(obs_dim=3, act_dim=1, budget="1GB", quant_b=0.5), "--quant-b 0.5 is not a bound"),
        (dict(obs_dim=3, act_dim=1, budget="1GB", quant_b=math.nan), "--quant-b nan is not"),
        (dict(obs_dim=3, act_dim=1, layouts=True, pack=True), "--pack does nothing with --lay"),
        (dict(budget="1GB"), "--budget needs a robot"),
        (dict(layouts=True), "--layouts needs a robot"),
        (dict(quant_m=2), "--quant-m needs a robot"),
        (dict(env="Humanoid-v33"), "unknown --env 'Humanoid-v33'"),
        (dict(env=""), "--env"),
        (dict(plot="fig2.xyz"), "the ending must be .png or .pdf"),
        (dict(plot="fig2"), "the ending must be .png or .pdf"),
        (dict(plot="folder.png"), "folder.png"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line_and_writes_nothing(bad, message, as_json, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    if "plot" in bad:
        bad = {**bad, "plot": tmp_path / bad["plot"]}
    with pytest.raises(SystemExit) as caught:
        memory.main(Args(**bad, json=as_json))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("memory.py: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
