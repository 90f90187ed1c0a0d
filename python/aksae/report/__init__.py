"""The report of a finished run: one HTML file that needs nothing else, not even a network."""

from .page import write_report

__all__ = ["write_report"]
