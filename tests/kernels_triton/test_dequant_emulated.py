"""The machine code of dequant_nvfp4 in `ptx_emulator`: rounding to BF16, which Triton's interpreter truncates."""

import pytest
import torch

from fp4suite import NVFP4Tensor, reference, testing
from fp4suite.problem import DequantProblem
from kernels_triton import dequant_nvfp4 as kernel

from .test_rope_emulated import emulate


@pytest.mark.parametrize(
    ("arch", "config", "out"),
    [
        ("sm_90a", (8, 512, 4), "bf16"),
        ("sm_100a", (1, 1024, 2), "bf16"),
        ("sm_90a", (8, 512, 4), "fp32"),
        ("sm_100a", (1, 1024, 2), "fp16"),
    ],
    ids=str,
)
def test_every_code_under_every_scale(arch, config, out, pool):
    p = DequantProblem(m=256, k=528, out=out)  # beside a full tile of 512 a part of one
    data = torch.arange(p.k // 2).to(torch.uint8).expand(p.m, -1).contiguous()
    sf = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, p.k // 16).contiguous()
    alpha = torch.tensor(0.37)
    got = torch.full((p.m, p.k), torch.nan, dtype=kernel.host.DTYPES[out])
    block_m, block_k, num_warps = config
    own = kernel.Config(block_m=block_m, block_k=block_k, num_warps=num_warps)
    grid = p.m // block_m, -(-p.k // block_k), 1
    strides = sf.numel(), 0, 0, 0, p.k
    args = (data, sf, alpha, got, *strides, p.m, p.k, 0, p.m, 0)
    emulate(pool, kernel, p, own, arch, grid, args)
    want = reference.dequant_nvfp4(NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), alpha), got.dtype)
    finite = ~want.isnan()
    assert torch.equal(got.isnan(), ~finite)
    testing.assert_same_bytes(torch.where(finite, got, 0), torch.where(finite, want, 0), out)
