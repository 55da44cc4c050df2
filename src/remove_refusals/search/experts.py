"""Candidates for mixtures: the experts that write most of the difference are silenced, alone and with directions.

Where routing decides what is refused, a direction can end refusals without bringing the answers back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from remove_refusals.directions import ablated, expert_choices, intervene, mean_difference
from remove_refusals.files import Journal
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel
from remove_refusals.processes import agreed
from remove_refusals.progress import Progress
from remove_refusals.search.candidates import Candidate, by_rule
from remove_refusals.search.material import Material
from remove_refusals.settings import Rule, Tied, published_name
from remove_refusals.types import Activations, ExpertChoice, Intervention, SiteEdit

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""So many experts are silenced at once."""

_MORE = 2
"""So many counts are tried beyond the first with hardly any refusal: answers may still be about something else."""


@dataclass(frozen=True, eq=False)
class Writers:
    """Experts by what they add to the difference behind the last layer, the largest first, along its direction."""

    found: tuple[ExpertChoice, ...]
    along: Intervention
    """What takes that direction out nowhere."""

    @property
    def lowest(self) -> int:
        """The lowest layer of any."""
        return min(choice.layer for choice in self.found)

    def silenced(self, n: int) -> Intervention:
        """Silence the first `n`."""
        edits = (
            SiteEdit(kind="expert", layer=choice.layer, expert=choice.expert, strength=1.0, whole=True)
            for choice in self.found[:n]
        )
        return Intervention(self.along.directions, tuple(edits))


def writers_of_difference(
    loaded: LoadedModel, collected: tuple[Activations, Activations], most: int, *, position: int, seed: int
) -> Writers | None:
    """Find at most so many experts that surely add to the difference; None in a model that has none."""
    model_map = map_model(loaded.model)
    editable = {mixture.layer for mixture in model_map.mixtures if mixture.writers}
    if not editable or not most:
        return None
    direction = mean_difference(
        *collected, layer=model_map.n_layers, position=position, model=published_name(loaded.source), seed=seed
    )
    choices = expert_choices(loaded, collected[0].prompts, collected[1].prompts, direction, position=position)
    known = [(choice.contribution or 0.0, choice) for choice in choices if choice.layer in editable]
    surely = [(value, choice) for value, choice in known if choice.low is not None and choice.low > 0]
    surely.sort(key=lambda pair: -pair[0])
    found = agreed(tuple(choice for _, choice in surely[:most]))
    return Writers(found, Intervention((direction,), ())) if found else None


def expert_candidates(
    writers: Writers,
    descended: Sequence[Candidate],
    material: Material,
    rule: Rule,
    tied: Tied,
    journal: Journal,
    progress: Progress,
) -> list[Candidate]:
    """Score what silences more and more experts, until hardly any refusal is left; else also with each descent's edit.

    Neither layers below the first edited one nor anything else of `material` may depend on what is silenced.
    """
    counts = [n for n in _COUNTS if n < len(writers.found)] + [len(writers.found)]
    progress = progress.stage("experts", len(counts) + 2 * len(descended))
    found: list[Candidate] = []

    def tried(name: str, intervention: Intervention) -> Candidate:
        def score() -> tuple[float, float]:
            with ablated(material.loaded, intervention, tied=tied):
                return material.score({})

        inputs = [
            [direction.basis.tolist() for direction in intervention.directions],
            [edit.to_json() for edit in intervention.edits],
            [[probe.inputs["input_ids"].tolist(), probe.paths] for probe in material.refusal_probes],
        ]
        candidate = Candidate(name, intervention, *journal.remember(name, inputs, score, list, _pair))
        found.append(candidate)
        progress.done(len(found))
        return candidate

    limit = rule.max_refusals
    enough = 0
    for n in counts:
        alone = tried(f"{n} expert{'s' * (n > 1)} silenced", writers.silenced(n))
        enough += limit is not None and alone.refusal <= limit
        if enough > _MORE:
            break
    if enough:
        return found
    best = min(found, key=lambda candidate: (candidate.refusal, candidate.damage))
    n_layers = map_model(material.loaded.model).n_layers
    for candidate in descended:
        for share, said in ((1.0, ""), (0.5, "half of ")):
            weaker = intervene(candidate.intervention, n_layers, strength=share)
            both = Intervention(weaker.directions, (*weaker.edits, *best.intervention.edits))
            tried(f"{best.name}, with {said}{candidate.name}", both)
    return found


def _pair(kept: Sequence[float]) -> tuple[float, float]:
    refusal, damage = kept
    return refusal, damage


def in_turn(candidates: Sequence[Candidate], n_directions: int, rule: Rule) -> tuple[int, ...]:
    """Put candidates in the order in which they are tried, those of directions alone standing before the others.

    Of both kinds one is among the first two, whatever the other's score: a score does not see whether what is answered
    belongs to what was asked.
    """
    points = [(candidate.refusal, candidate.damage) for candidate in candidates]
    order = list(by_rule(points, rule))
    order += [
        n_directions + index for index in by_rule(points[n_directions:], rule) if n_directions + index not in order
    ]
    other = next((index for index in order if (index < n_directions) is not (order[0] < n_directions)), None)
    if other is not None:
        order.remove(other)
        order.insert(1, other)
    return tuple(order)
