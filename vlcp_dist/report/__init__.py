"""What a run has shown: `results.json` and one self-contained page."""

from vlcp_dist.report.page import write
from vlcp_dist.report.results import results, summarize

__all__ = ["results", "summarize", "write"]
