import hashlib
import io
import json
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from remove_refusals.directions.saved import check_direction_path, direction_sha256, load_direction, save_direction
from remove_refusals.errors import CheckpointError, DirectionError, NumericalError, OutputError
from remove_refusals.files import read_json, versions, write_json, write_jsonl
from remove_refusals.types import Direction, DirectionOrigin

ORIGIN = DirectionOrigin(
    method="projected-mean-difference",
    model="example/model",
    layer=7,
    position=-2,
    seed=3,
    n_harmful=32,
    n_harmless=31,
    harmful_sha256="a" * 64,
    harmless_sha256="b" * 64,
)

SAFETENSORS_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class Bomb:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def random_direction(d_model: int = 16, columns: int = 1) -> Direction:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d_model, columns, generator=generator))
    return Direction(basis, ORIGIN)


@given(data=JSON_VALUES)
@settings(max_examples=100, deadline=None)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, data)
    assert read_json(path, error=CheckpointError) == data


def test_json_keeps_order_and_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": ["é", (1, 2)]})
    expected = '{\n  "z": 1,\n  "a": [\n    "é",\n    [\n      1,\n      2\n    ]\n  ]\n}\n'
    assert (tmp_path / "a.json").read_bytes() == expected.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_is_not_finite_and_says_where(tmp_path: Path, value: float) -> None:
    with pytest.raises(NumericalError, match=r"\$\.scores\[1\]\.kl .* -?(nan|inf)"):
        write_json(tmp_path / "a.json", {"scores": [{"kl": 0.0}, {"kl": value}]})
    with pytest.raises(NumericalError, match=r"row 2\.kl"):
        write_jsonl(tmp_path / "a.jsonl", [{"kl": 0.0}, {"kl": value}])
    assert list(tmp_path.iterdir()) == []


