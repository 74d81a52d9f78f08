"""memory.py against the paper's figures, real buffers, hand arithmetic and a faked machine."""

import json
import math
import re
import resource
import subprocess
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
import memory
import ppo
import sac
from buffers import ReplayBuffer, RolloutBuffer
from columns import LiveColumns
from memory import Args, allocated_ppo, allocated_sac, check_fits, paper_ledger
from quantize import STORAGE_DTYPES, FixedPoint, Float, Packed, make_codec

CODECS = [
    *map(Float, STORAGE_DTYPES.values()),
    *(kind(m) for kind in (FixedPoint, Packed) for m in range(4)),
    Packed(2, 5),  # 10 bits
]
HUMANOID = dict(obs_dim=376, act_dim=17, hidden=64)
SCRIPTS = {"ppo": ppo, "sac": sac}
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
        "Adam moments": 2 * 4 * (actor + critics + 1),
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
        "Adam moments": 2 * 4 * parameters,
        "decoded batch": 5 * (3 + 2 + 3) * 4,
    }
    # A rollout smaller than a minibatch is one minibatch.
    small = allocated_ppo(FixedPoint(0), **sizes, batch_size=64)
    assert small["decoded batch"] == 12 * (3 + 2 + 3) * 4


def test_packed_humanoid_is_below_785_mb():
    ledger = allocated_sac(Packed(2), **SAC)
    assert ledger["buffer observations"] == 1_000_001 * 2 * math.ceil(376 * 15 / 16)
    assert total(ledger) <= 785e6  # DESIGN.md section 9


# ---- the allocated ledger with --drop-constant ----


def bytes_while_columns_change(codec, size, num_envs, first_change, watched):
    """Fill a buffer in which column i first changes in step first_change[i], or never if None.

    Returns:
        live and late columns, buffer.obs.nbytes and buffer.nbytes at first and after every step.
    """
    n, settled_at = len(first_change), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", watched)
        buffer = ReplayBuffer(codec, size, num_envs, n, 2, CPU, seed=0, drop_constant=True)
        still = np.zeros(num_envs, bool)
        buffer.start(np.zeros((num_envs, n)), ~still)
        obs_bytes, all_bytes = [buffer.obs.nbytes], [buffer.nbytes]
        for step in range(1, watched + max(filter(None, first_change), default=0) + 2):
            obs = [float(first is not None and step >= first) for first in first_change]
            obs = np.tile(obs, (num_envs, 1))
            buffer.add(np.zeros((num_envs, 2)), np.zeros(num_envs), obs, still, still)
            if buffer.obs.settled and settled_at is None:
                settled_at = step
            obs_bytes.append(buffer.obs.nbytes)
            all_bytes.append(buffer.nbytes)
    early = settled_at or math.inf
    live = sum(first is not None and first < early for first in first_change)
    late = sum(first is not None and first >= early for first in first_change)
    return live, late, obs_bytes, all_bytes


