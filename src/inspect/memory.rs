//! How much memory this machine, or the control group that we are in, has.

use std::fs;

use serde::Serialize;

/// In bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// What there is, or may be used.
    pub total: u64,
    /// What can be had without swapping, now.
    pub available: u64,
}

impl Memory {
    /// `None` where the system does not tell as Linux does.
    pub fn of_this_machine() -> Option<Self> {
        let table = fs::read_to_string("/proc/meminfo").ok()?;
        let machine = Self {
            total: field(&table, "MemTotal:")?,
            available: field(&table, "MemAvailable:")?,
        };
        let limit = group_limit().unwrap_or(u64::MAX);
        Some(Self {
            total: machine.total.min(limit),
            available: machine.available.min(limit),
        })
    }

    /// Whether so many bytes fit, in words.
    pub fn verdict(self, bytes: u64) -> &'static str {
        match bytes {
            bytes if bytes <= self.available => "fits",
            bytes if bytes <= self.total => "fits if others make room",
            _ => "does not fit",
        }
    }
}

/// `MemTotal:       24617552 kB`
fn field(table: &str, name: &str) -> Option<u64> {
    let rest = table.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = rest.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// The smallest limit of the control groups that this process is in, of version 2 or 1.
fn group_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limits = groups.lines().filter_map(|line| {
        // HIERARCHY:CONTROLLERS:PATH
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        // In a container the path may be that of the host, and its own group the root.
        let above = path.match_indices('/').map(|(at, _)| &path[..at]);
        above
            .chain([path])
            .filter_map(|group| {
                let limit = fs::read_to_string(format!("{root}{group}/{file}")).ok()?;
                limit.trim().parse::<u64>().ok()
            })
            .min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_in_units_of_1024_bytes() {
        let table = "MemTotal:       24617552 kB\nMemFree:  1 kB\n";
        assert_eq!(field(table, "MemTotal:"), Some(24_617_552 * 1024));
        assert_eq!(field(table, "MemAvailable:"), None);
    }
}
