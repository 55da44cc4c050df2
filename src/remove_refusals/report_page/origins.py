"""Where a model's refusal comes from, as the template prints it: positions, sites, experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from remove_refusals.report_page.charts import bars
from remove_refusals.report_page.heat import Heat, heat
from remove_refusals.report_page.scales import integers, scale_of
from remove_refusals.report_page.words import interval, number, percent

View = dict[str, Any]

_KINDS = {"attn": "Attention, or the mixer in its place", "mlp": "MLP"}

_MOST_LISTED = 20
"""So many writers or experts stand in a table, those that matter most."""


def origins(analysis: Mapping[str, Any]) -> View | None:
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


def _contributions(record: Mapping[str, Any]) -> View:
    sites = [site for site in record["sites"] if site["layer"] is not None]
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
                (site["site"], _layer(site["layer"]), number(site["value"]), interval(site))
                for site in sorted(record["sites"], key=lambda site: -abs(site["value"]))
            ],
        ),
    }


def _shares(shares: Sequence[Mapping[str, Any]]) -> View | None:
    if not shares:
        return None
    ranked = sorted(shares, key=lambda share: -share["value"])
    return {
        "picture": _experts(
            [{**share, "shade": share["value"]} for share in shares if share["expert"] is not None],
            "How much of what each expert can write lies along the direction, by layer",
            lambda most: (f"{number(most)} times chance", "none", ""),
        ),
        "left_out": max(0, len(shares) - _MOST_LISTED),
        "table": (
            ("writer", "layer", "expert", "times chance"),
            [
                (share["parameter"], _layer(share["layer"]), _layer(share["expert"]), number(share["value"]))
                for share in ranked[:_MOST_LISTED]
            ],
        ),
    }


def _choices(choices: Sequence[Mapping[str, Any]]) -> View | None:
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
