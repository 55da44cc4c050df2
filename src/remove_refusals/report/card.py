"""The cards of what was made, from its record, and the way of all that to the hub."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, errors, hf_hub_download
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from remove_refusals.errors import HubError
from remove_refusals.files import Record
from remove_refusals.measure import Evaluation, table, table_key
from remove_refusals.models import CARD, CARRIED_FIELDS, HTTPError, licence_fields, model_source
from remove_refusals.report.records import AblationRecord, Certificate, DirectionRecord
from remove_refusals.report.sections import expert_strengths

_HIDDEN = (".*", "*/.*")

_WITH_ANSWERS = ("*.jsonl", "*.html")
"""Rows of answers, and the page that quotes them."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

_BESIDE_AN_ADAPTER = (
    *_ADAPTER, CARD, "ablation.json", "analysis.json", "certificate.json", "scores.json", "selection.json",
    "directions/*", "LICENSE*", "NOTICE*", "USE_POLICY*", *_WITH_ANSWERS,
)  # fmt: skip


def model_card(record: AblationRecord, scores: Evaluation | None = None, certificate: Certificate | None = None) -> str:
    """Write the model card of an edited model: Markdown with the metadata that the hub reads."""
    return _card(
        "model_card.md.jinja",
        record,
        library="transformers",
        tags=["modified", "refusal-ablation"],
        table=() if scores is None else table(scores),
        key="" if scores is None else table_key(scores),
        certificate=certificate,
        strengths=sorted({edit.strength for edit in record.intervention}),
        groups=_alike(record.directions),
        experts=expert_strengths(record.intervention),
        along=any(not edit.whole for edit in record.intervention),
    )


def adapter_card(record: AblationRecord) -> str:
    """Write the card of a LoRA."""
    return _card("adapter_card.md.jinja", record, library="peft", tags=["lora", "refusal-ablation"])


def _card(template: str, record: AblationRecord, *, library: str, tags: list[str], **more: Any) -> str:
    base = record.base.source
    data = ModelCardData(base_model=base, library_name=library, pipeline_tag="text-generation", tags=tags)
    # Markdown, not HTML: text is kept as it is, and what could break the table is in no record.
    text = (resources.files("remove_refusals") / "data" / template).read_text(encoding="utf-8")
    return f"{ModelCard.from_template(data, template_str=text, record=record, **more)}\n"


def _alike(directions: Sequence[DirectionRecord]) -> list[list[DirectionRecord]]:
    """Put directions together that differ in nothing but the layer, so that a card needs one line for them."""
    groups: dict[str, list[DirectionRecord]] = {}
    for direction in directions:
        groups.setdefault(direction.model_dump_json(exclude={"layer", "sha256", "length"}), []).append(direction)
    return list(groups.values())


class Pushed(Record):
    """What was sent in which commit, what was left out, what of the base's card went along, and what to say of it."""

    repo: str
    url: str
    commit: str
    private: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    card: dict[str, Any]
    notes: tuple[str, ...] = ()


