"""buffers.py against brute-force lists, on streams in which every observation is unique."""

import copy
import io
import math
from collections import Counter, deque
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffers import (
    ReplayBatch,
    ReplayBuffer,
    RolloutBuffer,
    layout_bytes,
    replay_layout,
    rollout_layout,
    rows_per_env,
)
from columns import LiveColumns, Rows
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, ObservationError, Packed

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OBS_DIM, ACT_DIM = 5, 2
CODECS = [
    *map(FixedPoint, (0, 2, 3)),
    *map(Packed, (0, 1, 2, 3)),
    *map(Float, STORAGE_DTYPES.values()),
]
WATCHED, LATE = 6, 25  # rows in `LiveColumns`; the serial number from which on column 4 changes
drop_or_not = pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])


@pytest.fixture(autouse=True, scope="module")
def short_watch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", WATCHED)
        yield


GOES_ON, TERMINATED, TRUNCATED, BOTH = (0, 0), (1, 0), (0, 1), (1, 1)


class Transition(NamedTuple):
    """What the model stores; an observation stands for its serial number."""

    obs: int
    action: tuple[float, ...]
    reward: float
    next_obs: int
    terminated: bool


def observations(serials: np.ndarray) -> np.ndarray:
    """(...) -> (..., OBS_DIM) unique ones that FixedPoint(2, 20_000) and float32 hold exactly.

    Column 3 never changes and column 4 from LATE on.
    """
    constant = np.full_like(serials, 7.0, dtype=np.float64)
    late = np.maximum(serials, LATE)
    return np.stack([serials, -serials, serials / 4, constant, late], axis=-1)


def serials_of(obs: torch.Tensor) -> list[int]:
    """The serial numbers that observations were made from; all their columns must agree."""
    serials = obs[:, 0].numpy().astype(int)
    np.testing.assert_array_equal(obs, observations(serials))
    return serials.tolist()


