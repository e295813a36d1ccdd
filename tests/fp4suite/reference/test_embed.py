"""embed against indexing, row by row; ids of no row; types."""

import torch

from fp4suite.reference import embed


def test_rows_in_every_stream() -> None:
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([7, 49, 0, 7, 50, -1])
    for streams in (1, 4):
        got = embed(ids, weight, streams=streams)
        assert got.shape == (6, streams, 24)
        assert got.is_contiguous()
        for t, token in enumerate(ids.tolist()):
            for s in range(streams):
                assert torch.equal(got[t, s], weight[token]) if 0 <= token < 50 else got[t, s].isnan().all()
    assert torch.equal(embed(ids[:4].int(), weight, out_dtype=torch.bfloat16)[:, 0], weight[ids[:4]].bfloat16())


def test_type_is_the_weights_unless_asked_for() -> None:
    weight = torch.ones(3, 8, dtype=torch.bfloat16)
    assert embed(torch.tensor([2]), weight).dtype == torch.bfloat16
    assert embed(torch.tensor([3]), weight, out_dtype=torch.float32).dtype == torch.float32
    assert embed(torch.zeros(0, dtype=torch.int64), weight, streams=2).shape == (0, 2, 8)
