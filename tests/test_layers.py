"""The choice of layer and position: what its scores mean, that its short cuts cost nothing, and what it picks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import tiny
from conftest import Command
from own_answers import own_answers
from remove_refusals.cli.options import made
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import added, is_steerable
from remove_refusals.errors import ConfigurationError, NumericalError, SelectionError
from remove_refusals.measure.answers import Answered
from remove_refusals.measure.judges import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.chat_template import tail_positions
from remove_refusals.models.generate import Answer
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.progress import Progress
from remove_refusals.prompts import embedded_prompts
from remove_refusals.search.layers import (
    Bench,
    LayerRule,
    LayerScore,
    Option,
    make_options,
    narrow_down,
    ranked,
    search_layers,
)
from remove_refusals.search.material import Openings, OwnAnswers
from remove_refusals.search.search import select, split_for_search
from remove_refusals.settings import ChatFormat, LayerSettings, MeasureSettings, Rule, RunSettings, SelectSettings
from remove_refusals.types import Activations, DirectionOrigin, PromptSet
from zoo import build, inputs

N = 20


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def prompts() -> tuple[PromptSet, PromptSet]:
    first, second = (
        PromptSet(name, embedded_prompts(f"{name}_train").prompts[:N], "embedded") for name in ("harmful", "harmless")
    )
    return first, second


@pytest.fixture(scope="module")
def collected(loaded: LoadedModel, prompts: tuple[PromptSet, PromptSet]) -> tuple[Activations, Activations]:
    positions = tail_positions(loaded, -1)
    first, second = (collect_activations(loaded, part, positions=positions) for part in prompts)
    return first, second


@pytest.fixture(scope="module")
def own(loaded: LoadedModel, prompts: tuple[PromptSet, PromptSet]) -> OwnAnswers:
    harmful, harmless = (own_answers(loaded, part, 16) for part in prompts)
    return OwnAnswers(loaded, harmful.only(Label.REFUSAL), harmless.only(Label.COMPLIANCE))


@pytest.fixture(scope="module")
def bench(own: OwnAnswers) -> Bench:
    return Bench(own, kl_tokens=4)


@pytest.fixture(scope="module")
def options(collected: tuple[Activations, Activations]) -> list[Option]:
    return make_options(*collected)


def named(options: list[Option], name: str) -> Option:
    return next(option for option in options if option.name == name)


class TestOptions:
    def test_every_layer_below_the_limit_and_every_position_is_tried(
        self, loaded: LoadedModel, options: list[Option]
    ) -> None:
        positions = tail_positions(loaded, -1)
        assert positions[0] == -1 and len(positions) > 1
        assert tail_positions(dataclasses.replace(loaded, chat=ChatFormat(plain=True)), -3) == (-3,)
        found = {(option.index, option.direction.origin.position) for option in options}
        assert found == {(index, position) for index in range(1, 5) for position in positions}
        assert len(options) == 2 * len(found)

    def test_pushes_have_the_length_of_the_difference_along_the_direction(
        self, options: list[Option], collected: tuple[Activations, Activations]
    ) -> None:
        option = named(options, "layer 3, position -1, projected")
        difference = collected[0].hidden[:, 0, 3].mean(dim=0) - collected[1].hidden[:, 0, 3].mean(dim=0)
        column = option.direction.basis[:, 0]
        torch.testing.assert_close(option.push, column * (column @ difference), atol=1e-4, rtol=1e-4)

    def test_activations_that_are_not_finite_are_refused(self, collected: tuple[Activations, Activations]) -> None:
        hidden = collected[0].hidden.clone()
        hidden[0, 0, 1, 0] = torch.nan
        with pytest.raises(NumericalError, match="NaN"):
            make_options(dataclasses.replace(collected[0], hidden=hidden), collected[1])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_added_shifts_the_stream_of_each_row_by_its_own_vector(model_type: str) -> None:
    model = build(model_type)
    model_map = map_model(model)
    given = inputs(model)
    n_rows = given["input_ids"].shape[0]
    vectors = torch.randn(n_rows, model_map.d_model, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        handle = model.get_submodule(model_map.layers[1]).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            logits: torch.Tensor = model(**given).logits
        handle.remove()
        return logits

    before = run()
    with added(model, {1: vectors}):
        run()
    with added(model, {model_map.n_layers: vectors}):
        behind = run()
    after = run()
    torch.testing.assert_close(seen[1] - seen[0], vectors[:, None].expand_as(seen[0]), atol=1e-4, rtol=1e-4)
    assert torch.equal(seen[2], seen[0]) and float((behind - before).abs().max()) > 1e-3
    assert torch.equal(before, after)


class TestScores:
    def test_the_direction_induces_refusals_and_its_absence_bypasses_them(
        self, bench: Bench, options: list[Option]
    ) -> None:
        option = named(options, "layer 3, position -1, projected")
        # The opposite push makes refusals less likely, while taking it out is the same.
        opposite = dataclasses.replace(option, push=-option.push)
        score, other = bench.score([option, opposite], 12)
        assert score.bypass < -5 and score.refusal < 0.05
        assert score.induce > 1
        assert other.induce < score.induce
        assert other.bypass == pytest.approx(score.bypass, abs=1e-3)
        assert 0 < score.damage < 0.2

    def test_candidates_in_one_batch_are_scored_as_each_alone(self, bench: Bench, options: list[Option]) -> None:
        few = options[::7]
        together = bench.score(few, 5)
        for option, score in zip(few, together, strict=True):
            (alone,) = bench.score([option], 5)
            assert dataclasses.astuple(alone) == pytest.approx(dataclasses.astuple(score), abs=2e-3)

    def test_a_direction_that_is_nothing_to_the_model_scores_nothing(self, bench: Bench, options: list[Option]) -> None:
        still = dataclasses.replace(options[0], push=torch.zeros_like(options[0].push))
        assert bench.score([still], 5)[0].induce == pytest.approx(0.0, abs=1e-3)

    def test_where_sites_cannot_be_steered_one_direction_after_another_is_scored(self) -> None:
        loaded = LoadedModel(build("bloom"), tiny.tokenizer(), "tiny")
        model_map = map_model(loaded.model)
        assert not is_steerable(model_map)
        generator = torch.Generator().manual_seed(0)

        def drawn(n: int, length: int) -> list[tuple[int, ...]]:
            return [tuple(row) for row in torch.randint(3, 30, (n, length), generator=generator).tolist()]

        def made(label: Label) -> Answered:
            answers = tuple(Answer(text="", token_ids=tokens, finished=False) for tokens in drawn(3, 6))
            return Answered(PromptSet("drawn", ("a", "b", "c"), "drawn"), tuple(drawn(3, 5)), answers, (label,) * 3)

        bench = Bench(OwnAnswers(loaded, made(Label.REFUSAL), made(Label.COMPLIANCE)), kl_tokens=4)
        vectors = torch.randn(2, model_map.d_model, generator=generator)
        few = [
            Option(1, direction_from_vectors(vector, DirectionOrigin(method="test")), vector, str(number))
            for number, vector in enumerate(vectors)
        ]
        together = bench.score(few, 3)
        for option, score in zip(few, together, strict=True):
            assert dataclasses.astuple(bench.score([option], 3)[0]) == pytest.approx(
                dataclasses.astuple(score), abs=1e-4
            )
        assert abs(together[0].bypass - together[1].bypass) > 1e-4
        assert min(score.damage for score in together) > 1e-5

    def test_first_tokens_are_as_many_as_tell_refusals_apart(self) -> None:
        openings = Openings(((1, 2, 3), (1, 2, 4)))
        assert openings.telling_apart([(5, 6), (7,)]).prefixes == ((1,),)
        assert openings.telling_apart([(1, 6), (1, 7)]).prefixes == ((1, 2),)
        assert openings.telling_apart([(1, 2, 3)]).prefixes == openings.prefixes


class TestRanking:
    def test_limits(self) -> None:
        assert LayerScore(-5, 1, 0.1, 0.1).passes(0.1)
        assert not LayerScore(-5, 1, 0.1, 0.11).passes(0.1)
        assert not LayerScore(-5, 0, 0.1, 0.05).passes(0.1)

    def test_the_lowest_bypass_wins_and_ties_go_by_damage(self) -> None:
        scores = [
            LayerScore(-5.0, 1, 0.1, 0.01),
            LayerScore(-9.95, 1, 0.0, 0.02),
            LayerScore(-10.0, 1, 0.0, 0.09),
            LayerScore(-20.0, 1, 0.0, 0.50),
            LayerScore(-20.0, -1, 0.0, 0.01),
        ]
        assert ranked(scores, 0.1) == (1, 2, 0, 4, 3)

    def test_without_any_that_keeps_the_limits_those_that_bypass_go_by_damage(self) -> None:
        scores = [LayerScore(-1, 1, 0.9, 0.2), LayerScore(-10, 1, 0, 5.0), LayerScore(-6, 1, 0, 2.0)]
        assert ranked(scores, 0.1) == (2, 1, 0)
        assert ranked([LayerScore(2, 1, 1, 1.0), LayerScore(1, 1, 1, 2.0)], 0.1) == (1, 0)


class TestSearch:
    def test_dropping_early_finds_what_scoring_all_finds(self, bench: Bench, options: list[Option]) -> None:
        settings = LayerSettings(rounds=(4, 8))
        told: list[tuple[int, int]] = []
        search = narrow_down(bench, options, N, settings, Progress(lambda name, *done: told.append(done)))
        scores = bench.score(options, N)
        best = scores[ranked(scores, settings.max_kl)[0]]
        found = search.scores[search.order[0]]
        assert found.passes(settings.max_kl)
        assert found.bypass <= best.bypass + 0.02 * abs(best.bypass)
        assert len(search.candidates) == len(options) == len({candidate.name for candidate in search.candidates})
        assert set(search.order) <= set(range(settings.finalists))
        assert search.notes == ()
        # Those that were dropped later, with scores on more prompts, come before those that were dropped first.
        for place, n in ((0, N), (settings.finalists, 8), (settings.fewest, 4), (len(options) - 1, 4)):
            (score,) = bench.score([named(options, search.candidates[place].name)], n)
            assert search.scores[place].bypass == pytest.approx(score.bypass, abs=2e-3)
        assert told[-1][0] == told[-1][1]

    def test_where_no_direction_keeps_the_limits_it_is_said(self, bench: Bench, options: list[Option]) -> None:
        search = narrow_down(bench, options[:6], 4, LayerSettings(max_kl=0.0, rounds=(2, 4), fewest=4))
        assert len(search.notes) == 1 and "None of the 4 directions that came farthest, of 6," in search.notes[0]
        assert search.order == (0, 1, 2, 3)

    def test_activations_without_a_difference_are_an_error(
        self,
        loaded: LoadedModel,
        collected: tuple[Activations, Activations],
        own: OwnAnswers,
    ) -> None:
        with pytest.raises(SelectionError, match="differ at no layer"):
            search_layers(own, (collected[0], collected[0]), LayerSettings())

    def test_select_frees_the_demo_model_and_repeats_itself(self, loaded: LoadedModel) -> None:
        settings = SelectSettings(method="layer", n_choose=24, n_confirm=16)
        sets = embedded_prompts("harmful_train"), embedded_prompts("harmless_train")
        parts = split_for_search(*sets, 16, settings)
        answers = MeasureSettings(max_new_tokens=40)
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        found = select(loaded, parts, settings, answers)
        confirmation = found.candidate.confirmation
        assert confirmation is not None and confirmation.failures <= 0.1
        assert confirmation.broken is not None and confirmation.broken.value <= 0.1
        assert found.notes == () and found.method == "layer"
        assert str(found.rule) == "lowest odds of a refusal without the direction, at a KL of at most 0.1"
        (direction,) = found.intervention.directions
        assert f"layer {direction.origin.layer}, position {direction.origin.position}" in found.candidate.name
        assert {edit.kind for edit in found.intervention.edits} == {"embedding", "attn", "mlp"}
        assert {edit.strength for edit in found.intervention.edits} == {1.0}
        assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
        again = select(loaded, parts, settings, answers)
        assert again.record() == found.record()
        assert torch.equal(again.intervention.directions[0].basis, direction.basis)


class TestOption:
    def test_accepted_values(self) -> None:
        chosen = made(RunSettings, {"select": "layer", "max_kl": 0.3}).select
        assert chosen.method == "layer" and chosen.rule == Rule(max_kl=0.3)
        assert made(RunSettings, {"select": "none", "max_kl": 0.3}).select is None
        for given in ({"select": "auto"}, {}):
            assert made(RunSettings, given).select == SelectSettings()
        with pytest.raises(ConfigurationError, match="--select is 'best', expected one of auto, layer, none"):
            made(RunSettings, {"select": "best"})

    def test_the_rule_says_its_limit(self) -> None:
        assert str(LayerRule(max_kl=0.3)).endswith("at most 0.3")

    def test_run_chooses_by_layer(self, command: Command, tmp_path: Path) -> None:
        output = tmp_path / "edited"
        outcome = command(
            "run", "demo", "-o", output, "--select", "layer", "--n-prompts", 16, "--n-test", 8, "--max-new-tokens", 24
        )
        assert outcome.code == 0, outcome
        record = json.loads((output / "selection.json").read_text())
        assert record["method"] == "layer"
        assert record["candidates"][record["picked"]]["confirmation"]["refusals"]["count"] <= 3
