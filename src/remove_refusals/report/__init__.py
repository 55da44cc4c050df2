"""The room report."""

from remove_refusals.report.card import Pushed, model_card, push
from remove_refusals.report.page import html_report, write_html_report
from remove_refusals.report.words import table, table_key

__all__ = [
    "Pushed",
    "html_report",
    "model_card",
    "push",
    "table",
    "table_key",
    "write_html_report",
]
