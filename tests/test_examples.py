"""examples/: Stable-Baselines3 gets from our replay buffer what its own gives, and DDPG learns."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer as TheirBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import buffers
import memory
from examples import cleanrl_loop
from examples.sb3_buffer import FixedPointReplayBuffer
from quantize import FixedPoint, Packed, quantize
from support.columns import LiveColumns, Rows
from support.envs import make

ROOT = Path(memory.__file__).parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OBS, ACTION = Box(-np.inf, np.inf, (3,), np.float64), Box(-1, 1, (2,), np.float32)
CPU = torch.device("cpu")


def ours(
    size: int = 1000, n_envs: int = 1, space: gym.Space = OBS, **how
) -> FixedPointReplayBuffer:
    return FixedPointReplayBuffer(size, space, ACTION, device="cpu", n_envs=n_envs, **how)


def stream(steps: int, n_envs: int, seed: int = 0, reset_at: tuple[int, ...] = ()) -> list[tuple]:
    """What SB3 hands to `add`, with ends of both kinds; all envs are also reset before reset_at.

    Some episodes begin with the very observation that the last one ended with.
    """
    rng = np.random.default_rng(seed)
    found, obs = [], rng.normal(size=(n_envs, 3))
    for step in range(steps):
        if step in reset_at:
            obs = rng.normal(size=(n_envs, 3))
        next_obs = obs + rng.normal(size=(n_envs, 3))
        done, timeout, same = (rng.random((3, n_envs)) < [[0.2], [0.5], [0.3]]).tolist()
        infos = [{"TimeLimit.truncated": d and t} for d, t in zip(done, timeout, strict=True)]
        action = rng.uniform(-1, 1, (n_envs, 2)).astype(np.float32)
        found.append((obs, next_obs, action, rng.normal(size=n_envs), np.array(done), infos))
        begins = (np.array(done) & ~np.array(same))[:, None]
        obs = np.where(begins, rng.normal(size=(n_envs, 3)), next_obs)
    return found


def held_by_ours(buffer: FixedPointReplayBuffer, env: int, normalizer=None) -> list[torch.Tensor]:
    """All transitions of an env from the oldest to the newest, as `sample` hands them out."""
    rows = buffer.rows
    order = env * rows.ring + (rows.head[env] + 1 + np.arange(rows.ring)) % rows.ring
    order = order[rows.is_start.numpy()[order]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_draw", lambda n: order[:n])
        return list(buffer.sample(len(order), normalizer)[:5])


def held_by_theirs(buffer: TheirBuffer, env: int, normalizer=None) -> list[torch.Tensor]:
    """The same of SB3's own."""
    order = np.arange(buffer.size()) + (buffer.pos if buffer.full else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "randint", lambda *_, size, **__: np.full(size, env))
        samples = buffer._get_samples(order % buffer.buffer_size, normalizer)
    return list(samples[:5])


def fill(rows: list[tuple], *filled) -> None:
    """Add rows to the buffers, from arrays that are written to afterwards."""
    for *arrays, infos in rows:
        for buffer in filled:
            lent = [array.copy() for array in arrays]
            buffer.add(*lent, infos)
            for array in lent:
                array.fill(9)


# --- Stable-Baselines3: what is stored and sampled -----------------------------------------------


@pytest.mark.parametrize("drop_constant", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [1, 30, 99, 500])
def test_float64_holds_the_transitions_of_sb3s_own(n_envs, steps, drop_constant, monkeypatch):
    """The newest ones; each episode in the ring takes one row more than it has steps."""
    monkeypatch.setattr(LiveColumns, "WATCHED", 6)
    mine = ours(100 * n_envs, n_envs, m=None, drop_constant=drop_constant)
    theirs = TheirBuffer(500 * n_envs, OBS, ACTION, device="cpu", n_envs=n_envs)
    rows, sizes = stream(steps, n_envs, reset_at=(resets := (20, 480))), []
    fill(rows, mine, theirs)
    for env in range(n_envs):
        got, expected = held_by_ours(mine, env), held_by_theirs(theirs, env)
        k = len(got[0])
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == torch.float32 and x.shape[1:] == y.shape[1:]
            assert torch.equal(x, y[-k:].float())
        final = [row[4][env] or step in resets for step, row in enumerate(rows, 1)]
        # Beside the head, each transition takes a row, and each end one for its observation.
        assert k == max(k for k in range(steps + 1) if k + sum(final[steps - k :]) + 1 <= 101)
        sizes.append(k)
    assert mine.size() == sum(sizes) // n_envs


