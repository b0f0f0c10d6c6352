"""Heat maps of the loads of experts: one for each kind of text, layers above each other, all on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from resilin.nested.budgets import BudgetError
from resilin.nested.expert_use import shares


def plot_loads(counts: Mapping[str, Tensor], path: Path) -> bool:
    """Each expert's share of its layer's choices, times the number of experts: 1 where all have the same load.

    Args:
        counts: (L, E) by label.
        path: of the PNG.

    Returns:
        False where matplotlib is not installed.

    Raises:
        BudgetError: there are no counts.
    """
    if not counts:
        raise BudgetError("there is nothing to plot: no loads were counted")
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scaled = {name: (shares(one) * one.shape[-1]).tolist() for name, one in counts.items()}
    top = max(value for rows in scaled.values() for row in rows for value in row)
    figure, axes = pyplot.subplots(len(scaled), 1, figsize=(8, 1.2 + 1.8 * len(scaled)), squeeze=False)
    for (name, rows), axis in zip(scaled.items(), axes.flat, strict=True):
        picture = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(top, 1.0))
        axis.set(title=name, ylabel="layer", yticks=range(len(rows)))
    axes.flat[-1].set_xlabel("expert")
    figure.tight_layout()
    figure.colorbar(picture, ax=axes.ravel().tolist(), label="load, 1: even")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return True
