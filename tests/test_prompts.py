import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from remove_refusals.errors import PromptError
from remove_refusals.prompts import (
    EMBEDDED_SETS,
    as_prompts,
    check_disjoint,
    draw,
    embedded_prompts,
    load_prompts,
    split_by_size,
)
from remove_refusals.types import PromptSet

PROMPTS = ("Bake bread", 'Say "hi", please', "Zwei\nZeilen é 🙂")

PROMPT_SETS = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=30).map(
    lambda prompts: PromptSet("p", tuple(prompts), "test")
)
SEEDS = st.integers(min_value=0, max_value=2**32)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[object]]) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def numbered(n: int, name: str = "p") -> PromptSet:
    return PromptSet(name, tuple(f"prompt {i}" for i in range(n)), "test")


def test_text_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\ufeffone\r\n\n   \n two \u2028 halves\nlast")
    loaded = load_prompts(source, name="mine")
    assert loaded == PromptSet("mine", ("one", " two \u2028 halves", "last"), "a.txt")


def test_file_without_suffix(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "prompts", "one\n"), name="p").prompts == ("one",)


@pytest.mark.parametrize(
    "content",
    [
        list(PROMPTS),
        {"prompts": list(PROMPTS)},
        [{"id": i, "text": prompt} for i, prompt in enumerate(PROMPTS)],
        {"version": 1, "data": [{"text": prompt} for prompt in PROMPTS]},
        {"id": [1, 2, 3], "text": list(PROMPTS)},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_file(tmp_path: Path, content: object, ascii_only: bool) -> None:
    source = write(tmp_path / "a.json", json.dumps(content, ensure_ascii=ascii_only))
    assert load_prompts(source, name="p").prompts == PROMPTS


@pytest.mark.parametrize("as_objects", [True, False])
def test_jsonl_file(tmp_path: Path, as_objects: bool) -> None:
    rows = [{"n": 1, "prompt": prompt} if as_objects else prompt for prompt in PROMPTS]
    source = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    loaded = load_prompts(source, name="p")
    assert loaded.prompts == PROMPTS
    assert loaded.source == ("a.jsonl, column prompt" if as_objects else "a.jsonl")


def test_csv_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", '"goal",target\nBake bread,x\n"Say ""hi"", please",y\n\n"Zwei\nZeilen é 🙂",z\n')
    assert load_prompts(source, name="p") == PromptSet("p", PROMPTS, "a.csv, column goal")
    assert load_prompts(source, name="p", column="target").prompts == ("x", "y", "z")


def test_parquet_file(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "Behavior": list(PROMPTS)})
    assert load_prompts(source, name="p") == PromptSet("p", PROMPTS, "a.parquet, column Behavior")


def test_texts_that_mean_nothing_elsewhere_are_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_prompts(write(tmp_path / "a.csv", "prompt\nNA\nnull\n"), name="p").prompts == ("NA", "null")
    with pytest.raises(PromptError):
        load_prompts(write(tmp_path / "b.csv", "prompt,b\nx,y\nx,y,z\n"), name="p")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_repeated_prompts_are_kept(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "a.txt", "b\na\nb\n"), name="p").prompts == ("b", "a", "b")


def test_columns_are_chosen_in_a_fixed_order(tmp_path: Path) -> None:
    row = {"question": "q", "goal": "g", "Prompt": "p", "text": "t"}
    source = write(tmp_path / "a.jsonl", json.dumps(row))
    assert load_prompts(source, name="p").prompts == ("p",)
    assert load_prompts(source, name="p", column="goal").prompts == ("g",)


def test_data_set_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        write_parquet(tmp_path / "set" / f"{split}.parquet", {"id": [1, 2], "text": [f"{split} 1", f"{split} 2"]})
    directory = str(tmp_path / "set")
    loaded = load_prompts(directory, name="p")
    assert loaded == PromptSet("p", ("train 1", "train 2"), "set, split train, column text")
    assert load_prompts(directory, name="p", split="test[:1]").prompts == ("test 1",)
    with pytest.raises(PromptError, match=r"split 'validation'.*validation"):
        load_prompts(directory, name="p", split="validation")
    with pytest.raises(PromptError, match="no column 'goal', expected one of those there: id, text"):
        load_prompts(directory, name="p", column="goal")
    with pytest.raises(PromptError, match="hold 1 at row 1, expected text"):
        load_prompts(directory, name="p", column="id")


