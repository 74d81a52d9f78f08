"""experiments/play.py: a run's own evaluation again, bit for bit, and pictures of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import SCRIPTS

import play
from play import Args, main
from support import checkpoints, folders, networks, runs

ROOT = Path(__file__).parent.parent
SMALL = {"env": "Pendulum-v1", "hidden": 16, "batch_size": 16, "eval_episodes": 2}
ONLY = {"sac": {"learning_starts": 20, "buffer_size": 1000}, "ppo": {"n_steps": 32}}
RUNS = {
    "sac": ("sac", {"quant_m": 2}),
    "sac-act": ("sac", {"quant_m": 0, "quant_act": True, "pack": True, "num_envs": 2}),
    "ppo": ("ppo", {"quant_m": 1, "seed": 5}),
    "ppo-act": ("ppo", {"quant_m": 0, "quant_act": True, "num_envs": 2, "device": "auto"}),
}


def train(algo: str, folder: Path, **settings) -> list[float]:
    """Train a little into a folder; return the evaluation."""
    where = {"run_dir": str(folder.parent), "run_name": folder.name}
    script = SCRIPTS[algo]
    args = script.Args(**SMALL | {"total_timesteps": 64} | ONLY[algo] | where | settings)
    return script.main(args)["result"]["evaluation"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders and evaluations of RUNS."""
    root = tmp_path_factory.mktemp("runs")
    return {
        name: (root / name, train(algo, root / name, **settings))
        for name, (algo, settings) in RUNS.items()
    }


@pytest.fixture
def further(tmp_path):
    """A run finished after 64 steps that was trained further, up to 96; all evaluations."""
    folder = tmp_path / "further"
    first = train("ppo", folder, checkpoint_every=32)
    kept = {name: (folder / name).read_bytes() for name in ("weights.pt", "result.json")}
    then = train("ppo", folder, checkpoint_every=32, total_timesteps=96, resume=True)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    assert first != then
    return folder, first, then


