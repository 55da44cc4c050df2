"""Prompts with given continuations, and what a model predicts along them: cheap, exact, and with gradients.

Three things make a search quick. The head is run on the rows that count only, and on the tokens that count only. What
lies below the first layer that is edited is computed once for each batch and kept. Batches stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from remove_refusals.modelmap import ModelMap
from remove_refusals.models import LoadedModel, accepts, left_pad, longest_first

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that a search looks at.

    Attributes:
        tokens: `[n_tokens]`, int64, ascending, on the model's device.
        weight: `[n_tokens, d_model]`: the head's rows for them; None where the head is not a plain linear layer.
        bias: `[n_tokens]`; None if the head has none.
    """

    tokens: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def indices(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens, each of which is in the vocabulary, into their places in it."""
        return torch.searchsorted(self.tokens, tokens.to(self.tokens.device))


@dataclass(frozen=True, eq=False)
class Probe:
    """One batch of prompts with given continuations.

    Attributes:
        prompts: `[n_prompts]`: the index of each prompt in the set that the batch was made from.
        token_ids: The rendered prompts.
        paths: The continuations that are looked at, at least one token each.
        inputs: The model's arguments, padded on the left.
        rows: `[n]`, int64: for each token of the continuations the row that it is in.
        columns: `[n]`, int64: the column that predicts it.
        targets: `[n]`, int64: the token.
        below: What the layer below the first edited one returned for this batch; None if it is not kept.
    """

    prompts: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[int, ...], ...]
    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    below: Any = None

    def __len__(self) -> int:
        return len(self.prompts)


def make_probes(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    n_tokens: int,
    batch_size: int,
) -> list[Probe]:
    """Make batches of prompts with the first tokens of their continuations; of similar length in each.

    Returns:
        The batches; each prompt is in one of them.
    """
    paths = [tuple(tokens[:n_tokens]) for tokens in continuations]
    order = longest_first([len(ids) + len(path) for ids, path in zip(token_ids, paths, strict=True)])
    probes = []
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tails = [paths[index] for index in part]
        batch = left_pad(
            [[*token_ids[index], *tail[:-1]] for index, tail in zip(part, tails, strict=True)], loaded.pad_token_id
        )
        width = batch.input_ids.shape[1]
        lengths = torch.tensor([len(tail) for tail in tails])
        rows, columns = (torch.arange(width) >= width - lengths[:, None]).nonzero(as_tuple=True)
        probes.append(
            Probe(
                prompts=tuple(part),
                token_ids=tuple(tuple(token_ids[index]) for index in part),
                paths=tuple(tails),
                inputs=batch.inputs(loaded),
                rows=rows.to(loaded.device),
                columns=columns.to(loaded.device),
                targets=torch.tensor([token for tail in tails for token in tail], device=loaded.device),
            )
        )
    return probes


def make_vocabulary(loaded: LoadedModel, tokens: torch.Tensor) -> Vocabulary:
    """Take the head's rows for given tokens.

    Args:
        loaded: The model.
        tokens: Any shape, int64; repeated ones count once.
    """
    chosen = torch.unique(tokens.flatten()).to(loaded.device)
    head = loaded.model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return Vocabulary(chosen, None, None)
    bias = head.bias.detach()[chosen] if head.bias is not None else None
    return Vocabulary(chosen, head.weight.detach()[chosen], bias)


def log_probabilities(
    loaded: LoadedModel, model_map: ModelMap, probe: Probe, vocabulary: Vocabulary | None, first_layer: int
) -> torch.Tensor:
    """Run a model along a batch's continuations.

    Args:
        loaded: The model, in whatever context it is to run.
        model_map: Its map.
        probe: The batch.
        vocabulary: The tokens to look at; None for all.
        first_layer: The first layer that may be edited; used only if the batch keeps what lies below it.

    Returns:
        `[n, n_tokens]`, float32: natural logarithms, normalised over the tokens that are looked at; one row for each
        token of the continuations.
    """
    extra: dict[str, Any] = {"use_cache": False} if accepts(loaded, "use_cache") else {}
    with _reduced_head(loaded, probe, vocabulary), _replayed(loaded, model_map, probe, first_layer):
        logits = loaded.model(**probe.inputs, **extra).logits
    found: torch.Tensor = logits[0].float().log_softmax(-1)
    return found


@contextmanager
def _reduced_head(loaded: LoadedModel, probe: Probe, vocabulary: Vocabulary | None) -> Iterator[None]:
    """Let the head see the rows that count, and give the tokens that count."""
    head = loaded.model.get_output_embeddings()
    original = head.forward

    def forward(hidden: torch.Tensor) -> Any:
        picked = hidden[probe.rows, probe.columns].unsqueeze(0)
        if vocabulary is None:
            return original(picked)
        if vocabulary.weight is None:
            return original(picked).index_select(-1, vocabulary.tokens)
        return torch.nn.functional.linear(picked, vocabulary.weight, vocabulary.bias)

    with _forward_of(head, forward):
        yield


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Exchange a module's forward function; one that was exchanged before comes back."""
    exchanged = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if exchanged is None:
            del module.forward
        else:
            module.forward = exchanged


@contextmanager
def _replayed(loaded: LoadedModel, model_map: ModelMap, probe: Probe, first_layer: int) -> Iterator[None]:
    """Let the layers below the first edited one return what was kept of them."""
    if probe.below is None:
        yield
        return
    modules = [loaded.model.get_submodule(name) for name in model_map.layers[:first_layer]]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_forward_of(module, lambda *_, **__: probe.below))
        yield


def keep_below(
    loaded: LoadedModel, model_map: ModelMap, probes: Sequence[Probe], vocabulary: Vocabulary | None, first_layer: int
) -> list[Probe]:
    """Compute once what lies below the first layer that is edited.

    Args:
        loaded: The model as it stands.
        model_map: Its map.
        probes: The batches.
        vocabulary: The tokens to look at.
        first_layer: The first layer that may be edited.

    Returns:
        The batches with what was kept; as they were, if `first_layer` is 0 or if running on from what was kept does not
        give what running the whole model gives, as in models whose layers hand on more than the residual stream.
    """
    if first_layer == 0:
        return list(probes)
    kept = []
    for index, probe in enumerate(probes):
        with torch.inference_mode(False), torch.no_grad():
            with _recorded(loaded, model_map.layers[first_layer - 1]) as outputs:
                whole = log_probabilities(loaded, model_map, probe, vocabulary, first_layer)
            if len(outputs) != 1:
                return list(probes)
            kept.append(replace(probe, below=outputs[0]))
            if index == 0:
                again = log_probabilities(loaded, model_map, kept[0], vocabulary, first_layer)
                if not torch.allclose(again, whole, atol=_TOLERANCE, rtol=_TOLERANCE):
                    return list(probes)
    return kept


@contextmanager
def _recorded(loaded: LoadedModel, layer: str) -> Iterator[list[Any]]:
    outputs: list[Any] = []
    handle = loaded.model.get_submodule(layer).register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def frozen(loaded: LoadedModel, *, gradients: bool) -> Iterator[None]:
    """Let gradients reach what a search changes and nothing else; the parameters are afterwards as they were.

    A parameter that needs no gradient makes the CPU's `linear` slow on inputs that are not contiguous; the head's rows,
    the only such input, are picked here, which makes them contiguous.
    """
    needed = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        with nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
