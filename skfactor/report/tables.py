"""Figures as text, tables as aligned text and as HTML."""
# SPDX-License-Identifier: BSD-3-Clause

from __future__ import annotations

import html
import math

__all__ = ["error_text", "finite_or_none", "html_table", "kappa_text", "number", "percent", "ratio_text", "shape_text",
           "text_table", "written"]

#: titles of columns of text; figures are aligned to the right
_LEFT = ("tensor", "shape", "method", "coder", "result", "layer", "runs", "input", "as", "one forward pass")


def percent(fraction):
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def number(value):
    return "" if value is None else f"{value:.2f}"


def ratio_text(ratio):
    return "" if ratio is None else f"{ratio:.2f}x"


def error_text(error):
    return "" if error is None else "0" if error == 0 else f"{100 * error:.2f} %"


def kappa_text(kappa):
    """Cut off, not rounded: κ is never 100 %."""
    return "" if kappa is None else f"{math.floor(1e4 * kappa) / 100:.2f} %"


def shape_text(shape):
    return "x".join(map(str, shape)) or "scalar"


def text_table(header, lines):
    """Columns aligned and parted by two blanks; a rule under the header and above the last line."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def aligned(line):
        cells = (c.ljust(w) if t in _LEFT else c.rjust(w) for c, w, t in zip(line, widths, header))
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([aligned(header), rule, *map(aligned, lines[:-1]), rule, aligned(lines[-1])])


def html_table(header, lines, footnotes):
    def row(cells, tag, style=""):
        inner = "".join(
            f'<{tag} style="text-align: {"left" if title in _LEFT else "right"}; padding: 2px 10px">'
            f"{html.escape(cell)}</{tag}>"
            for cell, title in zip(cells, header)
        )
        return f"<tr{style}>{inner}</tr>"

    body = [row(line, "td") for line in lines[:-1]]
    last = row(lines[-1], "td", ' style="font-weight: bold; border-top: 1px solid #888"')
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in footnotes)
    return "\n".join([
        '<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">',
        f'<thead style="border-bottom: 1px solid #888">{row(header, "th")}</thead>',
        "<tbody>", *body, last, "</tbody></table>",
        f'<div style="color: #666; font-size: small">{notes}</div>',
    ])


def written(text, path):
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
    return text


def finite_or_none(value):
    return value if value is not None and math.isfinite(value) else None
