"""Which numbers are offered in the place of one that does not work: the nearest below it and the nearest above it that do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence


def around(number: int, works: Callable[[int], bool], most: int) -> list[int]:
    """The nearest below `number` and the nearest above it, of 1 to `most`, that work: none, one or both, in this order."""
    below, above = range(min(number - 1, most), 0, -1), range(max(1, number + 1), most + 1)
    return [n for way in (below, above) if (n := next(filter(works, way), None)) is not None]


def multiples(number: int, unit: int, works: Callable[[int], bool] = bool) -> list[int]:
    """As `around`: the multiples of `unit` on both sides of `number`, which is none."""
    below = number // unit * unit
    return [n for n in (below, below + unit) if n > 0 and works(n)]


def divisors(number: int) -> list[int]:
    """All of them, the least first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def either(numbers: Iterable[int]) -> str:
    """In words."""
    return " or ".join(map(str, numbers))


def offers(by_flag: Mapping[str, Sequence[int]]) -> str:
    """The flags of which a value works, each with its numbers; other sizes where none does."""
    return ", or ".join(f"{flag} {either(numbers)}" for flag, numbers in by_flag.items() if numbers) or "other sizes"
