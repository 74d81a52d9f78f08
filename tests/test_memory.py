"""memory.py against real buffers and networks, hand arithmetic and a faked machine."""

import importlib
import math
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import memory
from buffers import ReplayBuffer, RolloutBuffer
from memory import allocated, check_fits, total
from quantize import STORAGE_DTYPES, FixedPoint, Float, Packed, make_codec
from support import networks
from support.arguments import check_ranges, flag
from support.columns import LiveColumns

CODECS = [
    *map(Float, STORAGE_DTYPES.values()),
    *(kind(m) for kind in (FixedPoint, Packed) for m in range(4)),
    Packed(2, 5),  # 10 bits
]
HUMANOID = dict(obs_dim=376, act_dim=17, hidden=64)
SAC = dict(**HUMANOID, buffer_size=1_000_000, num_envs=1, batch_size=256)
PPO = dict(**HUMANOID, n_steps=2048, num_envs=1, batch_size=64)
CPU = torch.device("cpu")


def script_args(algo, flags):
    """The Args that `sac.py` or `ppo.py` would have with these flags."""
    args = tyro.cli(importlib.import_module(algo).Args, args=flags)
    check_ranges(args)
    return args


def codec_of(args):
    return make_codec(args.quant_m, args.quant_b, args.storage, args.pack)


# ---- the allocated ledger ----


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("size", "num_envs"), [(1, 1), (7, 3), (100, 1), (101, 8), (2, 5)])
def test_buffer_rows_sum_to_nbytes(codec, size, num_envs):
    dims = dict(obs_dim=11, act_dim=3)
    common = dict(**dims, hidden=8, num_envs=num_envs, batch_size=4)
    for algo, kind in (("ppo", RolloutBuffer), ("sac", ReplayBuffer)):
        buffer = kind(codec, size, num_envs, *dims.values(), CPU, seed=0)
        ledger = allocated(algo, codec, **common, **{memory.SIZED_BY[algo]: size})
        assert ledger["buffer observations"] == buffer.obs.nbytes
        assert ledger["buffer observations"] + ledger["buffer rest"] == buffer.nbytes


def test_decoded_batch_is_that_of_real_buffers():
    sizes, codec = dict(obs_dim=3, act_dim=2, num_envs=2), FixedPoint(2)
    rollout = RolloutBuffer(codec, n_steps=6, **sizes, device=CPU, seed=0)
    replay = ReplayBuffer(codec, buffer_size=9, **sizes, device=CPU, seed=0)
    still, obs = np.zeros(2, bool), np.zeros((2, 3))
    replay.start(obs, ~still)
    replay.add(np.zeros((2, 2)), np.zeros(2), obs, still, still)
    for batch_size in (5, 64):  # a rollout smaller than a minibatch is one minibatch
        common = dict(**sizes, hidden=4, batch_size=batch_size)
        batch = next(rollout.minibatches(batch_size))
        ledger = allocated("ppo", codec, **common, n_steps=6)
        assert ledger["decoded batch"] == sum(tensor.nbytes for tensor in batch)
        ledger = allocated("sac", codec, **common, buffer_size=9)
        assert ledger["decoded batch"] == sum(t.nbytes for t in replay.sample(batch_size))


def test_humanoid_row_is_826_bytes():
    row = 376 * 2 + 17 * 4 + 4 + 1 + 1  # int16 obs; float32 action, reward; terminated, is_start
    assert row == 826
    ledger = allocated("sac", FixedPoint(2), **SAC)
    buffer = ledger["buffer observations"] + ledger["buffer rest"]
    assert buffer == 1_000_001 * row  # with the open row
    assert total(ledger) <= 830e6  # DESIGN.md section 10
    assert total(allocated("sac", Float(), **SAC)) > 3.7 * total(ledger)


def test_packed_humanoid_is_below_785_mb_and_without_constant_columns_below_565():
    ledger = allocated("sac", Packed(2), **SAC)
    assert ledger["buffer observations"] == 1_000_001 * 2 * math.ceil(376 * 15 / 16)
    assert total(ledger) <= 785e6  # DESIGN.md section 10
    dropped = allocated("sac", Packed(2), **SAC, live_columns=257)
    assert dropped["buffer observations"] == pytest.approx(1_000_001 * 482, abs=10_000)
    assert total(dropped) <= 565e6
    whole = allocated("sac", FixedPoint(2), **SAC, live_columns=257)
    assert whole["buffer observations"] == pytest.approx(1_000_001 * 514, abs=10_000)


