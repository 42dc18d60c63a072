//! Giving up privileges that are not needed, so that a fault of ours, met by a hostile model, is worth
//! less. Both calls hold for the calling thread and those that it starts from then on.

#[cfg(target_os = "linux")]
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// What a daemon that was started by root goes on needing.
#[cfg(target_os = "linux")]
const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN // to unmount when a signal asks for it
    .union(CapabilitySet::DAC_READ_SEARCH) // to open parts again that only their owner may read
    .union(CapabilitySet::FOWNER); // to ask what of them is cached

/// No program that this process starts gains privileges: no set-user-id helper will work.
pub fn no_new_privileges() {
    // Kernels refuse it only if they are older than it.
    #[cfg(target_os = "linux")]
    let _ = set_no_new_privs(true);
}

/// Keeps only the capabilities of a daemon that unmounts by itself.
pub fn keep_what_serving_needs() -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let now = capabilities(None)?;
        // Programs that it starts, if there ever were any, would get no others either. Removing needs
        // a capability that is given up below.
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
