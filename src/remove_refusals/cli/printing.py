"""What the command shows: progress, tables, the chat prompt. Numbers come from records; nothing is computed here."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from remove_refusals.cli.command import StageLog, current, write_log
from remove_refusals.processes import is_first
from remove_refusals.progress import Cost, Progress

if TYPE_CHECKING:
    from remove_refusals.baking import ScalePlan
    from remove_refusals.directions import EditPlan
    from remove_refusals.examination import Inspection
    from remove_refusals.measure import Calibration, Damage, Evaluation, SideBySide
    from remove_refusals.modelmap import ModelMap
    from remove_refusals.report import Certificate
    from remove_refusals.search import Selection


def say(*lines: str, style: str | None = None) -> None:
    """Print lines to standard output."""
    for line in lines:
        Console(highlight=False).print(line, soft_wrap=True, markup=False, style=style)


def _show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 1) -> None:
    """Print a table; the first columns stand on the left, and the very first is not broken where it alone does."""
    shown = Table(title=title)
    for number, column in enumerate(columns):
        side: Any = "left" if number < n_left else "right"
        shown.add_column(column, justify=side, no_wrap=number == 0 and n_left == 1, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False).print(shown)


def write(text: str) -> None:
    """Print a piece of text at once, without a line end."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Wrapped:
    """Writes pieces of text as they come to a terminal; a line ends between two words, not within one."""

    def __init__(self) -> None:
        self._column, self._word = 0, ""

    def __call__(self, text: str) -> None:
        """Write a piece; its last word waits for its end."""
        for character in text:
            if character.isspace():
                self._end_word()
                self._column = 0 if character == "\n" else self._column + 1
                write(character if character == "\n" or self._column <= self._width() else "")
            else:
                self._word += character
                # Between characters of double width a line may end anywhere.
                if cell_len(character) > 1 or cell_len(self._word) >= self._width():
                    self._end_word()

    def _width(self) -> int:
        return shutil.get_terminal_size().columns

    def _end_word(self) -> None:
        length = cell_len(self._word)
        if self._column > 0 and self._column + length > self._width():
            write("\n")
            self._column = 0
        write(self._word)
        self._column, self._word = self._column + length, ""


