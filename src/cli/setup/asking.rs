//! Questions that a person answers at a terminal, or a program through a pipe, a line each.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Context, bail};
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};

/// Where the answers come from.
pub struct Asking {
    terminal: bool,
}

impl Asking {
    /// Standard input.
    pub fn new() -> Self {
        Self { terminal: io::stdin().is_terminal() }
    }

    /// Asks until `judge` takes the answer; an empty one is the default. What a pipe says wrong is the error: it will say nothing else.
    ///
    /// # Errors
    /// What `judge` said, or that no answer came where there is no default.
    pub fn about<T>(&self, question: &str, default: Option<&str>, judge: impl Fn(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
        loop {
            let shown = default.map(|default| format!(" [{default}]")).unwrap_or_default();
            let answer = self.line(&format!("{question}{shown}: "))?;
            let typed = match (answer.as_deref().map(str::trim), default) {
                (Some(""), Some(default)) | (None, Some(default)) => default,
                (Some(typed), _) => typed,
                (None, None) => bail!("{question}: no answer came"),
            };
            match judge(typed) {
                Ok(answer) => return Ok(answer),
                Err(error) if self.terminal => eprintln!("packmule: {error:#}"),
                Err(error) => return Err(error.context(question.to_owned())),
            }
        }
    }

    /// A question whose default is `default`, for want of an answer too.
    pub fn whether(&self, question: &str, default: bool) -> anyhow::Result<bool> {
        let shown = if default { "Y/n" } else { "y/N" };
        self.about(question, Some(shown), |typed| match typed.to_ascii_lowercase().as_str() {
            "y" | "yes" => Ok(true),
            "n" | "no" => Ok(false),
            _ if typed == shown => Ok(default),
            _ => bail!("'{typed}': expected y or n"),
        })
    }

    /// As [`Asking::about`]; a terminal does not show what is typed.
    pub fn secret(&self, question: &str) -> anyhow::Result<String> {
        let answer = if self.terminal {
            prompt(&format!("{question}: "))?;
            shows_again_when_interrupted();
            Some(rpassword::read_password().context("the terminal cannot be read")?)
        } else {
            self.line(&format!("{question}: "))?
        };
        match answer.as_deref().map(str::trim) {
            Some("") | None => bail!("{question}: no answer came"),
            Some(secret) => Ok(secret.to_owned()),
        }
    }

    /// `None` at the end of the input.
    fn line(&self, text: &str) -> anyhow::Result<Option<String>> {
        prompt(text)?;
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line).context("standard input cannot be read")?;
        if !self.terminal || read == 0 {
            // The line break that a terminal has shown.
            println!();
        }
        Ok((read > 0).then_some(line))
    }
}

/// A terminal that is told not to show what is typed shows it again where Ctrl-C ends the question, which ends the program.
fn shows_again_when_interrupted() {
    let Ok(as_it_was) = tcgetattr(io::stdin()) else { return };
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &as_it_was);
            // 128 and SIGINT, as shells have it.
            std::process::exit(130);
        }
    });
}

fn prompt(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
