"""The core types, frozen: PromptSet → Activations → Direction → Intervention → EditPlan → one carrier.

What a model's map consists of is in `modelmap/types.py`; an edit plan is in `directions/plan.py`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AliasChoices, Field, PlainSerializer

from remove_refusals.errors import DirectionError
from remove_refusals.files import Record
from remove_refusals.notebook import plot
from remove_refusals.settings import SiteKind, Tied

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PromptSet:
    """User messages in a fixed order; `source` is a file, a data set id with split and column, or `embedded`."""

    name: str
    prompts: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, {len(self)} prompts, source={self.source!r}, sha256={self.sha256[:12]})"

    @property
    def sha256(self) -> str:
        """The hash of the prompts in their order: SHA-256 of their JSON list in UTF-8, as 64 hex digits."""
        encoded = json.dumps(list(self.prompts), ensure_ascii=False, separators=(",", ":")).encode()
        return hashlib.sha256(encoded).hexdigest()

    @property
    def ids(self) -> tuple[str, ...]:
        """What each prompt is called in records: the first 16 hex digits of its SHA-256 in UTF-8."""
        return tuple(hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in self.prompts)


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states of the residual stream at chosen token positions."""

    hidden: "torch.Tensor"
    """`[n_prompts, n_positions, n_layers + 1, d_model]`, float32, on the CPU. Index `i` of the third axis is the stream
    before layer `i`, and the last one that behind the last layer that was looked at, before any final norm."""
    positions: tuple[int, ...]
    """Negative, counted from the end of the rendered prompt."""
    prompts: PromptSet
    model: str | None = None
    """What records call the model."""

    @property
    def n_layers(self) -> int:
        """The number of layers that were looked at, from the first; it may be less than the model has."""
        return self.hidden.shape[2] - 1

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.hidden.shape[3]

    def __repr__(self) -> str:
        places = f"positions={self.positions}, n_layers={self.n_layers}, d_model={self.d_model}, model={self.model!r}"
        return f"Activations({self.prompts!r}, {places})"


class DirectionOrigin(Record):
    """Where a direction came from and how it was found; what is not known is None."""

    method: str
    """For example `mean-difference`, `projected-mean-difference` or `given`."""
    model: str | None = None
    layer: int | None = None
    """The index on the layer axis of `Activations.hidden`."""
    position: int | tuple[int, ...] | None = None
    """The token position, negative; several of them for a direction with a column for each."""
    seed: int | None = None
    n_harmful: int | None = None
    n_harmless: int | None = None
    harmful_sha256: str | None = None
    harmless_sha256: str | None = None
    length: Annotated[float, Field(gt=0)] | None = None
    """How long the difference was of which this is the unit vector; of a direction with one column alone."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A checked orthonormal basis, `[d_model, k]` in float32 on the CPU, of the subspace to be taken out."""

    basis: "torch.Tensor"
    origin: DirectionOrigin

    def __post_init__(self) -> None:
        import torch

        basis = self.basis
        if basis.dim() != 2 or basis.dtype != torch.float32 or not 0 < basis.shape[1] <= basis.shape[0]:
            raise DirectionError(
                f"The direction has shape {tuple(basis.shape)} and dtype {basis.dtype}, expected [d_model, k] in "
                "float32 with 1 <= k <= d_model; build it with `direction_from_vectors`."
            )
        if not bool(torch.isfinite(basis).all()):
            raise DirectionError("The direction has NaN or infinite entries; compute it again from finite activations.")
        error = float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())
        if error > 1e-4:
            raise DirectionError(
                f"The columns of the direction are off orthonormal by {error:.2g}, expected at most 1e-4; "
                "build it with `direction_from_vectors`."
            )

    @property
    def d_model(self) -> int:
        """The width of the residual stream that the direction lives in."""
        return self.basis.shape[0]

    def __repr__(self) -> str:
        known = {name: value for name, value in self.origin if value is not None and "harm" not in name}
        norm = f", norm={known.pop('length'):.4g}" if "length" in known else ""
        said = ", ".join(f"{name}={value!r}" for name, value in known.items())
        return f"Direction({said}{norm}, d_model={self.d_model}, rank={self.basis.shape[1]})"


class TiedChoice(Record):
    """What happens to an embedding that is also the unembedding: what was asked for, what is done, and why."""

    asked: Tied
    done: Literal["untie", "both"]
    why: str


class SiteEdit(Record):
    """How much of which direction is taken out at the sites of one kind in one layer, or of one expert's output."""

    # What `selection.json` once called it.
    kind: SiteKind = Field(validation_alias=AliasChoices("kind", "site"))
    layer: int | None = None
    """None for the embedding."""
    strength: float
    """The share of the component: 0 leaves the site alone, 1 takes out all of it."""
    direction: int = 0
    """The index into `Intervention.directions`."""
    expert: int | None = None
    """Which one, for the kind `expert` alone."""
    whole: bool | None = None
    """True for an expert that is silenced: of all that it writes the share is taken out, along no direction."""

    @property
    def place(self) -> tuple[SiteKind, int | None, int | None]:
        """What an intervention edits at most once: kind, layer and expert."""
        return self.kind, self.layer, self.expert


