"""Observation -> stored code -> observation: Eq. 4, 5, 6 of *Just Round* (Grossman, Plancher 2023).

    codec = FixedPoint(m=2, b=127)
    codes = codec.encode(np.array([1.23456, -500.0]))   # tensor([123, -12700], dtype=torch.int16)
    codec.decode(codes)                                 # tensor([1.2300, -127.0000])

| paper | here                    | meaning                                 |
|-------|-------------------------|-----------------------------------------|
| s     | `s`, `obs`              | an observation                          |
| m     | `m`                     | decimals kept                           |
| a, b  | `-b`, `b`               | clamp bounds, symmetric around 0        |
| 10^m  | `scale`                 | codes per unit                          |
| s_q   | `decode(encode(s))`     | equals float32(`quantize(s, m, b)`)     |

A `Codec` is how a buffer stores observations. `Float` is the baseline, `FixedPoint` the paper's
method in whole integers, `Packed` the same integers in as many bits as they need.

Which m and b suit a robot: `python experiments/survey.py --env Humanoid-v5 --steps 20000`.
"""

import math
import warnings

import numpy as np
import torch

from support.packing import pack_bits, unpack_bits

FLOAT32_MAX = torch.finfo(torch.float32).max

STORAGE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def clamp(s: np.ndarray, b: float) -> np.ndarray:
    """Limit to [-b, b]; float64. Paper eq. 4 with a = -b."""
    # Half the time of np.clip on the single row that a step brings.
    return np.minimum(np.maximum(np.asarray(s, np.float64), -b), b)


def quantize(s: np.ndarray, m: int, b: float) -> np.ndarray:
    """Clamp to [-b, b], then round to m decimals, ties to even; float64. Paper eq. 4, 5.

    The formula, for reading and for tests. Training rounds in `FixedPoint.encode`.
    """
    # + 0.0 turns -0.0 into 0.0: a fixed-point code has one zero.
    return np.round(clamp(s, b), m) + 0.0


def bits(m: int, b: float) -> int:
    """Bits that the paper counts per value: sign, integer part, decimals. Paper eq. 6."""
    return 1 + math.ceil(math.log2(b)) + math.ceil(m * math.log2(10))


def stored_bits(m: int, b: float) -> int:
    """Bits that two's complement needs for the codes -round(b 10^m) ... round(b 10^m).

    Equal to `bits` at b = 127. Eq. 6 is short wherever b rounds up to a power of two at m = 0
    (b = 128 has 257 codes for its 8 bits), and gives 1 bit for the three codes of b = 1, m = 0.
    """
    return max(2, round(b * 10**m).bit_length() + 1)


