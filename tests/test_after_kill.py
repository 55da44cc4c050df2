"""Whatever a process was killed at, nothing of it is left once the same command, or another, has come to its end."""

import hashlib
import shutil

import peft  # noqa: F401 - once, and not in each process
import pytest
import torch

import tiny
from killing import run_until
from remove_refusals.baking import bake, bake_gguf_lora, bake_lora, open_base
from remove_refusals.baking.disk import certify_directory
from remove_refusals.directions import intervene, save_direction
from remove_refusals.files import atomic_directory, atomic_file, resumable_directory
from remove_refusals.pipeline import run
from remove_refusals.settings import DirectionSettings, LoadSettings, MeasureSettings, RunSettings
from remove_refusals.types import Direction, DirectionOrigin

DIRECTION = Direction(torch.nn.functional.normalize(torch.ones(32, 1), dim=0), DirectionOrigin(method="given"))


def as_checkpoint(base, output):
    bake(base, intervene(DIRECTION, 2), output, force=True)


def as_lora(base, output):
    bake_lora(base, intervene(DIRECTION, 2), output, force=True)


def as_gguf_lora(base, output):
    bake_gguf_lora(base, intervene(DIRECTION, 2), output, force=True)


def as_direction(base, output):
    save_direction(DIRECTION, output.with_suffix(".safetensors"), force=True)


def as_run(base, output):
    settings = RunSettings(
        model=base.source,
        loading=LoadSettings(device="cpu"),
        direction=DirectionSettings(n_prompts=4),
        measure=MeasureSettings(n_test=2, max_new_tokens=2, kl_tokens=1),
        select=None,
    )
    run(settings, output, force=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model in several safetensors files, and one in a .bin file."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("safe", "pickled"):
        tiny.llama().save_pretrained(folder / name, max_shard_size="40KB" if name == "safe" else "1GB")
        tiny.tokenizer().save_pretrained(folder / name)
    torch.save(tiny.llama().state_dict(), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    return {name: open_base(folder / name) for name in ("safe", "pickled")}


def tree(directory):
    """Every file with its SHA-256, and every directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in directory.rglob("*")
    }


def points(last, n):
    """Points of a job, `n` all over it and three at its end, where what was made is moved into its place."""
    return sorted({1 + last * step // n for step in range(n)} | {last - 2, last - 1, last})


KINDS = {
    "checkpoint": (as_checkpoint, "safe", False, 6),
    "checkpoint in another's place": (as_checkpoint, "safe", True, 3),
    "checkpoint of a .bin": (as_checkpoint, "pickled", False, 6),
    "lora": (as_lora, "safe", False, 3),
    "gguf-lora in another's place": (as_gguf_lora, "safe", True, 3),
    "direction": (as_direction, "safe", False, 9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_that_was_killed_anywhere_leaves_nothing_when_it_is_repeated(bases, tmp_path, kind):
    work, base, there, n = KINDS[kind]
    alone = tmp_path / "alone"
    alone.mkdir()
    if there:
        work(bases[base], alone / "out")
    last = run_until(0, alone, work, bases[base], alone / "out")
    expected = tree(alone)
    assert last > 3
    for point in points(last, n):
        folder = tmp_path / str(point)
        folder.mkdir()
        if there:
            shutil.copytree(alone, folder, dirs_exist_ok=True)
        assert run_until(point, folder, work, bases[base], folder / "out") == 0
        work(bases[base], folder / "out")
        assert tree(folder) == expected, point
        shutil.rmtree(folder)


def test_a_run_that_was_killed_leaves_nothing_when_it_is_repeated(bases, tmp_path):
    (tmp_path / "alone").mkdir()
    last = run_until(0, tmp_path / "alone", as_run, bases["pickled"], tmp_path / "alone" / "out")
    for point in (last // 3, last - 2):
        folder = tmp_path / str(point)
        folder.mkdir()
        run_until(point, folder, as_run, bases["pickled"], folder / "out")
        assert any(folder.glob(".out.*"))
        as_run(bases["pickled"], folder / "out")
        assert tree(folder).keys() == tree(tmp_path / "alone").keys()


def test_another_command_with_the_same_output_removes_what_is_left(bases, tmp_path):
    last = run_until(0, tmp_path, as_checkpoint, bases["pickled"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run_until(last // 2, tmp_path, as_checkpoint, bases["pickled"], tmp_path / "out")
    run_until(4, tmp_path, as_lora, bases["safe"], tmp_path / "out")
    (tmp_path / ".out.journal").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    as_lora(bases["safe"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def certified(base, output):
    certify_directory(output, base.source)


def test_certify_leaves_nothing(bases, tmp_path):
    as_checkpoint(bases["pickled"], tmp_path / "out")
    expected = tree(tmp_path)
    for point in (2, 3):
        run_until(point, tmp_path, certified, bases["pickled"], tmp_path / "out")
        assert len(list(tmp_path.iterdir())) == 2
        certified(bases["pickled"], tmp_path / "out")
        assert tree(tmp_path) == expected


def replaced(output):
    with atomic_directory(output, force=True) as directory:
        (directory / "config.json").write_text("new")


def test_what_was_set_aside_when_a_process_was_killed_comes_back(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    last = run_until(0, tmp_path, replaced, output)
    seen = set()
    for point in range(1, last + 1):
        shutil.rmtree(output)
        output.mkdir()
        (output / "config.json").write_text("old")
        run_until(point, tmp_path, replaced, output)
        seen.add(output.exists())
        with pytest.raises(ValueError, match="x"), atomic_directory(output, force=True):
            raise ValueError("x")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (output / "config.json").read_text() in ("old", "new")
    assert seen == {True, False}


def test_what_another_process_is_making_is_let_alone(tmp_path):
    for make in (atomic_directory, atomic_file, resumable_directory):
        with make(tmp_path / "out") as staging:
            with atomic_directory(tmp_path / "out") as other:
                (other / "config.json").write_text("other")
            assert staging.parent.is_dir()
            assert len(list(tmp_path.iterdir())) == 2
            shutil.rmtree(tmp_path / "out")
            if make is atomic_file:
                staging.write_text("x")
        (tmp_path / "out").unlink() if make is atomic_file else shutil.rmtree(tmp_path / "out")
        assert not list(tmp_path.iterdir())
