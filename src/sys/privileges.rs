//! Giving up privileges that are not needed, which limits what a hostile model could do with a bug
//! of ours. Both calls affect the calling thread and the threads that it starts from then on.

#[cfg(target_os = "linux")]
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// The capabilities that a daemon started by root needs to the end.
#[cfg(target_os = "linux")]
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN // to unmount on a signal
    .union(CapabilitySet::DAC_READ_SEARCH) // to reopen parts that only their owner may read
    .union(CapabilitySet::FOWNER); // to ask which of their pages are cached

/// Keeps programs that this process starts from gaining privileges. Set-user-id helpers no longer
/// work.
pub fn no_new_privileges() {
    // Only kernels that do not have the setting refuse it.
    #[cfg(target_os = "linux")]
    let _ = set_no_new_privs(true);
}

/// Keeps only the capabilities of a daemon that unmounts by itself.
pub fn keep_what_serving_needs() -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let now = capabilities(None)?;
        // Programs that it starts, if there ever are any, get no others either. Before the rest,
        // since removing needs a capability that is given up below.
        for dropped in CapabilitySet::all().difference(KEPT).iter() {
            let _ = remove_capability_from_bounding_set(dropped);
        }
        let kept = now.permitted.intersection(KEPT);
        let sets = CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets)?;
    }
    Ok(())
}
