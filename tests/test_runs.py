"""runs.py: what a checkpoint holds and costs, whose run it is, and what is refused, in one line."""

import collections
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppo
import runs
import sac
from buffers import PER_ROW, ReplayBuffer, layout_bytes, replay_layout
from columns import LiveColumns
from quantize import FixedPoint, Packed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import checkpoint

CPU = torch.device("cpu")
MODULES = {"sac": sac, "ppo": ppo, "live": sac}  # "live": --drop-constant, laid out already
COMMON = {"env": "Pendulum-v1", "hidden": 4, "eval_episodes": 0, "quant_m": 2, "quant_b": 5.0}
SAC = {"learning_starts": 20, "buffer_size": 200, "batch_size": 8}
TINY = {
    "sac": SAC,
    "live": {**SAC, "drop_constant": True},
    "ppo": {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
}
STEPS = 64  # of 2 envs; both checkpoints are of this step, and the velocity was clamped before
three = pytest.mark.parametrize("name", MODULES)
both = pytest.mark.parametrize("name", ["sac", "ppo"])


@pytest.fixture(autouse=True)
def soon_laid_out(monkeypatch):
    monkeypatch.setattr(LiveColumns, "WATCHED", 10)


def make_args(name: str, folder: Path, **changes):
    common = {**COMMON, **TINY[name], "num_envs": 2, "total_timesteps": STEPS + 4}
    named = {"run_dir": str(folder), "run_name": "run", "resume": True}
    return MODULES[name].Args(**{**common, **named, **changes})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, bytes]:
    """An unfinished run's checkpoint for each of MODULES."""
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveColumns, "WATCHED", 10)
        for name, module in MODULES.items():
            folder = tmp_path_factory.mktemp(name)
            changes = {"total_timesteps": STEPS, "resume": False, "checkpoint_every": STEPS}
            module.main(make_args(name, folder, **changes))
            files[name] = (folder / "run" / "checkpoint.pt").read_bytes()
    return files


def plant(folder: Path, file: bytes) -> Path:
    """A run's folder that holds a checkpoint and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(file)
    return folder


def signed(body: bytes) -> bytes:
    """As a forger would: with the SHA-256 that `load` asks for."""
    return body + hashlib.sha256(body).digest()


def content_of(file: bytes) -> dict:
    return torch.load(io.BytesIO(file), weights_only=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_unlocked(folder: Path) -> None:
    os.close(runs._lock(folder))


def find(name: str, args) -> runs.Place:
    """`find_place`, with the lock released again."""
    place = runs.find_place(f"{MODULES[name].__name__}.py", args, CPU)
    os.close(place.lock)
    return place


def refusal(name: str, args) -> str:
    with pytest.raises(ValueError) as error:
        find(name, args)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: float):
    def ring(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ending(name: str, args) -> str:
    """How main ends: "trained", "refused: ...", "stopped: ..."; or, as it must not, "WRONG ..."."""
    script = f"{MODULES[name].__name__}.py"
    err = io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(err),
            time_limit(5),
        ):
            warnings.simplefilter("always")
            MODULES[name].main(args)
        return "trained"
    except SystemExit as end:
        code = end.code
    except (Exception, Hangs) as error:
        return f"WRONG {error!r}"
    lines = err.getvalue().splitlines()
    if code != 2:  # a fault in training; numpy may have warned of nan, as in any training
        one_line = isinstance(code, str) and len(code.splitlines()) == 1
        return f"stopped: {code}" if one_line else f"WRONG {code!r}"
    lines += [str(warning.message) for warning in warned]
    one_line = len(lines) == 1 and lines[0].startswith(f"{script}: error: --resume: ")
    return f"refused: {lines[0]}" if one_line else f"WRONG {lines}"


# --- Files ----------------------------------------------------------------------------------------

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


@st.composite
def tensors(draw) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0).byte()
    return bits.view(dtype).view(shape)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
contents = st.dictionaries(
    st.text(),
    st.recursive(
        plain | tensors(),
        lambda part: st.lists(part) | st.dictionaries(st.text(), part),
        max_leaves=9,
    ),
)


def same(a, b) -> bool:
    """Equal in type, dtype and shape and to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


