"""How every figure looks: sizes of a printed page, the paper's colours, PNG and PDF side by side.

    with style():
        figure = Figure(figsize=(PAGE, 2.2))
        ...
        save(figure, Path("fig4.png"))          # and fig4.pdf

The PNG is for pages, the PDF for papers.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.16  # inches: one column of a two-column page, and both
BLACK, BLUE, ORANGE = "black", "#1667c4", "#e07b00"  # float64, rounded, Stable-Baselines3
LIGHT_BLUE, GREEN, LIGHT_GREEN = "#7fb0e6", "#1b8a3a", "#8fd19e"  # of Fig. 3
ENDINGS = (".png", ".pdf")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it figures are made whose text is readable at the size they are printed in."""
    look = {
        "font.size": 8,
        "axes.titlesize": 8,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "0.92",
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,  # letters, not shapes: journals ask for it, and they can be searched
    }
    with matplotlib.rc_context(look):
        yield


def thousands(axes: Axes) -> None:
    """Label the steps of an x axis as 200k, 1M."""
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:g}k" if x else "0"
    )


def check_path(path: Path, asked: str) -> None:
    """Raise ValueError, one line that begins with `asked`, if `save` takes no such name."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{asked} {path}: the ending must be .png or .pdf; both are written")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and, beside it, as PDF; equal figures give equal files.

    Makes the folder if there is none.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None})
