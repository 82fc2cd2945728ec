"""Configs of every model that transformers knows, made tiny.

A config is shrunk by the names of its fields, at every depth. Models whose fields depend on each other in a way that
their names do not show have a row in ``OVERRIDES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN = 256
HEADS = 4
KEY_VALUE_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
VOCABULARY = 512
MOST_LAYERS = 6

EXACT: dict[str, int] = {
    name: value
    for names, value in (
        # Every width of every tower is the same, so that projections between towers fit without a record of them.
        (
            "hidden_size d_model n_embd embed_dim dim embedding_dim emb_dim embedding_size word_embed_proj_dim"
            " projection_dim encoder_hidden_size text_hidden_size audio_hidden_size vision_hidden_size"
            " out_hidden_size output_dim adapter_in_dim"
            " cross_hidden_size hidden_size_global adapter_out_dim lru_width image_text_hidden_size"
            " projector_output_dim projector_input_dim projector_hidden_size projection_hidden_size"
            " projection_hidden_dim backbone_hidden_size decoder_hidden_size patch_embed_hidden_size"
            " input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim"
            " speech_decoder_prenet_units d_inner_model adapter_input_size downsample_hidden_size ple_embed_dim"
            " output_hidden_size hidden_dim vision_config_hidden_size moe_hidden_size attention_hidden_size",
            HIDDEN,
        ),
        (
            "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff mlp_dim ffn_hidden_size d_inner"
            " feed_forward_size dense_intermediate_size intermediate_size_mlp alignment_intermediate_size"
            " projection_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"
            " n_inner",
            2 * HIDDEN,
        ),
        (
            "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
            " shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"
            " share_expert_dim",
            HIDDEN,
        ),
        (
            "num_attention_heads n_head num_heads n_heads attention_heads encoder_attention_heads"
            " decoder_attention_heads conf_num_attention_heads swa_num_attention_heads num_sliding_attention_heads"
            " cross_num_attention_heads cross_num_key_value_heads encoder_num_attention_heads"
            " decoder_num_attention_heads encoder_num_key_value_heads decoder_num_key_value_heads"
            " speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads"
            " num_encoder_attention_heads num_decoder_attention_heads resampler_n_heads resampler_heads"
            " linear_num_value_heads linear_num_heads index_n_heads guided_attention_loss_num_heads",
            HEADS,
        ),
        ("num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads", KEY_VALUE_HEADS),
        (
            "head_dim d_kv d_head kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim"
            " linear_value_head_dim linear_head_dim swa_head_dim cross_head_dim dim_head resampler_head_dim"
            " resampler_dim_head attention_head_size mamba_d_head mamba_head_dim mamba_headdim",
            HEAD_DIM,
        ),
        ("q_lora_rank kv_lora_rank o_lora_rank index_head_dim qk_head_dim attention_head_dim", 2 * HEAD_DIM),
        ("mamba_d_ssm", 2 * HIDDEN),
        ("mamba_n_heads mamba_num_heads n_mamba_heads", 2 * HIDDEN // HEAD_DIM),
        ("mamba_d_state state_size ssm_state_size", 32),
        ("mamba_n_groups mamba_ngroups n_groups n_group topk_group num_expert_group", 1),
        ("time_step_rank mamba_dt_rank", 16),
        ("rotary_dim", HEAD_DIM // 2),
    )
    for name in names.split()
}
"""Fields that get this value whenever they hold a positive number."""

AT_MOST: dict[str, int] = {
    name: value
    for names, value in (
        (
            "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers layers num_blocks"
            " num_decoder_layers num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers"
            " conf_num_hidden_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers resampler_depth"
            " num_global_layers num_timestamp_prediction_layers speech_decoder_postnet_layers num_layers_per_stack"
            " aligner_num_add_layers altup_num_inputs num_codebooks num_quantizers",
            2,
        ),
        (
            "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num",
            4,
        ),
        (
            "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts",
            2,
        ),
        ("num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers", 1),
        (
            "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input codebook_size"
            " codebook_vocab_size num_embeddings unpadded_vocab_size encoder_hash_byte_group_vocab char_vocab_size"
            " t2u_vocab_size unit_hifi_gan_vocab_size pronunciation_vocab_size shape_vocab_size audio_vocab_size"
            " num_position_embeddings position_embedding_size additional_vocab_size",
            VOCABULARY,
        ),
        (
            "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len max_speech_positions"
            " max_source_positions max_2d_position_embeddings context_length max_num_patches",
            1024,
        ),
        ("num_filters upsample_groups", 16),
        ("base_channels", 32),
        ("latent_query_num resampler_n_latents resampler_num_latents num_query_tokens prompt_length", 8),
        ("pos_emb_height pos_emb_width posemb_grid_size", 8),
        ("moe_layer_end_index", 1),
        ("hidden_size_per_layer_input", 64),
        ("subsampling_conv_channels nemo_conv_channels conv_channels speech_decoder_postnet_units", 64),
        ("codebook_dim vector_quantization_hidden_dimension latent_channels", 64),
        ("block_size local_attn_chunk_length lsh_attn_chunk_length", 16),
        ("chunk_size mamba_chunk_size canvas_length", 32),
    )
    for name in names.split()
}
"""Fields that are lowered to this value."""

ABSENT = {"head_dim": HEAD_DIM, "num_key_value_heads": KEY_VALUE_HEADS}
"""Fields that some constructors leave empty and some models need."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
INDEX_LISTS = ("full_attn_idxs", "moe_layers", "cross_attention_layers", "hybrid_layer_ids", "mlp_only_layers")
"""Lists of numbers of layers, beside lists with one entry a layer."""
TOWER_INDEX_LISTS = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "intermediate_layers_indices": [0, 1],
    "spatial_target_layers": [0, 1],
}
DERIVED = (
    "transformers_version",
    "id2label",
    "label2id",
    "architectures",
    "kv_source_layers",
    "dtype",
    "_name_or_path",
)
"""Fields that a constructor sets itself, from others."""

