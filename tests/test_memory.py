"""memory.py against the paper's figures, real buffers, hand arithmetic and a faked machine."""

import json
import math
import resource
import types

import psutil
import pytest
import torch

import envs
import memory
from buffers import ReplayBuffer, RolloutBuffer
from memory import Args, allocated_ppo, allocated_sac, check_fits, paper_ledger
from quantize import STORAGE_DTYPES, FixedPoint, Float

CODECS = [*map(Float, STORAGE_DTYPES.values()), *(FixedPoint(m) for m in range(4))]
HUMANOID = dict(obs_dim=376, act_dim=17, hidden=64)
SAC = dict(**HUMANOID, buffer_size=1_000_000, num_envs=1, batch_size=256)
PPO = dict(**HUMANOID, n_steps=2048, num_envs=1, batch_size=64)
CPU = torch.device("cpu")


def total(ledger):
    return sum(ledger.values())


# ---- parameters and the allocated ledger ----


def test_mlp_parameters_are_those_of_torch():
    layers = [torch.nn.Linear(7, 5), torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)]
    real = sum(p.numel() for layer in layers for p in layer.parameters())
    assert memory.mlp_parameters([7, 5, 3, 2]) == real


@pytest.mark.parametrize(
    ("task", "hidden", "ppo", "with_targets", "without"),
    [  # PAPER.md
        ("Walker2d-v3", 64, 11_085, 29_136, 17_614),
        ("HalfCheetah-v3", 64, 11_085, 29_136, 17_614),
        ("Ant-v3", 64, 23_249, 59_988, 36_178),
        ("Humanoid-v3", 64, 57_763, 148_262, 89_380),
        ("Walker2d-v3", 256, None, 362_256, None),
        ("Ant-v3", 256, None, 485_652, None),
        ("Humanoid-v3", 256, None, 838_694, None),
    ],
)
def test_parameter_counts(task, hidden, ppo, with_targets, without):
    actor, critic = memory.sac_parameters(*memory.TASKS[task], hidden)
    assert actor + 4 * critic == with_targets
    if ppo:
        assert actor + 2 * critic == without
        assert memory.ppo_parameters(*memory.TASKS[task], hidden) == ppo


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("size", "num_envs"), [(1, 1), (7, 3), (100, 1), (101, 8), (2, 5)])
def test_buffer_rows_sum_to_nbytes(codec, size, num_envs):
    dims = dict(obs_dim=11, act_dim=3)
    common = dict(**dims, hidden=8, num_envs=num_envs, batch_size=4)
    for buffer, ledger in (
        (
            RolloutBuffer(codec, size, num_envs, *dims.values(), CPU, seed=0),
            allocated_ppo(codec, **common, n_steps=size),
        ),
        (
            ReplayBuffer(codec, size, num_envs, *dims.values(), CPU, seed=0),
            allocated_sac(codec, **common, buffer_size=size),
        ),
    ):
        assert ledger["buffer observations"] == buffer.obs.nbytes
        assert ledger["buffer observations"] + ledger["buffer rest"] == buffer.nbytes


def test_humanoid_row_is_826_bytes():
    row = 376 * 2 + 17 * 4 + 4 + 1 + 1  # int16 obs; float32 action, reward; terminated, is_start
    assert row == 826
    ledger = allocated_sac(FixedPoint(2), **SAC)
    buffer = ledger["buffer observations"] + ledger["buffer rest"]
    assert buffer == 1_000_001 * row + 3 * 8  # the open row; first_row, head and fill
    assert total(ledger) <= 830e6  # DESIGN.md section 9
    assert total(allocated_sac(Float(), **SAC)) > 3.7 * total(ledger)


