"""Greedy decoding behind a common beginning that is run once, with rows that leave the batch when they have ended."""

import sys
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

import tiny
import zoo
from remove_refusals.directions import collect_activations
from remove_refusals.errors import NumericalError
from remove_refusals.models import render
from remove_refusals.models.batches import hooked, left_padded
from remove_refusals.models.generate import (
    _end_token_ids,
    _finite,
    _run,
    _run_generate,
    answer_logits,
    begin,
    generate,
)
from remove_refusals.models.load import LoadedModel
from remove_refusals.types import PromptSet

BEGINNING = [7, 11, 23, 42, 31, 9]
ROWS = [BEGINNING + [(17 * index + 5 * n) % 90 + 5 for index in range(n)] for n in (2, 7, 1, 4, 9)]
SHARED = ("llama", "gpt2", "qwen2", "mistral", "gemma3_text", "qwen3_moe", "phi3")
WINDOWED = ("mistral", "gemma3_text")


@pytest.fixture(autouse=True)
def short_beginnings_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["remove_refusals.models.generate"], "_LEAST_SHARED", 1)


def loaded_model(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny.tokenizer(), "tiny")


def plain(loaded: LoadedModel, rows: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The answers of the model's own `generate`, each until an end token."""
    answers, ends = _run_generate(loaded, rows, n, _finite(loaded, rows, range(len(rows)))), _end_token_ids(loaded)
    return [next((row[: i + 1] for i, token in enumerate(row) if token in ends), row) for row in answers]


@pytest.mark.parametrize("model_type", SHARED)
def test_answers_and_logits_are_those_of_the_plain_way(model_type: str) -> None:
    loaded = loaded_model(zoo.build(model_type, **({"sliding_window": 40} if model_type in WINDOWED else {})))
    first = plain(loaded, ROWS, 12)
    # Tokens that some rows come to, each at another step.
    loaded.model.generation_config.eos_token_id = sorted(
        {row[min(step, len(row) - 1)] for row, step in zip(first, (2, 5, 3, 8, 1), strict=True)}
    )
    begun = begin(loaded, ROWS, 12)
    assert begun is not None
    assert begun.n_tokens == len(BEGINNING)
    sizes = []

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(tuple(kwargs["input_ids"].shape))

    with hooked(loaded.model, before=[("", note)]):
        found = [list(answer.token_ids) for answer in generate(loaded, ROWS, max_new_tokens=12)]
    assert found == plain(loaded, ROWS, 12)
    # The beginning by itself, its rest for all rows, then a token for each that goes on.
    assert sizes[:2] == [(1, len(BEGINNING)), (len(ROWS), 9)]
    assert [n for n, _ in sizes[2:]] == [
        sum(len(row) > step for row in found) for step in range(1, max(map(len, found)))
    ]
    with torch.inference_mode():
        logits, _ = _run(loaded, *begun.rest(loaded, ROWS))
        whole = loaded.model(**left_padded(loaded, ROWS)).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", [*SHARED, "falcon_h1", "git"])
def test_a_beginning_that_is_run_once_changes_neither_logits_nor_states(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_model(zoo.build(model_type, **({"sliding_window": 200} if model_type in WINDOWED else {})))
    kinds = ("rye", "wheat", "maize and oats")
    prompts = PromptSet("harmless", tuple(f"How do I bake bread of {kind}?" for kind in kinds), "own")
    rows, answers = render(loaded, prompts.prompts), [[9, 14, 3], [8], [30, 31, 32, 33]]

    def measured() -> tuple[torch.Tensor, torch.Tensor]:
        logits = answer_logits(loaded, rows, answers, 4).logits
        return logits, collect_activations(loaded, prompts, positions=(-2, -1)).hidden

    begun, first = begin(loaded, rows, 4), measured()
    assert (begun is not None and begun.n_tokens > 4) is (model_type in SHARED)
    monkeypatch.setattr(sys.modules["remove_refusals.models.generate"], "_LEAST_SHARED", 10**6)
    for found, expected in zip(first, measured(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["falcon_h1", "qwen3_next", "mamba", "bloom", "git"])
def test_models_that_cannot_go_on_from_a_cache_go_the_plain_way(model_type: str) -> None:
    loaded = loaded_model(zoo.build(model_type))
    assert begin(loaded, ROWS, 6) is None
    assert [list(answer.token_ids) for answer in generate(loaded, ROWS, max_new_tokens=6)] == plain(loaded, ROWS, 6)


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_window_that_an_answer_outgrows_has_no_padding_in_it(model_type: str) -> None:
    loaded = loaded_model(zoo.build(model_type, sliding_window=16))
    begun = begin(loaded, ROWS, 12)
    assert begun is not None
    assert begun.n_tokens == 0
    assert [list(answer.token_ids) for answer in generate(loaded, ROWS, max_new_tokens=12)] == plain(loaded, ROWS, 12)


def test_an_adapter_is_looked_through() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    loaded = loaded_model(model)
    assert begin(loaded, ROWS, 8) is not None
    found = [list(answer.token_ids) for answer in generate(loaded, ROWS, max_new_tokens=8)]
    assert found == plain(loaded_model(model.merge_and_unload()), ROWS, 8)


@pytest.mark.parametrize(
    "rows",
    [[BEGINNING, BEGINNING], [[5], [6, 7]], [BEGINNING, BEGINNING[:3]], [[*BEGINNING, 9], [8, *BEGINNING]]],
    ids=["the same", "nothing", "all of one", "an end"],
)
def test_whatever_prompts_have_in_common(rows: list[list[int]]) -> None:
    loaded = loaded_model(tiny.llama())
    assert [list(answer.token_ids) for answer in generate(loaded, rows, max_new_tokens=5)] == plain(loaded, rows, 5)


def test_memory_that_runs_out_behind_the_beginning_halves_the_batch() -> None:
    loaded = loaded_model(tiny.llama())
    sizes: list[int] = []

    def scarce(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError

    with hooked(loaded.model, before=[("", scarce)]):
        found = generate(loaded, ROWS, max_new_tokens=3)
    assert [list(answer.token_ids) for answer in found] == plain(loaded, ROWS, 3)
    assert max(sizes) == 5


def test_logits_that_stop_being_finite_name_the_prompt() -> None:
    loaded = loaded_model(tiny.llama())
    answers = plain(loaded, ROWS, 4)
    odd = next(index for index, row in enumerate(answers) if row[1] not in {t for other in answers for t in other[:1]})
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[answers[odd][1]] = float("nan")
    with pytest.raises(NumericalError, match=rf"prompt \d of {len(ROWS)}"):
        generate(loaded, ROWS, max_new_tokens=4)
