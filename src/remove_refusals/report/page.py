"""The page: read the records, prepare each section, fill the template."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from remove_refusals.errors import RecordError
from remove_refusals.files import atomic_file
from remove_refusals.report import chosen, measured, words
from remove_refusals.report import examined as origins
from remove_refusals.report import examined as separated
from remove_refusals.report.measured import HARMLESS, answers, prompt_texts
from remove_refusals.report.records import Material, read_material

_FOLDER = "data/report"


def html_report(directory: Path, *, full_answers: bool = False) -> str:
    """Make one self-contained HTML page of the records in a run's directory.

    It asks for nothing from any address, and says of each record that is not there that it was not measured.

    Args:
        directory: What `run` left, or any directory with some of `ablation.json`, `scores.json`, `rows.jsonl`,
            `selection.json`, `certificate.json` and `analysis.json`.
        full_answers: Whether answers to harmful prompts are in it whole; otherwise it holds their first sentence only.

    Returns:
        The page.

    Raises:
        RecordError: If there is no such directory, it holds none of the records, or one of an unknown form.
    """
    material = read_material(directory)
    style, script = (_text(name) for name in ("report.css", "report.js"))
    environment = Environment(
        loader=PackageLoader("remove_refusals", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": words.number, "p_value": words.p_value, "short_hash": words.short_hash}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The two are this package's own; everything else is escaped. The script is named by its hash, so that no other
    # runs even if something got through.
    page: str = environment.get_template("page.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        **_views(material, directory, full_answers=full_answers),
    )
    # JSON can hold half a character, which no file can.
    return page.encode(errors="replace").decode()


def write_html_report(
    directory: Path, output: Path | None = None, *, full_answers: bool = False, force: bool = False
) -> Path:
    """Make the page and save it, whole or not at all.

    Args:
        directory: As for `html_report`.
        output: The file to make; by default `report.html` in the directory, which is replaced.
        full_answers: As for `html_report`.
        force: Whether another file that exists is replaced.

    Returns:
        Where the page is.

    Raises:
        RecordError: As from `html_report`.
        OutputError: If the file exists and `force` is not given, or cannot be written.
    """
    page = html_report(directory, full_answers=full_answers)
    target = output or directory / "report.html"
    with atomic_file(target, force=force or output is None) as staging:
        staging.write_text(page, encoding="utf-8", newline="\n")
    return target


def _text(name: str) -> str:
    return (resources.files("remove_refusals") / _FOLDER / name).read_text(encoding="utf-8")


def _views(material: Material, directory: Path, *, full_answers: bool) -> dict[str, Any]:
    rows = material.rows or ()
    by_set, by_id = _of("rows.jsonl", directory, lambda: prompt_texts(rows))

    def of(name: str, record: object, make: Callable[..., Any], *more: object) -> Any:
        return None if record is None else _of(name, directory, lambda: make(record, *more))

    scores, ablation = material.scores, material.ablation
    # Every set of an evaluation but the first is of harmless prompts.
    sets = _of("scores.json", directory, lambda: (scores or {}).get("sets", {}).keys())

    def shown(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return answers(found, harmless=HARMLESS | (sets - {"harmful"}), full_answers=full_answers)

    return {
        "base": _of("ablation.json", directory, lambda: _base(material)),
        "edited": _edited(material, directory),
        "tiles": _of("scores.json", directory, lambda: measured.tiles(material)),
        "ablation": of("ablation.json", ablation, _done),
        "directions": of("ablation.json", ablation, chosen.directions),
        "refusals": of("scores.json", scores, measured.refusals, by_set),
        "damage": of("scores.json", scores, measured.damage),
        "measure_settings": None if scores is None else scores.get("settings"),
        "candidates": of("selection.json", material.selection, chosen.candidates),
        "strengths": _of("ablation.json", directory, lambda: chosen.strengths(material)),
        "separation": of("analysis.json", material.analysis, separated.separation, by_id),
        "origins": of("analysis.json", material.analysis, origins.origins),
        "certificate": of("certificate.json", material.certificate, chosen.certificate),
        "answers": of("rows.jsonl", material.rows, shown),
    }


def _of(name: str, directory: Path, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as cause:
        raise RecordError(
            f"The record {directory / name} has an unknown form ({type(cause).__name__}: {cause}), expected one as "
            "this version writes it; make the directory again, or use the version that made it."
        ) from cause


def _done(ablation: dict[str, Any]) -> dict[str, Any]:
    base, plan = ablation["base"], ablation["plan"]
    return {
        "base": {"source": base["source"], "revision": base.get("revision"), "dtype": base.get("dtype")},
        "model_type": base.get("model_type"),
        "hashes": list(base.get("sha256", {}).items()),
        "n_edited": len(plan["edited"]),
        "n_left": len(plan["left"]),
        "variant": plan["variant"],
        "untied": plan.get("embedding_untied", False),
        "warnings": ablation.get("warnings", []),
        "leak": ablation.get("leak", {}).get("why", []),
        "prompts": list(ablation.get("prompts", {}).items()),
        "versions": list(ablation.get("versions", {}).items()),
        "settings": json.dumps(ablation["settings"], indent=2, ensure_ascii=False) if "settings" in ablation else None,
    }


def _base(material: Material) -> str | None:
    found = (material.ablation or {}).get("base", {}).get("source") or (material.scores or {}).get("base")
    return found or (material.analysis or {}).get("model")


def _edited(material: Material, directory: Path) -> str | None:
    examined = material.ablation is None and "contributions" in (material.analysis or {})
    if examined or (material.ablation is None and material.scores is None):
        return None
    return (material.scores or {}).get("edited") or directory.resolve().name
