"""Checks a cluster for a run, and prints or returns what was found."""

import json
import sys
from collections.abc import Callable, Sequence

from domainshuttle.cluster.spec import ClusterSpec
from domainshuttle.platform.cluster_checks.findings import Finding, failed, print_findings, require_none_failed
from domainshuttle.platform.cluster_checks.preflight import PARTS, run_checks
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.console import say
from domainshuttle.platform.driver.ray_cluster import connected, trial_needs


def preflight(config: RunConfig, spec: ClusterSpec | None, parts: Sequence[str], as_json: bool) -> bool:
    """Prints the findings; whether none failed."""
    findings = _findings(config, spec, parts or PARTS, (lambda text: None) if as_json else say)
    if as_json:
        sys.stdout.write(json.dumps([one.record() for one in findings], indent=2) + "\n")
    else:
        print_findings(findings)
    return not failed(findings)


def require_preflight(config: RunConfig) -> None:
    """The same before a training; raises PreflightError where a check failed."""
    findings = _findings(config, None, PARTS, say)
    print_findings(findings)
    require_none_failed(findings)


def _findings(
    config: RunConfig, spec: ClusterSpec | None, parts: Sequence[str], echo: Callable[[str], None]
) -> list[Finding]:
    with connected(config, trial_needs(config)):
        from domainshuttle.platform.driver.group_size import require_room  # which imports Ray

        require_room(config)
        return run_checks(config, spec, parts, echo)
