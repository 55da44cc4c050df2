"""What the page shows of a run: the first figures, refusals, damage, answers, and what was chosen and taken out."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remove_refusals.measure import Evaluation, Label, Mean, RefusalsByLength, Response, TokenMean, number, percent
from remove_refusals.report.charts import Chart, Point, Scale, Series, integers, scale_of
from remove_refusals.report.records import CandidateRecord, Material, SelectionRecord
from remove_refusals.report.words import estimate, interval, percent_interval
from remove_refusals.settings import expects_refusals
from remove_refusals.types import SiteEdit

_SETS = {"harmful": "Harmful prompts", "harmless": "Harmless prompts", "alarming": "Harmless but alarming prompts"}

HARMLESS = frozenset({"harmless", "alarming"})
"""The sets that are harmless wherever they turn up; one that is not known to be is treated as harmful."""

KL_OVER = {"harmless": "all harmless prompts", "harmless_answered": "harmless prompts that the base model answered"}

SITES = {"attn": "Attention, or the mixer in its place", "mlp": "MLP"}

_YARDSTICKS = (
    ("a run, on 0.5B and 1.5B", 0.0040, 0.010),
    ("Heretic 1.4.0, 40 trials", 0.0076, 0.011),
    ("one direction by hand", 0.028, 0.073),
)
"""What taking refusals out costs: the KL along answers, in nats, on both models of docs/results.md."""

_MOST_EXAMPLES = 3

_MOST_CANDIDATES = 30
"""Of more, those that are neither on the front nor tried by generation are drawn and not listed."""


def set_title(name: str) -> str:
    """Say what a prompt set is."""
    return _SETS.get(name, name.replace("_", " ").capitalize())


def rate_name(name: str, kind: str) -> str:
    """Say what is counted in a prompt set."""
    if kind == "refusals":
        return "Refusals" if expects_refusals(name) else "False refusals"
    return kind.capitalize() if kind == "deflections" else f"{kind.capitalize()} answers"


def tiles(material: Material) -> list[tuple[str, str, str, str]]:
    """Give the first figures on the page: name, before, value, note; what was not measured has none."""
    found, scores = [], material.scores
    sets = scores.sets if scores is not None else {}
    for name in ("harmful", "alarming" if "alarming" in sets else "harmless"):
        if name in sets:
            base, edited = sets[name].refusals.base, sets[name].refusals.edited
            note = f"of {edited.n} prompts; 95% interval {percent_interval(edited)}"
            lectures = sets[name].moralising
            if lectures is not None and lectures.edited.count:
                note += f"; {lectures.edited.count} more only moralise"
            what = "harmless but alarming" if name == "alarming" else name
            found.append((f"{rate_name(name, 'refusals')}, {what}", percent(base.value), percent(edited.value), note))
    if (mean := damage(material)) is not None:
        note = f"nats a token, {how_much(mean.value)}; {mean.n} harmless prompts, 95% interval {interval(mean)}"
        found.append(("KL along answers", "", number(mean.value), note))
    if (certificate := material.certificate) is not None:
        note = f"{len(certificate.edited)} edited tensors measured on the saved files; this says nothing of safety"
        found.append(("File check", "", "as planned" if certificate.passed else "not as planned", note))
    return found


def damage(material: Material) -> Mean | None:
    """Give the mean KL along answers to harmless prompts, those that the base answered if that was measured."""
    kl = material.scores.kl if material.scores is not None else None
    return None if kl is None else (kl.harmless_answered or kl.harmless).mean


def how_much(kl: float) -> str:
    """Say how much a KL along answers is, beside what was measured of real models."""
    (_, least, most), _, (_, by_hand, at_most) = _YARDSTICKS
    if kl <= most:
        return f"little: a run on real models costs {least:.3f} to {most:.3f}"
    if kl < by_hand:
        return f"some: one direction by hand costs {by_hand:.2f} to {at_most:.2f}"
    if kl <= at_most:
        return f"as much as one direction by hand, {by_hand:.2f} to {at_most:.2f}"
    return f"much: one direction by hand costs {by_hand:.2f} to {at_most:.2f}"


def less_likely(kl: float) -> str:
    """Say how much less probable the base's next token is on geometric average, which is what a KL is."""
    return f"{100 * -math.expm1(-kl):.2g}%"


def yardsticks(found: Mean) -> list[tuple[str, str, float, float, float | None, str]]:
    """Put a KL beside what was measured of real models: name, style, its ends and its place in percent, and figures."""
    scale = Scale(0.001, 1.0, logarithmic=True)
    rows: list[tuple[str, str, float, float, float | None, str]] = []
    for name, style, low, high, at, said in (
        ("edited", "edited", found.low, found.high, found.value, number(found.value)),
        *((name, "other", low, high, None, f"{low:.2g} to {high:.2g}") for name, low, high in _YARDSTICKS),
    ):
        left, right = (round(100 * scale.share(end), 2) for end in (low, high))
        rows.append((name, style, left, right, None if at is None else round(100 * scale.share(at), 2), said))
    return rows


