"""Every model type's verdict, verified by numbers."""

import re

import pytest
import transformers
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

import architectures
import zoo
import zoo_wrappers
from remove_refusals.errors import CheckpointError

LARGEST_COMPONENT = 3e-5
LARGEST_DIFFERENCE = 3e-5


@pytest.fixture(scope="module")
def documented():
    """The tables of docs/architectures.md, by model type."""
    text = architectures.DOCUMENT.read_text()
    version = re.search(r"of Transformers (\S+) that", text).group(1)
    if version != transformers.__version__:
        pytest.skip(f"docs/architectures.md is of Transformers {version}")
    return text


def tables(text):
    parts = text.split("\n## ")[1:]
    return [[line for line in part.splitlines() if line.startswith("| `")] for part in parts]


def check(entry, found):
    """Check what was measured on a model type that is not refused."""
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


@pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
def test_the_verdict_holds(model_type, tmp_path, documented):
    entry = architectures.entry(model_type)
    if entry.verdict == "refused":
        assert zoo.tiny_config(model_type).model_type in entry.reason
    else:
        check(entry, architectures.measure(entry, tmp_path))
    assert architectures.row(entry) in tables(documented)[0], "run: python tests/architectures.py"


@pytest.mark.parametrize("model_type", zoo_wrappers.MODEL_TYPES)
def test_the_verdict_holds_with_towers_that_stay_and_the_class_that_a_user_loads(model_type, tmp_path, documented):
    entry = architectures.entry(model_type, zoo_wrappers.build)
    if entry.verdict == "refused":
        assert zoo_wrappers.tiny_config(model_type).model_type in entry.reason
    else:
        is_image_text = model_type in zoo_wrappers.IMAGE_TEXT_TYPES
        auto = AutoModelForImageTextToText if is_image_text else AutoModelForMultimodalLM
        found = architectures.measure(entry, tmp_path, auto)
        check(entry, found)
        towers = architectures.towers(entry.model, entry.model_map)
        assert (towers or model_type in zoo_wrappers.WITHOUT_TOWER) and towers.isdisjoint(found.changed)
        if entry.verdict == "exact":
            assert not any(found.loading.values()), found.loading
    assert architectures.row(entry) in tables(documented)[1], "run: python tests/architectures.py"


@pytest.mark.parametrize("model_type", zoo_wrappers.UNLOADABLE)
def test_what_transformers_does_not_find_again_is_not_edited(model_type, tmp_path):
    with pytest.raises(CheckpointError, match="no tensor that holds parameter"):
        architectures.measure(architectures.entry(model_type, zoo_wrappers.build), tmp_path)


def test_the_document_has_these_rows_and_no_others(documented):
    texts, wrappers = tables(documented)
    assert documented == architectures.document(texts, wrappers)
    for rows, model_types in ((texts, zoo.MODEL_TYPES), (wrappers, zoo_wrappers.MODEL_TYPES)):
        assert sorted(line.split("`")[1] for line in rows) == sorted(model_types)


def test_most_model_types_are_exact(documented):
    verdicts = [line.split(" | ")[1] for line in tables(documented)[0]]
    assert verdicts.count("exact") >= 154
    assert verdicts.count("exact") + verdicts.count("hooks only") >= 175


def test_most_image_text_types_are_exact_or_hooks_only(documented):
    verdicts = [{line.split("`")[1]: line.split(" | ")[1] for line in rows} for rows in tables(documented)]
    whole = {name: (verdicts[0] | verdicts[1])[name] for name in zoo_wrappers.IMAGE_TEXT_TYPES}
    assert len(whole) == 100
    assert sum(verdict != "refused" for verdict in whole.values()) >= 85
