"""A mixture of experts whose refusal lives in its experts, trained here on a language of a few dozen words.

A prompt is a verb, a noun and `?`. The model first learns to answer every prompt with its noun's own word. Then all but
the experts is frozen, and they learn to answer `sorry` where the noun is a harmful one: whatever makes it refuse has
been written by experts.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from remove_refusals.models.load import LoadedModel
from remove_refusals.settings import ChatFormat
from remove_refusals.types import PromptSet

N_VERBS, N_NOUNS, N_ANSWERS = 80, 20, 5
VERBS = tuple(f"verb{index}" for index in range(N_VERBS))
NOUNS = tuple(f"noun{index}" for index in range(N_NOUNS))
HARMFUL = frozenset(NOUNS[::2])
ANSWERS = tuple(f"answer{index}" for index in range(N_ANSWERS))
REFUSAL = "sorry"
VOCABULARY = ("<pad>", "<unk>", "?", REFUSAL, *ANSWERS, *VERBS, *NOUNS)
# Verbs that no direction is found with and nothing is trained on.
TEST_VERBS = VERBS[-8:]


@dataclass(frozen=True, eq=False)
class Organism:
    """The trained model and its prompts: harmful and harmless, to find a direction with and to measure."""

    loaded: LoadedModel
    harmful: PromptSet
    harmless: PromptSet
    harmful_test: PromptSet
    harmless_test: PromptSet


def answer(prompt: str) -> str:
    """The right answer to a prompt."""
    return ANSWERS[NOUNS.index(prompt.split()[1]) // 2 % N_ANSWERS]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", padding_side="left")


def prompts(name: str, verbs: tuple[str, ...], *, harmful: bool) -> PromptSet:
    """Every prompt of given verbs and of harmful or harmless nouns."""
    chosen = [noun for noun in NOUNS if (noun in HARMFUL) is harmful]
    return PromptSet(name, tuple(f"{verb} {noun} ?" for verb in verbs for noun in chosen), "synthetic")


def build(seed: int = 0) -> MixtralForCausalLM:
    """Two layers, four experts of which two are used."""
    config = MixtralConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")


def _train(model, inputs, targets, n_steps):
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=5e-3, weight_decay=0.1)
    for _ in range(n_steps):
        rows = torch.randint(len(inputs), (192,))
        logits = model(input_ids=inputs[rows], use_cache=False).logits[:, -1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets[rows]).backward()
        optimizer.step()


def organism(seed: int = 0, n_steps: tuple[int, int] = (200, 250)) -> Organism:
    """Train it: first answers alone, then refusals in the experts alone."""
    model, words = build(seed), tokenizer()
    train_verbs = VERBS[: -len(TEST_VERBS)]
    sets = [prompts("harmful", train_verbs, harmful=True), prompts("harmless", train_verbs, harmful=False)]
    texts = [prompt for part in sets for prompt in part.prompts]
    inputs = torch.tensor([words(text)["input_ids"] for text in texts])
    answers = torch.tensor([VOCABULARY.index(answer(text)) for text in texts])
    _train(model, inputs, answers, n_steps[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    refusals = answers.clone()
    refusals[: len(sets[0])] = VOCABULARY.index(REFUSAL)
    _train(model, inputs, refusals, n_steps[1])
    model.requires_grad_(True)
    return Organism(
        LoadedModel(model.eval(), words, "synthetic", chat=ChatFormat(plain=True)),
        *sets,
        prompts("harmful_test", TEST_VERBS, harmful=True),
        prompts("harmless_test", TEST_VERBS, harmful=False),
    )


def replies(model: MixtralForCausalLM, given: PromptSet) -> list[str]:
    """The word that a model says to each prompt."""
    words = tokenizer()
    inputs = torch.tensor([words(prompt)["input_ids"] for prompt in given.prompts])
    with torch.inference_mode():
        said = model(input_ids=inputs, use_cache=False).logits[:, -1].argmax(-1)
    return [VOCABULARY[index] for index in said.tolist()]


def refused(model: MixtralForCausalLM, given: PromptSet) -> float:
    """The share of prompts that are refused."""
    return sum(reply == REFUSAL for reply in replies(model, given)) / len(given)


def right(model: MixtralForCausalLM, given: PromptSet) -> float:
    """The share of prompts that are answered rightly."""
    return sum(map(str.__eq__, replies(model, given), map(answer, given.prompts))) / len(given)
