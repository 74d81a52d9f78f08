"""buffers.py against brute-force lists, on streams in which every observation is unique."""

import io
import math
import re
from collections import Counter, deque
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffers import ClampCount, ReplayBatch, ReplayBuffer, RolloutBuffer, rows_per_env
from quantize import STORAGE_DTYPES, Codec, FixedPoint, Float, Packed
from support.columns import LiveColumns, Rows, columns_of

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

CPU, META = torch.device("cpu"), torch.device("meta")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OBS_DIM, ACT_DIM = 5, 2
CODECS = [
    *map(FixedPoint, (0, 2, 3)),
    *map(Packed, (0, 1, 2, 3)),
    *map(Float, STORAGE_DTYPES.values()),
]
WATCHED, LATE = 6, 25  # rows in `LiveColumns`; the serial number from which on column 4 changes
VALUES = st.floats(-2000, 2000) | st.floats(allow_nan=False, allow_infinity=False)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
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

    def start(self, mask: list[bool]) -> None:
        """A running episode that is not gone on with takes one more row: the new head."""
        for ring, fresh in zip(self.rings, mask, strict=True):
            running = len(ring) > 1 and ring[-2] is not None
            ring.extend([None] if fresh and running else [])

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
        """Begin an episode where mask is true, also in the middle of one; nan is not to be read."""
        fresh = np.full((self.num_envs, OBS_DIM), np.nan)
        for env in np.flatnonzero(mask):
            self.current[env] = self.next_serial()
            fresh[env] = observations(self.current[env])
        self.buffer.start(fresh, np.array(mask))
        self.model.start(mask)

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
        assert self.buffer.fill == [len(ring) for ring in self.model.rings]  # at an end 2 rows more
        self.current = [t.next_obs for t in transitions]
        if any(map(any, ends)):
            self.start([any(end) for end in ends])

    def resume(self) -> None:
        """Go on with another buffer that was loaded from what this one saved."""
        file = io.BytesIO()
        torch.save(self.buffer.state_dict(), file)
        size, arrays = len(file.getvalue()), sum(part.nbytes for part in tensors_in(self.buffer))
        assert size < arrays + 20_000  # no storage is written beyond what is used of it
        file.seek(0)
        restored = self.new_buffer(seed=99)
        restored.load_state_dict(torch.load(file, weights_only=True))
        if self.buffer.size:
            pairs = zip(self.buffer.sample(8), restored.sample(8), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        self.buffer = restored

    def check(self) -> None:
        """The public arrays hold the model's transitions, `size` counts them, samples are some."""
        stored = transitions_in(self.buffer)
        assert sorted(stored) == self.model.stored
        assert self.buffer.size == len(stored)
        assert self.buffer.fill == [len(ring) for ring in self.model.rings]
        if stored:
            assert set(transitions_of(self.buffer.sample(32))) <= set(stored)


def tensors_in(buffer: ReplayBuffer) -> list[torch.Tensor]:
    """Those of its state, however deep."""

    def walk(value) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value
        return [t for part in parts for t in walk(part)] if isinstance(value, dict | list) else []

    return walk(buffer.state_dict())


def transitions_in(buffer: ReplayBuffer) -> list[Transition]:
    """Every row with is_start, joined with the next row of its ring."""
    rows = np.flatnonzero(buffer.is_start)
    rings = rows // buffer.ring
    next_rows = rings * buffer.ring + (rows + 1) % buffer.ring
    batch = ReplayBatch(
        obs=buffer.obs.get(rows),
        action=buffer.actions[rows],
        reward=buffer.rewards[rows],
        next_obs=buffer.obs.get(next_rows),
        terminated=buffer.terminated[rows],
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
    def start(self, data):
        n = self.pair.num_envs
        self.pair.start(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))

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
        torch.save(buffers[0].state_dict(), file)
        file.seek(0)
        buffers[1].load_state_dict(torch.load(file, weights_only=True))
        one, other = map(tensors_in, buffers)
        assert len(one) == len(other) and all(map(torch.equal, one, other))
        assert (buffers[0].head, buffers[0].fill) == (buffers[1].head, buffers[1].fill)
        assert counts(buffers[0].clamped) == counts(buffers[1].clamped)
        if steps:
            for a, b in zip(*(buffer.sample(50) for buffer in buffers), strict=True):
                assert torch.equal(a, b)


def test_a_running_episode_that_starts_anew_ends_as_if_truncated():
    pair = Pair(10, num_envs=2)  # observations 1, 2
    pair.step([GOES_ON, GOES_ON])  # 1 -> 3, 2 -> 4
    pair.start([True, False])  # 5 begins
    pair.start([True, False])  # 6 begins in its place: no step was taken
    pair.step([GOES_ON, GOES_ON])  # 6 -> 7, 4 -> 8
    transitions = {(t.obs, t.next_obs, t.terminated) for t in transitions_in(pair.buffer)}
    assert transitions == {(1, 3, False), (2, 4, False), (6, 7, False), (4, 8, False)}


@drop_or_not
@pytest.mark.parametrize("other", [4, 12])
def test_saved_rows_of_another_size_are_refused(other, drop):
    pair = Pair(8, num_envs=2, drop=drop)
    for _ in range(30):
        pair.step([GOES_ON, GOES_ON])
    larger = ReplayBuffer(FixedPoint(2, 20_000), other, 2, OBS_DIM, ACT_DIM, CPU, 0, drop)
    with pytest.raises(ValueError, match="other rows"):
        pair.new_buffer(0).load_state_dict(larger.state_dict() | {"fill": [5, 5]})


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
    assert pair.buffer.fill == fills

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
        "obs": (5, OBS_DIM),
        "action": (5, ACT_DIM),
        "reward": (5,),
        "next_obs": (5, OBS_DIM),
        "terminated": (5,),
    }
    assert [x.dtype for x in batch] == [torch.float32] * 4 + [torch.bool]
    assert batch.obs.is_contiguous() and batch.next_obs.is_contiguous()
    # Storages, as obs and next_obs are views of one.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in batch}
    assert len(storages) == 4
    assert sum(storages.values()) == pair.buffer.batch_bytes(5)


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
    """Bit patterns of everything in a buffer but its codec and its generator."""
    if isinstance(value, torch.Tensor):
        return bytes(value.contiguous().view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    if isinstance(value, ReplayBuffer | RolloutBuffer | Rows | LiveColumns | ClampCount):
        value = vars(value)
        return {name: snapshot(v) for name, v in value.items() if name not in ("codec", "_rng")}
    return value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["add", "start"])
