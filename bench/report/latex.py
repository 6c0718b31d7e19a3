"""A Sheet as a LaTeX table of booktabs, and a document around several of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.report import published
from bench.report.sheets import Cell, Sheet

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$", "–": "--", "†": r"$^\dagger$",
    "·": r"$\cdot$", "\u00a0": "~", "γ": r"$\gamma$", "ρ": r"$\rho$",
}  # fmt: skip


def escape(text: str) -> str:
    """Text that LaTeX sets as it is; characters that its standard fonts lack become a question mark."""
    return "".join(SPECIAL.get(c, c if c.isascii() or c.isalpha() else "?") for c in text)


def table(sheet: Sheet, caption: str, label: str, notes: Sequence[str]) -> str:
    """A `table*`: families as headings, the best bold, the second best underlined, printed rows in italics."""
    columns = len(sheet.headers)
    lines = [
        r"\begin{table*}[t]", r"\centering", r"\small", rf"\caption{{{escape(caption)}}}", rf"\label{{tab:{label}}}",
        r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}", r"\toprule",
        " & ".join(escape(header) for header in sheet.headers) + r" \\",
    ]  # fmt: skip
    heading = None
    for line in sheet.lines:
        title = f"published {published.MARK}" if line.printed else line.family
        if title != heading:
            lines += [r"\midrule", rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{escape(title)}}}}} \\"]
            heading = title
        lines.append(" & ".join(_cell(cell, line.printed) for cell in line.cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if notes:
        lines += ["", r"\smallskip", r"\begin{minipage}{\textwidth}\footnotesize"]
        lines += [escape(note) + r"\par" for note in notes]
        lines += [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table*}"])


def _cell(cell: Cell, printed: bool) -> str:
    text = re.sub(r"^-(?=\d)", "$-$", escape(cell.text))
    if cell.bold:
        text = rf"\textbf{{{text}}}"
    elif cell.second:
        text = rf"\underline{{{text}}}"
    elif printed:
        text = rf"\textit{{{text}}}"
    return f"{text} {escape(cell.under)}" if cell.under else text


def document(tables: Sequence[str]) -> str:
    """Compiles as it is; a paper that loads booktabs and graphicx takes the tables alone."""
    head = [
        r"\documentclass{article}", r"\usepackage[T1]{fontenc}", r"\usepackage{booktabs}", r"\usepackage{graphicx}",
        r"\usepackage[margin=1.5cm,landscape]{geometry}", r"\begin{document}",
    ]  # fmt: skip
    return "\n".join([*head, *tables, r"\end{document}", ""])
