"""Commands that let a model answer, and the talk in the terminal: as it is, with the direction taken out, or both."""

import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from typer import Argument, Option

from remove_refusals.cli.command import (
    CandidateName,
    DirectionFile,
    Force,
    ModelArgument,
    RunDirectory,
    current,
    given_intervention,
    takes,
    to,
)
from remove_refusals.errors import (
    ConfigurationError,
    DirectionError,
    ModelError,
    PromptError,
    RemoveRefusalsError,
    require_package,
)

if TYPE_CHECKING:
    from remove_refusals.models import LoadedModel
    from remove_refusals.settings import EditSettings, RunSettings
    from remove_refusals.types import Direction, Intervention

Side = Literal["base", "edited"]
Sides = Literal["base", "edited", "compare"]

Make = Callable[[float, "tuple[int, int] | None"], "Intervention"]
"""Makes the intervention of a strength and a range of layers, None for all."""

HELP = """\
/strength 0.5     how much is taken out from the next answer on
/layers 8-20      where; /layers all for everywhere
/edited, /base    who answers; /compare for both, one after the other
/system TEXT      the system message; without a text none
/regenerate       answer the last message again, as things are set now
/status           what is set
/reset            forget what was said
/save FILE        save what was said as JSON Lines
/quit             end the talk, as exit and Ctrl-D do
Ctrl-C stops an answer, or clears the line. Pasted lines are one message.
// at the beginning is a / that is meant.
Each side knows the whole talk: its own answers, or else the other side's."""

_QUIT = ("/quit", "/exit", "quit", "exit")


@dataclass(frozen=True)
class ChatState:
    """What can be changed while talking; `layers` are the first and the last one to edit, None for all."""

    strength: float = 1.0
    layers: tuple[int, int] | None = None
    sides: Sides = "edited"
    system_prompt: str | None = None


@dataclass(frozen=True)
class Exchange:
    """A message and its answers by side, as far as they went, with what was set."""

    prompt: str
    state: ChatState
    answers: dict[Side, str]

    def seen_by(self, side: Side) -> tuple[str, str]:
        """Give the message and the answer that a side takes for its own."""
        return self.prompt, self.answers[side] if side in self.answers else next(iter(self.answers.values()))


@dataclass(frozen=True)
class Talk:
    """A model to talk to, what makes the edit of a strength and layers, if there is one, and what both are called."""

    loaded: "LoadedModel"
    make: Make | None
    about: str = ""
    max_new_tokens: int = 512

    def says(self, state: ChatState) -> str:
        """Say what is set, in a line."""
        where = "all layers" if state.layers is None else f"layers {state.layers[0]}-{state.layers[1]}"
        edit = "" if self.make is None else f"Strength {state.strength:g} in {where}. "
        who = {"base": "The base answers", "edited": "The edited model answers", "compare": "Both answer"}[state.sides]
        return f"{edit}{who}. System message: {state.system_prompt or 'none'}."


def converse(talk: Talk, messages: Iterable[str], write: Callable[[str], None], state: ChatState | None = None) -> None:
    """Answer messages one after the other, streaming to `write`.

    Those that begin with `/` are commands (`HELP`); what is wrong with one is said, and the talk goes on. Ctrl-C stops
    the answer that is being given. In plain mode the system message is left out.
    """
    state = state or ChatState(system_prompt=talk.loaded.chat.system_prompt)
    said: list[Exchange] = []
    for typed in messages:
        line, message, before = typed.strip(), typed, said
        if line in _QUIT:
            return
        try:
            if line == "/regenerate" and said:
                message, before = said[-1].prompt, said[:-1]
            elif line.startswith("//"):
                message = typed.replace("//", "/", 1)
            elif line.startswith("/"):
                state, reply = _obey(line, state, said, talk)
                write(f"{reply}\n")
                continue
            answers = _answers(talk, message, state, before, write) if message.strip() else {}
            said = [*before, Exchange(message, state, answers)] if answers else said
        except RemoveRefusalsError as error:
            write(f"{error}\n")


