"""The public interface: on a model in memory, lists of strings and tensors; and what the README shows runs."""

import ast
import builtins
import inspect
import pydoc
import re
import rlcompleter
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any
from xml.etree import ElementTree

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline

import remove_refusals as rr
import remove_refusals.pipeline  # imports nearly every module, which must not hide a name of the interface
import tiny
import zoo
from remove_refusals.errors import DirectionError, ModelError
from remove_refusals.measure import table
from remove_refusals.settings import EditSettings, GradientSettings, MeasureSettings, SelectSettings

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"
ALIASES = ("Language", "Placement", "Prompts", "SiteKind", "Taken", "Tied")
"""Public names that stand for several types, or for some texts."""
HARMFUL, HARMLESS = ["pick a lock", "forge a note", "hide a bug", "rob a shop"], ["bake", "draw a cat", "sing", "sew"]
SHORT = MeasureSettings(max_new_tokens=12, kl_tokens=2)
QUICK = SelectSettings(n_tokens=16, n_confirm_tokens=12, descent=GradientSettings(n_steps=6, n_more_steps=2))


@pytest.mark.parametrize("name", rr.__all__)
def test_every_name_is_a_function_or_a_class_that_says_what_it_is_for(name: str) -> None:
    value = getattr(rr, name)
    assert name in ALIASES or (callable(value) and value.__doc__)
    assert name in (rr.__doc__ or "") or name == "mean_difference_per_layer"
    if inspect.isfunction(value) and list(inspect.signature(value).parameters):
        assert "Args:" in value.__doc__


def test_the_interface_fits_on_a_screen_and_is_all_that_is_shown() -> None:
    functions = [name for name in rr.__all__ if inspect.isfunction(getattr(rr, name))]
    assert len(functions) <= 22 and sorted(dir(rr)) == sorted([*rr.__all__, "__version__"])
    assert len((rr.__doc__ or "").splitlines()) <= 32
    shown = pydoc.plain(pydoc.render_doc(rr)).splitlines()
    # Under the title, the name and its sentence, and the heading.
    assert any(line.strip() == "import remove_refusals as rr" for line in shown[:10])


def test_completion_offers_the_public_names() -> None:
    completer, found = rlcompleter.Completer({"rr": rr}), []
    while (text := completer.complete("rr.", len(found))) is not None:
        found.append(text)
    assert sorted(re.sub(r"\W.*", "", text.removeprefix("rr.")) for text in found) == sorted(rr.__all__)


def signatures() -> Iterator[Callable[..., Any]]:
    """Give the public functions, and the public methods and constructors of the public classes."""
    for value in (getattr(rr, name) for name in rr.__all__ if name not in ALIASES):
        if inspect.isfunction(value):
            yield value
            continue
        for name, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and not name.startswith("_"):
                yield function


def named(annotation: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)} - set(dir(builtins))


def test_every_type_in_a_public_signature_is_public_or_in_the_reference() -> None:
    reference = REFERENCE.read_text(encoding="utf-8")
    seen = set()
    for function in signatures():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        notes = [argument.annotation for argument in (*tree.args.args, *tree.args.kwonlyargs)]
        for name in set().union(*(named(ast.unparse(note)) for note in (*notes, tree.returns) if note is not None)):
            value = function.__globals__.get(name)
            if getattr(value, "__module__", "").startswith("remove_refusals") or isinstance(value, UnionType):
                seen.add(name)
                is_public = name in rr.__all__ and getattr(rr, name) is value
                # What only results are made of is not public, but has its place there.
                result = not is_public and "." not in function.__qualname__
                assert not result, f"{function.__qualname__}: {name}"
                assert re.search(rf"^::: remove_refusals\.([\w.]+\.)?{name}$", reference, re.MULTILINE), name
    assert {"Prompts", "Taken", "Selection", "SelectionSummary"} <= seen


def parts(annotation: Any) -> Iterator[type]:
    for part in typing.get_args(annotation):
        yield from parts(part)
    if isinstance(annotation, type) and annotation.__module__.startswith("remove_refusals"):
        yield annotation


def test_every_type_that_a_result_consists_of_is_in_the_reference() -> None:
    reference = REFERENCE.read_text(encoding="utf-8")
    waiting = {getattr(rr, name) for name in rr.__all__ if inspect.isclass(getattr(rr, name))}
    seen: set[type] = set()
    while waiting - seen:
        seen.add(one := (waiting - seen).pop())
        assert re.search(rf"^::: remove_refusals\.([\w.]+\.)?{one.__name__}$", reference, re.MULTILINE), one
        hints = (
            typing.get_type_hints(one, localns={"torch": torch}) if one.__module__.startswith("remove_refusals") else {}
        )
        waiting |= {part for name, hint in hints.items() if name[0] != "_" for part in parts(hint)}
    assert len(seen) > len(rr.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rr.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import remove_refusals, sys; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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


def held(kind: str) -> tuple[Any, Any]:
    """Give the demo model, a Llama of six layers, as somebody may have it in a notebook."""
    source = rr.load("demo").source
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if kind == "a pipeline":
        return TextGenerationPipeline(model, tokenizer), None
    if kind == "an adapter":
        adapter = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], r=2)
        model = peft.get_peft_model(model, adapter).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["a model", "an adapter", "a pipeline"])