@pytest.mark.parametrize("source", ["owner/absent", "absent", "owner/absent:part"])
def test_data_set_that_cannot_be_had(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match=f"{source} are no file here and cannot be loaded"):
        load_prompts(source, name="p")


@pytest.mark.parametrize(
    "source", ["absent.txt", "absent.JSONL", "./absent", "../absent", "/absent", "~/absent", "a/b/c", "a\\b", "a/"]
)
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match="is missing, expected a file"):
        load_prompts(source, name="p")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "are empty"),
        ("a.txt", "\n  \n", "are empty"),
        ("a.txt", b"fine\nna\xefve\n", "byte 0xef at line 2, expected text in UTF-8"),
        ("a.xlsx", "x", "suffix .xlsx, expected one of .txt"),
        ("a.json", "[]", "are empty"),
        ("a.json", "", "not JSON at line 1"),
        ("a.json", '["a",\n"b"', "not JSON at line 2"),
        ("a.json", "[" * 100_000, "not JSON that can be read"),
        ("a.json", b'["\xff"]', "byte 0xff at line 1"),
        ("a.json", "3", "JSON int without a list"),
        ("a.json", '{"a": 1}', "JSON dict without a list"),
        ("a.json", '["a", null]', "hold None at item 2, expected text"),
        ("a.json", '["a", ["b"]]', r"hold ['b'] at item 2, expected text"),
        ("a.json", '["a", "  "]', "blank prompt at item 2"),
        ("a.json", '["\\ud800"]', "surrogate pair at item 1"),
        ("a.json", '[{"a": "x", "b": "y"}]', "have the columns a, b, expected one of prompt, instruction"),
        ("a.json", '[{"text": "x"}, "y"]', "no 'text' at item 2"),
        ("a.json", '{"a": ["x"], "b": ["y"]}', "have the columns a, b, expected one of prompt"),
        ("a.jsonl", '"a"\n\n{"text": 1', "not JSON at line 3"),
        ("a.jsonl", '{"text": "a"}\n{"test": "b"}', "no 'text' at line 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "hold 5 at line 2"),
        ("a.csv", "", "cannot be read as csv"),
        ("a.csv", "prompt\n", "are empty"),
        ("a.csv", "a,b\nx,y\n", "have the columns a, b"),
        ("a.csv", "prompt,b\nx,y\nx, y, z\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", "prompt\nHello, world\n", "put fields with commas into double quotes"),
        ("a.csv", "b,prompt\nx\n", "blank prompt at row 1"),
        ("a.csv", 'prompt,b\n"x,y\n', "EOF inside string starting at row 1"),
        ("a.csv", 'prompt,b\n" ",y\n', "blank prompt at row 1"),
        ("a.csv", b"prompt\nna\xefve\n", "can't decode byte 0xef"),
        ("a.parquet", "PAR1 and nothing else", "cannot be read as parquet"),
        ("a.parquet", "", "cannot be read as parquet"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(PromptError) as raised:
        load_prompts(write(tmp_path / name, content), name="p")
    assert message in str(raised.value)
    assert name in str(raised.value)


def test_bad_columns(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"id": [1], "text": [None], "label": ["x"]})
    with pytest.raises(PromptError, match="no column 'goal', expected one of those there: id, text, label"):
        load_prompts(source, name="p", column="goal")
    with pytest.raises(PromptError, match="hold None at row 1, expected text"):
        load_prompts(source, name="p")
    for name, content in (("a.txt", "x"), ("a.json", '["x"]')):
        with pytest.raises(PromptError, match="column 'goal'"):
            load_prompts(write(tmp_path / name, content), name="p", column="goal")


def test_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="expected a data set for the split 'test'"):
        load_prompts(write(tmp_path / "a.txt", "x"), name="p", split="test")


@pytest.mark.parametrize("source", ["a.parquet", "a.csv", "owner/name"])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    write(tmp_path / "a.csv", "text\nx\n")
    # None in this table is how Python itself marks a package that must not be imported.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"package datasets is missing.*remove-refusals\[data\]"):
        load_prompts(source, name="p")


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_embedded_sets(name: str) -> None:
    prompts = embedded_prompts(name)
    assert len(prompts) >= 60
    assert prompts.name == name
    assert all(prompt.strip() == prompt and prompt for prompt in prompts.prompts)


