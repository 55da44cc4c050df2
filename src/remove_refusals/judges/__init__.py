"""Judges: label an answer as refusal, compliance, deflection or degenerate.

Three judges stand behind one interface: `PhraseJudge` by a list of phrases, `classifier.ClassifierJudge` by a sequence
classifier, `endpoint.EndpointJudge` by a language model behind an address. `choosing.make_judge` picks one by a word.
"""

from remove_refusals.judges.broken import is_degenerate
from remove_refusals.judges.labels import Judge, Judgement, Label
from remove_refusals.judges.phrases import PhraseJudge, judge_phrases, strip_thinking
from remove_refusals.judges.refusals import is_refusal

__all__ = [
    "Judge",
    "Judgement",
    "Label",
    "PhraseJudge",
    "is_degenerate",
    "is_refusal",
    "judge_phrases",
    "strip_thinking",
]
