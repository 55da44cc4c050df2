import dataclasses
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedModel

import tiny
import zoo
from remove_refusals.directions.activations import collect_activations, token_states
from remove_refusals.errors import ModelError, NumericalError, PromptError
from remove_refusals.models.batches import (
    accepts,
    check_prompts,
    contiguous_head,
    in_batches,
    left_padded,
    longest_first,
    n_positions,
)
from remove_refusals.models.generate import answer_logits, generate, stream
from remove_refusals.models.load import LoadedModel
from remove_refusals.progress import Progress
from remove_refusals.search.continuations import make_probes
from remove_refusals.settings import ChatFormat
from remove_refusals.types import PromptSet

TEXTS = (
    "a",
    "Tell me more.",
    "What is 2 + 2? Say it twice.",
    "xyz",
    "Why?",
    "A longer prompt than the others are, by far.",
)


MODEL = tiny.llama()


def loaded_model(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, tiny.tokenizer(), "tiny")


@pytest.fixture(scope="module", params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [tiny.tokenizer()(text)["input_ids"] for text in TEXTS]


def greedy_by_hand(model: PreTrainedModel, ids: Sequence[int], n: int) -> tuple[int, ...]:
    """One prompt, no padding, no cache, no generate."""
    sequence = list(ids)
    with torch.inference_mode():
        while len(sequence) < len(ids) + n:
            sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
            if sequence[-1] == tiny.tokenizer().eos_token_id:
                break
    return tuple(sequence[len(ids) :])


def test_left_padded(loaded: LoadedModel) -> None:
    inputs = left_padded(loaded, [[5, 6, 7], [8]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}


def test_position_ids_are_given_only_to_models_that_take_them(loaded: LoadedModel) -> None:
    assert set(left_padded(loaded, [[5]])) == {"input_ids", "attention_mask", "position_ids"}
    assert not accepts(loaded, "no_such_argument")


@pytest.mark.parametrize("ids", [[[]], [[1, 2], []]])
def test_prompts_without_tokens_are_refused(loaded: LoadedModel, ids: list[list[int]]) -> None:
    with pytest.raises(PromptError, match="0 tokens"):
        left_padded(loaded, ids)
    with pytest.raises(PromptError, match="0 tokens"):
        generate(loaded, ids)


def test_no_prompts_no_answers(loaded: LoadedModel) -> None:
    assert generate(loaded, []) == []


def test_prompts_that_do_not_fit_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match=r"has 500 tokens and 100 more .* at most 512"):
        generate(loaded, [[4], [4] * 500])
    with pytest.raises(ModelError, match=f"token {len(tiny.VOCABULARY)}, expected"):
        check_prompts(loaded, [[len(tiny.VOCABULARY)]])


@pytest.mark.parametrize("model_type", ["gpt2", "mpt", "llama"])
def test_no_pass_runs_what_the_model_has_no_positions_or_embeddings_for(model_type: str) -> None:
    loaded = LoadedModel(zoo.build(model_type), tiny.tokenizer(), model_type, chat=ChatFormat(plain=True))
    limit, rows = n_positions(loaded), loaded.model.get_input_embeddings().weight.shape[0]
    assert limit is not None
    passes: tuple[Callable[[list[int]], object], ...] = (
        lambda ids: token_states(loaded, ids, 1),
        lambda ids: make_probes(loaded, [ids[:-1]], [[*ids[-1:], 0]], 2, 1),
        lambda ids: answer_logits(loaded, [ids], [[5]], 1),
        lambda ids: list(stream(loaded, ids)),
    )
    for run in passes:
        with pytest.raises(ModelError, match=f"'aaaa.* has {limit + 1} tokens.* at most {limit} in all"):
            run([4] * (limit + 1))
        with pytest.raises(ModelError, match=f"has the token {rows}, expected tokens from 0 to {rows - 1}"):
            run([4, rows, 4])
    with pytest.raises(ModelError, match=f"prompt 'bbbb.* has {limit + 1} tokens, expected at most {limit}"):
        collect_activations(loaded, PromptSet("long", ("a", "b" * (limit + 1)), "test"))


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=20))
def test_longest_first_is_a_permutation_by_falling_length(token_ids: list[list[int]]) -> None:
    order = longest_first([len(ids) for ids in token_ids])
    lengths = [len(token_ids[index]) for index in order]
    assert sorted(order) == list(range(len(token_ids)))
    assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 20))
def test_backoff_covers_every_item_once_in_order(n: int, size: int, room: int) -> None:
    def function(batch: Sequence[int]) -> int:
        if len(batch) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return sum(batch)

    done = list(in_batches(loaded_model(MODEL), [1] * n, function, most=size))
    assert [item for batch, _ in done for item in batch] == list(range(n))
    assert all(result == sum(batch) and len(batch) <= room for batch, result in done)


def test_backoff_gives_up_with_one_prompt_and_knows_real_memory_errors() -> None:
    calls = []

    def function(batch: Sequence[int]) -> torch.Tensor:
        calls.append(len(batch))
        return torch.empty(2**58, dtype=torch.uint8)  # more than any machine has: PyTorch's own error

    with pytest.raises(ModelError, match="batch of 1"):
        list(in_batches(loaded_model(MODEL), [1] * 4, function, most=4))
    assert calls == [4, 2, 1]


def test_backoff_passes_other_errors_on() -> None:
    def function(batch: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(loaded_model(MODEL), [1] * 2, function, most=2))


