"""The options that several commands share, and what their values mean."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals import completion
from remove_refusals.errors import DirectionError, PromptError, SelectionError

if TYPE_CHECKING:
    from remove_refusals.map_types import ModelMap
    from remove_refusals.models import LoadedModel
    from remove_refusals.selection.choose import SelectSettings
    from remove_refusals.settings import DirectionSettings, EditSettings
    from remove_refusals.types import ChatFormat, Direction, Intervention

MODEL, PROMPTS, EDIT, MEASURE = "Model", "Direction", "Edit", "Measurement"
CHOICE, DISK = "Choice", "Edit on disk"

ModelArgument = Annotated[str, typer.Argument(help="A directory, a hub id, or 'demo', the embedded model.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the first that is there.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str,
    typer.Option(help="auto: the checkpoint's on an accelerator, float32 on the CPU.", rich_help_panel=MODEL),
]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load with bitsandbytes.", rich_help_panel=MODEL)]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads it over GPUs, memory and disk.", rich_help_panel=MODEL)
]
Offload = Annotated[str | None, typer.Option(help="With a map: a directory for the rest.", rich_help_panel=MODEL)]
MaxMemory = Annotated[
    str | None, typer.Option(help="With a map: the most memory for weights, as 8GiB.", rich_help_panel=MODEL)
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL)
]
Revision = Annotated[str | None, typer.Option(help="The hub's branch, tag or commit.", rich_help_panel=MODEL)]
SystemPrompt = Annotated[str | None, typer.Option(help="A system message before each prompt.", rich_help_panel=MODEL)]
TemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file in place of the model's.", rich_help_panel=MODEL)
]
Plain = Annotated[bool, typer.Option("--plain", help="No chat template, for base models.", rich_help_panel=MODEL)]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Prompts at once; found automatically.", rich_help_panel=MODEL)
]
Harmful = Annotated[str | None, typer.Option(help="File or data set of refused prompts.", rich_help_panel=PROMPTS)]
Harmless = Annotated[str | None, typer.Option(help="File or data set of answered prompts.", rich_help_panel=PROMPTS)]
Column = Annotated[str | None, typer.Option(help="The prompts' column in tables.", rich_help_panel=PROMPTS)]
Split = Annotated[str | None, typer.Option(help="The split of data sets.", rich_help_panel=PROMPTS)]
NPrompts = Annotated[int, typer.Option(min=1, help="How many of each are drawn.", rich_help_panel=PROMPTS)]
Seed = Annotated[int, typer.Option(help="What draws them.", rich_help_panel=PROMPTS)]
Layer = Annotated[str, typer.Option(help="Where: a fraction of depth (0.6) or an index (15).", rich_help_panel=PROMPTS)]


def _positions(text: str) -> int | tuple[int, ...]:
    """Read one token position or several, joined by commas."""
    parts = str(text).split(",")
    if not all(part.removeprefix("-").isdecimal() and int(part) < 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a negative number or several, such as -1 or -1,-2.")
    return int(text) if len(parts) == 1 else tuple(map(int, parts))


Position = Annotated[
    Any,
    typer.Option(
        parser=_positions,
        metavar="N[,N]",
        help="Which token, from the end; for several the direction has a column each.",
        rich_help_panel=PROMPTS,
    ),
]
Projected = Annotated[
    bool,
    typer.Option("--projected", help="Remove the component along the harmless mean.", rich_help_panel=PROMPTS),
]
PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="For each layer a direction, found behind it.", rich_help_panel=PROMPTS)
]
DirectionFile = Annotated[
    Path, typer.Option("--direction", help="A direction: .safetensors or .pt; or a directory of one for each layer.")
]
OptionalDirectionFile = Annotated[
    Path | None, typer.Option("--direction", help="Use this direction instead.", rich_help_panel=PROMPTS)
]
Strength = Annotated[float, typer.Option(help="The share that is taken out.", rich_help_panel=EDIT)]
LayerRange = Annotated[
    str | None, typer.Option("--layers", help="Only these layers, such as 8-20.", rich_help_panel=EDIT)
]
Sites = Annotated[
    str,
    typer.Option(autocompletion=completion.sites, help="Only these kinds, joined by commas.", rich_help_panel=EDIT),
]
TiedOption = Annotated[
    str,
    typer.Option(
        "--tied",
        autocompletion=completion.one_of("--tied"),
        help="A tied embedding: untie, or edit both.",
        rich_help_panel=EDIT,
    ),
]
AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Edit even where no edit is exact; measure it.", rich_help_panel=EDIT)
]
Affine = Annotated[
    bool, typer.Option("--affine", help="Put the harmless mean's component back instead.", rich_help_panel=EDIT)
]
VariantOption = Annotated[
    str,
    typer.Option(
        "--variant",
        autocompletion=completion.one_of("--variant"),
        help="plain, norm-preserving or row-norm.",
        rich_help_panel=EDIT,
    ),
]


def _size(text: str) -> int:
    """Read a number of bytes with a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if size < 1 << 20:
        raise typer.BadParameter(f"{text!r} is not a size of at least 1MiB, such as 500MiB or 2GiB.")
    return size


