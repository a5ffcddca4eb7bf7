"""What `prepare` read, kept and dropped, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Finding:
    """Rows of one table that break the contract for one reason.

    Attributes:
        table: `"log"`, `"items"` or `"queries"`.
        reason: what is wrong with them.
        count: number of rows.
        first: the first of them, as dicts with `row` (0-based, in the order read) and the columns that tell.
        dropped: False for rows that are kept as they are (events of unknown items).
    """

    table: str
    reason: str
    count: int
    first: list[dict[str, Any]] = field(default_factory=list)
    dropped: bool = True

    def __str__(self) -> str:
        action = "dropped" if self.dropped else "kept"
        rows = "; ".join(", ".join(f"{k}={v!r}" for k, v in row.items()) for row in self.first[:2])
        return f"{self.table}: {self.count:,} {action}: {self.reason} (first: {rows})"


@dataclass
class Report:
    """The outcome of `prepare`, also written as report.json.

    Attributes:
        rows_read: rows by table.
        rows_kept: rows by table, after dropping.
        findings: what was dropped or kept with a remark.
        num_users: by split (`train`, `validation`, `test`).
        num_events: by split; of validation and test those in the window, without the history before it.
        events_after_test: events later than the test window, in no split.
        num_items: rows of items.parquet.
    """

    rows_read: dict[str, int] = field(default_factory=dict)
    rows_kept: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    num_users: dict[str, int] = field(default_factory=dict)
    num_events: dict[str, int] = field(default_factory=dict)
    events_after_test: int = 0
    num_items: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts, for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The text of report.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, default=str) + "\n"

    def __str__(self) -> str:
        lines = [f"{'table':<12}{'read':>15}{'kept':>15}"]
        lines += [f"{t:<12}{n:>15,}{self.rows_kept.get(t, n):>15,}" for t, n in self.rows_read.items()]
        lines += ["", f"{'split':<12}{'users':>15}{'events':>15}"]
        lines += [f"{s:<12}{n:>15,}{self.num_events[s]:>15,}" for s, n in self.num_users.items()]
        lines += ["", f"items in the catalogue: {self.num_items:,}"]
        if self.events_after_test:
            lines.append(f"events after the test window, unused: {self.events_after_test:,}")
        return "\n".join(lines + [str(finding) for finding in self.findings])
