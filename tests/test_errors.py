"""Every bad input: one sentence on standard error, exit code 2, and nothing half-written."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

import tiny
from conftest import TOLD, Command, Inputs, Outcome
from remove_refusals.baking.base import open_base
from remove_refusals.directions.saved import save_direction
from remove_refusals.models.load import load
from remove_refusals.types import Direction, DirectionOrigin

D_MODEL = 32


def sentence(outcome: Outcome) -> str:
    """Check the form that every error has, and return it without its beginning."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ") and outcome.err.endswith(".\n"), outcome.err
    assert outcome.err.count("\n") == 1
    # What another package said may stand in brackets, in as many sentences as it used.
    assert not re.search(r"[.!?] [A-Z]", re.sub(r"\(.*\)", "", outcome.err)), outcome.err
    return outcome.err.removeprefix("Error: ").strip()


def empty_model(directory: Path) -> Path:
    """Make a directory that can be a model's by its names alone."""
    (directory / "empty").mkdir()
    (directory / "empty" / "config.json").write_text("{}")
    return directory / "empty"


def everything_in(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def copied(llama_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_directory, tmp_path / "copy"))


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    return write_direction(tmp_path / "given.safetensors")


def write_direction(path: Path, d_model: int = D_MODEL) -> Path:
    basis = torch.nn.functional.normalize(torch.arange(1.0, d_model + 1), dim=0).unsqueeze(1)
    save_direction(Direction(basis, DirectionOrigin(method="given")), path)
    return path


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with no room left."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(point)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    (point / "filler").write_bytes(bytes(64 * 1024))
    yield point
    subprocess.run(["umount", str(point)], check=True)


