"""Talk to a model in the terminal: as it is, with the direction taken out, or both one after the other."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from remove_refusals.directions import ablated
from remove_refusals.errors import DirectionError, RemoveRefusalsError
from remove_refusals.files import write_jsonl
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import LoadedModel, render_conversation, stream
from remove_refusals.types import Intervention

Sides = Literal["ablated", "original", "compare"]


Make = Callable[[float, tuple[int, int] | None], Intervention]
"""Makes the intervention of a strength and a range of layers, None for all."""


HELP = """\
/strength 0.5     how much is taken out from the next answer on
/layers 8-20      where; /layers all for everywhere
/compare, /ablated, /original    who answers
/system TEXT      the system message; without a text none
/reset            forget what was said
/save FILE        save what was said as JSON Lines
Ctrl-C stops an answer, Ctrl-D ends the talk; // at the beginning is a / that is meant."""


@dataclass(frozen=True)
class ChatState:
    """What can be changed while talking.

    Attributes:
        strength: How much is taken out.
        layers: The first and last layer to edit; None for all.
        sides: Which side answers; `compare` lets the original answer first.
        system_prompt: The system message.
    """

    strength: float = 1.0
    layers: tuple[int, int] | None = None
    sides: Sides = "ablated"
    system_prompt: str | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        side: Who answered, `original` or `ablated`.
        state: What was set.
        prompt: The user message.
        answer: The answer, as far as it went.
    """

    side: str
    state: ChatState
    prompt: str
    answer: str


def converse(
    loaded: LoadedModel,
    make: Make | None,
    prompts: Iterable[str],
    write: Callable[[str], None],
    *,
    state: ChatState | None = None,
    model_map: ModelMap | None = None,
    max_new_tokens: int = 512,
) -> None:
    """Answer prompts one after the other, streaming; each side keeps a history of its own.

    Lines that begin with `/` are commands (`HELP`); what is wrong with one is said, and the talk goes on. Ctrl-C stops
    the answer that is being given.

    Args:
        loaded: The model.
        make: Makes what is taken out on the ablated side; None only if the original alone answers.
        prompts: The user messages, for example lines that are typed; blank ones are skipped.
        write: Takes pieces of text as they come.
        state: What is set at the beginning.
        model_map: The model's map, if it is at hand.
        max_new_tokens: Where an answer is cut off.

    Raises:
        RemoveRefusalsError: If the model cannot be hooked or a prompt cannot be rendered.
    """
    state = state or ChatState(system_prompt=loaded.chat.system_prompt)
    turns: list[Turn] = []
    for line in prompts:
        prompt = line.strip()
        if prompt.startswith("/") and not prompt.startswith("//"):
            try:
                state, said = _obey(prompt, state, turns, make)
            except RemoveRefusalsError as error:
                said = str(error)
            write(f"{said}\n")
        elif prompt:
            text = line.replace("//", "/", 1) if prompt.startswith("//") else line
            system_prompt = None if loaded.chat.plain else state.system_prompt
            now = replace(loaded, chat=loaded.chat.model_copy(update={"system_prompt": system_prompt}))
            turns += _turn(now, make, text, state, turns, write, model_map, max_new_tokens)


def _obey(line: str, state: ChatState, turns: list[Turn], make: Make | None) -> tuple[ChatState, str]:
    """Do what a command says; give the new state and what to say."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "save":
        return state, _save(rest, turns)
    if name == "reset":
        turns.clear()
        return state, "Forgotten."
    if name == "help":
        return state, HELP
    if name == "system":
        return replace(state, system_prompt=rest or None), f"System message: {rest or 'none'}."
    if name in get_args(Sides):
        return replace(state, sides=_checked_side(name, make)), f"Now: {name}."
    if name in ("strength", "layers"):
        if make is None:
            raise DirectionError(f"There is no direction for /{name}, expected one; start again with --direction FILE.")
        state = replace(state, strength=_strength(rest)) if name == "strength" else replace(state, layers=_layers(rest))
        make(state.strength, state.layers)
        where = "all layers" if state.layers is None else f"layers {state.layers[0]}-{state.layers[1]}"
        return state, f"Strength {state.strength:g} in {where}."
    raise DirectionError(f"There is no command /{name}, expected one of these:\n{HELP}")


def _checked_side(name: str, make: Make | None) -> Sides:
    if name != "original" and make is None:
        raise DirectionError(f"There is no direction for /{name}, expected one; start again with --direction FILE.")
    return next(side for side in get_args(Sides) if side == name)


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DirectionError(
            f"The strength is {text!r}, expected a number such as 0.5; write /strength 0.5."
        ) from error


def _layers(text: str) -> tuple[int, int] | None:
    first, dash, last = text.partition("-")
    if text == "all":
        return None
    if not dash or not first.isdecimal() or not last.isdecimal():
        raise DirectionError(f"The layers are {text!r}, expected a range or all; write /layers 8-20.")
    return int(first), int(last)


def _save(text: str, turns: list[Turn]) -> str:
    if not text:
        raise DirectionError("The file is missing, expected a path; write /save talk.jsonl.")
    rows: Iterator[dict[str, object]] = (
        {
            "side": turn.side,
            "strength": turn.state.strength if turn.side == "ablated" else 0.0,
            "layers": turn.state.layers,
            "system_prompt": turn.state.system_prompt,
            "prompt": turn.prompt,
            "answer": turn.answer,
        }
        for turn in turns
    )
    write_jsonl(Path(text).expanduser(), rows)
    return f"Saved {len(turns)} answers to {text}."


def _turn(
    loaded: LoadedModel,
    make: Make | None,
    prompt: str,
    state: ChatState,
    turns: list[Turn],
    write: Callable[[str], None],
    model_map: ModelMap | None,
    max_new_tokens: int,
) -> list[Turn]:
    """Let one side or both answer."""
    found = []
    for side in ("original", "ablated") if state.sides == "compare" else (state.sides,):
        if state.sides == "compare":
            write(f"[{side}] ")
        context: AbstractContextManager[None] = nullcontext()
        if side == "ablated" and make is not None:
            context = ablated(loaded.model, make(state.strength, state.layers), model_map=model_map)
        history = [(turn.prompt, turn.answer) for turn in turns if turn.side == side]
        with context:
            answer = _answer(loaded, prompt, history, write, max_new_tokens)
        found.append(Turn(side, state, prompt, answer))
        write("\n")
    return found


def _answer(
    loaded: LoadedModel,
    prompt: str,
    history: list[tuple[str, str]],
    write: Callable[[str], None],
    max_new_tokens: int,
) -> str:
    pieces = []
    answer = stream(loaded, render_conversation(loaded, prompt, history), max_new_tokens=max_new_tokens)
    try:
        for piece in answer:
            pieces.append(piece)
            write(piece)
    except KeyboardInterrupt:
        answer.close()
        write(" [stopped]")
    return "".join(pieces)
