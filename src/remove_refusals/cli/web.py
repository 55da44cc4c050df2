"""The web page itself: what it shows, what is called when something is pressed, and its server."""

import html
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from remove_refusals.baking import bake, bake_lora, base_of
from remove_refusals.directions import ablated, intervene, middle_direction, project_tokens
from remove_refusals.errors import ModelError, OutputError, RemoveRefusalsError, require_package
from remove_refusals.measure import Label, PhraseJudge
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, render, stream
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import embedded_prompts
from remove_refusals.report import CandidateRecord, front_scales, tick
from remove_refusals.settings import SITE_KINDS, SiteKind
from remove_refusals.types import Intervention

LOOPBACK = "127.0.0.1"
_LOCAL = (LOOPBACK, "localhost", "::1")

Messages = list[dict[str, str]]
Talks = tuple[Messages, Messages]
"""What was said to and by the base, and the same of the edited model."""


@dataclass(frozen=True)
class Source:
    """What the page was started with, as a command line names it; `option` is `--direction` or `--run`."""

    model: str
    option: str
    path: str


@dataclass(frozen=True)
class Controls:
    """What is set on the page; the candidate is one of the run's search, None what was picked or a direction."""

    strength: float
    layers: tuple[int, int]
    kinds: tuple[SiteKind, ...]
    candidate: str | None = None
    temperature: float = 0.0
    system_prompt: str | None = None


@dataclass(frozen=True)
class Shown:
    """What is shown while both answer, base first: the talks, a note on each answer, and their tokens as strips."""

    talks: Talks
    notes: tuple[str, ...] = ("", "")
    strips: tuple[str, ...] = ("", "")


