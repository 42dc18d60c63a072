//! The immutable tree: directories, files, and where the bytes of a file come from.
//!
//! The problem: 23,040 files must be found by name, listed, described and read by several threads
//! at once, and all of that must fit in a few MiB.
//!
//! The plan: flat tables. A node's inode number is its index in the table plus one, the children of
//! a directory are one sorted range of the table, a file is a range of the extent table, and all
//! names share one string. Nothing changes after [`Tree::new`], so nothing needs a lock.

use std::ops::Range;

/// An inode number. The root is 1, as in FUSE.
pub type Ino = u64;

/// The root directory.
pub const ROOT: Ino = 1;

/// A document that is rendered on demand. The layout gives the number its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DocId(pub u32);

/// An array that is computed when it is read; what the number means is for the layout to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecipeId(pub u32);

/// Where the bytes of an extent come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole document that this program renders.
    Made(DocId),
    /// A byte range of a part of the model.
    Model {
        /// 0-based.
        part: u32,
        /// First byte in the part's file.
        offset: u64,
    },
    /// An array that is computed, whole.
    Computed(RecipeId),
}

/// A run of bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte in the file.
    pub start: u64,
    /// Bytes; never 0.
    pub len: u64,
    pub content: Content,
}

/// What file systems share blocks in, nearly always: that is what plans count with.
const BLOCK_BYTES: u64 = 4096;

impl Extent {
    /// Bytes of whole blocks that are whole blocks of the model, too, so that a file system can
    /// share them.
    pub fn sharable_bytes(&self) -> u64 {
        if !self.is_congruent() {
            return 0;
        }
        let end = self.start + self.len;
        let last = end - end % BLOCK_BYTES;
        last.saturating_sub(self.start.next_multiple_of(BLOCK_BYTES))
    }

    /// Bytes of tensors that are computed, or are at another offset in the model, modulo a block.
    pub fn incongruent_bytes(&self) -> u64 {
        match self.content {
            Content::Made(_) => 0,
            _ if self.is_congruent() => 0,
            Content::Model { .. } | Content::Computed(_) => self.len,
        }
    }

    /// Whether it is at the same offset in the model, modulo a block.
    fn is_congruent(&self) -> bool {
        matches!(self.content, Content::Model { offset, .. } if offset % BLOCK_BYTES == self.start % BLOCK_BYTES)
    }
}

/// The part of an extent that answers a part of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    pub len: u64,
    /// First byte within the document or the array, or in the part's file.
    pub offset: u64,
    pub origin: Origin,
}

/// Where a [`Slice`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Made(DocId),
    /// The 0-based part of the model.
    Part(u32),
    Computed(RecipeId),
}

/// The kind of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
}

#[derive(Debug)]
struct Node {
    parent: u32,
    kind: Kind,
    /// Into `Tree::names`.
    name: Range<u32>,
    /// Bytes of a file, 0 for a directory.
    size: u64,
    /// A file's extents, or a directory's children.
    items: Range<u32>,
}

/// A directory of two levels, ready to be served.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    names: String,
    extents: Vec<Extent>,
}

/// A file to put into a tree: its name, and the length and content of each of its runs.
#[derive(Debug)]
pub struct NewFile {
    pub name: String,
    pub runs: Vec<(u64, Content)>,
}

/// A child of the root.
enum Child {
    Directory(Vec<NewFile>),
    File(NewFile),
}

fn assert_names_differ<'a>(sorted: impl Iterator<Item = &'a String> + Clone) {
    let differ = sorted.clone().zip(sorted.skip(1)).all(|(a, b)| a != b);
    assert!(differ, "two files of the same name");
}

impl Tree {
    /// Builds a tree of directories with files in them. Inode numbers follow from the names alone:
    /// the root, the directories sorted by name, then the files of each, sorted by name.
    ///
    /// # Panics
    /// If a directory has two files of the same name; layouts never do.
    pub fn new(directories: Vec<(&str, Vec<NewFile>)>) -> Self {
        Self::with_files(directories, Vec::new())
    }

