"""Commands that let a model answer."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals.cli.options import (
    BatchSize,
    Column,
    Device,
    Dtype,
    Force,
    FourBit,
    LayerRange,
    MaxNewTokens,
    ModelArgument,
    OptionalDirectionFile,
    Plain,
    RemoteCode,
    Revision,
    Sites,
    Split,
    Strength,
    SystemPrompt,
    TemplateFile,
    chat_format,
    edit_settings,
)
from remove_refusals.errors import DirectionError
from remove_refusals.progress import SILENT, Progress

if TYPE_CHECKING:
    from remove_refusals.cli.chat import Sides
    from remove_refusals.modelmap import ModelMap
    from remove_refusals.models import LoadedModel
    from remove_refusals.settings import EditSettings
    from remove_refusals.types import Direction, Intervention, PromptSet


Run = Annotated[Path | None, typer.Option("--run", help="Take out what this run chose, a directory of `run`.")]


CandidateName = Annotated[str | None, typer.Option("--candidate", help="With --run: another candidate of its search.")]


Host = Annotated[str, typer.Option(help="The address to listen on; by default only this machine.")]


def chat(
    model: ModelArgument,
    direction: OptionalDirectionFile = None,
    run: Run = None,
    candidate: CandidateName = None,
    no_ablation: Annotated[bool, typer.Option("--no-ablation", help="Talk to the model as it is.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answers, one after the other.")] = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")] = 512,
) -> None:
    """Talk to a model with the direction taken out as it runs; /help there says what can be changed, Ctrl-D ends it."""
    from remove_refusals.cli import chat as chatting
    from remove_refusals.cli import printing as console
    from remove_refusals.models import load_model
    from remove_refusals.settings import LoadSettings

    if no_ablation and compare:
        raise DirectionError("Both --no-ablation and --compare are given, expected one of them; leave one out.")
    if direction is None and run is None and not no_ablation:
        raise DirectionError(
            "No direction is given, expected --direction FILE; make one with `remove-refusals direction`, or pass "
            "--run DIR or --no-ablation."
        )
    edit = edit_settings(strength, layers, sites)
    given = None if no_ablation else _given(direction, run, candidate, edit)
    loaded = load_model(
        model,
        LoadSettings(
            device=device,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
            revision=revision,
        ),
        chat=chat_format(system_prompt, chat_template, plain),
    )
    make, model_map = None, None
    if given is not None:
        make, model_map = _maker(given, edit, loaded)
        make(strength, edit.layers)
    sides: Sides = "compare" if compare else "original" if no_ablation else "ablated"
    chatting.converse(
        loaded,
        make,
        console.typed_lines(),
        console.write,
        state=chatting.ChatState(strength, edit.layers, sides, system_prompt),
        model_map=model_map,
        max_new_tokens=max_new_tokens,
    )


def ui(
    model: ModelArgument,
    direction: OptionalDirectionFile = None,
    run: Run = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port; the first free one from 7860 on.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")] = 256,
) -> None:
    """A web page with both answers side by side, and how far each token lies along the direction."""
    from remove_refusals.cli import printing as console
    from remove_refusals.cli import web
    from remove_refusals.cli import web as web_page
    from remove_refusals.cli.web import Source
    from remove_refusals.models import load_model
    from remove_refusals.report import SelectionRecord
    from remove_refusals.search import load_candidates
    from remove_refusals.settings import EditSettings, LoadSettings

    edit = EditSettings()
    given = _given(direction, run, None, edit)
    loaded = load_model(
        model,
        LoadSettings(
            device=device,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
            revision=revision,
        ),
        chat=chat_format(system_prompt, chat_template, plain),
    )
    make, model_map = _maker(given, edit, loaded)
    searched = run / "selection.json" if run is not None else None
    found = SelectionRecord.read(searched, error=DirectionError) if searched and searched.is_file() else None
    page = web.Page(
        loaded,
        make(1.0, None),
        model_map,
        Source(model, "--run" if run is not None else "--direction", str(run or direction)),
        () if found is None else found.candidates,
        load_candidates(run) if run is not None else {},
        None if found is None else found.candidates[found.picked].name,
        max_new_tokens,
    )
    console.say(f"Serving on http://{host}:{port or 'the first free port from 7860 on'}; Ctrl-C ends it.")
    web_page.serve(page, host=host, port=port)


def _given(
    direction: Path | None, run: Path | None, candidate: str | None, edit: "EditSettings"
) -> "tuple[Direction, ...] | Intervention":
    """Read the directions, or the intervention of a run; before a model is loaded.

    Raises:
        DirectionError: If both or neither are given, or the candidate is not known.
    """
    from remove_refusals.baking import load_intervention
    from remove_refusals.directions import direction as direction_files
    from remove_refusals.search import load_candidates

    if (direction is None) == (run is None):
        raise DirectionError("Neither or both of --direction and --run are given, expected one of them; pass one.")
    if direction is not None:
        if candidate is not None:
            raise DirectionError("The option --candidate is given without --run, expected both; add --run DIR.")
        return direction_files.load_directions(direction)
    assert run is not None
    if candidate is None:
        return load_intervention(run)
    found = load_candidates(run)
    if candidate not in found:
        raise DirectionError(
            f"The candidate {candidate!r} is not among those whose directions {run} keeps, expected one of "
            f"{', '.join(map(repr, found)) or 'none'}; choose one of these."
        )
    return found[candidate]


def _maker(
    given: "tuple[Direction, ...] | Intervention", edit: "EditSettings", loaded: "LoadedModel"
) -> "tuple[Callable[[float, tuple[int, int] | None], Intervention], ModelMap]":
    """Give what makes the intervention of a strength and a range of layers, and the model's map."""
    from remove_refusals.directions import check_fit, make_intervention, scaled
    from remove_refusals.modelmap import derive as modelmap

    model_map = modelmap.map_model(loaded.model)
    if isinstance(given, tuple):
        return lambda strength, layers: make_intervention(
            given, edit.model_copy(update={"strength": strength, "layers": layers}), model_map
        ), model_map
    check_fit(given, model_map)
    return lambda strength, layers: scaled(
        given, model_map.n_layers, strength=strength, layers=layers, kinds=edit.sites
    ), model_map


