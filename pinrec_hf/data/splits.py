"""Where train ends and validation and test begin."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pinrec_hf.data.contract import DataContractError, parse_time

DAY = 86_400
SPLITS = ("train", "validation", "test")

Time = int | float | str | datetime


@dataclass(frozen=True)
class Split:
    """A cut by global time, or each user's last events.

    Attributes:
        kind: `"time"` or `"leave_one_out"`.
        train_end, validation_end, test_end: seconds since epoch; a split holds what came before. 0 if none.
        num_targets: leave-one-out's N: a user's last N events are test and the N before them validation.
    """

    kind: str
    train_end: int = 0
    validation_end: int = 0
    test_end: int = 0
    num_targets: int = 1

    def ends(self) -> dict[str, int]:
        """Split name -> its end."""
        return {"train": self.train_end, "validation": self.validation_end, "test": self.test_end}

    def to_dict(self) -> dict[str, Any]:
        """As metadata.json has it."""
        if self.kind == "leave_one_out":
            return {"kind": self.kind, "num_targets": self.num_targets}
        return {"kind": self.kind, **{f"{name}_end": end for name, end in self.ends().items()}}

    def check(self, num_users: dict[str, int]) -> None:
        """Refuse a split in which one of the three holds nobody."""
        for name in SPLITS:
            if num_users[name]:
                continue
            if self.kind == "leave_one_out":
                raise DataContractError(
                    f"{name} is empty: leave-one-out with num_targets={self.num_targets} needs users with at least "
                    f"{2 * self.num_targets + 1} events"
                )
            raise DataContractError(
                f"{name} is empty: no event lies in {self._window(name)}; set validation_start, test_start and test_end"
            )

    def _window(self, name: str) -> str:
        begin = {"train": None, "validation": self.train_end, "test": self.validation_end}[name]
        stamps = [
            "the beginning" if t is None else f"{datetime.fromtimestamp(t, UTC):%Y-%m-%dT%H:%M:%SZ}"
            for t in (begin, self.ends()[name])
        ]
        return f"[{stamps[0]}, {stamps[1]})"


def make_split(
    last_time: int | None,
    *,
    validation_start: Time | None = None,
    test_start: Time | None = None,
    test_end: Time | None = None,
    leave_one_out: bool = False,
    num_targets: int = 1,
) -> Split:
    """The split asked for; by default the log's last day (UTC) is test and the day before it validation.

    Args:
        last_time: of the log, in seconds; None if no event has a time.
        validation_start, test_start, test_end: seconds or ISO 8601 (see `parse_time`).
        leave_one_out: each user's last `num_targets` events are test, as many before them validation; no times then.
            Users with fewer than 2 `num_targets` + 1 events are train only.

    Raises:
        DataContractError: times that contradict each other or leave-one-out, or a log without any known time.
    """
    given = {"validation_start": validation_start, "test_start": test_start, "test_end": test_end}
    times = {name: parse_time(value, name) for name, value in given.items() if value is not None}
    if num_targets < 1 or (num_targets > 1 and not leave_one_out):
        raise DataContractError(
            f"num_targets is {num_targets}: it must be at least 1, and goes with leave_one_out only"
        )
    if leave_one_out:
        if times:
            raise DataContractError(f"leave_one_out takes no times; leave out {sorted(times)}")
        return Split("leave_one_out", num_targets=num_targets)
    if last_time is None:
        raise DataContractError(
            "log: no event has a known timestamp; a split by time needs some (or leave_one_out=True)"
        )
    end_of_log = (last_time // DAY + 1) * DAY
    test = times.get("test_start", end_of_log - DAY)
    validation = times.get("validation_start", test - DAY)
    end = times.get("test_end", max(end_of_log, test))
    if not validation < test <= end:
        raise DataContractError(
            f"validation_start ({validation}) < test_start ({test}) < test_end ({end}) does not hold "
            f"(seconds; those left out follow from the log's last event, {last_time})"
        )
    return Split("time", validation, test, end)
