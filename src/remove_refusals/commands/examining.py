"""The command that looks at a model without changing it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remove_refusals.options import (
    AlarmingTest,
    BatchSize,
    Column,
    Device,
    Dtype,
    Force,
    Harmful,
    HarmfulTest,
    Harmless,
    HarmlessTest,
    KlTokens,
    MaxNewTokens,
    ModelArgument,
    NTest,
    Plain,
    RemoteCode,
    Revision,
    Seed,
    Split,
    SystemPrompt,
    TemplateFile,
    chat_format,
)

if TYPE_CHECKING:
    from remove_refusals.examination import Examination


def analyze(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make, with report.html in it.")],
    force: Force = False,
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Also see what is left without one direction, by generation.")
    ] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    column: Column = None,
    split: Split = None,
    seed: Seed = 0,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
) -> None:
    """Where a model's refusal lives and how robust it is; the model is not changed."""
    from remove_refusals import atomic, console, examination
    from remove_refusals.settings import DirectionSettings, LoadSettings, MeasureSettings, PromptSource, RunSettings

    atomic.check_target(output, force=force, directory=True)
    source = PromptSource
    settings = RunSettings(
        model=model,
        loading=LoadSettings(device, dtype, False, trust_remote_code, revision),
        chat=chat_format(system_prompt, chat_template, plain),
        direction=DirectionSettings(source(harmful, column, split), source(harmless, column, split), seed=seed),
        measure=MeasureSettings(
            source(harmful_test, column, split),
            source(harmless_test, column, split),
            source(alarming_test, column, split),
            n_test,
            max_new_tokens,
            kl_tokens,
        ),
        batch_size=batch_size,
    )
    with console.progress() as on_progress:
        found = examination.analyze(settings, output, answers=answers, force=force, on_progress=on_progress)
    console.finish(
        found.to_json() | {"output": str(output)},
        f"Saved to {output}: report.html, analysis.json" + (", scores.json and rows.jsonl." if answers else "."),
        lambda: _show(found),
    )


def _show(found: "Examination") -> None:
    """Say what was found."""
    from remove_refusals import console
    from remove_refusals.evaluation import warnings

    best = found.separation.layers[found.direction.origin.layer or 0].auroc
    if best is not None:
        console.say(
            f"Harmful and harmless prompts are told apart best at layer {found.direction.origin.layer} of "
            f"{len(found.separation.layers) - 1}: AUROC {best.value:.3f} [{best.low:.3f}, {best.high:.3f}], "
            f"{best.n_harmful} and {best.n_harmless} prompts, each by a direction that it had no part in."
        )
    most = sorted(found.contributions.sites, key=lambda site: -site.value)[:3]
    written = ", ".join(f"{site.site} {'' if site.layer is None else site.layer} {site.value:.3g}" for site in most)
    console.say(f"What adds most along that direction: {written}.")
    if found.evaluation is not None:
        console.show_evaluation(found.evaluation, warnings(found.evaluation))
