"""Tiny random models of every causal-LM model type that the installed Transformers knows.

A model type's default configuration is shrunk: every known size becomes a small one, the rest stays. Norm gains and
biases are made non-trivial, so that a numeric test of an edit means something.
"""

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N_LAYERS, D_MODEL, VOCABULARY = 4, 64, 128
L, D, V = N_LAYERS, D_MODEL, VOCABULARY

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# A config attribute and its small value, used where the default config has the attribute and it is not None.
# fmt: off
SMALL = dict(
    hidden_size=D, d_model=D, n_embd=D, emb_dim=D, embedding_dim=D, embedding_size=D,
    num_hidden_layers=L, n_layer=L, n_layers=L, num_layers=L, num_blocks=L, decoder_layers=L, encoder_layers=L,
    num_encoder_layers=1, num_decoder_layers=L, num_layers_per_stack=L,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, attention_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
    num_key_value_heads=2, num_kv_heads=2, kv_n_heads=2, n_head_kv=2, num_query_groups=2,
    num_global_key_value_heads=2, global_head_dim=16,
    head_dim=16, d_head=16, dim_head=16, attention_head_dim=16, kv_channels=16, attention_head_size=16,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, swa_v_head_dim=16,
    intermediate_size=96, n_inner=96, decoder_ffn_dim=96, encoder_ffn_dim=96, ffn_dim=96, dim_ff=96, dff=96,
    d_inner=96, feed_forward_size=96, ffn_hidden_size=96, mlp_dim=96, intermediate_size_mlp=96,
    dense_intermediate_size=96, expert_ffn_hidden_size=32,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    shared_experts_intermediate_size=32, moe_shared_expert_intermediate_size=32,
    num_experts=4, n_routed_experts=4, num_local_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_top_k=2, moe_k=2, top_k_experts=2,
    topk_group=1, n_group=1, num_expert_group=1, zero_expert_num=1,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    first_k_dense_replace=1, num_dense_layers=1, moe_layer_start_index=1, moe_layer_end_index=3,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, kv_lora_rank=16, q_lora_rank=16, qk_head_dim=16,
    o_lora_rank=16, o_groups=2, index_head_dim=16, index_n_heads=2, index_topk=4, gated_norm_rank=8,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_head_dim=16, linear_num_heads=4,
    mamba_d_state=16, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_chunk_size=8, mamba_n_groups=1,
    mamba_num_heads=8, mamba_head_dim=16, n_groups=1, ssm_state_size=16, chunk_size=8, mamba_dt_rank=4,
    mamba_ngroups=1, mamba_headdim=16, n_mamba_heads=2, state_size=16, time_step_rank=4,
    lru_width=D, attention_hidden_size=D, word_embed_proj_dim=D, rotary_dim=8, adapter_rank=8, laurel_rank=8,
    input_embedding_size=D, output_embedding_size=D, hidden_size_per_layer_input=8, router_hidden_size=16,
    hc_lowrank=8, ple_embed_dim=16, loop_gate_rank=8, ngram_vocab_size_base=64, split_ngram_parts=2,
    vocab_size=V, vocab_size_per_layer_input=V, decoder_vocab_size=V + 1, unpadded_vocab_size=V, audio_vocab_size=V,
    max_position_embeddings=64, n_positions=64, max_seq_len=64, context_length=64, max_target_positions=64,
    max_source_positions=64, sliding_window=16, attention_window_size=16, window_size=16, local_attention=16,
    attention_chunk_size=16, sliding_window_size=16, rel_extent=32, original_max_position_embeddings=32,
    num_nextn_predict_layers=0, num_kv_shared_layers=0, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1,
    depth=2, image_size=28, patch_size=14, conf_num_hidden_layers=1,
    decoder_start_token_id=1, dim_model_base=32, query_pre_attn_scalar=16,
    max_window_layers=2, global_attn_every_n_layers=2, attn_layer_period=2, attn_layer_offset=1,
    expert_layer_period=2, expert_layer_offset=1, layer_group_size=2, n_layers_per_attn_res_block=2,
    loop_layer_index_start=1, loop_layer_index_end=3, num_codebooks=4, attention_chunk=16,
    hidden_size_global=D, cross_attn_k=1, position_bias_num_buckets=32, position_bias_max_distance=64,
    shape_embed_dim=16, pronunciation_embed_dim=16, shape_vocab_size=V, pronunciation_vocab_size=V,
    block_size=4, keep_window_size=16, backbone_hidden_size=D, num_centroids=8, centroid_intermediate_top_k=2,
    qk_dim_factor=0.5, image_token_id=V-1, video_token_id=V-2, audio_token_id=V-3, image_token_index=V-1,
    boi_token_id=V-4, eoi_token_id=V-5, boa_token_id=V-6, eoa_token_id=V-7, vision_start_token_id=V-4,
    vision_end_token_id=V-5, vocab_offset=V, index_block_size=4, index_topk_blocks=2, index_local_blocks=1,
    vision_hidden_size=D, out_hidden_size=D, vision_output_dim=D,
    swa_intermediate_size=96, hidden_size_vision=D, num_mem_blocks=1,
    encoder_hash_byte_group_vocab=64, projector_hidden_size=96, downsample_hidden_size=16, output_channels=32,
)
# fmt: on
SMALL_PER_LAYER = dict(
    intermediate_size=96, num_attention_heads_per_layer=4, num_attention_heads=4, num_key_value_heads=2
)

