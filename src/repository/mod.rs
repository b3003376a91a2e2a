//! Level 2: the content-addressed repository.
