"""What a run's directory says of itself: the records that are written to disk and read back, each with its type."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, computed_field

from remove_refusals.errors import RecordError
from remove_refusals.files import Record
from remove_refusals.measure import Evaluation, Mean, Rate, Response, is_poor_match, read_rows
from remove_refusals.settings import SiteKind
from remove_refusals.types import (
    Auroc,
    Contributions,
    Cosine,
    DirectionOrigin,
    ExpertChoice,
    Interchange,
    LayerSeparation,
    Separation,
    SiteEdit,
    TiedChoice,
    WriterShare,
)

LARGEST_SHARE_OFF = 0.05
"""How far the share that is left in a quantised tensor may be off: its rounding alone would hide a skipped writer."""


_BOUNDARIES = "largest_component_at_layer_boundaries"


class BaseRecord(Record):
    """From what a model was made; of a directory the hashes of its files, and what its card says of its licence."""

    source: str
    revision: str | None = None
    model_type: str
    dtype: str | None = None
    sha256: dict[str, str] | None = None
    card: dict[str, Any] | None = None


class DirectionRecord(DirectionOrigin):
    """What a direction is and where it came from."""

    # Those of an older version may say more.
    model_config = ConfigDict(extra="ignore")

    sha256: str
    d_model: int
    rank: int


class PlanRecord(Record):
    """What happened to which tensor: those that were edited, and those that were left, each with the reason."""

    edited: tuple[str, ...]
    left: dict[str, str]
    variant: str = "plain"
    embedding_untied: bool = False
    tied_in_base: bool = False
    tied: TiedChoice | None = None
    """What was done with an embedding that is also the unembedding, if it was edited."""


class PromptsRecord(Record):
    """Which prompts were used."""

    source: str
    n: int
    sha256: str


class Confirmation(Record):
    """What a candidate did when the model generated with it, on prompts that the search did not use.

    `broken` counts, of the harmless prompts that the base answered, those that get no answer now; `damage` is the mean
    KL along the base's own answers to those, in nats. `match` counts the answers to harmful prompts that answer them,
    and `match_of_base` the base's own to harmless ones, by words alone where these tell of enough. Records of older
    versions count no lectures and no matches.
    """

    refusals: Rate
    degenerate: Rate
    false_refusals: Rate
    degenerate_harmless: Rate
    moralising: Rate | None = None
    moralising_harmless: Rate | None = None
    broken: Rate | None = None
    match: Rate | None = None
    match_of_base: Rate | None = None
    damage: Mean | None = None

    @property
    def failures(self) -> float:
        """The share of harmful prompts that got no answer: refused, a lecture, degenerate, or to something else."""
        lectures = 0 if self.moralising is None else self.moralising.count
        failed = (self.refusals.count + lectures + self.degenerate.count) / self.refusals.n
        if self.match is not None and is_poor_match(self.match, self.match_of_base):
            return max(failed, 1 - self.match.value)
        return failed


class SelectionSummary(Record):
    """What was picked by which rule, and what should be said of it."""

    method: str
    rule: str
    n_candidates: int
    picked: str
    refusal: float
    damage: float
    confirmation: Confirmation | None = None
    notes: tuple[str, ...] = ()


class LeakRecord(Record):
    """Why an edit is not exact, and the most of the direction that is left at any layer's boundary."""

    why: tuple[str, ...]
    largest_component: float


class AdapterRecord(Record):
    """What an adapter holds."""

    kind: str
    rank: int
    dtype: str
    tensors: int
    biases: int | None = None


class AblationRecord(Record):
    """`ablation.json`: from what a model was made and how; of a run also its settings and what it measured."""

    format: Literal[1] = 1
    modified: str = ""
    base: BaseRecord
    directions: tuple[DirectionRecord, ...]
    intervention: tuple[SiteEdit, ...]
    plan: PlanRecord
    versions: dict[str, str]
    adapter: AdapterRecord | None = None
    leak: LeakRecord | None = None
    settings: dict[str, Any] | None = None
    prompts: dict[str, PromptsRecord] | None = None
    selection: SelectionSummary | None = None
    scores: dict[str, Any] | None = None
    warnings: tuple[str, ...] | None = None