def push(
    directory: Path | str,
    repo: str,
    *,
    private: bool = True,
    adapter_only: bool = False,
    with_answers: bool = False,
    base: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Send what `run` or `bake` left to the hub, in one commit; the directory itself is not changed.

    Rows of answers and HTML pages, which hold answers to harmful prompts, stay here, and so does what begins with a
    dot. The card says of which model this is a change: licence and base model are those of the base's card.
    """
    source = Path(directory)
    record = _checked_record(source)
    found, chosen = _chosen(source, adapter_only=adapter_only, with_answers=with_answers)
    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repo):
        carried = _carried(record, base, token, endpoint)
        card = _card_to_send(source, record, carried)
        made = api.create_repo(repo, private=private, exist_ok=True)
        if private and api.model_info(made.repo_id).private is not True:
            raise HubError(
                f"The repository {made.repo_id} is public already, expected a private one; make it private, choose "
                "another, or allow it with --public."
            )
        with tempfile.TemporaryDirectory() as staging:
            for name in chosen - {CARD}:
                (Path(staging) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(staging) / name).symlink_to((source / name).resolve())
            (Path(staging) / CARD).write_text(card, encoding="utf-8")
            message = "A model with its refusal direction taken out"
            commit = api.upload_folder(repo_id=made.repo_id, folder_path=staging, commit_message=message).oid
    missing = () if "license" in carried else ("The base's card names no licence, so this one names none; mind it.",)
    return Pushed(
        repo=made.repo_id,
        url=str(made),
        commit=commit,
        private=private,
        files=tuple(sorted({*chosen, CARD})),
        left_out=tuple(name for name in found if name not in chosen),
        card=carried,
        notes=missing,
    )


def _chosen(directory: Path, *, adapter_only: bool, with_answers: bool) -> tuple[list[str], set[str]]:
    """Give the names of all files in a directory, and of those that are to be sent."""
    if adapter_only and not all((directory / name).is_file() for name in _ADAPTER):
        raise HubError(
            f"The directory {directory} has no {' and '.join(_ADAPTER)}, expected an adapter; make one with "
            "`bake --as lora`, or leave --adapter-only out."
        )
    found = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    ignored = _HIDDEN if with_answers else (*_HIDDEN, *_WITH_ANSWERS)
    allowed = list(_BESIDE_AN_ADAPTER) if adapter_only else None
    return found, set(filter_repo_objects(found, allow_patterns=allowed, ignore_patterns=list(ignored)))


def _checked_record(directory: Path) -> AblationRecord:
    """Read `ablation.json`, and check that the certificate beside it did not fail."""
    record = AblationRecord.read(directory / "ablation.json", error=HubError)
    place = directory / "certificate.json"
    if place.is_file() and not Certificate.read(place, error=HubError).passed:
        raise HubError(
            f"The certificate {place} has not passed, expected files that hold what their record says; make the "
            "directory again."
        )
    return record


def _carried(record: AblationRecord, base: str | None, token: str | None, endpoint: str | None) -> dict[str, Any]:
    """Find what the base's card says of its licence, and what model the card is to name as base."""
    on_hub = None if record.base.sha256 is not None else record.base.source
    found = dict(record.base.card or {})
    place = base if base is not None else on_hub
    if place is not None and Path(model_source(place)).is_dir():
        found |= licence_fields(Path(model_source(place)))
    elif place is not None:
        on_hub, revision = place, record.base.revision if base is None else None
        found |= _hub_fields(place, revision, token, endpoint)
    if on_hub is not None:
        found["base_model"] = on_hub
        if "://" not in (link := str(found.get("license_link", "://"))):
            # A file's name within the base's repository means nothing in another.
            found["license_link"] = f"https://huggingface.co/{on_hub}/blob/main/{link}"
    return found


def _hub_fields(repo: str, revision: str | None, token: str | None, endpoint: str | None) -> dict[str, Any]:
    """Read the licence fields of a card on the hub; none where there is no card for us to read."""
    try:
        path = hf_hub_download(repo, CARD, revision=revision, token=token, endpoint=endpoint)
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError):
        return {}
    found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    return {name: found[name] for name in CARRIED_FIELDS if name in found}


def _card_to_send(directory: Path, record: AblationRecord, carried: dict[str, Any]) -> str:
    """Give the directory's card, or one written from its record, with the fields of the base."""
    place = directory / CARD
    card = ModelCard(place.read_text(encoding="utf-8") if place.is_file() else model_card(record), True)
    fields = card.data.to_dict()  # type: ignore[no-untyped-call]
    # A directory's name is not a model on the hub, which would take it for one.
    fields.pop("base_model", None)
    known = {name: carried[name] for name in ("base_model", *CARRIED_FIELDS) if name in carried}
    card.data = ModelCardData(**(known | fields), ignore_metadata_errors=True)
    return str(card)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(
            f"The repository {repo!r} is no name on the hub ({str(error).rstrip('.')}), expected one such as "
            "me/my-model; correct it."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        what = "log in with `hf auth login`, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        what = what or "try again, or look at the hub's status"
        said = (error.server_message or str(error)).splitlines()[0].rstrip(".")
        raise HubError(
            f"The hub did not take {repo} (status {status}: {said}), expected a repository to write to; {what}."
        ) from error
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        said = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise HubError(
            f"The upload to {repo} failed ({type(error).__name__}: {said}), expected a hub that can be reached; check "
            "the network, HF_ENDPOINT and HF_HUB_OFFLINE, and call it again: files that arrived are not sent twice."
        ) from error
