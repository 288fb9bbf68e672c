"""Looks at everything that a run needs, on every node, before it starts."""

from vlcp_dist.doctor.checks import Check, Report, examine

__all__ = ["Check", "Report", "examine"]
