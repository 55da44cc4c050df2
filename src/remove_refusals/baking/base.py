"""A model that something is made from, in memory or on disk: its map, its tensors, a plan, and what records say."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remove_refusals.directions import EditPlan, describe_direction, load_directions, resolve
from remove_refusals.errors import CheckpointError, DirectionError, ModelError, RecordError
from remove_refusals.files import read_json, versions, write_json
from remove_refusals.modelmap import (
    DiskTensor,
    ModelMap,
    StoredNames,
    map_model,
    name_for,
    saved_shapes,
    skeleton,
    skeleton_of,
    stored_names,
)
from remove_refusals.models import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    LoadedModel,
    Place,
    cached_commit,
    check_editable,
    checkpoint_tensors,
    file_hashes,
    find_block_tensor,
    fp8_block,
    has_adapter,
    is_spread,
    licence_fields,
    local_directory,
    model_source,
    plain_shapes,
    quiet,
    read_tensor,
    refuse_adapter,
    same_bytes,
    saved_dtype,
    weights_directory,
)
from remove_refusals.report import AblationRecord, AdapterRecord, BaseRecord, DirectionRecord, PlanRecord
from remove_refusals.settings import VARIANTS, EditSettings, Variant
from remove_refusals.types import Intervention

MODIFIED = "The refusal direction was taken out of this model's weights; it is not the base model."
ADAPTED = "With this adapter the refusal direction is taken out; the base model's files are unchanged."

PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """A tensor that the files get where nothing is tied any more: a stored one's, as it was or as the edit makes it."""

    source: str
    edited: bool