def test_allocated_sac_by_hand():
    sizes = dict(obs_dim=3, act_dim=2, hidden=4, buffer_size=9, num_envs=1, batch_size=5)
    actor = 3 * 4 + 4 + 4 * 4 + 4 + 4 * 4 + 4
    critics = 2 * (5 * 4 + 4 + 4 * 4 + 4 + 4 * 1 + 1)
    assert allocated("sac", FixedPoint(2), **sizes) == {
        "buffer observations": 10 * 3 * 2,
        "buffer rest": 10 * (2 * 4 + 4 + 1 + 1),
        "networks": 4 * (actor + critics + 1),
        "target networks": 4 * critics,
        "gradients": 4 * (actor + critics + 1),
        "Adam moments": 2 * 4 * (actor + critics + 1),
        "decoded batch": 5 * (3 + 3 + 2 + 1) * 4 + 5,
    }


def test_allocated_ppo_by_hand():
    sizes = dict(obs_dim=3, act_dim=2, hidden=4, n_steps=6, num_envs=2, batch_size=5)
    parameters = (3 * 4 + 4 + 4 * 4 + 4) * 2 + (4 * 2 + 2) + (4 * 1 + 1) + 2
    assert allocated("ppo", FixedPoint(0), **sizes) == {
        "buffer observations": 12 * 3,
        "buffer rest": 12 * (2 * 4 + 5 * 4 + 1),
        "rollout noise": 2 * 12 * 2 * 4,
        "networks": 4 * parameters,
        "gradients": 4 * parameters,
        "Adam moments": 2 * 4 * parameters,
        "decoded batch": 5 * (3 + 2 + 3) * 4,
    }


@pytest.mark.parametrize(
    ("dims", "ppo", "with_targets"),
    [  # PAPER.md
        ((17, 6, 64), 11_085, 29_136),
        ((111, 8, 64), 23_249, 59_988),
        ((376, 17, 64), 57_763, 148_262),
        ((376, 17, 256), None, 838_694),
    ],
)
def test_networks_have_the_papers_parameters(dims, ppo, with_targets):
    sac = memory.learning("sac", *dims)
    assert sac["networks"] + sac["target networks"] == 4 * (with_targets + 1)  # and log_alpha
    if ppo:
        assert memory.learning("ppo", *dims)["networks"] == 4 * ppo


def test_a_change_of_the_networks_is_in_the_ledger_by_itself(monkeypatch):
    class Normed(networks.ActorCritic):
        def __init__(self, obs_dim, act_dim, hidden):
            super().__init__(obs_dim, act_dim, 3 * hidden)
            self.norm = torch.nn.LayerNorm(obs_dim)

    before = allocated("sac", FixedPoint(2), **SAC)
    monkeypatch.setattr(memory, "learning", memory.learning.__wrapped__)  # without its cache
    monkeypatch.setattr(networks, "Critic", partial(networks.Critic, count=3))
    monkeypatch.setattr(networks, "ActorCritic", Normed)
    after = allocated("sac", FixedPoint(2), **SAC)
    one = before["target networks"] // 2
    added = {row: after[row] - before[row] for row in after if after[row] != before[row]}
    assert added == {
        "networks": one,
        "target networks": one,
        "gradients": one,
        "Adam moments": 2 * one,
    }
    policy = 376 * 192 + 192 + 192 * 192 + 192 + 192 * 17 + 17 + 17 + 2 * 376
    value_function = 376 * 192 + 192 + 192 * 192 + 192 + 192 + 1
    assert memory.learning("ppo", 376, 17, 64)["networks"] == 4 * (policy + value_function)


def test_sizes_beyond_64_bits_are_one_line():
    for huge in ({"hidden": 10**12}, {"obs_dim": 10**8, "buffer_size": 10**12}):
        with pytest.raises(ValueError, match="more than 9 EB of memory; lower --hid") as caught:
            memory.plan("sac", Float(), CPU, **{**SAC, **huge})
        assert "\n" not in str(caught.value)


