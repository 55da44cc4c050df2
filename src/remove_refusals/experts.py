"""How much writers, experts among them, can write along a direction, and which experts the routers choose."""

import re
from dataclasses import dataclass

import torch

from remove_refusals.map_types import ModelMap, Writer
from remove_refusals.models import LoadedModel
from remove_refusals.plan import pull_back
from remove_refusals.taps import Tap, collect_at
from remove_refusals.types import ChatFormat, Direction, PromptSet, SiteKind

_TOP_K = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k")
"""What configurations call the number of experts that a token goes through."""

_EXPERT = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
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
    layer: int | None
    expert: int | None
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


def writer_shares(loaded: LoadedModel, direction: Direction, model_map: ModelMap) -> tuple[WriterShare, ...]:
    """Measure on the weights how much of what each writer can write lies along a direction.

    Args:
        loaded: The model.
        direction: The direction; it is pulled back through the norm between a writer and the stream.
        model_map: The model's map.

    Returns:
        A share for each weight, and of fused experts for each expert; biases and quantised weights are left out.
    """
    shares = []
    for site in model_map.sites:
        for writer in site.writers:
            weight = loaded.model.get_parameter(writer.parameter)
            if len(writer.shape) < 2 or not weight.is_floating_point() or weight.shape != writer.shape:
                continue
            basis = pull_back(direction.basis, writer.steps, loaded.model.get_parameter).to(weight.device)
            rows = weight.detach().movedim(writer.axis, -1)
            fused = rows.dim() > 2
            for index, part in enumerate(rows if fused else [rows]):
                value = _share(part.to(torch.float32), basis)
                expert = index if fused else _expert(writer)
                shares.append(WriterShare(writer.parameter, site.kind, site.layer, expert, value))
    return tuple(shares)


def _share(rows: torch.Tensor, basis: torch.Tensor) -> float:
    whole = float(rows.square().sum())
    chance = basis.shape[1] / basis.shape[0]
    return float((rows @ basis).square().sum()) / whole / chance if whole else 0.0


def _expert(writer: Writer) -> int | None:
    found = _EXPERT.search(writer.parameter)
    return int(found[1]) if found else None


def expert_choices(
    loaded: LoadedModel,
    harmful: PromptSet,
    harmless: PromptSet,
    model_map: ModelMap,
    *,
    position: int = -1,
    chat: ChatFormat | None = None,
    batch_size: int | None = None,
) -> tuple[ExpertChoice, ...]:
    """Measure which experts the routers rank first, on harmful and on harmless prompts.

    Args:
        loaded: The model.
        harmful: Prompts that it refuses.
        harmless: Prompts that it answers.
        model_map: The model's map.
        position: The token position.
        chat: How the prompts are put before the model.
        batch_size: How many prompts to run at once.

    Returns:
        A share for each expert of each layer whose router is found: the one matrix of the layer with a row for each
        expert. Empty for a model without experts.

    Raises:
        PromptError: If the prompts cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    config = loaded.model.config.get_text_config()
    n_chosen = next((value for name in _TOP_K if isinstance(value := getattr(config, name, None), int)), None)
    taps = {layer: _router_tap(loaded, name) for layer, name in _routers(loaded, model_map).items()}
    if n_chosen is None or not taps:
        return ()
    sides = [collect_at(loaded, part, taps, position, chat, batch_size, model_map) for part in (harmful, harmless)]
    choices = []
    for layer in taps:
        rates = []
        for side in sides:
            chosen = side[layer].topk(min(n_chosen, side[layer].shape[1])).indices
            rates.append(torch.zeros_like(side[layer]).scatter_(1, chosen, 1.0).mean(dim=0).tolist())
        choices += [
            ExpertChoice(layer, expert, first, second, len(harmful), len(harmless))
            for expert, (first, second) in enumerate(zip(*rates, strict=True))
        ]
    return tuple(choices)


def _routers(loaded: LoadedModel, model_map: ModelMap) -> dict[int, str]:
    """The name of each layer's one matrix `[n_experts, d_model]` that writes nothing."""
    routers = {}
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
