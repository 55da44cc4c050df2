"""The residual stream in a trace: its layers, and what is added to it between each two of their boundaries."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from remove_refusals.errors import ArchitectureError
from remove_refusals.terms import Term, Terms
from remove_refusals.trace import ModuleCall, Trace


@dataclass(frozen=True)
class Segment:
    """What happens to the residual stream between two boundaries of layers.

    Attributes:
        layer: The layer it belongs to, None for the embedding.
        hands_to: The layer whose input it ends in, None where it is a layer's own work.
        start: Where it begins, on the clock of the trace.
        end: Where it ends.
        written: What parameters have added.
        leaks: What else was done, one sentence each.
    """

    layer: int | None
    hands_to: int | None
    start: int
    end: int
    written: Terms
    leaks: tuple[str, ...]


def find_layers(model: torch.nn.Module, trace: Trace, n_layers: int, model_type: str) -> tuple[str, ...]:
    """Find the layers: the list of `n_layers` modules that hand on what they were given, with the most parameters.

    Args:
        model: The traced model.
        trace: Its trace.
        n_layers: The number of layers that its configuration names; where no list has it, any number will do.
        model_type: What to call the model in an error.

    Returns:
        The layers' module names, in their order.

    Raises:
        ArchitectureError: If there is no such list.
    """
    called = {call.module: call for call in trace.calls}
    best: tuple[bool, bool, int, tuple[str, ...]] = (False, False, 0, ())
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList):
            continue
        members = tuple(f"{name}.{index}" for index in range(len(module)))
        calls = [called[member] for member in members if member in called]
        if len(calls) > len(members) // 2:
            size = sum(parameter.numel() for parameter in module.parameters())
            best = max(best, (any(map(_hands_on, calls)), len(module) == n_layers, size, members))
    if not best[3]:
        raise ArchitectureError(
            f"Model type '{model_type}' has no list of layers that its forward pass calls, expected one; "
            "this model type is not supported."
        )
    return best[3]


def _hands_on(call: ModuleCall) -> bool:
    """Whether a module's output may hold its input; what a module that only adds returns does not."""
    before, after = ({(term.source, term.axis) for term in terms or ()} for terms in (call.before, call.after))
    return bool(before & after) or any(axis is None for _, axis in after)


def find_segments(
    trace: Trace, layers: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], d_model: int, model_type: str
) -> list[Segment]:
    """Cut a trace at the layers' boundaries.

    Args:
        trace: The trace.
        layers: The layers' module names.
        shapes: The shape of every parameter by its name.
        d_model: The width of the residual stream.
        model_type: What to call the model in an error.

    Returns:
        The segments in which something new appears, in the order of the forward pass; a layer that is called several
        times adds nothing new later on, unless it does something that no sum of parameters describes.

    Raises:
        ArchitectureError: If the residual stream cannot be followed through a layer.
    """
    calls = sorted((call for call in trace.calls if call.module in layers), key=lambda call: call.start)
    segments: list[Segment] = []
    seen: Terms = frozenset()
    returned: Terms = frozenset()
    time = -1
    for number, call in enumerate(calls):
        if call.before is None or call.after is None:
            raise ArchitectureError(
                f"Layer '{call.module}' of model type '{model_type}' does not take and return a tensor of width "
                f"{d_model} that parameters can be followed to; this model type is not supported."
            )
        if number and returned != call.before and returned in call.beside:
            raise ArchitectureError(
                f"Layer '{call.module}' of model type '{model_type}' takes two residual streams, expected one; this "
                "model type is not supported."
            )
        index = layers.index(call.module)
        between = (index if number else None, index, time, call.start, call.before)
        inside = (index, None, call.start, call.end, call.after)
        for layer, hands_to, start, end, after in (between, inside):
            if not after <= seen:
                place = "the embedding" if layer is None else f"layer {layer}"
                written, leaks = _added(after - seen, seen, place, shapes, d_model)
                segments.append(Segment(layer, hands_to, start, end, written, leaks))
                seen |= after
        returned, time = call.after, call.end
    return segments


def _added(
    new: Terms, seen: Terms, place: str, shapes: Mapping[str, tuple[int, ...]], d_model: int
) -> tuple[Terms, tuple[str, ...]]:
    """What parameters have added to the residual stream, and what else was done to it."""
    leaks = []
    earlier = {(term.source, term.axis) for term in seen}
    written: dict[tuple[str, int], Term] = {}
    for term in sorted(new, key=lambda term: (term.source, len(term.steps))):
        if term.source not in shapes or term.axis is None:
            leaks.append(f"In {place} the residual stream takes in {term.source}, which no parameter writes.")
        elif shapes[term.source][term.axis] != d_model:
            leaks.append(
                f"In {place} '{term.source}' writes to the residual stream through an axis of width "
                f"{shapes[term.source][term.axis]} instead of {d_model}."
            )
        elif (term.source, term.axis) in earlier:
            leaks.append(f"In {place} the residual stream itself passes through a norm, a gain or a convolution.")
        elif written.setdefault((term.source, term.axis), term) is not term:
            leaks.append(f"In {place} '{term.source}' writes to the residual stream in two ways at once.")
    return frozenset(written.values()), tuple(dict.fromkeys(leaks))


def unseen_writers(trace: Trace, layers: tuple[str, ...], head: str | None) -> list[str]:
    """Find parameters of the layers that reach the unembedding and are in no layer's input or output.

    Args:
        trace: The trace.
        layers: The layers' module names.
        head: The unembedding's module name; None if there is none.

    Returns:
        The parameters' names: the model has a second stream beside the one that was followed.
    """
    calls = [call for call in trace.calls if call.module in layers]
    seen = {term.source for call in calls for term in (call.before or frozenset()) | (call.after or frozenset())}
    read = {term.source for call in trace.calls if call.module == head for term in call.before or ()}
    return sorted(source for source in read - seen if any(source.startswith(layer + ".") for layer in layers))


def outermost(calls: list[ModuleCall], wanted: Terms, trace: Trace) -> list[ModuleCall]:
    """Choose the fewest, outermost calls whose outputs hold nothing but wanted terms, each term once.

    Args:
        calls: The calls to choose from.
        wanted: The terms.
        trace: The trace; a term that is also made while a module is not being called is not all in its output.

    Returns:
        The calls in the order in which they began.
    """
    fitting = [
        call
        for call in calls
        if call.after
        and call.after <= wanted
        and all(call.module in trace.made_in.get(term, ()) for term in call.after)
    ]
    fitting.sort(key=lambda call: (-len(call.after or ()), call.start, -call.end))
    chosen: list[ModuleCall] = []
    covered: set[Term] = set()
    for call in fitting:
        if call.after and not call.after & covered:
            chosen.append(call)
            covered |= call.after
    return sorted(chosen, key=lambda call: call.start)
