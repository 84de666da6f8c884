"""The levels and the budgets that a sequence length asks for, where nobody says. Integers alone."""

from __future__ import annotations

TABLE = ((2**17, 3, 64), (2**19, 3, 128), (None, 4, 256))
"""Up to so many tokens (None: any): levels (L), and tokens to an entry of the budget (N/k).

The paper's k at 98,304 tokens is N/64; the rows after it are what was measured at 262,144, 524,288 and 1,048,576 (ours).
"""
TILE = 128
"""m, and the budget where that is smaller."""
TRIED = 1000
"""Multiples that are tried each way."""
NAMES = ("levels", "budget", "tile_budget")


def by_length(
    seq_length: int, pooling: int, levels: int | None = None, budget: int | None = None, tile_budget: int | None = None
) -> dict[str, int]:
    """The fields of `NAMES` for a sequence of `seq_length` tokens (N), those that are given left as they are.

    Of budgets that fit, that of `TABLE`, in the largest tiles; where none of it does, the nearest to it, of half to twice as
    many. Where none fits, one that `LighthouseConfig.geometry` refuses, of 2^n tiles, so that it is that of a length nearby. On
    how many ranks it runs makes no difference: a checkpoint goes on with others.
    """
    least, share = next((levels, share) for most, levels, share in TABLE if most is None or seq_length <= most)
    levels = least if levels is None else levels
    if budget is not None:
        return {"levels": levels, "budget": budget, "tile_budget": TILE if tile_budget is None else tile_budget}
    window = max(1, pooling) ** max(0, levels - 1)
    wanted = max(2, min(seq_length // share, seq_length // window))
    tiles = [TILE >> step for step in range(7)] if tile_budget is None else [max(1, tile_budget)]  # 128 to 2

    def fits(budget: int, tile: int) -> bool:
        return seq_length % (budget // tile * window) == 0 and seq_length >= window * budget

    exact = [(wanted, tile) for tile in tiles if wanted % tile == 0 and seq_length % share == 0 and fits(wanted, tile)]
    near = (
        (budget, tile)
        for tile in tiles
        for budget in sorted(multiples_about(wanted, tile), key=lambda budget: abs(budget - wanted))
        if wanted <= 2 * budget <= 4 * wanted and fits(budget, tile)
    )
    tile = next((tile for tile in tiles if tile <= wanted), tiles[-1])
    most = min(wanted * 3 // 2, seq_length // window)
    of_nearby = max([tile << step for step in range(most.bit_length()) if tile << step <= most], default=tile)
    found = exact[0] if exact else next(near, (of_nearby, tile))
    return {"levels": levels, "budget": found[0], "tile_budget": found[1]}


def multiples_about(value: int, unit: int) -> range:
    """Multiples of `unit` about a value, TRIED each way: trying all takes hours where a length is far too great."""
    middle = value // unit * unit
    return range(max(unit, middle - TRIED * unit), middle + TRIED * unit + 1, unit)
