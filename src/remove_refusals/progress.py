"""How far a job is: one object that is handed down, and told of each stage."""

from collections.abc import Callable
from dataclasses import dataclass, replace

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Progress:
    """Tells `on_progress` how much of a stage is done; `SILENT` tells nobody.

    A job calls `stage` where one begins and hands the result on; whoever does the work calls `done` as it goes, and
    `after` where its part begins behind others of the same stage.
    """

    on_progress: OnProgress | None = None
    name: str = ""
    total: int = 0
    before: int = 0

    def stage(self, name: str, total: int) -> "Progress":
        """Give the progress of a stage of that many steps."""
        return replace(self, name=name, total=total, before=0)

    def after(self, n_done: int) -> "Progress":
        """Give the progress of a part of the stage that begins when so many further steps are done."""
        return replace(self, before=self.before + n_done)

    def done(self, n_done: int) -> None:
        """Tell that so many steps of this part are done."""
        if self.on_progress is not None:
            self.on_progress(self.name, self.before + n_done, self.total)


SILENT = Progress()