@settings(deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    size=st.integers(1, 60),
    num_envs=st.integers(1, 3),
    first_change=st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=9),
    watched=st.integers(1, 20),
)
def test_ledger_of_live_and_late_columns_is_the_most_that_the_buffer_takes(
    codec, size, num_envs, first_change, watched
):
    live, late, obs_bytes, all_bytes = bytes_while_columns_change(
        codec, size, num_envs, first_change, watched
    )
    sizes = dict(obs_dim=len(first_change), act_dim=2, hidden=4, num_envs=num_envs)
    sizes |= dict(buffer_size=size, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", watched)
        ledger = allocated_sac(codec, **sizes, live_columns=live, late_columns=late)
        bound = memory.dropping_at_most(codec, **sizes)
        assert total(bound) == max(
            total(allocated_sac(codec, **sizes, live_columns=k, late_columns=j))
            for k in range(len(first_change) + 1)
            for j in range(len(first_change) + 1 - k)
        )
    assert max(obs_bytes) <= ledger["buffer observations"]
    assert max(all_bytes) <= ledger["buffer observations"] + ledger["buffer rest"]
    assert max(all_bytes) <= bound["buffer observations"] + bound["buffer rest"]
    odd_bytes = codec.bits == 8 and isinstance(codec, Packed)  # rows of whole 16-bit words
    if not odd_bytes:  # a ring that is watched for ever may take a byte less a row
        assert max(obs_bytes) == ledger["buffer observations"]
        assert max(all_bytes) == ledger["buffer observations"] + ledger["buffer rest"]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_settled_buffer_by_hand(codec):
    first_change = [None, 1, 2, 3, None, 40, 2, None, None, None, None]
    live, late, obs_bytes, _ = bytes_while_columns_change(codec, 101, 2, first_change, watched=20)
    assert (live, late) == (4, 1)
    rows, size = 2 * (51 + 1), codec.dtype.itemsize
    row = 2 * math.ceil(4 * codec.bits / 16) if isinstance(codec, Packed) else 4 * size
    sizes = dict(obs_dim=11, act_dim=2, hidden=4, num_envs=2, buffer_size=101, batch_size=4)
    without = allocated_sac(codec, **sizes)
    small = obs_bytes[0] - 20 * 11 * size  # beside the watched rows
    assert obs_bytes[-1] == rows * (row + size) + small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", 20)
        ledger = allocated_sac(codec, **sizes, live_columns=4, late_columns=1)
    assert ledger == without | {"buffer observations": obs_bytes[-1]}


def test_humanoid_without_its_constant_columns():
    ledger = allocated_sac(FixedPoint(2), **SAC, live_columns=257)
    assert ledger["buffer observations"] == pytest.approx(1_000_001 * 514, abs=10_000)
    packed = allocated_sac(Packed(2), **SAC, live_columns=257)
    assert packed["buffer observations"] == pytest.approx(1_000_001 * 482, abs=10_000)


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


def options(message, codec, knob, asked):
    """What a refusal suggests: codec and size of each option, read as the script would read it."""
    script = sac if knob == "buffer_size" else ppo
    found = []
    for option in message.split("; what fits: ")[1].split(", or "):
        flags, _, replaced = option.partition(" in place of ")
        args = tyro.cli(script.Args, args=flags.split())
        assert (replaced == codec.name) == ("--quant-m" in flags)
        given = make_codec(args.quant_m, args.quant_b, None, args.pack) if replaced else codec
        found.append((given, getattr(args, knob) if memory._flag(knob) in flags else asked))
    return found


@pytest.mark.parametrize(
    ("allocated", "sizes", "knob"),
    [
        (allocated_sac, SAC, "buffer_size"),
        (allocated_sac, {**SAC, "num_envs": 7}, "buffer_size"),
        (allocated_ppo, {**PPO, "n_steps": 10**6}, "n_steps"),
        (allocated_ppo, {**PPO, "n_steps": 10**6, "num_envs": 3}, "n_steps"),
    ],
)
@pytest.mark.parametrize(
    "codec",
    [Float(), Float(torch.float16), FixedPoint(2), FixedPoint(3), FixedPoint(1, 10_000), Packed(3)],
    ids=lambda codec: codec.name,
)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_suggested_sizes_are_the_largest_that_fit(allocated, sizes, knob, codec, share):
    free = int(total(allocated(codec, **sizes)) * share)
    with pytest.raises(ValueError, match="what fits") as caught:
        check_fits(allocated, codec, free=free, **sizes)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{memory.mb(free)} MB are free" in message
    found = options(message, codec, knob, sizes[knob])
    assert found[0][0] is codec
    assert [n for _, n in found] == sorted({n for _, n in found})  # each holds more
    for choice, n in found:
        check_fits(allocated, choice, free=free, **{**sizes, knob: n})
        assert total(allocated(choice, **{**sizes, knob: n})) <= free
        if n < sizes[knob]:
            assert total(allocated(choice, **{**sizes, knob: n + 1})) > free


def test_fits_exactly_and_not_by_one_byte():
    needed = total(allocated_sac(Packed(2), **SAC))
    check_fits(allocated_sac, Packed(2), free=needed, **SAC)
    with pytest.raises(ValueError, match=r"what fits: --buffer-size 999999$"):
        check_fits(allocated_sac, Packed(2), free=needed - 1, **SAC)
    free = total(allocated_sac(Packed(2), **{**SAC, "buffer_size": 600_000}))
    with pytest.raises(ValueError, match=r"--buffer-size 600000$"):  # it fills free to the byte
        check_fits(allocated_sac, Packed(2), free=free, **SAC)


def test_suggests_packing_and_fixed_point_at_full_and_at_reduced_size():
    def suggestion(allocated, codec, free, sizes):
        with pytest.raises(ValueError, match="what fits") as caught:
            check_fits(allocated, codec, free=free, **sizes)
        return str(caught.value).partition(", or ")[2]

    assert suggestion(allocated_sac, Float(), 10**9, SAC) == "--quant-m 2 in place of float64"
    sizes = (
        r"--quant-m 2 --buffer-size \d+ in place of float64, or --quant-m 2 --pack --buffer-size"
    )
    assert re.match(sizes, suggestion(allocated_sac, Float(), 10**8, SAC))
    packed = "--quant-m 2 --pack in place of int16 (m=2, b=127)"
    assert suggestion(allocated_sac, FixedPoint(2), 800_000_000, SAC) == packed
    huge = {**PPO, "n_steps": 10**6}
    found = suggestion(allocated_ppo, FixedPoint(2, 10_000), 10**8, huge)
    assert "--quant-m 1 --quant-b 127 --n-steps" in found  # the bound that was given is too wide
    assert "--quant-m 2 --quant-b 10000 --pack --n-steps" in found


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


def test_plan_with_dropped_columns_refuses_only_what_cannot_fit(monkeypatch):
    codec = FixedPoint(2)
    bound = total(memory.dropping_at_most(codec, **SAC))
    least = total(allocated_sac(codec, **SAC, live_columns=0))
    assert 70e6 < least < 80e6 < 828e6 < bound < 830e6

    def plan(free):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        line = memory.plan("sac", codec, CPU, drop_constant=True, **SAC)
        assert "\n" not in line
        return line

    assert "= 828.5 MB; float64" in plan(bound)
    assert plan(bound).endswith("; with --drop-constant that is the most it can take")
    for free in (bound - 1, least):
        assert plan(free).endswith(f"it can take, and only {memory.mb(free)} MB are free")
    refusal = "even if no column ever changes this run needs 77.2 MB of memory, and 77.2 MB are"
    with pytest.raises(ValueError, match=refusal):
        plan(least - 1)


def test_settled_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 4_000_000_000)
    line = memory.settled(556_000_000, np.arange(376) < 257, CPU)
    assert "257 of 376 columns" in line
    assert "556.0 MB, 4,000.0 MB are free" in line
    assert "\n" not in line


