//! Level 3: recipe to disk image.
