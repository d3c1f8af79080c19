//! The table as a picture: a group of bars for each task, each as long as its seconds are beside the slowest of its group.

use std::fmt::Write as _;

use crate::measure::{Report, Row};

const WIDTH: f64 = 860.0;
const NAMES: f64 = 190.0;
const BARS: f64 = 480.0;
const BAR: f64 = 16.0;
const GROUP: f64 = 34.0;

/// An SVG of it, without scripts, fonts or colours that a dark page would hide.
pub fn svg(report: &Report) -> String {
    let mut groups: Vec<(&str, Vec<&Row>)> = Vec::new();
    for row in &report.rows {
        match groups.iter_mut().find(|(task, _)| *task == row.task) {
            Some((_, rows)) => rows.push(row),
            None => groups.push((row.task, vec![row])),
        }
    }
    let height: f64 = groups.iter().map(|(_, rows)| GROUP + rows.len() as f64 * (BAR + 3.0)).sum::<f64>() + 50.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" fill=\"#333333\">Seconds, shorter is better: {} × {}, Linux {}</text>\n",
        report.processors,
        escaped(&report.processor),
        escaped(&report.kernel)
    );
    let mut y = 40.0;
    for (task, rows) in groups {
        let slowest = rows.iter().map(|row| row.seconds).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(out, "<text x=\"12\" y=\"{}\" fill=\"#111111\" font-weight=\"bold\">{}</text>", y + 18.0, escaped(task));
        y += GROUP - 8.0;
        for row in rows {
            let ours = row.program.starts_with("packmule");
            let (fill, length) = (if ours { "#c2560c" } else { "#8a94a6" }, (row.seconds / slowest * BARS).max(1.5));
            let _ = writeln!(
                out,
                "<text x=\"{}\" y=\"{}\" fill=\"#333333\" text-anchor=\"end\">{}</text>\
                 <rect x=\"{}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{fill}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" fill=\"#333333\">{}</text>",
                NAMES - 6.0,
                y + 12.5,
                escaped(&row.program),
                NAMES,
                NAMES + length + 6.0,
                y + 12.5,
                said(row)
            );
            y += BAR + 3.0;
        }
        y += 8.0;
    }
    out + "</svg>\n"
}

/// Seconds, requests and bytes.
fn said(row: &Row) -> String {
    let mut said = format!("{:.2} s", row.seconds);
    if let Some(requests) = &row.requests {
        let _ = write!(said, ", {} requests", requests.values().sum::<u64>());
    }
    if let Some(bytes) = row.bytes_up.zip(row.bytes_down).map(|(up, down)| up + down) {
        let _ = write!(said, ", {:.1} MB", bytes as f64 / 1e6);
    }
    said
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
