"""Post JSON to an address that the user gave, patiently; nothing else is ever contacted."""

import http.client
import json
import random
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from remove_refusals.errors import JudgeError

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_SECONDS = 60.0


class RefusedError(Exception):
    """The server says that it cannot take such a request: status 400, 404, 415 or 422."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address is one that the user did not give, and the key would go there."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Patience:
    """How long to go on trying.

    Attributes:
        attempts: How many times a request is sent at most.
        first_wait_seconds: How long to wait after the first failure; it doubles each time, with some chance in it. What
            the server asks for in `Retry-After` is honoured up to a minute.
        timeout_seconds: How long to wait for a reply.
    """

    attempts: int = 6
    first_wait_seconds: float = 1.0
    timeout_seconds: float = 120.0


def is_local(url: str) -> bool:
    """Tell whether an address is on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def post_json(url: str, body: Mapping[str, Any], key: str | None, patience: Patience) -> dict[str, Any]:
    """Send a request and give the reply; what passes by itself (too busy, a timeout, a lost connection) is tried again.

    Args:
        url: The address, `http` or `https`; a redirect is not followed.
        body: What to send.
        key: Sent as a bearer token; None sends none.
        patience: How long to go on trying.

    Returns:
        The reply, a JSON object.

    Raises:
        RefusedError: If the server cannot take such a request; the text is the server's.
        JudgeError: If it cannot be reached, forbids it, or replies with something else than a JSON object.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    handlers: list[Any] = [_NoRedirect]
    if is_local(url):
        # This machine is never behind the proxy that the environment may name.
        handlers.append(urllib.request.ProxyHandler({}))
    opener, problem = urllib.request.build_opener(*handlers), ""
    for attempt in range(patience.attempts):
        try:
            with opener.open(request, timeout=patience.timeout_seconds) as reply:
                return _parsed(url, reply.read())
        except urllib.error.HTTPError as error:
            said = _shortened(error, key)
            if error.code in (400, 404, 415, 422):
                raise RefusedError(f"{error.code}: {said}") from None
            if error.code not in _PASSING:
                raise JudgeError(
                    f"The judge at {url} answers with status {error.code} ({said}), expected a completion; check the "
                    "address and the key."
                ) from None
            problem, wait = f"status {error.code}: {said}", _asked_wait(error)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem, wait = str(getattr(error, "reason", "") or error or type(error).__name__), None
        if attempt + 1 < patience.attempts:
            doubled = patience.first_wait_seconds * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(_LONGEST_WAIT_SECONDS, doubled if wait is None else wait))
    raise JudgeError(
        f"The judge at {url} did not answer in {patience.attempts} attempts ({problem}), expected a completion; check "
        "that it runs, and try again: what it has judged is kept."
    )


def _parsed(url: str, content: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(content)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise JudgeError(
            f"The judge at {url} replies with {content[:80]!r}, expected a JSON object; check that the address is that "
            "of an OpenAI-compatible interface, usually ending in /v1."
        )
    return reply


def _shortened(error: urllib.error.HTTPError, key: str | None) -> str:
    said = error.read(2000).decode("utf-8", "replace") or error.reason
    # Some servers quote the key that they do not like.
    said = said.replace(key, "…") if key else said
    return textwrap.shorten(said, 200, placeholder=" …")


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None
