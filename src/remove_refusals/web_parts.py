"""Pieces of the web page that need no server: strips of tokens, the front as a drawing, the state as a command line."""

import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remove_refusals.types import SITE_KINDS, SiteKind

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 44


@dataclass(frozen=True)
class Source:
    """What the page was started with, as a command line names it.

    Attributes:
        model: The model.
        option: `--direction` or `--run`.
        path: The direction's file, or the run's directory.
    """

    model: str
    option: str
    path: str


@dataclass(frozen=True)
class Controls:
    """What is set on the page.

    Attributes:
        strength: How much of what the intervention takes out is taken out.
        layers: The first and the last layer.
        kinds: The kinds of site.
        candidate: The candidate of the run's search; None for what was picked, or for a direction.
    """

    strength: float
    layers: tuple[int, int]
    kinds: tuple[SiteKind, ...]
    candidate: str | None = None


def command_line(source: Source, controls: Controls, n_layers: int) -> str:
    """Write the command that talks to the model in the same state.

    Args:
        source: What the page was started with.
        controls: What is set.
        n_layers: The model's number of layers.

    Returns:
        One line for a shell; what is at its default is left out.
    """
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
    """Draw tokens with their projection on the direction as their background.

    Args:
        tokens: The tokens' texts.
        values: A projection for each.
        largest: The projection that gets the full colour.

    Returns:
        HTML; every text is escaped, and each token says its number to whoever points at it.
    """
    pieces = []
    for token, value in zip(tokens, values, strict=True):
        share = max(-1.0, min(1.0, value / largest if largest > 0 else 0.0))
        colour = "var(--towards)" if share > 0 else "var(--away)"
        shown = html.escape(token).replace("\n", "⏎\n") or "∅"
        style = f"background: color-mix(in srgb, {colour} {abs(share):.0%}, transparent)"
        pieces.append(f'<span title="{value:+.3f}" style="{style}">{shown}</span>')
    return f'<div class="strip" aria-label="Projection of each token on the direction">{"".join(pieces)}</div>'


def legend() -> str:
    """Say in HTML what the colours of the strips mean."""
    return (
        '<div class="legend">Each token by its projection on the direction, at about 60% of the depth: '
        '<span class="towards">towards it</span> <span class="away">away from it</span></div>'
    )


def front_drawing(candidates: Sequence[Mapping[str, Any]], kept: Sequence[str], chosen: str | None) -> str:
    """Draw the candidates of a search by damage and refusal; those that can be tried are buttons.

    Args:
        candidates: The candidates of `selection.json`.
        kept: The names of those that can be tried.
        chosen: The name of the one that is set.

    Returns:
        An SVG drawing.
    """
    largest = max((float(candidate["damage"]) for candidate in candidates), default=0.0) or 1.0

    def at(candidate: Mapping[str, Any]) -> tuple[float, float]:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * float(candidate["damage"]) / largest
        return across, _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * float(candidate["refusal"])

    marks = []
    for candidate in candidates:
        across, down = at(candidate)
        name = html.escape(str(candidate["name"]), quote=True)
        said = f"{name}: {float(candidate['refusal']):.1%} refused, damage {float(candidate['damage']):.3g}"
        if candidate["name"] in kept:
            ring = "chosen" if candidate["name"] == chosen else "kept"
            marks.append(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="8" data-candidate="{name}" role="button" tabindex="0" '
                f'class="{ring}"><title>{said}: try it</title></circle>'
            )
        else:
            marks.append(
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" class="other"><title>{said}</title></circle>'
            )
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return (
        f'<svg class="front" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" '
        'aria-label="Candidates by damage and refusal">'
        f'<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" class="axis"/>'
        f'<text x="{right}" y="{bottom + 28}" text-anchor="end">damage, up to {largest:.3g} nats</text>'
        f'<text x="{_MARGIN}" y="{_MARGIN - 16}">refused, 0 to 100%</text>{"".join(marks)}</svg>'
    )
