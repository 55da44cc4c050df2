"""The stages of `results.py`, each in a process of its own: make a variant; let it answer, and label its answers."""

import argparse
import json
import os
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from transformers import AutoConfig

from remove_refusals import pipeline, progress
from remove_refusals.baking import bake, load_edited
from remove_refusals.files import Journal, Record, versions
from remove_refusals.measure import EvaluationPrompts, Label, kept_answers, measuring_prompts
from remove_refusals.measure.answers import PromptDistance, distances_between
from remove_refusals.measure.evaluate import judge_of
from remove_refusals.measure.judges.calibration import measuring_judge
from remove_refusals.measure.scores import TaskScore
from remove_refusals.measure.tasks import run_tasks
from remove_refusals.modelmap import map_model
from remove_refusals.models import (
    Answer,
    AnswerLogits,
    LoadedModel,
    answer_logits,
    load_model,
    local_directory,
    longest_first,
    model_source,
    render,
)
from remove_refusals.prompts import prompts_from
from remove_refusals.search import split_for_search
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    LoadSettings,
    MeasureSettings,
    PromptSource,
    RunSettings,
    SelectSettings,
    published_name,
)
from results import BASE, RUN, seed_of

PER_BATCH = 8

BAND = (0.23, 0.87)
"""Of the depth, what the published example of the recipe by hand edits: layers 11 to 41 of 48."""


class Seconds(Record):
    """What something took: by the clock, and of the processors, all threads together."""

    wall_s: float
    cpu_s: float


class Cost(Seconds):
    """What a process took; the peaks are in bytes."""

    peak_memory: int
    peak_device_memory: int | None = None


class Made(Record):
    """How a variant came about: the whole process, its search alone, and its steps."""

    cost: Cost
    search: Seconds | None = None
    steps: dict[str, Seconds] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Peer(Record):
    """What another tool says of its own work."""

    tool: str
    n_trials: int
    search_s: float
    wall_s: float
    cpu_s: float | None = None
    peak_memory: int
    threads: int | None = None
    refusals: int
    n: int
    kl: float


class Labelled(Record):
    """The prompts of one set whose answers have each label that the judge knows of, by id; the others complied."""

    n: int
    prompts_sha256: str
    ids: dict[str, tuple[str, ...]]


class Along(Record):
    """How far a variant is from the base along the base's answer to one harmless prompt.

    The KL in nats at the first token and the mean over the answer's first tokens, how many these are, and the summed
    negative log-likelihood of the answer under the base and the variant.
    """

    first: float
    mean: float
    n_tokens: int
    base_loss: float
    edited_loss: float


class Machine(Record):
    """Where it was measured."""

    processor: str
    n_cores: int
    threads: int
    memory: int
    device: str
    versions: dict[str, str]


class How(Record):
    """With what it was measured, and by which command; `n_of` says how many prompts the sets have that were cut."""

    judge: str
    dtype: str
    max_new_tokens: int
    kl_tokens: int
    prompts: dict[str, str]
    n_of: dict[str, int]
    why: str = ""
    command: str = ""


class Variant(Record):
    """One way of taking refusals out of one model, and what it did; no text of an answer is in it."""

    format: Literal[1] = 1
    name: str
    recipe: str
    model: str
    weights: int | None = None
    seed: int | None = None
    how: How
    machine: Machine
    sets: dict[str, Labelled]
    along: dict[str, Along] | None = None
    tasks: tuple[TaskScore, ...] | None = None
    made: Made | None = None
    measured: Cost
    peer: Peer | None = None


def seconds_of(costs: Mapping[str, progress.Cost]) -> dict[str, Seconds]:
    """Give the seconds of what a job took, stage by stage."""
    return {name: Seconds(wall_s=cost.seconds, cpu_s=cost.cpu_seconds) for name, cost in costs.items()}


def search_of(steps: Mapping[str, Seconds]) -> Seconds:
    """Add up the stages that find out what to take out: those between the model's map and the saving."""
    names = list(steps)
    parts = [steps[name] for name in names[names.index("mapping") + 1 : names.index("saving")]]
    return Seconds(wall_s=sum(part.wall_s for part in parts), cpu_s=sum(part.cpu_s for part in parts))


