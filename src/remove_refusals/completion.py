"""What a shell completes after an option; the names stand here, since their modules are too heavy to ask for them."""

from collections.abc import Callable
from pathlib import Path

CHOICES = {
    "--select": ("auto", "layer", "tpe", "none"),
    "--tied": ("untie", "both"),
    "--variant": ("plain", "norm-preserving", "row-norm"),
}
"""The values of options that take one name."""

SITES = ("embedding", "attn", "mlp")
"""What `--sites` takes, joined by commas."""


def one_of(option: str) -> Callable[[str], list[str]]:
    """Give what completes an option that takes one name."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in CHOICES[option] if name.startswith(incomplete)]

    return complete


def sites(incomplete: str) -> list[str]:
    """Complete the last of several kinds of sites; those that stand there already are not offered again."""
    *given, last = incomplete.split(",")
    left = (site for site in SITES if site not in given and site.startswith(last))
    return [",".join((*given, site)) for site in left]


def judge(incomplete: str) -> list[str]:
    """Complete a judge: the built-in one, or a directory with a classifier."""
    directory, _, last = incomplete.rpartition("/")
    parent = Path(directory or ("/" if incomplete.startswith("/") else "."))
    found = ["phrases"] if "phrases".startswith(incomplete) else []
    if parent.is_dir():
        beside = sorted(path for path in parent.iterdir() if path.is_dir() and path.name.startswith(last))
        prefix = incomplete[: len(incomplete) - len(last)]
        found += [f"{prefix}{path.name}" for path in beside if not path.name.startswith(".")]
    return found
