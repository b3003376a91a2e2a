//! How long work goes on: a bar on a terminal, a line now and then elsewhere, events for programs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::interface::{Event, Message, MigrationProgress};
use crate::types::text::escaped;

use super::format::{bytes, seconds};
use super::printer::Printer;

/// Between lines of one phase where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Between events of one phase for programs.
const EVENT_EVERY: Duration = Duration::from_millis(200);
const BAR_STEPS: u64 = 1000;

pub struct Progress {
    printer: Printer,
    bar: Option<ProgressBar>,
    last_phase: String,
    last_line: Option<Instant>,
    begun: Instant,
}

impl Progress {
    pub fn new(printer: &Printer) -> Self {
        Self {
            printer: printer.clone(),
            bar: None,
            last_phase: String::new(),
            last_line: None,
            begun: Instant::now(),
        }
    }

    pub fn event(&mut self, event: &Event) {
        if self.printer.json {
            if self.is_too_soon(event) {
                return;
            }
            // A reader that is gone is noticed when the end is printed.
            let _ = self.printer.json_message(&Message::Event(event.clone()));
            return;
        }
        match event {
            Event::Note { text } => self.note(text),
            Event::LeftOut { path, what } => self.note(&format!("left out {path}, {what}")),
            Event::Progress { phase, done, total, unit } => {
                if *phase != self.last_phase {
                    self.begun = Instant::now();
                }
                let fraction = if *total == 0 { 0.0 } else { *done as f64 / *total as f64 };
                self.show(phase, fraction, &amount(*done, *total, unit, self.begun.elapsed()));
            }
            Event::Migration(p) => self.show(p.phase.as_str(), p.fraction, &migration_text(p)),
        }
    }

    /// Whether programs were told of this phase a moment ago. Its end is always told.
    fn is_too_soon(&mut self, event: &Event) -> bool {
        let (phase, over) = match event {
            Event::Note { .. } | Event::LeftOut { .. } => return false,
            Event::Progress { phase, done, total, .. } => (phase.as_str(), done >= total),
            Event::Migration(p) => (p.phase.as_str(), p.ended),
        };
        let same = phase == self.last_phase;
        if same && !over && self.last_line.is_some_and(|t| t.elapsed() < EVENT_EVERY) {
            return true;
        }
        phase.clone_into(&mut self.last_phase);
        self.last_line = Some(Instant::now());
        false
    }

    /// Removes the bar.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// A line that stays, above the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.printer.note(text)),
            None => self.printer.note(text),
        }
    }

    fn show(&mut self, phase: &str, fraction: f64, text: &str) {
        if self.printer.draws {
            let bar = self.bar.get_or_insert_with(new_bar);
            bar.set_prefix(escaped(phase).into_owned());
            bar.set_position((fraction.clamp(0.0, 1.0) * BAR_STEPS as f64) as u64);
            bar.set_message(escaped(text).into_owned());
        } else if phase != self.last_phase || self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            let percent = fraction.clamp(0.0, 1.0) * 100.0;
            self.printer.note(format!("{phase}: {percent:.0} %, {text}").trim_end_matches(", "));
        }
        if phase != self.last_phase {
            self.last_phase = phase.to_owned();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(BAR_STEPS), ProgressDrawTarget::stderr());
    // A constant template that tests draw.
    if let Ok(style) = ProgressStyle::with_template("{prefix:>12} [{bar:24}] {percent:>3} %  {wide_msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

fn amount(done: u64, total: u64, unit: &str, elapsed: Duration) -> String {
    if unit != "bytes" {
        return format!("{done} of {total} {unit}");
    }
    let mut text = format!("{} of {}", bytes(done), bytes(total));
    let s = elapsed.as_secs_f64();
    if s > 1.0 && done > 0 {
        let rate = done as f64 / s;
        let left = total.saturating_sub(done) as f64 / rate;
        text.push_str(&format!(", {}/s, {} left", bytes(rate as u64), seconds(left)));
    }
    text
}

fn migration_text(p: &MigrationProgress) -> String {
    let mut parts = Vec::new();
    if p.bytes_total > 0 {
        parts.push(format!("{} of {}", bytes(p.bytes_done), bytes(p.bytes_total)));
    }
    if p.rate_bytes_per_s > 0 && p.bytes_done < p.bytes_total {
        parts.push(format!("{}/s", bytes(p.rate_bytes_per_s)));
        parts.extend(p.eta_s.map(|s| format!("{} left", seconds(s as f64))));
    }
    if !p.detail.is_empty() {
        parts.push(p.detail.clone());
    }
    parts.join(", ")
}
