"""A model's sites and writers, derived from a traced forward pass of a weightless copy of it.

The residual stream is what the layers hand on; the terms that are new between two of its boundaries were added there.
Hooks go to the outermost modules whose output holds just those. What is not a parameter's output, or a residual stream
that itself passes through something, is noted as a leak: no weight edit is exact there.
"""

import inspect
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap.knowledge import Term, Terms
from remove_refusals.modelmap.skeleton import skeleton
from remove_refusals.modelmap.trace import ModuleCall, Trace, trace_forward
from remove_refusals.modelmap.types import HookPoint, Mixture, ModelMap, Site, Writer
from remove_refusals.models import model_of
from remove_refusals.settings import SiteKind

# The kind of a site changes nothing but which strength applies to it, so names may decide it.
_MLP = re.compile(r"mlp|ffn|ff\b|fc|feed_?forward|moe|expert|dense_h_to|intermediate|lin2|w_out|^output")

_N_TOKENS = 7

# What a tower beside the language model would hand over; without it cross-attention layers do not run.
_STATES = ("cross_attention_states", "encoder_hidden_states", "encoder_outputs")

# What a configuration says of how and where a model was saved.
_UNTOLD = ("_name_or_path", "architectures", "dtype", "transformers_version")

_MAPS: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, ModelMap]]" = weakref.WeakKeyDictionary()
"""The maps of models that are still there, each with the shape that the model had."""

_ALIKE: dict[tuple[object, ...], ModelMap] = {}
"""The same by what a map is derived from: class, configuration, and names, sharing and shapes of the parameters."""


def map_model(model: Any) -> ModelMap:
    """Derive the sites and writers of a causal language model, whose weights are not read, or remember them.

    Args:
        model: A causal language model of Transformers, a pipeline with one, or what `load` gave; it is left as it is.

    Returns:
        The map; `leaks` says why a weight edit would not be exact, and `unhooked` why hooks would not.

    Raises:
        ArchitectureError: If the layers cannot be found, the forward pass cannot be traced, or a parameter of a layer
            has an axis of width d_model and was never used.
        ModelError: If it is no model of Transformers.

    Example:
        >>> map_model(model).verdict
        'exact'
    """
    model = model_of(model)
    shape = [(name, id(value), tuple(value.shape)) for name, value in model.named_parameters(remove_duplicate=False)]
    known = _MAPS.get(model)
    if known is not None and known[0] == shape:
        return known[1]
    first = {number: name for name, number, _ in reversed(shape)}
    parameters = tuple((name, first[number], sizes) for name, number, sizes in shape)
    config = json.loads(
        model.config.to_json_string(use_diff=False),
        object_hook=lambda part: repr(sorted((name, value) for name, value in part.items() if name not in _UNTOLD)),
    )
    key = (type(model), config, parameters)
    if key not in _ALIKE:
        # Under inference mode operations on the meta device are not seen one by one.
        with torch.inference_mode(False):
            _ALIKE[key] = _map(model)
    _MAPS[model] = shape, _ALIKE[key]
    return _ALIKE[key]


def _map(model: PreTrainedModel) -> ModelMap:
    if any(
        getattr(part, "is_encoder_decoder", False)
        for part in (model.config, model.config.get_text_config(decoder=True))
    ):
        raise ArchitectureError(
            f"Model type '{model.config.model_type}' is an encoder with a decoder, expected a decoder alone; this "
            "model type is not supported."
        )
    weightless = skeleton(model, dtype=torch.float32)
    config = weightless.config.get_text_config(decoder=True)
    d_model, n_layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(d_model, int) or not isinstance(n_layers, int):
        raise ArchitectureError(
            f"The config of model type '{model.config.model_type}' has hidden_size {d_model} and num_hidden_layers "
            f"{n_layers}, expected two numbers; this model type is not supported."
        )
    found = _Derivation(weightless, d_model, n_layers, _traced(weightless, d_model, {})).model_map()
    states = next((name for name in _STATES if name in inspect.signature(weightless.forward).parameters), None)
    if not found.unused or states is None:
        return found
    empty = torch.empty(1, _N_TOKENS, d_model, device="meta")
    try:
        trace = _traced(weightless, d_model, {states: (empty,) if states == "encoder_outputs" else empty})
        return _Derivation(weightless, d_model, n_layers, trace).model_map()
    except ArchitectureError:
        # The tower is of another width, or the model has none; the map lists what is unused.
        return found


