"""Tiny random models and a character tokenizer, built without any download."""

import signal
import string

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = tuple(string.ascii_letters + string.digits + string.punctuation + " \n")
VOCABULARY = (*SPECIAL, *CHARACTERS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(*, pad: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a character; the pad token is token 0."""
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(VOCABULARY)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": padding_side}
    if pad:
        special["pad_token"] = "<pad>"
    built = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    built.chat_template = CHAT_TEMPLATE
    return built


def llama(seed: int = 0, *, spread: float = 0.3, vocab_size: int = len(VOCABULARY)) -> LlamaForCausalLM:
    """Two layers, two heads, width 32; `spread` is the standard deviation of the weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0, *, spread: float = 0.3) -> GPT2LMHeadModel:
    """Two layers, two heads, width 32, learned absolute positions."""
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).eval()


def heed_interrupts() -> None:
    """Let a child process be interrupted even where the tests run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share_left(edited, original, basis, axis):
    """How much of a subspace an edit has left: the Frobenius norm of `QᵀW'` over that of `QᵀW`."""
    after, before = (float((value.detach().movedim(axis, -1).float() @ basis).norm()) for value in (edited, original))
    return after / before if before else float(after > 0)
