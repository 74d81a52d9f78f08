"""Observation -> stored code -> observation: Eq. 4, 5, 6 of *Just Round* (Grossman, Plancher 2023).

    codec = FixedPoint(m=2, b=127)
    codes = codec.encode(np.array([1.23456, -500.0]))   # tensor([123, -12700], dtype=torch.int16)
    codec.decode(codes)                                 # tensor([1.2300, -127.0000])

| paper | here                    | meaning                                 |
|-------|-------------------------|-----------------------------------------|
| m     | `m`                     | decimals kept                           |
| a, b  | `-b`, `b`               | clamp bounds, symmetric around 0        |
| 10^m  | `scale`                 | codes per unit                          |
| s_q   | `decode(encode(s))`     | equals float32(`quantize(s, m, b)`)     |

A `Codec` is how a buffer stores observations. `Float` is the baseline, `FixedPoint` the method in
whole integers, `Packed` the method in as many bits as the codes need.

    python quantize.py --env Humanoid-v5 --steps 20000    # which m and b suit a robot: survey.py
"""

import math
import warnings

import numpy as np
import torch

STORAGE_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")
}


def quantize(obs: np.ndarray, m: int, b: float) -> np.ndarray:
    """Clamp to [-b, b], then round to m decimals, ties to even; float64. Paper eq. 4, 5."""
    # + 0.0 turns -0.0 into 0.0: a fixed-point code has one zero.
    return np.round(np.clip(np.asarray(obs, np.float64), -b, b), m) + 0.0


def bits(m: int, b: float) -> int:
    """Bits that the paper counts per value: sign, integer part, decimals. Paper eq. 6."""
    return 1 + math.ceil(math.log2(b)) + math.ceil(m * math.log2(10))


def stored_bits(m: int, b: float) -> int:
    """Bits that two's complement needs for the codes -round(b 10^m) ... round(b 10^m).

    Equal to `bits` at b = 127. Eq. 6 is short wherever b rounds up to a power of two at m = 0
    (b = 128 has 257 codes for its 8 bits), and gives 1 bit for the three codes of b = 1, m = 0.
    """
    return max(2, round(b * 10**m).bit_length() + 1)


class ObservationError(ValueError):
    """An observation that cannot be stored: nan or inf. The message names the columns."""


def check_finite(obs: np.ndarray) -> None:
    """Raise ObservationError, naming the columns, if (..., n) observations hold nan or inf."""
    finite = np.isfinite(obs)
    if not finite.all():
        bad = ~finite.reshape(-1, obs.shape[-1]).all(axis=0)
        raise ObservationError(f"nan or inf in observation columns {columns_of(bad)}")


