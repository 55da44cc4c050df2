"""Where a direction comes from: what sites and single experts add along it, and whether the routers decide."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from remove_refusals.directions.activations import ExpertsTap, Tap, collect_at, run_decoder
from remove_refusals.formula import pull_back
from remove_refusals.modelmap import (
    ModelMap,
    Routing,
    Site,
    Writer,
    choice_of,
    first_of_width,
    map_model,
    routing_of,
    with_choice,
)
from remove_refusals.models import LoadedModel, hooked, in_batches, render, whole_parameter, without_gradients
from remove_refusals.settings import SiteKind
from remove_refusals.types import (
    Contribution,
    Contributions,
    Direction,
    ExpertChoice,
    Interchange,
    PromptSet,
    Share,
    WriterShare,
)

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
    value, low, high = _difference(harmful, harmless)
    return Contribution(site=kind, layer=layer, value=value, low=low, high=high)


def _difference(harmful: torch.Tensor, harmless: torch.Tensor) -> tuple[float, float, float]:
    """Give the difference of two means with the ends of its interval."""
    low = high = value = float(harmful.mean() - harmless.mean())
    # Where it is the same number in every prompt, there is nothing that an interval could be of.
    if float(harmful.std()) + float(harmless.std()) >= 1e-6 * (float(harmful.abs().max()) + 1e-30):
        from scipy.stats import ttest_ind

        interval = ttest_ind(harmful.numpy(), harmless.numpy(), equal_var=False).confidence_interval()
        low, high = float(interval.low), float(interval.high)
    return value, low, high


def writer_shares(loaded: LoadedModel, direction: Direction) -> tuple[WriterShare, ...]:
    """Measure on the weights how much of what each writer can write lies along a direction.

    The direction is pulled back through the norm between a writer and the stream. There is a share for each weight, and
    of fused experts for each expert; biases and quantised weights are left out.
    """
    shares, tensor_of = [], whole_parameter(loaded.model)
    for site in map_model(loaded.model).sites:
        for writer in site.writers:
            weight = loaded.model.get_parameter(writer.parameter)
            if len(writer.shape) < 2 or not weight.is_floating_point() or weight.shape != writer.shape:
                continue
            weight = tensor_of(writer.parameter)
            basis = pull_back(direction.basis, writer.steps, tensor_of).to(weight.device)
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
    loaded: LoadedModel, harmful: PromptSet, harmless: PromptSet, direction: Direction, *, position: int = -1
) -> tuple[ExpertChoice, ...]:
    """Measure which experts one token goes through, and what each of them writes along a direction.

    It is read where the experts are run, behind all that selects them: biases, groups and normalisation. An expert
    writes its weight times its output, and nothing where it is not chosen.
    """
    model_map = map_model(loaded.model)
    taps: dict[Any, ExpertsTap] = {}
    for mixture in model_map.mixtures:
        steps = mixture.writers[0].steps if mixture.writers else ()
        basis = pull_back(direction.basis, steps, whole_parameter(loaded.model))
        measure = partial(_written_by_each, mixture.n_experts, basis[:, 0])
        block, _, router = (mixture.router or "").rpartition(".")
        taps[mixture.layer] = ExpertsTap(block or mixture.module, measure, router or None)
    sides = [collect_at(loaded, part, taps, position) for part in (harmful, harmless)]
    choices = []
    for layer in taps if taps and all(sides) else ():
        rates = [side[layer][:, :, 0].mean(dim=0).tolist() for side in sides]
        for expert, (first, second) in enumerate(zip(*rates, strict=True)):
            written = [side[layer][:, expert, 1].double() for side in sides]
            value, low, high = _difference(*written)
            choices.append(
                ExpertChoice(
                    layer=layer,
                    expert=expert,
                    harmful=first,
                    harmless=second,
                    n_harmful=len(harmful),
                    n_harmless=len(harmless),
                    contribution=value,
                    low=low,
                    high=high,
                )
            )
    return tuple(choices)


def _written_by_each(n_experts: int, unit: torch.Tensor, routing: Routing, run: Callable[..., Any]) -> torch.Tensor:
    """Give `[n_tokens, n_experts, 2]`: whether each expert is chosen, and what it writes along a direction."""
    chosen = routing.chosen.clamp(max=n_experts).to(torch.int64)
    found = torch.zeros(len(chosen), n_experts + 1, 2, device=chosen.device)
    for place in range(chosen.shape[1]):
        alone = routing.weights * (torch.arange(chosen.shape[1], device=chosen.device) == place)
        along = routing.written(run, routing.chosen, alone).to(torch.float32) @ unit.to(chosen.device)
        # Some routers name experts without a weight where they choose fewer than the most.
        used = (routing.weights[:, place] != 0).to(torch.float32)
        column = chosen[:, place, None, None].expand(-1, 1, 2)
        found.scatter_add_(1, column, torch.stack([used, along], dim=-1).unsqueeze(1))
    return found[:, :n_experts]


MOST_PAIRS = 32
"""So many pairs of prompts say whether the choice of experts decides."""


def routing_interchange(
    loaded: LoadedModel, harmful: PromptSet, harmless: PromptSet, direction: Direction, *, position: int = -1
) -> tuple[Interchange, ...]:
    """Measure how much of a difference along a direction goes where harmful prompts get harmless prompts' experts.

    Token by token from the end, a harmful prompt gets the experts and weights of a harmless one: in one layer after
    another, and in all of them. The control gets those of another harmful prompt. What is measured is the stream behind
    the last layer, as a share of the difference of the two sets' means there. It is the interchange intervention of
    Geiger et al. 2021 (arXiv 2106.02997), with the routers' choice as what is interchanged.
    """
    model_map = map_model(loaded.model)
    layers: list[tuple[int, ...]] = [(mixture.layer,) for mixture in model_map.mixtures]
    n = min(len(harmful), len(harmless), MOST_PAIRS)
    if not layers or n < 2:
        return ()
    layers += [tuple(layer for (layer,) in layers)] if len(layers) > 1 else []
    ids = [render(loaded, part.prompts[:n]) for part in (harmful, harmless)]
    unit = direction.basis[:, 0]

    def behind(donors: Sequence[Sequence[int]], which: tuple[int, ...]) -> torch.Tensor:
        """Give `[n, 2]`: along the direction, the harmful prompts with the donors' experts, and the donors."""
        values = torch.empty(n, 2, dtype=torch.float64)

        def run(rows: Sequence[int]) -> torch.Tensor:
            both = [ids[0][row] for row in rows] + [donors[row] for row in rows]
            lengths, mixtures = list(map(len, both)), [one for one in model_map.mixtures if one.layer in which]
            changes = [
                (mixture.module, partial(_with_donors, lengths, model_map.d_model))
                for mixture in mixtures
                if mixture.router is None
            ]
            seen: list[torch.Tensor] = []

            def look(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                stream = first_of_width(output, model_map.d_model)
                assert stream is not None
                seen.append(stream.reshape(len(both), -1, model_map.d_model)[:, position].to(torch.float32))

            sorting = [(mixture.router, partial(_sorted_as_donors, lengths)) for mixture in mixtures if mixture.router]
            behind: list[tuple[str, Callable[..., Any]]] = [*sorting, (model_map.layers[-1], look)]
            with without_gradients(loaded.model), hooked(loaded.model, before=changes, behind=behind):
                run_decoder(loaded, both)
            return (seen[-1] @ unit.to(seen[-1].device)).reshape(2, -1).T.to("cpu", torch.float64)

        lengths = [max(len(one), len(other)) for one, other in zip(ids[0], donors, strict=True)]
        for rows, part in in_batches(loaded, lengths, run):
            values[list(rows)] = part
        return values

    others = [*ids[0][1:], ids[0][0]]
    base = behind(ids[1], ())
    whole = float(base[:, 0].mean() - base[:, 1].mean())
    found = []
    for which in layers:
        shares = [(base[:, 0] - behind(donors, which)[:, 0]) / (whole or 1.0) for donors in (ids[1], others)]
        share, control = (_mean(one) for one in shares)
        found.append(Interchange(layer=which[0] if len(which) == 1 else None, share=share, control=control, n=n))
    return tuple(found)


def _with_donors(lengths: Sequence[int], d_model: int, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    routing = routing_of((args, kwargs), d_model)
    if routing is None:
        return None
    return routing.arguments(routing.states, *_of_donors(lengths, routing.chosen, routing.weights))


def _sorted_as_donors(lengths: Sequence[int], router: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return with_choice(output, *_of_donors(lengths, *choice_of(router, output)))


def _of_donors(lengths: Sequence[int], *choice: torch.Tensor) -> list[torch.Tensor]:
    """Give each prompt of the first half of a batch, from its end on, the experts of its donor in the second."""
    n, changed = len(lengths) // 2, []
    for part in choice:
        values = part.reshape(len(lengths), -1, part.shape[1]).clone()
        for row in range(n):
            shared = min(lengths[row], lengths[n + row])
            values[row, -shared:] = values[n + row, -shared:]
        changed.append(values.reshape_as(part))
    return changed


def _mean(values: torch.Tensor) -> Share:
    low = high = value = float(values.mean())
    if float(values.std()) >= 1e-9:
        from scipy.stats import ttest_1samp

        interval = ttest_1samp(values.numpy(), 0.0).confidence_interval()
        low, high = float(interval.low), float(interval.high)
    return Share(value=value, low=low, high=high)
