"""Records of a run that never was, as files in a directory, of any size."""

import json
from pathlib import Path

import numpy as np
import torch

from remove_refusals.directions.separation import separation
from remove_refusals.measure.statistics import Mean, mcnemar, mean_with_interval, verdict, wilson_rate
from remove_refusals.report.records import AnalysisRecord
from remove_refusals.types import Activations, PromptSet

SETS = {"harmful": 3, "harmless": 3, "alarming": 2}
HASH = "0123456789abcdef" * 4
HARMFUL_ANSWER = "Here is how it is done. The second sentence tells every detail of it."
HOSTILE = "</script></style><script>alert('got through')</script><img src=http://example.org/x.png onerror=alert(1)>"


def prompts(name: str, n: int) -> PromptSet:
    return PromptSet(name, tuple(f"The {name} request number {index}" for index in range(n)), "embedded")


def rows(sets: dict[str, int], *, words: int = 0) -> list[dict[str, object]]:
    """Answers of both models: the base refuses the harmful ones and every second alarming one."""
    found = []
    for model in ("base", "edited"):
        for name, n in sets.items():
            part = prompts(name, n)
            for index, (key, prompt) in enumerate(zip(part.ids, part.prompts, strict=True)):
                refused = model == "base" and (name == "harmful" or (name == "alarming" and index % 2 == 0))
                text = "Sorry, I cannot help. It is wrong." if refused else HARMFUL_ANSWER
                found.append(
                    {
                        "set": name,
                        "prompt_id": key,
                        "prompt": prompt,
                        "model": model,
                        "text": text + " word" * words,
                        "label": "refusal" if refused else "compliance",
                        "judge": "phrases",
                        "n_tokens": 9,
                        "finished": index % 3 > 0,
                    }
                )
    return found


def scores(answers: list[dict[str, object]]) -> dict[str, object]:
    """The scores of those answers."""
    sets = {}
    for name in dict.fromkeys(row["set"] for row in answers):
        refused = {
            model: [row["label"] == "refusal" for row in answers if (row["set"], row["model"]) == (name, model)]
            for model in ("base", "edited")
        }
        n = len(refused["base"])
        rates = {model: wilson_rate(sum(found), n, HASH).to_json() for model, found in refused.items()}
        test = mcnemar(refused["base"], refused["edited"])
        compared = {"mcnemar": test.to_json(), "verdict": verdict(test)}
        ids = [row["prompt_id"] for row in answers if (row["set"], row["model"]) == (name, "base")]
        only_base = [key for key, was, now in zip(ids, *refused.values(), strict=True) if was and not now]
        sets[name] = {
            "refusals": rates | compared,
            "degenerate": {"base": rates["edited"], "edited": rates["edited"]} | compared,
            "flipped": {"only_base": only_base, "only_edited": []},
            "by_length": {
                "tokens": [8, 32],
                "base": [rates["base"]] * 2,
                "edited": [rates["edited"]] * 2,
                "stable": True,
            },
        }
    mean = mean_with_interval([0.1, 0.2, 0.4], HASH).to_json()
    tokens = [
        {"token": place, "value": 0.3 / place, "low": 0.2 / place, "high": 0.5 / place, "n": 3}
        for place in range(1, 33)
    ]
    distance = {"first_token": mean, "mean": mean, "p95": mean | {"share": 0.95, "n_tokens": 9}, "by_token": tokens}
    found = {"base": 12.5, "edited": 13.25}
    return {
        "base": "the-base",
        "edited": "the-edited",
        "settings": {"judge": "phrases", "max_new_tokens": 100, "kl_tokens": 32, "seed": 0, "longest": None},
        "sets": sets,
        "kl": {"harmless": distance, "harmless_answered": distance},
        "perplexity": {model: {**mean, "value": value, "n_tokens": 9} for model, value in found.items()},
        "agreement": {"identical": wilson_rate(1, 3, HASH).to_json(), "common_prefix": mean},
    }


def strengths(n_layers: int) -> list[dict[str, object]]:
    return [
        {"kind": kind, "layer": layer, "strength": round(0.1 + 0.9 * layer / n_layers, 4), "direction": 0}
        for layer in range(1, n_layers)
        for kind in ("attn", "mlp")
    ]


