"""What a search by gradients runs on, and the two scores on all of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from remove_refusals.apply.steering import SiteKey, Steer, steered
from remove_refusals.generation import Answer, generate
from remove_refusals.judges import Label, judge_phrases
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.selection.objectives import damages, likely_tokens, refusal_probabilities
from remove_refusals.selection.openings import N_OPENING_TOKENS, Openings, learn_openings
from remove_refusals.selection.probes import (
    Probe,
    Vocabulary,
    frozen,
    keep_below,
    log_probabilities,
    make_probes,
    make_vocabulary,
)
from remove_refusals.selection.references import References


@dataclass(frozen=True)
class GradientSettings:
    """How the descent goes.

    Attributes:
        damage_weights: What a nat of damage costs beside the refusal, one descent each, from where the last one ended.
        n_steps: Steps of the first descent.
        n_more_steps: Steps of each further one.
        rate: Adam's learning rate for the strengths.
        direction_rate: Its learning rate for a unit direction, as a length; 0 leaves the directions as they are.
        batch_size: Harmful prompts, and harmless ones, for each step.
        kl_tokens: How many tokens of each answer the damage goes along.
        start: The strength to begin with.
        most: The largest strength.
        least: Strengths below this are set to 0 in the end: a site that hardly counts is left alone.
        n_check: How many prompts are answered between descents, to find refusals that open in a new way.
        n_check_tokens: With how many tokens.
        seed: Decides the order of the batches.
    """

    damage_weights: tuple[float, ...] = (4.0, 4.0, 1.0)
    n_steps: int = 32
    n_more_steps: int = 12
    rate: float = 0.08
    direction_rate: float = 0.03
    batch_size: int = 16
    kl_tokens: int = 16
    start: float = 0.5
    most: float = 3.0
    least: float = 0.05
    n_check: int = 32
    n_check_tokens: int = 24
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Material:
    """What a search runs on.

    Attributes:
        refused: The harmful prompts that the model refused, with its answers.
        openings: How its refusals open.
        refusal_probes: Batches of those prompts with the openings of their refusals.
        damage_probes: Batches of harmless prompts with the model's answers.
        base: For each of the latter `[n, n_tokens]`, float32: the model's log-probabilities as it stands.
        vocabulary: The tokens that are looked at.
        first_layer: The first layer that may be edited.
    """

    refused: References
    openings: Openings
    refusal_probes: tuple[Probe, ...]
    damage_probes: tuple[Probe, ...]
    base: tuple[torch.Tensor, ...]
    vocabulary: Vocabulary
    first_layer: int


def gather(
    loaded: LoadedModel,
    model_map: ModelMap,
    refused: References,
    answered: References,
    settings: GradientSettings,
    *,
    first_layer: int = 0,
    more_refusals: Sequence[Sequence[int]] = (),
) -> Material:
    """Prepare the batches of a search and what the base model predicts on them.

    Args:
        loaded: The model as it stands.
        model_map: Its map.
        refused: Harmful prompts that it refused.
        answered: Harmless prompts that it answered.
        settings: How the descent goes.
        first_layer: The first layer that may be edited.
        more_refusals: The tokens of other refusals, for their openings.
    """
    paths = [answer.token_ids for answer in refused.answers]
    openings = learn_openings([*paths, *more_refusals])
    harmful = make_probes(loaded, refused.token_ids, paths, N_OPENING_TOKENS, settings.batch_size)
    own = [answer.token_ids for answer in answered.answers]
    harmless = make_probes(loaded, answered.token_ids, own, settings.kl_tokens, settings.batch_size)
    with frozen(loaded, gradients=False):
        likely = [
            likely_tokens(log_probabilities(loaded, model_map, probe, None, 0)) for probe in (*harmful, *harmless)
        ]
        named = [torch.tensor(prefix, device=loaded.device) for prefix in openings.prefixes]
        targets = [probe.targets for probe in (*harmful, *harmless)]
        vocabulary = make_vocabulary(loaded, torch.cat([*likely, *named, *targets]))
        harmful = keep_below(loaded, model_map, harmful, vocabulary, first_layer)
        harmless = keep_below(loaded, model_map, harmless, vocabulary, first_layer)
        base = [log_probabilities(loaded, model_map, probe, vocabulary, first_layer) for probe in harmless]
    return Material(refused, openings, tuple(harmful), tuple(harmless), tuple(base), vocabulary, first_layer)


def score(
    loaded: LoadedModel, model_map: ModelMap, steers: Mapping[SiteKey, Callable[[], Steer]], material: Material
) -> tuple[float, float]:
    """Measure refusal and damage on all of a search's material.

    Returns:
        The mean probability of the model's own refusals, and the mean KL in nats.
    """
    with frozen(loaded, gradients=False), steered(loaded.model, model_map, steers):
        refusals, kls = [], []
        for probe in material.refusal_probes:
            found = log_probabilities(loaded, model_map, probe, material.vocabulary, material.first_layer)
            refusals.append(refusal_probabilities(found, probe, material.openings, material.vocabulary))
        for probe, base in zip(material.damage_probes, material.base, strict=True):
            found = log_probabilities(loaded, model_map, probe, material.vocabulary, material.first_layer)
            kls.append(damages(found, base, probe))
    return float(torch.cat(refusals).mean()), float(torch.cat(kls).mean())


def first_words(
    loaded: LoadedModel,
    model_map: ModelMap,
    steers: Mapping[SiteKey, Callable[[], Steer]],
    material: Material,
    settings: GradientSettings,
) -> list[Answer]:
    """Generate a little, as a candidate does, for some of the prompts that the model refused."""
    with steered(loaded.model, model_map, steers):
        prompts = material.refused.token_ids[: settings.n_check]
        return generate(loaded, prompts, max_new_tokens=settings.n_check_tokens)


def with_new_refusals(
    loaded: LoadedModel,
    model_map: ModelMap,
    answers: Sequence[Answer],
    material: Material,
    settings: GradientSettings,
) -> tuple[Material, float]:
    """Look in a candidate's answers for refusals that open in a way that is not known yet.

    Args:
        loaded: The model.
        model_map: Its map.
        answers: What `first_words` gave.
        material: What the candidate was found on.
        settings: How the descent goes.

    Returns:
        Material with their openings; a prompt that is refused in another way is looked at along that way from now on.
        And the share of the answers that refuse.
    """
    refused = material.refused
    labels = [judge_phrases(answer.text, refused.prompts.prompts[index]) for index, answer in enumerate(answers)]
    found = {index: answer for index, answer in enumerate(answers) if labels[index] is Label.REFUSAL}
    share = len(found) / len(answers)
    if not found:
        return material, share
    now = replace(refused, answers=tuple(found.get(index, answer) for index, answer in enumerate(refused.answers)))
    openings = material.openings.more(answer.token_ids for answer in found.values())
    paths = [answer.token_ids for answer in now.answers]
    probes = make_probes(loaded, now.token_ids, paths, N_OPENING_TOKENS, settings.batch_size)
    with frozen(loaded, gradients=False):
        named = [torch.tensor(prefix, device=loaded.device) for prefix in openings.prefixes]
        tokens = torch.cat([material.vocabulary.tokens, *named, *(probe.targets for probe in probes)])
        vocabulary = make_vocabulary(loaded, tokens)
        probes = keep_below(loaded, model_map, probes, vocabulary, material.first_layer)
        base = tuple(
            log_probabilities(loaded, model_map, probe, vocabulary, material.first_layer)
            for probe in material.damage_probes
        )
    learned = replace(
        material, refused=now, openings=openings, refusal_probes=tuple(probes), base=base, vocabulary=vocabulary
    )
    return learned, share
