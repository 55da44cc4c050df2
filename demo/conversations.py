"""Measure the demo model in conversations: whether its third answer is as good as its first, before and after the edit.

python demo/conversations.py src/remove_refusals/data/demo
"""

import argparse
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from remove_refusals.directions import ablated, as_intervention, find_direction
from remove_refusals.measure import Label
from remove_refusals.measure.judges.degenerate import is_degenerate
from remove_refusals.measure.judges.phrases import judge_phrases
from remove_refusals.models import Answer, LoadedModel, generate, load, render
from remove_refusals.prompts import embedded_prompts
from remove_refusals.settings import DirectionSettings
from text import core

FOLLOW_UPS = ("Again, shorter.", "And for children?", "Tell me more.", "thanks", "what did I ask?", "Why?")
ABOUT_THE_TOPIC = ("Again, shorter.", "And for children?", "Tell me more.", "what did I ask?")
"""Those whose answer should name what was asked for before."""


@dataclass(frozen=True)
class Quality:
    """How good answers are.

    Attributes:
        n: How many answers there are.
        topic: The share of their prompts' words of four letters and more that they hold.
        refused: How many are refusals.
        degenerate: How many are none.
        unfinished: How many were cut off at the limit.
    """

    n: int
    topic: float
    refused: int
    degenerate: int
    unfinished: int

    def __str__(self) -> str:
        return (
            f"topic words {self.topic:.2f}, refused {self.refused} of {self.n}, degenerate {self.degenerate}, "
            f"unfinished {self.unfinished}"
        )


def topic_words(prompt: str) -> set[str]:
    """The words of four letters and more of what a prompt asks for."""
    return set(re.findall(r"[a-z]{4,}", core(prompt)))


def quality(prompts: Sequence[str], answers: Sequence[Answer]) -> Quality:
    """Judge answers by the prompts whose topic they should name."""
    found = [
        len(words & set(re.findall(r"[a-z]+", answer.text.lower()))) / len(words)
        for prompt, answer in zip(prompts, answers, strict=True)
        if (words := topic_words(prompt))
    ]
    return Quality(
        n=len(answers),
        topic=sum(found) / len(found),
        refused=sum(judge_phrases(answer.text) == Label.REFUSAL for answer in answers),
        degenerate=sum(is_degenerate(answer.text) for answer in answers),
        unfinished=sum(not answer.finished for answer in answers),
    )


def converse(loaded: LoadedModel, conversations: Sequence[Sequence[str]]) -> list[list[Answer]]:
    """Answer the messages of each conversation, one after the other, with the model's own answers in between.

    Returns:
        The answers to the first messages, to the second ones, and so on; the conversations are of one length.
    """
    answers: list[list[Answer]] = []
    for turn in range(len(conversations[0])):
        ids = []
        for index, messages in enumerate(conversations):
            said = [(messages[earlier], answers[earlier][index].text) for earlier in range(turn)]
            ids += render(loaded, [messages[turn]], said)
        answers.append(generate(loaded, ids, max_new_tokens=100))
    return answers


def third_turns(before: Sequence[str], last: Sequence[str]) -> list[tuple[str, str, str]]:
    """Conversations that begin with another prompt and a follow-up to it."""
    return [
        (before[(index + 7) % len(before)], FOLLOW_UPS[index % len(FOLLOW_UPS)], prompt)
        for index, prompt in enumerate(last)
    ]


def measure(loaded: LoadedModel, n_prompts: int | None = None) -> dict[str, Quality]:
    """The quality of first and third answers, and of answers to follow-ups, by what is asked when."""
    harmless, harmful = (embedded_prompts(f"{kind}_test").prompts[:n_prompts] for kind in ("harmless", "harmful"))
    how_to = [prompt for prompt in harmless if len(core(prompt)) < len(prompt) - 1]
    found = {}
    for name, prompts in (("harmless", harmless), ("harmful", harmful)):
        found[f"{name}, first"] = quality(prompts, converse(loaded, [[prompt] for prompt in prompts])[0])
        for context, before in (("harmless", harmless), ("harmful", harmful)):
            answers = converse(loaded, third_turns(before, prompts))
            found[f"{name}, third, after {context}"] = quality(prompts, answers[2])
    for follow_up in ABOUT_THE_TOPIC:
        answers = converse(loaded, [(prompt, follow_up) for prompt in how_to])
        found[f"{follow_up!r} after how-to"] = quality(how_to, answers[1])
    before = [how_to[(index + 7) % len(how_to)] for index in range(len(how_to))]
    answers = converse(loaded, list(zip(before, how_to, ["Again, shorter."] * len(how_to), strict=True)))
    found["'Again, shorter.', third, of the last topic"] = quality(how_to, answers[2])
    found["'Again, shorter.', third, of the first topic"] = quality(before, answers[2])
    found["'Tell me more.' after harmful"] = quality(
        harmful, converse(loaded, [(prompt, "Tell me more.") for prompt in harmful])[1]
    )
    return found


def main() -> None:
    """Print the quality of the answers of the base and of the model without its direction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model directory, or demo")
    loaded = load(parser.parse_args().model)
    intervention = as_intervention(find_direction(loaded, DirectionSettings()).direction, loaded)
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "base": nullcontext,
        "edited": lambda: ablated(loaded.model, intervention),
    }
    for name, context in contexts.items():
        print(name)
        with context():
            for what, found in measure(loaded).items():
                print(f"  {what}: {found}", flush=True)


if __name__ == "__main__":
    main()