@given(contents)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path, content):
    path = tmp_path / "file"
    runs.save(path, content)
    data = path.read_bytes()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert same(runs.load(path), content)
    assert list(tmp_path.iterdir()) == [path]


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        *(np.zeros(2), {1}, b"x", CPU),
        *(torch.nn.Parameter(torch.zeros(1)), torch.zeros(1).as_subclass(Sub)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_load_would_refuse_is_not_saved_and_named(tmp_path, value):
    path = tmp_path / "file"
    runs.save(path, {"before": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"^it\['a'\]\[1\]\['b'\] is <class '"):
        runs.save(path, {"fine": 0, "a": [None, {"b": value}]})
    assert files_in(tmp_path) == {"file": before}


def test_numpys_numbers_and_tuples_are_saved_as_pythons(tmp_path):
    path = tmp_path / "file"
    runs.save(path, {"a": (np.float32(0.5), [np.int64(3), np.bool_(True)])})
    assert same(runs.load(path), {"a": [0.5, [3, True]]})


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_replacing_leaves_the_old_file_if_anything_goes_wrong(tmp_path, error):
    path = tmp_path / "file"
    with runs.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(error), runs.replacing(path) as file:
        file.write(b"new")
        raise error
    assert files_in(tmp_path) == {"file": b"old"}
    with runs.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("limit", [0, 100, 5_000, 300_000])
def test_a_file_that_does_not_fit_leaves_the_old_one_and_tells_why(tmp_path, limit):
    path = tmp_path / "file"
    runs.save(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            runs.save(path, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(tmp_path) == {"file": before}


def test_a_file_cut_at_any_byte_or_with_any_byte_changed_is_refused(tmp_path):
    path = tmp_path / "file"
    runs.save(path, {"x": torch.arange(3)})
    data, rng = path.read_bytes(), random.Random(0)
    assert same(runs.load(path), {"x": torch.arange(3)})
    refused = pytest.raises(ValueError, match=r"^it (is damaged|cannot be read): [^\n]*$")
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), i)
            with refused:
                runs.load(path)
            os.pwrite(file.fileno(), bytes([byte]), i)
        for i in reversed(range(len(data))):
            file.truncate(i)
            with refused:
                runs.load(path)


@pytest.mark.parametrize("body", [b"", b"x", bytes(1000), b"PK\x05\x06" + bytes(18)])
def test_a_digest_alone_makes_no_checkpoint(tmp_path, body):
    path = tmp_path / "file"
    path.write_bytes(signed(body))
    with pytest.raises(ValueError, match=runs.FORGED):
        runs.load(path)


# --- Damage ---------------------------------------------------------------------------------------


def damage(rng: random.Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One of ten accidents."""
    kinds = "flip cut delete repeat zero swap append both empty random"
    kind, n = rng.choice(kinds.split()), len(data)
    a, size = rng.randrange(n), rng.choice((1, 2, 16, 64, 512, 4096))
    b, old = rng.randrange(n), bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            old[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del old[a:]
    elif kind == "delete":
        del old[a : a + size]
    elif kind == "repeat":
        old[b:b] = old[a : a + size]
    elif kind == "zero":
        old[a : a + size] = bytes(len(old[a : a + size]))
    elif kind == "swap":
        a, b = sorted((a, b))
        size = min(size, b - a, n - b)
        old[a : a + size], old[b : b + size] = old[b : b + size], old[a : a + size]
    elif kind == "append":
        old += rng.choice((bytes(size), rng.randbytes(size), old[-size:]))
    elif kind == "both":
        old += other
    elif kind == "empty":
        old.clear()
    elif kind == "random":
        old = rng.randbytes(size)
    return kind, bytes(old)


@three
def test_500_random_corruptions_are_refused_and_change_nothing(name, checkpoints, tmp_path):
    rng, data, args = random.Random(name), checkpoints[name], make_args(name, tmp_path)
    folder = plant(tmp_path / "run", data)
    assert find(name, args).saved["state"]["global_step"] == STEPS
    kinds = collections.Counter()
    while kinds.total() < 500:
        kind, damaged = damage(rng, data, checkpoints[rng.choice(list(MODULES))])
        if damaged == data:  # zeros that were zeroed
            continue
        kinds[kind] += 1
        (folder / "checkpoint.pt").write_bytes(damaged)
        message = refusal(name, args)
        assert str(folder) in message and " cannot be used: it " in message, (kind, message)
        if kinds.total() % 25 == 0:
            assert ending(name, args).startswith("refused"), kind
        assert files_in(folder) == {"checkpoint.pt": damaged}
        assert_unlocked(folder)
    assert len(kinds) == 10 and min(kinds.values()) > 20
    plant(folder, data)
    assert ending(name, args) == "trained"


# --- Forgeries: the SHA-256 is right --------------------------------------------------------------


@three
def test_random_forgeries_are_refused_or_train_but_never_crash(name, checkpoints, tmp_path):
    rng, data = random.Random(name), checkpoints[name][: -runs.DIGEST]
    args, endings = make_args(name, tmp_path), collections.Counter()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read("archive/data.pkl")
    for i in range(120):
        forged = damage(rng, data, checkpoints["ppo"])[1]
        if i % 3:  # in the pickle, which is small beside the rest; a stop fills what is missing
            damaged = damage(rng, pickled, pickled)[1][: len(pickled)].ljust(len(pickled), b".")
            forged = data.replace(pickled, damaged)
        folder = plant(tmp_path / "run", signed(forged))
        end = ending(name, args)
        assert not end.startswith("WRONG"), (i, end)
        endings[end.split(":")[0]] += 1
        if end.startswith("refused"):
            assert files_in(folder) == {"checkpoint.pt": signed(forged)}
            assert_unlocked(folder)
    assert endings["refused"] > 50 and endings["trained"] > 5


class Code:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_value(content: dict, code: Code) -> dict:
    return {**content, "more": code}


def as_part(content: dict, code: Code) -> dict:
    return {**content, "more": [{"deep": {"er": [code]}}]}


def as_whole(content: dict, code: Code) -> Code:
    return code


@both
@pytest.mark.parametrize("where", [as_value, as_part, as_whole])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "open"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    kind, zipped, where, name, checkpoints, tmp_path
):
    mark = tmp_path / "mark"
    code = {
        "system": Code(os.system, f"touch {shlex.quote(str(mark))}"),
        "eval": Code(eval, f"open({str(mark)!r}, 'w')"),
        "open": Code(open, str(mark), "w"),
    }[kind]
    file, content = io.BytesIO(), where(content_of(checkpoints[name]), code)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    folder = plant(tmp_path / "run", signed(file.getvalue()))
    assert runs.FORGED in refusal(name, make_args(name, tmp_path))
    assert ending(name, make_args(name, tmp_path)).startswith("refused")
    assert not mark.exists()
    assert_unlocked(folder)
    torch.load(folder / "checkpoint.pt", weights_only=False)  # it is dangerous indeed
    assert mark.exists()


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_or_another_protocol_is_one_line_at_most(
    name, protocol, checkpoints, tmp_path
):
    content = content_of(checkpoints[name])
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    plant(tmp_path / "run", signed(file.getvalue()))
    end = ending(name, make_args(name, tmp_path))
    assert end == "trained" if protocol == 2 else not end.startswith("WRONG")
    plant(tmp_path / "run", signed(pickle.dumps(content, protocol)))
    assert ending(name, make_args(name, tmp_path)).startswith("refused")


def places(part, path: tuple = ()):
    """The path and value of everything in a checkpoint, dicts and lists included."""
    if path:
        yield path, part
    if isinstance(part, dict | list):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from places(value, (*path, key))


def forge(file: bytes, path: tuple, *value) -> bytes:
    """A checkpoint with another value there, or without any."""
    content = content_of(file)
    *before, last = path
    part = content
    for key in before:
        part = part[key]
    if value:
        part[last] = value[0]
    else:
        del part[last]
    forged = io.BytesIO()
    torch.save(content, forged)
    return signed(forged.getvalue())


GONE = object()
OTHERS = (None, "x", {}, [1, 2], torch.zeros(2, 3, dtype=torch.int64))
NUMBERS = (-1, 2**70, 1.5, math.nan, math.inf, -math.inf, -(2**40))


def misfits(path: tuple, old):
    """What cannot be in the place of what a checkpoint holds."""
    yield GONE
    yield from (other for other in OTHERS if type(other) is not type(old))
    if isinstance(old, list) and old:
        yield from ([*old, *old], old[:-1])
    elif isinstance(old, torch.Tensor):
        yield torch.zeros(())
        if old.numel() and path[-1] != "episodes":  # of which there may be any number
            yield from (torch.cat([old, old]), old[:0].clone())


def matters(name: str, path: tuple) -> bool:
    """Whether a forgery at this place is to be tried for this run, and must be refused."""
    path = path[1:] if path[0] == "state" and len(path) > 1 else path
    if name == "live" and path[:2] != ("buffer", "obs"):
        return False  # as without --drop-constant
    if path[0] in ("args", "versions") and len(path) > 1:
        return path[-1] in ("seed", "torch")  # they are compared all alike
    if path[0] == "envs" and len(path) > 1:
        return False  # where an episode does not replay a new one begins, and that is said
    return path not in (("rng", "cuda"), ("clamp", "column_peak"))


def shown(path: tuple, new, end: str) -> str:
    value = "nothing" if new is GONE else " ".join(repr(new).split())
    return f"{'.'.join(map(str, path))} = {value[:60]}: {end[:160]}"


@three
def test_forged_structure_is_refused_in_one_line(name, checkpoints, tmp_path):
    file, args, wrong, tried = checkpoints[name], make_args(name, tmp_path), [], 0
    for path, old in places(content_of(file)):
        for new in misfits(path, old) if matters(name, path) else ():
            forged = forge(file, path, *([] if new is GONE else [new]))
            folder, end = plant(tmp_path / "run", forged), ending(name, args)
            tried += 1
            if not end.startswith("refused") or files_in(folder) != {"checkpoint.pt": forged}:
                wrong.append(shown(path, new, end))
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 70


@both
def test_forged_episodes_and_telemetry_never_crash(name, checkpoints, tmp_path):
    file, args, wrong = checkpoints[name], make_args(name, tmp_path), []
    for path, old in places(content_of(file)):
        below = path[0] == "state" and path[1:2] in (("envs",), ("clamp",), ("rng",))
        if below and len(path) > 2 and not matters(name, path):
            for new in (*misfits(path, old), -1, torch.full((1, 1), math.nan)):
                forged = forge(file, path, *([] if new is GONE else [new]))
                plant(tmp_path / "run", forged)
                end = ending(name, args)
                if end.startswith("WRONG"):
                    wrong.append(shown(path, new, end))
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@both
def test_forged_numbers_never_crash_and_counts_are_not_negative(name, checkpoints, tmp_path):
    file, args, wrong = checkpoints[name], make_args(name, tmp_path), []
    for path, old in places(content_of(file)):
        if type(old) not in (int, float) or path[0] == "args":
            continue
        for new in NUMBERS:
            plant(tmp_path / "run", forge(file, path, new))
            end = ending(name, args)
            count = path[-1] in ("global_step", "steps", "size") and new < 0
            if end.startswith("WRONG") or (count and not end.startswith("refused")):
                wrong.append(shown(path, new, end))
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@three
@pytest.mark.parametrize("bits", [0, 255])
def test_forged_tensors_never_crash(name, bits, checkpoints, tmp_path):
    file, args, wrong = checkpoints[name], make_args(name, tmp_path), []
    for path, old in places(content_of(file)):
        if isinstance(old, torch.Tensor) and old.numel():
            new = torch.full((old.nbytes,), bits, dtype=torch.uint8).view(old.dtype)
            plant(tmp_path / "run", forge(file, path, new.view(old.shape)))
            end = ending(name, args)
            if end.startswith("WRONG"):
                wrong.append(shown(path, bits, end))
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"head": [-1, 101]},
        {"head": [0, 100]},  # env 0's rows are 0 ... 100, env 1's 101 ... 201
        {"head": [101, 0]},
        {"head": [0, 202]},
        {"head": [2**62, 101]},
        {"fill": [0, 33]},
        {"fill": [-5, 33]},
        {"fill": [102, 33]},
        {"fill": [34, 33]},  # another number of rows than there are
        {"head": [0], "fill": [33]},
        {"head": [0, 101, 202], "fill": [33, 33, 33]},
        {"size": 63},
        {"size": 65},
        {"size": 0},
    ],
    ids=str,
)
def test_rows_that_the_replay_buffer_does_not_have_are_refused(change, checkpoints, tmp_path):
    content = content_of(checkpoints["sac"])
    buffer = content["state"]["buffer"]
    assert buffer["fill"].tolist() == [33, 33] and buffer["size"] == STEPS
    for key, value in change.items():
        buffer[key] = torch.tensor(value) if isinstance(value, list) else value
    plant(tmp_path / "run", b"")
    runs.save(tmp_path / "run" / "checkpoint.pt", content)
    assert ending("sac", make_args("sac", tmp_path)).startswith("refused")


@both
@pytest.mark.parametrize("key", ["format", "script", "versions", "device", "args"])
def test_a_forger_cannot_add_lines_to_the_message(name, key, checkpoints, tmp_path):
    lines, path = "1\nppo.py: all is well\x1b[2J", (key,)
    path += {"versions": ("torch",), "args": ("gamma",)}.get(key, ())
    plant(tmp_path / "run", forge(checkpoints[name], path, lines))
    end = ending(name, make_args(name, tmp_path))
    assert end.startswith("refused") and "\x1b" not in end


# --- Checkpoints of other runs --------------------------------------------------------------------


def other(value, name: str):
    """Another value for a flag."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"env": "Humanoid-v3", "storage": "float16", "memory_budget": "1GB"}.get(name, 3)


def differing(name: str) -> list[str]:
    return [field.name for field in fields(MODULES[name].Args) if field.name != "device"]


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for name in ("sac", "ppo") for flag in differing(name)]
)
def test_every_flag_is_compared_but_those_that_may_differ(name, flag, checkpoints, tmp_path):
    args = make_args(name, tmp_path)
    content, here = content_of(checkpoints[name]), getattr(args, flag)
    there = other(here, flag)
    content["args"] = {**asdict(args), flag: there}
    plant(tmp_path / "run", b"")
    runs.save(tmp_path / "run" / "checkpoint.pt", content)
    if flag in runs.MAY_DIFFER:
        assert find(name, args).saved["args"][flag] == there
    else:
        message = refusal(name, args)
        assert message.endswith(f"--{flag.replace('_', '-')} was {there} there and is {here} here")
    assert_unlocked(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("sac", {"env": "MountainCarContinuous-v0"}, "--env was Pendulum-v1 there and is Mount"),
        ("sac", {"quant_m": 1}, "--quant-m was 2 there and is 1 here"),
        ("sac", {"quant_m": None, "quant_b": 127.0}, "--quant-m was 2 there and is None here"),
        ("sac", {"quant_b": 6.0}, "--quant-b was 5.0 there and is 6.0 here"),
        ("sac", {"pack": True}, "--pack was False there and is True here"),
        ("sac", {"drop_constant": True}, "--drop-constant was False there and is True here"),
        ("sac", {"hidden": 5}, "--hidden was 4 there and is 5 here"),
        ("sac", {"num_envs": 3}, "--num-envs was 2 there and is 3 here"),
        ("sac", {"seed": 11}, "--seed was 1 there and is 11 here"),
        ("sac", {"buffer_size": 201}, "--buffer-size was 200 there and is 201 here"),
        ("ppo", {"env": "MountainCarContinuous-v0"}, "--env was Pendulum-v1 there and is Mount"),
        ("ppo", {"pack": True}, "--pack was False there and is True here"),
        ("ppo", {"num_envs": 1}, "--num-envs was 2 there and is 1 here"),
        ("ppo", {"n_steps": 32}, "--n-steps was 16 there and is 32 here"),
    ],
)
def test_a_checkpoint_of_other_arguments_is_refused(name, changes, said, checkpoints, tmp_path):
    folder = plant(tmp_path / "run", checkpoints[name])
    end = ending(name, make_args(name, tmp_path, **changes))
    assert end.startswith("refused") and said in end
    assert files_in(folder) == {"checkpoint.pt": checkpoints[name]}
    assert_unlocked(folder)


