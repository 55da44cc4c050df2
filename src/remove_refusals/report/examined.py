"""How far apart harmful and harmless prompts lie, as the template prints it."""

from collections.abc import Mapping, Sequence
from typing import Any

from remove_refusals.report.charts import Heat, Point, Scale, Series, bars, chart, heat, integers, scale_of
from remove_refusals.report.words import interval, number, percent

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


View_origins = dict[str, Any]


_KINDS = {"attn": "Attention, or the mixer in its place", "mlp": "MLP"}


_MOST_LISTED = 20
"""So many writers or experts stand in a table, those that matter most."""


def origins(analysis: Mapping[str, Any]) -> View_origins | None:
    """Give what an examination found beside the separation at the last token; None if there was none.

    Args:
        analysis: The content of `analysis.json`.
    """
    if "contributions" not in analysis:
        return None
    return {
        "direction": analysis["direction"],
        "versions": list(analysis["versions"].items()),
        "positions": _positions(analysis["positions"]),
        "contributions": _contributions(analysis["contributions"]),
        "shares": _shares(analysis["writer_shares"]),
        "choices": _choices(analysis["expert_choices"]),
    }


def _positions(positions: Sequence[Mapping[str, Any]]) -> Heat:
    cells = [[None if each is None else 2 * each["value"] - 1 for each in part["auroc"]] for part in positions]
    names = [f"{part['position']}" for part in positions]
    head = ("layer", *(f"{part['position']} {part['token']!r}" for part in positions))
    rows = [
        (str(layer), *("" if each is None else f"{number(each['value'])} {interval(each)}" for each in column))
        for layer, column in enumerate(zip(*(part["auroc"] for part in positions), strict=True))
    ]
    return heat(
        "AUROC by layer, for each token that the chat template puts behind the prompt",
        cells,
        key=("AUROC 1", "0.5 or not measured", "0"),
        axes="layer across, token position down",
        table=(head, rows),
        y_names=names,
    )


def _contributions(record: Mapping[str, Any]) -> View_origins:
    sites = [site for site in record["sites"] if site.get("layer") is not None]
    across = integers(0, len(record["stream"]) - 2)
    up = scale_of([0.0, *(site["value"] for site in sites)])
    rows = []
    for kind, name in _KINDS.items():
        values = [(site["layer"], site["value"]) for site in sites if site["site"] == kind]
        said = ", ".join(f"layer {layer}: {number(value)}" for layer, value in values) or "not measured"
        rows.append(bars(name, f"Contribution by layer, {name}: {said}", values, across, up))
    explained = {site["layer"] for site in sites}
    return {
        "bars": rows,
        "unexplained": [layer for layer in range(len(record["stream"]) - 1) if layer not in explained],
        "n": (record["n_harmful"], record["n_harmless"]),
        "table": (
            ("site", "layer", "contribution", "95% interval"),
            [
                (site["site"], _layer(site.get("layer")), number(site["value"]), interval(site))
                for site in sorted(record["sites"], key=lambda site: -abs(site["value"]))
            ],
        ),
    }


def _shares(shares: Sequence[Mapping[str, Any]]) -> View_origins | None:
    if not shares:
        return None
    ranked = sorted(shares, key=lambda share: -share["value"])
    return {
        "picture": _experts(
            [{**share, "shade": share["value"]} for share in shares if share.get("expert") is not None],
            "How much of what each expert can write lies along the direction, by layer",
            lambda most: (f"{number(most)} times chance", "none", ""),
        ),
        "left_out": max(0, len(shares) - _MOST_LISTED),
        "table": (
            ("writer", "layer", "expert", "times chance"),
            [
                (share["parameter"], _layer(share.get("layer")), _layer(share.get("expert")), number(share["value"]))
                for share in ranked[:_MOST_LISTED]
            ],
        ),
    }


def _choices(choices: Sequence[Mapping[str, Any]]) -> View_origins | None:
    if not choices:
        return None
    moved = [{**choice, "shade": choice["harmful"] - choice["harmless"]} for choice in choices]
    ranked = sorted(moved, key=lambda choice: -abs(choice["shade"]))
    return {
        "picture": _experts(
            moved,
            "How much more often each expert is chosen on harmful prompts than on harmless ones, by layer",
            lambda most: (f"{percent(most)} more often on harmful", "alike", f"{percent(most)} more often on harmless"),
        ),
        "n": (choices[0]["n_harmful"], choices[0]["n_harmless"]),
        "left_out": max(0, len(choices) - _MOST_LISTED),
        "table": (
            ("layer", "expert", "chosen on harmful", "chosen on harmless"),
            [
                (str(each["layer"]), str(each["expert"]), percent(each["harmful"]), percent(each["harmless"]))
                for each in ranked[:_MOST_LISTED]
            ],
        ),
    }


def _experts(entries: Sequence[Mapping[str, Any]], label: str, key: Any) -> Heat | None:
    """Draw a number for each expert of each layer, the largest in the full shade."""
    if not entries:
        return None
    most = max(abs(entry["shade"]) for entry in entries)
    n_layers, n_experts = (1 + max(entry[name] for entry in entries) for name in ("layer", "expert"))
    cells: list[list[float | None]] = [[None] * n_layers for _ in range(n_experts)]
    for entry in entries:
        # An expert may have several matrices.
        shade, row = entry["shade"] / (most or 1.0), cells[entry["expert"]]
        held = row[entry["layer"]]
        row[entry["layer"]] = shade if held is None else max(held, shade, key=abs)
    return heat(label, cells, key=key(most), axes="layer across, expert down")


def _layer(value: int | None) -> str:
    return "" if value is None else str(value)
