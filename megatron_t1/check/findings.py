"""What a check has to say: problems that stop a run, warnings, facts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def must(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def should(self, holds: bool, warning: str) -> None:
        if not holds:
            self.warnings.append(warning)

    def text(self) -> str:
        lines = [*self.facts, *(f"warning: {text}" for text in self.warnings)]
        lines += [f"problem: {text}" for text in self.problems]
        count = len(self.problems)
        lines.append(f"{count} problem{'s' * (count != 1)}" if count else "no problem found")
        return "\n".join(lines)
