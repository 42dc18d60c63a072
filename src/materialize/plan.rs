//! The plan of a run: made before it begins, without changing the target.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::compare::{State, Unsure};
use super::methods::{Cost, Methods};
use super::target::Target;
use super::{DOCUMENTS, MaterializeError, Options, Reflink, io_error};
use crate::folder::Entry;
use crate::layout::{
    FileKind, HF_DIRECTORY, JOINED_PATH, METADATA_GGUF_PATH, REGISTRY_PATH, TensorFile,
};
use crate::model::Model;
use crate::on_disk::OnDisk;
use crate::tree::Ino;
use crate::verify::known_form_of;

/// The files to write to a target, and those that are there already.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) model: &'a Model,
    pub(super) target: Target,
    /// Files to write, in the order of the model, without the documents.
    pub(super) missing: Vec<Ino>,
    /// How many documents will be written.
    documents: usize,
    /// Those of them that replace what has their name.
    pub(super) replaced: HashSet<Ino>,
    /// Chosen files that are complete already.
    pub(super) done: Vec<Ino>,
    /// Files that look complete but have another time, so that their bytes must be compared.
    pub(super) unsure: Vec<Unsure>,
    /// Whether each file of [`Layout::files`](crate::layout::Layout::files) is chosen, and so will
    /// be there after the run.
    pub(super) chosen: Vec<bool>,
    pub(super) options: Options,
    pub(super) methods: Methods,
    pub(super) cost: Cost,
}

impl<'a> Plan<'a> {
    /// Compares a target, which need not exist, with the chosen part of a model's tree, and works
    /// out what writing the rest will cost. Leaves nothing behind.
    pub fn new(
        model: &'a Model,
        target: &Path,
        options: &Options,
    ) -> Result<Self, MaterializeError> {
        let layout = model.layout();
        let selection = &options.selection;
        selection.check(layout)?;
        let target = Target::open(target, model.tree())?;
        if !options.force {
            check_form(model, target.path())?;
        }
        let methods = Methods::probe(model, target.nearest(), options)?;
        let mut plan = Self {
            model,
            target,
            missing: Vec::new(),
            documents: 0,
            replaced: HashSet::new(),
            done: Vec::new(),
            unsure: Vec::new(),
            chosen: vec![false; layout.files().len()],
            options: options.clone(),
            methods,
            cost: Cost::default(),
        };
        let mut chosen_experts = 0;
        for (index, file) in layout.files().iter().enumerate() {
            if layout.shows(file.kind) && selection.takes(file.kind) {
                plan.take(plan.find(&file.kind.path()))?;
                plan.chosen[index] = true;
                chosen_experts += usize::from(matches!(file.kind, FileKind::Expert { .. }));
            }
        }
        if chosen_experts == 0 && (selection.layers.is_some() || selection.experts.is_some()) {
            return Err(MaterializeError::NothingSelected);
        }
        if !selection.without_base && layout.show().base {
            plan.take(plan.find(METADATA_GGUF_PATH))?;
        }
        for ino in others(model) {
            plan.take(ino)?;
        }
        for (path, doc) in DOCUMENTS {
            let Some(ino) = model.tree().find(path) else {
                continue;
            };
            plan.check_document(ino, doc)?;
            // Beside files that are complete, they most often are, too.
            if !plan.missing.is_empty() {
                let bytes = model.tree().size(ino).unwrap_or(0);
                plan.documents += 1;
                plan.cost.copied += bytes;
                plan.cost.room += bytes.next_multiple_of(plan.methods.block);
            }
        }
        plan.look_at_others()?;
        plan.check_sharing()?;
        Ok(plan)
    }

    /// The number of files to write, not counting the two documents.
    pub fn files(&self) -> usize {
        self.missing.len()
    }

    /// The number of chosen files that are complete already.
    pub fn files_done(&self) -> usize {
        self.done.len()
    }

    /// The number of files that look complete but do not have the tree's time. A run compares their
    /// bytes first.
    pub fn files_to_compare(&self) -> usize {
        self.unsure.len()
    }

    /// Their bytes.
    pub fn bytes_to_compare(&self) -> u64 {
        let tree = self.model.tree();
        let sizes = self.unsure.iter().map(|unsure| tree.size(unsure.ino));
        sizes.flatten().sum()
    }

