//! Plain tables: columns two spaces apart, numbers to the right, no lines.

use std::borrow::Cow;

use super::printer::{Outcome, Printer};

/// Between columns.
const GAP: usize = 2;
/// No column is made narrower.
const WIDTH_MIN: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A column whose name begins with `>` is aligned to the right. Without any names there is no head.
    pub fn new<const N: usize>(columns: [&str; N]) -> Self {
        let columns = columns.iter().map(|c| match c.strip_prefix('>') {
            Some(name) => (name.to_owned(), Align::Right),
            None => ((*c).to_owned(), Align::Left),
        });
        Self { columns: columns.collect(), rows: Vec::new() }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// To stdout; nothing at all if there is no row.
    pub fn print(&self, printer: &Printer) -> Outcome {
        if self.rows.is_empty() {
            return Ok(());
        }
        let widths = self.widths(printer.columns.filter(|_| !printer.verbose));
        let heads: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        if heads.iter().any(|h| !h.is_empty()) {
            printer.line(printer.bold(&self.render(&heads, &widths)))?;
        }
        self.rows.iter().try_for_each(|row| printer.line(self.render(row, &widths)))
    }

    fn render(&self, cells: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for (i, cell) in cells.iter().enumerate() {
            let width = widths.get(i).copied().unwrap_or(0);
            let align = self.columns.get(i).map_or(Align::Left, |c| c.1);
            let cell = shortened(cell, width);
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            match align {
                Align::Left => line.extend([&*cell, &pad]),
                Align::Right => line.extend([pad.as_str(), &cell]),
            }
            line.push_str("  ");
        }
        line.trim_end().to_owned()
    }

    /// As wide as their cells, or as the terminal lets them be: what is shortened is the widest of the columns
    /// of words, again and again, and never a number.
    fn widths(&self, columns: Option<usize>) -> Vec<usize> {
        let mut widths: Vec<usize> = (0..self.columns.len()).map(|i| self.width(i)).collect();
        let most = columns.unwrap_or(usize::MAX);
        let all = |widths: &[usize]| widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        while all(&widths) > most {
            let words = (0..widths.len()).filter(|i| self.columns[*i].1 == Align::Left);
            match words.filter(|i| widths[*i] > WIDTH_MIN).max_by_key(|i| widths[*i]) {
                Some(widest) => widths[widest] -= 1,
                None => break,
            }
        }
        widths
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let head = self.columns.get(column).map(|(name, _)| name);
        cells.chain(head).map(|c| c.chars().count()).max().unwrap_or(0)
    }
}

/// The text, or as much of it as fits, and a sign that there is more.
fn shortened(text: &str, width: usize) -> Cow<'_, str> {
    if text.chars().count() <= width {
        return text.into();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…").into()
}

/// Facts about one thing, one a line; those without a value are left out.
pub fn card(printer: &Printer, facts: &[(&str, String)]) -> Outcome {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        printer.line(format!("{}  {value}", printer.bold(&format!("{name:<width$}"))))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_no_wider_than_its_terminal() {
        let mut table = Table::new(["NAME", "WHERE", ">MEMORY"]);
        table.row(["web".into(), "given-up (a-cloud@federation.example.org)".into(), "512 MiB".into()]);
        let row = |columns| table.render(&table.rows[0], &table.widths(columns));
        assert_eq!(row(None), "web   given-up (a-cloud@federation.example.org)  512 MiB");
        for columns in [30, 40, 55] {
            let row = row(Some(columns));
            assert_eq!(row.chars().count(), columns, "{row}");
            assert!(row.starts_with("web ") && row.contains('…') && row.ends_with("512 MiB"), "{row}");
        }
        assert_eq!(row(Some(56)), row(None));
        // It cannot be made to fit everywhere.
        assert_eq!(row(Some(3)), "web   given-u…  512 MiB");
    }
}