@pytest.mark.parametrize(("name", "other_name"), [("sac", "ppo"), ("ppo", "sac")])
def test_a_checkpoint_of_the_other_script_is_refused(name, other_name, checkpoints, tmp_path):
    plant(tmp_path / "run", checkpoints[other_name])
    end = ending(name, make_args(name, tmp_path))
    assert end.startswith("refused") and f"by {other_name}.py, this is {name}.py" in end


@both
@pytest.mark.parametrize("library", runs.VERSIONS)
def test_another_version_is_refused_with_the_one_to_install(
    name, library, checkpoints, tmp_path, monkeypatch
):
    plant(tmp_path / "run", checkpoints[name])
    then = runs.VERSIONS[library]
    monkeypatch.setitem(runs.VERSIONS, library, "99.9")
    message = refusal(name, make_args(name, tmp_path))
    assert f"with {library} {then} and this is 99.9; install {library}=={then} to" in message


@both
def test_another_format_and_another_device_are_refused(name, checkpoints, tmp_path, monkeypatch):
    plant(tmp_path / "run", checkpoints[name])
    args = make_args(name, tmp_path)
    with pytest.raises(ValueError, match=r"it was trained on cpu and this is cuda$"):
        runs.find_place(f"{name}.py", args, torch.device("cuda"))
    assert_unlocked(tmp_path / "run")
    monkeypatch.setattr(runs, "FORMAT", 9)
    assert refusal(name, args).endswith("it has format 1; this program has 9")


