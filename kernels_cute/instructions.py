"""PTX instructions that CuTe DSL has no function for, as device functions: those that more than one kernel uses.

Addresses are in bytes: of shared memory an Int32, of global memory an Int64. What must stay where it stands among reads
and writes has a side effect for the compiler; the rest it moves, or drops where nobody reads the result.
"""

from cutlass import Boolean, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def _load_four(asm: str, address: Int32 | Int64, kind: type[Float32] | type[Uint32], loc, ip):
    """The four registers of this kind that an instruction loads."""
    register, letter = (T.f32(), "f") if kind is Float32 else (T.i32(), "r")
    constraints = f"={letter}," * 4 + ("l" if isinstance(address, Int64) else "r")
    four, args = llvm.StructType.get_literal([register] * 4), [address.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(four, args, asm, constraints, has_side_effects=True, loc=loc, ip=ip)
    return [kind(llvm.extractvalue(register, got, [i], loc=loc, ip=ip)) for i in range(4)]


# --- global memory ----------------------------------------------------------------------------------------------------


@dsl_user_op
def fetch(address: Int64, *, loc=None, ip=None) -> Float32:
    """One number of global memory that nobody writes meanwhile."""
    asm = "ld.global.nc.f32 $0, [$1];"
    return Float32(llvm.inline_asm(T.f32(), [address.ir_value(loc=loc, ip=ip)], asm, "=f,l", loc=loc, ip=ip))


@dsl_user_op
def fetch_words(address: Int64, *, loc=None, ip=None):
    """Four words of global memory that are read once, and not before a fence that stands above."""
    return _load_four("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", address, Uint32, loc, ip)


@dsl_user_op
def bulk_load(to: Int32, source: Int64, size: Int32, barrier: Int32, policy: Int64, *, loc=None, ip=None):
    """`size` bytes to shared memory, counted by `barrier`, under a cache policy of L2."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (to, source, size, barrier, policy)]
    asm = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$0], [$1], $2, [$3], $4;"
    llvm.inline_asm(None, args, asm, "r,l,r,r,l", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def create_policy(once: Boolean, *, loc=None, ip=None) -> Int64:
    """A cache policy of L2: evict first, or as usual."""
    asm = (
        "{ .reg .pred p; .reg .b64 first, normal; setp.ne.b32 p, $1, 0; "
        "createpolicy.fractional.L2::evict_first.b64 first, 1.0; "
        "createpolicy.fractional.L2::evict_normal.b64 normal, 1.0; selp.b64 $0, first, normal, p; }"
    )
    args = [Int32(once).ir_value(loc=loc, ip=ip)]
    return Int64(llvm.inline_asm(T.i64(), args, asm, "=l,r", loc=loc, ip=ip))


@dsl_user_op
def prefetch(address: Int64, size: Int32, *, loc=None, ip=None):
    """Bytes of global memory to L2: the address and their number are multiples of 16."""
    args = [address.ir_value(loc=loc, ip=ip), size.ir_value(loc=loc, ip=ip)]
    asm = "cp.async.bulk.prefetch.L2.global [$0], $1;"
    llvm.inline_asm(None, args, asm, "l,r", has_side_effects=True, loc=loc, ip=ip)


# --- shared memory ----------------------------------------------------------------------------------------------------


@dsl_user_op
def load_number(address: Int32, *, loc=None, ip=None) -> Float32:
    """One number of shared memory."""
    args = [address.ir_value(loc=loc, ip=ip)]
    asm = "ld.shared.f32 $0, [$1];"
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def load4(address: Int32, *, loc=None, ip=None):
    """Four numbers of shared memory."""
    return _load_four("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", address, Float32, loc, ip)


@dsl_user_op
def load_words(address: Int32, *, loc=None, ip=None):
    """Four words of shared memory."""
    return _load_four("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, Uint32, loc, ip)


@dsl_user_op
def store_words(address: Int32, words, *, loc=None, ip=None):
    """Four words to shared memory."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, *words)]
    asm = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
    llvm.inline_asm(None, args, asm, "r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_matrices(address: Int32, *, loc=None, ip=None):
    """Four 8 x 8 matrices of 16-bit numbers from shared memory, of each a lane's pair of a row."""
    return _load_four("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", address, Uint32, loc, ip)


def loads_have_come():
    """This thread's loads of shared memory are over, and TMA may write there, once it has arrived at an mbarrier: the
    arrival alone may overtake them.
    """
    cute.arch.fence_proxy("async.shared", space="cta")


# --- shared memory of a CTA of the cluster; addresses are as in this CTA ----------------------------------------------


@dsl_user_op
def push(address: Int32, barrier: Int32, rank: Int32, numbers, *, loc=None, ip=None):
    """One, two or four numbers or words, counted by a barrier of the receiver."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, barrier, rank, *numbers)]
    kind, letter = ("f32", ",f") if isinstance(numbers[0], Float32) else ("b32", ",r")
    what = "$3"
    if len(numbers) > 1:
        kind, what = f"v{len(numbers)}.{kind}", "{" + ", ".join(f"${3 + i}" for i in range(len(numbers))) + "}"
    asm = (
        "{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $2; mapa.shared::cluster.u32 bar, $1, $2; "
        f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [to], {what}, [bar]; }}"
    )
    llvm.inline_asm(None, args, asm, "r,r,r" + letter * len(numbers), has_side_effects=True, loc=loc, ip=ip)


# --- bits -------------------------------------------------------------------------------------------------------------


@dsl_user_op
def float_bits(x: Float32, *, loc=None, ip=None) -> Uint32:
    return Uint32(llvm.bitcast(T.i32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def bits_float(x: Int32 | Uint32, *, loc=None, ip=None) -> Float32:
    return Float32(llvm.bitcast(T.f32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


def widen(word):
    """Two BF16 numbers of a word."""
    return bits_float(word << Uint32(16)), bits_float(word & Uint32(0xFFFF0000))


@dsl_user_op
def prmt(x: Uint32, y: Uint32, selector: int, *, loc=None, ip=None) -> Uint32:
    """Four bytes of (x, y), picked by the selector's digits from 0 (lowest of x) to 7."""
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def highest_bit(x: Uint32, *, loc=None, ip=None) -> Int32:
    """The place of the highest bit that is set; -1 if none is."""
    args = [x.ir_value(loc=loc, ip=ip)]
    return Int32(llvm.inline_asm(T.i32(), args, "bfind.u32 $0, $1;", "=r,r", loc=loc, ip=ip))


# --- conversions ------------------------------------------------------------------------------------------------------


@dsl_user_op
def e4m3x2_to_f16x2(x: Uint32, *, loc=None, ip=None) -> Uint32:
    """The two low bytes as E4M3 -> two FP16 numbers in a word, exactly."""
    asm = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 $0, h; }"
    return Uint32(llvm.inline_asm(T.i32(), [x.ir_value(loc=loc, ip=ip)], asm, "=r,r", loc=loc, ip=ip))


@dsl_user_op
def f16_to_f32(x: Uint32, *, loc=None, ip=None) -> Float32:
    """The low half of a word as FP16."""
    asm = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }"
    return Float32(llvm.inline_asm(T.f32(), [x.ir_value(loc=loc, ip=ip)], asm, "=f,r", loc=loc, ip=ip))


