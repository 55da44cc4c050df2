"""What was taken out and how that was chosen, as the template prints it: candidates, strengths, the certificate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from remove_refusals.report.charts import Point, Scale, Series, bars, chart, integers, scale_of
from remove_refusals.report.records import Material
from remove_refusals.report.words import number, percent, short_hash

View = dict[str, Any]


_MOST_CANDIDATES = 30
"""Of more, those that are neither on the front nor tried by generation are drawn and not listed."""


_KINDS = {"attn": "Attention, or the mixer in its place", "mlp": "MLP"}


def candidates(selection: Mapping[str, Any]) -> View:
    """Give the front of refusals and damage, and a table of the candidates."""
    entries = selection["candidates"]
    on_front = [entries[index] for index in selection["front"]]
    others = [entry for index, entry in enumerate(entries) if index not in selection["front"]]
    pick = entries[selection["picked"]]
    damages = [entry["damage"] for entry in entries]
    refusal_ends = [entry["refusal"] for entry in entries]
    drawn = chart(
        "Every candidate of the search: refusals against damage; the front joins those that no other beats",
        [
            Series("other candidates", "other", tuple(_candidate(entry, "ring") for entry in others), joined=False),
            Series("front", "edited", tuple(_candidate(entry, "dot") for entry in on_front)),
            Series("picked", "edited", (_candidate(pick, "star"),), joined=False),
        ],
        scale_of(damages, from_zero=min(damages) < 0.5 * max(damages), may_be_logarithmic=True),
        scale_of(refusal_ends, may_be_logarithmic=max(refusal_ends) < 0.05),
        x_name="damage: KL in nats on the prompts of the search",
        y_name="refusals",
        whole=False,
        up=_share,
    )
    listed = [
        index
        for index, entry in enumerate(entries)
        if len(entries) <= _MOST_CANDIDATES or "confirmation" in entry or index in selection["front"]
    ]
    return {
        "chart": drawn,
        "rows": [_candidate_row(entries[index], index, selection) for index in listed],
        "left_out": len(entries) - len(listed),
        "rule": selection["rule"],
        "method": selection["method"],
        "picked": pick["name"],
        "n": len(entries),
        "notes": selection.get("notes", []),
    }


def _share(value: float) -> str:
    return f"{100 * value:g}%"


def _candidate(entry: Mapping[str, Any], kind: str) -> Point:
    title = f"{entry['name']}: refusals {percent(entry['refusal'])}, damage {number(entry['damage'])}"
    return Point(entry["damage"], entry["refusal"], title=title, kind=kind)


def _candidate_row(entry: Mapping[str, Any], index: int, selection: Mapping[str, Any]) -> tuple[str, ...]:
    confirmed = entry.get("confirmation", {})
    counts = [
        f"{confirmed[key]['count']}/{confirmed[key]['n']}" if key in confirmed else ""
        for key in ("refusals", "degenerate", "broken")
    ]
    damage = number(confirmed["damage"]["value"]) if "damage" in confirmed else ""
    mark = "picked" if index == selection["picked"] else "front" if index in selection["front"] else ""
    return (entry["name"], percent(entry["refusal"]), number(entry["damage"]), *counts, damage, mark)


def strengths(material: Material) -> View | None:
    """Give how much was taken out at which site of which layer; None if no record says it."""
    if material.ablation is not None and "intervention" in material.ablation:
        edits = material.ablation["intervention"]
    elif material.selection is not None:
        found = material.selection["candidates"][material.selection["picked"]]["strengths"]
        edits = [{"layer": None, **edit} for edit in found]
    else:
        return None
    in_layers = [edit for edit in edits if "layer" in edit]
    depth = len(material.analysis["layers"]) - 2 if material.analysis is not None else 0
    across = integers(0, max([depth, *(edit["layer"] for edit in in_layers)]))
    up = Scale(min([0.0, *(edit["strength"] for edit in edits)]), max([1.0, *(edit["strength"] for edit in edits)]))
    rows = []
    for kind, name in _KINDS.items():
        values = [(edit["layer"], edit["strength"]) for edit in in_layers if edit["kind"] == kind]
        said = ", ".join(f"layer {layer}: {number(value)}" for layer, value in values) or "left alone everywhere"
        rows.append(bars(name, f"Strength by layer, {name}: {said}", values, across, up))
    return {
        "bars": rows,
        "embedding": next((number(edit["strength"]) for edit in edits if edit["kind"] == "embedding"), None),
        "table": (
            ("site", "layer", "strength", "direction"),
            [
                (
                    edit["kind"],
                    str(edit.get("layer", "")),
                    number(edit["strength"]),
                    str(edit.get("direction", 0) + 1),
                )
                for edit in edits
            ],
        ),
    }


def directions(ablation: Mapping[str, Any]) -> View:
    """Give the directions that were taken out: a sentence, and a table."""
    entries = ablation["directions"]
    methods = sorted({entry.get("method", "given") for entry in entries})
    layers = [entry["layer"] for entry in entries if "layer" in entry]
    keys = ("method", "layer", "position", "rank", "n_harmful", "n_harmless", "seed")
    rows = [
        (str(index), *(_shown(entry.get(key)) for key in keys), short_hash(entry["sha256"]))
        for index, entry in enumerate(entries, start=1)
    ]
    return {
        "n": len(entries),
        "methods": methods,
        "layers": _ranges(layers),
        "table": (("", "method", "layer", "position", "rank", "harmful", "harmless", "seed", "SHA-256"), rows),
    }


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """Print whole numbers with runs drawn together: `1-6, 9`."""
    runs: list[list[int]] = []
    for each in sorted(set(numbers)):
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _bound(share: float) -> str:
    """Print a share that is near 0, rounded up."""
    return "less than 0.01%" if share < 1e-4 else f"at most {math.ceil(1e4 * share) / 100:.2f}%"


def certificate(record: Mapping[str, Any]) -> View:
    """Give what was measured on the saved files."""
    edited = record["edited"]
    beyond = [abs(entry["share_left"] - abs(1 - entry["strength"])) for entry in edited]
    rows = [
        (
            entry["name"],
            number(entry["strength"]),
            f"{abs(1 - entry['strength']):.2%}",
            f"{entry['share_left']:.2%}",
            entry["dtype"],
            "passed" if entry["passed"] else "failed",
        )
        for entry in edited
    ]
    return {
        "passed": record["passed"],
        "problems": record["problems"],
        "n": len(edited),
        "worst": _bound(max(beyond)) if beyond else None,
        "worst_name": edited[beyond.index(max(beyond))]["name"] if beyond else "",
        "identical": record.get("identical_tensors"),
        "largest_boundary": number(max(record["boundaries"])) if record.get("boundaries") else None,
        "table": (("tensor", "strength", "planned to be left", "left", "saved in", ""), rows),
        "left": list(record["left"].items()),
    }
