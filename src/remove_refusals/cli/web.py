"""The web page itself: what it shows, what is called when something is pressed, and its server."""

import html
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from typing import Any

from remove_refusals.directions import ablated, intervene, middle_direction, project_tokens
from remove_refusals.errors import ModelError, require_package
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, render, stream
from remove_refusals.report import CandidateRecord
from remove_refusals.settings import SITE_KINDS, SiteKind
from remove_refusals.types import Intervention

LOOPBACK = "127.0.0.1"

Messages = list[dict[str, str]]


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

    def answers(
        self, prompt: str, original: Messages, edited: Messages, controls: Controls
    ) -> Iterator[tuple[Messages, Messages, str, str]]:
        """Let the original and then the edited model answer, piece by piece: both histories, in the end the strips."""
        intervention = self.made(controls)
        histories = [original, edited]
        for side, context in enumerate(self._contexts(intervention)):
            token_ids = self._rendered(prompt, histories[side])
            said, before = "", histories[side] + [{"role": "user", "content": prompt}]
            with context:
                for piece in stream(self.loaded, token_ids, max_new_tokens=self.max_new_tokens):
                    said += piece
                    histories[side] = [*before, {"role": "assistant", "content": said}]
                    yield histories[0], histories[1], "", ""
            histories[side] = [*before, {"role": "assistant", "content": said}]
        strips = self._strips(prompt, (original, edited), histories, intervention)
        yield histories[0], histories[1], *strips

    def _contexts(
        self, intervention: Intervention
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), ablated(self.loaded, intervention)

    def _rendered(self, prompt: str, history: Messages) -> list[int]:
        turns = [(one["content"], other["content"]) for one, other in zip(history[::2], history[1::2], strict=True)]
        return render(self.loaded, [prompt], turns)[0]

    def _strips(
        self, prompt: str, before: tuple[Messages, Messages], after: list[Messages], intervention: Intervention
    ) -> tuple[str, str]:
        """Measure both answers' tokens; both strips have one scale."""
        direction, layer = middle_direction(self.intervention, self.n_layers)
        tokenizer, found = self.loaded.tokenizer, []
        for side, context in enumerate(self._contexts(intervention)):
            token_ids = self._rendered(prompt, before[side])
            answer = tokenizer(after[side][-1]["content"], add_special_tokens=False)["input_ids"]
            values = project_tokens(self.loaded, [*token_ids, *answer], direction, layer, context=context)
            found.append(([tokenizer.decode([token]) for token in answer], values[len(token_ids) :]))
        largest = max((abs(value) for _, values in found for value in values), default=0.0)
        first, second = (strip(tokens, values, largest) for tokens, values in found)
        return first, second


