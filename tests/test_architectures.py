"""Every model type's verdict, verified by numbers."""

import re

import pytest
import transformers

import architectures
import zoo

LARGEST_COMPONENT = 3e-5
LARGEST_DIFFERENCE = 3e-5


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_the_verdict_holds(model_type, tmp_path):
    entry = architectures.entry(model_type)
    if entry.verdict == "refused":
        assert zoo.tiny_config(model_type).model_type in entry.reason
        return
    found = architectures.measure(model_type, tmp_path)
    assert found.base.n_boundaries >= 2 * entry.model_map.n_layers
    assert found.base.component > 1e-3
    assert found.hooked.component < LARGEST_COMPONENT
    assert found.behind is None or found.behind.component < LARGEST_COMPONENT
    assert architectures.difference(found.base.logits, found.hooked.logits) > 100 * LARGEST_DIFFERENCE
    if entry.verdict == "hooks only":
        return
    assert found.edited.component < LARGEST_COMPONENT and found.edited.reported < LARGEST_COMPONENT
    assert architectures.difference(found.hooked.logits, found.edited.logits) < LARGEST_DIFFERENCE
    assert found.halves < LARGEST_DIFFERENCE
    assert found.certificate.problems == ()
    assert found.unlike == frozenset()
    assert len(found.certificate.edited) >= sum(len(site.writers) for site in entry.model_map.sites)


@pytest.fixture(scope="module")
def documented():
    text = architectures.DOCUMENT.read_text()
    version = re.search(r"Transformers (\S+) maps", text).group(1)
    if version != transformers.__version__:
        pytest.skip(f"docs/architectures.md is of Transformers {version}")
    return text


def test_the_document_is_up_to_date(documented):
    assert documented == architectures.document(), "run: python tests/architectures.py"


def test_most_model_types_are_exact(documented):
    verdicts = [line.split(" | ")[1] for line in documented.splitlines() if line.startswith("| `")]
    assert len(verdicts) == len(zoo.MODEL_TYPES)
    assert verdicts.count("exact") >= 154
    assert verdicts.count("exact") + verdicts.count("hooks only") >= 175
