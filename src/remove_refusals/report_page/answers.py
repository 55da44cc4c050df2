"""Answers of both models side by side, as the template prints them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from remove_refusals.report_page.measured import set_title
from remove_refusals.report_page.words import first_sentence

View = dict[str, Any]

HARMLESS = frozenset({"harmless", "alarming"})
"""The sets that are harmless wherever they turn up; one that is not known to be is treated as harmful."""


def answers(rows: Sequence[Mapping[str, Any]], *, harmless: frozenset[str] = HARMLESS, full_answers: bool) -> View:
    """Pair the answers of both models to each prompt.

    Args:
        rows: The content of `rows.jsonl`.
        harmless: The sets whose answers are shown as they are.
        full_answers: Whether answers to harmful prompts are kept whole; otherwise only their first sentence is.

    Returns:
        The pairs in the order of their prompts, with the sets and labels that there are.
    """
    pairs: dict[tuple[str, str, int], View] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = (row["set"], row["prompt_id"])
        # A prompt may stand in a set twice.
        time = seen[*key, row["model"]]
        seen[*key, row["model"]] += 1
        pair = pairs.setdefault((*key, time), _pair(row, time, unfolded=row["set"] in harmless))
        pair["answers"][row["model"]] = _answer(row, whole=full_answers or row["set"] in harmless)
    for pair in pairs.values():
        labels = {model: answer["label"] for model, answer in pair["answers"].items()}
        pair["labels"] = labels
        pair["changed"] = len(labels) > 1 and len(set(labels.values())) > 1
    sets = {name: set_title(name) for name in dict.fromkeys(pair["set"] for pair in pairs.values())}
    labels_found = sorted({label for pair in pairs.values() for label in pair["labels"].values()})
    return {"pairs": list(pairs.values()), "sets": sets, "labels": labels_found, "cut": not full_answers}


def _pair(row: Mapping[str, Any], time: int, *, unfolded: bool) -> View:
    suffix = f"-{time + 1}" if time else ""
    return {
        "set": row["set"],
        "anchor": f"{row['set']}-{row['prompt_id']}{suffix}",
        "prompt": row["prompt"],
        "open": unfolded,
        "answers": {},
    }


def _answer(row: Mapping[str, Any], *, whole: bool) -> View:
    text, left_out = (row["text"], 0) if whole else first_sentence(row["text"])
    said = [f"{row['n_tokens']} tokens"] if "n_tokens" in row else []
    said += ["cut off at the limit"] if row.get("finished") is False else []
    return {"label": row["label"], "text": text, "left_out": left_out, "said": ", ".join(said)}


def prompt_texts(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Give the texts of prompts, by set and id, and by id alone."""
    by_set = {(row["set"], row["prompt_id"]): row["prompt"] for row in rows}
    return by_set, {key: text for (_, key), text in by_set.items()}
