"""The public interface: on a model in memory, lists of strings and tensors; and what the README shows runs."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TextGenerationPipeline

import remove_refusals as rr
import remove_refusals.pipeline  # imports nearly every module, which must not hide a name of the interface
import tiny
from remove_refusals.errors import DirectionError, ModelError
from remove_refusals.settings import EditSettings, MeasureSettings

README = Path(__file__).parents[1] / "README.md"
HARMFUL, HARMLESS = ["pick a lock", "forge a note", "hide a bug", "rob a shop"], ["bake", "draw a cat", "sing", "sew"]
SHORT = MeasureSettings(max_new_tokens=4, kl_tokens=2)


@pytest.mark.parametrize("name", rr.__all__)
def test_every_name_is_a_function_or_a_class_that_says_what_it_is_for(name: str) -> None:
    value = getattr(rr, name)
    assert callable(value) and value.__doc__
    assert name in (rr.__doc__ or "") or name == "mean_difference_per_layer"
    if inspect.isfunction(value) and list(inspect.signature(value).parameters):
        assert "Args:" in value.__doc__


def test_the_interface_fits_on_a_screen() -> None:
    assert len(rr.__all__) <= 28 and set(rr.__all__) <= set(dir(rr))
    assert len((rr.__doc__ or "").splitlines()) <= 30


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rr.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import remove_refusals, sys; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], check=True, cwd=tmp_path)
    assert (tmp_path / "demo-without-refusals" / "ablation.json").is_file()


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny.llama().eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(8).unsqueeze(0)).logits


def test_a_model_in_memory_lists_and_tensors_are_enough(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    harmful = rr.collect_activations(model, tokenizer, HARMFUL)
    harmless = rr.collect_activations(model, tokenizer, tuple(HARMLESS))
    direction = rr.mean_difference(harmful, harmless, layer=0.6)
    assert len(rr.separation(harmful, harmless).layers) == harmful.n_layers + 1
    before = logits(model)
    with rr.ablated(model, direction):
        taken_out = logits(model)
        assert len(rr.generate(model, tokenizer, HARMLESS, max_new_tokens=3)) == len(HARMLESS)
    assert torch.equal(logits(model), before)
    column = direction.basis
    for tensor in (column[:, 0], 3 * column, column.T, column[:, 0].to(torch.float64)):
        with rr.ablated(model, tensor):
            assert torch.allclose(logits(model), taken_out, atol=1e-4)
    scores = rr.evaluate(
        model, direction, tokenizer, harmful=HARMFUL, harmless=HARMLESS, alarming=["kill a process"], settings=SHORT
    )
    assert scores.sets["harmful"].refusals.base.n == len(HARMFUL) and scores.kl is not None
    rr.bake_in_place(model, direction)
    assert torch.allclose(logits(model), taken_out, atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_what_is_written_does_what_the_hooks_do(model: torch.nn.Module, tmp_path: Path) -> None:
    loaded = rr.load(model, tiny.tokenizer())
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    half = EditSettings(strength=0.5, layers=(1, 1))
    baked = rr.bake(loaded, vector, tmp_path / "edited", settings=half)
    assert baked.certificate is not None and baked.certificate.passed
    with rr.ablated(
        loaded,
        rr.intervene(
            rr.load_direction(tmp_path / "edited" / "directions" / "direction.safetensors"),
            2,
            strength=0.5,
            layers=(1, 1),
        ),
    ):
        taken_out = logits(model)
    assert torch.allclose(logits(rr.load(tmp_path / "edited").model), taken_out, atol=1e-4)


def test_a_pipeline_brings_model_and_tokenizer(model: torch.nn.Module) -> None:
    pipeline = TextGenerationPipeline(model, tiny.tokenizer(), device=-1)
    assert rr.collect_activations(pipeline, None, HARMFUL).d_model == model.config.hidden_size


def test_what_cannot_be_taken_is_said_in_a_sentence(model: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="expected a tokenizer"):
        rr.collect_activations(model, None, HARMFUL)
    with pytest.raises(ModelError, match="expected a directory"):
        rr.load(42)
    with pytest.raises(rr.RemoveRefusalsError, match="single text"):
        rr.generate(model, tiny.tokenizer(), "one prompt")
    with pytest.raises(DirectionError, match="expected"), rr.ablated(model, torch.ones(1, 7)):
        pass
