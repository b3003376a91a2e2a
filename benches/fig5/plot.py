"""Table and plots of fig5."""

from xml.sax.saxutils import escape

STYLE = """text { fill: #24292f; font-size: 11px } .axis { stroke: #57606a } .grid { stroke: #8c959f; stroke-opacity: .3 }
.a { stroke: #1a7f37; fill: #1a7f37 } .b { stroke: #bc4c00; fill: #bc4c00 } .c { stroke: #0969da; fill: #0969da }
.d { stroke: #8250df; fill: #8250df } .e { stroke: #6e7781; fill: #6e7781 }
polyline { fill: none !important; stroke-width: 2 } text { stroke: none !important }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .a { stroke: #3fb950; fill: #3fb950 }
.b { stroke: #f0883e; fill: #f0883e } .c { stroke: #58a6ff; fill: #58a6ff } .d { stroke: #bc8cff; fill: #bc8cff } }"""


def links(rows):
    return sorted({int(r["mbit"]) for r in rows.values()}, reverse=True)


def series(rows, mbit, column, factor=1.0, holds="components"):
    points = [(int(r["user_data_mib"]), float(r[column]) * factor) for r in rows.values()
              if int(r["mbit"]) == mbit and r["target_holds"] == holds and r[column] not in ("", None)]
    return sorted(points)


def totals(rows):
    charts = [(f"{mbit} Mbit/s: a whole move, seconds", [
        ("Cicada, the target holds the components", "a", series(rows, mbit, "total_seconds")),
        ("monolithic: stop, rsync -z of both disks, start", "b", series(rows, mbit, "monolithic_total_seconds")),
        ("Cicada, the target holds nothing", "c", series(rows, mbit, "total_seconds", holds="nothing")),
        ("Cicada: of that, the VM is down (monolithic: all the time)", "d", series(rows, mbit, "downtime_ms", 1e-3)),
    ]) for mbit in links(rows)]
    return draw(charts)


def phases(rows, names):
    constant = [n for n in names if n not in ("stage", "release")]
    charts = []
    for mbit in links(rows):
        lines = [(n, cls, series(rows, mbit, f"{n.replace('-', '_')}_ms", 1e-3)) for n, cls in zip(constant, "abcde")]
        lines.append(("boot", "e", series(rows, mbit, "boot_ms", 1e-3)))
        lines = [line for line in lines if line[2]]
        charts.append((f"{mbit} Mbit/s: phases that should not depend on the data, seconds", lines))
    return draw(charts)


WIDTH, HEIGHT, LEFT, TOP = 640, 300, 50, 34


def draw(charts):
    body, y = [], 0
    for title, lines in charts:
        body.append(f'<g transform="translate(0 {y})">{chart(title, lines)}</g>')
        y += HEIGHT + 30 + 15 * len(lines)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif">\n'
            f"<style>\n{STYLE}\n</style>\n" + "\n".join(body) + "\n</svg>\n")


def chart(title, lines):
    points = [p for _, _, found in lines for p in found]
    if not points:
        return ""
    x_max, y_max = max(p[0] for p in points) or 1, nice(max(p[1] for p in points))
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - 40
    x = lambda v: LEFT + width * v / x_max
    y = lambda v: TOP + height * (1 - v / y_max)
    out = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for n in range(6):
        v = y_max * n / 5
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y(v):.1f}" x2="{LEFT + width}" y2="{y(v):.1f}"/>')
        out.append(f'<text x="{LEFT - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for v in sorted({p[0] for p in points}):
        out.append(f'<text x="{x(v):.1f}" y="{TOP + height + 16}" text-anchor="middle">{v}</text>')
    out.append(f'<text x="{LEFT + width}" y="{TOP + height + 32}" text-anchor="end">user data, MiB</text>')
    for n, (label, cls, found) in enumerate(lines):
        out.append(f'<g class="{cls}"><polyline points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in found)}"/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in found]
        at = HEIGHT + 8 + 15 * n
        out.append(f'<rect x="{LEFT}" y="{at - 8}" width="18" height="8"/>'
                   f'<text x="{LEFT + 24}" y="{at}">{escape(label)}</text></g>')
    return "".join(out)


def nice(value):
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** len(str(int(value)))
    return next(power / 100 * step for step in (1, 2, 5, 10, 20, 50, 100) if power / 100 * step >= value)


def slope(points):
    """Of a straight line through the points, by least squares."""
    n, mean_x, mean_y = len(points), sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
    square = sum((p[0] - mean_x) ** 2 for p in points)
    return sum((p[0] - mean_x) * (p[1] - mean_y) for p in points) / square if n > 1 and square else 0.0


def table(rows, names):
    lines = []
    for mbit in links(rows):
        lines.append(f"{mbit} Mbit/s, seconds")
        lines.append(f"{'MiB':>6} {'target holds':>13} {'Cicada':>8} {'monolith.':>9} "
                     + " ".join(f"{n:>11}" for n in names) + f" {'boot':>7} {'down':>7}")
        for r in rows.values():
            if int(r["mbit"]) != mbit:
                continue
            seconds = lambda v: f"{float(v) / 1e3:.2f}" if v else ""
            lines.append(f"{r['user_data_mib']:>6} {r['target_holds']:>13} {float(r['total_seconds']):8.2f}"
                         f" {float(r['monolithic_total_seconds']):9.2f} "
                         + " ".join(f"{seconds(r[n.replace('-', '_') + '_ms']):>11}" for n in names)
                         + f" {seconds(r['boot_ms']):>7} {seconds(r['downtime_ms']):>7}")
        for label, column, factor in [("Cicada", "total_seconds", 1), ("monolithic", "monolithic_total_seconds", 1),
                                      *((n, f"{n.replace('-', '_')}_ms", 1e-3) for n in names), ("boot", "boot_ms", 1e-3)]:
            found = series(rows, mbit, column, factor)
            if len(found) > 1:
                lines.append(f"  slope of {label}: {slope(found) * 1024:8.2f} s/GiB")
        lines.append(f"  the link alone: {8 * 1.073741824e9 / (mbit * 1e6):8.2f} s/GiB")
        lines.append("")
    return "\n".join(lines)