def test_allocated_sac_by_hand():
    ledger = allocated_sac(
        FixedPoint(2), obs_dim=3, act_dim=2, hidden=4, buffer_size=9, num_envs=1, batch_size=5
    )
    actor = 3 * 4 + 4 + 4 * 4 + 4 + 4 * 4 + 4
    critics = 2 * (5 * 4 + 4 + 4 * 4 + 4 + 4 * 1 + 1)
    assert ledger == {
        "buffer observations": 10 * 3 * 2,
        "buffer rest": 10 * (2 * 4 + 4 + 1 + 1) + 24,
        "networks": 4 * (actor + critics + 1),
        "target networks": 4 * critics,
        "gradients": 4 * (actor + critics + 1),
        "Adam moments": 2 * 4 * (actor + critics + 1) + 2 * 4,
        "decoded batch": 5 * (3 + 3 + 2 + 1) * 4 + 5,
    }


def test_allocated_ppo_by_hand():
    sizes = dict(obs_dim=3, act_dim=2, hidden=4, n_steps=6, num_envs=2)
    ledger = allocated_ppo(FixedPoint(0), **sizes, batch_size=5)
    parameters = (3 * 4 + 4 + 4 * 4 + 4) * 2 + (4 * 2 + 2) + (4 * 1 + 1) + 2
    assert ledger == {
        "buffer observations": 12 * 3,
        "buffer rest": 12 * (2 * 4 + 5 * 4 + 1),
        "networks": 4 * parameters,
        "gradients": 4 * parameters,
        "Adam moments": 2 * 4 * parameters + 4,
        "decoded batch": 5 * (3 + 2 + 3) * 4,
    }
    # A rollout smaller than a minibatch is one minibatch.
    small = allocated_ppo(FixedPoint(0), **sizes, batch_size=64)
    assert small["decoded batch"] == 12 * (3 + 2 + 3) * 4


# ---- the paper ledger ----


def test_tasks_are_those_of_envs():
    assert set(memory.TASKS) == set(envs.V3_TASKS)
    for task, dims in memory.TASKS.items():
        env = envs.make(task)
        assert (*env.observation_space.shape, *env.action_space.shape) == dims
        env.close()


def test_fig2_ratios():
    cells = memory.fig2()
    ratios = {algo: [c["ratio"] for c in cells if c["algo"] == algo] for algo in ("ppo", "sac")}
    assert ratios["ppo"] == pytest.approx([2.11, 2.11, 3.65, 4.16], abs=0.005)  # PAPER.md
    assert ratios["sac"] == pytest.approx([2.63, 2.63, 3.74, 3.95], abs=0.005)
    assert [f"{r:.1f}" for r in (ratios["ppo"][0], ratios["ppo"][-1])] == ["2.1", "4.2"]
    assert [f"{r:.1f}" for r in (ratios["sac"][0], ratios["sac"][-1])] == ["2.6", "3.9"]
    assert {(c["algo"], c["bits"]) for c in cells} == {("ppo", 12), ("sac", 15)}
    assert all(c["model_of_q"] < 0.02 for c in cells if c["algo"] == "sac")  # Sec. V-B


def test_eq1_and_eq3_by_hand():
    sizes = dict(obs_dim=17, act_dim=6, hidden=64)
    policy_and_value = 4 * 11_085
    rollout = 2048 * (17 * 12 / 8 + 4 * (6 + 7))
    ledger = paper_ledger("ppo", 12, **sizes, steps=2048)
    assert total(ledger) == policy_and_value + rollout  # eq. 1
    replay = 1_000_000 * (17 * 15 / 8 + 4 * (6 + 2))
    ledger = paper_ledger("sac", 15, **sizes, steps=1_000_000)
    assert total(ledger) == 4 * 17_614 + replay  # eq. 3


def test_humanoid_sac_is_just_under_750_in_mib_only():
    humanoid = memory.fig2()[-1]
    b, q = total(humanoid["B"]), total(humanoid["Q"])
    assert b / 1e6 == pytest.approx(3084.4, abs=0.05)
    assert q / 1e6 == pytest.approx(781.4, abs=0.05)
    assert q / 2**20 == pytest.approx(745.2, abs=0.05)
    targets = 4 * (148_262 - 89_380)
    assert (q + targets) / 2**20 == pytest.approx(745.4, abs=0.05)  # PAPER.md's counts targets


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [  # PAPER.md
        ((391, 16, 8_300, 1.3e6), (27.09, 95.42, 95.83, 91.45)),
        ((112, 8, 100_000, 2.3e6), (96.8, 97.68, 92.56, 90.41)),
        ((112, 8, 1_000_000, 2.3e6), (968.0, 99.76, 92.56, 92.34)),
    ],
)
def test_worked_examples(inputs, expected):
    assert tuple(memory.worked_example(*inputs).values()) == pytest.approx(expected, abs=0.005)
    assert inputs in [example[1] for example in memory.WORKED_EXAMPLES]


