//! Level 6: one file per subcommand, printer, exit codes.
