"""The report: a view of Records as one HTML file. No maths, no torch."""

from virtual_weights.report.page import page, payload, report, write_report

__all__ = ["page", "payload", "report", "write_report"]
