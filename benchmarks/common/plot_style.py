"""Colours and style of every plot."""

from __future__ import annotations

COLORS = {"dense": "#6b7280", "neq": "#0f766e", "stochastic": "#d97706", "fixed": "#7c3aed"}


INK, FAINT = "#1f2937", "#e5e7eb"


STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.bbox": "tight",
}
