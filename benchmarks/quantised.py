"""Edits of quantised weights on disk, and their certificates: bytes per CPU second, in each format.

    python benchmarks/quantised.py [--rows 7168] [--columns 2048] [--formats fp8,mxfp4,int4,nvfp4]

One expert's down projection in each format, of random numbers, is edited and measured as `bake` and `certify` do it,
on one thread. The hash is of the written file, and the error the certificate's: another version of the program gives
the same, or says with them what it lost. To compare with one:

    git worktree add ../before COMMIT && PYTHONPATH=../before/src python benchmarks/quantised.py
"""

import argparse
import hashlib
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from remove_refusals.baking.certificate import deviation
from remove_refusals.baking.shards import FilePlan, TensorEdit, fingerprint, write_shard
from remove_refusals.directions import PlanEntry
from remove_refusals.models import checkpoint_tensors, find_block_tensor, read_header

NAME = "down_proj.weight"
MEMORY = 192 << 20
"""What each of four workers has of the default of 1 GiB."""

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e2m1(sizes: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, two in a byte."""
    codes = torch.bucketize(sizes, (E2M1[1:] + E2M1[:-1]) / 2) | (negative.long() << 3)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def quantised(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Store `[d_model, n]` in a format."""
    rows, columns = weight.shape
    if kind == "fp8":
        scales = weight.view(rows // 128, 128, columns // 128, 128).abs().amax((1, 3)) / 448
        numbers = weight / scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return {NAME: numbers.to(torch.float8_e4m3fn), f"{NAME}_scale_inv": scales}
    groups = weight.unflatten(1, (-1, 16 if kind == "nvfp4" else 32))
    largest = groups.abs().amax(-1, keepdim=True)
    if kind == "mxfp4":
        exponents = torch.ceil(torch.log2(largest / 6))
        numbers = e2m1(groups.abs() / 2**exponents, groups < 0)
        return {f"{NAME}_blocks": numbers[None], f"{NAME}_scales": (exponents[..., 0] + 127).to(torch.uint8)[None]}
    if kind == "nvfp4":
        whole = 448 * 6 / weight.abs().max()
        scales = (largest / 6 * whole).to(torch.float8_e4m3fn)
        numbers = e2m1(groups.abs() / (scales.float() / whole), groups < 0).flatten(1)
        return {f"{NAME}_packed": numbers, f"{NAME}_scale": scales[..., 0], f"{NAME}_global_scale": whole.reshape(1)}
    scales = (largest / 7.5).to(torch.bfloat16)
    codes = (groups / scales.float()).round().clamp(-8, 7).flatten(1).to(torch.int64) + 8
    words = (codes.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {f"{NAME}_packed": words, f"{NAME}_scale": scales[..., 0], f"{NAME}_shape": torch.tensor(weight.shape)}


def measured(kind: str, rows: int, columns: int, folder: Path) -> str:
    """Edit and certify one tensor; give a row of the table."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    basis = torch.nn.functional.normalize(torch.randn(rows, 1, generator=generator), dim=0)
    (folder / "after").mkdir()
    save_file(quantised(kind, weight), folder / "model.safetensors", metadata={"format": "pt"})
    before = checkpoint_tensors(folder)
    block = find_block_tensor(NAME, before, (128, 128))
    assert block is not None
    entry = PlanEntry(NAME, "mlp", 0, block.shape, 1, 1.0, basis, ())
    edits = {place[1].name: (TensorEdit(place[1], 1, entry, block),) for place in (block.weights, block.scales)}
    source = folder / "model.safetensors"
    file = FilePlan(read_header(source), fingerprint(source), edits, {})
    size = source.stat().st_size
    times = [time.process_time()]
    write_shard(file, folder / "after" / source.name, "plain", MEMORY, lambda: False)
    times.append(time.process_time())
    after = find_block_tensor(NAME, checkpoint_tensors(folder / "after"), (128, 128))
    assert after is not None
    found = deviation(block, after, entry, "plain", MEMORY)
    times.append(time.process_time())
    edit, certificate = (size / 1e6 / (end - start) for start, end in pairwise(times))
    digest = hashlib.sha256((folder / "after" / source.name).read_bytes()).hexdigest()[:12]
    left, error = (found.after / found.before) ** 0.5, (found.error / found.original) ** 0.5
    return f"{kind:6} {size / 1e6:8.1f} {edit:12.1f} {certificate:12.1f}   {digest}  {left:.2e}  {error:.4f}"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=7168)
    options.add_argument("--columns", type=int, default=2048)
    options.add_argument("--formats", default="fp8,mxfp4,int4,nvfp4")
    given = options.parse_args()
    torch.set_num_threads(1)
    print("format     MB   edit, MB/s  certify, MB/s  hash          share left  error / weight")
    for kind in given.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(measured(kind, given.rows, given.columns, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
