"""The page's style sheet. Colours differ enough for readers who do not tell all hues apart, on light and on dark."""

from __future__ import annotations

# By name: on light paper, on dark paper. Text is at least 4.5 to 1 against paper and card, series are 3 to 1.
COLOURS = {
    "paper": ("#ffffff", "#14181d"),
    "card": ("#f3f5f7", "#1e242b"),
    "ink": ("#1b1f24", "#e8ebee"),
    "faint": ("#545d68", "#aab4bf"),
    "rule": ("#c3cad2", "#48525d"),
    "link": ("#0550ae", "#79b8ff"),
}
# What stands for a kind of token, or for a line of a chart.
SERIES = {
    "anchor": ("#0a84e0", "#4f93d8"),
    "dynamic": ("#9b1c10", "#f2785c"),
    "static": ("#958a00", "#f0d060"),
    "summary": ("#1f1457", "#e6e6e6"),
}
# The lines of charts borrow the colours of token kinds: never two of one chart the same.
ALIASES = {"clip": "anchor", "null": "dynamic", "lost": "dynamic", "quality": "anchor"}


def _variables(place: int) -> str:
    named = {**COLOURS, **SERIES}
    return "".join(f"--{name}:{values[place]};" for name, values in named.items())


def _series() -> str:
    styles = {**{name: name for name in SERIES}, **ALIASES}
    return "".join(
        f".fill.{name}{{fill:var(--{of})}}.curve.{name},.dot.{name}{{stroke:var(--{of})}}.dot.{name}{{fill:var(--{of})}}"
        for name, of in styles.items()
    )


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
    + _series()
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main,footer{max-width:1000px;margin:0 auto;padding:0 16px}
h1{font-size:1.6rem;margin:24px 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:40px 0 8px;padding-top:8px;border-top:1px solid var(--rule)}
p{max-width:46rem;margin:8px 0}
a{color:var(--link)}
nav ul,.legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;list-style:none}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-999px}.skip:focus{left:16px;top:8px;background:var(--paper);padding:4px 8px}
.wide{overflow-x:auto;margin:8px 0}
.wide>svg{display:block;width:100%;min-width:620px;height:auto}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}
.swatch{width:14px;height:14px;vertical-align:-2px}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--ink);stroke-width:1}
.curve{fill:none;stroke-width:2}.curve.null{stroke-dasharray:6 4}
.dot{stroke-width:2}.dot.null{fill:var(--paper)}
.part{fill:var(--card);stroke:var(--rule)}.part.odd{fill:var(--rule)}
.anchor-tick{stroke:var(--anchor);stroke-width:2}.event{fill:var(--dynamic)}
table{border-collapse:collapse;font-size:.9rem}
caption{text-align:left;white-space:nowrap;color:var(--faint);padding:4px 0}
th,td{text-align:left;vertical-align:top;padding:4px 12px 4px 0;border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
tbody th{font-weight:600;white-space:nowrap}
td{font-variant-numeric:tabular-nums}
summary{cursor:pointer;padding:4px 0;color:var(--link)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));gap:12px;padding:0;list-style:none}
.cards li{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:10px}
.cards .pictures{display:flex;gap:8px;align-items:flex-start;margin:6px 0}
.cards p{margin:0;font-size:.9rem}
img{display:block;border:1px solid var(--rule)}
.map{image-rendering:pixelated;height:88px;width:auto;min-width:44px;max-width:100%}
.cards .map{flex:none}.cards .thumb{min-width:0;flex:1;height:88px;object-fit:contain;background:#000}
.strip{image-rendering:pixelated;width:100%;height:110px}
.scale{height:12px;width:180px;image-rendering:auto;display:inline-block;vertical-align:-1px}
.faint{color:var(--faint)}
footer{margin:48px auto 24px;color:var(--faint);font-size:.9rem}
@media print{.wide{overflow:visible}details{display:block}}
"""
)