@dataclass(frozen=True, eq=False)
class Page:
    """What a page shows: what is taken out at strength 1, and the candidates of a search.

    Nothing else may run the model meanwhile. Candidates that can be chosen are those of `tried`, by name; the run has
    `picked` one of them.
    """

    loaded: LoadedModel
    intervention: Intervention
    source: Source
    candidates: Sequence[CandidateRecord] = ()
    tried: Mapping[str, Intervention] = field(default_factory=dict)
    picked: str | None = None
    max_new_tokens: int = 256

    @property
    def n_layers(self) -> int:
        """The model's number of layers."""
        return map_model(self.loaded.model).n_layers

    def made(self, controls: Controls) -> Intervention:
        """Give what the controls take out."""
        base = self.tried.get(controls.candidate or "", self.intervention)
        return intervene(base, self.n_layers, strength=controls.strength, layers=controls.layers, kinds=controls.kinds)

    def answers(self, prompt: str, before: Talks, controls: Controls) -> Iterator[Shown]:
        """Let the base and then the edited model answer, piece by piece, and in the end measure their tokens."""
        chat = self.loaded.chat
        system_prompt = None if chat.plain else controls.system_prompt
        loaded = replace(self.loaded, chat=chat.model_copy(update={"system_prompt": system_prompt}))
        intervention, shown = self.made(controls), Shown(before)
        for side, context in enumerate(_contexts(loaded, intervention)):
            token_ids, said, begun = _rendered(loaded, prompt, before[side]), "", time.perf_counter()
            most, temperature = self.max_new_tokens, controls.temperature
            with context:
                for piece in stream(loaded, token_ids, max_new_tokens=most, temperature=temperature):
                    said += piece
                    shown = replace(shown, talks=_with_answer(shown.talks, before, side, prompt, said))
                    yield shown
            seconds = time.perf_counter() - begun
            notes = [*shown.notes]
            notes[side] = self._note(prompt, said, seconds)
            talks = _with_answer(shown.talks, before, side, prompt, said)
            shown = replace(shown, talks=talks, notes=tuple(notes))
            yield shown
        yield replace(shown, strips=self._strips(loaded, prompt, before, shown.talks, intervention))

    def _note(self, prompt: str, answer: str, seconds: float) -> str:
        """Say of an answer what it is and how fast it came."""
        label = PhraseJudge().judge([prompt], [answer])[0].label
        n_tokens = len(self.loaded.tokenizer(answer, add_special_tokens=False)["input_ids"])
        said = f"{n_tokens} tokens, {n_tokens / seconds:.0f} a second"
        return f'<span class="label {label}">{_LABELS[label]}</span> {said}'

    def _strips(
        self, loaded: LoadedModel, prompt: str, before: Talks, after: Talks, intervention: Intervention
    ) -> tuple[str, str]:
        """Measure both answers' tokens; both strips have one scale."""
        direction, layer = middle_direction(self.intervention, self.n_layers)
        tokenizer, found = loaded.tokenizer, []
        for side, context in enumerate(_contexts(loaded, intervention)):
            token_ids = _rendered(loaded, prompt, before[side])
            answer = tokenizer(after[side][-1]["content"], add_special_tokens=False)["input_ids"]
            values = project_tokens(loaded, [*token_ids, *answer], direction, layer, context=context)
            found.append(([tokenizer.decode([token]) for token in answer], values[len(token_ids) :]))
        largest = max((abs(value) for _, values in found for value in values), default=0.0)
        first, second = (scale(largest) + strip(tokens, values, largest) for tokens, values in found)
        return first, second

    def save(self, controls: Controls, output: str, *, as_lora: bool, progress: Progress = SILENT) -> str:
        """Write what the controls take out to a new directory; give a sentence of what was made."""
        if not output.strip():
            raise OutputError("The directory is missing, expected a path; type the name of a new directory.")
        target, intervention = Path(output.strip()).expanduser(), self.made(controls)
        if target.exists():
            raise OutputError(f"The directory {target} exists already, expected a new one; type another name.")
        base = base_of(self.loaded)
        if as_lora:
            plan, _ = bake_lora(base, intervention, target)
            return f"Saved a LoRA of {len(plan.entries)} tensors to `{target}`."
        baked = bake(base, intervention, target, progress=progress)
        checked = "" if baked.certificate is None else "; the files hold the edit as planned"
        return f"Saved the edited model to `{target}`: {len(baked.plan.entries)} tensors edited{checked}."


_LABELS = {
    Label.REFUSAL: "refused",
    Label.MORALISING: "only lectured",
    Label.COMPLIANCE: "answered",
    Label.DEFLECTION: "answered something else",
    Label.DEGENERATE: "broken",
    Label.UNJUDGED: "not judged: no phrases for its language",
}


def _contexts(
    loaded: LoadedModel, intervention: Intervention
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), ablated(loaded, intervention)


def _rendered(loaded: LoadedModel, prompt: str, history: Messages) -> list[int]:
    turns = [(one["content"], other["content"]) for one, other in zip(history[::2], history[1::2], strict=True)]
    return render(loaded, [prompt], turns)[0]


