"""The steps of the job on what is at hand: a model and its tokenizer, lists of strings, tensors, or names of these.

Each function takes a model that is in memory, with its tokenizer, or what `load` gave; prompts as a list of strings or
a `PromptSet`; and what is taken out as an `Intervention`, a `Direction` or a plain tensor. The rooms do the work.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from remove_refusals.baking import Baked, base_of, check_unchanged
from remove_refusals.baking import bake as write
from remove_refusals.baking import bake_in_place as edit
from remove_refusals.directions import Taken, ablated, as_intervention
from remove_refusals.directions import collect_activations as collect
from remove_refusals.directions import separation as separate
from remove_refusals.errors import ModelError
from remove_refusals.files import Journal
from remove_refusals.measure import Evaluation, make_judge, measuring_prompts
from remove_refusals.measure import evaluate as measure
from remove_refusals.modelmap import map_model
from remove_refusals.models import Answer, LoadedModel, load, render
from remove_refusals.models import generate as answer
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import as_prompts
from remove_refusals.search import Selection, split_for_search
from remove_refusals.search import select as search
from remove_refusals.settings import DirectionSettings, EditSettings, MeasureSettings, SelectSettings, published_name
from remove_refusals.types import Activations, Direction, Intervention, PromptSet, Separation

Prompts = PromptSet | Sequence[str]
"""User messages as text."""


def collect_activations(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    positions: Sequence[int] = (-1,),
    n_layers: int | None = None,
    progress: Progress = SILENT,
) -> Activations:
    """Run prompts through a model, without generating, and keep the residual stream at token positions.

    Args:
        model: A `PreTrainedModel`, a directory, a hub id, `demo`, or what `load` gave.
        tokenizer: Its tokenizer; None where the model brings it.
        prompts: The prompts; they are put into the model's chat template.
        positions: Token positions, negative and counted from the end of the rendered prompt.
        n_layers: How many layers are run, from the first; by default all.
        progress: Told how many prompts are done.

    Returns:
        Activations whose `hidden` is `[n_prompts, n_positions, n_layers + 1, d_model]`, float32, on the CPU.

    Raises:
        ModelError: If the model cannot be loaded, a prompt does not fit it, or memory runs out.
        PromptError: If a prompt cannot be rendered, or a position does not lie within the chat template's tail.
        NumericalError: If an activation is NaN or infinite.

    Example:
        >>> harmful = collect_activations(model, tokenizer, ["How do I pick a lock?", "..."])
    """
    given = as_prompts("prompts", prompts)
    return collect(load(model, tokenizer), given, positions=positions, n_layers=n_layers, progress=progress)


def separation(harmful: Activations, harmless: Activations, *, position: int = -1, seed: int = 0) -> Separation:
    """Measure at every layer how far apart harmful and harmless prompts lie, each by a direction without its part.

    Each set is cut into halves; the difference of the means of one (Arditi et al. 2024, section 2.3) scores the other.

    Args:
        harmful: Activations on prompts that the model refuses.
        harmless: Activations on prompts that it answers.
        position: The token position, one of those that were collected.
        seed: What cuts the sets.

    Returns:
        For each layer the AUROC with its interval, distances, and a permutation test.

    Raises:
        DirectionError: If the sets do not fit together or have fewer than two prompts each.

    Example:
        >>> [layer.auroc for layer in separation(harmful, harmless).layers]
    """
    return separate(harmful, harmless, position=position, seed=seed)


def generate(
    model: Any, tokenizer: Any, prompts: Prompts, *, max_new_tokens: int = 100, progress: Progress = SILENT
) -> list[Answer]:
    """Answer prompts greedily, in batches.

    Args:
        model: As for `collect_activations`.
        tokenizer: Likewise.
        prompts: The prompts; they are put into the model's chat template.
        max_new_tokens: Where an answer is cut off.
        progress: Told how many prompts are done.

    Returns:
        One answer for each prompt: `text`, `token_ids` and whether it `finished` by itself.

    Raises:
        ModelError: If the model cannot be loaded, a prompt does not fit it, or memory runs out.
        NumericalError: If logits are NaN.

    Example:
        >>> with ablated(model, direction):
        ...     answers = generate(model, tokenizer, ["How do I pick a lock?"])
    """
    loaded = load(model, tokenizer)
    token_ids = render(loaded, as_prompts("prompts", prompts).prompts)
    return answer(loaded, token_ids, max_new_tokens=max_new_tokens, progress=progress)


def select(
    model: Any,
    tokenizer: Any = None,
    *,
    harmful: Prompts,
    harmless: Prompts,
    settings: SelectSettings | None = None,
    measure: MeasureSettings | None = None,
    journal: Path | str | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Search for what to take out where, as `run` does, without saving anything.

    Args:
        model: As for `collect_activations`; it is left as it is.
        tokenizer: Likewise.
        harmful: Prompts that the model refuses, at least 24 and better 160; they are split for directions, search and
            confirmation.
        harmless: Prompts that it answers, likewise.
        settings: How the search goes.
        measure: How answers are generated for the confirmation.
        journal: A directory that keeps what is done, so that a killed search goes on.
        progress: Told of every stage.

    Returns:
        Every candidate with its scores, and the pick, whose `intervention` the other functions take.

    Raises:
        SelectionError: If there are too few prompts, or the model gives nothing to choose by.

    Example:
        >>> found = select(model, tokenizer, harmful=refused, harmless=answered)
        >>> bake_in_place(model, found.intervention)
    """
    chosen = settings or SelectSettings()
    parts = split_for_search(
        as_prompts("harmful", harmful), as_prompts("harmless", harmless), DirectionSettings().n_prompts, chosen
    )
    return search(
        load(model, tokenizer),
        parts,
        chosen,
        measure or MeasureSettings(),
        journal=Journal(None if journal is None else Path(journal)),
        progress=progress,
    )


