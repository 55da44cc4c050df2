"""What a search by gradients runs on, and the two scores on all of it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from remove_refusals.directions import SiteKey, Steer, steered
from remove_refusals.measure import Label, judge_phrases
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import Answer, LoadedModel, generate
from remove_refusals.search.continuations import (
    Probe,
    Vocabulary,
    frozen,
    keep_below,
    log_probabilities,
    make_probes,
    make_vocabulary,
)
from remove_refusals.search.references import References
from remove_refusals.settings import GradientSettings


@dataclass(frozen=True)
class Openings:
    """The first tokens of a model's refusals.

    Attributes:
        prefixes: Token sequences, none of which is the beginning of another; the most frequent first.
    """

    prefixes: tuple[tuple[int, ...], ...]

    def branches(self, path: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Give the tokens by which another opening leaves a path, for each place on it.

        Args:
            path: The first tokens of an answer.

        Returns:
            For each token of the path the other tokens that come next in openings that share the path up to there.
        """
        found = []
        for place, token in enumerate(path):
            shared = tuple(path[:place])
            others = {prefix[place] for prefix in self.prefixes if len(prefix) > place and prefix[:place] == shared} - {
                token
            }
            found.append(tuple(sorted(others)))
        return tuple(found)

    def more(self, answers: Iterable[Sequence[int]]) -> "Openings":
        """Add the openings of more refusals."""
        return learn_openings([*self.prefixes, *answers])


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


N_OPENING_TOKENS = 6
"""How many tokens of a refusal are looked at: enough that hardly another answer begins with them."""


_MOST = 24


def learn_openings(refusals: Iterable[Sequence[int]], n_tokens: int = N_OPENING_TOKENS) -> Openings:
    """Learn openings from refusals.

    Args:
        refusals: The tokens of answers that refuse.
        n_tokens: How many tokens of each are looked at.

    Returns:
        Their distinct first tokens, at most 24 of them; longer ones that begin with a shorter one are left out.
    """
    counts = Counter(tuple(answer[:n_tokens]) for answer in refusals if len(answer))
    kept: list[tuple[int, ...]] = []
    for prefix, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if not any(other != prefix and prefix[: len(other)] == other for other in counts):
            kept.append(prefix)
    return Openings(tuple(kept[:_MOST]))


def refusal_probabilities(
    log_probabilities: torch.Tensor, probe: Probe, openings: Openings, vocabulary: Vocabulary
) -> torch.Tensor:
    """How likely each prompt's answer is to open as the model's own refusals do.

    Along a refusal's first tokens every other opening branches off somewhere. What branches off counts as refused, so
    that one run gives the probability of all openings, or a little more: of an opening that branches off, its first
    other token is counted and not the rest.

    Args:
        log_probabilities: `[n, n_tokens]`, float32, along the paths of the batch, which are openings.
        probe: The batch.
        openings: All openings that are known.
        vocabulary: The tokens on the second axis.

    Returns:
        `[n_prompts]`, float32, from 0 to 1.
    """
    targets = vocabulary.indices(probe.targets)
    along = log_probabilities.gather(1, targets[:, None])[:, 0]
    totals = []
    start = 0
    for path in probe.paths:
        steps = along[start : start + len(path)]
        before = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        total = before[-1].exp()
        for place, others in enumerate(openings.branches(path)):
            if others:
                tokens = vocabulary.indices(torch.tensor(others))
                total = total + (before[place] + log_probabilities[start + place, tokens].logsumexp(0)).exp()
        totals.append(total)
        start += len(path)
    return torch.stack(totals).clamp(max=1.0)


def damages(log_probabilities: torch.Tensor, base: torch.Tensor, probe: Probe) -> torch.Tensor:
    """The KL divergence from the base model along its own answers.

    Args:
        log_probabilities: `[n, n_tokens]`, float32.
        base: The base model's, of the same shape.
        probe: The batch.

    Returns:
        `[n_prompts]`, float32, in nats: the mean over the tokens of each answer.
    """
    kl = (base.exp() * (base - log_probabilities)).sum(dim=1)
    n = torch.bincount(probe.rows, minlength=len(probe))
    return torch.zeros(len(probe), device=kl.device).index_add(0, probe.rows, kl) / n


def unlikelihood(probabilities: torch.Tensor) -> torch.Tensor:
    """The mean of `-log(1 - p)`: what it costs that a refusal is likely (Welleck et al. 2020, section 3)."""
    surprise: torch.Tensor = -torch.log1p(-probabilities.clamp(max=1 - 1e-4))
    return surprise.mean()


def likely_tokens(log_probabilities: torch.Tensor, least: float = 1e-3) -> torch.Tensor:
    """The tokens that are likely at any of the places.

    Args:
        log_probabilities: `[n, vocabulary]`, float32.
        least: The probability from which on a token is likely.

    Returns:
        `[any]`, int64, each token once.
    """
    return (log_probabilities > math.log(least)).any(dim=0).nonzero()[:, 0]