def test_networks_of_another_depth_are_refused(checkpoints, tmp_path, monkeypatch):
    plain, orthogonal = sac.uniform, ppo.orthogonal
    deeper = lambda count, first, *sizes: plain(count, first, sizes[0], *sizes)  # noqa: E731
    monkeypatch.setattr(sac, "uniform", deeper)
    monkeypatch.setattr(
        ppo, "orthogonal", lambda first, *sizes, gain: orthogonal(first, 4, *sizes, gain=gain)
    )
    # Of a Pendulum's 3 observations and 1 action, with 4 hidden units: both critics have 90
    # parameters; policy, values and log_std 83. Another layer adds 20 to each network.
    said = {
        "sac": "it['target'] is torch.float32 (90,) there and torch.float32 (130,) here",
        "ppo": "its networks have 83 parameters, these have 123",
    }
    for name, line in said.items():
        plant(tmp_path / "run", checkpoints[name])
        end = ending(name, make_args(name, tmp_path))
        assert end.startswith("refused")
        assert end.endswith(line)
        assert_unlocked(tmp_path / "run")


@both
def test_what_may_differ_may_differ_and_folders_may_move(name, checkpoints, tmp_path):
    plant(tmp_path / "elsewhere" / "renamed", checkpoints[name])
    changes = {"total_timesteps": STEPS + 40, "checkpoint_every": 16, "eval_episodes": 1}
    args = make_args(name, tmp_path / "elsewhere", run_name="renamed", **changes)
    result = MODULES[name].main(args)["result"]
    assert STEPS + 40 <= result["global_step"] < STEPS + 80 and len(result["evaluation"]) == 1