@dataclass(frozen=True)
class CardRow:
    """A line of the picture: what, its figures, and marks on a scale: style, low, place and high, all in percent."""

    name: str
    note: str
    before: str
    value: str
    ticks: tuple[str, ...]
    marks: tuple[tuple[str, float, float | None, float], ...]


def card_rows(material: Material) -> list[CardRow]:
    """Give the rates and the KL that the picture shows."""
    rows, sets = [], material.scores.sets if material.scores is not None else {}
    for name in ("harmful", *(one for one in ("alarming", "harmless") if one in sets))[:2]:
        if name in sets:
            base, edited = sets[name].refusals.base, sets[name].refusals.edited
            rows.append(
                CardRow(
                    rate_name(name, "refusals"),
                    f"{edited.n} {_SETS[name].lower()}",
                    percent(base.value),
                    percent(edited.value),
                    ("0", "25", "50", "75", "100%"),
                    tuple(
                        (style, 100 * rate.low, 100 * rate.value, 100 * rate.high)
                        for style, rate in (("base", base), ("edited", edited))
                    ),
                )
            )
    if (mean := damage(material)) is not None:
        found, *_, by_hand = yardsticks(mean)
        marks = tuple((style, low, at, high) for _, style, low, high, at, _ in (by_hand, found))
        note = "grey: one direction by hand"
        rows.append(CardRow("KL along answers", note, "", number(mean.value), ("0.001", "0.01", "0.1", "1"), marks))
    return rows


def card_foot(material: Material) -> str:
    """Say how the figures of the picture were measured."""
    assert material.scores is not None
    how = material.scores.settings
    measured = f"Answers of at most {how.max_new_tokens} tokens; judge: {how.judge}; KL in nats a token."
    return f"Ring: base; dot: edited; lines: 95% intervals. {measured}"


def lengths(name: str, found: RefusalsByLength) -> Chart:
    """Draw the refusals of a set by how much of the answer is read."""
    series = []
    for model, rates, kind in (("base", found.base, "ring"), ("edited", found.edited, "dot")):
        points = (
            Point(at, rate.value, rate.low, rate.high, f"{model}, {at} tokens: {rate}", kind)
            for at, rate in zip(found.tokens, rates, strict=True)
        )
        series.append(Series(model, model, tuple(points)))
    return Chart(
        f"Refusals of {set_title(name).lower()} by how much of the answer is read, with 95% intervals",
        scale_of(found.tokens),
        Scale(0, 1),
        "counted as refusals",
        "tokens of the answer",
        tuple(series),
        whole=False,
        height=130,
        up=percent,
    )


def token_means(scores: Evaluation) -> tuple[str, tuple[TokenMean, ...]] | None:
    """Give KL by token, over what the base model answered if that was measured; None where it was not."""
    for over in reversed(KL_OVER):
        if (part := getattr(scores.kl, over, None)) is not None and part.by_token:
            return KL_OVER[over], part.by_token
    return None


def by_token(means: Sequence[TokenMean]) -> Chart:
    """Draw KL by token of the answer."""
    points = tuple(
        Point(mean.token, mean.value, mean.low, mean.high, f"token {mean.token}: {estimate(mean)}") for mean in means
    )
    return Chart(
        "KL divergence from the base model by token of the answer, with 95% intervals",
        integers(means[0].token, means[-1].token),
        scale_of(end for mean in means for end in (mean.value, mean.low, mean.high)),
        "KL in nats",
        "token of the answer",
        (Series("KL", "edited", points),),
    )


