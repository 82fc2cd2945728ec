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
            " projection_dim encoder_hidden_size text_hidden_size out_hidden_size output_dim vision_hidden_size"
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
            "vocab_size decoder_vocab_size vocab_size_per_layer_input codebook_size codebook_vocab_size"
            " num_embeddings unpadded_vocab_size encoder_hash_byte_group_vocab char_vocab_size t2u_vocab_size"
            " unit_hifi_gan_vocab_size pronunciation_vocab_size shape_vocab_size audio_vocab_size"
            " num_position_embeddings position_embedding_size additional_vocab_size",
            VOCABULARY,
        ),
        (
            "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len max_speech_positions"
            " max_source_positions max_2d_position_embeddings context_length max_num_patches",
            1024,
        ),
        ("num_filters base_channels upsample_groups", 16),
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
DERIVED = ("transformers_version", "id2label", "label2id", "architectures", "kv_source_layers", "dtype", "_name_or_path")
"""Fields that a constructor sets itself, from others."""

Fields = dict[str, Any]

OVERRIDES: dict[str, Fields] = {}
"""What the names of the fields do not say, by model type: fields that replace those of the shrunk config.

A value of ``None`` under ``DROP`` removes a field, so that the constructor derives it.
"""

DROP = "drop"


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Build the tiny config of ``model_type``."""
    made = CONFIG_MAPPING[model_type]
    row = dict(OVERRIDES.get(model_type, {}))
    start = made(**row.pop("start", {}))
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
    for name, value in fields.items():
        if name in DERIVED:
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
    per_layer = [value for value in fields.values() if isinstance(value, list) and len(value) == layers and layers > 4]
    by_index = [fields[name] for name in INDEX_LISTS if isinstance(fields.get(name), list)]
    if not per_layer and not by_index:
        return []
    first: dict[str, int] = {}
    for layer in range(layers):
        kind = [value[layer] for value in per_layer] + [layer in value for value in by_index]
        first.setdefault(repr(kind), layer)
    kept = sorted(first.values())[:MOST_LAYERS]
    return kept if len(kept) > 1 else [0, 1]


def is_number(value: object) -> bool:
    """Tell a whole number from everything else, ``True`` included."""
    return isinstance(value, int) and not isinstance(value, bool)