# --- The run's folder -----------------------------------------------------------------------------


class Runs:
    """Runs of the same arguments in a folder, each with a checkpoint or a result as is told."""

    def __init__(self, name: str, folder: Path, file: bytes):
        self.name, self.folder, self.file, self.clock = name, folder, file, itertools.count()
        self.args = make_args(name, folder, run_name=None, total_timesteps=STEPS + 4)
        begun = make_args(name, folder, run_name=None, resume=False)
        self.base = find(name, begun).folder.name
        (folder / self.base).rmdir()

    def add(self, suffix: str, result: str | None = None, file: bytes | None = None) -> None:
        """The newest so far."""
        folder = plant(self.folder / (self.base + suffix), file or self.file)
        now = 1e9 + next(self.clock)
        os.utime(folder / "checkpoint.pt", (now, now))
        if result is not None:
            (folder / "result.json").write_text(result)

    def taken(self, **changes) -> str:
        """The suffix of the run that --resume takes."""
        args = MODULES[self.name].Args(**{**asdict(self.args), **changes})
        return find(self.name, args).folder.name.removeprefix(self.base)

    def refused(self, **changes) -> str:
        args = MODULES[self.name].Args(**{**asdict(self.args), **changes})
        return refusal(self.name, args)


@pytest.fixture(params=["sac", "ppo"])
def some(request, checkpoints, tmp_path):
    return Runs(request.param, tmp_path, checkpoints[request.param])