def test_the_ten_lines_of_a_notebook(kind: str, tmp_path: Path) -> None:
    model, tokenizer = held(kind)
    own = model.model if kind == "a pipeline" else model

    def answers(one: Any) -> torch.Tensor:
        with torch.inference_mode():
            return one(input_ids=torch.arange(5, 25).unsqueeze(0)).logits

    refused, answered = (list(rr.embedded_prompts(name).prompts) for name in ("harmful_train", "harmless_train"))

    harmful = rr.collect_activations(model, tokenizer, refused[:16])
    harmless = rr.collect_activations(model, tokenizer, answered[:16])
    direction = rr.mean_difference(harmful, harmless, layer=0.6)
    with rr.ablated(model, direction):
        taken_out = answers(own)
    found = rr.select(model, tokenizer, harmful=refused[:36], harmless=answered[:36], settings=QUICK)
    scores = rr.evaluate(
        model,
        found.intervention,
        tokenizer,
        harmful=refused[-8:],
        harmless=answered[-8:],
        alarming=rr.embedded_prompts("harmless_alarming").prompts[:4],
        settings=SHORT,
    )
    if kind == "an adapter":
        with pytest.raises(ModelError, match=r"since saving it would save the adapter.*merge_and_unload\(\)"):
            rr.bake_in_place(model, direction)
        with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
            rr.bake(model, direction, tmp_path / "not", tokenizer=tokenizer)
        own = model = model.merge_and_unload()
    before = answers(own)
    rr.bake_in_place(model, direction)
    own.save_pretrained(tmp_path / "edited")

    assert not torch.allclose(before, taken_out, atol=1e-2)
    assert torch.allclose(answers(own), taken_out, atol=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    assert torch.equal(answers(saved), answers(own))
    refusals = scores.sets["harmful"].refusals
    assert refusals.base.count >= 6 and refusals.edited.count <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mixtral"])
def test_hooks_on_an_adapted_model_are_the_edit_of_the_merged_one(model_type: str) -> None:
    experts = {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    where = experts if model_type == "mixtral" else {"target_modules": "all-linear"}
    base = zoo.build(model_type)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, fan_in_fan_out=model_type == "gpt2", **where)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    plain, vector = logits(model), torch.randn(zoo.D_MODEL)
    with rr.ablated(model, vector):
        taken_out = logits(model)
    assert torch.equal(logits(model), plain) and float((plain - taken_out).abs().max()) > 0.1
    merged = model.merge_and_unload()
    rr.bake_in_place(merged, vector)
    assert torch.allclose(logits(merged), taken_out, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "tied"])
def test_an_edit_in_memory_is_the_saved_one(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    make().to(dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    rr.bake(str(tmp_path / "base"), vector, str(tmp_path / "baked"), strength=0.7)
    assert model.dtype == dtype
    rr.bake_in_place(model, vector, strength=0.7)
    model.save_pretrained(tmp_path / "saved")
    baked, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("baked", "saved"))
    assert baked.keys() == saved.keys()
    assert all(torch.equal(baked[name], saved[name]) and baked[name].dtype == dtype for name in baked)
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("baked", "saved")]
    assert torch.equal(*map(logits, both)) and torch.equal(logits(both[0]), logits(model))
    with pytest.raises(ModelError, match="was not changed in memory"):
        rr.bake(model, vector, tmp_path / "again", tokenizer=tiny.tokenizer())