# ---- free memory ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8000 bytes available, no cgroup files and no rlimits; fields to change."""
    fake = types.SimpleNamespace(
        available=8000, rlimits={}, used={"vms": 300, "data": 200}, root=tmp_path / "cgroup"
    )
    fake.proc = tmp_path / "proc_cgroup"

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def getrlimit(limit):
        return fake.rlimits.get(limit, resource.RLIM_INFINITY), resource.RLIM_INFINITY

    def process():
        return types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(**fake.used))

    fake.write = write
    monkeypatch.setattr(memory, "PROC_CGROUP", fake.proc)
    monkeypatch.setattr(memory, "CGROUP_ROOT", fake.root)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: types.SimpleNamespace(available=fake.available)
    )
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    return fake


def test_free_memory_of_this_machine():
    assert 0 < memory.free_memory(CPU) <= psutil.virtual_memory().total


def test_free_memory_without_limits(machine):
    assert memory.free_memory(CPU) == 8000


@pytest.mark.parametrize("folder", ["a/b", "a", ""])
def test_cgroup_v2_limit_at_any_level_binds(machine, folder):
    machine.proc.write_text("0::/a/b\n")
    for level in ("a/b", "a", ""):
        machine.write(machine.root / level / "memory.max", "max\n")
        machine.write(machine.root / level / "memory.current", "900\n")
    machine.write(machine.root / folder / "memory.max", "3000\n")
    assert memory.free_memory(CPU) == 2100
    machine.write(machine.root / folder / "memory.stat", "inactive_anon 7\ninactive_file 400\n")
    assert memory.free_memory(CPU) == 2500  # page cache can be reclaimed


@pytest.mark.parametrize("folder", ["docker/x", ""])  # "" is what a container sees
def test_cgroup_v1_limit(machine, folder):
    machine.proc.write_text("9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n")
    group = machine.root / "memory" / folder
    machine.write(group / "memory.limit_in_bytes", "3000\n")
    machine.write(group / "memory.usage_in_bytes", "900\n")
    machine.write(group / "memory.stat", "inactive_file 1\ntotal_inactive_file 400\n")
    assert memory.free_memory(CPU) == 2500


def test_cgroup_of_another_hierarchy_is_no_limit(machine):
    machine.proc.write_text("4:cpu:/a\n")
    machine.write(machine.root / "memory/a/memory.limit_in_bytes", "1\n")
    machine.write(machine.root / "memory/a/memory.usage_in_bytes", "0\n")
    assert memory.free_memory(CPU) == 8000


def test_usage_beyond_the_limit_leaves_nothing(machine):
    machine.proc.write_text("0::/\n")
    machine.write(machine.root / "memory.max", "100\n")
    machine.write(machine.root / "memory.current", "900\n")
    assert memory.free_memory(CPU) == 0


def test_rlimits_bind(machine):
    machine.rlimits[resource.RLIMIT_AS] = 5300
    assert memory.free_memory(CPU) == 5000
    machine.rlimits[resource.RLIMIT_DATA] = 4200
    assert memory.free_memory(CPU) == 4000
    machine.available = 3999
    assert memory.free_memory(CPU) == 3999


# ---- refusing what cannot fit ----


def suggested(message, flag):
    words = message.replace(",", "").split()
    return int(words[words.index(flag) + 1])


