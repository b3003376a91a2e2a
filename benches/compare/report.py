"""The text table and the plot of a run."""

import math
from xml.sax.saxutils import escape


def wire(rows, corpus, tool):
    row = rows.get((corpus, tool))
    return int(row["wire_bytes"]) if row else None


def best_rival(rows, corpus, tools):
    """The rival that sent least, of those that were measured."""
    found = [(wire(rows, corpus, t), t) for t in tools if tools[t].rival and wire(rows, corpus, t)]
    return min(found) if found else None


def ratios(rows, titles, tools):
    """(corpus, Cicada's bytes / the best rival's, that rival) for every pair where both are known."""
    out = []
    for corpus in titles:
        own, best = wire(rows, corpus, "cicada"), best_rival(rows, corpus, tools)
        if own and best:
            out.append((corpus, own / best[0], best[1]))
    return out


def table(rows, titles, tools):
    lines = []
    for corpus in titles:
        own = wire(rows, corpus, "cicada")
        present = [t for t in tools if (corpus, t) in rows]
        if not present:
            continue
        lines.append(f"{corpus}: {titles[corpus]}")
        lines.append(f"  {'':32} {'on the wire':>13} {'ratio':>8} {'time':>9} {'CPU':>9} {'source':>9} {'target':>9}"
                     f" {'before':>9}")
        for tool in present:
            r = rows[(corpus, tool)]
            ratio = f"{int(r['wire_bytes']) / own:7.2f}x" if own else ""
            mib = lambda key: f"{int(r[key]) / 2**20:7.0f} M" if int(r[key]) else ""
            before = f"{float(r['prepare_seconds']):7.1f} s" if float(r["prepare_seconds"]) else ""
            lines.append(f"  {tools[tool].title:32} {int(r['wire_bytes']):13,} {ratio:>8} {float(r['seconds']):7.1f} s"
                         f" {float(r['cpu_seconds']):7.1f} s {mib('peak_rss_source_bytes'):>9}"
                         f" {mib('peak_rss_target_bytes'):>9} {before:>9}".rstrip())
        lines.append("")
    found = ratios(rows, titles, tools)
    if found:
        lines.append("Cicada's bytes / the best rival's with the same seed material")
        for corpus, ratio, rival in found:
            lines.append(f"  {titles[corpus]:32} {ratio:6.2f}   {tools[rival].title}")
        mean = math.exp(sum(math.log(r) for _, r, _ in found) / len(found))
        lines.append(f"  {'geometric mean of ' + str(len(found)):32} {mean:6.2f}")
        lines.append(f"  {'worst':32} {max(r for _, r, _ in found):6.2f}")
    lines += ["", "on the wire: bytes at the target's interface, both directions, with all headers. ratio: to Cicada's.",
              "time, CPU: of the move at both ends, making the disk included. source, target: largest resident set.",
              "before: what the source makes once for a disk and can use for every target; not in the time.",
              "zstd --patch-from needs the held disk at the source too, and qemu-img sends the whole disk: both are",
              "not counted as rivals."]
    return "\n".join(lines) + "\n"


# ---- plot

WIDTH, LABEL, BAR, GAP = 900, 200, 13, 26


def plot(rows, titles, tools):
    """Bars of bytes on a logarithmic axis, one group a pair. Readable on light and dark."""
    shown = [c for c in titles if any((c, t) in rows for t in tools)]
    values = [wire(rows, c, t) for c in shown for t in tools if wire(rows, c, t)]
    if not values:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>'
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    plot_width = WIDTH - LABEL - 90
    x = lambda v: LABEL + plot_width * (math.log10(v) - low) / max(high - low, 1)
    body, y = [], 40
    for corpus in shown:
        body.append(f'<text class="group" x="10" y="{y + 4}">{escape(titles[corpus])}</text>')
        y += 12
        best = best_rival(rows, corpus, tools)
        for tool in tools:
            value = wire(rows, corpus, tool)
            if value is None:
                continue
            kind = "own" if tool == "cicada" else "best" if best and tool == best[1] else "rival" if tools[tool].rival else "other"
            body.append(f'<text class="tool" x="{LABEL - 6}" y="{y + 10}">{escape(tools[tool].title)}</text>')
            body.append(f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{x(value) - LABEL:.1f}" height="{BAR - 3}"/>')
            body.append(f'<text class="value" x="{x(value) + 4:.1f}" y="{y + 9}">{size(value)}</text>')
            y += BAR
        y += GAP
    axis = []
    for power in range(low, high + 1):
        at = x(10**power)
        axis.append(f'<line x1="{at:.1f}" y1="26" x2="{at:.1f}" y2="{y - 10}"/>')
        axis.append(f'<text class="tick" x="{at:.1f}" y="20">{size(10**power)}</text>')
    return f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 30}" font-family="sans-serif">
<style>
text {{ fill: #24292f; font-size: 10px }} .group {{ font-weight: bold; font-size: 12px }} .tool {{ text-anchor: end }}
.tick {{ text-anchor: middle }} line {{ stroke: #8c959f; stroke-opacity: .35 }}
.own {{ fill: #1a7f37 }} .best {{ fill: #bc4c00 }} .rival {{ fill: #8c959f }} .other {{ fill: #8c959f; fill-opacity: .45 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .own {{ fill: #3fb950 }} .best {{ fill: #f0883e }} }}
</style>
<g>{"".join(axis)}</g>
{chr(10).join(body)}
<text x="10" y="{y + 14}">Bytes on the wire, both directions, logarithmic. Green: Cicada. Orange: the best rival with the same seed. Pale: not a rival of that kind.</text>
</svg>
'''


def size(value):
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"
