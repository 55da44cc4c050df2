"""TODO."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


def stage_progress(
    on_progress: OnProgress | None, stage: str, before: int = 0, total: int | None = None
) -> Callable[..., None] | None:
    """Turn the report of one stage's part, `(done)` or `(done, total)`, into that of the stage."""
    if on_progress is None:
        return None

    def report(done: int, whole: int | None = None) -> None:
        on_progress(stage, before + done, whole if total is None and whole is not None else total or 0)

    return report
