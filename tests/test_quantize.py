"""quantize.py: Eq. 4-6 against exact rational arithmetic, limits and invariants."""

import math
import re
import warnings
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings

from quantize import (
    STORAGE_DTYPES,
    FixedPoint,
    Float,
    Packed,
    bits,
    make_codec,
    quantize,
    stored_bits,
)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def fixed_point(m: int, b: float, make: type[FixedPoint] = FixedPoint) -> FixedPoint:
    """A FixedPoint without its warning about float32; `test_warns_*` look at that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(m, b)


def assert_same_bits(actual, expected) -> None:
    """Equal float32 patterns, so 0.0 is not -0.0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32))


def exact_quantize(s: float, m: int, b: float) -> float:
    """Eq. 4 and 5 without floating point; python rounds fractions half to even."""
    return float(round(min(max(Fraction(s), -Fraction(b)), Fraction(b)), m))


@st.composite
def formats(draw, max_code: int = 2**31 - 1) -> tuple[int, float]:
    """(m, b), integer bounds and others, with codes up to max_code."""
    m = draw(st.integers(0, 6))
    most = max_code // 10**m
    small = min(most, 300)
    integers = st.integers(1, most) | st.integers(1, small)
    return m, draw(integers | st.floats(1, most) | st.floats(1, small))


def values(m: int, b: float) -> st.SearchStrategy[float]:
    """Finite float64: inside the bound, at it, far beyond it, on ties, and both zeros."""
    edges = [0.0, b, math.nextafter(b, 0), math.nextafter(b, math.inf), 1e308, 5e-324, 2.0**-1022]
    ties = st.integers(-int(b * 10**m), int(b * 10**m)).map(lambda code: (code + 0.5) / 10**m)
    return st.one_of(
        st.floats(-b, b),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from([sign * edge for edge in edges for sign in (1, -1)]),
        ties,
    )


@st.composite
def cases(draw, max_code: int = 2**31 - 1):
    """(m, b, obs) with obs (n,) or (k, n)."""
    m, b = draw(formats(max_code))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=6))
    return m, b, draw(hnp.arrays(np.float64, shape, elements=values(m, b)))


# Eq. 4 and 5


@pytest.mark.parametrize(
    ("s", "m", "b", "expected"),
    [
        (0.5, 0, 127, 0.0),
        (1.5, 0, 127, 2.0),
        (2.5, 0, 127, 2.0),
        (-1.5, 0, 127, -2.0),
        (-0.5, 0, 127, 0.0),
        (0.25, 1, 127, 0.2),
        (-0.75, 1, 127, -0.8),
        (0.125, 2, 127, 0.12),
        (0.375, 2, 127, 0.38),
        (-0.125, 2, 127, -0.12),
        (1.23456, 2, 127, 1.23),
        (-126.996, 2, 127, -127.0),
        (-0.0, 2, 127, 0.0),
        (-0.004, 2, 127, 0.0),
        (-5e-324, 6, 127, 0.0),
        (127.0, 2, 127, 127.0),
        (-127.0, 2, 127, -127.0),
        (127.01, 2, 127, 127.0),
        (1e308, 2, 127, 127.0),
        (-1e308, 0, 127, -127.0),
        (100.0, 0, 2.5, 2.0),  # clamp first, round second
        (-9.0, 1, 1.26, -1.3),
    ],
)
def test_quantize_hand_values(s, m, b, expected):
    actual = quantize(np.array([s]), m, b)
    assert actual.dtype == np.float64
    assert actual[0].hex() == expected.hex()
    assert exact_quantize(s, m, b).hex() == expected.hex()


@given(formats(), st.data())
def test_quantize_is_eq_5_in_rational_arithmetic(form, data):
    m, b = form
    s = data.draw(values(m, b))
    # Next to a tie the float64 product s * 10^m may land on the tie; ties have a table above.
    distance = abs(Fraction(s) * 10**m % 1 - Fraction(1, 2))
    assume(distance > abs(Fraction(s)) * 10**m / 2**50)
    assert float(quantize(s, m, b)).hex() == exact_quantize(s, m, b).hex()


# encode and decode


@settings(max_examples=500)
@given(cases())
def test_round_trip_is_float32_of_quantize(case):
    m, b, obs = case
    codec = fixed_point(m, b)
    decoded = codec.decode(codec.encode(obs)).numpy()
    assert_same_bits(decoded, quantize(obs, m, b).astype(np.float32))
    assert not np.signbit(decoded[decoded == 0]).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", range(4))
