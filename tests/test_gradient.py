"""The search by gradients: each of its short cuts gives what the long way gives, and the demo model is freed by it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from own_answers import own_answers
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import Steer, ablated, is_steerable, steered
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import PromptError
from remove_refusals.measure.answers import Answered
from remove_refusals.measure.judges import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.generate import answer_logits
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import embedded_prompts
from remove_refusals.search.continuations import (
    frozen,
    is_packable,
    log_probabilities,
    make_probes,
    make_vocabulary,
    run_once,
)
from remove_refusals.search.material import (
    Openings,
    OwnAnswers,
    by_opening,
    damages,
    gather,
    learn_openings,
    refusal_probabilities,
    unlikelihood,
    with_declined,
)
from remove_refusals.search.search import select, split_for_search
from remove_refusals.settings import GradientSettings, MeasureSettings, Rule, SelectSettings
from remove_refusals.types import PromptSet
from zoo import build, inputs

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def model_map(loaded: LoadedModel) -> ModelMap:
    return map_model(loaded.model)


@pytest.fixture(scope="module")
def own(loaded: LoadedModel) -> dict[str, Answered]:
    sets = {name: embedded_prompts(f"{name}_train") for name in ("harmful", "harmless")}
    return {
        name: own_answers(loaded, PromptSet(name, part.prompts[:12], "embedded"), 16) for name, part in sets.items()
    }


class TestOpenings:
    @given(answers=st.lists(TOKENS, min_size=1, max_size=8))
    @settings(deadline=None)
    def test_every_answer_begins_with_one_opening_and_none_begins_another(self, answers: list[list[int]]) -> None:
        prefixes = learn_openings(answers, n_tokens=4).prefixes
        for answer in answers:
            assert sum(tuple(answer[: len(prefix)]) == prefix for prefix in prefixes) == 1
        for one in prefixes:
            assert not any(other != one and other[: len(one)] == one for other in prefixes)

    def test_branches(self) -> None:
        openings = Openings(((1, 2, 3), (1, 5), (4,)))
        assert openings.branches((1, 2, 3)) == ((4,), (5,), ())
        assert openings.branches((9, 9)) == ((1, 4), ())

    def test_more(self) -> None:
        assert set(learn_openings([*learn_openings([(1, 2)]).prefixes, (3, 4)]).prefixes) == {(1, 2), (3, 4)}


def test_what_declines_late_teaches_no_opening(own: dict[str, Answered]) -> None:
    """A model that begins to answer and then refuses would have every such beginning counted as a refusal."""
    answers = own["harmful"].at(range(4)).answers
    paths = [(7, 8), (5, 6), (9, 9), ()]
    made = tuple(answer.model_copy(update={"token_ids": ids}) for answer, ids in zip(answers, paths, strict=True))
    labels = (Label.REFUSAL, Label.REFUSAL, Label.MORALISING, Label.REFUSAL)
    declined = dataclasses.replace(own["harmful"].at(range(4)), answers=made, labels=labels)
    opening, late = by_opening(declined, [(5, 6), (5, 9), (7, 8)], [(7, 1), (7, 2), (5, 3)])
    assert opening.answers == (made[1],)
    assert late.answers == (made[0], made[2])


def test_what_is_still_declined_joins_and_what_declines_late_is_followed_farther(
    loaded: LoadedModel, own: dict[str, Answered]
) -> None:
    settings = GradientSettings(batch_size=4)
    refused, answered = own["harmful"].only(Label.REFUSAL), own["harmless"].only(Label.COMPLIANCE)
    material = gather(OwnAnswers(loaded, refused.at(range(4)), answered.at(range(4))), settings)
    long = refused.answers[5].model_copy(update={"token_ids": tuple(range(20, 44))})
    checked = refused.at([4, 5, 6])
    labels = (Label.REFUSAL, Label.MORALISING, Label.COMPLIANCE)
    checked = dataclasses.replace(checked, answers=(checked.answers[0], long, checked.answers[2]), labels=labels)
    more, share = with_declined(checked, material, settings)
    assert share == 2 / 3
    assert (len(more.refused), len(more.late)) == (5, 1)
    paths = [path for probe in more.refusal_probes for path in probe.paths]
    assert (tuple(range(20, 36)) in paths) and sorted(map(len, paths))[:-1] == [6] * 5
    assert not any(prefix[0] == 20 for prefix in more.openings.prefixes)
    again, _ = with_declined(checked, more, settings)
    assert (len(again.refused), len(again.late)) == (5, 1)


def random_direction(d_model: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_model, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mixtral", "olmo2", "cohere"])
def test_steering_is_what_the_hooks_do(model_type: str) -> None:
    model = build(model_type)
    model_map = map_model(model)
    assert is_steerable(model_map)
    vector = random_direction(model_map.d_model)
    intervention = intervene(direction_from_vectors(vector), model_map.n_layers, strength=0.7)
    steer = Steer(torch.tensor(0.7), vector)
    steers = {(edit.kind, edit.layer): lambda: steer for edit in intervention.edits}
    given = inputs(model)
    with torch.no_grad():
        plain = model(**given).logits
        with ablated(model, intervention):
            hooked = model(**given).logits
        with steered(model, steers):
            found = model(**given).logits
    assert (hooked - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, hooked, atol=1e-5, rtol=1e-5)


def test_each_row_may_have_its_own_strength_and_direction(loaded: LoadedModel, model_map: ModelMap) -> None:
    vectors = torch.stack([random_direction(model_map.d_model, seed) for seed in (1, 2)])
    strengths = torch.tensor([0.5, 1.5])
    ids = torch.arange(6).repeat(2, 1)

    def run(steer: Steer, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), steered(loaded.model, {("mlp", 2): lambda: steer}):
            return loaded.model(input_ids=rows).logits

    together = run(Steer(strengths, vectors), ids)
    for row in range(2):
        alone = run(Steer(strengths[row], vectors[row]), ids[:1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_gradients_agree_with_finite_differences(
    loaded: LoadedModel, model_map: ModelMap, own: dict[str, Answered]
) -> None:
    material = gather(
        OwnAnswers(loaded, own["harmful"].only(Label.REFUSAL), own["harmless"].only(Label.COMPLIANCE)),
        GradientSettings(),
    )
    probe = material.refusal_probes[0]
    vector = random_direction(model_map.d_model)

    def loss(strength: torch.Tensor) -> torch.Tensor:
        with steered(loaded.model, {("mlp", 2): lambda: Steer(strength, vector)}):
            found = log_probabilities(loaded, probe, material.vocabulary)
        return unlikelihood(refusal_probabilities(found, probe, material.openings, material.vocabulary))

    strength = torch.tensor(0.8, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(strength), strength)
    with torch.no_grad():
        # A wide step: where a refusal is nearly certain, -log(1 - p) has few digits in float32.
        difference = (loss(torch.tensor(0.9)) - loss(torch.tensor(0.7))) / 0.2
    assert abs(float(slope) - float(difference)) < 0.05 * abs(float(difference)) + 1e-4
    assert float(difference) != 0.0


class TestProbes:
    def test_the_reduced_head_gives_the_logits_of_the_whole_one(
        self, loaded: LoadedModel, own: dict[str, Answered]
    ) -> None:
        part = own["harmless"]
        answers = [answer.token_ids for answer in part.answers]
        (probe,) = make_probes(loaded, part.token_ids, answers, 5, 16)
        order = list(probe.prompts)
        direct = answer_logits(loaded, [part.token_ids[i] for i in order], [answers[i] for i in order], 5)
        with torch.no_grad():
            whole = log_probabilities(loaded, probe, None)
            tokens = torch.cat([torch.tensor([3, 77, 500]), probe.targets])
            vocabulary = make_vocabulary(loaded, tokens)
            reduced = log_probabilities(loaded, probe, vocabulary)
        torch.testing.assert_close(whole, direct.logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
        expected = whole[:, vocabulary.tokens].log_softmax(-1)
        torch.testing.assert_close(reduced, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(vocabulary.tokens[vocabulary.indices(probe.targets)], probe.targets)

    def test_going_on_from_what_was_kept_gives_what_the_whole_model_gives(
        self, loaded: LoadedModel, model_map: ModelMap, own: dict[str, Answered]
    ) -> None:
        part = own["harmless"]
        probes = make_probes(loaded, part.token_ids, [answer.token_ids for answer in part.answers], 5, 8)
        (kept, _), _ = run_once(loaded, probes, 3, 1e-3)
        assert kept.below is not None
        steers = {("mlp", 4): lambda: Steer(torch.tensor(1.0), random_direction(model_map.d_model))}
        with torch.no_grad(), steered(loaded.model, steers):
            whole = log_probabilities(loaded, probes[0], None)
            again = log_probabilities(loaded, kept, None)
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5)
        # What lies below is not run: nonsense in its place is what comes through.
        nonsense = dataclasses.replace(kept, below=torch.zeros_like(kept.below))
        with torch.no_grad():
            assert not torch.allclose(log_probabilities(loaded, nonsense, None), whole, atol=1e-2)

    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mixtral", "cohere2", "deepseek_v3"])
    def test_a_packed_batch_gives_what_a_padded_one_gives(self, model_type: str) -> None:
        loaded = LoadedModel(build(model_type), tiny.tokenizer(), model_type)
        ids, paths = [[3, 4, 5, 6, 7], [3, 4, 8], [3, 4, 9, 10]], [[11, 12, 13], [14, 15], [16]]
        assert is_packable(loaded, ids, paths, 3)
        with frozen(loaded, gradients=False):
            (padded,), (packed,) = (make_probes(loaded, ids, paths, 3, 3, packed=way, seed=1) for way in (False, True))
            # The two tokens that all begin with stand once.
            assert packed.inputs["input_ids"].shape == (1, 2 + (3 + 2) + (1 + 1) + 2)
            assert packed.prompts == padded.prompts
            assert torch.equal(packed.targets, padded.targets) and torch.equal(packed.rows, padded.rows)
            one, other = (log_probabilities(loaded, probe) for probe in (packed, padded))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "jamba", "bloom"])
    def test_a_model_that_keeps_a_state_is_not_packed(self, model_type: str) -> None:
        loaded = LoadedModel(build(model_type), tiny.tokenizer(), model_type)
        assert not is_packable(loaded, [[3, 4, 5, 6], [3, 4, 8]], [[11, 12], [14, 15]], 2)

    def test_the_model_is_left_as_it_was(self, loaded: LoadedModel, own: dict[str, Answered]) -> None:
        head = loaded.model.get_output_embeddings()
        assert "forward" not in vars(head)
        assert all("forward" not in vars(layer) for layer in loaded.model.model.layers)


def test_refusal_probability_is_the_sum_over_openings(loaded: LoadedModel, own: dict[str, Answered]) -> None:
    """Where other openings branch off with their last token, the sum is exact."""
    ids = own["harmful"].token_ids[0]
    path, branch = (5, 6, 7), (5, 9)
    openings = Openings((path, branch, (8,)))
    (probe,) = make_probes(loaded, [ids], [path], 3, 1)
    vocabulary = make_vocabulary(loaded, torch.arange(loaded.vocabulary_size))
    with torch.no_grad():
        found = log_probabilities(loaded, probe, vocabulary)
        total = refusal_probabilities(found, probe, openings, vocabulary)
        by_hand = 0.0
        for opening in openings.prefixes:
            along = answer_logits(loaded, [ids], [opening], len(opening))
            by_hand += float(along.logits.log_softmax(-1).gather(1, along.targets[:, None]).sum().exp())
    assert abs(float(total) - by_hand) < 1e-5 * max(1.0, by_hand)
    assert by_hand > 0


def test_the_first_token_may_count_for_a_share_of_the_damage(loaded: LoadedModel, own: dict[str, Answered]) -> None:
    part = own["harmless"].only(Label.COMPLIANCE)
    (probe,) = make_probes(loaded, part.token_ids, [answer.token_ids for answer in part.answers], 4, 16)
    with torch.no_grad():
        base = log_probabilities(loaded, probe)
        with steered(loaded.model, {("mlp", 2): lambda: Steer(torch.tensor(1.0), random_direction(128))}):
            found = log_probabilities(loaded, probe)
    along, half, first = (damages(found, base, probe, share) for share in (0.0, 0.5, 1.0))
    kl = torch.nn.functional.kl_div(found, base, reduction="none", log_target=True).sum(-1)
    by_prompt = [kl[probe.rows == row] for row in range(len(probe))]
    torch.testing.assert_close(along, torch.stack([values.mean() for values in by_prompt]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first, torch.stack([values[0] for values in by_prompt]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(half, (along + first) / 2)


def test_damage_is_zero_for_the_model_itself_and_positive_beside_it(
    loaded: LoadedModel, model_map: ModelMap, own: dict[str, Answered]
) -> None:
    material = gather(
        OwnAnswers(loaded, own["harmful"].only(Label.REFUSAL), own["harmless"].only(Label.COMPLIANCE)),
        GradientSettings(),
    )
    probe, base = material.damage_probes[0], material.base[0]
    steers = {("mlp", 3): lambda: Steer(torch.tensor(1.0), random_direction(model_map.d_model))}
    with torch.no_grad():
        same = damages(log_probabilities(loaded, probe, material.vocabulary), base, probe)
        with steered(loaded.model, steers):
            other = damages(log_probabilities(loaded, probe, material.vocabulary), base, probe)
    assert float(same.abs().max()) < 1e-5
    assert float(other.min()) > 0


class TestSelect:
    @pytest.fixture(scope="class")
    def quick(self) -> SelectSettings:
        descent = GradientSettings(targets=(0.05, 0.01), n_steps=16, n_more_steps=6)
        return SelectSettings(n_choose=32, n_confirm=16, descent=descent)

    def test_frees_the_demo_model_and_repeats_itself(self, loaded: LoadedModel, quick: SelectSettings) -> None:
        sets = embedded_prompts("harmful_train"), embedded_prompts("harmless_train")
        prompts = split_for_search(*sets, 16, quick)
        answers = MeasureSettings(max_new_tokens=40)
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        found = select(loaded, prompts, quick, answers)
        confirmation = found.candidate.confirmation
        assert confirmation is not None and confirmation.failures <= 0.1
        assert confirmation.damage is not None and confirmation.damage.value < 0.05
        assert found.notes == ()
        assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
        assert all(parameter.requires_grad for parameter in loaded.model.parameters())
        again = select(loaded, prompts, quick, answers)
        assert again.record() == found.record()
        for one, other in zip(found.intervention.directions, again.intervention.directions, strict=True):
            assert torch.equal(one.basis, other.basis)

    def test_a_position_outside_the_template_is_refused(self, loaded: LoadedModel, quick: SelectSettings) -> None:
        sets = embedded_prompts("harmful_train"), embedded_prompts("harmless_train")
        with pytest.raises(PromptError, match="-30"):
            select(loaded, split_for_search(*sets, 16, quick), quick, MeasureSettings(), position=-30)

    def test_no_prompt_is_in_two_parts(self, quick: SelectSettings) -> None:
        sets = embedded_prompts("harmful_train"), embedded_prompts("harmless_train")
        parts = split_for_search(*sets, 16, quick).sets()
        used = [prompt for part in parts for prompt in part.prompts]
        assert len(used) == len(set(used)) == 2 * (16 + 32 + 16)

    def test_a_candidate_that_cannot_be_confirmed_is_named(self, loaded: LoadedModel, quick: SelectSettings) -> None:
        """Descents that hardly move leave the refusals; the search says so and gives what came nearest."""
        sets = embedded_prompts("harmful_train"), embedded_prompts("harmless_train")
        still = GradientSettings(targets=(0.05,), n_steps=1, rate=1e-6, direction_rate=0.0, start=0.01, least=0.0)
        settings = quick.model_copy(update={"descent": still, "rule": Rule(max_refusals=0.05)})
        found = select(loaded, split_for_search(*sets, 16, settings), settings, MeasureSettings(max_new_tokens=24))
        assert len(found.notes) == 2
        assert "fell short" in found.notes[0] and "No candidate was confirmed" in found.notes[1]
