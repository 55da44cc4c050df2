"""Prompts with given continuations, and what a model predicts along them: cheap, exact, and with gradients.

The head is run only on the rows and tokens that count, and what lies below the first edited layer is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, accepts, hooked, left_padded, longest_first

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that a search looks at: `[n_tokens]`, int64, ascending, on the model's device.

    The weight, `[n_tokens, d_model]`, and bias are the head's rows for them; None where it is not a plain linear layer.
    """

    tokens: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def indices(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens, each of which is in the vocabulary, into their places in it."""
        return torch.searchsorted(self.tokens, tokens.to(self.tokens.device))


@dataclass(frozen=True, eq=False)
class Probe:
    """One batch of prompts, by their indices in their set, with the continuations that are looked at.

    For each token of these the row that it is in, the column that predicts it, and the token itself are `[n]`, int64.
    `below` is what the layer below the first edited one returned, and stands for `n_below` layers.
    """

    prompts: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    below: Any = None
    n_below: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


Tokens = Sequence[Sequence[int]]
"""Token sequences."""


def make_probes(
    loaded: LoadedModel, token_ids: Tokens, continuations: Tokens, n_tokens: int, batch_size: int
) -> list[Probe]:
    """Make batches of prompts of similar length with the first tokens of their continuations."""
    paths = [tuple(tokens[:n_tokens]) for tokens in continuations]
    order = longest_first([len(ids) + len(path) for ids, path in zip(token_ids, paths, strict=True)])
    probes = []
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tails = [paths[index] for index in part]
        sequences = [[*token_ids[index], *tail[:-1]] for index, tail in zip(part, tails, strict=True)]
        width = max(map(len, sequences))
        lengths = torch.tensor([len(tail) for tail in tails])
        rows, columns = (torch.arange(width) >= width - lengths[:, None]).nonzero(as_tuple=True)
        probes.append(
            Probe(
                prompts=tuple(part),
                paths=tuple(tails),
                inputs=left_padded(loaded, sequences),
                rows=rows.to(loaded.device),
                columns=columns.to(loaded.device),
                targets=torch.tensor([token for tail in tails for token in tail], device=loaded.device),
            )
        )
    return probes


def make_vocabulary(loaded: LoadedModel, tokens: torch.Tensor) -> Vocabulary:
    """Take the head's rows for given tokens, of which repeated ones count once."""
    chosen = torch.unique(tokens.flatten()).to(loaded.device)
    head = loaded.model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return Vocabulary(chosen, None, None)
    bias = head.bias.detach()[chosen] if head.bias is not None else None
    return Vocabulary(chosen, head.weight.detach()[chosen], bias)


def log_probabilities(loaded: LoadedModel, probe: Probe, vocabulary: Vocabulary | None = None) -> torch.Tensor:
    """Run a model along a batch's continuations: `[n, n_tokens]`, float32, normalised over the tokens looked at."""
    extra: dict[str, Any] = {"use_cache": False} if accepts(loaded, "use_cache") else {}
    head = loaded.model.get_output_embeddings()
    whole_head = head.forward

    def reduced_head(hidden: torch.Tensor) -> Any:
        picked = hidden[probe.rows, probe.columns].unsqueeze(0)
        if vocabulary is None:
            return whole_head(picked)
        if vocabulary.weight is None:
            return whole_head(picked).index_select(-1, vocabulary.tokens)
        return torch.nn.functional.linear(picked, vocabulary.weight, vocabulary.bias)

    with ExitStack() as exchanged:
        exchanged.enter_context(_forward_of(head, reduced_head))
        for name in map_model(loaded.model).layers[: probe.n_below] if probe.n_below else ():
            layer = loaded.model.get_submodule(name)
            exchanged.enter_context(_forward_of(layer, lambda *_, **__: probe.below))
        logits = loaded.model(**probe.inputs, **extra).logits
    found: torch.Tensor = logits[0].float().log_softmax(-1)
    return found


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


def keep_below(
    loaded: LoadedModel, probes: Sequence[Probe], vocabulary: Vocabulary | None, first_layer: int
) -> list[Probe]:
    """Compute once what lies below the first layer that is edited, for batches that do not hold it yet.

    The batches come back as they were where running on from it gives something else: some layers hand on more than the
    stream.
    """
    kept: list[Probe] = []
    if first_layer == 0 or all(probe.n_below for probe in probes):
        return list(probes)
    below = map_model(loaded.model).layers[first_layer - 1]
    for probe in probes:
        outputs: list[Any] = []
        with torch.inference_mode(False), torch.no_grad():
            with hooked(loaded.model, behind=[(below, lambda *given, kept=outputs: kept.append(given[-1]))]):
                whole = log_probabilities(loaded, probe, vocabulary)
            if len(outputs) != 1:
                return list(probes)
            kept.append(replace(probe, below=outputs[0], n_below=first_layer))
            if len(kept) == 1:
                again = log_probabilities(loaded, kept[0], vocabulary)
                if not torch.allclose(again, whole, atol=_TOLERANCE, rtol=_TOLERANCE):
                    return list(probes)
    return kept


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