Memory = Annotated[
    Any,
    typer.Option(
        "--memory",
        parser=_size,
        metavar="SIZE",
        help="What is held at once beside Python itself, such as 2GiB.",
        rich_help_panel=DISK,
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Files written at once; up to 4.", rich_help_panel=DISK)]
Certify = Annotated[
    bool, typer.Option("--certify/--no-certify", help="Read the files back and measure.", rich_help_panel=DISK)
]
SelectOption = Annotated[
    str | None,
    typer.Option(
        "--select",
        autocompletion=completion.one_of("--select"),
        help="auto, layer, tpe or none; auto, unless options below say what to take out.",
        rich_help_panel=CHOICE,
    ),
]
MaxKl = Annotated[float | None, typer.Option(min=0, help="Pick: the most damage, in nats.", rich_help_panel=CHOICE)]
MaxRefusals = Annotated[
    float | None, typer.Option(min=0, max=1, help="Pick: the largest share refused; 0.05.", rich_help_panel=CHOICE)
]
Trials = Annotated[int, typer.Option(min=1, help="How many trials tpe makes.", rich_help_panel=CHOICE)]
HarmfulTest = Annotated[str | None, typer.Option(help="Refused prompts to measure on.", rich_help_panel=MEASURE)]
HarmlessTest = Annotated[str | None, typer.Option(help="Answered prompts to measure on.", rich_help_panel=MEASURE)]
AlarmingTest = Annotated[str | None, typer.Option(help="Alarming but harmless prompts.", rich_help_panel=MEASURE)]
NTest = Annotated[int | None, typer.Option(min=1, help="At most so many of each; all.", rich_help_panel=MEASURE)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Where an answer is cut off.", rich_help_panel=MEASURE)]
KlTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of each answer that the KL is measured on.", rich_help_panel=MEASURE)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def direction_settings(
    harmful: Any,
    harmless: Any,
    n_prompts: int,
    seed: int,
    layer: str,
    position: int | tuple[int, ...],
    projected: bool,
    per_layer: bool,
) -> "DirectionSettings":
    """Give the settings that the options mean.

    Raises:
        DirectionError: If the layer is no number.
    """
    from remove_refusals.settings import DirectionSettings

    return DirectionSettings(harmful, harmless, n_prompts, seed, _layer(layer), position, projected, per_layer)


def _layer(text: str) -> float | int:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise DirectionError(
            f"The layer is {text!r}, expected a fraction of depth such as 0.6 or an index such as 15."
        ) from None


def edit_settings(
    strength: float,
    layers: str | None,
    sites: str,
    tied: str = "untie",
    variant: str = "plain",
    allow_leak: bool = False,
    affine: bool = False,
) -> "EditSettings":
    """Give the settings that the options mean.

    Raises:
        DirectionError: If a value is not among the accepted ones.
    """
    from remove_refusals.linalg import VARIANTS
    from remove_refusals.settings import EditSettings
    from remove_refusals.types import SITE_KINDS

    kinds = tuple(kind for kind in SITE_KINDS if kind in sites.split(","))
    if set(kinds) != set(sites.split(",")):
        raise DirectionError(f"The sites are {sites!r}, expected some of {','.join(SITE_KINDS)}, joined by commas.")
    return EditSettings(
        strength,
        _range(layers),
        kinds,
        _one_of("--tied", tied, ("untie", "both")),
        _one_of("--variant", variant, VARIANTS),
        allow_leak,
        affine,
    )


def _one_of(option: str, value: str, accepted: tuple[Any, ...]) -> Any:
    if value not in accepted:
        raise DirectionError(f"{option} is {value!r}, expected one of {', '.join(accepted)}.")
    return value


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    if not (first.isdecimal() and last.isdecimal()):
        raise DirectionError(f"The layers are {text!r}, expected a range such as 8-20 or one layer such as 12.")
    return int(first), int(last)


def chat_format(system_prompt: str | None, chat_template: Path | None, plain: bool) -> "ChatFormat":
    """Give the chat format that the options mean; the template is read from its file.

    Raises:
        PromptError: If the file cannot be read.
    """
    from remove_refusals.types import ChatFormat

    text = None
    if chat_template is not None:
        try:
            text = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"The chat template {chat_template} cannot be read ({error}), expected a Jinja file in UTF-8."
            ) from error
    return ChatFormat(system_prompt, text, plain)


def made_intervention(
    loaded: "LoadedModel", directions: "tuple[Direction, ...]", settings: "EditSettings"
) -> tuple["Intervention", "ModelMap"]:
    """Map the model and make the intervention that the settings mean for it.

    Raises:
        ArchitectureError: If the model cannot be mapped.
        DirectionError: If the directions or the layers do not fit the model.
    """
    from remove_refusals import modelmap, stages

    model_map = modelmap.map_model(loaded.model)
    return stages.make_intervention(directions, settings, model_map), model_map


def select_settings(
    method: str | None, max_kl: float | None, max_refusals: float | None, n_trials: int, *, as_given: bool
) -> "SelectSettings | None":
    """Give the settings of the search that the options mean.

    Args:
        method: The option `--select`; None if it was not given.
        max_kl: The most damage.
        max_refusals: The largest share of refusals.
        n_trials: How many trials `tpe` makes.
        as_given: Whether other options say what to take out, so that nothing is searched unless it is asked for.

    Returns:
        The settings, or None where nothing is searched.

    Raises:
        SelectionError: If the method is not among the accepted ones.
    """
    from remove_refusals.selection.candidates import METHODS, Method, Rule
    from remove_refusals.selection.choose import SelectSettings

    accepted = (*METHODS, "none")
    if method not in (None, *accepted):
        raise SelectionError(f"--select is {method!r}, expected one of {', '.join(accepted)}.")
    if method == "none" or (method is None and as_given):
        return None
    rule = Rule(max_kl, max_refusals if max_refusals is not None or max_kl is not None else 0.05)
    chosen: Method = next((known for known in METHODS if known == method), METHODS[0])
    return SelectSettings(method=chosen, rule=rule, n_trials=n_trials)


def check_choice(method: str | None, *, as_given: bool) -> None:
    """Check that a search is not asked for beside options that it would have to ignore.

    Args:
        method: The option `--select`; None if it was not given.
        as_given: Whether other options say what to take out.

    Raises:
        SelectionError: If it is.
    """
    if method not in (None, "none") and as_given:
        raise SelectionError(
            f"--select {method} and options that say what to take out are both given, expected one of them; leave "
            "--select out, or --direction, --layer, --strength, --layers, --sites, --variant, --projected, "
            "--per-layer, --affine and all positions but one."
        )
