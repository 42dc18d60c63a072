//! Sizes as people read them.

use std::fmt;

/// Bytes, shown as `1.50 GiB`: in powers of 1024, with two digits behind the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut number = self.0 as f64;
        let mut unit = None;
        for larger in UNITS {
            if number < 1024.0 {
                break;
            }
            number /= 1024.0;
            unit = Some(larger);
        }
        match unit {
            None => write!(f, "{} B", self.0),
            Some(unit) => write!(f, "{number:.2} {unit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_the_largest_unit_that_they_fill() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1_048_575, "1024.00 KiB"),
            (1 << 20, "1.00 MiB"),
            (3 << 29, "1.50 GiB"),
            (578 << 30, "578.00 GiB"),
            (5 << 40, "5.00 TiB"),
            (u64::MAX, "16.00 EiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