def typed_lines() -> Iterator[str]:
    """Give what is typed until the end of input; a terminal asks with `> `, pasted lines are one, Ctrl-C clears it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in iter(sys.stdin.readline, ""):
            yield line.rstrip("\n")
        return
    # Else a warning stands where a terminal does not say where its cursor is.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line


LOADING, READING, ANSWERING, EDITING, MEASURING = (
    "Loading the model",
    "Reading activations",
    "Answering the prompts",
    "Editing the weights",
    "Measuring base and edited",
)
SEARCHED = (
    *(LOADING, READING, "Answering as the base model", "Searching by gradients", "Confirming by generation"),
    *(EDITING, MEASURING),
)
GIVEN = (LOADING, READING, EDITING, MEASURING)
"""The stages of a run with a search, and of one without, in words."""

_BEGINNINGS = {
    LOADING: ("prompts", "loading", "mapping"),
    READING: ("activations",),
    SEARCHED[2]: ("own answers",),
    SEARCHED[3]: ("first gradients", "descent", "experts", "directions"),
    SEARCHED[4]: ("confirming",),
    EDITING: ("saving", "files", "certificate", "reading back"),
    MEASURING: ("evaluation", "answers of", "separation", "records"),
    ANSWERING: ("answers",),
}
"""What the stages are called that a job tells of, or how that begins."""


class _Stages:
    """Says on standard error what is done: by a bar in a terminal, else by a line now and every half minute."""

    def __init__(self, titles: Sequence[str], bars: Bars) -> None:
        self._titles, self._bars, self._log = titles, bars, StageLog()
        self._task = bars.add_task("", total=None, counted="")
        self._begin(titles[0])

    def _begin(self, title: str) -> None:
        self._title, self._counted = title, ""
        counted = len(self._titles) > 1 and title in self._titles
        place = f"{self._titles.index(title) + 1} of {len(self._titles)}, " if counted else ""
        self._said = f"{place}{title[:1].lower()}{title[1:]}" if place else title
        write_log(self._said)
        self._restart(0)

    def _restart(self, done: int) -> None:
        self._since = time.monotonic(), done
        self._bars.reset(self._task, description=self._said, total=None, counted="")

    def stage(self, name: str) -> None:
        """Note that a stage begins; one without a title of its own is a part of what lasts."""
        title = next((title for title, names in _BEGINNINGS.items() if name.startswith(names)), self._title)
        if title != self._title:
            self._begin(title)

    def update(self, stage: str, done: int, total: int) -> None:
        """Note how much of a stage is done, and how long the rest takes if it goes on like that."""
        self._log.update(stage, done, total)
        (began, first), now = self._since, time.monotonic()
        if done < first or not self._counted:
            self._since = began, first = now, done
        left = (now - began) / (done - first) * (total - done) if done > first else 0
        self._counted = f"{done} of {total}" + (f", {_duration(left)} left" if left > 1 else "")
        self._bars.update(self._task, completed=done, total=total, counted=self._counted)

    def note(self, text: str) -> None:
        """Say a sentence that stays."""
        write_log(text)
        if is_first() and not current().quiet:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self) -> None:
        """Write the line."""
        sys.stderr.write(f"{self._said}{self._counted and f': {self._counted}'}\n")
        sys.stderr.flush()


@contextmanager
def progress(*titles: str, every: float = 30.0) -> Iterator[Progress]:
    """Say on standard error what is done, unless it is to be quiet, and write the same to the log.

    The titles are those of the stages to come, in order; of several each is counted.
    """
    console = Console(stderr=True)
    loud, ended = is_first() and not current().quiet, Event()
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[counted]}"))
    with Bars(*columns, console=console, transient=True, disable=not (loud and console.is_terminal)) as bars:
        stages = _Stages(titles, bars)

        def tell() -> None:
            while not ended.wait(every):
                stages.tell()

        teller = Thread(target=tell, daemon=True)
        if loud and bars.disable:
            stages.tell()
            teller.start()
        try:
            yield Progress(stages.update, stages.note, stages.stage)
        finally:
            ended.set()
            if teller.is_alive():
                teller.join()


@contextmanager
def transfers() -> Iterator[None]:
    """Show the hub's own bars of uploads while the context lasts, where standard error is a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = (current().quiet or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def show_plan(plan: "EditPlan", model_map: "ModelMap") -> None:
    """Say how many tensors were edited at which kinds of site, and what was left."""
    counts: dict[str, int] = {}
    for entry in plan.entries:
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    edited = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    say(f"Edited tensors of model type {model_map.model_type}: {edited}; left as they were: {len(plan.left)} writers.")
    show_tied(plan)


def show_tied(plan: "EditPlan") -> None:
    """Say what became of an embedding that is also the unembedding, if it was edited."""
    if plan.tied is not None:
        how = "it was untied first, so the unembedding is unchanged" if plan.untie else "both are one tensor still"
        say(f"The embedding is tied to the unembedding: {how} (--tied {plan.tied.asked}; {plan.tied.why}).")


def show_selection(selection: "Selection") -> None:
    """Print every candidate of a search with its scores, and the pick, where all is to be shown."""
    if current().verbose:
        _show(f"Candidates; the pick: {selection.rule}", *selection.table(), n_left=2)
        say(*selection.table_key())


