"""What the CUTLASS examples are compared with: operands, references, and that a wrong result is seen."""

from types import ModuleType

import cutlass
import ml_dtypes
import numpy as np
import pytest
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor

from ptx_emulator import Fault, active, emulate, emulation

from .examples import gpu_host as gpu_tensors, harness, operands
from .examples.gpu_host import as_it_stands, gpu_host
from .examples.harness import Case, Prepared, run_case
from .examples.operands import FORMATS, empty, expected, matrix, product, scales


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("int4", ml_dtypes.int4),
    ],
)
def test_codes_of_less_than_a_byte(name, dtype):
    f = FORMATS[name]
    codes = np.arange(1 << f.bits, dtype=np.uint8)
    want = codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(f.decode(torch.from_numpy(codes)).numpy(), want)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"e8m0", "tf32", "int32"}))
@pytest.mark.parametrize("major", ["k", "mn"])
def test_what_is_stored_is_what_the_reference_multiplies(name, major):
    m = matrix(name, 2, 48, 32, generator(), major)
    assert torch.equal(m.read(), m.values)
    assert len(m.values.unique()) > 8
    assert m.data.numel() == 2 * 48 * 32 * m.format.bits // 8
    assert m.data.data_ptr() % 128 == 0


def test_scales_differ_everywhere_and_padding_is_not_zero():
    s = scales("e4m3", 1, 160, 96, 16, generator())
    assert s.values.shape == (1, 160, 6)
    assert len(s.values.unique()) > 20
    assert (s.data != 0).all()
    assert s.data.numel() == 256 * 8


def gemm():
    gen = generator()
    a, b = matrix("e2m1", 1, 32, 64, gen), matrix("e2m1", 1, 16, 64, gen)
    sfa, sfb = scales("e4m3", 1, 32, 64, 16, gen), scales("e4m3", 1, 16, 64, 16, gen)
    left, right = a.values * sfa.expanded(64), b.values * sfb.expanded(64)
    output = expected(empty("fp16", 1, 32, 16), *product(left, right))
    return output, left, right


def write(output, values) -> None:
    output.out.data.copy_(values.to(torch.float16).reshape(-1).view(torch.uint8))


def test_a_right_result_and_wrong_ones():
    output, left, right = gemm()
    assert "nan" in output.mismatch()  # nothing was written yet
    exact = left @ right.transpose(1, 2)
    write(output, exact)
    assert output.mismatch() is None
    for wrong in (exact.roll(1, 1), left.roll(16, 2) @ right.transpose(1, 2), exact * (1 + 2.0**-9)):
        write(output, wrong)
        assert "elements are wrong" in output.mismatch()
    spoilt = exact.clone()
    spoilt[0, 31, 15] += 0.25 + spoilt[0, 31, 15].abs() / 256
    write(output, spoilt)
    assert output.mismatch().startswith("d[0, 31, 15] is")
    assert output.mismatch().endswith("1 of 512 elements are wrong")
    output.reset()
    assert output.out.read().isnan().all()


def test_what_is_left_open_may_be_anything():
    output, left, right = gemm()
    want = left @ right.transpose(1, 2)
    want[:, 7] = torch.nan
    some = expected(output.out, want, want.abs())
    write(some, want)
    assert some.mismatch() is None


def test_packing():
    codes = torch.tensor([1, 2, 3, 63], dtype=torch.uint8)
    assert operands.pack(codes, 6).tolist() == [0b10000001, 0b00110000, 0b11111100]
    assert operands.unpack(operands.pack(codes, 6), 6).tolist() == codes.tolist()
    assert operands.pack(codes[:2], 4).tolist() == [0x21]


class _Result:
    """An output that is wrong where `wrong` says so."""

    def __init__(self, wrong):
        self.wrong = wrong

    def reset(self) -> None:
        pass

    def mismatch(self) -> str | None:
        return "an element is wrong" if self.wrong() else None


@pytest.mark.parametrize(
    ("says", "says_so", "shown", "wrong_under", "verdict"),
    [
        ("data race", "data race: here", (), (), None),
        ("data race", "no proxy fence: here", (), (), "must be refused for 'data race', but: Fault: no proxy fence"),
        ("data race", "", (), (), "must be refused for 'data race', but: None"),
        ("data race", "data race: here", (), ("eager",), "an element is wrong"),
        ("data race", "data race: here", ("eager",), ("eager",), None),
        ("data race", "data race: here", ("eager",), (), "must be wrong without the checks"),
        ("", "data race: here", (), (), "Fault: data race: here"),
    ],
)
def test_a_case_is_held_to_what_it_says(monkeypatch, says, says_so, shown, wrong_under, verdict):
    monkeypatch.setattr(harness, "import_example", lambda *a: None)

    def prepare(module, gen) -> Prepared:
        def run() -> None:
            if says_so and emulation._active[-1].races:
                raise Fault(says_so)

        return Prepared(run, [_Result(lambda: emulation._active[-1].schedule in wrong_under)], ())

    outcomes = []
    good = run_case(None, Case("an.example", prepare, refused=says, shown=shown), ["round", "eager"], outcomes.append)
    assert good == (verdict is None)
    assert outcomes[-1].problem is None if verdict is None else verdict in outcomes[-1].problem


def verdict(verify) -> str | None:
    """What the harness says of an example whose own check is this function."""
    module = ModuleType("example")
    module.verify = verify
    prepared = as_it_stands(module, generator())
    with emulate("sm_100a"):
        try:
            prepared.run()
        except AssertionError as e:
            return str(e)
    return None


def test_an_example_that_checks_itself_is_believed_only_when_a_kernel_ran():
    assert verdict(lambda: None) == "no kernel was launched"

    def right():
        active().launches.append(None)

    def wrong(say):
        right()
        print(say)

    def raises():
        torch.testing.assert_close(torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"))

    assert verdict(right) is None
    assert verdict(lambda: wrong("all is well")) is None
    assert "FAILED" in verdict(lambda: wrong("kernel 4: FAILED"))
    assert "not close" in verdict(raises)
    assert verdict(lambda: right() is not None) is not None


def test_tensors_of_host_code_lie_as_on_a_gpu():
    before = torch.cuda.is_available()
    with gpu_host():
        made = torch.randn(3, 5, device="cuda"), torch.zeros(7).cuda(), torch.ones(3, 2).T.to("cuda")
        copied = made[0].cpu()
        copied[0, 0] = 9
    assert all(x.untyped_storage().data_ptr() % 512 == 0 for x in made)
    assert [x.untyped_storage().nbytes() for x in made] == [60, 28, 24]
    assert made[2].stride() == (1, 2)
    assert made[0][0, 0] != 9
    assert torch.cuda.is_available() == before


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(8, 4, dtype=torch.float16), "float16 for one of Float32"),
        (torch.zeros(8, 5), "5 where the function was compiled for 4"),
        (torch.zeros(6, 4), "6 is not a multiple of 4"),
        (torch.zeros(4, 8).T, "1 where the function was compiled for 4|stride 1"),
    ],
)
def test_tensors_that_are_not_as_they_were_when_compiling(tensor, message):
    fake = make_fake_compact_tensor(
        cutlass.Float32, (cute.sym_int64(divisibility=4), 4), stride_order=(1, 0), assumed_align=4
    )
    gpu_tensors._Descriptor(fake, torch.zeros(8, 4))
    with pytest.raises(ValueError, match=message):
        gpu_tensors._Descriptor(fake, tensor)
