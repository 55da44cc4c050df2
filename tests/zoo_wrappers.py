"""Tiny random models of every type that wraps a language model: with towers that read pictures or sound beside it.

The class is the one that a user loads. What a default configuration leaves too large, or open, is given here.
"""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from zoo import D_MODEL as D
from zoo import FIX as TEXT_FIX
from zoo import N_LAYERS as L
from zoo import VOCABULARY as V
from zoo import defaults, fixed, roughen, shrunk

# The omni types hold a talker beside the thinker; the thinker is what is loaded for text, and a type of its own.
OMNI = {name: MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[name] for name in ("qwen2_5_omni", "qwen3_omni_moe")}

# The class of each type, where the causal class is not the whole model already.
CLASSES = {
    name: architecture
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for name, architecture in names.items()
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) != architecture and name not in OMNI
}

IMAGE_TEXT_TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

MODEL_TYPES = tuple(CLASSES)


# Among the types that read pictures, though its model reads none.
WITHOUT_TOWER = ("mistral4",)

# Types whose files Transformers does not find again, with why.
UNLOADABLE = {
    "shieldgemma2": "Transformers maps model type 'shieldgemma2', a classifier of pictures, to a class that cannot "
    "load its files."
}


def rope(*sections: int, kind: str = "default") -> dict[str, Any]:
    """Rotary positions in time, height and width."""
    return {"rope_type": kind, "rope_theta": 10000.0, "mrope_section": list(sections)}


# A small vision tower that stands in for one of the timm package, which no text passes through.
_CLIP = dict(model_type="clip_vision_model", hidden_size=D, num_hidden_layers=1, num_attention_heads=4, image_size=28)
_CLIP |= dict(intermediate_size=96, patch_size=14)
_VQ = dict(base_channels=32, embed_dim=8, latent_channels=8, num_embeddings=16, codebook_size=16, num_res_blocks=1)

