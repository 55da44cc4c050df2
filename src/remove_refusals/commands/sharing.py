"""The command that sends what was made to the hub; nothing else in this package sends anything there."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(help="What `run` or `bake` left.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, such as me/my-model.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; private by default.")] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Only an adapter's files, its card and its records.")
    ] = False,
    with_answers: Annotated[
        bool, typer.Option("--with-answers", help="Also rows.jsonl and HTML pages, with answers to harmful prompts.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the base's card is, for the licence: a directory or a hub id.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="The hub's address; HF_ENDPOINT by default.")] = None,
) -> None:
    """Send what `run` or `bake` left to the hub, with its model card.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from remove_refusals import console, hub

    with console.transfers():
        pushed = hub.push(
            directory,
            repo,
            private=not public,
            adapter_only=adapter_only,
            with_answers=with_answers,
            base=base,
            endpoint=endpoint,
        )
    remarks = [f"Note: {note}" for note in pushed.notes]
    remarks += [f"Left out: {', '.join(pushed.left_out)}."] if pushed.left_out else []
    who = "private" if pushed.private else "public"
    console.finish(
        pushed.to_json(),
        f"Sent {len(pushed.files)} files to {pushed.url} ({who}), commit {pushed.commit}.",
        lambda: console.say_all(remarks),
    )
