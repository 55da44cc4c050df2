"""Write the records of `results.py` and `device.py` up as a page; every number on it is computed here."""

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from device import Device
from remove_refusals.errors import RecordError
from remove_refusals.files import atomic_file
from remove_refusals.measure import Estimate, Mean, Rate, mean_with_interval, wilson_rate
from remove_refusals.measure.statistics import (
    PairedDifference,
    PairedRateDifference,
    Verdict,
    paired_difference,
    paired_rates,
    perplexity,
    token_quantile,
)
from results import BASE, RUN
from results_stages import Cost, Made, Seconds, Variant

REFUSED, LECTURED, DEGENERATE, UNJUDGED = "refusal", "moralising", "degenerate", "unjudged"
NOT_ANSWERED = (REFUSED, LECTURED)
"""A lecture is no answer either, where the judge knows of lectures."""

INTRODUCTION = """\
# Results

This page compares ways of taking refusals out of the same models, on the same prompts. One evaluator measured all of
them from the saved files. `benchmarks/results.py` made and measured them, and wrote this page from
`benchmarks/records/`, which has counts and the ids of prompts, no answers. Brackets are 95% intervals: Wilson's for
counts, the bootstrap over prompts for means. Seconds are processor seconds, all threads together; seconds by the clock
follow in parentheses. The machines did other work at the same time.

- *refused*: harmful prompts whose answer declines; *lectures*: harmful prompts whose answer only moralises;
- *false refusals*: refusals and lectures on harmless prompts, and on harmless prompts that sound alarming;
- *no answer*: empty, looping or gibberish answers in the harmful, the harmless and the alarming set;
- *KL*: in nats, along the base's answers to the harmless prompts that the base answered: at the first token, and the
  mean over the first tokens of the answer. The column *all* is over all harmless prompts. It counts cured false
  refusals of the base as damage;
- *perplexity*: of the base's answers, as a multiple of that under the base;
- *search*: choosing what to take out; *all*: making the model and measuring it, the base's answers included;
- arrows: more or fewer than the base, by the exact McNemar test at 5%, without correction for many tests.
"""

STAGES = """\
The seconds of `run` with its defaults, as the mean over its seeds. Its own evaluation was cut to one prompt of each
set; the last two lines are the full measurement.
"""

LOSSES = """\
Each line lists what is lower, and so better, than with `run`. The number of `run`, the mean over its seeds, comes
second. A difference is *decided* if the paired test supports it (McNemar's for counts, a sign-flip test for the KL, at
5%, without correction for many tests). A variant that still refuses easily has a low KL, so its refusals come first.
"""


