"""The house: rooms that are entered by their faces, files of one subject, functions that can be read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import remove_refusals

SOURCE = Path(remove_refusals.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path.parent for path in FILES if path.name == "__init__.py" and path.parent != SOURCE)
HEAVY = frozenset(
    "accelerate bitsandbytes datasets gguf gradio huggingface_hub lm_eval openai peft prompt_toolkit scipy torch "
    "transformers".split()
)
"""Packages that take long to import, or that are extras: they may be imported where they are used."""


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def room_of(module: str) -> str | None:
    """The room that a module of the package lies in; the judges' folder counts as one of its own."""
    parts = module.split(".")[1:]
    for n in (2, 1):
        if (SOURCE / "/".join(parts[:n]) / "__init__.py").is_file() and len(parts) >= n:
            return ".".join(parts[:n])
    return None


def test_rooms_and_files_have_a_size_that_can_be_kept_in_mind() -> None:
    door = [path for path in FILES if path.parent == SOURCE and path.name not in ("__init__.py", "__main__.py")]
    assert len(door) <= 12
    for room in ROOMS:
        inside = [path for path in room.glob("*.py") if path.name != "__init__.py"]
        assert 0 < len(inside) <= 8, named(room)
    long = {named(path): n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 550}
    assert not long
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= 23_200


@pytest.mark.parametrize("path", FILES, ids=named)
def test_functions_can_be_read(path: Path) -> None:
    for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < 60, function.name
        arguments = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        n = len([name for name in arguments if name not in ("self", "cls")]) + len(function.args.kwonlyargs)
        assert n <= 10, function.name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_room_is_entered_by_its_face(path: Path) -> None:
    here = room_of("remove_refusals." + ".".join(path.relative_to(SOURCE).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("remove_refusals."):
            room = room_of(node.module or "")
            if room is None or here == room or path == SOURCE / "__init__.py":
                continue
            # The judges stand in the measure room, which has a face over them.
            if {here, room} == {"measure", "measure.judges"}:
                continue
            assert node.module == f"remove_refusals.{room}" and room != "measure.judges", f"{node.module}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_only_heavy_packages_are_imported_inside_a_function(path: Path) -> None:
    for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
                light = name.split(".")[0] not in HEAVY
                # The command imports what needs torch when a command runs, so that --help is there at once.
                assert not light or (named(path).startswith("cli") and name.startswith("remove_refusals")), name