@dsl_user_op
def pack_bf16(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two numbers rounded to BF16, in a word."""
    args = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", loc=loc, ip=ip))


# --- arithmetic -------------------------------------------------------------------------------------------------------


@dsl_user_op
def approximately(function: str, x: Float32, *, loc=None, ip=None) -> Float32:
    """rcp, sqrt, rsqrt, ex2 or lg2 as the hardware has it."""
    args = [x.ir_value(loc=loc, ip=ip)]
    return Float32(llvm.inline_asm(T.f32(), args, f"{function}.approx.ftz.f32 $0, $1;", "=f,f", loc=loc, ip=ip))


@dsl_user_op
def mul(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """Rounded by itself, whatever is done with it."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    return Float32(llvm.inline_asm(T.f32(), args, "mul.rn.f32 $0, $1, $2;", "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def add(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """Rounded by itself, whatever is done with it."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    return Float32(llvm.inline_asm(T.f32(), args, "add.rn.f32 $0, $1, $2;", "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def fma(x: Float32, y: Float32, z: Float32, *, loc=None, ip=None) -> Float32:
    """x y + z."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y, z)]
    return Float32(llvm.inline_asm(T.f32(), args, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc=loc, ip=ip))


@dsl_user_op
def plus_zero(x: Float32, *, loc=None, ip=None) -> Float32:
    """Zeros become positive, NaN one and the same."""
    asm = "add.rn.f32 $0, $1, 0f00000000;"
    return Float32(llvm.inline_asm(T.f32(), [x.ir_value(loc=loc, ip=ip)], asm, "=f,f", loc=loc, ip=ip))


@dsl_user_op
def add_lanes(x: Int32, *, loc=None, ip=None) -> Int32:
    """The sum over a warp."""
    args = [x.ir_value(loc=loc, ip=ip)]
    asm = "redux.sync.add.s32 $0, $1, 0xffffffff;"
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def mul_bf16x2(x: Uint32, y: Uint32, *, loc=None, ip=None) -> Uint32:
    """Two BF16 products; subnormal operands count in full (PTX ISA, mul.bf16x2)."""
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def mul_by_half(kind: str, x: Uint32, scales: Uint32, half: int, *, loc=None, ip=None) -> Uint32:
    """Two products with one half of a word, bf16x2 or f16x2; subnormal operands count in full (PTX ISA, mul)."""
    name = ("low", "high")[half]
    asm = (
        "{ .reg .b16 low, high; .reg .b32 s; mov.b32 {low, high}, $2; "
        f"mov.b32 s, {{{name}, {name}}}; mul.rn.{kind} $0, $1, s; }}"
    )
    args = [x.ir_value(loc=loc, ip=ip), scales.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def mma_16816(a, b, c, *, loc=None, ip=None):
    """c + a b of m16n8k16: four words of a, two of b, four FP32 numbers of c."""
    asm = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};"
    )
    args = [x.ir_value(loc=loc, ip=ip) for x in (*a, *b, *c)]
    kind = llvm.StructType.get_literal([T.f32()] * 4)
    got = llvm.inline_asm(kind, args, asm, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", loc=loc, ip=ip)
    return [Float32(llvm.extractvalue(T.f32(), got, [i], loc=loc, ip=ip)) for i in range(4)]