def answers(rows: Iterable[Response]) -> list[tuple[str, dict[str, Response]]]:
    """Pair the answers of both models to each prompt, in the order of the prompts; each pair has a name of its own."""
    pairs: dict[str, dict[str, Response]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        key = row.set, row.prompt_id, row.model
        # A prompt may stand in a set twice.
        again = f"-{seen[key] + 1}" if seen[key] else ""
        seen[key] += 1
        pairs.setdefault(f"{row.set}-{row.prompt_id}{again}", {})[row.model] = row
    return list(pairs.items())


def examples(rows: Iterable[Response]) -> list[tuple[str, dict[str, Response]]]:
    """Give a few prompts with both answers, of each set in turn.

    First come those that the base refused and the edited model answers; of harmless ones those that both answered.
    """
    sets: dict[str, list[tuple[str, dict[str, Response]]]] = {}
    for anchor, sides in answers(rows):
        if len(sides) == 2:
            sets.setdefault(sides["base"].set, []).append((anchor, sides))
    for name, pairs in sets.items():
        wanted = (Label.COMPLIANCE if name == "harmless" else Label.REFUSAL, Label.COMPLIANCE)
        pairs.sort(key=lambda pair: (pair[1]["base"].label, pair[1]["edited"].label) != wanted)
    turns = itertools.zip_longest(*sets.values())
    return [pair for turn in turns for pair in turn if pair is not None][:_MOST_EXAMPLES]


def is_flat(found: RefusalsByLength) -> bool:
    """Whether the rates are the same at every length, so that a chart would say nothing."""
    return all(len({rate.value for rate in rates}) == 1 for rates in (found.base, found.edited))


def candidates(selection: SelectionRecord) -> Chart:
    """Draw the front of refusals and damage."""
    entries = selection.candidates
    others = tuple(_candidate(entry, "ring") for at, entry in enumerate(entries) if at not in selection.front)
    return Chart(
        "Every candidate of the search: refusals against damage; the front joins those that no other beats",
        *front_scales(entries),
        "refusals",
        "damage: KL in nats on the prompts of the search",
        (
            Series("other candidates", "other", others, joined=False),
            Series("front", "edited", tuple(_candidate(entries[at], "dot") for at in selection.front)),
            Series("picked", "edited", (_candidate(entries[selection.picked], "star"),), joined=False),
        ),
        whole=False,
        up=lambda value: f"{100 * value:g}%",
    )


def front_scales(entries: Sequence[CandidateRecord]) -> tuple[Scale, Scale]:
    """Choose the scales of damage and refusals that hold all candidates."""
    damages, refusals = [entry.damage for entry in entries], [entry.refusal for entry in entries]
    return (
        scale_of(damages, from_zero=min(damages) < 0.5 * max(damages), may_be_logarithmic=True),
        scale_of(refusals, may_be_logarithmic=max(refusals) < 0.05),
    )


def _candidate(entry: CandidateRecord, kind: str) -> Point:
    title = f"{entry.name}: refusals {percent(entry.refusal)}, damage {number(entry.damage)}"
    return Point(entry.damage, entry.refusal, title=title, kind=kind)


def listed(selection: SelectionRecord) -> list[tuple[CandidateRecord, str]]:
    """Give the candidates that stand in the table, each with its mark."""
    marks = dict.fromkeys(selection.front, "front") | {selection.picked: "picked"}
    return [
        (entry, marks.get(at, ""))
        for at, entry in enumerate(selection.candidates)
        if len(selection.candidates) <= _MOST_CANDIDATES or entry.confirmation is not None or at in selection.front
    ]


def strengths(material: Material) -> Sequence[SiteEdit] | None:
    """Give how much was taken out at which site of which layer; None if no record says it."""
    if material.ablation is not None:
        return material.ablation.intervention
    selection = material.selection
    return None if selection is None else selection.candidates[selection.picked].strengths


def strength_bars(material: Material, edits: Sequence[SiteEdit]) -> list[Chart]:
    """Draw the strengths by layer, for each kind of site."""
    depth = len(material.analysis.layers) - 2 if material.analysis is not None else 0
    across = integers(0, max([depth, *(edit.layer for edit in edits if edit.layer is not None)]))
    taken = [edit.strength for edit in edits]
    up = Scale(min([0.0, *taken]), max([1.0, *taken]))
    values = [(edit.kind, edit.layer, edit.strength) for edit in edits if edit.layer is not None]
    return site_bars("Strength", values, across, up, "left alone everywhere")


def expert_strengths(edits: Sequence[SiteEdit]) -> list[tuple[int, str, float, str]]:
    """Give how much was taken out of single experts: layer, experts, strength, and of what."""
    groups: dict[tuple[int, float, str], list[int]] = {}
    for edit in edits:
        if edit.expert is not None and edit.layer is not None:
            what = "all that they write" if edit.whole else f"direction {edit.direction + 1}"
            groups.setdefault((edit.layer, edit.strength, what), []).append(edit.expert)
    return [(layer, ranges(experts), share, what) for (layer, share, what), experts in sorted(groups.items())]


def site_bars(
    what: str, values: Sequence[tuple[str, int, float]], across: Scale, up: Scale, nothing: str
) -> list[Chart]:
    """Draw a number for each layer, for each kind of site; the values are kind, layer and number."""
    charts = []
    for kind, name in SITES.items():
        bars = tuple((layer, value) for site, layer, value in values if site == kind)
        said = ", ".join(f"layer {layer}: {number(value)}" for layer, value in bars) or nothing
        charts.append(Chart(f"{what} by layer, {name}: {said}", across, up, name, bars=bars, height=90))
    return charts


def ranges(layers: Iterable[int | None]) -> str:
    """Print whole numbers with runs drawn together: `1-6, 9`."""
    runs: list[list[int]] = []
    for each in sorted({layer for layer in layers if layer is not None}):
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def bound(share: float) -> str:
    """Print a share that is near 0, rounded up."""
    return "less than 0.01%" if share < 1e-4 else f"at most {math.ceil(1e4 * share) / 100:.2f}%"