# What a type needs beside the small values; a part of the configuration is named before the dot.
FIX: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": _VQ | dict(resolution=32, channel_multiplier=[1, 1], spatial_scale_factor=2),
        "audio_config": dict(codebook_dim=D, num_filters=4, codebook_size=16, decoder_num_layers=1),
        "": dict(image_token_offset=V, audio_token_offset=V + 16),
        "text_config": dict(vocab_size=V + 32),
    },
    "chameleon": {"vq_config": _VQ, "": dict(vocabulary_map={"<image>": V - 1})},
    "cohere_compass": {"text_config": TEXT_FIX["cohere_compass_text"]},
    "cosmos3_edge": {
        "text_config": dict(rope_parameters=rope(2, 3, 3)),
    },
    "cohere2_vision": {"": dict(alignment_intermediate_size=96)},
    "deepseek_ocr2": {
        "vision_config.sam_config": dict(downsample_channels=[32, D], global_attn_indexes=[1]),
        "text_config": dict(mlp_layer_types=["dense", "sparse"] * 2, num_experts_per_tok=2, n_group=1, topk_group=1),
    },
    "diffusion_gemma": {
        "text_config": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=32, per_layer_config=None),
        "": dict(canvas_length=16),
    },
    "dots3_note": {
        "text_config": dict(per_layer_config={}),
        "vision_config": dict(per_layer_config={}, adapter_in_dim=D, adapter_out_dim=D),
        "audio_config": dict(adapter_input_size=D, adapter_out_dim=D),
    },
    "emu3": {
        "vq_config": _VQ | dict(channel_multiplier=[1, 1]),
        "": dict(vocabulary_map={"<image>": V - 1, "<|extra_200|>": V - 2}),
    },
    "ernie4_5_vl_moe": {"text_config": dict(moe_intermediate_size=[32, 32], rope_parameters=rope(3, 3, 2))},
    "fast_vlm": {"vision_config": _CLIP},
    "florence2": {
        "vision_config": dict(
            depths=[1, 1, 1, 1],
            embed_dim=[16, 16, 16, D],
            num_heads=[2, 2, 2, 2],
            num_groups=[2, 2, 2, 2],
            patch_size=[7, 3, 3, 3],
            projection_dim=D,
        ),
    },
    "fun_asr_nano": {"adaptor_config": dict(intermediate_size=D // 4)},
    "glm5_next": {
        "text_config": dict(num_key_value_heads=4, qk_rope_head_dim=0, head_dim=0, index_kpool=4),
        "vision_config": dict(projection_intermediate_size=96),
    },
    "glm4v_moe": {"text_config": dict(rope_parameters=rope(1, 1, 2) | dict(partial_rotary_factor=0.5))},
    "granite4_vision": {
        "": dict(deepstack_layer_map=[[0, 1]], downsample_rate="1/2", spatial_target_layers=[1]),
        "qformer_config": dict(encoder_hidden_size=D),
    },
    "granite_speech": {
        "encoder_config": dict(hidden_dim=D, num_layers=1),
        "projector_config": dict(encoder_hidden_size=D),
    },
    "hunyuan_vl": {
        "text_config": dict(head_dim=16, rope_parameters=rope(2, 3, 3)),
        "vision_config": dict(text_hidden_size=D),
    },
    "hy_v4_vl": {"text_config": dict(rope_parameters=rope(1, 1, 2))},
    "inkling2": {"text_config": TEXT_FIX["inkling2_loop_text"], "vision_config": dict(text_hidden_size=D)},
    "janus": {
        "vision_config": dict(projection_dim=D),
        "vq_config": _VQ | dict(projection_dim=D, image_token_embed_dim=D, channel_multiplier=[1, 1], num_patches=2),
    },
    "kosmos-2": {"text_config": dict(embed_dim=D, layers=L), "": dict(latent_query_num=4)},
    "kosmos-2.5": {
        "text_config": dict(embed_dim=D, layers=L),
        "vision_config": dict(patch_embed_hidden_size=48, max_num_patches=16),
        "": dict(latent_query_num=4),
    },
    "kyutai_speech_to_text": {
        "": dict(codebook_vocab_size=V + 1, audio_bos_token_id=V, audio_pad_token_id=V),
        "codec_config": dict(upsample_groups=1),
    },
    "molmo2": {"adapter_config": dict(vision_feature_layer=[3, 2], text_hidden_size=D)},
    "muse_spark": {
        "text_config": dict(moe_hidden_size=D, layer_rope_theta=[500000.0, 0] * 2),
        "audio_config": dict(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], patch_sizes=[16, 6, 5, 4]),
    },
    "nemo_speechlm": {
        "audio_config.diarization_config.head_config": dict(audio_hidden_size=D),
        "audio_config.diarization_config.audio_config": dict(num_key_value_heads=4),
        "audio_config.asr_config": dict(num_key_value_heads=4),
        "word_timestamp_config": dict(blank_token_id=V - 1, num_key_value_heads=4),
    },
    "nemotron_h_omni": {
        "vision_config": dict(video_temporal_patch_size=2),
    },
    "omniasr": {"audio_config": dict(conv_dim=[32] * 7)},
    "mistral4": {"": dict(head_dim=16)},
    "perception_lm": {"vision_config": _CLIP | dict(model_args=dict(embed_dim=D))},
    "qwen2_vl": {"text_config": dict(rope_parameters=rope(2, 3, 3)), "vision_config": dict(embed_dim=D)},
    "qwen3_omni_moe": {
        "talker_config": dict(thinker_hidden_size=D, spatial_merge_size=2),
        "talker_config.text_config": dict(shared_expert_intermediate_size=32),
        "code2wav_config": dict(decoder_dim=16, codebook_size=16, num_quantizers=2),
    },
    "qwen4_exp": {"text_config": TEXT_FIX["qwen4_exp_text"]},
    "step3p7": {"text_config": dict(sliding_window=16, num_sliding_attention_heads=4, share_expert_dim=32)},
    "unlimited_ocr": {
        "text_config": dict(num_key_value_heads=4),
        "vision_config.sam_config": dict(downsample_channels=[32, D]),
    },
    "vibevoice_asr": {
        part: dict(num_filters=4, depths=[1, 1], downsampling_ratios=[2])
        for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
}
FIX["granite_speech_plus"] = FIX["granite_speech"]
FIX["inkling2_loop"] = FIX["inkling2"]
FIX |= {
    name: {"text_config": dict(rope_parameters=rope(2, 3, 3))}
    for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl")
}


def tiny_config(model_type: str, **overrides: dict[str, Any]) -> Any:
    """The shrunk configuration of a type with towers; of the parts that are named some values are others."""
    config_class = CONFIG_MAPPING[model_type]
    small = fixed(model_type, shrunk(defaults(config_class)))
    for part, values in (*FIX.get(model_type, {}).items(), *overrides.items()):
        inner = small
        for name in filter(None, part.split(".")):
            inner = inner.setdefault(name, {})
        inner |= values
    return config_class(**small)


def build(model_type: str, seed: int = 0, **overrides: dict[str, Any]) -> PreTrainedModel:
    """A tiny random float32 model of the class that a user loads, in evaluation mode."""
    torch.manual_seed(seed)
    architecture = getattr(transformers, (CLASSES | OMNI)[model_type])
    model: PreTrainedModel = architecture._from_config(
        tiny_config(model_type, **overrides), attn_implementation="eager"
    )
    model = model.eval().float()
    roughen(model, seed)
    return model
