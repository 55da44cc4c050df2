"""The web page itself: what it shows, what is called when something is pressed, and its server."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from typing import Any

from remove_refusals.errors import ModelError
from remove_refusals.types import SITE_KINDS
from remove_refusals.web import Messages, Page
from remove_refusals.web_parts import Controls, command_line, front_drawing, legend

LOOPBACK = "127.0.0.1"

_CLICKED = """
element.addEventListener('click', event => {
  const point = event.target.closest('[data-candidate]');
  if (point) trigger('click', {candidate: point.dataset.candidate});
});
element.addEventListener('keydown', event => {
  const point = event.target.closest('[data-candidate]');
  if (point && (event.key === 'Enter' || event.key === ' ')) trigger('click', {candidate: point.dataset.candidate});
});
"""


def build_page(page: Page) -> Any:
    """Build the page.

    Args:
        page: What it shows.

    Returns:
        Gradio's `Blocks`, to be launched.

    Raises:
        ModelError: If Gradio is not installed.
    """
    # Nothing is sent anywhere: not Gradio's own statistics either.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ModelError(
            "The command ui found no package gradio, expected it to be installed; run "
            "`pip install 'remove-refusals[ui]'`."
        ) from error
    last = page.model_map.n_layers - 1
    with gradio.Blocks(title="remove-refusals", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {page.source.model}: as it is, and with the direction taken out")
        with gradio.Row():
            sides = []
            for name in ("Original", "Direction taken out"):
                with gradio.Column(min_width=320):
                    talk = gradio.Chatbot(label=name, height=360, buttons=["copy"], feedback_options=None)
                    sides.append((talk, gradio.HTML(elem_classes="strips")))
        gradio.HTML(legend())
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


def _add_front(gradio: Any, page: Page, candidate: Any) -> None:
    """Add the drawing of the candidates; a click on one sets `candidate`."""
    kept = tuple(page.tried)
    drawing = gradio.HTML(front_drawing(page.candidates, kept, page.picked), js_on_load=_CLICKED, elem_id="front")
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
    return command_line(page.source, replace(now, candidate=other), page.model_map.n_layers)


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


def serve(page: Page, *, host: str = LOOPBACK, port: int | None = None, wait: bool = True) -> Any:
    """Serve the page until Ctrl-C.

    Args:
        page: What it shows.
        host: The address to listen on; by default this machine alone can reach it.
        port: The port; by default the first free one from 7860 on.
        wait: Whether to wait for Ctrl-C.

    Returns:
        Gradio's `Blocks`, served.

    Raises:
        ModelError: If Gradio is not installed.
    """
    blocks = build_page(page)
    import gradio

    style = (resources.files("remove_refusals") / "data" / "web.css").read_text(encoding="utf-8")
    # Fonts by name: those of Gradio's own themes would be asked of a server far away.
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks.queue().launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
        footer_links=[],
        theme=theme,
        css=style,
        enable_monitoring=False,
        ssr_mode=False,
    )
    return blocks


def _text(content: Any) -> str:
    """Give a message's text, which the page hands back as pieces."""
    if isinstance(content, str):
        return content
    return "".join(str(piece.get("text", "")) if isinstance(piece, dict) else str(piece) for piece in content)
