"""How plots look: a figure goes in, SVG whose ink follows the light or dark mode of the reader comes out.

Colors and lines are in `figures.mplstyle`. Equal figures give equal text: no clock, no random names, no pyplot state.
"""

import io
from pathlib import Path

from matplotlib.figure import Figure

LOOK = Path(__file__).with_name("figures.mplstyle")
INK = "#010203"
"""The text color of LOOK, which in an SVG becomes that of the reader's mode."""
MODES = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d5dae0}}</style>"


def svg(figure: Figure) -> str:
    """The figure as a file of its own."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue().replace("<defs>", f"{MODES}<defs>", 1).replace(INK, "currentColor")