class Clamp:
    """Eq. 4 with a = -b. Refuses what is not finite and counts what it changes.

    Attributes:
        seen, clipped: numbers of values so far, and of those that lay beyond the bound.
        max_abs: largest |s| so far.
        column_peak: (n,) float64, largest |s| beyond the bound per column, 0 where there was none;
            None while nothing was clamped.
    """

    def __init__(self, b: float, remedy: str):
        self.b = b
        self.remedy = remedy  # for `report`: what would hold the clamped values
        self.seen = 0
        self.clipped = 0
        self.max_abs = 0.0
        self.column_peak: np.ndarray | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Clamp (..., n) observations to [-b, b].

        Raises:
            ObservationError: nan or inf; nothing is counted then.
        """
        magnitude = np.abs(obs)
        peak = float(magnitude.max(initial=0.0))  # nan if any is: then the comparison fails too
        if not peak <= self.b:
            check_finite(obs)
            beyond = magnitude > self.b
            peaks = np.where(beyond, magnitude, 0.0).reshape(-1, obs.shape[-1]).max(axis=0)
            if self.column_peak is None:
                self.column_peak = np.zeros(obs.shape[-1], np.float64)
            np.maximum(self.column_peak, peaks, out=self.column_peak)
            self.clipped += int(np.count_nonzero(beyond))
            obs = np.clip(obs, -self.b, self.b)
        self.seen += obs.size
        self.max_abs = max(self.max_abs, peak)
        return obs

    def state(self) -> dict:
        """The counts, for a checkpoint."""
        peak = None if self.column_peak is None else torch.from_numpy(self.column_peak.copy())
        return {
            "seen": self.seen,
            "clipped": self.clipped,
            "max_abs": self.max_abs,
            "column_peak": peak,
        }

    def load(self, saved: dict, n: int) -> None:
        """Take over what `state` returned, of n columns. Raises ValueError if it cannot be."""
        self.seen, self.clipped = saved["seen"], saved["clipped"]
        self.max_abs, peak = saved["max_abs"], saved["column_peak"]
        if not 0 <= self.max_abs < math.inf or (peak is not None and peak.shape != (n,)):
            raise ValueError("its record of what was clamped is damaged")
        self.column_peak = None if peak is None else peak.numpy().copy()

    @property
    def fraction(self) -> float:
        """Share of the values seen that were clamped."""
        return self.clipped / self.seen if self.seen else 0.0

    def report(self) -> str | None:
        """One line on what was clamped and the bound that would hold it; None if nothing was."""
        if self.column_peak is None:
            return None
        return (
            f"{self.clipped:,} of {self.seen:,} observation values lay beyond +-{self.b:g} and "
            f"were clamped, in columns {columns_of(self.column_peak > 0)}; "
            f"{self.remedy.format(bound=math.ceil(self.max_abs))} would hold them"
        )


def columns_of(mask: np.ndarray, most: int = 12) -> str:
    """The indices where mask (n,) is true, e.g. "[3, 7]"; a long list is cut and counted."""
    indices = np.flatnonzero(mask).tolist()
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{indices[:most]}{more}"


class Codec:
    """How a buffer stores observations: encode, pack, keep, unpack, decode.

    A code stands for one value; a stored row is what a buffer keeps of one observation. Here, and
    for all but `Packed`, a row is its codes.

    Attributes:
        dtype: of the codes.
        bits: per value in a row.
        name: for people.
        clamp: counts what `encode` had to clamp.
    """

    dtype: torch.dtype
    bits: int
    name: str
    clamp: Clamp

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        """(..., n) float -> (..., n) `dtype`, on the CPU. Raises ObservationError on nan or inf."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., n) `dtype`, on any device -> (..., n) float32."""
        raise NotImplementedError

    def row(self, n: int) -> tuple[int, torch.dtype]:
        """Elements and dtype of the stored row of n values."""
        return n, self.dtype

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., n) codes on the CPU -> (..., width) stored rows."""
        return codes

    def unpack(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        """(..., width) stored rows, on any device -> (..., n) codes; undoes `pack`."""
        return rows


class Float(Codec):
    """The baselines: observations in a float dtype, clamped to what is finite in it and in float32.

    Args:
        dtype: one of `STORAGE_DTYPES`. float64 is the paper's baseline.
    """

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.bits = 8 * dtype.itemsize
        # float16 would turn 1e5 into inf, and float32, which we decode to, 1e300.
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        self.clamp = Clamp(largest, "a wider --storage")

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.clamp(np.asarray(obs, np.float64))).to(self.dtype)

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
            remedy = (
                f"--quant-b {(2**31 - 1) // 10**m} fits" if m <= 9 else "--quant-m is at most 9"
            )
            raise ValueError(
                f"--quant-m {m} --quant-b {b:g} needs codes up to {b:g} * 10^{m}, "
                f"beyond int32's {2**31 - 1}; {remedy}"
            )
        self.m, self.b, self.scale = m, b, 10.0**m
        limit = round(b * 10**m)
        self.dtype = next(
            dtype
            for dtype in (torch.int8, torch.int16, torch.int32)
            if limit <= torch.iinfo(dtype).max
        )
        self.name = f"{str(self.dtype).removeprefix('torch.')} (m={m}, b={b:g})"
        self.bits = 8 * self.dtype.itemsize
        self.clamp = Clamp(b, "a bound of {bound}")
        # Codes up to 2^24 are exact in float32; then one float32 division rounds as float64 would.
        self._decode_dtype = torch.float32 if limit <= 2**24 else torch.float64
        self._numpy_dtype = np.dtype(f"i{self.dtype.itemsize}")
        if np.spacing(np.nextafter(np.float32(b), np.float32(0))) * self.scale > 1:
            warnings.warn(f"float32 cannot show {m} decimals near {b:g}", stacklevel=2)

    def encode(self, obs: np.ndarray) -> torch.Tensor:
        # In float64: float32 arithmetic gets about 14 codes per million wrong.
        scaled = self.clamp(np.asarray(obs, np.float64)) * self.scale
        return torch.from_numpy(np.rint(scaled).astype(self._numpy_dtype))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        values = codes.to(self._decode_dtype)
        # A true division: a product with 10^-m is off by one ulp for 28% of the m = 2 codes, and
        # CUDA turns division by a number into that product, though not division by a tensor.
        scale = torch.full((), self.scale, dtype=values.dtype, device=values.device)
        return values.div_(scale).to(torch.float32)


class Packed(FixedPoint):
    """FixedPoint without the idle bits: a value takes `stored_bits(m, b)`, as the paper counts.

    At b = 127 that is 8, 12, 15, 18 bits for m = 0, 1, 2, 3. Lossless: rows hold the same codes.
    """

    def __init__(self, m: int, b: float = 127):
        super().__init__(m, b)
        self.bits = stored_bits(m, b)
        self.name = f"packed {self.bits}-bit (m={m}, b={b:g})"

    def row(self, n: int) -> tuple[int, torch.dtype]:
        return math.ceil(n * self.bits / 16), torch.int16

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(pack_bits(codes.numpy(), self.bits))

    def unpack(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        return unpack_bits(rows, n, self.bits).to(self.dtype)


def _spare(width: int) -> tuple[int, int, int]:
    """How codes of `width` bits go into the spare bits of 16-bit words that hold one code each.

    Returns:
        c, k, e: a code is cut into k chunks of c bits, one to a word; a word has room for e chunks.
    """
    c = math.gcd(width, 16)
    return c, width // c, (16 - width) // c


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """(..., n) integers that fit in `width` bits, 1 to 32 -> (..., ceil(n width / 16)) int16.

    With W words the first W codes take the high bits of a word each. The others are cut into chunks
    for the words' spare low bits: at 15 bits, 15 words hold their own code and one bit each of a
    sixteenth; at 12 bits, of 4 bits a letter, the words AAAd BBBd CCCd hold a fourth code ddd.
    Beyond 16 bits every code has a word for its low 16 bits, and behind those words the high bits
    are packed as codes of their own.
    """
    codes = codes.astype(np.int32)
    if width > 16:
        return np.concatenate([codes.astype(np.int16), pack_bits(codes >> 16, width - 16)], -1)
    c, k, e = _spare(width)
    n_words = math.ceil(codes.shape[-1] * width / 16)
    words = codes[..., :n_words] << (16 - width)
    # (..., k, rest): all lowest chunks lie side by side, then all second ones.
    shifts, mask = c * np.arange(k)[:, None], (1 << c) - 1
    chunks = (codes[..., None, n_words:] >> shifts) & mask
    chunks = chunks.reshape(*codes.shape[:-1], math.prod(chunks.shape[-2:]))
    for j in range(e):
        part = chunks[..., j * n_words : (j + 1) * n_words]
        words[..., : part.shape[-1]] |= part << (c * j)
    return words.astype(np.int16)


def unpack_bits(words: torch.Tensor, n: int, width: int) -> torch.Tensor:
    """Undo `pack_bits`: (..., W) int16, on any device -> (..., n) int16, or int32 from 17 bits on.

    Few passes over whole words, in place where it can be: memory traffic is what this costs.
    """
    if width > 16:
        high = unpack_bits(words[..., n:], n, width - 16).to(torch.int32)
        low = words[..., :n].to(torch.int32)
        return high.bitwise_left_shift_(16).bitwise_or_(low.bitwise_and_(0xFFFF))
    c, k, e = _spare(width)
    n_rest = n - words.shape[-1]
    if n_rest == 0:
        return words >> (16 - width)
    mask = (1 << c) - 1
    chunks = [(words >> (c * j) if j else words) & mask for j in range(e)]
    rest = torch.cat(chunks, -1) if e > 1 else chunks[0]
    while k > 1:  # halve the number of blocks: chunk i + half joins chunk i at its place
        half = (k + 1) // 2
        upper = rest[..., half * n_rest : k * n_rest]
        rest[..., : (k - half) * n_rest].add_(upper, alpha=1 << (c * half))
        k = half
    rest = rest[..., :n_rest]
    # The arithmetic shift drops the chunks below the first codes and extends every code's sign.
    return torch.cat((words, rest << (16 - width)), -1).bitwise_right_shift_(16 - width)


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


if __name__ == "__main__":
    import tyro

    import survey  # only here: it loads MuJoCo

    survey.main(tyro.cli(survey.Args))
