"""Tiny checkpoints on disk, and their edit there."""

import torch

import tiny
import zoo
from remove_refusals.baking.base import open_base
from remove_refusals.baking.disk import bake
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.models.load import LoadedModel
from remove_refusals.progress import Progress
from remove_refusals.settings import DiskSettings, EditSettings
from remove_refusals.types import DirectionOrigin


def taken_out(rank=1, **options):
    vectors = torch.randn(zoo.D_MODEL, rank, generator=torch.Generator().manual_seed(5))
    return intervene(direction_from_vectors(vectors, DirectionOrigin(method="given")), zoo.N_LAYERS, **options)


def saved(folder, model_type, dtype=torch.bfloat16, shards="1GB", **overrides):
    """A saved tiny model, and the same loaded, in float32."""
    model = zoo.build(model_type, **overrides).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shards)
    tiny.tokenizer().save_pretrained(folder / "base")
    return LoadedModel(model.float(), tiny.tokenizer(), str(folder / "base"), checkpoint_dtype=dtype)


def streamed(folder, intervention, name="streamed", *, on_progress=None, force=False, **options):
    """The edit of `base`; options of how files are written go where they belong."""
    disk = {key: options.pop(key) for key in ("memory", "jobs", "certify") if key in options}
    more = {"disk": DiskSettings(**disk), "progress": Progress(on_progress), "force": force}
    return bake(open_base(folder / "base"), intervention, folder / name, EditSettings(**options), **more)
