"""support/columns.py: what is stored column by column reads as if every row were stored whole."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings

from buffers import ReplayBuffer
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed
from support.columns import LiveColumns, Rows, columns_of

ROOT = Path(__file__).parent.parent

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CODECS = [
    *map(FixedPoint, (0, 2, 3)),
    *map(Packed, (0, 1, 2, 3)),
    *map(Float, STORAGE_DTYPES.values()),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
PALETTE = [0.0, -0.0, 1.0, -1.0, 127.0, -127.0, 0.25, -64.0]  # as floats, the zeros differ in a bit


class Both:
    """`LiveColumns` and, told the same, `Rows` and a plain account of what has changed when."""

    def __init__(
        self, codec: Codec, num_envs: int, ring: int, n: int, watched: int, device: str = "cpu"
    ):
        self.codec, self.num_envs, self.ring, self.n = codec, num_envs, ring, n
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LiveColumns, "WATCHED", watched)
            self.live = LiveColumns(codec, num_envs, ring, n, torch.device(device))
        self.plain = Rows(codec, num_envs, ring, n, torch.device(device))
        self.watched = min(ring, -(-watched // num_envs))
        self.written: set[int] = set()
        self.first: list[bytes] | None = None  # codes of the first row
        self.changed: set[int] = set()
        self.first_block: int | None = None  # its number of columns, once the watch is over

    def put(self, rows: list[int], obs: list[list[float]]) -> None:
        codes = self.codec.encode(np.array(obs, np.float64).reshape(len(rows), self.n))
        if self.first_block is None and any(row % self.ring >= self.watched for row in rows):
            self.first_block = len(self.changed)
        values = [[bytes(code) for code in row] for row in codes.view(torch.uint8).numpy().reshape(
            len(rows), self.n, -1)]  # fmt: skip
        self.first = self.first or values[0]
        self.changed |= {i for row in values for i in range(self.n) if row[i] != self.first[i]}
        for kept in (self.plain, self.live):
            kept.put(np.array(rows), codes)
        self.written |= set(rows)

    def check(self) -> None:
        rows = np.array(sorted(self.written))
        rows = np.append(rows[::-1], rows[0])  # in another order, and one row twice
        assert_same_bits(self.live.get(rows), self.plain.get(rows))
        assert set(np.flatnonzero(self.live.live).tolist()) == self.changed
        assert self.live.watching == (self.first_block is None)
        assert self.live.nbytes == self.expected_nbytes()

    def expected_nbytes(self) -> int:
        size = self.codec.dtype.itemsize
        per_column = size + 1 + 8 + 8  # its constant, whether it is live, its rank, twice
        if self.first_block is None:
            rows, row = self.num_envs * self.watched, self.n * size
        else:
            rows, (width, dtype) = self.num_envs * self.ring, self.codec.row(self.first_block)
            row = width * dtype.itemsize + (len(self.changed) - self.first_block) * size
        return rows * row + self.n * per_column


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal float32 patterns, so 0.0 is not -0.0."""
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


# Whatever changes, and whenever


@pytest.mark.parametrize(("codec", "num_envs"), [(FixedPoint(2), 1), (Packed(2), 3)])
@pytest.mark.parametrize("first", range(1, 22))
def test_columns_that_change_at_any_two_moments(codec, num_envs, first):
    """In a watch of 4 rows a ring, at its end, right after, while rings of 9 fill and wrap twice.

    Column 0 never rests, 1 never changes. 2 and 3 change at a moment each and go back at once, 4
    stays changed from the second on, and 5 changes at both; always in the last ring only.
    """
    for second in range(1, 22):
        both = Both(codec, num_envs, ring=9, n=6, watched=4 * num_envs)
        for t in range(23):
            one, two, three = t == first, t == second, t >= second
            obs = [[t, 5, 0, 7, 2, 0]] * (num_envs - 1)
            obs.append([t, 5, one, 7 - two, 2 - three, one + 3 * two])
            both.put([env * 9 + t % 9 for env in range(num_envs)], obs)
            if t in (first, second, 22):
                both.check()


