"""The report of a run: one self-contained HTML page, a terminal table, a dictionary."""

from simulations.report.page import build_report
from simulations.report.tables import digest_dict, summary_dict
from simulations.report.terminal_table import summary_table

__all__ = ["build_report", "digest_dict", "summary_dict", "summary_table"]
