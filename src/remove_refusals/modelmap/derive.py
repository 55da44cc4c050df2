"""A model's sites and writers, derived from a traced forward pass of a weightless copy of it.

The residual stream is what the layers hand on. Between two of its boundaries, the terms that are new are what was
added: each is a parameter with the axis that it writes on and the norm gains that it passes through. The outermost
modules whose output holds just those terms are where hooks go. What is not a parameter's output, or a residual stream
that itself passes through something, is noted as a leak: no weight edit is exact there.
"""

import inspect
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap.knowledge import Term, Terms
from remove_refusals.modelmap.skeleton import disk_tensors, skeleton, stored_names
from remove_refusals.modelmap.trace import ModuleCall, Trace, trace_forward
from remove_refusals.modelmap.types import HookPoint, ModelMap, Site, Writer
from remove_refusals.settings import SiteKind

# The kind of a site changes nothing but which strength applies to it, so names may decide it.
_MLP = re.compile(r"mlp|ffn|ff\b|fc|feed_?forward|moe|expert|dense_h_to|intermediate|lin2|w_out|^output")


_N_TOKENS = 7


# What a tower beside the language model would hand over; without it cross-attention layers do not run.
_STATES = ("cross_attention_states", "encoder_hidden_states", "encoder_outputs")


_MAPS: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, ModelMap]]" = weakref.WeakKeyDictionary()
"""The maps of models that are still there, each with the shape that the model had."""


def map_model(model: PreTrainedModel) -> ModelMap:
    """Derive the sites and writers of a causal language model; of one that is known already, remember them.

    Args:
        model: A Transformers causal language model; its weights are not read and it is left as it is.

    Returns:
        The map. `leaks` says where a weight edit would not be exact.

    Raises:
        ArchitectureError: If the layers cannot be found, the forward pass cannot be traced, or a parameter inside a
            layer has an axis of width d_model and was never used.
    """
    shape = [(name, id(value), tuple(value.shape)) for name, value in model.named_parameters(remove_duplicate=False)]
    known = _MAPS.get(model)
    if known is not None and known[0] == shape:
        return known[1]
    # Under inference mode operations on the meta device are not seen one by one.
    with torch.inference_mode(False):
        found = _map(model)
    _MAPS[model] = shape, found
    return found


def _map(model: PreTrainedModel) -> ModelMap:
    copy_of_model = skeleton(model, dtype=torch.float32)
    d_model, n_layers = _dimensions(copy_of_model)
    found = _mapped(model, copy_of_model, d_model, n_layers, {})
    if not found.unused:
        return found
    for name in _STATES:
        if name in inspect.signature(copy_of_model.forward).parameters:
            states = torch.empty(1, _N_TOKENS, d_model, device="meta")
            given = {name: (states,) if name == "encoder_outputs" else states}
            try:
                return _mapped(model, copy_of_model, d_model, n_layers, given)
            except ArchitectureError:
                # The tower is of another width, or the model has none; the map lists what is unused.
                return found
    return found


def _mapped(
    model: PreTrainedModel,
    copy_of_model: PreTrainedModel,
    d_model: int,
    n_layers: int,
    states: Mapping[str, Any],
) -> ModelMap:
    # A model with an embedding for each codebook takes the tokens of each as a row of its own.
    embeddings = copy_of_model.get_input_embeddings()
    rows = len(embeddings) if isinstance(embeddings, torch.nn.ModuleList) else 1
    tokens = torch.zeros(rows, _N_TOKENS, dtype=torch.int64, device="meta")
    arguments = {"input_ids": tokens, "attention_mask": None, "use_cache": False, **states}
    try:
        with torch.device("meta"):
            trace = trace_forward(copy_of_model, d_model, lambda: copy_of_model(**arguments))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ArchitectureError(
            f"The forward pass of model type '{model.config.model_type}' cannot be traced without weights "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}), expected one that runs on the "
            "meta device; use hooks on another model type or report this one."
        ) from error
    return _Derivation(model, copy_of_model, d_model, n_layers, trace).model_map()


