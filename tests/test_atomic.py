import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from remove_refusals.errors import OutputError
from remove_refusals.files import atomic_directory, atomic_file, resumable_directory

NOBODY = 65534


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def make_model(directory: Path, content: str = "{}") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(content)
    return directory


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(point)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.fixture
def closed_directory() -> Iterator[Path]:
    """A directory that the running user may read but not write to."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o555)
        privileged = os.geteuid() == 0
        if privileged:
            os.seteuid(NOBODY)
        yield directory
        if privileged:
            os.seteuid(0)
        directory.chmod(0o755)


def test_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with atomic_directory(target) as staging:
        assert staging.parent == target.parent
        assert staging.name.startswith(".model.") and str(os.getpid()) not in staging.name.split(".")
        (staging / "sub").mkdir()
        (staging / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert names_in(target.parent) == ["model"]


def test_directory_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing_and_passes(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="in the middle"), atomic_directory(tmp_path / "new" / "model") as staging:
        (staging / "a.txt").write_text("a")
        raise kind("in the middle")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_exception_leaves_the_old_directory(tmp_path: Path, kind: type[BaseException]) -> None:
    target = make_model(tmp_path / "model", "old")
    with pytest.raises(kind), atomic_directory(target, force=True) as staging:
        (staging / "config.json").write_text("new")
        raise kind
    assert (target / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["model"]


def test_parents_in_which_others_wrote_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), atomic_directory(tmp_path / "new" / "model"):
        (tmp_path / "new" / "other.txt").write_text("theirs")
        raise ValueError("x")
    assert names_in(tmp_path / "new") == ["other.txt"]


def test_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    target = make_model(tmp_path / "model")
    entered = False
    with pytest.raises(OutputError, match=r"model exists already.*--force"), atomic_directory(target):
        entered = True
    assert not entered


def test_force_replaces_a_model_and_nothing_stays(tmp_path: Path) -> None:
    target = make_model(tmp_path / "model", "old")
    (target / "stale.safetensors").write_text("old")
    with atomic_directory(target, force=True) as staging:
        (staging / "ablation.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert names_in(target) == ["ablation.json"]
    assert names_in(tmp_path) == ["model"]


def test_force_replaces_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model", force=True) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "model" / "config.json").read_text() == "new"


def test_force_never_replaces_what_is_no_model(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds none of config\.json"), atomic_directory(home, force=True):
        pass
    assert (home / "thesis.tex").read_text() == "years of work"


def test_force_never_replaces_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    expected = pytest.raises(OutputError, match="is a file, expected a directory")
    with expected, atomic_directory(tmp_path / "file", force=True):
        pass
    make_model(tmp_path / "model")
    expected = pytest.raises(OutputError, match="is a directory, expected a file")
    with expected, atomic_file(tmp_path / "model", force=True):
        pass


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(OutputError, match="exists already"), atomic_directory(target) as staging:
        (staging / "config.json").write_text("ours")
        make_model(target, "theirs")
    assert (target / "config.json").read_text() == "theirs"
    assert names_in(tmp_path) == ["model"]


def test_link_is_followed_not_replaced(tmp_path: Path) -> None:
    real = make_model(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(real)
    with atomic_directory(tmp_path / "link", force=True) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (real / "config.json").read_text() == "new"


def test_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "a.json"
    with pytest.raises(ValueError, match="x"), atomic_file(target) as staging:
        staging.write_text("half")
        raise ValueError("x")
    assert names_in(tmp_path) == []
    with atomic_file(target) as staging:
        assert staging.suffix == ".json"
        staging.write_text("whole")
    assert target.read_text() == "whole"
    with pytest.raises(OutputError, match="exists already"), atomic_file(target):
        pass
    with atomic_file(target, force=True) as staging:
        staging.write_text("newer")
    assert target.read_text() == "newer"
    assert names_in(target.parent) == ["a.json"]


def test_full_disk_with_plain_files(full_disk: Path) -> None:
    expected = pytest.raises(OutputError, match=r"model could not be written \(No space left on device\)")
    with expected, atomic_directory(full_disk / "model") as staging:
        (staging / "weights").write_bytes(bytes(2_000_000))
    assert names_in(full_disk) == []


def test_full_disk_with_safetensors(full_disk: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), atomic_directory(full_disk / "model") as staging:
        save_file({"weight": torch.ones(500_000)}, staging / "model.safetensors")
    assert names_in(full_disk) == []


def test_full_disk_keeps_the_old_model(full_disk: Path) -> None:
    target = make_model(full_disk / "model", "old")
    with pytest.raises(OutputError, match="No space left"), atomic_directory(target, force=True) as staging:
        (staging / "weights").write_bytes(bytes(2_000_000))
    assert (target / "config.json").read_text() == "old"
    assert names_in(full_disk) == ["model"]


def test_file_size_limit(tmp_path: Path) -> None:
    # Works without privileges: the system refuses to let a file of this process grow past the limit.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OutputError, match="room for all of it"), atomic_file(tmp_path / "a.bin") as staging:
            staging.write_bytes(bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names_in(tmp_path) == []


def test_closed_directory(closed_directory: Path) -> None:
    for target in (closed_directory / "model", closed_directory / "new" / "model"):
        with pytest.raises(OutputError, match=r"\(Permission denied\).*permissions"), atomic_directory(target):
            pass
    with pytest.raises(OutputError, match=r"\(Permission denied\)"), atomic_file(closed_directory / "a") as staging:
        staging.write_text("a")


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Not a directory"), atomic_directory(tmp_path / "file" / "model"):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    for writer in (atomic_directory, resumable_directory):
        with (
            pytest.raises(OutputError, match="expected a place that this user can write to"),
            writer(Path("/proc/out")),
        ):
            pass


def test_a_missing_file_of_the_caller_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), resumable_directory(tmp_path / "out") as directory:
        (directory / "not there").read_text()


def test_unreadable_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "model"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "source" / "config.json"))
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "model"):
        (tmp_path / "source").read_text()


def test_interrupt_in_the_middle_of_another_process(tmp_path: Path) -> None:
    make_model(tmp_path / "old", "old")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from remove_refusals.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), force=True) as staging:\n"
        "    with (staging / 'weights').open('wb') as file:\n"
        "        file.write(bytes(100_000))\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    for name in ("old", "new"):
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=tiny.heed_interrupts
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert len(names_in(tmp_path)) == 2
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=30)
        assert "KeyboardInterrupt" in errors
        assert names_in(tmp_path) == ["old"]
        assert (tmp_path / "old" / "config.json").read_text() == "old"
