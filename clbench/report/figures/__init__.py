"""Figures, each defined once as a Vega-Lite specification: the page shows it, `clbench report plot` writes it for papers."""
