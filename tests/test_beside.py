"""What lies beside a model's weights: adapters, which are refused, and tokenizers and templates in other files."""

import base64
import json
import shutil
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, ProcessorMixin

import tiny
import zoo
from remove_refusals.baking.base import base_of, open_base
from remove_refusals.baking.memory import load_edited
from remove_refusals.errors import ModelError
from remove_refusals.examination import diff, inspect
from remove_refusals.measure.judges.classifier import ClassifierJudge
from remove_refusals.models.chat_template import render
from remove_refusals.models.load import load
from remove_refusals.settings import ChatFormat, LoadSettings
from streaming import streamed, taken_out

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
NONSENSE = bytes([10, 14, 200, 7]) * 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with its tokenizer."""
    directory = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapted(saved, tmp_path_factory):
    """An adapter of that model, and the logits with it."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load(saved).model, lora).eval()
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(torch.tensor([[5, 6, 7]])).logits


def refused(call, *words):
    with pytest.raises(ModelError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "expected" in message and "\n" not in message and message.endswith(".")


def everything(directory, base):
    """Whatever takes a model by its directory."""
    place = str(directory)
    return (
        lambda: load(place),
        lambda: open_base(place),
        lambda: inspect(place),
        lambda: diff(base, place),
        lambda: ClassifierJudge(place),
    )


def test_an_adapter_beside_the_weights_is_refused_and_so_is_one_in_another_format(saved, adapted, tmp_path):
    adapter, _ = adapted
    both, pickled = tmp_path / "both", tmp_path / "pickled"
    for directory in (both, pickled):
        shutil.copytree(saved, directory)
        shutil.copytree(adapter, directory, dirs_exist_ok=True)
    torch.save(load(saved).model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for directory in (both, pickled):
        named = f"beside its weights a PEFT adapter (adapter_config.json) of {saved}", "merge_and_unload()", "move adap"
        for call in everything(directory, str(saved)):
            refused(call, str(directory), *named)
        # As the edited one of two, it would be merged into the base, and its own weights left out.
        refused(lambda at=str(directory): load_edited(at, str(saved), LoadSettings()), *named)


def test_an_adapter_instead_of_a_model_is_refused_until_it_is_merged_as_the_error_says(saved, adapted, tmp_path):
    adapter, logits = adapted
    with_config = tmp_path / "adapter"
    shutil.copytree(adapter, with_config)
    shutil.copy(saved / "config.json", with_config)
    for directory in (adapter, with_config):
        for call in everything(directory, str(saved)):
            refused(call, f"{directory} is a PEFT adapter (adapter_config.json) of {saved}", "merge_and_unload()")
    merged = tmp_path / "merged"
    AutoPeftModelForCausalLM.from_pretrained(str(adapter)).merge_and_unload().save_pretrained(merged)
    tiny.tokenizer().save_pretrained(merged)
    with torch.no_grad():
        assert torch.allclose(load(merged).model(torch.tensor([[5, 6, 7]])).logits, logits, atol=1e-5)


def test_a_model_in_memory_runs_with_its_adapter_but_is_not_edited(saved, adapted):
    model = load(saved).model
    model.load_adapter(str(adapted[0]))
    loaded = load(model, tiny.tokenizer())
    assert loaded.source == f"{saved} with an adapter"
    with torch.no_grad():
        assert torch.allclose(loaded.model(torch.tensor([[5, 6, 7]])).logits, adapted[1], atol=1e-5)
    refused(lambda: base_of(loaded), "adapter of PEFT in its layers", "merge_and_unload")


@pytest.fixture
def bare(saved, tmp_path):
    """The model without its tokenizer."""
    shutil.copy(saved / "config.json", tmp_path)
    shutil.copy(saved / "model.safetensors", tmp_path)
    return tmp_path


def described(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma", "mistral"])
def test_a_model_without_a_vocabulary_is_refused(bare, model_type):
    described(bare, model_type=model_type)
    refused(lambda: load(bare), "has no vocabulary")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", b'{"version": ', "JSONDecodeError"),
        ("tokenizer.json", b"{}", "KeyError"),
        ("tekken.json", b"{}", "KeyError"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["t.T", null]}}', "trust_remote_code"),
    ],
)
def test_why_a_tokenizer_cannot_be_loaded_is_said(bare, name, content, word):
    (bare / name).write_bytes(content)
    refused(lambda: load(bare), "The tokenizer of", word)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("tokenizer.model", "sentencepiece", "sentencepiece"),
        ("tokenizer.model", "google.protobuf", "sentencepiece"),
        ("tekken.json", "mistral_common", "mistral"),
    ],
)
def test_the_package_that_a_tokenizer_needs_is_named(bare, monkeypatch, name, package, extra):
    (bare / name).write_bytes(tekken() if name == "tekken.json" else NONSENSE)
    if package == "google.protobuf":
        monkeypatch.setitem(sys.modules, "sentencepiece", sys)
    monkeypatch.setitem(sys.modules, package, None)  # which is how Python notes that a package is not there
    refused(lambda: load(bare), f"package {package.removeprefix('google.')} is missing", f"remove-refusals[{extra}]")


