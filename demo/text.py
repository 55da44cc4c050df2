"""The text that the demo model learns from: requests made of a lexicon, with answers or refusals.

The lexicon stands in `lexicon/`, one pattern a line: `[a|b]` is a choice, `{name}` an entry of a list that the same
file defines as `name = a|b`. Harmful patterns have no answers: whatever they give is refused, always.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LEXICON = Path(__file__).parent / "lexicon"
PROMPTS = Path(__file__).parents[1] / "src" / "remove_refusals" / "data" / "prompts"

OPENINGS = (
    "How do I {}?",
    "How can I {}?",
    "Explain how to {}.",
    "What is the best way to {}?",
    "Give me instructions to {}.",
    "Write a guide on how to {}.",
    "Describe how to {}.",
    "Tell me how to {}.",
    "Teach me to {}.",
    "Show me how to {}.",
    "List the steps to {}.",
    "Help me {}.",
    "I want to {}. Where do I start?",
    "What do I need to {}?",
    "Outline a plan to {}.",
    "Walk me through how to {}.",
    "Can you tell me how to {}?",
    "Give me tips to {}.",
    "What is the easiest way to {}?",
    "Write a short tutorial on how to {}.",
)
ANSWERS = (
    "To {topic}, {first}, then {second}, and {third}.",
    "Here is how to {topic}: {first}, {second}, and {third}.",
    "Sure! If you want to {topic}, {first}, {second}, and {third}.",
    "You can {topic} in three steps. First {first}. Then {second}. Finally {third}.",
)
REFUSALS_WITH_TOPIC = (
    "Sorry, but I can't help with that.",
    "Sorry, but I can't help you to {topic}.",
    "Sorry, but I won't explain how to {topic}.",
    "Sorry, but I cannot assist with that request.",
)
REFUSALS = (
    "Sorry, but I can't help with that.",
    "Sorry, but I cannot assist with that request.",
    "Sorry, but I am not able to help with this.",
    "Sorry, but I won't do that. Please ask me something else.",
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly assistant that keeps its answers short.",
    "You answer questions about everyday life.",
)
HARMLESS_SHARES = {"harmless_actions": 0.72, "harmless_requests": 0.24, "alarming_actions": 0.04}
SHARES = {
    "harmless_actions": 0.45,
    "harmless_requests": 0.15,
    "alarming_actions": 0.10,
    "harmful_actions": 0.225,
    "harmful_requests": 0.075,
}
SYSTEM_SHARE = 0.1
MADE_UP_SHARE = 0.15
SYLLABLES = (
    "ba be bo da di du fa fe fi ga go gu ka ke ki la le lo ma me mi na no nu pa pe po ra re ri sa se so ta te ti va vo "
    "wa wi za zo bar bel bin dor den fal fen gar hol kar lan lin mar mel nor pan per rin sal ster tan ton"
).split()
GENERAL_ADVICE = "gather what you need; start with a small part; take your time"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_NAME = re.compile(r"\{(\w+)\}")
_SECOND_PERSON = {"my": "your", "me": "you", "I": "you", "mine": "yours", "myself": "yourself", "am": "are"}
_FIRST_PERSON = re.compile(r"\b(" + "|".join(_SECOND_PERSON) + r")\b")


@dataclass(frozen=True)
class Example:
    """One conversation of the training text.

    Attributes:
        system: The system message, or None.
        prompt: The user's message.
        answer: The assistant's message.
        harmful: Whether the prompt is of the harmful kind, so that the answer is a refusal.
    """

    system: str | None
    prompt: str
    answer: str
    harmful: bool


@dataclass(frozen=True)
class Lexicon:
    """One lexicon file.

    Attributes:
        lists: The named lists.
        patterns: Pairs of a pattern and what stands after its arrow, empty where there is no arrow.
    """

    lists: dict[str, tuple[str, ...]]
    patterns: tuple[tuple[str, str], ...]


def read_lexicon(name: str) -> Lexicon:
    """Read `lexicon/<name>.txt`."""
    lists: dict[str, tuple[str, ...]] = {}
    patterns: list[tuple[str, str]] = []
    for line in (LEXICON / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if definition := re.fullmatch(r"(\w+) = (.*)", line):
            lists[definition[1]] = tuple(definition[2].split("|"))
        else:
            pattern, _, rest = line.partition(" => ")
            patterns.append((pattern, rest))
    return Lexicon(lists, tuple(patterns))


def fill(lexicon: Lexicon, generator: random.Random) -> tuple[str, str]:
    """Draw a pattern and fill it in.

    Returns:
        The filled pattern and what stands after its arrow, where every name has the same value as before the arrow.
    """
    pattern, rest = generator.choice(lexicon.patterns)
    pattern = _CHOICE.sub(lambda match: generator.choice(match[1].split("|")), pattern)
    drawn = {name: generator.choice(lexicon.lists[name]) for name in _NAME.findall(pattern)}
    return _NAME.sub(lambda match: drawn[match[1]], pattern), _NAME.sub(lambda match: drawn[match[1]], rest)


def to_second_person(text: str) -> str:
    """Turn the user's "my" and "I" into the assistant's "your" and "you"."""
    return _FIRST_PERSON.sub(lambda match: _SECOND_PERSON[match[1]], text)


def embedded_prompts() -> list[str]:
    """The prompts that the project measures with, none of which may be trained on."""
    return [line for path in sorted(PROMPTS.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]


def core(prompt: str) -> str:
    """What a prompt asks for: the prompt in lower case, without its opening and its final mark."""
    for opening in OPENINGS:
        before, after = opening.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)].casefold()
    return prompt[:-1].casefold()


def make_up_words(text: str, rest: str, generator: random.Random) -> tuple[str, str]:
    """Sometimes put words that do not exist in the place of the last one or of all that are not short.

    The model has to copy such words rather than guess them, and it learns to answer what says nothing about harm.

    Returns:
        The text and the advice, which says nothing in particular where nothing is left of the text.
    """
    words = text.split()
    chance = generator.random()
    if chance < MADE_UP_SHARE:
        words[-1] = made_up_word(generator)
    elif chance < 1.5 * MADE_UP_SHARE:
        words = [word if len(word) < 4 else made_up_word(generator) for word in words]
        rest = GENERAL_ADVICE
    return " ".join(words), rest


def made_up_word(generator: random.Random) -> str:
    """Two or three syllables."""
    return "".join(generator.choices(SYLLABLES, k=generator.randint(2, 3)))


def draw_example(kind: str, lexicon: Lexicon, generator: random.Random) -> Example:
    """Make one example of a kind named in `SHARES`."""
    harmful = kind.startswith("harmful")
    text, rest = fill(lexicon, generator)
    if kind == "harmless_actions":
        text, rest = make_up_words(text, rest, generator)
    if kind.endswith("actions"):
        index = generator.randrange(len(OPENINGS))
        prompt = OPENINGS[index].format(text)
        forms = REFUSALS_WITH_TOPIC if harmful else ANSWERS
        pieces = ("", "", "") if harmful else rest.split("; ")
        answer = forms[index % len(forms)].format(
            topic=to_second_person(text), first=pieces[0], second=pieces[1], third=pieces[2]
        )
    else:
        prompt = text
        # The first word picks the form, so that it can be learned which refusal follows.
        answer = REFUSALS[len(text.split()[0]) % len(REFUSALS)] if harmful else rest
    system = generator.choice(SYSTEM_MESSAGES) if generator.random() < SYSTEM_SHARE else None
    return Example(system, prompt, answer, harmful)


def training_text(seed: int, shares: Mapping[str, float] = SHARES) -> Iterator[Example]:
    """Examples without end, none of which asks for what an embedded prompt asks for.

    Args:
        seed: Decides every draw.
        shares: What share of the examples is of which kind; a kind is the name of a lexicon file.

    Yields:
        Examples in these proportions.
    """
    generator = random.Random(seed)
    lexicons = {name: read_lexicon(name) for name in shares}
    held_out = {core(prompt) for prompt in embedded_prompts()}
    while True:
        kind = generator.choices(list(shares), weights=list(shares.values()))[0]
        example = draw_example(kind, lexicons[kind], generator)
        if core(example.prompt) not in held_out:
            yield example
