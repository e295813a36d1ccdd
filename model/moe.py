"""Mixture of experts: a router, stacked routed experts, and one shared expert that every token passes."""

import torch
from torch import Tensor, nn

from fp4suite import by_token, ops
from fp4suite.formats import NVFP4Tensor
from fp4suite.reference import moe

from .config import ModelConfig
from .inputs import Gated, Input
from .linear import Build, Linear


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, build: Build) -> None:
        super().__init__()
        self.config, self.act = config, build.act
        d, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate = Gate(config, layer, build)
        self.w13 = build.weight("w13", (experts, 2 * inner, d), segments=(inner, inner))  # gate rows, then up
        self.w2 = build.weight("w2", (experts, d, inner))
        self.shared = SharedExpert(config, build.child("shared"))

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [tokens, hidden], normed -> [tokens, hidden]; token_ids int64 [tokens], for layers that route by them."""
        read = Input(x)
        ids, weights = self.gate.choose(read, token_ids)  # [tokens, topk]
        w13, w2, limit = self.w13.weight, self.w2.weight, self.config.swiglu_limit
        if isinstance(w13, NVFP4Tensor) and isinstance(w2, NVFP4Tensor):
            a = read.nvfp4() if self.act == "nvfp4" else x
            routed = ops.moe_nvfp4(a, w13, w2, ids, weights, limit=limit).to(x.dtype)
        elif isinstance(w13, Tensor) and isinstance(w2, Tensor):
            routed = by_token.each(lambda *one: moe(one[0], w13, w2, *one[1:], limit=limit), x, ids, weights)
        else:
            kinds = f"{type(w13).__name__} and {type(w2).__name__}"
            raise TypeError(f"w13 and w2 must both be NVFP4 or both plain tensors, got {kinds}")
        return routed + self.shared(read)


class Gate(Linear):
    """Chooses experts: by score plus bias, or in the first layers by a table of the token id."""

    bias: Tensor | None  # FP32 [experts]
    tid2eid: Tensor | None  # int32 [vocab, topk]

    def __init__(self, config: ModelConfig, layer: int, build: Build) -> None:
        super().__init__(config.n_routed_experts, config.hidden_size, build.format_of("gate"), device=build.device)
        self.config = config
        is_hash = config.is_hash(layer)
        self.register_buffer("bias", None if is_hash else build.fp32(config.n_routed_experts))
        table = build.int32(config.vocab_size, config.num_experts_per_tok) if is_hash else None
        self.register_buffer("tid2eid", table)

    def choose(self, x: Input, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int32 and weights FP32, [tokens, topk] each."""
        return ops.route(
            self(x, torch.float32),  # scores in FP32: ties and near ties decide which expert runs
            topk=self.config.num_experts_per_tok,
            scale=self.config.routed_scaling_factor,
            bias=self.bias,
            token_ids=token_ids if self.tid2eid is not None else None,
            table=self.tid2eid,
        )


class SharedExpert(nn.Module):
    """One dense expert of the routed experts' width, clamped like them; its weight in the sum is 1."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w13 = build.linear("w13", 2 * inner, d, segments=(inner, inner))  # gate rows, then up
        self.w2 = build.linear("w2", d, inner)

    def forward(self, x: Input) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self.w2(Gated(self.w13(x, torch.float32), self.limit, x.dtype))
