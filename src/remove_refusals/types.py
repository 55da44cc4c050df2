"""The core types: frozen dataclasses for everything that flows from one stage to the next.

PromptSet → Activations → Direction → Intervention → EditPlan → one carrier. What a model's map and an edit plan consist
of is in `map_types`.
"""

import hashlib
import json
from dataclasses import dataclass

import torch

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
