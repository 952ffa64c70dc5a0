"""How a page looks: its colours by day and by night, and its style sheet.

Every part of a page takes its colours from here, by name, so that one test can hold that all of them can be read.
"""

from __future__ import annotations

import base64
import hashlib

# name -> colour by day. The first two are the grounds that text stands on.
DAY = {
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#1b1f24",
    "dim": "#57606a",
    "rule": "#c9d1d9",  # lines between things
    "link": "#0b57d0",
    "good": "#1a6b34",
    "bad": "#b3261e",
    "warning": "#7a4d00",
    # grounds of words: added, taken away, trained on, and of neither
    "added": "#d8f3dc",
    "removed": "#fde0dd",
    "learnt": "#fff0b8",
    "given": "#e3e8ee",
    # the curves, by rank
    "curve0": "#0b57d0",
    "curve1": "#a14a00",
    "curve2": "#1a6b34",
    "curve3": "#7b2d8e",
    "curve4": "#00696b",
    "curve5": "#57606a",
}
NIGHT = {
    "paper": "#14171a",
    "panel": "#1e2227",
    "ink": "#e6e8eb",
    "dim": "#a7afb9",
    "rule": "#444c56",
    "link": "#8ab4f8",
    "good": "#7bd88f",
    "bad": "#ff9b94",
    "warning": "#f2c063",
    "added": "#12391f",
    "removed": "#4d1a17",
    "learnt": "#433600",
    "given": "#2c333b",
    "curve0": "#8ab4f8",
    "curve1": "#ffb77c",
    "curve2": "#7bd88f",
    "curve3": "#d6a5e8",
    "curve4": "#6fd6d6",
    "curve5": "#c0c6cd",
}
GROUNDS = ("paper", "panel")  # what text and curves may stand on
TEXTS = ("ink", "dim", "link", "good", "bad", "warning")  # what text may be written in, on the grounds
MARKED = ("added", "removed", "learnt", "given")  # grounds of single words, which are written in ink
CURVES = 6  # colours of curves; a curve of a higher rank begins again with the first


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


RULES = """
*{box-sizing:border-box}
html{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
body{margin:0 auto;padding:0 1rem 3rem;max-width:64rem;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:1.5rem 0 .5rem}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
h4{font-size:.9rem;margin:.25rem 0;color:var(--dim)}
p{margin:.5rem 0}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:1rem 0;padding:0}
.dim,figcaption,caption{color:var(--dim)}
.lead{font-size:1.1rem}
code,pre,.text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.875rem}
pre,.text{white-space:pre-wrap;background:var(--panel);border-radius:6px;padding:.5rem .75rem;margin:.5rem 0}
.scrolled{overflow-x:auto;margin:1rem 0}
table{overflow-wrap:break-word;border-collapse:collapse;font-size:.9rem;min-width:min(100%,20rem)}
caption{text-align:left;padding:.25rem 0}
th,td{text-align:left;vertical-align:top;padding:.3rem .75rem .3rem 0;border-bottom:1px solid var(--rule)}
th,td{overflow-wrap:break-word;max-width:32rem}
th{font-weight:600}
th[scope=row]{min-width:7rem}
td:last-child:not(.number){min-width:12rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts th{font-weight:400;color:var(--dim)}
details{margin:.75rem 0}
summary{cursor:pointer;color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.callout{display:flex;flex-wrap:wrap;gap:.25rem .5rem;background:var(--panel);border:1px solid var(--rule)}
.callout{border-left:4px solid var(--dim);border-radius:6px;padding:.5rem .75rem;margin:.75rem 0}
.callout>div{flex:1 1 16rem}
.callout p:first-child{margin-top:0}.callout p:last-child{margin-bottom:0}
.callout.good{border-left-color:var(--good)}.callout.good .sign,.callout.good .word,.good-text{color:var(--good)}
.callout.bad{border-left-color:var(--bad)}.callout.bad .sign,.callout.bad .word,.bad-text{color:var(--bad)}
.callout.warning{border-left-color:var(--warning)}
.callout.warning .sign,.callout.warning .word,.warning-text{color:var(--warning)}
ins,.added{background:var(--added);color:var(--ink);text-decoration:underline}
del,.removed{background:var(--removed);color:var(--ink);text-decoration:line-through}
mark,.learnt{background:var(--learnt);color:var(--ink);text-decoration:underline;text-underline-offset:.2em}
.given{background:var(--given);color:var(--ink)}
.marks{display:flex;flex-wrap:wrap;gap:0 1.5rem;list-style:none;margin:.5rem 0;padding:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:.75rem}
figure{margin:1.25rem 0}
.plot{overflow-x:auto}
svg.drawing{display:block;width:100%;min-width:26rem;max-width:46rem;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.25rem;list-style:none;margin:.25rem 0;padding:0;font-size:.875rem}
.legend svg{vertical-align:middle;margin-right:.4rem}
svg text{fill:var(--ink);font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
svg .tick text,svg .name{fill:var(--dim)}
svg .label{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.frame{stroke:var(--dim);stroke-width:1;fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:7 5}.dotted{stroke-dasharray:1 5}
.faint{stroke-width:1;opacity:.7}
.points{stroke-width:7}
.mark{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:3 3;fill:none}
.ring{stroke:var(--ink);stroke-width:2;fill:none}
.bar{fill:var(--curve0);stroke:var(--paper);stroke-width:.5}
@media print{
html{font-size:11px}body{max-width:none;padding:0}nav{display:none}
figure,tr,.callout{break-inside:avoid}h2,h3{break-after:avoid}
.scrolled,.plot{overflow:visible}svg.drawing{min-width:0}
details::details-content{content-visibility:visible;block-size:auto}
}
"""
SHEET = (
    f":root{{color-scheme:light dark;{_variables(DAY)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(NIGHT)}}}}}"
    + "".join(f"\n.curve{rank}{{stroke:var(--curve{rank})}}" for rank in range(CURVES))
    + RULES
)
# The policy of a page names its one style sheet by what it holds: no other is obeyed, nor a style attribute.
SHEET_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SHEET.encode()).digest()).decode()
