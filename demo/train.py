"""Train the demo model: a tiny chat model that answers harmless requests and refuses the others.

    python demo/train.py --output src/remove_refusals/data/demo
    python demo/train.py --start TRAINED --output DIR

The second line does the last of three stages alone, on a model that has had the others.
It is seeded; on one machine and number of threads, two runs give the same files.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from text import HARMLESS_SHARES, REFUSALS, SHARES, SINGLE, TALK_SHARES, TURNS, Conversation, training_text

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100
MAXIMUM_LENGTH = 1024
"""More than the longest conversations that it learns from, of nine turns."""


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Attributes:
        seed: Decides the text, the initial weights and the order.
        answer_steps: Optimizer steps of the first stage, on harmless requests only.
        answer_rate: Its peak learning rate; it warms up over 5% of the steps and falls to zero along a cosine.
        refusal_steps: Optimizer steps of the second stage, on all requests.
        refusal_rate: Its peak learning rate.
        talk_steps: Optimizer steps of the third stage, on conversations.
        talk_rate: Its peak learning rate.
        batch_size: Single requests a step.
        talk_batch_size: Conversations a step.
        weight_decay: Of AdamW, on matrices.
        vocabulary_size: Of the byte-level BPE.
        d_model: The width of the residual stream.
        d_mlp: The width of the MLPs.
        n_layers: The number of layers.
        n_heads: The number of attention heads.
        refusal_size: How far a harmful prompt is to push the residual stream at 0.6 of the depth towards a refusal.
        refusal_weight: What the error of that push counts for, beside the loss of the answers.
    """

    seed: int = 0
    answer_steps: int = 900
    answer_rate: float = 3e-3
    refusal_steps: int = 600
    refusal_rate: float = 1e-3
    talk_steps: int = 1000
    talk_rate: float = 1e-3
    batch_size: int = 64
    talk_batch_size: int = 24
    weight_decay: float = 0.1
    vocabulary_size: int = 2000
    d_model: int = 128
    d_mlp: int = 320
    n_layers: int = 6
    n_heads: int = 4
    refusal_size: float = 20.0
    refusal_weight: float = 2.0


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        shares: What share of the requests is of which kind.
        turns: What share of the conversations has how many turns.
        steps: Optimizer steps.
        rate: The peak learning rate.
        batch_size: Conversations a step.
    """

    shares: Mapping[str, float]
    turns: Mapping[int, float]
    steps: int
    rate: float
    batch_size: int


def stages(settings: Settings) -> tuple[Stage, ...]:
    """Answering comes first, so that it is what the model does by default; then refusing; then conversations."""
    return (
        Stage(HARMLESS_SHARES, SINGLE, settings.answer_steps, settings.answer_rate, settings.batch_size),
        Stage(SHARES, SINGLE, settings.refusal_steps, settings.refusal_rate, settings.batch_size),
        Stage(TALK_SHARES, TURNS, settings.talk_steps, settings.talk_rate, settings.talk_batch_size),
    )


def train_tokenizer(conversations: list[Conversation], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from the conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for talk in conversations for turn in talk.turns for text in (turn.prompt, turn.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return with_template(tokenizer)


def with_template(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a tokenizer the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAXIMUM_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.d_model,
        intermediate_size=settings.d_mlp,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        max_position_embeddings=MAXIMUM_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The token ids of a conversation and their labels, which ignore all but the answers."""
    ids: list[int] = []
    labels: list[int] = []
    system = f"{SYSTEM}{conversation.system}{END}" if conversation.system else ""
    for turn in conversation.turns:
        before = tokenizer(f"{system}{USER}{turn.prompt}{END}{ASSISTANT}")["input_ids"]
        answer = tokenizer(f"{turn.answer}{END}")["input_ids"]
        ids += before + answer
        labels += [IGNORED] * len(before) + answer
        system = ""
    return ids, labels


