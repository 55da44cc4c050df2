"""Commands for runs that can be written down and repeated."""

from pathlib import Path
from typing import Annotated

import typer

from remove_refusals.errors import CertificateError
from remove_refusals.options import Force


def config(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; printed by default.")] = None,
    force: Force = False,
) -> None:
    """Every option of `run` with its default, as a commented TOML file for `run --config`."""
    from remove_refusals import atomic, configuration, console

    assert context.parent is not None
    group = context.parent.command
    found = group.get_command(context.parent, "run")  # type: ignore[attr-defined]
    text = configuration.default_configuration(found.params)
    if output is None:
        console.write(text)
        return
    with atomic.atomic_file(output, force=force) as staging:
        staging.write_text(text, encoding="utf-8")
    console.finish({"output": str(output)}, f"Saved to {output}.")


def reproduce(
    directory: Annotated[Path, typer.Argument(help="What `run` left.")],
    model: Annotated[str | None, typer.Option(help="Where the base model is, if not where it was.")] = None,
    files: Annotated[Path | None, typer.Option(help="The directory with the prompt files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Repeat a run and say, hash by hash, what came out the same; exit code 3 if the weights did not."""
    from remove_refusals import console, reproduction

    with console.progress() as on_progress:
        found = reproduction.reproduce(directory, model=model, files=files, on_progress=on_progress)
    if as_json:
        console.say_json(found.to_json())
    else:
        for name, version, now in found.versions:
            console.say(f"Version: {name} was {version}, is {now}.")
        for name, sha in found.same:
            console.say(f"same       {sha[:16]}  {name}")
        for name, sha, other in found.different:
            console.say(f"different  {sha[:16]}  {name} (now {other[:16]})")
        for name in found.missing:
            console.say(f"missing    {'':16}  {name}")
        for name in found.new:
            console.say(f"new        {'':16}  {name}")
        total = len(found.same) + len(found.different) + len(found.missing)
        console.say(f"{len(found.same)} of {total} files came out the same.")
    if not found.weights_alike:
        raise CertificateError(
            f"The weights of {directory} did not come out the same, expected equal hashes; compare the versions and "
            "the machine."
        )
