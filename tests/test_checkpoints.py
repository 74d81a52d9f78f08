"""support/checkpoints.py: what is saved comes back bit for bit, or the old file stays as it was."""

import copy
import hashlib
import io
import math
import os
import random
import resource
import shlex
import struct

import numpy as np
import pytest
import torch

from buffers import ReplayBuffer
from checkpoint import measure
from quantize import FixedPoint
from support.checkpoints import NOT_OURS, load, replacing, restore, save, state_of

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
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
        as_bytes = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Files ----------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path):
    path = tmp_path / "file"
    tensors = [
        torch.arange(count).view(shape) for count, shape in ((0, (2, 0)), (1, ()), (6, (2, 3)))
    ]
    content = {
        "tensors": [tensor.to(dtype) for tensor in tensors for dtype in DTYPES],
        "strided": torch.arange(9.0).view(3, 3).T[1:],
        "numbers": [0, -(2**70), 2**127, True, None, 0.1, math.nan, -math.inf, -0.0],
        "texts": {"": [], "é\n": {}, "x\x00": {3: "a key that is a number"}},
    }
    save(path, content)
    data = path.read_bytes()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert same(load(path), content)
    assert list(tmp_path.iterdir()) == [path]


SPARSE = torch.eye(2).to_sparse()


@pytest.mark.parametrize("value", [np.zeros(2), {1}, b"x", torch.device("cpu"), SPARSE], ids=repr)
def test_what_load_would_refuse_is_not_saved_and_named(tmp_path, value):
    path = tmp_path / "file"
    save(path, {"before": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"^it\['a'\]\[1\]\['b'\] is a \w+, which a checkpoint can"):
        save(path, {"fine": 0, "a": [None, {"b": value}]})
    assert files_in(tmp_path) == {"file": before}


def test_numpys_numbers_parameters_and_tuples_are_saved_as_plain_ones(tmp_path):
    path = tmp_path / "file"
    numbers = (np.float32(0.5), [np.int64(3), np.bool_(True), {np.int64(3): 1}])
    save(path, {"a": numbers, "b": torch.nn.Parameter(torch.ones(2))})
    assert same(load(path), {"a": [0.5, [3, True, {3: 1}]], "b": torch.ones(2)})


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_replacing_leaves_the_old_file_if_anything_goes_wrong(tmp_path, error):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"new")
        raise error
    assert files_in(tmp_path) == {"file": b"old"}
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("limit", [0, 100, 5_000, 300_000])
def test_a_file_that_does_not_fit_leaves_the_old_one_and_tells_why(tmp_path, limit):
    path = tmp_path / "file"
    save(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(path, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(tmp_path) == {"file": before}


def test_a_file_cut_at_any_byte_or_with_any_byte_changed_is_refused(tmp_path):
    path = tmp_path / "file"
    save(path, {"x": torch.arange(3)})
    data, rng = path.read_bytes(), random.Random(0)
    assert same(load(path), {"x": torch.arange(3)})
    refused = pytest.raises(ValueError, match=r"^it (is damaged|cannot be read): [^\n]*$")
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), i)
            with refused:
                load(path)
            os.pwrite(file.fileno(), bytes([byte]), i)
        for i in reversed(range(len(data))):
            file.truncate(i)
            with refused:
                load(path)


# --- Strangers: the SHA-256 is right --------------------------------------------------------------


SPARE = 64e6  # bytes that anonymous resident memory may grow by; glibc keeps as much of freed ones


def signed(body: bytes) -> bytes:
    """As a stranger would: with the SHA-256 that `load` asks for."""
    return body + hashlib.sha256(body).digest()


class Code:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "open"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(kind, zipped, tmp_path):
    path, mark = tmp_path / "file", tmp_path / "mark"
    code = {
        "system": Code(os.system, f"touch {shlex.quote(str(mark))}"),
        "eval": Code(eval, f"open({str(mark)!r}, 'w')"),
        "open": Code(open, str(mark), "w"),
    }[kind]
    file = io.BytesIO()
    content = {"format": 2, "parts": [{"deep": {"er": [code]}}]}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    path.write_bytes(signed(file.getvalue()))
    with pytest.raises(ValueError, match=NOT_OURS):
        load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it is dangerous indeed
    assert mark.exists()


