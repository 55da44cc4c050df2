import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from remove_refusals.errors import ModelError, PromptError
from remove_refusals.models import LoadedModel
from remove_refusals.models.chat_template import check_positions, render, template_tail_length
from remove_refusals.settings import ChatFormat

LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n"
    "{{ message['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
DATED = (
    "\n{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }} "
    "{{ strftime_now('%Y-%m-%d').split('-')[1] }}\n"
)
QWEN = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_THINKING = QWEN.split("{% if enable_thinking", maxsplit=1)[0] + "<think>\n{% endif %}"
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% else %}<|start|>User{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>Assistant<think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
NO_SPECIALS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}Answer:"
TEMPLATES = {
    "llama": LLAMA,
    "qwen": QWEN,
    "qwen-thinking": QWEN_THINKING,
    "r1": R1,
    "gemma": GEMMA,
    "no-specials": NO_SPECIALS,
}
TAILS = {
    "llama": "<|eot|><|start|>assistant<|end|>\n\n",
    "qwen": "<|eot|>\n<|start|>assistant\n<think>\n\n</think>\n\n",
    "qwen-thinking": "<|eot|>\n<|start|>assistant\n<think>\n\n</think>\n\n",
    "r1": "<|start|>Assistant<think>\n\n</think>\n\n",
    "gemma": "<|end|>\n<|start|>model\n",
}
MODEL = tiny.llama(vocab_size=330)
SPECIAL = ["<bos>", "<|start|>", "<|end|>", "<|eot|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def make() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Tokenizers of byte-level pairs, which add a beginning of their own as Llama's and Gemma's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # Marks followed by line ends are trained to merge, as they do in real vocabularies.
    corpus = ["user assistant model: What is this?\n\n", "Answer: it is so.\n\n", "the end\n\n"] * 5
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])

    def build(template: str | None) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<|eot|>")
        tokenizer.chat_template = template
        return tokenizer

    return build


Make = Callable[[str | None], PreTrainedTokenizerFast]


def put(tokenizer: PreTrainedTokenizerFast, **chat: object) -> LoadedModel:
    return LoadedModel(MODEL, tokenizer, "tiny", chat=ChatFormat(**chat))


@pytest.mark.parametrize("kind", TAILS)
def test_prompt_ends_where_the_answer_starts(make: Make, kind: str) -> None:
    tokenizer = make(TEMPLATES[kind])
    (row,) = render(put(tokenizer), ["How are you?"])
    text = tokenizer.decode(row)
    assert text.endswith("How are you?" + TAILS[kind])
    assert text.count("<bos>") == (0 if "qwen" in kind else 1)
    assert text.count("<think>") == text.count("</think>")


def test_thinking_is_closed_with_the_tokens_that_the_template_uses_itself(make: Make) -> None:
    by_template = render(put(make(QWEN)), ["Hi"])
    by_hand = render(put(make(QWEN_THINKING)), ["Hi"])
    assert by_template == by_hand


def test_prompt_about_thinking_is_left_alone(make: Make) -> None:
    tokenizer = make(LLAMA)
    (row,) = render(put(tokenizer), ["What does <think> mean?"])
    assert "</think>" not in tokenizer.decode(row)


def test_rendering_agrees_with_the_library_where_there_is_no_thinking(make: Make) -> None:
    tokenizer = make(LLAMA)
    for prompt in ("Hi", "Two\nlines", "é 日本 🙂"):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert render(put(tokenizer, system_prompt="Be kind."), [prompt]) == [expected]


def test_conversation_agrees_with_the_library(make: Make) -> None:
    tokenizer = make(LLAMA)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render(put(tokenizer, system_prompt="Be kind."), ["Bye"], [("Hi", "Hello.")]) == [expected]


def test_each_prompt_is_rendered_as_if_alone(make: Make) -> None:
    tokenizer = make(QWEN)
    prompts = ["a", "a much longer prompt than the first", "b"]
    assert render(put(tokenizer), prompts) == [render(put(tokenizer), [prompt])[0] for prompt in prompts]
    assert render(put(tokenizer), []) == []


def test_date_is_the_same_every_day(make: Make) -> None:
    tokenizer = make(DATED + LLAMA)
    (row,) = render(put(tokenizer), ["Hi"])
    assert tokenizer.decode(row) == "\n26 Jul 2024 07\n" + tokenizer.decode(render(put(make(LLAMA)), ["Hi"])[0])


