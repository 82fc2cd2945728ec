"""Records of known families, each with what the general rules cannot know."""

from __future__ import annotations

from nemotron_fp8.planning.families.base import (
    ENCODER,
    EVERYWHERE,
    OTHERS,
    ROUTERS,
    STATE_SPACE,
    UNQUANTIZED,
    VISION,
    Family,
    StackedExperts,
    Unread,
    rename,
    rule,
)

FUSED_ROWS = (
    "reorders the rows of query_key_value, and loads it with one scale for each row only; use format"
    " 'compressed-tensors' with granularity 'channel'"
)

REORDERED = (
    "reorders the rows of q_proj and k_proj, which fails for scales of blocks in this layout; use granularity"
    " 'channel', or format 'fp8'"
)

NAMELESS = "looks up parts of this family under names that no list can hold; use format 'compressed-tensors'"

NAMELESS_BLOCKS = (
    "looks up parts of this family that do not divide into blocks under names that no list can hold; use format"
    " 'compressed-tensors' with granularity 'channel'"
)

RENAMED = (
    "renames parts of this family that do not divide into blocks, and takes them for FP8; use granularity 'channel'"
)

RENAMED_SCALE = "renames the scales of blocks of this family; use format 'compressed-tensors'"

SPLITS = "cannot split a fused matrix of this family that is stored in FP8; dequantize the result for it"

MIXED = (
    "computes parts of this family in float32, which meet bf16 in this layout and fail; dequantize the result for it"
)

# Source: `_load_weights_other` of vLLM's gpt_oss, the loader for every method but MXFP4 and Quark.
STACKS_ONLY = (
    "loads the experts of this family in stacks only, in MXFP4 or unquantized; serve the source itself, or leave its"
    " experts out of FP8 in a checkpoint without MXFP4"
)