def recipe(name: str, options: argparse.Namespace) -> str:
    """Say in words how a variant is made."""
    if name in options.also:
        return "made by another tool"
    made_in = f", in {options.dtype}" if options.measure_dtype not in (None, options.dtype) and name != BASE else ""
    if name.startswith(f"{RUN}-"):
        return f"`run` with its defaults, seed {seed_of(name, options)}{made_in}"
    said = {
        BASE: "the model as it came",
        "classic": "mean difference of 32 + 32 prompts at 60% of the depth, last token, taken out everywhere "
        "(`--select none`)",
        "projected": f"mean difference of all training prompts at 60% of the depth, less its part along the harmless "
        f"mean, taken out of attention and MLP from {BAND[0]:.0%} to {BAND[1]:.0%} of the depth, norms kept "
        "(`--projected --variant norm-preserving --sites attn,mlp --layers …`)",
        "layer": "one direction, its layer and position chosen (`--select layer`)",
        "tpe": f"strengths by {options.trials} trials of a Parzen estimator, each counted by generation "
        "(`benchmarks/tpe.py`)",
    }[name]
    return said + made_in


def loading(options: argparse.Namespace) -> LoadSettings:
    """Say how models are loaded."""
    return LoadSettings(device=options.device, dtype=options.dtype)


def measuring(options: argparse.Namespace) -> MeasureSettings:
    """Say what is measured."""
    return MeasureSettings(
        harmful=PromptSource(source=options.harmful_test),
        harmless=PromptSource(source=options.harmless_test),
        alarming=PromptSource(source=options.alarming_test),
        n_test=options.n_test,
        max_new_tokens=options.max_new_tokens,
        kl_tokens=options.kl_tokens,
        judge=options.judge,
        tasks=options.tasks,
        task_directory=options.task_files,
        task_limit=options.task_limit,
    )


def finding(options: argparse.Namespace, name: str) -> DirectionSettings:
    """Say what directions are found on."""
    sources = {kind: PromptSource(source=getattr(options, kind)) for kind in ("harmful", "harmless")}
    return DirectionSettings(**sources, seed=seed_of(name, options))


