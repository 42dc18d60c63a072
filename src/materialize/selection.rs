//! The choice of files to write.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::MaterializeError;
use crate::layout::{FileKind, Layout};

/// A choice of files; the default is all of them.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Leave out `base_model/*.safetensors` and `metadata.gguf`.
    pub without_base: bool,
    /// Leave out all experts.
    pub without_experts: bool,
    /// Only the experts of these layers.
    pub layers: Option<Numbers>,
    /// Only the experts with these numbers.
    pub experts: Option<Numbers>,
}

impl Selection {
    /// Fails if a number or range is not in the model, or goes beyond it. A range may contain
    /// numbers that do not exist, such as layers without experts.
    pub fn check(&self, layout: &Layout) -> Result<(), MaterializeError> {
        let of = |number: fn(u32, u32) -> u32| {
            let experts = layout
                .experts()
                .iter()
                .filter_map(move |file| match file.kind {
                    FileKind::Expert { layer, expert } => Some(number(layer, expert)),
                    FileKind::Base(_) => None,
                });
            experts.collect::<BTreeSet<u32>>()
        };
        let layers = (
            "--layers",
            "layers with routed experts",
            &self.layers,
            of(|layer, _| layer),
        );
        let experts = (
            "--experts",
            "routed experts",
            &self.experts,
            of(|_, expert| expert),
        );
        for (option, what, asked, existing) in [layers, experts] {
            if let Some(asked) = asked.as_ref().filter(|asked| !asked.lie_in(&existing)) {
                return Err(MaterializeError::NotThere {
                    option,
                    what,
                    asked: asked.to_string(),
                    existing: in_ranges(&existing),
                });
            }
        }
        Ok(())
    }

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

    /// Whether each range contains one of the numbers that exist, and ends no later than the last.
    fn lie_in(&self, existing: &BTreeSet<u32>) -> bool {
        let lies_in = |range: &RangeInclusive<u32>| {
            existing.range(range.clone()).next().is_some()
                && existing.last().is_some_and(|last| range.end() <= last)
        };
        self.0.iter().all(lies_in)
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self
            .0
            .iter()
            .map(|range| match (range.start(), range.end()) {
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first}-{last}"),
            });
        f.write_str(&texts.collect::<Vec<_>>().join(","))
    }
}

/// Numbers as they are written on the command line.
fn in_ranges(numbers: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<RangeInclusive<u32>> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some(last) if last.end() + 1 == number => *last = *last.start()..=number,
            _ => ranges.push(number..=number),
        }
    }
    Numbers(ranges).to_string()
}

/// Text that is not a set of numbers.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a list of numbers and ranges such as 0-3,7, with the smaller numbers first")]
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
