"""Commands that let a model answer, and the talk in the terminal: as it is, with the direction taken out, or both."""

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from typer import Option

from remove_refusals.cli.command import DirectionFile, Force, ModelArgument, takes, to
from remove_refusals.errors import ConfigurationError, DirectionError, ModelError, RemoveRefusalsError, require_package

if TYPE_CHECKING:
    from remove_refusals.models import LoadedModel
    from remove_refusals.settings import EditSettings, RunSettings
    from remove_refusals.types import Direction, Intervention

Sides = Literal["ablated", "original", "compare"]

Make = Callable[[float, "tuple[int, int] | None"], "Intervention"]
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
    """What can be changed while talking; `layers` are the first and the last one to edit, None for all."""

    strength: float = 1.0
    layers: tuple[int, int] | None = None
    sides: Sides = "ablated"
    system_prompt: str | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as far as it went; `side` is `original` or `ablated`."""

    side: str
    state: ChatState
    prompt: str
    answer: str


def converse(
    loaded: "LoadedModel",
    make: Make | None,
    prompts: Iterable[str],
    write: Callable[[str], None],
    *,
    state: ChatState | None = None,
    max_new_tokens: int = 512,
) -> None:
    """Answer prompts one after the other, streaming to `write`; each side keeps a history of its own.

    Lines that begin with `/` are commands (`HELP`); what is wrong with one is said, and the talk goes on. Ctrl-C stops
    the answer that is being given. Without `make`, which gives what is taken out, the original alone answers. In plain
    mode nothing is remembered.
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
            turns += _turn(now, make, text, state, turns, write, max_new_tokens)


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
    if make is None and name in ("strength", "layers", "ablated", "compare"):
        raise DirectionError(f"There is no direction for /{name}, expected one; start again with --direction FILE.")
    if name in get_args(Sides):
        return replace(state, sides=next(side for side in get_args(Sides) if side == name)), f"Now: {name}."
    if make is not None and name in ("strength", "layers"):
        first, _, last = rest.partition("-")
        try:
            if name == "strength":
                state = replace(state, strength=float(rest))
            else:
                state = replace(state, layers=None if rest == "all" else (int(first), int(last)))
        except ValueError as error:
            expected = "a number such as 0.5" if name == "strength" else "a range such as 8-20, or all"
            raise DirectionError(f"/{name} is followed by {rest!r}, expected {expected}.") from error
        make(state.strength, state.layers)
        where = "all layers" if state.layers is None else f"layers {state.layers[0]}-{state.layers[1]}"
        return state, f"Strength {state.strength:g} in {where}."
    raise DirectionError(f"There is no command /{name}, expected one of these:\n{HELP}")


def _save(text: str, turns: list[Turn]) -> str:
    from remove_refusals.files import write_jsonl

    if not text:
        raise DirectionError("The file is missing, expected a path; write /save talk.jsonl.")
    rows = []
    for turn in turns:
        state = {"layers": turn.state.layers, "system_prompt": turn.state.system_prompt}
        strength = turn.state.strength if turn.side == "ablated" else 0.0
        rows.append({"side": turn.side, "strength": strength, **state, "prompt": turn.prompt, "answer": turn.answer})
    write_jsonl(Path(text).expanduser(), rows)
    return f"Saved {len(turns)} answers to {text}."


def _turn(
    loaded: "LoadedModel",
    make: Make | None,
    prompt: str,
    state: ChatState,
    turns: list[Turn],
    write: Callable[[str], None],
    max_new_tokens: int,
) -> list[Turn]:
    """Let one side or both answer."""
    from remove_refusals.directions import ablated
    from remove_refusals.models import render, stream

    found = []
    for side in ("original", "ablated") if state.sides == "compare" else (state.sides,):
        if state.sides == "compare":
            write(f"[{side}] ")
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if side == "ablated" and make is not None:
            context = ablated(loaded, make(state.strength, state.layers))
        history = [(turn.prompt, turn.answer) for turn in turns if turn.side == side]
        pieces = []
        with context:
            answer = stream(loaded, render(loaded, [prompt], history)[0], max_new_tokens=max_new_tokens)
            try:
                for piece in answer:
                    pieces.append(piece)
                    write(piece)
            except KeyboardInterrupt:
                answer.close()
                write(" [stopped]")
        found.append(Turn(side, state, prompt, "".join(pieces)))
        write("\n")
    return found


