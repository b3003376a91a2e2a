//! Level 2: VM disk files: qcow2 overlays, raw user-data disks, chunk maps of both.
