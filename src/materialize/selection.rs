//! Which files of the tree to write.

use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::layout::FileKind;

/// A choice of files; the default is all of them.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Leave out `base_model/*.safetensors` and `metadata.gguf`.
    pub without_base: bool,
    /// Leave out all experts.
    pub without_experts: bool,
    /// Of the experts, only those of these layers.
    pub layers: Option<Numbers>,
    /// Of the experts, only those with these numbers.
    pub experts: Option<Numbers>,
}

impl Selection {
    /// Whether a file is chosen.
    pub fn takes(&self, kind: FileKind) -> bool {
        match kind {
            FileKind::Base(_) => !self.without_base,
            FileKind::Expert { layer, expert } => {
                let takes = |numbers: &Option<Numbers>, n| {
                    numbers.as_ref().is_none_or(|numbers| numbers.contains(n))
                };
                !self.without_experts && takes(&self.layers, layer) && takes(&self.experts, expert)
            }
        }
    }
}

/// A set of numbers, written `0-3,7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbers(Vec<RangeInclusive<u32>>);

impl Numbers {
    /// Whether the number is in the set.
    pub fn contains(&self, number: u32) -> bool {
        self.0.iter().any(|range| range.contains(&number))
    }
}

/// Text that is no set of numbers.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no list of numbers and ranges such as 0-3,7, smaller numbers first")]
pub struct NotNumbers(String);

impl FromStr for Numbers {
    type Err = NotNumbers;

    fn from_str(text: &str) -> Result<Self, NotNumbers> {
        let range = |item: &str| {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
            (!range.is_empty()).then_some(range)
        };
        let ranges = text.split(',').map(range).collect::<Option<_>>();
        ranges.map(Self).ok_or_else(|| NotNumbers(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ranges_are_read() {
        let numbers: Numbers = "0-3, 7".parse().unwrap();
        let inside: Vec<u32> = (0..9).filter(|n| numbers.contains(*n)).collect();
        assert_eq!(inside, [0, 1, 2, 3, 7]);
        for wrong in ["", "a", "3-1", "1,,2", "-1", "1-"] {
            assert!(wrong.parse::<Numbers>().is_err(), "{wrong:?}");
        }
    }
}
