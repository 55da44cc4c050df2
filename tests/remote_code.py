"""A model that comes with its own code, of the shape that Qwen had before Transformers knew it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny

WIDTH, N_LAYERS = 32, 2

CONFIGURATION = """
from transformers import PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old_qwen"

    def __init__(self, vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **others):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        super().__init__(**others)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_old import OldConfig


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        heads = [part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.w2 = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OldPreTrainedModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "transformer"


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids=None, attention_mask=None, **others):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return (self.ln_f(x),)


class OldLMHeadModel(OldPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OldModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, **others):
        return CausalLMOutputWithPast(logits=self.lm_head(self.transformer(input_ids)[0]))
"""


def write(directory: Path) -> Path:
    """Write configuration, code, random weights and a tokenizer; give the directory."""
    directory.mkdir()
    (directory / "configuration_old.py").write_text(CONFIGURATION)
    (directory / "modeling_old.py").write_text(MODELING)
    vocab_size = len(tiny.VOCABULARY)
    classes = {"AutoConfig": "configuration_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldLMHeadModel"}
    config = {
        "model_type": "old_qwen",
        "architectures": ["OldLMHeadModel"],
        "auto_map": classes,
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocab_size), directory / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(directory)
    return directory


def _weights(vocab_size: int) -> dict[str, torch.Tensor]:
    shapes = {"transformer.wte.weight": (vocab_size, WIDTH), "lm_head.weight": (vocab_size, WIDTH)}
    shapes["transformer.ln_f.weight"] = (WIDTH,)
    for layer in range(N_LAYERS):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.{norm}.weight": (WIDTH,) for norm in ("ln_1", "ln_2")}
        shapes |= {f"{block}.attn.c_attn.weight": (3 * WIDTH, WIDTH), f"{block}.attn.c_attn.bias": (3 * WIDTH,)}
        shapes |= {f"{block}.attn.c_proj.weight": (WIDTH, WIDTH), f"{block}.mlp.c_proj.weight": (WIDTH, 2 * WIDTH)}
        shapes |= {f"{block}.mlp.{name}.weight": (2 * WIDTH, WIDTH) for name in ("w1", "w2")}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