    /// The same, with files beside the directories. The root's children, directories and files, are
    /// sorted together.
    pub fn with_files(directories: Vec<(&str, Vec<NewFile>)>, beside: Vec<NewFile>) -> Self {
        let files = directories.iter().map(|(_, files)| files.len());
        let count = 1 + directories.len() + files.sum::<usize>() + beside.len();
        let mut tree = Self {
            nodes: Vec::with_capacity(count),
            names: String::new(),
            extents: Vec::new(),
        };
        let directories = directories
            .into_iter()
            .map(|(name, files)| (name.to_owned(), Child::Directory(files)));
        let beside = beside.into_iter();
        let beside = beside.map(|file| (file.name.clone(), Child::File(file)));
        let mut children: Vec<_> = directories.chain(beside).collect();
        children.sort_by(|a, b| a.0.cmp(&b.0));
        assert_names_differ(children.iter().map(|(name, _)| name));

        let first_child = 1;
        let mut next_file = first_child + children.len() as u32;
        tree.push(0, Kind::Directory, "", 0, first_child..next_file);
        for (name, child) in &children {
            match child {
                Child::Directory(files) => {
                    let children = next_file..next_file + files.len() as u32;
                    next_file = children.end;
                    tree.push(0, Kind::Directory, name, 0, children);
                }
                Child::File(file) => tree.push_file(0, file),
            }
        }
        for (directory, (_, child)) in (first_child..).zip(children) {
            let Child::Directory(mut files) = child else {
                continue;
            };
            files.sort_by(|a, b| a.name.cmp(&b.name));
            assert_names_differ(files.iter().map(|file| &file.name));
            for file in files {
                tree.push_file(directory, &file);
            }
        }
        tree.nodes.shrink_to_fit();
        tree.names.shrink_to_fit();
        tree.extents.shrink_to_fit();
        tree
    }

    fn push(&mut self, parent: u32, kind: Kind, name: &str, size: u64, items: Range<u32>) {
        let start = self.names.len() as u32;
        self.names.push_str(name);
        self.nodes.push(Node {
            parent,
            kind,
            name: start..self.names.len() as u32,
            size,
            items,
        });
    }

    fn push_file(&mut self, parent: u32, file: &NewFile) {
        let first = self.extents.len() as u32;
        let mut start = 0;
        for &(len, content) in &file.runs {
            if len > 0 {
                self.extents.push(Extent {
                    start,
                    len,
                    content,
                });
                start += len;
            }
        }
        let extents = first..self.extents.len() as u32;
        self.push(parent, Kind::File, &file.name, start, extents);
    }

    fn node(&self, ino: Ino) -> Option<&Node> {
        self.nodes.get(usize::try_from(ino.checked_sub(1)?).ok()?)
    }

    fn name_of(&self, node: &Node) -> &str {
        &self.names[node.name.start as usize..node.name.end as usize]
    }

    /// The number of nodes; inode numbers go from 1 to this.
    pub fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Whether the tree has no nodes; it always has a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Bytes of all files together.
    pub fn total_size(&self) -> u64 {
        self.nodes.iter().map(|node| node.size).sum()
    }

    /// The kind of a node; `None` if there is no such node.
    pub fn kind(&self, ino: Ino) -> Option<Kind> {
        self.node(ino).map(|node| node.kind)
    }

    /// Bytes of a file, 0 for a directory.
    pub fn size(&self, ino: Ino) -> Option<u64> {
        self.node(ino).map(|node| node.size)
    }

    /// A node's name; that of the root is empty.
    pub fn name(&self, ino: Ino) -> Option<&str> {
        self.node(ino).map(|node| self.name_of(node))
    }

    /// A node's directory; the root's is the root.
    pub fn parent(&self, ino: Ino) -> Option<Ino> {
        self.node(ino).map(|node| Ino::from(node.parent) + 1)
    }

    /// The children of a directory in the order of their names (bytewise), which is also that of
    /// their inode numbers; `None` for a file.
    pub fn children(&self, ino: Ino) -> Option<Range<Ino>> {
        let node = self.node(ino)?;
        (node.kind == Kind::Directory)
            .then(|| Ino::from(node.items.start) + 1..Ino::from(node.items.end) + 1)
    }

    /// The child with this name.
    pub fn lookup(&self, directory: Ino, name: &[u8]) -> Option<Ino> {
        let children = self.children(directory)?;
        let first = children.start;
        let nodes = &self.nodes[first as usize - 1..children.end as usize - 1];
        nodes
            .binary_search_by(|node| self.name_of(node).as_bytes().cmp(name))
            .ok()
            .map(|at| first + at as Ino)
    }

    /// The node at a path such as `experts/registry.json`.
    pub fn find(&self, path: &str) -> Option<Ino> {
        path.split('/')
            .filter(|name| !name.is_empty())
            .try_fold(ROOT, |ino, name| self.lookup(ino, name.as_bytes()))
    }

    /// The path of a node below the root, such as `experts/registry.json`.
    pub fn path(&self, ino: Ino) -> Option<String> {
        let node = self.node(ino)?;
        let name = self.name_of(node);
        Some(match node.parent {
            0 => name.to_owned(),
            parent => format!("{}/{name}", self.name_of(&self.nodes[parent as usize])),
        })
    }

