"""The server: a real one, asked over HTTP by the client that people use, and what it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import pytest

from conftest import Command
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import mean_difference, save_direction
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ModelError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.types import Direction, Intervention

PROMPT = embedded_prompts("harmful_test").prompts[0]
GREEDY: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": PROMPT}],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def direction(loaded: LoadedModel) -> Direction:
    sets = [draw(embedded_prompts(f"{name}_train"), 32, 0) for name in ("harmful", "harmless")]
    return mean_difference(*(collect_activations(loaded, part) for part in sets), layer=0.6)


@pytest.fixture(scope="module")
def direction_file(direction: Direction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / "demo.safetensors"
    save_direction(direction, output)
    return output


@pytest.fixture(scope="module")
def intervention(loaded: LoadedModel, direction: Direction) -> Intervention:
    return intervene(direction, map_model(loaded.model).n_layers)


@pytest.fixture(scope="module")
def answers(loaded: LoadedModel, intervention: Intervention) -> tuple[str, str]:
    """What the model says without and with the edit, without a server."""
    ids = render(loaded.tokenizer, [PROMPT])
    plain = generate(loaded, ids, max_new_tokens=24)[0].text
    with ablated(loaded.model, intervention):
        edited = generate(loaded, ids, max_new_tokens=24)[0].text
    assert plain != edited
    return plain, edited


@pytest.fixture(scope="module")
def address(direction_file: Path) -> Iterator[str]:
    """The address that the command says; it is ended as a service manager would, and has to end well."""
    options = ["demo", "--direction", str(direction_file), "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "remove_refusals", "serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            found = re.fullmatch(r"Serving demo on (http://127\.0\.0\.1:\d+/v1); Ctrl-C ends it\.\n", said)
            assert found is not None, said or process.communicate()[1]
            yield found[1]
            process.send_signal(signal.SIGTERM)
            assert (*process.communicate(timeout=60), process.returncode) == ("", "", 0)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
        yield found


def post(url: str, body: Any) -> tuple[int, str]:
    """Ask for what the client has no method for."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_answers_as_the_hooks_do(client: openai.OpenAI, answers: tuple[str, str]) -> None:
    found = client.chat.completions.create(**GREEDY)
    assert found.choices[0].message.content == answers[1]
    assert found.model == "demo"


def test_the_stream_is_the_same_text(client: openai.OpenAI, answers: tuple[str, str]) -> None:
    pieces = [piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**GREEDY, stream=True)]
    assert "".join(pieces) == answers[1]
    assert sum(map(bool, pieces)) > 1


def test_the_other_two_ways_of_asking_answer_with_it_too(
    client: openai.OpenAI, loaded: LoadedModel, answers: tuple[str, str]
) -> None:
    found = client.responses.create(model="demo", input=PROMPT, temperature=0, max_output_tokens=24, stream=False)
    assert found.output_text == answers[1]
    ids = render(loaded.tokenizer, [PROMPT])
    rendered = loaded.tokenizer.decode(ids[0])
    assert render(loaded.tokenizer, [rendered], plain=True) == ids
    completed = client.completions.create(model="demo", prompt=rendered, temperature=0, max_tokens=24)
    assert completed.choices[0].text == answers[1]


def test_the_one_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


@pytest.mark.parametrize("name", ["other", "org/other", "demo@main", "demo:weights.gguf"])
def test_another_model_is_refused(address: str, name: str) -> None:
    asked = {"model": name, "messages": GREEDY["messages"]}
    bodies = {"chat/completions": asked, "completions": {"model": name, "prompt": PROMPT}}
    bodies["responses"] = {"model": name, "input": PROMPT}
    for path, body in bodies.items():
        status, text = post(f"{address}/{path}", body)
        assert status == 400 and f"'{name}'" in text
    status, text = post(address.replace("/v1", "/load_model"), {"model": name})
    assert status == 400 and "This server has the model 'demo' alone" in text


def test_it_stays_in_memory(address: str, client: openai.OpenAI, answers: tuple[str, str]) -> None:
    assert '"ready"' in post(address.replace("/v1", "/load_model"), {"model": "demo"})[1]
    assert post(address.replace("/v1", "/reset"), {})[0] == 200
    assert client.chat.completions.create(**GREEDY).choices[0].message.content == answers[1]


@pytest.mark.parametrize("path", ["systemone", "audio/transcriptions"])
def test_what_asks_for_other_models_is_not_served(address: str, path: str) -> None:
    status, text = post(f"{address}/{path}", {"model": "demo"})
    assert status == 404 and "Not served here" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_middle_of_an_answer(
    loaded: LoadedModel, intervention: Intervention, answers: tuple[str, str], number: signal.Signals
) -> None:
    ready: Queue[str] = Queue()
    # Without an end token it would go on for long.
    endless = {"generation_config": json.dumps({"do_sample": False, "min_new_tokens": 300, "max_new_tokens": 300})}

    def ask() -> str:
        with openai.OpenAI(base_url=ready.get(timeout=60), api_key="none", max_retries=0) as client:
            pieces = client.chat.completions.create(
                model="it", messages=GREEDY["messages"], stream=True, extra_body=endless
            )
            said = "".join(next(pieces).choices[0].delta.content or "" for _ in range(6))
            os.kill(os.getpid(), number)
            with pytest.raises(openai.APIError) as broken_off:
                list(pieces)
            assert "The server is being stopped" in str(broken_off.value.body)
            return said

    before = signal.getsignal(number)
    with ThreadPoolExecutor(1) as executor, serving.reserved(port=0) as listener:
        asked = executor.submit(ask)
        serving.serve(loaded, intervention, listener, name="it", on_ready=ready.put)
        said = asked.result(timeout=60)
    assert said and answers[1].startswith(said)
    assert signal.getsignal(number) is before
    # The model is as it was.
    assert generate(loaded, render(loaded.tokenizer, [PROMPT]), max_new_tokens=24)[0].text == answers[0]


def test_what_cannot_be_served_is_said_in_a_sentence(command: Command, direction_file: Path) -> None:
    found = command("serve", "demo")
    assert found.code == 2 and "--direction" in found.err and "--run" in found.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = command("serve", "demo", "--direction", direction_file, "--port", taken.getsockname()[1])
    assert found.code == 2 and "cannot be listened on" in found.err and found.err.count("\n") == 1


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    serving.check_installed()
    assert not serving.is_known_form(lambda model_manager, new_handler: None)
    # An entry of None makes an import fail as it does where there is no such module.
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", None)
    with pytest.raises(ModelError, match="no server of a known form"):
        serving.check_installed()
    monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelError, match=r"remove-refusals\[serve\]"):
        serving.check_installed()
