//! Documents as bytes: rendered when they are read, and kept if they are large.

use std::io::{self, Write};
use std::sync::OnceLock;

use super::Model;
use crate::layout::Doc;
use crate::tree::{Content, DocId, Tree};

/// Larger documents are kept after their first read. Smaller ones are the headers of experts:
/// rendering one again costs less than keeping 23,040 of them.
const KEPT_DOCUMENT_BYTES: u64 = 64 << 10;

/// Large documents, rendered when they are first read.
#[derive(Debug)]
pub(super) struct Kept(Vec<(DocId, OnceLock<Box<[u8]>>)>);

impl Model {
    pub(super) fn read_document(&self, doc: DocId, offset: u64, buffer: &mut [u8]) {
        let render = |out: &mut dyn Write| {
            let mut out = out;
            self.layout
                .render(Doc::of_id(doc), &mut out)
                .expect("writing to memory cannot fail");
        };
        match self.kept.get(doc) {
            Some(kept) => {
                let whole = kept.get_or_init(|| {
                    let mut bytes = Vec::new();
                    render(&mut bytes);
                    bytes.into()
                });
                let start = offset as usize;
                buffer.copy_from_slice(&whole[start..start + buffer.len()]);
            }
            None => {
                let mut window = Window {
                    skip: offset as usize,
                    rest: buffer,
                };
                render(&mut window);
                assert!(window.rest.is_empty(), "a document is as long as its size");
            }
        }
    }
}

impl Kept {
    pub(super) fn of(tree: &Tree) -> Self {
        let mut large: Vec<_> = tree
            .files()
            .flat_map(|file| tree.extents(file))
            .filter(|extent| extent.len > KEPT_DOCUMENT_BYTES)
            .filter_map(|extent| match extent.content {
                Content::Made(doc) => Some((doc, OnceLock::new())),
                Content::Model { .. } | Content::Computed(_) => None,
            })
            .collect();
        large.sort_by_key(|(doc, _)| *doc);
        Self(large)
    }

    fn get(&self, doc: DocId) -> Option<&OnceLock<Box<[u8]>>> {
        let at = self.0.binary_search_by_key(&doc, |(doc, _)| *doc).ok()?;
        Some(&self.0[at].1)
    }
}

/// Keeps the bytes of a document that fall into a buffer, and drops the others.
struct Window<'a> {
    /// Bytes to drop first.
    skip: usize,
    rest: &'a mut [u8],
}

impl Write for Window<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let wanted = &bytes[skipped..];
        let count = wanted.len().min(self.rest.len());
        let (here, rest) = std::mem::take(&mut self.rest).split_at_mut(count);
        here.copy_from_slice(&wanted[..count]);
        self.rest = rest;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
