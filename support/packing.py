"""Bit packing: integers of `width` bits each, in 16-bit words without idle bits.

    words = pack_bits(codes, 15)              # (..., n) integers -> (..., ceil(n 15 / 16)) int16
    codes = unpack_bits(words, n, 15)

`pack_bits` works on the few rows that a step brings; `unpack_bits` on whole batches, so it is made
of few passes over whole words: memory traffic is what it costs.
"""

import math

import numpy as np
import torch


def _chunks(width: int) -> tuple[int, int, int]:
    """How codes of `width` bits go into the spare bits of 16-bit words that hold one code each.

    Returns:
        c, k, e: a code is split into k chunks of c bits; a word has room for e such chunks.
    """
    c = math.gcd(width, 16)
    return c, width // c, (16 - width) // c


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """(..., n) integers that fit in `width` bits, 1 to 32 -> (..., ceil(n width / 16)) int16.

    With W words the first W codes take the high bits of one word each. The others are split into
    chunks for the words' spare low bits: at 15 bits, 15 words hold their own code and one bit each
    of a sixteenth; at 12 bits, of 4 bits a letter, the words AAAd BBBd CCCd hold a fourth code ddd.
    Beyond 16 bits every code has a word for its low 16 bits, and behind those words the high bits
    are packed as codes of their own.
    """
    codes = codes.astype(np.int32)
    if width > 16:
        return np.concatenate([codes.astype(np.int16), pack_bits(codes >> 16, width - 16)], -1)
    c, k, e = _chunks(width)
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
    """Undo `pack_bits`: (..., W) int16, on any device -> (..., n) int16; int32 from 17 bits on."""
    if width > 16:
        high = unpack_bits(words[..., n:], n, width - 16).to(torch.int32)
        low = words[..., :n].to(torch.int32)
        return high.bitwise_left_shift_(16).bitwise_or_(low.bitwise_and_(0xFFFF))
    c, k, e = _chunks(width)
    n_rest = n - words.shape[-1]
    if n_rest == 0:
        return words >> (16 - width)
    mask = (1 << c) - 1
    chunks = [(words >> (c * j) if j else words) & mask for j in range(e)]
    rest = torch.cat(chunks, -1) if e > 1 else chunks[0]
    while k > 1:  # halve the number of chunks: chunk i + half is added to chunk i, shifted
        half = (k + 1) // 2
        upper = rest[..., half * n_rest : k * n_rest]
        rest[..., : (k - half) * n_rest].add_(upper, alpha=1 << (c * half))
        k = half
    rest = rest[..., :n_rest]
    # The arithmetic shift drops the chunks below the first codes and extends every code's sign.
    return torch.cat((words, rest << (16 - width)), -1).bitwise_right_shift_(16 - width)
