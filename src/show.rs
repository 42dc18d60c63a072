//! What a tree shows of a model: the choice of `--show`.

use std::fmt;
use std::str::FromStr;

/// The parts of a tree. The default is `base` and `experts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Show {
    /// `base_model/`
    pub base: bool,
    /// `experts/`
    pub experts: bool,
    /// `model.gguf`, all parts of the model in one file
    pub joined: bool,
    /// `hf/`, a directory that transformers or mlx-lm open
    pub hf: bool,
}

const NAMES: [&str; 4] = ["base", "experts", "joined", "hf"];

impl Show {
    /// Nothing at all.
    pub const NOTHING: Self = Self {
        base: false,
        experts: false,
        joined: false,
        hf: false,
    };

    fn parts(&mut self) -> [&mut bool; 4] {
        [
            &mut self.base,
            &mut self.experts,
            &mut self.joined,
            &mut self.hf,
        ]
    }
}

impl Default for Show {
    fn default() -> Self {
        Self {
            base: true,
            experts: true,
            ..Self::NOTHING
        }
    }
}

impl FromStr for Show {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let mut show = Self::NOTHING;
        for name in list.split(',').map(str::trim) {
            let place = NAMES.iter().position(|known| *known == name);
            let place = place.ok_or_else(|| {
                let known = NAMES.join(", ");
                format!("{name:?} is not one of {known}")
            })?;
            *show.parts()[place] = true;
        }
        Ok(show)
    }
}

impl fmt::Display for Show {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        let shown = NAMES.into_iter().zip(copy.parts());
        let names = shown.filter_map(|(name, shown)| shown.then_some(name));
        f.write_str(&names.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_is_written() {
        for list in ["base,experts", "hf", "base,experts,joined,hf", "joined"] {
            assert_eq!(list.parse::<Show>().unwrap().to_string(), list);
        }
        assert_eq!(" hf, base".parse::<Show>().unwrap().to_string(), "base,hf");
        assert_eq!(Show::default().to_string(), "base,experts");
        for list in ["", "base,", "HF", "base experts", "all"] {
            assert!(list.parse::<Show>().is_err(), "{list:?}");
        }
    }
}
