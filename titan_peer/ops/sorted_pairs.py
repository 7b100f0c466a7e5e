"""(token, expert) pairs grouped by expert: the basis of every table update."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SortedPairs(NamedTuple):
    """The P pairs of an index tensor [T, K] (T*K minus those with a negative index), stably sorted by expert; a run is
    the pairs of one expert.

    On a GPU only the device knows P and R, so tensors have the largest possible lengths; there, read num_rows and
    run_starts[num_rows].
    """

    order: Tensor
    """int32 [P]: flat positions t*K + j."""
    row_ids: Tensor
    """int32 [R]: the experts that were chosen, ascending."""
    run_starts: Tensor
    """int32 [R + 1]: where each expert's run begins in `order`, and P."""
    num_rows: Tensor
    """0-d integer: R, the number of different experts."""

    def rows(self) -> Tensor:
        """The experts that were chosen, int64 [R]; the host waits for a GPU."""
        return self.row_ids[: int(self.num_rows)].long()
