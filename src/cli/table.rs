//! Plain tables: columns two spaces apart, numbers to the right, no lines.

use super::printer::{Outcome, Printer};

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
        let heads: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        if heads.iter().any(|h| !h.is_empty()) {
            printer.line(printer.bold(&self.render(&heads)))?;
        }
        self.rows.iter().try_for_each(|row| printer.line(self.render(row)))
    }

    fn render(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (i, cell) in cells.iter().enumerate() {
            let (width, align) = (self.width(i), self.columns.get(i).map_or(Align::Left, |c| c.1));
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            match align {
                Align::Left => line.extend([cell.as_str(), &pad]),
                Align::Right => line.extend([pad.as_str(), cell]),
            }
            line.push_str("  ");
        }
        line.trim_end().to_owned()
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let head = self.columns.get(column).map(|(name, _)| name);
        cells.chain(head).map(|c| c.chars().count()).max().unwrap_or(0)
    }
}

/// Facts about one thing, one a line; those without a value are left out.
pub fn card(printer: &Printer, facts: &[(&str, String)]) -> Outcome {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        printer.line(format!("{}  {value}", printer.bold(&format!("{name:<width$}"))))?;
    }
    Ok(())
}
