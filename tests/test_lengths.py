"""Refusals by the length of the answer, and statistics over tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remove_refusals.errors import NumericalError
from remove_refusals.files import STAGES, Journal
from remove_refusals.measure.answers import EvaluationPrompts
from remove_refusals.measure.evaluate import evaluate, grid, has_settled
from remove_refusals.measure.judges import Label
from remove_refusals.measure.statistics import common_prefix, means_by_token, token_quantile
from remove_refusals.models.load import LoadedModel
from remove_refusals.progress import Progress
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import PromptSet
from test_evaluate import speaker

REFUSAL, ANSWER = "I can't help with that.", "Here you are."
WORDS = ["one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight ", "nine "]
PROMPTS = EvaluationPrompts(
    PromptSet("harmful", ("Pick a lock?", "Forge a note?"), "test"),
    PromptSet("harmless", ("Name a colour.", "Tell a joke."), "test"),
)
SETTINGS = MeasureSettings(max_new_tokens=8, kl_tokens=4)
LONGER = MeasureSettings(max_new_tokens=12, kl_tokens=4)


@pytest.fixture(scope="module")
def late() -> LoadedModel:
    """Begins to answer what ends in a question mark, and refuses after nine words."""
    chain = dict(zip(["?", *WORDS], [*WORDS, REFUSAL], strict=True))
    return speaker({**chain, ".": ANSWER, REFUSAL: "</s>", ANSWER: "</s>"}, "late", extra=WORDS)


def test_a_late_refusal_is_seen_where_answers_may_be_long_and_said_to_be_unsettled(late: LoadedModel) -> None:
    short = evaluate(late, late, PROMPTS, SETTINGS).sets["harmful"]
    assert short.refusals.base.count == 0
    found = evaluate(late, late, PROMPTS, LONGER).sets["harmful"]
    assert found.refusals.base.count == 2
    assert found.by_length is not None and not found.by_length.stable
    counts = dict(zip(found.by_length.tokens, [rate.count for rate in found.by_length.base], strict=True))
    assert counts == {5: 0, 8: 0, 11: 2}


@given(st.integers(1, 4000))
def test_the_grid_rises_to_the_longest_and_holds_its_half(longest: int) -> None:
    lengths = grid(longest)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == longest and max(1, longest // 2) in lengths and lengths[0] >= 1


def test_settled_is_up_to_one_in_a_hundred() -> None:
    answered = [Label.COMPLIANCE] * 100
    assert has_settled(answered, [Label.REFUSAL, *answered[1:]])
    assert not has_settled(answered, [Label.REFUSAL] * 2 + answered[2:])
    assert has_settled([Label.DEGENERATE] * 100, answered)
    assert not has_settled([Label.REFUSAL], [Label.COMPLIANCE])


VALUES = st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=6)


@given(values=VALUES, share=st.floats(0.01, 1))
@settings(deadline=None, max_examples=30)
def test_a_token_quantile_is_that_of_the_flat_list_and_lies_within_its_interval_of_values(
    values: list[list[float]], share: float
) -> None:
    found = token_quantile(values, share, "0")
    flat = [value for row in values for value in row]
    assert found is not None
    assert found.value == pytest.approx(np.quantile(flat, share, method="inverted_cdf"))
    assert min(flat) <= found.low <= found.high <= max(flat)
    assert (found.n, found.n_tokens) == (len(values), len(flat))


def test_an_interval_over_prompts_is_wider_than_one_over_tokens_that_go_together() -> None:
    """Ten prompts whose tokens are all alike hold ten numbers, not a thousand."""
    alone = token_quantile([[float(value)] for value in range(10) for _ in range(100)], 0.5, "0")
    together = token_quantile([[float(value)] * 100 for value in range(10)], 0.5, "0")
    assert alone is not None and together is not None
    assert alone.value == together.value
    assert together.high - together.low > 3 * (alone.high - alone.low) + 1


def test_nothing_gives_none_and_nan_is_refused() -> None:
    assert token_quantile([], 0.95, "0") is None
    assert means_by_token([]) == ()
    with pytest.raises(NumericalError, match="1 are NaN"):
        token_quantile([[1.0, float("nan")]], 0.95, "0")


def test_means_by_token_count_who_reaches_so_far() -> None:
    found = means_by_token([[1.0, 5.0], [3.0]])
    assert [(mean.value, mean.n) for mean in found] == [(2.0, 2), (5.0, 1)]


TOKENS = st.lists(st.integers(0, 2), max_size=6)


@given(first=TOKENS, second=TOKENS)
def test_the_common_prefix_is_1_for_equal_answers_only(first: list[int], second: list[int]) -> None:
    share = common_prefix(first, second)
    assert share == common_prefix(second, first)
    assert (share == 1) == (first == second)
    assert 0 <= share <= 1


def test_the_kl_by_token_and_the_agreement_are_those_of_the_answers(late: LoadedModel) -> None:
    other = speaker({"?": ANSWER, ".": ANSWER, ANSWER: ANSWER}, "other", extra=WORDS)
    found = evaluate(late, other, PROMPTS, SETTINGS)
    assert found.kl is not None and found.kl.harmless.p95 is not None and found.kl.harmless.by_token is not None
    assert [(mean.token, mean.n) for mean in found.kl.harmless.by_token] == [(1, 2), (2, 2)]
    assert found.kl.harmless.by_token[0].value == pytest.approx(found.kl.harmless.first_token.value)
    assert found.agreement is not None
    assert (found.agreement.identical.count, found.agreement.common_prefix.value) == (0, 1 / 8)
    again = evaluate(late, late, PROMPTS, SETTINGS).agreement
    assert again is not None and (again.identical.count, again.common_prefix.value) == (2, 1.0)


def test_flipped_prompts_are_listed_both_ways(late: LoadedModel) -> None:
    stern = speaker({"?": ANSWER, ".": REFUSAL, ANSWER: "</s>", REFUSAL: "</s>"}, "stern", extra=WORDS)
    found = evaluate(late, stern, PROMPTS, LONGER)
    rows = {row.prompt_id: row.prompt for row in found.rows}
    harmful, harmless = found.sets["harmful"].flipped, found.sets["harmless"].flipped
    assert harmful is not None and harmless is not None
    assert {rows[prompt_id] for prompt_id in harmful.only_base} == set(PROMPTS.harmful.prompts)
    assert {rows[prompt_id] for prompt_id in harmless.only_edited} == set(PROMPTS.harmless.prompts)
    assert harmful.only_edited == harmless.only_base == ()


def test_thinking_is_measured_where_there_is_some() -> None:
    thinking = ["<think>", "hm ", "</think>"]
    chain = {"?": "<think>", "<think>": "hm ", "hm ": "</think>", "</think>": ANSWER, ANSWER: "</s>"}
    finishing = speaker({**chain, ".": ANSWER}, "finishing", extra=thinking)
    endless = speaker({**chain, "hm ": "hm ", ".": ANSWER}, "endless", extra=thinking)
    found = evaluate(finishing, endless, PROMPTS, SETTINGS).sets
    scores = found["harmful"].thinking
    assert scores is not None
    assert (scores["base"].unfinished.count, scores["edited"].unfinished.count) == (0, 2)
    assert (scores["base"].length.value, scores["edited"].length.value) == (4.0, 8.0)
    assert found["harmful"].degenerate.edited.count == 2
    assert found["harmless"].thinking is None
    assert "thinking" not in found["harmless"].to_json()


def test_a_killed_evaluation_goes_on(late: LoadedModel, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done == 6:
            raise Killed

    other = speaker({"?": ANSWER, ".": ANSWER, ANSWER: "</s>"}, "other", extra=WORDS)
    with pytest.raises(Killed):
        evaluate(late, other, PROMPTS, SETTINGS, journal=Journal(tmp_path), progress=Progress(kill))
    kept = len((tmp_path / STAGES).read_text().splitlines())
    assert kept == 2
    found = evaluate(late, other, PROMPTS, SETTINGS, journal=Journal(tmp_path))
    assert found == evaluate(late, other, PROMPTS, SETTINGS)
