"""Options from a file, and runs repeated from their records."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import tiny
from remove_refusals.cli.main import app
from remove_refusals.cli.options import default_configuration, made, read_configuration, settings_of
from remove_refusals.errors import ConfigurationError, RecordError
from remove_refusals.pipeline import reproduce
from remove_refusals.settings import (
    DirectionSettings,
    DiskSettings,
    EditSettings,
    GradientSettings,
    LayerSettings,
    LoadSettings,
    MeasureSettings,
    PromptSource,
    Rule,
    RunFiles,
    RunSettings,
)

WORDS = {
    "a": "rob hack lie",
    "b": "cook sing draw",
    "c": "kill shoot",
    "d": "steal break burn",
    "e": "bake water paint",
}


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "remove_refusals", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its prompts, and a configuration that runs on them."""
    place = tmp_path_factory.mktemp("place")
    tiny.llama().to(torch.bfloat16).save_pretrained(place / "base")
    tiny.tokenizer().save_pretrained(place / "base")
    for name, words in WORDS.items():
        (place / f"{name}.txt").write_text("".join(f"Please {word} it\n" for word in words.split()))
    (place / "run.toml").write_text(
        'model = "base"\noutput = "out"\n[direction]\nharmful = "d.txt"\nharmless = "e.txt"\nn-prompts = 3\n'
        '[measure]\nharmful-test = "a.txt"\nharmless_test = "b.txt"\nalarming-test = "c.txt"\nmax-new-tokens = 6\n'
        'kl-tokens = 4\nstrength = 0.5\ncalibration = "sub/calibration.json"\n'
    )
    (place / "sub").mkdir()
    assert command("judge", "calibrate", "-o", "sub/calibration.json", cwd=place).returncode == 0
    done = command("run", "--config", "run.toml", "--kl-tokens", "3", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def test_a_run_from_a_file_is_the_run_of_its_options_and_the_command_line_wins(place: Path) -> None:
    settings = json.loads((place / "out" / "ablation.json").read_text())["settings"]
    assert settings["model"] == "base" and settings["edit"]["strength"] == 0.5 and settings["select"] is None
    assert settings["direction"]["n_prompts"] == 3 and settings["direction"]["harmful"]["source"] == "d.txt"
    assert (settings["measure"]["max_new_tokens"], settings["measure"]["kl_tokens"]) == (6, 3)


def test_every_option_of_run_comes_from_the_tree() -> None:
    names = {option.name for option in typer.main.get_command(app).commands["run"].params}
    declared = {one.parameter for tree in (RunSettings, RunFiles) for one in settings_of(tree).values()}
    assert names == declared | {"config", "help_all", "quiet", "log", "as_json", "verbose"}


def test_every_setting_says_what_it_is() -> None:
    for tree in (PromptSource, LoadSettings, DirectionSettings, EditSettings, MeasureSettings, RunFiles, DiskSettings):
        assert all(field.description for field in tree.model_fields.values()), tree
    for tree in (GradientSettings, LayerSettings, Rule):
        assert all(field.description for field in tree.model_fields.values()), tree


def test_the_pages_say_of_every_option_what_the_tree_says() -> None:
    told = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for tree in (RunSettings, RunFiles):
        for name, one in settings_of(tree).items():
            default = "" if one.default is None or one.default is False else f"`{one.default}`"
            assert one.option.is_argument or f"| `--{name}` | {default} | {one.declared.description} |" in told


def test_the_default_file_is_toml_that_changes_nothing_and_gives_the_tree_back(tmp_path: Path) -> None:
    text = default_configuration()
    assert tomllib.loads(text) == {}
    for tree in (RunSettings, RunFiles):
        for name in settings_of(tree):
            assert f"# {name} " in text
    # Each default, once its # is taken away, is what the command takes for granted anyway.
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    found = read_configuration(tmp_path / "all.toml")
    assert len(found) > 15
    for tree in (RunSettings, RunFiles):
        names = {one.parameter for one in settings_of(tree).values()}
        assert made(tree, {name: value for name, value in found.items() if name in names}) == tree()


def test_a_column_is_for_all_files_or_for_some() -> None:
    more = {"also": ["mine=a.csv", "own=b.csv"]}
    everywhere = made(RunSettings, more | {"column": "goal"})
    assert everywhere.direction.harmful.column == everywhere.measure.harmless.column == "goal"
    assert [source.column for _, source in everywhere.measure.more] == ["goal", "goal"]
    apart = made(RunSettings, more | {"column": "harmful=goal,harmless-test=text,own=q"})
    assert (apart.direction.harmful.column, apart.direction.harmless.column) == ("goal", None)
    assert (apart.measure.harmful.column, apart.measure.harmless.column) == (None, "text")
    assert [source.column for _, source in apart.measure.more] == [None, "q"]
    with pytest.raises(ConfigurationError, match="the sets are harmful, harmless, harmful-test"):
        made(RunSettings, {"column": "harmless=a,hramful=b"})


def test_a_tree_is_its_record_again() -> None:
    settings = RunSettings(
        direction=DirectionSettings(harmful=PromptSource(source="a/b", column="c"), layer=3, position=(-1, -2)),
        edit=EditSettings(layers=(2, 4), sites=("mlp",)),
        measure=MeasureSettings(more=(("xstest", PromptSource(source="x.csv")),), tasks=("arc",)),
        select=None,
    )
    assert RunSettings.model_validate(json.loads(json.dumps(settings.record()))) == settings


@pytest.mark.parametrize("typed", [{"layer": "0.6"}, {"strength": 1.0}, {"sites": "embedding,attn,mlp"}])
def test_a_default_that_is_typed_counts_as_given(typed: dict[str, object]) -> None:
    assert made(RunSettings, typed) == RunSettings()
    assert made(RunSettings, typed).says_what_to_take_out
    assert not made(RunSettings, {"seed": 0, "tied": "untie"}).says_what_to_take_out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("strenght = 1.0", "the key 'strenght', expected an option of `run`; did you mean 'strength'"),
        ("xyzzy = 1.0", "the key 'xyzzy', expected an option of `run`; there are model,"),
        ("n-prompts = 'many'", "'n-prompts' the value 'many', expected a whole number"),
        ("strength = true", "expected a number"),
        ("plain = 1", "expected true or false"),
        ("also = 'a=b'", "expected a list of texts"),
        ("[x]\nseed = 1\n[y]\nseed = 2", "'seed' in two tables"),
        ("seed = ", "expected TOML"),
        ("n-prompts = 0", "'n-prompts' the value 0, expected at least 1"),
        ("max-refusals = 1.5", "'max-refusals' the value 1.5, expected at most 1"),
        ("tied = 'loose'", "'tied' the value 'loose', expected one of auto, untie, both"),
        ("layers = '9-'", "'layers' the value '9-', expected a range such as 8-20"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_key_and_value(tmp_path: Path, content, words) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(ConfigurationError, match="cannot be read" if "TOML" in words else words.replace("'", "['\"]")):
        read_configuration(tmp_path / "run.toml")
    done = command("run", "--config", "run.toml", cwd=tmp_path)
    assert (
        done.returncode == 2 and done.stderr.startswith("Error: The configuration") and "Traceback" not in done.stderr
    )


def test_a_run_is_repeated_with_equal_hashes(place: Path) -> None:
    (place / "calibration.json").write_bytes((place / "sub" / "calibration.json").read_bytes())
    done = command("reproduce", "out", cwd=place)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("same") and line.endswith("model.safetensors") for line in lines)
    assert not any(line.startswith(("different", "missing", "new")) for line in lines), done.stdout
    total = sum(path.is_file() for path in (place / "out").rglob("*"))
    assert lines[-1] == f"{total} of {total} files came out the same."


def test_weights_that_differ_are_told_with_exit_code_3(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    done = command("reproduce", "out", "--model", place / "base", "--files", place, "--json", cwd=tmp_path)
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert [name for name, _, _ in found["different"]] == ["model.safetensors"]
    assert not found["weights_alike"]


def test_files_that_cannot_be_found_and_another_base_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"'d\.txt', expected it in"):
        reproduce(place / "out", files=tmp_path)
    tiny.llama(seed=5).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(RecordError, match=r"model\.safetensors .* differs"):
        reproduce(place / "out", files=place, model=str(tmp_path / "base"))
    with pytest.raises(RecordError):
        reproduce(tmp_path)
