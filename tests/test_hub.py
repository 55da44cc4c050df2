"""Models from the hub and to it, against the part of its HTTP interface in `hub_stub`, on this machine alone.

Whether the hub is to be asked is decided when its client is imported; so each part runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

import tiny
from hub_stub import Hub
from remove_refusals.errors import HubError
from remove_refusals.models.source import licence_fields
from remove_refusals.report.card import push
from remove_refusals.report.records import Certificate
from report_records import ablation

TOKEN = "hf_only_for_the_stub"
CARD = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nbase_model: maker/grandmother\n---\n# Tiny\n"


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def environment(home: Path, endpoint: str, *, offline: bool = False) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "remove_refusals", *map(str, arguments)]
    return subprocess.run(call, env=env, capture_output=True, text=True, check=False)


def pushes(calls: Sequence[dict[str, Any]], *, env: dict[str, str]) -> list[dict[str, Any]]:
    """Call `push` several times in one process; each gives what it returned or its error."""
    script = (
        "import json, sys\n"
        "from remove_refusals.errors import RemoveRefusalsError\n"
        "from remove_refusals.report import push\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        print(json.dumps(push(**call).to_json()))\n"
        "    except RemoveRefusalsError as error:\n"
        "        print(json.dumps({'error': str(error)}))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)], env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a tiny model whose main branch has moved on since `v1`."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.tokenizer().save_pretrained(directory)
    with Hub(TOKEN) as running:
        for seed in (0, 1):
            tiny.llama(seed).save_pretrained(directory)
            sha = running.add(
                "maker/tiny",
                files_of(directory) | {"README.md": CARD, "LICENSE": b"free", "processor_config.json": b"{}"},
            )
            running.repositories["maker/tiny"].branches[f"v{seed + 1}"] = sha
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def prompt_options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder, options = tmp_path_factory.mktemp("prompts"), []
    for name in ("harmful", "harmless", "harmful-test", "harmless-test", "alarming-test"):
        path = folder / f"{name}.txt"
        path.write_text("".join(f"{name} number {number}\n" for number in range(3)))
        options += [f"--{name}", path]
    return [*options, "--n-prompts", 3, "--max-new-tokens", 4, "--kl-tokens", 2, "--select", "none"]


@pytest.fixture(scope="module")
def made(hub: Hub, home: Path, prompt_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run straight from the hub leaves, at a revision that is not the newest."""
    output = tmp_path_factory.mktemp("made") / "out"
    found = command(
        "run", "maker/tiny", "--revision", "v1", "-o", output, *prompt_options, env=environment(home, hub.endpoint)
    )
    assert found.returncode == 0, found.stderr
    return output


