"""Thinking in the forms that models write it: out of answers, closed in prompts."""

import pytest
from transformers import AddedToken

import tiny
from remove_refusals.measure.judges import Label
from remove_refusals.measure.judges.phrases import judge_phrases
from remove_refusals.models.chat_template import close_thinking, strip_thinking, text_of

THOUGHT = "They ask about yeast. I can't help with that? No, it is fine."
ANSWER = "Mix flour, water, salt and yeast, and let the dough rest overnight."

FORMS = {
    "think": "<think>{}</think>",
    "thinking": "<thinking>\n{}\n</thinking>\n",
    "reasoning": "<reasoning>{}</reasoning>",
    "capitals": "<THINK>{}</THINK>",
    "of a family": "<seed:think>{}</seed:think>",
    "magistral": "[THINK]{}[/THINK]",
    "kimi": "◁think▷{}◁/think▷",
    "cohere": "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>",
    "gemma 4": "<|channel>thought\n{}<channel|>",
    "hunyuan": "<think>{}</think>\n<answer>\n",
    "harmony": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "harmony, with a remark": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>"
    "commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>",
    "harmony without its special tokens": "analysis{}assistantfinal",
    "granite": "Here is my thought process: {}\nHere is my response: ",
    "opened by the prompt": "{}</think>",
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_is_the_answer(form: str) -> None:
    said = FORMS[form].format(THOUGHT) + ANSWER
    assert (strip_thinking(said) or "").strip() == ANSWER
    assert judge_phrases(said, "How do I bake bread?") is Label.COMPLIANCE
    refusing = FORMS[form].format("Bread is harmless, I could tell.") + "I'm sorry, but I can't help with that."
    assert judge_phrases(refusing, "How do I bake bread?") is Label.REFUSAL


@pytest.mark.parametrize("form", [form for form in FORMS if form != "opened by the prompt"])
def test_an_answer_that_is_cut_off_while_thinking_is_none(form: str) -> None:
    begun = FORMS[form].partition("{}")[0] + THOUGHT
    assert strip_thinking(begun) is None
    assert judge_phrases(begun, "How do I bake bread?") is Label.DEGENERATE


@pytest.mark.parametrize(
    "said",
    [
        "plain",
        "Analysis of the data shows growth.",
        "analysis of variance is a test.",
        "Use [brackets] and <b>bold</b> words.",
        "The channel is final.",
        "Here is my response: yes.",
        "<answer>Paris</answer>",
    ],
)
def test_what_is_no_thinking_stays(said: str) -> None:
    assert strip_thinking(said) == said


def test_several_blocks_and_an_end_alone() -> None:
    assert strip_thinking("<think>a</think>b<think>c</think>d") == "bd"
    assert strip_thinking("a</think>b") == "b"
    assert strip_thinking("a<think>b") is None


@pytest.mark.parametrize(
    ("ending", "closed"),
    [
        ("<think>", "<think>\n\n</think>\n\n"),
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<thought>\n", "<thought>\n\n</thought>\n\n"),
        ("<seed:think>", "<seed:think>\n\n</seed:think>\n\n"),
        ("[THINK]", "[THINK][/THINK]"),
        ("◁think▷", "◁think▷◁/think▷"),
        ("<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("</think>", "</think>"),
    ],
)
def test_what_a_prompt_opens_is_closed(ending: str, closed: str) -> None:
    assert close_thinking(f"What does <think> mean?{ending}") == f"What does <think> mean?{closed}"


def test_special_tokens_that_mark_thinking_stay_in_an_answers_text() -> None:
    tokenizer = tiny.tokenizer()
    plain = tokenizer("apples and pears", add_special_tokens=False)["input_ids"]
    assert text_of(tokenizer, plain) == tokenizer.decode(plain, skip_special_tokens=True)
    marks = ["[THINK]", "[/THINK]", "<|return|>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    begin, end, over = tokenizer.convert_tokens_to_ids(marks)
    text = text_of(tokenizer, [begin, *plain, end, *plain, over])
    assert "[THINK]" in text and "[/THINK]" in text and "<|return|>" not in text
    assert (strip_thinking(text) or "").split() == tokenizer.decode(plain).split()