def test_resident_grows_with_what_is_written():
    before = memory.resident()
    kept = np.ones(40_000_000, np.uint8)
    assert 35e6 < memory.resident() - before < 60e6
    del kept


# ---- budgets ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("750MB", 750_000_000),
        ("1.2GB", 1_200_000_000),
        ("1.001kB", 1001),  # 1000.9999999999999 in floating point
        ("700MiB", 700 * 2**20),
        ("0.5 GiB", 2**29),
        (" 2 tb ", 2 * 10**12),
        ("3kB", 3000),
        (".5kib", 512),
        ("12B", 12),
        ("123456", 123_456),
    ],
)
def test_parse_bytes(text, expected):
    assert memory.parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "MB", ".", "nan", "inf", "-1", "-750MB", "0", "0MB", "0.4", "1e9", "7.5.0MB", "5iB"),
        *("750 M B", "750MBs", "750M", "1,000", "0x10", "1_000", "1\n2", "\u0667MB", "9" * 99),
    ],
)
def test_parse_bytes_refuses_in_one_line(text):
    with pytest.raises(ValueError, match=r"no amount of memory; 750MB.*700MiB") as caught:
        memory.parse_bytes(text)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    algo=st.sampled_from(["ppo", "sac"]),
    codec=st.sampled_from(CODECS),
    live=st.none() | st.integers(0, 40),
    obs_dim=st.integers(40, 400),
    num_envs=st.integers(1, 9),
    batch_size=st.integers(1, 3000),
    budget=st.integers(1, 10**8) | st.integers(10**8, 10**13),
)
def test_largest_is_the_largest_within_the_budget(
    algo, codec, live, obs_dim, num_envs, batch_size, budget
):
    sizes = dict(obs_dim=obs_dim, act_dim=3, hidden=8, num_envs=num_envs, batch_size=batch_size)
    if algo == "sac" and live is not None:
        sizes["live_columns"] = live
    knob, ledger = memory.KNOB[algo], memory.LEDGERS[algo]
    if budget < (least := least_budget(algo, codec, budget, sizes)):
        budget = least
        with pytest.raises(ValueError, match="the least is"):
            memory.largest(algo, codec, budget - 1, **sizes)
    n = memory.largest(algo, codec, budget, **sizes)
    assert n * (num_envs if algo == "ppo" else 1) >= batch_size
    assert total(ledger(codec, **sizes, **{knob: n})) <= budget
    assert n == 10**12 or total(ledger(codec, **sizes, **{knob: n + 1})) > budget