def test_system_prompt_that_the_template_refuses(make: Make) -> None:
    with pytest.raises(PromptError, match=r"System role not supported.*leave the system prompt away"):
        render(put(make(GEMMA), system_prompt="Be kind."), ["Hi"])
    assert render(put(make(GEMMA)), ["Hi"])


def test_what_the_template_swallows_is_an_error(make: Make) -> None:
    no_system = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(PromptError, match=r"leaves out the system prompt 'Be kind\.'"):
        render(put(make(no_system), system_prompt="Be kind."), ["Hi"])
    shouting = "{% for message in messages %}{{ message.content | string | replace('a', 'A') }}{% endfor %}"
    with pytest.raises(PromptError, match="leaves out the prompt 'banana'"):
        render(put(make(shouting)), ["banana"])


PARTS = {
    "loop": "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}",
    "strict": "{% if message.content is string %}{{ raise_exception('A list is wanted.') }}{% endif %}"
    "{{ message.content[0]['text'] | trim }}",
    "mapping": "{% for part in message.content %}{% for key, value in part.items() if key == 'text' %}{{ value }}"
    "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_template_that_wants_parts_gets_them_and_renders_as_one_that_takes_text(make: Make, kind: str) -> None:
    wanting = LLAMA.replace("{{ message['content'] | trim }}", PARTS[kind])
    assert wanting != LLAMA
    for chat in ({}, {"system_prompt": "Be kind."}):
        by_parts, by_text = (
            render(put(make(template), **chat), ["Bye", 'Say "yes"'], [("Hi", "Hello.")])
            for template in (wanting, LLAMA)
        )
        assert by_parts == by_text
    assert template_tail_length(put(make(wanting))) == template_tail_length(put(make(LLAMA)))


def test_a_template_that_takes_both_gets_text(make: Make) -> None:
    both = LLAMA.replace(
        "{{ message['content'] | trim }}",
        "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}!{% endif %}",
    )
    assert render(put(make(both)), ["Hi"]) == render(put(make(LLAMA)), ["Hi"])


def test_a_template_that_writes_whatever_it_gets_is_not_given_parts(make: Make) -> None:
    for written in ("message.content", "message.content | tojson"):
        template = (
            "{% for message in messages %}{% if message.content is string %}-{% else %}{{ X }}{% endif %}{% endfor %}"
        )
        with pytest.raises(PromptError, match="leaves out the prompt 'Hi'"):
            render(put(make(template.replace("X", written))), ["Hi"])


@pytest.mark.parametrize("written", ["tojson", "tojson(ensure_ascii=true)", "tojson(indent=2)"])
def test_a_template_that_writes_messages_as_json(make: Make, written: str) -> None:
    tokenizer = make(LLAMA.replace("message['content'] | trim", f"message['content'] | {written}"))
    prompts = ['Say "yes"\nor no.', "C:\\temp", "Wie heißt das? 日本", "tab\there"]
    for prompt, row in zip(prompts, render(put(tokenizer), prompts), strict=True):
        shown = json.dumps(prompt, ensure_ascii="true" in written)
        assert tokenizer.decode(row).endswith(shown + TAILS["llama"])


@pytest.mark.parametrize("template", ["{% for", "{{ messages.nothing.here }}", "{{ messages + 1 }}"])
def test_broken_template(make: Make, template: str) -> None:
    with pytest.raises(PromptError, match="The chat template failed"):
        render(put(make(None), chat_template=template), ["Hi"])


def test_model_without_template(make: Make) -> None:
    tokenizer = make(None)
    for function in (lambda: render(put(tokenizer), ["Hi"]), lambda: template_tail_length(put(tokenizer))):
        with pytest.raises(PromptError, match=r"no chat template.*chat model.*--chat-template FILE.*plain"):
            function()
    assert render(put(tokenizer, chat_template=LLAMA), ["Hi"]) == render(put(make(LLAMA)), ["Hi"])
    assert render(put(make(QWEN), chat_template=LLAMA), ["Hi"]) == render(put(make(LLAMA)), ["Hi"])
    assert tokenizer.chat_template is None


def test_several_templates(make: Make) -> None:
    tokenizer = make(None)
    tokenizer.chat_template = {"default": LLAMA, "tools": QWEN}
    assert render(put(tokenizer), ["Hi"]) == render(put(make(LLAMA)), ["Hi"])
    tokenizer.chat_template = {"rag": LLAMA, "tools": QWEN}
    with pytest.raises(PromptError, match="rag, tools, expected one named default"):
        render(put(tokenizer), ["Hi"])


def test_plain_mode(make: Make) -> None:
    tokenizer = make(LLAMA)
    assert render(put(tokenizer, plain=True), ["Hi there"]) == [tokenizer("Hi there")["input_ids"]]
    assert tokenizer.decode(render(put(tokenizer, plain=True), ["Hi"])[0]) == "<bos>Hi"
    assert template_tail_length(put(tokenizer, plain=True)) == 0
    with pytest.raises(PromptError, match="given a system prompt"):
        render(put(tokenizer, plain=True, system_prompt="Be kind."), ["Hi"])
    with pytest.raises(PromptError, match="given a chat template"):
        render(put(tokenizer, plain=True, chat_template=LLAMA), ["Hi"])


def test_prompt_without_tokens(make: Make) -> None:
    tokenizer = make(None)
    with pytest.raises(PromptError, match="gives no tokens"):
        render(put(tokenizer, chat_template="{{ messages[0].content }}"), ["Hi", ""])


def test_a_prompt_that_the_model_cannot_take_is_named(make: Make) -> None:
    with pytest.raises(ModelError, match=r"prompt 'Count: 1 1 .* …' has \d+ tokens, expected at most 512"):
        render(put(make(LLAMA)), ["Hi", "Count: " + "1 " * 600])
    tokenizer = make(LLAMA + "<|extra|>")
    tokenizer.add_tokens("<|extra|>", special_tokens=True)
    model = tiny.llama(vocab_size=len(tokenizer) - 1)
    with pytest.raises(ModelError, match=rf"prompt 'Hi' has the token {len(tokenizer) - 1}, expected tokens from 0 to"):
        render(LoadedModel(model, tokenizer, "tiny"), ["Hi"])


@pytest.mark.parametrize("kind", TAILS)
def test_tail_is_what_follows_the_words(make: Make, kind: str) -> None:
    tokenizer = make(TEMPLATES[kind])
    expected = tokenizer(TAILS[kind], add_special_tokens=False)["input_ids"]
    assert template_tail_length(put(tokenizer)) == len(expected)
    if kind != "gemma":
        assert template_tail_length(put(tokenizer, system_prompt="Be kind.")) == len(expected)


@given(prompt=st.text(min_size=1, max_size=20).filter(lambda text: text.strip() == text))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_prompt_has_the_same_tail(make: Make, kind: str, prompt: str) -> None:
    tokenizer = make(TEMPLATES[kind])
    tail = template_tail_length(put(tokenizer))
    first, second = render(put(tokenizer), ["Tell me about apples", prompt])
    assert tail > 0
    assert first[-tail:] == second[-tail:]


def test_marks_that_merge_with_the_template_shorten_the_tail(make: Make) -> None:
    tokenizer = make(NO_SPECIALS)
    whole = tokenizer("\n\nAnswer:", add_special_tokens=False)["input_ids"]
    (question,) = render(put(tokenizer), ["this?"])
    assert question[-len(whole) :] != whole, "the tokenizer of this test should merge the question mark"
    assert 0 < template_tail_length(put(tokenizer)) < len(whole)


def test_unknown_words_are_no_part_of_the_tail() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Answer": 1, ":": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert template_tail_length(put(tokenizer, chat_template="{{ messages[0].content }} Answer:")) == 2


@pytest.mark.parametrize("template", [LLAMA, "{{ messages[0].content }}"])
def test_positions_within_the_tail(make: Make, template: str) -> None:
    loaded = put(make(template))
    tail = template_tail_length(loaded)
    assert (tail > 2) == (template == LLAMA) and (tail == 0) == (template != LLAMA)
    check_positions(loaded, [-1, -max(tail, 1)])
    for position in (-max(tail, 1) - 1, 0, 2):
        with pytest.raises(PromptError, match=rf"position is {position}, expected .* puts {tail} tokens"):
            check_positions(loaded, [-1, position])
    check_positions(put(make(template), plain=True), [-7])