def test_an_episode_that_begins_where_the_last_one_ended():
    """The reset happens to lead to the final observation, which is the first one then, too."""
    mine, s = ours(m=None), np.arange(12.0).reshape(4, 1, 3)
    action, reward, no, yes = np.zeros((1, 2)), np.zeros(1), np.array([False]), np.array([True])
    mine.add(s[0], s[1], action, reward, yes, [{"TimeLimit.truncated": True}])
    mine.add(s[1], s[2], action, reward, no, [{}])
    mine.add(s[1], s[3], action, reward, yes, [{}])  # reset in mid-episode
    obs, _, next_obs, done, _ = held_by_ours(mine, 0)
    assert obs[:, 0].tolist() == [0, 3, 3] and next_obs[:, 0].tolist() == [3, 6, 9]
    assert done[:, 0].tolist() == [0, 0, 1]


def test_what_is_learned_from_is_rounded():
    rows = stream(60, 3)
    exact, plain, packed = ours(n_envs=3, m=None), ours(n_envs=3), ours(n_envs=3, b=9, pack=True)
    dropping = ours(n_envs=3, b=9, pack=True, drop_constant=True)
    fill(rows, exact, plain, packed, dropping)
    for env in range(3):
        obs, action, next_obs, done, reward = held_by_ours(plain, env)
        raw = np.array([row[0][env] for row in rows]), np.array([row[1][env] for row in rows])
        for got, s in zip((obs, next_obs), raw, strict=True):
            np.testing.assert_array_equal(got, quantize(s, 2, 127).astype(np.float32))
            assert not np.array_equal(got, s.astype(np.float32))
        for got, same in zip((action, done, reward), (1, 3, 4), strict=True):
            assert torch.equal(got, held_by_ours(exact, env)[same])
        bounded = torch.from_numpy(quantize(raw[0], 2, 9)).float()
        assert torch.equal(held_by_ours(packed, env)[0], bounded)
        for x, y in zip(held_by_ours(packed, env), held_by_ours(dropping, env), strict=True):
            assert torch.equal(x, y)
    assert isinstance(dropping.rows.obs, LiveColumns) and isinstance(packed.rows.obs, Rows)
    assert packed.rows.clamped.clipped > 0 and plain.rows.clamped.clipped == 0


def test_a_truncated_episode_is_right_where_optimize_memory_usage_is_wrong():
    s, reset, action, reward = np.ones((1, 3)), np.full((1, 3), 7.0), np.zeros((1, 2)), np.ones(1)
    options = {"optimize_memory_usage": True, "handle_timeout_termination": False}
    theirs, mine = TheirBuffer(100, OBS, ACTION, device="cpu", **options), ours()
    for buffer in (theirs, mine):
        buffer.add(s, 2 * s, action, reward, np.array([True]), [{"TimeLimit.truncated": True}])
        buffer.add(
            reset, 8 * s, action, reward, np.array([False]), [{"TimeLimit.truncated": False}]
        )
    wrong, right = held_by_theirs(theirs, 0), held_by_ours(mine, 0)
    assert wrong[2][0].tolist() == [7, 7, 7] and wrong[3].tolist() == [[1], [0]]
    assert right[2][0].tolist() == [2, 2, 2] and right[3].tolist() == [[0], [0]]


