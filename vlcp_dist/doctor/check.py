"""A line of what `vlcp doctor` finds, and all of them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and, if that is not `ok`, what to do. `node` None: all of them."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    node: str | None = None


@dataclass
class Report:
    checks: list[Check] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "nodes": self.facts}