def _traced(weightless: PreTrainedModel, d_model: int, states: Mapping[str, Any]) -> Trace:
    # A model with an embedding for each codebook takes the tokens of each as a row of its own.
    embeddings = weightless.get_input_embeddings()
    rows = len(embeddings) if isinstance(embeddings, torch.nn.ModuleList) else 1
    tokens = torch.zeros(rows, _N_TOKENS, dtype=torch.int64, device="meta")
    arguments = {"input_ids": tokens, "attention_mask": None, "use_cache": False, **states}
    try:
        with torch.device("meta"):
            return trace_forward(weightless, d_model, lambda: weightless(**arguments))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ArchitectureError(
            f"The forward pass of model type '{weightless.config.model_type}' cannot be traced without weights "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}), expected one that runs on the "
            "meta device; use hooks on another model type or report this one."
        ) from error


@dataclass(frozen=True)
class Segment:
    """What happens to the residual stream between two boundaries of layers, from `start` to `end` in the trace.

    `layer` is None for the embedding; `hands_to`, the layer whose input it ends in, where it is a layer's own work.
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

    model: PreTrainedModel
    d_model: int
    n_layers: int
    trace: Trace

    def model_map(self) -> ModelMap:
        self._check_one_stack()
        segments = self._segments()
        leaks = [leak for segment in segments for leak in segment.leaks]
        beside = [f"'{name}' writes to a stream beside the one that the layers hand on." for name in self._unseen()]
        sites = tuple(site for segment in segments for site in self._sites(segment))
        first = self._weight_of(self.model.get_input_embeddings())
        last = self._weight_of(self.model.get_output_embeddings())
        return ModelMap(
            model_type=self._model_type,
            d_model=self.d_model,
            n_layers=len(self.layers),
            layers=self.layers,
            sites=sites,
            input_embedding=first or "",
            unembedding=last,
            tied=first is not None and first == last,
            leaks=tuple(dict.fromkeys(leaks + beside)),
            unhooked=tuple(dict.fromkeys(beside)),
            unused=self._unused(),
            used_elsewhere=self.trace.used_elsewhere,
            mixtures=self._mixtures(sites),
            text_type=str(self.model.config.get_text_config(decoder=True).model_type),
        )

    @property
    def _model_type(self) -> str:
        return str(self.model.config.model_type)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its name."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The list of (if there is one, `n_layers`) modules that hand on what they are given, with most parameters."""
        called = {call.module: call for call in self.trace.calls}
        best: tuple[bool, bool, int, tuple[str, ...]] = (False, False, 0, ())
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.nn.ModuleList):
                continue
            members = tuple(f"{name}.{index}" for index in range(len(module)))
            calls = [called[member] for member in members if member in called]
            if len(calls) > len(members) // 2:
                size = sum(parameter.numel() for parameter in module.parameters())
                best = max(best, (any(map(_hands_on, calls)), len(module) == self.n_layers, size, members))
        if not best[3]:
            raise ArchitectureError(
                f"Model type '{self._model_type}' has no list of layers that its forward pass calls, expected one; "
                "this model type is not supported."
            )
        return best[3]

    def _check_one_stack(self) -> None:
        """Check that no second stack runs with the layers' parameters, whose stream would be beside the first one."""
        called = {call.module for call in self.trace.calls}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for alias, value in self.model.named_parameters(remove_duplicate=False):
            name = names[id(value)]
            if self._is_inside(name) != self._is_inside(alias) and called.issuperset(map(_module_of, (name, alias))):
                raise ArchitectureError(
                    f"Parameter '{name}' of model type '{self._model_type}' is also '{alias}' in a second stack of "
                    "layers, expected one stack; this model type is not supported."
                )

    def _weight_of(self, module: torch.nn.Module | None) -> str | None:
        """The name of an embedding's weight; of several embeddings the first's."""
        if isinstance(module, torch.nn.ModuleList):
            module = module[0]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return names.get(id(module.weight)) if module is not None else None

    def _segments(self) -> list[Segment]:
        """Cut the trace at the layers' boundaries, in the order of the forward pass.

        A later call of a layer adds nothing new, unless it does something that no sum of parameters describes.
        """
        calls = sorted((call for call in self.trace.calls if call.module in self.layers), key=lambda call: call.start)
        segments: list[Segment] = []
        seen: Terms = frozenset()
        returned: Terms = frozenset()
        time = -1
        for number, call in enumerate(calls):
            if call.before is None or call.after is None:
                raise ArchitectureError(
                    f"Layer '{call.module}' of model type '{self._model_type}' does not take and return a tensor of "
                    f"width {self.d_model} that parameters can be followed to; this model type is not supported."
                )
            if number and returned != call.before and returned in call.beside:
                raise ArchitectureError(
                    f"Layer '{call.module}' of model type '{self._model_type}' takes two residual streams, expected "
                    "one; this model type is not supported."
                )
            index = self.layers.index(call.module)
            between = (index if number else None, index, time, call.start, call.before)
            inside = (index, None, call.start, call.end, call.after)
            for layer, hands_to, start, end, after in (between, inside):
                if not after <= seen:
                    place = "the embedding" if layer is None else f"layer {layer}"
                    segments.append(Segment(layer, hands_to, start, end, *self._added(after - seen, seen, place)))
                    seen |= after
            returned, time = call.after, call.end
        return segments

    def _added(self, new: Terms, seen: Terms, place: str) -> tuple[Terms, tuple[str, ...]]:
        """What parameters have added to the residual stream, and what else was done to it."""
        leaks = []
        earlier = {(term.source, term.axis) for term in seen}
        written: dict[tuple[str, int], Term] = {}
        for term in sorted(new, key=lambda term: (term.source, len(term.steps))):
            if term.source not in self.shapes or term.axis is None:
                leaks.append(f"In {place} the residual stream takes in {term.source}, which no parameter writes.")
            elif (width := self.shapes[term.source][term.axis]) != self.d_model:
                leaks.append(
                    f"In {place} '{term.source}' writes to the residual stream through an axis of width {width} "
                    f"instead of {self.d_model}."
                )
            elif (term.source, term.axis) in earlier:
                leaks.append(f"In {place} the residual stream itself passes through a norm, a gain or a convolution.")
            elif written.setdefault((term.source, term.axis), term) is not term:
                leaks.append(f"In {place} '{term.source}' writes to the residual stream in two ways at once.")
        return frozenset(written.values()), tuple(dict.fromkeys(leaks))

    def _sites(self, segment: Segment) -> list[Site]:
        if segment.leaks:
            # No sum of writers describes it, so the residual stream as a whole is the place.
            if segment.hands_to is not None:
                kind: SiteKind = "embedding" if segment.layer is None else "attn"
                point = HookPoint(self.layers[segment.hands_to], on_input=True)
            else:
                assert segment.layer is not None
                kind, point = "mlp", HookPoint(self.layers[segment.layer])
            return [Site(kind, segment.layer, self._writers(segment.written), (point,), point)]
        inner = [
            call
            for call in self.trace.calls
            if segment.start < call.start and call.end < segment.end and call.module not in self.layers and call.after
        ]
        sites = []
        layer, wanted = segment.layer, segment.written
        for call in self._outermost(inner, wanted):
            assert call.after is not None
            here = HookPoint(call.module)
            writers, module = self._writers(call.after), self.model.get_submodule(call.module)
            points = self._points(call.after, inner) if any(term.steps for term in call.after) else (here,)
            if isinstance(module, torch.nn.Embedding) and any(module.children()):
                # It norms the rows that it gives: nothing but the parameter lies before that.
                points = tuple(HookPoint("", writer=writer) for writer in writers)
            sites.append(Site(self._kind(layer, call.module), layer, writers, points, here))
            wanted -= call.after
        # What is left was added outside of any module.
        for term in sorted(wanted, key=lambda term: term.source):
            only = frozenset({term})
            points = self._points(only, inner)
            behind = None if term.steps else points[0]
            sites.append(Site(self._kind(layer, term.source), layer, self._writers(only), points, behind))
        return sites

    def _points(self, terms: Terms, calls: list[ModuleCall]) -> tuple[HookPoint, ...]:
        """The outermost modules whose outputs, before any per-channel step, make up given terms.

        Else a norm whose input is just the terms that go through its gain; else the parameter, as a bias in a norm.
        """
        steps_of = {(term.source, term.axis): term.steps for term in terms}
        bare = frozenset(Term(source, axis) for source, axis in steps_of)
        points = []
        for call in self._outermost(calls, bare):
            assert call.after is not None
            steps = {steps_of[term.source, term.axis] for term in call.after}
            if len(steps) == 1:
                points.append(HookPoint(call.module, next(iter(steps))))
                bare -= call.after
        left = frozenset(term for term in terms if Term(term.source, term.axis) in bare)
        for through in dict.fromkeys(term.steps for term in sorted(left, key=lambda term: term.source)):
            gain = next((step.parameter for step in through if step.parameter is not None), "")
            norm = gain.rpartition(".")[0]
            alike = frozenset(Term(term.source, term.axis) for term in left if term.steps == through)
            inputs = [call.before for call in calls if call.module == norm]
            if inputs and all(before == alike for before in inputs):
                points.append(HookPoint(norm, through, on_input=True))
                left = frozenset(term for term in left if term.steps != through)
        return (*points, *(HookPoint("", writer=writer) for writer in self._writers(left)))

    def _outermost(self, calls: list[ModuleCall], wanted: Terms) -> list[ModuleCall]:
        """Choose the fewest, outermost calls whose outputs hold nothing but wanted terms, each term once."""
        made_in = self.trace.made_in
        # A term that is also made while a module is not being called is not all in its output.
        fitting = [
            call
            for call in calls
            if call.after and call.after <= wanted and all(call.module in made_in.get(term, ()) for term in call.after)
        ]
        fitting.sort(key=lambda call: (-len(call.after or ()), call.start, -call.end))
        chosen: list[ModuleCall] = []
        covered: set[Term] = set()
        for call in fitting:
            if call.after and not call.after & covered:
                chosen.append(call)
                covered |= call.after
        return sorted(chosen, key=lambda call: call.start)

    def _kind(self, layer: int | None, module: str) -> SiteKind:
        if layer is None:
            return "embedding"
        return "mlp" if _MLP.search(module.removeprefix(self.layers[layer] + ".").lower()) else "attn"

    def _writers(self, terms: Terms) -> tuple[Writer, ...]:
        """The terms' parameters, and their siblings in a list of experts that no token was routed to."""
        writers = []
        for term in sorted(terms, key=lambda term: term.source):
            assert term.axis is not None
            shape, pattern = self.shapes[term.source], _pattern(term.source)
            siblings = (
                name
                for name, other in self.shapes.items()
                if name not in self.trace.used and other == shape and _pattern(name) == pattern
            )
            for name in (term.source, *siblings):
                writers.append(Writer(name, term.axis, shape, term.steps))
        return tuple(writers)

    def _mixtures(self, sites: Sequence[Site]) -> tuple[Mixture, ...]:
        """The modules that are told which experts each token goes through, with what these write."""
        found = []
        routed = dict.fromkeys(call.module for call in self.trace.calls if call.routed)
        sorting = dict.fromkeys(call.module for call in self.trace.calls if call.sorts)
        called = {call.module for call in self.trace.calls}
        for layer, name in enumerate(self.layers):
            inside = [writer for site in sites if site.layer == layer for writer in site.writers]
            places: list[tuple[str, str | None]] = [(one, None) for one in routed if one.startswith(name + ".")]
            # Of attention's experts no module holds all that one token goes through.
            for router in (one for one in sorting if one.startswith(name + ".") and _module_of(one) in called):
                fused = (one for one in inside if one.axis and len(one.shape) == 3)
                own = (_module_of(one.parameter) for one in fused if one.parameter.startswith(_module_of(router) + "."))
                places += [] if places else [(module, router) for module in dict.fromkeys(own)]
            found += [one for place in places if (one := self._mixture(layer, *place, inside)) is not None]
        return tuple(found)

    def _mixture(self, layer: int, module: str, router: str | None, inside: Sequence[Writer]) -> Mixture | None:
        writers = [one for one in inside if one.parameter.startswith(module + ".")]
        fused = (one.shape[0] for one in writers if len(one.shape) == 3 and one.axis)
        n_experts = next(fused, getattr(self.model.get_submodule(module), "num_experts", 0))
        if not n_experts:
            return None
        # Behind a norm of its own an expert writes as much as before, whatever its weights are scaled by.
        editable = all(
            one.axis
            and one.shape[0] % n_experts == 0
            and not any((step.parameter or "").startswith(module + ".") for step in one.steps)
            for one in writers
        )
        return Mixture(layer, module, n_experts, tuple(writers) if editable else (), router)

    def _unseen(self) -> list[str]:
        """The layers' parameters that reach the unembedding by a second stream, beside the one that was followed."""
        modules = {id(module): name for name, module in self.model.named_modules()}
        head = modules.get(id(self.model.get_output_embeddings()))
        calls = [call for call in self.trace.calls if call.module in self.layers]
        seen = {term.source for call in calls for term in (call.before or frozenset()) | (call.after or frozenset())}
        read = {term.source for call in self.trace.calls if call.module == head for term in call.before or ()}
        return sorted(source for source in read - seen if self._is_inside(source))

    def _is_inside(self, name: str) -> bool:
        return any(name.startswith(layer + ".") for layer in self.layers)

    def _unused(self) -> tuple[str, ...]:
        """Parameters of the layers with an axis of width d_model whose module the forward pass never calls."""
        called = {call.module for call in self.trace.calls}
        known = {_pattern(name) for name in self.trace.used}
        unused = []
        for name, shape in self.shapes.items():
            if not self._is_inside(name) or self.d_model not in shape or _pattern(name) in known:
                continue
            if _module_of(name) in called:
                raise ArchitectureError(
                    f"Parameter '{name}' of shape {shape} in model type '{self._model_type}' has an axis "
                    f"of width {self.d_model} and nothing is known of its use, expected every such parameter to be a "
                    "known writer or reader; this model type is not supported."
                )
            unused.append(name)
        return tuple(unused)


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _pattern(name: str) -> str:
    """A parameter's name with the numbers behind its layer's left out: experts in a list have one pattern."""
    match = re.match(r"(?:.*?\.)?\d+\.", name)
    layer = match.group() if match else ""
    return layer + re.sub(r"\.\d+\.", ".*.", "." + name.removeprefix(layer))


def _hands_on(call: ModuleCall) -> bool:
    """Whether a module's output may hold its input; what a module that only adds returns does not."""
    before, after = ({(term.source, term.axis) for term in terms or ()} for terms in (call.before, call.after))
    return bool(before & after) or any(axis is None for _, axis in after)
