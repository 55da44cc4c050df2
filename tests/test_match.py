"""Whether answers answer their prompts: told by the likelihoods of a model, here mostly the demo's own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from remove_refusals.measure import (
    Answered,
    EvaluationPrompts,
    Label,
    Rate,
    answer_match,
    evaluate,
    is_poor_match,
    labelled,
    wilson_rate,
)
from remove_refusals.measure.match import MOST_ANSWERS, N_OTHERS, Pair, _log_likelihoods, _partners
from remove_refusals.models import Answer, LoadedModel, generate, load, render
from remove_refusals.progress import SILENT
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import PromptSet


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def answered(demo: LoadedModel) -> Answered:
    """Harmless prompts that the demo model answers, with its answers."""
    prompts = PromptSet("harmless", embedded_prompts("harmless_test").prompts[:30], "test")
    ids = render(demo, prompts.prompts)
    return labelled(prompts, ids, generate(demo, ids, max_new_tokens=24)).only(Label.COMPLIANCE)


def test_answers_are_told_from_those_to_other_prompts(demo: LoadedModel, answered: Answered) -> None:
    n = len(answered)
    moved = replace(answered, answers=answered.answers[5:] + answered.answers[:5])
    # Every fifth answer is moved, so that four of 5 and what is told by chance match.
    mixed = [answered.answers[(i + 5) % n if i % 5 == 0 else i] for i in range(n)]
    one = replace(answered, answers=(answered.answers[0],) * n)
    own, foreign, partly, same = answer_match(demo, answered, moved, replace(answered, answers=tuple(mixed)), one)
    assert own is not None and foreign is not None and partly is not None and same is not None
    assert own.count >= n - 3 and (own.n, own.prompts_sha256) == (n, answered.prompts.sha256)
    assert foreign.value < 0.35 and 0.65 < partly.value < 1 and foreign.n == n
    assert same.count == 0 and same.n == n
    assert is_poor_match(foreign, own) and is_poor_match(same, own) and not is_poor_match(own, own)


def test_an_evaluation_says_which_answers_answer_their_prompts(demo: LoadedModel) -> None:
    drawn = (draw(embedded_prompts(f"{name}_test"), 12, 0) for name in ("harmful", "harmless"))
    scores = evaluate(demo, demo, EvaluationPrompts(*drawn), MeasureSettings(max_new_tokens=16, kl_tokens=4)).sets
    # It refuses the harmful ones.
    assert scores["harmful"].match is None and "match" not in scores["harmful"].to_json()
    match = scores["harmless"].match
    assert match is not None and match["base"] == match["edited"] and match["base"].count >= match["base"].n - 1 >= 9


def test_what_is_no_answer_is_left_out(demo: LoadedModel, answered: Answered) -> None:
    n = len(answered)
    labels = [Label.REFUSAL, Label.MORALISING, Label.DEGENERATE, Label.UNJUDGED, Label.DEFLECTION]
    found, few = answer_match(
        demo,
        replace(answered, labels=(*labels, *[Label.COMPLIANCE] * (n - 5))),
        replace(answered, labels=(*[Label.COMPLIANCE] * N_OTHERS, *[Label.REFUSAL] * (n - N_OTHERS))),
    )
    assert found is not None and found.n == n - 4
    assert found.prompts_sha256 == answered.at(range(4, n)).prompts.sha256
    assert few is None
    assert not is_poor_match(few, found) and not is_poor_match(found, few)


def test_what_was_thought_is_no_part_of_the_answer(demo: LoadedModel, answered: Answered) -> None:
    def thinking(answer: Answer, thought: str) -> Answer:
        text = f"<think>{thought}</think>{answer.text}"
        return Answer(text=text, token_ids=tuple(demo.tokenizer(text)["input_ids"]), finished=True)

    texts = [answer.text for answer in answered.answers]
    thought = tuple(thinking(answer, texts[at - 1]) for at, answer in enumerate(answered.answers))
    unfinished = tuple(answer.model_copy(update={"text": f"<think>{answer.text}"}) for answer in answered.answers)
    of_thinking, of_unfinished = answer_match(
        demo, replace(answered, answers=thought), replace(answered, answers=unfinished)
    )
    # As good as without, and that the answers thought of are the wrong ones changes nothing.
    assert of_thinking is not None and of_thinking.count >= len(answered) - 3
    assert of_unfinished is None


def test_the_likelihood_is_that_of_one_plain_pass() -> None:
    loaded = LoadedModel(tiny.llama(), tiny.tokenizer(), "tiny", batch_size=3)
    pairs: list[Pair] = [((5, 9, 20), (7, 8)), ((6,), (30, 31, 32, 2)), ((40, 41, 42, 43), (11,)), ((6, 7), (2,))]
    for (prompt, answer), found in zip(pairs, _log_likelihoods(loaded, pairs, SILENT).values(), strict=True):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        along = logits.log_softmax(-1)[range(len(answer)), list(answer)]
        assert found == pytest.approx(float(along.sum()), abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=40))
def test_an_answer_is_compared_with_others_that_differ(drawn: list[tuple[int, int]]) -> None:
    pairs: list[Pair] = [((prompt,), (answer,)) for prompt, answer in drawn]
    found = _partners(pairs)
    assert len(found) == len(pairs)
    for at, others in enumerate(found):
        differing = [
            other for other, (prompt, answer) in enumerate(pairs) if pairs[at][0] != prompt and pairs[at][1] != answer
        ]
        assert len(others) == min(N_OTHERS, len(differing)) == len(set(others))
        assert set(others) <= set(differing)


def test_of_many_answers_some_are_drawn(demo: LoadedModel, answered: Answered) -> None:
    times = MOST_ANSWERS // len(answered) + 1
    many = answered.at([*range(len(answered))] * times)
    (found,) = answer_match(demo, many)
    assert found is not None and found.n == MOST_ANSWERS


def test_a_match_is_poor_if_it_is_clearly_below_the_models_own() -> None:
    def rate(count: int, n: int = 32) -> Rate | None:
        return wilson_rate(count, n, "")

    assert is_poor_match(rate(10), rate(32)) and is_poor_match(rate(6), rate(20))
    # Too near, or too few to tell.
    assert not is_poor_match(rate(29), rate(32))
    assert not is_poor_match(rate(2, 5), rate(12, 20))
