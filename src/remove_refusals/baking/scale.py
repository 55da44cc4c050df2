"""What a run needs, from a configuration alone: where the weights lie, how much at once, and what each stage holds.

The formulas are those of docs/scale.md. They count what grows with the model and the prompts; what the libraries take
was measured once. The page holds them against the peak memory of real runs.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remove_refusals.errors import CheckpointError, ConfigurationError
from remove_refusals.files import Record, read_json
from remove_refusals.modelmap import ModelMap, map_model, skeleton_of
from remove_refusals.models import INDEX_FILE, checkpoint_tensors, local_directory, parse_dtype, quantisation
from remove_refusals.settings import GradientSettings, LoadSettings, RunSettings

GIB = 1 << 30

_LIBRARIES = {"cpu": 0.43, "cuda": 0.9}
"""GiB that Python, torch and Transformers take, or the driver, kernels and workspace on a GPU."""

_PER_NODE = 8

_USED = 0.92
"""The share of a device's memory that a plan fills at most: the rest is lost between blocks."""

_PROMPT, _SHARED = 46, 24
"""Tokens of a prompt in a chat template, the longest of the embedded ones, and how many of these all begin with."""

_PASS = {"cpu": 1500, "cuda": 32768}
_AT_ONCE = {"cpu": 64, "cuda": 512}
_HELD_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Of forward passes, generation and comparisons along answers: tokens, prompts and logits at once, at most."""

_EDIT_BYTES = 1 << 28
"""What writing the edited files holds."""

_BITS = {"fp8": 8.1, "fbgemm_fp8": 8.1, "mxfp4": 4.25, "compressed-tensors": 4.5, "modelopt": 4.5}
"""Bits of a number with its share of a scale, where no file says it."""

_EDITED = {"plain": 500e6, "FP8": 18e6, "other": 8e6}
"""Bytes of edited tensors that a core writes in a second: benchmarks/stream.py and benchmarks/quantised.py."""

_DISK = 2e9


@dataclass(frozen=True)
class Devices:
    """So many devices of one kind, each with so many bytes of memory."""

    n: int
    memory: int
    kind: str

    @classmethod
    def read(cls, text: str) -> "Devices":
        """Read `8x80GiB`, `24GiB`, `cpu` or `cpu:64GiB`."""
        size = r"(\d+(?:\.\d+)?) ?([MGT])i?B"
        match = re.fullmatch(rf"(cpu)(?::{size})?|(?:([1-9]\d*)x)?{size}", text.strip(), re.IGNORECASE)
        if match is None:
            raise ConfigurationError(
                f"The devices are {text!r}, expected their number and memory, such as 8x80GiB, 24GiB or cpu:64GiB."
            )
        number, unit = match[2] or match[5], match[3] or match[6]
        memory = float(number) * GIB * 1024.0 ** ("MGT".index(unit.upper()) - 1) if number else _memory_here()
        return cls(int(match[4] or 1), int(memory), "cpu" if match[1] else "cuda")

    def __str__(self) -> str:
        size = f"{self.memory / GIB:.4g} GiB"
        return f"CPU with {size}" if self.kind == "cpu" else f"{self.n} x {size}"


def _memory_here() -> int:
    from accelerate.utils import get_max_memory

    return int(get_max_memory()["cpu"])


@dataclass(frozen=True)
class Sizes:
    """What of a model decides how much it takes, in numbers, and from `weights` on in bytes."""

    d_model: int
    n_layers: int
    vocabulary: int
    inner: int
    """Numbers inside an MLP that one token goes through."""
    n_parameters: int
    heads: int
    kv_heads: int
    """Among so many devices a token's keys and values can be divided."""
    weights: int
    """In memory."""
    stored: int
    """In the files."""
    edited: int
    """What an edit changes, in memory."""
    cached: int
    """The keys and values of one token."""
    number: int
    """A number that is computed with."""
    method: str | None
    """How the weights are quantised where they stay so in memory."""
    rate: float
    """Bytes of edited tensors that are written in a CPU second."""

    @property
    def token(self) -> int:
        """What a layer holds at once for each token that goes through it."""
        return self.number * (6 * self.d_model + 3 * self.inner)

    @property
    def gradient(self) -> int:
        """What all layers keep of a token for its gradient; hooks and norms keep some of it in float32."""
        return self.n_layers * (self.number * (4 * self.d_model + 3 * self.inner) + 10 * self.d_model)