class Model:
    """What a `ReplayBuffer` must hold, as one list of rows per env that forgets its oldest rows.

    A row is a `Transition` once its step is complete. The open head and final rows are None.
    """

    def __init__(self, buffer_size: int, num_envs: int):
        capacity = max(3, -(-buffer_size // num_envs) + 1)
        self.rings = [deque([None], maxlen=capacity) for _ in range(num_envs)]

    def add(self, transitions: list[Transition], ended: list[bool]) -> None:
        for ring, transition, end in zip(self.rings, transitions, ended, strict=True):
            ring[-1] = transition
            ring.extend([None, None] if end else [None])

    def cut(self, mask: list[bool]) -> None:
        for ring, cut in zip(self.rings, mask, strict=True):
            ring.extend([None] if cut else [])

    @property
    def stored(self) -> list[Transition]:
        return sorted(row for ring in self.rings for row in ring if row is not None)


class Pair:
    """A `ReplayBuffer` and its `Model`, driven with the same stream."""

    def __init__(
        self,
        buffer_size: int,
        num_envs: int,
        codec: Codec | None = None,
        device: str = "cpu",
        seed: int = 0,
        drop: bool = False,
    ):
        codec, device = codec or FixedPoint(2, 20_000), torch.device(device)
        self.num_envs = num_envs
        self.new_buffer = lambda seed: ReplayBuffer(
            codec, buffer_size, num_envs, OBS_DIM, ACT_DIM, device, seed, drop_constant=drop
        )
        self.buffer = self.new_buffer(seed)
        self.model = Model(buffer_size, num_envs)
        self.serials = 0
        self.current = [0] * num_envs
        self.start([True] * num_envs)

    def next_serial(self) -> int:
        self.serials += 1
        return self.serials

    def start(self, mask: list[bool]) -> None:
        """Begin an episode where mask is true; elsewhere there is nothing fit to be read."""
        fresh = np.full((self.num_envs, OBS_DIM), np.nan)
        for env in np.flatnonzero(mask):
            self.current[env] = self.next_serial()
            fresh[env] = observations(self.current[env])
        self.buffer.start(fresh, np.array(mask))

    def step(self, ends: list[tuple[int, int]]) -> None:
        """One step of every env, each going on or ending as told, and the resets after it."""
        transitions = []
        for obs, (terminated, _) in zip(self.current, ends, strict=True):
            action, reward = (-obs / 4, obs / 8), obs / 2
            transitions.append(
                Transition(obs, action, reward, self.next_serial(), bool(terminated))
            )
        self.buffer.add(
            np.array([t.action for t in transitions]),
            np.array([t.reward for t in transitions]),
            observations(np.array([t.next_obs for t in transitions])),
            *np.array(ends, bool).T,
        )
        self.model.add(transitions, [any(end) for end in ends])
        self.current = [t.next_obs for t in transitions]
        if any(map(any, ends)):
            self.start([any(end) for end in ends])

    def cut(self, mask: list[bool]) -> None:
        """The episodes where mask is true could not be gone on with: new ones begin there."""
        self.buffer.cut(np.array(mask))
        self.model.cut(mask)
        self.start(mask)

    def resume(self) -> None:
        """Go on with another buffer that was loaded from what this one saved."""
        file = io.BytesIO()
        torch.save(self.buffer.state(), file)
        size, arrays = len(file.getvalue()), sum(part.nbytes for part in tensors_in(self.buffer))
        assert size < arrays + 20_000  # no storage is written beyond what is used of it
        file.seek(0)
        restored = self.new_buffer(seed=99)
        restored.load(torch.load(file, weights_only=True))
        if self.buffer.size:
            pairs = zip(self.buffer.sample(8), restored.sample(8), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        self.buffer = restored

    def check(self) -> None:
        """The public arrays hold the model's transitions, `size` counts them, samples are some."""
        stored = transitions_in(self.buffer)
        assert sorted(stored) == self.model.stored
        assert self.buffer.size == len(stored)
        assert self.buffer.fill.tolist() == [len(ring) for ring in self.model.rings]
        if stored:
            assert set(transitions_of(self.buffer.sample(32))) <= set(stored)


def tensors_in(buffer: ReplayBuffer) -> list[torch.Tensor]:
    """Those of its state, however deep."""

    def walk(value) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value
        return [t for part in parts for t in walk(part)] if isinstance(value, dict | list) else []

    return walk(buffer.state())


def transitions_in(buffer: ReplayBuffer) -> list[Transition]:
    """Every row with is_start, joined with the next row of its ring."""
    rows = np.flatnonzero(buffer.is_start)
    rings = rows // buffer.rows
    next_rows = rings * buffer.rows + (rows + 1) % buffer.rows
    batch = ReplayBatch(
        buffer.obs.get(torch.from_numpy(np.concatenate([rows, next_rows]))),
        buffer.actions[rows],
        buffer.rewards[rows],
        buffer.terminated[rows],
    )
    return transitions_of(batch)


def transitions_of(batch: ReplayBatch) -> list[Transition]:
    columns = (
        serials_of(batch.obs),
        map(tuple, batch.action.tolist()),
        batch.reward.tolist(),
        serials_of(batch.next_obs),
        batch.terminated.tolist(),
    )
    return [Transition(*fields) for fields in zip(*columns, strict=True)]


def every(period: int, end: tuple[int, int], step: int) -> tuple[int, int]:
    """`end` on every period-th step, counted from 1; 0 never ends."""
    return end if period and step % period == 0 else GOES_ON


# ReplayBuffer: what it holds


@pytest.mark.parametrize(("make", "drop"), [(FixedPoint, False), (Packed, True)])
@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED, BOTH], ids=["term", "trunc", "both"])
@pytest.mark.parametrize("period", [0, 1, 2, 3, 7, 30], ids="episode{}".format)
@pytest.mark.parametrize("buffer_size", [1, 2, 3, 8, 9])
def test_one_env_holds_what_the_model_holds(buffer_size, period, end, make, drop):
    pair = Pair(buffer_size, num_envs=1, codec=make(2, 20_000), drop=drop)
    for step in range(1, 41):
        pair.step([every(period, end, step)])
        pair.check()


@drop_or_not
@pytest.mark.parametrize("make", [FixedPoint, Packed])
@pytest.mark.parametrize("buffer_size", [1, 9, 10, 11, 30])
@pytest.mark.parametrize("periods", [(0, 0, 0), (1, 0, 4), (1, 2, 3), (5, 5, 5), (20, 3, 1)])
def test_three_envs_hold_what_the_model_holds(buffer_size, periods, make, drop):
    """Envs that end at different times fill their rings unequally and wrap at different steps."""
    pair = Pair(buffer_size, num_envs=3, codec=make(2, 20_000), drop=drop)
    kinds = (TERMINATED, TRUNCATED, BOTH)
    for step in range(1, 41):
        pair.step([every(p, end, step) for p, end in zip(periods, kinds, strict=True)])
        pair.check()


class RandomEnds(RuleBasedStateMachine):
    """Any pattern of episode ends, for any number of envs, any size and each way to keep rows."""

    @initialize(
        buffer_size=st.integers(1, 20),
        num_envs=st.integers(1, 4),
        make=st.sampled_from([FixedPoint, Packed]),
        drop=st.booleans(),
    )
    def make(self, buffer_size, num_envs, make, drop):
        self.pair = Pair(buffer_size, num_envs, codec=make(2, 20_000), drop=drop)

    @rule(data=st.data())
    def step(self, data):
        kinds = st.sampled_from([GOES_ON, TERMINATED, TRUNCATED, BOTH])
        n = self.pair.num_envs
        self.pair.step(data.draw(st.lists(kinds, min_size=n, max_size=n)))

    @rule(steps=st.integers(1, 10))
    def go_on(self, steps):
        for _ in range(steps):
            self.pair.step([GOES_ON] * self.pair.num_envs)

    @rule(data=st.data())
    def cut(self, data):
        n = self.pair.num_envs
        self.pair.cut(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))

    @rule()
    def resume(self):
        self.pair.resume()

    @invariant()
    def holds_what_the_model_holds(self):
        self.pair.check()


