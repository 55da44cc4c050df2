"""The room measure."""

from remove_refusals.measure.divergence import distances_along
from remove_refusals.measure.evaluate import (
    EvaluationPrompts,
    evaluate,
    measure,
    test_prompts,
    warnings,
)
from remove_refusals.measure.judges.calibration import (
    Accuracies,
    Calibration,
    accuracy_rows,
    calibrate,
    confusion_rows,
    load_calibration,
)
from remove_refusals.measure.judges.choose import make_judge, test_judge
from remove_refusals.measure.judges.labels import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge, judge_phrases
from remove_refusals.measure.scores import Evaluation, PairedRate
from remove_refusals.measure.side_by_side import SideBySide
from remove_refusals.measure.statistics import (
    CorrectedRate,
    McNemar,
    Mean,
    Perplexity,
    Quantile,
    Rate,
    Verdict,
    holm,
    mean_with_interval,
    paired_difference,
    paired_rates,
    rogan_gladen,
    verdict,
    wilson_rate,
)
from remove_refusals.measure.tasks import TaskScore, run_tasks

__all__ = [
    "Accuracies",
    "Calibration",
    "CorrectedRate",
    "Evaluation",
    "EvaluationPrompts",
    "Judge",
    "Label",
    "McNemar",
    "Mean",
    "PairedRate",
    "Perplexity",
    "PhraseJudge",
    "Quantile",
    "Rate",
    "SideBySide",
    "TaskScore",
    "Verdict",
    "accuracy_rows",
    "calibrate",
    "confusion_rows",
    "distances_along",
    "evaluate",
    "holm",
    "judge_phrases",
    "load_calibration",
    "make_judge",
    "mean_with_interval",
    "measure",
    "paired_difference",
    "paired_rates",
    "rogan_gladen",
    "run_tasks",
    "test_judge",
    "test_prompts",
    "verdict",
    "warnings",
    "wilson_rate",
]