class Codec:
    """How a buffer stores observations.

    A code stands for one value; a row is what a buffer keeps of one observation. Here, and in all
    codecs but `Packed`, a row is just its n codes.

    Attributes:
        dtype: of the codes.
        bits_per_value: in a row.
        name: for people.
        b: the largest |value| that is kept; `encode` clamps to it.
        remedy: what would keep values up to `{bound}`, for messages.
    """

    dtype: torch.dtype
    bits_per_value: int
    name: str
    b: float
    remedy: str = "a bound of {bound}"

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        """(..., n) finite numbers -> (..., n) codes, on the CPU."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., n) codes, on any device -> (..., n) float32."""
        raise NotImplementedError

    def row(self, n: int) -> tuple[int, torch.dtype]:
        """Width and dtype of the row of n values."""
        return n, self.dtype

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., n) codes on the CPU -> (..., width) rows."""
        return codes

    def unpack(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        """(..., width) rows, on any device -> (..., n) codes; undoes `pack`."""
        return rows


class Float(Codec):
    """The baselines: observations in a float dtype, clamped to what is finite in it and in float32.

    Args:
        dtype: one of `STORAGE_DTYPES`. float64 is the paper's baseline.
    """

    remedy = "a wider --storage"

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.bits_per_value = 8 * dtype.itemsize
        # float16 would turn 1e5 into inf, and float32, which we decode to, 1e300.
        self.b = min(torch.finfo(dtype).max, FLOAT32_MAX)

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(clamp(obs, self.b)).to(self.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32)


class FixedPoint(Codec):
    """The paper's method: code = round(clamp(s) * 10^m), in the smallest of int8, int16, int32.

    |decode(encode(s)) - s| <= 0.5 * 10^-m + b * 2^-24 for |s| <= b.

    Args:
        m: decimals kept, >= 0.
        b: clamp bound, >= 1, with b * 10^m < 2^31.

    Raises:
        ValueError: m or b out of range; the message says what would fit.
    """

    def __init__(self, m: int, b: float = 127):
        if m < 0:
            raise ValueError(f"--quant-m {m} is negative; the number of decimals kept is 0 or more")
        if not 1 <= b < math.inf:
            raise ValueError(f"--quant-b {b:g} is not a bound; it must be finite and at least 1")
        if m > 9 or not b * 10**m < 2**31 - 0.5:  # the largest code is rounded
            fits = f"--quant-b {(2**31 - 1) // 10**m} fits" if m <= 9 else "--quant-m is at most 9"
            raise ValueError(
                f"--quant-m {m} --quant-b {b:g} needs codes up to {b:g} * 10^{m}, "
                f"beyond int32's {2**31 - 1}; {fits}"
            )
        self.m, self.b, self.scale = m, b, 10.0**m
        limit = round(b * 10**m)
        self.dtype = next(
            dtype
            for dtype in (torch.int8, torch.int16, torch.int32)
            if limit <= torch.iinfo(dtype).max
        )
        self.name = f"{str(self.dtype).removeprefix('torch.')} (m={m}, b={b:g})"
        self.bits_per_value = 8 * self.dtype.itemsize
        # Codes up to 2^24 are exact in float32; then one float32 division rounds as float64 would.
        self._decode_dtype = torch.float32 if limit <= 2**24 else torch.float64
        self._divisor = torch.tensor(self.scale, dtype=self._decode_dtype)
        self._numpy_dtype = np.dtype(f"i{self.dtype.itemsize}")
        if np.spacing(np.nextafter(np.float32(b), np.float32(0))) * self.scale > 1:
            warnings.warn(f"float32 cannot show {m} decimals near {b:g}", stacklevel=2)

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        # In float64: float32 arithmetic gets about 14 codes per million wrong.
        scaled = clamp(obs, self.b) * self.scale
        return torch.from_numpy(np.rint(scaled).astype(self._numpy_dtype))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        # A true division: a product with 10^-m is off by one ulp for 28% of the m = 2 codes, and
        # CUDA turns division by a number into that product, though not division by a tensor.
        values = codes.to(self._decode_dtype)
        return values.div_(self._divisor.to(codes.device)).to(torch.float32)


class Packed(FixedPoint):
    """FixedPoint without the idle bits: a value takes `stored_bits(m, b)`, as the paper counts.

    At b = 127 that is 8, 12, 15, 18 bits for m = 0, 1, 2, 3. Lossless: rows hold the same codes.
    """

    def __init__(self, m: int, b: float = 127):
        super().__init__(m, b)
        self.bits_per_value = stored_bits(m, b)
        self.name = f"packed {self.bits_per_value}-bit (m={m}, b={b:g})"

    def row(self, n: int) -> tuple[int, torch.dtype]:
        return math.ceil(n * self.bits_per_value / 16), torch.int16

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(pack_bits(codes.numpy(), self.bits_per_value))

    def unpack(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        return unpack_bits(rows, n, self.bits_per_value).to(self.dtype)


def make_codec(
    quant_m: int | None, quant_b: float, storage: str | None, pack: bool = False
) -> Codec:
    """The codec that --quant-m, --quant-b, --storage and --pack ask for; float64 without any.

    Raises:
        ValueError: flags that contradict each other or are out of range.
    """
    if quant_m is None:
        if quant_b != 127:
            raise ValueError(f"--quant-b {quant_b:g} does nothing without --quant-m; add it")
        if pack:
            raise ValueError("--pack packs fixed-point codes and does nothing without --quant-m")
        return Float(STORAGE_DTYPES[storage or "float64"])
    if storage is not None:
        raise ValueError(
            f"--quant-m {quant_m} and --storage {storage} exclude each other; drop one"
        )
    return Packed(quant_m, quant_b) if pack else FixedPoint(quant_m, quant_b)
