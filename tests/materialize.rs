//! What only a program that uses the library can do to a target.

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use odmoe_fs::gguf::GgmlType;
use odmoe_fs::gguf::write::Writer;
use odmoe_fs::materialize::{MaterializeError, Options, Plan, Selection};
use odmoe_fs::model::Model;
use tempfile::TempDir;

/// A model of two layers with two experts each.
fn model(folder: &Path) -> Model {
    model_of(folder, 7)
}

/// The same, of this byte, and of a time of its own.
fn model_of(folder: &Path, byte: u8) -> Model {
    let mut writer = Writer::new();
    for layer in 0..2 {
        let name = format!("blk.{layer}.ffn_up_exps.weight");
        writer.tensor(&name, &[32, 4, 2], GgmlType::from_name("Q8_0").unwrap());
    }
    let written = writer.header();
    let path = folder.join("model.gguf");
    let mut bytes = written.bytes;
    bytes.resize(written.file_bytes as usize, byte);
    fs::write(&path, bytes).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(byte.into());
    let file = fs::File::open(&path).unwrap();
    file.set_modified(time).unwrap();
    Model::open(&path).unwrap()
}

fn layer(layers: &str) -> Options {
    Options {
        selection: Selection {
            layers: Some(layers.parse().unwrap()),
            ..Selection::default()
        },
        ..Options::default()
    }
}

fn run(plan: &Plan) -> Result<(), MaterializeError> {
    plan.run(NonZeroUsize::MIN, &AtomicBool::new(false), &|_| {})
        .map(drop)
}

#[test]
fn the_documents_list_what_another_run_has_written_since_the_plan_was_made() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    let first = Plan::new(&model, &out, &layer("0")).unwrap();
    let second = Plan::new(&model, &out, &layer("1")).unwrap();
    run(&first).unwrap();
    run(&second).unwrap();
    let registry = model.tree().find("experts/registry.json").unwrap();
    let written = fs::read(out.join("experts/registry.json")).unwrap();
    assert_eq!(written, model.read(registry).unwrap());
}

#[test]
fn the_documents_do_not_list_what_another_model_has_written_since_the_plan_was_made() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let [one, other] = [7, 8].map(|byte| {
        let folder = folder.path().join(byte.to_string());
        fs::create_dir(&folder).unwrap();
        model_of(&folder, byte)
    });
    let only_experts = |number| {
        let mut options = layer(number);
        options.selection.without_base = true;
        options
    };
    let first = Plan::new(&one, &out, &only_experts("0")).unwrap();
    let second = Plan::new(&other, &out, &only_experts("1")).unwrap();
    run(&first).unwrap();
    run(&second).unwrap();
    let registry = fs::read_to_string(out.join("experts/registry.json")).unwrap();
    assert!(registry.contains("layer_01_expert_000"), "{registry}");
    assert!(!registry.contains("layer_00_expert_000"), "{registry}");
}

#[test]
fn experts_of_an_earlier_run_whose_time_differs_are_listed_once_their_bytes_were_compared() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    run(&Plan::new(&model, &out, &layer("0")).unwrap()).unwrap();
    let touched = out.join("experts/layer_00_expert_001.safetensors");
    let file = fs::File::open(&touched).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    run(&Plan::new(&model, &out, &layer("1")).unwrap()).unwrap();
    let registry = fs::read_to_string(out.join("experts/registry.json")).unwrap();
    assert!(registry.contains("layer_00_expert_001"), "{registry}");
    let modified = touched.metadata().unwrap().modified().unwrap();
    assert_eq!(modified, model.source().modified());
}

#[test]
fn two_plans_of_the_same_files_both_succeed() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    let plans = [(); 2].map(|()| Plan::new(&model, &out, &Options::default()).unwrap());
    plans.iter().for_each(|plan| run(plan).unwrap());
}

