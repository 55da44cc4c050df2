"""Where a direction comes from: what the embedding, attention and the MLP of each layer add along it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import ttest_ind

from remove_refusals.directions.activations import Tap, collect_at
from remove_refusals.formula import pull_back
from remove_refusals.modelmap import ModelMap, Site, Writer, map_model
from remove_refusals.models import LoadedModel
from remove_refusals.settings import SiteKind
from remove_refusals.types import Contribution, Contributions, Direction, ExpertChoice, PromptSet, WriterShare

_MULTIPLIER_TOLERANCE = 0.02
"""How far what a layer adds may be off its sites' outputs times one number: beyond the rounding of bfloat16."""


def site_contributions(
    loaded: LoadedModel, harmful: PromptSet, harmless: PromptSet, direction: Direction, *, position: int = -1
) -> Contributions:
    """Measure what each site adds along a direction at one token, on harmful prompts more than on harmless ones.

    Up to any layer the sites' contributions add up to the stream's; those of a layer are left out where its sites'
    outputs do not explain what it adds. Each set has at least two prompts, and the direction one column.
    """
    unit, model_map = direction.basis[:, 0], map_model(loaded.model)

    def along(states: torch.Tensor) -> torch.Tensor:
        return states @ unit.to(states.device)

    taps: dict[Any, Tap] = {index: Tap(name, True, along) for index, name in enumerate(model_map.layers)}
    taps[model_map.n_layers] = Tap(model_map.layers[-1], False, along)
    for site in _reachable(model_map):
        assert site.residual_hook is not None
        taps[site.kind, site.layer] = Tap(site.residual_hook.module, site.residual_hook.on_input, along)
    found = [collect_at(loaded, part, taps, position) for part in (harmful, harmless)]
    stream = [tuple(side[index].double() for side in found) for index in range(model_map.n_layers + 1)]
    sites = [_contribution("embedding", None, *stream[0])]
    for layer in range(model_map.n_layers):
        sites += _of_layer(layer, found, stream)
    return Contributions(
        layer=direction.origin.layer,
        position=position,
        stream=tuple(float(first.mean() - second.mean()) for first, second in stream),
        sites=tuple(sites),
        n_harmful=len(harmful),
        n_harmless=len(harmless),
    )


def _reachable(model_map: ModelMap) -> list[Site]:
    """The layers' sites whose contribution is one module's output, and no other site's."""
    hooks = [(site, site.residual_hook) for site in model_map.sites if site.layer is not None]
    modules = [hook.module for _, hook in hooks if hook and hook.writer is None and not hook.steps]
    return [site for site, hook in hooks if hook and not hook.steps and modules.count(hook.module) == 1]


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
    low = high = value = float(harmful.mean() - harmless.mean())
    # Where it is the same number in every prompt, there is nothing that an interval could be of.
    if float(harmful.std()) + float(harmless.std()) >= 1e-6 * (float(harmful.abs().max()) + 1e-30):
        interval = ttest_ind(harmful.numpy(), harmless.numpy(), equal_var=False).confidence_interval()
        low, high = float(interval.low), float(interval.high)
    return Contribution(site=kind, layer=layer, value=value, low=low, high=high)


_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k")
"""What configurations call the number of experts that a token goes through."""


def writer_shares(loaded: LoadedModel, direction: Direction) -> tuple[WriterShare, ...]:
    """Measure on the weights how much of what each writer can write lies along a direction.

    The direction is pulled back through the norm between a writer and the stream. There is a share for each weight, and
    of fused experts for each expert; biases and quantised weights are left out.
    """
    shares = []
    for site in map_model(loaded.model).sites:
        for writer in site.writers:
            weight = loaded.model.get_parameter(writer.parameter)
            if len(writer.shape) < 2 or not weight.is_floating_point() or weight.shape != writer.shape:
                continue
            basis = pull_back(direction.basis, writer.steps, loaded.model.get_parameter).to(weight.device)
            rows = weight.detach().movedim(writer.axis, -1)
            fused = rows.dim() > 2
            for index, part in enumerate(rows if fused else [rows]):
                values = part.to(torch.float32)
                whole, along = float(values.square().sum()), float((values @ basis).square().sum())
                chance = basis.shape[1] / basis.shape[0]
                shares.append(
                    WriterShare(
                        parameter=writer.parameter,
                        site=site.kind,
                        layer=site.layer,
                        expert=index if fused else _expert(writer),
                        value=along / whole / chance if whole else 0.0,
                    )
                )
    return tuple(shares)


def _expert(writer: Writer) -> int | None:
    return int(found[1]) if (found := re.search(r"experts\.(\d+)\.", writer.parameter)) else None


def expert_choices(
    loaded: LoadedModel, harmful: PromptSet, harmless: PromptSet, *, position: int = -1
) -> tuple[ExpertChoice, ...]:
    """Measure which experts the routers rank first at one token, on harmful and on harmless prompts.

    A router is the one matrix of a layer with a row for each expert; for layers where it is not found there is none.
    """
    config = loaded.model.config.get_text_config()
    n_chosen = next((value for name in _TOP_K if isinstance(value := getattr(config, name, None), int)), None)
    taps = {layer: _router_tap(loaded, name) for layer, name in _routers(loaded).items()}
    if n_chosen is None or not taps:
        return ()
    sides = [collect_at(loaded, part, taps, position) for part in (harmful, harmless)]
    choices = []
    for layer in taps:
        rates = []
        for side in sides:
            chosen = side[layer].topk(min(n_chosen, side[layer].shape[1])).indices
            rates.append(torch.zeros_like(side[layer]).scatter_(1, chosen, 1.0).mean(dim=0).tolist())
        numbers = {"n_harmful": len(harmful), "n_harmless": len(harmless)}
        choices += [
            ExpertChoice(layer=layer, expert=expert, harmful=first, harmless=second, **numbers)
            for expert, (first, second) in enumerate(zip(*rates, strict=True))
        ]
    return tuple(choices)


def _routers(loaded: LoadedModel) -> dict[int, str]:
    """The name of each layer's one matrix `[n_experts, d_model]` that writes nothing."""
    model_map, routers = map_model(loaded.model), {}
    for layer, name in enumerate(model_map.layers):
        writers = [writer for site in model_map.sites if site.layer == layer for writer in site.writers]
        fused = [writer.shape[0] for writer in writers if len(writer.shape) == 3]
        single = {index for writer in writers if (index := _expert(writer)) is not None}
        n_experts = fused[0] if fused else len(single)
        own = {writer.parameter for writer in writers}
        found = [
            f"{name}.{inner}"
            for inner, value in loaded.model.get_submodule(name).named_parameters()
            if tuple(value.shape) == (n_experts, model_map.d_model) and f"{name}.{inner}" not in own
        ]
        if n_experts > 1 and len(found) == 1:
            routers[layer] = found[0]
    return routers


def _router_tap(loaded: LoadedModel, parameter: str) -> Tap:
    weight = loaded.model.get_parameter(parameter).detach()
    owner = parameter.rpartition(".")[0]
    bias = getattr(loaded.model.get_submodule(owner), "bias", None)

    def logits(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = states @ weight.to(states).T
        return found if bias is None else found + bias.detach().to(found)

    return Tap(owner, True, logits)
