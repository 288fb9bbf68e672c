"""Looks at everything that a run needs, on every node, before it starts."""

from vlcp_dist.doctor.check import Check, Report
from vlcp_dist.doctor.checks import examine

__all__ = ["Check", "Report", "examine"]
