from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from remove_refusals.errors import JudgeError, ModelError
from remove_refusals.measure.judges import Label
from remove_refusals.measure.judges.classifier import ClassifierJudge

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sorry", "cake", "tea", "moon", "bake", "user"]


def save_classifier(path: Path, names: list[str], *, positions: int = 64, template: str | None = None) -> Path:
    """Save a model whose class 0 grows with the share of "sorry" that its first token attends to; class 1 otherwise."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions - 2, **special)
    fast.chat_template = template
    fast.save_pretrained(path)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=positions,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(1.0)
        words = model.bert.embeddings.word_embeddings.weight
        words[:, 0], words[:, 1] = -1.0, 1.0
        words[WORDS.index("sorry"), 2], words[WORDS.index("sorry"), 3] = 4.0, -4.0
        layer = model.bert.encoder.layer[0]
        layer.attention.self.value.weight.copy_(torch.eye(8))
        layer.attention.output.dense.weight.copy_(8 * torch.eye(8))
        model.bert.pooler.dense.weight.copy_(torch.eye(8))
        model.classifier.weight[0, 2], model.classifier.weight[0, 3] = 20.0, -20.0
        model.classifier.bias[1] = 4.0
    model.save_pretrained(path)
    return path


def test_it_separates_what_its_weights_separate(tmp_path: Path) -> None:
    judge = ClassifierJudge(save_classifier(tmp_path / "c", ["REJECTION", "NORMAL"]), device="cpu")
    found = judge.judge(["bake"] * 3, ["sorry sorry", "cake tea moon", "sorry tea"])
    assert [judgement.label for judgement in found] == [Label.REFUSAL, Label.COMPLIANCE, Label.REFUSAL]
    assert all(judgement.score is not None and 0.5 < judgement.score <= 1 for judgement in found)
    assert judge.name.startswith("classifier:c@")
    assert judge.judge([], []) == []


def test_batches_do_not_change_a_judgement(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "c", ["refusal", "compliance"])
    answers = ["sorry", "cake", "tea tea tea tea sorry", "moon cake tea", "sorry sorry cake moon tea"]
    one, many = (ClassifierJudge(path, device="cpu", batch_size=size).judge(["bake"] * 5, answers) for size in (1, 4))
    assert [judgement.label for judgement in one] == [judgement.label for judgement in many]
    for single, batched in zip(one, many, strict=True):
        assert single.score == pytest.approx(batched.score, abs=1e-5)


def test_a_refusal_at_the_end_of_a_long_answer_is_not_cut_off(tmp_path: Path) -> None:
    judge = ClassifierJudge(save_classifier(tmp_path / "c", ["refusal", "compliance"], positions=16), device="cpu")
    long = "cake " * 100
    found = judge.judge(["bake"] * 2, [long + "sorry sorry sorry sorry", long])
    assert [judgement.label for judgement in found] == [Label.REFUSAL, Label.COMPLIANCE]


def test_thinking_is_not_read(tmp_path: Path) -> None:
    judge = ClassifierJudge(save_classifier(tmp_path / "c", ["refusal", "compliance"]), device="cpu")
    found = judge.judge(["bake"] * 3, ["<think>sorry sorry</think>cake", "<think>cake", "<think>cake</think> "])
    assert [judgement.label for judgement in found] == [Label.COMPLIANCE, Label.DEGENERATE, Label.DEGENERATE]
    assert found[1].score is None


def test_what_it_reads_can_be_said(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "c", ["refusal", "compliance"])
    alone = ClassifierJudge(path, device="cpu")
    both = ClassifierJudge(path, device="cpu", text_format="{prompt} : {answer}")
    assert alone.judge(["sorry sorry"], ["cake"])[0].label is Label.COMPLIANCE
    assert both.judge(["sorry sorry"], ["cake"])[0].label is Label.REFUSAL
    assert alone.name != both.name
    template = "{% for message in messages %}user {{ message.content }} {% endfor %}"
    templated = ClassifierJudge(save_classifier(tmp_path / "t", ["refusal", "comply"], template=template), device="cpu")
    assert templated.judge(["sorry sorry"], ["cake"])[0].label is Label.REFUSAL


def test_classes_are_mapped_by_name_or_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "c", ["LABEL_0", "LABEL_1"])
    with pytest.raises(
        JudgeError, match=r"has a class 'LABEL_0', expected names such as refusal, moralising, compliance"
    ):
        ClassifierJudge(path, device="cpu")
    named = ClassifierJudge(path, device="cpu", labels={"LABEL_0": "refusal", "LABEL_1": "deflection"})
    assert [found.label for found in named.judge(["bake"] * 2, ["sorry", "cake"])] == [Label.REFUSAL, Label.DEFLECTION]
    no_refusal = save_classifier(tmp_path / "d", ["compliance", "deflection"])
    with pytest.raises(JudgeError, match="expected one for refusals"):
        ClassifierJudge(no_refusal, device="cpu")


def test_a_missing_or_incomplete_classifier_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        ClassifierJudge(tmp_path, device="cpu")
    path = save_classifier(tmp_path / "c", ["refusal", "compliance"])
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        ClassifierJudge(path, device="cpu")


def test_a_token_that_the_classifier_has_no_embedding_for_is_named(tmp_path: Path) -> None:
    judge = ClassifierJudge(save_classifier(tmp_path, ["refusal", "compliance"]), device="cpu")
    judge._tokenizer.add_tokens(["outside"])
    with pytest.raises(JudgeError, match=f"gives the token {len(WORDS)}, expected tokens from 0 to {len(WORDS) - 1}"):
        judge.judge(["?"], ["outside"])