def test_every_transition_is_sampled_as_often():
    mine = ours(40, 2)
    fill(stream(200, 2), mine)
    held = torch.cat([held_by_ours(mine, env)[4] for env in range(2)])[:, 0]
    drawn = mine.sample(40_000)[4][:, 0]
    counts = torch.stack([(drawn == reward).sum() for reward in held])
    assert counts.sum() == 40_000
    expected = 40_000 / len(held)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_reset_empties_it():
    mine, rows = ours(m=None), stream(30, 1)
    middle = next(i for i, row in enumerate(rows) if not row[4].any()) + 1  # goes on from the last
    fill(rows[:middle], mine)
    mine.reset()
    assert mine.size() == 0
    with pytest.raises(ValueError, match="no complete transition"):
        mine.sample(1)
    fill(rows[middle:], mine)
    expected = np.concatenate([row[0] for row in rows[middle:]]).astype(np.float32)
    np.testing.assert_array_equal(held_by_ours(mine, 0)[0], expected)


# --- Stable-Baselines3: training -----------------------------------------------------------------


class Walk(gym.Env):
    """A random walk that an action pushes; it terminates far from 0."""

    action_space = ACTION

    def __init__(self, dtype: type):
        self.observation_space = Box(-np.inf, np.inf, (3,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.np_random.normal(size=3)
        return self.s.astype(self.observation_space.dtype), {}

    def step(self, action):
        self.s = self.s + 0.5 * self.np_random.normal(size=3) + 0.2 * action.sum()
        far = bool(np.abs(self.s).max() > 3)
        return self.s.astype(self.observation_space.dtype), -np.abs(self.s).sum(), far, False, {}


def trained(buffer_class: type, n_envs: int, dtype: type, normalize: bool, **how) -> SAC:
    """A short training in two calls of `learn`, the second of which resets in mid-episode."""
    env = make_vec_env(lambda: TimeLimit(Walk(dtype), 7), n_envs)
    model = SAC(
        "MlpPolicy", VecNormalize(env) if normalize else env, seed=3, device="cpu",
        buffer_size=1000, batch_size=16, learning_starts=12, policy_kwargs={"net_arch": [16, 16]},
        replay_buffer_class=buffer_class, replay_buffer_kwargs=how,
    )  # fmt: skip
    return model.learn(30 * n_envs).learn(25 * n_envs)


def draw_as_sb3(buffer: buffers.ReplayBuffer, n: int) -> np.ndarray:
    """In place of `_draw`: the transitions that SB3's own buffer draws, while no ring is full."""
    starts = buffer.is_start.numpy().reshape(-1, buffer.ring)
    step = np.random.randint(0, buffer.size // len(starts), size=n)  # noqa: NPY002
    env = np.random.randint(0, high=len(starts), size=(n,))  # noqa: NPY002
    rows = [np.flatnonzero(ring) for ring in starts]
    return np.array([e * buffer.ring + rows[e][t] for e, t in zip(env, step, strict=True)])


CASES = [
    (1, np.float64, False),
    (3, np.float64, False),
    (1, np.float32, True),
    (3, np.float32, True),
]


@pytest.mark.parametrize(("n_envs", "dtype", "normalize"), CASES)
def test_sac_learns_the_same_from_ours_as_from_its_own(n_envs, dtype, normalize, monkeypatch):
    monkeypatch.setattr(buffers.ReplayBuffer, "_draw", draw_as_sb3)
    case = n_envs, dtype, normalize
    theirs = trained(TheirBuffer, *case)
    mine, rounded = (trained(FixedPointReplayBuffer, *case, m=m) for m in (None, 2))
    ends = theirs.replay_buffer.dones, theirs.replay_buffer.timeouts
    assert (ends[0] > ends[1]).any() and ends[1].any()  # both kinds
    expected = theirs.policy.state_dict() | {"alpha": theirs.log_ent_coef}
    got = mine.policy.state_dict() | {"alpha": mine.log_ent_coef}
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    moved = rounded.policy.state_dict()
    assert not all(torch.equal(moved[name], value) for name, value in got.items() if name in moved)
    assert [e["r"] for e in mine.ep_info_buffer] == [e["r"] for e in theirs.ep_info_buffer]


def test_normalized_float64_observations_differ_by_float32s_rounding():
    """Ours are float32 before they are normalised, SB3's are so afterwards."""
    model = trained(FixedPointReplayBuffer, 2, np.float64, True, m=None)
    theirs = TheirBuffer(1000, OBS, ACTION, device="cpu", n_envs=2)
    rows, mine = stream(50, 2), ours(n_envs=2, m=None)
    fill(rows, mine, theirs)
    for env in range(2):
        got = held_by_ours(mine, env, model.get_vec_normalize_env())
        expected = held_by_theirs(theirs, env, model.get_vec_normalize_env())
        raw = held_by_ours(mine, env)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(got[0], raw[0]) and not torch.allclose(got[4], raw[4])


@pytest.mark.parametrize("how", [{"m": None}, {"m": 2}, {"pack": True, "drop_constant": True}])
def test_saved_and_loaded(how, tmp_path):
    model = trained(FixedPointReplayBuffer, 2, np.float64, False, **how)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.save(tmp_path / "model.zip")
    loaded = SAC.load(tmp_path / "model.zip", env=model.env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    before = [held_by_ours(model.replay_buffer, env) for env in range(2)]
    steps = loaded.replay_buffer.size()
    for sample in (model.replay_buffer.sample(50), loaded.replay_buffer.sample(50)):
        assert sample.observations.shape == (50, 3)
    for x, y in zip(
        model.replay_buffer.sample(50)[:5], loaded.replay_buffer.sample(50)[:5], strict=True
    ):
        assert torch.equal(x, y)
    loaded.learn(20)
    assert loaded.replay_buffer.size() == steps + 10
    for env, transitions in enumerate(before):
        after = held_by_ours(loaded.replay_buffer, env)
        assert all(torch.equal(x, y[:steps]) for x, y in zip(transitions, after, strict=True))


def test_the_seed_is_sb3s():
    first, second = (trained(FixedPointReplayBuffer, 1, np.float64, False) for _ in range(2))
    other = first.replay_buffer.sample(50)
    assert torch.equal(other[0], second.replay_buffer.sample(50)[0])
    torch.manual_seed(4)
    fresh = ours()
    fill(stream(60, 1), fresh, again := ours())
    torch.manual_seed(5)
    fill(stream(60, 1), different := ours())
    drawn = [buffer.sample(50)[0] for buffer in (fresh, again, different)]
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])


@pytest.mark.parametrize(
    ("obs", "action", "how", "said"),
    [
        (OBS, Discrete(3), {}, "has actions Discrete(3); a Box of shape (n,)"),
        (Discrete(3), ACTION, {}, "has observations Discrete(3); a Box of shape (n,)"),
        (Box(0, 255, (8, 8, 3), np.uint8), ACTION, {}, "a Box of shape (n,)"),
        (Dict(a=OBS), ACTION, {}, "has observations Dict("),
        (OBS, ACTION, {"optimize_memory_usage": True}, "drop optimize_memory_usage"),
        (OBS, ACTION, {"m": -1}, "is 0 or more"),
        (OBS, ACTION, {"m": None, "pack": True}, "does nothing without --quant-m"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_line(obs, action, how, said):
    with pytest.raises(ValueError) as error:
        FixedPointReplayBuffer(10, obs, action, device="cpu", **how)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("algo", [TD3, DDPG])
def test_td3_and_ddpg_take_it(algo):
    model = algo("MlpPolicy", Walk(np.float64), device="cpu", learning_starts=10, batch_size=8,
                 replay_buffer_class=FixedPointReplayBuffer)  # fmt: skip
    fresh = copy.deepcopy(model.policy.state_dict())
    assert model.learn(30).replay_buffer.size() == 30
    assert all(not torch.equal(x, fresh[name]) for name, x in model.policy.state_dict().items())


def test_sb3s_dqn_is_refused():
    with pytest.raises(ValueError, match="has actions Discrete"):
        DQN("MlpPolicy", "CartPole-v1", replay_buffer_class=FixedPointReplayBuffer)


# --- As they are run -----------------------------------------------------------------------------


def run(name: str, *argv: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *argv])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def layouts(capsys, **robot) -> dict[str, int]:
    """Bytes of every layout, as memory.py prints them."""
    memory.main(memory.Args(layouts=True, json=True, **robot))
    return {row["layout"]: row["total"] for row in json.loads(capsys.readouterr().out)["rows"]}


HUMANOID = {"obs_dim": 376, "act_dim": 17, "live_columns": 257}


@pytest.mark.parametrize(
    ("name", "steps"), [("sb3_buffer.py", "101"), ("cleanrl_loop.py", "4")], ids=["sb3", "cleanrl"]
)
def test_it_trains_and_prints_memory_before_and_after(name, steps, monkeypatch, capsys):
    expected, humanoid = layouts(capsys, obs_dim=3, act_dim=1), layouts(capsys, **HUMANOID)
    run(name, "--total-timesteps", steps, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert re.search(r"^Pendulum-v1, mean return of 10 episodes: -\d+\.\d$", shown, re.M)
    # Pendulum's observations are float32 in SB3, too.
    before, after = expected["CleanRL, LeanRL: float32"], expected["ours: int16 (m=2, b=127)"]
    line = f"1,000,000 rows: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after\n"
    assert line in shown
    for layout, total in humanoid.items():
        assert re.search(rf"^{re.escape(layout)} .* {total / 1e6:,.1f} ", shown, re.M)


def test_humanoids_buffers_are_as_large_as_memory_py_says(capsys):
    expected, env = layouts(capsys, **HUMANOID), make("Humanoid-v3")
    spaces = env.observation_space, env.action_space
    theirs = TheirBuffer(1_000_000, *spaces)
    stored = sum(x.nbytes for x in vars(theirs).values() if isinstance(x, np.ndarray))
    assert stored == expected["Stable-Baselines3, SBX: float64"]
    for how, codec in (({}, FixedPoint(2)), ({"pack": True}, Packed(2))):
        mine = FixedPointReplayBuffer(1_000_000, *spaces, **how)
        assert mine.rows.nbytes == expected[f"ours: {codec.name}"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_docstring_says_the_memory(path, capsys):
    totals = layouts(capsys, **HUMANOID).values()
    totals = {f"{total / 1e9:.{digits}f}" for total in totals for digits in (1, 2)}
    text = path.read_text().split('"""')[1]
    said = re.findall(r"([\d.]+) GB", text)
    assert len(said) >= 3 and set(said) <= totals


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_bad_input_is_one_line(path, monkeypatch, capsys):
    for env, said in (("CartPole-v1", "has actions Discrete(2)"), ("Nothing-v0", "unknown --env")):
        with pytest.raises(SystemExit) as end:
            run(path.name, "--env", env, monkeypatch=monkeypatch)
        shown = capsys.readouterr()
        assert end.value.code == 2 and shown.out == ""
        assert shown.err.startswith(f"{path.name}: error: ") and said in shown.err
        assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "code", "remedy"),
    [
        ("examples/sb3_buffer.py", 1, "tests/requirements.txt"),
        ("experiments/peers.py", 2, "./run.sh experiments/peers.py"),
    ],
)
def test_without_stable_baselines3_there_is_one_line(script, code, remedy):
    absent = "import runpy, sys; sys.modules['stable_baselines3'] = None; "
    command = [sys.executable, "-c", f"{absent}runpy.run_path(sys.argv[1])", ROOT / script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert "stable_baselines3" in done.stderr and remedy in done.stderr


# --- The loop in CleanRL's style -----------------------------------------------------------------


def test_every_parameter_moves():
    fresh, short = (cleanrl_loop.main(total_timesteps=steps) for steps in (0, 4))
    for before, after in zip(fresh.parameters(), short.parameters(), strict=True):
        assert not torch.equal(before, after) and after.isfinite().all()


def test_what_it_stores_are_a_pendulums_steps(monkeypatch):
    """Also those at the time-outs, every 200 steps."""
    batches, sample = [], buffers.ReplayBuffer.sample

    def recorded(buffer, batch_size):
        batches.append(sample(buffer, batch_size))
        return batches[-1]

    monkeypatch.setattr(buffers.ReplayBuffer, "sample", recorded)
    cleanrl_loop.main(total_timesteps=900, quant_m=None)
    assert len(batches) == 450
    batch = buffers.ReplayBatch(*map(torch.cat, zip(*batches, strict=True)))
    assert not batch.terminated.any()
    (cos, sin, speed), torque = batch.obs.T, 2 * batch.action[:, 0]
    angle = torch.atan2(sin, cos)
    cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
    torch.testing.assert_close(batch.reward, -cost, atol=1e-4, rtol=1e-4)
    speed = (speed + 0.05 * (15 * sin + 3 * torque)).clamp(-8, 8)
    angle = angle + 0.05 * speed
    following = torch.stack([angle.cos(), angle.sin(), speed], 1)
    torch.testing.assert_close(batch.next_obs, following, atol=1e-4, rtol=1e-4)


def test_its_updates_are_ddpgs(monkeypatch):
    """Against a plain one: two optimisers, and gradients of the actor's loss by autograd.grad."""
    batches, sample = [], buffers.ReplayBuffer.sample

    def recorded(buffer, batch_size):
        batches.append(sample(buffer, batch_size))
        terminated = torch.arange(batch_size) % 3 == 0  # a pendulum has none
        batches[-1] = batches[-1]._replace(terminated=terminated)
        return batches[-1]

    actor, critic = networks = cleanrl_loop.main(total_timesteps=0)
    monkeypatch.setattr(buffers.ReplayBuffer, "sample", recorded)
    trained = cleanrl_loop.main(total_timesteps=10)
    actor_target, critic_target = copy.deepcopy(networks)
    adams = [torch.optim.Adam(net.parameters(), cleanrl_loop.LEARNING_RATE) for net in networks]
    for batch in batches:
        with torch.no_grad():
            next_action = actor_target(batch.next_obs)
            next_q = critic_target(torch.cat([batch.next_obs, next_action], 1)).squeeze(1)
        y = batch.reward + 0.99 * (1 - batch.terminated.float()) * next_q
        q = critic(torch.cat([batch.obs, batch.action], 1)).squeeze(1)
        gradients = torch.autograd.grad(torch.nn.functional.mse_loss(q, y), [*critic.parameters()])
        value = critic(torch.cat([batch.obs, actor(batch.obs)], 1)).mean()
        gradients = [*torch.autograd.grad(-value, [*actor.parameters()]), *gradients]
        for parameter, gradient in zip(networks.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for adam in adams:
            adam.step()
        targets = [*actor_target.parameters(), *critic_target.parameters()]
        for target, parameter in zip(targets, networks.parameters(), strict=True):
            target.data = 0.995 * target.data + 0.005 * parameter.data
    assert len(batches) == 5
    for got, expected in zip(trained.parameters(), networks.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_the_lines_of_our_buffer_are_marked():
    lines = (ROOT / "examples/cleanrl_loop.py").read_text().splitlines()
    marked = [line for line in lines if "  # ours" in line]
    uses = [
        line
        for line in lines
        if re.search(r"\bbuffer = |\bbuffer\.[a-z]+\(|^from (buffers|quantize)", line)
    ]
    assert marked == uses and len(marked) == 6
