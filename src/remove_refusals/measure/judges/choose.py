"""Pick a judge by a word."""

from pathlib import Path

from remove_refusals.measure.judges.calibration import Accuracies, load_calibration
from remove_refusals.measure.judges.labels import Judge
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.settings import MeasureSettings


def make_judge(
    spec: str,
    *,
    device: str | None = None,
    cache: Path | None = None,
    prompt_price: float | None = None,
    completion_price: float | None = None,
    text_format: str | None = None,
) -> Judge:
    """Make the judge that a word stands for. Nothing is contacted but what the word names.

    Args:
        spec: `phrases`; an address `URL#MODEL` of an OpenAI-compatible interface; or else the directory or hub id of a
            sequence classifier.
        device: Where a classifier goes.
        cache: The file where a model's judgements are kept; by default one in the user's cache directory.
        prompt_price: The price of a million prompt tokens of a model.
        completion_price: The price of a million completion tokens.
        text_format: What a classifier reads, with `{prompt}` and `{answer}` in it.

    Returns:
        The judge.

    Raises:
        JudgeError: If the address is not of the form `URL#MODEL`, or a class of the classifier is no label.
        ModelError: If the classifier cannot be found or loaded.
    """
    if spec == PhraseJudge.name:
        return PhraseJudge()
    if spec.startswith(("http://", "https://")):
        from remove_refusals.measure.judges.endpoint import EndpointJudge, default_cache

        return EndpointJudge(
            spec, cache=cache or default_cache(), prompt_price=prompt_price, completion_price=completion_price
        )
    from remove_refusals.measure.judges.classifier import ClassifierJudge

    return ClassifierJudge(spec, device=device, text_format=text_format)


def measuring_judge(settings: MeasureSettings, device: str | None = None) -> tuple[Judge, Accuracies]:
    """Make the judge, and read how often it is right.

    Raises:
        JudgeError: If the judge or its calibration cannot be used.
        ModelError: If a classifier cannot be found or loaded.
    """
    judge = make_judge(settings.judge, device=device)
    if settings.calibration is None:
        return judge, {}
    return judge, load_calibration(Path(settings.calibration), judge).accuracies
