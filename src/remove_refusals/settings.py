"""Everything that decides a run's result: one tree of frozen Pydantic models.

Each setting is declared here once. The options of the command, the TOML file and the record are made from it, and
`model_fields_set` says what somebody typed. Nothing heavy is imported.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


@dataclass(frozen=True)
class Option:
    """How a setting is typed at the command line, where its declaration does not say it yet."""

    name: str | None = None
    short: bool = False
    """Whether it stands on the short help page."""
    flag: str | None = None
    metavar: str | None = None
    is_file: bool = False
    """Whether a file is named whose text is the setting."""
    is_argument: bool = False
    may_be_none: bool = False
    """Whether `none` leaves out all of the part of the tree that it stands in."""


def setting(default: Any, description: str, *, ge: float | None = None, le: float | None = None, **option: Any) -> Any:
    """Declare a setting that is an option too; `option` are the attributes of `Option`."""
    return Field(
        default, description=description, ge=ge, le=le, validate_default=True, json_schema_extra={"option": option}
    )


def inner(default: Any, description: str, *, ge: float | None = None, le: float | None = None) -> Any:
    """Declare a setting that is no option: it is there for who calls the library."""
    return Field(default, description=description, ge=ge, le=le)


class Settings(BaseModel):
    """A part of the tree; `panel` heads its options on a help page."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    panel: ClassVar[str] = "General"


class PromptSource(Settings):
    """Where prompts come from; without a source it is the embedded set."""

    panel: ClassVar[str] = "Direction"

    source: str | None = inner(None, "A file or data set id.")
    column: str | None = setting(None, "The prompts' column in tables; or SET=COLUMN for some, joined by commas.")
    split: str | None = setting(None, "The split of data sets; or SET=SPLIT.")


def _source(value: Any) -> Any:
    return PromptSource(source=value) if isinstance(value, str) else value


Prompts = Annotated[PromptSource, BeforeValidator(_source)]
"""A text is the source."""


def _processes(value: Any) -> Any:
    if value in (None, "auto") or (str(value).isdecimal() and int(value) > 0):
        return None if value is None else str(value)
    raise ValueError(f"The option --tp is {value!r}, expected auto or a number of processes such as 8.")


