use std::process::ExitCode;

fn main() -> ExitCode {
    cicada::cli::run()
}
