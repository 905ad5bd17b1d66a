"""The options that all solvers here share: how the grid of a group is fitted, see ``ptqcli.numerics.grids``.

What suits a solver differs. Rounding gains from clipping a group's range where that lowers the squared error. Error feedback widens what
has to be rounded afterwards, so a range that was clipped on the original weights clips that, too: at 2 bits the divergence of GPTQ's
result from the original model is twice as large with clipped ranges as with full ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ptqcli.numerics.grids import SEARCHES, RangeSearch, range_search
from ptqcli.options import option

AUTO = "auto"


def scale_search_option() -> Any:
    """The field ``scale_search`` of a solver that fits grids."""
    return option(AUTO, "how a group's scale is fitted; auto: mse for rtn, minmax where errors are fed back", choices=(AUTO, *SEARCHES))


def signed_option() -> Any:
    """The field ``signed`` of a solver that fits grids."""
    return option(True, "symmetric scales take the sign that puts a group's largest weight on the lowest code")


class FitsGrids:
    """A solver with both options. usual_search: what ``auto`` stands for."""

    usual_search: ClassVar[str]
    scale_search: str
    signed: bool

    @property
    def ranges(self) -> RangeSearch:
        """What fits its grids."""
        return range_search(self.usual_search if self.scale_search == AUTO else self.scale_search, self.signed)