class LoadSettings(Settings):
    """How the model is loaded; the names are those of `load`."""

    panel: ClassVar[str] = "Model"

    device: str | None = setting(None, "cuda, mps or cpu; the first that is there.", short=True)
    dtype: str = setting("auto", "auto: the checkpoint's on an accelerator, float32 on the CPU (bfloat16 takes half).")
    load_in_4bit: bool = setting(False, "Load in 4 bits with bitsandbytes.")
    load_in_8bit: bool = setting(False, "Load in 8 bits with bitsandbytes.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    revision: str | None = setting(None, "The hub's branch, tag or commit.")
    device_map: str | dict[str, Any] | None = setting(None, "auto spreads it over GPUs, memory and disk.")
    offload: str | None = setting(None, "With a map: a directory for the rest.")
    max_memory: str | None = setting(None, "With a map: the most memory for weights, as 8GiB.")
    tp: Annotated[str | None, BeforeValidator(_processes)] = setting(
        None, "Under torchrun: auto, or so many processes hold the model together.", metavar="auto|N"
    )
    replicas: int | None = setting(None, "Under torchrun: copies of the model that share the prompts.", ge=1)


class ChatFormat(Settings):
    """How a prompt is put before the model; `chat_template` is a template's text, used in place of its own."""

    panel: ClassVar[str] = "Model"

    system_prompt: str | None = setting(None, "A system message before each prompt.", short=True)
    chat_template: str | None = setting(None, "A Jinja file in place of the model's.", is_file=True)
    plain: bool = setting(False, "No chat template, for base models.")


def _layer(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    except ValueError:
        raise ValueError(
            f"The layer is {value!r}, expected a fraction of depth such as 0.6 or an index such as 15."
        ) from None


def _position(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not parts or not all(str(part).removeprefix("-").isdecimal() and int(part) < 0 for part in parts):
        raise ValueError(
            f"The option --position is {value!r}, expected a negative number or several, such as -1 or -1,-2; --help "
            "says more."
        )
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))


class DirectionSettings(Settings):
    """How the direction is found; `layer` plays no part where `per_layer` is set."""

    panel: ClassVar[str] = "Direction"

    harmful: Prompts = setting(PromptSource(), "File or data set of refused prompts.", short=True)
    harmless: Prompts = setting(PromptSource(), "File or data set of answered prompts.", short=True)
    n_prompts: int = setting(32, "How many of each are drawn.", ge=1)
    seed: int = setting(0, "What draws them.")
    layer: Annotated[float | int, BeforeValidator(_layer)] = setting(
        0.6, "Where: a fraction of depth (0.6) or an index (15).", short=True
    )
    position: Annotated[int | tuple[int, ...], BeforeValidator(_position)] = setting(
        -1, "Which token, from the end; for several the direction has a column each.", metavar="N[,N]"
    )
    projected: bool = setting(False, "Remove the component along the harmless mean.")
    per_layer: bool = setting(False, "For each layer a direction, found behind it.")

    @property
    def positions(self) -> tuple[int, ...]:
        """The token positions, one or several."""
        return (self.position,) if isinstance(self.position, int) else self.position


Tied = Literal["auto", "untie", "both"]
"""What happens to an embedding that is also the unembedding: `untie` leaves the unembedding as it was, and the files
get a tensor for it; `both` edits them as one, which takes the direction out of what the unembedding reads as well.
`auto` is `both` where servers know no unembedding of its own for the model type, else `untie`."""

SiteKind = Literal["embedding", "attn", "mlp", "expert"]
"""A place where something is added to the residual stream; `attn` also stands for the mixer in its place, and `expert`
is one routed expert of a mixture."""

SITE_KINDS: tuple[SiteKind, ...] = ("embedding", "attn", "mlp")
"""The kinds that a direction is taken out of; an expert is edited by itself where somebody says so."""

Variant = Literal["plain", "norm-preserving"]
"""What else an edit does to a tensor; see `project_out`."""


def _layers(value: Any) -> Any:
    if not isinstance(value, str | int):
        return value
    first, dash, last = str(value).partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"The layers are {value!r}, expected a range such as 8-20 or one layer such as 12.")
    return int(first), int(last)


