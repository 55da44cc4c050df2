"""Pick a judge by a word."""

from pathlib import Path

from remove_refusals.measure.judges.calibration import Accuracies, load_calibration
from remove_refusals.measure.judges.classifier import ClassifierJudge
from remove_refusals.measure.judges.endpoint import EndpointJudge, default_cache
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
    """Make the judge that a word stands for; nothing is contacted but what the word names.

    The word is `phrases`, an address `URL#MODEL` of an OpenAI-compatible interface, or else the directory or hub id of
    a sequence classifier. The other arguments are those of `EndpointJudge` and `ClassifierJudge`; without a cache an
    address has one in the user's cache directory.
    """
    if spec == PhraseJudge.name:
        return PhraseJudge()
    if not spec.startswith(("http://", "https://")):
        return ClassifierJudge(spec, device=device, text_format=text_format)
    cache = cache or default_cache()
    return EndpointJudge(spec, cache=cache, prompt_price=prompt_price, completion_price=completion_price)


def measuring_judge(settings: MeasureSettings, device: str | None = None) -> tuple[Judge, Accuracies]:
    """Make the judge of the settings, and read how often it is right."""
    judge = make_judge(settings.judge, device=device)
    if settings.calibration is None:
        return judge, {}
    return judge, load_calibration(Path(settings.calibration), judge).accuracies