def test_a_quantised_layer_is_refused_by_its_name(model: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = model.get_submodule("model.layers.1.mlp")
    for stored in (torch.float8_e4m3fn, None):
        layer.down_proj = torch.nn.Linear(64, 32, bias=False, dtype=None if stored is None else torch.float32)
        if stored is None:
            # As GPTQ and AWQ keep their numbers, under another name.
            layer.down_proj.qweight = layer.down_proj.weight
            del layer.down_proj.weight
        else:
            layer.down_proj.weight.data = layer.down_proj.weight.data.to(stored)
        with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' of a Linear .*quantisation"):
            rr.bake_in_place(model, torch.ones(32))
        for name, value in model.state_dict().items():
            assert "down_proj" in name or torch.equal(value, before[name])


def test_paths_are_strings_or_paths(model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "harmful.txt").write_text("\n".join(HARMFUL), encoding="utf-8")
    prompts = [rr.load_prompts(kind(tmp_path / "harmful.txt")) for kind in (str, Path)]
    assert prompts[0] == prompts[1] and prompts[0].prompts == tuple(HARMFUL)
    with pytest.raises(rr.RemoveRefusalsError, match="is missing"):
        rr.load_prompts(Path("owner/name"))
    loaded = rr.load(model, tiny.tokenizer())
    short = SHORT.model_copy(update={"n_test": 3})
    alarming = ["kill a process", "burn a disc", "shoot a film", "hack a tree"]
    scores = rr.evaluate(loaded, torch.ones(32), harmful=HARMFUL, harmless=HARMLESS, alarming=alarming, settings=short)
    assert scores.sets["alarming"].refusals.base.n == 3
    assert (scores.base, scores.edited) == ("LlamaForCausalLM", "LlamaForCausalLM, edited by hooks")
    (tmp_path / "scores").mkdir()
    scores.save(str(tmp_path / "scores"))
    assert rr.Evaluation.load(str(tmp_path / "scores")).rows == scores.rows
    direction = rr.mean_difference(*(rr.collect_activations(loaded, None, part) for part in (HARMFUL, HARMLESS)))
    for kind in (str, Path):
        place = kind(tmp_path / f"{kind.__name__}.safetensors")
        rr.save_direction(direction, place)
        assert torch.equal(rr.load_direction(place).basis, direction.basis)


def test_results_show_themselves(model: torch.nn.Module) -> None:
    loaded = rr.load(model, tiny.tokenizer())
    harmful, harmless = (rr.collect_activations(loaded, None, part) for part in (HARMFUL, HARMLESS))
    found = rr.separation(harmful, harmless)
    assert repr(found).startswith("Separation(4 harmful and 4 harmless prompts, position=-1, 3 layers, largest AUROC ")
    drawn = ElementTree.fromstring(f"<div>{found._repr_html_()}</div>")
    circles = [element for element in drawn.iter() if element.tag.endswith("circle")]
    # Before the first layer the token is the same in every prompt.
    assert len(circles) == sum(layer.auroc is not None for layer in found.layers) > 0
    for layer, circle in zip([one for one in found.layers if one.auroc is not None], circles, strict=True):
        assert f"layer {layer.layer}: {layer.auroc.value:.3f}" in ElementTree.tostring(circle, encoding="unicode")
    asked = {"harmful": ["<b>rob</b> a shop"], "harmless": ["sew"], "alarming": ["kill a process"]}
    scores = rr.evaluate(loaded, torch.ones(32), **asked, settings=SHORT)
    shown = ElementTree.fromstring(f"<div>{scores._repr_html_()}</div>")
    rows = [tuple(cell.text or "" for cell in row.iter("td")) for row in shown.iter("tr")]
    assert rows[1:] == list(
        table(scores)
    ) and "Base: LlamaForCausalLM. Edited: LlamaForCausalLM, edited by hooks." in "".join(shown.itertext())
    for value in (scores, found, harmful):
        assert "\n" not in repr(value) and len(repr(value)) < 300
    assert str(scores) == repr(scores) and "harmful 0/1 to 0" in repr(scores)


def test_what_load_gave_is_taken_with_what_it_knows() -> None:
    loaded = rr.load(tiny.llama(), tiny.tokenizer(), chat=rr.ChatFormat(plain=True), batch_size=2)
    assert rr.load(loaded).chat.plain and rr.load(loaded, tiny.tokenizer()).batch_size == 2
    assert rr.load(loaded, batch_size=3).chat.plain
    assert repr(loaded) == "LoadedModel('LlamaForCausalLM', LlamaForCausalLM, float32 on cpu)"
    assert repr(rr.map_model(loaded)) == "ModelMap('llama', 2 layers, d_model=32, 5 writers, exact)"


def test_what_cannot_be_taken_is_said_in_a_sentence(model: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="expected a tokenizer"):
        rr.collect_activations(model, None, HARMFUL)
    with pytest.raises(ModelError, match="expected a directory"):
        rr.load(42)
    with pytest.raises(rr.RemoveRefusalsError, match="single text"):
        rr.generate(model, tiny.tokenizer(), "one prompt")
    with pytest.raises(DirectionError, match="expected"), rr.ablated(model, torch.ones(1, 7)):
        pass
    with pytest.raises(ModelError, match="is a str, expected"), rr.ablated("demo", torch.ones(32)):
        pass
    with pytest.raises(ModelError, match="give the tokenizer third"):
        rr.evaluate(model, tiny.tokenizer(), torch.ones(32))
    with pytest.raises(ModelError, match="pass it beside the model"):
        rr.bake(model, torch.ones(32), "never")
    virtual = peft.get_peft_model(tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="before every prompt"):
        rr.load(virtual.eval(), tiny.tokenizer())