@dataclass(frozen=True, eq=False)
class Intervention:
    """The model-independent choice, at most one edit per kind, layer and expert; sites without one are left alone."""

    directions: tuple[Direction, ...]
    edits: tuple[SiteEdit, ...]

    def __repr__(self) -> str:
        layers = [edit.layer for edit in self.edits if edit.layer is not None]
        strengths = sorted({f"{edit.strength:.3g}" for edit in self.edits}, key=float)
        where = f"layers {min(layers)}-{max(layers)}" if layers else "no layer"
        share = (
            f"strength {' to '.join(strengths[:: max(1, len(strengths) - 1)])}" if strengths else "nothing taken out"
        )
        n = len(self.directions)
        found = f", {f'{n} directions, the first ' if n > 1 else ''}{self.directions[0]!r}" if n else ""
        return f"Intervention({len(self.edits)} sites, {where}, {share}{found})"


class Auroc(Record):
    """The area under the receiver operating characteristic: how often a harmful prompt scores above a harmless one."""

    value: float
    """The share of pairs, ties counted half."""
    low: float
    """The lower end of the 95% interval."""
    high: float
    n_harmful: int
    n_harmless: int
    seed: int
    """What cut the sets into halves."""


# A picture needs four digits, and a model of many layers has many points.
Points = tuple[tuple[Annotated[float, PlainSerializer(lambda value: float(f"{value:.4g}"))], ...], ...]
Cosine = Annotated[float, PlainSerializer(lambda value: round(value, 4))]


class Projection(Record):
    """Where each prompt lies: along the difference of the other half's means, and along what varies most beside it."""

    harmful: Points
    harmless: Points


class LayerSeparation(Record):
    """How far apart the two sets lie at one index of the layer axis."""

    layer: int
    auroc: Auroc | None = None
    """Of the projection on the mean difference of the prompts' other half; None where the means do not differ, as
    before the first layer, when the token is the same in every prompt."""
    difference_norm: float
    norm_harmful: float
    """The mean norm on harmful prompts."""
    norm_harmless: float
    largest_coordinate_share: float
    projection: Projection | None = None


@dataclass(frozen=True)
class Separation:
    """How far apart harmful and harmless prompts lie, layer by layer; `seed` drew prompts and cut them into halves."""

    model: str | None
    position: int
    seed: int
    prompts: tuple[PromptSet, PromptSet]
    layers: tuple[LayerSeparation, ...]
    """One entry for each index of the layer axis."""
    cosines: tuple[tuple[Cosine | None, ...], ...]
    """`[n_layers + 1, n_layers + 1]`: between the mean differences of any two; None where there is none."""

    def __repr__(self) -> str:
        known = [(layer.auroc.value, layer.layer) for layer in self.layers if layer.auroc is not None]
        best = f", largest AUROC {max(known)[0]:.3f} at layer {max(known)[1]}" if known else ", no AUROC"
        harmful, harmless = map(len, self.prompts)
        sizes = f"{harmful} harmful and {harmless} harmless prompts, position={self.position}"
        return f"Separation({sizes}, {len(self.layers)} layers{best}, model={self.model!r})"

    def _repr_html_(self) -> str:
        return auroc_plot(self.layers)


def auroc_plot(layers: Iterable[LayerSeparation]) -> str:
    """Draw the AUROC by layer for a notebook."""
    measured = [(layer.layer, found) for layer in layers if (found := layer.auroc) is not None]
    points = [(layer, found.value, found.low, found.high) for layer, found in measured]
    title = "AUROC by layer with 95% intervals: how often a harmful prompt lies farther along the direction"
    return plot(points, title, chance=0.5)


class Contribution(Record):
    """What a site adds along a direction on harmful prompts more than on harmless ones: a difference of means."""

    site: SiteKind
    layer: int | None = None
    """None for the embedding."""
    value: float
    low: float
    """The lower end of the 95% interval (Welch 1947)."""
    high: float


class Contributions(Record):
    """Where the difference along a direction comes from."""

    layer: int | None = None
    """Where the direction was found, on the layer axis."""
    position: int
    stream: tuple[float, ...]
    """For each index of the layer axis the difference of the means along the direction."""
    sites: tuple[Contribution, ...]
    """Embedding, attention and MLP of each layer, as far as their outputs explain what the layer adds."""
    n_harmful: int
    n_harmless: int


class WriterShare(Record):
    """How much of what a writer can write lies along a direction."""

    parameter: str
    site: SiteKind
    layer: int | None = None
    expert: int | None = None
    """None for a writer that is no expert."""
    value: float
    """The share of its squared norm, times the number of channels: 1 for a matrix that knows nothing of it."""


class ExpertChoice(Record):
    """How often a token goes through an expert, and what that writes along a direction.

    The contribution is the mean of the expert's weight times its output along the direction on harmful prompts, less
    that on harmless ones; with its 95% interval (Welch 1947).
    """

    layer: int
    expert: int
    harmful: float
    """The share of harmful prompts."""
    harmless: float
    n_harmful: int
    n_harmless: int
    contribution: float | None = None
    low: float | None = None
    high: float | None = None


class Share(Record):
    """A mean of shares over pairs of prompts with its 95% interval (Student's t)."""

    value: float
    low: float
    high: float


class Interchange(Record):
    """What of a difference along a direction goes where harmful prompts get the experts of harmless ones.

    1 is all of it. The control gets those of other harmful prompts.
    """

    layer: int | None = None
    """None for all layers with experts at once."""
    share: Share
    control: Share
    n: int
