//! `demo`: the whole way on a toy model, in a temporary folder that is removed again.
//!
//! It runs this same program as a user would, and checks what it reads through the mount against
//! the model's own bytes.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use odmoe_fs::explain::Explain;
use odmoe_fs::gguf::GgmlType;
use odmoe_fs::model::Model;
use odmoe_fs::mounts::{UnmountError, unmount};
use odmoe_fs::toy::Toy;
use rustix::fs::Mode;
use serde_json::Value;

use super::failure::{Context, Failure, Result};
use super::screen::Screen;
use super::{Stop, print, text};

/// Show the whole way on a toy model: mount, list, read one expert, check it, unmount
///
/// Works in a temporary folder and removes it again.
#[derive(clap::Args)]
pub struct DemoArgs {}

/// The expert that is read.
const EXPERT_FILE: &str = "layer_01_expert_002";
const LAYER: u64 = 1;
const EXPERT: u64 = 2;

pub fn run(_: &DemoArgs) -> Result<()> {
    let stop = Stop::on_signals()?;
    stop.explain(demo(&stop))
}

/// A folder that only this user may enter, whatever the umask, and that is removed when dropped.
/// From here on, so is what this process makes: a umask can deny us our own files, too.
pub fn temporary_folder(prefix: &str, within: &Path) -> Result<tempfile::TempDir> {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    tempfile::Builder::new()
        .prefix(prefix)
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(within)
        .with_context(|| format!("cannot make a temporary folder in {within:?}"))
}

fn demo(stop: &Stop) -> Result<()> {
    let folder = temporary_folder("odmoe-demo-", &std::env::temp_dir())
        .map_err(|e| e.hint("set TMPDIR to a folder that you can write to"))?;
    let model = folder.path().join("toy.gguf");
    let toy = Toy {
        layers: 2,
        experts: 4,
        dim: 256,
        ffn_dim: 512,
        vocab: 500,
        ggml_type: GgmlType::from_name("Q4_K").context("Q4_K is a type")?,
        ..Toy::default()
    };
    toy.write(&model, &stop.flag, &|_| {})?;
    let bytes = model.metadata()?.len();
    print(&Screen::of_stdout().fit(&format!(
        "A toy model of 2 layers with 4 experts each, in Q4_K: toy.gguf, {}\n\n",
        text::size(bytes)
    )))?;

    let directory = folder.path().join("mnt");
    fs::create_dir(&directory)?;
    print("$ odmoe-fs mount toy.gguf mnt\n")?;
    match Mounted::new(&model, &directory) {
        Ok(mounted) => {
            show(&model, &directory)?;
            print("\n$ odmoe-fs umount mnt\n")?;
            mounted.unmount()?;
        }
        Err(e) => {
            stop.check()?;
            print("\n$ odmoe-fs materialize toy.gguf out\n")?;
            let files = folder.path().join("out");
            run_self(&["materialize".as_ref(), model.as_ref(), files.as_ref()])?;
            show(&model, &files)?;
            return Err(e.context("mounting failed, so the same tree was shown as real files"));
        }
    }
    folder
        .close()
        .context("cannot remove the temporary folder")?;
    // A Ctrl-C waits until here, where all is clean again.
    stop.check().context("everything was removed again")?;
    print("Everything was removed again. Next:\n  odmoe-fs mount MODEL.gguf DIR\n")
}

fn show(toy: &Path, root: &Path) -> Result<()> {
    show_tree(root)?;
    check_expert(toy, root)
}

/// A mount that does not outlive the demo.
pub struct Mounted {
    directory: PathBuf,
}

impl Mounted {
    pub fn new(model: &Path, directory: &Path) -> Result<Self> {
        let mounted = Self {
            directory: directory.to_owned(),
        };
        run_self(&["mount".as_ref(), model.as_ref(), directory.as_ref()])?;
        Ok(mounted)
    }

    pub fn unmount(self) -> Result<()> {
        run_self(&["umount".as_ref(), self.directory.as_ref()])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        match unmount(&self.directory, true) {
            // It was unmounted, or never mounted.
            Ok(_) | Err(UnmountError::NotOurs(_)) => {}
            Err(e) => tracing::error!("{}", e.line()),
        }
    }
}

/// Runs this program with other arguments, and fails with what it said.
fn run_self(arguments: &[&std::ffi::OsStr]) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program itself")?;
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        return Err(Failure::parsed(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}

fn show_tree(root: &Path) -> Result<()> {
    let root_name = root.file_name().unwrap_or_default().to_string_lossy();
    let mut out = format!("{root_name}/\n");
    for directory in sorted(root)? {
        out += &format!("  {}/\n", name_of(&directory));
        let files = sorted(&directory)?.into_iter().map(|file| {
            let size = text::count(file.metadata()?.len());
            Ok([
                format!("    {:<34}", name_of(&file)),
                format!("{size:>9} bytes"),
            ])
        });
        out += &Screen::of_stdout().whole_table(files.collect::<Result<_>>()?);
    }
    print(&out)
}

fn sorted(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Reads an expert as a loader does, and compares every tensor with where the GGUF's own header
/// says that the expert's slice of it lies.
fn check_expert(toy: &Path, root: &Path) -> Result<()> {
    let file = fs::read(root.join(format!("experts/{EXPERT_FILE}.safetensors")))?;
    let (length, rest) = file
        .split_first_chunk::<8>()
        .context("the file has no header")?;
    let (json, payload) = rest
        .split_at_checked(u64::from_le_bytes(*length) as usize)
        .context("the header is cut short")?;
    let header: Value = serde_json::from_slice(json).map_err(|e| Failure::unknown(&e))?;
    let sources = header["__metadata__"]["odmoe.tensors"].as_str();
    let sources = sources.context("there is no odmoe.tensors")?;
    let sources: Value = serde_json::from_str(sources).map_err(|e| Failure::unknown(&e))?;

    let model = Model::open(toy)?;
    let gguf = fs::File::open(toy)?;
    let mut out = format!("\nexperts/{EXPERT_FILE}.safetensors holds\n");
    for (name, word) in [("w1", "gate"), ("w2", "down"), ("w3", "up")] {
        let name = format!("{name}.weight");
        let gguf_name = format!("blk.{LAYER}.ffn_{word}_exps.weight");
        let mut tensors = model.layout().model().tensors.iter();
        let tensor = tensors.find(|tensor| tensor.info.name == gguf_name);
        let info = &tensor.context("the toy model lacks a tensor")?.info;
        let bytes = info.bytes / info.ne[2];
        let offset = info.offset + EXPERT * bytes;

        let mut expected = vec![0; bytes as usize];
        gguf.read_exact_at(&mut expected, offset)?;
        let at = |n| header[&name]["data_offsets"][n].as_u64().unwrap_or(0) as usize;
        let found = payload.get(at(0)..at(1));
        if found != Some(&expected[..]) {
            let message = format!("{name} differs from {gguf_name}: this is a bug in odmoe-fs");
            return Err(Failure::new(message).hint("please report it"));
        }
        out += &format!(
            "  {name}  {} {:<9}  {} bytes, the same as toy.gguf at {}\n",
            info.ggml_type,
            sources[&name]["shape"].to_string(),
            text::count(bytes),
            text::count(offset),
        );
    }
    print(&Screen::of_stdout().fit(&out))
}