def test_every_code_at_b_127(m, device):
    """On CUDA too: there `tensor / python_float` is a product with the reciprocal, one ulp off."""
    codec = FixedPoint(m)
    codes = torch.arange(-127 * 10**m, 127 * 10**m + 1, dtype=codec.dtype)
    exact = codes.double().numpy() / 10**m
    decoded = codec.decode(codes.to(device)).cpu().numpy()
    assert_same_bits(decoded, exact.astype(np.float32))
    assert_same_bits(decoded, quantize(exact, m, 127).astype(np.float32))
    assert torch.equal(codec.encode(exact), codes)
    assert torch.equal(codec.encode(decoded), codes)


@settings(max_examples=300)
@given(cases())
def test_error_bound(case):
    m, b, obs = case
    codec = fixed_point(m, b)
    obs = np.clip(obs, -b, b)
    bound = Fraction(1, 2 * 10**m) + Fraction(b) / 2**24
    for s, decoded in zip(obs.flat, codec.decode(codec.encode(obs)).numpy().flat, strict=True):
        assert abs(Fraction(float(decoded)) - Fraction(float(s))) <= bound


@given(cases())
def test_quantize_twice_is_once(case):
    m, b, obs = case
    once = quantize(obs, m, b)
    np.testing.assert_array_equal(quantize(once, m, b).view(np.int64), once.view(np.int64))


@given(cases(max_code=2**23))
def test_round_trip_twice_is_once(case):
    """For codes up to 2^23; beyond, neighbouring codes can share a float32."""
    m, b, obs = case
    codec = fixed_point(m, b)
    codes = codec.encode(obs)
    assert torch.equal(codec.encode(codec.decode(codes).numpy()), codes)


@given(cases())
def test_round_trip_keeps_order(case):
    m, b, obs = case
    codec = fixed_point(m, b)
    codes = codec.encode(np.sort(obs, axis=None))
    assert (codes.diff() >= 0).all()
    assert (codec.decode(codes).diff() >= 0).all()


@given(cases())
def test_round_trip_is_odd(case):
    m, b, obs = case
    codec = fixed_point(m, b)
    assert torch.equal(codec.encode(-obs), -codec.encode(obs))