class TestFromTheHub:
    def test_the_record_pins_the_commit_of_the_revision(self, hub: Hub, made: Path) -> None:
        base = json.loads((made / "ablation.json").read_text())["base"]
        branches = hub.repositories["maker/tiny"].branches
        assert branches["v1"] != branches["main"] == branches["v2"]
        assert (base["source"], base["revision"]) == ("maker/tiny", branches["v1"])

    def test_the_same_again_from_the_cache_when_offline(
        self, made: Path, home: Path, prompt_options: list[object], tmp_path: Path
    ) -> None:
        # Nothing listens there.
        env = environment(home, "http://127.0.0.1:9", offline=True)
        found = command("run", "maker/tiny", "--revision", "v1", "-o", tmp_path / "out", *prompt_options, env=env)
        assert found.returncode == 0, found.stderr
        for name in ("model.safetensors", "rows.jsonl", "LICENSE", "processor_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()
        first, second = (json.loads((path / "ablation.json").read_text()) for path in (made, tmp_path / "out"))
        assert first["base"] == second["base"]

    @pytest.mark.parametrize(("revision", "offline"), [("v9", False), ("v2", True)])
    def test_what_is_not_there_is_said_in_a_sentence(
        self, hub: Hub, made: Path, home: Path, tmp_path: Path, revision: str, offline: bool
    ) -> None:
        env = environment(home, hub.endpoint, offline=offline)
        found = command("direction", "maker/tiny", "--revision", revision, "-o", tmp_path / "d.pt", env=env)
        # Behind a line that says what is being done.
        said = found.stderr.splitlines()
        assert found.returncode == 2 and [line for line in said if line.startswith("Error: ")] == said[1:]
        assert len(said) == 2 and "maker/tiny" in said[1]

    def test_the_map_is_that_of_the_revision(self, hub: Hub, made: Path, home: Path) -> None:
        env = environment(home, hub.endpoint)
        found = command("inspect", "maker/tiny", "--revision", "v1", "--json", env=env)
        assert found.returncode == 0 and all("dtype" in row for row in json.loads(found.stdout)["writers"])
        assert command("inspect", "maker/tiny", "--revision", "v9", env=env).returncode == 2

    def test_an_edit_on_disk_is_pinned_too(self, hub: Hub, made: Path, home: Path, tmp_path: Path) -> None:
        direction = made / "directions" / "direction.safetensors"
        options = ("bake", "maker/tiny", "--revision", "v1", "--direction", direction, "-o", tmp_path / "out")
        found = command(*options, env=environment(home, hub.endpoint))
        assert found.returncode == 0, found.stderr
        base = json.loads((tmp_path / "out" / "ablation.json").read_text())["base"]
        assert base["revision"] == hub.repositories["maker/tiny"].branches["v1"]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


class TestPush:
    def test_the_hub_holds_the_files_but_those_with_answers(self, hub: Hub, made: Path, home: Path) -> None:
        before = files_of(made)
        found = command("push", made, "me/tiny-ablated", env=environment(home, hub.endpoint))
        assert (found.returncode, found.stderr) == (0, ""), found
        assert "Left out: report.html, rows.jsonl." in found.stdout
        repository = hub.repositories["me/tiny-ablated"]
        assert repository.private and repository.branches["main"] in found.stdout
        expected = {name: content for name, content in before.items() if name not in ("report.html", "rows.jsonl")}
        held = dict(repository.files)
        held.pop(".gitattributes")
        assert held.keys() == expected.keys()
        card, own = held.pop("README.md").decode(), expected.pop("README.md").decode()
        assert held == expected
        assert files_of(made) == before
        # The card is the directory's; its fields are the base's where they are about licence and descent.
        assert card.split("---\n", 2)[2].strip() == own.split("---\n", 2)[2].strip()
        fields = ModelCard(card).data.to_dict()
        assert (fields["license"], fields["license_name"]) == ("other", "tiny")
        assert fields["license_link"] == "https://huggingface.co/maker/tiny/blob/main/LICENSE"
        assert fields["base_model"] == "maker/tiny"
        assert {"library_name", "pipeline_tag", "tags"} <= fields.keys()

    def test_again_with_answers_and_to_a_public_repository(self, hub: Hub, made: Path, home: Path) -> None:
        hub.add("me/open", {"a.txt": b"a"})
        common = {"directory": str(made), "repo": "me/open"}
        refused, sent, _ = pushes(
            [common, *[common | {"private": False, "with_answers": True}] * 2], env=environment(home, hub.endpoint)
        )
        assert "me/open is public already" in refused["error"]
        assert hub.repositories["me/open"].files.items() >= {"a.txt": b"a"}.items()
        assert hub.repositories["me/open"].files["rows.jsonl"] == (made / "rows.jsonl").read_bytes()
        assert sent["left_out"] == [] and "report.html" in sent["files"] and sent["private"] is False
        # What the hub has already is not sent a second time.
        puts = [request for request in hub.requests if request.startswith("PUT")]
        assert puts and len(puts) == len(set(puts))

    def test_an_adapter_alone_and_a_checkpoint_without_a_card(
        self, hub: Hub, made: Path, home: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("peft")
        direction = made / "directions" / "direction.safetensors"
        base = tmp_path / "base"
        tiny.llama().save_pretrained(base)
        tiny.tokenizer().save_pretrained(base)
        (base / "README.md").write_bytes(CARD)
        env = environment(home, hub.endpoint)
        for kind in ("lora", "checkpoint"):
            options = ("bake", base, "--direction", direction, "--as", kind, "-o", tmp_path / kind)
            found = command(*options, env=env)
            assert found.returncode == 0, found.stderr
        (tmp_path / "lora" / "notes.txt").write_text("mine")
        (tmp_path / "checkpoint" / ".hidden").write_text("mine")
        adapter, checkpoint = pushes(
            [
                {"directory": str(tmp_path / "lora"), "repo": "me/lora", "adapter_only": True},
                {"directory": str(tmp_path / "checkpoint"), "repo": "me/whole"},
            ],
            env=env,
        )
        assert adapter["left_out"] == ["notes.txt"] and checkpoint["left_out"] == [".hidden"]
        held = hub.repositories["me/lora"].files
        for name in ("adapter_config.json", "adapter_model.safetensors", "ablation.json"):
            assert held[name] == (tmp_path / "lora" / name).read_bytes()
        # The base is a directory: its card's licence and its own base are carried over, not the directory's name.
        for name in ("me/lora", "me/whole"):
            fields = ModelCard(hub.repositories[name].files["README.md"].decode()).data.to_dict()
            assert (fields["license"], fields["base_model"]) == ("other", "maker/grandmother")
        assert "Nothing: neither refusals nor damage." in hub.repositories["me/whole"].files["README.md"].decode()

    def test_what_the_hub_refuses_is_said_in_a_sentence(self, hub: Hub, made: Path, home: Path) -> None:
        common = {"directory": str(made), "repo": "me/refused"}
        token, name, nobody = pushes(
            [
                common | {"token": "hf_wrong", "base": str(made)},
                common | {"repo": "a/b/c"},
                common | {"endpoint": "http://127.0.0.1:9", "base": str(made)},
            ],
            env=environment(home, hub.endpoint),
        )
        assert "status 401" in token["error"] and "hf auth login" in token["error"]
        assert "'a/b/c'" in name["error"]
        assert "me/refused" in nobody["error"] and "reached" in nobody["error"]
        assert "me/refused" not in hub.repositories
        assert not any("\n" in found["error"] for found in (token, name, nobody))
        (offline,) = pushes([common], env=environment(home, hub.endpoint, offline=True))
        assert "HF_HUB_OFFLINE" in offline["error"]


class TestRefused:
    """What is refused before anything is asked; no hub is needed for that."""

    def test_without_a_record(self, tmp_path: Path) -> None:
        with pytest.raises(HubError, match=r"ablation\.json"):
            push(tmp_path, "me/x")
        (tmp_path / "ablation.json").write_text("[]")
        with pytest.raises(HubError, match=r"ablation\.json has at the top"):
            push(tmp_path, "me/x")

    @pytest.mark.parametrize("certificate", ['{"passed": false}', "[]", '{"passed": "yes"}', None])
    def test_a_failed_certificate(self, tmp_path: Path, certificate: str | None) -> None:
        (tmp_path / "ablation.json").write_text(json.dumps(ablation(2)))
        failed = Certificate(problems=("It does not hold.",), edited=(), left={}, identical=0)
        (tmp_path / "certificate.json").write_text(certificate or json.dumps(failed.to_json()))
        with pytest.raises(HubError, match=r"has not passed" if certificate is None else r"certificate\.json has at"):
            push(tmp_path, "me/x")

    def test_no_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "ablation.json").write_text(json.dumps(ablation(2)))
        with pytest.raises(HubError, match="--as lora"):
            push(tmp_path, "me/x", adapter_only=True)


@pytest.mark.parametrize(
    ("card", "fields"),
    [
        (None, {}),
        ("No fields at all.\n", {}),
        ("---\n[broken\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: mit\nlanguage: en\n---\n", {"license": "mit"}),
    ],
)
def test_licence_fields(tmp_path: Path, card: str | None, fields: dict[str, str]) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_fields(tmp_path) == fields


def test_a_model_that_was_edited_in_memory_is_pushed_as_bake_writes_it(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    script = (
        "import sys, torch, remove_refusals as rr\n"
        "from transformers import AutoModelForCausalLM\n"
        "vector = torch.ones(32)\n"
        "rr.bake(f'{sys.argv[1]}/base', vector, f'{sys.argv[1]}/baked')\n"
        "model = AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/base').eval()\n"
        "rr.bake_in_place(model, vector)\n"
        "model.push_to_hub('me/edited')\n"
    )
    with Hub(TOKEN) as own:
        env = environment(tmp_path / "home", own.endpoint)
        found = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        sent = load(own.repositories["me/edited"].files["model.safetensors"])
    baked = load_file(tmp_path / "baked" / "model.safetensors")
    assert sent.keys() == baked.keys() and all(torch.equal(sent[name], baked[name]) for name in baked)
