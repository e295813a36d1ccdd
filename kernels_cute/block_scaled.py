"""Operands of block-scaled MMAs of sm_100a on their way from global to shared to tensor memory.

Codes lie in shared memory in rows of 128 bytes, swizzled; scales as whole atoms of `blocked_128x4`
(`fp4suite.layouts`), each the scales of 128 rows and of one MMA's k.
"""

from cutlass import cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cutlass_dsl import dsl_user_op

TILE_K = 256  # k of a stage: 128 bytes of codes, one swizzled row
MMA_K = 64  # k of one MMA instruction: four scales a row
SF_ROWS, SF_ATOM_BYTES = 128, 512  # a scale atom covers 128 rows and MMA_K of k
SF_WORDS = SF_ATOM_BYTES // 4
MMAS = TILE_K // MMA_K  # MMA instructions of a stage, and scale atoms along k


def swizzled_rows(dtype, rows, stages):
    """Shared [rows, columns, stage], a row 128 bytes, its 16-byte chunks permuted by row % 8 (TMA's SWIZZLE_128B)."""
    atom = tcgen05.make_smem_layout_atom(tcgen05.SmemLayoutAtomKind.K_SW128, dtype)
    return cute.tile_to_shape(atom, (rows, 128 * 8 // dtype.width, stages), order=(0, 1, 2))


def scale_words(rows, k):
    """A blocked_128x4 buffer as [SF_WORDS, k / MMA_K, ceil(rows / SF_ROWS)]: to TMA an atom is a run of words.

    Row r of an atom is its word r % 32 * 4 + r // 32.
    """
    atoms_k = k // MMA_K
    shape = (SF_WORDS, atoms_k, cute.ceil_div(rows, SF_ROWS))
    return cute.make_layout(shape, stride=(1, SF_WORDS, SF_WORDS * atoms_k))


def scale_bytes(rows, k):
    """The same buffer as bytes [row, block of 16 along k]."""
    atoms_k = k // MMA_K
    shape = ((32, 4, cute.ceil_div(rows, SF_ROWS)), (4, atoms_k))
    return cute.make_layout(shape, stride=((16, 4, SF_ATOM_BYTES * atoms_k), (1, SF_ATOM_BYTES)))


def scale_atoms(atoms, stages):
    """Shared [SF_WORDS, MMAS, atoms of rows, stage], in the same order as in global memory."""
    return cute.make_ordered_layout((SF_WORDS, MMAS, atoms, stages), order=(0, 1, 2, 3))


def partition(tma, smem, box, part, parts):
    """Shared [values, stage] and global [values, tile...] sides of copies of boxes, or of one of `parts` of each."""
    gmem = cute.flat_divide(tma.tma_tensor, box)
    rank = len(box)
    return cpasync.tma_partition(
        tma.atom, part, cute.make_layout(parts), cute.group_modes(smem, 0, rank), cute.group_modes(gmem, 0, rank)
    )


def send(tma, source, target, barrier, ctas, parts):
    """One TMA load, to the CTAs of the mask if it is shared."""
    mask = ctas if parts > 1 else None
    cute.copy(tma.atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)


@dsl_user_op
def tcgen05_fence(side, *, loc=None, ip=None):
    """Orders tcgen05 work "before" or "after" a synchronisation of threads (PTX ISA, tcgen05.fence)."""
    kinds = {"before": nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, "after": nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC}
    nvvm.tcgen05_fence(kinds[side], loc=loc, ip=ip)
