"""A model's sites and writers, derived from a traced forward pass of a weightless copy of it.

The residual stream is what the layers hand on. Between two of its boundaries, the terms that are new are what was
added: each is a parameter with the axis that it writes on and the norm gains that it passes through. The outermost
modules whose output holds just those terms are where hooks go. What is not a parameter's output, or a residual stream
that itself passes through something, is noted as a leak: no weight edit is exact there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.skeleton import disk_tensors, skeleton
from remove_refusals.trace import ModuleCall, Term, Terms, Trace, trace_forward
from remove_refusals.types import DiskTensor, HookPoint, ModelMap, Site, SiteKind, Writer

# The kind of a site changes nothing but which strength applies to it, so names may decide it.
_MLP = re.compile(r"mlp|ffn|ff\b|fc|feed_?forward|moe|expert|dense_h_to|intermediate|lin2|w_out|^output")
_N_TOKENS = 7


def map_model(model: PreTrainedModel) -> ModelMap:
    """Derive the sites and writers of a causal language model.

    Args:
        model: A Transformers causal language model; its weights are not read and it is left as it is.

    Returns:
        The map. `leaks` says where a weight edit would not be exact.

    Raises:
        ArchitectureError: If the layers cannot be found, the forward pass cannot be traced, or a parameter inside a
            layer has an axis of width d_model and was never used.
    """
    # Grouped matrix products of experts run on the meta device in bfloat16 only.
    copy_of_model = skeleton(model, dtype=torch.bfloat16)
    d_model, n_layers = _dimensions(copy_of_model)
    tokens = torch.arange(_N_TOKENS, device="meta").unsqueeze(0)
    try:
        trace = trace_forward(
            copy_of_model, d_model, lambda: copy_of_model(input_ids=tokens, attention_mask=None, use_cache=False)
        )
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
class _Segment:
    """What happens to the residual stream between two boundaries of layers.

    `layer` is the layer it belongs to, None for the embedding; `hands_to` is the layer whose input it ends in, None
    where it is a layer's own work.
    """

    layer: int | None
    hands_to: int | None
    before: Terms
    after: Terms
    start: int
    end: int


@dataclass(frozen=True)
class _Derivation:
    """From a trace to a map."""

    source: PreTrainedModel
    model: PreTrainedModel
    d_model: int
    n_layers: int
    trace: Trace

    def model_map(self) -> ModelMap:
        layers = self._layers()
        leaks: list[str] = []
        unhooked: list[str] = []
        sites: list[Site] = []
        for segment in self._segments(layers):
            sites.extend(self._sites(segment, layers, leaks, unhooked))
        writers = {writer.parameter for site in sites for writer in site.writers}
        embedding, unembedding = self._embeddings()
        return ModelMap(
            model_type=self.model.config.model_type,
            d_model=self.d_model,
            n_layers=len(layers),
            layers=layers,
            sites=tuple(sites),
            input_embedding=embedding,
            unembedding=unembedding,
            tied=unembedding == embedding,
            leaks=tuple(dict.fromkeys(leaks)),
            unhooked=tuple(dict.fromkeys(unhooked)),
            unused=self._unused(layers, writers),
        )

    def _embeddings(self) -> tuple[str, str | None]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        output = self.model.get_output_embeddings()
        return (
            names[id(self.model.get_input_embeddings().weight)],
            names.get(id(output.weight)) if output is not None else None,
        )

    def _layers(self) -> tuple[str, ...]:
        """The called list of `num_hidden_layers` modules with the most parameters, or else of any number of them."""
        called = {call.module for call in self.trace.calls}
        best: tuple[bool, int, tuple[str, ...]] = (False, 0, ())
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.nn.ModuleList):
                continue
            members = tuple(f"{name}.{index}" for index in range(len(module)))
            if len(called & set(members)) > len(members) // 2:
                size = sum(parameter.numel() for parameter in module.parameters())
                best = max(best, (len(module) == self.n_layers, size, members))
        if not best[2]:
            raise ArchitectureError(
                f"Model type '{self.model.config.model_type}' has no list of layers that its forward pass calls, "
                "expected one; this model type is not supported."
            )
        return best[2]

    def _segments(self, layers: tuple[str, ...]) -> list[_Segment]:
        calls = sorted((call for call in self.trace.calls if call.module in layers), key=lambda call: call.start)
        segments: list[_Segment] = []
        terms: Terms = frozenset()
        time = -1
        for call in calls:
            if call.before is None or call.after is None:
                raise ArchitectureError(
                    f"Layer '{call.module}' of model type '{self.model.config.model_type}' does not take and return a "
                    f"tensor of width {self.d_model} that parameters can be followed to; this model type is not "
                    "supported."
                )
            index = layers.index(call.module)
            segments.append(_Segment(index if segments else None, index, terms, call.before, time, call.start))
            segments.append(_Segment(index, None, call.before, call.after, call.start, call.end))
            terms, time = call.after, call.end
        return [segment for segment in segments if segment.before != segment.after]

    def _sites(self, segment: _Segment, layers: tuple[str, ...], leaks: list[str], unhooked: list[str]) -> list[Site]:
        place = "the embedding" if segment.layer is None else f"layer {segment.layer}"
        found: list[str] = []
        wanted = self._wanted(segment, place, found)
        if found:
            leaks.extend(found)
            return [self._stream_site(segment, wanted, layers)]
        candidates = [
            call
            for call in self.trace.calls
            if segment.start < call.start and call.end < segment.end and call.module not in layers and call.after
        ]
        parameters = dict(self.model.named_parameters())
        sites = []
        for call in _outermost(candidates, wanted):
            assert call.after is not None
            terms = sorted(call.after, key=lambda term: term.source)
            writers = tuple(writer for term in terms for writer in self._writers(term, parameters))
            kind = self._kind(segment.layer, call.module, layers)
            hooks = _before_norms(call, candidates)
            sites.append(Site(kind, segment.layer, writers, hooks, HookPoint(call.module)))
            wanted -= call.after
        for term in sorted(wanted, key=lambda term: term.source):
            unhooked.append(f"In {place} '{term.source}' writes to the residual stream outside of any module's output.")
            kind = self._kind(segment.layer, term.source, layers)
            sites.append(Site(kind, segment.layer, tuple(self._writers(term, parameters)), (), HookPoint("")))
        return sites

    def _stream_site(self, segment: _Segment, wanted: set[Term], layers: tuple[str, ...]) -> Site:
        """The residual stream as a whole, behind a segment that no sum of writers describes."""
        parameters = dict(self.model.named_parameters())
        terms = sorted(wanted, key=lambda term: term.source)
        writers = tuple(writer for term in terms for writer in self._writers(term, parameters))
        if segment.hands_to is not None:
            kind: SiteKind = "embedding" if segment.layer is None else "attn"
            point = HookPoint(layers[segment.hands_to], on_input=True)
        else:
            assert segment.layer is not None
            kind, point = "mlp", HookPoint(layers[segment.layer])
        return Site(kind, segment.layer, writers, (point,), point)

    def _wanted(self, segment: _Segment, place: str, leaks: list[str]) -> set[Term]:
        """The terms that parameters have added in a segment; what else was done goes to `leaks`."""
        earlier = {(term.source, term.axis) for term in segment.before}
        if segment.before - segment.after:
            leaks.append(f"The residual stream itself passes through something in {place}.")
        new = [term for term in segment.after - segment.before if (term.source, term.axis) not in earlier]
        parameters = dict(self.model.named_parameters())
        wanted: set[Term] = set()
        for term in sorted(new, key=lambda term: term.source):
            if term.source not in parameters or term.axis is None:
                leaks.append(f"In {place} the residual stream takes in {term.source}, which no parameter writes.")
            elif parameters[term.source].shape[term.axis] != self.d_model:
                leaks.append(
                    f"In {place} '{term.source}' writes to the residual stream through an axis of width "
                    f"{parameters[term.source].shape[term.axis]} instead of {self.d_model}."
                )
            else:
                wanted.add(term)
        return wanted

    def _kind(self, layer: int | None, module: str, layers: tuple[str, ...]) -> SiteKind:
        if layer is None:
            return "embedding"
        return "mlp" if _MLP.search(module.removeprefix(layers[layer] + ".").lower()) else "attn"

    def _writers(self, term: Term, parameters: Mapping[str, torch.nn.Parameter]) -> list[Writer]:
        """The term's parameter and its siblings in a list of experts that no token was routed to."""
        assert term.axis is not None
        names = [term.source, *self._unused_siblings(term.source, parameters)]
        return [
            Writer(name, term.axis, tuple(parameters[name].shape), term.steps, self._on_disk(name, term.axis))
            for name in names
        ]

    def _on_disk(self, name: str, axis: int) -> tuple[DiskTensor, ...]:
        return disk_tensors(self.source, name, tuple(dict(self.model.named_parameters())[name].shape), axis)

    def _unused_siblings(self, source: str, parameters: Mapping[str, torch.nn.Parameter]) -> list[str]:
        pattern = _pattern(source, keep=self._layer_prefix(source))
        return [
            name
            for name in parameters
            if name not in self.trace.used
            and _pattern(name, keep=self._layer_prefix(name)) == pattern
            and parameters[name].shape == parameters[source].shape
        ]

    def _layer_prefix(self, name: str) -> str:
        match = re.match(r"(?:.*?\.)?\d+\.", name)
        return match.group() if match else ""

    def _unused(self, layers: tuple[str, ...], writers: set[str]) -> tuple[str, ...]:
        """Parameters of the layers with an axis of width d_model whose module the forward pass never calls.

        Raises:
            ArchitectureError: If the module is called and yet the parameter is never used.
        """
        called = {call.module for call in self.trace.calls}
        known = {_pattern(name, self._layer_prefix(name)) for name in self.trace.used | writers}
        unused = []
        for name, parameter in self.model.named_parameters():
            inside = any(name.startswith(layer + ".") for layer in layers)
            if not inside or self.d_model not in parameter.shape or _pattern(name, self._layer_prefix(name)) in known:
                continue
            if name.rpartition(".")[0] in called:
                raise ArchitectureError(
                    f"Parameter '{name}' of shape {tuple(parameter.shape)} in model type "
                    f"'{self.model.config.model_type}' has an axis of width {self.d_model} and nothing is known of its "
                    "use, expected every such parameter to be a known writer or reader; this model type is not "
                    "supported."
                )
            unused.append(name)
        return tuple(unused)


