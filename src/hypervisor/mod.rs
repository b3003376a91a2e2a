//! Level 2: the hypervisor driver trait and its drivers.
