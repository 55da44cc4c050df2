"""Every model type of the installed Transformers that writes text, measured on a tiny random model.

Run as a script (`python tests/architectures.py`) it writes docs/architectures.md.
"""

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import zoo
import zoo_wrappers
from remove_refusals.baking.base import Base, open_base
from remove_refusals.baking.disk import bake
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.knowledge import first_of_width
from remove_refusals.modelmap.types import Mixture, ModelMap
from remove_refusals.report.records import Certificate
from remove_refusals.settings import DiskSettings
from remove_refusals.types import Direction, DirectionOrigin, Intervention

Build = Callable[[str], PreTrainedModel]

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@dataclass(frozen=True)
class Entry:
    """A model type's verdict, what the map says of it, and the model; both are None where there is no map."""

    model_type: str
    verdict: str
    reason: str
    model_map: ModelMap | None = None
    model: PreTrainedModel | None = None


def entry(model_type: str, build: Build = zoo.build) -> Entry:
    try:
        model = build(model_type)
        model_map = map_model(model)
    except ArchitectureError as error:
        return Entry(model_type, "refused", str(error))
    if build is zoo_wrappers.build and model_type in zoo_wrappers.UNLOADABLE:
        return Entry(model_type, "refused", zoo_wrappers.UNLOADABLE[model_type], model_map, model)
    reason = next(iter((*model_map.leaks, *model_map.unhooked)), "")
    return Entry(model_type, model_map.verdict, reason, model_map, model)


@dataclass(frozen=True)
class Run:
    """One forward pass.

    Attributes:
        logits: The logits.
        component: The largest component along the direction, relative to the residual stream's norm, over every input
            and output of a layer.
        reported: The same over the hidden states that the model itself returns, which it notes before a hook on a
            layer's output has run.
        n_boundaries: The number of inputs and outputs of layers that were measured.
    """

    logits: torch.Tensor
    component: float
    reported: float
    n_boundaries: int


def run(model: torch.nn.Module, model_map: ModelMap, direction: Direction) -> Run:
    seen: list[float] = []

    def component(value: Any) -> float:
        stream = first_of_width(value, model_map.d_model)
        assert stream is not None
        hidden = stream.reshape(-1, model_map.d_model)
        # A token at which the whole stream is zero, as behind a mask, has no component.
        return float((hidden @ direction.basis).norm(dim=-1).div(hidden.norm(dim=-1).clamp_min(1e-9)).max())

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(component((args, kwargs)))

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append(component(output))

    modules = [model.get_submodule(layer) for layer in model_map.layers]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        with torch.inference_mode():
            output = model(**zoo.inputs(model), output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    # The last may be behind the final norm.
    reported = (getattr(output, "hidden_states", None) or ())[:-1]
    widths = [hidden for hidden in reported if hidden.shape[-1] == model_map.d_model]
    return Run(output.logits, max(seen), max(map(component, widths), default=0.0), len(seen))


def direction_of(model_map: ModelMap) -> Direction:
    vector = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(3))
    return direction_from_vectors(vector, DirectionOrigin(method="given"))


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    return float((first - second).abs().max() / first.abs().max().clamp_min(1.0))


@dataclass(frozen=True)
class Measured:
    """What was measured on a model type.

    Attributes:
        base: The model as it is.
        hooked: With hooks at the writers.
        behind: With hooks behind the norms; None where what is added is no module's output.
        edited: With edited weights, saved and loaded again; None where no edit is exact.
        halves: The difference of logits between hooks and weights where half of the direction is taken out.
        certificate: Of the saved files.
        unlike: Tensors that are not the same bit for bit when the edit is made in memory.
        changed: Tensors that are not the same bit for bit as in the base.
        loading: What Transformers says that it missed, did not expect or could not fit when it loaded the files.
    """

    base: Run
    hooked: Run
    behind: Run | None
    edited: Run | None = None
    halves: float | None = None
    certificate: Certificate | None = None
    unlike: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    loading: dict[str, Any] | None = None


