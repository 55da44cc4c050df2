"""Judges: label an answer as refusal, compliance, deflection or degenerate."""
