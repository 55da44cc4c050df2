"""The model card, from records; nothing is computed here but what is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from remove_refusals.certify import Certificate


def model_card(
    record: Mapping[str, Any], table: Sequence[Sequence[str]], key: str, certificate: Certificate | None = None
) -> str:
    """Write the model card of an edited model.

    Args:
        record: The content of `ablation.json`; measured if it has `prompts`, `scores` and `warnings`.
        table: The rows of `Evaluation.table`.
        key: What explains the table.
        certificate: What was measured on the saved files; left out if there is none.

    Returns:
        Markdown with the metadata block that the Hugging Face hub reads.
    """
    # Markdown, not HTML: text is kept as it is, and what could break the table is in no record.
    environment = Environment(
        loader=PackageLoader("remove_refusals", "data"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    worst = certificate.worst if certificate is not None else None
    text: str = environment.get_template("model_card.md.jinja").render(
        record=record,
        table=table,
        key=key,
        certificate=certificate,
        worst=100 * abs(worst.share_left - abs(1 - worst.strength)) if worst is not None else 0.0,
        strengths=sorted({edit["strength"] for edit in record["intervention"]}),
        groups=_alike(record["directions"]),
    )
    return text


def _alike(directions: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Put directions together that differ in nothing but the layer, so that a card needs one line for them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for direction in directions:
        recipe = {
            key: value
            for key, value in direction.items()
            if key not in ("layer", "sha256", "harmless_component", "length")
        }
        groups.setdefault(str(sorted(recipe.items(), key=lambda item: item[0])), []).append(direction)
    return list(groups.values())
