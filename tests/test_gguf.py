"""GGUF carriers: an adapter, a control vector and an edited file, each held to the edit in memory; in llama.cpp too."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_gguf
import zoo
from remove_refusals.baking.gguf import ARCHITECTURES, GgufNames, gguf_lora, write_gguf_lora
from remove_refusals.baking.lora import low_rank
from remove_refusals.baking.memory import edited_tensors
from remove_refusals.directions.direction import direction_from_vectors, save_direction
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.plan import PlanEntry, resolve
from remove_refusals.errors import ArchitectureError, CheckpointError, DirectionError, OutputError
from remove_refusals.formula import project_out
from remove_refusals.modelmap.derive import map_model
from remove_refusals.types import DirectionOrigin

needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not there")
PROJECTIONS = ("attn", "mlp")


def direction(d_model=zoo.D_MODEL, rank=1, **origin):
    vectors = torch.randn(d_model, rank, generator=torch.Generator().manual_seed(5))
    return direction_from_vectors(vectors, DirectionOrigin("given", **origin))


def planned(model, *, rank=1, strength=1.0, **options):
    model_map = map_model(model)
    kinds = options.pop("kinds", PROJECTIONS)
    intervention = intervene(direction(rank=rank), zoo.N_LAYERS, strength=strength, kinds=kinds)
    return model_map, intervention, resolve(intervention, model_map, model.get_parameter, **options)


def edited(model, plan, model_map):
    """Logits of the model with the edit in its weights; the model is put back."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: t.clone() for name, t in edited_tensors(model, plan, model_map).items()})
    found = logits(model)
    model.load_state_dict(kept)
    return found


def logits(model):
    with torch.inference_mode():
        return model(zoo.token_ids(model), use_cache=False).logits[0]


def ids(model):
    return zoo.token_ids(model)[0].tolist()


class TestNames:
    @pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
    def test_every_writer_of_a_listed_type_has_a_tensor_of_its_own(self, model_type):
        model_map = map_model(zoo.build(model_type))
        writers = [writer for site in model_map.sites for writer in site.writers]
        names = GgufNames(model_map).of_writers(writers)
        assert len(names) == len({writer.parameter for writer in writers}) > zoo.N_LAYERS
        for writer in writers:
            layer = next((site.layer for site in model_map.sites if writer in site.writers), None)
            assert layer is None or names[writer.parameter].startswith(f"blk.{layer}.")
            assert names[writer.parameter].endswith(".bias") == ("bias" in writer.parameter)

    def test_a_type_that_is_not_listed_is_refused(self):
        with pytest.raises(ArchitectureError, match=r"'xglm' has no known architecture"):
            GgufNames(map_model(zoo.build("xglm")))