RandomEnds.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestRandomEnds = RandomEnds.TestCase


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@drop_or_not
def test_a_buffer_resumes_in_every_dtype_before_and_after_it_wraps(codec, drop):
    """Bytes, as FixedPoint(0) and float8 do not hold the serial numbers: what is saved is equal."""
    for steps in (0, 3, 9, 30):
        buffers = [ReplayBuffer(codec, 12, 3, OBS_DIM, ACT_DIM, CPU, 1, drop) for _ in range(2)]
        buffers[0].start(observations(np.arange(3)), np.ones(3, bool))
        for t in range(steps):
            obs = observations(np.arange(3) + 3 * t) % 100
            ends = np.array([t % 4 == 0, False, False])
            buffers[0].add(np.ones((3, ACT_DIM)), np.full(3, t), obs, ends, ~ends & False)
            if ends.any():
                buffers[0].start(obs, ends)
        file = io.BytesIO()
        torch.save(buffers[0].state(), file)
        file.seek(0)
        buffers[1].load(torch.load(file, weights_only=True))
        one, other = map(tensors_in, buffers)
        assert len(one) == len(other) and all(map(torch.equal, one, other))
        if steps:
            for a, b in zip(*(buffer.sample(50) for buffer in buffers), strict=True):
                assert torch.equal(a, b)