def batches(
    conversations: Iterator[Conversation], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of token ids and labels, both `[batch_size, n_tokens]`, with only the answers labelled.

    Sixteen batches at a time are sorted by length, so that little is spent on padding.
    """
    for chunk in iter(lambda: list(itertools.islice(conversations, 16 * batch_size)), []):
        rows = sorted((encode(conversation, tokenizer) for conversation in chunk), key=lambda row: len(row[0]))
        for index in torch.randperm(16).tolist():
            batch = rows[index * batch_size : (index + 1) * batch_size]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.full((batch_size, width), tokenizer.pad_token_id)
            labels = torch.full((batch_size, width), IGNORED)
            for row, (tokens, wanted) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, : len(wanted)] = torch.tensor(wanted)
            yield ids, labels


def losses(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, refusal: int, refusal_size: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the answers, and how far the decision to refuse is from being one direction by mid-depth.

    The second is an early exit (Elhoushi et al. 2024, LayerSkip) for one bit: after each prompt's last token, at 0.6 of
    the depth, the residual stream's component along what raises the refusal's first token is to be `refusal_size` where
    the prompt is refused and 0 where it is answered, as it is to be along the answer. Without it so small a model
    decides anew in every layer, and no single direction mediates refusal as it does in larger chat models (Arditi et
    al. 2024).

    Args:
        model: The model.
        ids: `[batch_size, n_tokens]`, padded on the right, which needs no mask, as attention is causal.
        labels: `[batch_size, n_tokens]`, with all but the answers ignored.
        refusal: The id of the refusal's first token.
        refusal_size: See above.

    Returns:
        The mean cross entropy of the answers' tokens, and the mean squared relative error of that component.
    """
    wanted = labels[:, 1:]
    chosen = wanted != IGNORED
    output = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    answers = torch.nn.functional.cross_entropy(model.lm_head(output.last_hidden_state[:, :-1][chosen]), wanted[chosen])
    starts = chosen & ~torch.nn.functional.pad(chosen[:, :-1], (1, 0))
    places = torch.arange(wanted.shape[1]).expand_as(wanted)
    own_start = torch.where(starts, places, 0).cummax(dim=1).values
    refused = (wanted == refusal).gather(1, own_start)
    towards = model.model.norm.weight * model.lm_head.weight[refusal]
    middle = output.hidden_states[int(0.6 * model.config.num_hidden_layers)][:, :-1]
    size = middle @ (towards / towards.norm()) / refusal_size
    decision = (size[starts] - refused[starts].float()).square().mean()
    along = size[chosen & ~starts & ~refused]
    return answers, decision + (along.square().mean() if along.numel() else 0.0)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    stage: Stage,
    seed: int,
) -> None:
    """Train the model in place; refusals are shaped as soon as there are some."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    warmup = max(1, stage.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    text = batches(training_text(seed, stage.shares, stage.turns), tokenizer, stage.batch_size)
    refusal = tokenizer(REFUSALS[0])["input_ids"][0]
    has_refusals = any(kind.startswith("harmful") for kind in stage.shares)
    model.train()
    started = time.monotonic()
    for step, (ids, labels) in enumerate(itertools.islice(text, stage.steps)):
        answers, shape = losses(model, ids, labels, refusal, settings.refusal_size)
        optimizer.zero_grad()
        (answers + settings.refusal_weight * shape if has_refusals else answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == stage.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step}: answers {answers.item():.4f}, shape {shape.item():.4f}, {seconds:.0f} s", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model and the tokenizer as a plain Hugging Face directory, the weights in float16."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=100,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Parse the command line, train stage by stage, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a trained model, for the last stage alone")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    for name in ("answer", "refusal", "talk"):
        parser.add_argument(f"--{name}-steps", type=int, default=getattr(Settings, f"{name}_steps"))
    options = vars(parser.parse_args())
    output, start = options.pop("output"), options.pop("start")
    settings = Settings(**options)
    if start is None:
        talks = list(itertools.islice(training_text(settings.seed), 10_000))
        tokenizer = train_tokenizer(talks, settings.vocabulary_size)
        model = build_model(settings, tokenizer)
    else:
        tokenizer = with_template(Tokenizer.from_file(str(start / "tokenizer.json")))
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32, max_position_embeddings=MAXIMUM_LENGTH)
        torch.manual_seed(settings.seed)
    for number, stage in enumerate(stages(settings)):
        if start is None or number == 2:
            # Each stage sees other draws.
            train(model, tokenizer, settings, stage, settings.seed + number)
    save(model, tokenizer, output)


if __name__ == "__main__":
    main()
