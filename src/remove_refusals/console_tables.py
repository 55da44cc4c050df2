"""Measured models as a table on the screen."""

from rich.console import Console
from rich.table import Table

from remove_refusals.comparisons import Verdict
from remove_refusals.side_by_side import SideBySide

_DAMAGE = (
    ("KL, answered", ("kl", "harmless_answered", "mean")),
    ("KL, 95th percentile, answered", ("kl", "harmless_answered", "p95")),
    ("Perplexity", ("perplexity", "edited")),
    ("Identical answers", ("agreement", "identical")),
)


def show_side_by_side(found: SideBySide) -> None:
    """Print a column for each model, and the differences that the data support."""
    console = Console(highlight=False)
    table = Table(title="Models on the same prompts")
    table.add_column("", no_wrap=True)
    for model in found.models:
        table.add_column(model, justify="right", overflow="fold")
    for (name, label), rates in found.rates.items():
        cells = [f"{rate.count}/{rate.n} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]%" for rate in rates]
        table.add_row(f"{label}, {name}".capitalize(), *cells)
    for title, path in _DAMAGE:
        cells = [_cell(found.damage.get(model, {}), path) for model in found.models]
        if any(cells):
            table.add_row(title, *cells)
    console.print(table)
    decided = [one for one in found.differences if one.verdict is not Verdict.UNDECIDED]
    for one in decided:
        points = f"{100 * one.value:+.0f} [{100 * one.low:+.0f}, {100 * one.high:+.0f}] points"
        console.print(
            f"{one.second} has a {one.verdict} {one.label} rate than {one.first} on {one.prompt_set} prompts: "
            f"{points}, p = {one.adjusted_p:.2g}.",
            markup=False,
        )
    undecided = len(found.differences) - len(decided)
    console.print(
        f"{undecided} of {len(found.differences)} comparisons are undecided. Exact McNemar, corrected for all of them "
        f"(Holm 1979); intervals at 95%. Labels: {found.judge}.",
        markup=False,
    )


def _cell(damage: object, path: tuple[str, ...]) -> str:
    for key in path:
        if not isinstance(damage, dict) or key not in damage:
            return ""
        damage = damage[key]
    return f"{damage['value']:.2g} [{damage['low']:.2g}, {damage['high']:.2g}]" if isinstance(damage, dict) else ""
