"""Prompts with given continuations, and what a model predicts along them: cheap, exact, and with gradients.

The head is run only on the tokens that count, what lies below the first edited layer is computed once, and, where a
model can be run so, a batch is one packed row in which the tokens that all prompts begin with stand once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, accepts, hooked, left_padded, longest_first, rows_of
from remove_refusals.processes import agreed

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that a search looks at: `[n_tokens]`, int64, ascending, on the model's device.

    The weight, `[n_tokens, d_model]`, and bias are the head's rows for them, where it lies; None where it is no plain
    linear layer.
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

    For each token of these its prompt in the batch, where in the input it is predicted (row and column), and the token
    itself are `[n]`, int64. `below` is what the layer below the first edited one returned, for `n_below` layers.
    """

    prompts: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor
    below: Any = None
    n_below: int = 0

    def __len__(self) -> int:
        return len(self.prompts)


Tokens = Sequence[Sequence[int]]
"""Token sequences."""


def make_probes(
    loaded: LoadedModel,
    token_ids: Tokens,
    continuations: Tokens,
    n_tokens: int,
    batch_size: int,
    *,
    packed: bool = False,
    seed: int | None = None,
) -> list[Probe]:
    """Make batches of prompts with the first tokens of their continuations: of like length, or drawn by a seed."""
    paths = [tuple(tokens[:n_tokens]) for tokens in continuations]
    if seed is None:
        order = longest_first([len(ids) + len(path) for ids, path in zip(token_ids, paths, strict=True)])
    else:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        _make_probe(loaded, token_ids, paths, order[start : start + batch_size], packed=packed)
        for start in range(0, len(order), batch_size)
    ]


def _make_probe(
    loaded: LoadedModel, token_ids: Tokens, paths: Sequence[tuple[int, ...]], part: Sequence[int], *, packed: bool
) -> Probe:
    tails = [paths[index] for index in part]
    sequences = [[*token_ids[index], *tail[:-1]] for index, tail in zip(part, tails, strict=True)]
    lengths = torch.tensor([len(tail) for tail in tails])
    width = max(map(len, sequences))
    rows, columns = (torch.arange(width) >= width - lengths[:, None]).nonzero(as_tuple=True)
    if packed:
        n_shared = _n_shared([token_ids[index] for index in part])
        inputs = _packed(loaded, sequences, n_shared)
        ends = n_shared + torch.tensor([len(sequence) - n_shared for sequence in sequences]).cumsum(0)
        places = torch.zeros_like(rows), ends[rows] - (width - columns)
    else:
        inputs, places = left_padded(loaded, sequences), (rows, columns)
    return Probe(
        prompts=tuple(part),
        paths=tuple(tails),
        inputs=inputs,
        rows=rows.to(loaded.device),
        places=(places[0].to(loaded.device), places[1].to(loaded.device)),
        targets=torch.tensor([token for tail in tails for token in tail], device=loaded.device),
    )


def _n_shared(prompts: Tokens) -> int:
    """Count the tokens that all prompts begin with, less the last of each prompt, behind which the answers differ."""
    shortest = min(map(len, prompts)) - 1
    return sum(
        1
        for _ in takewhile(lambda column: len(set(column)) == 1, zip(*(ids[:shortest] for ids in prompts), strict=True))
    )


def _packed(loaded: LoadedModel, sequences: Tokens, n_shared: int) -> dict[str, torch.Tensor]:
    """Put sequences behind each other in one row: each token sees what all begin with, and its own sequence so far."""
    tails = [sequence[n_shared:] for sequence in sequences]
    ids = [*sequences[0][:n_shared], *(token for tail in tails for token in tail)]
    positions = [*range(n_shared), *(n_shared + place for tail in tails for place in range(len(tail)))]
    owners = torch.tensor([-1] * n_shared + [row for row, tail in enumerate(tails) for _ in tail])
    seen = ((owners == -1) | (owners == owners[:, None])).tril()
    dtype = loaded.model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": mask[None, None],
        "position_ids": torch.tensor([positions]),
    }
    return {name: tensor.to(loaded.device) for name, tensor in inputs.items()}


def is_packable(loaded: LoadedModel, token_ids: Tokens, continuations: Tokens, n_tokens: int) -> bool:
    """Tell whether two prompts of a set, packed, give what they give padded: not where layers keep a state."""
    model = loaded.model
    if getattr(model, "_is_stateful", False) or not accepts(loaded, "position_ids"):
        return False
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    order = longest_first([len(ids) for ids in token_ids])
    ids, paths = ([part[index] for index in (order[0], order[-1])] for part in (token_ids, continuations))
    with frozen(loaded, gradients=False):
        (padded,), (packed,) = (make_probes(loaded, ids, paths, n_tokens, 2, packed=way) for way in (False, True))
        try:
            found = log_probabilities(loaded, packed)
        except (RuntimeError, ValueError, IndexError, TypeError):
            # A model that takes no mask of its own for every token says so in words of its own.
            return False
        apart = float((found.exp() - log_probabilities(loaded, padded).exp()).abs().sum(-1).max())
    return agreed(bool(apart < torch.finfo(model.dtype).eps ** 0.5))