class TestModels:
    @pytest.fixture
    def refused(self, command: Command, inputs: Inputs, tmp_path: Path):
        """Give a model to `direction` and to `run` and return the sentence, which must be the same."""

        def give(model: Path | str, *options: object) -> str:
            before = everything_in(tmp_path)
            found = sentence(command("direction", model, "-o", tmp_path / "d.safetensors", *inputs.train, *options))
            again = command("run", model, "-o", tmp_path / "edited", *inputs.train, *inputs.test, *options)
            assert sentence(again) == found
            assert everything_in(tmp_path) == before
            return found

        return give

    def test_missing_directory(self, refused, tmp_path: Path) -> None:
        assert f"{tmp_path / 'absent'} does not exist" in refused(tmp_path / "absent")

    def test_directory_without_config(self, refused, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "has no config.json" in refused(tmp_path / "empty")

    def test_truncated_weights(self, refused, copied: Path) -> None:
        path = copied / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "model.safetensors" in refused(copied)

    def test_corrupt_shard_is_named(self, refused, tmp_path: Path) -> None:
        model = tmp_path / "sharded"
        tiny.llama().save_pretrained(model, max_shard_size="20KB")
        tiny.tokenizer().save_pretrained(model)
        shards = sorted(model.glob("model-*.safetensors"))
        assert len(shards) > 2
        content = shards[1].read_bytes()
        shards[1].write_bytes(content[:8] + b"?" + content[9:])
        assert shards[1].name in refused(model)

    def test_missing_shard_is_named(self, refused, tmp_path: Path) -> None:
        model = tmp_path / "sharded"
        tiny.llama().save_pretrained(model, max_shard_size="20KB")
        tiny.tokenizer().save_pretrained(model)
        shard = sorted(model.glob("model-*.safetensors"))[-1]
        shard.unlink()
        assert shard.name in refused(model)

    def test_unknown_model_type(self, refused, copied: Path) -> None:
        edit_config(copied, model_type="llamb")
        assert "type llamb" in refused(copied)

    def test_config_that_is_not_json(self, refused, copied: Path) -> None:
        (copied / "config.json").write_text("{")
        assert "config.json" in refused(copied)

    def test_encoder_decoder(self, refused, tmp_path: Path) -> None:
        config = T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        tiny.tokenizer().save_pretrained(tmp_path / "t5")
        assert "type t5" in refused(tmp_path / "t5")

    def test_no_tokenizer(self, refused, copied: Path) -> None:
        for path in copied.glob("*token*"):
            path.unlink()
        assert "tokenizer" in refused(copied)

    def test_no_chat_template(self, refused, copied: Path) -> None:
        (copied / "chat_template.jinja").unlink()
        assert "no chat template" in refused(copied)

    def test_unknown_device_and_dtype(self, refused, llama_directory: Path) -> None:
        assert "device abacus" in refused(llama_directory, "--device", "abacus")
        assert "dtype int8" in refused(llama_directory, "--dtype", "int8")

    def test_nan_weights(self, refused, copied: Path) -> None:
        model = tiny.llama()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
        model.save_pretrained(copied)
        found = refused(copied)
        assert "NaN" in found and "layer index 1" in found

    def test_4bit_without_bitsandbytes(
        self, command: Command, llama_directory: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which is how Python notes that a package is not there
        found = command("direction", llama_directory, "-o", "d.safetensors", *inputs.train, "--load-in-4bit")
        assert "bitsandbytes" in sentence(found) and "remove-refusals[4bit]" in found.err

    def test_4bit_cannot_be_saved(self, command: Command, llama_directory: Path, tmp_path: Path) -> None:
        found = command("run", llama_directory, "-o", tmp_path / "edited", "--load-in-4bit")
        assert "expected full weights" in sentence(found)


def test_a_model_that_no_edit_fits_is_refused_by_type(
    command: Command, direction: Path, inputs: Inputs, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, is_decoder=True
    )
    model = tmp_path / "bert"
    BertLMHeadModel(config).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    before = everything_in(tmp_path)
    output = ("-o", tmp_path / "edited")
    assert "'bert'" in sentence(command("bake", model, "--direction", direction, *output))
    assert "'bert'" in sentence(command("run", model, *inputs.train, *inputs.test, *output))
    assert everything_in(tmp_path) == before


class TestPrompts:
    @pytest.fixture
    def refused(self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path):
        """Give a prompt file in every role and return the sentence, which must be the same."""

        def give(name: str, content: str | bytes | None, *options: object) -> str:
            path = tmp_path / name
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            before = everything_in(tmp_path)
            found = sentence(
                command("direction", llama_directory, "-o", tmp_path / "d.pt", "--harmful", path, *options)
            )
            output = ("-o", tmp_path / "answers.jsonl")
            assert sentence(command("generate", llama_directory, "--prompts", path, *output, *options)) == found
            output = ("-o", tmp_path / "scores.json", "--alarming-test", path)
            assert sentence(command("evaluate", llama_directory, llama_directory, *output, *options)) == found
            assert everything_in(tmp_path) == before
            return found

        return give

    def test_missing(self, refused) -> None:
        assert "absent.txt is missing" in refused("absent.txt", None)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "", "are empty"),
            ("a.jsonl", "", "are empty"),
            ("a.txt", b"fine\n\xff\n", "at line 2"),
            ("a.json", '["half', "not JSON"),
            ("a.json", '{"prompt": "alone"}', "expected a list"),
            ("a.json", "[1, 2]", "expected text"),
            ("a.jsonl", '{"prompt": "fine"}\n{"promt": "no"}\n', "line 2"),
            ("a.csv", 'prompt,n\n"open', "starting at row 1"),
            ("a.csv", "n,m\n1,2\n", "the columns n, m"),
            ("a.parquet", b"PAR1 and no more", "Parquet"),
            ("a.docx", "words", "suffix .docx"),
        ],
    )
    def test_of_the_wrong_form(self, refused, name: str, content: str | bytes, message: str) -> None:
        assert message in refused(name, content)

    def test_wrong_column(self, refused) -> None:
        assert "no column 'request'" in refused("a.csv", "prompt,n\nHello,1\n", "--column", "request")

    def test_column_or_split_of_a_text_file(self, refused) -> None:
        assert "leave it away" in refused("a.txt", "Hello\n", "--column", "prompt")
        assert "leave the split away" in refused("a.txt", "Hello\n", "--split", "test")

    def test_more_than_there_are(self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path) -> None:
        found = command("direction", llama_directory, "-o", tmp_path / "d.pt", *inputs.train, "--n-prompts", 5)
        assert "There are 4 harmful prompts in harmful.txt and 5 were asked for" in sentence(found)
        assert not (tmp_path / "d.pt").exists()

    def test_measured_on_what_it_was_found_with(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        inputs.harmful_test.write_text("Open a safe\npick a  LOCK\nCheat at cards\nRead their mail\n")
        before = everything_in(tmp_path)
        found = sentence(
            command("run", llama_directory, "-o", tmp_path / "edited", *inputs.train, *inputs.test, "--n-prompts", 4)
        )
        assert "is in both harmful and" in found
        assert everything_in(tmp_path) == before


class TestDirections:
    @pytest.fixture
    def refused(self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path):
        """Give a direction and options to every command that takes one and return the one sentence."""

        def give(path: Path, *options: object) -> str:
            before = everything_in(tmp_path)
            given = ("--direction", path, *options)
            ways = [
                ("bake", llama_directory, "-o", tmp_path / "edited"),
                ("run", llama_directory, "-o", tmp_path / "edited", *inputs.test),
                ("chat", llama_directory),
                ("generate", llama_directory, "--prompts", inputs.harmful, "-o", tmp_path / "answers.jsonl"),
            ]
            found = {sentence(command(*way, *given)) for way in ways}
            assert len(found) == 1, found
            assert everything_in(tmp_path) == before
            return found.pop()

        return give

    def test_wrong_width_says_both_numbers(self, refused, tmp_path: Path) -> None:
        found = refused(write_direction(tmp_path / "wide.safetensors", d_model=48))
        assert "48" in found and "32" in found

    def test_missing(self, refused, tmp_path: Path) -> None:
        assert "absent.pt does not exist" in refused(tmp_path / "absent.pt")

    def test_pickle_that_runs_code(self, refused, tmp_path: Path) -> None:
        for path, save in ((tmp_path / "a.pt", torch.save), (tmp_path / "b.pt", _pickle)):
            save(Bomb(tmp_path / "exploded"), path)
            assert str(path) in refused(path)
            assert not (tmp_path / "exploded").exists()
        # Read without care it does go off.
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert (tmp_path / "exploded").exists()

    def test_damaged(self, refused, direction: Path) -> None:
        direction.write_bytes(direction.read_bytes()[:-4])
        assert "is corrupt" in refused(direction)

    def test_a_model_is_no_direction(self, refused, llama_directory: Path) -> None:
        assert "not of a model" in refused(llama_directory / "model.safetensors")

    @pytest.mark.parametrize("layers", ["x", "1-", "-1", "0-1-2", "0.5", ""])
    def test_a_layer_range_that_is_none(self, refused, direction: Path, layers: str) -> None:
        assert f"The layers are {layers!r}" in refused(direction, f"--layers={layers}")

    @pytest.mark.parametrize("layers", ["1-2", "2", "1-0"])
    def test_a_layer_range_outside_of_the_model(self, refused, direction: Path, layers: str) -> None:
        assert "does not lie within the model's layers 0-1" in refused(direction, "--layers", layers)

    def test_unknown_sites_and_strengths(self, refused, direction: Path) -> None:
        assert "The sites are 'attn,head'" in refused(direction, "--sites", "attn,head")
        assert "The strength is nan" in refused(direction, "--strength", "nan")

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--layer", "3", "Layer 3 does not lie within a model of 2 layers"),
            ("--layer", "1.5", "Layer 1.5 does not lie"),
            ("--layer", "-1", "Layer -1 does not lie"),
            ("--layer", "nan", "Layer nan does not lie"),
            ("--layer", "inf", "Layer inf does not lie"),
            ("--layer", "-0.1", "Layer -0.1 does not lie"),
            ("--layer", "1.2", "Layer 1.2 does not lie"),
            ("--layer", "middle", "The layer is 'middle'"),
            ("--position", "-30", "expected -12 to -1 because the chat template puts 12 tokens"),
        ],
    )
    def test_places_that_are_not_there(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path, option, value, message
    ) -> None:
        before = everything_in(tmp_path)
        where = (f"{option}={value}", *inputs.train)
        found = sentence(command("direction", llama_directory, "-o", tmp_path / "d.pt", *where))
        assert message in found
        assert sentence(command("run", llama_directory, "-o", tmp_path / "edited", *where, *inputs.test)) == found
        assert everything_in(tmp_path) == before

    def test_file_of_an_unknown_kind(self, command: Command, tmp_path: Path) -> None:
        found = command("direction", empty_model(tmp_path), "-o", tmp_path / "d.npy")
        assert "'.npy', expected .safetensors or .pt" in sentence(found)

    def test_chat_without_one(self, command: Command, llama_directory: Path, direction: Path) -> None:
        assert "--no-ablation" in sentence(command("chat", llama_directory))
        both = ("--no-ablation", "--compare")
        assert "leave one out" in sentence(command("chat", llama_directory, "--direction", direction, *both))


