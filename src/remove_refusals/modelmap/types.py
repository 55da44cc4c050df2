"""What a model's map consists of: writers and hook points, by the sites where they add to the residual stream."""

from dataclasses import dataclass
from typing import Literal

from remove_refusals.formula import ChannelStep
from remove_refusals.settings import SiteKind


@dataclass(frozen=True)
class DiskTensor:
    """A tensor of a checkpoint that holds a parameter, or a part of it, with its axis of width d_model."""

    name: str
    axis: int


@dataclass(frozen=True)
class Writer:
    """A parameter whose output, along its axis of width d_model, lands in the residual stream, behind `steps`."""

    parameter: str
    axis: int
    shape: tuple[int, ...]
    steps: tuple[ChannelStep, ...] = ()


@dataclass(frozen=True)
class HookPoint:
    """A tensor that a hook can change, with `steps` between it and the residual stream: a module's output or input.

    Or else (`module` is empty) what `writer` gives, as a bias that a norm adds: an edited copy stands in its place.
    """

    module: str
    steps: tuple[ChannelStep, ...] = ()
    on_input: bool = False
    writer: Writer | None = None


@dataclass(frozen=True)
class Site:
    """A place where `writers` add to the residual stream; its layer is None for the embedding.

    Changing `hooks`, before any norm in between, has the effect of editing the writers. `residual_hook` is the output
    as it is added, after any norm in between; None if that is no module's.
    """

    kind: SiteKind
    layer: int | None
    writers: tuple[Writer, ...]
    hooks: tuple[HookPoint, ...]
    residual_hook: HookPoint | None


@dataclass(frozen=True)
class Mixture:
    """A layer's routed experts: the module that is told which experts each token goes through, and with what weights.

    Each of the `writers` holds one expert behind the other along its first axis; there are none where a strength of
    one expert cannot be put into them. With a `router` the module is told nothing and gets the tokens sorted by expert,
    as that module of the same block gives them.
    """

    layer: int
    module: str
    n_experts: int
    writers: tuple[Writer, ...]
    router: str | None = None


@dataclass(frozen=True)
class ModelMap:
    """A model's sites and writers, the embedding first, then in the order of the layers, which are module names.

    Attributes:
        leaks: Why a weight edit cannot be exact, one sentence each; `unhooked` says it of hooks.
        mixtures: The layers with routed experts.
        text_type: The type of the language model inside, where `model_type` is that of one with towers.
        unused: Parameters of the layers with an axis of width d_model that take no part in the forward pass.
        used_elsewhere: Parameters that are used while their module is not called, too: changing its output misses that.
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
    mixtures: tuple[Mixture, ...] = ()
    text_type: str = ""

    def __repr__(self) -> str:
        writers = sum(len(site.writers) for site in self.sites)
        size = f"{self.n_layers} layers, d_model={self.d_model}, {writers} writers"
        return f"ModelMap({self.model_type!r}, {size}, {self.verdict}{', tied' if self.tied else ''})"

    @property
    def verdict(self) -> Literal["exact", "hooks only"]:
        """`exact` if an edit of the weights is exact, otherwise `hooks only`."""
        return "hooks only" if self.leaks else "exact"
