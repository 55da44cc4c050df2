"""Refusals of a quantised GGUF in llama.cpp, with and without the adapter, beside those of the edited checkpoint.

    python benchmarks/gguf_lora.py MODEL EDITED --donor FILE.gguf --prompts F --n 50

MODEL is a Gemma 3 directory and EDITED what `bake` or `run` made of it, whose intervention is used. A Q8_0 GGUF of
MODEL is written with the metadata of the donor, any GGUF of the same architecture and vocabulary. Then the same prompts
are answered greedily by four models: the Q8_0 file; the file with the adapter of `--as gguf-lora`; the file that
`--as gguf` made of it; and EDITED in Transformers, unless `--rows` names its answers as a run kept them. Needs the
extra `gguf` and llama-cpp-python.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama_cpp import Llama

from remove_refusals.baking.base import base_on_disk, open_checkpoint
from remove_refusals.baking.gguf import GgufNames, bake_gguf_lora
from remove_refusals.directions.intervention import load_intervention
from remove_refusals.measure.judges.phrases import judge_phrases
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.skeleton import skeleton_of
from remove_refusals.models.chat_template import render
from remove_refusals.models.checkpoint import checkpoint_tensors, read_tensor
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def main() -> None:
    """Parse the command line and print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("edited")
    parser.add_argument("--donor", required=True, type=Path)
    parser.add_argument("--prompts", required=True, type=Path, help="one harmful prompt a line")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--rows", type=Path, help="the rows.jsonl of EDITED, of as many tokens")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prompts = options.prompts.read_text(encoding="utf-8").splitlines()[: options.n]
    intervention = load_intervention(Path(options.edited))
    edited = load(options.edited)
    tokens = render(edited.tokenizer, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        base, lora, rewritten = (Path(scratch) / name for name in ("base.gguf", "lora.gguf", "edited.gguf"))
        write_gguf(options.model, options.donor, base)
        bake_gguf_lora(base_on_disk(open_checkpoint(options.model)), intervention, lora)
        bake_gguf(base, map_model(skeleton_of(options.model)), intervention, rewritten)
        print(f"Q8_0: {base.stat().st_size / 1e6:.0f} MB; adapter: {lora.stat().st_size / 1e6:.2f} MB", flush=True)
        for name, path, adapter in (
            ("Q8_0", base, None),
            ("Q8_0 with --lora", base, lora),
            ("Q8_0 edited by --as gguf", rewritten, None),
        ):
            start = time.perf_counter()
            model = Llama(
                str(path),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=1024,
                n_threads=options.threads,
                n_threads_batch=options.threads,
                verbose=False,
            )
            show(name, prompts, [answer(model, edited, ids, options.max_new_tokens) for ids in tokens], start)
            model.close()
    start = time.perf_counter()
    if options.rows is not None:
        known = kept(options.rows)
        answers = [known[prompt] for prompt in prompts]
    else:
        answers = [one.text for one in generate(edited, tokens, max_new_tokens=options.max_new_tokens)]
    show("the edited checkpoint", prompts, answers, start)


def kept(path: Path) -> dict[str, str]:
    """Read the edited model's answers from the rows of an evaluation, by their prompts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["prompt"]: row["text"] for row in rows if row["model"] == "edited"}


def write_gguf(model: str, donor: Path, path: Path) -> None:
    """Write a Gemma 3 directory as a Q8_0 GGUF file, as llama.cpp's converter does, with the metadata of another."""
    checkpoint = open_checkpoint(model)
    names = GgufNames(checkpoint.model_map)
    if names.architecture != "gemma3":
        raise SystemExit(f"{model} is of architecture {names.architecture}, expected gemma3.")
    writer = gguf.GGUFWriter(path, names.architecture)
    for key, value, kind, part in metadata(donor):
        if key not in ("general.architecture", "general.file_type", "general.quantization_version"):
            writer.add_key_value(key, value, kind, part)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, (file, entry) in checkpoint_tensors(checkpoint.directory).items():
        values = read_tensor(file, entry).to(torch.float32).numpy()
        stored = names.find(name)
        if stored is None:
            raise SystemExit(f"{name} has no tensor in GGUF files.")
        if values.ndim == 1:
            # Gemma multiplies by one more than its gains.
            writer.add_tensor(stored, values + 1)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Give a file's metadata: key, value, type, and the type of an array's parts."""
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("GGUF."):
            yield key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None


def answer(model: Llama, edited: LoadedModel, ids: Sequence[int], most: int) -> str:
    """Continue one prompt greedily in llama.cpp."""
    ends = edited.model.generation_config.eos_token_id
    found: list[int] = []
    for token in model.generate(list(ids), temp=0.0):
        if token in np.atleast_1d(ends) or len(found) == most:
            break
        found.append(token)
    text = edited.tokenizer.decode(found, skip_special_tokens=True)
    return str(text)


def show(name: str, prompts: Sequence[str], answers: Sequence[str], start: float) -> None:
    """Print how many answers are refusals, and degenerate."""
    labels = [judge_phrases(text, prompt) for text, prompt in zip(answers, prompts, strict=True)]
    counts = ", ".join(f"{labels.count(label)}/{len(labels)} {label}" for label in ("refusal", "degenerate"))
    print(f"{name:26} {counts} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
