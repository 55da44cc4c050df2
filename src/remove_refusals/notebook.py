"""What a notebook shows of a result: a table as HTML, and a plot by layer as SVG, in the colours of the page."""

from collections.abc import Iterable, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 200, 36, 34

_LINE = 'stroke="currentColor" stroke-opacity="{}"'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str, note: str = "") -> str:
    """Give an HTML table with a caption above and a note below."""

    def line(cells: Sequence[object], tag: str) -> str:
        style = 'style="text-align:left;white-space:nowrap"'
        return f"<tr>{''.join(f'<{tag} {style}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    below = f'<p style="max-width:60em;opacity:0.7"><small>{escape(note)}</small></p>' if note else ""
    body = "".join(line(row, "td") for row in rows)
    title = f'<caption style="text-align:left">{escape(caption)}</caption>'
    return f"<table>{title}<thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def plot(points: Sequence[tuple[int, float, float, float]], title: str, chance: float) -> str:
    """Draw shares up to 1 by layer, (layer, value, and the ends of its interval), with a line at what chance gives."""
    lowest = int(10 * min([chance, *(low for _, _, low, _ in points)])) / 10
    first, last = (end([layer for layer, *_ in points], default=0) for end in (min, max))

    def across(layer: float) -> float:
        return round(_LEFT + 8 + (_WIDTH - _LEFT - 16) * (layer - first) / max(1, last - first), 1)

    def down(value: float) -> float:
        return round(8 + (_HEIGHT - _BELOW - 8) * (1 - value) / (1 - lowest), 1)

    def text(x: float, y: float, said: str, anchor: str) -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="currentColor" font-size="11">{escape(said)}</text>'

    def line(x: float, y: float, to_x: float, to_y: float, opacity: float) -> str:
        return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" {_LINE.format(opacity)}/>'

    drawn = []
    for at in range(round(10 * lowest), 11):
        y = down(at / 10)
        drawn += [line(_LEFT, y, _WIDTH, y, 0.15), text(_LEFT - 6, y + 4, f"{at / 10:g}", "end")]
    for layer in range(first, last + 1, max(1, (last - first) // 8)):
        drawn.append(text(across(layer), _HEIGHT - 18, str(layer), "middle"))
    drawn += [line(_LEFT, down(chance), _WIDTH, down(chance), 0.6), text(_WIDTH, down(chance) - 4, "chance", "end")]
    drawn.append(text((_LEFT + _WIDTH) / 2, _HEIGHT - 3, "layer", "middle"))
    joined = " ".join(f"{across(layer)},{down(value)}" for layer, value, *_ in points)
    drawn.append(f'<polyline points="{joined}" fill="none" stroke="#c2410c"/>')
    for layer, value, low, high in points:
        drawn.append(line(across(layer), down(low), across(layer), down(high), 0.5))
        said = f"<title>layer {layer}: {value:.3f} [{low:.3f}, {high:.3f}]</title>"
        drawn.append(f'<circle cx="{across(layer)}" cy="{down(value)}" r="3" fill="#c2410c">{said}</circle>')
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="max-width:100%" width="{_WIDTH}" role="img"'
    return f'<p>{escape(title)}</p><svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(drawn)}</svg>'