class TestOutputs:
    def test_existing_files_are_kept_without_force(self, command: Command, inputs: Inputs, tmp_path: Path) -> None:
        # That the model is empty is not what is complained of: the look comes before the work.
        absent, old = empty_model(tmp_path), tmp_path / "old.safetensors"
        old.write_text("mine")
        commands = [
            ("direction", absent, "-o", old),
            ("generate", absent, "--prompts", inputs.harmful, "-o", old),
            ("evaluate", absent, absent, "-o", old),
            ("evaluate", absent, absent, "--rows", old),
        ]
        for arguments in commands:
            assert "old.safetensors exists already" in sentence(command(*arguments))
            assert "pass `--force`" in sentence(command(*arguments))
            assert old.read_text() == "mine"

    def test_existing_directories_are_kept_without_force(
        self, command: Command, direction: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        absent, old = empty_model(tmp_path), tmp_path / "old"
        old.mkdir()
        (old / "config.json").write_text("mine")
        before = everything_in(tmp_path)
        for arguments in (("bake", absent, "--direction", direction), ("run", absent)):
            assert "old exists already" in sentence(command(*arguments, "-o", old))
        assert everything_in(tmp_path) == before and (old / "config.json").read_text() == "mine"

    def test_force_replaces_no_directory_but_a_model(
        self, command: Command, llama_directory: Path, direction: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("mine")
        given = ("--direction", direction, "-o", tmp_path / "home", "--force")
        for name in ("bake", "run"):
            assert "is not empty" in sentence(command(name, llama_directory, *given))
        assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"

    @pytest.mark.parametrize("how", ["itself", "link", "parent"])
    def test_the_model_is_never_replaced_by_its_edit(
        self, command: Command, copied: Path, direction: Path, tmp_path: Path, how: str
    ) -> None:
        (tmp_path / "link").symlink_to(copied)
        (tmp_path / "config.json").write_text("{}")
        output = {"itself": copied, "link": tmp_path / "link", "parent": tmp_path}[how]
        before = {path: path.read_bytes() for path in copied.iterdir()}
        for name in ("bake", "run"):
            found = command(name, copied, "--direction", direction, "-o", output, "--force")
            assert "the model itself" in sentence(found)
        assert {path: path.read_bytes() for path in copied.iterdir()} == before

    def test_what_looks_at_a_model_never_replaces_it(
        self, command: Command, copied: Path, direction: Path, inputs: Inputs
    ) -> None:
        before = {path: path.read_bytes() for path in copied.iterdir()}
        config, weights, taken = copied / "config.json", copied / "model.safetensors", ("--direction", direction)
        commands = [
            ("analyze", copied, "-o", copied),
            ("evaluate", "demo", copied, "-o", copied),
            ("evaluate", copied, *taken, "-o", config),
            ("evaluate", copied, *taken, "--rows", config),
            ("generate", copied, "--prompts", inputs.harmful, "-o", config),
            ("direction", copied, "--per-layer", "-o", copied),
            ("bake", copied, *taken, "--as", "gguf-lora", "-o", weights),
            ("bake", copied, *taken, "--as", "lora", "-o", copied),
            ("bake", "demo", "--run", copied, "-o", copied),
        ]
        for arguments in commands:
            assert "the model" in sentence(command(*arguments, "--force"))
        assert {path: path.read_bytes() for path in copied.iterdir()} == before

    def test_no_output_has_the_name_of_the_embedded_model(
        self, command: Command, direction: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        commands = [
            ("bake", "demo", "--direction", direction),
            ("run", "demo"),
            ("analyze", "demo"),
            ("config",),
            ("generate", "demo", "--prompts", inputs.harmful),
        ]
        for arguments in commands:
            for name in ("demo", tmp_path / "demo"):
                assert "name of the embedded model" in sentence(command(*arguments, "-o", name))
        assert not (tmp_path / "demo").exists()

    def test_a_directory_is_taken_for_the_embedded_model_by_its_path_alone(
        self, command: Command, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(llama_directory, "demo")
        embedded, other = command("inspect", "demo"), command("inspect", "./demo")
        assert "d_model 128" in embedded.out and "d_model 32" in other.out
        assert embedded.err == "Note: 'demo' is the embedded model; for the directory of that name write ./demo.\n"
        assert other.err == ""
        assert open_base(Path("demo")).model_map.d_model == 32
        assert load(Path("demo"), dtype="float32").model.config.hidden_size == 32
        command("bake", "./demo", "--direction", write_direction(Path("d.safetensors")), "-o", "edited")
        certified = command("certify", "edited", "--base", "demo")
        assert "This is not the base: edited was made from demo, and " in certified.err and certified.code == 2
        assert command("certify", "edited", "--base", "./demo").code == 0

    def test_full_disk(
        self, command: Command, llama_directory: Path, direction: Path, inputs: Inputs, full_disk: Path
    ) -> None:
        model = llama_directory
        commands = [
            ("direction", model, *inputs.train, "-o", full_disk / "d.safetensors"),
            ("generate", model, "--prompts", inputs.harmful, "-o", full_disk / "a.jsonl", "--max-new-tokens", 4),
            ("bake", model, "--direction", direction, "-o", full_disk / "edited"),
            ("run", model, *inputs.train, *inputs.test, "-o", full_disk / "edited"),
        ]
        for arguments in commands:
            assert "No space left on device" in sentence(command(*arguments))
            assert [path.name for path in full_disk.iterdir()] == ["filler"]

    def test_a_parent_that_is_a_file(self, command: Command, llama_directory: Path, direction: Path) -> None:
        found = command("bake", llama_directory, "--direction", direction, "-o", direction / "edited")
        assert "Not a directory" in sentence(found)


class TestOtherProcess:
    """As a shell sees it: also what other packages print, and signals."""

    @pytest.fixture
    def process(self):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

        def start(*arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "remove_refusals", *map(str, arguments)]
            pipe = subprocess.PIPE
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                text=True,
                env=environment,
                preexec_fn=tiny.heed_interrupts,
            )

        return start

    def test_one_sentence_and_nothing_else(self, process, copied: Path, tmp_path: Path) -> None:
        model = tiny.llama()
        with torch.no_grad():
            model.lm_head.weight[3, 5] = float("nan")
        model.save_pretrained(copied)
        (tmp_path / "p.txt").write_text("Hello\n")
        output = ("-o", tmp_path / "a.jsonl")
        with process("generate", copied, "--prompts", tmp_path / "p.txt", *output) as child:
            out, errors = child.communicate(timeout=120)
        errors = "".join(line for line in errors.splitlines(keepends=True) if not TOLD.match(line))
        assert "NaN" in sentence(Outcome(child.returncode, out, errors))
        assert not (tmp_path / "a.jsonl").exists()

    @pytest.mark.parametrize("moment", ["*", "*/directions/direction.safetensors"])
    def test_interrupt_leaves_nothing(
        self, process, llama_directory: Path, inputs: Inputs, tmp_path: Path, moment: str
    ) -> None:
        inputs.harmful_test.write_text("".join(f"Open safe {number}\n" for number in range(2000)))
        folder = tmp_path / "outputs"
        folder.mkdir()
        with process("run", llama_directory, "-o", folder / "new" / "edited", *inputs.train, *inputs.test) as child:
            wait_for(child, folder / "new", f".edited.*{moment[1:]}")
            child.send_signal(signal.SIGINT)
            out, errors = child.communicate(timeout=120)
        assert child.returncode == 130
        assert out == ""
        assert errors.splitlines()[-1] == "Stopped; nothing was left half-made."
        assert all(TOLD.match(line) for line in errors.splitlines()[:-1])
        assert list(folder.iterdir()) == []

    def test_interrupt_names_what_is_kept(self, process, llama_directory: Path, inputs: Inputs, tmp_path: Path) -> None:
        inputs.alarming_test.write_text("".join(f"Kill process {number}\n" for number in range(2000)))
        folder = tmp_path / "outputs"
        with process("run", llama_directory, "-o", folder / "edited", *inputs.train, *inputs.test) as child:
            wait_for(child, folder, ".edited.journal/stages.jsonl")
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=120)
        assert child.returncode == 130
        kept = folder / ".edited.journal"
        stopped = f"Stopped; what was done is kept in {kept}, where the same command goes on."
        assert errors.splitlines()[-1] == stopped
        assert list(folder.iterdir()) == [kept]


def wait_for(child: subprocess.Popen[str], directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(directory.glob(pattern)):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")


def _pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))