def test_a_cut_episode_ends_as_if_truncated_and_no_transition_joins_it_to_the_next():
    pair = Pair(10, num_envs=2)  # observations 1, 2
    pair.step([GOES_ON, GOES_ON])  # 1 -> 3, 2 -> 4
    pair.cut([True, False])  # 5 begins
    pair.step([GOES_ON, GOES_ON])  # 5 -> 6, 4 -> 7
    pairs = {(t.obs, t.next_obs) for t in transitions_in(pair.buffer)}
    assert pairs == {(1, 3), (2, 4), (5, 6), (4, 7)}


@pytest.mark.parametrize("name", ["head", "fill"])
@pytest.mark.parametrize("value", [-1, 0, 5, 6, 99])
def test_saved_rows_beyond_the_rings_are_refused(name, value):
    """Rings of 5 rows: heads 0 to 4 and 5 to 9, fills from 1 to 5."""
    pair = Pair(8, num_envs=2)
    saved = pair.buffer.state()
    saved[name][1] = value
    fits = value in {"head": (5, 6), "fill": (5,)}[name]
    if not fits:
        with pytest.raises(ValueError, match="other rows"):
            pair.new_buffer(0).load(saved)
    elif name == "head":
        pair.new_buffer(0).load(saved)


def test_terminated_wins_over_truncated():
    pair = Pair(10, num_envs=4)
    pair.step([GOES_ON, TERMINATED, TRUNCATED, BOTH])
    assert [t.terminated for t in sorted(transitions_in(pair.buffer))] == [0, 1, 0, 1]


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED])
def test_next_obs_at_an_end_is_the_final_observation_not_the_reset(end):
    pair = Pair(10, num_envs=1)  # observation 1
    pair.step([GOES_ON])  # 1 -> 2
    pair.step([end])  # 2 -> 3, reset to 4
    pair.step([GOES_ON])  # 4 -> 5
    batch = pair.buffer.sample(100)
    pairs = {(t.obs, t.next_obs) for t in transitions_of(batch)}
    assert pairs == {(1, 2), (2, 3), (4, 5)}


@pytest.mark.parametrize(
    ("buffer_size", "num_envs", "rows"),
    [(1, 1, 3), (2, 1, 3), (3, 1, 4), (1_000_000, 1, 1_000_001), (10, 3, 5), (9, 3, 4), (2, 8, 3)],
)
def test_rows_per_env(buffer_size, num_envs, rows):
    assert rows_per_env(buffer_size, num_envs) == rows
    assert Pair(buffer_size, num_envs).buffer.obs.array.shape == (num_envs * rows, OBS_DIM)


# ReplayBuffer: what it samples


