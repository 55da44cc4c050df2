"""The page: read the records, fill the template."""

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from remove_refusals.errors import OutputError, RecordError
from remove_refusals.files import atomic_file
from remove_refusals.measure import number, percent
from remove_refusals.report import examined, sections, words
from remove_refusals.report.records import Material, read_material
from remove_refusals.settings import expects_refusals

_FOLDER = "data/report"

_FILTERS = (
    number, percent, words.interval, words.estimate, words.percent_interval,
    words.p_value, words.first_sentence, words.place, sections.set_title, sections.bound,
)  # fmt: skip


def html_report(directory: Path, *, full_answers: bool = False) -> str:
    """Make one HTML page, which asks for nothing from any address, of the records in a run's directory."""
    material = read_material(directory)
    style, script = (
        (resources.files("remove_refusals") / _FOLDER / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    environment = _environment()
    environment.globals |= {"sections": sections, "examined": examined, "material": material} | vars(material)
    rows, sets = material.rows or (), material.scores.sets if material.scores else {}
    try:
        # The style and the script are this package's own; everything else is escaped. The script is named by its hash,
        # so that no other runs even if something got through.
        page = environment.get_template("page.html.jinja").render(
            style=Markup(style),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            base=_base(material),
            edited=_edited(material, directory),
            texts={(row.set, row.prompt_id): row.prompt for row in rows},
            texts_by_id={row.prompt_id: row.prompt for row in rows},
            full_answers=full_answers,
            harmless=sections.HARMLESS | {name for name in sets if not expects_refusals(name)},
        )
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as cause:
        raise RecordError(
            f"The records in {directory} do not fit together ({type(cause).__name__}: {cause}), expected those of one "
            "run of this version; make the directory again, or use the version that made it."
        ) from cause
    # JSON can hold half a character, which no file can.
    return page.encode(errors="replace").decode()


def write_html_report(
    directory: Path | str, output: Path | str | None = None, *, full_answers: bool = False, force: bool = False
) -> Path:
    """Make one HTML page of the records in a directory, to be read without network.

    Args:
        directory: What `run`, `analyze` or `evaluate` left.
        output: The file to make; by default `report.html` in the directory, which is replaced.
        full_answers: Whether answers to harmful prompts are shown whole, rather than their first sentence.
        force: Whether another file that exists is replaced.

    Returns:
        Where the page is.

    Raises:
        RecordError: If there is nothing to show, or a record cannot be read.
        OutputError: If the file exists and `force` is not given, or cannot be written.

    Example:
        >>> write_html_report("gemma-ablated")
    """
    page = html_report(Path(directory), full_answers=full_answers)
    target = Path(output or Path(directory) / "report.html")
    with atomic_file(target, force=force or output is None) as staging:
        staging.write_text(page, encoding="utf-8", newline="\n")
    return target


def write_card(directory: Path | str, output: Path | str, *, force: bool = False) -> Path:
    """Draw the first figures of a run's records as one SVG picture, 1200 by 630, to be shown to others."""
    target, material = Path(output), read_material(Path(directory))
    if target.suffix.lower() != ".svg":
        raise OutputError(f"The picture is to be {target}, expected a name that ends in .svg; it is drawn as SVG.")
    rows = sections.card_rows(material)
    if not rows:
        raise RecordError(
            f"The directory {directory} has no scores.json with rates or KL, expected measurements to draw; name a "
            "directory that `run` or `evaluate` made."
        )
    drawn = (
        _environment()
        .get_template("card.svg.jinja")
        .render(
            base=_base(material),
            edited=_edited(material, Path(directory)),
            rows=rows,
            foot=sections.card_foot(material),
        )
    )
    with atomic_file(target, force=force) as staging:
        staging.write_text(drawn.strip() + "\n", encoding="utf-8", newline="\n", errors="replace")
    return target


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("remove_refusals", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in _FILTERS}
    environment.filters |= {"repr": repr, "pretty": lambda data: json.dumps(data, indent=2, ensure_ascii=False)}
    return environment


def _base(material: Material) -> str | None:
    if material.ablation is not None:
        return material.ablation.base.source
    if material.scores is not None:
        return material.scores.base
    return material.analysis.model if material.analysis is not None else None


def _edited(material: Material, directory: Path) -> str | None:
    if material.ablation is None and (material.scores is None or material.is_examination):
        return None
    return material.scores.edited if material.scores is not None else directory.resolve().name
