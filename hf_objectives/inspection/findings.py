"""One finding about a run, and how bad it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]
#: Severities from harmless to fatal.
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is noteworthy about a run."""

    kind: str  #: its name; `diagnostics/detect.py` lists the kinds
    step: int  #: the first optimizer step that it concerns
    severity: Severity  #: "info" (worth knowing), "warning" (look before you go on) or "error" (the run is wrong)
    evidence: str  #: what was measured, in figures
    advice: str  #: what to do, the likeliest cause first
    last_step: int = -1  #: the last step that it concerns; `step` where it is one step
    run: str = ""  #: the run's name where several were read

    def __post_init__(self) -> None:
        if self.last_step < self.step:
            object.__setattr__(self, "last_step", self.step)

    @property
    def steps(self) -> str:
        """The steps in words: "step 7" or "steps 7 to 20"."""
        return f"step {self.step:,}" if self.last_step == self.step else f"steps {self.step:,} to {self.last_step:,}"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)
