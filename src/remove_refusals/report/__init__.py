"""The room report."""

from typing import TYPE_CHECKING

from remove_refusals.errors import lazy_face

if TYPE_CHECKING:
    from remove_refusals.report.card import adapter_card, model_card, push
    from remove_refusals.report.page import write_card, write_html_report
    from remove_refusals.report.records import (
        AblationRecord,
        AdapterRecord,
        AnalysisRecord,
        BaseRecord,
        CandidateRecord,
        Certificate,
        Confirmation,
        DirectionRecord,
        LeakRecord,
        LookedAtDirection,
        PlanRecord,
        PositionRecord,
        PromptsRecord,
        SelectionRecord,
        SelectionSummary,
        WriterCertificate,
    )
    from remove_refusals.report.sections import front_scales
    from remove_refusals.report.words import tick

__all__ = [
    "AblationRecord",
    "AdapterRecord",
    "AnalysisRecord",
    "BaseRecord",
    "CandidateRecord",
    "Certificate",
    "Confirmation",
    "DirectionRecord",
    "LeakRecord",
    "LookedAtDirection",
    "PlanRecord",
    "PositionRecord",
    "PromptsRecord",
    "SelectionRecord",
    "SelectionSummary",
    "WriterCertificate",
    "adapter_card",
    "front_scales",
    "model_card",
    "push",
    "tick",
    "write_card",
    "write_html_report",
]

lazy_face(__name__)