    /// Experts that the target's registry lists, but that are gone and not chosen. The registry
    /// will no longer list them.
    pub fn lost(&self) -> Result<Vec<String>, MaterializeError> {
        let (tree, there) = (self.model.tree(), self.target.there());
        let Some(ino) = tree.find(REGISTRY_PATH) else {
            return Ok(Vec::new());
        };
        // Another kind of file is reported elsewhere.
        let Ok(Entry::There(Ok(registry))) = there.read(tree, ino, tree.size(ino).unwrap_or(0))
        else {
            return Ok(Vec::new());
        };
        let registry: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&registry).unwrap_or_default();
        let mut lost = Vec::new();
        for (file, chosen) in self.model.layout().files().iter().zip(&self.chosen) {
            let stem = file.kind.stem();
            if !chosen
                && self.model.layout().shows(file.kind)
                && registry.contains_key(&stem)
                && matches!(
                    self.state(there, self.find(&file.kind.path()))?,
                    State::Missing
                )
            {
                lost.push(stem);
            }
        }
        Ok(lost)
    }

    /// The number of documents to write, as far as that is known before.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Bytes of the files to write, without the documents.
    pub fn bytes(&self) -> u64 {
        let tree = self.model.tree();
        let sizes = self.missing.iter().filter_map(|&ino| tree.size(ino));
        sizes.sum()
    }

    /// How many bytes will be shared, copied or left out, the documents included.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Bytes that may still be written to the target's file system.
    pub fn available_bytes(&self) -> u64 {
        self.methods.available
    }

    /// Why blocks of the model, or of some of its parts, will not be shared.
    pub fn refusal(&self) -> Option<&str> {
        self.methods.refusal.as_deref()
    }

    /// Bytes to write that lie at another place modulo 4096 than in the model, so that no file
    /// system can share their blocks.
    pub fn incongruent_bytes(&self) -> u64 {
        let tree = self.model.tree();
        let missing = self.missing.iter();
        missing.map(|&ino| tree.incongruent_bytes(ino)).sum()
    }

    /// Fails if the target cannot be written to, or if its file system has less room than the plan
    /// needs. In the latter case it first removes what killed runs have left there; a dry run only
    /// counts that.
    pub fn check_room(&self) -> Result<(), MaterializeError> {
        if self.missing.is_empty() {
            return Ok(());
        }
        if let Some(cause) = &self.methods.unwritable {
            let cause = cause
                .raw_os_error()
                .map_or_else(|| cause.kind().into(), io::Error::from_raw_os_error);
            return Err(io_error("create files in", self.target.nearest().path())(
                cause,
            ));
        }
        let (needed, mut available) = (self.cost.room, self.methods.available);
        if needed > available {
            available = self.room_without_leftovers()?;
        }
        self.compare_room(needed, available, !self.replaced.is_empty())
    }

    pub(super) fn compare_room(
        &self,
        needed: u64,
        available: u64,
        replacing: bool,
    ) -> Result<(), MaterializeError> {
        if needed <= available {
            return Ok(());
        }
        Err(MaterializeError::NoRoom {
            target: self.target.path().to_owned(),
            needed,
            available,
            replacing,
        })
    }

    fn check_sharing(&self) -> Result<(), MaterializeError> {
        match &self.methods.refusal {
            Some(reason)
                if self.options.reflink == Reflink::Always
                    && !self.missing.is_empty()
                    && !self.methods.is_untried =>
            {
                Err(MaterializeError::CannotShare {
                    target: self.target.path().to_owned(),
                    reason: reason.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn find(&self, path: &str) -> Ino {
        let found = self.model.tree().find(path);
        found.expect("the layout's files are in the tree")
    }

    /// Adds a chosen file to the plan.
    fn take(&mut self, ino: Ino) -> Result<(), MaterializeError> {
        match self.state(self.target.there(), ino)? {
            State::Done => self.done.push(ino),
            State::OtherTime => self.unsure.push(Unsure {
                ino,
                is_chosen: true,
            }),
            State::Folder => return Err(MaterializeError::FolderInTheWay(self.path(ino))),
            State::Foreign(_) if self.options.force => {
                self.replaced.insert(ino);
                self.plan_to_write(ino)?;
            }
            State::Foreign(reason) => return Err(self.foreign(ino, &reason)),
            State::Missing => self.plan_to_write(ino)?,
        }
        Ok(())
    }

    fn plan_to_write(&mut self, ino: Ino) -> Result<(), MaterializeError> {
        self.methods.add_cost(self.model, ino, &mut self.cost)?;
        self.missing.push(ino);
        Ok(())
    }

    pub(super) fn path(&self, ino: Ino) -> PathBuf {
        let path = self.model.tree().path(ino).unwrap_or_default();
        self.target.path().join(path)
    }

    pub(super) fn foreign(&self, ino: Ino, reason: &str) -> MaterializeError {
        MaterializeError::Foreign {
            path: self.path(ino),
            reason: reason.to_owned(),
        }
    }

    /// Finds files that were not chosen and look like files of this model. The documents would list
    /// them, but they may belong to another model of the same shape.
    fn look_at_others(&mut self) -> Result<(), MaterializeError> {
        let files = self.model.layout().files().iter().zip(&self.chosen);
        let shown = files.filter(|(file, _)| self.model.layout().shows(file.kind));
        let others = shown.filter(|(_, chosen)| !**chosen);
        let others: Vec<_> = others.map(|(f, _)| self.find(&f.kind.path())).collect();
        for ino in others {
            if matches!(self.state(self.target.there(), ino)?, State::OtherTime) {
                self.unsure.push(Unsure {
                    ino,
                    is_chosen: false,
                });
            }
        }
        Ok(())
    }

    /// Whether the documents list each file of `Layout::files`: those that were chosen, and those
    /// that other runs of this model have left there, as their time or their bytes tell.
    pub(super) fn present(
        &self,
        there: &OnDisk,
        same: &[Ino],
    ) -> Result<Vec<bool>, MaterializeError> {
        let files = self.model.layout().files().iter().zip(&self.chosen);
        let is_done = |file: &TensorFile| {
            let ino = self.find(&file.kind.path());
            let state = self.state(there, ino);
            state.map(|state| matches!(state, State::Done) || same.binary_search(&ino).is_ok())
        };
        files
            .map(|(file, &chosen)| {
                let is_shown = self.model.layout().shows(file.kind);
                Ok(chosen || (is_shown && is_done(file)?))
            })
            .collect()
    }
}

/// The files that no document lists: `model.gguf`, and those of the model directory.
fn others(model: &Model) -> impl Iterator<Item = Ino> + '_ {
    let tree = model.tree();
    tree.files().filter(|&ino| {
        let path = tree.path(ino).unwrap_or_default();
        path == JOINED_PATH || Path::new(&path).starts_with(HF_DIRECTORY)
    })
}

/// Fails if the target holds a tree of another form: files of two forms would never be one tree.
fn check_form(model: &Model, target: &Path) -> Result<(), MaterializeError> {
    match known_form_of(target) {
        Some(form) if form != model.layout().form() => Err(MaterializeError::OtherForm {
            target: target.to_owned(),
            form,
        }),
        _ => Ok(()),
    }
}
