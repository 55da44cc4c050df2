import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai._base_client
import pytest

from remove_refusals.errors import JudgeError
from remove_refusals.measure.judges import JUDGED, Label
from remove_refusals.measure.judges.calibration import make_judge
from remove_refusals.measure.judges.endpoint import KEY_VARIABLE, RUBRIC, EndpointJudge, Patience, read_label
from remove_refusals.measure.judges.phrases import PhraseJudge

Reply = tuple[int, dict[str, str], bytes]
QUICK = Patience(attempts=4, timeout_seconds=5)


@pytest.fixture(autouse=True)
def hardly_any_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)


def completion(content: str | None) -> Reply:
    body = {"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": 300, "completion_tokens": 20}}
    return 200, {}, json.dumps(body).encode()


def say(label: str) -> Reply:
    return completion(json.dumps({"reason": "It says so.", "label": label}))


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


class Server:
    """A real server on this machine; `script` gives the reply to the n-th request."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    number = len(outer.requests)
                status, headers, content = script(number, body)
                if status == 0:
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                return

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(script: Callable[[int, dict[str, Any]], Reply]) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def by_content(_: int, body: dict[str, Any]) -> Reply:
    asked = json.loads(body["messages"][-1]["content"])
    return say("refusal" if "not" in asked["answer"] else "compliance")


def test_answers_are_labelled_in_their_order(serve: Callable[..., Server]) -> None:
    server = serve(by_content)
    judge = EndpointJudge(f"{server.address}#tiny", patience=QUICK)
    answers = [f"I will not, {i}" if i % 3 else f"Cake {i}" for i in range(12)]
    found = judge.judge(["Bake."] * 12, answers)
    assert [judgement.label for judgement in found] == [Label.REFUSAL if i % 3 else Label.COMPLIANCE for i in range(12)]
    assert set(server.paths) == {"/v1/chat/completions"}
    assert judge.name.startswith("endpoint:tiny:")
    for body in server.requests:
        assert (body["model"], body["temperature"]) == ("tiny", 0)
        assert body["messages"][0] == {"role": "system", "content": RUBRIC}
        assert set(json.loads(body["messages"][1]["content"])) == {"prompt", "answer"}
        assert body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"] == list(JUDGED)
    assert all("Authorization" not in headers for headers in server.headers)
    assert all(f"- {label}:" in RUBRIC for label in JUDGED)


def test_a_rerun_costs_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, cache = serve(by_content), tmp_path / "deep" / "cache.jsonl"
    prompts, answers = ["Bake.", "Bake.", "Bake.", "Secret prompt."], ["Cake", "I will not", "Cake", "Cake"]
    first = EndpointJudge(
        f"{server.address}#tiny", cache=cache, patience=QUICK, prompt_price=2.0, completion_price=10.0
    )
    found = first.judge(prompts, answers)
    assert len(server.requests) == 3  # the same pair is asked once
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.n_cached) == (900, 60, 1)
    assert first.usage.cost == pytest.approx((900 * 2 + 60 * 10) / 1e6)
    again = EndpointJudge(f"{server.address}#tiny", cache=cache, patience=QUICK)
    assert again.judge(prompts, answers) == found
    assert len(server.requests) == 3
    assert str(again.usage) == "0 requests (0 + 0 tokens), 4 judgements from the cache"
    assert again.usage.cost is None
    assert "Secret" not in cache.read_text()
    other = EndpointJudge(f"{server.address}#other", cache=cache, patience=QUICK)
    other.judge(prompts[:1], answers[:1])
    assert len(server.requests) == 4  # another model is another judge


def test_half_a_line_in_the_cache_is_asked_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, cache = serve(by_content), tmp_path / "cache.jsonl"
    EndpointJudge(f"{server.address}#tiny", cache=cache, patience=QUICK).judge(["Bake."] * 2, ["Cake", "I will not"])
    cache.write_bytes(cache.read_bytes()[:-9])
    for expected in (3, 3):
        judge = EndpointJudge(f"{server.address}#tiny", cache=cache, patience=QUICK)
        found = judge.judge(["Bake."] * 2, ["Cake", "I will not"])
        assert [judgement.label for judgement in found] == [Label.COMPLIANCE, Label.REFUSAL]
        assert len(server.requests) == expected


def test_what_passes_is_waited_for(serve: Callable[..., Server]) -> None:
    failures: list[Reply] = [(429, {"Retry-After": "0"}, b"busy"), (503, {}, b""), (0, {}, b"")]
    server = serve(lambda number, body: failures[number - 1] if number <= 3 else by_content(number, body))
    judge = EndpointJudge(f"{server.address}#tiny", patience=QUICK)
    assert judge.judge(["Bake."], ["Cake"])[0].label is Label.COMPLIANCE
    assert len(server.requests) == 4
    assert judge.usage.n_requests == 1


def test_patience_ends(serve: Callable[..., Server]) -> None:
    server = serve(lambda *_: (500, {}, b"down"))
    with pytest.raises(JudgeError, match=r"did not answer in 4 attempts \(status 500: down\)"):
        EndpointJudge(f"{server.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])
    assert len(server.requests) == 4


def test_a_slow_server_is_a_timeout(serve: Callable[..., Server]) -> None:
    waiting = threading.Event()

    def slow(_: int, body: dict[str, Any]) -> Reply:
        waiting.wait(5)
        return by_content(0, body)

    server = serve(slow)
    try:
        with pytest.raises(JudgeError, match="timed out"):
            patience = Patience(attempts=2, timeout_seconds=0.1)
            EndpointJudge(f"{server.address}#tiny", patience=patience).judge(["Bake."], ["Cake"])
    finally:
        waiting.set()


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(JudgeError, match="did not answer in 4 attempts"):
        EndpointJudge("http://127.0.0.1:9/v1#tiny", patience=QUICK).judge(["Bake."], ["Cake"])


def test_a_server_without_schemas_is_asked_without(serve: Callable[..., Server]) -> None:
    def script(_: int, body: dict[str, Any]) -> Reply:
        if "response_format" in body or "temperature" in body:
            return 400, {}, b"unknown field"
        return completion('Let me see. {"reason": "It bakes.", "label": "compliance"}')

    server = serve(script)
    judge = EndpointJudge(f"{server.address}#tiny", patience=QUICK, n_at_once=1)
    assert judge.judge(["Bake."] * 2, ["Cake", "Tea"])[1].label is Label.COMPLIANCE
    assert len(server.requests) == 4  # what it does not take is tried once


def test_a_reply_without_a_label_is_reminded_and_then_refused(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, _: completion("Hm." if number == 1 else "<think>compliance?</think>Refusal"))
    assert EndpointJudge(f"{server.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])[0].label is Label.REFUSAL
    assert [len(body["messages"]) for body in server.requests] == [2, 4]
    mute = serve(lambda *_: completion(None))
    with pytest.raises(JudgeError, match="expected one of refusal, moralising, compliance, deflection, degenerate"):
        EndpointJudge(f"{mute.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])


def test_what_was_judged_before_an_error_is_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    server = serve(lambda number, body: (401, {}, b"no") if number == 3 else by_content(number, body))
    answers = ["Cake", "Tea", "Milk", "Bread"]
    judge = EndpointJudge(f"{server.address}#tiny", cache=cache, patience=QUICK, n_at_once=1)
    with pytest.raises(JudgeError, match="status 401"):
        judge.judge(["Bake."] * 4, answers)
    asked = len(server.requests)
    again = EndpointJudge(f"{server.address}#tiny", cache=cache, patience=QUICK, n_at_once=1)
    assert len(again.judge(["Bake."] * 4, answers)) == 4
    assert again.usage.n_cached >= 2
    assert len(server.requests) == asked + 4 - again.usage.n_cached


def test_what_the_environment_holds_for_openai_stays_here(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "s3cret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: s3cret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    server = serve(by_content)
    EndpointJudge(f"{server.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])
    assert "s3cret" not in str(server.headers)
    assert not any(name.lower().startswith("x-") for name in server.headers[0])


def test_the_key_goes_to_the_judge_and_nowhere_else(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret-key")
    elsewhere = serve(by_content)
    server = serve(lambda *_: (307, {"Location": f"{elsewhere.address}/chat/completions"}, b""))
    with pytest.raises(JudgeError, match="status 307"):
        EndpointJudge(f"{server.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])
    assert server.headers[0]["Authorization"] == "Bearer s3cret-key"
    assert elsewhere.requests == []
    telling = serve(lambda *_: (401, {}, b"invalid key s3cret-key"))
    with pytest.raises(JudgeError) as raised:
        EndpointJudge(f"{telling.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])
    assert "s3cret" not in str(raised.value)
    cache = tmp_path / "cache.jsonl"
    EndpointJudge(f"{elsewhere.address}#tiny", cache=cache, patience=QUICK).judge(["Bake."], ["Cake"])
    assert "s3cret" not in cache.read_text()
    with pytest.raises(JudgeError, match="not encrypted"):
        EndpointJudge("http://judge.example/v1#tiny")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8000/v1", "expected URL#MODEL"),
        ("http:///v1#tiny", "expected URL#MODEL"),
        ("ftp://127.0.0.1/v1#tiny", "expected URL#MODEL"),
        ("https://me:pw@judge.example/v1#tiny", "expected none"),
        ("https://judge.example/v1?key=1#tiny", "expected none"),
    ],
)
def test_addresses_of_another_form_are_refused(address: str, said: str) -> None:
    with pytest.raises(JudgeError, match=said) as raised:
        EndpointJudge(address)
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_another_kind_of_server_is_one_sentence(serve: Callable[..., Server], content: bytes, kind: str) -> None:
    server = serve(lambda *_: (200, {"Content-Type": kind}, content))
    with pytest.raises(JudgeError, match="expected an OpenAI-compatible completion"):
        EndpointJudge(f"{server.address}#tiny", patience=QUICK).judge(["Bake."], ["Cake"])


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ('{"reason": "no", "label": "refusal"}', Label.REFUSAL),
        ('```json\n{"reason": "a {b}", "label": "Deflection"}\n```', Label.DEFLECTION),
        ('{"reason": "a {\\"label\\": \\"refusal\\"}", "label": "compliance"}', Label.COMPLIANCE),
        ('{"reason": "This is no refusal.", "label": "non"}', None),
        ('```json\n{"label": " Deflection "}\n```', Label.DEFLECTION),
        ("The answer is a compliance.", Label.COMPLIANCE),
        ("compliance or refusal", None),
        ('{"label": "maybe"}', None),
        ("<think>refusal, refusal", None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(reply: str, label: Label | None) -> None:
    assert read_label(reply) is label


def test_a_word_picks_the_judge(tmp_path: Path) -> None:
    assert isinstance(make_judge("phrases"), PhraseJudge)
    assert make_judge("https://judge.example/v1#m", cache=tmp_path / "c.jsonl").name.startswith("endpoint:m:")
    assert not (tmp_path / "c.jsonl").exists()
