"""The room measure."""

from remove_refusals.measure.answers import Answered, EvaluationPrompts, kept_answers, labelled, measuring_prompts
from remove_refusals.measure.divergence import distances_along
from remove_refusals.measure.evaluate import evaluate, warnings
from remove_refusals.measure.judges.calibration import Calibration, calibrate, load_answers, load_calibration
from remove_refusals.measure.judges.choose import make_judge, measuring_judge
from remove_refusals.measure.judges.labels import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge, judge_phrases
from remove_refusals.measure.scores import Distance, Evaluation, PairedRate, RefusalsByLength, Response, read_rows
from remove_refusals.measure.side_by_side import Damage, SideBySide, side_by_side
from remove_refusals.measure.statistics import (
    Estimate,
    Mean,
    Rate,
    TokenMean,
    Verdict,
    holm,
    mean_with_interval,
    paired_difference,
    paired_rates,
    rogan_gladen,
    wilson_rate,
)

__all__ = [
    "Answered",
    "Calibration",
    "Damage",
    "Distance",
    "Estimate",
    "Evaluation",
    "EvaluationPrompts",
    "Judge",
    "Label",
    "Mean",
    "PairedRate",
    "PhraseJudge",
    "Rate",
    "RefusalsByLength",
    "Response",
    "SideBySide",
    "TokenMean",
    "Verdict",
    "calibrate",
    "distances_along",
    "evaluate",
    "holm",
    "judge_phrases",
    "kept_answers",
    "labelled",
    "load_answers",
    "load_calibration",
    "make_judge",
    "mean_with_interval",
    "measuring_judge",
    "measuring_prompts",
    "paired_difference",
    "paired_rates",
    "read_rows",
    "rogan_gladen",
    "side_by_side",
    "warnings",
    "wilson_rate",
]
