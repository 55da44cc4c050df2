"""What the page shows of a model that was looked at: how far apart its prompts lie, and where that comes from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from remove_refusals.measure import number, percent
from remove_refusals.report.charts import Chart, Heat, Point, Scale, Series, integers, scale_of
from remove_refusals.report.records import AnalysisRecord
from remove_refusals.report.sections import site_bars
from remove_refusals.report.words import estimate
from remove_refusals.types import (
    Contribution,
    Contributions,
    ExpertChoice,
    Interchange,
    LayerSeparation,
    WriterShare,
)

MOST_COSINES = 50
"""A table of more rows and columns nobody reads; the record has them all."""

MOST_LISTED = 20
"""So many writers or experts stand in a table, those that matter most."""

Valued = TypeVar("Valued", Contribution, WriterShare)


def _across(layers: Sequence[LayerSeparation]) -> Scale:
    return integers(layers[0].layer, layers[-1].layer)


def auroc(layers: Sequence[LayerSeparation]) -> Chart:
    """Draw by layer how well the direction tells the sets apart."""
    points = tuple(
        Point(layer.layer, found.value, found.low, found.high, f"layer {layer.layer}: {estimate(found)}")
        for layer in layers
        if (found := layer.auroc) is not None
    )
    lowest = min([0.5, *(point.low for point in points if point.low is not None)])
    return Chart(
        "AUROC by layer with 95% intervals: how often a harmful prompt lies farther along the direction",
        _across(layers),
        Scale(int(10 * lowest) / 10, 1.0),
        "AUROC",
        "layer (the stream before it; the last is behind all)",
        (Series("AUROC", "harmful", points),),
        rule=(0.5, "chance"),
    )


def norms(layers: Sequence[LayerSeparation]) -> Chart:
    """Draw the norms by layer."""
    names = {
        "difference_norm": ("difference of the means", "other"),
        "norm_harmful": ("mean norm, harmful", "harmful"),
        "norm_harmless": ("mean norm, harmless", "harmless"),
    }
    values = {key: [(layer.layer, float(getattr(layer, key))) for layer in layers] for key in names}
    # A difference that is none has no place on a logarithmic scale.
    up = scale_of([value for part in values.values() for _, value in part if value > 0], may_be_logarithmic=True)
    series = []
    for key, (name, style) in names.items():
        points = (
            Point(layer, value, title=f"layer {layer}, {name}: {number(value)}")
            for layer, value in values[key]
            if value > 0 or not up.logarithmic
        )
        series.append(Series(name, style, tuple(points)))
    label = "Norms by layer: of the residual stream on harmful and harmless prompts, and of their difference"
    return Chart(label, _across(layers), up, "norm", "layer", tuple(series))


def cosines(cells: Sequence[Sequence[float | None]]) -> Heat:
    """Draw how alike the directions of any two layers are."""
    apart = [value for row in cells for value in row if value is not None]
    least = f"; the smallest is {number(min(apart))}" if apart else ""
    key = ("cosine 1", "0 or not measured", "cosine -1")
    return Heat(f"Cosines between the directions of all layers{least}", cells, key, "layer against layer")


def pictures(analysis: AnalysisRecord, texts: Mapping[str, str]) -> dict[str, Any] | None:
    """Give every layer's points in percent of the picture, what they are called, and which layer to begin with."""
    layers = [_picture(layer) for layer in analysis.layers if layer.projection is not None]
    if not layers:
        return None
    names = {}
    for name, part in analysis.prompts.items():
        known = [texts.get(key, f"prompt {key}") for key in part.ids]
        names[name] = known + [f"{name} prompt {at + 1}" for at in range(len(known), part.n)]
    return {"layers": layers, "names": names, "first": max(range(len(layers)), key=lambda at: layers[at]["auroc"])}


def _picture(layer: LayerSeparation) -> dict[str, Any]:
    assert layer.projection is not None and layer.auroc is not None
    parts = {"harmful": layer.projection.harmful, "harmless": layer.projection.harmless}
    across, up = (
        scale_of([point[axis] for part in parts.values() for point in part] + [0.0], from_zero=False) for axis in (0, 1)
    )
    return {
        "layer": layer.layer,
        "auroc": layer.auroc.value,
        "said": f"AUROC {estimate(layer.auroc)}",
        "zero": round(100 * across.share(0), 1),
        **{
            name: [[round(100 * across.share(x), 1), round(100 - 100 * up.share(y), 1)] for x, y in part]
            for name, part in parts.items()
        },
    }