def refused(capsys, *args, **settings) -> str:
    """What is said, in one line and with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(Args(*args, **settings))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("play.py: error: ")
    assert error.count("\n") == 1
    return error


# --- Returns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_returns_are_those_of_the_evaluation(name, finished, capsys):
    folder, evaluation = finished[name]
    before = {path: path.stat() for path in [folder, *folder.iterdir()]}
    returns = main(Args(folder, episodes=3))
    assert (
        returns[:2] == evaluation == json.loads((folder / "result.json").read_text())["evaluation"]
    )
    out = capsys.readouterr().out
    assert out.startswith(
        f"{folder}/weights.pt: {RUNS[name][0]}.py on Pendulum-v1 after 64 steps\n"
    )
    assert out.endswith(
        f"episode 3: return {returns[2]:.1f}\nmean return {np.mean(returns):.1f}, "
        f"standard deviation (n - 1) {np.std(returns, ddof=1):.1f}\n"
        "bit for bit what result.json has\n"
    )
    for path, stat in before.items():
        assert path.stat().st_mtime_ns == stat.st_mtime_ns


def test_another_seed_is_another_episode(finished, capsys):
    folder, evaluation = finished["sac"]
    seed = 1 + runs.EVALUATION_SEED
    assert main(Args(folder, episodes=1, seed=seed)) == evaluation[:1]
    assert main(Args(folder, episodes=1, seed=7)) == main(Args(folder, episodes=1, seed=7))
    assert main(Args(folder, episodes=1, seed=7)) != evaluation[:1]
    out, err = capsys.readouterr()
    assert "deviation" not in out and "result.json" not in out + err  # of one, and of another seed


def test_other_returns_than_in_the_result_are_told(finished, tmp_path, capsys):
    folder = shutil.copytree(finished["ppo"][0], tmp_path / "run")
    weights = torch.load(folder / "weights.pt", weights_only=True)
    weights["actor_critic"]["mean.bias"] += 0.01
    torch.save(weights, folder / "weights.pt")
    assert main(Args(folder, episodes=1)) != finished["ppo"][1][:1]
    out, err = capsys.readouterr()
    assert err.startswith("warning: result.json has other returns") and "bit for bit" not in out


# --- Which state ---------------------------------------------------------------------------------


def test_the_newer_of_two_states_is_played(further, capsys):
    folder, first, then = further
    assert main(Args(folder, episodes=2)) == then
    assert (
        f"{folder}/checkpoint.pt: ppo.py on Pendulum-v1 after 96 steps\n" in capsys.readouterr().out
    )
    newest = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").unlink()
    assert main(Args(folder, episodes=2)) == first
    (folder / "checkpoint.pt").write_bytes(newest)
    (folder / "weights.pt").unlink()  # as of a run that never got to its end
    (folder / "result.json").unlink()
    assert main(Args(folder, episodes=2)) == then


@pytest.mark.parametrize("algo", SCRIPTS)
def test_a_run_that_is_training_is_played(algo, tmp_path, monkeypatch):
    """Its lock is held, and its checkpoint replaced, meanwhile."""
    folder, played, load = tmp_path / "run", [], checkpoints.load

    def while_it_is_read(path):
        saved = load(path)
        checkpoints.save(path, {"another": 1})
        return saved

    def play_then_evaluate(*args, evaluate=runs.evaluate):
        before = (folder / "checkpoint.pt").read_bytes()
        assert not (folder / "result.json").exists()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "load", while_it_is_read)
            played.extend(main(Args(folder, episodes=2)))
        (folder / "checkpoint.pt").write_bytes(before)
        with pytest.raises(ValueError, match="another process is training"):
            folders.lock(folder)
        return evaluate(*args)

    monkeypatch.setattr(runs, "evaluate", play_then_evaluate)
    assert train(algo, folder, checkpoint_every=32) == played


# --- Changed code --------------------------------------------------------------------------------


def test_a_hacked_main_is_played_as_it_stands(tmp_path, capsys):
    """Hack 11 normalises observations: a part more in `main`, and another way to act."""
    for name in ("support", "experiments", "docs/hacks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    apply = ["git", "apply", "docs/hacks/normalised-observations.patch"]
    subprocess.run(apply, cwd=tmp_path, env=os.environ | {"GIT_DIR": "none"}, check=True)
    code = (
        "import ppo, play, pathlib\n"
        "result = ppo.main(ppo.Args('Pendulum-v1', total_timesteps=64, n_steps=32, batch_size=16,"
        " hidden=16, eval_episodes=1, run_name='run'))['result']\n"
        "assert play.main(play.Args(pathlib.Path('runs/run'), 1)) == result['evaluation']\n"
    )
    where = {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'experiments'}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | where,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Here is code that knows no such part.
    assert refused(capsys, tmp_path / "runs/run").endswith(
        "weights.pt does not fit ppo.py, which was changed since it was trained: "
        "only one of them has 'obs_norm' among its parts\n"
    )


def test_weights_that_do_not_fit_the_networks_any_more(finished, capsys, monkeypatch):
    class Wider(networks.Actor):
        def __init__(self, obs_dim, act_dim, hidden):
            super().__init__(obs_dim, act_dim, hidden + 1)

    monkeypatch.setattr(SCRIPTS["sac"], "Actor", Wider)
    error = refused(capsys, finished["sac"][0])
    assert "weights.pt does not fit sac.py, which was changed since" in error
    assert "shape torch.Size([16, 3])" in error and "torch.Size([17, 3])" in error


# --- Bad input -----------------------------------------------------------------------------------


def test_arguments_out_of_range(finished, capsys, tmp_path):
    folder, _ = finished["sac"]
    assert "--episodes 0 is too few" in refused(capsys, folder, episodes=0)
    assert "--seed -1 is negative" in refused(capsys, folder, seed=-1)
    assert "x.avi must end in .mp4" in refused(capsys, folder, video=Path("x.avi"))
    assert "x must end in .png" in refused(capsys, folder, stills=Path("x"))
    (tmp_path / "x.mp4").mkdir()
    assert "x.mp4 is a folder" in refused(capsys, folder, video=tmp_path / "x.mp4")


def test_folders_without_a_policy(capsys, tmp_path):
    assert "there is no folder" in refused(capsys, tmp_path / "none")
    (tmp_path / "file").touch()
    assert "there is no folder" in refused(capsys, tmp_path / "file")
    assert "holds no policy: neither" in refused(capsys, tmp_path)
    (tmp_path / "result.json").touch()
    assert "holds no policy: neither" in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value: line 1"),
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode"),
        (b"[]", "TypeError("),
        (b"{}", "KeyError('global_step')"),
        (b'{"global_step": 1, "algo": "dqn", "evaluation": []}', "KeyError('dqn.py')"),
    ],
)
def test_a_damaged_result(content, why, finished, capsys, tmp_path):
    folder = shutil.copytree(finished["sac"][0], tmp_path / "run")
    (folder / "result.json").write_bytes(content)
    error = refused(capsys, folder)
    assert "result.json cannot be used: " in error and why in error


@pytest.mark.parametrize("changed", [{"gamma": 2}, {"hidden": "16"}, {"fourth": 4}])
def test_a_result_with_other_arguments(changed, finished, capsys, tmp_path):
    folder = shutil.copytree(finished["sac"][0], tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    result["args"] |= changed
    (folder / "result.json").write_text(json.dumps(result))
    assert "result.json cannot be used: " in refused(capsys, folder)


def test_damaged_weights(finished, capsys, tmp_path):
    folder = shutil.copytree(finished["sac"][0], tmp_path / "run")
    content = (folder / "weights.pt").read_bytes()
    for damaged in (b"", content[:1000], b"0" * 1000):
        (folder / "weights.pt").write_bytes(damaged)
        assert "weights.pt cannot be used: " in refused(capsys, folder)
    torch.save([torch.zeros(2)], folder / "weights.pt")
    assert "weights.pt cannot be used: " in refused(capsys, folder)


def test_a_damaged_checkpoint(further, capsys):
    folder, _, _ = further
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[1000] ^= 1
    (folder / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt cannot be used: it is damaged" in refused(capsys, folder)
    checkpoints.save(folder / "checkpoint.pt", {"script": "toy.py", "args": {}})
    assert "checkpoint.pt cannot be used: KeyError('toy.py')" in refused(capsys, folder)


def test_an_unknown_environment(finished, capsys, tmp_path):
    folder = shutil.copytree(finished["sac"][0], tmp_path / "run")
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("Pendulum-v1", "Pendulums-v7"))
    assert "unknown --env 'Pendulums-v7'" in refused(capsys, folder)


# --- Pictures ------------------------------------------------------------------------------------


class Clock(gym.Env):
    """Its image tells the step: grey of 8 times the step, 33 x 47, both odd."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space, self.action_space = Box(-1, 1, (3,)), Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(action[0]), False, self.steps == 25, {}

    def render(self):
        return np.full((33, 47, 3), 8 * self.steps, np.uint8)


