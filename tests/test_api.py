"""The public interface: every name is there, whatever was imported before, and what the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import remove_refusals
import remove_refusals.pipeline  # imports nearly every module, which must not hide a name of the interface

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", remove_refusals.__all__)
def test_every_name_is_a_function_or_a_class_with_a_docstring(name):
    value = getattr(remove_refusals, name)
    assert callable(value) and value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = remove_refusals.nonsense


def test_importing_the_package_imports_nothing_heavy():
    code = "import remove_refusals, sys; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_the_readme_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], check=True, cwd=tmp_path)
    assert (tmp_path / "demo-without-refusals" / "ablation.json").is_file()
