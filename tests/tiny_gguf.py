"""Tiny random models as GGUF files, written as llama.cpp's converter does, and their logits in llama.cpp."""

import ctypes
from contextlib import contextmanager

import gguf
import numpy as np
import torch

import zoo
from remove_refusals.baking.gguf import GgufNames

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
SETTINGS = {
    "gemma3_text": dict(layer_types=["sliding_attention"] * zoo.N_LAYERS),
    "mixtral": dict(),
    "llama": dict(),
    "qwen2": dict(),
    "gpt2": dict(n_inner=96),
}


def build(model_type):
    """A tiny model whose norm gains and positions llama.cpp runs as Transformers does."""
    return zoo.build(model_type, **SETTINGS[model_type])


def _permuted(weight, n_heads):
    """The rows of a query or key projection in the order of llama.cpp's rotary embedding."""
    return weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _stored(model, name, tensor, architecture):
    config, value = model.config, tensor.detach().float().numpy()
    if architecture == "llama" and ".q_proj." in name:
        return _permuted(value, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return _permuted(value, config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return value + 1
    return value.T.copy() if architecture == "gpt2" and ".c_" in name and value.ndim == 2 else value


def tensors(model):
    """A model's tensors by their names in GGUF files, float32."""
    names = GgufNames(model)
    found = {}
    for name, tensor in model.named_parameters():
        if name.endswith("gate_up_proj"):
            gate, up = tensor.detach().float().numpy().reshape(tensor.shape[0], 2, -1, tensor.shape[2]).swapaxes(0, 1)
            layer = name.split(".")[2]
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate.copy(), f"blk.{layer}.ffn_up_exps.weight": up.copy()}
        else:
            found[names.find(name)] = _stored(model, name, tensor, names.architecture)
    return found


def write(model, path, kind=F32):
    """Write a model to a GGUF file; matrices get the type `kind`."""
    config, architecture = model.config, GgufNames(model).architecture
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(zoo.D_MODEL)
    writer.add_block_count(zoo.N_LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if "mixtral" in config.model_type:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, value in tensors(model).items():
        quantised = kind != F32 and value.ndim > 1
        writer.add_tensor(
            name, gguf.quants.quantize(value, kind) if quantised else value, raw_dtype=kind if quantised else F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _context(path):
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp cannot load {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 64, 64, 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, options)
    try:
        yield model, context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def logits(path, token_ids, *, lora=None, vector=None):
    """Logits of every token in llama.cpp, with an adapter or a control vector: `[n_tokens, n_vocab]`."""
    import llama_cpp

    with _context(path) as (model, context):
        if lora is not None:
            adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
            assert adapter, f"llama.cpp cannot load {lora}"
            scales = (ctypes.c_float * 1)(1.0)
            found = llama_cpp.llama_set_adapters_lora(
                context, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scales
            )
            assert found == 0
        if vector is not None:
            data = np.ascontiguousarray(vector, dtype=np.float32)
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert llama_cpp.llama_set_adapter_cvec(context, pointer, data.size, data.shape[1], 1, data.shape[0]) == 0
        batch = llama_cpp.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for place, token in enumerate(token_ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        pointer = llama_cpp.llama_get_logits(context)
        found = np.ctypeslib.as_array(pointer, shape=(len(token_ids), n_vocab)).copy()
        llama_cpp.llama_batch_free(batch)
    return torch.from_numpy(found)