Fields = dict[str, Any]

DROP = "drop"
"""In a row of ``OVERRIDES``: the fields to leave to the constructor."""
START = "start"
"""In a row of ``OVERRIDES``: arguments of the constructor before the config is shrunk."""


def rope(*section: int, **fields: Any) -> Fields:
    """Return rotary embeddings over time, height and width with this many frequencies each."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **fields}


MROPE = {"text_config": {"rope_parameters": rope(8, 12, 12)}}
GEMMA_3N: Fields = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [2 * HIDDEN] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
GRANITE_HYBRID: Fields = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
ZAMBA: Fields = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
LFM2: Fields = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], DROP: ["full_attn_idxs"]}
QWEN4: Fields = {
    "eos_token_id": 2,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}
COMPASS: Fields = {"rope_parameters": {"full_attention": rope(12, 10, 10)}}
GEMMA_4_EXPERTS: Fields = {
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": HIDDEN,
    "enable_moe_block": True,
}
GEMMA_4_SHARING: Fields = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_double_wide_mlp": True,
    DROP: ["per_layer_config"],
    "global_head_dim": 2 * HEAD_DIM,
}
DOTS_3: Fields = {
    "swa_head_dim": 2 * HEAD_DIM,
    "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
}
EMU_3 = {"<image>": 500, "<|extra_200|>": 501, "<|visual token 000000|>": 502, "<|image token|>": 503}
ONE_EACH = {"depths": [1] * 7, "num_filters": 4}

OVERRIDES: dict[str, Fields] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 500, "IMGIMGAZ": 501}},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": GEMMA_4_EXPERTS},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots3_note": {START: {"text_config": DOTS_3}, "text_config": {DROP: ["rope_parameters"]}},
    "dots3_note_text": {START: DOTS_3, DROP: ["rope_parameters"]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": EMU_3},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": rope(12, 12, 8)}},
    "florence2": {
        "vision_config": {
            "embed_dim": [64, 64, 128, 256],
            "num_heads": [1, 1, 2, 4],
            "num_groups": [1, 1, 2, 4],
            "depths": [1, 1, 1, 1],
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "gemma3n": {"text_config": GEMMA_3N},
    "gemma3n_text": GEMMA_3N,
    "gemma4_assistant": {
        START: {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text_config": {DROP: ["num_kv_shared_layers"]},
    },
    "gemma4_unified_assistant": {"text_config": {DROP: ["num_kv_shared_layers"]}},
    "glm4v_moe": {"text_config": {"rope_parameters": rope(4, 6, 6, partial_rotary_factor=0.5)}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0], [-2, 1]]},
    "hunyuan_vl": {"text_config": {"rope_parameters": rope(4, 8, 8, 12)}},
    "granitemoehybrid": GRANITE_HYBRID,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": LFM2,
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {"text_config": LFM2},
    "llama4": {START: {"text_config": {"interleave_moe_layer_step": 2}}, "text_config": {"moe_layers": [1]}},
    "llama4_text": {START: {"interleave_moe_layer_step": 2}, "moe_layers": [1]},
    "mllama": {"vision_config": {"vision_output_dim": 3 * HIDDEN}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [64, 64, 128, 256], "depths": [1, 1, 1, 1]}
    },
    "paddleocr_vl": MROPE,
    "qwen2_5_omni": {
        "thinker_config": MROPE,
        "talker_config": {"rope_parameters": rope(8, 12, 12)},
        "token2wav_config": {"bigvgan_config": {"upsample_initial_channel": 64}},
    },
    "qwen2_5_omni_thinker": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_omni_moe": {
        "code2wav_config": {"decoder_dim": 64},
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": HIDDEN}},
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [32, 32]},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "vibevoice": {"audio_config": ONE_EACH, "semantic_model_config": ONE_EACH},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": ONE_EACH,
        "semantic_tokenizer_encoder_config": ONE_EACH,
    },
    "zamba": {**ZAMBA, "attention_hidden_size": 2 * HIDDEN},
    "zamba2": {**ZAMBA, DROP: ["hybrid_layer_ids", "attention_hidden_size", "attention_head_dim"]},
}
"""Fields that replace those of the shrunk config, by model type: the names of its fields do not say them."""


VARIANTS: dict[str, dict[str, Fields]] = {
    "deepseek_v2": {"lite": {**OVERRIDES["deepseek_v2"], "q_lora_rank": None}},
    # "latent": with heads as large as kernels for latent attention want them.
    "deepseek_v3": {"lite": {"q_lora_rank": None}, "latent": {"kv_lora_rank": 512, "num_experts_per_tok": 4}},
    "falcon": {"grouped": {"new_decoder_architecture": True, "num_kv_heads": KEY_VALUE_HEADS}},
    "gemma4": {"experts": {"text_config": GEMMA_4_EXPERTS}},
    "gemma4_text": {"experts": GEMMA_4_EXPERTS, "sharing": {"num_hidden_layers": 4, **GEMMA_4_SHARING}},
    "gpt_bigcode": {"wide": {"n_head": 2}},
    "granitemoehybrid": {"dense": {**GRANITE_HYBRID, "num_local_experts": 0}},
    "kimi_linear": {"lora": {"q_lora_rank": 2 * HEAD_DIM}},
    "llama": {"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True, "mlp_bias": True}},
    "llama4_text": {"every": {}},
    "llava": {"mistral": {"text_config": {"model_type": "mistral"}}, "qwen2": {"text_config": {"model_type": "qwen2"}}},
    "mistral3": {"experts": {START: {"text_config": {"model_type": "mistral4"}}}},
    "nemotron_h": {"latent": {"moe_latent_size": HIDDEN // 2}},
    "qwen2": {"tied": {"tie_word_embeddings": True}},
    "qwen2_5_vl": {"tied": {**MROPE, "tie_word_embeddings": True}},
    "qwen2_moe": {"mixed": {"mlp_only_layers": [0]}},
    "qwen3": {"tied": {"tie_word_embeddings": True}},
    "qwen3_moe": {"mixed": {"mlp_only_layers": [0]}},
    # Sides that differ, so that their order shows.
    "qwen3_vl_moe": {"published": {"text_config": {"moe_intermediate_size": 384}}},
    "qwen3_vl": {"tied": {"tie_word_embeddings": True}},
    # "short": two seconds of sound.
    "whisper": {"short": {"max_source_positions": 100}},
}

_TOWER = {r"(^|\.)vision_tower\.(?!vision_model\.)": r"\1vision_tower.vision_model."}
PUBLISHED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("aya_vision", "cohere2_vision", "gemma3", "llava", "llava_next", "llava_onevision"), _TOWER),
    **dict.fromkeys(("paligemma", "vipllava"), _TOWER),
    "qwen3_vl_moe": {},
}
"""Patterns of names, and what stands there in published checkpoints, where transformers 5 saves under newer names."""
TRANSPOSED = {"qwen3_vl_moe": r"\.experts\.\w+$"}
"""Pattern of the stacks that published checkpoints store with the last two sides exchanged."""
"""Other structures of real checkpoints of a model type, by a name: rows in the place of those of ``OVERRIDES``."""


def tiny_config(model_type: str, variant: str = "") -> PreTrainedConfig:
    """Build the tiny config of ``model_type``, or of one of its variants."""
    made = CONFIG_MAPPING[model_type]
    row = dict(VARIANTS.get(model_type, {}).get(variant) or OVERRIDES.get(model_type, {}))
    start = made(**row.pop(START, {}))
    fields = shrink(start.to_dict())
    merge(fields, row)
    fields.pop("model_type", None)
    return made(**fields)


def merge(fields: Fields, row: Fields) -> None:
    """Put the entries of ``row`` into ``fields``, at every depth."""
    for name, value in row.items():
        if name == DROP:
            for dropped in value:
                fields.pop(dropped, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict):
            merge(fields[name], value)
        else:
            fields[name] = value


def shrink(fields: Fields) -> Fields:
    """Shrink a config and the configs inside it."""
    shrunk: Fields = {}
    kept = kept_layers(fields)
    layers = next((fields[name] for name in LAYER_COUNTS if is_number(fields.get(name))), None)
    patch = fields.get("patch_size")
    for key, value in fields.items():
        name = str(key)
        if name in DERIVED:
            continue
        if name == "per_layer_config" and value and kept:
            each = {int(layer): fields_of for layer, fields_of in value.items()}
            shrunk[name] = {kept.index(layer): shrink(each[layer]) for layer in kept if layer in each}
            continue
        if name in ABSENT and value is None and "kv_lora_rank" not in fields:
            shrunk[name] = ABSENT[name]
            continue
        if isinstance(value, dict):
            shrunk[name] = shrink(value)
        elif isinstance(value, list):
            shrunk[name] = shrink_list(name, value, layers, kept)
        elif not is_number(value):
            shrunk[name] = value
        elif name in LAYER_COUNTS and kept and value == layers:
            shrunk[name] = len(kept)
        elif name == "image_size" and isinstance(patch, int):
            shrunk[name] = 4 * patch
        else:
            shrunk[name] = shrink_number(name, value, fields)
    return shrunk


def shrink_number(name: str, value: int, fields: Fields) -> int:
    """Shrink one number by the name of its field."""
    if name.endswith(("token_id", "token_index", "_idx", "_index")) and value >= VOCABULARY:
        # Far from the tokens of the forwards, and no two fields of one config at the same place.
        names = sorted(field for field in fields if field.endswith(("token_id", "token_index", "_idx", "_index")))
        return VOCABULARY - 1 - names.index(name)
    if name in EXACT and value > 0:
        if name == "num_heads" and "expand" in fields:  # Mamba-2: the inner width is twice the hidden size
            return 2 * HIDDEN // HEAD_DIM
        if name == "head_dim" and value > fields.get("qk_nope_head_dim", value):
            return 2 * HEAD_DIM
        if name == "num_key_value_heads" and "kv_lora_rank" in fields:
            return HEADS
        return EXACT[name]
    return min(value, AT_MOST[name]) if name in AT_MOST else value


def shrink_list(name: str, value: list[Any], layers: int | None, kept: list[int]) -> list[Any]:
    """Shrink a list: to the layers that stay, or to the tokens that exist."""
    if name in TOWER_INDEX_LISTS:
        return TOWER_INDEX_LISTS[name]
    if name in INDEX_LISTS:
        return [kept.index(layer) for layer in value if layer in kept] if kept else value
    if kept and len(value) == layers:
        one_each = [value[layer] for layer in kept]
        return [shrink_number(name, entry, {}) if is_number(entry) else entry for entry in one_each]
    if name == "eos_token_id":
        return [2]
    if name == "mrope_section":
        return [8, 12, 12]
    if name == "image_size":
        return [56, 56]
    return value


def kept_layers(fields: Fields) -> list[int]:
    """Number the layers that stay: one of each kind, and two at least; empty if no list tells kinds apart."""
    layers = next((fields[name] for name in LAYER_COUNTS if is_number(fields.get(name))), None)
    if layers is None or layers <= 1:
        return []
    per_layer = [
        value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == layers and layers > 4 and name not in INDEX_LISTS
    ]
    by_index = [fields[name] for name in INDEX_LISTS if isinstance(fields.get(name), list)]
    own = {int(layer): value for layer, value in (fields.get("per_layer_config") or {}).items()}
    if not per_layer and not by_index and not own:
        return []
    first: dict[str, int] = {}
    for layer in range(layers):
        kind = [value[layer] for value in per_layer] + [layer in value for value in by_index]
        kind.append(own.get(layer))
        first.setdefault(repr(kind), layer)
    kept = sorted(first.values())[:MOST_LAYERS]
    return kept if len(kept) > 1 else [0, 1]


def is_number(value: object) -> bool:
    """Tell a whole number from everything else, ``True`` included."""
    return isinstance(value, int) and not isinstance(value, bool)