@pytest.fixture
def clock(tmp_path):
    """The folder of a run on Clock."""
    gym.register("Clock-v0", Clock)
    train("ppo", tmp_path / "clock", env="Clock-v0")
    yield tmp_path / "clock"
    del gym.registry["Clock-v0"]


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video, (T, height, width, 3) uint8."""
    with av.open(str(path)) as video:
        return np.array([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def test_a_video_shows_every_step_of_the_first_episode(clock, tmp_path, capsys):
    main(Args(clock, episodes=2, video=tmp_path / "a.mp4", stills=tmp_path / "a.png"))
    assert f"wrote {tmp_path}/a.mp4\nwrote {tmp_path}/a.png\n" in capsys.readouterr().out
    frames = frames_of(tmp_path / "a.mp4")
    assert frames.shape == (25, 32, 46, 3)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), 8 * np.arange(25), atol=3)  # compressed
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 10
    strip = (255 * matplotlib.image.imread(tmp_path / "a.png")).round()[..., :3]
    assert strip.shape == (16, 6 * 23, 3)
    stills = strip.reshape(16, 6, 23, 3).transpose(1, 0, 2, 3).reshape(6, -1)
    assert (stills == 8 * np.array([[0], [2], [4], [6], [8], [10]])).all()  # 0.2 s are 2 steps


def test_what_cannot_be_written_is_told_before_the_first_episode(
    clock, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(play.envs, "evaluate", None)
    for name in ("video", "stills"):
        path = tmp_path / "none" / f"x.{'mp4' if name == 'video' else 'png'}"
        error = refused(capsys, clock, **{name: path})
        assert f"--{name} {path} cannot be written: No such file or directory" in error


def test_a_video_that_was_not_finished_leaves_what_was_there(clock, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "a.mp4").write_bytes(b"another")
    monkeypatch.setattr(play.envs, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(Args(clock, video=tmp_path / "a.mp4"))
    assert (tmp_path / "a.mp4").read_bytes() == b"another"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.filterwarnings("ignore:.*render_modes")
def test_environments_that_cannot_be_drawn(clock, tmp_path, monkeypatch, capsys):
    video = tmp_path / "a.mp4"
    monkeypatch.setattr(Clock, "render", lambda self: None)
    assert "draws object of shape ()" in refused(capsys, clock, video=video)

    def render(self):
        raise ImportError("no library\nat all")

    monkeypatch.setattr(Clock, "render", render)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert "Clock-v0 cannot be drawn: no library at all\n" in refused(capsys, clock, video=video)
    monkeypatch.setattr(Clock, "metadata", {})
    assert "it has no render_mode 'rgb_array'" in refused(capsys, clock, video=video)
    assert not video.exists() and not list(tmp_path.glob("*.part"))


@pytest.fixture(scope="module")
def humanoid(tmp_path_factory):
    """The folder of a run on Humanoid-v3, whose episodes are short, and its evaluation."""
    folder = tmp_path_factory.mktemp("humanoid") / "run"
    return folder, train("ppo", folder, env="Humanoid-v3", eval_episodes=1)


def test_a_robot_is_filmed_or_the_missing_library_named(humanoid, tmp_path):
    """Really, in a process of its own, with what this machine has."""
    folder, evaluation = humanoid
    video, stills = tmp_path / "a.mp4", tmp_path / "a.png"
    words = ["--episodes", "1", "--video", video, "--stills", stills]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    command = [sys.executable, ROOT / "experiments/play.py", folder, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if play.find_gl() is None:
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "libegl1" in done.stderr and "libosmesa6" in done.stderr
        return
    assert (done.returncode, done.stderr) == (0, "")
    assert f"return {evaluation[0]:.1f}\n" in done.stdout and "bit for bit" in done.stdout
    frames, steps = frames_of(video), []
    act = play.policy_of(play.read(folder))
    play.envs.evaluate("Humanoid-v3", act, 1, 10_001, lambda *step: steps.append(step))
    assert frames.shape == (len(steps), 480, 480, 3)
    assert frames[0].std() > 20 and frames[0].mean() > 20  # neither black nor empty
    assert (frames[1:] != frames[:-1]).any((1, 2, 3)).all()
    shown = sum(round(0.2 * i * 67) < len(steps) for i in range(6))  # at 67 steps a second
    assert matplotlib.image.imread(stills).shape[:2] == (240, 240 * shown)


def test_without_opengl_the_libraries_are_named(humanoid, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(play, "find_gl", lambda: None)
    error = refused(capsys, humanoid[0], video=tmp_path / "a.mp4")
    assert "neither EGL nor OSMesa works here" in error and "libegl1, or libosmesa6" in error
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_work_is_not_found(monkeypatch):
    monkeypatch.setattr(play, "DRAWS", "import os; exit(os.environ['MUJOCO_GL'] != 'osmesa')")
    assert play.find_gl() == "osmesa"
    monkeypatch.setattr(play, "DRAWS", "raise OSError")
    assert play.find_gl() is None


def test_the_camera_goes_along_where_there_is_such_a_one(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "not looked at")
    image = {"render_mode": "rgb_array"}
    for env_id, more in (("Ant-v3", {"camera_name": "track"}), ("InvertedPendulum-v5", {})):
        assert play.set_up_camera(env_id, play.envs.make(env_id)) == image | more
