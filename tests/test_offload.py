"""A model whose weights stay on the disk gives what one in memory gives."""

import weakref
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

import tiny
from remove_refusals.baking import base_of, load_changed, write_baked
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import direction_from_vectors, find_direction
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ModelError
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, in_turn, load
from remove_refusals.pipeline import run
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    LoadSettings,
    MeasureSettings,
    PromptSource,
    RunSettings,
)
from remove_refusals.types import DirectionOrigin, PromptSet

PROMPTS = PromptSet("p", ("Name a colour.", "Tell a joke please.", "Why?"), "test")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def offloaded(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    # So little memory that the layers stay on the disk.
    return load(directory, device_map="auto", offload=tmp_path_factory.mktemp("offload"), max_memory="40KB")


def test_activations_answers_and_hooks_are_the_same(directory: Path, offloaded: LoadedModel) -> None:
    loaded = load(directory)
    assert offloaded.is_offloaded and not loaded.is_offloaded
    first, second = (collect_activations(one, PROMPTS).hidden for one in (loaded, offloaded))
    torch.testing.assert_close(first, second)
    vector = torch.randn(first.shape[-1], generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="test")), 2)
    answers = []
    for one in (loaded, offloaded):
        with ablated(one.model, intervention):
            answers.append(generate(one, [[5, 6, 7], [8, 9]], max_new_tokens=6))
    assert answers[0] == answers[1]


def settings(directory: Path, tmp_path: Path, loading: LoadSettings) -> RunSettings:
    def prompts(name: str, words: str) -> PromptSource:
        (tmp_path / name).write_text("".join(f"Please {word} it\n" for word in words.split()))
        return PromptSource(source=str(tmp_path / name))

    return RunSettings(
        model=str(directory),
        loading=loading,
        direction=DirectionSettings(
            harmful=prompts("a", "steal break burn"), harmless=prompts("b", "bake water paint"), n_prompts=3
        ),
        edit=EditSettings(strength=0.5),
        measure=MeasureSettings(
            harmful=prompts("c", "rob hack"),
            harmless=prompts("d", "cook sing"),
            alarming=prompts("e", "kill shoot"),
            max_new_tokens=4,
            kl_tokens=2,
        ),
        select=None,
    )


def test_every_weight_is_read_once_for_all_prompts(directory: Path, offloaded: LoadedModel, tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []
    layer = offloaded.model.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape[:1])))
    try:
        wanted = settings(directory, tmp_path, LoadSettings()).direction
        found = find_direction(offloaded, wanted)
    finally:
        handle.remove()
    assert calls == [(6,)]
    expected = find_direction(load(directory), wanted)
    torch.testing.assert_close(found.directions[0].basis, expected.directions[0].basis, atol=1e-5, rtol=1e-4)


def test_a_run_edits_the_files_to_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    loading = LoadSettings(device_map="auto", offload=str(tmp_path / "offload"), max_memory="40KB", dtype="float32")
    run(settings(directory, tmp_path, loading), tmp_path / "one")
    run(settings(directory, tmp_path, LoadSettings()), tmp_path / "other")
    names = {path.name for path in (tmp_path / "other").iterdir()}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    one, other = (load(tmp_path / name).model.state_dict() for name in ("one", "other"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4)


def test_what_does_not_go_together_is_refused(directory: Path) -> None:
    with pytest.raises(ModelError, match="without a device map"):
        load(directory, max_memory="1GiB")
    with pytest.raises(ModelError, match="'much'"):
        load(directory, device_map="auto", max_memory="much")


def test_base_and_edited_take_turns_in_memory_and_give_the_same(directory: Path, tmp_path: Path) -> None:
    wanted = settings(directory, tmp_path, LoadSettings())
    both, alone = (
        run(wanted.model_copy(update={"one_at_a_time": flag}), tmp_path / name)
        for name, flag in (("both", False), ("alone", True))
    )
    assert both.evaluation.rows == alone.evaluation.rows
    assert both.evaluation.kl == alone.evaluation.kl
    assert both.evaluation.sets == alone.evaluation.sets
    for name in ("certificate.json", "analysis.json"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_one_of_two_models_is_in_memory_at_a_time(directory: Path) -> None:
    loaded = load(directory)
    seen = weakref.ref(loaded.model)
    base, edited = in_turn(loaded, lambda: load(directory), lambda: load(directory), "edited")
    del loaded
    assert base.model is seen() and base.vocabulary_size == edited.vocabulary_size
    assert edited.model is not None and seen() is None
    other = weakref.ref(edited.model)
    assert base.model is not None and other() is None
    assert (base.source, edited.source) == (str(directory), "edited")


def test_a_model_on_several_devices_shares_its_memory_with_its_edit(directory: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = load(directory)
    # The hooks that move what a layer takes to where it lies, as where there are several devices.
    dispatch_model(loaded.model, places, main_device="cpu", force_hooks=True)
    base = base_of(loaded)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="test")), 2)
    plan = base.plan(intervention)
    (tmp_path / "edited").mkdir()
    write_baked(base, intervention, plan, tmp_path / "edited")
    edited = load_changed(loaded, base, plan, tmp_path / "edited")
    assert edited is not None
    assert edited.model.model.norm.weight is loaded.model.model.norm.weight
    given = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before, after = loaded.model(given).logits, edited.model(given).logits
        torch.testing.assert_close(after, load(tmp_path / "edited").model(given).logits)
        assert torch.equal(before, load(directory).model(given).logits)
