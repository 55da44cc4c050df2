"""Commands on checkpoints as they lie on disk: what differs between two, and taking an edit back."""

from pathlib import Path
from typing import Annotated

import typer

from remove_refusals.options import ModelArgument, OptionalDirectionFile, RemoteCode, Revision

_MOST_ROWS = 40


def restore(
    directory: Annotated[Path, typer.Argument(help="The edited model, with its ablation.json.")],
    base: Annotated[str, typer.Option(help="The model that it was made from.")],
    revision: Revision = None,
) -> None:
    """Put the base's bytes back, tensor by tensor, and verify them by hash."""
    from remove_refusals import console, restoring

    found = restoring.restore(directory, base, revision=revision)
    files = f", {len(found.files)} files replaced whole" if found.files else ""
    files += f", {len(found.removed)} files removed" if found.removed else ""
    console.finish(
        {**vars(found), "directory": str(found.directory)},
        f"Restored {directory}: {len(found.tensors)} tensors written{files}; all hashes are the base's.",
    )


def diff(
    first: ModelArgument,
    second: Annotated[str, typer.Argument(help="The other one, by the same kinds of names.")],
    direction: OptionalDirectionFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Which tensors differ between two checkpoints, by how much, and what share of that lies along a direction."""
    from remove_refusals import console, differences, direction_files, errors

    given = direction_files.load_directions(direction) if direction is not None else (None,)
    if len(given) != 1:
        raise errors.DirectionError(f"{direction} holds {len(given)} directions, expected one; give one of its files.")
    found = differences.diff(first, second, given[0], trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(found.to_json())
        return
    for row in found.tensors[:_MOST_ROWS]:
        numbers = "" if row.relative is None else f", {row.relative:.2e} of its norm"
        numbers += "" if row.along is None else f", {row.along:.1%} of that along the direction"
        console.say(f"{row.name}: {row.status}{numbers}")
    if len(found.tensors) > _MOST_ROWS:
        console.say(f"… and {len(found.tensors) - _MOST_ROWS} more; --json gives all.")
    whole = "" if found.relative is None else f" by {found.relative:.2e} of their norm"
    whole += "" if found.along is None else f", {found.along:.1%} of that (squared) along the direction"
    console.say(f"{len(found.tensors)} tensors differ{whole}; {found.identical} are identical.")