def _before_norms(call: ModuleCall, candidates: Iterable[ModuleCall]) -> tuple[HookPoint, ...]:
    """The outermost modules whose outputs, before any per-channel step, make up a call's output.

    Biases that a norm adds have no module of their own: they are taken out of the call's output. Where the parts cannot
    all be found, the call's output itself is the place.
    """
    assert call.after is not None
    steps_of = {(term.source, term.axis): term.steps for term in call.after}
    if not any(steps_of.values()):
        return (HookPoint(call.module),)
    bare = {Term(source, axis) for source, axis in steps_of}
    points = []
    for part in _outermost([other for other in candidates if call.start <= other.start or other.after], bare):
        assert part.after is not None
        steps = {steps_of[term.source, term.axis] for term in part.after}
        if len(steps) > 1:
            return (HookPoint(call.module),)
        points.append(HookPoint(part.module, next(iter(steps))))
        bare -= part.after
    for term in sorted(bare, key=lambda term: term.source):
        if steps_of[term.source, term.axis]:
            return (HookPoint(call.module),)
        points.append(HookPoint(call.module, (), term.source))
    return tuple(points)


def _pattern(name: str, keep: str) -> str:
    return keep + re.sub(r"\.\d+\.", ".*.", "." + name.removeprefix(keep))


def _outermost(calls: Iterable[ModuleCall], wanted: set[Term]) -> list[ModuleCall]:
    """The fewest, outermost calls whose outputs hold nothing but wanted terms, each term once."""
    fitting = [call for call in calls if call.after and call.after <= wanted]
    fitting.sort(key=lambda call: (-len(call.after or ()), call.start, -call.end))
    chosen: list[ModuleCall] = []
    covered: set[Term] = set()
    for call in fitting:
        if call.after and not call.after & covered:
            chosen.append(call)
            covered |= call.after
    return sorted(chosen, key=lambda call: call.start)