RECORDS: tuple[Family, ...] = (
    # Squared ReLU without a gate: self_attn.{q,k,v,o}_proj and mlp.{up,down}_proj.
    Family("Nemotron-4, Minitron", ("nemotron",), ("NemotronForCausalLM",)),
    # mixer.{in,out,q,k,v,o,up,down}_proj, experts.E.{up,down}_proj, shared_experts.*_proj. conv1d is 3-D, A_log, D,
    # dt_bias and gate are not called *_proj.
    Family("Nemotron-H, Nano v2, Nemotron 3", ("nemotron_h",), ("NemotronHForCausalLM",)),
    # Some layers lack whole sublayers; the other layers have the names of Llama.
    Family("Llama-Nemotron NAS", ("nemotron-nas", "deci"), ("DeciLMForCausalLM",)),
    Family("Llama", ("llama",), ("LlamaForCausalLM",)),
    Family("Mistral, Mixtral", ("mistral", "mixtral", "ministral")),
    Family("Qwen", ("qwen2", "qwen3")),
    Family("Qwen MoE", ("qwen2_moe", "qwen3_moe"), stacked=StackedExperts(transposed=False)),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text")),
    # vLLM builds these in a module self_decoder. Source: Gemma3nTextModel of vLLM.
    Family(
        "Gemma 3n",
        ("gemma3n", "gemma3n_text"),
        renames=(rename(r"(^|\.)(per_layer_model_projection|altup_projections\.\d+)$", r"\1self_decoder.\2"),),
    ),
    Family("Phi", ("phi3",)),
    Family("GLM", ("glm4",)),
    Family("DeepSeek, GLM MoE", ("deepseek_v2", "deepseek_v3", "glm4_moe"), stacked=StackedExperts(transposed=False)),
    # Rows of the gate and of the other input projection alternate. Source: GptOssExperts of transformers.
    Family(
        "gpt-oss",
        ("gpt_oss",),
        stacked=StackedExperts(transposed=False, interleaved=True, only_packed=True, unread=STACKS_ONLY),
    ),
    Family("Granite", ("granite",)),
    Family(
        "Granite MoE",
        ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        stacked=StackedExperts(
            transposed=False,
            always=True,
            aliases=(
                ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
                ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
            ),
        ),
    ),
    # Published checkpoints store [in, out]; transformers from 5.23 writes [out, in].
    Family("Qwen3-VL MoE", ("qwen3_vl_moe", "qwen3_vl_moe_text"), stacked=StackedExperts(transposed=None, always=True)),
    Family(
        "Llama 4",
        ("llama4", "llama4_text"),
        stacked=StackedExperts(transposed=True, always=True, singles_in=("compressed-tensors",)),
        unread=(Unread("vLLM", REORDERED, ("compressed-tensors",), ("block",)),),
    ),
    # vLLM loads their experts one by one, transformers in stacks only.
    Family("Gemma 4", ("gemma4", "gemma4_text"), stacked=StackedExperts(transposed=False, always=True)),
    Family("Mistral 4", ("mistral4",), stacked=StackedExperts(transposed=False, always=True)),
    Family("MiniMax M3, text", ("minimax_m3_vl_text",), stacked=StackedExperts(transposed=False, always=True)),
    Family("Zaya", ("zaya",), stacked=StackedExperts(transposed=False, always=True)),
    Family(
        "Step 3.5, Step 3.7",
        ("step3p5", "step3p7"),
        stacked=StackedExperts(
            transposed=False,
            parts=(("gate_proj", ("gate_proj",)), ("up_proj", ("up_proj",)), ("down_proj", ("down_proj",))),
            always=True,
            aliases=tuple((f"moe.{part}_proj.weight", f"moe.experts.{part}_proj") for part in ("gate", "up", "down")),
        ),
    ),
    Family("vision-language", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava")),
    Family(
        "BLOOM",
        ("bloom",),
        unread=(Unread("vLLM", FUSED_ROWS, ("fp8",)), Unread("vLLM", FUSED_ROWS, (), ("tensor", "block"))),
    ),
    Family("Falcon", ("falcon",), unread=(Unread("vLLM", FUSED_ROWS, (), ("block",)),)),
    # Its loader renames weight_scale_inv. Source: Mistral's mapper in vLLM.
    Family(
        "Mistral 3",
        ("mistral3",),
        stacked=StackedExperts(transposed=False, always=True),
        unread=(Unread("vLLM", RENAMED_SCALE, ("fp8",), ("block",)),),
    ),
    # Modules of attention and Mamba under names that the engine makes up while it builds the model.
    Family("MiniCPM3", ("minicpm3",), unread=(Unread("vLLM", NAMELESS_BLOCKS, (), ("block",)),)),
    Family("Falcon H1", ("falcon_h1",), unread=(Unread("vLLM", NAMELESS_BLOCKS, (), ("block",)),)),
    Family(
        "LFM 3", ("lfm3", "lfm3_vl"), unread=(Unread("transformers", RENAMED, ("compressed-tensors",), ("block",)),)
    ),
    # vLLM builds a low-rank norm as a feed-forward part.
    Family(
        "A.X K2",
        ("axk2",),
        renames=(
            rename(r"layernorm\.W_down$", "layernorm.mlp.fc1"),
            rename(r"layernorm\.W_up$", "layernorm.mlp.fc2"),
        ),
    ),
    # transformers calls the weight of a short convolution weight_proj.
    Family(
        "Inkling",
        ("inkling2", "inkling2_text"),
        renames=(
            rename(r"_sconv$", "_sconv.weight_proj"),
            rename(r"(^|\.)attn\.(\w+_sconv\.weight_proj)$", r"\1self_attn.\2"),
        ),
        unread=(
            Unread("transformers", MIXED, ("fp8",), ("block",)),
            Unread("transformers", RENAMED, ("compressed-tensors",), ("block",)),
        ),
    ),
    # vLLM drops one "model" from the names in the list, but looks up names with it. Source: Aria's mapper in vLLM.
    Family(
        "Aria",
        ("aria",),
        renames=(rename(r"^(language_model\.model|model\.language_model)\.", "language_model.model.model."),),
    ),
    # vLLM looks up the image encoder without the part of its name before the first dot.
    Family("BLIP-2", ("blip-2",), unread=(Unread("vLLM", NAMELESS, ("fp8",)),)),
    # The layers of the image encoder are called blocks, beside the decoder's layers.
    Family(
        "Cosmos",
        ("cosmos3_omni", "cosmos3_edge"),
        unquantized=(
            *UNQUANTIZED,
            rule(r"^blocks\.", ENCODER, "blocks", linear=False),
        ),
    ),
    # Conv1D of transformers, stored [in, out].
    Family("GPT-2", ("gpt2", "imagegpt", "openai-gpt", "decision_transformer"), transposed=True),
    Family("Whisper", ("whisper",), tied_heads=("proj_out", "lm_head"), unread=(Unread("vLLM", NAMELESS, ("fp8",)),)),
    Family("T5Gemma", ("t5gemma", "t5gemma2"), tied_heads=("lm_head.out_proj",)),
    Family("XLM", ("xlm", "flaubert"), tied_heads=("pred_layer.proj",)),
    Family("XLNet", ("xlnet",), tied_heads=("lm_loss",), unread=(Unread("transformers", MIXED, ("fp8",), ("block",)),)),
    Family("ModernBERT decoder", ("modernbert-decoder",), tied_heads=("decoder",)),
    Family(
        "Cohere ASR",
        ("cohere_asr",),
        tied_heads=("proj_out",),
        renames=(rename(r"(^|\.)encoder_decoder_proj$", r"\1decoder.proj"),),
    ),
    # transformers builds the shared block for every place where it stands, and ties its weights, but not its scales.
    Family(
        "Zamba",
        ("zamba", "zamba2"),
        unquantized=(
            *UNQUANTIZED,
            rule(r"(^|\.)shared_transf\w*\.", "transformers ties the weights of shared layers, but not their scales"),
        ),
    ),
    # transformers names these parts of attention otherwise.
    Family(
        "DeepSeek V4",
        ("deepseek_v4",),
        renames=(rename(r"(^|\.)attn\.indexer\.weights_proj$", r"\1self_attn.compressor.indexer.scorer.weights_proj"),),
    ),
    Family(
        "Mistral Large 4",
        ("mistral_large4", "mistral_large4_text"),
        renames=(rename(r"(^|\.)attention\.indexer\.", r"\1self_attn.indexer."),),
    ),
    # The decoder's layers are in a module called encoder.
    Family(
        "ChatGLM, GLM-4-9b",
        ("chatglm",),
        tied_heads=("output_layer",),
        unquantized=(
            *(*EVERYWHERE, *VISION, *ROUTERS, *STATE_SPACE, *OTHERS),
            rule(r"(^|\.)vision\.", ENCODER, "vision.", linear=False),
        ),
    ),
    # The action expert, which transformers calls dit.
    Family("pi0", ("pi0",), renames=(rename(r"(^|\.)paligemma_with_expert\.gemma_expert\.model\.", r"\1dit."),)),
    # What transformers cannot load in a layout, although it loads the source; it says so by an exception.
    Family("CTRL", ("ctrl",), unread=(Unread("transformers", MIXED, ("compressed-tensors",)),)),
    Family("HunYuan 4", ("hy_v4",), unread=(Unread("transformers", MIXED),)),
    Family(
        "HRM",
        ("hrm_text",),
        unread=(
            Unread("transformers", SPLITS, ("fp8",), ("block",)),
            Unread("transformers", SPLITS, ("compressed-tensors",), ("tensor",)),
        ),
    ),
    Family(
        "Molmo 2",
        ("molmo2", "molmo2_text"),
        unread=(
            Unread("transformers", SPLITS, ("fp8",), ("block",)),
            Unread("transformers", SPLITS, ("compressed-tensors",), ("tensor",)),
        ),
    ),
    Family("Unlimited OCR", ("unlimited_ocr",), unread=(Unread("transformers", SPLITS, ("fp8",), ("block",)),)),
    Family(
        "Kyutai speech to text",
        ("kyutai_speech_to_text",),
        unread=(
            Unread(
                "transformers",
                "takes the scales of layers in the audio codec for scales of weights in this layout; use format"
                " 'compressed-tensors'",
                ("fp8",),
                ("block",),
            ),
        ),
    ),
    Family("Qianfan OCR", ("qianfan_ocr",), unread=(Unread("transformers", SPLITS),)),
    Family(
        "DiffusionGemma",
        ("diffusion_gemma",),
        unread=(
            Unread(
                "transformers",
                "multiplies by weights of this family outside their layers, where they are FP8 codes in this layout;"
                " use format 'fp8' with granularity 'block'",
                ("compressed-tensors",),
            ),
        ),
    ),
    Family(
        "Qwen 4",
        ("qwen4_exp", "qwen4_exp_text"),
        unread=(
            Unread(
                "transformers",
                "does not join the table of n-grams of this family in this layout; use format 'fp8' with granularity"
                " 'block'",
                ("compressed-tensors",),
            ),
        ),
    ),
    Family(
        "ERNIE 4.5 VL",
        ("ernie4_5_vl_moe",),
        unread=(
            Unread(
                "transformers",
                "does not put FP8 experts of text and images of this family together; dequantize the result for it",
            ),
        ),
    ),
)