def test_embedded_sets_are_disjoint() -> None:
    check_disjoint(*(embedded_prompts(name) for name in EMBEDDED_SETS))


def test_unknown_embedded_set() -> None:
    with pytest.raises(PromptError, match="no embedded prompt set 'harmful', expected one of harmful_train"):
        embedded_prompts("harmful")


def test_draw_is_the_same_in_every_process() -> None:
    # These five come first when the lines of `sha256sum` are sorted.
    script = (
        "from remove_refusals.prompts import draw\nfrom remove_refusals.types import PromptSet\n"
        "print(draw(PromptSet('p', tuple(f'prompt {i}' for i in range(100)), 'test'), 5, 7).prompts)"
    )
    drawn = ("prompt 80", "prompt 76", "prompt 34", "prompt 62", "prompt 63")
    assert draw(numbered(100), 5, 7).prompts == drawn
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(drawn)


@given(prompts=PROMPT_SETS, seed=SEEDS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_draw_takes_each_prompt_at_most_as_often_as_it_is_there(
    prompts: PromptSet, seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(prompts)))
    drawn = draw(prompts, n, seed)
    assert len(drawn) == n
    assert sorted(draw(prompts, len(prompts), seed).prompts) == sorted(prompts.prompts)
    assert draw(prompts, len(prompts), seed).prompts[:n] == drawn.prompts
    backwards = PromptSet("p", prompts.prompts[::-1], "test")
    assert draw(backwards, n, seed) == drawn


def test_draw_depends_on_the_seed() -> None:
    assert len({draw(numbered(100), 5, seed).prompts for seed in range(20)}) == 20


def test_draw_is_even() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for prompt in draw(numbered(10), 3, seed).prompts:
            counts[int(prompt.split()[1])] += 1
    # Each is expected 600 times with a standard deviation of 20.5.
    assert all(500 < count < 700 for count in counts)


@pytest.mark.parametrize("n", [4, 0, -1])
def test_draw_of_too_many_says_both_numbers(n: int) -> None:
    with pytest.raises(PromptError, match=f"There are 3 p prompts in .* and {n} were asked for"):
        draw(numbered(3), n, 0)


@given(prompts=PROMPT_SETS, seed=SEEDS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_split_by_size_has_the_sizes_and_nothing_in_common(prompts: PromptSet, seed: int, data: st.DataObject) -> None:
    distinct = len(set(prompts.prompts))
    first = data.draw(st.integers(1, distinct))
    rest = distinct - first
    sizes = {"train": first} | ({"test": data.draw(st.integers(1, rest))} if rest else {})
    parts = split_by_size(prompts, sizes, seed)
    assert {name: len(part) for name, part in parts.items()} == sizes
    assert all(parts[name].name == name for name in sizes)
    chosen = [prompt for part in parts.values() for prompt in part.prompts]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(prompts.prompts)


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 2}, {"a": 0, "b": 1}, {}])
def test_split_by_wrong_sizes(sizes: dict[str, int]) -> None:
    prompts = PromptSet("p", ("x", "y", "y", "z"), "test")
    with pytest.raises(PromptError, match="which has 3 different ones"):
        split_by_size(prompts, sizes, 0)


def test_lists_of_texts_are_prompts_too() -> None:
    given = numbered(3)
    assert as_prompts("other", given) is given
    assert as_prompts("mine", ["b", "a"]) == PromptSet("mine", ("b", "a"), "given")
    for wrong, message in (
        ("text", "single text 'text'"),
        ([], "mine are empty"),
        (["a", " "], "blank prompt at item 2"),
    ):
        with pytest.raises(PromptError, match=message):
            as_prompts("mine", wrong)


def test_shared_prompts_are_found() -> None:
    check_disjoint(numbered(5), PromptSet("other", ("something else", "something else"), "test"))
    other = PromptSet("test", ("new", "  Prompt\t3 "), "test")
    with pytest.raises(PromptError, match=r"'  Prompt\\t3 ' is in both p and test"):
        check_disjoint(numbered(5), PromptSet("empty", (), "test"), other)