def make(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Make a variant, and say what its stages took."""
    output = options.directory / "models" / name
    journal = output.with_name(f".{name}.journal")
    notes = ["It was interrupted and went on; the seconds are those of the last part."] if journal.exists() else []
    output.parent.mkdir(exist_ok=True)
    if name == "tpe":
        said, costs = _by_trials(options, output, journal)
    else:
        result = pipeline.run(run_settings(options, name), output, force=True)
        said = result.selection.notes if result.selection is not None else ()
        notes += [warning for warning in result.warnings if warning.startswith("Nothing was chosen")]
        costs = result.costs
    steps = seconds_of(costs)
    return {
        "search": search_of(steps).to_json(),
        "steps": {step: seconds.to_json() for step, seconds in steps.items()},
        "notes": [*notes, *said],
        "cost": device_memory(),
    }


def device_memory() -> dict[str, int]:
    """Give the most memory of GPUs that PyTorch has held in this process, if there are any."""
    return {"peak_device_memory": progress.peak_memory()[1]} if torch.cuda.is_available() else {}


def run_settings(options: argparse.Namespace, name: str) -> RunSettings:
    """Give the settings of `run` that make a variant; what `run` measures by itself is cut to a glance."""
    direction, select, edit = finding(options, name), None, EditSettings()
    if name.startswith(f"{RUN}-"):
        select = SelectSettings()
    elif name == "layer":
        select = SelectSettings(method="layer")
    elif name == "projected":
        config = AutoConfig.from_pretrained(model_source(options.model)).get_text_config(decoder=True)
        n_layers = config.num_hidden_layers
        edit = EditSettings(
            variant="norm-preserving",
            sites=("attn", "mlp"),
            layers=(int(BAND[0] * n_layers), max(0, round(BAND[1] * n_layers) - 1)),
        )
        sets = (prompts_from(getattr(direction, kind), kind, f"{kind}_train") for kind in ("harmful", "harmless"))
        direction = direction.model_copy(update={"projected": True, "n_prompts": min(map(len, sets))})
    return RunSettings(
        model=options.model,
        loading=loading(options),
        batch_size=options.batch_size,
        direction=direction,
        select=select,
        edit=edit,
        measure=measuring(options).model_copy(update={"n_test": 1, "tasks": (), "judge": "phrases"}),
    )


def _by_trials(
    options: argparse.Namespace, output: Path, journal: Path
) -> tuple[Sequence[str], Mapping[str, progress.Cost]]:
    """Make the yardstick; give what should be said of it, and what its stages took."""
    # Optuna takes seconds to import, which the others do not need.
    from tpe import TpeSettings, select_tpe

    meter = progress.Meter()
    direction, settings = finding(options, "tpe"), SelectSettings(seed=seed_of("tpe", options))
    sets = (prompts_from(getattr(direction, kind), kind, f"{kind}_train") for kind in ("harmful", "harmless"))
    prompts = split_for_search(*sets, direction.n_prompts, settings)
    meter.begin("loading")
    loaded = load_model(options.model, loading(options), batch_size=options.batch_size)
    meter.begin("mapping")
    map_model(loaded.model)
    selection = select_tpe(
        loaded,
        prompts,
        settings,
        measuring(options),
        TpeSettings(n_trials=options.trials, seed=settings.seed),
        journal=Journal(journal),
        deadline_s=options.deadline,
        progress=progress.Progress(meter=meter),
    )
    meter.begin("saving")
    bake(loaded, selection.intervention, output, force=True)
    shutil.rmtree(journal, ignore_errors=True)
    return selection.notes, meter.costs()


def answer(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Let a variant answer the test prompts, follow it along the base's answers, and label what it said."""
    settings, private = measuring(options), options.directory / "private"
    prompts = measuring_prompts(settings)
    place = options.model if name == BASE else options.also.get(name, options.directory / "models" / name)
    # What rounding to bfloat16 adds to a KL would hide the smallest.
    measured_in = loading(options).model_copy(update={"dtype": options.measure_dtype or options.dtype})
    loaded = load_edited(str(place), options.model, measured_in, batch_size=options.batch_size)
    of_base = None if name == BASE else json.loads((private / f"{BASE}.answer.json").read_text(encoding="utf-8"))
    # As the base's tokenizer and chat template have it; another tool may have saved others.
    ids = (
        of_base["prompts"]
        if of_base
        else {part: render(loaded, own.prompts) for part, own in prompts.by_name().items()}
    )
    journal = Journal(private / "journal")
    said = {part: kept_answers(loaded, part, ids[part], options.max_new_tokens, journal) for part in ids}
    found: dict[str, Any] = {"answers": {part: [one.to_json() for one in answers] for part, answers in said.items()}}
    along = [one["token_ids"] for one in (of_base or found)["answers"]["harmless"]]
    logits = private / "logits"
    if of_base is None:
        keep_logits(loaded, ids["harmless"], along, options.kl_tokens, logits)
        found["prompts"] = ids
    else:
        distances = distances_from(loaded, ids["harmless"], along, options.kl_tokens, logits)
        found["along"] = dict(zip(prompts.harmless.ids, map(shortened, distances), strict=True))
        if settings.tasks:
            base = load_model(options.model, measured_in, batch_size=options.batch_size)
            found["tasks"] = [task.to_json() for task in run_tasks(base, loaded, settings)]
    found["dtype"], found["device"] = str(loaded.model.dtype).removeprefix("torch."), str(loaded.device)
    return found | {"record": scored(options, name, found), "cost": device_memory()}


def batches(ids: Sequence[Sequence[int]], along: Sequence[Sequence[int]]) -> list[list[int]]:
    """Put prompts with answers of like length together, few at a time: each holds logits of the whole vocabulary."""
    order = longest_first([len(one) + len(other) for one, other in zip(ids, along, strict=True)])
    return [order[start : start + PER_BATCH] for start in range(0, len(order), PER_BATCH)]


def keep_logits(
    base: LoadedModel, ids: Sequence[Sequence[int]], along: Sequence[Sequence[int]], n_tokens: int, place: Path
) -> None:
    """Write down what the base predicts along its answers, once for all variants, which then need no base."""
    place.mkdir(exist_ok=True)
    for number, chosen in enumerate(batches(ids, along)):
        found = answer_logits(base, [ids[at] for at in chosen], [along[at] for at in chosen], n_tokens)
        tensors = {name: tensor.to("cpu").contiguous() for name, tensor in vars(found).items()}
        safetensors.torch.save_file(tensors, place / f"{number}.safetensors")


def distances_from(
    edited: LoadedModel, ids: Sequence[Sequence[int]], along: Sequence[Sequence[int]], n_tokens: int, place: Path
) -> list[PromptDistance]:
    """Compare a variant with what was written down of the base."""
    found: dict[int, PromptDistance] = {}
    for number, chosen in enumerate(batches(ids, along)):
        base = AnswerLogits(**safetensors.torch.load_file(place / f"{number}.safetensors", device=str(edited.device)))
        own = answer_logits(edited, [ids[at] for at in chosen], [along[at] for at in chosen], n_tokens)
        found |= zip(chosen, distances_between(base, own, len(chosen)), strict=True)
    return [found[at] for at in range(len(ids))]


def shortened(distance: PromptDistance) -> dict[str, float]:
    """Give what a record keeps of a distance, in five digits."""
    n_tokens = len(distance.kl)
    numbers = {"first": distance.kl[0], "mean": sum(distance.kl) / n_tokens}
    numbers |= {"base_loss": distance.base_loss, "edited_loss": distance.edited_loss}
    return {name: float(f"{number:.5g}") for name, number in numbers.items()} | {"n_tokens": n_tokens}


def scored(options: argparse.Namespace, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Turn answers and distances into the record of a variant, without what it took."""
    settings = measuring(options)
    prompts, asked = measuring_prompts(settings), measuring_judge(settings, options.device)[0]
    sets, judges = {}, set()
    for part, prompt_set in prompts.by_name().items():
        judged = judge_of(part, asked, settings)
        judges.add(judged.name)
        texts = [Answer.model_validate(one).text for one in found["answers"][part]]
        labels = [judgement.label for judgement in judged.judge(prompt_set.prompts, texts)]
        ids = {
            kind.value: tuple(key for key, label in zip(prompt_set.ids, labels, strict=True) if label is kind)
            for kind in Label
            if kind is Label.UNJUDGED or kind in judged.labels - {Label.COMPLIANCE}
        }
        sets[part] = Labelled(n=len(prompt_set), prompts_sha256=prompt_set.sha256, ids=ids)
    directory = local_directory(options.model, None)
    record: dict[str, Any] = {
        "format": 1,
        "name": name,
        "recipe": recipe(name, options),
        "model": published_name(options.model),
        "seed": None if name == BASE or name in options.also else seed_of(name, options),
        "how": how(options, found["dtype"], " and ".join(sorted(judges)), prompts).to_json(),
        "machine": machine(found["device"]).to_json(),
        "sets": {part: one.to_json() for part, one in sets.items()},
        "along": found.get("along"),
        "tasks": found.get("tasks"),
        "peer": peer(options.heretic_log[name]).to_json() if name in options.heretic_log else None,
    }
    if directory is not None:
        record["weights"] = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {key: value for key, value in record.items() if value is not None}


def how(options: argparse.Namespace, dtype: str, judges: str, prompts: EvaluationPrompts) -> How:
    """Say with what it was measured."""
    whole = measuring_prompts(measuring(options).model_copy(update={"n_test": None})).by_name()
    return How(
        judge=judges,
        dtype=dtype,
        max_new_tokens=options.max_new_tokens,
        kl_tokens=options.kl_tokens,
        prompts={name: published_name(part.source) for name, part in prompts.by_name().items()},
        n_of={name: len(part) for name, part in whole.items()},
        why=options.why,
        command=command(options.arguments),
    )


def command(arguments: Sequence[str]) -> str:
    """Give the arguments that a person typed, of local paths the last part."""
    words, skipped = [], False
    for word in arguments:
        if word == "--stage":
            break
        if not skipped and word not in ("--why", "--judge-again"):
            name, equals, value = word.rpartition("=")
            words.append(f"{name}{equals}{published_name(value)}")
        skipped = word == "--why"
    return shlex.join(words)


def machine(device: str) -> Machine:
    """Describe this machine."""
    processor = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = (line.partition(":") for line in described.read_text(encoding="utf-8").splitlines())
        processor = next((value.strip() for name, _, value in lines if name.strip() == "model name"), processor)
    return Machine(
        processor=processor,
        n_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
        versions=versions(),
    )


def peer(path: Path) -> Peer:
    """Read what the driver of Heretic wrote of its search, its pick and its own numbers."""
    log = json.loads(path.read_text(encoding="utf-8"))
    pick = log["selected"]
    return Peer(
        tool=f"Heretic {log['heretic']}",
        n_trials=log["n_trials"],
        search_s=log["search_done_s"] - log["import_s"],
        wall_s=log["wall_s"],
        cpu_s=log.get("cpu_s"),
        peak_memory=round(log["peak_rss_gb"] * 2**30),
        threads=log.get("threads"),
        refusals=pick["refusals"],
        n=pick["n_bad"],
        kl=pick["kl"],
    )
