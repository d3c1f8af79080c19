//! A table that is drawn again and again in one place (`packmule status --watch`).

use std::io::{self, IsTerminal};
use std::time::Duration;

use unicode_width::UnicodeWidthChar;

use super::pages::is_read;

/// Between two drawings.
const PAUSE: Duration = Duration::from_secs(1);

/// Characters of a bar.
const BAR: u64 = 20;

/// Draws what `look` gives every second, over the last drawing where the output is a terminal, until nobody reads it.
pub fn forever(mut look: impl FnMut() -> anyhow::Result<String>) -> anyhow::Result<()> {
    loop {
        let text = look()?;
        let drawn = match terminal_size::terminal_size().filter(|_| io::stdout().is_terminal()) {
            // Home, each line with the rest of the old one cleared, then clear to the end: no flicker.
            Some((width, height)) => {
                format!("\x1b[H{}\x1b[J", clipped(&text, width.0.into(), height.0.into()).replace('\n', "\x1b[K\n"))
            }
            None => text,
        };
        if !is_read(drawn.as_bytes())? {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// What a terminal of this size holds: a line that is longer is cut, and of more lines the last says how many. The last row stays free, so
/// that nothing scrolls.
fn clipped(text: &str, width: usize, height: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let room = height.saturating_sub(1).max(1);
    let shown = if lines.len() > room { room - 1 } else { lines.len() };
    let cut = |line: &str| {
        let mut columns = 0;
        let fits = line.chars().take_while(|c| {
            columns += c.width().unwrap_or(0);
            columns <= width
        });
        fits.collect::<String>() + "\n"
    };
    let mut clipped: String = lines[..shown].iter().map(|line| cut(line)).collect();
    if shown < lines.len() {
        clipped += &cut(&format!("… and {} more lines", lines.len() - shown));
    }
    clipped
}

/// `[=======>            ]`, as far as `done` is of `all`; full only where it is all.
pub fn bar(done: u64, all: u64) -> String {
    let filled = (u128::from(done.min(all)) * u128::from(BAR)).checked_div(all.into()).unwrap_or(0) as usize;
    let (whole, head) = (BAR as usize, usize::from(filled < BAR as usize && filled > 0));
    format!("[{}{}{}]", "=".repeat(filled - head), ">".repeat(head), " ".repeat(whole - filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_what_is_done() {
        assert_eq!(bar(0, 100), "[                    ]");
        assert_eq!(bar(50, 100), "[=========>          ]");
        assert_eq!(bar(99, 100), "[==================> ]");
        assert_eq!(bar(100, 100), "[====================]");
        assert_eq!(bar(5, 0), "[                    ]");
        assert_eq!(bar(u64::MAX, u64::MAX).len(), bar(1, u64::MAX).len());
    }

    #[test]
    fn a_table_fits_its_terminal() {
        assert_eq!(clipped("a\nbcd\n", 2, 24), "a\nbc\n");
        assert_eq!(clipped("1\n2\n3\n4\n", 80, 4), "1\n2\n… and 2 more lines\n");
        assert_eq!(clipped("1\n2\n3\n", 80, 4), "1\n2\n3\n");
        assert_eq!(clipped("éé\n", 1, 0), "é\n");
        assert_eq!(clipped("版版版\n", 5, 24), "版版\n", "two columns each");
    }
}
