//! Setting up a process: signals, descriptors, privileges.
//!
//! The command line calls these when it starts. A library user needs none of them, but
//! [`raise_descriptor_limit`] helps with models of many parts.

pub use crate::sys::privileges::no_new_privileges;
pub use crate::sys::process::{
    Signals, close_inherited_descriptors, ignore_file_size_signal, leave_caller,
    raise_descriptor_limit, reset_inherited_signals,
};