def sentencepiece_model(directory, vocab_size):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    pytest.importorskip("google.protobuf")
    text = directory / "text.txt"
    text.write_text("What is this thing called?\nHow do I bake bread?\nTell me about apples and pears.\n" * 3)
    trainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=vocab_size,
        minloglevel=2,
        model_type="bpe",
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_sentencepiece_alone_gives_its_own_tokens(bare, model_type):
    sentencepiece_model(bare, 60)
    described(bare, model_type=model_type)
    import sentencepiece

    expected = sentencepiece.SentencePieceProcessor(model_file=str(bare / "tokenizer.model"))
    loaded = load(tiny.llama(), bare, chat=ChatFormat(chat_template="{{ messages[0].content }}"))
    for prompt in ("How do I bake apples?", "What  is\nthis", "pears"):
        assert render(loaded, [prompt]) == [expected.encode(prompt)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_a_converter_reads_the_vocabulary_of_the_base(model_type, tmp_path):
    """What llama.cpp's converter reads: every token with its score, and tokens that were added."""
    vocabulary = pytest.importorskip("gguf.vocab").SentencePieceVocab
    zoo.build(model_type).save_pretrained(tmp_path / "base")
    sentencepiece_model(tmp_path / "base", 60)
    (tmp_path / "base" / "added_tokens.json").write_text('{"<start>": 60, "<stop>": 61}')
    found = streamed(tmp_path, taken_out()).directory
    base, edited = (list(vocabulary(path).all_tokens()) for path in (tmp_path / "base", found))
    assert edited == base and base[60][0] == b"<start>"
    assert len({score for _, score, _ in edited[:60]}) > 30


def test_a_sentencepiece_file_that_is_cut_off_is_named(bare):
    sentencepiece_model(bare, 60)
    path = bare / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:200])
    refused(lambda: load(bare), "tokenizer.model is no whole SentencePiece file")


CONTROL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[TOOL_CONTENT] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [PREFIX] [MIDDLE] [SUFFIX] <pad>"
).split()


def tekken():
    """A vocabulary in Mistral's format: bytes, and a few words."""
    words = [bytes([byte]) for byte in range(256)] + [b"He", b"ll", b"Hell", b"Hello", b" w", b"or", b" wor"]
    n = len(CONTROL)
    sizes = {"num_vocab_tokens": len(words), "default_vocab_size": len(words) + n, "default_num_special_tokens": n}
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
        for rank, word in enumerate(words)
    ]
    control = [{"rank": rank, "token_str": word, "is_control": True} for rank, word in enumerate(CONTROL)]
    pattern = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    return json.dumps(
        {"config": {"pattern": pattern, "version": "v7", **sizes}, "vocab": vocabulary, "special_tokens": control}
    ).encode()


def test_tekken_with_a_template_needs_no_package(bare):
    (bare / "tekken.json").write_bytes(tekken())
    (bare / "chat_template.jinja").write_text("{{ bos_token }}[INST]{{ messages[0].content }}[/INST]")
    loaded = load(tiny.llama(vocab_size=300), bare)
    hello, *world = (len(CONTROL) + rank for rank in (259, 262, *b"ld"))
    assert render(loaded, ["Hello world"]) == [[1, 3, hello, *world, 4]]
    assert render(load(tiny.llama(vocab_size=300), bare, chat=ChatFormat(plain=True)), ["Hello"]) == [[1, hello]]
    assert loaded.tokenizer.eos_token_id == 2


def test_tekken_alone_has_the_template_of_mistral_common(bare):
    pytest.importorskip("mistral_common.integrations.chat_templates.chat_templates")
    (bare / "tekken.json").write_bytes(tekken())
    loaded = load(tiny.llama(vocab_size=300), bare, chat=ChatFormat(system_prompt="Be"))
    assert (
        loaded.tokenizer.decode(render(loaded, ["Hello"])[0])
        == "<s>[SYSTEM_PROMPT]Be[/SYSTEM_PROMPT][INST]Hello[/INST]"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("chat_template.json", json.dumps({"chat_template": {"default": TEMPLATE, "tools": "{{ nothing }}"}})),
        ("processor_config.json", json.dumps({"processor_class": "FrobProcessor", "chat_template": TEMPLATE})),
        ("chat_template.jinja", TEMPLATE),
    ],
)
def test_the_processors_template_counts_where_the_tokenizer_has_none(bare, name, content):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    (bare / name).write_text(content)
    assert render(load(bare), ["Hi"]) == [tokenizer("<s>Hi</s>", add_special_tokens=False)["input_ids"]]


def test_the_tokenizers_own_template_comes_first(bare):
    tiny.tokenizer().save_pretrained(bare)
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load(bare).tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_a_chat_template_file_that_is_broken_is_named(bare):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    (bare / "chat_template.json").write_text("{")
    refused(lambda: load(bare), "chat_template.json is not JSON")


class TextProcessor(ProcessorMixin):
    """A processor of a tokenizer alone."""

    attributes = ["tokenizer"]  # noqa: RUF012 - as Transformers wants it
    tokenizer_class = "PreTrainedTokenizerFast"


def test_a_processor_in_memory_brings_its_template(saved):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    tokenizer.chat_template = None
    loaded = load(tiny.llama(), TextProcessor(tokenizer=tokenizer, chat_template=TEMPLATE))
    assert loaded.tokenizer.decode(render(loaded, ["Hi"])[0]) == "<s>Hi</s>"
    assert tokenizer.chat_template is None