def _with_answer(talks: Talks, before: Talks, side: int, prompt: str, said: str) -> Talks:
    """Put a message and its answer so far behind what one of the models said before."""
    now = [*before[side], {"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    return (now, talks[1]) if side == 0 else (talks[0], now)


def build_page(page: Page, *, may_save: bool = True) -> Any:
    """Build the page: Gradio's `Blocks`, to be launched; who may not save sees no place for it."""
    # Nothing is sent anywhere: not Gradio's own statistics either.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gradio = require_package("gradio", "ui", "the command ui", ModelError)
    with gradio.Blocks(title="remove-refusals", analytics_enabled=False, fill_width=True) as blocks:
        gradio.Markdown(
            f"**{page.source.model}** answers twice: as it is (base), and with its refusal direction taken out as it "
            "runs (edited). Nothing leaves this machine.",
            elem_id="lead",
        )
        prompt = gradio.Textbox(
            placeholder="A message to both", show_label=False, container=False, render=False, elem_id="message"
        )
        gradio.Examples(
            _examples(), prompt, label="Click one to try it", examples_per_page=_MOST_EXAMPLES, elem_id="examples"
        )
        with gradio.Row(elem_id="stage"):
            with gradio.Column(scale=3, min_width=320), gradio.Row():
                sides = [_add_side(gradio, name) for name in ("Base", "Edited")]
            with gradio.Column(scale=1, min_width=240):
                controls = _add_controls(gradio, page)
        with gradio.Column(elem_id="ask"):
            prompt.render()
            with gradio.Row(elem_id="buttons"):
                send = gradio.Button("Send", variant="primary", size="sm", min_width=60, elem_id="send")
                names = ("Stop", "Regenerate", "Clear", "Export")
                stop, again, clear, export = (
                    gradio.Button(name, size="sm", min_width=60, elem_id=name.lower()) for name in names
                )
        if len(page.candidates) > 1:
            _add_front(gradio, page, controls[4])
        if may_save:
            _add_saving(gradio, page, controls)
        command = gradio.Textbox(
            label="The same on the command line", interactive=False, buttons=["copy"], elem_id="command"
        )
        rows = gradio.State([])
        shown = [prompt, *(part for parts in zip(*sides, strict=True) for part in parts), rows]
        given = [prompt, sides[0][0], sides[1][0], rows, *controls]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
        running = [event(partial(_ask, page), given, shown, **one_at_a_time) for event in (send.click, prompt.submit)]
        running.append(again.click(partial(_ask_again, page), given, shown, **one_at_a_time))
        stop.click(None, None, None, cancels=running)
        for cleared in (clear.click, sides[0][0].clear, sides[1][0].clear):
            cleared(lambda: ("", [], [], "", "", "", "", []), None, shown)
        text = gradio.Textbox(visible="hidden")
        export.click(_as_jsonl, rows, text).then(None, text, None, js=_data("web_export.js"))
        for part in controls:
            part.change(partial(_say, page), controls, command, show_progress="hidden")
        blocks.load(partial(_say, page), controls, command)
    return blocks


_MOST_EXAMPLES = 6


def _examples() -> list[list[str]]:
    """Give short prompts of the embedded sets, in turn: harmful, harmless but alarming, harmless."""
    sets = (embedded_prompts(name).prompts for name in ("harmful_test", "harmless_alarming", "harmless_test"))
    short = [[prompt for prompt in prompts if len(prompt) < 50] for prompts in sets]
    return [[prompt] for turn in zip(*short, strict=False) for prompt in turn][:_MOST_EXAMPLES]


def _add_side(gradio: Any, name: str) -> tuple[Any, Any, Any]:
    """Add what one of the models says, the note on its answer, and the strip of it."""
    with gradio.Column(min_width=300):
        waiting = f"The {name.lower()} model answers here."
        talk = gradio.Chatbot(
            label=name, height=330, buttons=["copy"], feedback_options=None, placeholder=waiting, elem_classes="talk"
        )
        return talk, gradio.HTML(elem_classes="note", padding=False), gradio.HTML(elem_classes="strips", padding=False)


def _add_controls(gradio: Any, page: Page) -> list[Any]:
    """Add what can be set, from the next answer on, in the order in which `_controls` reads it."""
    last, chat = page.n_layers - 1, page.loaded.chat
    strength = gradio.Slider(
        0, 2, 1, step=0.05, label="Strength", info="0 takes out nothing, 1 what was chosen", elem_id="strength"
    )
    if len(page.tried) > 1:
        candidate = gradio.Dropdown(list(page.tried), value=page.picked, label="Candidate", elem_id="candidate")
    else:
        candidate = gradio.State(page.picked if page.picked in page.tried else None)
    temperature = gradio.Slider(
        0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest token", elem_id="temperature"
    )
    system_prompt = gradio.Textbox(
        chat.system_prompt or "", label="System message", lines=2, visible=not chat.plain, elem_id="system"
    )
    with gradio.Accordion("Layers and sites", open=False):
        first = gradio.Slider(0, last, 0, step=1, label="First layer")
        end = gradio.Slider(0, last, last, step=1, label="Last layer")
        kinds = gradio.CheckboxGroup(list(SITE_KINDS), value=list(SITE_KINDS), label="Sites")
    return [strength, first, end, kinds, candidate, temperature, system_prompt]


def _data(name: str) -> str:
    return (resources.files("remove_refusals") / "data" / name).read_text(encoding="utf-8")


def _add_front(gradio: Any, page: Page, candidate: Any) -> None:
    """Add the drawing of the candidates; a click on one chooses it."""
    drawn = partial(front_drawing, page.candidates, tuple(page.tried))
    with gradio.Accordion("Candidates of the search", elem_id="candidates"):
        drawing = gradio.HTML(drawn(page.picked), js_on_load=_data("web.js"), elem_id="front")

    def choose(event: Any) -> str:
        return str(event._data.get("candidate", ""))

    # Gradio hands the event to whatever is annotated with its type, which is not known before the package is.
    choose.__annotations__["event"] = gradio.EventData
    if len(page.tried) > 1:
        drawing.click(choose, None, candidate)
        candidate.change(drawn, candidate, drawing, show_progress="hidden")


def _add_saving(gradio: Any, page: Page, controls: list[Any]) -> None:
    """Add the place to save what is set."""
    kinds = ("edited model", "LoRA adapter")
    with gradio.Accordion("Save this setting", open=False, elem_id="saving"):
        with gradio.Row():
            kind = gradio.Radio(kinds, value=kinds[0], label="As")
            name = f"{Path(page.source.model).name}-edited"
            place = gradio.Textbox(
                name, label="New directory", info="On this machine, from where the command was started"
            )
            save = gradio.Button("Save", elem_id="save")
        done = gradio.Markdown(elem_id="saved", min_height=40)

    def saved(kind: str, place: str, *values: Any, progress: Any = gradio.Progress()) -> str:  # noqa: B008
        progress(0, desc="resolving the edit")
        told = Progress(lambda stage, n, total: progress((n, total), desc=stage))
        with _told(gradio):
            return page.save(_controls(values), place, as_lora=kind == kinds[1], progress=told)

    save.click(saved, [kind, place, *controls], done, concurrency_id="model", concurrency_limit=1)


@contextmanager
def _told(gradio: Any) -> Iterator[None]:
    """Show what is wrong as the sentence that it is."""
    try:
        yield
    except RemoveRefusalsError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _controls(values: Sequence[Any]) -> Controls:
    low, high = sorted((int(values[1]), int(values[2])))
    chosen = tuple(kind for kind in SITE_KINDS if kind in values[3])
    return Controls(float(values[0]), (low, high), chosen, values[4], float(values[5]), values[6].strip() or None)


def _say(page: Page, *values: Any) -> str:
    now = _controls(values)
    other = None if now.candidate == page.picked else now.candidate
    system_prompt = None if now.system_prompt == page.loaded.chat.system_prompt else now.system_prompt
    return command_line(page.source, replace(now, candidate=other, system_prompt=system_prompt), page.n_layers)


Rows = list[dict[str, Any]]
"""The answers that were given, as they are exported."""


def _ask(
    page: Page, text: str, base: Messages, edited: Messages, rows: Rows, *values: Any
) -> Iterator[tuple[Any, ...]]:
    import gradio

    before, controls = (_messages(base), _messages(edited)), _controls(values)
    if not text.strip():
        yield (text, *before, *(gradio.skip() for _ in range(4)), rows)
        return
    with _told(gradio):
        for shown in page.answers(text, before, controls):
            said = zip(("base", "edited"), before, shown.talks, strict=True)
            new = [_row(side, controls, now) for side, then, now in said if len(now) > len(then)]
            yield ("", *shown.talks, *shown.notes, *shown.strips, [*rows, *new])


def _ask_again(
    page: Page, text: str, base: Messages, edited: Messages, rows: Rows, *values: Any
) -> Iterator[tuple[Any, ...]]:
    """Answer the last message anew; what is being typed stays."""
    talks = [_messages(base), _messages(edited)]
    last = max(talks, key=len)
    if not last:
        yield (text, *talks, "", "", "", "", rows)
        return
    # An answer that was stopped may be of one side alone.
    talks = [talk[:-2] if len(talk) == len(last) else talk for talk in talks]
    kept = len(talks[0]) // 2 + len(talks[1]) // 2
    for _, *shown in _ask(page, last[-2]["content"], *talks, rows[:kept], *values):
        yield (text, *shown)


def _row(side: str, controls: Controls, talk: Messages) -> dict[str, Any]:
    how = asdict(controls if side == "edited" else replace(controls, strength=0.0))
    return {"side": side} | how | {"prompt": talk[-2]["content"], "answer": talk[-1]["content"]}


def _as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _messages(talk: Messages) -> Messages:
    return [{"role": one["role"], "content": _text(one["content"])} for one in talk]


def serve(page: Page, *, host: str = LOOPBACK, port: int | None = None) -> Any:
    """Serve the page beside what goes on, to this machine alone by default, on the first free port from 7860 on."""
    # Files are written for whoever sits at this machine, and for nobody else.
    blocks = build_page(page, may_save=host in _LOCAL)
    import gradio

    # Fonts by name: those of Gradio's own themes would be asked of a server far away.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400"
    )
    private: dict[str, Any] = {"share": False, "enable_monitoring": False, "ssr_mode": False, "footer_links": []}
    try:
        blocks.queue().launch(
            server_name=host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css=_data("web.css"),
            **private,
        )
    except OSError as error:
        raise ModelError(
            f"The page did not start on {host}:{port} within seconds, expected a free port and a machine with time for "
            "it; try again, or pass another --port."
        ) from error
    return blocks


def _text(content: Any) -> str:
    """Give a message's text, which the page hands back as pieces."""
    if isinstance(content, str):
        return content
    return "".join(str(piece.get("text", "")) if isinstance(piece, dict) else str(piece) for piece in content)


def command_line(source: Source, controls: Controls, n_layers: int) -> str:
    """Write the command that talks to the model in the same state; what is at its default is left out."""
    words = ["remove-refusals", "chat", source.model, source.option, source.path, "--compare"]
    if controls.candidate is not None:
        words += ["--candidate", controls.candidate]
    if controls.strength != 1:
        words += ["--strength", f"{controls.strength:g}"]
    if controls.layers != (0, n_layers - 1):
        words += ["--layers", f"{controls.layers[0]}-{controls.layers[1]}"]
    if set(controls.kinds) != set(SITE_KINDS):
        words += ["--sites", ",".join(kind for kind in SITE_KINDS if kind in controls.kinds)]
    if controls.system_prompt is not None:
        words += ["--system-prompt", controls.system_prompt]
    return shlex.join(words)


def strip(tokens: Sequence[str], values: Sequence[float], largest: float) -> str:
    """Draw tokens as HTML, escaped, with their projection as their background; `largest` gets the full colour."""
    pieces = []
    for token, value in zip(tokens, values, strict=True):
        share = max(-1.0, min(1.0, value / largest if largest > 0 else 0.0))
        colour = "var(--towards)" if share > 0 else "var(--away)"
        shown = html.escape(token).replace("\n", "⏎\n") or "∅"
        style = f"background: color-mix(in srgb, {colour} {abs(share):.0%}, transparent)"
        pieces.append(f'<span title="{value:+.3f}" style="{style}">{shown}</span>')
    return f'<div class="strip" aria-label="Projection of each token on the direction">{"".join(pieces)}</div>'


def scale(largest: float) -> str:
    """Draw what the colours of a strip mean."""
    return (
        '<div class="scale"><span>away</span>'
        f'<b>{-largest:.2f}</b><i aria-hidden="true"></i><b>+{largest:.2f}</b><span>towards the direction</span></div>'
    )


_HEIGHT, _ACROSS = 220, 7.0
"""The front's pixels down, and so many percent of its width lie between points that do not touch, on a phone too."""


def front_drawing(candidates: Sequence[CandidateRecord], kept: Sequence[str], chosen: str | None) -> str:
    """Draw the candidates of a search by damage and refusal; those that can be tried are numbered buttons, and listed.

    Places across are percentages. Points that would lie on others are put above or below, with a line to their place.
    """
    x, y = front_scales(candidates)
    grid = [f'<text x="{100 * x.share(at):.2f}%" y="{_HEIGHT + 18}">{tick(at)}</text>' for at in x.ticks(7)]
    for at in y.ticks(6):
        down = _HEIGHT * (1 - y.share(at))
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{down:.1f}" y2="{down:.1f}"/>')
        grid.append(f'<text class="up" x="-6" y="{down + 4:.1f}">{100 * at:g}%</text>')
    marks: list[str] = []
    listed: list[str] = []
    placed: list[tuple[float, float, int]] = []
    # Those with numbers come first, so that they keep their places.
    for one in sorted(candidates, key=lambda one: one.name not in kept):
        radius = 9 if one.name in kept else 3
        across, true = 100 * x.share(one.damage), _HEIGHT * (1 - y.share(one.refusal))
        down = _free(across, true, radius, placed)
        placed.append((across, down, radius))
        place = f'cx="{across:.2f}%" cy="{down:.1f}" r="{radius}"'
        name = html.escape(one.name, quote=True)
        said = f"{name}: {one.refusal:.1%} refused, damage {one.damage:.3g}"
        if one.confirmation is not None:
            said += f"; by generation {one.confirmation.refusals.count} of {one.confirmation.refusals.n} refused"
        if abs(down - true) > 1:
            marks.append(f'<line class="moved" x1="{across:.2f}%" x2="{across:.2f}%" y1="{true:.1f}" y2="{down:.1f}"/>')
        if one.name not in kept:
            marks.append(f'<circle class="other" {place}><title>{said}</title></circle>')
            continue
        state, number = "chosen" if one.name == chosen else "kept", len(listed) + 1
        button = f'class="{state}" data-candidate="{name}" role="button" tabindex="0"'
        marks.append(
            f"<g {button}><circle {place}/>"
            f'<text x="{across:.2f}%" y="{down + 4:.1f}">{number}</text><title>{said}: try it</title></g>'
        )
        listed.append(f'<li class="{state}"><span data-candidate="{name}">{said}</span></li>')
    return (
        '<div class="front"><p>refused, on the prompts of the search</p>'
        f'<svg height="{_HEIGHT}" role="group" aria-label="Candidates by damage and refusal">{"".join(grid)}'
        f'<path class="axis" d="M0 0V{_HEIGHT}"/><line class="axis" x1="0" x2="100%" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
        f'{"".join(marks)}</svg><p class="below">damage: KL in nats</p><ol>{"".join(listed)}</ol></div>'
    )


def _free(across: float, down: float, radius: int, placed: Sequence[tuple[float, float, int]]) -> float:
    """Find the place down nearest to the true one where a point lies on no other; the true one if all is full."""
    near = [(at, size) for beside, at, size in placed if abs(beside - across) < _ACROSS]
    for step in range(2 * _HEIGHT):
        moved = down + (step + 1) // 2 * (1 if step % 2 else -1)
        if 0 <= moved <= _HEIGHT and all(abs(moved - at) >= radius + size + 1 for at, size in near):
            return moved
    return down