@st.composite
def runs(draw, codec: Codec):
    """Sizes and puts for `Both`: rings that fill in any order, columns that change at any time."""
    sizes = {
        "num_envs": draw(st.sampled_from([1, 3])),
        "ring": draw(st.integers(3, 9)),
        "n": draw(st.integers(1, 24)),
        "watched": draw(st.integers(1, 12)),
    }
    n = sizes["n"]
    value = st.sampled_from(PALETTE)
    first = draw(st.lists(value, min_size=n, max_size=n))
    restless = draw(st.sets(st.integers(0, n - 1)) | st.just(set(range(n))))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    heads, puts = np.zeros(sizes["num_envs"], int), []
    for _ in range(draw(st.integers(1, 30))):
        envs = draw(st.sets(st.integers(0, len(heads) - 1), min_size=1))
        rows, obs = [], []
        for env in sorted(envs):
            rows.append(int(env * sizes["ring"] + heads[env]))
            row = list(first)
            for column in restless:
                row[column] = PALETTE[rng.integers(len(PALETTE))]
            for column, to in draw(
                st.dictionaries(st.integers(0, n - 1), value, max_size=2)
            ).items():
                row[column] = to
            obs.append(row)
            ahead = draw(st.sampled_from([1, 1, 1, 1, 2, 0, 5]))
            heads[env] = (heads[env] + ahead) % sizes["ring"]
        puts.append((rows, obs))
    return sizes, puts