def test_existing_records_are_kept_without_force(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(OutputError, match="exists already"):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json", error=CheckpointError) == 1
    write_json(tmp_path / "a.json", 2, force=True)
    assert read_json(tmp_path / "a.json", error=CheckpointError) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff", b"[" * 100_000])
def test_bad_json_is_an_error_of_the_given_type(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DirectionError, match=r"a\.json is not JSON in UTF-8"):
        read_json(tmp_path / "a.json", error=DirectionError)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "a.json", error=CheckpointError)


def test_jsonl_takes_rows_as_they_come(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ({"i": i, "text": "a\nb\u2028é"} for i in range(3)))
    lines = (tmp_path / "a.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [{"i": i, "text": "a\nb\u2028é"} for i in range(3)]


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("origin", [ORIGIN, DirectionOrigin(method="given")])
def test_direction_comes_back_with_its_origin(tmp_path: Path, columns: int, origin: DirectionOrigin) -> None:
    direction = replace(random_direction(columns=columns), origin=origin)
    save_direction(direction, tmp_path / "a.safetensors")
    loaded = load_direction(tmp_path / "a.safetensors")
    assert torch.equal(loaded.basis, direction.basis)
    assert loaded.origin == origin


def test_direction_file_is_plain_safetensors(tmp_path: Path) -> None:
    save_direction(random_direction(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert list(file.keys()) == ["direction"]
        assert file.get_tensor("direction").shape == (16, 1)
        record = json.loads(file.metadata()["remove_refusals"])
    assert record["format_version"] == 1
    assert record["library_version"] == versions().get("remove-refusals")
    assert record["origin"]["harmful_sha256"] == "a" * 64


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_same_direction_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    contents = set()
    for number in range(5):
        path = tmp_path / str(number) / f"a{suffix}"
        save_direction(random_direction(), path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_plain_file_holds_the_bare_vector(tmp_path: Path) -> None:
    direction = random_direction()
    save_direction(direction, tmp_path / "a.pt")
    vector = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(vector, direction.basis[:, 0])
    loaded = load_direction(tmp_path / "a.pt")
    assert torch.allclose(loaded.basis, direction.basis, atol=1e-6)
    assert loaded.origin == DirectionOrigin(method="given")


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES)
@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1)])
def test_vector_from_elsewhere_is_scaled_to_unit_length(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    vector = torch.arange(8, dtype=dtype).reshape(shape)
    torch.save(vector, tmp_path / "a.pt")
    save_file({"direction": vector}, tmp_path / "a.safetensors")
    expected = torch.arange(8.0) / torch.arange(8.0).norm()
    for name in ("a.pt", "a.safetensors"):
        loaded = load_direction(tmp_path / name)
        assert loaded.basis.shape == (8, 1)
        assert torch.allclose(loaded.basis[:, 0], expected, atol=1e-6)
        assert loaded.origin.method == "given"


def test_direction_of_several_columns_does_not_fit_the_plain_file(tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match=r"3 columns.*\.safetensors"):
        save_direction(random_direction(columns=3), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["torch", "pickle", "legacy"])
def test_code_in_a_file_is_not_executed(tmp_path: Path, kind: str) -> None:
    bomb = Bomb(tmp_path / "exploded")
    path = tmp_path / "a.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DirectionError, match=r"a\.pt"):
        load_direction(path)
    assert not (tmp_path / "exploded").exists()
    # The file is a working bomb: read without care, it goes off.
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, 4), r"shape \(3, 4\)"),
        (torch.ones(2, 1, 4), r"shape \(2, 1, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(0), r"shape \(0,\)"),
        (torch.arange(4), "floating-point"),
        (torch.ones(4).to_sparse(), "one floating-point vector"),
        (torch.ones(1).expand(10**15), r"shape \(1000000000000000,\)"),
        (torch.ones(4, device="meta"), "one floating-point vector"),
        (torch.ones(4, dtype=torch.complex64), "floating-point"),
        (torch.zeros(4), r"length 0\.0"),
        (torch.tensor([1.0, float("nan")]), "length nan"),
        (torch.tensor([1.0, float("inf")]), "length inf"),
        ({"direction": torch.ones(4)}, "holds dict"),
        ([1.0, 2.0], "holds list"),
    ],
)
def test_plain_file_of_something_else(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(DirectionError, match=message):
        load_direction(tmp_path / "a.pt")


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        with pytest.raises(DirectionError, match="No such file"):
            load_direction(tmp_path / f"a{suffix}")
    with pytest.raises(DirectionError, match=r"'\.npy', expected \.safetensors or \.pt"):
        load_direction(tmp_path / "a.npy")
    with pytest.raises(DirectionError, match=r"expected \.safetensors or \.pt"):
        save_direction(random_direction(), tmp_path / "a")


def test_path_is_checked_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    check_direction_path(path)
    assert not path.exists()
    save_direction(random_direction(), path)
    check_direction_path(path, force=True)
    with pytest.raises(OutputError, match="exists already"):
        check_direction_path(path)
    with pytest.raises(DirectionError, match=r"'\.npy'"):
        check_direction_path(tmp_path / "a.npy")
    (tmp_path / "directory.pt").mkdir()
    with pytest.raises(OutputError, match="is a directory, expected a file"):
        check_direction_path(tmp_path / "directory.pt", force=True)
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, weights)
    with pytest.raises(OutputError, match="is no direction"):
        check_direction_path(weights, force=True)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_file_gives_a_direction_or_a_direction_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"a{suffix}"
    save_direction(random_direction(), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        loaded = load_direction(path)
    except DirectionError as error:
        assert f"a{suffix}" in str(error) or "direction" in str(error)
    else:
        assert torch.isfinite(loaded.basis).all()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pickle_gives_a_direction_or_a_direction_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    # The checksums of the zip archive are made anew, so that the damage reaches the unpickler.
    directory = tmp_path_factory.mktemp("damaged")
    save_direction(random_direction(), directory / "whole.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(directory / "whole.pt") as whole, zipfile.ZipFile(buffer, "w") as damaged:
        for name in whole.namelist():
            content = bytearray(whole.read(name))
            if name.endswith("data.pkl"):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            damaged.writestr(name, bytes(content))
    (directory / "a.pt").write_bytes(buffer.getvalue())
    try:
        load_direction(directory / "a.pt")
    except DirectionError as error:
        assert "a.pt" in str(error)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not json", "at the top None"),
        ('{"format_version": 2, "origin": {"method": "x"}}', "format_version 2"),
        ('{"format_version": 1}', "at origin"),
        ('{"format_version": 1, "origin": {}}', r"origin\.method \{\}"),
        ('{"format_version": 1, "origin": {"method": "x", "colour": "red"}}', "colour"),
    ],
)
def test_record_of_another_form(tmp_path: Path, record: str, message: str) -> None:
    content = save({"direction": random_direction().basis}, metadata={"remove_refusals": record})
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DirectionError, match=message):
        load_direction(tmp_path / "a.safetensors")


def test_model_weights_are_not_a_direction(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(DirectionError, match=r"model\.norm\.weight.*expected one named `direction`"):
        load_direction(tmp_path / "a.safetensors")


def test_hash_depends_on_the_basis_alone() -> None:
    direction = random_direction(columns=2)
    same = Direction(direction.basis.T.contiguous().T, DirectionOrigin(method="given"))
    assert not same.basis.is_contiguous()
    assert direction_sha256(same) == direction_sha256(direction)
    assert direction_sha256(Direction(-direction.basis, ORIGIN)) != direction_sha256(direction)
    unit = torch.eye(4)[:, :1]
    expected = hashlib.sha256(b"4x1\n" + struct.pack("<4f", 1, 0, 0, 0)).hexdigest()
    assert direction_sha256(Direction(unit, ORIGIN)) == expected


def test_versions_name_what_runs() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "torch", "transformers", "safetensors"} <= found.keys()