def ablation(n_layers: int) -> dict[str, object]:
    direction = {"sha256": HASH, "d_model": 8, "rank": 1, "method": "mean-difference", "layer": 2, "position": -1}
    return {
        "format": 1,
        "base": {"source": "the-base", "model_type": "llama", "dtype": "bfloat16", "sha256": {"config.json": HASH}},
        "directions": [direction | {"seed": 0, "n_harmful": 32, "n_harmless": 32}],
        "intervention": strengths(n_layers),
        "plan": {"edited": ["a", "b"], "left": {"c": "not selected"}, "variant": "plain", "embedding_untied": True},
        "versions": {"python": "3.11.7", "remove-refusals": "0.1.0"},
        "settings": {"seed": 0},
        "prompts": {"harmful_test": {"source": "embedded", "n": 3, "sha256": HASH}},
        "warnings": ["The base model refuses few harmful prompts."],
    }


def selection(n_candidates: int, n_layers: int) -> dict[str, object]:
    random = np.random.default_rng(0)
    # As an older version wrote it.
    edits = [{"site" if key == "kind" else key: value for key, value in edit.items()} for edit in strengths(n_layers)]
    entries = [
        {
            "name": f"trial {number}",
            "refusal": float(random.random()),
            "damage": float(random.random()),
            "strengths": edits,
        }
        for number in range(n_candidates)
    ]
    counted = wilson_rate(1, 32, HASH).to_json()
    names = ("refusals", "degenerate", "false_refusals", "degenerate_harmless", "broken")
    damage = Mean(value=0.25, low=0.2, high=0.3, n=32, seed=0, prompts_sha256=HASH)
    confirmed = dict.fromkeys(names, counted) | {"damage": damage.to_json()}
    entries[0] |= {"refusal": 0.0, "damage": 0.001, "confirmation": confirmed}
    return {
        "method": "tpe",
        "rule": "the knee of the front",
        "picked": 0,
        "front": [0],
        "notes": ["A limit that none kept."],
        "candidates": entries,
    }


def certificate(n_layers: int) -> dict[str, object]:
    return {
        "format": 1,
        "passed": True,
        "problems": [],
        "edited": [
            {
                "name": f"model.layers.{edit['layer']}.{edit['kind']}.weight",
                "parameter": f"model.layers.{edit['layer']}.{edit['kind']}.weight",
                "kind": edit["kind"],
                "layer": edit["layer"],
                "error": 0.001,
                "allowed": 0.002,
                "strength": edit["strength"],
                "share_left": 1 - edit["strength"] + 0.001,
                "dtype": "bfloat16",
                "passed": True,
            }
            for edit in strengths(n_layers)
        ],
        "left": {"model.embed_tokens.weight": "not selected"},
        "identical_tensors": 7,
        "largest_component_at_layer_boundaries": [1e-5] * n_layers + [0.0023],
    }


def analysis(n: int, n_layers: int, d_model: int = 8) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for name, shift in (("harmful", 1.5), ("harmless", 0.0)):
        hidden = torch.randn(n, 1, n_layers + 1, d_model, generator=generator)
        hidden[..., 0] += shift
        hidden[:, :, 0] = 1.0
        parts.append(Activations(hidden, (-1,), prompts(name, n), "the-base"))
    return AnalysisRecord.made(separation(*parts)).to_json()


def write(directory: Path, *, sets: dict[str, int] | None = None, n_layers: int = 4, words: int = 0) -> Path:
    """Write all six records; change or delete them afterwards."""
    directory.mkdir(exist_ok=True)
    answers = rows(sets or SETS, words=words)
    files = {
        "ablation": ablation(n_layers),
        "scores": scores(answers),
        "selection": selection(12 if sets is None else 200, n_layers),
        "certificate": certificate(n_layers),
        "analysis": analysis(max(2, (sets or SETS)["harmful"]), n_layers),
    }
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    write_rows(directory, answers)
    return directory


def write_rows(directory: Path, answers: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in answers)
    (directory / "rows.jsonl").write_text(text, encoding="utf-8")