@every_codec
@settings(max_examples=25)
@given(data=st.data())
def test_equals_whole_rows_after_every_put(codec, data):
    sizes, puts = data.draw(runs(codec))
    both = Both(codec, **sizes)
    for rows, obs in puts:
        both.put(rows, obs)
        both.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", [FixedPoint(2), Packed(2), Float()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_equals_whole_rows_at_the_size_of_a_run(codec, num_envs, device):
    """With the true watch and a step's worth of rows in each put, twice round."""
    rng, n = np.random.default_rng(0), 40
    both = Both(codec, num_envs, ring=1500, n=n, watched=LiveColumns.WATCHED, device=device)
    steps = 3001
    obs = np.full((steps, num_envs, n), 3.25)
    obs[:, :, :25] = rng.choice(PALETTE, (steps, num_envs, 25))
    end = -(-LiveColumns.WATCHED // num_envs)  # the first step after the watch
    for column, (env, first, last) in enumerate(
        [(0, end - 1, end), (-1, end, steps), (0, 1499, 1500), (-1, 2000, steps), (0, 3000, 3001)],
        30,
    ):
        obs[first:last, env, column] = -1.0
    for t in range(steps):
        both.put([env * 1500 + t % 1500 for env in range(num_envs)], obs[t])
        if t in (0, end - 1, end, 1499, 1500, 2000, 3000):
            both.check()
    assert both.first_block == 26
    assert [part.stop - part.start for part, _ in both.live.blocks] == [26, 1, 1, 1, 1]


@every_codec
def test_zeros_of_both_signs_are_kept_apart(codec):
    both = Both(codec, 1, ring=10, n=2, watched=3)
    for t in range(12):
        both.put([t % 10], [[(0.0, -0.0)[t == 5], (-0.0, 0.0)[t % 2]]])
        both.check()
    assert both.changed == ({0, 1} if isinstance(codec, Float) else set())


@every_codec
def test_columns_of_which_none_ever_changes_take_no_rows(codec):
    both = Both(codec, num_envs=2, ring=50, n=6, watched=8)
    for t in range(120):
        both.put([t % 50, 50 + t % 50], [[1, 0, -1, 127, -127, 0]] * 2)
        both.check()
    assert both.live.blocks[0][1].nbytes == 0


# The watch


@pytest.mark.parametrize(
    ("num_envs", "ring", "watched"),
    [(1, 5000, 1000), (1, 1000, 1000), (1, 999, 999), (3, 5000, 334), (3, 334, 334), (2000, 9, 1)],
)
def test_the_watch_is_a_thousand_rows_of_all_rings_together(num_envs, ring, watched):
    kept = LiveColumns(FixedPoint(2), num_envs, ring, 4, CPU)
    assert kept.watched == watched
    codes = torch.arange(4 * num_envs, dtype=torch.int16).view(num_envs, 4)
    rows = np.arange(num_envs) * ring
    for t in range(2 * ring):
        kept.put(rows + t % ring, codes + t)
        assert kept.watching == (t < watched or ring <= watched)
        if not kept.watching:
            break


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_buffer_smaller_than_the_watch_is_kept_whole(num_envs):
    both = Both(Packed(2), num_envs, ring=30, n=20, watched=1000)
    rng = np.random.default_rng(0)
    for t in range(70):
        rows = [env * 30 + t % 30 for env in range(num_envs)]
        both.put(rows, rng.choice(PALETTE, (num_envs, 20)))
        both.check()
    assert both.live.watching


# Bytes


def run_constant(buffer: ReplayBuffer, steps: int, live: int, late: dict[int, int]) -> None:
    """Columns up to `live` change in every step; `late` tells when some others first do."""
    num_envs, n = len(buffer.head), buffer.obs.live.size
    rng, no = np.random.default_rng(0), np.zeros(num_envs, bool)
    obs = np.zeros((num_envs, n))
    buffer.start(obs, ~no)
    for t in range(1, steps + 1):
        obs[:, :live] = rng.uniform(-100, 100, (num_envs, live))
        for column, first in late.items():
            obs[-1, column] = float(t >= first)
        buffer.add(np.zeros((num_envs, 1)), np.zeros(num_envs), obs, no, no)


@every_codec
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("live", [0, 1, 17, 30])
def test_bytes_when_is_the_largest_nbytes_of_a_run(codec, num_envs, live, monkeypatch):
    """Foretold by a buffer on the meta device, which holds nothing."""
    monkeypatch.setattr(LiveColumns, "WATCHED", 20)
    sizes = codec, 100, num_envs, 30, 1
    on_meta = ReplayBuffer(*sizes, torch.device("meta"), seed=0, drop_constant=True).obs

    def largest(late: dict[int, int]) -> int:
        buffer = ReplayBuffer(*sizes, CPU, seed=0, drop_constant=True)
        before = buffer.obs.nbytes
        assert on_meta.nbytes == before
        run_constant(buffer, 60, live, late)
        assert not buffer.obs.watching
        return max(before, buffer.obs.nbytes)

    assert largest({}) == on_meta.bytes_when(live)
    if live < 30:
        assert largest({29: 50}) == on_meta.bytes_when(live, 1)
        assert largest({29: 5}) == on_meta.bytes_when(live + 1)
    if live == 17:
        assert largest({20: 50, 22: 50, 29: 55}) == on_meta.bytes_when(17, 3)


def test_a_late_column_costs_no_copy():
    """Neither for a moment nor for good: 100,000 of a million rows are resident, 51 MB."""
    code = """
import re
from pathlib import Path
import numpy as np, psutil, torch
from support.columns import LiveColumns
from quantize import FixedPoint

torch.set_num_threads(1)
rng = np.random.default_rng(0)
kept = LiveColumns(FixedPoint(2), 1, 1_000_001, 376, torch.device("cpu"))
codes = torch.zeros((1000, 376), dtype=torch.int16)
for start in range(0, 100_000, 1000):
    codes[:, :257] = torch.from_numpy(rng.integers(-9999, 9999, (1000, 257)).astype(np.int16))
    kept.put(np.arange(start, start + 1000), codes)
((_, block),) = kept.blocks

def used():
    # Not ru_maxrss: a forked child inherits its parent's.
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    return psutil.Process().memory_info().rss, peak, kept.nbytes

before = used()
for row in range(100_000, 100_010):
    codes[0, 257:270] = 1
    kept.put(np.array([row]), codes[:1])
    kept.get(np.arange(0, 100_000, 400))
after = used()
assert kept.blocks[0][1] is block and len(kept.blocks) == 2
print(*before, *after)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rss, peak, nbytes, rss_after, peak_after, nbytes_after = map(int, done.stdout.split())
    assert nbytes_after - nbytes == 1_000_001 * 13 * 2
    assert rss > 51e6
    assert peak < rss + 20e6  # or the peak could hide a copy
    assert rss_after < rss + 10e6
    assert peak_after < max(peak, rss + 10e6)


def test_what_a_late_column_never_wrote_takes_no_memory(monkeypatch):
    """128 MB of a new block: a few pages of it are written, and thousands of its rows are read."""
    monkeypatch.setattr(LiveColumns, "WATCHED", 10)
    kept = LiveColumns(Float(), 1, 2_000_000, 10, CPU)
    codes = torch.ones((1000, 10), dtype=torch.float64)
    kept.put(np.arange(9), codes[:9])
    codes[:, 0] = torch.arange(1000)
    for start in range(0, 100_000, 1000):
        kept.put(np.arange(start, start + 1000), codes)
    process = psutil.Process()
    before, nbytes = process.memory_info().rss, kept.nbytes
    codes[:, 2:] = 2.0
    kept.put(np.arange(100_000, 100_010), codes[:10])
    assert kept.nbytes - nbytes == 128_000_000
    for start in range(0, 100_000, 1000):
        assert (kept.get(np.arange(start, start + 1000))[:, 1:] == 1).all()
    assert (kept.get(np.arange(100_000, 100_010))[:, 2:] == 2).all()
    assert process.memory_info().rss - before < 30e6


# Names of columns


@pytest.mark.parametrize(
    ("n", "names"),
    [(0, "[]"), (2, "[0, 1]"), (12, str([*range(12)])), (13, f"{[*range(12)]} and 1 more")],
)
def test_columns_of_shortens_long_lists(n, names):
    assert columns_of(np.arange(20) < n) == names
