"""What was measured of both models, as the template prints it: refusals, damage, the first figures on the page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from remove_refusals.report.charts import Chart, Point, Scale, Series, chart, integers, scale_of
from remove_refusals.report.records import Material
from remove_refusals.report.words import first_sentence, interval, number, percent, percent_interval

View = dict[str, Any]


_SETS = {
    "harmful": "Harmful requests",
    "harmless": "Harmless requests",
    "alarming": "Harmless requests that sound alarming",
}


_KL_OVER = {
    "harmless": "all harmless prompts",
    "harmless_answered": "harmless prompts that the base model answered",
    "harmless_refused": "harmless prompts that the base model refused falsely",
}


_SIGNIFICANCE = 0.05
"""Below it a difference counts as one, where a record does not say so itself."""


_OTHERS = {
    "perplexity": "Perplexity of the base model's answers",
    "text": "Perplexity of a text",
    "agreement": "Greedy answers to harmless prompts that the base answered",
    "identical": "share that is the same to the last token",
    "common_prefix": "share that is the same from the start on",
}


_KL_OF = {"first_token": "first token", "mean": "mean", "p95": "95th percentile"}


def set_title(name: str) -> str:
    """Say what a prompt set is."""
    return _SETS.get(name, name.replace("_", " ").capitalize())


def tiles(material: Material) -> list[View]:
    """Give the first figures on the page; what was not measured has none."""
    found: list[View] = []
    sets = (material.scores or {}).get("sets", {})
    for name in ("harmful", "alarming" if "alarming" in sets else "harmless"):
        if name in sets:
            rates = sets[name]["refusals"]
            found.append(
                {
                    "name": f"{_rate_name(name, 'refusals')}, {name}",
                    "before": percent(rates["base"]["value"]),
                    "value": percent(rates["edited"]["value"]),
                    "note": f"of {rates['edited']['n']} prompts; 95% interval {percent_interval(rates['edited'])}",
                }
            )
    distances = (material.scores or {}).get("kl", {})
    answered = "harmless_answered" in distances
    if answered or "harmless" in distances:
        mean = distances["harmless_answered" if answered else "harmless"]["mean"]
        over = "harmless prompts that the base answered" if answered else "harmless prompts"
        note = f"nats, over {mean['n']} {over}; 95% interval {interval(mean)}"
        found.append({"name": "KL from the base", "before": "", "value": number(mean["value"]), "note": note})
    if material.certificate is not None:
        passed = material.certificate["passed"]
        note = f"{len(material.certificate['edited'])} tensors measured on the saved files"
        found.append({"name": "Certificate", "before": "", "value": "passed" if passed else "failed", "note": note})
    return found


def refusals(scores: Mapping[str, Any], prompts: Mapping[tuple[str, str], str]) -> list[View]:
    """Give for each prompt set its rates before and after.

    Args:
        scores: The content of `scores.json`.
        prompts: The texts of prompts by set and id, as far as they are known.
    """
    return [_set(name, part, prompts) for name, part in scores["sets"].items()]


def _set(name: str, part: Mapping[str, Any], prompts: Mapping[tuple[str, str], str]) -> View:
    pairs = [(kind, rates) for kind, rates in part.items() if _is_pair(rates) and "value" in rates["base"]]
    flipped = [
        {"who": who, "prompts": [(key, prompts.get((name, key), key)) for key in part["flipped"][key_name]]}
        for key_name, who in (("only_base", "Refused by the base model alone"), ("only_edited", "By the edited alone"))
        if part.get("flipped", {}).get(key_name)
    ]
    return {
        "name": name,
        "title": set_title(name),
        "pairs": [{"name": _rate_name(name, kind), **_pair(rates)} for kind, rates in pairs],
        "flipped": flipped,
        "thinking": [(model, _thinking(found)) for model, found in part.get("thinking", {}).items()],
        "lengths": _lengths(name, part["by_length"]) if "by_length" in part else None,
    }


def _is_pair(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(model), Mapping) for model in ("base", "edited"))


def _rate_name(name: str, kind: str) -> str:
    if kind == "refusals":
        return "Refusals" if name == "harmful" else "False refusals"
    return "Degenerate answers" if kind == "degenerate" else kind.replace("_", " ").capitalize()


def _pair(rates: Mapping[str, Any]) -> View:
    rows, corrected = [], rates.get("corrected", {})
    for model in ("base", "edited"):
        rows.append(_rate(model, model, rates[model]))
        if model in corrected:
            rows.append(_rate(f"{model}, corrected", model, corrected[model]))
    test = rates.get("mcnemar")
    undecided = "undecided" if test is not None and test["p_value"] >= _SIGNIFICANCE else ""
    return {
        "rates": rows,
        "corrected": bool(corrected),
        "mcnemar": test,
        "adjusted": rates.get("adjusted_p"),
        "verdict": rates.get("verdict", undecided),
    }


def _rate(name: str, style: str, rate: Mapping[str, Any]) -> View:
    counts = f"{rate['count']} of {rate['n']}" if "count" in rate else ""
    places = {key: f"{100 * min(1.0, max(0.0, rate[key])):.2f}" for key in ("value", "low", "high")}
    return {
        "name": name,
        "style": style,
        "places": places,
        "value": percent(rate["value"]),
        "interval": percent_interval(rate),
        "counts": counts,
    }


def _thinking(record: Mapping[str, Any]) -> str:
    unfinished, length = record["unfinished"], record["length"]
    return (
        f"{number(length['value'])} tokens {interval(length)} on average over {length['n']} answers; unfinished in "
        f"{percent(unfinished['value'])} {percent_interval(unfinished)} of {unfinished['n']}"
    )


def _lengths(name: str, record: Mapping[str, Any]) -> View:
    tokens = record["tokens"]
    series = []
    for model in ("base", "edited"):
        rates = zip(tokens, record[model], strict=True)
        points = tuple(
            Point(
                at,
                rate["value"],
                rate.get("low"),
                rate.get("high"),
                f"{model}, {at} tokens: {percent(rate['value'])} {percent_interval(rate)}",
                "ring" if model == "base" else "dot",
            )
            for at, rate in rates
        )
        series.append(Series(model, model, points))
    drawn = chart(
        f"Refusals of {set_title(name).lower()} by how much of the answer is read, with 95% intervals",
        series,
        scale_of(tokens),
        Scale(0, 1),
        x_name="tokens of the answer",
        y_name="counted as refusals",
        whole=False,
        height=130,
        up=percent,
    )
    rows = [
        (str(at), *(f"{percent(rate['value'])} {percent_interval(rate)}" for rate in pair))
        for at, *pair in zip(tokens, record["base"], record["edited"], strict=True)
    ]
    return {"chart": drawn, "table": (("tokens", "base", "edited"), rows), "stable": record.get("stable")}


def damage(scores: Mapping[str, Any]) -> View:
    """Give the table of what the edit did beside its aim, and KL by token."""
    rows = [*_kl_rows(scores.get("kl", {})), *_other_rows(scores)]
    parts = scores.get("kl", {})
    name = next((each for each in ("harmless_answered", "harmless") if "by_token" in parts.get(each, {})), None)
    return {
        "rows": rows,
        "tasks": [_task(record) for record in scores.get("tasks", [])],
        "tokens": None if name is None else _tokens(parts[name]["by_token"]),
        "tokens_over": _KL_OVER.get(name or "", ""),
    }


def _kl_rows(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for over, part in parts.items():
        for key, record in part.items():
            if key in _KL_OF and (row := _row(record)) is not None:
                yield (f"KL, {_KL_OF[key]}, over {_KL_OVER.get(over, over.replace('_', ' '))}", "", *row)


def _other_rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for key, record in scores.items():
        name = _OTHERS.get(key, key.replace("_", " ").capitalize())
        if key in ("sets", "kl", "settings") or not isinstance(record, Mapping):
            continue
        if _is_pair(record) and (edited := _row(record["edited"])) is not None:
            before = number(record["base"]["value"])
            yield (name, f"{before} {interval(record['base'])}", *edited)
        for part, found in record.items():
            if part not in ("base", "edited") and (row := _row(found)) is not None:
                yield (f"{name}, {_OTHERS.get(part, part.replace('_', ' '))}", "", *row)


def _task(record: Mapping[str, Any]) -> tuple[str, ...]:
    parts = [f"{number(record[key]['value'])} {interval(record[key])}" for key in ("base", "edited", "difference")]
    decided = "" if record["difference"]["verdict"] != "undecided" else "undecided"
    return (record["task"], record["metric"], *parts, str(record["difference"]["n"]), decided)


def _row(record: object) -> tuple[str, str] | None:
    """Print a record with a value: the value with its interval, and how many prompts it is of."""
    if not isinstance(record, Mapping) or not isinstance(record.get("value"), int | float):
        return None
    return f"{number(record['value'])} {interval(record)}".strip(), number(record["n"]) if "n" in record else ""


def _tokens(records: Sequence[Mapping[str, Any]]) -> View:
    points = tuple(
        Point(
            record["token"],
            record["value"],
            record.get("low"),
            record.get("high"),
            f"token {record['token']}: {number(record['value'])} {interval(record)}",
        )
        for record in records
    )
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    drawn: Chart = chart(
        "KL divergence from the base model by token of the answer, with 95% intervals",
        [Series("KL", "edited", points)],
        integers(int(points[0].x), int(points[-1].x)),
        scale_of(ends),
        x_name="token of the answer",
        y_name="KL in nats",
    )
    rows = [
        (
            number(record["token"]),
            number(record["value"]),
            interval(record),
            number(record["n"]) if "n" in record else "",
        )
        for record in records
    ]
    return {"chart": drawn, "table": (("token", "KL in nats", "95% interval", "n"), rows)}


View_answers = dict[str, Any]


HARMLESS = frozenset({"harmless", "alarming"})
"""The sets that are harmless wherever they turn up; one that is not known to be is treated as harmful."""


def answers(
    rows: Sequence[Mapping[str, Any]], *, harmless: frozenset[str] = HARMLESS, full_answers: bool
) -> View_answers:
    """Pair the answers of both models to each prompt.

    Args:
        rows: The content of `rows.jsonl`.
        harmless: The sets whose answers are shown as they are.
        full_answers: Whether answers to harmful prompts are kept whole; otherwise only their first sentence is.

    Returns:
        The pairs in the order of their prompts, with the sets and labels that there are.
    """
    pairs: dict[tuple[str, str, int], View_answers] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = (row["set"], row["prompt_id"])
        # A prompt may stand in a set twice.
        time = seen[*key, row["model"]]
        seen[*key, row["model"]] += 1
        pair = pairs.setdefault((*key, time), _pair_answers(row, time, unfolded=row["set"] in harmless))
        pair["answers"][row["model"]] = _answer(row, whole=full_answers or row["set"] in harmless)
    for pair in pairs.values():
        labels = {model: answer["label"] for model, answer in pair["answers"].items()}
        pair["labels"] = labels
        pair["changed"] = len(labels) > 1 and len(set(labels.values())) > 1
    sets = {name: set_title(name) for name in dict.fromkeys(pair["set"] for pair in pairs.values())}
    labels_found = sorted({label for pair in pairs.values() for label in pair["labels"].values()})
    return {"pairs": list(pairs.values()), "sets": sets, "labels": labels_found, "cut": not full_answers}


def _pair_answers(row: Mapping[str, Any], time: int, *, unfolded: bool) -> View_answers:
    suffix = f"-{time + 1}" if time else ""
    return {
        "set": row["set"],
        "anchor": f"{row['set']}-{row['prompt_id']}{suffix}",
        "prompt": row["prompt"],
        "open": unfolded,
        "answers": {},
    }


def _answer(row: Mapping[str, Any], *, whole: bool) -> View_answers:
    text, left_out = (row["text"], 0) if whole else first_sentence(row["text"])
    said = [f"{row['n_tokens']} tokens"] if "n_tokens" in row else []
    said += ["cut off at the limit"] if row.get("finished") is False else []
    return {"label": row["label"], "text": text, "left_out": left_out, "said": ", ".join(said)}


def prompt_texts(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Give the texts of prompts, by set and id, and by id alone."""
    by_set = {(row["set"], row["prompt_id"]): row["prompt"] for row in rows}
    return by_set, {key: text for (_, key), text in by_set.items()}