# What a model type needs beside the small values.
FIX = {
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "reformer": dict(
        attn_layers=["local", "lsh", "local", "lsh"],
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[32, 32],
        is_decoder=True,
        num_hidden_layers=None,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
    ),
}
for model_type in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"):
    FIX[model_type] = dict(head_dim=16)
FIX["nemotron"] = dict(num_key_value_heads=2)
FIX["lfm2_moe"] = dict(layer_types=["conv", "full_attention", "conv", "full_attention"])
FIX["xlstm"] = dict(chunk_size=8, v_dim_factor=1.0, qk_dim_factor=1.0)
FIX["zamba"] = dict(attention_hidden_size=2 * D, attention_head_dim=32, num_key_value_heads=4)
FIX["zamba2"] = dict(
    attention_hidden_size=2 * D,
    attention_head_dim=32,
    n_mamba_heads=8,
    mamba_headdim=16,
    num_key_value_heads=4,
    kv_channels=16,
    hybrid_layer_ids=[1, 3],
    layers_block_type=["linear_attention", "hybrid"] * 2,
    use_mamba_kernels=False,
)
FIX["zamba"]["use_mamba_kernels"] = False
FIX["mamba2"] = dict(num_heads=8, head_dim=16)
FIX["bamba"] = dict(attn_layer_indices=[1, 3])
FIX["granitemoehybrid"] = dict(layer_types=["linear_attention", "full_attention"] * 2)
FIX["dory"] = dict(
    num_hidden_layers=8,
    n_input_layers=2,
    n_recurrent_layers=4,
    n_output_layers=2,
    n_recurrent_loops=2,
    layer_types=["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
)
FIX["zaya"] = dict(num_experts_per_tok=1)
FIX["inkling2_loop_text"] = dict(n_layers_per_attn_res_block=1)
FIX["qwen4_exp_text"] = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2
)
FIX["dots1"] = dict(
    num_experts_per_tok=2, n_group=1, topk_group=1, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1
)
FIX["deepseek_v2"] = dict(num_experts_per_tok=2, n_group=1, topk_group=1)
FIX["dots3_note_text"] = dict(head_dim=16, layer_types=["indexed_attention", "sliding_attention"] * 2)
FIX["cohere_compass_text"] = dict(
    layer_types=["full_attention", "sliding_attention"] * 2,
    rope_parameters={k: dict(rope_type="default", rope_theta=10000.0) for k in ("full_attention", "sliding_attention")},
)
FIX["dbrx"] = dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0))
FIX["gemma4_assistant"] = dict(
    text_config=dict(
        model_type="gemma4_text",
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        intermediate_size=96,
        vocab_size=V,
        vocab_size_per_layer_input=0,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=L,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
)

# Decoders with cross-attention, which runs only where something beside the language model hands over hidden states.
WITH_TOWER = (
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mllama",
    "mllama_text_model",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "trocr",
    "whisper",
)

# Composite configurations whose causal LM takes the text part.
TEXT_CONFIG = {"gemma3n": "text_config", "qwen4_exp": "text_config", "dots3_note": "text_config"}

TOKEN_IDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "forced_eos_token_id",
    "forced_bos_token_id",
    "eod_token_id",
)
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
# Parameters of a state space model whose values must stay in their range.
KEPT = ("A_log", "dt_bias", "D")


