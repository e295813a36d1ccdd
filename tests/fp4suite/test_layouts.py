"""blocked_128x4 and both orders of fragments against their formulas in plain loops, and both ways round."""

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fp4suite import layouts

SHAPES = [(1, 1), (1, 4), (3, 5), (31, 4), (32, 3), (33, 8), (127, 7), (128, 4), (129, 4), (300, 28), (256, 64)]


def offset(m: int, s: int, ks: int) -> int:
    """The byte of scale [m, s] in the blocked order, from the formula alone."""
    tiles = -(-ks // 4)
    return ((m // 128) * tiles + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4


@pytest.mark.parametrize(("m", "ks"), SHAPES)
def test_formula(m, ks):
    sf = torch.randint(1, 256, (m, ks), dtype=torch.uint8)
    flat = layouts.to_blocked_128x4(sf)
    size = -(-m // 128) * 128 * (-(-ks // 4) * 4)
    assert flat.shape == (size,)
    assert layouts.blocked_128x4_bytes(m, ks) == size
    want = [0] * size  # padding is zero
    for row in range(m):
        for s in range(ks):
            want[offset(row, s, ks)] = int(sf[row, s])
    assert flat.tolist() == want


@pytest.mark.parametrize(("m", "ks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_inverse(m, ks, dtype):
    sf = torch.randint(0, 256, (2, 3, m, ks), dtype=torch.uint8).view(dtype)
    flat = layouts.to_blocked_128x4(sf)
    assert flat.dtype == dtype
    assert flat.shape == (2, 3, layouts.blocked_128x4_bytes(m, ks))
    back = layouts.from_blocked_128x4(flat, m, ks)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), sf.view(torch.uint8))
    one = layouts.to_blocked_128x4(sf[1, 2])
    assert torch.equal(one.view(torch.uint8), flat[1, 2].view(torch.uint8))


@pytest.mark.parametrize("shape", [(128, 4), (384, 28), (2, 3, 256, 8), (0, 4), (0, 128, 4)])
@pytest.mark.parametrize("scratch", [1, 2 * 128 * 4, layouts.SCRATCH_BYTES])
def test_whole_atoms_stay_in_their_memory(shape, scratch, monkeypatch):
    monkeypatch.setattr(layouts, "SCRATCH_BYTES", scratch)
    linear = torch.randint(0, 256, shape, dtype=torch.uint8)
    sf = linear.clone().view(torch.float8_e4m3fn)
    flat = layouts.to_blocked_128x4_(sf)
    assert torch.equal(flat.view(torch.uint8), layouts.to_blocked_128x4(linear))
    back = layouts.from_blocked_128x4_(flat, *shape[-2:])
    assert back.shape == shape
    assert torch.equal(back.view(torch.uint8), linear)
    assert flat.data_ptr() == back.data_ptr() == sf.data_ptr()


@pytest.mark.parametrize("shape", [(127, 4), (128, 5), (2, 40, 12)])
def test_padding_takes_new_memory(shape):
    linear = torch.randint(0, 256, shape, dtype=torch.uint8)
    sf = linear.clone()
    flat = layouts.to_blocked_128x4_(sf)
    assert torch.equal(flat, layouts.to_blocked_128x4(linear))
    assert torch.equal(sf, linear)
    assert torch.equal(layouts.from_blocked_128x4_(flat, *shape[-2:]), linear)
    with pytest.raises(ValueError, match="bytes, got"):
        layouts.from_blocked_128x4_(flat[..., 1:], *shape[-2:])


def test_a_full_atom_is_a_permutation():
    """Blocked, then back, starting from the blocked side: no byte of a whole atom is padding."""
    flat = torch.randperm(512).to(torch.uint8)
    assert torch.equal(layouts.to_blocked_128x4(layouts.from_blocked_128x4(flat, 128, 4)), flat)


def test_strided_input():
    sf = torch.randint(0, 256, (40, 12), dtype=torch.uint8)[::2, ::3]
    assert torch.equal(layouts.to_blocked_128x4(sf), layouts.to_blocked_128x4(sf.contiguous()))


def test_no_rows():
    assert layouts.to_blocked_128x4(torch.empty(0, 4, dtype=torch.uint8)).shape == (0,)
    assert layouts.from_blocked_128x4(torch.empty(0, dtype=torch.uint8), 0, 4).shape == (0, 4)


def test_wrong_size():
    with pytest.raises(ValueError, match=r"\[5, 4\] take 512 bytes, got 511"):
        layouts.from_blocked_128x4(torch.zeros(511, dtype=torch.uint8), 5, 4)


MASK = 0x81C081C0  # a pair in a register: sign, exponent, mantissa at bits 15, 8 .. 6 and 31, 24 .. 22
FRAGMENTS = tuple(order for order in layouts.ORDERS if order != layouts.ROWS_ORDER)


def random_weight(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of [..., n, k], any bytes."""
    gen = torch.Generator().manual_seed(seed)
    *lead, n, k = shape
    data = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8, generator=gen)
    sf = torch.randint(0, 256, (*lead, n, k // 16), dtype=torch.uint8, generator=gen)
    return data, sf


def register(low: int, high: int) -> int:
    """Two codes as a kernel wants them before it scales them to BF16: S at bit 15, E E M at bits 8 .. 6; and 16 on."""
    image = [(code >> 3) << 15 | (code & 7) << 6 for code in (low, high)]
    return image[0] | image[1] << 16


def rotate_left(x: int, by: int) -> int:
    return (x << by | x >> (32 - by)) & 0xFFFFFFFF if by else x


def word_of_pairs(codes: list[int]) -> int:
    """The word of four pairs, from the definition: three registers rotated, the fourth into the bits left over."""
    pairs = list(zip(codes[::2], codes[1::2], strict=True))
    word = 0
    for pair, turn in zip(pairs[:3], (0, 3, 6), strict=True):
        word |= rotate_left(register(*pair), turn)
    for code, half in zip(pairs[3], (0, 16), strict=True):
        sign, e1, e0, mantissa = (code >> bit & 1 for bit in (3, 2, 1, 0))
        word |= (e1 | sign << 1 | mantissa << 3 | e0 << 4) << half
    return word


def registers_of(word: int) -> list[int]:
    """What a kernel takes out of a word, in its own operations."""
    return [
        word & MASK,
        rotate_left(word, 32 - 3) & MASK,
        rotate_left(word, 32 - 6) & MASK,
        (word & 0x001B001B) * (2**3 + 2**8 + 2**14) & MASK,
    ]


def codes_of_pairs(word: int) -> list[int]:
    """Undoes `word_of_pairs` by a kernel's operations."""
    halves = [r >> shift & 0xFFFF for r in registers_of(word) for shift in (0, 16)]
    return [half >> 12 & 8 | half >> 6 & 7 for half in halves]


def word_of_selectors(codes: list[int]) -> int:
    """The word of eight neighbours: each magnitude a digit, signs where two bytes of four numbers have theirs."""
    word = 0
    for i, code in enumerate(codes):
        word |= (code & 7) << 4 * i
        word |= (code >> 3) << (8 * i + 7 if i < 4 else 8 * (i - 4) + 3)
    return word


def codes_of_selectors(word: int) -> list[int]:
    """Undoes `word_of_selectors` by a kernel's operations: digits select, signs are those of bytes, shifted or not."""
    signs = [half >> 8 * i + 7 & 1 for half in (word, word << 4) for i in range(4)]
    return [word >> 4 * i & 7 | sign << 3 for i, sign in enumerate(signs)]


WORD_OF = {"fragments_sm90": word_of_pairs, "fragments_sm90_fp8": word_of_selectors}
CODES_OF = {"fragments_sm90": codes_of_pairs, "fragments_sm90_fp8": codes_of_selectors}


def word_place(order: str, lane: int, index: int) -> list[tuple[int, int]]:
    """Row and column of the eight codes of one of a lane's four words in a tile, from the definition."""
    w, g, q = lane // 32, lane % 32 // 4, lane % 4
    row = 16 * w + g
    if order == "fragments_sm90":
        pairs = [(row + 8 * (p % 2), 16 * index + 2 * q + 8 * (p // 2)) for p in range(4)]
        return [(r, c + i) for r, c in pairs for i in range(2)]
    j, h = index // 2, index % 2
    return [(row + 8 * h, 16 * q + 8 * j + i) for i in range(8)]


def scale_place(order: str, byte: int) -> tuple[int, int]:
    """Row and block of the scale at a byte of a tile, from the definition."""
    if order == "fragments_sm90":
        w, g, h, s = byte // 64, byte // 8 % 8, byte // 4 % 2, byte % 4
        return 16 * w + g + 8 * h, s
    t, h = byte // 2, byte % 2
    return 16 * (t // 32) + t % 32 // 4 + 8 * h, t % 4


def one_word(order: str, lane: int, index: int, codes: list[int]) -> bytes:
    """The tile that `layouts` makes when those are the codes of one word and all others 0."""
    data, sf = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
    for (row, column), code in zip(word_place(order, lane, index), codes, strict=True):
        data[row, column // 2] |= code << 4 * (column % 2)
    layouts.to_fragments_(data, sf, order)
    return bytes(data.view(-1).tolist())


@pytest.mark.parametrize("order", FRAGMENTS)
def test_every_code_in_every_place_of_a_word(order):
    """Each of the eight codes, alone and with every other bit of the word set; nothing lies outside of its word."""
    for others in (0, 15):
        for i in range(8):
            for code in range(16):
                codes = [others] * 8
                codes[i] = code
                word = WORD_OF[order](codes)
                assert CODES_OF[order](word) == codes
                tile = one_word(order, 0, 0, codes)
                assert int.from_bytes(tile[:4], "little") == word
                assert not any(tile[4:])


@pytest.mark.parametrize("order", FRAGMENTS)
def test_every_word_of_every_lane_has_its_place(order):
    """Eight different codes at the places of one word fill that word and no other."""
    codes = [9, 2, 15, 4, 13, 6, 7, 8]
    want = WORD_OF[order](codes).to_bytes(4, "little")
    for lane in (0, 1, 5, 31, 32, 70, 127):
        for index in range(4):
            tile = one_word(order, lane, index, codes)
            at = 16 * lane + 4 * index
            assert tile[at : at + 4] == want
            assert not any(tile[:at] + tile[at + 4 :])


@pytest.mark.parametrize("order", FRAGMENTS)
def test_a_word_is_its_codes(order):
    """Any 32 bits are eight codes: no bit is spare, none is shared."""
    for word in [0, 0xFFFFFFFF, *(1 << bit for bit in range(32))]:
        data, sf = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
        data.view(-1)[:4] = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8)
        layouts.from_fragments_(data, sf, order)
        codes = [int(data[r, c // 2]) >> 4 * (c % 2) & 15 for r, c in word_place(order, 0, 0)]
        assert WORD_OF[order](codes) == word
        assert CODES_OF[order](word) == codes
    gen = torch.Generator().manual_seed(1)
    for word in torch.randint(0, 2**32, (100_000,), generator=gen).tolist():
        assert WORD_OF[order](CODES_OF[order](word)) == word


def test_pairs_are_registers():
    """A kernel's four operations give each pair its register: all 256 values, beside zeros and beside ones."""
    for others in (0, 15):
        for p in range(4):
            for byte in range(256):
                pairs = [(others, others)] * 4
                pairs[p] = (byte & 15, byte >> 4)
                word = word_of_pairs([code for pair in pairs for code in pair])
                assert registers_of(word) == [register(*pair) for pair in pairs]


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (128, 192), (192, 64)])
def test_fragments_formula(order, n, k):
    """Element by element: which row and column every bit of every word comes from, and every scale."""
    data, sf = random_weight(n, k)
    code = torch.stack((data & 15, data >> 4), -1).flatten(-2).tolist()  # [n, k]
    scale = sf.tolist()
    words, scales = [], []
    for i in range(n // 64):
        for j in range(k // 64):
            for lane in range(128):
                for index in range(4):
                    places = word_place(order, lane, index)
                    words.append(WORD_OF[order]([code[64 * i + r][64 * j + c] for r, c in places]))
            for byte in range(256):
                row, block = scale_place(order, byte)
                scales.append(scale[64 * i + row][4 * j + block])
    layouts.to_fragments_(data, sf, order)
    assert bytes(data.view(-1).tolist()) == b"".join(word.to_bytes(4, "little") for word in words)
    assert sf.view(-1).tolist() == scales


def test_a_block_of_the_fp8_order_and_its_scale_belong_to_one_lane():
    """What the order is for: a lane's two words of a row are 16 columns under one scale, which is at bytes 2 t + h."""
    for lane in range(128):
        for h in range(2):
            places = [place for j in range(2) for place in word_place("fragments_sm90_fp8", lane, 2 * j + h)]
            row, block = scale_place("fragments_sm90_fp8", 2 * lane + h)
            assert places == [(row, 16 * block + i) for i in range(16)]


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize("shape", [(64, 64), (320, 448), (3, 128, 192), (2, 2, 64, 128), (0, 64), (64, 0), (0, 64, 64)])
@pytest.mark.parametrize("scratch", [1, 2 * 64 * 224, layouts.SCRATCH_BYTES])
def test_fragments_inverse(order, shape, scratch, monkeypatch):
    """There and back, and back and there; a block at a time, two (the last alone), or all at once give the same."""
    data, sf = random_weight(*shape)
    want_data, want_sf = data.clone(), sf.clone()
    layouts.to_fragments_(want_data, want_sf, order)
    monkeypatch.setattr(layouts, "SCRATCH_BYTES", scratch)
    moved_data, moved_sf = data.clone(), sf.clone().view(torch.float8_e4m3fn)
    layouts.to_fragments_(moved_data, moved_sf, order)
    assert torch.equal(moved_data, want_data)
    assert torch.equal(moved_sf.view(torch.uint8), want_sf)
    layouts.from_fragments_(moved_data, moved_sf, order)
    assert torch.equal(moved_data, data)
    assert torch.equal(moved_sf.view(torch.uint8), sf)
    layouts.from_fragments_(moved_data, moved_sf, order)
    layouts.to_fragments_(moved_data, moved_sf, order)
    assert torch.equal(moved_data, data)
    assert torch.equal(moved_sf.view(torch.uint8), sf)


@pytest.mark.parametrize("order", FRAGMENTS)
def test_experts_are_reordered_each_for_itself(order):
    data, sf = random_weight(3, 128, 64)
    one_data, one_sf = data[1].clone(), sf[1].clone()
    layouts.to_fragments_(data, sf, order)
    layouts.to_fragments_(one_data, one_sf, order)
    assert torch.equal(data[1], one_data)
    assert torch.equal(sf[1], one_sf)


@pytest.mark.parametrize("order", FRAGMENTS)
def test_rows_of_a_weight_are_reordered_as_they_arrive(order):
    """Blocks of 64 rows keep their bytes: shards of a weight can be done one by one, in any order."""
    data, sf = random_weight(256, 192)
    whole_data, whole_sf = data.clone(), sf.clone()
    layouts.to_fragments_(whole_data, whole_sf, order)
    for rows in (slice(192, 256), slice(0, 128), slice(128, 192)):
        layouts.to_fragments_(data[rows], sf[rows], order)
    assert torch.equal(data, whole_data)
    assert torch.equal(sf, whole_sf)


@pytest.mark.parametrize("order", layouts.ORDERS)
@pytest.mark.parametrize("shape", [(64, 64), (2, 128, 192)])
def test_row_maxima_in_any_order(order, shape):
    data, sf = random_weight(*shape)
    want = sf.amax(-1)
    if order != layouts.ROWS_ORDER:
        layouts.to_fragments_(data, sf, order)
    assert torch.equal(layouts.row_maxima(sf.view(torch.float8_e4m3fn), order), want)


def test_fp8_columns():
    """Place by place from the definition: A of two MMAs of k = 32, each of a lane's registers four neighbours of K."""
    columns = torch.arange(192).repeat(2, 1)
    placed = layouts.fp8_columns(columns)
    for base in range(0, 192, 64):
        for q in range(4):
            for j in range(2):
                for i in range(2):
                    for c in range(4):
                        assert placed[1, base + 32 * j + 16 * i + 4 * q + c] == base + 16 * q + 8 * j + 4 * i + c
    assert torch.equal(layouts.fp8_columns(placed), columns)


def test_fp8_columns_follow_the_codes_of_a_lane():
    """The four bytes of a lane's register of A: columns of codes in its words, and of tokens at the MMA's places."""
    placed = layouts.fp8_columns(torch.arange(64)).tolist()
    for lane in range(4):
        codes = [column for j in range(2) for _, column in word_place("fragments_sm90_fp8", lane, 2 * j)]
        places = [32 * j + 16 * i + 4 * lane + c for j in range(2) for i in range(2) for c in range(4)]
        assert [placed[at] for at in places] == codes


class Largest(TorchDispatchMode):
    """Bytes of storage that are alive at once, of what is made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage.data_ptr()] = (
                    StorageWeakRef(storage),
                    len(storage),
                )
        self.alive = {at: (ref, size) for at, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


REORDERS = {
    **{f"to_{order}": partial(layouts.to_fragments_, order=order) for order in FRAGMENTS},
    **{f"from_{order}": partial(layouts.from_fragments_, order=order) for order in FRAGMENTS},
    "to_blocked": lambda data, sf: layouts.to_blocked_128x4_(sf),
    "from_blocked": lambda data, sf: layouts.from_blocked_128x4_(sf.view(-1), *sf.shape),
}


@pytest.mark.parametrize("name", REORDERS)
def test_scratch_is_bounded(name, monkeypatch):
    """Ten times the weight takes no more memory beside it."""
    monkeypatch.setattr(layouts, "SCRATCH_BYTES", 1 << 15)
    reorder = REORDERS[name]
    reorder(*random_weight(128, 64))  # tables are made once
    peaks = []
    for n in (1024, 10240):
        data, sf = random_weight(n, 1024)
        with Largest() as seen:
            assert data.view(-1).numel() + sf.view(-1).numel() == seen.peak  # the weight itself counts, seen by views
            reorder(data, sf)
        peaks.append(seen.peak - data.numel() - sf.numel())
    assert 0 < peaks[0] == peaks[1] <= 5 * layouts.SCRATCH_BYTES


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize(("n", "k"), [(96, 64), (64, 96)])
def test_fragments_refuse_other_shapes(order, n, k):
    message = f'the order "{order}" is of tiles of 64 x 64, got n={n}, k={k}'
    assert layouts.refuse_fragments(n, k, order) == message
    assert layouts.refuse_fragments(64, 128, order) is None
    for reorder in (layouts.to_fragments_, layouts.from_fragments_):
        with pytest.raises(ValueError, match=message):
            reorder(*random_weight(n, k), order)


@pytest.mark.parametrize("order", FRAGMENTS)
def test_fragments_refuse_other_scales_and_strides(order):
    data, sf = random_weight(128, 64)
    with pytest.raises(ValueError, match=r"needs linear sf \[128, 4\], got \[512\]"):
        layouts.to_fragments_(data, layouts.to_blocked_128x4(sf), order)
    before = data.clone()
    with pytest.raises(ValueError, match="must be contiguous"):
        layouts.to_fragments_(data, random_weight(4, 2048)[1].T, order)
    assert torch.equal(data, before)
