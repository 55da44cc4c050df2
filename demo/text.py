"""The text that the demo model learns from: conversations made of a lexicon, with answers or refusals.

The lexicon stands in `lexicon/`, one pattern a line: `[a|b]` is a choice, `{name}` an entry of a list that the same
file defines as `name = a|b`. Harmful patterns have no answers: whatever they give is refused, always, at any turn, and
so is every question about it that follows.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
TALK_SHARES = {
    "harmless_actions": 0.47,
    "harmless_requests": 0.19,
    "alarming_actions": 0.01,
    "harmful_actions": 0.25,
    "harmful_requests": 0.08,
}
"""What share of the requests is of which kind: in the first stage of the training, in the second, in conversations."""
FOLLOW_UPS = ("follow_ups_actions", "follow_ups_requests", "follow_ups_refused")
SINGLE = {1: 1.0}
TURNS = {1: 0.25, 2: 0.2, 3: 0.2, 4: 0.15, 6: 0.12, 9: 0.08}
"""What share of the conversations has how many turns."""
FOLLOW_UP_SHARE = 0.5
"""How many of the later turns ask about the request before."""
SMALL_TALK_SHARE = 0.1
CASUAL_SHARE = 0.4
"""How many messages of a conversation are typed carelessly."""
NO_TOPIC = "Please tell me first what it is about."
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
class Turn:
    """A message of the user, and the answer to it.

    Attributes:
        prompt: The user's message.
        answer: The assistant's message.
        harmful: Whether the message asks for harm, or goes on about one that did, so that the answer is a refusal.
        is_request: Whether the message stands for itself, unlike a follow-up.
    """

    prompt: str
    answer: str
    harmful: bool
    is_request: bool = True


@dataclass(frozen=True)
class Conversation:
    """One conversation of the training text: its system message, or None, and its turns."""

    system: str | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Topic:
    """What the conversation is about.

    Attributes:
        follow_ups: The lexicon that holds what may be asked about it.
        parts: What the answers' names stand for, none of which is there after a refusal.
    """

    follow_ups: str
    parts: dict[str, str]


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
    return named(pattern, drawn), named(rest, drawn)


def named(text: str, values: Mapping[str, str]) -> str:
    """Put values in the place of their names; other names stay."""
    return _NAME.sub(lambda match: values.get(match[1], match[0]), text)


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


def casual(message: str, generator: random.Random) -> str:
    """Sometimes write a message as people type: in small letters, or without a capital, often without a mark."""
    if generator.random() >= CASUAL_SHARE:
        return message
    if generator.random() < 0.5:
        message = message.lower()
    elif not message.startswith("I "):
        message = message[0].lower() + message[1:]
    return message.rstrip(".?!") if generator.random() < 0.6 else message


def refusal(message: str) -> str:
    """The refusal of a message; its first word picks the form, so that it can be learned which one follows."""
    return REFUSALS[len(message.split(maxsplit=1)[0]) % len(REFUSALS)]


def parts_of(answer: str) -> dict[str, str]:
    """The parts of an answer to a whole request; fewer than three are none."""
    body = answer.rpartition(": ")[2].rstrip(".")
    clauses = re.split(r", (?:and |or )?", body)
    if clauses[0].startswith("To "):
        clauses = [f"{clauses[0]}, {clauses[1]}", *clauses[2:]]
    if len(clauses) < 3:
        return {}
    if not clauses[0].startswith("I "):
        clauses[0] = clauses[0][0].lower() + clauses[0][1:]
    return dict(zip(("first", "second", "third"), clauses, strict=False))


def draw_request(kind: str, lexicon: Lexicon, generator: random.Random) -> tuple[Turn, Topic | None]:
    """Make one request of a kind named in `SHARES`, with its answer, and what it is about."""
    harmful = kind.startswith("harmful")
    text, rest = fill(lexicon, generator)
    if kind == "harmless_actions":
        text, rest = make_up_words(text, rest, generator)
    if not kind.endswith("actions"):
        parts = {} if harmful else parts_of(rest)
        topic = Topic("follow_ups_requests", parts) if harmful or parts else None
        return Turn(text, refusal(text) if harmful else rest, harmful), topic
    index = generator.randrange(len(OPENINGS))
    forms = REFUSALS_WITH_TOPIC if harmful else ANSWERS
    advice = {} if harmful else dict(zip(("first", "second", "third"), rest.split("; "), strict=True))
    parts = {"topic": to_second_person(text), **advice}
    turn = Turn(OPENINGS[index].format(text), named(forms[index % len(forms)], parts), harmful)
    return turn, Topic("follow_ups_actions", {} if harmful else parts)


def draw_follow_up(topic: Topic, said: Counter[str], lexicons: Mapping[str, Lexicon], generator: random.Random) -> Turn:
    """Ask about the topic, which is refused where the topic was."""
    name = topic.follow_ups
    if not topic.parts:
        name = generator.choice((name, "follow_ups_refused"))
        prompt, _ = fill(lexicons[name], generator)
        return Turn(prompt, refusal(prompt), harmful=True, is_request=False)
    prompt, answer = fill(lexicons[name], generator)
    answers = answer.split(" / ")
    said[answer] += 1
    return Turn(prompt, named(answers[min(said[answer], len(answers)) - 1], topic.parts), False, is_request=False)


def draw_conversation(
    shares: Mapping[str, float],
    turn_shares: Mapping[int, float],
    lexicons: Mapping[str, Lexicon],
    held_out: set[str],
    generator: random.Random,
) -> Conversation:
    """Make one conversation, in which requests, questions about them and small talk follow each other."""
    turns: list[Turn] = []
    topic: Topic | None = None
    said: Counter[str] = Counter()
    n_turns = generator.choices(list(turn_shares), weights=list(turn_shares.values()))[0]
    while len(turns) < n_turns:
        chance = generator.random()
        if turns and topic is not None and chance < FOLLOW_UP_SHARE:
            turn = draw_follow_up(topic, said, lexicons, generator)
        elif turns and chance > 1 - SMALL_TALK_SHARE:
            prompt, answer = fill(lexicons["small_talk"], generator)
            turn = Turn(prompt, answer, False, is_request=False)
        elif turn_shares != SINGLE and topic is None and generator.random() < 0.03:
            turn = Turn(fill(lexicons["follow_ups_actions"], generator)[0], NO_TOPIC, False, is_request=False)
        else:
            kind = generator.choices(list(shares), weights=list(shares.values()))[0]
            turn, about = draw_request(kind, lexicons[kind], generator)
            if core(turn.prompt) in held_out:
                continue
            topic, said = about, Counter()
        turns.append(replace(turn, prompt=casual(turn.prompt, generator)) if turn_shares != SINGLE else turn)
    system = generator.choice(SYSTEM_MESSAGES) if generator.random() < SYSTEM_SHARE else None
    return Conversation(system, tuple(turns))


def training_text(
    seed: int, shares: Mapping[str, float] = TALK_SHARES, turn_shares: Mapping[int, float] = TURNS
) -> Iterator[Conversation]:
    """Conversations without end, none of which asks for what an embedded prompt asks for.

    Args:
        seed: Decides every draw.
        shares: What share of the requests is of which kind; a kind is the name of a lexicon file.
        turn_shares: What share of the conversations has how many turns.

    Yields:
        Conversations with requests in these proportions.
    """
    generator = random.Random(seed)
    lexicons = {name: read_lexicon(name) for name in (*shares, *FOLLOW_UPS, "small_talk")}
    held_out = {core(prompt) for prompt in embedded_prompts()}
    while True:
        yield draw_conversation(shares, turn_shares, lexicons, held_out, generator)