def _dimensions(model: PreTrainedModel) -> tuple[int, int]:
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(found[0], int) or not isinstance(found[1], int):
        raise ArchitectureError(
            f"The config of model type '{model.config.model_type}' has hidden_size {found[0]} and num_hidden_layers "
            f"{found[1]}, expected two numbers; this model type is not supported."
        )
    return found[0], found[1]


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


@dataclass(frozen=True)
class _Derivation:
    """From a trace to a map."""

    source: PreTrainedModel
    model: PreTrainedModel
    d_model: int
    n_layers: int
    trace: Trace

    def model_map(self) -> ModelMap:
        model_type = self.model.config.model_type
        layers = find_layers(self.model, self.trace, self.n_layers, model_type)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        segments = find_segments(self.trace, layers, shapes, self.d_model, model_type)
        sites = [site for segment in segments for site in self._sites(segment, layers, shapes)]
        leaks = [leak for segment in segments for leak in segment.leaks]
        names = {id(module): name for name, module in self.model.named_modules()}
        embedding, unembedding = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        unseen = unseen_writers(self.trace, layers, names.get(id(unembedding)))
        beside = [f"'{name}' writes to a stream beside the one that the layers hand on." for name in unseen]
        first, last = self._weight_of(embedding), self._weight_of(unembedding)
        return ModelMap(
            model_type=model_type,
            d_model=self.d_model,
            n_layers=len(layers),
            layers=layers,
            sites=tuple(sites),
            input_embedding=first or "",
            unembedding=last,
            tied=first is not None and first == last,
            leaks=tuple(dict.fromkeys(leaks + beside)),
            unhooked=tuple(dict.fromkeys(beside)),
            unused=self._unused(layers, shapes),
            used_elsewhere=self.trace.used_elsewhere,
            stored=stored_names(self.source),
            prefix=self.source.base_model_prefix,
        )

    def _weight_of(self, module: torch.nn.Module | None) -> str | None:
        """The name of an embedding's weight; of several embeddings the first's."""
        if isinstance(module, torch.nn.ModuleList):
            module = module[0]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return names.get(id(module.weight)) if module is not None else None

    def _sites(self, segment: Segment, layers: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[Site]:
        inner = [
            call
            for call in self.trace.calls
            if segment.start < call.start and call.end < segment.end and call.module not in layers and call.after
        ]
        if segment.leaks:
            return [self._stream_site(segment, layers, shapes)]
        sites = []
        wanted = segment.written
        for call in outermost(inner, wanted, self.trace):
            assert call.after is not None
            writers = self._writers(call.after, shapes)
            kind = self._kind(segment.layer, call.module, layers)
            points = self._points(call.after, inner, shapes) if _has_steps(call.after) else (HookPoint(call.module),)
            sites.append(Site(kind, segment.layer, writers, points, HookPoint(call.module)))
            wanted -= call.after
        # What is left was added outside of any module.
        for term in sorted(wanted, key=lambda term: term.source):
            kind = self._kind(segment.layer, term.source, layers)
            points = self._points(frozenset({term}), inner, shapes)
            behind = None if term.steps else points[0]
            sites.append(Site(kind, segment.layer, self._writers(frozenset({term}), shapes), points, behind))
        return sites

    def _points(
        self, terms: Terms, calls: list[ModuleCall], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[HookPoint, ...]:
        """The outermost modules whose outputs, before any per-channel step, make up given terms.

        A parameter without such a module, as a bias that a norm adds, is itself the place.
        """
        steps_of = {(term.source, term.axis): term.steps for term in terms}
        bare = frozenset(Term(source, axis) for source, axis in steps_of)
        points = []
        for call in outermost(calls, bare, self.trace):
            assert call.after is not None
            steps = {steps_of[term.source, term.axis] for term in call.after}
            if len(steps) == 1:
                points.append(HookPoint(call.module, next(iter(steps))))
                bare -= call.after
        left = frozenset(term for term in terms if Term(term.source, term.axis) in bare)
        points.extend(_norm_inputs(left, calls))
        covered = {point.steps for point in points if point.on_input}
        left = frozenset(term for term in left if term.steps not in covered)
        return (*points, *(HookPoint("", writer=writer) for writer in self._writers(left, shapes)))

    def _stream_site(self, segment: Segment, layers: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Site:
        """The residual stream as a whole, behind a segment that no sum of writers describes."""
        writers = self._writers(segment.written, shapes)
        if segment.hands_to is not None:
            kind: SiteKind = "embedding" if segment.layer is None else "attn"
            point = HookPoint(layers[segment.hands_to], on_input=True)
        else:
            assert segment.layer is not None
            kind, point = "mlp", HookPoint(layers[segment.layer])
        return Site(kind, segment.layer, writers, (point,), point)

    def _kind(self, layer: int | None, module: str, layers: tuple[str, ...]) -> SiteKind:
        if layer is None:
            return "embedding"
        return "mlp" if _MLP.search(module.removeprefix(layers[layer] + ".").lower()) else "attn"

    def _writers(self, terms: Terms, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Writer, ...]:
        """The terms' parameters, and their siblings in a list of experts that no token was routed to."""
        writers = []
        for term in sorted(terms, key=lambda term: term.source):
            assert term.axis is not None
            for name in (term.source, *self._unused_siblings(term.source, shapes)):
                on_disk = disk_tensors(self.source, name, shapes[name], term.axis)
                writers.append(Writer(name, term.axis, shapes[name], term.steps, on_disk))
        return tuple(writers)

    def _unused_siblings(self, source: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        pattern = _pattern(source)
        return [
            name
            for name, shape in shapes.items()
            if name not in self.trace.used and shape == shapes[source] and _pattern(name) == pattern
        ]

    def _unused(self, layers: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """Parameters of the layers with an axis of width d_model whose module the forward pass never calls.

        Raises:
            ArchitectureError: If the module is called and yet the parameter is never used.
        """
        called = {call.module for call in self.trace.calls}
        known = {_pattern(name) for name in self.trace.used}
        unused = []
        for name, shape in shapes.items():
            inside = any(name.startswith(layer + ".") for layer in layers)
            if not inside or self.d_model not in shape or _pattern(name) in known:
                continue
            if name.rpartition(".")[0] in called:
                raise ArchitectureError(
                    f"Parameter '{name}' of shape {shape} in model type '{self.model.config.model_type}' has an axis "
                    f"of width {self.d_model} and nothing is known of its use, expected every such parameter to be a "
                    "known writer or reader; this model type is not supported."
                )
            unused.append(name)
        return tuple(unused)


def _has_steps(terms: Terms) -> bool:
    return any(term.steps for term in terms)


def _norm_inputs(terms: Terms, calls: list[ModuleCall]) -> list[HookPoint]:
    """The norms whose input is just the terms that go through their gain."""
    points = []
    for steps in {term.steps: None for term in sorted(terms, key=lambda term: term.source)}:
        gain = next((step.parameter for step in steps if step.parameter is not None), "")
        bare = frozenset(Term(term.source, term.axis) for term in terms if term.steps == steps)
        inputs = [call.before for call in calls if call.module == gain.rpartition(".")[0]]
        if inputs and all(before == bare for before in inputs):
            points.append(HookPoint(gain.rpartition(".")[0], steps, on_input=True))
    return points


def _pattern(name: str) -> str:
    """A parameter's name with the numbers behind its layer's left out: experts in a list have one pattern."""
    match = re.match(r"(?:.*?\.)?\d+\.", name)
    layer = match.group() if match else ""
    return layer + re.sub(r"\.\d+\.", ".*.", "." + name.removeprefix(layer))


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