@pytest.mark.parametrize("body", [b"", b"x", bytes(1000), b"PK\x05\x06" + bytes(18)])
def test_a_digest_alone_makes_no_checkpoint(tmp_path, body):
    path = tmp_path / "file"
    path.write_bytes(signed(body))
    with pytest.raises(ValueError, match=NOT_OURS):
        load(path)


def test_a_tensor_that_overlaps_itself_and_a_shared_list_are_saved_as_what_they_are(tmp_path):
    shared = [1, 2]
    state = {"mask": torch.ones(1).expand(5), "lists": [shared, shared]}
    save(tmp_path / "file", state)
    loaded = load(tmp_path / "file")
    assert torch.equal(loaded["mask"], torch.ones(5)) and loaded["lists"] == [[1, 2], [1, 2]]


# --- Parts ----------------------------------------------------------------------------------------


def through_a_file(part, tmp_path):
    save(tmp_path / "file", {"part": state_of(part)})
    return load(tmp_path / "file")["part"]


def test_generators_go_on_with_the_numbers_that_would_have_come(tmp_path):
    numpys, torchs = np.random.default_rng(3), torch.Generator().manual_seed(3)
    for rng, draw in (
        (numpys, lambda: numpys.normal(size=4).tolist()),
        (torchs, lambda: torch.randn(4, generator=torchs).tolist()),
    ):
        draw()
        saved, expected = through_a_file(rng, tmp_path), draw()
        draw()
        restore(rng, saved)
        assert draw() == expected


def test_tensors_are_restored_in_place_and_must_have_the_shape(tmp_path):
    flat = torch.arange(4.0)
    part = flat[1:3].requires_grad_()
    saved = through_a_file(part, tmp_path)
    flat[:] = 0
    restore(part, saved)
    assert flat.tolist() == [0, 1, 2, 0] and part.requires_grad
    with pytest.raises(ValueError, match=r"its shape is \(2,\) there, \(3, 2\) here"):
        restore(torch.zeros(3, 2), saved)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(fused, tmp_path):
    def step(weights, adam):
        weights.grad = weights.detach().cos()
        adam.step()

    weights = torch.nn.Parameter(torch.linspace(0, 1, 5))
    adam = torch.optim.Adam([weights], 0.1, fused=fused)
    for _ in range(3):
        step(weights, adam)
    saved = [through_a_file(part, tmp_path) for part in (weights, adam)]
    again = torch.nn.Parameter(torch.zeros(5))
    adam_again = torch.optim.Adam([again], 0.1, fused=fused)
    restore(again, saved[0])
    restore(adam_again, saved[1])
    (tmp_path / "file").write_bytes(b"")  # and it needs the file no more
    step(weights, adam), step(again, adam_again)
    assert torch.equal(again, weights)


def test_neither_saving_nor_loading_makes_a_copy_of_the_buffer(tmp_path):
    path, n = tmp_path / "file", 20_000
    buffer = ReplayBuffer(FixedPoint(2), 6_000, 3, n, 2, torch.device("cpu"), seed=0)  # 240 MB
    obs, ends = np.full((3, n), 1.5), np.zeros(3, bool)
    buffer.start(obs, ~ends)
    for _ in range(2_500):
        buffer.add(np.ones((3, 2)), np.ones(3), obs, ends, ends)

    def saving(state) -> None:
        save(path, {"buffer": state})

    assert measure(lambda: saving(buffer.state_dict()))[1] < SPARE
    assert measure(lambda: saving(copy.deepcopy(buffer.state_dict())))[1] > SPARE  # would be seen
    assert measure(lambda: buffer.load_state_dict(load(path)["buffer"]))[1] < SPARE
