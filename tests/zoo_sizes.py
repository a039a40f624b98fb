"""How the default configurations of transformers are made small, by the names of their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

D_MODEL, VOCAB, LAYERS, WINDOW = 48, 264, 3, 8

_NAMES: Mapping[int, str] = {
    D_MODEL: "hidden_size d_model n_embd emb_dim word_embed_proj_dim out_hidden_size",
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers num_decoder_layers",
    WINDOW: """sliding_window window_size attention_window_size attention_chunk_size sliding_window_size
        local_attention_window_len mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size block_size
        qk_rope_head_dim output_channels block_multiple_of""",
    0: "pad_token_id",
    1: """bos_token_id encoder_layers num_encoder_layers num_global_layers n_shared_experts num_shared_experts
        moe_num_shared_experts n_group topk_group num_expert_group first_k_dense_replace num_dense_layers""",
    2: """eos_token_id num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_k moe_top_k o_groups n_groups index_n_heads linear_num_key_heads depth""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads
        linear_num_heads""",
    5: "time_step_rank mamba_dt_rank",
    10: "qk_nope_head_dim linear_key_head_dim linear_head_dim",
    12: "o_lora_rank",
    14: "v_head_dim linear_value_head_dim",
    16: """head_dim swa_head_dim kv_channels attention_head_size dim_head index_topk index_head_dim
        num_position_embeddings""",
    20: "kv_lora_rank",
    24: "q_lora_rank mamba_d_head mamba_head_dim",
    28: "image_size",
    32: "projector_input_dim projector_output_dim",
    40: "moe_intermediate_size expert_ffn_hidden_size",
    56: """shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size""",
    80: """intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim
        feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size mlp_dim""",
    128: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions model_max_length""",
}

#: Small values by the name of the field. Only fields that a configuration has are set.
SIZES: Mapping[str, int] = {name: size for size, names in _NAMES.items() for name in names.split()}

#: Fields that are set also where the default is None.
UNSET = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")

#: Lists with one entry per layer that say what kind of layer it is.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers", "indexer_types")


def _rope(kinds: Sequence[str], **more: Any) -> dict[str, Any]:
    return {kind: {"rope_type": "default", "rope_theta": 1e4, **more} for kind in dict.fromkeys(kinds)}


_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_SPARSE = ["dense", "sparse", "sparse"]
_DECODER = {"is_decoder": True}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_FALCON_H1 = {
    "mamba_d_ssm": 96,
    "embedding_multiplier": 5.0,
    "ssm_out_multiplier": 0.6,
    "attention_out_multiplier": 0.7,
    "mlp_multipliers": [0.8, 0.5],
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 80,
    "hidden_size_per_layer_input": 20,
    "laurel_rank": 10,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_GEMMA4_UNIFIED = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {"2": {"head_dim": 24}},
}
_GEMMA4 = {**_GEMMA4_UNIFIED, "hidden_size_per_layer_input": 20}
_DOTS3 = {"per_layer_config": {}, "head_dim": 18}
_MINIMAX = {
    f"{part}_{factor}_factor": value
    for part in ("full_attn", "linear_attn", "mlp")
    for factor, value in (("alpha", 1.5), ("beta", 0.7))
}
_MINIMAX_M3 = {
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": _SPARSE,
    "index_block_size": 2,
    "index_topk_blocks": 2,
    "rotary_dim": 8,
}
_QWEN4 = {
    "hc_count": 2,
    "hc_lowrank": 12,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
QWEN4_PLE = {
    "ple_layer_ids": [1],
    "ple_embed_dim": 24,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": 2,
}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40}
_REFORMER = {
    "is_decoder": True,
    "axial_pos_shape": [16, 8],
    "axial_pos_embds_dim": [16, 32],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 2,
    "hash_seed": 0,
}
_BLT = {
    "encoder_hash_byte_group_vocab": 64,
    "patcher_config": {"head_dim": ...},
    "decoder_config": {"head_dim": ..., "hidden_size_global": 96},
    "encoder_config": {"hidden_size_global": 96},
    "global_config": {"head_dim": ..., "hidden_size": 96},
}


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}

#: What the names of fields cannot tell, for one or more model types. `...` unsets a field.
_MORE: Mapping[str, Mapping[str, Any]] = {
    """bert bert-generation big_bird camembert data2vec-text ernie megatron-bert roberta roberta-prelayernorm roformer
    xlm-roberta xlm-roberta-xl""": _DECODER,
    "granite granite_swa granitemoe granitemoe_swa granitemoeshared": _GRANITE,
    "flint qwen2_moe qwen3_moe qwen3_next": {"mlp_only_layers": [0]},
    "qwen2 qwen3": {"layer_types": _MIXED, "use_sliding_window": True, "sliding_window": WINDOW},
    "bamba": {"attn_layer_indices": [1]},
    "blt": _BLT,
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": {"mlp_layer_types": _SPARSE},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": _rope(_MIXED, mrope_section=[2, 2, 2])},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": D_MODEL}},
    "deepseek_v4": {"head_dim": 16, "num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "dots1": {"n_shared_experts": 1, "layer_types": _MIXED},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": D_MODEL, "adapter_out_dim": D_MODEL},
        "audio_config": {"adapter_input_size": D_MODEL, "adapter_output_size": D_MODEL},
    },
    "dots3_note_text": _DOTS3,
    "dory": {"layer_types": _MIXED, "n_input_layers": 1, "n_output_layers": 1},
    "electra": {**_DECODER, "embedding_size": 32},
    "falcon_h1": _FALCON_H1,
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4_UNIFIED},
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_GRANITE, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "helium": {"head_dim": 12},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_text": {"mlp_layer_types": _SPARSE},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
    "laguna": {"layer_types": _MIXED, "num_attention_heads_per_layer": [4, 2, 4]},
    "lfm2 lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"head_dim": 24},
    "mellum": {"layer_types": _MIXED, "mlp_layer_types": _SPARSE},
    "minimax": _MINIMAX,
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * D_MODEL},
    },
    "glm4v qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 8, "ext_pw_out_channel": 8}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"embed_dim": 32}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": _REFORMER,
    "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 40},
    "roc_bert": {**_DECODER, "shape_vocab_size": 30, "pronunciation_vocab_size": 30},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "xlm": {"causal": True},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "sliding_window": WINDOW,
        "router_hidden_size": 24,
    },
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {name: more for names, more in _MORE.items() for name in names.split()}
