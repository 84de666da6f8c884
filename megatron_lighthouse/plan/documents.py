"""Packed documents in a plan: how long they are, and what a row of them asks of attention. Counts, no speeds.

A row holds its number of tokens of the mix, in which documents come as often as the file has them. Longer ones than a row are
cut into rows. That the ends of rows cut others too is not counted: attention then does a little less than said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid, Shape
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.scorers import SCORERS

FLAG = "--document-lengths"


@dataclass(frozen=True)
class Row:
    """The documents of a row, on average."""

    seq_length: int
    counts: tuple[tuple[int, float], ...]
    """(tokens of a document, how many of these a row holds)."""

    def sum(self, of: Callable[[int], float]) -> float:
        """Of a number that each document has by its tokens."""
        return sum(count * of(tokens) for tokens, count in self.counts)

    @property
    def attended(self) -> float:
        """Tokens of one document in which dense attention does as much."""
        return float(self.sum(lambda tokens: tokens**2) ** 0.5)

    def words(self) -> str:
        """For the answer."""
        many = self.sum(lambda tokens: 1)
        share = self.attended**2 / self.seq_length**2
        return (
            f"{many:,.1f} a row, of {self.seq_length / many:,.0f} tokens on average and {self.counts[-1][0]:,} at most: dense "
            f"attention does {share:.1%} of the work of one document"
        )


@dataclass(frozen=True)
class Mix:
    """Documents of a corpus."""

    lengths: tuple[tuple[int, int], ...]
    """(tokens, documents), the shortest first."""

    @staticmethod
    def read(path: Path) -> Mix:
        """Of a file with a document's tokens in each line, or these and how many documents have so many.

        Raises:
            ValueError: a file that cannot be read, or a line that is no such numbers.
        """
        found = Counter[int]()
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{FLAG} {path} cannot be read ({error}): name a text file.") from None
        for number, line in enumerate(lines, 1):
            words = line.split()
            if words:
                if len(words) > 2 or not all(word.isdecimal() and int(word) for word in words):
                    raise ValueError(
                        f"{FLAG} {path}, line {number}: {line.strip()[:40]!r} must be a document's tokens, and how many have "
                        "so many where it is not one: such as '8192', or '8192 17'."
                    )
                found[int(words[0])] += int(words[1]) if len(words) == 2 else 1
        if not found:
            raise ValueError(f"{FLAG} {path} holds no length: give a document's tokens in each line.")
        return Mix(tuple(sorted(found.items())))

    def row(self, seq_length: int) -> Row:
        """A row of so many tokens."""
        parts = Counter[int]()
        for tokens, count in self.lengths:
            parts[seq_length] += count * (tokens // seq_length)
            parts[tokens % seq_length] += count
        rows = sum(tokens * count for tokens, count in parts.items()) / seq_length
        return Row(seq_length, tuple((tokens, count / rows) for tokens, count in sorted(parts.items()) if tokens and count))


@dataclass(frozen=True)
class DocumentGeometry(Geometry):
    """A layer's sizes for a row of documents, on average."""

    row: Row
    rule: Rule

    @staticmethod
    def of(config: LighthouseConfig, row: Row) -> DocumentGeometry:
        return DocumentGeometry(
            row.seq_length, config.levels, config.pooling, config.budget, config.tile_budget, row, config.rule
        )

    @property
    def gathered_length(self) -> int:
        """S."""
        return round(self.row.sum(self.rule.rows))

    @property
    def attended(self) -> float:
        """Rows of one document in which attention does as much."""
        return float(self.row.sum(lambda tokens: self.rule.rows(tokens) ** 2) ** 0.5)

    @property
    def is_whole(self) -> bool:
        """Whether all documents go in whole, so that nothing is scored, gathered or scattered."""
        return not self.row.sum(lambda tokens: len(self.rule.tiles(tokens)))

    @property
    def tiles(self) -> int:
        """Of all documents; 1 where there is none."""
        return max(1, round(self.row.sum(lambda tokens: len(self.rule.tiles(tokens)))))

    def entries(self, level: int) -> int:
        """Entries of `level`."""
        windows = self.row.sum(self._windows)
        return round(windows * self.pooling ** (self.levels - 1 - level)) if level else self.seq_length

    def scorer_flops(self, scorer: str, layer: Shape) -> float:
        """Operations of a scorer, which attends within each document."""
        flops, width = SCORERS[scorer].flops, self.rule.window
        return self.row.sum(lambda tokens: flops(Pyramid(self._windows(tokens) * width, self.levels, self.pooling), layer))

    def _windows(self, tokens: int) -> int:
        return sum(tile.windows for tile in self.rule.tiles(tokens))