def test_new_runs_get_the_next_free_number_and_are_locked(some):
    args = MODULES[some.name].Args(**{**asdict(some.args), "resume": False})
    places = [runs.find_place(f"{some.name}.py", args, CPU) for _ in range(3)]
    names = [place.folder.name for place in places]
    assert names == [some.base, f"{some.base}-2", f"{some.base}-3"]
    for place in places:
        assert place.saved is None
        with pytest.raises(ValueError, match=f"another process is training {place.folder}"):
            runs._lock(place.folder)
        os.close(place.lock)
        assert_unlocked(place.folder)


def test_the_unfinished_run_that_was_saved_last_is_taken(some):
    for suffix in ("-2", "", "-10", "-3"):
        some.add(suffix)
        assert some.taken() == suffix
    os.utime(some.folder / some.base / "checkpoint.pt")
    assert some.taken() == ""


def test_finished_runs_are_skipped_until_more_steps_are_asked_for(some):
    done = f'{{"global_step": {STEPS + 4}}}'
    some.add("")
    some.add("-2", done)
    some.add("-3", done)
    assert some.taken() == ""
    assert some.taken(total_timesteps=STEPS + 5) == "-3"
    (some.folder / some.base / "result.json").write_text(done)
    message = f"-3 is finished; --total-timesteps beyond {STEPS + 4} trains it further"
    assert message in some.refused()


@pytest.mark.parametrize("result", ["", "{", "[]", "{}", "3", '{"global_step": null}', "\x00"])
def test_a_result_that_is_none_does_not_make_a_run_finished(some, result):
    some.add("", result)
    assert some.taken() == ""


def test_names_that_only_look_alike_are_other_runs(some):
    some.add("")
    for suffix in ("1", "1-2", "-2-3", "-x", "-", "-2x", ".old", " ", "\n"):
        some.add(suffix)
    for name in (f"x{some.base}", some.base.upper(), some.base[:-1]):
        plant(some.folder / name, some.file)
    (some.folder / f"{some.base}-4").write_text("a file")
    (some.folder / f"{some.base}-5").mkdir()
    (some.folder / f"{some.base}-6" / "checkpoint.pt").mkdir(parents=True)
    (some.folder / f"{some.base}-7").symlink_to("nowhere")
    assert some.taken() == ""
    assert some.refused(seed=2).endswith("or name its folder with --run-name")


def test_no_run_at_all_is_one_line(some):
    message = f"--resume: {some.folder} holds no checkpoint of a run with these arguments"
    assert some.refused().startswith(message)
    message = some.refused(run_dir=str(some.folder / "absent"))
    assert f"{some.folder / 'absent'} holds no checkpoint" in message
    assert not list(some.folder.iterdir())