def unlike(first: PreTrainedModel, second: PreTrainedModel) -> frozenset[str]:
    """The tensors of two models that are not the same bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    return frozenset(name for name, tensor in one.items() if not torch.equal(tensor, other[name]))


def measure(found: Entry, directory: Path, auto: Any = None) -> Measured:
    """Measure a model type; the files are loaded by its own class, or by an Auto class."""
    model, model_map = found.model, found.model_map
    assert model is not None and model_map is not None
    direction = direction_of(model_map)
    whole, half = (intervene(direction, model_map.n_layers, strength=strength) for strength in (1.0, 0.5))

    def hooked(intervention: Intervention, **options: Any) -> Run:
        with ablated(model, intervention, **options):
            return run(model, model_map, direction)

    def in_memory(intervention: Intervention) -> PreTrainedModel:
        other = copy.deepcopy(model)
        bake_in_place(other, intervention)
        return other

    base = run(model, model_map, direction)
    reachable = all(site.residual_hook is not None for site in model_map.sites)
    behind = hooked(whole, placement="residual") if reachable else None
    if model_map.leaks:
        return Measured(base, hooked(whole), behind)
    model.save_pretrained(directory / "base")
    # A few types are in Transformers' lists and not in what its Auto classes read.
    known = auto is not None and type(model.config) in auto._model_mapping
    # Some configurations have no causal form of their own, so that the files alone do not say what they belong to.
    files = Base(model, str(directory / "base"), directory=directory / "base")
    if known:
        files = open_base(directory / "base")
        assert type(files.model) is type(model)
    baked = bake(files, whole, directory / "edited", disk=DiskSettings(jobs=1))
    again, loading = (auto if known else type(model)).from_pretrained(
        directory / "edited", attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(model)
    return Measured(
        base,
        hooked(whole),
        behind,
        edited=run(again.eval(), model_map, direction),
        halves=difference(hooked(half).logits, run(in_memory(half), model_map, direction).logits),
        certificate=baked.certificate,
        unlike=unlike(again, in_memory(whole)),
        changed=unlike(again, model),
        loading=loading,
    )


_TOWER = re.compile(r"vision|visual|image|audio|speech|tower|encoder|projector|vqmodel|acoustic|sam_|protein")


def towers(model: PreTrainedModel, model_map: ModelMap) -> frozenset[str]:
    """The tensors beside the language model that read pictures, sound or the like."""
    inside = (model_map.layers[0].rpartition(".")[0], model_map.input_embedding, model_map.unembedding)
    names = (name for name in model.state_dict() if not name.startswith(tuple(filter(None, inside))))
    return frozenset(name for name in names if _TOWER.search(name))


NO_MIXTURE = Mixture(0, "", 0, ())


def row(found: Entry) -> str:
    """A model type's line in docs/architectures.md."""
    layers, writers, notes = "", "", found.reason
    if found.model_map is not None:
        layers = f"`{found.model_map.layers[0].rpartition('.')[0]}`"
        written = [writer for site in found.model_map.sites for writer in site.writers]
        writers = str(len(written))
        kinds = {step.kind for writer in written for step in writer.steps}
        mixtures = found.model_map.mixtures
        fused = any(
            len(writer.shape) == 3 and writer.axis
            for site in found.model_map.sites
            if site.kind == "mlp"
            for writer in site.writers
        )
        marks = [
            text
            for text, holds in (
                ("tied embeddings", found.model_map.tied),
                ("gains behind writers", "gain" in kinds),
                ("a convolution behind writers", "taps" in kinds),
                ("single experts", bool(mixtures) and all(mixture.writers for mixture in mixtures)),
                ("experts as one", fused and not all(mixture.writers for mixture in mixtures or [NO_MIXTURE])),
                (f"{len(found.model_map.unused)} parameters unused", bool(found.model_map.unused)),
            )
            if holds
        ]
        notes = "; ".join([*marks, *([found.reason] if found.reason else [])])
    return f"| `{found.model_type}` | {found.verdict} | {layers} | {writers} | {notes} |"


def document(texts: Iterable[str], wrappers: Iterable[str]) -> str:
    """The text of docs/architectures.md, given its rows."""
    tables = [sorted(texts), sorted(wrappers)]
    counts = [Counter(line.split(" | ")[1] for line in rows) for rows in tables]
    values = [[len(rows), *(found[name] for name in VERDICTS)] for rows, found in zip(tables, counts, strict=True)]
    lines = ["\n".join(rows) for rows in tables]
    return DOCUMENT_FORM.format(transformers.__version__, *values[0], lines[0], *values[1], lines[1])


VERDICTS = ("exact", "hooks only", "refused")

_TABLE = """| model type | verdict | layers | writers | notes |
|---|---|---|---|---|
{}
"""

DOCUMENT_FORM = (
    """# Model types

What an edit can do to each model type of Transformers {} that writes text, on a tiny random model of each.
Made by `python tests/architectures.py`; `tests/test_architectures.py` verifies every row by numbers.

- *exact*: with edited weights, as with hooks, the residual stream has no component along the direction at any layer's
  input or output, and both give the same logits.
- *hooks only*: the residual stream itself passes through something that no edit of a writer can undo. Hooks on the
  stream leave no component. `--allow-leak` edits the weights all the same, and measures the leak.
- *refused*: the model is not edited, for the reason given.

In mixtures with *single experts* the experts of each token are read where the model runs them, and each expert can have
its own strength, both with hooks and in files. Mixtures with *experts as one* have one strength for all experts of a
layer.

The number of writers is that of the tiny model, which has four layers in most cases.

## Language models

The {} types that map to a causal language model: **{} exact, {} hooks only, {} refused**.

"""
    + _TABLE
    + """
## Language models with towers

The {} types that map to a model that reads pictures or sound beside text, where that is more than the causal language
model: **{} exact, {} hooks only, {} refused**. The class is the one that a user loads. What lies beside the language
model keeps its bytes. Of an omni type the thinker is edited.

"""
    + _TABLE
)


def main() -> None:
    DOCUMENT.parent.mkdir(exist_ok=True)
    texts = (row(entry(model_type)) for model_type in zoo.MODEL_TYPES)
    wrappers = (row(entry(model_type, zoo_wrappers.build)) for model_type in zoo_wrappers.MODEL_TYPES)
    DOCUMENT.write_text(document(texts, wrappers))
    sys.stdout.write(f"{DOCUMENT}\n")


if __name__ == "__main__":
    main()