@dataclass(frozen=True, eq=False)
class Measured:
    """The variants of one model that were measured alike, in their order; the base is the first."""

    title: str
    variants: tuple[Variant, ...]

    @property
    def base(self) -> Variant:
        """The model as it came."""
        return self.variants[0]

    @property
    def runs(self) -> tuple[Variant, ...]:
        """What `run` made, one for each seed."""
        return tuple(one for one in self.variants if one.name.startswith(f"{RUN}-"))

    def has(self, part: str, label: str) -> bool:
        """Whether the judge looked for a label."""
        return part in self.base.sets and label in self.base.sets[part].ids

    def flagged(self, variant: Variant, part: str, labels: Iterable[str]) -> tuple[Counter[str], int]:
        """Give the prompts whose answer has one of the labels, as often as they are there, of how many judged ones."""
        own, base = variant.sets[part], self.base.sets[part]
        left_out = Counter(own.ids[UNJUDGED]) | Counter(base.ids[UNJUDGED])
        found = Counter(key for label in labels for key in own.ids.get(label, ()))
        return found - left_out, own.n - left_out.total()

    def rate(self, variant: Variant, part: str, labels: Iterable[str]) -> Rate:
        """Count the prompts whose answer has one of the labels."""
        found, n = self.flagged(variant, part, labels)
        rate = wilson_rate(found.total(), n, variant.sets[part].prompts_sha256)
        assert rate is not None
        return rate

    def compared(self, first: Variant, second: Variant, part: str, labels: Iterable[str]) -> PairedRateDifference:
        """Compare two variants on the same prompts."""
        (one, n), (other, m) = (self.flagged(variant, part, labels) for variant in (first, second))
        apart = list((one | other).elements())
        rest = [False] * (min(n, m) - len(apart))
        difference = paired_rates([*(key in one for key in apart), *rest], [*(key in other for key in apart), *rest])
        assert difference is not None
        return difference

    @property
    def answered(self) -> list[str]:
        """The harmless prompts that the base answered."""
        ids = self.base.sets["harmless"].ids
        left_out = {key for label in (*NOT_ANSWERED, UNJUDGED) for key in ids.get(label, ())}
        along = next((one.along for one in self.variants if one.along is not None), {})
        return [key for key in along if key not in left_out]

    def distances(self, variant: Variant, value: str, keys: Sequence[str] | None = None) -> list[float]:
        """Give one number of each prompt, by default of those that the base answered."""
        assert variant.along is not None
        return [getattr(variant.along[key], value) for key in (self.answered if keys is None else keys)]

    def beside_base(self, variant: Variant, part: str, labels: Iterable[str]) -> str:
        """Write a rate, with an arrow where it is higher or lower than the base's."""
        verdict = self.compared(self.base, variant, part, list(labels)).verdict
        arrow = {Verdict.HIGHER: " ↑", Verdict.LOWER: " ↓"}.get(verdict, "")
        return f"{self.rate(variant, part, labels)}{arrow}"

    def kl(self, variant: Variant, value: str, keys: Sequence[str] | None = None) -> Mean:
        """Give a mean KL with its interval."""
        found = mean_with_interval(self.distances(variant, value, keys), variant.sets["harmless"].prompts_sha256)
        assert found is not None
        return found

    def median(self, variant: Variant) -> float:
        """Give the median of the first token's KL."""
        found = token_quantile([[value] for value in self.distances(variant, "first")], 0.5, "")
        assert found is not None
        return found.value

    def perplexity_ratio(self, variant: Variant) -> Estimate:
        """Give the perplexity of the base's answers above that under the base."""
        losses = [self.distances(variant, name) for name in ("base_loss", "edited_loss")]
        above = [edited - base for base, edited in zip(*losses, strict=True)]
        found = perplexity(above, [int(n) for n in self.distances(variant, "n_tokens")], "")
        assert found is not None
        return found

    def whole(self, variant: Variant) -> Seconds | None:
        """Give the seconds of making and measuring it, the base's answers included."""
        parts: list[Seconds] = [self.base.measured]
        if variant.name != BASE:
            parts.append(variant.measured)
        if variant.made is not None:
            parts.append(variant.made.cost)
        elif variant.name != BASE:
            return None
        return Seconds(wall_s=sum(one.wall_s for one in parts), cpu_s=sum(one.cpu_s for one in parts))


def read(directories: Sequence[Path]) -> tuple[list[Measured], list[Device]]:
    """Read records, a directory for each model."""
    measured, devices = [], []
    for directory in directories:
        found = {}
        for path in sorted(directory.glob("*.json")):
            if path.name.startswith("device"):
                devices.append(Device.read(path, error=RecordError))
            else:
                variant = Variant.read(path, error=RecordError)
                found[variant.name] = variant
        if not found:
            continue
        if BASE not in found:
            raise RecordError(f"The directory {directory} has no {BASE}.json, expected one; measure the base too.")
        for variant in found.values():
            _check_alike(found[BASE], variant, directory)
        own = sorted(name for name in found if name.startswith(f"{RUN}-"))
        last = [name for name in ("layer", "classic", "projected", "tpe") if name in found]
        others = [name for name in found if name not in (BASE, *own, *last)]
        measured.append(Measured(directory.name, tuple(found[name] for name in (BASE, *own, *last, *others))))
    return measured, devices


def _check_alike(base: Variant, variant: Variant, directory: Path) -> None:
    for what, of_base, own in (
        ("judge", base.how.judge, variant.how.judge),
        ("length", base.how.max_new_tokens, variant.how.max_new_tokens),
        ("prompts", *({part: one.prompts_sha256 for part, one in each.sets.items()} for each in (base, variant))),
    ):
        if of_base != own:
            raise RecordError(
                f"The record {directory / variant.name}.json was measured with another {what} ({own}) than the base "
                f"({of_base}), expected the same; measure or judge it again."
            )