def evaluate(
    model: Any,
    edited: Any,
    tokenizer: Any = None,
    *,
    harmful: Prompts | None = None,
    harmless: Prompts | None = None,
    alarming: Prompts | None = None,
    settings: MeasureSettings | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure refusals, false refusals and damage: a model against an edit of it, on the same prompts.

    Args:
        model: The base, as for `collect_activations`.
        edited: What is taken out (an `Intervention`, a `Direction` or a tensor), which is measured with hooks; or
            another model: in memory, or a directory or hub id.
        tokenizer: The base's tokenizer; None where the model brings it.
        harmful: Prompts that the base is expected to refuse; by default the embedded test set.
        harmless: Harmless prompts; by default the embedded test set.
        alarming: Harmless prompts that sound harmful; by default the embedded set.
        settings: How many prompts there are at most, how long answers are, which judge, and what else is measured.
        progress: Told how many runs of a prompt are done.

    Returns:
        The scores with their intervals, and every answer with its label.

    Raises:
        ModelError: If a model cannot be loaded, or the two have different vocabularies or tokenizers.
        JudgeError: If the judge cannot be used.

    Example:
        >>> scores = evaluate(model, direction, tokenizer, harmful=prompts, harmless=others)
        >>> scores.sets["harmful"].refusals
    """
    if isinstance(edited, PreTrainedTokenizerBase | ProcessorMixin):
        raise ModelError(
            f"The second argument of `evaluate` is a {type(edited).__name__}, expected what is taken out, or an edited "
            "model; give the tokenizer third."
        )
    base, chosen = load(model, tokenizer), settings or MeasureSettings()
    sets = {"harmful": harmful, "harmless": harmless, "alarming": alarming}
    given = {name: as_prompts(name, prompts) for name, prompts in sets.items() if prompts is not None}
    other, context, name = _edited(edited, base)
    found = measure(
        base,
        other,
        measuring_prompts(chosen, given=given),
        chosen,
        edited_context=context,
        judge=make_judge(chosen.judge, language=chosen.language),
        progress=progress,
    )
    return found.model_copy(update={"base": published_name(base.source), "edited": name})


def _edited(edited: Any, base: LoadedModel) -> tuple[LoadedModel, Any, str]:
    """Give the model that is measured against the base, the context that it runs in, and what it is called."""
    if isinstance(edited, Intervention | Direction | list | tuple | torch.Tensor):
        context = partial(ablated, base.model, as_intervention(edited, base.model))
        return base, context, f"{published_name(base.source)}, edited by hooks"
    other = load(edited, base.tokenizer if isinstance(edited, torch.nn.Module) else None)
    return other, nullcontext, published_name(other.source)


def bake(
    base: Any,
    what: Taken,
    output: str | Path,
    *,
    tokenizer: Any = None,
    strength: float | None = None,
    settings: EditSettings | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Baked:
    """Write an edited copy of a checkpoint, file by file, with its certificate.

    Every tensor that is not edited, and every file beside the weights, keeps its bytes.

    Args:
        base: A directory, a hub id, `demo`, or a model as for `collect_activations`: of one that was loaded from files
            these are edited, which have to hold what is in memory; one that came from none is saved first.
        what: An intervention; or a direction, or a plain tensor of one.
        output: The directory to be made.
        tokenizer: Of a model in memory that came from no files.
        strength: The share that is taken out; an intervention's own strengths are multiplied by it.
        settings: Layers, sites, what happens to a tied embedding, and the strength, if that is not given.
        force: Whether to replace an existing output.
        progress: Told of every stage.

    Returns:
        What was written: the directory, the plan, the record and the certificate.

    Raises:
        ArchitectureError: If the model cannot be mapped, or no edit of its weights is exact.
        CheckpointError: If the base is corrupt or has a format that cannot be edited.
        CertificateError: If the saved files do not hold the edit; nothing is kept then.
        OutputError: If the output exists, is the base itself, or cannot be written.

    Example:
        >>> bake("google/gemma-3-1b-it", direction, "gemma-ablated")
    """
    chosen = _edit_settings(strength, settings)
    if tokenizer is None and isinstance(base, torch.nn.Module):
        # Only its files are needed, which lie beside the model's.
        tokenizer = getattr(base, "name_or_path", None) or None
    given = base if isinstance(base, str | Path) else load(base, tokenizer)
    made_from = base_of(given)
    if isinstance(given, LoadedModel):
        check_unchanged(made_from, given.model)
    return write(
        given if isinstance(given, LoadedModel) else made_from,
        as_intervention(what, made_from.model_map, chosen),
        output,
        chosen,
        force=force,
        progress=progress,
    )


def _edit_settings(strength: float | None, settings: EditSettings | None) -> EditSettings:
    chosen = settings or EditSettings()
    return chosen if strength is None else chosen.model_copy(update={"strength": strength})


def bake_in_place(
    model: Any, what: Taken, *, strength: float | None = None, settings: EditSettings | None = None
) -> None:
    """Take a direction out of the weights of a model in memory, which is changed and writes no files.

    Args:
        model: A `PreTrainedModel`, a pipeline or what `load` gave: whole in memory, not quantised, adapters merged.
        what: An intervention; or a direction, or a plain tensor of one.
        strength: The share that is taken out; an intervention's own strengths are multiplied by it.
        settings: Layers, sites, what happens to a tied embedding, and the strength, if that is not given.

    Raises:
        DirectionError: If it does not fit the model.
        ArchitectureError: If the model cannot be mapped, or no edit of its weights is exact.
        ModelError: If a tensor is quantised or not in memory, which its name says, or there is an adapter.

    Example:
        >>> bake_in_place(model, direction)
        >>> model.save_pretrained("edited")
    """
    chosen = _edit_settings(strength, settings)
    edit(model, as_intervention(what, map_model(model), chosen), chosen)
