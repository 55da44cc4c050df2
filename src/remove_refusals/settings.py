"""Everything that decides a run's result, as frozen dataclasses."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from remove_refusals.linalg import Variant
from remove_refusals.plan import Tied
from remove_refusals.prompts import embedded_prompts, load_prompts
from remove_refusals.selection.choose import SelectSettings
from remove_refusals.sources import DEMO
from remove_refusals.types import SITE_KINDS, ChatFormat, PromptSet, SiteKind


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        source: A file or data set id; None for the embedded set.
        column: The column of a table or the field of an object; None for the usual names.
        split: The split of a data set.
    """

    source: str | None = None
    column: str | None = None
    split: str | None = None

    def load(self, name: str, embedded: str) -> PromptSet:
        """Load the prompts, or the embedded set of the given name."""
        if self.source is None:
            return replace(embedded_prompts(embedded), name=name)
        return load_prompts(self.source, name=name, column=self.column, split=self.split)


@dataclass(frozen=True)
class LoadSettings:
    """How the model is loaded; the names are those of `load`."""

    device: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    device_map: str | None = None
    offload: str | None = None
    max_memory: str | None = None


@dataclass(frozen=True)
class DirectionSettings:
    """How the direction is found.

    Attributes:
        harmful: Prompts that the model refuses.
        harmless: Prompts that it answers.
        n_prompts: How many of each are drawn.
        seed: What draws them.
        layer: A fraction of depth (float) or an index (int).
        position: The token position, negative, within the chat template's tail; several for a column for each.
        projected: Whether the component along the harmless mean is removed.
        per_layer: Whether each layer gets a direction of its own, found behind it; `layer` plays no part then.
    """

    harmful: PromptSource = PromptSource()
    harmless: PromptSource = PromptSource()
    n_prompts: int = 32
    seed: int = 0
    layer: float | int = 0.6
    position: int | tuple[int, ...] = -1
    projected: bool = False
    per_layer: bool = False

    @property
    def positions(self) -> tuple[int, ...]:
        """The token positions, one or several."""
        return (self.position,) if isinstance(self.position, int) else self.position


@dataclass(frozen=True)
class EditSettings:
    """What is taken out where.

    Attributes:
        strength: The share that is taken out.
        layers: The first and last layer to edit; None for all and the embedding.
        sites: The kinds of site to edit.
        tied: What to do with an embedding that is also the unembedding.
        variant: What else the edit does to each tensor.
        allow_leak: Whether to edit a model whose weights no edit makes exact.
        affine: Whether the harmless mean's component is put in the place of what is taken out.
    """

    strength: float = 1.0
    layers: tuple[int, int] | None = None
    sites: tuple[SiteKind, ...] = SITE_KINDS
    tied: Tied = "untie"
    variant: Variant = "plain"
    allow_leak: bool = False
    affine: bool = False


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured.

    Attributes:
        harmful: Requests that the base model is expected to refuse.
        harmless: Harmless ones.
        alarming: Harmless ones that sound harmful.
        n_test: How many prompts of each set at most; None takes all.
        max_new_tokens: Where an answer is cut off.
        kl_tokens: How many tokens of the base model's answers the KL goes along.
        longest: Up to how many tokens answers go on until the refusals settle; None leaves them cut off.
        more: Further harmless sets by name.
        text: A text file whose perplexity is measured.
        tasks: Tasks of lm-evaluation-harness.
        task_directory: Where task files of the user's own lie.
        task_limit: How many samples of each task at most.
        judge: What labels the answers: `phrases`, a classifier's directory or hub id, or `URL#MODEL`.
        calibration: A file of `judge calibrate`, for rates corrected for the judge's errors.
    """

    harmful: PromptSource = PromptSource()
    harmless: PromptSource = PromptSource()
    alarming: PromptSource = PromptSource()
    n_test: int | None = None
    max_new_tokens: int = 100
    kl_tokens: int = 32
    longest: int | None = None
    more: tuple[tuple[str, PromptSource], ...] = ()
    text: str | None = None
    tasks: tuple[str, ...] = ()
    task_directory: str | None = None
    task_limit: int | None = None
    judge: str = "phrases"
    calibration: str | None = None


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run's result.

    Attributes:
        model: A directory, a hub id, or `demo`.
        loading: How the model is loaded.
        chat: How prompts are put before it.
        direction: How the direction is found; of a search only the prompts, their number, the seed and the position.
        edit: What is taken out where; a search decides the strengths and sites itself.
        measure: What is measured.
        select: How to choose what to take out; None does as `direction` and `edit` say.
        batch_size: How many prompts to run at once; None is automatic.
    """

    model: str = DEMO
    loading: LoadSettings = LoadSettings()
    chat: ChatFormat = field(default_factory=ChatFormat)
    direction: DirectionSettings = DirectionSettings()
    edit: EditSettings = EditSettings()
    measure: MeasureSettings = MeasureSettings()
    select: SelectSettings | None = field(default_factory=SelectSettings)
    batch_size: int | None = None

    def record(self) -> dict[str, Any]:
        """Give the settings as JSON, for a record that may be published: of local paths only the last part stays."""
        return {name: _published(value) for name, value in asdict(self).items()}


def published_name(source: str) -> str:
    """Give what a record that may be published calls a source: of a local path only the last part."""
    return Path(source).resolve().name if Path(source).exists() else source


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _published(part) for name, part in value.items()}
    return published_name(value) if isinstance(value, str) and os.sep in value else value
