"""Scores that stress a choice of the highest: what the tests of index_topk's kernels share."""

from types import ModuleType

import torch
from torch import Tensor

from fp4suite import testing
from fp4suite.problem import IndexTopkProblem

INF, NAN = float("inf"), float("nan")
KINDS = {
    "random": lambda g, n: torch.randn(n, generator=g),
    "ties": lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),
    "rising": lambda g, n: torch.arange(float(n)) - n / 2,
    "falling": lambda g, n: n / 2 - torch.arange(float(n)),
    "equal": lambda g, n: torch.zeros(n),
    "zeros of both signs": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "not finite": lambda g, n: torch.tensor([NAN, -NAN, INF, -INF, 1.0])[torch.randint(0, 5, (n,), generator=g)],
    "a third NaN": lambda g, n: torch.where(torch.rand(n, generator=g) < 1 / 3, NAN, torch.randn(n, generator=g)),
    "huge and tiny": lambda g, n: torch.randn(n, generator=g) * 10.0 ** torch.randint(-45, 38, (n,), generator=g),
}


def rows(entries: int, device: torch.device, page: int = 8) -> dict[str, Tensor]:
    """One query of each kind with every entry, one with fewer, one that sees nothing and one of padding."""
    g = torch.Generator().manual_seed(entries)
    made = [make(g, entries) for make in KINDS.values()]
    made += [torch.randn(entries, generator=g) for _ in range(3)]
    table = torch.randperm(3 * -(-entries // page), generator=g).int().view(3, -1)
    table[2, 1::3] = -1
    seen = torch.tensor([entries] * len(KINDS) + [entries * 2 // 3, 0, entries])
    sequences = torch.arange(len(made)) % 3
    sequences[-1] = -1
    return {
        "logits": torch.stack(made).to(device),
        "block_table": table.to(device),
        "positions": (4 * seen + 2).int().to(device),  # the entry after the last seen is one token short
        "sequence_ids": sequences.int().to(device),
    }


def check_in_a_graph(kernel: ModuleType, m: int, entries: int, device: torch.device) -> None:
    """A launch of `index_topk` captured once, replayed on other scores."""
    c = testing.case(IndexTopkProblem(m=m, entries=entries, topk=512), device)
    config = kernel.default(c.problem)
    kernel.warm(c.problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for _ in range(3):
        c.operands[0].copy_(torch.roll(c.operands[0], 12345, 1))
        c.poison()
        graph.replay()
        c.check()
