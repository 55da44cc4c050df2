"""The room measure."""

from typing import TYPE_CHECKING

from remove_refusals.errors import lazy_face

if TYPE_CHECKING:
    from remove_refusals.measure.answers import (
        Answered,
        EvaluationPrompts,
        distances_along,
        kept_answers,
        labelled,
        measuring_prompts,
    )
    from remove_refusals.measure.evaluate import evaluate, no_effect, warnings
    from remove_refusals.measure.judges import JUDGED, Label
    from remove_refusals.measure.judges.calibration import (
        Calibration,
        calibrate,
        load_answers,
        make_judge,
        measuring_judge,
    )
    from remove_refusals.measure.judges.phrases import PhraseJudge
    from remove_refusals.measure.match import answer_match
    from remove_refusals.measure.scores import (
        Distance,
        Evaluation,
        PairedRate,
        RefusalsByLength,
        Response,
        Which,
        read_rows,
        skewed,
        summary,
        table,
        table_key,
    )
    from remove_refusals.measure.side_by_side import Damage, SideBySide, side_by_side
    from remove_refusals.measure.statistics import (
        POOR_MATCH,
        Estimate,
        Mean,
        Rate,
        TokenMean,
        Verdict,
        is_poor_match,
        mean_with_interval,
        number,
        percent,
        wilson_rate,
    )

__all__ = [
    "JUDGED",
    "POOR_MATCH",
    "Answered",
    "Calibration",
    "Damage",
    "Distance",
    "Estimate",
    "Evaluation",
    "EvaluationPrompts",
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
    "Which",
    "answer_match",
    "calibrate",
    "distances_along",
    "evaluate",
    "is_poor_match",
    "kept_answers",
    "labelled",
    "load_answers",
    "make_judge",
    "mean_with_interval",
    "measuring_judge",
    "measuring_prompts",
    "no_effect",
    "number",
    "percent",
    "read_rows",
    "side_by_side",
    "skewed",
    "summary",
    "table",
    "table_key",
    "warnings",
    "wilson_rate",
]

lazy_face(__name__)