def generate(
    model: ModelArgument,
    prompts: Annotated[str, typer.Option(help="A file or data set of prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSON Lines file.")],
    direction: OptionalDirectionFile = None,
    force: Force = False,
    column: Column = None,
    split: Split = None,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    max_new_tokens: MaxNewTokens = 100,
) -> None:
    """Answer prompts in batches, greedily; without --direction the model answers as it is."""
    from remove_refusals import files as atomic
    from remove_refusals import files as records
    from remove_refusals.cli import printing as console
    from remove_refusals.directions import direction as direction_files
    from remove_refusals.directions import made_intervention
    from remove_refusals.models import load_model
    from remove_refusals.prompts import prompts_from
    from remove_refusals.settings import LoadSettings, PromptSource

    atomic.check_target(output, force=force, directory=False)
    prompt_set = prompts_from(PromptSource(source=prompts, column=column, split=split), "prompts", "")
    given = None if direction is None else direction_files.load_directions(direction)
    edit = edit_settings(strength, layers, sites)
    loaded = load_model(
        model,
        LoadSettings(
            device=device,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
            revision=revision,
        ),
        chat=chat_format(system_prompt, chat_template, plain),
        batch_size=batch_size,
    )
    intervention, model_map = None, None
    if given is not None:
        intervention, model_map = made_intervention(loaded, given, edit)
    with console.progress() as progress:
        rows = answer_rows(
            loaded,
            prompt_set,
            intervention,
            model_map=model_map,
            max_new_tokens=max_new_tokens,
            progress=progress.stage("answers", len(prompt_set)),
        )
    records.write_jsonl(output, rows, force=force)
    console.finish({"output": str(output), "answers": len(rows)}, f"Saved {len(rows)} answers to {output}.")


def answer_rows(
    loaded: "LoadedModel",
    prompts: "PromptSet",
    intervention: "Intervention | None",
    *,
    model_map: "ModelMap | None" = None,
    max_new_tokens: int = 100,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Answer prompts, with a direction taken out if an intervention is given.

    Returns:
        One JSON object per prompt, in order: `prompt`, `answer`, `n_tokens`, `finished`, `ablated`.

    Raises:
        RemoveRefusalsError: If the model cannot be hooked, or a prompt cannot be rendered or does not fit.
    """
    from remove_refusals.directions import ablated
    from remove_refusals.models import generate as generate_answers
    from remove_refusals.models import render

    token_ids = render(loaded, prompts.prompts)
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if intervention is not None:
        context = ablated(loaded.model, intervention, model_map=model_map)
    with context:
        answers = generate_answers(loaded, token_ids, max_new_tokens=max_new_tokens, progress=progress)
    return [
        {
            "prompt": prompt,
            "answer": answer.text,
            "n_tokens": len(answer.token_ids),
            "finished": answer.finished,
            "ablated": intervention is not None,
        }
        for prompt, answer in zip(prompts.prompts, answers, strict=True)
    ]
