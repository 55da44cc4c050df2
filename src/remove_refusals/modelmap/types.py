"""What a model's map and an edit plan consist of: writers and hook points by site, and what happens to which tensor."""

from dataclasses import dataclass
from typing import Literal

from remove_refusals.formula import ChannelStep
from remove_refusals.settings import SiteKind


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
