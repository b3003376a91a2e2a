//! Level 3: building components from a distribution's packages, directories and tars.
