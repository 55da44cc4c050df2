"""What a search minimises: how likely the model's own refusals are, and how far its own answers have moved."""

import math

import torch

from remove_refusals.selection.openings import Openings
from remove_refusals.selection.probes import Probe, Vocabulary


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
