//! The curve of a run as a picture: bytes per move against moves made.

use std::fmt::Write;

use crate::types::ByteSize;

use super::scenario::{Outcome, Row};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 80.0;
const BOTTOM: f64 = 60.0;

/// A line of the picture.
struct Line {
    name: &'static str,
    colour: &'static str,
    dashes: &'static str,
    of: fn(&Row) -> u64,
}

const LINES: &[Line] = &[
    Line { name: "Cicada: components and own", colour: "#1b6ca8", dashes: "", of: cicada },
    Line {
        name: "of it components",
        colour: "#3a9d5d",
        dashes: "6 3",
        of: |row| row.component_bytes_per_move,
    },
    Line {
        name: "blocks of 4 KiB, each once",
        colour: "#c28a1b",
        dashes: "9 2 2 2",
        of: |row| row.block_bytes_per_move,
    },
    Line {
        name: "whole disk, compressed",
        colour: "#b3423a",
        dashes: "2 3",
        of: |row| row.monolithic_bytes_per_move,
    },
];

fn cicada(row: &Row) -> u64 {
    row.component_bytes_per_move + row.own_bytes_per_move
}

/// Bytes per move, on a logarithmic scale, against moves made. What is zero lies on the axis.
pub fn svg(outcome: &Outcome) -> String {
    let all = || outcome.rows.iter().flat_map(|row| LINES.iter().map(|line| (line.of)(row)));
    // Decades that hold everything that is not zero.
    let low = all().filter(|bytes| *bytes > 0).min().unwrap_or(1).ilog10();
    let high = (all().max().unwrap_or(1).max(1).ilog10() + 1).max(low + 1);
    let moves = outcome.rows.last().map_or(1, |row| row.moves).max(1);
    let x = |n: u64| LEFT + (WIDTH - LEFT - RIGHT) * n as f64 / moves as f64;
    let y = |bytes: u64| {
        let decades = (bytes.max(1) as f64).log10().max(f64::from(low)) - f64::from(low);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * decades / f64::from(high - low)
    };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>Bytes per move against moves made: {} clouds, {} VMs, seed {}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        outcome.clouds, outcome.vms, outcome.seed
    );
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    // Writing to a string does not fail.
    for decade in low..=high {
        let (bytes, at) = (10u64.saturating_pow(decade), y(10u64.saturating_pow(decade)));
        let _ = writeln!(
            text,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            decimal(bytes)
        );
    }
    for fifth in 0..=5 {
        let n = moves * fifth / 5;
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{n}</text>",
            x(n),
            bottom + 18.0
        );
    }
    let _ = writeln!(
        text,
        "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">moves made</text>\n\
         <text transform=\"translate(20 {:.1}) rotate(-90)\" text-anchor=\"middle\">bytes per move</text>",
        (LEFT + right) / 2.0,
        HEIGHT - 16.0,
        (TOP + bottom) / 2.0
    );
    for (line, n) in LINES.iter().zip(0u32..) {
        let points: Vec<String> =
            outcome.rows.iter().map(|row| format!("{:.1},{:.1}", x(row.moves), y((line.of)(row)))).collect();
        let style =
            format!("stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"", line.colour, line.dashes);
        let (at, high) = (LEFT + 360.0 * f64::from(n % 2), 24.0 + 22.0 * f64::from(n / 2));
        let average = outcome.rows.iter().map(&line.of).sum::<u64>() / (outcome.rows.len() as u64).max(1);
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" {style}/>\n\
             <line x1=\"{at}\" y1=\"{high}\" x2=\"{}\" y2=\"{high}\" {style}/>\
             <text x=\"{}\" y=\"{}\">{} (mean {})</text>",
            points.join(" "),
            at + 30.0,
            at + 36.0,
            high + 4.0,
            line.name,
            ByteSize(average)
        );
    }
    text.push_str("</svg>\n");
    text
}

/// A power of ten in decimal units.
fn decimal(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let unit = (bytes.max(1).ilog10() / 3) as usize;
    format!("{} {}", bytes / 1000u64.pow(unit as u32), units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::minidom::Element;

    const NS: &str = "http://www.w3.org/2000/svg";

    fn parse(outcome: &Outcome) -> Element {
        svg(outcome).parse().unwrap()
    }

    #[test]
    fn the_picture_shows_each_row_with_axes_and_legend() {
        let row = |moves, component, own, whole| Row {
            moves,
            component_bytes_per_move: component,
            own_bytes_per_move: own,
            monolithic_bytes_per_move: whole,
            block_bytes_per_move: component + own,
            ..Row::default()
        };
        let rows = vec![row(10, 200_000_000, 4_000_000, 300_000_000), row(20, 0, 4_000_000, 300_000_000)];
        let picture = parse(&Outcome { rows, ..Outcome::default() });
        let of = |name: &str| picture.children().filter(|e| e.is(name, NS)).cloned().collect::<Vec<_>>();
        let texts: Vec<String> = of("text").iter().map(Element::text).collect();
        for wanted in ["moves made", "bytes per move", "1 MB", "1 GB", "20"] {
            assert!(texts.iter().any(|text| text == wanted), "{wanted}: {texts:?}");
        }
        for line in LINES {
            assert!(texts.iter().any(|text| text.starts_with(line.name)), "{texts:?}");
        }
        let lines = of("polyline");
        assert_eq!(lines.len(), LINES.len());
        let ys = |line: &Element| -> Vec<f64> {
            let points = line.attr("points").unwrap().split(' ');
            points.map(|p| p.split_once(',').unwrap().1.parse().unwrap()).collect()
        };
        let (ours, components, whole) = (ys(&lines[0]), ys(&lines[1]), ys(&lines[3]));
        assert!(ours[0] < ours[1] && whole[0] == whole[1] && whole[0] < ours[0], "more is higher: {ours:?}");
        assert_eq!(components[1], HEIGHT - BOTTOM, "nothing lies on the axis");
    }

    #[test]
    fn without_a_move_there_is_a_picture_all_the_same() {
        assert_eq!(
            parse(&Outcome::default()).children().filter(|e| e.is("polyline", NS)).count(),
            LINES.len()
        );
    }
}
