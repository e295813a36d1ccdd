"""What every op computes, in plain PyTorch: same signature, any device, FP32 (FP64 in, FP64 out) arithmetic."""

from .attention import rope_inverse_quantize as rope_inverse_quantize, sparse_attention as sparse_attention
from .cache import (
    kv_norm_rope_insert as kv_norm_rope_insert,
    qkv_norm_rope_insert as qkv_norm_rope_insert,
    qnorm_rope_quantize as qnorm_rope_quantize,
    read_rows as read_rows,
    write_rows as write_rows,
)
from .compressor import (
    CompressorStep as CompressorStep,
    compress_kv as compress_kv,
    compress_kv_pair as compress_kv_pair,
    hadamard_transform as hadamard_transform,
)
from .embed import embed as embed
from .fp8 import (
    dequant_fp8 as dequant_fp8,
    dequant_fp8_weight as dequant_fp8_weight,
    quantize_fp8 as quantize_fp8,
)
from .gemm import gemm_nvfp4 as gemm_nvfp4, grouped_gemm_nvfp4 as grouped_gemm_nvfp4
from .hyper_connection import (
    hyper_connection_head as hyper_connection_head,
    hyper_connection_post as hyper_connection_post,
    hyper_connection_post_pre as hyper_connection_post_pre,
    hyper_connection_pre as hyper_connection_pre,
)
from .indexer import (
    csa_queries as csa_queries,
    csa_queries_fp8 as csa_queries_fp8,
    entry_slots as entry_slots,
    index_logits as index_logits,
    index_query as index_query,
    index_query_fp8 as index_query_fp8,
    index_topk as index_topk,
)
from .moe import combine as combine, moe as moe, moe_nvfp4 as moe_nvfp4, permute as permute, swiglu as swiglu
from .native import (
    dequant_fp8_block as dequant_fp8_block,
    dequant_mxfp4 as dequant_mxfp4,
    mxfp4_to_nvfp4 as mxfp4_to_nvfp4,
    quantize_fp8_block as quantize_fp8_block,
    quantize_mxfp4 as quantize_mxfp4,
)
from .norm import rms_norm as rms_norm
from .quant import (
    dequant_nvfp4 as dequant_nvfp4,
    quantize_nvfp4 as quantize_nvfp4,
    rmsnorm_quantize as rmsnorm_quantize,
    swiglu_quantize as swiglu_quantize,
)
from .rope import (
    qnorm_rope as qnorm_rope,
    rope_frequencies as rope_frequencies,
    rope_inverse as rope_inverse,
    rope_inverse_ as rope_inverse_,
    rope_table as rope_table,
)
from .router import route as route
from .sample import sample as sample