def show_evaluation(evaluation: "Evaluation", notes: tuple[str, ...]) -> None:
    """Print the scores of both models, all or those that matter most, and what should be said of them."""
    from remove_refusals.measure import skewed, summary, table, table_key

    columns = ("", "base", "edited", "verdict, p")
    if current().verbose:
        _show("Base and edited model on the same prompts", columns, table(evaluation))
        say(table_key(evaluation))
    else:
        rows = (columns, *summary(evaluation))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        say(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
        say(*filter(None, [skewed(evaluation).strip()]))
    if evaluation.judge_usage is not None:
        say(f"Asked the judge: {evaluation.judge_usage}.")
    say(*(f"Warning: {note}" for note in notes), style="yellow")


def costs_in_words(costs: Mapping[str, Cost]) -> str:
    """Say in a line how long a job took and how much memory, and its longest stages."""
    whole = sum(cost.seconds for cost in costs.values())
    longest = sorted(costs.items(), key=lambda one: -one[1].seconds)[:5]
    parts = ", ".join(f"{name} {_duration(cost.seconds)}" for name, cost in longest if cost.seconds > whole / 100)
    memory, gpu = (max((getattr(cost, of) for cost in costs.values()), default=0) for of in ("memory", "gpu_memory"))
    held = [f"{size / 1e9:.1f} GB of {kind}" for size, kind in ((memory, "memory"), (gpu, "GPU memory")) if size]
    return f"Took {_duration(whole)}{' and at most ' if held else ''}{' and '.join(held)}: {parts}."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h {minutes % 60} min"
    return hours if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show_calibration(calibration: "Calibration", usage: object | None) -> None:
    """Print what a judge says of answers with known labels, how often it is right, and what asking it has cost."""
    from remove_refusals.measure import JUDGED

    counted = [
        (str(true), *(str(row[label]) for label in JUDGED))
        for true, row in calibration.confusion.items()
        if any(row.values())
    ]
    title = f"{calibration.judge} on {calibration.n} answers ({calibration.labelled})"
    _show(title, ("true, said:", *map(str, JUDGED)), counted)
    rates = [(str(label), str(one.sensitivity), str(one.specificity)) for label, one in calibration.classes.items()]
    _show("How often it is right about each label", ("label", "sensitivity", "specificity"), rates)
    if calibration.unjudged is not None:
        say(f"It could not judge {calibration.unjudged} more, which are in a language that it has no phrases for.")
    say(f"Intervals: 95%, Wilson. SHA-256 of the answers' file: {calibration.sha256}")
    if usage is not None:
        say(f"Asked: {usage}.")


def finish(data: object, last: str | None = None, show: Callable[[], None] | None = None) -> None:
    """Print a command's result: as JSON if that was asked for, else for people.

    `last` says what was made, or is None where the result itself was asked for; `show` prints that, or remarks before
    the last line, which `--quiet` leaves out.
    """
    if last is not None:
        write_log(last)
    if current().as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return
    if show is not None and not (current().quiet and last is not None):
        show()
    if last is not None:
        say(last)


def remark(took: str, *lines: str) -> None:
    """Print what stands below a result, for people who are to be told more than that."""
    if not (current().quiet or current().as_json):
        say(took if current().verbose else f"{took.partition(':')[0].rstrip('.')}.", *lines)


def show_map(found: "Inspection") -> None:
    """Print a model's map as a table, with its verdict and what would be left."""
    rows = []
    for row in found.writers:
        layer, tied = "" if row.layer is None else str(row.layer), "yes" if row.tied else ""
        dtype = "missing" if row.missing else row.dtype or ""
        shape = " x ".join(map(str, row.shape))
        rows.append((row.site, layer, row.on_disk, shape, str(row.axis), dtype, row.norm or "", tied))
    columns = ("site", "layer", "on disk", "shape", "axis", "dtype", "norm", "tied")
    _show(f"{found.model_type}: {found.n_layers} layers, d_model {found.d_model}", columns, rows, n_left=len(columns))
    meaning = "weights and hooks" if found.verdict == "exact" else "no weight edit is exact"
    say(f"Verdict: {found.verdict} ({meaning}).", *(f"  {part}" for part in (*found.leaks, *found.unhooked)))
    if found.experts:
        layers, most = len(found.experts), max(found.experts.values())
        how = "can have strengths" if found.experts_alone else "can have no strengths"
        say(f"Routed experts: up to {most} in each of {layers} layers; they {how} of their own.")
    if found.unused:
        say(f"Left, since their modules take no part in the forward pass: {', '.join(found.unused)}.")
    if found.unexplained:
        first, more = ", ".join(found.unexplained[:3]), len(found.unexplained) - 3
        say(f"Left, since the model has no place for them: {first}{f' and {more} more tensors' if more > 0 else ''}.")


def show_scale(found: "ScalePlan") -> None:
    """Print what a run needs on devices."""
    gib, together = 1 << 30, found.together
    rows = [(one.name, f"{one.peak / gib:.2f}", str(one.batch or "")) for one in found.stages]
    many = found.n_parameters / 1e9
    size = f"{many * 1000:.3g} million" if many < 1 else f"{many:.{0 if many >= 100 else 1}f} billion"
    title = f"{size} parameters on {found.devices}"
    _show(title, ("stage", "peak on each, GiB", "prompts at once"), rows)
    how = "One device holds the model" if together == 1 else f"{together} devices hold the model together"
    say(f"{how}, {found.weights / gib / together:.2f} GiB of weights each; copies: {found.replicas}.")
    if found.one_at_a_time:
        say("Base and edited model are loaded one after the other.")
    say(*found.slow, found.command if found.fits else f"If it is tried all the same: {found.command}")


def show_certificate(certificate: "Certificate") -> None:
    """Print what was measured on the saved files."""
    say(*(f"Failed: {problem}" for problem in certificate.problems))
    worst = certificate.worst
    if worst is not None:
        say(
            f"Edited tensors: {len(certificate.edited)}; the most of the direction is left in {worst.name}: "
            f"{worst.share_left:.2%} at strength {worst.strength:g}, saved in {worst.dtype}."
        )
    say(f"Writers left as planned: {len(certificate.left)}. Other tensors identical: {certificate.identical}.")
    if certificate.boundaries is not None:
        say(f"Largest component at any layer boundary: {max(certificate.boundaries):.1e} of the norm.")
    say("Certificate passed." if certificate.passed else "Certificate failed.")


def show_side_by_side(found: "SideBySide") -> None:
    """Print a column for each model, and the differences that the data support."""
    from remove_refusals.measure import Verdict

    rows = [
        [f"{row.label}, {row.set}".capitalize(), *(str(row.models[one]) for one in found.models)] for row in found.rates
    ]
    damages = [{}, *(_damage(found.damage[model]) for model in found.models[1:])]
    titles = dict.fromkeys(title for part in damages for title in part)
    rows += [[title, *(part.get(title, "") for part in damages)] for title in titles]
    _show("Models on the same prompts", ("", *found.models), rows)
    decided = [one for one in found.differences if one.verdict is not Verdict.UNDECIDED]
    for one in decided:
        points = f"{100 * one.value:+.0f} [{100 * one.low:+.0f}, {100 * one.high:+.0f}] points"
        say(
            f"{one.second} has a {one.verdict} {one.label} rate than {one.first} on {one.prompt_set} prompts: "
            f"{points}, p = {one.adjusted_p:.2g}."
        )
    say(
        f"{len(found.differences) - len(decided)} of {len(found.differences)} comparisons are undecided. Exact "
        f"McNemar, corrected for all of them (Holm 1979); intervals at 95%. Labels: {found.judge}."
    )


def _damage(damage: "Damage") -> dict[str, str]:
    """Give what is shown of the damage, by its title."""
    found: dict[str, object] = {}
    if damage.kl is not None and damage.kl.harmless_answered is not None:
        found["KL, answered"] = damage.kl.harmless_answered.mean
        found["KL, 95th percentile, answered"] = damage.kl.harmless_answered.p95
    if damage.perplexity is not None:
        found["Perplexity"] = damage.perplexity.edited
    if damage.agreement is not None:
        found["Identical answers"] = damage.agreement.identical
    found |= {f"Match, {name}": rate for name, rate in (damage.match or {}).items()}
    return {title: str(value) for title, value in found.items() if value is not None}
