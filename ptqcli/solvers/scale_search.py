"""The options that all solvers here share: how the grid of a group is fitted, see ``ptqcli.numerics.grids``.

What suits a solver differs. Rounding gains from clipping a group's range where that lowers the squared error. Error feedback widens what
has to be rounded afterwards, so a range that was clipped on the original weights may clip that, too: GPTQ tries both.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ptqcli.numerics.ranges import SEARCHES, RangeSearch, range_search
from ptqcli.options import option

AUTO = "auto"


def scale_search_option() -> Any:
    """The field ``scale_search`` of a solver that fits grids."""
    text = "how a group's scale is fitted; auto: mse for rtn, minmax for obq, for gptq whichever leaves a row the smaller error"
    return option(AUTO, text, choices=(AUTO, *SEARCHES))


def signed_option() -> Any:
    """The field ``signed`` of a solver that fits grids."""
    return option(True, "symmetric scales take the sign that puts a group's largest weight on the lowest code")


class FitsGrids:
    """A solver with both options. usual_searches: what ``auto`` stands for."""

    usual_searches: ClassVar[tuple[str, ...]]
    scale_search: str
    signed: bool

    @property
    def searches(self) -> tuple[RangeSearch, ...]:
        """What fits its grids; of several, the best for each row is kept."""
        names = self.usual_searches if self.scale_search == AUTO else (self.scale_search,)
        return tuple(range_search(name, self.signed) for name in names)

    @property
    def ranges(self) -> RangeSearch:
        """What fits grids on trial: the last of its searches."""
        return self.searches[-1]
