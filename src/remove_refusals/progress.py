"""How far a job is and what it takes: one object that is handed down, and told of each stage."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

if sys.platform != "win32":
    import resource

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Cost:
    """What a stage took, and the most bytes held up to its end: by the process, 0 if unknown, and on CUDA devices."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0
    gpu_memory: int = 0


class Meter:
    """Measures what the stages of a job take: each lasts until the next begins, and one that returns is added up."""

    def __init__(self) -> None:
        """Begin, with a stage that has no name yet."""
        self._costs: dict[str, Cost] = {}
        self._name, self._since = "", (time.perf_counter(), time.process_time())

    def begin(self, name: str) -> None:
        """End the stage that lasts, and begin another; what stands behind a comma in its name does not count."""
        before, now = self._costs.get(self._name, Cost()), (time.perf_counter(), time.process_time())
        wall, cpu = (late - early for late, early in zip(now, self._since, strict=True))
        if self._name:
            self._costs[self._name] = Cost(before.seconds + wall, before.cpu_seconds + cpu, *peak_memory())
        self._name, self._since = name.partition(",")[0], now

    def costs(self) -> dict[str, Cost]:
        """Give what each stage took so far, in the order in which they began first."""
        self.begin(self._name)
        return dict(self._costs)


def peak_memory() -> tuple[int, int]:
    """Tell how many bytes the process has held at most so far, and on CUDA devices."""
    import torch

    gpu = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    if sys.platform == "win32":
        return 0, gpu
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), gpu


@dataclass(frozen=True)
class Progress:
    """Tells `on_progress` how much of a stage is done, `on_stage` and the meter of each; `SILENT` tells nobody.

    A job calls `stage` where one begins and hands the result on; whoever does the work calls `done` as it goes, and
    `after` where its part begins behind others of the same stage.
    """

    on_progress: OnProgress | None = None
    on_note: Callable[[str], None] | None = None
    on_stage: Callable[[str], None] | None = None
    name: str = ""
    total: int = 0
    before: int = 0
    meter: Meter | None = None

    def begin(self, name: str) -> None:
        """Tell that a stage begins, which may have no steps or be a part of another."""
        if self.on_stage is not None:
            self.on_stage(name)
        if self.meter is not None:
            self.meter.begin(name)

    def stage(self, name: str, total: int) -> "Progress":
        """Give the progress of a stage of that many steps."""
        self.begin(name)
        return replace(self, name=name, total=total, before=0)

    def after(self, n_done: int) -> "Progress":
        """Give the progress of a part of the stage that begins when so many further steps are done."""
        return replace(self, before=self.before + n_done)

    def note(self, *sentences: str) -> None:
        """Tell what whoever waits should know."""
        if self.on_note is not None:
            for sentence in sentences:
                self.on_note(sentence)

    def done(self, n_done: int) -> None:
        """Tell that so many steps of this part are done."""
        if self.on_progress is not None:
            self.on_progress(self.name, self.before + n_done, self.total)


SILENT = Progress()