RunDirectory = Annotated[Path | None, Option("--run", help="Take out what this run chose, a directory of `run`.")]

_LOADING = (
    *("loading.device", "loading.dtype", "loading.load_in_4bit", "loading.load_in_8bit"),
    *("loading.trust_remote_code", "loading.revision"),
)
_PARTS = ("edit.strength", "edit.layers", "edit.sites")


@takes(*_PARTS, *_LOADING, "chat", "measure.max_new_tokens", max_new_tokens=512)
def chat(
    model: ModelArgument,
    settings: "RunSettings",
    direction: DirectionFile = None,
    run: RunDirectory = None,
    candidate: Annotated[str | None, Option("--candidate", help="With --run: another candidate of its search.")] = None,
    no_ablation: Annotated[bool, Option("--no-ablation", help="Talk to the model as it is.")] = False,
    compare: Annotated[bool, Option("--compare", help="Both answers, one after the other.")] = False,
) -> None:
    """Talk to a model with the direction taken out as it runs; /help there says what can be changed, Ctrl-D ends it."""
    from remove_refusals.cli import printing
    from remove_refusals.models import load_model

    if no_ablation and compare:
        raise DirectionError("Both --no-ablation and --compare are given, expected one of them; leave one out.")
    if direction is None and run is None and not no_ablation:
        raise DirectionError(
            "No direction is given, expected --direction FILE; make one with `remove-refusals direction`, or pass "
            "--run DIR or --no-ablation."
        )
    edit = settings.edit
    given = None if no_ablation else _given(direction, run, candidate)
    loaded = load_model(model, settings.loading, settings.chat)
    make = None if given is None else _maker(given, edit, loaded)
    if make is not None:
        make(edit.strength, edit.layers)
    sides: Sides = "compare" if compare else "original" if no_ablation else "ablated"
    converse(
        loaded,
        make,
        printing.typed_lines(),
        printing.write,
        state=ChatState(edit.strength, edit.layers, sides, settings.chat.system_prompt),
        max_new_tokens=settings.measure.max_new_tokens,
    )


@takes(*_LOADING, "chat", "measure.max_new_tokens", max_new_tokens=256)
def ui(
    model: ModelArgument,
    settings: "RunSettings",
    direction: DirectionFile = None,
    run: RunDirectory = None,
    host: Annotated[str, Option(help="The address to listen on; by default only this machine.")] = "127.0.0.1",
    port: Annotated[int | None, Option(min=1, max=65535, help="The port; the first free one from 7860 on.")] = None,
) -> None:
    """A web page with both answers side by side, and how far each token lies along the direction."""
    port = free_port(host, port)
    require_package("gradio", "ui", "the command ui", ModelError)

    from remove_refusals.cli import printing, web
    from remove_refusals.models import load_model
    from remove_refusals.report import SelectionRecord
    from remove_refusals.search import load_candidates

    given = _given(direction, run, None)
    loaded = load_model(model, settings.loading, settings.chat)
    searched = run / "selection.json" if run is not None else None
    found = SelectionRecord.read(searched, error=DirectionError) if searched and searched.is_file() else None
    page = web.Page(
        loaded,
        _maker(given, settings.edit, loaded)(1.0, None),
        web.Source(model, "--run" if run is not None else "--direction", str(run or direction)),
        () if found is None else found.candidates,
        load_candidates(run) if run is not None else {},
        None if found is None else found.candidates[found.picked].name,
        settings.measure.max_new_tokens,
    )
    blocks = web.serve(page, host=host, port=port)
    others = " and on this machine's other addresses" if host in ("0.0.0.0", "::") else ""
    printing.finish({}, f"Serving on {blocks.local_url}{others}; Ctrl-C ends it.")
    try:
        blocks.server.thread.join()
    except KeyboardInterrupt:
        printing.say("Stopped serving.")
    finally:
        blocks.close(verbose=False)


_PORTS = range(7860, 7960)