def chi_square_critical(freedom: int, z: float = 3.719) -> float:
    """Wilson & Hilferty's approximation of the upper quantile; z = 3.719 is p = 1e-4."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("steps", "fills"), [(7, [15, 8, 9]), (15, [21, 16, 19]), (60, [21, 21, 21])]
)
def test_samples_are_uniform_over_unequal_rings(steps, fills):
    """One env of one-step episodes, half of whose rows are final, one of none, one between."""
    pair = Pair(60, num_envs=3, seed=1)
    for step in range(1, steps + 1):
        pair.step([every(period, TRUNCATED, step) for period in (1, 0, 4)])
    stored = transitions_in(pair.buffer)
    assert pair.buffer.fill.tolist() == fills

    draws = 400 * len(stored)
    sampled = Counter(transitions_of(pair.buffer.sample(draws)))
    assert set(sampled) == set(stored)
    expected = draws / len(stored)
    chi_square = sum((sampled[t] - expected) ** 2 / expected for t in stored)
    assert chi_square < chi_square_critical(len(stored) - 1)


def test_draws_are_independent_within_a_batch():
    """Two draws agree as often as chance has it: sampling is with replacement."""
    pair = Pair(10, num_envs=1)
    for _ in range(4):
        pair.step([GOES_ON])
    obs = pair.buffer.sample(20_000).obs[:, 0].view(-1, 2)
    agree = (obs[:, 0] == obs[:, 1]).float().mean().item()
    sigma = math.sqrt(1 / 4 * 3 / 4 / 10_000)
    assert abs(agree - 1 / 4) < 4 * sigma


def test_sampling_before_the_first_complete_transition_is_an_error():
    buffer = ReplayBuffer(FixedPoint(2), 10, 2, OBS_DIM, ACT_DIM, CPU, seed=0)
    with pytest.raises(ValueError, match="no complete transition"):
        buffer.sample(4)
    buffer.start(np.ones((2, OBS_DIM)), np.array([True, True]))
    with pytest.raises(ValueError, match="no complete transition"):
        buffer.sample(4)


@pytest.mark.parametrize("device", DEVICES)
@drop_or_not
def test_same_seed_same_samples(device, drop):
    def samples(seed: int, device: str = "cpu", drop: bool = False) -> list[list[Transition]]:
        pair = Pair(20, num_envs=2, device=device, seed=seed, drop=drop)
        for step in range(1, 31):
            pair.step([every(5, TERMINATED, step), GOES_ON])
        return [transitions_of(pair.buffer.sample(50)) for _ in range(2)]

    assert samples(1, device, drop) == samples(1)
    assert samples(1) != samples(2)
    assert samples(1)[0] != samples(1)[1]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_replay_dtypes_and_shapes(codec):
    pair = Pair(10, num_envs=2, codec=codec)
    pair.step([TERMINATED, GOES_ON])
    assert pair.buffer.obs.array.dtype == codec.row(OBS_DIM)[1]
    batch = pair.buffer.sample(5)
    shapes = {name: tuple(x.shape) for name, x in batch._asdict().items()}
    assert shapes == {
        "both_obs": (10, OBS_DIM),
        "action": (5, ACT_DIM),
        "reward": (5,),
        "terminated": (5,),
    }
    assert [x.dtype for x in batch] == [torch.float32] * 3 + [torch.bool]
    assert batch.obs.shape == batch.next_obs.shape == (5, OBS_DIM)
    assert torch.equal(torch.cat([batch.obs, batch.next_obs]), batch.both_obs)
    storages = {x.untyped_storage().data_ptr() for x in (batch.obs, batch.next_obs, batch.both_obs)}
    assert len(storages) == 1  # views: memory.py counts both_obs alone


@drop_or_not
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_replay_samples_are_what_the_codec_makes_of_the_observations(codec, drop):
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(0, 200, (2, 1, OBS_DIM))
    buffer = ReplayBuffer(codec, 10, 1, OBS_DIM, ACT_DIM, CPU, seed=0, drop_constant=drop)
    buffer.start(obs, np.array([True]))
    buffer.add(np.zeros((1, ACT_DIM)), np.zeros(1), next_obs, *np.zeros((2, 1), bool))
    batch = buffer.sample(3)
    assert torch.equal(batch.obs, codec.decode(codec.encode(obs)).expand(3, -1))
    assert torch.equal(batch.next_obs, codec.decode(codec.encode(next_obs)).expand(3, -1))


# ReplayBuffer: what it refuses, what it takes


def snapshot(value):
    """Bit patterns of everything in a buffer but its codec, its layout and its generator."""
    if isinstance(value, torch.Tensor):
        return bytes(value.contiguous().view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    if isinstance(value, ReplayBuffer | RolloutBuffer | Rows | LiveColumns):
        value = vars(value)
        return {name: snapshot(v) for name, v in value.items() if name not in UNCOMPARED}
    return copy.copy(value)


UNCOMPARED = ("codec", "layout", "_rng")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["obs", "reward", "start"])
@pytest.mark.parametrize("steps", [0, 3, 20])
@drop_or_not
def test_nonfinite_is_refused_and_nothing_is_stored(where, value, steps, drop):
    pair = Pair(8, num_envs=2, drop=drop)
    for step in range(1, steps + 1):
        pair.step([every(3, TRUNCATED, step), GOES_ON])
    before = snapshot(pair.buffer)
    bad_obs, bad_reward = np.ones((2, OBS_DIM)), np.ones(2)
    with pytest.raises(ObservationError, match=r"nan or inf in .*\[1\]"):
        if where == "start":
            bad_obs[1, 1] = value
            pair.buffer.start(bad_obs, np.array([True, True]))
        else:
            if where == "obs":
                bad_obs[0, 1] = value
            else:
                bad_reward[1] = value
            ends = np.array([[True, False], [False, False]])
            pair.buffer.add(np.ones((2, ACT_DIM)), bad_reward, bad_obs, *ends)
    assert snapshot(pair.buffer) == before
    pair.step([TERMINATED, GOES_ON])  # and it still works
    pair.check()


def test_start_reads_only_the_masked_envs():
    pair = Pair(10, num_envs=3)
    before = pair.buffer.obs.array.clone()
    obs = np.full((3, OBS_DIM), np.nan)
    obs[1] = observations(99)
    pair.buffer.start(obs, np.array([False, True, False]))
    changed = (pair.buffer.obs.array != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [pair.buffer.head[1]]


def row_bytes(codec: Codec, n: int) -> int:
    """A packed row ends with a whole 16-bit word."""
    return -(-n * codec.bits // 16) * 2 if isinstance(codec, Packed) else n * codec.bits // 8


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("buffer_size", "num_envs"), [(1000, 1), (1000, 3), (1, 1)])
def test_replay_nbytes(codec, buffer_size, num_envs):
    buffer = ReplayBuffer(codec, buffer_size, num_envs, 376, 17, CPU, seed=0)
    rows = num_envs * max(3, -(-buffer_size // num_envs) + 1)
    # per row: observation, 17 float32 actions, float32 reward, two flags; per env: three int64
    expected = rows * (row_bytes(codec, 376) + 17 * 4 + 4 + 2) + num_envs * 3 * 8
    layout = replay_layout(codec, buffer_size, num_envs, 376, 17)
    assert buffer.nbytes == layout_bytes(layout) == expected
    assert tuple(buffer.obs.array.shape) == layout.pop("obs")[0]
    for name, (shape, _) in layout.items():
        assert tuple(getattr(buffer, name).shape) == shape


def test_a_million_humanoid_rows_become_resident_only_when_written():
    process = psutil.Process()
    before = process.memory_info().rss
    buffer = ReplayBuffer(FixedPoint(2), 1_000_000, 1, 376, 17, CPU, seed=0)
    assert buffer.nbytes > 800e6
    assert process.memory_info().rss - before < 50e6
    written = 50_000
    buffer.obs.array[:written] = 1
    assert process.memory_info().rss - before > 0.9 * written * 376 * 2


@pytest.mark.parametrize(("codec", "most"), [(FixedPoint(2), 830e6), (Packed(2), 785e6)])
def test_a_million_humanoid_rows_stay_below_the_limits_of_the_design(codec, most):
    assert layout_bytes(replay_layout(codec, 1_000_000, 1, 376, 17)) < most


def test_touch_makes_every_page_resident():
    process = psutil.Process()
    buffer = ReplayBuffer(FixedPoint(2), 700_000, 2, 60, 30, CPU, seed=0)
    before = process.memory_info().rss
    buffer.touch()
    # 84 MB each: glibc keeps up to 64 MB of freed memory, resident, for smaller arrays.
    large = (buffer.obs.array, buffer.actions)
    assert process.memory_info().rss - before > 0.99 * sum(array.nbytes for array in large) > 160e6
    for name in ("actions", "rewards", "terminated", "is_start"):
        assert not getattr(buffer, name).any()
    assert not buffer.obs.array.any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_touch_changes_no_value(codec):
    buffer = ReplayBuffer(codec, 10_000, 3, OBS_DIM, ACT_DIM, CPU, seed=0)
    rng = np.random.default_rng(0)
    for array in (buffer.obs.array, buffer.actions, buffer.rewards):
        raw = array.view(-1).view(torch.uint8)
        raw[:] = torch.from_numpy(rng.integers(0, 256, len(raw), np.uint8))
    buffer.terminated[:] = torch.from_numpy(rng.random(len(buffer.terminated)) < 0.5)
    buffer.is_start[:] = rng.random(len(buffer.is_start)) < 0.5
    before = snapshot(buffer)
    buffer.touch()
    assert snapshot(buffer) == before


# RolloutBuffer

N_STEPS, NUM_ENVS = 5, 3


def filled_rollout(codec: Codec | None = None, seed: int = 0, first: int = 0) -> RolloutBuffer:
    """Step t of env e has the number 10 t + e (+ first), and every field is made from it."""
    codec = codec or FixedPoint(2, 1000)
    buffer = RolloutBuffer(codec, N_STEPS, NUM_ENVS, OBS_DIM, ACT_DIM, CPU, seed)
    fill_rollout(buffer, first)
    return buffer


def fill_rollout(buffer: RolloutBuffer, first: int = 0) -> None:
    buffer.log_probs[:] = torch.from_numpy(numbers(first) + 0.5)
    for t in range(N_STEPS):
        number = first + 10.0 * t + np.arange(NUM_ENVS)
        buffer.add(
            obs=observations(number),
            action=np.stack([number + 0.25, -number], axis=1).astype(np.float32),
            value=(number + 0.75).astype(np.float32),
            reward=number + 0.125,
            end=number % 2 == 0,
        )
    buffer.advantages[:] = buffer.values * 2
    buffer.returns[:] = buffer.values * 4


def numbers(first: int = 0) -> np.ndarray:
    return first + 10 * np.arange(N_STEPS)[:, None] + np.arange(NUM_ENVS)


def test_rollout_arrays_are_indexed_by_step_and_env():
    buffer, number = filled_rollout(), numbers()
    obs = buffer.codec.decode(buffer.obs).numpy()
    np.testing.assert_array_equal(obs, observations(number))
    np.testing.assert_array_equal(buffer.actions, np.stack([number + 0.25, -number], axis=2))
    np.testing.assert_array_equal(buffer.log_probs, number + 0.5)
    np.testing.assert_array_equal(buffer.values, number + 0.75)
    np.testing.assert_array_equal(buffer.rewards, number + 0.125)
    np.testing.assert_array_equal(buffer.ends, number % 2 == 0)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(4, [4, 4, 4, 3]), (5, [5, 5, 5]), (15, [15]), (99, [15]), (1, [1] * 15)],
)
def test_each_epoch_is_a_partition_into_minibatches(batch_size, sizes):
    buffer, orders = filled_rollout(), []
    for _ in range(2):
        batches = list(buffer.minibatches(batch_size))
        assert [len(batch.obs) for batch in batches] == sizes
        orders.append([int(s) for batch in batches for s in batch.obs[:, 0]])
        assert sorted(orders[-1]) == numbers().flatten().tolist()
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != orders[0]


def test_minibatch_fields_belong_to_the_same_step():
    for obs, action, log_prob, advantage, ret in filled_rollout().minibatches(4):
        number = obs[:, 0]
        np.testing.assert_array_equal(obs, observations(number.numpy()))
        assert torch.equal(action, torch.stack([number + 0.25, -number], dim=1))
        assert torch.equal(log_prob, number + 0.5)
        assert torch.equal(advantage, (number + 0.75) * 2)
        assert torch.equal(ret, (number + 0.75) * 4)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_minibatches_are_decoded_float32(codec):
    buffer = filled_rollout(codec)
    assert buffer.obs.dtype == codec.row(OBS_DIM)[1]
    obs = observations(numbers()).reshape(-1, OBS_DIM)
    (batch,) = buffer.minibatches(15)
    assert [tuple(x.shape) for x in batch] == [(15, OBS_DIM), (15, ACT_DIM), (15,), (15,), (15,)]
    assert {x.dtype for x in batch} == {torch.float32}
    order = (batch.log_prob - 0.5).long()
    rows = (order // 10) * NUM_ENVS + order % 10
    assert torch.equal(batch.obs, codec.decode(codec.encode(obs))[rows])


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_rollouts_stay_on_the_cpu_and_only_minibatches_go_to_the_device(codec):
    """There the environments are. Every machine has the device "meta", which holds no data."""
    meta = torch.device("meta")
    buffer = RolloutBuffer(codec, N_STEPS, NUM_ENVS, OBS_DIM, ACT_DIM, meta, seed=0)
    fill_rollout(buffer)
    assert {getattr(buffer, name).device for name in buffer.layout} == {CPU}
    for batch in buffer.minibatches(4):
        assert {x.device for x in batch} == {meta}


def test_second_rollout_overwrites_the_first():
    buffer = filled_rollout()
    assert buffer.step == 0
    fill_rollout(buffer, first=100)
    (batch,) = buffer.minibatches(15)
    assert sorted(batch.obs[:, 0].tolist()) == numbers(100).flatten().tolist()
    np.testing.assert_array_equal(buffer.rewards, numbers(100) + 0.125)


def test_same_seed_same_minibatches():
    def order(seed: int) -> list[float]:
        return [s for batch in filled_rollout(seed=seed).minibatches(4) for s in batch.log_prob]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["obs", "reward"])
def test_rollout_refuses_nonfinite_and_stores_nothing(where, value):
    buffer = filled_rollout()
    before = snapshot(buffer)
    obs, reward, ones = np.ones((NUM_ENVS, OBS_DIM)), np.ones(NUM_ENVS), np.ones(NUM_ENVS)
    (obs if where == "obs" else reward)[1] = value
    with pytest.raises(ObservationError, match="nan or inf"):
        buffer.add(obs, np.ones((NUM_ENVS, ACT_DIM)), ones, reward, np.ones(NUM_ENVS, bool))
    assert snapshot(buffer) == before


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["replay", "rollout"])
def test_a_reward_beyond_float32_is_refused_and_the_largest_is_kept(kind, sign):
    obs, most = np.ones((2, OBS_DIM)), float(np.finfo(np.float32).max)
    if kind == "replay":
        buffer = ReplayBuffer(FixedPoint(2), 8, 2, OBS_DIM, ACT_DIM, CPU, seed=0)
        buffer.start(obs, np.ones(2, bool))

        def add(reward):
            buffer.add(np.ones((2, ACT_DIM)), reward, obs, *np.zeros((2, 2), bool))
    else:
        buffer = RolloutBuffer(FixedPoint(2), 8, 2, OBS_DIM, ACT_DIM, CPU, seed=0)

        def add(reward):
            buffer.add(obs, np.ones((2, ACT_DIM)), np.ones(2), reward, np.zeros(2, bool))

    before = snapshot(buffer)
    with pytest.raises(ObservationError, match=r"reward of env \[1\]"):
        add(np.array([1.0, sign * 2 * most]))
    assert snapshot(buffer) == before
    add(np.array([1.0, sign * most]))
    assert sign * most in buffer.rewards.flatten().tolist()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_rollout_nbytes(codec):
    buffer = RolloutBuffer(codec, 2048, 2, 376, 17, CPU, seed=0)
    # per step: observation, 17 float32 actions, five float32 scalars, one flag
    expected = 2048 * 2 * (row_bytes(codec, 376) + 17 * 4 + 5 * 4 + 1)
    layout = rollout_layout(codec, 2048, 2, 376, 17)
    assert buffer.nbytes == layout_bytes(layout) == expected
    for name, (shape, dtype) in layout.items():
        array = getattr(buffer, name)
        assert (tuple(array.shape), array.dtype) == (shape, dtype)
