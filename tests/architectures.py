"""Every causal-LM model type of the installed Transformers, measured on a tiny random model.

Run as a script (`python tests/architectures.py`) it writes docs/architectures.md.
"""

import copy
import functools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import zoo
from remove_refusals.baking.base import Base
from remove_refusals.baking.disk import bake
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.knowledge import first_of_width
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.report.records import Certificate
from remove_refusals.settings import DiskSettings
from remove_refusals.types import Direction, DirectionOrigin, Intervention

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@dataclass(frozen=True)
class Entry:
    """A model type's verdict and what the map says of it; the map is None where it was refused."""

    model_type: str
    verdict: str
    reason: str
    model_map: ModelMap | None


@functools.cache
def entry(model_type: str) -> Entry:
    try:
        model_map = map_model(zoo.build(model_type))
    except ArchitectureError as error:
        return Entry(model_type, "refused", str(error), None)
    reason = next(iter((*model_map.leaks, *model_map.unhooked)), "")
    return Entry(model_type, model_map.verdict, reason, model_map)


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
    """

    base: Run
    hooked: Run
    behind: Run | None
    edited: Run | None = None
    halves: float | None = None
    certificate: Certificate | None = None
    unlike: frozenset[str] | None = None


def unlike(first: PreTrainedModel, second: PreTrainedModel) -> frozenset[str]:
    """The tensors of two models that are not the same bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    return frozenset(name for name, tensor in one.items() if not torch.equal(tensor, other[name]))


def measure(model_type: str, directory: Path) -> Measured:
    model, model_map = zoo.build(model_type), entry(model_type).model_map
    assert model_map is not None
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
    # Some configurations have no causal form of their own, so that the files alone do not say what they belong to.
    files = Base(model, str(directory / "base"), directory=directory / "base")
    baked = bake(files, whole, directory / "edited", disk=DiskSettings(jobs=1))
    again = type(model).from_pretrained(directory / "edited", attn_implementation="eager").eval()
    return Measured(
        base,
        hooked(whole),
        behind,
        edited=run(again, model_map, direction),
        halves=difference(hooked(half).logits, run(in_memory(half), model_map, direction).logits),
        certificate=baked.certificate,
        unlike=unlike(again, in_memory(whole)),
    )


def document() -> str:
    """The text of docs/architectures.md."""
    entries = [entry(model_type) for model_type in sorted(zoo.MODEL_TYPES)]
    counts = Counter(found.verdict for found in entries)
    rows = []
    for found in entries:
        layers, writers, notes = "", "", found.reason
        if found.model_map is not None:
            layers = f"`{found.model_map.layers[0].rpartition('.')[0]}`"
            written = [writer for site in found.model_map.sites for writer in site.writers]
            writers = str(len(written))
            kinds = {step.kind for writer in written for step in writer.steps}
            marks = [
                text
                for text, holds in (
                    ("tied embeddings", found.model_map.tied),
                    ("gains behind writers", "gain" in kinds),
                    ("a convolution behind writers", "taps" in kinds),
                    (f"{len(found.model_map.unused)} parameters unused", bool(found.model_map.unused)),
                )
                if holds
            ]
            notes = "; ".join([*marks, *([found.reason] if found.reason else [])])
        rows.append(f"| `{found.model_type}` | {found.verdict} | {layers} | {writers} | {notes} |")
    return (
        HEAD.format(
            version=transformers.__version__,
            total=len(entries),
            **{name.replace(" ", "_"): counts[name] for name in ("exact", "hooks only", "refused")},
        )
        + "\n".join(rows)
        + "\n"
    )


HEAD = """# Model types

What an edit can do to each of the {total} model types that Transformers {version} maps to a causal language model, on a
tiny random model of each: **{exact} exact, {hooks_only} hooks only, {refused} refused**.
Made by `python tests/architectures.py`; `tests/test_architectures.py` verifies every row by numbers.

- *exact*: with edited weights, as with hooks, the residual stream has no component along the direction at any layer's
  input or output, and both give the same logits.
- *hooks only*: the residual stream itself passes through something that no edit of a writer can undo. Hooks on the
  stream leave no component; a weight edit has to be asked for with `--allow-leak`, and its leak is measured.
- *refused*: the model is not edited, for the reason given.

The number of writers is that of the tiny model, which has four layers in most cases.

| model type | verdict | layers | writers | notes |
|---|---|---|---|---|
"""


def main() -> None:
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
    sys.stdout.write(f"{DOCUMENT}\n")


if __name__ == "__main__":
    main()