def positions(analysis: AnalysisRecord) -> Heat:
    """Draw the AUROC by layer for each token of the chat template's tail."""
    parts = analysis.positions or ()
    return Heat(
        "AUROC by layer, for each token that the chat template puts behind the prompt",
        [[None if each is None else 2 * each.value - 1 for each in part.auroc] for part in parts],
        ("AUROC 1", "0.5 or not measured", "0"),
        "layer across, token position down",
        tuple(str(part.position) for part in parts),
    )


def contribution_bars(found: Contributions) -> list[Chart]:
    """Draw what each site adds along the direction."""
    values = [(site.site, site.layer, site.value) for site in found.sites if site.layer is not None]
    up = scale_of([0.0, *(value for _, _, value in values)])
    return site_bars("Contribution", values, integers(0, len(found.stream) - 2), up, "not measured")


def unexplained(found: Contributions) -> list[int]:
    """Give the layers whose sites' contributions were not measured."""
    return sorted(set(range(len(found.stream) - 1)) - {site.layer for site in found.sites if site.layer is not None})


def largest(entries: Iterable[Valued]) -> list[Valued]:
    """Put the largest values first, whatever their signs."""
    return sorted(entries, key=lambda entry: -abs(entry.value))


def share_picture(shares: Sequence[WriterShare]) -> Heat | None:
    """Draw how much of what each expert can write lies along the direction; None without experts."""
    values = [(share.layer, share.expert, share.value) for share in shares]
    known = [(layer, expert, value) for layer, expert, value in values if layer is not None and expert is not None]
    most = max((value for _, _, value in known), default=0.0)
    label = "How much of what each expert can write lies along the direction, by layer"
    return _experts(known, label, (f"{number(most)} times chance", "none", ""))


def most_moved(choices: Sequence[ExpertChoice]) -> list[ExpertChoice]:
    """Put the experts first whose choice differs most."""
    return sorted(choices, key=lambda choice: -abs(choice.harmful - choice.harmless))


def contribution_picture(choices: Sequence[ExpertChoice]) -> Heat | None:
    """Draw what each expert writes along the direction on harmful prompts more than on harmless ones."""
    values = [(choice.layer, choice.expert, choice.contribution) for choice in choices]
    known = [(layer, expert, value) for layer, expert, value in values if value is not None]
    most = number(max((abs(value) for _, _, value in known), default=0.0))
    label = "What each expert adds along the direction on harmful prompts more than on harmless ones, by layer"
    return _experts(known, label, (f"{most} more on harmful", "alike", f"{most} more on harmless"))


def largest_writers(choices: Sequence[ExpertChoice]) -> list[ExpertChoice]:
    """Put the experts first that add most along the direction."""
    return sorted(choices, key=lambda choice: -abs(choice.contribution or 0.0))


def most_decisive(found: Sequence[Interchange]) -> Interchange:
    """Give the layer whose routers decide most."""
    return max((one for one in found if one.layer is not None), key=lambda one: one.share.value)


def choice_picture(choices: Sequence[ExpertChoice]) -> Heat | None:
    """Draw how much more often each expert is chosen on harmful prompts."""
    values = [(choice.layer, choice.expert, choice.harmful - choice.harmless) for choice in choices]
    most = percent(max((abs(value) for _, _, value in values), default=0.0))
    label = "How much more often each expert is chosen on harmful prompts than on harmless ones, by layer"
    return _experts(values, label, (f"{most} more often on harmful", "alike", f"{most} more often on harmless"))


def _experts(values: Sequence[tuple[int, int, float]], label: str, key: tuple[str, str, str]) -> Heat | None:
    """Draw a number for each expert of each layer, the largest in the full shade."""
    if not values:
        return None
    most = max(abs(value) for _, _, value in values) or 1.0
    n_layers, n_experts = (1 + max(value[axis] for value in values) for axis in (0, 1))
    cells: list[list[float | None]] = [[None] * int(n_layers) for _ in range(int(n_experts))]
    for layer, expert, value in values:
        # An expert may have several matrices.
        cells[expert][layer] = max(cells[expert][layer] or 0.0, value / most, key=abs)
    return Heat(label, cells, key, "layer across, expert down")
