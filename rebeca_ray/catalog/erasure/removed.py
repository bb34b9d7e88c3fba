"""The count of an erasure: what went, by kind, and the addresses of a dry run."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Everything that an erasure removes, or would remove in a dry run.

    `counts` are things by kind, such as `items` or `image rows`. `paths` are the files and folders that are
    rewritten or removed.
    """

    dry_run: bool
    counts: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)

    def add(self, kind: str, number: int, *paths: str) -> None:
        """Count things of a kind, and note their files or folders."""
        if number:
            self.counts[kind] += number
        self.paths.extend(paths)