def test_an_explicit_name_is_taken_and_no_other(some):
    some.add("")
    plant(some.folder / "mine", some.file)
    assert some.taken(run_name="mine") == "mine"
    assert "yours has no checkpoint to go on from" in some.refused(run_name="yours")
    (some.folder / "empty").mkdir()
    assert "empty has no checkpoint to go on from" in some.refused(run_name="empty")
    (some.folder / "mine" / "result.json").write_text(f'{{"global_step": {STEPS + 4}}}')
    assert "mine is finished" in some.refused(run_name="mine")
    assert some.taken() == ""


def test_an_existing_name_is_refused_without_resume(some):
    plant(some.folder / "mine", some.file)
    assert "exists; add --resume to go on with it, or" in some.refused(
        run_name="mine", resume=False
    )
    (some.folder / "mine" / "checkpoint.pt").rename(some.folder / "mine" / "log")
    assert some.refused(run_name="mine", resume=False).endswith("exists; choose another --run-name")


def test_an_empty_folder_of_that_name_is_taken(some):
    """Of a run that was stopped before it began."""
    (some.folder / "mine").mkdir()
    args = MODULES[some.name].Args(**{**asdict(some.args), "resume": False, "run_name": "mine"})
    place = runs.find_place(f"{some.name}.py", args, CPU)
    assert place.folder == some.folder / "mine" and place.saved is None
    os.close(place.lock)


def test_a_run_in_training_is_left_alone(some):
    some.add("")
    some.add("-2")
    lock = runs._lock(some.folder / f"{some.base}-2")
    assert "another process is training" in some.refused()  # rather than an older one taken
    assert "another process is training" in some.refused(run_name=f"{some.base}-2")
    os.close(lock)
    assert some.taken() == "-2"


def test_a_damaged_checkpoint_is_refused_rather_than_an_older_run_taken(some):
    some.add("")
    some.add("-2", file=some.file[:-1])
    assert f"{some.base}-2/checkpoint.pt cannot be used: it is damaged" in some.refused()
    assert_unlocked(some.folder / f"{some.base}-2")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1)
TEXTS = TEXTS.filter(lambda text: text != "None")  # tyro takes that for None
CHANGES = {
    "env": TEXTS,
    "run_dir": TEXTS,
    "run_name": st.none() | TEXTS,
    "quant_m": st.none() | st.integers(0, 9),
    "quant_b": st.floats(1, 1e9),
    "storage": st.sampled_from([None, "float16", "float8_e4m3fn"]),
    "pack": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "learning_rate": st.floats(0, 1),
    "checkpoint_every": st.integers(0, 10**12),
}
OWN_CHANGES = {
    "sac": {
        "target_entropy": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "memory_budget": st.none() | st.sampled_from(["750MB", "1 GB"]),
    },
    "ppo": {"ent_coef": st.floats(0, 1e12), "n_steps": st.integers(1, 10**12)},
}


@both
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_command_line_gives_the_arguments_back(name, data):
    changes = data.draw(st.fixed_dictionaries({}, optional=CHANGES | OWN_CHANGES[name]))
    args = MODULES[name].Args(**changes)
    script, resumed = f"{name}.py", MODULES[name].Args(**{**changes, "resume": True})
    for line, expected in (
        (runs.command_line(script, args), args),
        (runs.command_line(script, args, resume=True), resumed),
    ):
        python, named, *words = shlex.split(line)
        assert (python, named) == (sys.executable, script)
        assert tyro.cli(MODULES[name].Args, args=words) == expected


@both
@pytest.mark.parametrize("run_name", ["-x", "--env", "--hidden=3", "-1", "a b", "it's", "", "-"])
def test_the_command_line_names_a_run_whatever_its_name(name, run_name):
    args = MODULES[name].Args(run_name=run_name)
    words = shlex.split(runs.command_line(f"{name}.py", args))[2:]
    assert tyro.cli(MODULES[name].Args, args=words) == args


# --- Size and memory ------------------------------------------------------------------------------

SPARE = 64e6  # bytes that anonymous resident memory may grow by; glibc keeps as much of freed ones