def least_budget(algo, codec, budget, sizes):
    """0 if the budget is enough, else what the refusal says would be."""
    try:
        memory.largest(algo, codec, budget, **sizes)
    except ValueError as error:
        assert "\n" not in str(error)
        return int(re.search(r"the least is (\d+) bytes", str(error))[1])
    return 0


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
    report = memory.budget_report(args)
    script, knob = SCRIPTS[args.algo], memory.KNOB[args.algo]
    obs_dim, act_dim, budget = report["obs_dim"], report["act_dim"], report["budget"]
    seen = set()
    for row in report["rows"]:
        if row["command"] == "does not fit":
            assert row[knob] == 0
            continue
        python, name, *flags = row["command"].split()
        assert (python, name) == ("python", f"{args.algo}.py")
        assert flags[:2] == ["--env", args.env or "YOUR-ENV"]
        run = tyro.cli(script.Args, args=flags)
        script.check(run)
        codec = make_codec(run.quant_m, run.quant_b, run.storage, run.pack)
        assert (codec.name, codec.bits) == (row["storage"], row["bits"])
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
        assert total(memory.LEDGERS[args.algo](codec, **sizes, **{knob: n})) <= budget
        assert total(memory.LEDGERS[args.algo](codec, **sizes, **{knob: n + 1})) > budget
        seen.add((codec.name, row["columns"]))
    assert len(seen) == sum(row[knob] > 0 for row in report["rows"])
    memory.main(args)
    out = capsys.readouterr().out
    assert all(row["command"] in out and row["storage"] in out for row in report["rows"])
    assert "libraries\ncome on top" in out
    assert ("does not fit" in out) == any(row[knob] == 0 for row in report["rows"])
    assert ("--drop-constant: if" in out) == (args.live_columns is not None)


def test_budget_tries_every_storage_once():
    def names(**given):
        report = memory.budget_report(Args(obs_dim=376, act_dim=17, budget="750MB", **given))
        return [(row["storage"], row["columns"]) for row in report["rows"]]

    floats = [(name, 376) for name in STORAGE_DTYPES]
    fixed = ["int8 (m=0, b=127)", "int16 (m=1, b=127)", "packed 12-bit (m=1, b=127)"]
    fixed += ["int16 (m=2, b=127)", "packed 15-bit (m=2, b=127)"]
    fixed += ["int32 (m=3, b=127)", "packed 18-bit (m=3, b=127)"]
    assert names() == floats + [(name, 376) for name in fixed]
    assert names(live_columns=9) == floats + [(name, n) for name in fixed for n in (376, 9)]
    wide = ["int32 (m=0, b=1e+07)", "packed 25-bit (m=0, b=1e+07)"]  # no decimal in a float32
    assert [name for name, _ in names(quant_b=1e7)] == [*STORAGE_DTYPES, *wide]


# ---- other libraries' buffers ----