def test_greedy_answers_do_not_depend_on_batch_size_or_padding(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    expected = [greedy_by_hand(loaded.model, ids, 12) for ids in prompts]
    assert len(set(expected)) == len(expected)
    for batch_size in (1, 2, 4, None):
        answers = generate(dataclasses.replace(loaded, batch_size=batch_size), prompts, max_new_tokens=12)
        assert [answer.token_ids for answer in answers] == expected


def test_answers_end_at_the_end_token(prompts: list[list[int]]) -> None:
    model = tiny.llama()
    plain = generate(loaded_model(model), prompts, max_new_tokens=12)
    stop = plain[1].token_ids[5]
    model.generation_config.eos_token_id = [stop]
    for before, after in zip(plain, generate(loaded_model(model), prompts, max_new_tokens=12), strict=True):
        at = before.token_ids.index(stop) if stop in before.token_ids else None
        assert after.finished == (at is not None or before.finished)
        assert after.token_ids == (before.token_ids if at is None else before.token_ids[: at + 1])
        kept = after.token_ids[:-1] if after.finished else after.token_ids
        assert after.text == "".join(tiny.VOCABULARY[token] for token in kept if token >= len(tiny.SPECIAL))
    assert any(answer.finished for answer in generate(loaded_model(model), prompts, max_new_tokens=12))


def test_the_models_generation_settings_do_not_leak_in(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    expected = generate(loaded, prompts, max_new_tokens=8)
    original = loaded.model.generation_config
    odd = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[token for answer in expected for token in answer.token_ids],
        min_new_tokens=8,
        num_beams=2,
        eos_token_id=2,
    )
    try:
        loaded.model.generation_config = odd
        assert generate(loaded, prompts, max_new_tokens=8) == expected
        assert loaded.model.generation_config is odd
    finally:
        loaded.model.generation_config = original


def test_progress_counts_up_to_all(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    seen: list[int] = []
    few = dataclasses.replace(loaded, batch_size=4)
    generate(few, prompts, max_new_tokens=1, progress=Progress(lambda _, done, total: seen.append(done)))
    assert seen == [4, 6]


def test_nan_logits_name_the_prompt(prompts: list[list[int]]) -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[prompts[3][0]] = float("nan")  # the letter x, in TEXTS[3] alone
    with pytest.raises(NumericalError, match=r"prompt 4 of 6 \('xyz'\)"):
        generate(dataclasses.replace(loaded_model(model), batch_size=4), prompts, max_new_tokens=1)
    with pytest.raises(NumericalError, match=r"prompt 4 of 6 \('xyz'\)"):
        answer_logits(loaded_model(model), prompts, [[4, 5]] * 6, 2)
    with pytest.raises(NumericalError, match="xyz"):
        list(stream(loaded_model(model), prompts[3]))


def test_stream_gives_the_answer_in_pieces(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    for ids in prompts[:3]:
        (answer,) = generate(loaded, [ids], max_new_tokens=20)
        assert "".join(stream(loaded, ids, max_new_tokens=20)) == answer.text
    pieces = list(stream(loaded, prompts[1] + tiny.tokenizer()(" ")["input_ids"], max_new_tokens=60))
    assert len(pieces) >= 1 and all(pieces)


def test_a_stream_ends_where_the_model_can_hold_no_more(loaded: LoadedModel) -> None:
    (answer,) = generate(loaded, [[4] * 507], max_new_tokens=5)
    assert "".join(stream(loaded, [4] * 507, max_new_tokens=50)) == answer.text


def test_leaving_a_stream_ends_its_thread(prompts: list[list[int]]) -> None:
    model = tiny.llama()
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    only_spaces = torch.nn.functional.one_hot(torch.tensor(tiny.VOCABULARY.index(" ")), len(tiny.VOCABULARY))
    model.lm_head.register_forward_hook(lambda *_: only_spaces.float().expand(1, 1, -1))  # they end words at once
    before = threading.active_count()
    pieces = stream(loaded_model(model), prompts[0], max_new_tokens=400)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    assert len(steps) < 400


def test_answer_logits_equal_a_plain_forward_pass(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    answers = [[7, 8, 9], [10], [], [11, 12, 13, 14, 15, 16], [17, 18], [2]]
    found = answer_logits(loaded, prompts, answers, 4)
    row = 0
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([prompt + answer])).logits[0]
        for offset, target in enumerate(answer[:4]):
            assert (int(found.rows[row]), int(found.offsets[row]), int(found.targets[row])) == (index, offset, target)
            expected = logits[len(prompt) - 1 + offset].log_softmax(-1)
            torch.testing.assert_close(found.logits[row].log_softmax(-1), expected, atol=2e-5, rtol=1e-5)
            row += 1
    assert row == len(found.rows) == len(found.logits) == 3 + 1 + 4 + 2 + 1


def test_answer_logits_of_empty_answers(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    found = answer_logits(loaded, prompts[:2], [[], []], 4)
    assert found.logits.shape == (0, len(tiny.VOCABULARY))


def test_the_head_sees_contiguous_input_only_inside_the_context(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    seen: list[bool] = []
    head = loaded.model.get_output_embeddings()
    batch = left_padded(loaded, prompts[:3])
    with torch.inference_mode(), contiguous_head(loaded):
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        loaded.model(**batch, logits_to_keep=1)
    with torch.inference_mode():
        loaded.model(**batch, logits_to_keep=1)
    handle.remove()
    assert seen == [True, False]
    assert not head._forward_pre_hooks
