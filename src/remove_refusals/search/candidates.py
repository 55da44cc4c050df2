"""Candidates of a search, the front of those that no other beats, and the rule that picks one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from remove_refusals import notebook
from remove_refusals.directions import DIRECTIONS, direction_sha256
from remove_refusals.errors import DirectionError
from remove_refusals.files import atomic_file
from remove_refusals.measure import number, percent
from remove_refusals.report import CandidateRecord, Confirmation, SelectionRecord, SelectionSummary
from remove_refusals.settings import Rule
from remove_refusals.types import Direction, DirectionOrigin, Intervention

CANDIDATES = f"{DIRECTIONS}/candidates.safetensors"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One intervention: its mean probability of refusals, mean damage in nats, and what generation showed, if tried."""

    name: str
    intervention: Intervention
    refusal: float
    damage: float
    confirmation: Confirmation | None = None

    def record(self) -> CandidateRecord:
        """Give the entry in `selection.json`."""
        values = {name: value for name, value in vars(self).items() if name != "intervention"}
        return CandidateRecord(strengths=self.intervention.edits, **values)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a search tried, what it picked by which rule, and what should be said of it, a sentence each."""

    method: str
    candidates: tuple[Candidate, ...]
    picked: int
    rule: Rule
    notes: tuple[str, ...] = ()

    @property
    def candidate(self) -> Candidate:
        """The pick."""
        return self.candidates[self.picked]

    @property
    def intervention(self) -> Intervention:
        """The pick's intervention."""
        return self.candidate.intervention

    @property
    def front(self) -> tuple[int, ...]:
        """The indices of the candidates that no other beats, by rising damage."""
        return front([(candidate.refusal, candidate.damage) for candidate in self.candidates])

    def __repr__(self) -> str:
        found = self.candidate.confirmation
        tried = "not tried" if found is None else f"{found.refusals.count}/{found.refusals.n} refused"
        picked = f"{self.candidate.name!r}, {tried}, damage {self.candidate.damage:.3g} nats"
        n = len(self.candidates)
        return f"Selection({n} candidate{'s' if n > 1 else ''}, picked {picked}; rule: {self.rule})"

    def table(self, most: int = 12) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Give the head and rows of text; of more candidates than `most` those on the front and those that were tried.

        Refusal and damage are those on the prompts of the search; what was counted, on others.
        """
        rows = []
        for index, candidate in enumerate(self.candidates):
            found = candidate.confirmation
            if len(self.candidates) > most and found is None and index not in self.front:
                continue
            name = "*" if index == self.picked else "", candidate.name
            row: tuple[str, ...] = (*name, percent(candidate.refusal), number(candidate.damage))
            if found is not None:
                counted = (found.refusals, found.moralising, found.degenerate, found.broken, found.match)
                row += tuple("" if rate is None else f"{rate.count}/{rate.n}" for rate in counted)
            rows.append(row)
        head = ("", "candidate", "refusal", "damage", "refused", "moralising", "degenerate", "broken", "match")
        return head, rows

    def table_key(self) -> tuple[str, ...]:
        """Explain the table, and give what should be said of the search, a sentence each."""
        key = (
            "Refusal and damage (KL in nats, along the model's own answers): on the prompts of the search. The counts: "
            "generated, on others; matches are told by words alone where these tell of enough."
        )
        return key, *(f"Note: {note}" for note in self.notes)

    def _repr_html_(self) -> str:
        return notebook.table(*self.table(), f"Candidates; the pick: {self.rule}", " ".join(self.table_key()))

    def summary(self) -> SelectionSummary:
        """Say what was picked by which rule, and what should be said of it."""
        picked = self.candidate.record()
        return SelectionSummary(
            method=self.method,
            rule=str(self.rule),
            n_candidates=len(self.candidates),
            picked=picked.name,
            refusal=picked.refusal,
            damage=picked.damage,
            confirmation=picked.confirmation,
            notes=self.notes,
        )

    def record(self) -> SelectionRecord:
        """Give the content of `selection.json`."""
        return SelectionRecord(
            method=self.method,
            rule=str(self.rule),
            picked=self.picked,
            front=self.front,
            notes=self.notes,
            candidates=tuple(candidate.record() for candidate in self.candidates),
        )


def front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Give, by rising second coordinate, the indices of points that no other beats; less is better, ties go first."""
    order = sorted(range(len(points)), key=lambda index: (points[index][1], points[index][0], index))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][0] < points[kept[-1]][0]:
            kept.append(index)
    return tuple(kept)


def by_rule(points: Sequence[tuple[float, float]], rule: Rule) -> tuple[int, ...]:
    """Put the points (refusal, damage) of the front in the order in which a rule prefers them, and give their indices.

    Points that keep no limit come last, those that miss it least first. The knee is the point that is farthest from the
    line through the front's two ends, both coordinates scaled to the front's extent (Branke et al. 2004); the others
    follow by that distance.
    """
    on_front = front(points)

    def key(index: int) -> tuple[float, ...]:
        refusal, damage = points[index]
        beyond_kl = 0.0 if rule.max_kl is None else max(0.0, damage - rule.max_kl)
        if rule.max_refusals is not None:
            return max(0.0, refusal - rule.max_refusals), beyond_kl, damage
        return (beyond_kl, refusal) if rule.max_kl is not None else (-_bulge(points, on_front, index),)

    return tuple(sorted(on_front, key=key))


def _bulge(points: Sequence[tuple[float, float]], on_front: Sequence[int], index: int) -> float:
    """How far a point lies below the line through the ends of the front, in units of the front's extent."""
    first, last = points[on_front[0]], points[on_front[-1]]
    extents = first[0] - last[0], last[1] - first[1]
    if extents[0] <= 0 or extents[1] <= 0:
        return 0.0
    refusal, damage = points[index]
    return 1.0 - (refusal - last[0]) / extents[0] - (damage - first[1]) / extents[1]


def save_candidates(interventions: Mapping[int, Intervention], path: Path) -> None:
    """Write the directions of candidates, by their number in `selection.json`, each direction once."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    for index, intervention in interventions.items():
        names[str(index)] = [direction_sha256(direction)[:16] for direction in intervention.directions]
        bases = (direction.basis.contiguous() for direction in intervention.directions)
        tensors |= dict(zip(names[str(index)], bases, strict=True))
    with atomic_file(path) as staging:
        # What safetensors writes by itself is readable by its owner alone, whatever the umask says.
        staging.write_bytes(safetensors.torch.save(tensors, {"candidates": json.dumps(names)}))


def load_candidates(directory: Path) -> dict[str, Intervention]:
    """Read the candidates of a run's search whose directions were kept, by name in the order of `selection.json`."""
    path = directory / CANDIDATES
    if not path.exists():
        return {}
    record = SelectionRecord.read(directory / "selection.json", error=DirectionError)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["candidates"])
            bases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        found = {}
        for number, kept in sorted(names.items(), key=lambda item: int(item[0])):
            candidate = record.candidates[int(number)]
            directions = tuple(Direction(bases[name], DirectionOrigin(method="search")) for name in kept)
            found[candidate.name] = Intervention(directions, candidate.strengths)
    except (KeyError, IndexError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DirectionError(
            f"The candidates in {path} cannot be read ({type(error).__name__}: {error}), expected what `run` leaves; "
            "make the directory again."
        ) from error
    return found