@pytest.mark.parametrize(
    ("allocated", "sizes", "knob"),
    [
        (allocated_sac, SAC, "buffer_size"),
        (allocated_sac, {**SAC, "num_envs": 7}, "buffer_size"),
        (allocated_ppo, {**PPO, "n_steps": 10**6}, "n_steps"),
        (allocated_ppo, {**PPO, "n_steps": 10**6, "num_envs": 3}, "n_steps"),
    ],
)
@pytest.mark.parametrize("codec", [Float(), FixedPoint(2), FixedPoint(3)], ids=lambda c: c.name)
def test_suggested_size_is_the_largest_that_fits(allocated, sizes, knob, codec):
    free = total(allocated(codec, **sizes)) * 2 // 3
    with pytest.raises(ValueError, match="what fits") as caught:
        check_fits(allocated, codec, free=free, **sizes)
    message = str(caught.value)
    assert "\n" not in message
    assert memory.mb(free) in message
    flag = f"--{knob.replace('_', '-')}"
    n = suggested(message, flag)
    check_fits(allocated, codec, free=free, **{**sizes, knob: n})
    assert total(allocated(codec, **{**sizes, knob: n})) <= free
    assert total(allocated(codec, **{**sizes, knob: n + 1})) > free
    assert ("--quant-m" in message) == (codec.bits > 16)


def test_fits_exactly_and_not_by_one_byte():
    needed = total(allocated_sac(FixedPoint(2), **SAC))
    check_fits(allocated_sac, FixedPoint(2), free=needed, **SAC)
    with pytest.raises(ValueError, match=r"--buffer-size 999999$"):
        check_fits(allocated_sac, FixedPoint(2), free=needed - 1, **SAC)
    free = total(allocated_sac(FixedPoint(2), **{**SAC, "buffer_size": 600_000}))
    with pytest.raises(ValueError, match=r"--buffer-size 600000$"):  # it fills free to the byte
        check_fits(allocated_sac, FixedPoint(2), free=free, **SAC)


def test_suggests_fixed_point_at_full_and_at_reduced_size():
    with pytest.raises(ValueError, match=r"or --quant-m 2 in place of float64$"):
        check_fits(allocated_sac, Float(), free=10**9, **SAC)
    with pytest.raises(ValueError, match=r"--quant-m 2 --buffer-size \d+ in place") as caught:
        check_fits(allocated_sac, Float(), free=10**8, **SAC)
    n = suggested(str(caught.value).split(", or ")[1], "--buffer-size")
    assert total(allocated_sac(FixedPoint(2), **{**SAC, "buffer_size": n})) <= 10**8
    assert total(allocated_sac(FixedPoint(2), **{**SAC, "buffer_size": n + 1})) > 10**8
    with pytest.raises(
        ValueError, match=r"--quant-m 1 --quant-b 127 --n-steps \d+ in place of int"
    ):
        huge = {**PPO, "n_steps": 10**6}
        check_fits(allocated_ppo, FixedPoint(2, 10_000), free=10**8, **huge)


def test_nothing_fits():
    with pytest.raises(ValueError, match="not even --buffer-size 1 fits"):
        check_fits(allocated_sac, Float(), free=1000, **SAC)
    with pytest.raises(ValueError, match="not even --n-steps 1 fits"):
        check_fits(allocated_ppo, Float(), free=0, **PPO)


def test_footprint_is_one_line_with_both_totals():
    ledger, baseline = allocated_sac(FixedPoint(2), **SAC), allocated_sac(Float(), **SAC)
    line = memory.footprint(ledger, baseline)
    assert "\n" not in line
    assert (
        f"= {total(ledger) / 1e6:.1f} MB; float64 baseline {total(baseline) / 1e6:,.1f} MB" in line
    )
    assert line.endswith("3.7x as much")
    assert memory.footprint(baseline, baseline).endswith("this is the float64 baseline")


def test_plan_checks_and_tells(monkeypatch):
    for algo, allocated, sizes in (("sac", allocated_sac, SAC), ("ppo", allocated_ppo, PPO)):
        monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
        codec = FixedPoint(2)
        expected = memory.footprint(allocated(codec, **sizes), allocated(Float(), **sizes))
        assert memory.plan(algo, codec, CPU, **sizes) == expected
        monkeypatch.setattr(memory, "free_memory", lambda device: 2_600_000)
        with pytest.raises(ValueError, match="MB are free; what fits"):
            memory.plan(algo, codec, CPU, **sizes)


