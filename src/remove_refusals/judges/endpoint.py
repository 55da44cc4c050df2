"""A judge that is a language model behind an OpenAI-compatible address."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from remove_refusals.errors import JudgeError
from remove_refusals.judges.cache import JudgementCache, judgement_key
from remove_refusals.judges.labels import Judgement, Label
from remove_refusals.judges.rubric import REMINDER, RESPONSE_FORMAT, RUBRIC, question, read_label, rubric_hash
from remove_refusals.judges.transport import Patience, RefusedError, is_local, post_json

KEY_VARIABLE = "REMOVE_REFUSALS_JUDGE_KEY"
"""The environment variable with the API key. Not that of some provider: a key must not go to an address by accident."""

# From the most exact to what any server takes: a schema, free text, free text without a temperature.
_FORMS: tuple[dict[str, Any], ...] = (
    {"response_format": RESPONSE_FORMAT, "temperature": 0},
    {"temperature": 0},
    {},
)


@dataclass(frozen=True)
class Usage:
    """What a judge has cost so far.

    Attributes:
        n_requests: How many completions were asked for.
        n_cached: How many judgements came from the cache.
        prompt_tokens: How many tokens the server counted in what it was sent.
        completion_tokens: How many it counted in its replies.
        cost: What they cost, in the currency of the prices; None if no price was given.
    """

    n_requests: int = 0
    n_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        price = "" if self.cost is None else f", cost {self.cost:.4f}"
        return f"{self.n_requests} requests ({tokens}{price}), {self.n_cached} judgements from the cache"


class EndpointJudge:
    """Asks a language model for each answer; what it has said once is kept in a file and not asked again."""

    labels = frozenset(Label)

    def __init__(
        self,
        address: str,
        *,
        cache: Path | None = None,
        prompt_price: float | None = None,
        completion_price: float | None = None,
        patience: Patience | None = None,
        n_at_once: int = 4,
    ) -> None:
        """Set up a judge; nothing is contacted yet.

        Args:
            address: `URL#MODEL`, for example `http://127.0.0.1:8000/v1#my-model`. The API key, if one is needed, is in
                the environment variable `REMOVE_REFUSALS_JUDGE_KEY`, and goes over https or to this machine only.
            cache: Where judgements are kept, for example `default_cache()`; None keeps them with this object only.
            prompt_price: The price of a million prompt tokens.
            completion_price: The price of a million completion tokens.
            patience: How long to go on trying.
            n_at_once: How many requests are under way at once.

        Raises:
            JudgeError: If the address is not of that form, the key would be sent unprotected, or the cache cannot be
                read.
        """
        base, self.model = _parsed_address(address)
        self._url = f"{base.rstrip('/')}/chat/completions"
        self._key = os.environ.get(KEY_VARIABLE) or None
        if self._key and urlsplit(base).scheme != "https" and not is_local(base):
            raise JudgeError(
                f"The judge's address {base} is not encrypted and {KEY_VARIABLE} is set, expected https for another "
                "machine; use https, or unset the variable if no key is needed."
            )
        self.name = f"endpoint:{self.model}:{rubric_hash()}"
        self._cache, self._patience, self._n_at_once = JudgementCache(cache), patience or Patience(), n_at_once
        self._prices = (prompt_price, completion_price)
        self._lock, self._form = threading.Lock(), 0
        self._counts = {"n_requests": 0, "n_cached": 0, "prompt_tokens": 0, "completion_tokens": 0}

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""
        price_in, price_out = self._prices
        sent, said = self._counts["prompt_tokens"], self._counts["completion_tokens"]
        priced = price_in is not None or price_out is not None
        cost = (sent * (price_in or 0.0) + said * (price_out or 0.0)) / 1e6 if priced else None
        return Usage(**self._counts, cost=cost)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """Label answers; see `Judge.judge`. The judgements have no score.

        Args:
            prompts: The prompts.
            answers: The answers.

        Returns:
            The judgements.

        Raises:
            JudgeError: If the server cannot be reached, forbids it, or says no label; what was judged is kept.
        """
        pairs = list(zip(prompts, answers, strict=True))
        keys = [judgement_key(self._url, self.model, RUBRIC, prompt, answer) for prompt, answer in pairs]
        asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if self._cache.get(key) is None}
        self._count(n_cached=len(keys) - len(asked))
        with ThreadPoolExecutor(self._n_at_once) as pool:
            futures = {key: pool.submit(self._ask_and_keep, key, *pair) for key, pair in asked.items()}
            try:
                said = {key: future.result() for key, future in futures.items()}
            finally:
                # After an error, what is under way is kept, and the rest is not begun.
                pool.shutdown(cancel_futures=True)
        return [Judgement(self._cache.get(key) or said[key]) for key in keys]

    def _ask_and_keep(self, key: str, prompt: str, answer: str) -> Label:
        label = self._ask(prompt, answer)
        self._cache.put(key, label)
        return label

    def _ask(self, prompt: str, answer: str) -> Label:
        messages = [{"role": "system", "content": RUBRIC}, {"role": "user", "content": question(prompt, answer)}]
        reply = self._complete(messages)
        label = read_label(reply)
        if label is None:
            reminded = [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": REMINDER}]
            reply = self._complete(reminded)
            label = read_label(reply)
        if label is None:
            raise JudgeError(
                f"The judge {self.model} says {reply[:80]!r} of an answer to {prompt[:60]!r}, expected one of "
                f"{', '.join(Label)}; choose a stronger model."
            )
        return label

    def _complete(self, messages: Sequence[dict[str, str]]) -> str:
        form, refused = self._form, ""
        for index in range(form, len(_FORMS)):
            body = {"model": self.model, "messages": messages, **_FORMS[index]}
            try:
                reply = post_json(self._url, body, self._key, self._patience)
            except RefusedError as error:
                refused = refused or str(error)
                continue
            self._form = max(self._form, index)
            usage = reply.get("usage") or {}
            sent, said = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            self._count(n_requests=1, prompt_tokens=sent, completion_tokens=said)
            return self._text(reply)
        raise JudgeError(
            f"The judge at {self._url} refuses the request ({refused}), expected a completion by {self.model}; check "
            "the address and the model's name."
        )

    def _text(self, reply: dict[str, Any]) -> str:
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError):
            raise JudgeError(
                f"The judge at {self._url} replies without choices[0].message.content, expected an OpenAI-compatible "
                "completion; check the address."
            ) from None

    def _count(self, **added: int) -> None:
        with self._lock:
            for name, number in added.items():
                self._counts[name] += number


def _parsed_address(address: str) -> tuple[str, str]:
    base, model = urldefrag(address)
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise JudgeError(
            f"The judge's address is {address}, expected URL#MODEL such as http://127.0.0.1:8000/v1#my-model; add what "
            "is missing."
        )
    if parts.username or parts.password or parts.query:
        raise JudgeError(
            f"The judge's address on {parts.hostname} has a user, a password or a query in it, expected none; put the "
            f"API key into the environment variable {KEY_VARIABLE}."
        )
    return base, model
