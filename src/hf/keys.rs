//! The hyper-parameters of a model: its keys, read with care.
//!
//! A number that is written into a program's configuration sizes what that program allocates, and
//! here it divides and multiplies. So each is checked when it is read: its kind, that it is not
//! zero, and that it is no larger than a model's can be.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::HfError;
use crate::gguf::{KeyValue, ModelHeader, Value};

/// No count of a real model comes near; products of two still fit into 64 bits.
const MAX_COUNT: u64 = 1 << 31;

/// The keys `ARCHITECTURE.*` of a model.
pub(super) struct Keys<'a> {
    model: &'a ModelHeader,
    architecture: &'a str,
    /// Those that were asked for.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub fn new(model: &'a ModelHeader, architecture: &'a str) -> Self {
        Self {
            model,
            architecture,
            read: RefCell::default(),
        }
    }

    /// The full name of a key.
    pub fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn get(&self, name: &str) -> Option<&'a KeyValue> {
        self.read.borrow_mut().insert(name.to_owned());
        self.model.get(&self.full(name))
    }

    /// Keys that nothing has asked for.
    pub fn unread(&self) -> Vec<&'a str> {
        let read = self.read.borrow();
        let keys = self.model.key_values.iter().map(|kv| kv.key.as_str());
        let unread = keys.filter(|key| {
            let name = key.strip_prefix(self.architecture);
            let name = name.and_then(|rest| rest.strip_prefix('.'));
            name.is_some_and(|name| !read.contains(name))
        });
        unread.collect()
    }

    pub fn wrong(&self, name: &str, problem: impl Into<String>) -> HfError {
        HfError::Key {
            key: self.full(name),
            problem: problem.into(),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// One value for all layers. Some converters write one for each, which must then be the same.
    fn scalar(&self, name: &str) -> Result<Option<&'a Value>, HfError> {
        let Some(kv) = self.get(name) else {
            return Ok(None);
        };
        match &kv.value {
            Value::Array {
                items: Some(items), ..
            } => match &items[..] {
                [first, rest @ ..] if rest.iter().all(|item| item == first) => Ok(Some(first)),
                _ => Err(self.wrong(name, "differs from layer to layer")),
            },
            Value::Array { items: None, .. } => Err(self.wrong(name, "is a long array")),
            value => Ok(Some(value)),
        }
    }

    /// A whole number, from 0 on.
    pub fn number(&self, name: &str) -> Result<Option<u64>, HfError> {
        let Some(value) = self.scalar(name)? else {
            return Ok(None);
        };
        let number = value.as_u64().filter(|&n| n <= MAX_COUNT);
        number
            .map(Some)
            .ok_or_else(|| self.wrong(name, format!("must be a whole number up to {MAX_COUNT}")))
    }

    /// A count of something that every model has at least one of.
    pub fn count(&self, name: &str) -> Result<u64, HfError> {
        match self.number(name)? {
            None => Err(HfError::MissingKey(self.full(name))),
            Some(0) => Err(self.wrong(name, "is 0")),
            Some(count) => Ok(count),
        }
    }

    /// A number that is neither infinite nor NaN.
    pub fn float(&self, name: &str) -> Result<Option<f32>, HfError> {
        let Some(value) = self.scalar(name)? else {
            return Ok(None);
        };
        let float = match *value {
            Value::F32(float) => Some(float),
            Value::F64(float) => Some(float as f32),
            ref value => value.as_u64().map(|n| n as f32),
        };
        let float = float.filter(|float| float.is_finite());
        float
            .map(Some)
            .ok_or_else(|| self.wrong(name, "must be a finite number"))
    }

    /// A number that is not negative either.
    pub fn float_from_0(&self, name: &str) -> Result<Option<f32>, HfError> {
        match self.float(name)? {
            Some(float) if float < 0.0 => Err(self.wrong(name, "must not be negative")),
            float => Ok(float),
        }
    }

    /// A number above 0.
    pub fn float_above_0(&self, name: &str) -> Result<Option<f32>, HfError> {
        match self.float(name)? {
            Some(float) if float <= 0.0 => Err(self.wrong(name, "must be above 0")),
            float => Ok(float),
        }
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>, HfError> {
        match self.scalar(name)? {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(name, "must be true or false")),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>, HfError> {
        match self.get(name).map(|kv| &kv.value) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "must be a text")),
        }
    }
}

/// A float of 32 bits as the shortest decimal number that stands for it: 1e-6 rather than
/// 9.999999974752427e-7.
pub(super) fn shortest(float: f32) -> f64 {
    format!("{float:?}").parse().unwrap_or(f64::from(float))
}