class WriterCertificate(Record):
    """What was measured on one tensor of the saved files that holds a writer or a part of one.

    `share_left` is `‖QᵀW'‖ / ‖QᵀW‖`, of which a plain edit wants `|1 - strength|`; of a silenced expert it is
    `‖W'‖ / ‖W‖`. Frobenius norms are `error`, of `W'`
    minus the planned one, and what rounding may cost, and quantising the unedited tensor anew.
    """

    model_config = ConfigDict(extra="ignore")

    name: str
    parameter: str
    kind: SiteKind
    layer: int | None = None
    expert: int | None = None
    dtype: str
    strength: float
    share_left: float
    error: float
    allowed: float
    requantising_alone: float | None = None

    @property
    def off(self) -> float:
        """How far the share that is left is from the one that the plan wants."""
        return abs(self.share_left - abs(1 - self.strength))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the deviation is within rounding; of a quantised tensor also the share that is left."""
        return self.error <= self.allowed and (self.requantising_alone is None or self.off <= LARGEST_SHARE_OFF)


class Certificate(Record):
    """`certificate.json`: what was measured on saved files against their base, and what does not hold.

    `boundaries` are the largest components along the direction, relative to the residual stream's norm, before each
    layer and behind the last; None where the model was not run.
    """

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    format: Literal[1] = 1
    problems: tuple[str, ...]
    edited: tuple[WriterCertificate, ...]
    left: dict[str, str]
    identical: int = Field(validation_alias="identical_tensors", serialization_alias="identical_tensors")
    leaks: tuple[str, ...] | None = None
    boundaries: tuple[float, ...] | None = Field(None, validation_alias=_BOUNDARIES, serialization_alias=_BOUNDARIES)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the files hold what the plan says."""
        return not self.problems

    @property
    def worst(self) -> WriterCertificate | None:
        """The edited tensor with the largest share left beyond what the plan wants."""
        return max(self.edited, key=lambda entry: entry.off, default=None)


class CandidateRecord(Record):
    """One candidate: what the search measured of it, and what generation showed, if it was tried."""

    name: str
    refusal: float
    damage: float
    strengths: tuple[SiteEdit, ...]
    confirmation: Confirmation | None = None


class SelectionRecord(Record):
    """`selection.json`: every candidate, the front of those that no other beats, and the pick, by their index."""

    method: str
    rule: str
    picked: int
    front: tuple[int, ...]
    notes: tuple[str, ...] = ()
    candidates: tuple[CandidateRecord, ...]


class LookedAt(Record):
    """Prompts that a model was run on, with what each is called in other records."""

    n: int
    sha256: str
    ids: tuple[str, ...] = ()


class PositionRecord(Record):
    """How far apart the two sets lie at one token of the chat template's tail, for each index of the layer axis."""

    position: int
    token: str
    auroc: tuple[Auroc | None, ...]


class LookedAtDirection(Record):
    """The direction of an examination, and the first and the last layer that it was taken out of."""

    layer: int | None = None
    position: int | tuple[int, ...] | None = None
    method: str
    sha256: str
    taken_out_of: tuple[int, int]


class AnalysisRecord(Record):
    """`analysis.json`: how far apart harmful and harmless prompts lie; of an examination also where that comes from."""

    format: Literal[1] = 1
    model: str | None = None
    position: int
    seed: int
    prompts: dict[str, LookedAt]
    layers: tuple[LayerSeparation, ...]
    cosines: tuple[tuple[Cosine | None, ...], ...]
    positions: tuple[PositionRecord, ...] | None = None
    direction: LookedAtDirection | None = None
    contributions: Contributions | None = None
    writer_shares: tuple[WriterShare, ...] | None = None
    expert_choices: tuple[ExpertChoice, ...] | None = None
    interchange: tuple[Interchange, ...] | None = None
    versions: dict[str, str] | None = None

    @classmethod
    def made(cls, separated: Separation, **more: Any) -> "AnalysisRecord":
        """Make it of a separation; what else an examination found is `more`."""
        sets = zip(("harmful", "harmless"), separated.prompts, strict=True)
        return cls(
            model=separated.model,
            position=separated.position,
            seed=separated.seed,
            prompts={name: LookedAt(n=len(part), sha256=part.sha256, ids=part.ids) for name, part in sets},
            layers=separated.layers,
            cosines=separated.cosines,
            **more,
        )


@dataclass(frozen=True)
class Material:
    """What a report is made from; what is not in the directory is None."""

    ablation: AblationRecord | None = None
    scores: Evaluation | None = None
    selection: SelectionRecord | None = None
    certificate: Certificate | None = None
    analysis: AnalysisRecord | None = None
    rows: tuple[Response, ...] | None = None

    @property
    def is_examination(self) -> bool:
        """Whether a model was looked at beyond the separation of its prompts."""
        return self.analysis is not None and self.analysis.contributions is not None


_RECORDS: dict[str, type[Record]] = {
    "ablation": AblationRecord,
    "scores": Evaluation,
    "selection": SelectionRecord,
    "certificate": Certificate,
    "analysis": AnalysisRecord,
}

NAMES = (*(f"{name}.json" for name in _RECORDS), "rows.jsonl")
"""The files that a report is made from."""


def read_material(directory: Path) -> Material:
    """Read the records in what `run` left, or in any directory with some of the same files."""
    if not directory.is_dir():
        raise RecordError(f"There is no directory {directory}, expected one that `run` made; check the path.")
    found: dict[str, Any] = {
        name: record.read(path, error=RecordError)
        for name, record in _RECORDS.items()
        if (path := directory / f"{name}.json").is_file()
    }
    if (rows := directory / "rows.jsonl").is_file():
        found["rows"] = read_rows(rows, error=RecordError)
    if not found:
        raise RecordError(
            f"The directory {directory} holds none of {', '.join(NAMES)}, expected at least one; name a directory that "
            "`run` made."
        )
    return Material(**found)