class TestLora:
    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "granitemoe", "mamba2"])
    @pytest.mark.parametrize("rank", [1, 3])
    def test_factors_times_scale_are_the_change(self, model_type, rank):
        model = zoo.build(model_type)
        kinds = ("embedding", *PROJECTIONS)
        model_map, _, plan = planned(model, rank=rank, strength=0.6, kinds=kinds)
        adapter = gguf_lora(plan, model_map, model.get_parameter)
        after = edited_tensors(model, plan, model_map)
        names = GgufNames(model_map)
        assert adapter.rank == rank and len(adapter.tensors) == 2 * len(plan.entries)
        for entry in plan.entries:
            name = names.find(entry.parameter, entry.on_disk)
            first, second = adapter.tensors[f"{name}.lora_a"], adapter.tensors[f"{name}.lora_b"]
            change = after[entry.parameter] - model.get_parameter(entry.parameter)
            made = first @ second.mT if name == "token_embd.weight" else second @ first
            torch.testing.assert_close(made, change.detach(), rtol=0, atol=1e-6)

    @given(rows=st.integers(2, 9), columns=st.integers(1, 9), axis=st.sampled_from([0, 1]), strength=st.floats(-2, 2))
    @settings(deadline=None, max_examples=50)
    def test_low_rank_factors_are_the_one_formula(self, rows, columns, axis, strength):
        generator = torch.Generator().manual_seed(rows * 100 + columns)
        tensor = torch.randn(rows, columns, generator=generator)
        width = tensor.shape[axis]
        basis = direction_from_vectors(
            torch.randn(width, min(2, width), generator=generator), DirectionOrigin("given")
        ).basis
        entry = PlanEntry("w", "mlp", 0, axis, tuple(tensor.shape), strength, basis, ())
        factors = low_rank(entry, tensor)
        wanted = project_out(tensor, basis, strength, axis)
        torch.testing.assert_close(tensor + factors.left @ factors.right, wanted, rtol=0, atol=2e-5)

    @needs_llama
    @pytest.mark.parametrize(
        ("model_type", "tolerance"), [("llama", 1e-4), ("qwen2", 1e-4), ("mixtral", 1e-4), ("gemma3_text", 5e-3)]
    )
    def test_llama_cpp_gives_the_edited_logits(self, model_type, tolerance, tmp_path):
        # Gemma's activation is looked up in half precision there.
        model = tiny_gguf.build(model_type)
        kinds = PROJECTIONS if model_type == "gemma3_text" else ("embedding", *PROJECTIONS)
        model_map, _, plan = planned(model, rank=2, kinds=kinds)
        tiny_gguf.write(model, tmp_path / "base.gguf")
        adapter = gguf_lora(plan, model_map, model.get_parameter)
        write_gguf_lora(adapter, tmp_path / "lora.gguf", name="tiny", base="tiny")
        plain, wanted = logits(model), edited(model, plan, model_map)
        assert float((plain - wanted).abs().max()) > 0.5
        found = tiny_gguf.logits(tmp_path / "base.gguf", ids(model), lora=tmp_path / "lora.gguf")
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)

    @needs_llama
    def test_a_quantised_file_runs_with_the_adapter_of_the_full_model(self, tmp_path):
        model = tiny_gguf.build("llama")
        model_map, _, plan = planned(model)
        tiny_gguf.write(model, tmp_path / "base.gguf", tiny_gguf.Q8_0)
        adapter = gguf_lora(plan, model_map, model.get_parameter)
        write_gguf_lora(adapter, tmp_path / "lora.gguf", name="tiny", base="tiny")
        wanted = edited(model, plan, model_map)
        off = float((tiny_gguf.logits(tmp_path / "base.gguf", ids(model)) - logits(model)).abs().max())
        found = tiny_gguf.logits(tmp_path / "base.gguf", ids(model), lora=tmp_path / "lora.gguf")
        assert float((found - wanted).abs().max()) < 3 * off < 0.3 < float((logits(model) - wanted).abs().max())

    @pytest.mark.parametrize(
        ("model_type", "kinds", "message"),
        [
            ("gemma3_text", ("embedding", *PROJECTIONS), r"embed_tokens.*unembedding.*--sites attn,mlp"),
            ("gpt2", PROJECTIONS, r"c_proj\.bias.*no matrix"),
            ("gpt_oss", ("mlp",), r"down_proj_bias.*no matrix"),
        ],
    )
    def test_what_llama_cpp_cannot_carry_is_refused_by_name(self, model_type, kinds, message):
        model = zoo.build(model_type)
        model_map, _, plan = planned(model, kinds=kinds)
        with pytest.raises(ArchitectureError, match=message):
            gguf_lora(plan, model_map, model.get_parameter)

    def test_position_embeddings_are_refused_since_no_adapter_reaches_them(self):
        model = zoo.build("gpt2", tie_word_embeddings=False)
        model_map, _, plan = planned(model, kinds=("embedding",))
        with pytest.raises(ArchitectureError, match=r"wpe.*applies no adapter"):
            gguf_lora(plan, model_map, model.get_parameter)

    def test_the_command_writes_metadata_that_llama_cpp_asks_for(self, command, tmp_path):
        zoo.build("llama").save_pretrained(tmp_path / "base")
        save_direction(direction(), tmp_path / "taken.safetensors")
        arguments = ("bake", tmp_path / "base", "--direction", tmp_path / "taken.safetensors", "--as", "gguf-lora")
        outcome = command(*arguments, "-o", tmp_path / "lora.gguf")
        assert outcome.code == 0, outcome
        fields = open_gguf(tmp_path / "lora.gguf").fields
        wanted = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
        assert {key: fields[key] for key in wanted} == wanted and fields["general.architecture"] == "llama"
        record = json.loads(fields["remove_refusals.ablation"])
        assert record["base"]["source"] == "base" and len(record["plan"]["edited"]) == 9