@pytest.mark.parametrize("steps", [0, 3, 20])
@drop_or_not
def test_nonfinite_is_refused_and_nothing_is_stored(where, value, steps, drop):
    pair = Pair(8, num_envs=2, drop=drop)
    for step in range(1, steps + 1):
        pair.step([every(3, TRUNCATED, step), GOES_ON])
    before = snapshot(pair.buffer)
    bad_obs = np.ones((2, OBS_DIM))
    bad_obs[1, 1] = value
    with pytest.raises(ValueError, match=r"nan or inf in observation columns \[1\]"):
        if where == "start":
            pair.buffer.start(bad_obs, np.array([True, True]))
        else:
            ends = np.array([[True, False], [False, False]])
            pair.buffer.add(np.ones((2, ACT_DIM)), np.ones(2), bad_obs, *ends)
    assert snapshot(pair.buffer) == before
    pair.step([TERMINATED, GOES_ON])  # and it still works
    pair.check()


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_transition_without_an_observation_to_begin_with_is_refused(steps):
    """It would learn from whatever lies in the head's row: zeros, or what is long overwritten."""
    buffer = Pair(6, num_envs=3).new_buffer(0)
    one, no = (np.full(3, value) for value in (True, False))
    obs, act = np.ones((3, OBS_DIM)), np.ones((3, ACT_DIM))
    if steps:
        buffer.start(obs, one)
        for _ in range(steps):
            buffer.add(act, np.ones(3), obs, no, no)
        buffer.add(act, np.ones(3), obs, np.array([0, 1, 0], bool), np.array([0, 0, 1], bool))
    else:
        buffer.start(obs, np.array([True, False, False]))
    before = snapshot(buffer)
    with pytest.raises(
        ValueError, match=re.escape("start() must come before add() in envs [1, 2]")
    ):
        buffer.add(act, np.ones(3), obs, no, no)
    assert snapshot(buffer) == before
    buffer.start(obs, np.array([False, True, True]))
    buffer.add(act, np.ones(3), obs, no, no)
    restored = Pair(6, num_envs=3).new_buffer(0)
    restored.load_state_dict(buffer.state_dict())
    restored.add(act, np.ones(3), obs, no, no)  # it goes on


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
    bits = n * codec.bits_per_value
    return -(-bits // 16) * 2 if isinstance(codec, Packed) else bits // 8


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("buffer_size", "num_envs"), [(1000, 1), (1000, 3), (1, 1)])
def test_replay_nbytes(codec, buffer_size, num_envs):
    buffer = ReplayBuffer(codec, buffer_size, num_envs, 376, 17, CPU, seed=0)
    rows = num_envs * max(3, -(-buffer_size // num_envs) + 1)
    # per row: observation, 17 float32 actions, float32 reward, two flags
    assert buffer.nbytes == rows * (row_bytes(codec, 376) + 17 * 4 + 4 + 2)
    assert buffer.obs.nbytes == rows * row_bytes(codec, 376)
    on_meta = ReplayBuffer(codec, buffer_size, num_envs, 376, 17, META, seed=0)
    assert (on_meta.nbytes, on_meta.obs.nbytes) == (buffer.nbytes, buffer.obs.nbytes)


def test_a_million_humanoid_rows_become_resident_only_when_written():
    process = psutil.Process()
    before = process.memory_info().rss
    buffer = ReplayBuffer(FixedPoint(2), 1_000_000, 1, 376, 17, CPU, seed=0)
    assert buffer.nbytes > 800e6
    assert process.memory_info().rss - before < 50e6
    written = 50_000
    buffer.obs.array[:written] = 1
    assert process.memory_info().rss - before > 0.9 * written * 376 * 2


def test_a_buffer_on_the_meta_device_takes_no_memory_and_knows_its_bytes():
    process = psutil.Process()
    before = process.memory_info().vms
    sizes = FixedPoint(2), 10**12, 3, 376, 17, META
    whole, dropping = ReplayBuffer(*sizes, seed=0), ReplayBuffer(*sizes, seed=0, drop_constant=True)
    rollout = RolloutBuffer(FixedPoint(2), 10**9, *sizes[2:], seed=0)
    assert whole.nbytes > 800e12 > 800e9 > rollout.nbytes - 2e12
    assert whole.nbytes - whole.obs.nbytes == dropping.nbytes - dropping.obs.nbytes > 70e12
    assert process.memory_info().vms - before < 100e6


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
    buffer.is_start[:] = torch.from_numpy(rng.random(len(buffer.is_start)) < 0.5)
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
    for batch_size in (4, 15, 99):
        first = next(buffer.minibatches(batch_size))
        assert buffer.batch_bytes(batch_size) == sum(x.nbytes for x in first)
    order = (batch.log_prob - 0.5).long()
    rows = (order // 10) * NUM_ENVS + order % 10
    assert torch.equal(batch.obs, codec.decode(codec.encode(obs))[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_rollouts_stay_on_the_cpu_and_only_minibatches_go_to_the_device(device):
    """There the environments are."""
    device = torch.device(device)
    buffer = RolloutBuffer(Packed(2), N_STEPS, NUM_ENVS, OBS_DIM, ACT_DIM, device, seed=0)
    fill_rollout(buffer)
    assert {x.device for x in vars(buffer).values() if isinstance(x, torch.Tensor)} == {CPU}
    for batch in buffer.minibatches(4):
        assert {x.device.type for x in batch} == {device.type}


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
def test_rollout_refuses_nonfinite_and_stores_nothing(value):
    buffer = filled_rollout()
    before = snapshot(buffer)
    obs, ones = np.ones((NUM_ENVS, OBS_DIM)), np.ones(NUM_ENVS)
    obs[1, 2] = value
    with pytest.raises(ValueError, match=r"nan or inf in observation columns \[2\]"):
        buffer.add(obs, np.ones((NUM_ENVS, ACT_DIM)), ones, ones, np.ones(NUM_ENVS, bool))
    assert snapshot(buffer) == before


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_rollout_nbytes(codec):
    # per step: observation, 17 float32 actions, five float32 scalars, one flag
    expected = 2048 * 2 * (row_bytes(codec, 376) + 17 * 4 + 5 * 4 + 1)
    for device in (CPU, META):
        buffer = RolloutBuffer(codec, 2048, 2, 376, 17, device, seed=0)
        assert (buffer.nbytes, buffer.obs.nbytes) == (expected, 4096 * row_bytes(codec, 376))


def test_a_rollout_buffer_resumes_its_order_and_its_counts():
    buffers = filled_rollout(seed=1), filled_rollout(seed=2)
    list(buffers[0].minibatches(4))
    buffers[1].load_state_dict(buffers[0].state_dict())
    one, other = ([b.log_prob.tolist() for b in buffer.minibatches(4)] for buffer in buffers)
    assert one == other
    assert counts(buffers[0].clamped) == counts(buffers[1].clamped)


# ClampCount


def counts(clamped: ClampCount) -> tuple:
    return clamped.seen, clamped.clipped, clamped.max_abs, clamped.column_peak


def test_clamped_values_are_counted_and_reported():
    batches = [[[1.0, -10.0, 10.0], [10.5, 3.0, -4.0]], [[0.0, 0.0, -99.5]]]
    clamped = ClampCount(FixedPoint(2, 10))
    assert counts(clamped) == (0, 0, 0.0, None)
    assert clamped.fraction == 0
    assert clamped.report() is None
    for obs in batches:
        clamped.count(np.array(obs))
    assert counts(clamped) == (9, 2, 99.5, [10.5, 0.0, 99.5])
    assert clamped.fraction == 2 / 9
    assert clamped.report() == (
        "2 of 9 observation values lay beyond +-10 and were clamped, in columns [0, 2]; "
        "a bound of 100 would hold them"
    )

    wider = ClampCount(FixedPoint(2, 100))
    for obs in batches:
        wider.count(np.array(obs))
    assert counts(wider) == (9, 0, 99.5, None)
    assert wider.report() is None


def test_the_remedy_of_a_float_storage_is_a_wider_one():
    clamped = ClampCount(Float(torch.float16))
    clamped.count(np.array([[1e5, 65504.0]]))
    assert clamped.report().endswith("in columns [0]; a wider --storage would hold them")


SOME_ROWS = st.tuples(st.integers(0, 3), st.just(4))


@given(
    b=st.floats(1, 1000),
    batches=st.lists(
        hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.just(4)), elements=VALUES),
        max_size=4,
    ),
)
def test_counts_against_brute_force(b, batches):
    clamped = ClampCount(FixedPoint(2, b))
    for obs in batches:
        before = obs.copy()
        clamped.count(obs)
        np.testing.assert_array_equal(obs, before)
    rows = [[abs(value) for value in row] for obs in batches for row in obs.tolist()]
    beyond = [[value if value > b else 0.0 for value in row] for row in rows]
    clipped = sum(value > 0 for row in beyond for value in row)
    peaks = [max(column) for column in zip(*beyond, strict=True)] if clipped else None
    assert counts(clamped) == (4 * len(rows), clipped, max(map(max, rows), default=0.0), peaks)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(data=st.data())
def test_what_is_counted_as_clamped_is_what_the_codec_clamps(codec, data):
    obs = data.draw(hnp.arrays(np.float64, (2, 3), elements=VALUES))
    at_bound = codec.encode(np.clip(obs, -codec.b, codec.b))
    assert torch.equal(codec.encode(obs).view(torch.uint8), at_bound.view(torch.uint8))
    clamped = ClampCount(codec)
    clamped.count(obs)
    assert clamped.clipped == np.count_nonzero(np.abs(obs) > codec.b)


@given(
    bad=st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 19)), NOT_FINITE, min_size=1),
    beyond=st.booleans(),
)
def test_nonfinite_columns_are_named_and_nothing_is_counted(bad, beyond):
    clamped = ClampCount(FixedPoint(2))
    clamped.count(np.full((3, 20), 1e5 if beyond else 1.0))
    before = counts(clamped)
    obs = np.full((3, 20), 1e6)
    for index, value in bad.items():
        obs[index] = value
    with pytest.raises(ValueError) as refused:
        clamped.count(obs)
    columns = columns_of(np.isin(np.arange(20), [column for _, column in bad]))
    assert str(refused.value) == f"nan or inf in observation columns {columns}"
    assert counts(clamped) == before


@pytest.mark.parametrize("value", [1.0, 500.0])
def test_the_counts_go_on_from_what_was_saved(value):
    one, other = ClampCount(FixedPoint(2)), ClampCount(FixedPoint(2))
    one.count(np.array([[0.0, value, -3.0]]))
    saved = one.state_dict()
    one.count(np.array([[-900.0, 0.0, 0.0]]))  # what was saved is a copy
    other.load_state_dict(saved)
    other.count(np.array([[-900.0, 0.0, 0.0]]))
    assert counts(one) == counts(other)
    assert one.report() == other.report() and "columns [0" in one.report()