def _obey(line: str, state: ChatState, said: list[Exchange], talk: Talk) -> tuple[ChatState, str]:
    """Do what a command says; give the new state and what to say."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if talk.make is None and name in ("strength", "layers", "edited", "compare"):
        raise DirectionError(
            f"There is nothing to take out for /{name}, expected an edit; start again with --run DIR or "
            "--direction FILE."
        )
    reply = ""
    if name == "save":
        reply = _save(rest, said)
    elif name == "reset":
        said.clear()
        reply = "Forgotten."
    elif name == "help":
        reply = HELP
    elif name == "status":
        reply = f"{talk.about}\n{talk.says(state)}\nMessages so far: {len(said)}.".strip()
    elif name == "system":
        state = replace(state, system_prompt=rest or None)
    elif name == "regenerate":
        raise DirectionError("There is no message yet, expected one to answer again; type one.")
    elif name in get_args(Sides):
        state = replace(state, sides=next(side for side in get_args(Sides) if side == name))
    elif talk.make is not None and name in ("strength", "layers"):
        state = _changed(state, name, rest)
        talk.make(state.strength, state.layers)
    else:
        raise DirectionError(f"There is no command /{name}, expected one that /help lists; write // for a /.")
    return state, reply or talk.says(state)


def _changed(state: ChatState, name: str, value: str) -> ChatState:
    first, _, last = value.partition("-")
    try:
        if name == "strength":
            return replace(state, strength=float(value))
        return replace(state, layers=None if value == "all" else (int(first), int(last)))
    except ValueError as error:
        expected = "a number such as 0.5" if name == "strength" else "a range such as 8-20, or all"
        raise DirectionError(f"/{name} is followed by {value!r}, expected {expected}.") from error


def _save(text: str, said: list[Exchange]) -> str:
    from remove_refusals.files import write_jsonl

    if not text:
        raise DirectionError("The file is missing, expected a path; write /save talk.jsonl.")
    rows = []
    for exchange in said:
        state = {"layers": exchange.state.layers, "system_prompt": exchange.state.system_prompt}
        for side, answer in exchange.answers.items():
            strength = exchange.state.strength if side == "edited" else 0.0
            rows.append({"side": side, "strength": strength, **state, "prompt": exchange.prompt, "answer": answer})
    write_jsonl(Path(text).expanduser(), rows)
    return f"Saved {len(rows)} answers to {text}."


def _answers(
    talk: Talk, prompt: str, state: ChatState, said: list[Exchange], write: Callable[[str], None]
) -> dict[Side, str]:
    """Let one side or both answer; Ctrl-C ends that, and what was said by then stays."""
    from remove_refusals.directions import ablated
    from remove_refusals.models import render, stream

    loaded = talk.loaded
    system_prompt = None if loaded.chat.plain else state.system_prompt
    loaded = replace(loaded, chat=loaded.chat.model_copy(update={"system_prompt": system_prompt}))
    answers: dict[Side, str] = {}
    sides: tuple[Side, ...] = ("base", "edited") if state.sides == "compare" else (state.sides,)
    for side in sides:
        if state.sides == "compare":
            write(f"[{side}] ")
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if side == "edited" and talk.make is not None:
            context = ablated(loaded, talk.make(state.strength, state.layers))
        pieces: list[str] = []
        try:
            token_ids = render(loaded, [prompt], [one.seen_by(side) for one in said])[0]
            with context, contextlib.closing(stream(loaded, token_ids, max_new_tokens=talk.max_new_tokens)) as found:
                for piece in found:
                    pieces.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            write(" [stopped]\n")
            return answers | ({side: "".join(pieces)} if pieces else {})
        answers[side] = "".join(pieces)
        write("\n")
    return answers


_LOADING = (
    *("loading.device", "loading.dtype", "loading.load_in_4bit", "loading.load_in_8bit"),
    *("loading.trust_remote_code", "loading.revision"),
)
_PARTS = ("edit.strength", "edit.layers", "edit.sites", "edit.silence_experts")


@takes(*_PARTS, *_LOADING, "chat", "measure.max_new_tokens", max_new_tokens=512)
def chat(
    model: ModelArgument,
    settings: "RunSettings",
    direction: DirectionFile = None,
    run: RunDirectory = None,
    candidate: CandidateName = None,
    no_ablation: Annotated[bool, Option("--no-ablation", help="Talk to the model as it is.")] = False,
    compare: Annotated[bool, Option("--compare", help="Both answers, one after the other.")] = False,
) -> None:
    """Talk to a model with the direction taken out as it runs; /help there says what can be changed."""
    from remove_refusals.cli import printing
    from remove_refusals.models import edited_before, load_model

    if no_ablation and compare:
        raise DirectionError("Both --no-ablation and --compare are given, expected one of them; leave one out.")
    if direction is None and run is None and not (no_ablation or settings.edit.silence_experts):
        raise DirectionError(
            "No direction is given, expected --direction FILE; make one with `remove-refusals direction`, or pass "
            "--run DIR or --no-ablation."
        )
    edit = settings.edit
    given = None if no_ablation else given_intervention(direction, run, candidate) or ()
    loaded = load_model(model, settings.loading, settings.chat)
    make = None if given is None else _maker(given, edit, loaded)
    if make is not None:
        make(edit.strength, edit.layers)
    sides: Sides = "compare" if compare else "base" if no_ablation else "edited"
    state = ChatState(edit.strength, edit.layers, sides, settings.chat.system_prompt)
    named = [str(run or direction or "the experts that are named"), candidate]
    source = "none" if given is None else ", ".join(filter(None, named))
    before = edited_before(model, settings.loading.revision)
    about = "\n".join(filter(None, [f"Model: {model}. Taken out: {source}.", before and f"Note: {before}"]))
    talk = Talk(loaded, make, about, settings.measure.max_new_tokens)
    if not current().quiet:
        printing.say(about, talk.says(state), "/help lists the commands, /quit ends the talk.", "")
    write = printing.Wrapped() if sys.stdout.isatty() else printing.write
    converse(talk, printing.typed_lines(), write, state)


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
    from remove_refusals.models import edited_before, load_model
    from remove_refusals.report import SelectionRecord
    from remove_refusals.search import load_candidates

    given = given_intervention(direction, run)
    if given is None:
        raise DirectionError("Neither --direction nor --run is given, expected one of them; pass one.")
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
    if (before := edited_before(model, settings.loading.revision)) is not None:
        printing.say(f"Note: {before}")
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


def _maker(given: "tuple[Direction, ...] | Intervention", edit: "EditSettings", loaded: "LoadedModel") -> "Make":
    """Give what makes the intervention of a strength and a range of layers."""
    from remove_refusals.directions import as_intervention
    from remove_refusals.settings import EditSettings

    as_intervention(given, loaded, EditSettings(silence_experts=edit.silence_experts))
    return lambda strength, layers: as_intervention(
        given, loaded, edit.model_copy(update={"strength": strength, "layers": layers})
    )


@takes(
    *("direction.harmful.column", "direction.harmful.split"),
    *_PARTS,
    *_LOADING,
    *("loading.device_map", "loading.offload", "loading.max_memory", "loading.tp", "loading.replicas"),
    *("chat", "batch_size", "measure.max_new_tokens"),
)
def generate(
    model: ModelArgument,
    settings: "RunSettings",
    prompt: Annotated[list[str] | None, Argument(help="A prompt, in quotes; or several.")] = None,
    prompts: Annotated[str | None, Option(help="A file or data set of prompts instead.")] = None,
    output: Annotated[Path | None, to("A JSON Lines file; answers to prompts typed here are printed.")] = None,
    direction: DirectionFile = None,
    run: RunDirectory = None,
    candidate: CandidateName = None,
    force: Force = False,
) -> None:
    """Answer prompts in batches, greedily; without --direction or --run the model answers as it is."""
    from remove_refusals.cli import printing
    from remove_refusals.files import check_target, write_jsonl
    from remove_refusals.prompts import as_prompts, prompts_from
    from remove_refusals.settings import PromptSource

    if bool(prompt) == (prompts is not None) or (prompts is not None and output is None):
        raise PromptError(
            "Expected prompts in quotes behind the model, or --prompts FILE and --output FILE for their answers."
        )
    if output is not None:
        check_target(output, force=force, directory=False)
    table = settings.direction.harmful
    source = PromptSource(source=prompts, column=table.column, split=table.split)
    prompt_set = as_prompts("typed", prompt) if prompt else prompts_from(source, "prompts", "")
    with printing.progress(printing.LOADING, printing.ANSWERING) as progress:
        from remove_refusals.directions import ablated, as_intervention
        from remove_refusals.models import check_not_source, edited_before, load_model, render
        from remove_refusals.models import generate as answer_all

        if output is not None:
            check_not_source(output, model, run, revision=settings.loading.revision)
        given = given_intervention(direction, run, candidate)
        loaded = load_model(model, settings.loading, settings.chat, settings.batch_size, progress=progress)
        changed = given is not None or settings.edit.silence_experts
        intervention = as_intervention(given or (), loaded, settings.edit) if changed else None
        token_ids, n_tokens = render(loaded, prompt_set.prompts), settings.measure.max_new_tokens
        stage = progress.stage("answers", len(prompt_set))
        with ablated(loaded, intervention) if intervention else contextlib.nullcontext():
            answers = answer_all(loaded, token_ids, max_new_tokens=n_tokens, progress=stage)
    rows = [
        {
            "prompt": prompt,
            "answer": answer.text,
            "n_tokens": len(answer.token_ids),
            "finished": answer.finished,
            "model": "base" if intervention is None else "edited",
        }
        for prompt, answer in zip(prompt_set.prompts, answers, strict=True)
    ]
    if output is None:
        title = "> {prompt}\n{answer}" if len(rows) > 1 else "{answer}"
        printing.finish({"answers": rows}, show=lambda: printing.say(*(title.format(**row) for row in rows)))
        return
    write_jsonl(output, rows, force=force)
    before = edited_before(model, settings.loading.revision) if intervention is not None else None
    said, notes = f"Saved {len(rows)} answers to {output}.", [f"Note: {before}"] if before else []
    printing.finish({"output": str(output), "answers": len(rows)}, said, lambda: printing.say(*notes))
