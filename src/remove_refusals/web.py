"""What a web page asks of a model: two answers side by side, and how far their tokens lie along the direction."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from remove_refusals.apply.hooks import ablated
from remove_refusals.chat_template import render, render_conversation
from remove_refusals.generation import stream
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.plan import scaled
from remove_refusals.projections import middle_direction, project_tokens
from remove_refusals.types import ChatFormat, Intervention
from remove_refusals.web_parts import Controls, Source, strip

Messages = list[dict[str, str]]


@dataclass(frozen=True, eq=False)
class Page:
    """What a page shows.

    Attributes:
        loaded: The model; nothing else may run it meanwhile.
        intervention: What is taken out at strength 1.
        model_map: The model's map.
        source: What the page was started with.
        chat: How prompts are put before the model.
        candidates: The candidates of a search, as in `selection.json`.
        tried: Those that can be tried, by name.
        picked: The name of the candidate that the run picked; None without a search.
        max_new_tokens: Where an answer is cut off.
    """

    loaded: LoadedModel
    intervention: Intervention
    model_map: ModelMap
    source: Source
    chat: ChatFormat = field(default_factory=ChatFormat)
    candidates: Sequence[Mapping[str, Any]] = ()
    tried: Mapping[str, Intervention] = field(default_factory=dict)
    picked: str | None = None
    max_new_tokens: int = 256

    def made(self, controls: Controls) -> Intervention:
        """Give what the controls take out."""
        base = self.tried.get(controls.candidate or "", self.intervention)
        return scaled(
            base, self.model_map.n_layers, strength=controls.strength, layers=controls.layers, kinds=controls.kinds
        )

    def answers(
        self, prompt: str, original: Messages, edited: Messages, controls: Controls
    ) -> Iterator[tuple[Messages, Messages, str, str]]:
        """Let the original and then the edited model answer, piece by piece.

        Args:
            prompt: The user message.
            original: What was said with the original so far.
            edited: What was said with the edited model so far.
            controls: What is set.

        Yields:
            Both histories with what is said so far, and the strips under the answers, which come last.
        """
        intervention = self.made(controls)
        histories = [original, edited]
        for side, context in enumerate(self._contexts(intervention)):
            token_ids = self._rendered(prompt, histories[side])
            said, before = "", histories[side] + [{"role": "user", "content": prompt}]
            with context:
                for piece in stream(self.loaded, token_ids, max_new_tokens=self.max_new_tokens):
                    said += piece
                    histories[side] = [*before, {"role": "assistant", "content": said}]
                    yield histories[0], histories[1], "", ""
            histories[side] = [*before, {"role": "assistant", "content": said}]
        strips = self._strips(prompt, (original, edited), histories, intervention)
        yield histories[0], histories[1], *strips

    def _contexts(
        self, intervention: Intervention
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), ablated(self.loaded.model, intervention, model_map=self.model_map)

    def _rendered(self, prompt: str, history: Messages) -> list[int]:
        if self.chat.plain:
            return list(render(self.loaded.tokenizer, [prompt], plain=True)[0])
        turns = [(one["content"], other["content"]) for one, other in zip(history[::2], history[1::2], strict=True)]
        template = {"system_prompt": self.chat.system_prompt, "chat_template": self.chat.chat_template}
        return list(render_conversation(self.loaded.tokenizer, prompt, turns, **template))

    def _strips(
        self, prompt: str, before: tuple[Messages, Messages], after: list[Messages], intervention: Intervention
    ) -> tuple[str, str]:
        """Measure both answers' tokens; both strips have one scale."""
        direction, layer = middle_direction(self.intervention, self.model_map.n_layers)
        tokenizer, found = self.loaded.tokenizer, []
        for side, context in enumerate(self._contexts(intervention)):
            token_ids = self._rendered(prompt, before[side])
            answer = tokenizer(after[side][-1]["content"], add_special_tokens=False)["input_ids"]
            values = project_tokens(
                self.loaded,
                [*token_ids, *answer],
                direction,
                layer,
                model_map=self.model_map,
                context=context,
            )
            found.append(([tokenizer.decode([token]) for token in answer], values[len(token_ids) :]))
        largest = max((abs(value) for _, values in found for value in values), default=0.0)
        first, second = (strip(tokens, values, largest) for tokens, values in found)
        return first, second
