"""A model's own answers to prompts, labelled, as a search is given them."""

from remove_refusals.measure import Answered, labelled
from remove_refusals.models import LoadedModel, generate, render
from remove_refusals.types import PromptSet


def own_answers(loaded: LoadedModel, prompts: PromptSet, n_tokens: int) -> Answered:
    ids = render(loaded, prompts.prompts)
    return labelled(prompts, ids, generate(loaded, ids, max_new_tokens=n_tokens))
