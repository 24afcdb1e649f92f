"""Replace the slow loops of a published repository, which stays as it is, by the library's kernels.

    import itm_fast, model, evaluation        # the repository's own modules
    print(itm_fast.patch(model, evaluation))  # a table: what was replaced, what was refused and why

A replacement is made only where it gives the results and gradients of the very code that it replaces, on a small random
problem in float64.
"""

from ._modules import patch, unpatch
from ._report import Report, Row

__all__ = ["Report", "Row", "patch", "unpatch"]