def write(directories: Sequence[Path], output: Path | None) -> None:
    """Write the page, or print it."""
    text = page(*read(directories))
    if output is None:
        print(text, end="")
        return
    with atomic_file(output, force=True) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def page(measured: Sequence[Measured], devices: Sequence[Device]) -> str:
    """Give the page as Markdown."""
    parts = ["---\nhide:\n  - toc\n---\n\n" + INTRODUCTION]
    parts += [section(one) for one in measured]
    if any(own.runs for own in measured):
        parts.append(f"## Seconds by stage\n\n{STAGES}\n" + stages(measured))
    if devices:
        parts.append("## On a GPU\n\n" + on_devices(devices))
    parts.append(repeated(measured))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def section(own: Measured) -> str:
    """Write one model up."""
    base = own.base
    how, machine = base.how, base.machine
    answered = own.rate(base, "harmless", NOT_ANSWERED)
    sizes = ", ".join(
        f"{one.n} {part}" + (f" of {how.n_of[part]}" if how.n_of.get(part, one.n) != one.n else "")
        for part, one in base.sets.items()
    )
    why = " ".join(dict.fromkeys(one.how.why for one in own.variants))
    recipes = "".join(filled(f"- `{one.name}`: {told(one)}", "  ") for one in own.variants)
    size = "" if base.weights is None else f" ({base.weights / 1e6:,.0f} MB of weights)"
    text = [
        f"## {own.title}\n",
        filled(
            f"`{base.model}`{size}. Prompts: {sizes} ({', '.join(sorted(set(how.prompts.values())))}), of which the "
            f"base answered {answered.n - answered.count} harmless ones. Answers of up to {how.max_new_tokens} tokens, "
            f"the KL over up to {how.kl_tokens}. Judge: {how.judge}. {how.dtype} on {machine.device}; "
            f"{machine.processor}, {machine.n_cores} cores, PyTorch with {machine.threads} of them, "
            f"{machine.memory / 2**30:.0f} GiB; torch {machine.versions.get('torch')}, transformers "
            f"{machine.versions.get('transformers')}. {why}"
        ),
        recipes,
        refusals(own),
        damage(own),
        costs(own),
    ]
    if own.runs:
        text += [f"### Where `run` loses on {own.title}\n", losses(own)]
    return "\n".join(text)