def played(codec, rows: int, num_envs: int, n: int, steps: int, **options) -> ReplayBuffer:
    """A replay buffer after some steps; only env 0's episodes end, so rings fill unequally."""
    buffer = ReplayBuffer(codec, rows, num_envs, n, 2, CPU, seed=0, **options)
    some = np.random.default_rng(0).normal(0, 9, (20, num_envs, n))
    some[..., n // 4 :] = some[0, 0, n // 4 :]  # three in four columns are constant
    buffer.start(some[0], np.ones(num_envs, bool))
    for step in range(steps):
        if step == 3 * steps // 4:
            some[:, :, -1] = 1.0  # but the last one changes late
        end = np.arange(num_envs) + step % 5 == 0
        obs = some[step % 20]
        buffer.add(np.ones((num_envs, 2)), np.ones(num_envs), obs, end & False, end)
        if end.any():
            buffer.start(obs, end)
    return buffer


def row_bytes(buffer: ReplayBuffer) -> int:
    """Of one row of every array that is stored by rows."""
    observed = buffer.obs
    arrays = [block for _, block in observed.blocks] if hasattr(observed, "blocks") else None
    arrays = [observed.array] if arrays is None else arrays
    arrays += [torch.as_tensor(getattr(buffer, name)) for name in PER_ROW]
    return sum(array[0].nbytes for array in arrays)


@pytest.mark.parametrize("drop_constant", [False, True])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("share", [0.25, 2.5])
@pytest.mark.parametrize("codec", [FixedPoint(2), Packed(2)], ids=lambda codec: codec.name)
def test_a_checkpoint_takes_the_bytes_of_the_filled_rows(
    codec, share, num_envs, drop_constant, tmp_path
):
    rows, n, options = 3_000, 400, {"drop_constant": drop_constant}
    steps = int(share * rows / num_envs) if num_envs == 3 else int(share * rows / 1.2)
    buffer = played(codec, rows, num_envs, n, steps, **options)
    filled, whole = buffer.fill.sum(), num_envs * buffer.rows
    if share < 1:
        assert 0.24 < filled / whole < 0.29
        assert num_envs == 1 or buffer.fill[0] > 1.1 * buffer.fill[1]
    else:
        assert filled == whole  # and gone round
    path = tmp_path / "file"
    runs.save(path, {"buffer": buffer.state()})
    assert 0 < path.stat().st_size - filled * row_bytes(buffer) < 20_000

    again = ReplayBuffer(codec, rows, num_envs, n, 2, CPU, seed=7, **options)
    again.load(runs.load(path)["buffer"])
    assert same(again.state(), buffer.state()) and again.nbytes == buffer.nbytes
    drawn, drawn_again = buffer.sample(50), again.sample(50)
    assert all(map(torch.equal, drawn, drawn_again))


@pytest.mark.parametrize(("codec", "num_envs"), [(FixedPoint(2), 3), (Packed(2), 1)])
def test_neither_saving_nor_loading_makes_a_copy_of_the_buffer(codec, num_envs, tmp_path):
    rows, n, path = 6_000, 20_000, tmp_path / "file"  # 225 or 240 MB, two thirds of them filled
    buffer = played(codec, rows, num_envs, n, int(0.6 * rows / num_envs))
    filled = int(buffer.fill.sum()) * row_bytes(buffer)
    assert 2 * SPARE < filled < 0.75 * buffer.nbytes
    _, grown = checkpoint.measure(lambda: runs.save(path, {"buffer": buffer.state()}))
    assert grown < SPARE
    copied = tmp_path / "copied"
    _, grown = checkpoint.measure(lambda: runs.save(copied, copy.deepcopy(buffer.state())))
    assert grown > SPARE  # so a copy would have been seen
    copied.unlink()

    again = ReplayBuffer(codec, rows, num_envs, n, 2, CPU, seed=0)
    _, grown = checkpoint.measure(lambda: again.load(runs.load(path)["buffer"]))
    assert filled - SPARE < grown < filled + SPARE  # the rows themselves, not those that are empty
    again.touch()
    _, grown = checkpoint.measure(lambda: again.load(runs.load(path)["buffer"]))
    assert grown < SPARE


def test_a_million_rows_of_humanoid_take_at_most_800_mb(tmp_path, monkeypatch):
    layout = replay_layout(Packed(2), 1_000_000, 1, 376, 17)
    assert layout_bytes(layout) < 800e6 - 10e6
    monkeypatch.setattr(checkpoint, "STORAGES", (Packed(2),))
    out = tmp_path / "checkpoint.csv"
    checkpoint.main(["--rows", "5000", "--out", str(out)])
    (small,) = csv.DictReader(out.open())
    beside = int(small["bytes"]) - int(small["bytes of the buffer"])
    assert 0 < beside < 10e6
    for measured in csv.DictReader((checkpoint.ROOT / "experiments/results/checkpoint.csv").open()):
        assert measured["rows"] == "1000000"
        assert abs(int(measured["bytes"]) - int(measured["bytes of the buffer"]) - beside) < 1e4
        assert max(int(measured[f"growth at {when}"]) for when in ("saving", "loading")) < SPARE
