"""Where a direction comes from: what the embedding, attention and the MLP of each layer add along it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import ttest_ind

from remove_refusals.map_types import ModelMap, Site
from remove_refusals.models import LoadedModel
from remove_refusals.taps import Tap, collect_at
from remove_refusals.types import ChatFormat, Direction, PromptSet, SiteKind

_MULTIPLIER_TOLERANCE = 0.02
"""How far what a layer adds may be off its sites' outputs times one number: beyond the rounding of bfloat16."""


@dataclass(frozen=True)
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
    layer: int | None
    value: float
    low: float
    high: float


@dataclass(frozen=True)
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

    layer: int | None
    position: int
    stream: tuple[float, ...]
    sites: tuple[Contribution, ...]
    n_harmful: int
    n_harmless: int

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return asdict(self)


def site_contributions(
    loaded: LoadedModel,
    harmful: PromptSet,
    harmless: PromptSet,
    direction: Direction,
    model_map: ModelMap,
    *,
    position: int = -1,
    chat: ChatFormat | None = None,
    batch_size: int | None = None,
) -> Contributions:
    """Measure what each site adds along a direction at one token, on harmful prompts more than on harmless ones.

    Up to any layer the sites' contributions add up to the stream's.

    Args:
        loaded: The model.
        harmful: Prompts that it refuses, at least two.
        harmless: Prompts that it answers, at least two.
        direction: A direction of one column.
        model_map: The model's map.
        position: The token position.
        chat: How the prompts are put before the model.
        batch_size: How many prompts to run at once.

    Returns:
        The contributions; those of a layer are left out where its sites' outputs do not explain what it adds.

    Raises:
        PromptError: If the prompts cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    unit = direction.basis[:, 0]

    def along(states: torch.Tensor) -> torch.Tensor:
        return states @ unit.to(states.device)

    taps: dict[Any, Tap] = {index: Tap(name, True, along) for index, name in enumerate(model_map.layers)}
    taps[model_map.n_layers] = Tap(model_map.layers[-1], False, along)
    for site in _reachable(model_map):
        assert site.residual_hook is not None
        taps[site.kind, site.layer] = Tap(site.residual_hook.module, site.residual_hook.on_input, along)
    found = [collect_at(loaded, part, taps, position, chat, batch_size, model_map) for part in (harmful, harmless)]
    stream = [tuple(side[index].double() for side in found) for index in range(model_map.n_layers + 1)]
    sites = [_contribution("embedding", None, *stream[0])]
    for layer in range(model_map.n_layers):
        sites += _of_layer(layer, found, stream)
    return Contributions(
        direction.origin.layer,
        position,
        tuple(float(first.mean() - second.mean()) for first, second in stream),
        tuple(sites),
        len(harmful),
        len(harmless),
    )


def _reachable(model_map: ModelMap) -> list[Site]:
    """The layers' sites whose contribution is one module's output, and no other site's."""
    found = [
        site
        for site in model_map.sites
        if site.layer is not None and site.residual_hook and site.residual_hook.writer is None
        and not site.residual_hook.steps
    ]  # fmt: skip
    modules = [site.residual_hook and site.residual_hook.module for site in found]
    return [site for site, module in zip(found, modules, strict=True) if modules.count(module) == 1]


def _of_layer(layer: int, found: Sequence[Mapping[Any, torch.Tensor]], stream: Sequence[Any]) -> list[Contribution]:
    kinds: list[SiteKind] = [kind for kind in ("attn", "mlp") if all((kind, layer) in side for side in found)]
    if not kinds:
        return []
    outputs = {kind: tuple(side[kind, layer].double() for side in found) for kind in kinds}
    added = torch.cat([stream[layer + 1][side] - stream[layer][side] for side in (0, 1)])
    written = torch.cat([sum((outputs[kind][side] for kind in kinds), torch.zeros(())) for side in (0, 1)])
    # Some models multiply what a site adds by a number of their configuration.
    factor = float((added * written).sum() / written.square().sum().clamp_min(1e-30))
    if not float((added - factor * written).norm()) <= _MULTIPLIER_TOLERANCE * float(added.norm()):
        return []
    return [_contribution(kind, layer, *(factor * side for side in outputs[kind])) for kind in kinds]


def _contribution(kind: SiteKind, layer: int | None, harmful: torch.Tensor, harmless: torch.Tensor) -> Contribution:
    value = float(harmful.mean() - harmless.mean())
    if float(harmful.std()) + float(harmless.std()) < 1e-6 * (float(harmful.abs().max()) + 1e-30):
        # The same number in every prompt: there is nothing that an interval could be of.
        return Contribution(kind, layer, value, value, value)
    interval = ttest_ind(harmful.numpy(), harmless.numpy(), equal_var=False).confidence_interval()
    return Contribution(kind, layer, value, float(interval.low), float(interval.high))
