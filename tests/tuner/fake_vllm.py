"""vLLM's operators under their own schemas (those that version 0.33 registers), computed in PyTorch.

What an adapter passes is so checked against the arguments that there are, by name, order and type.
"""

import torch

from fp4suite.formats import E4M3_MAX

SCHEMAS = {
    "_C": """
rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()
silu_and_mul_with_clamp(Tensor! result, Tensor input, float limit, float alpha=1.0, float beta=0.0) -> ()
dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()
rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, \
int rope_dim_offset=0, bool inverse=False) -> ()
per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, \
float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned ) -> ()
fused_deepseek_v4_kv_rope_insert(Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, \
Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale=None, bool kv_mxfp8=False) -> ()
fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(Tensor q_in, Tensor kv, Tensor! k_cache, Tensor slot_mapping, \
Tensor position_ids, Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size, \
bool apply_q_norm=True, bool kv_mxfp8=False, bool apply_q_rope=True, bool is_q_interleaved=False) -> Tensor
top_k_per_row_prefill(Tensor logits, Tensor rowStarts, Tensor rowEnds, Tensor! indices, int numRows, int stride0, \
int stride1, int topK) -> ()
persistent_topk(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()
cooperative_topk(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, int k, int max_seq_len) -> ()
""",
    "_moe_C": """
topk_softplus_sqrt(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, \
bool renormalize, float routed_scaling_factor, Tensor? bias, Tensor? input_ids, Tensor? tid2eid, Tensor? is_padding, \
Tensor? bias_vl=None, int image_sentinel_lo=0) -> ()
moe_prepare_scatter(Tensor topk_ids, Tensor token_expert_indices, Tensor? expert_map, int n_expert, \
int n_local_expert, Tensor! expert_first_token_offset, Tensor! scatter_idx, Tensor! sort_workspace, \
Tensor! sorted_experts, Tensor! sorted_rows, Tensor! topk_ids_for_sort)->()
moe_permute_sort_workspace_size(int num_expanded_rows, int n_expert) -> int
moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, \
Tensor! num_tokens_post_pad, Tensor? maybe_expert_map, Tensor(a!)? scatter_idx=None) -> ()
moe_unpermute(Tensor permuted_hidden_states, Tensor topk_weights, Tensor inv_permuted_idx, \
Tensor? expert_first_token_offset, int topk, Tensor! hidden_states)->()
""",
}

_libraries = []  # operators live as long as their library


def ops(namespace, *needed):
    """As `tuner.peers.vllm_ops`."""
    mine = f"fake_vllm{namespace}"
    if not hasattr(torch.ops, mine) or not hasattr(getattr(torch.ops, mine), needed[0]):
        library = torch.library.Library(mine, "DEF")
        for schema in filter(None, SCHEMAS[namespace].split("\n")):
            library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, globals()[name], "CompositeExplicitAutograd")
        _libraries.append(library)
    found = getattr(torch.ops, mine)
    assert all(hasattr(found, name) for name in needed)
    return found


def rms_norm(result, input, weight, epsilon):
    x = input.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(input.dtype)
    result.copy_(x * weight)


def silu_and_mul_with_clamp(result, input, limit, alpha=1.0, beta=0.0):
    gate, up = input.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    result.copy_(gate * torch.sigmoid(alpha * gate) * (up + beta))


def dynamic_per_token_scaled_fp8_quant(result, input, scale, scale_ub):
    step = (input.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1 / (512 * E4M3_MAX))
    scale.copy_(step)
    result.copy_((input.float() / step).clamp(-E4M3_MAX, E4M3_MAX).to(result.dtype))


def _rotated(x, positions, table, inverse=False):
    """The whole last dimension of x [tokens, ..., rope], pairs side by side."""
    half = table.shape[1] // 2
    angles = torch.complex(table[positions, :half], table[positions, half:])
    angles = angles.conj() if inverse else angles
    pairs = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs * angles.view(len(x), *(1,) * (x.ndim - 2), half)).flatten(-2)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset=0, inverse=False):
    assert positions.dtype == torch.long
    assert (key, is_neox, query.shape[-1]) == (None, False, head_size)
    part = query[..., rope_dim_offset : rope_dim_offset + cos_sin_cache.shape[1]]
    part.copy_(_rotated(part, positions, cos_sin_cache, inverse))


def per_token_group_fp8_quant(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, *dummies):
    assert group_size == input.shape[-1]
    step = input.float().abs().amax(-1, keepdim=True).clamp_min(eps) / fp8_max
    step = torch.exp2(step.log2().ceil()) if scale_ue8m0 else step
    output_s.copy_(step)
    output_q.copy_((input.float() / step).clamp(fp8_min, fp8_max).to(output_q.dtype))


