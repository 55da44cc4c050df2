"""What a search by gradients runs on, and its two scores: how likely a refusal is, and the damage."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from remove_refusals.directions import SiteKey, Steer, steered
from remove_refusals.measure import Answered, Label
from remove_refusals.models import LoadedModel
from remove_refusals.processes import agreed
from remove_refusals.search.continuations import (
    Probe,
    Vocabulary,
    frozen,
    is_packable,
    log_probabilities,
    make_probes,
    make_vocabulary,
    run_once,
)
from remove_refusals.settings import GradientSettings, Tied
from remove_refusals.types import PromptSet

N_OPENING_TOKENS = 6
"""How many tokens of a refusal are looked at: enough that hardly another answer begins with them."""

_N_LATE_TOKENS = 16
"""How many tokens of an answer are looked at that declines without opening as refusals do."""

_MOST_OPENINGS = 24

_FIRST_SHARE = 0.5
"""How much of the damage that a descent sees is the first token's."""

_LIKELY = 1e-3
"""The probability from which on a token is looked at."""


@dataclass(frozen=True)
class Openings:
    """The first tokens of a model's refusals, none the beginning of another; the most frequent first."""

    prefixes: tuple[tuple[int, ...], ...]

    def branches(self, path: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Give, for each token of a path, the other tokens that come next in openings that share the path up to it."""
        found = []
        for place, token in enumerate(path):
            shared = tuple(path[:place])
            next_tokens = {
                prefix[place] for prefix in self.prefixes if len(prefix) > place and prefix[:place] == shared
            }
            found.append(tuple(sorted(next_tokens - {token})))
        return tuple(found)

    def telling_apart(self, answers: Sequence[Sequence[int]]) -> "Openings":
        """Cut the openings down to as few tokens as a tenth of the answers, no refusals, begin with at most.

        The paper looks at the first token, which a direction that is added can make a model repeat. More are needed
        where answers begin as refusals do.
        """
        for n_tokens in range(1, N_OPENING_TOKENS):
            few = learn_openings(self.prefixes, n_tokens)
            alike = sum(any(tuple(answer[: len(head)]) == head for head in few.prefixes) for answer in answers)
            if alike <= 0.1 * len(answers):
                return few
        return self


def learn_openings(refusals: Iterable[Sequence[int]], n_tokens: int = N_OPENING_TOKENS) -> Openings:
    """Learn at most 24 openings from refusals' first tokens; longer ones that begin with a shorter one are left out."""
    counts = Counter(tuple(answer[:n_tokens]) for answer in refusals if len(answer))
    kept: list[tuple[int, ...]] = []
    for prefix, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if not any(other != prefix and prefix[: len(other)] == other for other in counts):
            kept.append(prefix)
    return Openings(tuple(kept[:_MOST_OPENINGS]))


def by_opening(
    declined: Answered, refusals: Iterable[Sequence[int]], answers: Iterable[Sequence[int]]
) -> tuple[Answered, Answered]:
    """Part refusals from what declines later: lectures, and refusals that open as answers do.

    The opening of a late one would count answers as refused. Such refusals are told by their first token, which then
    begins more answers than refusals.
    """
    often, seldom = (Counter(tokens[0] for tokens in part if len(tokens)) for part in (refusals, answers))
    opening: list[int] = []
    late: list[int] = []
    for index, (answer, label) in enumerate(zip(declined.answers, declined.labels, strict=True)):
        if answer.token_ids:
            first = answer.token_ids[0]
            early = label is Label.REFUSAL and often[first] >= seldom[first]
            (opening if early else late).append(index)
    return declined.at(opening), declined.at(late)


@dataclass(frozen=True, eq=False)
class OwnAnswers:
    """A model, harmful prompts that it refused, harmless ones that it answered, and the tokens of other refusals.

    Beside them the harmful prompts that it declined late, which only a descent looks at.
    """

    loaded: LoadedModel
    refused: Answered
    answered: Answered
    more_refusals: Sequence[Sequence[int]] = ()
    tied: Tied = "auto"
    late: Answered | None = None


@dataclass(frozen=True, eq=False)
class Material:
    """What a search runs on: batches of refused prompts with the openings, and of harmless ones with the answers."""

    loaded: LoadedModel
    refused: Answered
    late: Answered
    """Harmful prompts with answers that decline, but do not open as refusals do."""
    openings: Openings
    refusal_probes: tuple[Probe, ...]
    damage_probes: tuple[Probe, ...]
    base: tuple[torch.Tensor, ...]
    """For each of the latter `[n, n_tokens]`, float32: the model's log-probabilities as it stands."""
    vocabulary: Vocabulary
    first_layer: int
    packed: bool

    def refusals(self, batch: int) -> torch.Tensor:
        """Run a batch of harmful prompts: `[n_prompts]`, the probability that each is refused."""
        probe = self.refusal_probes[batch]
        found = log_probabilities(self.loaded, probe, self.vocabulary)
        return refusal_probabilities(found, probe, self.openings, self.vocabulary)

    def damages(self, batch: int) -> torch.Tensor:
        """Run a batch of harmless prompts: `[n_prompts]`, the KL along the answer to each and at its first token."""
        probe = self.damage_probes[batch]
        found = log_probabilities(self.loaded, probe, self.vocabulary)
        return damages(found, self.base[batch], probe, _FIRST_SHARE)

    def score(self, steers: Mapping[SiteKey, Callable[[], Steer]]) -> tuple[float, float]:
        """Run all of it: the mean probability of a refusal, and the mean damage in nats."""
        with frozen(self.loaded, gradients=False), steered(self.loaded.model, steers):
            refusals = torch.cat([self.refusals(batch) for batch in range(len(self.refusal_probes))])
            kls = torch.cat([self.damages(batch) for batch in range(len(self.damage_probes))])
        return agreed((float(refusals.mean()), float(kls.mean())))


def gather(own: OwnAnswers, settings: GradientSettings, first_layer: int = 0) -> Material:
    """Prepare batches of refused and answered prompts, and what the model predicts on them as it stands."""
    loaded, prompts = own.loaded, own.answered.token_ids
    answers = [answer.token_ids for answer in own.answered.answers]
    packed = is_packable(loaded, prompts, answers, settings.kl_tokens)
    n, seed = settings.batch_size, settings.seed
    with frozen(loaded, gradients=False):
        found = make_probes(loaded, prompts, answers, settings.kl_tokens, n, packed=packed, seed=seed)
        harmless, tokens = run_once(loaded, found, first_layer, _LIKELY)
        tokens += [probe.targets for probe in harmless]
    openings = learn_openings([*(answer.token_ids for answer in own.refused.answers), *own.more_refusals])
    declined = own.refused, own.refused.at([]) if own.late is None else own.late
    return _prepared(loaded, declined, openings, harmless, tokens, settings, first_layer, packed=packed)


def _prepared(
    loaded: LoadedModel,
    declined: tuple[Answered, Answered],
    openings: Openings,
    harmless: Sequence[Probe],
    tokens: Sequence[torch.Tensor],
    settings: GradientSettings,
    first_layer: int,
    *,
    packed: bool,
) -> Material:
    """Make batches of declined prompts; take the head's rows for all tokens that are looked at; run the base model."""
    lengths, n, seed = (N_OPENING_TOKENS, _N_LATE_TOKENS), settings.batch_size, settings.seed
    paths = [answer.token_ids[:most] for part, most in zip(declined, lengths, strict=True) for answer in part.answers]
    ids = [one for part in declined for one in part.token_ids]
    found = make_probes(loaded, ids, paths, max(lengths), n, packed=packed, seed=seed)
    named = [torch.tensor(prefix, device=loaded.device) for prefix in openings.prefixes]
    with frozen(loaded, gradients=False):
        harmful, likely = run_once(loaded, found, first_layer, _LIKELY)
        named += [*likely, *(probe.targets for probe in harmful)]
        vocabulary = make_vocabulary(loaded, torch.cat([*tokens, *named]))
        base = tuple(log_probabilities(loaded, probe, vocabulary) for probe in harmless)
    return Material(loaded, *declined, openings, tuple(harmful), tuple(harmless), base, vocabulary, first_layer, packed)


def with_declined(checked: Answered, material: Material, settings: GradientSettings) -> tuple[Material, float]:
    """Let prompts that a candidate still declines, and how it does, join what it is to unlearn; give their share."""
    before = material.refused, material.late
    declined = checked.only(Label.REFUSAL, Label.MORALISING)
    answered = [path for probe in material.damage_probes for path in probe.paths]
    parts = by_opening(declined, [answer.token_ids for answer in material.refused.answers], answered)
    new = {ids for part in parts for ids in part.token_ids}
    share = len(declined) / len(checked)
    if not new:
        return material, share

    def joined(old: Answered, more: Answered) -> Answered:
        kept = old.at([index for index, ids in enumerate(old.token_ids) if ids not in new])
        return Answered(
            PromptSet(old.prompts.name, kept.prompts.prompts + more.prompts.prompts, old.prompts.source),
            kept.token_ids + more.token_ids,
            kept.answers + more.answers,
            kept.labels + more.labels,
        )

    refused, late = (joined(old, more) for old, more in zip(before, parts, strict=True))
    openings = learn_openings([*material.openings.prefixes, *(answer.token_ids for answer in parts[0].answers)])
    tokens, first = [material.vocabulary.tokens], material.first_layer
    harmless, packed = material.damage_probes, material.packed
    found = _prepared(material.loaded, (refused, late), openings, harmless, tokens, settings, first, packed=packed)
    return found, share


def refusal_probabilities(
    log_probabilities: torch.Tensor, probe: Probe, openings: Openings, vocabulary: Vocabulary
) -> torch.Tensor:
    """Give `[n_prompts]`: how likely each answer is to open as the model's own refusals do.

    Along a refusal's first tokens, `[n, n_tokens]` in float32, every other opening branches off somewhere. What
    branches off counts as refused, so that one run gives the probability of all openings, or a little more.
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


def damages(
    log_probabilities: torch.Tensor, base: torch.Tensor, probe: Probe, first_share: float = 0.0
) -> torch.Tensor:
    """Give `[n_prompts]`, in nats: the mean KL from the base over the tokens of each answer, of two `[n, n_tokens]`.

    With a share, that of the first token, on which hangs what the answer becomes, counts so much beside the mean.
    """
    kl = (base.exp() * (base - log_probabilities)).sum(dim=1)
    n = torch.bincount(probe.rows, minlength=len(probe))
    along = torch.zeros(len(probe), device=kl.device).index_add(0, probe.rows, kl) / n
    return torch.lerp(along, kl[n.cumsum(0) - n], first_share)


def unlikelihood(probabilities: torch.Tensor) -> torch.Tensor:
    """The mean of `-log(1 - p)`: what it costs that a refusal is likely (Welleck et al. 2020, section 3)."""
    surprise: torch.Tensor = -torch.log1p(-probabilities.clamp(1e-4, 1 - 1e-4))
    return surprise.mean()