def filled(text: str, indent: str = "") -> str:
    """Break a paragraph into lines."""
    return (
        textwrap.fill(text.strip(), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        + "\n"
    )


def told(variant: Variant) -> str:
    """Say how a variant was made, and what its maker says of it."""
    text = variant.recipe
    if (peer := variant.peer) is not None:
        each = peer.search_s / peer.n_trials
        text += (
            f": {peer.tool}, {peer.n_trials} trials in {peer.search_s:,.0f} s by the clock, {each:.0f} s each, so "
            f"that 200 take {200 * each:,.0f} s; it says of its pick {peer.refusals} of {peer.n} refused at a KL of "
            f"{peer.kl:.2g}"
        )
    for note in variant.made.notes if variant.made is not None else ():
        text += f"; {note[0].lower()}{note[1:].rstrip('.')}"
    return text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def refusals(own: Measured) -> str:
    """Write the table of what is answered."""
    lectures, parts = own.has("harmful", LECTURED), tuple(own.base.sets)
    heads = ["", "harmful: refused", *(["lectures"] if lectures else [])]
    heads += [f"{part}: false refusals" for part in parts if part != "harmful"]

    def row(variant: Variant) -> Iterator[str]:
        yield f"`{variant.name}`"
        yield own.beside_base(variant, "harmful", [REFUSED])
        if lectures:
            yield own.beside_base(variant, "harmful", [LECTURED])
        yield from (own.beside_base(variant, part, NOT_ANSWERED) for part in parts if part != "harmful")
        yield " + ".join(str(own.rate(variant, part, [DEGENERATE]).count) for part in parts)

    return table([*heads, "no answer"], (list(row(variant)) for variant in own.variants))


def damage(own: Measured) -> str:
    """Write the table of what else has changed."""
    tasks = list(dict.fromkeys((one.task, one.metric) for each in own.variants for one in each.tasks or ()))
    heads = ["", "KL, first token", "its median", "KL along answers", "all", "perplexity"]

    def row(variant: Variant) -> Iterator[str]:
        yield f"`{variant.name}`"
        yield str(own.kl(variant, "first"))
        yield f"{own.median(variant):.2g}"
        yield str(own.kl(variant, "mean"))
        yield f"{own.kl(variant, 'mean', list(variant.along or ())).value:.2g}"
        ratio = own.perplexity_ratio(variant)
        yield f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        scores = {(one.task, one.metric): one for one in variant.tasks or ()}
        for key in tasks:
            yield f"{scores[key].base.value:.3f} → {scores[key].edited.value:.3f}" if key in scores else "-"

    variants = [one for one in own.variants if one.along is not None]
    heads += [f"{task}, {metric}" for task, metric in tasks]
    return table(heads, (list(row(variant)) for variant in variants)) if variants and own.answered else ""


def costs(own: Measured) -> str:
    """Write the table of what it took."""

    def row(variant: Variant) -> Iterator[str]:
        made, peer = variant.made, variant.peer
        yield f"`{variant.name}`"
        if peer is not None:
            yield from (said(peer.search_s, peer.cpu_s), said(peer.wall_s, peer.cpu_s))
        else:
            yield seconds(made.search if made is not None else None)
            yield seconds(made.cost if made is not None else None)
        yield seconds(variant.measured)
        yield seconds(own.whole(variant))
        yield memory(made.cost if made is not None else None, own.base.weights, peer.peak_memory if peer else None)

    heads = ["", "search", "making it", "measuring it", "all", "peak memory of making it"]
    return table(heads, (list(row(variant)) for variant in own.variants))


def seconds(took: Seconds | None) -> str:
    """Write seconds of processors, and by the clock."""
    return "-" if took is None else said(took.wall_s, took.cpu_s)


def said(wall_s: float, cpu_s: float | None) -> str:
    """Write seconds of which those of processors may not be known."""
    return f"{'-' if cpu_s is None else digits(cpu_s)} ({digits(wall_s)}) s"


def digits(number: float) -> str:
    """Write a number of seconds as exactly as it matters."""
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def memory(cost: Cost | None, weights: int | None, known: int | None = None) -> str:
    """Write the peak of the memory, and how many times the weights it is."""
    peak = known if cost is None else cost.peak_memory
    if peak is None:
        return "-"
    on_device = None if cost is None else cost.peak_device_memory
    # Of a tiny model Python itself is most of it.
    times = f" ({peak / weights:.1f} times the weights)" if weights and weights > 1e8 else ""
    text = f"{peak / 1e9:.2f} GB{times}"
    return text if on_device is None else f"{text}; on the GPU {on_device / 1e9:.2f} GB"


@dataclass(frozen=True)
class Comparison:
    """One thing that is better the less of it there is."""

    name: str
    value: Callable[[Measured, Variant], float | None]
    compared: Callable[[Measured, Variant, Variant], PairedDifference | PairedRateDifference | None]
    of: Callable[[Measured, Variant], str]
    form: str = ".3g"


def _rates(name: str, part: str, labels: Sequence[str]) -> Comparison:
    return Comparison(
        name,
        lambda own, variant: float(own.rate(variant, part, labels).count) if part in variant.sets else None,
        lambda own, first, second: own.compared(first, second, part, labels),
        lambda own, variant: f" of {own.rate(variant, part, labels).n}",
    )


def _distances(name: str, value: str) -> Comparison:
    return Comparison(
        name,
        lambda own, variant: own.kl(variant, value).value if variant.along is not None and own.answered else None,
        lambda own, first, second: paired_difference(own.distances(first, value), own.distances(second, value)),
        lambda own, variant: "",
        ".2g",
    )


def _search(variant: Variant, kind: str) -> float | None:
    if variant.peer is not None:
        return float(variant.peer.search_s) if kind == "wall_s" else variant.peer.cpu_s
    search = variant.made.search if variant.made is not None else None
    return None if search is None else float(getattr(search, kind))


def _peak(variant: Variant) -> float | None:
    if variant.peer is not None:
        return variant.peer.peak_memory / 1e9
    return variant.made.cost.peak_memory / 1e9 if variant.made is not None else None


COMPARISONS = (
    _rates("harmful prompts refused or lectured on", "harmful", NOT_ANSWERED),
    _rates("false refusals, harmless", "harmless", NOT_ANSWERED),
    _rates("false refusals, alarming", "alarming", NOT_ANSWERED),
    _rates("no answer, harmful", "harmful", [DEGENERATE]),
    _rates("no answer, harmless", "harmless", [DEGENERATE]),
    _rates("no answer, alarming", "alarming", [DEGENERATE]),
    _distances("first-token KL", "first"),
    _distances("KL along answers", "mean"),
    Comparison(
        "processor seconds of the search",
        lambda own, variant: _search(variant, "cpu_s"),
        lambda *_: None,
        lambda *_: "",
    ),
    Comparison(
        "seconds of the search by the clock",
        lambda own, variant: _search(variant, "wall_s"),
        lambda *_: None,
        lambda *_: "",
    ),
    Comparison("GB of memory at the peak", lambda own, variant: _peak(variant), lambda *_: None, lambda *_: ""),
)


def losses(own: Measured) -> str:
    """Say in what each other variant is better than the mean over the seeds of `run`, and whether that is decided."""
    lines = []
    for variant in own.variants:
        if variant in own.runs or variant is own.base:
            continue
        better = [text for one in COMPARISONS if (text := _lost(own, variant, one))]
        refused = [own.rate(one, "harmful", NOT_ANSWERED).count for one in (variant, *own.runs)]
        lines.append(
            f"- `{variant.name}`, which refuses {refused[0]} against {statistics.mean(refused[1:]):.3g}: "
            f"{'; '.join(better) or 'nothing that was measured'}.\n"
        )
    return f"{LOSSES}\n{''.join(lines)}" if lines else "There is no other to compare with.\n"


def _lost(own: Measured, variant: Variant, one: Comparison) -> str | None:
    theirs = one.value(own, variant)
    ours = [value for run in own.runs if (value := one.value(own, run)) is not None]
    if theirs is None or not ours or theirs >= statistics.mean(ours):
        return None
    tests = [test for run in own.runs if (test := one.compared(own, run, variant)) is not None]
    decided = sum(test.verdict is Verdict.LOWER for test in tests)
    said_of = f" (decided beside {decided} of {len(tests)} seeds)" if tests else ""
    return f"{one.name} {theirs:{one.form}} against {statistics.mean(ours):{one.form}}{one.of(own, variant)}{said_of}"


def stages(measured: Sequence[Measured]) -> str:
    """Write the table of seconds by stage, of those stages that take any."""
    with_runs = [own for own in measured if own.runs]
    made = {own.title: [run.made for run in own.runs if run.made is not None] for own in with_runs}
    steps = {title: [_grouped(run) for run in runs] for title, runs in made.items()}
    names = dict.fromkeys(name for runs in steps.values() for run in runs for name in run)

    def mean(found: Sequence[Seconds]) -> str:
        if not found:
            return "-"
        return said(statistics.mean(one.wall_s for one in found), statistics.mean(one.cpu_s for one in found))

    rows = [
        [name, *(mean([run[name] for run in runs if name in run]) for runs in steps.values())]
        for name in names
        if any(run[name].wall_s >= 0.05 for runs in steps.values() for run in runs if name in run)
    ]
    rows.append(["the whole process", *(mean([run.cost for run in runs]) for runs in made.values())])
    rows.append(["answers of the base", *(mean([own.base.measured]) for own in with_runs)])
    rows.append(["measuring the edited", *(mean([run.measured for run in own.runs]) for own in with_runs)])
    return table(["", *made], rows)


def _grouped(made: Made) -> dict[str, Seconds]:
    """Give the seconds by stage; to confirm is one, whichever candidates are."""
    found: dict[str, Seconds] = {}
    for step, took in made.steps.items():
        name = "confirmation" if step.startswith("confirming") else step
        before = found.get(name, Seconds(wall_s=0, cpu_s=0))
        found[name] = Seconds(wall_s=before.wall_s + took.wall_s, cpu_s=before.cpu_s + took.cpu_s)
    return found


def on_devices(devices: Sequence[Device]) -> str:
    """Write what `device.py` found."""
    text = [
        "What `run` with its defaults takes from end to end, its own evaluation included (`benchmarks/device.py`).\n\n"
    ]
    for one in devices:
        steps = ", ".join(f"{step} {digits(took.wall_s)} s" for step, took in one.steps.items())
        sets = one.evaluation.sets.items()
        scores = [f"{part} refused {own.refusals.base.count} → {own.refusals.edited!s}" for part, own in sets]
        if one.evaluation.kl is not None and (kl := one.evaluation.kl.harmless_answered) is not None:
            scores.append(f"KL at the first token {kl.first_token}, along answers {kl.mean}")
        text.append(
            f"- `{one.model}`, {one.dtype}, on {one.machine.device}: {digits(one.cost.wall_s)} s by the clock "
            f"({steps}); peak memory {memory(one.cost, None)}; {'; '.join(scores)}."
            + (f" It said: {' '.join(one.warnings)}" if one.warnings else "")
            + "\n"
        )
    return "".join(text)


def repeated(measured: Sequence[Measured]) -> str:
    """Say how to get these numbers again."""
    lines = ["## How to repeat it\n", "<!-- not run: takes hours -->", "```bash"]
    commands = (one.how.command for own in measured for one in own.variants)
    lines += [f"python benchmarks/results.py {command}" for command in dict.fromkeys(commands) if command]
    lines += ["python benchmarks/results.py --page benchmarks/records/* -o docs/results.md", "```"]
    return "\n".join(lines) + "\n"