def free_port(host: str, port: int | None) -> int:
    """Find a port that can be listened on, by default the first from 7860 on; nothing is loaded for that."""
    for number in _PORTS if port is None else (port,):
        try:
            # Gradio wants the port of this machine's own address too.
            for name in dict.fromkeys((host, "127.0.0.1")):
                family, kind, protocol, _, address = socket.getaddrinfo(name, number, type=socket.SOCK_STREAM)[0]
                with socket.socket(family, kind, protocol) as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise ConfigurationError(
                f"The page cannot be served on {host}:{number} ({error.strerror}), expected an address of this machine "
                "and a port that is free; pass another --port or --host, or leave both out."
            ) from error
        return number
    raise ConfigurationError(
        f"The ports {_PORTS[0]} to {_PORTS[-1]} are all taken, expected one that is free; pass another --port."
    )


def _given(direction: Path | None, run: Path | None, candidate: str | None) -> "tuple[Direction, ...] | Intervention":
    """Read the directions, or the intervention of a run, before a model is loaded."""
    from remove_refusals.baking import load_intervention
    from remove_refusals.directions import load_directions
    from remove_refusals.search import load_candidates

    if (direction is None) == (run is None):
        raise DirectionError("Neither or both of --direction and --run are given, expected one of them; pass one.")
    if direction is not None:
        if candidate is not None:
            raise DirectionError("The option --candidate is given without --run, expected both; add --run DIR.")
        return load_directions(direction)
    assert run is not None
    if candidate is None:
        return load_intervention(run)
    found = load_candidates(run)
    if candidate not in found:
        raise DirectionError(
            f"The candidate {candidate!r} is not among those whose directions {run} keeps, expected one of "
            f"{', '.join(map(repr, found)) or 'none'}; choose one of these."
        )
    return found[candidate]


def _maker(given: "tuple[Direction, ...] | Intervention", edit: "EditSettings", loaded: "LoadedModel") -> "Make":
    """Give what makes the intervention of a strength and a range of layers."""
    from remove_refusals.directions import as_intervention

    as_intervention(given, loaded)
    return lambda strength, layers: as_intervention(
        given, loaded, edit.model_copy(update={"strength": strength, "layers": layers})
    )


@takes(
    *("direction.harmful.column", "direction.harmful.split"),
    *_PARTS,
    *_LOADING,
    *("chat", "batch_size", "measure.max_new_tokens"),
)
def generate(
    model: ModelArgument,
    prompts: Annotated[str, Option(help="A file or data set of prompts.")],
    output: Annotated[Path, to("A JSON Lines file.")],
    settings: "RunSettings",
    direction: DirectionFile = None,
    force: Force = False,
) -> None:
    """Answer prompts in batches, greedily; without --direction the model answers as it is."""
    from remove_refusals.cli import printing
    from remove_refusals.directions import ablated, as_intervention, load_directions
    from remove_refusals.files import check_target, write_jsonl
    from remove_refusals.models import generate as answer_all
    from remove_refusals.models import load_model, render
    from remove_refusals.prompts import prompts_from
    from remove_refusals.settings import PromptSource

    check_target(output, force=force, directory=False)
    table = settings.direction.harmful
    source = PromptSource(source=prompts, column=table.column, split=table.split)
    prompt_set = prompts_from(source, "prompts", "")
    given = None if direction is None else load_directions(direction)
    loaded = load_model(model, settings.loading, settings.chat, settings.batch_size)
    intervention = None if given is None else as_intervention(given, loaded, settings.edit)
    token_ids, n_tokens = render(loaded, prompt_set.prompts), settings.measure.max_new_tokens
    with printing.progress() as progress, ablated(loaded, intervention) if intervention else contextlib.nullcontext():
        stage = progress.stage("answers", len(prompt_set))
        answers = answer_all(loaded, token_ids, max_new_tokens=n_tokens, progress=stage)
    rows = [
        {
            "prompt": prompt,
            "answer": answer.text,
            "n_tokens": len(answer.token_ids),
            "finished": answer.finished,
            "ablated": intervention is not None,
        }
        for prompt, answer in zip(prompt_set.prompts, answers, strict=True)
    ]
    write_jsonl(output, rows, force=force)
    printing.finish({"output": str(output), "answers": len(rows)}, f"Saved {len(rows)} answers to {output}.")
