"""What a check found: it passes, warns or fails, where, and what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from domainshuttle.pipelines.errors import UserFacingError, counted
from domainshuttle.platform.console import console
from domainshuttle.platform.report.text import Prose


class Verdict(StrEnum):
    """A wrong result fails; a tool that is missing, or a doubt, warns."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One check's result, or one fault of it."""

    check: str
    verdict: Verdict
    what: str
    where: str = ""
    """The node, device, link or place; empty: the whole cluster."""
    remedy: str = ""

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "verdict": str(self.verdict)}

    def line(self) -> str:
        """For people."""
        where = f" {self.where}:" if self.where else ""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.verdict.upper():4}  {self.check}:{where} {self.what}{remedy}"


def node_name(host: str, address: str, node: str) -> str:
    """A node for people; `node` is Ray's id."""
    return f"node {host} ({address}, {node[:8]})"


class PreflightError(UserFacingError, RuntimeError):
    """A cluster on which a run would fail, or train wrongly or slowly."""


def passed(check: str, what: str, where: str = "") -> Finding:
    return Finding(check, Verdict.PASS, what, where)


def warning(check: str, what: str, where: str = "", remedy: str = "") -> Finding:
    return Finding(check, Verdict.WARN, what, where, remedy)


def failure(check: str, what: str, where: str = "", remedy: str = "") -> Finding:
    return Finding(check, Verdict.FAIL, what, where, remedy)


def failed(findings: Iterable[Finding]) -> list[Finding]:
    return [one for one in findings if one.verdict is Verdict.FAIL]


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints a line each, the faults last, where they are seen, and the count."""
    order = [Verdict.PASS, Verdict.WARN, Verdict.FAIL]
    for one in sorted(findings, key=lambda finding: order.index(finding.verdict)):
        console.print(Prose(one.line()))
    counts = [sum(one.verdict is verdict for one in findings) for verdict in order]
    console.print(Prose(f"Preflight: {counts[0]} passed, {counted(counts[1], 'warning')}, {counts[2]} failed"))


def require_none_failed(findings: Sequence[Finding]) -> None:
    """Raises PreflightError that names each failed check, with its remedy."""
    if wrong := failed(findings):
        lines = "\n".join(f"  {one.line()}" for one in wrong)
        raise PreflightError(f"the cluster does not pass {counted(len(wrong), 'check')}:\n{lines}")
