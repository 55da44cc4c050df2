"""The core types: frozen dataclasses for everything that flows from one stage to the next.

PromptSet → Activations → Direction → Intervention → EditPlan → one carrier.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import torch

from remove_refusals.errors import DirectionError
from remove_refusals.linalg import Variant

SiteKind = Literal["embedding", "attn", "mlp"]
"""A place where something is added to the residual stream; `attn` also stands for the mixer in its place."""

SITE_KINDS: tuple[SiteKind, ...] = ("embedding", "attn", "mlp")


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


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt is put before the model.

    Attributes:
        system_prompt: A system message before each prompt.
        chat_template: The text of a Jinja template to use in place of the tokenizer's own.
        plain: Whether to use no template: the prompt alone.
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    plain: bool = False


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
        harmless_component: `Qᵀm` for the mean `m` of the harmless activations at that layer, over the positions: `k`
            numbers along the basis, which the affine variant puts back.
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
    harmless_component: tuple[float, ...] | None = None
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
        offset: What is added to the residual stream after that, once: `k` numbers along the direction's basis. Only
            the embedding takes one, from where it reaches every layer; empty for none.
    """

    kind: SiteKind
    layer: int | None
    strength: float
    direction: int = 0
    offset: tuple[float, ...] = ()


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
class ChannelStep:
    """One linear step between a writer's output and the residual stream, acting on each channel.

    Attributes:
        kind: `gain` multiplies by `parameter + offset` channel by channel; `center` subtracts the mean over channels;
            `taps` is a depthwise convolution over tokens, each of whose taps multiplies channel by channel.
        parameter: The name of the gain in the model, of `d_model` numbers, or of the taps, `[d_model, 1, n_taps]`;
            None for `center`.
        offset: What is added to the parameter to get the effective gain: 1.0 in Gemma, 0.0 in most. For `taps` 1.0 if
            what enters the convolution is also added to what leaves it.
    """

    kind: Literal["gain", "center", "taps"]
    parameter: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class DiskTensor:
    """A tensor of a checkpoint that holds a parameter of the model, or a part of it.

    Attributes:
        name: Its name on disk.
        axis: Its axis of width d_model.
    """

    name: str
    axis: int


@dataclass(frozen=True)
class Writer:
    """A parameter whose output lands in the residual stream.

    Attributes:
        parameter: Its name in the model, for example `model.layers.3.mlp.down_proj.weight`.
        axis: The axis of width d_model that is its output.
        shape: Its shape.
        steps: What its output passes through before it is added to the residual stream, first step first.
        on_disk: The tensors of a checkpoint that hold it; several where experts are fused in memory only.
    """

    parameter: str
    axis: int
    shape: tuple[int, ...]
    steps: tuple[ChannelStep, ...] = ()
    on_disk: tuple[DiskTensor, ...] = ()


@dataclass(frozen=True)
class HookPoint:
    """A tensor that a hook can change.

    Attributes:
        module: The module's name in the model; its output is changed, or its input if `on_input` is set.
        steps: What lies between that and the residual stream, first step first.
        on_input: Whether the module's input is changed.
        writer: A writer whose output is no module's, as a bias that a norm adds. If it is given, an edited copy stands
            in its place, and `module` is empty.
    """

    module: str
    steps: tuple[ChannelStep, ...] = ()
    on_input: bool = False
    writer: Writer | None = None


@dataclass(frozen=True)
class Site:
    """A place where something is added to the residual stream.

    Attributes:
        kind: The kind of site.
        layer: The layer's index, or None for the embedding.
        writers: The parameters whose output lands here.
        hooks: The outputs to change so that the effect is that of editing the writers (before any norm in between).
        residual_hook: The output as it is added to the residual stream (after any norm in between); None if that is no
            module's output.
    """

    kind: SiteKind
    layer: int | None
    writers: tuple[Writer, ...]
    hooks: tuple[HookPoint, ...]
    residual_hook: HookPoint | None


Verdict = Literal["exact", "hooks only"]


@dataclass(frozen=True)
class ModelMap:
    """A model's sites and writers.

    Attributes:
        model_type: The `model_type` of the config.
        d_model: The width of the residual stream.
        n_layers: The number of layers.
        layers: The layers' module names, in order.
        sites: Every site, the embedding first, then in the order of the layers.
        input_embedding: The name of the input embedding's weight.
        unembedding: The name of the unembedding's weight; None if the model has none.
        tied: Whether input embedding and unembedding are one parameter.
        leaks: Why a weight edit cannot be exact, one sentence each; empty where it can.
        unhooked: Why hooks cannot be exact, one sentence each; empty where they can.
        unused: Parameters of the layers with an axis of width d_model that take no part in the forward pass.
        used_elsewhere: Parameters that are also used while the module that holds them is not being called; a change of
            what the module does misses those uses.
        stored: The names under which checkpoints hold the model's tensors; empty if they are not known.
        prefix: What such a name begins with; some checkpoints leave it out.
    """

    model_type: str
    d_model: int
    n_layers: int
    layers: tuple[str, ...]
    sites: tuple[Site, ...]
    input_embedding: str
    unembedding: str | None
    tied: bool
    leaks: tuple[str, ...] = ()
    unhooked: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    used_elsewhere: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    prefix: str = ""

    @property
    def verdict(self) -> Verdict:
        """`exact` if an edit of the weights is exact, otherwise `hooks only`."""
        return "hooks only" if self.leaks else "exact"


@dataclass(frozen=True, eq=False)
class PlanEntry:
    """One tensor to be edited: `W' = W - strength * basis (basisᵀ W) + basis offset` along `axis`.

    Attributes:
        parameter: The tensor's name in the model.
        kind: The kind of the site that it writes to.
        layer: The layer's index, or None for the embedding.
        axis: The axis of width d_model.
        shape: The tensor's shape.
        strength: The share that is taken out.
        basis: `[d_model, k]`, float32, orthonormal: the direction, pulled back through the steps between the writer
            and the residual stream.
        on_disk: The tensors of a checkpoint that hold it.
        offset: What each row gets after that: `k` numbers along `basis`; empty for none.
    """

    parameter: str
    kind: SiteKind
    layer: int | None
    axis: int
    shape: tuple[int, ...]
    strength: float
    basis: torch.Tensor
    on_disk: tuple[DiskTensor, ...]
    offset: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class EditPlan:
    """An intervention resolved against one model: every tensor to be touched.

    Attributes:
        entries: What happens to each tensor, in the order of the map.
        untie: Whether the unembedding gets a copy of the unedited embedding first.
        left: Writers that are not touched, with the reason.
        leaks: Why the edit is not exact, if it was asked for all the same.
        variant: What else the edit does to each tensor.
        embedding_scale: What a row of the embedding is multiplied by until it is in the residual stream; None where
            no offset had to be divided by it.
    """

    entries: tuple[PlanEntry, ...]
    untie: bool
    left: tuple[tuple[str, str], ...]
    leaks: tuple[str, ...] = ()
    variant: Variant = "plain"
    embedding_scale: float | None = None