def build_page(page: Page) -> Any:
    """Build the page: Gradio's `Blocks`, to be launched."""
    # Nothing is sent anywhere: not Gradio's own statistics either.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gradio = require_package("gradio", "ui", "the command ui", ModelError)
    last = page.n_layers - 1
    with gradio.Blocks(title="remove-refusals", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {page.source.model}: as it is, and with the direction taken out")
        with gradio.Row():
            sides = []
            for name in ("Original", "Direction taken out"):
                with gradio.Column(min_width=320):
                    talk = gradio.Chatbot(label=name, height=360, buttons=["copy"], feedback_options=None)
                    sides.append((talk, gradio.HTML(elem_classes="strips")))
        gradio.HTML(_LEGEND)
        prompt = gradio.Textbox(label="Message", placeholder="Ask both", autofocus=True, elem_id="message")
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", elem_id="send")
            stop = gradio.Button("Stop")
            clear = gradio.Button("Forget what was said")
        with gradio.Row():
            strength = gradio.Slider(0, 2, 1, step=0.05, label="Strength, from the next answer on", elem_id="strength")
            first = gradio.Slider(0, last, 0, step=1, label="First layer")
            end = gradio.Slider(0, last, last, step=1, label="Last layer")
            kinds = gradio.CheckboxGroup(list(SITE_KINDS), value=list(SITE_KINDS), label="Sites")
        candidate = gradio.State(page.picked if page.picked in page.tried else None)
        if page.candidates:
            _add_front(gradio, page, candidate)
        command = gradio.Textbox(
            label="The same on the command line", interactive=False, buttons=["copy"], elem_id="command"
        )
        controls = [strength, first, end, kinds, candidate]

        shown = [prompt, sides[0][0], sides[1][0], sides[0][1], sides[1][1]]
        given = [prompt, sides[0][0], sides[1][0], *controls]
        running = [
            event(partial(_ask, page), given, shown, concurrency_id="model", concurrency_limit=1)
            for event in (send.click, prompt.submit)
        ]
        stop.click(None, None, None, cancels=running)
        clear.click(lambda: ([], [], "", ""), None, shown[1:])
        for part in controls:
            part.change(partial(_say, page), controls, command, show_progress="hidden")
        blocks.load(partial(_say, page), controls, command)
    return blocks


def _data(name: str) -> str:
    return (resources.files("remove_refusals") / "data" / name).read_text(encoding="utf-8")


def _add_front(gradio: Any, page: Page, candidate: Any) -> None:
    """Add the drawing of the candidates; a click on one sets `candidate`."""
    kept = tuple(page.tried)
    drawing = gradio.HTML(
        front_drawing(page.candidates, kept, page.picked), js_on_load=_data("web.js"), elem_id="front"
    )
    trying = gradio.Markdown(f"Now: {page.picked}. Click a large point to try that candidate.", elem_id="trying")

    def choose(event: Any) -> tuple[str, str, str]:
        name = str(event._data.get("candidate", ""))
        return name, front_drawing(page.candidates, kept, name), f"Now: {name}."

    # Gradio hands the event to whatever is annotated with its type, which is not known before the package is.
    choose.__annotations__["event"] = gradio.EventData
    drawing.click(choose, None, [candidate, drawing, trying])


def _controls(values: Sequence[Any]) -> Controls:
    low, high = sorted((int(values[1]), int(values[2])))
    chosen = tuple(kind for kind in SITE_KINDS if kind in values[3])
    return Controls(float(values[0]), (low, high), chosen, values[4])


def _say(page: Page, *values: Any) -> str:
    now = _controls(values)
    other = None if now.candidate == page.picked else now.candidate
    return command_line(page.source, replace(now, candidate=other), page.n_layers)


def _ask(
    page: Page, text: str, original: Messages, edited: Messages, *values: Any
) -> Iterator[tuple[str, Messages, Messages, str, str]]:
    if not text.strip():
        yield text, original, edited, "", ""
        return
    first, second = (
        [{"role": one["role"], "content": _text(one["content"])} for one in part] for part in (original, edited)
    )
    for found in page.answers(text, first, second, _controls(values)):
        yield "", *found


def serve(page: Page, *, host: str = LOOPBACK, port: int | None = None) -> Any:
    """Serve the page beside what goes on, to this machine alone by default, on the first free port from 7860 on."""
    blocks = build_page(page)
    import gradio

    # Fonts by name: those of Gradio's own themes would be asked of a server far away.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
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


_LEGEND = (
    '<div class="legend">Each token by its projection on the direction, at about 60% of the depth: '
    '<span class="towards">towards it</span> <span class="away">away from it</span></div>'
)
_WIDTH, _HEIGHT, _MARGIN = 640, 240, 44


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


def front_drawing(candidates: Sequence[CandidateRecord], kept: Sequence[str], chosen: str | None) -> str:
    """Draw the candidates of a search by damage and refusal as SVG; those that can be tried are buttons."""
    largest = max((candidate.damage for candidate in candidates), default=0.0) or 1.0

    marks = []
    for candidate in candidates:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * candidate.damage / largest
        down = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * candidate.refusal
        name = html.escape(candidate.name, quote=True)
        said, shape = f"{name}: {candidate.refusal:.1%} refused, damage {candidate.damage:.3g}", 'r="3" class="other"'
        if candidate.name in kept:
            ring = "chosen" if candidate.name == chosen else "kept"
            shape = f'r="8" class="{ring}" data-candidate="{name}" role="button" tabindex="0"'
            said += ": try it"
        marks.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" {shape}><title>{said}</title></circle>')
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return (
        f'<svg class="front" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" '
        'aria-label="Candidates by damage and refusal">'
        f'<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" class="axis"/>'
        f'<text x="{right}" y="{bottom + 28}" text-anchor="end">damage, up to {largest:.3g} nats</text>'
        f'<text x="{_MARGIN}" y="{_MARGIN - 16}">refused, 0 to 100%</text>{"".join(marks)}</svg>'
    )
