"""What a check finds out, as it is told and printed; free of torch, so that who watches the checks starts at once."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str = ""
    """Who runs the check fills it in."""
    seconds: float | None = None
    """Median."""
    floor: float | None = None
    """Seconds that the device's own ceilings allow."""
    bar: float | None = None
    """Largest ratio of seconds to floor that is good enough."""
    error: float | None = None
    """Norm of the difference to the reference over the norm of the reference."""
    allowed: float | None = None
    note: str = ""
    others: dict[str, float] = field(default_factory=dict)
    """Seconds of other ways to do the same, by name."""

    @property
    def ratio(self) -> float | None:
        return None if self.seconds is None or not self.floor else self.seconds / self.floor

    @property
    def verdict(self) -> str:
        if self.error is not None and not self.error <= (self.allowed or 0):  # NaN too
            return "WRONG"
        if self.ratio is None or self.bar is None:
            return "ok" if self.error is not None else ""
        return "ok" if self.ratio <= self.bar else "slow"


def failure(name: str, note: str) -> Row:
    """A check that could not be done."""
    return Row(name=name, error=float("nan"), allowed=0, note=note)


def table(rows: list[Row]) -> str:
    """For people."""

    def number(value: float | None, scale: float = 1, form: str = ".3f") -> str:
        return "" if value is None else f"{value * scale:{form}}"

    lines = [f"{'name':<44} {'ms':>10} {'floor':>10} {'ratio':>7} {'bar':>5} {'error':>9}  verdict"]
    for row in rows:
        numbers = f"{number(row.seconds, 1e3):>10} {number(row.floor, 1e3):>10} {number(row.ratio, 1, '.2f'):>7}"
        wrong = f"{number(row.bar, 1, '.2f'):>5} {number(row.error, 1, '.1e'):>9}"
        note = row.note.strip().partition("\n")[0]
        others = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in row.others.items())
        lines.append(f"{row.name:<44} {numbers} {wrong}  {row.verdict} {others} {note}".rstrip())
    return "\n".join(lines)