def _sites(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    kinds = value.split(",")
    if not set(kinds) <= set(SITE_KINDS):
        raise ValueError(f"The sites are {value!r}, expected some of {','.join(SITE_KINDS)}, joined by commas.")
    return tuple(kind for kind in SITE_KINDS if kind in kinds)


def _experts(value: Any) -> Any:
    """Read experts to be silenced, such as `3:5,7:1=0.5`, with the share of what each writes."""
    if not isinstance(value, str):
        return value
    parts = [re.fullmatch(r"(\d+):(\d+)(?:=(\d+(?:\.\d+)?))?", part.strip()) for part in value.split(",")]
    if not all(parts):
        raise ValueError(
            f"The option --silence-experts is {value!r}, expected LAYER:EXPERT or LAYER:EXPERT=SHARE, by comma, "
            "such as 3:5,7:1=0.5; `analyze` says which experts a model has."
        )
    return tuple((int(part[1]), int(part[2]), float(part[3] or 1)) for part in parts if part)


class EditSettings(Settings):
    """What is taken out where; without a range it is all layers and the embedding."""

    panel: ClassVar[str] = "Edit"

    strength: float = setting(1.0, "The share that is taken out.", short=True)
    layers: Annotated[tuple[int, int] | None, BeforeValidator(_layers)] = setting(
        None, "Only these layers, such as 8-20.", short=True
    )
    sites: Annotated[tuple[SiteKind, ...], BeforeValidator(_sites)] = setting(
        SITE_KINDS, "Only these kinds, joined by commas.", short=True
    )
    silence_experts: Annotated[tuple[tuple[int, int, float], ...], BeforeValidator(_experts)] = setting(
        (), "Silence these experts too, such as 3:5,7:1=0.5."
    )
    tied: Tied = setting("auto", "A tied embedding: auto, untie, or edit both.")
    variant: Variant = setting("plain", "plain or norm-preserving.")
    allow_leak: bool = setting(False, "Edit even where no edit is exact; measure it.")


HARMFUL_SETS = ("harmbench", "jailbreakbench", "strongreject", "sorry-bench")
ALARMING_SETS = ("xstest", "or-bench")
"""Published prompt sets that a word stands for: harmful ones, and harmless ones that sound alarming."""

PUBLISHED_JUDGES = ("harmbench", "strongreject")
"""Published judges that a word stands for."""

_TAKEN = ("harmful", "harmless", "alarming")


def expects_refusals(name: str) -> bool:
    """Whether the prompts of a set of this name are harmful, so that a refusal is no false one."""
    return name == "harmful" or name.replace("_", "-") in HARMFUL_SETS


def _more(value: Any) -> Any:
    """Read sets by name from texts, NAME=FILE or the word for a published set; pairs stay as they are."""
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        return value
    found: dict[str, PromptSource] = {}
    for part in value:
        published = part in (*HARMFUL_SETS, *ALARMING_SETS)
        name, equals, place = f"{part.replace('-', '_')}={part}".partition("=") if published else part.partition("=")
        if not equals or not name.isidentifier() or not place:
            raise ValueError(
                f"The option --also is {part!r}, expected NAME=FILE, the name of letters, digits and _, or one of "
                f"{', '.join((*ALARMING_SETS, *HARMFUL_SETS))}; write for example --also mine=mine.csv."
            )
        if name in _TAKEN or name in found:
            raise ValueError(f"The option --also names {name!r} twice, expected a name of its own; choose another.")
        found[name] = PromptSource(source=place)
    return tuple(found.items())


Language = Literal["auto", "en", "de", "fr", "es", "pt", "it", "ru", "zh", "ja", "ko", "ar", "hi"]
"""A language with test prompts and refusal phrases, by its code in ISO 639-1."""


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


class MeasureSettings(Settings):
    """What is measured, and how."""

    panel: ClassVar[str] = "Measurement"

    harmful: Prompts = setting(
        PromptSource(),
        "Refused prompts to measure on; or harmbench, jailbreakbench, strongreject.",
        name="harmful-test",
    )
    harmless: Prompts = setting(PromptSource(), "Answered prompts to measure on.", name="harmless-test")
    alarming: Prompts = setting(PromptSource(), "Alarming but harmless prompts.", name="alarming-test")
    n_test: int | None = setting(None, "At most so many of each; all.", ge=1, short=True)
    max_new_tokens: int = setting(100, "Where an answer is cut off.", ge=1, short=True)
    kl_tokens: int = setting(32, "Tokens of each answer that the KL is measured on.", ge=1)
    more: Annotated[tuple[tuple[str, Prompts], ...], BeforeValidator(_more)] = setting(
        (), "Another set; or xstest, or-bench, sorry-bench.", name="also", metavar="NAME=FILE"
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(_names)] = setting(
        (), "Tasks of lm-evaluation-harness, by comma."
    )
    task_directory: str | None = setting(None, "A directory with task files of your own.", name="task-files")
    task_limit: int | None = setting(None, "At most so many samples each.", ge=1)
    language: Language = setting(
        "auto",
        "Of test prompts and unclear answers: de, fr, es, pt, it, ru, zh, ja, ko, ar, hi. Searching stays English.",
    )
    judge: str = setting("phrases", "phrases, harmbench, strongreject, ID or URL#MODEL.", short=True)
    calibration: str | None = setting(None, "From `judge calibrate`: corrects the rates.")
    seed: int = inner(0, "The seed of the bootstrap intervals.")


DEMO = "demo"
"""The name that stands for the embedded demo model."""

Method = Literal["auto", "layer"]
"""How candidates are found: by gradients, or by layer and position alone."""


class Rule(Settings):
    """What decides between less refusal and less damage; without a limit it is the knee of the front.

    Of the candidates with at most `max_kl` it takes the one with the fewest refusals, and of those with at most
    `max_refusals` the one with the least damage.
    """

    panel: ClassVar[str] = "Choice"

    max_kl: float | None = setting(None, "Pick: the most damage, in nats.", ge=0)
    max_refusals: float | None = setting(None, "Pick: the largest share refused; 0.05.", ge=0, le=1, short=True)

    def __str__(self) -> str:
        """Say the rule in words."""
        damage = "" if self.max_kl is None else f"at a KL of at most {self.max_kl:g}"
        if self.max_refusals is not None:
            return f"least damage with refusals at most {self.max_refusals:g}{damage and ', if possible '}{damage}"
        if damage:
            return f"fewest refusals {damage}"
        return "the knee of the front"


class GradientSettings(Settings):
    """How the descent goes."""

    targets: tuple[float, ...] = inner(
        (0.01, 0.002),
        "How likely a refusal may be, one descent each, from where the last one ended.",
    )
    damage_weight: float = inner(8.0, "What a nat of damage costs at first, beside the refusal.", ge=0)
    least_weight: float = inner(1.0, "What it costs at least, where answers open as refusals do.", ge=0)
    weight_rate: float = inner(0.25, "How fast that rises where refusals are rarer than the target, or falls.", ge=0)
    n_steps: int = inner(32, "Steps of the first descent.", ge=1)
    n_more_steps: int = inner(12, "Steps of each further one.", ge=1)
    rate: float = inner(0.08, "Adam's learning rate for the strengths.", ge=0)
    direction_rate: float = inner(0.03, "Its rate for a unit direction, as a length; 0 leaves directions alone.", ge=0)
    batch_size: int = inner(16, "Harmful prompts, and harmless ones, for each step.", ge=1)
    kl_tokens: int = inner(8, "How many tokens of each answer the damage goes along.", ge=1)
    start: float = inner(0.5, "The strength to begin with.", ge=0)
    most: float = inner(3.0, "The largest strength.", ge=0)
    least: float = inner(0.05, "Strengths below this are set to 0 in the end: such a site hardly counts.", ge=0)
    n_check_tokens: int = inner(24, "With how many tokens other prompts are answered between descents.", ge=1)
    seed: int = inner(0, "Decides the order of the batches.")


class SelectSettings(Settings):
    """How a search goes."""

    panel: ClassVar[str] = "Choice"

    method: Method = setting("auto", "auto, layer, or none: no search.", name="select", short=True, may_be_none=True)
    rule: Rule = Rule(max_refusals=0.05)
    n_choose: int = inner(96, "How many harmful, and how many harmless prompts the search runs on.")
    n_confirm: int = inner(32, "How many others the pick is confirmed on.")
    n_confirm_tokens: int = inner(48, "Where the answers of the confirmation are cut off at most.", ge=1)
    n_tokens: int = inner(24, "How many tokens of its own answers the model is asked for in the search.")
    most_experts: int = inner(128, "Of a mixture so many experts are silenced at most; 0 tries no expert.", ge=0)
    most_confirmed: int = inner(3, "How many candidates are tried by generation at most.")
    seed: int = inner(0, "What splits the prompts and orders the batches.")
    descent: GradientSettings = GradientSettings()


class RunSettings(Settings):
    """Everything that decides a run's result.

    A search takes of `direction` only the prompts, their number, the seed and the position, and nothing of `edit`;
    without one it goes as these say.
    """

    panel: ClassVar[str] = "Model"

    model: str = setting(DEMO, "A directory, a hub id, or 'demo', the embedded model.", short=True, is_argument=True)
    loading: LoadSettings = LoadSettings()
    chat: ChatFormat = ChatFormat()
    batch_size: int | None = setting(None, "Prompts at once; found automatically.", ge=1)
    direction: DirectionSettings = DirectionSettings()
    select: SelectSettings | None = SelectSettings()
    edit: EditSettings = EditSettings()
    measure: MeasureSettings = MeasureSettings()
    from_files: bool = setting(False, "Measure the saved files loaded as a second model.")
    one_at_a_time: bool = setting(False, "Never hold base and edited model in memory together.")

    @property
    def says_what_to_take_out(self) -> tuple[str, ...]:
        """The options, typed as a default or not, that say what a search decides otherwise."""
        typed = {"layer", "projected", "per_layer"} & self.direction.model_fields_set
        typed |= {"strength", "layers", "sites", "silence_experts", "variant"} & self.edit.model_fields_set
        typed |= {"position"} if len(self.direction.positions) > 1 else set()
        return tuple(f"--{name.replace('_', '-')}" for name in sorted(typed))

    def record(self) -> dict[str, Any]:
        """Give the settings as JSON, for a record that may be published: of local paths only the last part stays."""
        return {name: _published(value) for name, value in self.model_dump(mode="json").items()}


def published_name(source: str) -> str:
    """Give what a record that may be published calls a source: of a local path only the last part."""
    return Path(source).resolve().name if os.path.exists(source) else source  # noqa: PTH110 - a template is too long


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _published(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_published(part) for part in value]
    return published_name(value) if isinstance(value, str) and os.sep in value else value


def _size(value: Any) -> Any:
    """Read a number of bytes with a unit."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", value.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if size < 1 << 20:
        raise ValueError(f"The option --memory is {value!r}, expected a size of at least 1MiB, such as 500MiB or 2GiB.")
    return size


class DiskSettings(Settings):
    """How files are edited on disk; none of it decides what they hold in the end."""

    panel: ClassVar[str] = "Edit on disk"

    memory: Annotated[int, BeforeValidator(_size)] = setting(
        "1GiB", "What is held at once beside Python itself, such as 2GiB.", metavar="SIZE"
    )
    jobs: int | None = setting(None, "Files written at once; up to 4.", ge=1)
    certify: bool = setting(True, "Read the files back and measure.")


class RunFiles(Settings):
    """What a run reads and writes beside its model and prompts."""

    output: Path | None = setting(None, "The directory to make; MODEL-ablated by default.", short=True, flag="-o")
    force: bool = setting(False, "Replace an existing output.", short=True)
    direction: Path | None = setting(None, "Use this direction instead.", short=True)


VARIANTS: tuple[Variant, ...] = ("plain", "norm-preserving")

MAX_KL = 0.1
"""The paper's limit on the damage."""


class LayerSettings(Settings):
    """How the choice by layer and position goes; the first token alone, as in the paper, misses damage behind it."""

    max_kl: float = inner(MAX_KL, "The most damage of a candidate; twice as much until the last round.", ge=0)
    depth: float = inner(0.8, "Only layers below this share of the model's depth are looked at, as in the paper.", ge=0)
    rounds: tuple[int, int] = inner((4, 16), "On how many prompts of each the first rounds run; the last runs on all.")
    share: float = inner(0.25, "The share of the candidates that the second round gets.", ge=0)
    fewest: int = inner(12, "How many it gets at least.", ge=1)
    finalists: int = inner(4, "How many the last one gets.", ge=1)
    kl_tokens: int = inner(4, "Of each of the model's own answers the damage is the mean over so many tokens.", ge=1)
    seed: int = inner(0, "What drew the prompts, for the record.")