def test_a_plan_loads_nothing_slow():
    code = (
        "import sys, torch, memory; from quantize import Float; cpu = torch.device('cpu');"
        "sizes = dict(obs_dim=3, act_dim=1, hidden=8, num_envs=1, batch_size=4);"
        "memory.plan('sac', Float(), cpu, **sizes, buffer_size=9);"
        "memory.plan('sac', Float(), cpu, **sizes, buffer_size=9, drop_constant=True);"
        "memory.plan('ppo', Float(), cpu, **sizes, n_steps=9);"
        "sys.exit('torch._dynamo' in sys.modules)"  # 2 s, which torch.arange on meta takes
    )
    root = Path(memory.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# ---- with --drop-constant ----


def bytes_while_columns_change(codec, size, num_envs, first_change, watched):
    """Fill a buffer in which column i first changes in step first_change[i], or never if None.

    Returns:
        live and late columns, buffer.obs.nbytes and buffer.nbytes at first and after every step.
    """
    n, watched_until = len(first_change), None
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
            if not buffer.obs.watching and watched_until is None:
                watched_until = step
            obs_bytes.append(buffer.obs.nbytes)
            all_bytes.append(buffer.nbytes)
    early = watched_until or math.inf
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
        ledger = allocated("sac", codec, **sizes, live_columns=live, late_columns=late)
    assert max(obs_bytes) <= ledger["buffer observations"]
    assert max(all_bytes) <= ledger["buffer observations"] + ledger["buffer rest"]
    odd_bytes = codec.bits_per_value == 8 and isinstance(
        codec, Packed
    )  # rows of whole 16-bit words
    if not odd_bytes:  # a ring that is watched for ever may take a byte less a row
        assert max(obs_bytes) == ledger["buffer observations"]
        assert max(all_bytes) == ledger["buffer observations"] + ledger["buffer rest"]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_most_that_dropping_can_take(codec, n, monkeypatch):
    monkeypatch.setattr(LiveColumns, "WATCHED", 2)
    sizes = dict(obs_dim=n, act_dim=2, hidden=4, num_envs=2, buffer_size=50, batch_size=4)
    at_most = max(
        total(allocated("sac", codec, **sizes, live_columns=k, late_columns=j))
        for k in range(n + 1)
        for j in range(n + 1 - k)
    )
    for free, warned in ((at_most, False), (at_most - 1, True)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        line = memory.plan("sac", codec, CPU, drop_constant=True, **sizes)
        assert f"= {memory.mb(at_most)} MB; float64" in line
        assert ("and only" in line) == warned


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_buffer_without_constant_columns_by_hand(codec):
    first_change = [None, 1, 2, 3, None, 40, 2, None, None, None, None]
    live, late, obs_bytes, _ = bytes_while_columns_change(codec, 101, 2, first_change, watched=20)
    assert (live, late) == (4, 1)
    rows, size = 2 * (51 + 1), codec.dtype.itemsize
    row = 2 * math.ceil(4 * codec.bits_per_value / 16) if isinstance(codec, Packed) else 4 * size
    sizes = dict(obs_dim=11, act_dim=2, hidden=4, num_envs=2, buffer_size=101, batch_size=4)
    without = allocated("sac", codec, **sizes)
    small = obs_bytes[0] - 20 * 11 * size  # beside the watched rows
    assert obs_bytes[-1] == rows * (row + size) + small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", 20)
        ledger = allocated("sac", codec, **sizes, live_columns=4, late_columns=1)
    assert ledger == without | {"buffer observations": obs_bytes[-1]}


# ---- refusing what cannot fit ----


def options(message, codec, knob, asked):
    """What a refusal suggests: codec and size of each option, read as the script would read it."""
    algo = "sac" if knob == "buffer_size" else "ppo"
    found = []
    for option in message.split("; what fits: ")[1].split(", or "):
        flags, _, replaced = option.partition(" in place of ")
        args = script_args(algo, flags.split())
        assert (replaced == codec.name) == ("--quant-m" in flags)
        given = codec_of(args) if replaced else codec
        found.append((given, getattr(args, knob) if flag(knob) in flags else asked))
    return found


@pytest.mark.parametrize(
    ("algo", "sizes", "knob"),
    [
        ("sac", SAC, "buffer_size"),
        ("sac", {**SAC, "num_envs": 7}, "buffer_size"),
        ("ppo", {**PPO, "n_steps": 10**6}, "n_steps"),
        ("ppo", {**PPO, "n_steps": 10**6, "num_envs": 3}, "n_steps"),
    ],
)
@pytest.mark.parametrize(
    "codec",
    [Float(), Float(torch.float16), FixedPoint(2), FixedPoint(3), FixedPoint(1, 10_000), Packed(3)],
    ids=lambda codec: codec.name,
)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_suggested_sizes_are_the_largest_that_fit(algo, sizes, knob, codec, share):
    free = int(total(allocated(algo, codec, **sizes)) * share)
    with pytest.raises(ValueError, match="what fits") as caught:
        check_fits(algo, codec, free=free, **sizes)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{memory.mb(free)} MB are free" in message
    found = options(message, codec, knob, sizes[knob])
    assert found[0][0] is codec
    assert [n for _, n in found] == sorted({n for _, n in found})  # each holds more
    for choice, n in found:
        check_fits(algo, choice, free=free, **{**sizes, knob: n})
        assert total(allocated(algo, choice, **{**sizes, knob: n})) <= free
        if n < sizes[knob]:
            assert total(allocated(algo, choice, **{**sizes, knob: n + 1})) > free


def test_fits_exactly_and_not_by_one_byte():
    needed = total(allocated("sac", Packed(2), **SAC))
    check_fits("sac", Packed(2), free=needed, **SAC)
    with pytest.raises(ValueError, match=r"what fits: --buffer-size 999999$"):
        check_fits("sac", Packed(2), free=needed - 1, **SAC)
    free = total(allocated("sac", Packed(2), **{**SAC, "buffer_size": 600_000}))
    with pytest.raises(ValueError, match=r"--buffer-size 600000$"):  # it fills free to the byte
        check_fits("sac", Packed(2), free=free, **SAC)


def test_suggests_packing_and_fixed_point_at_full_and_at_reduced_size():
    def suggestion(algo, codec, free, sizes):
        with pytest.raises(ValueError, match="what fits") as caught:
            check_fits(algo, codec, free=free, **sizes)
        return str(caught.value).partition(", or ")[2]

    assert suggestion("sac", Float(), 10**9, SAC) == "--quant-m 2 in place of float64"
    sizes = (
        r"--quant-m 2 --buffer-size \d+ in place of float64, or --quant-m 2 --pack --buffer-size"
    )
    assert re.match(sizes, suggestion("sac", Float(), 10**8, SAC))
    packed = "--quant-m 2 --pack in place of int16 (m=2, b=127)"
    assert suggestion("sac", FixedPoint(2), 800_000_000, SAC) == packed
    huge = {**PPO, "n_steps": 10**6}
    found = suggestion("ppo", FixedPoint(2, 10_000), 10**8, huge)
    assert "--quant-m 1 --quant-b 127 --n-steps" in found  # the bound that was given is too wide
    assert "--quant-m 2 --quant-b 10000 --pack --n-steps" in found


def test_nothing_fits():
    with pytest.raises(ValueError, match="not even --buffer-size 1 fits"):
        check_fits("sac", Float(), free=1000, **SAC)
    with pytest.raises(ValueError, match="not even --n-steps 1 fits"):
        check_fits("ppo", Float(), free=0, **PPO)


def test_footprint_is_one_line_with_both_totals():
    ledger, baseline = allocated("sac", FixedPoint(2), **SAC), allocated("sac", Float(), **SAC)
    line = memory.footprint(ledger, baseline)
    assert "\n" not in line
    assert (
        f"= {total(ledger) / 1e6:.1f} MB; float64 baseline {total(baseline) / 1e6:,.1f} MB" in line
    )
    assert line.endswith("3.7x as much")
    assert memory.footprint(baseline, baseline).endswith("this is the float64 baseline")


def test_plan_checks_and_tells(monkeypatch):
    for algo, sizes in (("sac", SAC), ("ppo", PPO)):
        monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
        codec = FixedPoint(2)
        expected = memory.footprint(
            allocated(algo, codec, **sizes), allocated(algo, Float(), **sizes)
        )
        assert memory.plan(algo, codec, CPU, **sizes) == expected
        monkeypatch.setattr(memory, "free_memory", lambda device: 2_600_000)
        with pytest.raises(ValueError, match="MB are free; what fits"):
            memory.plan(algo, codec, CPU, **sizes)


def test_plan_with_dropped_columns_refuses_only_what_cannot_fit(monkeypatch):
    codec = FixedPoint(2)
    bound = total(allocated("sac", codec, **SAC, live_columns=0, late_columns=376))
    least = total(allocated("sac", codec, **SAC, live_columns=0))
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


def test_columns_found_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 4_000_000_000)
    line = memory.columns_found(556_000_000, np.arange(376) < 257, CPU)
    assert "257 of 376 columns" in line
    assert "556.0 MB, 4,000.0 MB are free" in line
    assert "\n" not in line


# ---- budgets ----


def test_buffer_size_is_the_argument_or_what_the_budget_holds(monkeypatch):
    codec, sizes = FixedPoint(2), {name: n for name, n in SAC.items() if name != "buffer_size"}
    monkeypatch.setattr(memory, "free_memory", lambda device: 800_000_000)

    def rows(memory_budget):
        args = types.SimpleNamespace(buffer_size=77, memory_budget=memory_budget)
        return memory.buffer_size(args, codec, CPU, **sizes)

    assert rows(None) == 77
    assert rows("750MB") == memory.largest("sac", codec, 750_000_000, **sizes)
    for budget, message in (
        ("1GB", "--memory-budget 1GB is more than the 800.0 MB of memory that are free"),
        ("1MB", "a budget of 1,000,000 bytes holds no batch"),
        ("much", "'much' is no amount of memory"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            rows(budget)
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
    knob, ledger = memory.SIZED_BY[algo], partial(allocated, algo)
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
