"""The core types: frozen dataclasses for everything that flows from one stage to the next.

PromptSet → Activations → Direction → Intervention → EditPlan → one carrier. What a model's map and an edit plan consist
of is in `map_types`.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import PlainSerializer

from remove_refusals.errors import DirectionError
from remove_refusals.settings import SiteKind


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        name: What the set is called in records, for example `harmful`.
        prompts: The user messages, as text.
        source: Where they came from: a file name, a data set id with split and column, or `embedded`.
    """

    name: str
    prompts: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.prompts)

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
    """Hidden states of the residual stream at chosen token positions.

    Attributes:
        hidden: `[n_prompts, n_positions, n_layers + 1, d_model]`, float32, on the CPU. Index `i` on the third axis is
            the residual stream before layer `i`; index `n_layers` is the stream after the last layer that was looked
            at, which is before the final norm where that is the model's last.
        positions: The token positions, negative and counted from the end of the rendered prompt.
        prompts: The prompts that were run, in the order of the first axis.
    """

    hidden: torch.Tensor
    positions: tuple[int, ...]
    prompts: PromptSet

    @property
    def n_layers(self) -> int:
        """The number of layers that were looked at, from the first; it may be less than the model has."""
        return self.hidden.shape[2] - 1

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.hidden.shape[3]


@dataclass(frozen=True)
class DirectionOrigin:
    """Where a direction came from and how it was found; everything that is not known is None.

    Attributes:
        method: For example `mean-difference`, `projected-mean-difference` or `given`.
        model: The model id or directory name that was measured.
        layer: The index on the layer axis of `Activations.hidden`.
        position: The token position, negative; several of them for a direction with a column for each.
        seed: The seed that drew the prompts.
        n_harmful: The number of harmful prompts.
        n_harmless: The number of harmless prompts.
        harmful_sha256: `PromptSet.sha256` of the harmful prompts.
        harmless_sha256: `PromptSet.sha256` of the harmless prompts.
        length: How long the difference was of which this is the unit vector; of a direction with one column alone.
    """

    method: str
    model: str | None = None
    layer: int | None = None
    position: int | tuple[int, ...] | None = None
    seed: int | None = None
    n_harmful: int | None = None
    n_harmless: int | None = None
    harmful_sha256: str | None = None
    harmless_sha256: str | None = None
    length: float | None = None


@dataclass(frozen=True, eq=False)
class Direction:
    """A checked orthonormal basis of the subspace to be taken out.

    Attributes:
        basis: `[d_model, k]`, float32, on the CPU, with orthonormal columns; `k` is 1 for the classic direction.
        origin: Where it came from.
    """

    basis: torch.Tensor
    origin: DirectionOrigin

    def __post_init__(self) -> None:
        """Check shape, dtype, finiteness and orthonormality.

        Raises:
            DirectionError: If any of them does not hold.
        """
        basis = self.basis
        if basis.dim() != 2 or basis.dtype != torch.float32 or not 0 < basis.shape[1] <= basis.shape[0]:
            raise DirectionError(
                f"The direction has shape {tuple(basis.shape)} and dtype {basis.dtype}, expected [d_model, k] in "
                "float32 with 1 <= k <= d_model; build it with `direction_from_vectors`."
            )
        if not bool(torch.isfinite(basis).all()):
            raise DirectionError("The direction has NaN or infinite entries; compute it again from finite activations.")
        gram = basis.T @ basis
        error = float((gram - torch.eye(basis.shape[1])).abs().max())
        if error > 1e-4:
            raise DirectionError(
                f"The columns of the direction are off orthonormal by {error:.2g}, expected at most 1e-4; "
                "build it with `direction_from_vectors`."
            )

    @property
    def d_model(self) -> int:
        """The width of the residual stream that the direction lives in."""
        return self.basis.shape[0]


@dataclass(frozen=True)
class SiteEdit:
    """How much of which direction is taken out at the sites of one kind in one layer.

    Attributes:
        kind: The kind of site.
        layer: The layer's index, or None for the embedding.
        strength: The share of the component that is taken out: 0 leaves the site alone, 1 takes out all of it.
        direction: The index into `Intervention.directions`.
    """

    kind: SiteKind
    layer: int | None
    strength: float
    direction: int = 0


@dataclass(frozen=True, eq=False)
class Intervention:
    """The model-independent choice: which direction, at which strength, at which site of which layer.

    Attributes:
        directions: The directions that `edits` refer to.
        edits: At most one per kind and layer; sites without one are left alone.
    """

    directions: tuple[Direction, ...]
    edits: tuple[SiteEdit, ...]


