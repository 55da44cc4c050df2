"""An edit on disk that is killed, or meets a full disk or a change, and goes on."""

import hashlib
import multiprocessing
import os
import random
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

import zoo
from editing_process import MEMORY, edit_when_told, edit_within_limit
from remove_refusals.baking.base import open_base
from remove_refusals.baking.disk import bake
from remove_refusals.baking.shards import LEDGER_FILE, plan_files, write_shard
from remove_refusals.errors import CheckpointError, OutputError
from remove_refusals.models.checkpoint import checkpoint_files, file_hashes
from streaming import saved, streamed, taken_out


@pytest.fixture
def large(tmp_path):
    """A checkpoint of a few MB in many shards, and its direction in a file."""
    saved(tmp_path, "llama", intermediate_size=1024, num_hidden_layers=zoo.N_LAYERS, shards="400KB")
    assert len(checkpoint_files(tmp_path / "base")) > 5
    return tmp_path


def whole_hashes(directory):
    """SHA-256 of every file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def process(work, *arguments):
    """A process that is forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remove_refusals.baking.disk", "transformers.models.llama.modeling_llama"])
    started = context.Process(target=work, args=arguments)
    started.start()
    return started


def editing(checkpoint, output):
    """A process that has begun to edit."""
    context = multiprocessing.get_context("forkserver")
    ready, begin = context.Event(), context.Event()
    started = process(edit_when_told, checkpoint, taken_out(), output, ready, begin)
    assert ready.wait(120)
    begin.set()
    return started


def test_a_process_killed_anywhere_is_resumed_to_the_same_bytes(large):
    checkpoint = open_base(large / "base")
    output, unfinished = large / "edited", large / ".edited.partial"
    undisturbed = editing(checkpoint, large / "undisturbed")
    begun = time.monotonic()
    undisturbed.join()
    lasted = time.monotonic() - begun
    assert undisturbed.exitcode == 0
    expected, source = whole_hashes(large / "undisturbed"), whole_hashes(large / "base")
    generator = random.Random(0)
    killed, resumed = 0, 0
    for number in range(25):
        disturbed = editing(checkpoint, output)
        time.sleep(generator.uniform(0, lasted))
        disturbed.kill()
        disturbed.join()
        resumed += any(unfinished.glob("*.safetensors"))
        if not output.exists():
            killed += 1
            bake(checkpoint, taken_out(), output, disk=MEMORY)
        assert whole_hashes(output) == expected, number
        assert not unfinished.exists()
        shutil.rmtree(output)
    # On a busy machine most edits end before they are killed.
    assert killed > 1 and resumed > 1
    assert whole_hashes(large / "base") == source


def test_a_disk_that_fills_up_leaves_nothing_half_written(large):
    largest = max(path.stat().st_size for path in checkpoint_files(large / "base"))
    checkpoint = open_base(large / "base")
    stopped = process(edit_within_limit, checkpoint, taken_out(), large / "streamed", largest - 100)
    stopped.join()
    assert stopped.exitcode == 2 and not (large / "streamed").exists()
    whole = streamed(large, taken_out(), "whole")
    assert whole_hashes(streamed(large, taken_out()).directory) == whole_hashes(whole.directory)


def interrupted(folder, name="streamed"):
    """Leave what a process leaves that is killed when two files are whole."""

    class KilledError(BaseException):
        pass

    def on_progress(stage, done, total):
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        streamed(folder, taken_out(), name, jobs=1, on_progress=on_progress)
    return folder / f".{name}.partial"


def test_ctrl_c_names_what_is_kept(large):
    def on_progress(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        streamed(large, taken_out(), jobs=1, on_progress=on_progress)
    (note,) = stopped.value.__notes__
    assert str(large / ".streamed.partial") in note and (large / ".streamed.partial").is_dir()


def test_whole_files_are_not_written_again(large):
    partial = interrupted(large)
    whole = sorted(partial.glob("*.safetensors"))
    written = {path.name: path.stat().st_mtime_ns for path in whole[:2]}
    with (partial / LEDGER_FILE).open("a") as file:
        file.write('{"file": "model-0000')
    seen = []
    found = streamed(large, taken_out(), on_progress=lambda stage, done, total: seen.append(done))
    assert seen[0] == 3 and seen[-1] == len(checkpoint_files(large / "base"))
    assert {name: (found.directory / name).stat().st_mtime_ns for name in written} == written
    assert found.record.base.sha256 == file_hashes(large / "base")


def test_another_plan_is_not_mixed_with_an_unfinished_one(large):
    interrupted(large)
    with pytest.raises(OutputError, match="begun with another plan"):
        streamed(large, taken_out(strength=0.5))
    found = streamed(large, taken_out(strength=0.5), force=True)
    assert found.certificate.passed and found.record.intervention[0].strength == 0.5


def test_a_base_that_changed_is_not_mixed_with_an_unfinished_output(large):
    interrupted(large)
    path = checkpoint_files(large / "base")[-1]
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="begun with another base"):
        streamed(large, taken_out())
    assert streamed(large, taken_out(), force=True).certificate.passed


def test_a_base_that_changes_while_it_is_read_is_refused(large):
    checkpoint = open_base(large / "base")
    file = plan_files(checkpoint, checkpoint.plan(taken_out())).files[0]

    def touched():
        os.utime(file.header.path)
        return False

    with pytest.raises(CheckpointError, match="changed while it was read"):
        write_shard(file, large / "out", "plain", 1 << 20, touched)


def test_two_processes_do_not_write_one_output(large):
    partial = interrupted(large)
    import fcntl

    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process"):
        streamed(large, taken_out())
    os.close(descriptor)
    assert streamed(large, taken_out()).certificate.passed
