"""A badge for a README: an SVG with a number, its spread over seeds and how far it can be believed. No fonts, no scripts."""

from __future__ import annotations

import html

COLOURS = {"self-reported": "#6b6b6b", "verified": "#2e7d32"}
_WIDTH = 6.6  # of a letter of Verdana at 11 px, a little more than its mean


def svg(left: str, right: str, level: str) -> str:
    """Two fields of text; the colour of the right one is that of `level`, which its text names too."""
    words = f"{right}, {level}"
    a, b = (round(_WIDTH * len(text)) + 12 for text in (left, words))
    title = html.escape(f"{left}: {words}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" aria-label="{title}">'
        f"<title>{title}</title>"
        f'<rect width="{a}" height="20" fill="#3c3c3c"/><rect x="{a}" width="{b}" height="20" fill="{COLOURS[level]}"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{a / 2:g}" y="14" textLength="{a - 12}">{html.escape(left)}</text>'
        f'<text x="{a + b / 2:g}" y="14" textLength="{b - 12}">{html.escape(words)}</text></g></svg>\n'
    )
