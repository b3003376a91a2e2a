//! Level 4: the typed client of the local API.