def sizes(source: str, loading: LoadSettings, kind: str) -> Sizes:
    """Measure a model by its configuration, and by the headers or the index of its files where they are there."""
    dtype, revision = loading.dtype, loading.revision
    model = skeleton_of(source, revision=revision, trust_remote_code=loading.trust_remote_code)
    model_map, config = map_model(model), model.config.get_text_config(decoder=True)
    directory = local_directory(source, revision)
    described = read_json(directory / "config.json", error=CheckpointError) if directory is not None else {}
    assert isinstance(described, dict)
    method = quantisation(described).get("quant_method")
    saved = getattr(torch, str(described.get("dtype") or described.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    wanted = parse_dtype(dtype) or saved
    # Where there is no accelerator Transformers turns quantised weights into floats.
    kept = method is not None and kind == "cuda"
    number = torch.float32.itemsize if dtype == "auto" and kind == "cpu" and method is None else wanted.itemsize
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    bits = _BITS.get(str(method), 8 * saved.itemsize)
    stored = _stored(directory) or n_parameters * bits // 8
    share = stored / n_parameters if kept else number
    cached, kv_heads = _cached(config, model_map)
    edited = sum(math.prod(writer.shape) for site in model_map.sites for writer in site.writers)
    return Sizes(
        d_model=model_map.d_model,
        n_layers=model_map.n_layers,
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        inner=_inner(model_map, config),
        n_parameters=n_parameters,
        heads=int(getattr(config, "num_attention_heads", 0) or 1),
        kv_heads=kv_heads,
        weights=int(n_parameters * share),
        stored=int(stored),
        edited=int(edited * share),
        cached=cached * number,
        number=number,
        method=str(method) if kept else None,
        rate=_EDITED["plain" if method is None else "FP8" if "fp8" in str(method) else "other"],
    )


def _stored(directory: Path | None) -> int:
    """Say how many bytes the tensors in the files have, by their index or their headers."""
    if directory is None:
        return 0
    if (directory / INDEX_FILE).is_file():
        index = read_json(directory / INDEX_FILE, error=CheckpointError)
        assert isinstance(index, dict)
        return int((index.get("metadata") or {}).get("total_size") or 0)
    at_hand = any(directory.glob("*.safetensors"))
    return sum(one.stop - one.start for _, one in checkpoint_tensors(directory).values()) if at_hand else 0


def _inner(model_map: ModelMap, config: Any) -> int:
    """Count the numbers inside the widest MLP that one token goes through: of routed experts those that are chosen."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    chosen = next((int(n) for name in names if isinstance(n := getattr(config, name, None), int)), 1)
    widest = 0
    for site in model_map.sites:
        each = 0
        for writer in site.writers if site.kind == "mlp" else ():
            numbers = math.prod(writer.shape) // model_map.d_model if len(writer.shape) > 1 else 0
            each += numbers * chosen // writer.shape[0] if len(writer.shape) > 2 else numbers
        widest = max(widest, each)
    return widest


def _cached(config: Any, model_map: ModelMap) -> tuple[int, int]:
    """Count the numbers of one token's keys and values, and the heads that they belong to: one, of a latent cache."""
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    if getattr(config, "kv_lora_rank", None):
        return model_map.n_layers * int(config.kv_lora_rank + config.qk_rope_head_dim), 1
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or model_map.d_model // heads)
    return model_map.n_layers * 2 * kv_heads * width, kv_heads


class Stage(Record):
    """What one stage of a run holds on each device at its peak; `batch` is how many prompts it runs at once."""

    name: str
    peak: int
    batch: int | None = None


class ScalePlan(Record):
    """How a model lies on devices, what each stage of `run` needs there, and what to type."""

    model: str
    n_parameters: int
    weights: int
    devices: str
    together: int
    """So many devices hold the model together."""
    replicas: int
    one_at_a_time: bool
    fits: bool
    peak: int
    stages: tuple[Stage, ...]
    slow: tuple[str, ...]
    command: str


def plan_run(settings: RunSettings, devices: Devices) -> ScalePlan:
    """Plan a run on devices.

    Args:
        settings: The run; its model, data type, numbers of prompts and tokens, and batch size count.
        devices: What it is to run on.

    Returns:
        The plan with the fewest devices for each copy of the model, and as many copies as there is room for; of all
        devices for one copy where not even that fits.

    Raises:
        RemoveRefusalsError: If the configuration cannot be read or built.

    Example:
        >>> plan_run(RunSettings(model="demo"), Devices.read("24GiB")).fits
        True
    """
    loading = settings.loading
    size = sizes(settings.model, loading, devices.kind)
    layouts = [(n, alone) for n in _groups(devices, size) for alone in (False, True)]
    found = None
    for together, alone in layouts:
        stages = _stages(size, settings, devices, together, one_at_a_time=alone)
        peak = max(stage.peak for stage in stages)
        if found is None or peak <= _USED * devices.memory or together == devices.n:
            found = together, alone, stages, peak
        if peak <= _USED * devices.memory:
            break
    assert found is not None
    together, alone, stages, peak = found
    fits, replicas = peak <= _USED * devices.memory, devices.n // together
    return ScalePlan(
        model=settings.model,
        n_parameters=size.n_parameters,
        weights=size.weights,
        devices=str(devices),
        together=together,
        replicas=replicas,
        one_at_a_time=alone,
        fits=fits,
        peak=peak,
        stages=stages,
        slow=tuple(_slow(size, settings, devices, together, fits=fits)),
        command=_command(settings, devices, together, replicas, alone=alone),
    )


def _groups(devices: Devices, size: Sizes) -> list[int]:
    """Give the numbers of devices that can hold a copy of the model together, the smallest first."""
    most = devices.n
    return [n for n in range(1, most + 1) if most % n == 0 and (size.heads % n == 0 or n == most)]


def _stages(
    size: Sizes, settings: RunSettings, devices: Devices, together: int, *, one_at_a_time: bool
) -> tuple[Stage, ...]:
    """Add up what each stage holds on one of the devices that hold a copy together."""
    kind, select, measure = devices.kind, settings.select, settings.measure
    libraries = int(_LIBRARIES[kind] * GIB)
    weights = libraries + size.weights // together
    # Floats that are read from files of another type lie beside these until all are there.
    converted = size.stored if kind == "cpu" and size.stored != size.weights else 0
    longest = _PROMPT + measure.max_new_tokens
    row = size.cached * longest // min(together, size.kv_heads) + 8 * size.vocabulary
    free = max(0, devices.memory - weights)
    n_asked = max(measure.n_test or 0, select.n_choose if select is not None else 0)
    most = min(_AT_ONCE[kind], max(128 if kind == "cuda" else 1, free // 2 // row))
    batch = settings.batch_size or max(1, min(most, n_asked))
    answers = batch * (row + (_PROMPT - _SHARED) * size.token // together)
    tokens = min(_PASS[kind], 2 * settings.direction.n_prompts * _PROMPT)
    stages = [
        Stage(name="loading", peak=weights + converted),
        Stage(name="activations", peak=weights + tokens * size.token // together),
        Stage(name="answers", peak=weights + answers, batch=batch),
    ]
    if select is not None:
        stages.append(_descent(size, select.descent, weights, together))
    stages.append(Stage(name="saving", peak=weights + min(_EDIT_BYTES, size.edited)))
    # Several processes load the edited model whole; one reads back what the edit changed.
    second = 0 if one_at_a_time else size.edited if together == 1 else size.weights // together
    held = min(_HELD_LOGITS[kind], batch * measure.kl_tokens * size.vocabulary) * (2 * size.number + 4)
    stages.append(Stage(name="measuring", peak=weights + second + max(answers, held), batch=batch))
    return tuple(stages)


def _descent(size: Sizes, descent: GradientSettings, weights: int, together: int) -> Stage:
    """Add up what the gradients of a batch of refused and one of answered prompts keep, and the full logits of one."""
    tokens = 2 * descent.batch_size * (_PROMPT - _SHARED + descent.kl_tokens)
    logits = descent.batch_size * descent.kl_tokens * size.vocabulary * size.number
    kept = tokens * size.gradient // together
    return Stage(name="descent", peak=weights + max(kept, logits), batch=descent.batch_size)


def _slow(size: Sizes, settings: RunSettings, devices: Devices, together: int, *, fits: bool) -> list[str]:
    """Say what takes time, and what does not fit."""
    said = []
    if not fits:
        most = devices.n * devices.memory / GIB
        said.append(
            f"It does not fit: weights of {size.weights / GIB:.0f} GiB on {most:.0f} GiB; use more devices, fewer "
            "prompts at once (--batch-size), or a direction by hand (--select none)."
        )
    if size.stored > 10 * _DISK:
        said.append(f"Reading the weights: {size.stored / _DISK / 60:.1f} min at 2 GB a second.")
    edited = size.edited * size.stored / max(1, size.weights) if size.method is None else size.edited
    minutes = edited / size.rate / 60
    if minutes > 1:
        long = f"{minutes / 60:.1f} core-hours" if minutes > 60 else f"{minutes:.0f} core-minutes"
        said.append(f"Writing {edited / GIB:.0f} GiB of edited tensors: {long}, and half as many for the certificate.")
    if devices.kind == "cpu" and size.n_parameters > 3e9:
        said.append("Generation and gradients on a CPU: hours from a few billion parameters on.")
    if together > 1:
        bytes_of_token = 4 * size.n_layers * size.d_model * size.number
        said.append(
            f"{together} processes exchange about {bytes_of_token / 1e6:.1f} MB for each token, twice in each layer."
        )
    if together > _PER_NODE:
        said.append("The model spans nodes: these exchanges go over the network between them.")
    if size.method is not None:
        said.append(
            f"The weights stay {size.method} in memory, where the GPU and its kernels can; as floats they need "
            f"{size.n_parameters * 2 / GIB:.0f} GiB."
        )
    return said


def _command(settings: RunSettings, devices: Devices, together: int, replicas: int, *, alone: bool) -> str:
    """Write the line to type."""
    words = ["run", settings.model]
    if devices.n > 1:
        words += ["--tp", "auto"] if together > 1 else []
        words += ["--replicas", str(replicas)] if replicas > 1 else []
    words += ["--one-at-a-time"] if alone else []
    words += ["--device", "cpu"] if devices.kind == "cpu" else []
    words += ["--select", "none"] if settings.select is None else []
    words += ["--dtype", settings.loading.dtype] if settings.loading.dtype != "auto" else []
    if devices.n == 1:
        return " ".join(["remove-refusals", *words])
    nodes = -(-devices.n // _PER_NODE)
    several = ["--nnodes", str(nodes), "--rdzv-endpoint", "HOST:29500", "--rdzv-backend", "c10d"] if nodes > 1 else []
    each = str(devices.n // nodes)
    return " ".join(["torchrun", *several, "--nproc-per-node", each, "-m", "remove_refusals", *words])
