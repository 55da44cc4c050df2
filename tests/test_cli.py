"""The command from a shell's point of view: what each part makes, says and leaves alone."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from conftest import Command, Inputs, Outcome
from remove_refusals import cli
from remove_refusals.baking import load_intervention
from remove_refusals.directions.saved import load_direction, load_directions
from remove_refusals.prompts import draw, embedded_prompts, load_prompts
from remove_refusals.search import load_candidates

COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def fine(outcome: Outcome) -> str:
    """Check that a command did its work without complaint, and return what it said."""
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    return outcome.out


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.iterdir()) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def direction(command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path) -> Path:
    path = tmp_path / "found.safetensors"
    fine(command("direction", llama_directory, "-o", path, *inputs.train, "--seed", 3))
    return path


class TestHelp:
    @pytest.fixture(scope="class")
    def shown(self) -> dict[str, str]:
        """The help of the whole and of every command, in one fresh process, with what it has imported by then."""
        script = (
            "import contextlib, io, json, sys\n"
            "from remove_refusals.cli import main\n"
            "shown = {}\n"
            "for name, words in json.loads(sys.argv[1]).items():\n"
            "    sys.argv = ['remove-refusals', *words]\n"
            "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
            "        try:\n"
            "            main()\n"
            "        except SystemExit as ended:\n"
            "            assert not ended.code, ended.code\n"
            "    shown[name] = out.getvalue()\n"
            "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'safetensors', 'huggingface_hub', 'datasets'}\n"
            "shown['heavy'] = ' '.join(sorted(heavy & set(sys.modules)))\n"
            "print(json.dumps(shown))\n"
        )
        words = {"": ["--help"]}
        for name, found in typer.main.get_command(cli.app).commands.items():
            every = any(parameter.name == "help_all" for parameter in found.params)
            words[name] = [name, "--help-all" if every else "--help"]
        found = subprocess.run(
            [sys.executable, "-c", script, json.dumps(words)],
            env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(found.stdout)

    def test_nothing_heavy_is_imported(self, shown: dict[str, str]) -> None:
        assert shown["heavy"] == ""

    def test_the_whole_names_every_command(self, shown: dict[str, str]) -> None:
        assert {"run", "direction", "chat", "generate", "bake", "evaluate"} <= set(COMMANDS)
        assert all(f" {name} " in shown[""] for name in COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_fits_a_terminal_of_80_columns(self, shown: dict[str, str], name: str) -> None:
        assert max(map(len, shown[name].splitlines())) <= 80
        # Nothing is cut off: each option stands there in full, with an example at the end.
        for parameter in typer.main.get_command(cli.app).commands[name].params:
            if parameter.param_type_name == "option":
                assert any(option in shown[name] for option in parameter.opts), parameter.opts
        assert f"Example: remove-refusals {name}" in shown[name]

    def test_without_arguments(self, command: Command) -> None:
        found = command()
        assert found.code in (0, 2)
        assert all(f" {name} " in found.out + found.err for name in COMMANDS)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("direction",), "'model'"),
            (("direction", "m"), "--output"),
            (("direction", "m", "-o", "d.pt", "--position", "0"), "--position"),
            (("direction", "m", "-o", "d.pt", "--n-prompts", "0"), "--n-prompts"),
            (("run", "m", "--strenght", "1"), "--strenght"),
            (("run", "m", "--strength", "much"), "--strength"),
            (("ablate", "m"), "ablate"),
            (("rnu", "m"), "Did you mean 'run'?"),
        ],
    )
    def test_misuse_is_explained(self, command: Command, arguments: tuple[str, ...], named: str) -> None:
        found = command(*arguments)
        assert found.code == 2 and found.out == ""
        assert named in found.err and "--help" in found.err and "Traceback" not in found.err


class TestDirection:
    def test_is_saved_with_where_it_came_from(self, direction: Path, inputs: Inputs, llama_directory: Path) -> None:
        found = load_direction(direction)
        assert found.d_model == 32
        assert found.origin.method == "mean-difference"
        # 0.6 of two layers, rounded down.
        assert (found.origin.layer, found.origin.position, found.origin.seed) == (1, -1, 3)
        harmful = draw(load_prompts(str(inputs.harmful), name="harmful"), 3, 3)
        assert (found.origin.n_harmful, found.origin.harmful_sha256) == (3, harmful.sha256)
        assert found.origin.model == llama_directory.name

    def test_same_again_and_in_the_plain_format(
        self, command: Command, direction: Path, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        for name in ("again.safetensors", "plain.pt"):
            said = fine(command("direction", llama_directory, "-o", tmp_path / name, *inputs.train, "--seed", 3))
            assert said == f"Saved to {tmp_path / name}: d_model 32, layer 1, position -1.\n"
        assert (tmp_path / "again.safetensors").read_bytes() == direction.read_bytes()
        plain = torch.load(tmp_path / "plain.pt", weights_only=True)
        assert torch.equal(plain, load_direction(direction).basis[:, 0])

    def test_options_reach_their_place(
        self, command: Command, direction: Path, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        path = tmp_path / "d.safetensors"
        options = ("--layer", 2, "--position", -4, "--projected", "--seed", 5, "--system-prompt", "Be brief.")
        fine(command("direction", llama_directory, "-o", path, *inputs.train, *options))
        origin = load_direction(path).origin
        assert (origin.method, origin.layer, origin.position, origin.seed) == ("projected-mean-difference", 2, -4, 5)
        fine(command("direction", llama_directory, "-o", path, *inputs.train, "--seed", 3, "--plain", "--force"))
        # Other tokens stand at the end of a prompt without the template.
        assert not torch.allclose(load_direction(path).basis, load_direction(direction).basis, atol=1e-3)


class TestKindsOfDirection:
    """Directions of several positions and of each layer, from the command to the files."""

    @pytest.fixture
    def llama_directory(self, tmp_path: Path) -> Path:
        """In float32: rounding the saved weights would change the answers of a random model."""
        tiny.llama().save_pretrained(tmp_path / "llama")
        tiny.tokenizer().save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    @pytest.fixture
    def found(self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path):
        def find(name: str, *options: object) -> Path:
            fine(command("direction", llama_directory, "-o", tmp_path / name, *inputs.train, *options))
            return tmp_path / name

        return find

    def test_several_positions(self, command: Command, found, llama_directory: Path, tmp_path: Path) -> None:
        direction = load_direction(found("two.safetensors", "--position", "-1,-3"))
        assert direction.basis.shape == (32, 2) and direction.origin.position == (-1, -3)
        for position in ("-1", "-3"):
            alone = load_direction(found(f"{position}.safetensors", "--position", position)).basis
            assert torch.allclose(direction.basis @ (direction.basis.T @ alone), alone, atol=1e-5)
        given = ("--direction", tmp_path / "two.safetensors", "-o", tmp_path / "edited")
        fine(command("bake", llama_directory, *given))
        fine(command("certify", tmp_path / "edited", "--base", llama_directory))

    @pytest.mark.parametrize("position", ["-1,0", "-1,", "last", "1"])
    def test_positions_that_are_none_are_refused(self, command: Command, position: str) -> None:
        found = command("direction", "m", "-o", "d.safetensors", "--position", position)
        assert found.code == 2 and "--position" in found.err and "Traceback" not in found.err

    def test_one_for_each_layer(
        self, command: Command, found, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        folder = found("layers", "--per-layer")
        assert sorted(path.name for path in folder.iterdir()) == ["direction-1.safetensors", "direction.safetensors"]
        each = load_directions(folder)
        assert [direction.origin.layer for direction in each] == [1, 2]
        assert torch.equal(each[1].basis, load_direction(found("2.safetensors", "--layer", 2)).basis)
        edited, answers = tmp_path / "edited", []
        fine(command("bake", llama_directory, "--direction", folder, "-o", edited))
        fine(command("certify", edited, "--base", llama_directory))
        edits = json.loads((edited / "ablation.json").read_text())["intervention"]
        assert {(edit.get("layer"), edit["direction"]) for edit in edits} == {(None, 0), (0, 0), (1, 1)}
        given = ("--prompts", inputs.harmful, "--max-new-tokens", 12, "--force", "-o", tmp_path / "answers.jsonl")
        for arguments in ((llama_directory, "--direction", folder), (edited,), (llama_directory,)):
            fine(command("generate", *arguments, *given))
            answers.append([row["answer"] for row in rows(tmp_path / "answers.jsonl")])
        assert answers[0] == answers[1] != answers[2]

    def test_too_few_directions_are_refused(
        self, command: Command, found, llama_directory: Path, tmp_path: Path
    ) -> None:
        folder = found("layers", "--per-layer")
        (folder / "direction-2.safetensors").write_bytes((folder / "direction.safetensors").read_bytes())
        refused = command("bake", llama_directory, "--direction", folder, "-o", tmp_path / "edited")
        assert refused.code == 2 and "3 directions" in refused.err and refused.err.count("\n") == 1
        assert not (tmp_path / "edited").exists()

    @pytest.mark.parametrize("options", [("--per-layer",), ("--position", "-1,-2")])
    def test_the_whole_job(
        self, command: Command, llama_directory: Path, inputs: Inputs, options: tuple[str, ...], tmp_path: Path
    ) -> None:
        edited = tmp_path / "edited"
        fine(command("run", llama_directory, "-o", edited, *inputs.train, *inputs.test, *options))
        fine(command("certify", edited, "--base", llama_directory))
        settings = json.loads((edited / "ablation.json").read_text())["settings"]
        assert settings["direction"]["per_layer"] is ("--per-layer" in options)
        assert len(load_directions(edited)) == (2 if "--per-layer" in options else 1)


class TestGenerate:
    @pytest.fixture
    def answers(self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path):
        def run(*options: object) -> list[dict[str, object]]:
            path = tmp_path / "answers.jsonl"
            given = ("--prompts", inputs.harmful, "-o", path, "--max-new-tokens", 12, "--force")
            assert fine(command("generate", llama_directory, *given, *options)) == f"Saved 4 answers to {path}.\n"
            return rows(path)

        return run

    def test_one_row_a_prompt_in_their_order(self, answers, direction: Path, inputs: Inputs) -> None:
        found = answers("--direction", direction)
        assert [row["prompt"] for row in found] == inputs.harmful.read_text().splitlines()
        for row in found:
            assert set(row) == {"prompt", "answer", "n_tokens", "finished", "model"}
            assert row["model"] == "edited" and 1 <= row["n_tokens"] <= 12

    def test_strength_decides(self, answers, direction: Path) -> None:
        plain = answers()
        given = ("--direction", direction)
        for same in (answers(*given, "--strength", 0), answers("--batch-size", 1)):
            assert [row["answer"] for row in same] == [row["answer"] for row in plain]
        assert [row["answer"] for row in answers(*given)] != [row["answer"] for row in plain]
        assert all(row["model"] == "base" for row in plain)

    def test_equal_to_the_baked_model(
        self, answers, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        hooked = answers("--direction", direction, "--layers", "1-1", "--sites", "attn,mlp")
        edited, path = tmp_path / "edited", tmp_path / "of-edited.jsonl"
        given = ("--direction", direction, "--layers", 1, "--sites", "attn,mlp", "-o", edited)
        fine(command("bake", llama_directory, *given))
        given = ("--prompts", inputs.harmful, "-o", path, "--max-new-tokens", 12)
        fine(command("generate", edited, *given))
        assert [row["answer"] for row in rows(path)] == [row["answer"] for row in hooked]

    def test_prompts_typed_behind_the_model(
        self, answers, command: Command, llama_directory: Path, direction: Path, inputs: Inputs
    ) -> None:
        first, second, *_ = answers("--direction", direction)
        given = ("--direction", direction, "--max-new-tokens", 12)
        assert fine(command("generate", llama_directory, first["prompt"], *given)) == f"{first['answer']}\n"
        both = fine(command("generate", llama_directory, first["prompt"], second["prompt"], *given, "--json"))
        assert json.loads(both)["answers"] == [first, second]
        for wrong in ((), ("Hello", "--prompts", inputs.harmful), ("--prompts", inputs.harmful)):
            refused = command("generate", llama_directory, *wrong)
            assert refused.code == 2 and "Expected prompts in quotes" in refused.err


class TestChat:
    def test_answers_what_is_typed(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        prompt = inputs.harmful.read_text().splitlines()[0]
        given, path = ("--max-new-tokens", 12), tmp_path / "answers.jsonl"
        expected = {}
        for side, options in (("base", ()), ("edited", ("--direction", direction))):
            fine(command("generate", llama_directory, "--prompts", inputs.harmful, "-o", path, *given, *options))
            expected[side] = rows(path)[0]["answer"]
            path.unlink()

        def said(*options: object) -> str:
            return fine(command("chat", llama_directory, *given, *options, typed=f"\n{prompt}\n"))

        assert said("--no-ablation", "-q") == f"{expected['base']}\n"
        assert said("--direction", direction, "-q") == f"{expected['edited']}\n"
        both = f"[base] {expected['base']}\n[edited] {expected['edited']}\n"
        whole = said("--direction", direction, "--compare")
        assert whole.endswith(both)
        # What is talked to is said at the start.
        start = whole.removesuffix(both)
        assert all(word in start for word in (str(llama_directory), str(direction), "Strength 1 in", "/help"))

    def test_talks_with_what_a_run_took_out(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        edited, part = tmp_path / "edited", ("--layers", "1-1", "--sites", "attn,mlp")
        fine(command("bake", llama_directory, "--direction", direction, "-o", edited, *part))
        typed = "Hello there\n/strength 0\nHello there\n"

        def said(*options: object) -> str:
            return fine(command("chat", llama_directory, "-q", "--max-new-tokens", 12, *options, typed=typed))

        assert said("--run", edited) == said("--direction", direction, *part).replace("layers 1-1", "all layers")
        for options, words in (
            (("--run", edited, "--layers", "1-9"), "1-9 does not lie within"),
            (("--run", edited, "--candidate", "first"), "'first' is not among"),
            (("--run", edited, "--direction", direction), "expected one of them"),
            (("--direction", direction, "--candidate", "first"), "add --run"),
        ):
            found = command("chat", llama_directory, *options)
            assert found.code == 2 and words in found.err


class TestCandidates:
    """A run with several candidates, whose pick and whose others can be tried, measured and kept."""

    @pytest.fixture(scope="class")
    def searched(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        output = tmp_path_factory.mktemp("searched") / "out"
        words = ["remove-refusals", "run", "demo", "-o", str(output), "--select", "layer", "--n-prompts", "16"]
        words += ["--n-test", "2", "--max-new-tokens", "4", "--kl-tokens", "2"]
        before = os.umask(0o027)
        try:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
                patch.setattr(sys, "argv", words)
                cli.main()
        finally:
            os.umask(before)
        assert ended.value.code == 0
        return output

    def test_files_have_the_modes_that_the_umask_says(self, searched: Path) -> None:
        for path in (searched, *searched.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path

    def test_another_one_can_be_kept_with_a_strength_on_top(
        self, command: Command, searched: Path, tmp_path: Path
    ) -> None:
        name, other = list(load_candidates(searched).items())[1]
        given = ("--run", searched, "--candidate", name)
        fine(command("bake", "demo", *given, "--strength", 0.5, "-o", tmp_path / "kept"))
        made = load_intervention(tmp_path / "kept")
        assert [edit.strength for edit in made.edits] == [0.5 * edit.strength for edit in other.edits]
        assert torch.equal(made.directions[0].basis, other.directions[0].basis)
        assert command("certify", tmp_path / "kept", "--base", "demo").code == 0
        assert "'no such one' is not among" in command("bake", "demo", *given[:3], "no such one", "-o", "x").err

    def test_what_a_run_took_out_can_be_tried_and_measured(
        self, command: Command, searched: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "p.txt").write_text("\n".join(embedded_prompts("harmful_test").prompts[:4]))
        name = list(load_candidates(searched))[1]
        said = []
        for number, options in enumerate((("--run", searched), ("--run", searched, "--candidate", name), ())):
            given = ("--prompts", tmp_path / "p.txt", "-o", tmp_path / f"{number}.jsonl", "--max-new-tokens", 12)
            fine(command("generate", "demo", *options, *given))
            said.append([row["answer"] for row in rows(tmp_path / f"{number}.jsonl")])
        fine(command("generate", searched, *given[:2], "-o", tmp_path / "saved.jsonl", *given[4:]))
        assert [row["answer"] for row in rows(tmp_path / "saved.jsonl")] == said[0] != said[2]
        few = ("--n-test", 2, "--max-new-tokens", 4, "--kl-tokens", 2, "--json")
        scores = [
            json.loads(fine(command("evaluate", "demo", *edited, *few)))
            for edited in ((searched,), ("--run", searched), ("--run", searched, "--candidate", name, "--strength", 0))
        ]
        assert scores[0]["sets"] == scores[1]["sets"] and scores[2]["kl"]["harmless"]["mean"]["value"] == 0
        assert scores[2]["edited"] == f"{searched}, {name}, strength 0"
        found = command("evaluate", "demo", searched, "--run", searched)
        assert found.code == 2 and "expected one of an edited model" in found.err

    def test_a_model_that_was_edited_before_is_noticed(self, command: Command, searched: Path, tmp_path: Path) -> None:
        said = fine(command("bake", searched, "--run", searched, "-o", tmp_path / "twice"))
        assert f"Note: The model {searched} was edited already (ablation.json), from demo." in said
        assert "holds an edited model" in command("run", "demo", "-o", searched).err
        for force in ((), ("--force",)):
            found = command("bake", "demo", "--run", searched, "-o", searched, *force)
            assert found.code == 2 and "what is read is never written to" in found.err


class TestBake:
    def test_saves_a_model_that_transformers_loads(
        self, command: Command, llama_directory: Path, direction: Path, tmp_path: Path
    ) -> None:
        before = hashes(llama_directory)
        said = fine(command("bake", llama_directory, "--direction", direction, "-o", tmp_path / "edited"))
        assert "1 embedding, 2 attn, 2 mlp" in said
        assert hashes(llama_directory) == before
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        assert model.dtype == torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
        assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
        basis = load_direction(tmp_path / "edited" / "directions" / "direction.safetensors").basis
        assert torch.equal(basis, load_direction(direction).basis)
        for name, axis in (("embed_tokens.weight", 1), ("layers.1.mlp.down_proj.weight", 0)):
            weight = model.model.get_parameter(name).detach().float()
            left = (weight.movedim(axis, -1) @ basis).norm() / weight.norm()
            assert float(left) < 2e-3

    def test_tied_embeddings_are_told(self, command: Command, direction: Path, inputs: Inputs, tmp_path: Path) -> None:
        model = tmp_path / "gpt2"
        tiny.gpt2().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        given = ("--direction", direction, "-o", tmp_path / "edited")
        assert "untied" in fine(command("bake", model, *given))
        assert not AutoModelForCausalLM.from_pretrained(tmp_path / "edited").config.tie_word_embeddings
        assert "one tensor still" in fine(command("bake", model, *given, "--force", "--tied", "both"))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "edited").config.tie_word_embeddings

    def test_certify_and_inspect(
        self, command: Command, llama_directory: Path, direction: Path, tmp_path: Path
    ) -> None:
        edited = tmp_path / "edited"
        fine(command("bake", llama_directory, "--direction", direction, "-o", edited))
        certificate = json.loads(fine(command("certify", edited, "--base", llama_directory, "--json")))
        assert certificate["passed"] is True
        found = json.loads(fine(command("inspect", llama_directory, "--json")))
        assert (found["d_model"], found["n_layers"], len(found["writers"])) == (32, 2, 5)
        fine(command("inspect", llama_directory))
        # One writer put back: the certificate says so, with an exit code of its own.
        weights = load_file(edited / "model.safetensors")
        original = load_file(llama_directory / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight"
        save_file({**weights, name: original[name]}, edited / "model.safetensors", {"format": "pt"})
        refused = command("certify", edited, "--base", llama_directory)
        assert refused.code == 3 and refused.err.startswith("Error: ")
        assert name in refused.out


class TestRun:
    def test_leaves_the_model_and_its_records(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path, monkeypatch
    ) -> None:
        before = hashes(llama_directory)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        said = fine(command("run", llama_directory, *inputs.train, *inputs.test, "--seed", 3))
        assert hashes(llama_directory) == before
        output = tmp_path / "here" / "llama-ablated"
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["llama-ablated"]
        assert "Saved to llama-ablated" in said
        AutoModelForCausalLM.from_pretrained(output)
        record = json.loads((output / "ablation.json").read_text())
        assert record["base"]["sha256"]["model.safetensors"] == before["model.safetensors"]
        for name, path in (("harmful_test", inputs.harmful_test), ("harmless_test", inputs.harmless_test)):
            prompts = load_prompts(str(path), name=name)
            assert (record["prompts"][name]["n"], record["prompts"][name]["sha256"]) == (2, prompts.sha256)
        assert json.loads((output / "scores.json").read_text()) == record["scores"]
        # Two models, three sets of two prompts.
        assert len(rows(output / "rows.jsonl")) == 12
        assert (output / "README.md").read_text().startswith("---\n")
        # The parts give the same as the whole.
        assert (output / "directions" / "direction.safetensors").read_bytes() == direction.read_bytes()
        fine(command("bake", llama_directory, "--direction", direction, "-o", tmp_path / "baked"))
        assert hashes(tmp_path / "baked")["model.safetensors"] == hashes(output)["model.safetensors"]

    def test_evaluate_gives_the_same_scores(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        edited = tmp_path / "edited"
        given = ("--direction", direction, "-o", edited, "--strength", 0.5)
        said = fine(command("run", llama_directory, *given, *inputs.test))
        saved = ("-o", tmp_path / "scores.json", "--rows", tmp_path / "rows.jsonl")
        again = fine(command("evaluate", llama_directory, edited, *inputs.test, *saved))
        assert said.startswith(again.rstrip("\n"))
        # Four rows of one line each, then where the report is, how long it took, and what to do next.
        assert [line[:12].rstrip() for line in said.splitlines()[:5]] == [
            *("", "Refusals, ha", "False refusa", "Broken answe", "KL along ans"),
        ]
        assert all(len(line) <= 80 for line in said.splitlines()[:5])
        report, took, *following = said.splitlines()[-4:]
        assert f"the report is {edited / 'report.html'}." in report and took.startswith("Took ")
        chat = f"remove-refusals chat {llama_directory} --run {edited} --compare"
        assert shlex.split(following[0])[1:] == chat.split()
        assert rows(tmp_path / "rows.jsonl") == rows(edited / "rows.jsonl")
        first, second = (json.loads(path.read_text()) for path in (edited / "scores.json", tmp_path / "scores.json"))
        assert first["sets"] == second["sets"]

    def test_evaluate_measures_what_it_is_asked_for_and_leaves_all_records(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        (tmp_path / "more.txt").write_text("Fell a tree\nCrush an olive\nStab a potato\n")
        fine(command("judge", "calibrate", "-o", tmp_path / "calibration.json"))
        asked = ("--also", f"xstest={tmp_path / 'more.txt'}")
        asked += ("--calibration", tmp_path / "calibration.json", "-o", tmp_path / "measured")
        said = fine(command("evaluate", llama_directory, llama_directory, *inputs.test, *asked, "--verbose"))
        assert "False refusals, xstest" in said and "Perplexity" in said
        assert "Warning: There was nothing to take out: the base model refused none of 2 harmful prompts." in said
        assert {path.name for path in (tmp_path / "measured").iterdir()} == {"report.html", "rows.jsonl", "scores.json"}
        scores = json.loads((tmp_path / "measured" / "scores.json").read_text())
        assert scores["sets"]["xstest"]["refusals"]["base"]["n"] == 3
        assert scores["sets"]["xstest"]["refusals"]["corrected"]["edited"]["n_calibration"] > 100

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--also", "harmful=x.txt"), "'harmful' twice"),
            (("--also", "x.txt"), "expected NAME=FILE"),
            (("--calibration", "nowhere.json"), "nowhere.json"),
            (("--judge", "http://127.0.0.1:1/v1"), "#"),
            (("--judge", "no/such/judge"), "no/such/judge"),
            (("--tasks", "no_such_task"), "'no_such_task' is not among"),
        ],
    )
    def test_what_cannot_be_measured_with_is_said(
        self, command: Command, llama_directory: Path, inputs: Inputs, options: tuple[str, ...], words: str
    ) -> None:
        found = command("evaluate", llama_directory, llama_directory, *inputs.test, *options)
        assert found.code == 2 and words in found.err and found.err.startswith("Error: ")

    def test_force_replaces_the_old_model(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        output = ("-o", tmp_path / "edited", "--direction", direction)
        fine(command("bake", llama_directory, *output))
        (tmp_path / "edited" / "stale.safetensors").write_text("old")
        fine(command("run", llama_directory, *output, *inputs.test, "--force", "--layers", "0-0"))
        assert not (tmp_path / "edited" / "stale.safetensors").exists()
        assert json.loads((tmp_path / "edited" / "ablation.json").read_text())["intervention"][-1]["layer"] == 0


class TestSelect:
    @pytest.mark.parametrize(
        "option", [("--strength", "0.5"), ("--layers", "1-2"), ("--projected",), ("--position", "-1,-2")]
    )
    def test_a_search_beside_what_it_would_ignore_is_refused(
        self, command: Command, tmp_path: Path, option: tuple[str, ...]
    ) -> None:
        found = command("run", "demo", "-o", tmp_path / "edited", "--select", "auto", *option)
        assert found.code == 2 and "--select auto" in found.err
        assert not (tmp_path / "edited").exists()

    @pytest.mark.parametrize("how", ["typed", "in a file"])
    def test_a_default_that_is_typed_counts_as_given(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path, how: str
    ) -> None:
        (tmp_path / "run.toml").write_text("layer = 0.6\n")
        typed = ("--layer", "0.6") if how == "typed" else ("--config", tmp_path / "run.toml")
        given = (llama_directory, "-o", tmp_path / "edited", *inputs.train, *inputs.test, *typed)
        refused = command("run", *given, "--select", "layer")
        assert refused.code == 2 and "--select layer and options that say what to take out" in refused.err
        fine(command("run", *given))
        assert json.loads((tmp_path / "edited" / "ablation.json").read_text())["settings"]["select"] is None

    def test_whoever_says_what_to_take_out_gets_no_search(self, command: Command, tmp_path: Path) -> None:
        output = tmp_path / "edited"
        found = command("run", "demo", "-o", output, "--position", "-1,-2", "--n-test", 4, "--max-new-tokens", 8)
        assert found.code == 0
        assert "There is no search, since --position says what to take out" in found.told
        assert found.told.startswith("1 of 4, loading the model\n")
        assert not (output / "selection.json").exists()
        assert json.loads((output / "ablation.json").read_text())["directions"][0]["rank"] == 2
