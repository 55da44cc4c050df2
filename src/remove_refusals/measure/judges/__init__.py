"""Judges: label an answer as refusal, compliance, deflection or degenerate.

Three judges stand behind one interface: `PhraseJudge` by a list of phrases, `classifier.ClassifierJudge` by a sequence
classifier, `endpoint.EndpointJudge` by a language model behind an address. `choosing.make_judge` picks one by a word.
"""