#[test]
fn a_file_that_appears_after_the_plan_was_made_is_not_overwritten() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    let plan = Plan::new(&model, &out, &Options::default()).unwrap();
    let path = out.join("experts/layer_01_expert_001.safetensors");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, "mine").unwrap();
    let error = run(&plan).unwrap_err().to_string();
    assert!(error.contains("layer_01_expert_001.safetensors"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_run_that_is_stopped_leaves_no_unfinished_file() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    let plan = Plan::new(&model, &out, &Options::default()).unwrap();
    let stopped = plan.run(NonZeroUsize::MIN, &AtomicBool::new(true), &|_| {});
    assert!(matches!(stopped, Err(MaterializeError::Stopped)));
    for directory in ["base_model", "experts"] {
        assert_eq!(out.join(directory).read_dir().unwrap().count(), 0);
    }
}

#[test]
fn a_model_that_changes_after_the_plan_was_made_gives_no_file() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("out"));
    let plan = Plan::new(&model, &out, &Options::default()).unwrap();
    let part = fs::File::options()
        .append(true)
        .open(folder.path().join("model.gguf"));
    part.unwrap().set_len(1).unwrap();
    let error = run(&plan).unwrap_err().to_string();
    assert!(error.contains("has changed"), "{error}");
    for directory in ["base_model", "experts"] {
        assert_eq!(out.join(directory).read_dir().unwrap().count(), 0);
    }
}

/// What lies in a folder, by name.
fn names(folder: &Path) -> Vec<String> {
    let entries = folder.read_dir().unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_target_that_becomes_a_link_after_the_plan_was_made_is_not_written_through() {
    for is_there in [true, false] {
        let folder = TempDir::new().unwrap();
        let (model, out) = (model(folder.path()), folder.path().join("out"));
        let elsewhere = folder.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        if is_there {
            fs::create_dir(&out).unwrap();
        }
        let plan = Plan::new(&model, &out, &Options::default()).unwrap();
        if is_there {
            fs::rename(&out, folder.path().join("moved")).unwrap();
        }
        symlink(&elsewhere, &out).unwrap();
        let error = run(&plan).unwrap_err();
        assert_eq!(names(&elsewhere), [""; 0], "{error}");
        if is_there {
            assert!(matches!(error, MaterializeError::Replaced(path) if path == out));
            assert_eq!(names(&folder.path().join("moved/experts")), [""; 0]);
        } else {
            assert!(matches!(error, MaterializeError::Link(path) if path == out));
        }
    }
}

#[test]
fn a_folder_above_the_target_that_becomes_a_link_is_not_written_through() {
    for below in ["out", "a/b/out"] {
        let folder = TempDir::new().unwrap();
        let model = model(folder.path());
        let [above, elsewhere] = ["above", "elsewhere"].map(|name| folder.path().join(name));
        fs::create_dir(&above).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        let plan = Plan::new(&model, &above.join(below), &Options::default()).unwrap();
        fs::rename(&above, folder.path().join("moved")).unwrap();
        symlink(&elsewhere, &above).unwrap();
        let error = run(&plan).unwrap_err();
        assert!(matches!(error, MaterializeError::Replaced(_)), "{error}");
        assert_eq!(names(&elsewhere), [""; 0]);
    }
}

#[test]
fn a_name_on_the_way_to_the_target_that_becomes_a_link_is_not_followed() {
    let folder = TempDir::new().unwrap();
    let (model, out) = (model(folder.path()), folder.path().join("a/b/out"));
    let elsewhere = folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let plan = Plan::new(&model, &out, &Options::default()).unwrap();
    fs::create_dir(folder.path().join("a")).unwrap();
    symlink(&elsewhere, folder.path().join("a/b")).unwrap();
    let error = run(&plan).unwrap_err();
    assert!(matches!(error, MaterializeError::Link(path) if path.ends_with("a/b")));
    assert_eq!(names(&elsewhere), [""; 0]);
}

#[test]
fn a_target_may_be_named_in_any_way() {
    let folder = TempDir::new().unwrap();
    let model = model(folder.path());
    fs::create_dir(folder.path().join("real")).unwrap();
    symlink("real", folder.path().join("link")).unwrap();
    for name in [
        "real/../out",
        "link/out",
        "./new/out/",
        "link/../out/./x",
        "link",
    ] {
        let out = folder.path().join(name);
        run(&Plan::new(&model, &out, &Options::default()).unwrap()).unwrap();
        assert_eq!(names(&out.join("experts")).len(), 4 + 1, "{name}");
    }
}