# ---- the command ----


def test_paper_mode_prints_results_and_slips(capsys):
    memory.main(Args())
    out = capsys.readouterr().out
    for text in ("4.16x", "3.95x", "745.2 MiB", "781.4 MB", "27.09 (27)", "91.45 (92)", "968 MB"):
        assert text in out


@pytest.mark.parametrize(
    "args",
    [
        Args(env="Humanoid-v3", quant_m=2),
        Args(env="Pendulum-v1", algo="ppo", num_envs=3),
        Args(obs_dim=391, act_dim=16, control_hz=50.0, storage="float16"),
        Args(obs_dim=5, act_dim=2, buffer_size=10, num_envs=4, quant_m=0, quant_b=1),
    ],
)
def test_robot_mode_and_its_json(args, capsys):
    memory.main(args)
    text = capsys.readouterr().out
    args.json = True
    memory.main(args)
    report = json.loads(capsys.readouterr().out)
    allocated, paper = report["allocated"]["codec"], report["paper"]["codec"]
    differences = report["allocated_minus_paper"]
    assert sum(d["bytes"] for d in differences.values()) == total(allocated) - total(paper)
    assert all(row in text and d["why"] in text for row, d in differences.items())
    for ledger in (allocated, paper, *(report[k]["baseline"] for k in ("allocated", "paper"))):
        assert memory.mb(total(ledger)) in text
    assert ("bytes/s" in text) == (report["bytes_per_second"] is not None)


def test_robot_mode_is_the_same_from_env_and_from_dimensions():
    by_env = memory.robot_report(Args(env="Humanoid-v3"))
    by_dims = memory.robot_report(Args(obs_dim=376, act_dim=17))
    assert by_env["allocated"] == by_dims["allocated"]
    assert by_env["codec"].startswith("int16 (m=2")  # the paper's for SAC
    assert by_env["allocated"]["codec"] == allocated_sac(FixedPoint(2), **SAC)
    assert by_dims["bytes_per_second"] is None
    # 0.015 s per step: 376 values of 8, 2 and 15/8 bytes
    expected = {"baseline": 3008 / 0.015, "codec": 752 / 0.015, "paper": 705 / 0.015}
    assert by_env["bytes_per_second"] == pytest.approx(expected)
    ppo = memory.robot_report(Args(obs_dim=376, act_dim=17, algo="ppo"))
    assert ppo["codec"].startswith("int16 (m=1")
    assert ppo["allocated"]["codec"] == allocated_ppo(FixedPoint(1), **PPO)


def test_explicit_control_rate_wins_over_the_environments():
    assert memory.robot_report(Args(env="Humanoid-v3", control_hz=10.0))["control_hz"] == 10


def test_json_of_the_paper_parses_and_is_alone(capsys, tmp_path):
    memory.main(Args(json=True, plot=tmp_path / "f.svg"))
    report = json.loads(capsys.readouterr().out)
    assert len(report["fig2"]) == 8
    assert report["plot"].endswith("f.svg")
    assert len(report["worked_examples"]) == 3


def test_plot_writes_a_png(tmp_path, capsys):
    path = tmp_path / "fig2.png"
    memory.main(Args(plot=path))
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1500, 600)
    assert str(path) in capsys.readouterr().out


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
        (dict(obs_dim=3, act_dim=1, n_steps=5), "--n-steps belongs to --algo ppo"),
        (dict(obs_dim=3, act_dim=1, algo="ppo", buffer_size=5), "belongs to --algo sac"),
        (dict(quant_m=2), "--quant-m needs a robot"),
        (dict(env="Humanoid-v33"), "unknown --env 'Humanoid-v33'"),
        (dict(env=""), "--env"),
        (dict(plot="nowhere/fig2.png"), "there is no folder"),
        (dict(plot="fig2.xyz"), "the ending must be one of"),
        (dict(plot="fig2"), "the ending must be one of"),
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
