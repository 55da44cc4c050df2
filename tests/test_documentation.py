"""What the documentation says can be done: every command and every line of Python in it is run, page by page."""

import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typer
from nbclient import NotebookClient

from remove_refusals import cli

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
SHELL = ("bash", "sh", "shell", "console")

_BLOCK = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<why>[^\n]+?) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, its line, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    why_not: str | None


def blocks(page: str) -> Iterator[Block]:
    """Find the fenced blocks that could be run, in order."""
    for match in _BLOCK.finditer(page):
        if match["language"] in (*SHELL, "python"):
            line = page.count("\n", 0, match.start("language")) + 1
            yield Block(match["language"], textwrap.dedent(match["text"]), line, match["why"])


def lines_of(text: str) -> Iterator[str]:
    """Give the commands of a shell block; a backslash at the end goes on, and comments and prompts are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command and not command.startswith("#"):
            yield command


def run_command(command: str, directory: Path) -> tuple[int, str]:
    """Run one command: ours in this process, which is much quicker, and all else in a shell."""
    if command.startswith("remove-refusals ") and not re.search(r"[|<>;&`$]", command):
        before, sys.argv = sys.argv, shlex.split(command, comments=True)
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
        finally:
            sys.argv = before
        return 0, said.getvalue()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_works_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.why_not is not None:
            continue
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)
            continue
        for command in lines_of(block.text):
            code_, said = run_command(command, tmp_path)
            assert code_ == 0, f"{page.name}:{block.line}: {command}\n{said}"


def test_blocks_are_found_with_their_markers_and_run_as_they_stand() -> None:
    page = textwrap.dedent("""\
        ```bash
        # a comment
        remove-refusals run \\
            -o there
        ```

        <!-- not run: needs a GPU -->
        ```bash
        vllm serve there
        ```

        1. indented
            ```python
            if True:
                x = 1
            ```

        ```toml
        seed = 1
        ```
        """)
    first, second, third = blocks(page)
    assert list(lines_of(first.text)) == ["remove-refusals run      -o there"]
    assert (first.why_not, second.why_not, third.why_not) == (None, "needs a GPU", None)
    assert (first.line, second.line) == (1, 8)
    assert third.text == "if True:\n    x = 1\n"


def test_a_command_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("remove-refusals certify nowhere --base demo", tmp_path)[0] == 2
    assert run_command("remove-refusals nothing", tmp_path)[0] != 0
    assert run_command("true | false", tmp_path)[0] == 1


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Give every command with its full name."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, f"{before}{name} ")
        else:
            yield before + name, found


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def escaped(page: str) -> list[str]:
    """Give the lines that show a command of ours outside of the blocks that are run or say why not."""
    names = "|".join(name.replace(" ", " +") for name in COMMANDS)
    outside = _BLOCK.sub(lambda block: "" if block["language"] in (*SHELL, "python") else block[0], page)
    outside = re.sub(r"(?<!`)`(?!`)[^`]+`", "", outside)
    return [line for line in outside.splitlines() if re.search(rf"\bremove-refusals +(?:{names}|-)", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_escapes(page: Path) -> None:
    assert not escaped(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("page", "n"),
    [
        ("As said:\n\n    remove-refusals run demo\n", 1),
        ("```\nremove-refusals judge calibrate\n```\n", 1),
        ("```text\n$ remove-refusals --version\n```\n", 1),
        ("- remove-refusals bake demo\n", 1),
        ("```bash\nremove-refusals run demo\n```\n", 0),
        ("<!-- not run: needs a server -->\n```bash\nremove-refusals ui demo\n```\n", 0),
        ("With `remove-refusals run`, or `remove-refusals\nchat`, remove-refusals is a command.\n", 0),
    ],
)
def test_a_command_that_escapes_is_noticed(page: str, n: int) -> None:
    assert len(escaped(page)) == n


def not_run(page: str) -> Iterator[list[str]]:
    """Give the words of our commands in the blocks that are not run."""
    for block in blocks(page):
        for line in () if block.why_not is None else lines_of(block.text):
            for words in map(shlex.split, line.split("&&")):
                if words[0] == "remove-refusals" and words[1] != "--install-completion":
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_not_run_could_be_given(page: Path) -> None:
    for words in not_run(page.read_text(encoding="utf-8")):
        name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
        # It ends the test if an option, or a value of one, is not known.
        assert COMMANDS[name].make_context(name, words[len(name.split()) :]).params


def test_a_command_that_is_not_run_is_read() -> None:
    page = "<!-- not run: why -->\n```bash\na && remove-refusals bake M -o d --direction f --strenght 1\n```\n"
    (words,) = not_run(page)
    assert words[:2] == ["bake", "M"]
    with pytest.raises(Exception, match="--strenght"):
        COMMANDS["bake"].make_context("bake", words[1:])


def test_every_command_is_named() -> None:
    told = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if f"remove-refusals {name}" not in told]
    assert not missing


def test_every_option_of_run_is_explained() -> None:
    told = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    options = {name for option in COMMANDS["run"].params for name in option.opts if name.startswith("--")} - {"--help"}
    assert not {name for name in options if f"`{name}`" not in told}
    # What is no option any more must not be explained either.
    assert not set(re.findall(r"^\| `(--[a-z0-9-]+)`", told, re.MULTILINE)) - options


def test_every_public_name_has_a_place_in_the_reference() -> None:
    import remove_refusals

    told = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: remove_refusals\.(\S+)$", told, re.MULTILINE)
    assert sorted(entry for entry in entries if "." not in entry) == sorted(remove_refusals.__all__)
    assert len(entries) == len(set(entries))


def shown(cell: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Give what a cell shows, without numbers, which may differ from machine to machine, and in which forms."""
    found = []
    for output in cell.outputs:
        # Warnings are those of the place where it runs.
        if output.get("name") != "stderr":
            data = output.get("data", {"text/plain": output.get("text", "")})
            found.append((re.sub(r"\d+(\.\d+)?", "0", data["text/plain"]), tuple(sorted(data))))
    return found


def test_the_notebook_runs_and_shows_what_it_is_kept_with(tmp_path: Path) -> None:
    path = ROOT / "docs" / "notebook.ipynb"
    kept, again = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    NotebookClient(again, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, after = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (kept, again))
    assert [cell.execution_count for cell in before] == list(range(1, len(before) + 1))
    assert [shown(cell) for cell in before] == [shown(cell) for cell in after], (
        "what docs/notebook.ipynb shows is out of date: jupyter execute --inplace docs/notebook.ipynb"
    )
    assert all(shown(cell) for cell in before) and path.stat().st_size < 60_000
    forms = [form for cell in before for _, kinds in shown(cell) for form in kinds]
    assert forms.count("text/html") == 3
    # The search has to do something: all but a few refusals are gone.
    (counts,) = (
        found
        for cell in after
        for output in cell.outputs
        if (found := re.search(r"refused: harmful (\d+)/16 to (\d+)", output.get("data", {}).get("text/plain", "")))
    )
    assert int(counts[1]) >= 12 and int(counts[2]) <= 4


def test_every_link_within_the_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