@dataclass(frozen=True, eq=False)
class Base:
    """A model that something is made from; where it has files, its own weights are not looked at and may be missing.

    `converted` is where its weights are as safetensors, if they are not in `directory`.
    """

    model: PreTrainedModel
    source: str
    revision: str | None = None
    directory: Path | None = None
    converted: Path | None = None
    trust_remote_code: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def name(self) -> str:
        """What records call the model: a hub id, or the last part of a path."""
        return Path(self.source).resolve().name if Path(self.source).is_dir() else self.source

    @property
    def model_map(self) -> ModelMap:
        """Its map."""
        return map_model(self.model)

    @property
    def files(self) -> Path:
        """Where its files are, which there have to be."""
        assert self.directory is not None
        return self.directory

    @property
    def weights(self) -> Path:
        """Where its safetensors files are."""
        return self.converted or self.files

    def as_safetensors(self, scratch: Path) -> "Base":
        """Give the same base with its weights as safetensors; what has other files, or none, gets some in `scratch`."""
        if self.directory is None:
            with quiet(bars=True):
                self.model.save_pretrained(scratch, max_shard_size="4GB")
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(scratch)
            return replace(self, directory=scratch)
        return self if has_safetensors(self.files) else replace(self, converted=convert(self.files, scratch))

    @cached_property
    def stored(self) -> Mapping[str, Place | torch.Tensor]:
        """What the files hold; of .bin files the tensors, mapped into memory."""
        found: dict[str, Place | torch.Tensor] = {}
        if has_safetensors(self.weights):
            found |= checkpoint_tensors(self.weights)
        else:
            for path in pickled_files(self.weights):
                found |= _read_pickled(path)
        return found

    @cached_property
    def names(self) -> StoredNames:
        """What its files' tensors become in the model; of one without files, those that saving it would write."""
        return stored_names(
            self.model, saved_shapes(self.model) if self.directory is None else plain_shapes(self.stored)
        )

    def tensor(self, parameter: str) -> torch.Tensor:
        """Read a parameter whole; what is fused in memory alone is put together."""
        own: torch.Tensor = self.model.get_parameter(parameter)
        if self.directory is None:
            return own.detach()
        names = self.names.of(parameter)
        found = {name: part for name in names if (part := self._read(name)) is not None}
        if not names or len(found) < len(names):
            raise CheckpointError(
                f"The checkpoint {self.directory} has no tensor that holds parameter '{parameter}' in a format that is "
                "known, expected one; use an unquantised checkpoint as `save_pretrained` writes it."
            )
        whole = self.names.load(parameter, found)
        if whole.shape != own.shape:
            raise CheckpointError(
                f"The checkpoint {self.directory} has {len(found)} tensors for parameter '{parameter}', of the shapes "
                f"{[tuple(part.shape) for part in found.values()]}, expected {tuple(own.shape)} together; check that "
                "config.json and weights belong together."
            )
        return whole

    def _read(self, name: str) -> torch.Tensor | None:
        """Read a tensor of the files whole, as floats where blocks of its numbers share a scale."""
        held = self.stored.get(name)
        if isinstance(held, torch.Tensor):
            return held
        places = cast("Mapping[str, Place]", self.stored)
        block = find_block_tensor(name, places, fp8_block(described(self.directory)))
        if block is None:
            return None if held is None else read_tensor(*held)
        (floats,) = block.floats(sys.maxsize)
        # Transformers turns MXFP4's experts round.
        return floats.mT.contiguous() if block.dtype == "MXFP4" else floats.squeeze(0)

    def plan(self, intervention: Intervention, settings: EditSettings | None = None) -> EditPlan:
        """Resolve an intervention against it; an embedding that the files hold twice is edited as they hold it."""
        return self.named(resolve(intervention, self.model_map, self.tensor, settings))

    def named(self, plan: EditPlan) -> EditPlan:
        """Say where the files hold what a plan edits."""
        entries = [
            replace(entry, on_disk=self.names.tensors(entry.parameter, entry.axis % len(entry.shape)))
            for entry in plan.entries
        ]
        as_one = plan.tied is not None and not plan.untie and self.directory is not None
        for index, entry in enumerate(entries):
            if as_one and entry.parameter == self.model_map.input_embedding and entry.on_disk:
                own, first = {tensor.name for tensor in entry.on_disk}, entry.on_disk[0]
                twins = sorted(name for name in self._embedding_names - own if self._same(name, first.name))
                named = (*entry.on_disk, *(DiskTensor(name, first.axis) for name in twins))
                entries[index] = replace(entry, on_disk=named)
        return replace(plan, entries=tuple(entries))

    def as_stored(self) -> "Base":
        """Give the same base, embedding and unembedding two where the files hold them with different bytes.

        So does Transformers when it loads them, whatever the configuration says.
        """
        is_tied = self.model_map.tied and self.directory is not None
        stored = [name for name in self._embedding_names if name in self.stored] if is_tied else []
        if all(self._same(name, stored[0]) for name in stored[1:]):
            return self
        return replace(self, model=skeleton(self.model, tied=False))

    def added(self, plan: EditPlan) -> dict[str, Copy]:
        """Say which tensors the files need where a plan unties the embedding, and what is in them."""
        added: dict[str, Copy] = {}
        for group in self._tied_parameters if plan.untie else ():
            stored = next((names for names in map(self._names_of, group) if names), ())
            edited = not any(self.model_map.input_embedding in names for names in group)
            for aliases in group:
                if not self._names_of(aliases) and len(stored) == 1:
                    added[name_for(self._apart, aliases[0])] = Copy(stored[0], edited)
        return added

    def places(self, plan: EditPlan, parameter: str) -> tuple[str, ...]:
        """Name every place of a parameter in the model where a plan edits it, which leaves out what it unties."""
        own = self.model.get_parameter(parameter)
        named = self.model.named_parameters(remove_duplicate=False)
        kept = (aliases for group in self._tied_parameters if plan.untie for aliases in group if parameter in aliases)
        return next(kept, tuple(name for name, value in named if value is own))

    def _names_of(self, aliases: tuple[str, ...]) -> tuple[str, ...]:
        return next((names for names in map(self.names.of, aliases) if names), ())

    @cached_property
    def _embedding_names(self) -> frozenset[str]:
        """The names on disk of what shares the embedding's memory, its own included."""
        own = self.model_map.input_embedding
        groups = ({name for aliases in group for name in aliases} for group in self._tied_parameters)
        shared = next((names for names in groups if own in names), {own})
        return frozenset(name for parameter in shared for name in self.names.of(parameter))

    @cached_property
    def _apart(self) -> PreTrainedModel:
        """The model without weights and with nothing tied."""
        return skeleton(self.model, tied=False)

    @cached_property
    def _tied_parameters(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """What is one parameter as long as the embedding is tied, and several if not: groups of all their names."""
        if not self.model_map.tied:
            return ()
        groups: dict[int, dict[int, list[str]]] = {}
        for name, value in skeleton(self.model).named_parameters(remove_duplicate=False):
            apart = id(self._apart.get_parameter(name))
            groups.setdefault(id(value), {}).setdefault(apart, []).append(name)
        return tuple(tuple(map(tuple, group.values())) for group in groups.values() if len(group) > 1)

    def _same(self, first: str, second: str) -> bool:
        """Whether the files hold the same under two names."""
        one, other = self.stored.get(first), self.stored.get(second)
        if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
        return one is not None and other is not None and same_bytes(one, other)

    def ablation(
        self,
        intervention: Intervention,
        plan: EditPlan,
        known: Mapping[str, str] | None = None,
        adapter: AdapterRecord | None = None,
    ) -> AblationRecord:
        """Say from what a model or an adapter was made and how; of `known` files the SHA-256 was computed before."""
        path, config = Path(self.source), described(self.directory)
        local = path.is_dir()
        dtype = saved_dtype(str(self.directory), config) if self.directory is not None else self.model.dtype
        return AblationRecord(
            modified=MODIFIED if adapter is None else ADAPTED,
            adapter=adapter,
            base=BaseRecord(
                source=self.name,
                revision=self.revision,
                model_type=self.model_map.model_type,
                dtype=None if dtype is None else str(dtype).removeprefix("torch."),
                sha256=file_hashes(path, known) if local and self.directory is not None else None,
                card=licence_fields(path) or None if local else None,
            ),
            directions=tuple(DirectionRecord(**describe_direction(one)) for one in intervention.directions),
            intervention=intervention.edits,
            plan=PlanRecord(
                edited=tuple(entry.parameter for entry in plan.entries),
                left=dict(plan.left),
                variant=plan.variant,
                embedding_untied=plan.untie,
                tied_in_base=self.model_map.tied,
                tied=plan.tied,
            ),
            versions=versions(),
        )


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has its weights as safetensors."""
    return any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def has_weights(directory: Path) -> bool:
    """Whether a directory has weights in a format that can be edited."""
    return has_safetensors(directory) or any((directory / name).is_file() for name in (PICKLED_FILE, PICKLED_INDEX))


def open_base(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """Map a checkpoint from its configuration and headers: a directory, a hub id (downloaded if need be), or `demo`."""
    name = model_source(source)
    check_editable(name, revision)
    directory = weights_directory(name, revision)
    refuse_adapter(name, revision=revision, local_files_only=True)
    if directory is None or not has_weights(directory):
        raise CheckpointError(
            f"The model {source} has no {SINGLE_FILE}, {INDEX_FILE}, {PICKLED_FILE} or {PICKLED_INDEX}, expected one "
            "of them; check the path."
        )
    if not hasattr(os, "preadv"):
        raise CheckpointError("This system has no positioned reads, expected Linux, macOS or another Unix.")
    if has_safetensors(directory):
        checkpoint_tensors(directory)
    _check_not_rotated(directory)
    model = skeleton_of(directory, trust_remote_code=trust_remote_code)
    revision = None if Path(name).is_dir() else directory.name
    return Base(model, name, revision, directory, trust_remote_code=trust_remote_code).as_stored()


def base_of(model: "Base | LoadedModel | str | Path") -> Base:
    """Give the base that a loaded model was loaded from, or of a checkpoint by its name; one in memory has no files."""
    if isinstance(model, Base):
        return model
    if not isinstance(model, LoadedModel):
        return open_base(model)
    refuse_layers_with_adapter(model.model)
    directory = local_directory(model.source, model.revision)
    if directory is not None:
        # The files of a model from the hub may not all be here: Transformers brings those that it reads.
        directory = weights_directory(model.source, model.revision)
    if directory is None or not has_weights(directory):
        return Base(model.model, model.source, model.revision, tokenizer=model.tokenizer)
    elsewhere = model.is_offloaded or is_spread(model.model)
    if elsewhere or getattr(model.model.config, "quantization_config", None) is not None:
        return open_base(model.source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    _check_not_rotated(directory)
    return Base(model.model, model.source, model.revision, directory, trust_remote_code=model.trust_remote_code)


def refuse_layers_with_adapter(model: PreTrainedModel) -> None:
    """Refuse to edit weights that an adapter of PEFT adds to: what it writes along the direction would be left."""
    if has_adapter(model):
        raise ModelError(
            f"The {type(model).__name__} has an adapter of PEFT in its layers, expected weights alone, since saving it "
            "would save the adapter without the edit; merge it first: `model = model.merge_and_unload()`."
        )


def check_unchanged(base: Base, model: PreTrainedModel) -> None:
    """Check that a model in memory is what the files hold that an edit would be made from, in its own data type."""
    for name, own in model.named_parameters():
        if base.directory is None or own.is_meta or own.dtype not in FLOAT_DTYPES.values() or not base.names.of(name):
            continue
        if not torch.equal(base.tensor(name).to(own.device, own.dtype), own):
            raise ModelError(
                f"Parameter '{name}' is not what its file in {base.directory} holds, expected a model that was not "
                "changed in memory; save it with `save_pretrained` and give that directory, or load it again."
            )


def _check_not_rotated(directory: Path) -> None:
    """Check that no rotation is applied around what layers compute, as compressed-tensors can: it is in no tensor."""
    config = described(directory)
    for key in ("quantization_config", "compression_config"):
        part: Any = config.get(key)
        transforms = part.get("transform_config") if isinstance(part, dict) else None
        if isinstance(transforms, dict) and (groups := transforms.get("config_groups")):
            raise CheckpointError(
                f"The checkpoint {directory} has rotations in {key}.transform_config ({', '.join(map(str, groups))}), "
                "expected none: a tensor's own output is not what reaches the residual stream; use an unquantised "
                "checkpoint of this model."
            )


def described(directory: Path | None) -> dict[str, Any]:
    """Read a checkpoint's config.json; what is none is empty."""
    config = None if directory is None else read_json(directory / "config.json", error=CheckpointError)
    return config if isinstance(config, dict) else {}


def load_intervention(directory: Path) -> Intervention:
    """Read the intervention that a directory was made with, which can be resolved against the same base again."""
    record = AblationRecord.read(directory / "ablation.json", error=DirectionError)
    # What only silences experts may have no direction.
    return Intervention(load_directions(directory) if record.directions else (), record.intervention)


def recorded_edit(directory: Path, given: EditSettings) -> EditSettings:
    """Give the settings of an edit, of which its record says what is not given: the variant and the tied embedding."""
    record = AblationRecord.read(directory / "ablation.json", error=DirectionError)
    known = {"variant": variant_of(record)} | ({} if record.plan.tied is None else {"tied": record.plan.tied.asked})
    return given.model_copy(update={name: one for name, one in known.items() if name not in given.model_fields_set})


def variant_of(record: AblationRecord) -> Variant:
    """Give the variant of an edit, if this version has it."""
    found = next((known for known in VARIANTS if known == record.plan.variant), None)
    if found is None:
        raise CheckpointError(
            f"The record names the variant {record.plan.variant!r}, expected one of {', '.join(VARIANTS)}; use the "
            "version of this package that made it."
        )
    return found


def check_base(record: BaseRecord, model: str, made: Path, revision: str | None = None) -> None:
    """Check by hashes, or by its commit on the hub, that a model is the one that something was made from."""
    place = local_directory(model, revision)
    if place is None:
        return
    differing: list[str] = []
    if record.sha256 is not None:
        now = file_hashes(place)
        differing = sorted(name for name, sha in record.sha256.items() if now.get(name) != sha)
    elif record.revision is not None and cached_commit(model, revision) not in (None, record.revision):
        differing = [f"commit {place.name}"]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise RecordError(
            f"This is not the base: {made} was made from {record.source}, and {differing[0]}{more} of {model} "
            f"{'differ' if more else 'differs'} from its record, expected the same; give the model that it was made "
            "from."
        )


def pickled_files(directory: Path) -> tuple[Path, ...]:
    """Find the .bin files of a checkpoint: the single file, or else the shards that the index names."""
    if (directory / PICKLED_FILE).is_file():
        return (directory / PICKLED_FILE,)
    index = read_json(directory / PICKLED_INDEX, error=CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    for name in names or [""]:
        if Path(name).name != name or not name.endswith(".bin") or not (directory / name).is_file():
            raise CheckpointError(
                f"The index {directory / PICKLED_INDEX} names the shard {name!r}, expected a .bin file in the same "
                "directory; download the checkpoint again."
            )
    return tuple(directory / name for name in names)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read one file; what is in it is tensors and no code is run."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # The format from before PyTorch 1.6 cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The weight file {path} cannot be read ({str(error).strip().splitlines()[0] if str(error) else 'empty'}), "
            "expected plain tensors; do not load it in any other way, but look for safetensors files."
        ) from error
    for name, tensor in found.items() if isinstance(found, dict) else [("its content", found)]:
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.dtype in _NAMES
        if not plain or not isinstance(name, str):
            what = f"of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise CheckpointError(
                f"The weight file {path} has {name!r}, {what}, expected tensors that safetensors can hold; use a "
                "safetensors checkpoint of this model."
            )
    return dict(found)


def convert(directory: Path, target: Path) -> Path:
    """Write the .bin files of a checkpoint as safetensors files, shard by shard, shared memory once for each name."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    paths = pickled_files(directory)
    for path in paths:
        stem = path.stem.removeprefix("pytorch_").replace("pytorch_model", "model")
        name = SINGLE_FILE if len(paths) == 1 else f"{stem}.safetensors"
        tensors = {key: tensor for key, tensor in _read_pickled(path).items() if key not in weight_map}
        total += _write(tensors, target / name)
        weight_map |= dict.fromkeys(tensors, name)
        # With the times of the .bin files the same base is known again.
        times = path.stat()
        os.utime(target / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)
    return target


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> int:
    """Write one safetensors file, tensor by tensor, large numbers first, so that all of them are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in names:
        stop = place + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [place, stop]}
        place = stop
    with path.open("wb") as file:
        file.write(header_bytes(header))
        for name in names:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return place


def header_bytes(described: Mapping[str, object]) -> bytes:
    """Give what stands before the data of a safetensors file."""
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