class TestEdit:
    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "gpt2"])
    def test_a_float32_file_holds_the_edit_in_memory(self, model_type, tmp_path):
        model = tiny_gguf.build(model_type)
        kinds = ("embedding", *PROJECTIONS)
        model_map, intervention, plan = planned(model, strength=0.7, kinds=kinds, tied="both")
        tiny_gguf.write(model, tmp_path / "base.gguf")
        tied = "both" if model_map.tied else "untie"
        baked = bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf", tied=tied)
        assert baked.tied == model_map.tied
        assert {writer.parameter for writer in baked.writers} == {entry.parameter for entry in plan.entries}
        model.load_state_dict({name: t.clone() for name, t in edited_tensors(model, plan, model_map).items()})
        wanted, found = tiny_gguf.tensors(model), open_gguf(tmp_path / "out.gguf")
        assert set(wanted) == set(found.tensors)
        for name, value in wanted.items():
            np.testing.assert_allclose(found.values(name).numpy(), value, rtol=0, atol=1e-6, err_msg=name)

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
    def test_other_types_lose_the_direction_but_for_their_rounding(self, kind, tmp_path):
        model = tiny_gguf.build("mixtral")
        model_map, intervention, _ = planned(model, kinds=("embedding", *PROJECTIONS))
        tiny_gguf.write(model, tmp_path / "base.gguf", gguf.GGMLQuantizationType[kind])
        baked = bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")
        allowed = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.02, "Q4_0": 0.25, "Q5_1": 0.12}[kind]
        basis = intervention.directions[0].basis
        before, after = open_gguf(tmp_path / "base.gguf"), open_gguf(tmp_path / "out.gguf")
        for writer in baked.writers:
            axis = -1 if writer.name == "token_embd.weight" else -2
            shares = [float((f.values(writer.name).movedim(axis, -1) @ basis).norm()) for f in (after, before)]
            assert writer.type == kind
            assert writer.share_left == pytest.approx(shares[0] / shares[1], rel=1e-3)
            assert 0 < writer.share_left < allowed and writer.rounding < allowed
            assert writer.rounding_alone <= writer.rounding

    def test_every_other_byte_is_the_same(self, tmp_path):
        model = tiny_gguf.build("llama")
        model_map, _, _ = planned(model)
        intervention = intervene(direction(), zoo.N_LAYERS, layers=(1, 2), kinds=("mlp",))
        tiny_gguf.write(model, tmp_path / "base.gguf", tiny_gguf.Q8_0)
        before = (tmp_path / "base.gguf").read_bytes()
        baked = bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")
        after = (tmp_path / "out.gguf").read_bytes()
        assert (tmp_path / "base.gguf").read_bytes() == before and len(after) == len(before)
        names = {"blk.1.ffn_down.weight", "blk.2.ffn_down.weight"}
        assert {writer.name for writer in baked.writers} == names
        tensors = open_gguf(tmp_path / "out.gguf").tensors
        inside = [(tensors[name].offset, tensors[name].offset + tensors[name].n_bytes) for name in names]
        differs = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert differs and all(any(start <= place < stop for start, stop in inside) for place in differs)

    def test_strength_zero_leaves_the_file_as_it_was(self, tmp_path):
        model = tiny_gguf.build("llama")
        model_map, intervention, _ = planned(model, strength=0.0)
        tiny_gguf.write(model, tmp_path / "base.gguf", tiny_gguf.Q8_0)
        bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()

    @needs_llama
    @pytest.mark.parametrize("model_type", ["llama", "gpt2"])
    def test_llama_cpp_runs_the_edited_file(self, model_type, tmp_path):
        model = tiny_gguf.build(model_type)
        model_map, intervention, plan = planned(model)
        tiny_gguf.write(model, tmp_path / "base.gguf")
        bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")
        wanted = edited(model, plan, model_map)
        assert float((logits(model) - wanted).abs().max()) > 0.3
        torch.testing.assert_close(tiny_gguf.logits(tmp_path / "out.gguf", ids(model)), wanted, rtol=0, atol=3e-3)

    def test_a_tied_embedding_needs_a_word(self, tmp_path):
        model = tiny_gguf.build("gemma3_text")
        model_map, intervention, _ = planned(model, kinds=("embedding", *PROJECTIONS))
        tiny_gguf.write(model, tmp_path / "base.gguf")
        with pytest.raises(ArchitectureError, match=r"token_embd.weight.*--tied both.*--sites attn,mlp"):
            bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")
        assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]

    def test_types_that_cannot_be_written_are_refused_by_name(self, tmp_path):
        model = tiny_gguf.build("llama")
        model_map, intervention, _ = planned(model)
        tiny_gguf.write(model, tmp_path / "base.gguf")
        content = bytearray((tmp_path / "base.gguf").read_bytes())
        # The type is the number behind the dimensions of a tensor's entry; 256 numbers of Q4_K take 144 bytes.
        place = content.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4
        content[place : place + 16] = np.array([256, 24], np.uint64).tobytes()
        content[place + 16 : place + 20] = np.uint32(gguf.GGMLQuantizationType.Q4_K).tobytes()
        (tmp_path / "k.gguf").write_bytes(content)
        named = {"model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight"}
        tensor = open_gguf(tmp_path / "k.gguf").tensors[named["model.layers.1.mlp.down_proj.weight"]]
        assert tensor.type_name == "Q4_K" and not tensor.can_be_written()
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight"):
            bake_gguf(tmp_path / "k.gguf", model_map, intervention, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()

    def test_a_file_of_another_model_is_refused(self, tmp_path):
        tiny_gguf.write(tiny_gguf.build("qwen2"), tmp_path / "base.gguf")
        model_map, intervention, _ = planned(tiny_gguf.build("llama"))
        with pytest.raises(CheckpointError, match=r"general.architecture 'qwen2', expected 'llama'"):
            bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "out.gguf")

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 50])
    def test_what_is_no_gguf_is_refused(self, content, tmp_path):
        (tmp_path / "base.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"base\.gguf cannot be read as GGUF"):
            open_gguf(tmp_path / "base.gguf")

    def test_the_file_itself_is_never_the_output(self, tmp_path):
        model = tiny_gguf.build("llama")
        model_map, intervention, _ = planned(model)
        tiny_gguf.write(model, tmp_path / "base.gguf")
        with pytest.raises(OutputError, match="never written"):
            bake_gguf(tmp_path / "base.gguf", model_map, intervention, tmp_path / "base.gguf", force=True)

    def test_the_command_needs_no_weights_but_the_files(self, command, tmp_path):
        model = tiny_gguf.build("gemma3_text")
        tiny_gguf.write(model, tmp_path / "base.gguf", tiny_gguf.Q8_0)
        model.config.architectures = ["Gemma3ForCausalLM"]
        model.config.save_pretrained(tmp_path / "config")
        save_direction(direction(), tmp_path / "taken.safetensors")
        arguments = ("bake", tmp_path / "config", tmp_path / "base.gguf", "--as", "gguf", "--tied", "both")
        outcome = command(*arguments, "--direction", tmp_path / "taken.safetensors", "-o", tmp_path / "out.gguf")
        assert outcome.code == 0, outcome
        assert "Edited 9 tensors (Q8_0)" in outcome.out and "both were edited as one" in outcome.out
        record = json.loads(record_path(tmp_path / "out.gguf").read_text())
        assert len(record["certificate"]["edited"]) == 9
        assert 0 < record["certificate"]["largest_share_beyond_plan"] < 0.05

    @pytest.mark.parametrize(("kind", "file"), [("gguf", False), ("lora", True)])
    def test_a_file_goes_with_as_gguf_alone(self, kind, file, command, tmp_path):
        save_direction(direction(), tmp_path / "taken.safetensors")
        files = (tmp_path / "base.gguf",) if file else ()
        arguments = ("bake", "demo", *files, "--as", kind, "--direction", tmp_path / "taken.safetensors")
        outcome = command(*arguments, "-o", tmp_path / "out")
        assert outcome.code == 2 and f"--as is '{kind}'" in outcome.err

    @given(
        kind=st.sampled_from(["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0"]),
        rows=st.integers(1, 3),
        blocks=st.integers(1, 3),
        seed=st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=40)
    def test_what_was_rounded_once_stays(self, kind, rows, blocks, seed):
        values = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
        which = gguf.GGMLQuantizationType[kind]
        once = decoded(encoded(values, which), which)
        assert once.shape == values.shape
        limit = {"F32": 0.0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.02, "Q4_0": 0.4, "Q5_0": 0.2}[kind]
        assert float((once - values).abs().max()) <= limit


class TestControlVector:
    def test_it_goes_where_the_direction_was_found_and_takes_off_the_difference(self):
        found = direction(layer=3, length=7.5)
        vectors = control_vector((found,), 4, strength=2.0)
        assert set(vectors) == {2}
        torch.testing.assert_close(vectors[2], -15.0 * found.basis[:, 0])

    def test_without_a_length_it_is_a_unit_vector(self):
        vectors = control_vector((direction(),), 4, layers=(1, 3))
        assert set(vectors) == {1, 2, 3}
        assert all(float(vector.norm()) == pytest.approx(1.0, abs=1e-6) for vector in vectors.values())

    def test_each_layer_gets_its_own(self):
        given_directions = tuple(direction(length=float(number + 1)) for number in range(4))
        vectors = control_vector(given_directions, 4)
        assert [float(vectors[layer].norm()) for layer in (1, 2, 3)] == pytest.approx([2.0, 3.0, 4.0], abs=1e-5)

    @pytest.mark.parametrize(
        ("directions", "layers", "message"),
        [
            ((direction(rank=2),), (1, 2), "2 columns"),
            ((direction(),), None, "does not know"),
            ((direction(layer=1),), None, r"0-0, expected some of 1-3"),
            ((direction(),), (2, 4), r"2-4, expected some of 1-3"),
            ((direction(), direction()), (1, 2), "2 directions"),
        ],
    )
    def test_what_llama_cpp_has_no_place_for_is_refused(self, directions, layers, message):
        with pytest.raises(DirectionError, match=message):
            control_vector(directions, 4, layers=layers)

    def test_the_file_is_what_llama_cpp_reads(self, command, tmp_path):
        zoo.build("llama").save_pretrained(tmp_path / "base")
        save_direction(direction(layer=2, length=3.0), tmp_path / "taken.safetensors")
        arguments = ("bake", tmp_path / "base", "--direction", tmp_path / "taken.safetensors", "--as", "control-vector")
        outcome = command(*arguments, "-o", tmp_path / "vector.gguf")
        assert outcome.code == 0 and "not ablation" in outcome.out, outcome
        file = open_gguf(tmp_path / "vector.gguf")
        wanted = {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
        assert {key: file.fields[key] for key in wanted} == wanted and file.fields["controlvector.layer_count"] == 4
        assert list(file.tensors) == ["direction.1"] and file.tensors["direction.1"].shape == (zoo.D_MODEL,)
        torch.testing.assert_close(file.values("direction.1"), -3.0 * direction().basis[:, 0])

    @needs_llama
    def test_llama_cpp_adds_it_behind_the_layer(self, tmp_path):
        model = tiny_gguf.build("llama")
        tiny_gguf.write(model, tmp_path / "base.gguf")
        vectors = control_vector((direction(layer=3, length=2.0),), zoo.N_LAYERS)
        rows = torch.stack([vectors.get(layer, torch.zeros(zoo.D_MODEL)) for layer in range(1, zoo.N_LAYERS)])
        found = tiny_gguf.logits(tmp_path / "base.gguf", ids(model), vector=rows.numpy())
        with torch.inference_mode():
            handle = model.model.layers[2].register_forward_hook(lambda module, args, out: out + vectors[2])
            wanted = logits(model)
            handle.remove()
        assert float((wanted - logits(model)).abs().max()) > 0.3
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
