"""Commands that make something: a direction, an edited model, a repository on the hub."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from remove_refusals.cli.command import (
    CandidateName,
    ConfigFile,
    DirectionFile,
    Force,
    ModelArgument,
    RunDirectory,
    given_intervention,
    takes,
    to,
    write_log,
)
from remove_refusals.errors import DirectionError, SelectionError

if TYPE_CHECKING:
    from remove_refusals.settings import DiskSettings, RunFiles, RunSettings


@takes()
def run(settings: "RunSettings", files: "RunFiles", config: ConfigFile = None) -> None:
    """The whole job: activations, direction, ablation, evaluation, and the saved model."""
    from remove_refusals.cli import printing
    from remove_refusals.files import check_target

    decided = (*(["--direction"] if files.direction is not None else []), *settings.says_what_to_take_out)
    if decided:
        # Whoever says what to take out wants just that.
        if settings.select is not None and "method" in settings.select.model_fields_set:
            raise SelectionError(
                f"--select {settings.select.method} and options that say what to take out ({', '.join(decided)}) are "
                "both given, expected one of them; leave --select or the others out."
            )
        settings = settings.model_copy(update={"select": None})
    target = files.output or Path(f"{Path(settings.model).name}-ablated")
    check_target(target, force=files.force, directory=True)
    stages = printing.SEARCHED if settings.select is not None else printing.GIVEN
    with printing.progress(*stages) as progress:
        if settings.select is None:
            said = f"{' and '.join(decided) or '--select none'} says what to take out"
            progress.note(f"There is no search, since {said}; leave that out to search how much to take out where.")
        from remove_refusals import pipeline

        result = pipeline.run(settings, target, force=files.force, direction_file=files.direction, progress=progress)
    took = printing.costs_in_words(result.costs)
    write_log(took)

    def show() -> None:
        printing.show_evaluation(result.evaluation, result.warnings)
        if result.selection is not None:
            printing.show_selection(result.selection)
        printing.show_tied(result.baked.plan)

    data = {"output": str(target), "scores": result.evaluation.to_json(), "warnings": list(result.warnings)}
    data["costs"] = {name: asdict(cost) for name, cost in result.costs.items()}
    data |= {} if result.selection is None else {"selection": result.selection.summary().to_json()}
    printing.finish(data, f"Saved to {target}; the report is {target / 'report.html'}.", show)
    model, made = shlex.quote(settings.model), shlex.quote(str(target))
    printing.remark(
        took,
        f"Next:  remove-refusals chat {model} --run {made} --compare",
        f"       remove-refusals certify {made} --base {model}",
    )


@takes("loading", "chat", "batch_size", "direction")
def find(
    model: ModelArgument,
    output: Annotated[Path, to("A .safetensors or .pt file; a directory for --per-layer.")],
    settings: "RunSettings",
    force: Force = False,
) -> None:
    """Only the direction: the difference of mean activations on harmful and harmless prompts."""
    from remove_refusals.cli import printing
    from remove_refusals.directions import (
        check_direction_path,
        describe_direction,
        find_direction,
        save_direction,
        save_directions,
        training_prompts,
    )
    from remove_refusals.files import atomic_directory, check_target
    from remove_refusals.models import check_not_source, load_model

    wanted = settings.direction
    check_not_source(output, model, revision=settings.loading.revision)
    if wanted.per_layer:
        check_target(output, force=force, directory=True)
    else:
        check_direction_path(output, force=force)
    prompts = training_prompts(wanted)
    with printing.progress(printing.LOADING, printing.READING) as progress:
        loaded = load_model(model, settings.loading, settings.chat, settings.batch_size, progress=progress)
        found = find_direction(loaded, wanted, prompts=prompts, progress=progress)
    first, where = found.directions[0], ", ".join(map(str, wanted.positions))
    if wanted.per_layer:
        with atomic_directory(output, force=force) as directory:
            save_directions(found.directions, directory)
        layers = f"{len(found.directions)} layers"
    else:
        save_direction(first, output, force=force)
        layers = f"layer {first.origin.layer}"
    printing.finish(
        {"output": str(output), "directions": [describe_direction(one) for one in found.directions]},
        f"Saved to {output}: d_model {first.d_model}, {layers}, position {where}.",
    )


_KINDS = ("checkpoint", "lora", "gguf-lora")


@takes("edit", "loading.trust_remote_code", "loading.revision")
def bake(
    model: ModelArgument,
    output: Annotated[Path, to("The directory to make; a file for GGUF.")],
    settings: "RunSettings",
    disk: "DiskSettings",
    direction: DirectionFile = None,
    run: RunDirectory = None,
    candidate: CandidateName = None,
    force: Force = False,
    kind: Annotated[str, Option("--as", help="checkpoint; beside the base: lora or gguf-lora.")] = "checkpoint",
) -> None:
    """Edit the weights for good, file by file on disk; the same command goes on where a killed one stopped."""
    from remove_refusals import baking
    from remove_refusals.cli import printing
    from remove_refusals.directions import as_intervention
    from remove_refusals.files import check_target
    from remove_refusals.models import check_not_source, edited_before

    if kind not in _KINDS:
        raise DirectionError(f"--as is {kind!r}, expected one of {', '.join(_KINDS)}.")
    edit, loading = settings.edit, settings.loading
    check_not_source(output, model, run, revision=loading.revision)
    check_target(output, force=force, directory=kind in ("checkpoint", "lora"))
    given = given_intervention(direction, run, candidate)
    if given is None and not edit.silence_experts:
        raise DirectionError(
            "Neither --direction nor --run nor --silence-experts is given, expected one of them; pass one."
        )
    edit = edit if run is None else baking.recorded_edit(run, edit)
    base = baking.open_base(model, revision=loading.revision, trust_remote_code=loading.trust_remote_code)
    model_map, before = base.model_map, edited_before(model, loading.revision)
    intervention = as_intervention(given or (), model_map, edit)
    remarks = [] if before is None else [f"Note: {before}"]
    if kind == "checkpoint":
        with printing.progress(printing.EDITING) as progress:
            baked = baking.bake(base, intervention, output, edit, force=force, disk=disk, progress=progress)
        plan, record, what = baked.plan, baked.record, "."
    else:
        make = baking.bake_lora if kind == "lora" else baking.bake_gguf_lora
        plan, record = make(base, intervention, output, edit, force=force)
        what = f": a {'PEFT' if kind == 'lora' else 'llama.cpp'} LoRA of the edit."
        names = {entry.parameter for entry in plan.entries}
        remarks += [f"The adapter changes {len(names)} tensors of model type {model_map.model_type}; the base stays."]
        if model_map.tied and model_map.input_embedding in names:
            remarks.append(
                "The embedding is tied: loaded, the adapter leaves the unembedding alone; merged, both change."
            )

    def show() -> None:
        if kind == "checkpoint":
            printing.show_plan(plan, model_map)
        printing.say(*remarks)

    printing.finish({"output": str(output), "record": record.to_json()}, f"Saved to {output}{what}", show)


def push(
    directory: Annotated[Path, Argument(help="What `run` or `bake` left.")],
    repo: Annotated[str, Argument(help="The repository on the hub, such as me/my-model.")],
    public: Annotated[bool, Option("--public", help="Let everyone see it; private by default.")] = False,
    adapter_only: Annotated[
        bool, Option("--adapter-only", help="Only an adapter's files, its card and its records.")
    ] = False,
    with_answers: Annotated[
        bool, Option("--with-answers", help="Also rows.jsonl and HTML pages, with answers to harmful prompts.")
    ] = False,
    base: Annotated[
        str | None, Option(help="Where the base's card is, for the licence: a directory or a hub id.")
    ] = None,
    endpoint: Annotated[str | None, Option(help="The hub's address; HF_ENDPOINT by default.")] = None,
) -> None:
    """Send what `run` or `bake` left to the hub, with its model card.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from remove_refusals.cli import printing
    from remove_refusals.report import push as send

    with printing.transfers():
        pushed = send(
            directory,
            repo,
            private=not public,
            adapter_only=adapter_only,
            with_answers=with_answers,
            base=base,
            endpoint=endpoint,
        )
    remarks = [f"Note: {note}" for note in pushed.notes]
    remarks += [f"Left out: {', '.join(pushed.left_out)}."] if pushed.left_out else []
    who = "private" if pushed.private else "public"
    printing.finish(
        pushed.to_json(),
        f"Sent {len(pushed.files)} files to {pushed.url} ({who}), commit {pushed.commit}.",
        lambda: printing.say(*remarks),
    )