def _shrunk_list(name: str, value: list[Any]) -> Any:
    if name in SMALL_PER_LAYER:
        return [SMALL_PER_LAYER[name]] * L
    if value and isinstance(value[0], str):
        return (list(dict.fromkeys(value)) * L)[:L]
    return [1, 3] if name == "moe_layers" else value[:L]


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    depth = next(
        (
            values[k]
            for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if isinstance(values.get(k), int)
        ),
        None,
    )
    for name, value in values.items():
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            small[name] = shrunk(value)
            if "model_type" in value:
                small[name] = fixed(value["model_type"], small[name]) | {"model_type": value["model_type"]}
        elif isinstance(value, list | tuple):
            if name in LAYER_KINDS or (depth and len(value) == depth and depth > 3):
                small[name] = _shrunk_list(name, list(value))
            elif name == "mlp_only_layers":
                small[name] = []
            elif name == "eos_token_id":
                small[name] = 1
        elif name in TOKEN_IDS and isinstance(value, int):
            if not 0 <= value < V:
                small[name] = {"pad_token_id": 0, "bos_token_id": 2}.get(name, 1)
        elif name in SMALL and value is not None and not isinstance(value, bool):
            small[name] = SMALL[name]
    return small


def defaults(config_class: type) -> dict[str, Any]:
    try:
        return config_class().to_dict()
    except (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError):
        plain = int | float | list | tuple | str
        return {k: v for k, v in config_class.__dict__.items() if not k.startswith("_") and isinstance(v, plain)}


def fixed(model_type: str, small: dict[str, Any]) -> dict[str, Any]:
    """Small values with what the model type needs beside them."""
    if small.get("qk_rope_head_dim"):
        small["num_key_value_heads"] = 4
        if small.get("head_dim"):
            small["head_dim"] = small["qk_rope_head_dim"]
    return small | FIX.get(model_type, {})


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The shrunk configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    if model_type in TEXT_CONFIG:
        config_class = config_class.sub_configs[TEXT_CONFIG[model_type]]
    elif model_type.startswith("musicgen"):
        config_class = config_class.sub_configs["decoder"]
    name = getattr(config_class, "model_type", model_type) if model_type in TEXT_CONFIG else model_type
    small = fixed(name, shrunk(defaults(config_class))) | overrides
    if small.get("num_hidden_layers", L) is None:
        del small["num_hidden_layers"]
    config = config_class(**small)
    parts = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    for part in [config, *(part for part in parts if part is not None)]:
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    return config


def build(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random float32 model, in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    if model_type.startswith("musicgen"):
        architecture = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        model = architecture._from_config(config, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().float()
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    roughen(model, seed)
    return model


@torch.no_grad()
def roughen(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (parameter.dim() == 1 and name.split(".")[-1] in KEPT):
            continue
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif parameter.abs().max() == 0 or not torch.isfinite(parameter).all():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.std() < 0.05:
            parameter.mul_(0.1 / parameter.std().clamp_min(1e-6))


def token_ids(model: PreTrainedModel, n_tokens: int = 8, seed: int = 0) -> torch.Tensor:
    """Random token ids that any of the models takes: `[1, n_tokens]`, int64."""
    generator = torch.Generator().manual_seed(seed + 7)
    rows = 4 if model.config.model_type.startswith("musicgen") else 1
    return torch.randint(8, V - 16, (rows, n_tokens), generator=generator)


def inputs(model: PreTrainedModel, n_tokens: int = 8, seed: int = 0) -> dict[str, Any]:
    """Random inputs that any of the models takes: token ids, and what a tower beside the language model hands over."""
    states = torch.randn(1, 5, D, generator=torch.Generator().manual_seed(seed + 9))
    given: dict[str, Any] = {"input_ids": token_ids(model, n_tokens, seed), "use_cache": False}
    if model.config.model_type in WITH_TOWER:
        known = inspect.signature(model.forward).parameters
        name = next(
            name for name in ("cross_attention_states", "encoder_hidden_states", "encoder_outputs") if name in known
        )
        given[name] = (states,) if name == "encoder_outputs" else states
    return given