def fused_deepseek_v4_kv_rope_insert(
    kv, k_cache, slot_mapping, position_ids, cos_sin_cache, cache_block_size, fp8_scale=None, kv_mxfp8=False
):
    assert slot_mapping.dtype == position_ids.dtype == torch.long
    rope = cos_sin_cache.shape[1]
    row = torch.cat((kv[:, :-rope].float(), _rotated(kv[:, -rope:], position_ids, cos_sin_cache)), dim=1).bfloat16()
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        page, place = divmod(slot, cache_block_size)
        if k_cache.dtype == torch.bfloat16:
            k_cache[page, place] = row[t]
            continue
        # 448 codes and 64 BF16 numbers a row; behind the page's rows 8 bytes each of exponents
        flat = k_cache.as_strided((k_cache.stride(0),), (1,), page * k_cache.stride(0))
        blocks = row[t, :448].float().view(7, 64)
        exponent = (blocks.abs().amax(-1).clamp_min(1e-4) / E4M3_MAX).log2().ceil()
        codes = (blocks / torch.exp2(exponent)[:, None]).to(torch.float8_e4m3fn).flatten().view(torch.uint8)
        flat[place * 576 : place * 576 + 448] = codes
        flat[place * 576 + 448 : (place + 1) * 576] = row[t, 448:].view(torch.uint8)
        scales = cache_block_size * 576 + place * 8
        flat[scales : scales + 7] = (exponent + 127).to(torch.uint8)


def fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
    q_in, kv, k_cache, slot_mapping, position_ids, cos_sin_cache, q_head_padded, eps, cache_block_size, *flags
):
    assert len(kv) == len(q_in)
    assert (len(slot_mapping), q_head_padded) == (0, q_in.shape[1])
    x = q_in.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    rope = cos_sin_cache.shape[1]
    return torch.cat((x[..., :-rope], _rotated(x[..., -rope:], position_ids, cos_sin_cache)), dim=-1).to(q_in.dtype)


def top_k_per_row_prefill(logits, rowStarts, rowEnds, indices, numRows, stride0, stride1, topK):
    assert (numRows, topK) == tuple(indices.shape)
    for row, (first, end) in enumerate(zip(rowStarts.tolist(), rowEnds.tolist(), strict=True)):
        indices[row] = logits[row, first:end].topk(topK).indices.flip(0).int()


def persistent_topk(logits, lengths, output, workspace, k, max_seq_len):
    assert k == output.shape[1]
    assert (lengths == max_seq_len).all()
    output.copy_(logits.topk(k, dim=-1).indices.flip(1))


def cooperative_topk(logits, lengths, output, workspace, k, max_seq_len):
    assert len(logits) <= 32
    persistent_topk(logits, lengths, output, workspace, k, max_seq_len)


def topk_softplus_sqrt(
    topk_weights,
    topk_indices,
    token_expert_indices,
    gating_output,
    renormalize,
    routed_scaling_factor,
    bias,
    input_ids,
    tid2eid,
    is_padding,
    bias_vl=None,
    image_sentinel_lo=0,
):
    score = torch.nn.functional.softplus(gating_output.double()).sqrt()
    if tid2eid is None:
        ranked = score.float() if bias is None else score.float() + bias
        chosen = ranked.topk(topk_indices.shape[1], dim=-1).indices
    else:
        chosen = tid2eid[input_ids.long()].long()
    weights = score.gather(1, chosen)
    topk_indices.copy_(chosen)
    topk_weights.copy_(weights / weights.sum(-1, keepdim=True) * routed_scaling_factor)


def moe_permute_sort_workspace_size(num_expanded_rows, n_expert):
    return 1024


def moe_prepare_scatter(
    topk_ids,
    token_expert_indices,
    expert_map,
    n_expert,
    n_local_expert,
    expert_first_token_offset,
    scatter_idx,
    sort_workspace,
    sorted_experts,
    sorted_rows,
    topk_ids_for_sort,
):
    order = topk_ids.flatten().sort(stable=True)
    sorted_rows.view(-1).copy_(token_expert_indices.flatten()[order.indices])
    scatter_idx.view(-1)[sorted_rows.flatten().long()] = torch.arange(topk_ids.numel(), dtype=torch.int32)
    bounds = torch.arange(n_expert + 1, dtype=order.values.dtype)
    expert_first_token_offset.copy_(torch.searchsorted(order.values, bounds))


def moe_align_block_size(
    topk_ids,
    num_experts,
    block_size,
    sorted_token_ids,
    experts_ids,
    num_tokens_post_pad,
    maybe_expert_map,
    scatter_idx=None,
):
    flat, at = topk_ids.flatten(), 0
    sorted_token_ids.fill_(flat.numel())
    for expert in range(num_experts):
        mine = (flat == expert).nonzero().flatten()
        tiles = -(-len(mine) // block_size)
        sorted_token_ids[at : at + len(mine)] = mine.int()
        experts_ids[at // block_size : at // block_size + tiles] = expert
        at += tiles * block_size
    num_tokens_post_pad.fill_(at)


def moe_unpermute(
    permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset, topk, hidden_states
):
    assert topk_weights.shape[1] == topk
    rows = permuted_hidden_states[inv_permuted_idx.long()].float()
    hidden_states.copy_((rows * topk_weights[..., None]).sum(1))
