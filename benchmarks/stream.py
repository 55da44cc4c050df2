"""The edit on disk against `cp -r` and against loading, editing and saving: wall time and peak memory.

    python benchmarks/stream.py DIRECTORY [--gigabytes 8] [--steps cp,edit,certified,loaded] [--runs 1] [--rest 20]

Makes a Llama-like checkpoint in bfloat16 with shards of 2 GB in DIRECTORY (one random block over and over), edits it,
and removes all of it again. Each step is a process of its own; it begins with the checkpoint out of the page cache and
ends when the output is on the disk. `imports` is a process that only imports: what of the time is start-up, and the
peak memory that the others' is to be held against.

A virtual machine may give freed memory back to its host after some seconds, and fetch it again page by page, which can
cost more than all else. What starts at once when the last output was deleted would find that memory still there, and
what first imports for four seconds would not; so each step waits until it is gone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHARD_BYTES = 2_000_000_000
WIDTH, HIDDEN, HEADS, KEY_VALUE, VOCABULARY = 4096, 14336, 32, 8, 32000

MAKE = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig
from remove_refusals.directions import direction_from_vectors, save_direction
sys.path.insert(0, str(Path(sys.argv[1])))
import stream
stream.write_checkpoint(Path(sys.argv[2]), float(sys.argv[3]))
vector = torch.randn(stream.WIDTH, generator=torch.Generator().manual_seed(0))
save_direction(direction_from_vectors(vector), Path(sys.argv[2]) / "direction.safetensors")
"""

IMPORTS = """
from remove_refusals import baking, cli, directions
from transformers.models.llama import modeling_llama
"""

LOADED = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from remove_refusals.directions import load_direction
from remove_refusals.formula import project_out_in_place
from remove_refusals.modelmap import map_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
basis = load_direction(Path(sys.argv[2])).basis
with torch.inference_mode():
    for site in map_model(model).sites:
        for writer in site.writers:
            project_out_in_place(model.get_parameter(writer.parameter).data, basis, 1.0, writer.axis)
model.save_pretrained(sys.argv[3], max_shard_size="2GB")
"""


def tensor_shapes(gigabytes: float) -> dict[str, tuple[int, int] | tuple[int]]:
    """The tensors of a Llama of that size, in the order of a checkpoint."""
    shapes: dict[str, tuple[int, int] | tuple[int]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    narrow = WIDTH // HEADS * KEY_VALUE
    layer: dict[str, tuple[int, int] | tuple[int]] = {
        "self_attn.q_proj.weight": (WIDTH, WIDTH),
        "self_attn.k_proj.weight": (narrow, WIDTH),
        "self_attn.v_proj.weight": (narrow, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, WIDTH),
        "mlp.gate_proj.weight": (HIDDEN, WIDTH),
        "mlp.up_proj.weight": (HIDDEN, WIDTH),
        "mlp.down_proj.weight": (WIDTH, HIDDEN),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    ends = 2 * 2 * VOCABULARY * WIDTH
    n_layers = max(1, round((gigabytes * 1e9 - ends) / sum(map(n_bytes, layer.values()))))
    for index in range(n_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def n_bytes(shape: tuple[int, ...]) -> int:
    """The size of a tensor in bfloat16."""
    size = 2
    for length in shape:
        size *= length
    return size


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    """Write config, index and shards."""
    import torch
    from transformers import LlamaConfig

    shapes = tensor_shapes(gigabytes)
    directory.mkdir(parents=True)
    LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE,
        num_hidden_layers=sum("o_proj" in name for name in shapes),
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)
    block = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    raw = block.view(torch.uint8).numpy().data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(n_bytes, shards[-1].values())) + n_bytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, path.name)
        header, place = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard.items():
            offsets = [place, place + n_bytes(shape)]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
            place = offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                left = n_bytes(shape)
                while left:
                    left -= file.write(raw[: min(left, len(raw))])
    index = {"metadata": {"total_size": sum(map(n_bytes, shapes.values()))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def flush(directory: Path, *, evict: bool) -> None:
    """Wait until a directory's files are on the disk, and let the page cache forget them if asked to."""
    for path in directory.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if evict:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(base: Path, output: Path, *command: object) -> dict[str, float]:
    """Run a process with the base out of the cache, and flush its output; give seconds, and peak memory in MiB."""
    flush(base, evict=True)
    begun = time.monotonic()
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}.")
    ended = time.monotonic()
    flush(output, evict=False)
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "of_that_flush": round(time.monotonic() - ended, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    """Make the checkpoint, run the steps, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--steps", default="cp,edit,certified,loaded")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--rest", type=float, default=20.0, help="Seconds to wait before each step.")
    parser.add_argument("--memory", default="1GiB")
    options = parser.parse_args()
    base, output = options.directory / "base", options.directory / "out"
    direction = base / "direction.safetensors"
    python, command = sys.executable, [shutil.which("remove-refusals") or "remove-refusals"]
    bake = [*command, "bake", base, "--direction", direction, "-o", output, "--memory", options.memory]
    steps = {
        "cp": ["cp", "-r", base, output],
        "edit": [*bake, "--no-certify"],
        "certified": bake,
        "loaded": [python, "-c", LOADED, base, direction, output],
    }
    if base.exists():
        raise SystemExit(f"{base} exists already; give another directory.")
    try:
        subprocess.run([python, "-c", MAKE, Path(__file__).parent, base, str(options.gigabytes)], check=True)
        found: dict[str, object] = {
            "bytes": sum(path.stat().st_size for path in base.iterdir()),
            "cores": os.cpu_count(),
            "imports": measured(base, output, python, "-c", IMPORTS),
        }
        for number in range(options.runs):
            for name in options.steps.split(","):
                time.sleep(options.rest)
                found[f"{name}-{number}"] = measured(base, output, *steps[name])
                print(json.dumps({name: found[f"{name}-{number}"]}), file=sys.stderr, flush=True)
                shutil.rmtree(output)
        print(json.dumps(found, indent=2))
    finally:
        shutil.rmtree(options.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