@given(formats(), hnp.arrays(np.float32, 5, elements=st.floats(-500, 500, width=32)))
def test_float32_input_is_rounded_as_float64(form, obs):
    codec = fixed_point(*form)
    assert torch.equal(codec.encode(obs), codec.encode(obs.astype(np.float64)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_integer_input(dtype):
    obs = np.array([0, 1, 100, np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    expected = [max(-110.0, min(110.0, float(value))) for value in obs.tolist()]
    codec = FixedPoint(2, 110)
    assert codec.decode(codec.encode(obs)).tolist() == expected


@pytest.mark.parametrize("codec", [FixedPoint(2), Packed(2), Float()], ids=lambda codec: codec.name)
def test_any_leading_shape_and_the_input_is_left_alone(codec):
    obs = np.linspace(-300, 300, 24).reshape(2, 3, 4)
    before = obs.copy()
    codes = codec.encode(obs)
    assert codes.shape == codec.decode(codes).shape == (2, 3, 4)
    assert (codes.dtype, codes.device.type) == (codec.dtype, "cpu")
    assert codec.decode(codes).dtype == torch.float32
    assert codec.encode(obs[:0]).shape == (0, 3, 4)
    np.testing.assert_array_equal(obs, before)


# storage widths


@pytest.mark.parametrize(
    ("m", "b", "dtype"),
    [
        (0, 127, torch.int8),
        (1, 127, torch.int16),
        (2, 127, torch.int16),
        (3, 127, torch.int32),
        (0, 1, torch.int8),
        (0, 127.4, torch.int8),
        (0, 127.5, torch.int16),
        (0, 128, torch.int16),
        (1, 12.7, torch.int8),
        (1, 12.8, torch.int16),
        (0, 32767, torch.int16),
        (0, 32768, torch.int32),
        (2, 327.67, torch.int16),
        (2, 327.68, torch.int32),
        (0, 2**31 - 1, torch.int32),
    ],
)
def test_smallest_dtype(m, b, dtype):
    codec = fixed_point(m, b)
    assert codec.dtype == dtype
    assert codec.bits_per_value == torch.iinfo(dtype).bits
    assert codec.encode(np.array([-1e9, 1e9]) * 4).tolist() == [-round(b * 10**m), round(b * 10**m)]


def test_bits_of_the_paper():
    assert bits(m=1, b=127) == 12  # PPO
    assert bits(m=2, b=127) == 15  # SAC


@pytest.mark.parametrize(("m", "width"), [*enumerate([8, 12, 15, 18, 22, 25, 28])])
def test_stored_bits_equal_eq_6_at_b_127(m, width):
    assert stored_bits(m, 127) == bits(m, 127) == width


@pytest.mark.parametrize("b", [2**k for k in range(31)] + [1.3, 3.75, 127.6])
def test_stored_bits_are_one_more_where_b_rounds_to_a_power_of_two(b):
    assert stored_bits(0, b) == bits(0, b) + (1 if b != 1.3 else 0)


def test_stored_bits_of_three_codes():
    assert bits(0, 1) == 1
    assert stored_bits(0, 1) == 2


@given(formats())
@example((0, 1))
@example((0, 128))
def test_stored_bits_are_enough_and_needed(form):
    m, b = form
    codec, width = fixed_point(m, b), stored_bits(m, b)
    lowest, highest = codec.encode(np.array([-b, b])).tolist()
    assert -(2 ** (width - 1)) <= lowest <= highest <= 2 ** (width - 1) - 1
    assert highest > 2 ** (width - 2) - 1
    assert codec.bits_per_value == next(size for size in (8, 16, 32) if size >= width)


# what FixedPoint refuses


@pytest.mark.parametrize("m", [-1, -10])
def test_negative_m_is_refused(m):
    with pytest.raises(ValueError, match=f"--quant-m {m} is negative"):
        FixedPoint(m)


@pytest.mark.parametrize("b", [0, -1, -127.0, 0.99, math.nan, math.inf, -math.inf])
def test_bound_below_1_or_not_finite_is_refused(b):
    with pytest.raises(ValueError, match=r"--quant-b .* finite and at least 1"):
        FixedPoint(2, b)


@pytest.mark.parametrize(
    ("m", "b"),
    [
        (0, 2**31),
        (2, 2e9),
        (3, 5_000_000),
        (6, 2147.5),
        (9, 3),
        (9, 2.2),
        (2, 1e308),
        # b * 10^m < 2^31, but the code it rounds to is not
        (0, 2147483647.75),
        (2, 21474836.477),
    ],
)
def test_codes_beyond_int32_are_refused_with_a_bound_that_fits(m, b):
    with pytest.raises(ValueError, match="int32") as error:
        FixedPoint(m, b)
    fits = int(re.search(r"--quant-b (\d+) fits", str(error.value))[1])
    assert fixed_point(m, fits).b == fits
    with pytest.raises(ValueError, match="int32"):
        FixedPoint(m, fits + 1)


@pytest.mark.parametrize(("m", "b"), [(10, 127), (10, 1), (20, 127.5), (400, 127), (400, 127.5)])
def test_too_many_decimals_are_refused_with_the_most_that_fit(m, b):
    with pytest.raises(ValueError, match=f"--quant-m {m} .*int32") as error:
        FixedPoint(m, b)
    most = int(re.search(r"--quant-m is at most (\d+)", str(error.value))[1])
    assert fixed_point(most, 1).dtype == torch.int32
    with pytest.raises(ValueError, match="int32"):
        FixedPoint(most + 1, 1)


@pytest.mark.parametrize(("m", "b"), [(0, 2**24 + 2), (6, 127), (2, 140_000), (3, 16_777)])
def test_warns_where_float32_cannot_show_the_decimals(m, b):
    with pytest.warns(UserWarning, match=f"cannot show {m} decimals"):
        FixedPoint(m, b)


@pytest.mark.parametrize(("m", "b"), [(0, 2**24), (2, 127), (5, 127), (2, 131_072), (3, 8192)])
def test_warns_only_there(m, b):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FixedPoint(m, b).m == m


# the float baselines


@pytest.mark.parametrize("name", STORAGE_DTYPES)
@settings(max_examples=200)
@given(data=st.data())
def test_float_codec_rounds_as_torch_does(name, data):
    dtype = STORAGE_DTYPES[name]
    most = min(torch.finfo(dtype).max, FLOAT32_MAX)
    obs = data.draw(hnp.arrays(np.float64, 8, elements=st.floats(-most, most)))
    codec = Float(dtype)
    codes, expected = codec.encode(obs), torch.tensor(obs, dtype=dtype)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert_same_bits(codec.decode(codes), expected.to(torch.float32))


@pytest.mark.parametrize(
    ("name", "tenth", "most", "width"),
    [
        ("float64", float(np.float32(0.1)), FLOAT32_MAX, 64),
        ("float32", float(np.float32(0.1)), FLOAT32_MAX, 32),
        ("float16", 0.0999755859375, 65504.0, 16),
        ("bfloat16", 0.10009765625, 3.3895313892515355e38, 16),
        ("float8_e4m3fn", 0.1015625, 448.0, 8),
    ],
)
def test_float_codec_hand_values_clamping_and_width(name, tenth, most, width):
    codec = Float(STORAGE_DTYPES[name])
    assert (codec.name, codec.bits_per_value, codec.dtype.itemsize) == (name, width, width // 8)
    obs = np.array([0.1, most, -most, 1e300, -1e300, 2.0])
    assert codec.decode(codec.encode(obs)).tolist() == [tenth, most, -most, most, -most, 2.0]
    assert codec.b == most


@given(hnp.arrays(np.float64, 6, elements=st.floats(-FLOAT32_MAX, FLOAT32_MAX)))
def test_float64_round_trip_is_float32_of_the_observation(obs):
    codec = Float(torch.float64)
    assert_same_bits(codec.decode(codec.encode(obs)), obs.astype(np.float32))


# Packed: the codes of FixedPoint in as many bits as they need


@pytest.mark.parametrize(("m", "width"), [*enumerate([8, 12, 15, 18, 22, 25, 28])])
def test_packed_stores_the_bits_that_eq_6_counts_at_b_127(m, width):
    codec = fixed_point(m, 127, Packed)
    assert codec.bits_per_value == bits(m, 127) == width
    assert codec.name == f"packed {width}-bit (m={m}, b=127)"
    assert codec.row(16) == (width, torch.int16)
    assert codec.row(0) == (0, torch.int16)


def packed_and_fixed_point_agree(packed: Packed, fixed: FixedPoint, obs: np.ndarray) -> None:
    codes, n = packed.encode(obs), obs.shape[-1]
    assert codes.dtype == fixed.dtype
    assert torch.equal(codes, fixed.encode(obs))
    rows = packed.pack(codes)
    width, dtype = packed.row(n)
    assert (rows.shape, rows.dtype) == ((*obs.shape[:-1], width), dtype)
    unpacked = packed.unpack(rows, n)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)
    assert_same_bits(packed.decode(unpacked), fixed.decode(codes))


@settings(max_examples=200)
@given(formats(), st.integers(0, 60), st.data())
def test_packed_is_lossless_in_stored_bits_for_any_m_and_b_and_any_columns(form, n, data):
    m, b = form
    packed = fixed_point(m, b, Packed)
    assert packed.bits_per_value == stored_bits(m, b)
    assert packed.row(n) == (math.ceil(Fraction(n * packed.bits_per_value, 16)), torch.int16)
    lead = data.draw(st.sampled_from([(), (0,), (1,), (3,), (2, 2)]))
    obs = data.draw(hnp.arrays(np.float64, (*lead, n), elements=values(m, b)))
    packed_and_fixed_point_agree(packed, fixed_point(m, b), obs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 17, 376])
@pytest.mark.parametrize("m", range(4))
def test_packed_holds_every_code_at_b_127(m, n, device):
    """In every column, or for the 376 of a Humanoid in one at least."""
    codec, limit = Packed(m), 127 * 10**m
    codes = torch.arange(-limit, limit + 1, dtype=codec.dtype).repeat(2)
    codes = codes.unfold(0, n, 1 if n < 376 else 188)
    rows = codec.pack(codes)
    assert rows.nbytes == len(codes) * 2 * -(-n * codec.bits_per_value // 16)
    assert torch.equal(codec.unpack(rows.to(device), n).cpu(), codes)


@pytest.mark.parametrize("m", range(4))
@given(data=st.data())
def test_packed_keeps_the_extremes_beside_each_other(m, data):
    """Every sign bit next to every other."""
    codec, limit = Packed(m), 127 * 10**m
    extremes = st.sampled_from([limit, -limit, 0, -1, 1])
    codes = torch.tensor(data.draw(st.lists(extremes, max_size=40)), dtype=codec.dtype)
    assert torch.equal(codec.unpack(codec.pack(codes), len(codes)), codes)


@pytest.mark.parametrize("m", range(4))
@given(data=st.data())
def test_packed_column_changes_alone(m, data):
    codec, limit, n = Packed(m), 127 * 10**m, data.draw(st.integers(1, 40))
    code = st.integers(-limit, limit)
    before = torch.tensor(data.draw(st.lists(code, min_size=n, max_size=n)), dtype=codec.dtype)
    after, column = before.clone(), data.draw(st.integers(0, n - 1))
    after[column] = data.draw(code)
    unpacked = [codec.unpack(codec.pack(codes), n) for codes in (before, after)]
    assert torch.equal(unpacked[0], before)
    assert torch.equal(unpacked[1], after)


@pytest.mark.parametrize("m", range(4))
def test_packed_takes_and_gives_rows_in_any_memory_layout(m):
    """As buffers do: columns picked by an index, rows taken from the middle of an array."""
    codec, rng = Packed(m), np.random.default_rng(m)
    codes = rng.integers(-127 * 10**m, 127 * 10**m + 1, (30, 20))
    codes = torch.from_numpy(codes).to(codec.dtype)
    picked = torch.from_numpy(codes.numpy()[..., np.array([17, 3, 4, 5, 0, 19, 1])])
    for view in (codes.T, codes[::3, ::2], picked):
        rows = codec.pack(view)
        assert torch.equal(codec.unpack(rows, view.shape[1]), view)
        wide = torch.full((len(rows), 3, rows.shape[1] + 2), -1, dtype=torch.int16)
        wide[:, 1, 1:-1] = rows
        assert torch.equal(codec.unpack(wide[:, 1, 1:-1], view.shape[1]), view)


@pytest.mark.parametrize("codec", [FixedPoint(2), *map(Float, STORAGE_DTYPES.values())])
def test_rows_of_the_others_are_their_codes(codec):
    codes = codec.encode(np.linspace(-3, 3, 14).reshape(2, 7))
    assert codec.row(7) == (7, codec.dtype)
    assert codec.pack(codes) is codes
    assert codec.unpack(codes, 7) is codes


@pytest.mark.parametrize(("m", "b"), [(-1, 127), (2, 0.5), (2, math.nan), (7, 300)])
def test_packed_refuses_what_fixed_point_refuses(m, b):
    with pytest.raises(ValueError, match="--quant") as refused:
        Packed(m, b)
    with pytest.raises(ValueError, match=re.escape(str(refused.value))):
        FixedPoint(m, b)


# make_codec


@pytest.mark.parametrize("storage", [None, *STORAGE_DTYPES])
def test_make_codec_without_m_is_a_float_codec(storage):
    codec = make_codec(None, 127, storage)
    assert isinstance(codec, Float)
    assert codec.dtype == STORAGE_DTYPES[storage or "float64"]


def test_make_codec_with_m_is_fixed_point():
    codec = make_codec(0, 50.5, None)  # m = 0 is a choice, not "off"
    assert isinstance(codec, FixedPoint)
    assert (codec.m, codec.b) == (0, 50.5)


@pytest.mark.parametrize("m", [0, 2])
def test_make_codec_refuses_both(m):
    with pytest.raises(ValueError, match=f"--quant-m {m} and --storage float16 exclude each other"):
        make_codec(m, 127, "float16")


@pytest.mark.parametrize("pack", [False, True])
def test_make_codec_packs_where_it_is_told(pack):
    codec = make_codec(2, 50, None, pack)
    assert type(codec) is (Packed if pack else FixedPoint)
    assert (codec.m, codec.b) == (2, 50)


@pytest.mark.parametrize("storage", [None, "float16"])
def test_make_codec_refuses_to_pack_floats(storage):
    with pytest.raises(ValueError, match=r"--pack .* does nothing without --quant-m"):
        make_codec(None, 127, storage, pack=True)
    with pytest.raises(ValueError, match="--storage float16 exclude each other"):
        make_codec(2, 127, "float16", pack=True)
