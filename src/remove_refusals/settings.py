"""Everything that decides a run's result, as frozen dataclasses."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


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


Tied = Literal["untie", "both"]
"""What happens to an embedding that is also the unembedding: `untie` leaves the unembedding as it was, which is what
the hooks do; `both` edits them as one, which keeps the file small and takes the direction out of the logits as well."""


SiteKind = Literal["embedding", "attn", "mlp"]
"""A place where something is added to the residual stream; `attn` also stands for the mixer in its place."""


SITE_KINDS: tuple[SiteKind, ...] = ("embedding", "attn", "mlp")


Variant = Literal["plain", "norm-preserving"]
"""What else an edit does to a tensor; see `project_out`."""


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
    """

    strength: float = 1.0
    layers: tuple[int, int] | None = None
    sites: tuple[SiteKind, ...] = SITE_KINDS
    tied: Tied = "untie"
    variant: Variant = "plain"
    allow_leak: bool = False


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
        more: Further harmless sets by name.
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
    more: tuple[tuple[str, PromptSource], ...] = ()
    tasks: tuple[str, ...] = ()
    task_directory: str | None = None
    task_limit: int | None = None
    judge: str = "phrases"
    calibration: str | None = None


DEMO = "demo"
"""The name that stands for the embedded demo model."""


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt is put before the model.

    Attributes:
        system_prompt: A system message before each prompt.
        chat_template: The text of a Jinja template to use in place of the tokenizer's own.
        plain: Whether to use no template: the prompt alone.
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    plain: bool = False


Method = Literal["auto", "layer"]
"""How candidates are found: by gradients, by layer and position alone, or by the familiar search with generation."""


@dataclass(frozen=True)
class Rule:
    """What decides between less refusal and less damage; without a limit it is the knee of the front.

    Attributes:
        max_kl: Of the candidates with at most this damage, the one with the fewest refusals.
        max_refusals: Of the candidates with at most this share of refusals, the one with the least damage.
    """

    max_kl: float | None = None
    max_refusals: float | None = None

    def __str__(self) -> str:
        """Say the rule in words."""
        damage = "" if self.max_kl is None else f"at a KL of at most {self.max_kl:g}"
        if self.max_refusals is not None:
            return f"least damage with refusals at most {self.max_refusals:g}{damage and ', if possible '}{damage}"
        if damage:
            return f"fewest refusals {damage}"
        return "the knee of the front"


@dataclass(frozen=True)
class GradientSettings:
    """How the descent goes.

    Attributes:
        damage_weights: What a nat of damage costs beside the refusal, one descent each, from where the last one ended.
        n_steps: Steps of the first descent.
        n_more_steps: Steps of each further one.
        rate: Adam's learning rate for the strengths.
        direction_rate: Its learning rate for a unit direction, as a length; 0 leaves the directions as they are.
        batch_size: Harmful prompts, and harmless ones, for each step.
        kl_tokens: How many tokens of each answer the damage goes along.
        start: The strength to begin with.
        most: The largest strength.
        least: Strengths below this are set to 0 in the end: a site that hardly counts is left alone.
        n_check: How many prompts are answered between descents, to find refusals that open in a new way.
        n_check_tokens: With how many tokens.
        seed: Decides the order of the batches.
    """

    damage_weights: tuple[float, ...] = (4.0, 4.0, 1.0)
    n_steps: int = 32
    n_more_steps: int = 12
    rate: float = 0.08
    direction_rate: float = 0.03
    batch_size: int = 16
    kl_tokens: int = 16
    start: float = 0.5
    most: float = 3.0
    least: float = 0.05
    n_check: int = 32
    n_check_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True)
class SelectSettings:
    """How a search goes.

    Attributes:
        method: How candidates are found.
        rule: What decides between less refusal and less damage.
        n_choose: How many harmful prompts, and how many harmless ones, the search runs on.
        n_confirm: How many others the pick is confirmed on.
        n_tokens: How many tokens of its own answers the model is asked for in the search.
        most_confirmed: How many candidates are tried by generation at most.
        seed: What splits the prompts and orders the batches.
        descent: How the descent by gradients goes.
    """

    method: Method = "auto"
    rule: Rule = field(default_factory=lambda: Rule(max_refusals=0.05))
    n_choose: int = 64
    n_confirm: int = 32
    n_tokens: int = 24
    most_confirmed: int = 3
    seed: int = 0
    descent: GradientSettings = field(default_factory=GradientSettings)


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


@dataclass(frozen=True)
class EvaluationSettings:
    """How to measure.

    Attributes:
        max_new_tokens: Where an answer is cut off.
        kl_tokens: How many tokens of the base model's answers the mean KL and the perplexity go along.
        batch_size: How many prompts to run at once; None is automatic.
        chat: How the prompts are put before the models.
        seed: The seed of the bootstrap intervals.
    """

    max_new_tokens: int = 100
    kl_tokens: int = 32
    batch_size: int | None = None
    chat: ChatFormat = field(default_factory=ChatFormat)
    seed: int = 0


VARIANTS: tuple[Variant, ...] = ("plain", "norm-preserving")


MAX_KL = 0.1
"""The paper's limit on the damage."""


@dataclass(frozen=True)
class LayerSettings:
    """How the choice goes.

    Attributes:
        max_kl: The most damage that a candidate may do; twice as much until all prompts are looked at.
        depth: Only layers below this share of the model's depth are looked at, as in the paper.
        rounds: On how many harmful and as many harmless prompts the first rounds run; the last one runs on all.
        share: The share of the candidates that the second round gets.
        fewest: How many it gets at least.
        finalists: How many the last one gets.
        kl_tokens: The damage is the mean over so many tokens of the model's own answers; the paper looks at the first
            alone, which misses damage that begins behind it.
        seed: What drew the prompts, for the record.
    """

    max_kl: float = MAX_KL
    depth: float = 0.8
    rounds: tuple[int, int] = (4, 16)
    share: float = 0.25
    fewest: int = 12
    finalists: int = 4
    kl_tokens: int = 4
    seed: int = 0


METHODS: tuple[Method, ...] = ("auto", "layer")


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated in a search.

    Attributes:
        max_new_tokens: Where an answer is cut off.
        kl_tokens: How many tokens of the base model's answers the damage goes along.
        batch_size: How many prompts to run at once; None is automatic.
        chat: How the prompts are put before the model.
    """

    max_new_tokens: int = 100
    kl_tokens: int = 32
    batch_size: int | None = None
    chat: ChatFormat = field(default_factory=ChatFormat)
