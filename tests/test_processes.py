"""Several processes of one job, by gloo on the CPU: each layout gives what one process gives, and errors end all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

import spread
import tiny
from remove_refusals.errors import ModelError
from remove_refusals.models.distributed import layout_of
from remove_refusals.prompts import embedded_prompts
from remove_refusals.settings import LoadSettings

HERE = Path(__file__).parent
SENTENCE = re.compile(r"^Error: .*\.$", re.MULTILINE)
SIZES: dict[str, Any] = {
    "vocab_size": len(tiny.VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
ONE_KEY = {"num_key_value_heads": 1}
"""Heads for keys that two processes cannot share."""


def configurations() -> dict[str, PretrainedConfig]:
    common = {name: SIZES[name] for name in ("vocab_size", "initializer_range")}
    return {
        "llama": LlamaConfig(**SIZES),
        "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=8),
        "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS),
        "deepseek_v3": DeepseekV3Config(**{**SIZES, **LATENT}),
        "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        "gpt2": GPT2Config(**common, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=2),
        "llama-fetched": LlamaConfig(**{**SIZES, **ONE_KEY}),
        "qwen3_moe-fetched": Qwen3MoeConfig(**{**SIZES, **EXPERTS, **ONE_KEY}),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, config in configurations().items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, Any]:
    return {name: spread.computed(models / name) for name in configurations()}


def torchrun(*words: str, n: int = 2, timeout: int = 170, **environment: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), *words]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(call, env=env, capture_output=True, text=True, check=False, timeout=timeout)


LAYOUTS = {
    "tensor parallel, with its experts dealt out": ("auto", "none", "llama gemma2 qwen3_moe deepseek_v3 gpt_oss"),
    "each layer is fetched as it runs (FSDP2)": ("auto", "none", "llama-fetched qwen3_moe-fetched gpt2"),
    "2 processes hold a copy of the model each": ("none", "2", "llama qwen3_moe"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_what_one_process_gives(
    layout: str, models: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    tp, replicas, names = LAYOUTS[layout]
    found = torchrun(
        str(HERE / "spread.py"), str(tmp_path / "found"), tp, replicas, *(str(models / name) for name in names.split())
    )
    assert found.returncode == 0, found.stderr
    assert layout in found.stdout
    for process in (0, 1):
        for place, parts in torch.load(tmp_path / f"found.{process}.pt", weights_only=False).items():
            for what, expected in alone[Path(place).name].items():
                if isinstance(expected, torch.Tensor):
                    apart = float((parts[what] - expected).abs().max() / expected.abs().max())
                    assert apart < 1e-5, (process, place, what)
                else:
                    assert parts[what] == expected, (process, place, what)


def command(*words: str) -> list[str]:
    return ["-m", "remove_refusals", *words]


def test_what_does_not_fit_together_is_one_sentence(tmp_path: Path) -> None:
    call = [sys.executable, *command("run", "demo", "--tp", "auto", "-o", str(tmp_path / "x"))]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "--tp auto is given without torchrun" in found.stderr
    for words, said in (
        (("run", "demo", "-o", str(tmp_path / "x")), "without --tp or --replicas"),
        (("chat", "demo", "--no-ablation"), "The command chat was started 2 times"),
    ):
        found = torchrun(*command(*words))
        assert len(SENTENCE.findall(found.stderr)) == 1 and said in found.stderr
        assert "exitcode  : 2" in found.stderr or "exitcode: 2" in found.stderr
    assert not (tmp_path / "x").exists()


def test_pipeline_parallelism_is_refused() -> None:
    model = tiny.llama()
    model._is_distributed_loading_by_transformers = True
    model.config.distributed_config = type("Config", (), {"pp_size": 2})()
    with pytest.raises(ModelError, match="pp_size 2"):
        layout_of(model)


@pytest.mark.parametrize("value", ["0", "many", "-1"])
def test_a_number_of_processes_is_checked(value: str) -> None:
    with pytest.raises(ValueError, match="expected auto or a number of processes"):
        LoadSettings(tp=value)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that make a search short: it runs on some of the embedded prompts."""
    root = tmp_path_factory.mktemp("prompts")
    for name in ("harmful", "harmless"):
        prompts = embedded_prompts(f"{name}_train").prompts[:48]
        (root / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    files = ("--harmful", str(root / "harmful.txt"), "--harmless", str(root / "harmless.txt"))
    return (*files, "--n-test", "4", "--max-new-tokens", "8")


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]


def process_of(launcher: int, number: int) -> int | None:
    """Find one of the processes that torchrun has started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={number}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    return None


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_run_that_loses_a_process_goes_on_in_any_layout(few: tuple[str, ...], tmp_path: Path) -> None:
    alone = [sys.executable, *command("run", "demo", *few)]
    subprocess.run([*alone, "-o", str(tmp_path / "alone")], check=True, capture_output=True)
    together = ("run", "demo", "--tp", "2", *few, "-o", str(tmp_path / "spread"))
    log = tmp_path / ".spread.journal" / "stages.jsonl"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command(*together)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
        time.sleep(0.1)
    lost = process_of(launcher.pid, 1)
    assert lost is not None
    os.kill(lost, signal.SIGKILL)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and not (tmp_path / "spread").exists()
    # The other process may be ended before it can say what it has seen; torchrun says it in any case.
    assert len(SENTENCE.findall(said)) <= 1 and "SIGKILL" in said
    shutil.copytree(log.parent, tmp_path / ".other.journal")
    resumed = torchrun(*command(*together))
    assert resumed.returncode == 0, resumed.stderr
    other = subprocess.run([*alone, "-o", str(tmp_path / "other")], check=True, capture_output=True, text=True)
    for found in (resumed, other):
        assert found.stderr.count("Done before, and kept: answers, harmful_choose") == 1
    assert rows(tmp_path / "spread") == rows(tmp_path / "other") == rows(tmp_path / "alone")
    certificate = json.loads((tmp_path / "spread" / "certificate.json").read_text())
    assert not certificate["problems"]


def test_an_error_in_one_process_ends_all_with_its_sentence(few: tuple[str, ...], tmp_path: Path) -> None:
    words = " ".join(("run", "demo", "--replicas", "2", *few, "-o", str(tmp_path / "x")))
    script = tmp_path / "start.sh"
    # The second process alone is told of prompts that are not there.
    script.write_text(
        f"exec {sys.executable} -m remove_refusals {words} $([ $RANK = 1 ] && echo --alarming-test no.txt)\n"
    )
    found = torchrun("--no-python", "bash", str(script))
    assert found.returncode != 0
    assert len(SENTENCE.findall(found.stderr)) == 1 and "no.txt" in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start.sh"]


def test_the_other_commands_print_and_write_once(few: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("How do I bake a bread?\nHow do I paint a wall?\n")
    answers = ("generate", "demo", "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "8")
    found = torchrun(*command(*answers, "--tp", "auto", "-o", str(tmp_path / "two.jsonl")))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Saved 2 answers") == 1
    subprocess.run([sys.executable, *command(*answers, "-o", str(tmp_path / "one.jsonl"))], check=True)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