def make_vocabulary(loaded: LoadedModel, tokens: torch.Tensor) -> Vocabulary:
    """Take the head's rows for given tokens, of which repeated ones count once."""
    chosen = agreed(torch.unique(tokens.flatten()).cpu()).to(loaded.device)
    head = loaded.model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return Vocabulary(chosen, None, None)
    # The bias as a matrix of one column.
    bias = rows_of(head.bias.detach()[:, None], chosen)[:, 0] if head.bias is not None else None
    return Vocabulary(chosen, rows_of(head.weight.detach(), chosen), bias)


def log_probabilities(loaded: LoadedModel, probe: Probe, vocabulary: Vocabulary | None = None) -> torch.Tensor:
    """Run a model along a batch's continuations: `[n, n_tokens]`, float32, normalised over the tokens looked at."""
    return _logits(loaded, probe, vocabulary).float().log_softmax(-1)


def _logits(loaded: LoadedModel, probe: Probe, vocabulary: Vocabulary | None = None) -> torch.Tensor:
    extra: dict[str, Any] = {"use_cache": False} if accepts(loaded, "use_cache") else {}
    head = loaded.model.get_output_embeddings()
    whole_head = head.forward

    def reduced_head(hidden: torch.Tensor) -> Any:
        # The last layer may lie on another device than the first, and the head on a third.
        rows, columns = (place.to(hidden.device) for place in probe.places)
        picked = hidden[rows, columns].unsqueeze(0)
        if vocabulary is None:
            return whole_head(picked)
        if vocabulary.weight is None:
            logits = whole_head(picked)
            return logits.index_select(-1, vocabulary.tokens.to(logits.device))
        return torch.nn.functional.linear(picked.to(vocabulary.weight.device), vocabulary.weight, vocabulary.bias)

    with ExitStack() as exchanged:
        exchanged.enter_context(_forward_of(head, reduced_head))
        for name in map_model(loaded.model).layers[: probe.n_below] if probe.n_below else ():
            layer = loaded.model.get_submodule(name)
            exchanged.enter_context(_forward_of(layer, lambda *_, **__: probe.below))
        logits: torch.Tensor = loaded.model(**probe.inputs, **extra).logits
    return logits[0].to(loaded.device)


def _in_parts(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give log-probabilities in float32 for some rows at a time: all would take several times the logits' memory."""
    n_rows = max(1, (1 << 22) // logits.shape[-1])
    return (logits[start : start + n_rows].float().log_softmax(-1) for start in range(0, len(logits), n_rows))


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


def run_once(
    loaded: LoadedModel, probes: Sequence[Probe], first_layer: int, least: float
) -> tuple[list[Probe], list[torch.Tensor]]:
    """Run batches without an edit: keep what lies below the first edited layer, and give the tokens that are likely.

    A token counts where it has at least a probability. The batches come back as they were where running on from what
    was kept gives something else: some layers hand on more than the stream.
    """
    below = map_model(loaded.model).layers[first_layer - 1] if first_layer else None
    kept: list[Probe] = []
    tokens: list[torch.Tensor] = []
    for probe in probes:
        outputs: list[Any] = []
        watched = [] if below is None else [(below, lambda *given, kept=outputs: kept.append(given[-1]))]
        with torch.inference_mode(False), torch.no_grad(), hooked(loaded.model, behind=watched):
            whole = _logits(loaded, probe)
        likely = torch.stack([(part > math.log(least)).any(dim=0) for part in _in_parts(whole)])
        tokens.append(likely.any(dim=0).nonzero()[:, 0])
        if len(outputs) == 1 and len(kept) == len(tokens) - 1:
            kept.append(replace(probe, below=outputs[0], n_below=first_layer))
            with torch.no_grad():
                again = whole if len(kept) > 1 else _logits(loaded, kept[0])
            pairs = zip(_in_parts(again), _in_parts(whole), strict=True) if again is not whole else ()
            if not agreed(all(torch.allclose(one, other, atol=_TOLERANCE, rtol=_TOLERANCE) for one, other in pairs)):
                kept.clear()
    return (kept if len(kept) == len(probes) else list(probes)), tokens


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
