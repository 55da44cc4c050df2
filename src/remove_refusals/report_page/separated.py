"""How far apart harmful and harmless prompts lie, as the template prints it."""

from collections.abc import Mapping, Sequence
from typing import Any

from remove_refusals.report_page.charts import Point, Series, chart
from remove_refusals.report_page.heat import Heat, heat
from remove_refusals.report_page.scales import Scale, integers, scale_of
from remove_refusals.report_page.words import interval, number, percent

View = dict[str, Any]

_MOST_COSINES = 50
"""A table of more rows and columns nobody reads; the record has them all."""


def separation(analysis: Mapping[str, Any], prompts: Mapping[str, str]) -> View:
    """Give the charts of the separation by layer, and the pictures to step through.

    Args:
        analysis: The content of `analysis.json`.
        prompts: The texts of prompts by id, as far as they are known.
    """
    layers = analysis["layers"]
    across = integers(layers[0]["layer"], layers[-1]["layer"])
    measured = [layer for layer in layers if "auroc" in layer]
    return {
        "position": analysis["position"],
        "seed": analysis["seed"],
        "n": {name: part["n"] for name, part in analysis["prompts"].items()},
        "unmeasured": [layer["layer"] for layer in layers if "auroc" not in layer],
        "best": max(measured, key=lambda layer: layer["auroc"]["value"])["layer"] if measured else None,
        "auroc": _auroc(measured, across),
        "norms": _norms(layers, across),
        "table": _table(layers),
        "cosines": _cosines(analysis["cosines"]),
        "pictures": _pictures(analysis, prompts),
    }


def _auroc(layers: Sequence[Mapping[str, Any]], across: Scale) -> Any:
    points = tuple(
        Point(
            layer["layer"],
            layer["auroc"]["value"],
            layer["auroc"]["low"],
            layer["auroc"]["high"],
            f"layer {layer['layer']}: {number(layer['auroc']['value'])} {interval(layer['auroc'])}",
        )
        for layer in layers
    )
    lowest = min([0.5, *(point.low for point in points if point.low is not None)])
    return chart(
        "AUROC by layer with 95% intervals: how often a harmful prompt lies farther along the direction",
        [Series("AUROC", "harmful", points)],
        across,
        Scale(int(10 * lowest) / 10, 1.0),
        x_name="layer (the stream before it; the last is behind all)",
        y_name="AUROC",
        rule=(0.5, "chance"),
    )


def _norms(layers: Sequence[Mapping[str, Any]], across: Scale) -> Any:
    keys = {
        "difference_norm": ("difference of the means", "other"),
        "norm_harmful": ("mean norm, harmful", "harmful"),
        "norm_harmless": ("mean norm, harmless", "harmless"),
    }
    values = [layer[key] for layer in layers for key in keys]
    # A difference that is none has no place on a logarithmic scale.
    up = scale_of([value for value in values if value > 0], may_be_logarithmic=True)
    series = [
        Series(
            name,
            style,
            tuple(
                Point(layer["layer"], layer[key], title=f"layer {layer['layer']}, {name}: {number(layer[key])}")
                for layer in layers
                if layer[key] > 0 or not up.logarithmic
            ),
        )
        for key, (name, style) in keys.items()
    ]
    label = "Norms by layer: of the residual stream on harmful and harmless prompts, and of their difference"
    return chart(label, series, across, up, x_name="layer", y_name="norm")


def _table(layers: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("layer", "AUROC", "95% interval", "difference", "norm, harmful", "norm, harmless", "largest coordinate")
    rows = [
        (
            str(layer["layer"]),
            number(layer["auroc"]["value"]) if "auroc" in layer else "not measured",
            interval(layer["auroc"]) if "auroc" in layer else "",
            *(number(layer[key]) for key in ("difference_norm", "norm_harmful", "norm_harmless")),
            percent(layer["largest_coordinate_share"]),
        )
        for layer in layers
    ]
    return head, rows


def _cosines(cells: Sequence[Sequence[float | None]]) -> Heat:
    size = len(cells)
    apart = [value for row in cells for value in row if value is not None]
    least = f"; the smallest is {number(min(apart))}" if apart else ""
    head = ("layer", *map(str, range(size)))
    rows = [(str(at), *("" if value is None else f"{value:.2f}" for value in row)) for at, row in enumerate(cells)]
    return heat(
        f"Cosines between the directions of all layers{least}",
        cells,
        key=("cosine 1", "0 or not measured", "cosine -1"),
        axes="layer against layer",
        table=(head, rows) if size <= _MOST_COSINES else None,
    )


def _pictures(analysis: Mapping[str, Any], prompts: Mapping[str, str]) -> View | None:
    """Give every layer's points in percent of the picture, and what they are called."""
    drawn = [_picture(layer) for layer in analysis["layers"] if "projection" in layer]
    if not drawn:
        return None
    best = max(range(len(drawn)), key=lambda index: float(drawn[index]["auroc"]))
    names = {
        name: [prompts.get(key, f"prompt {key}") for key in part.get("ids", [])]
        for name, part in analysis["prompts"].items()
    }
    for name, part in names.items():
        part += [f"{name} prompt {index + 1}" for index in range(len(part), analysis["prompts"][name]["n"])]
    return {"layers": drawn, "names": names, "first": best}


def _picture(layer: Mapping[str, Any]) -> View:
    points = layer["projection"]
    every = [point for part in points.values() for point in part]
    across, up = (scale_of([point[axis] for point in every] + [0.0], from_zero=False) for axis in (0, 1))
    return {
        "layer": layer["layer"],
        "auroc": layer["auroc"]["value"],
        "said": f"AUROC {number(layer['auroc']['value'])} {interval(layer['auroc'])}",
        "zero": round(100 * across.share(0), 1),
        **{
            name: [[round(100 * across.share(x), 1), round(100 - 100 * up.share(y), 1)] for x, y in part]
            for name, part in points.items()
        },
    }
