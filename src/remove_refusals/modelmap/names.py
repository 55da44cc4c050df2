"""Which tensors of a checkpoint's files become which parameter: Transformers' loading conversion, read off the headers.

How Transformers would save a model says little of the files at hand: publishers have other names, fuse experts or store
them one by one, and transpose them. So the names in the files are put through the conversion that loads them, with
tensors that have a shape and no content, and what comes out is compared with the model's parameters.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from remove_refusals.modelmap.types import DiskTensor

Shape = tuple[int, ...]

# What conversions raise for tensors that are not as they expect them.
_UNFIT = (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, StopIteration)


@dataclass(frozen=True, eq=False)
class _Group:
    """Tensors of the files that are converted together, each with the pattern of its name; without a `converter` one.

    `target` is the first parameter that comes of it; `sources` gives for each the tensors that are in it.
    """

    target: str
    converter: WeightConverter | None
    tensors: tuple[tuple[str, str], ...]
    sources: Mapping[str, tuple[str, ...]]

    def convert(self, tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Make the parameters of the tensors."""
        if self.converter is None:
            return {self.target: tensors[self.tensors[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.tensors:
            converter.add_tensor(self.target, name, pattern, tensors[name])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _Sources(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the names of the tensors of which each new one is made, by storage."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: list[torch.Tensor] = list(tensors.values())
        self._names = {tensor.untyped_storage()._cdata: frozenset({name}) for name, tensor in tensors.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = frozenset().union(*map(self.of, tree_leaves((args, kwargs))))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._alive.append(tensor)
                self._names.setdefault(tensor.untyped_storage()._cdata, names)
        return out

    def of(self, value: Any) -> frozenset[str]:
        """Give the names for a tensor; none for what is no tensor."""
        known = isinstance(value, torch.Tensor) and self._names.get(value.untyped_storage()._cdata)
        return known or frozenset()


@dataclass(frozen=True)
class _Widened:
    """A model one of whose parameters is twice as wide along an axis, for conversions that look at its shape."""

    model: PreTrainedModel
    parameter: str
    shape: Shape

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def get_parameter(self, name: str) -> torch.Tensor:
        """Give a parameter without content."""
        own = self.shape if name == self.parameter else self.model.get_parameter(name).shape
        return torch.empty(own, device="meta")


@dataclass(frozen=True, eq=False)
class StoredNames:
    """What the tensors of some files become in a model; `shapes` has None for packed ones.

    `unexplained` are those that the model has no place for.
    """

    model: PreTrainedModel
    shapes: Mapping[str, Shape | None]
    unexplained: tuple[str, ...]
    _groups: Mapping[str, _Group]
    _axes: dict[object, int | None] = field(default_factory=dict)

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters and buffers that the files hold, whole or with others in one tensor."""
        return frozenset(self._groups)

    def of(self, parameter: str) -> tuple[str, ...]:
        """Name the tensors that a parameter is made of, a list's in the order of their numbers; none if unknown."""
        group = self._groups.get(parameter)
        return group.sources[parameter] if group is not None else ()

    def tensors(self, parameter: str, axis: int) -> tuple[DiskTensor, ...]:
        """Find the tensors that hold a parameter and nothing else, each with the axis that becomes this one."""
        group = self._groups.get(parameter)
        if group is None:
            return ()
        sources = group.sources[parameter]
        if any(not set(sources).isdisjoint(others) for other, others in group.sources.items() if other != parameter):
            return ()
        patterns = dict(group.tensors)
        axes = {pattern: self._axis(parameter, group, pattern, axis) for pattern in {patterns[one] for one in sources}}
        found = ((name, axes[patterns[name]]) for name in sources)
        known = tuple(DiskTensor(name, own) for name, own in found if own is not None)
        return known if len(known) == len(sources) else ()

    def load(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Make a parameter of the tensors that `of` names."""
        group = self._groups[parameter]
        own = tuple((name, pattern) for name, pattern in group.tensors if name in tensors)
        return replace(group, tensors=own).convert(tensors, self.model)[parameter]

    def _axis(self, parameter: str, group: _Group, pattern: str, axis: int) -> int | None:
        """Find the axis of a pattern's tensors that is the parameter's: only if it is doubled, the other is."""
        shape = tuple(self._state[parameter].shape)
        shapes = {name: self.shapes[name] for name, _ in group.tensors}
        if group.converter is None or None in shapes.values():
            return axis
        key = (id(group.converter), pattern, axis, shape, tuple(shapes.values()))
        if key in self._axes:
            return self._axes[key]
        wider = _doubled(shape, axis)
        rank = len(next(shapes[name] or () for name, own in group.tensors if own == pattern))
        self._axes[key] = None
        # Of a square tensor both may fit where the conversion transposes what does not: the same place comes first.
        candidates = sorted(range(rank), key=lambda one: rank - one != len(shape) - axis)
        # What is put together of tensors of the whole width, as an embedding of two, is wide where all of them are.
        whole = (
            one for one in candidates if all(size and size[one:][:1] == shape[axis:][:1] for size in shapes.values())
        )
        for candidate, every in (*((one, False) for one in candidates), *((one, True) for one in whole)):
            tensors = {
                name: torch.empty(_doubled(size, candidate) if every or patterns == pattern else size, device="meta")
                for (name, patterns), size in zip(group.tensors, shapes.values(), strict=True)
                if size is not None
            }
            try:
                made = group.convert(tensors, _Widened(self.model, parameter, wider))
            except _UNFIT:
                continue
            if parameter in made and tuple(made[parameter].shape) == wider:
                self._axes[key] = candidate
                break
        return self._axes[key]

    @cached_property
    def _state(self) -> Mapping[str, torch.Tensor]:
        state: Mapping[str, torch.Tensor] = self.model.state_dict()
        return state


def _doubled(shape: Shape, axis: int) -> Shape:
    return tuple(size + (index == axis) * size for index, size in enumerate(shape))


def stored_names(model: PreTrainedModel, shapes: Mapping[str, Shape | None]) -> StoredNames:
    """Read off what the tensors of some files become in a model, by their names and shapes; None if they are packed."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
    unexplained: list[str] = []
    for name in sorted(shapes, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            unexplained.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        known = collected.setdefault(parameter, (converter, []))
        if converter is None and known[1]:
            # A second name of what is there already; Transformers takes the first.
            unexplained.append(name)
        else:
            known[1].append((name, pattern or name))
    groups: dict[str, _Group] = {}
    for parameter, (converter, tensors) in collected.items():
        group = _Group(parameter, converter, tuple(tensors), {})
        sources = _sources(group, shapes, model)
        unexplained += [name for name, _ in tensors] if not sources else []
        for name in sources:
            groups.setdefault(name, replace(group, sources=sources))
    return StoredNames(model, shapes, tuple(unexplained), groups)


def _sources(group: _Group, shapes: Mapping[str, Shape | None], model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Give the parameters that a group becomes, each with its tensors; none if the conversion cannot take them."""
    names = [name for name, _ in group.tensors]
    if group.converter is None:
        return {group.target: tuple(names[:1])}
    # Packed tensors have the shape of another; that of the parameter's parts does for the conversion.
    own = tuple(model.get_parameter(group.target).shape)
    tensors = {name: torch.empty(shapes[name] or own[1:], device="meta") for name in names}
    mode = _Sources(tensors)
    try:
        with mode:
            made = group.convert(tensors, model)
    except _UNFIT:
        return {}
    found = {name: mode.of(tensor) for name, tensor in made.items()}
    return {name: tuple(one for one in names if one in sources) for name, sources in found.items()}


def saved_shapes(model: PreTrainedModel) -> dict[str, Shape | None]:
    """Name the tensors, with their shapes, of the files that `save_pretrained` would write."""
    state = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    try:
        saved = revert_weight_conversion(model, state)
    except _UNFIT:
        # Some conversions cannot be turned round; the model then has its own names.
        saved = state
    return {name: tuple(value.shape) for name, value in saved.items()}


def name_for(model: PreTrainedModel, parameter: str) -> str:
    """Give a name under which files may hold a parameter that they do not hold yet."""
    empty = torch.empty(model.get_parameter(parameter).shape, device="meta")
    names: tuple[str, ...] = (*revert_weight_conversion(model, {parameter: empty}), parameter)
    fitting = (name for name in names if stored_names(model, {name: tuple(empty.shape)}).of(parameter))
    return next(fitting, parameter)
