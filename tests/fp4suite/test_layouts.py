"""blocked_128x4 and fragments_sm90 against their formulas in plain loops, and both ways round."""

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


def word_of(pairs: list[tuple[int, int]]) -> int:
    """The word of four pairs, from the definition: three registers rotated, the fourth into the bits left over."""
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


def one_word(pairs: list[tuple[int, int]]) -> int:
    """The word that `layouts` makes of lane 0, step 0 when those are its codes and all others 0."""
    data, sf = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
    for p, (low, high) in enumerate(pairs):
        data[8 * (p % 2), 4 * (p // 2)] = low | high << 4
    layouts.to_fragments_sm90_(data, sf)
    return int.from_bytes(bytes(data.view(-1)[:4].tolist()), "little")


def test_every_code_of_every_pair():
    """All 256 values of each pair, alone and with every other bit of the word set."""
    for others in (0, 15):
        for p in range(4):
            for byte in range(256):
                pairs = [(others, others)] * 4
                pairs[p] = (byte & 15, byte >> 4)
                word = one_word(pairs)
                assert word == word_of(pairs)
                assert registers_of(word) == [register(*pair) for pair in pairs]


def test_a_word_is_its_registers():
    """Any 32 bits are four pairs: no bit is spare, none is shared."""
    gen = torch.Generator().manual_seed(1)
    for word in [0, 0xFFFFFFFF, *(1 << bit for bit in range(32))]:
        data, sf = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
        data.view(-1)[:4] = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8)
        layouts.from_fragments_sm90_(data, sf)
        pairs = [(b & 15, b >> 4) for b in (int(data[8 * (p % 2), 4 * (p // 2)]) for p in range(4))]
        assert word_of(pairs) == word
        assert registers_of(word) == [register(*pair) for pair in pairs]
    for word in torch.randint(0, 2**32, (100_000,), generator=gen).tolist():
        first, second, third, fourth = registers_of(word)
        signs, rest = fourth & 0x80008000, fourth & 0x01C001C0
        last = rest >> 3 & 0x00180018 | rest >> 8 & 0x00010001 | signs >> 14 & 0x00020002
        assert first | rotate_left(second, 3) | rotate_left(third, 6) | last == word


@pytest.mark.parametrize(("n", "k"), [(64, 64), (128, 192), (192, 64)])
def test_fragments_formula(n, k):
    """Element by element: which row and column every bit of every word comes from, and every scale."""
    data, sf = random_weight(n, k)
    code = torch.stack((data & 15, data >> 4), -1).flatten(-2).tolist()  # [n, k]
    scale = sf.tolist()
    words = [0] * (n * k // 8)
    scales = [0] * (n * k // 16)
    for i in range(n // 64):
        for j in range(k // 64):
            tile = i * (k // 64) + j
            for w in range(4):
                for g in range(8):
                    row = 64 * i + 16 * w + g
                    for q in range(4):
                        lane = 32 * w + 4 * g + q
                        for s in range(4):
                            pairs = []
                            for p in range(4):
                                r, c = row + 8 * (p % 2), 64 * j + 16 * s + 2 * q + 8 * (p // 2)
                                pairs.append((code[r][c], code[r][c + 1]))
                            words[tile * 512 + lane * 4 + s] = word_of(pairs)
                    for h in range(2):
                        for s in range(4):
                            scales[tile * 256 + 64 * w + 8 * g + 4 * h + s] = scale[row + 8 * h][4 * j + s]
    layouts.to_fragments_sm90_(data, sf)
    assert bytes(data.view(-1).tolist()) == b"".join(word.to_bytes(4, "little") for word in words)
    assert sf.view(-1).tolist() == scales


@pytest.mark.parametrize("shape", [(64, 64), (320, 448), (3, 128, 192), (2, 2, 64, 128), (0, 64), (64, 0), (0, 64, 64)])
@pytest.mark.parametrize("scratch", [1, 2 * 64 * 224, layouts.SCRATCH_BYTES])
def test_fragments_inverse(shape, scratch, monkeypatch):
    """There and back, and back and there; a block at a time, two (the last alone), or all at once give the same."""
    data, sf = random_weight(*shape)
    want_data, want_sf = data.clone(), sf.clone()
    layouts.to_fragments_sm90_(want_data, want_sf)
    monkeypatch.setattr(layouts, "SCRATCH_BYTES", scratch)
    moved_data, moved_sf = data.clone(), sf.clone().view(torch.float8_e4m3fn)
    layouts.to_fragments_sm90_(moved_data, moved_sf)
    assert torch.equal(moved_data, want_data)
    assert torch.equal(moved_sf.view(torch.uint8), want_sf)
    layouts.from_fragments_sm90_(moved_data, moved_sf)
    assert torch.equal(moved_data, data)
    assert torch.equal(moved_sf.view(torch.uint8), sf)
    layouts.from_fragments_sm90_(moved_data, moved_sf)
    layouts.to_fragments_sm90_(moved_data, moved_sf)
    assert torch.equal(moved_data, data)
    assert torch.equal(moved_sf.view(torch.uint8), sf)


def test_experts_are_reordered_each_for_itself():
    data, sf = random_weight(3, 128, 64)
    one_data, one_sf = data[1].clone(), sf[1].clone()
    layouts.to_fragments_sm90_(data, sf)
    layouts.to_fragments_sm90_(one_data, one_sf)
    assert torch.equal(data[1], one_data)
    assert torch.equal(sf[1], one_sf)


def test_rows_of_a_weight_are_reordered_as_they_arrive():
    """Blocks of 64 rows keep their bytes: shards of a weight can be done one by one, in any order."""
    data, sf = random_weight(256, 192)
    whole_data, whole_sf = data.clone(), sf.clone()
    layouts.to_fragments_sm90_(whole_data, whole_sf)
    for rows in (slice(192, 256), slice(0, 128), slice(128, 192)):
        layouts.to_fragments_sm90_(data[rows], sf[rows])
    assert torch.equal(data, whole_data)
    assert torch.equal(sf, whole_sf)


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
    "to_fragments": layouts.to_fragments_sm90_,
    "from_fragments": layouts.from_fragments_sm90_,
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


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [(96, 64, "tiles of 64 x 64, got n=96, k=64"), (64, 96, "tiles of 64 x 64, got n=64, k=96")],
)
def test_fragments_refuse_other_shapes(n, k, message):
    assert message in layouts.refuse_fragments_sm90(n, k)
    for reorder in (layouts.to_fragments_sm90_, layouts.from_fragments_sm90_):
        with pytest.raises(ValueError, match=message):
            reorder(*random_weight(n, k))


def test_fragments_refuse_other_scales_and_strides():
    data, sf = random_weight(128, 64)
    with pytest.raises(ValueError, match=r"needs linear sf \[128, 4\], got \[512\]"):
        layouts.to_fragments_sm90_(data, layouts.to_blocked_128x4(sf))
    before = data.clone()
    with pytest.raises(ValueError, match="must be contiguous"):
        layouts.to_fragments_sm90_(data, random_weight(4, 2048)[1].T)
    assert torch.equal(data, before)