@dataclass(frozen=True)
class Auroc:
    """The area under the receiver operating characteristic: how often a harmful prompt scores above a harmless one.

    Attributes:
        value: The share of pairs, ties counted half, from 0 to 1.
        low: The lower end of the 95% interval.
        high: The upper end.
        n_harmful: How many harmful prompts there are.
        n_harmless: How many harmless prompts there are.
        seed: The seed that cut the sets into halves.
    """

    value: float
    low: float
    high: float
    n_harmful: int
    n_harmless: int
    seed: int


# A picture needs four digits, and a model of many layers has many points.
Points = tuple[tuple[Annotated[float, PlainSerializer(lambda value: float(f"{value:.4g}"))], ...], ...]


@dataclass(frozen=True)
class Projection:
    """Where each prompt lies in two dimensions.

    The first is how far it is from the middle of the other half's means along their difference, the second the first
    principal component of what the difference leaves.
    """

    harmful: Points
    harmless: Points


@dataclass(frozen=True, kw_only=True)
class LayerSeparation:
    """How far apart the two sets lie at one index of the layer axis.

    Attributes:
        layer: The index: the stream before that layer, and the number of layers for the stream behind the last.
        auroc: Of the projection on the mean difference of the prompts' other half; None where the means do not differ,
            as before the first layer, when the token is the same in every prompt.
        difference_norm: The norm of the difference of the means.
        norm_harmful: The mean norm on harmful prompts.
        norm_harmless: The mean norm on harmless prompts.
        largest_coordinate_share: The largest coordinate's share of the summed squares.
        projection: None where the means do not differ.
    """

    layer: int
    auroc: Auroc | None = None
    difference_norm: float
    norm_harmful: float
    norm_harmless: float
    largest_coordinate_share: float
    projection: Projection | None = None


Cosine = Annotated[float, PlainSerializer(lambda value: round(value, 4))]


@dataclass(frozen=True)
class Separation:
    """How far apart harmful and harmless prompts lie, layer by layer.

    Attributes:
        model: The model's name; None if it is not known.
        position: The token position.
        seed: The seed that cut the sets into halves, and drew from them where they were larger than what was looked at.
        prompts: The harmful and the harmless prompts.
        layers: One entry for each index of the layer axis.
        cosines: `[n_layers + 1, n_layers + 1]`: between the mean differences of any two; None where there is none.
    """

    model: str | None
    position: int
    seed: int
    prompts: tuple[PromptSet, PromptSet]
    layers: tuple[LayerSeparation, ...]
    cosines: tuple[tuple[Cosine | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a site adds along a direction on harmful prompts more than on harmless ones.

    Attributes:
        site: The kind of site.
        layer: The layer; None for the embedding.
        value: The difference of the means.
        low: The lower end of its 95% interval (Welch 1947).
        high: The upper end.
    """

    site: SiteKind
    layer: int | None = None
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Contributions:
    """Where the difference along a direction comes from.

    Attributes:
        layer: Where the direction was found, on the layer axis.
        position: The token position.
        stream: For each index of the layer axis the difference of the means along the direction.
        sites: Embedding, attention and MLP of each layer, as far as their outputs explain what the layer adds.
        n_harmful: How many harmful prompts there are.
        n_harmless: How many harmless prompts there are.
    """

    layer: int | None = None
    position: int
    stream: tuple[float, ...]
    sites: tuple[Contribution, ...]
    n_harmful: int
    n_harmless: int


@dataclass(frozen=True, kw_only=True)
class WriterShare:
    """How much of what a writer can write lies along a direction.

    Attributes:
        parameter: The writer.
        site: The kind of its site.
        layer: The layer; None for the embedding.
        expert: The expert's index; None for a writer that is none.
        value: The share of its squared norm, times the number of channels: 1 for a matrix that knows nothing of the
            direction.
    """

    parameter: str
    site: SiteKind
    layer: int | None = None
    expert: int | None = None
    value: float


@dataclass(frozen=True)
class ExpertChoice:
    """How often a router ranks an expert among those that a token goes through, by its logits alone.

    Attributes:
        layer: The layer.
        expert: The expert.
        harmful: The share of harmful prompts.
        harmless: The share of harmless prompts.
        n_harmful: How many harmful prompts there are.
        n_harmless: How many harmless prompts there are.
    """

    layer: int
    expert: int
    harmful: float
    harmless: float
    n_harmful: int
    n_harmless: int