    /// Every file, in the order of inode numbers.
    pub fn files(&self) -> impl Iterator<Item = Ino> + '_ {
        (ROOT..=self.len()).filter(|&ino| self.kind(ino) == Some(Kind::File))
    }

    /// The extents of a file, in order; empty for a directory.
    pub fn extents(&self, ino: Ino) -> &[Extent] {
        match self.node(ino) {
            Some(node) if node.kind == Kind::File => {
                &self.extents[node.items.start as usize..node.items.end as usize]
            }
            _ => &[],
        }
    }

    /// The extent of a file that holds the byte at `offset`.
    pub fn extent_at(&self, ino: Ino, offset: u64) -> Option<&Extent> {
        let extents = self.extents(ino);
        extents.get(extents.partition_point(|extent| extent.start + extent.len <= offset))
    }

    /// Bytes of a file that no file system can share with the model, headers and documents aside.
    pub fn incongruent_bytes(&self, ino: Ino) -> u64 {
        let extents = self.extents(ino).iter();
        extents.map(Extent::incongruent_bytes).sum()
    }

    /// The slices that make up `len` bytes of a file from `offset`, in order; fewer bytes, or none,
    /// if the file ends before.
    pub fn slices(&self, ino: Ino, offset: u64, len: u64) -> impl Iterator<Item = Slice> + '_ {
        let end = offset.saturating_add(len);
        let extents = self.extents(ino);
        let first = extents.partition_point(|extent| extent.start + extent.len <= offset);
        extents[first..]
            .iter()
            .take_while(move |extent| extent.start < end)
            .filter(move |_| len > 0)
            .map(move |extent| {
                let skip = offset.saturating_sub(extent.start);
                let stop = extent.len.min(end - extent.start);
                let (origin, base) = match extent.content {
                    Content::Made(doc) => (Origin::Made(doc), 0),
                    Content::Model { part, offset } => (Origin::Part(part), offset),
                    Content::Computed(recipe) => (Origin::Computed(recipe), 0),
                };
                Slice {
                    len: stop - skip,
                    offset: base + skip,
                    origin,
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, runs: &[(u64, Content)]) -> NewFile {
        NewFile {
            name: name.into(),
            runs: runs.to_vec(),
        }
    }

    fn sample() -> Tree {
        let doc = |n| Content::Made(DocId(n));
        let model = |offset| Content::Model { part: 1, offset };
        let runs = [(10, doc(7)), (0, doc(8)), (20, model(100)), (5, model(50))];
        Tree::new(vec![
            ("z", vec![file("b", &[(3, doc(0))]), file("a", &runs)]),
            ("e", vec![]),
        ])
    }

    #[test]
    fn names_lead_to_nodes_and_back() {
        let tree = sample();
        assert_eq!(tree.len(), 5);
        assert_eq!(tree.find("z/a"), Some(4));
        assert_eq!(tree.path(4).unwrap(), "z/a");
        assert_eq!(tree.find("z"), Some(3));
        assert_eq!(tree.path(3).unwrap(), "z");
        assert_eq!(tree.children(2), Some(4..4));
        assert_eq!(tree.children(3), Some(4..6));
        assert_eq!(tree.children(4), None);
        assert_eq!((tree.parent(4), tree.parent(ROOT)), (Some(3), Some(ROOT)));
        for missing in ["z/c", "a", "z/a/x"] {
            assert_eq!(tree.find(missing), None, "{missing}");
        }
        assert_eq!(tree.kind(0), None);
        assert_eq!(tree.kind(6), None);
        assert_eq!(tree.total_size(), 38);
    }

    #[test]
    fn slices_walk_the_extents_and_stop_at_the_end_of_the_file() {
        let tree = sample();
        let slices = |offset, len| tree.slices(4, offset, len).collect::<Vec<_>>();
        let slice = |len, offset, origin| Slice {
            len,
            offset,
            origin,
        };
        assert_eq!(
            slices(8, 25),
            [
                slice(2, 8, Origin::Made(DocId(7))),
                slice(20, 100, Origin::Part(1)),
                slice(3, 50, Origin::Part(1)),
            ]
        );
        assert_eq!(slices(34, 100), [slice(1, 54, Origin::Part(1))]);
        for (offset, len) in [
            (35, 1),
            (u64::MAX, 1),
            (12, 0),
            (10, 0),
            (u64::MAX, u64::MAX),
        ] {
            assert_eq!(slices(offset, len), [], "{len} bytes at {offset}");
        }
    }
}