def test_layouts_are_those_of_peers_md(capsys):
    args = Args(env="Humanoid-v3", layouts=True, live_columns=257)
    rows = memory.layouts_report(args)["rows"]
    megabytes = [6016, 3008, 3008, 1504, 3008, 752, 752, 706, 514, 482]
    assert [row["bytes per observation"] for row in rows] == megabytes
    assert [row["observations"] / 1e6 for row in rows] == pytest.approx(megabytes, abs=0.01)
    assert [row["rest"] / 1e6 for row in rows] == pytest.approx([80] * 4 + [74] * 6, abs=0.01)
    assert [row["total"] for row in rows] == [row["observations"] + row["rest"] for row in rows]
    assert [row["times less"] for row in rows][3:8:4] == pytest.approx(
        [6096 / 1584, 7.815], abs=0.01
    )
    ledger = allocated_sac(Packed(2), **SAC, live_columns=257)
    assert rows[-1]["total"] == ledger["buffer observations"] + ledger["buffer rest"]
    memory.main(args)
    out = capsys.readouterr().out
    assert all(row["layout"] in out and memory.mb(row["total"]) in out for row in rows)
    assert "7.38x" in out
    args.json = True
    memory.main(args)
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_layouts_of_any_robot():
    report = memory.layouts_report(Args(obs_dim=5, act_dim=1, layouts=True, buffer_size=100))
    first, *_, last = report["rows"]
    assert first["total"] == 100 * (2 * 5 * 8 + 4 * (1 + 3))
    assert last["total"] == 101 * (2 * math.ceil(5 * 15 / 16) + 4 + 4 + 2) + 24


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
        args = tyro.cli(SCRIPTS[script].Args, args=command[2:])
        SCRIPTS[script].check(args)
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
    measured = memory.measure("Humanoid-v3", "sac", codec, **sizes)
    for args, n in zip(children.args, (1000, 1_000_000), strict=True):
        assert make_codec(args.quant_m, args.quant_b, args.storage, args.pack).name == codec.name
        assert (args.env, args.device, args.eval_episodes) == ("Humanoid-v3", "cpu", 0)
        assert (args.hidden, args.num_envs, args.batch_size) == (64, 7, 1000)
        assert args.learning_starts < args.total_timesteps < 2000
        allocated = total(allocated_sac(codec, **{**sizes, "buffer_size": n}))
        assert int(args.memory_budget) == allocated
        del sizes["buffer_size"]
        assert memory.largest("sac", codec, allocated, **sizes) >= n  # rounded up to whole rings
        sizes["buffer_size"] = 1_000_000
    resident = 300_000_000 + allocated
    assert measured == dict(
        resident=resident, peak=resident + 7, interpreter=300_000_000, total=allocated
    )
    assert not Path(args.run_dir).exists()


def test_measure_runs_one_whole_rollout_of_ppo(children, capsys):
    sizes = {**PPO, "num_envs": 3, "n_steps": 500}
    memory.measure("Walker2d-v3", "ppo", Float(torch.float16), **sizes)
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
    allocated, paper = report["allocated"]["codec"], report["paper"]["codec"]
    differences = report["allocated_minus_paper"]
    assert sum(d["bytes"] for d in differences.values()) == total(allocated) - total(paper)
    assert all(row in text and d["why"] in text for row, d in differences.items())
    for ledger in (allocated, paper, *(report[k]["baseline"] for k in ("allocated", "paper"))):
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
    assert by_env["allocated"]["codec"] == allocated_sac(FixedPoint(2), **SAC)
    assert by_dims["bytes_per_second"] is None
    # 0.015 s per step: 376 values of 8, 2 and 15/8 bytes
    expected = {"baseline": 3008 / 0.015, "codec": 752 / 0.015, "paper": 705 / 0.015}
    assert by_env["bytes_per_second"] == pytest.approx(expected)
    by_ppo = memory.robot_report(Args(obs_dim=376, act_dim=17, algo="ppo"))
    assert by_ppo["codec"].startswith("int16 (m=1")
    assert by_ppo["allocated"]["codec"] == allocated_ppo(FixedPoint(1), **PPO)
    packed = memory.robot_report(Args(env="Humanoid-v3", pack=True))
    assert packed["allocated"]["codec"] == allocated_sac(Packed(2), **SAC)
    assert packed["bytes_per_second"]["codec"] == pytest.approx(706 / 0.015)
    live = memory.robot_report(Args(obs_dim=376, act_dim=17, live_columns=200))
    assert live["allocated"]["codec"] == allocated_sac(FixedPoint(2), **SAC, live_columns=200)
    assert live["allocated"]["baseline"] == by_dims["allocated"]["baseline"]


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
        (dict(env="Humanoid-v3", measure=True, live_columns=9), "depend on the data"),
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
