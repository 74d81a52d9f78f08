"""support/packing.py: the format against one written out code by code, and back."""

import math
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from support.packing import pack_bits, unpack_bits

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def plain_pack(codes: list[int], width: int) -> list[int]:
    """`pack_bits` of one row, code by code, as words from 0 to 65535: the format in full."""
    if width > 16:
        high = [code >> 16 for code in codes]
        return [code & 0xFFFF for code in codes] + plain_pack(high, width - 16)
    n_words = -(-len(codes) * width // 16)
    words = [code % 2**width << 16 - width for code in codes[:n_words]]
    size = math.gcd(width, 16)
    chunks = [c >> low & 2**size - 1 for low in range(0, width, size) for c in codes[n_words:]]
    for i, chunk in enumerate(chunks):
        words[i % n_words] |= chunk << size * (i // n_words)
    return words


@st.composite
def packings(draw) -> tuple[int, np.ndarray]:
    """Any width, and rows of any leading shape whose codes use all of it."""
    width, n = draw(st.integers(1, 32)), draw(st.integers(0, 60))
    lead = draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    codes = st.integers(low, high) | st.sampled_from([low, high, 0, -1])
    return width, draw(hnp.arrays(np.int32, (*lead, n), elements=codes))


@settings(max_examples=200)
@given(packings())
@example((15, np.zeros((0, 20), np.int32)))
def test_pack_bits_is_undone_and_takes_whole_words_at_most(packing):
    width, codes = packing
    n, before = codes.shape[-1], codes.copy()
    words = torch.from_numpy(pack_bits(codes, width))
    assert words.dtype == torch.int16
    assert words.shape == (*codes.shape[:-1], math.ceil(Fraction(n * width, 16)))
    stored = words.clone()
    unpacked = unpack_bits(words, n, width)
    np.testing.assert_array_equal(unpacked, before)
    unpacked.fill_(1)
    assert torch.equal(words, stored)  # what works in place works on copies
    np.testing.assert_array_equal(codes, before)


@settings(max_examples=200)
@given(packings())
@example((15, np.arange(-40, 40)[None]))
@example((12, np.arange(-40, 40)[None]))
@example((18, np.arange(-(2**17), 2**17, 2**12)[None]))
def test_pack_bits_is_the_format_written_out(packing):
    width, codes = packing
    words = pack_bits(codes, width).view(np.uint16)
    for row in np.ndindex(codes.shape[:-1]):
        assert words[row].tolist() == plain_pack(codes[row].tolist(), width)


@pytest.mark.parametrize(
    ("width", "codes", "words"),
    [
        # The fourth code lies in the low digits of the others, its lowest digit first.
        (12, [0x123, 0x456, 0x789, 0x2BC], [0x123C, 0x456B, 0x7892]),
        (8, [0x12, 0x34, -1, 0x56, -2], [0x1256, 0x34FE, 0xFF00]),
        (15, [0, 1, 2, -1], [0, 2, 4, 0xFFFE]),
        (15, [3] * 15 + [5], [7, 6, 7] + [6] * 12),  # bits 0 and 2 of the sixteenth
        # The low 16 bits of each, then the high bits as 2-bit codes: 01, 11, 10.
        (18, [0x1ABCD, -1, -0x20000], [0xABCD, 0xFFFF, 0, 0x4000 | 0b11 | 0b10 << 2]),
    ],
)
def test_pack_bits_hand_values(width, codes, words):
    assert pack_bits(np.array(codes), width).view(np.uint16).tolist() == words
    assert plain_pack(codes, width) == words


@pytest.mark.parametrize("width", range(1, 33))
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33])
def test_every_stored_bit_belongs_to_one_column_or_to_none(width, n):
    """Flipped one by one: each column owns `width` bits, and what is left over is padding."""
    codes = np.random.default_rng(width).integers(-(2 ** (width - 1)), 2 ** (width - 1), n)
    words = pack_bits(codes, width)
    flips = words ^ (1 << np.arange(16, dtype=np.int32)).astype(np.int16)[:, None, None] * np.eye(
        len(words), dtype=np.int16
    )
    changed = unpack_bits(torch.from_numpy(flips), n, width).numpy() != codes
    assert changed.sum(-1).max() == 1
    assert changed.sum((0, 1)).tolist() == [width] * n
