use std::ffi::OsString;
use std::fs::File;
use std::io::BufReader;

use super::plan::Tensor;
use super::weights::{SplitMix64, f16_bits};
use super::*;
use crate::explain::Explain;
use crate::gguf::{Header, ModelHeader};

/// The name of the toys here, whole or in parts.
fn write(toy: &Toy, folder: &Path) -> Result<Vec<PathBuf>, ToyError> {
    toy.write(&folder.join("toy.gguf"), &AtomicBool::new(false), &|_| {})
}

/// A toy of a few hundred kilobytes at most.
fn tiny() -> Toy {
    Toy {
        layers: 1,
        experts: 2,
        dim: 256,
        ffn_dim: 256,
        vocab: 256,
        ggml_type: GgmlType::from_name("Q4_0").unwrap(),
        ..Toy::default()
    }
}

fn header(path: &Path) -> (Header, u64) {
    let bytes = fs::metadata(path).unwrap().len();
    let file = BufReader::new(File::open(path).unwrap());
    (Header::read(file, bytes).unwrap(), bytes)
}

fn data_of(paths: &[PathBuf], tensor: &str) -> Vec<u8> {
    let found = paths.iter().find_map(|path| {
        let (header, _) = header(path);
        let info = header.tensors.iter().find(|t| t.name == tensor)?;
        let start = info.offset as usize;
        Some(fs::read(path).unwrap()[start..start + info.bytes as usize].to_vec())
    });
    found.unwrap()
}

fn listing(folder: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|e| e.unwrap().file_name()).collect()
}

#[test]
fn the_reference_naming_is_that_of_the_reference_converter() {
    let plan = Plan::new(&Toy {
        naming: Naming::Reference,
        ..Toy::default()
    })
    .unwrap();
    let tensors: Vec<_> = plan.tensors.iter().map(|t| (&*t.name, &*t.dims)).collect();
    assert_eq!(tensors.len(), 40);
    for (at, name, dims) in [
        (0, "token_embd.weight", &[512, 1000][..]),
        (1, "output.weight", &[1000, 512]),
        (2, "blk.0.attn_norm.weight", &[512]),
        (6, "blk.0.attn_output.weight", &[512, 512]),
        (7, "blk.0.ffn_norm.weight", &[512]),
        (8, "blk.0.ffn.gate.weight", &[4, 512]),
        (9, "blk.0.ffn.experts.0.w1.weight", &[1024, 512]),
        (10, "blk.0.ffn.experts.0.w2.weight", &[512, 1024]),
        (21, "blk.1.attn_norm.weight", &[512]),
        (39, "blk.1.ffn.experts.3.w3.weight", &[1024, 512]),
    ] {
        assert_eq!(tensors[at], (name, dims));
    }
    let bytes: u64 = plan.tensors.iter().map(Tensor::bytes).sum();
    assert_eq!(bytes, 62_840_832);
    let keys: Vec<_> = plan.key_values.iter().map(|(key, _)| &**key).collect();
    assert_eq!(keys.len(), 8);
    assert_eq!(keys[0], "general.architecture");
    assert_eq!(keys[7], "kimi.num_active_experts");
}

#[test]
fn every_naming_and_type_reads_back_as_planned() {
    let stacked = Toy::types().map(|t| (t, Naming::Stacked));
    let q8_0 = GgmlType::from_name("Q8_0").unwrap();
    let namings = [Naming::Fused, Naming::PerExpert, Naming::Reference].map(|n| (q8_0, n));
    for (ggml_type, naming) in stacked.chain(namings) {
        let folder = tempfile::tempdir().unwrap();
        let toy = Toy {
            ggml_type,
            naming,
            ..tiny()
        };
        let files = write(&toy, folder.path()).unwrap();
        assert_eq!(files, [folder.path().join("toy.gguf")]);
        let (header, bytes) = header(&files[0]);
        let plan = Plan::new(&toy).unwrap();
        assert_eq!(header.key_values.len(), plan.key_values.len());
        assert_eq!(header.tensors.len(), plan.tensors.len());
        for (read, planned) in header.tensors.iter().zip(&plan.tensors) {
            assert_eq!(read.name, planned.name);
            assert_eq!(read.dims(), planned.dims);
            assert_eq!(read.ggml_type, planned.ggml_type);
        }
        let last = header.tensors.last().unwrap();
        assert_eq!((last.offset + last.bytes).next_multiple_of(32), bytes);
    }
}

#[test]
fn the_types_of_a_toy_are_those_of_gguf_py_that_files_hold() {
    let (toys, others): (Vec<_>, Vec<_>) =
        GGML_TYPES.iter().partition(|t| Elements::of(t).is_some());
    assert_eq!(toys.len(), 32);
    let gguf_py = others.iter().filter(|t| t.id <= 41).map(|t| t.name);
    assert_eq!(gguf_py.collect::<Vec<_>>(), ["Q8_1", "Q8_K"]);
}

#[test]
fn the_bytes_depend_on_seed_and_tensor_and_not_on_the_split() {
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let one = write(&tiny(), folders[0].path()).unwrap();
    let split = Toy { parts: 3, ..tiny() };
    let split = write(&split, folders[1].path()).unwrap();
    let other_seed = Toy { seed: 1, ..tiny() };
    let other_seed = write(&other_seed, folders[2].path()).unwrap();
    let mut seen = std::collections::HashSet::new();
    for tensor in Plan::new(&tiny()).unwrap().tensors {
        let data = data_of(&one, &tensor.name);
        assert_eq!(data, data_of(&split, &tensor.name), "{}", tensor.name);
        assert_ne!(data, data_of(&other_seed, &tensor.name), "{}", tensor.name);
        assert!(seen.insert(data), "{} repeats another tensor", tensor.name);
    }
}

#[test]
fn parts_have_the_right_names_and_make_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = Plan::new(&tiny()).unwrap().tensors.len() as u16;
    for parts in [2, 3, tensors] {
        let files = write(&Toy { parts, ..tiny() }, folder.path()).unwrap();
        assert_eq!(files.len(), usize::from(parts));
        let name = format!("toy-00002-of-{parts:05}.gguf");
        assert_eq!(files[1], folder.path().join(name));
        let headers: Vec<_> = files.iter().map(|path| header(path)).collect();
        assert!(headers.iter().all(|(h, _)| !h.tensors.is_empty()));
        assert!(headers[1..].iter().all(|(h, _)| h.key_values.len() == 3));
        let model = ModelHeader::join(headers).unwrap();
        assert_eq!(model.tensors.len(), usize::from(tensors));
    }
    let too_many = Toy {
        parts: tensors + 1,
        ..tiny()
    };
    let hint = write(&too_many, folder.path()).unwrap_err().hint().unwrap();
    assert!(hint.contains(&format!("--split {tensors}")), "{hint}");
}

#[test]
fn parts_are_of_about_equal_size() {
    let plan = Plan::new(&Toy::default()).unwrap();
    for range in plan.parts(3) {
        let bytes: u64 = plan.tensors[range].iter().map(Tensor::bytes).sum();
        assert!((16_000_000..26_000_000).contains(&bytes), "{bytes}");
    }
}

/// Why such a toy is refused; nothing is written.
fn refused(toy: &Toy) -> ToyError {
    let folder = tempfile::tempdir().unwrap();
    let error = write(toy, folder.path()).unwrap_err();
    assert!(listing(folder.path()).is_empty());
    error
}

#[test]
fn rows_of_broken_blocks_are_refused_with_the_tensor_and_the_option() {
    let (dim, ffn_dim, vocab) = (100, 100, 100);
    let reference = Toy {
        naming: Naming::Reference,
        ..tiny()
    };
    for (toy, tensor, option) in [
        (Toy { dim, ..tiny() }, "token_embd.weight", "--dim"),
        (
            Toy { ffn_dim, ..tiny() },
            "blk.0.ffn_down_exps.weight",
            "--ffn-dim",
        ),
        (Toy { vocab, ..reference }, "output.weight", "--vocab"),
    ] {
        let error = refused(&toy);
        let message = error.to_string();
        assert!(message.starts_with(tensor) && message.ends_with("Q4_0 blocks of 32"));
        assert_eq!(
            error.hint().unwrap(),
            format!("make {option} a multiple of 32")
        );
    }
}

#[test]
fn numbers_out_of_range_and_types_that_no_file_holds_are_refused() {
    for (toy, message, hint) in [
        (
            Toy {
                layers: 0,
                ..tiny()
            },
            "--layers 0 is out of range",
            "choose from 1 to 512",
        ),
        (
            Toy {
                experts: 1025,
                ..tiny()
            },
            "--experts 1025 is out of range",
            "choose from 1 to 1024",
        ),
        (
            Toy {
                dim: u32::MAX,
                ffn_dim: u32::MAX,
                ..tiny()
            },
            "--dim 4294967295 is out of range",
            "choose from 1 to 16384",
        ),
        (
            Toy { parts: 0, ..tiny() },
            "--split 0 is out of range",
            "choose from 1 to 65535",
        ),
        (
            Toy {
                ggml_type: GgmlType::from_name("Q8_K").unwrap(),
                ..tiny()
            },
            "a toy cannot be made of Q8_K",
            "choose a type that `odmoe-fs toy --help` lists",
        ),
    ] {
        let error = refused(&toy);
        assert_eq!(error.to_string(), message);
        assert_eq!(error.hint().unwrap(), hint);
    }
}

#[test]
fn no_file_is_overwritten_and_nothing_else_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let mine = folder.path().join("toy-00002-of-00003.gguf");
    fs::write(&mine, "mine").unwrap();
    let error = write(&Toy { parts: 3, ..tiny() }, folder.path()).unwrap_err();
    assert!(matches!(error, ToyError::Exists(path) if path == mine));
    assert_eq!(fs::read(&mine).unwrap(), b"mine");
    assert_eq!(listing(folder.path()), ["toy-00002-of-00003.gguf"]);
}

#[test]
fn one_that_is_stopped_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(true);
    let stopped = tiny().write(&folder.path().join("toy.gguf"), &stop, &|_| {});
    assert!(matches!(stopped, Err(ToyError::Stopped)));
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn the_generator_is_splitmix64() {
    let mut random = SplitMix64(1_234_567);
    assert_eq!(random.next(), 6_457_827_717_110_365_317);
    assert_eq!(random.next(), 3_203_168_211_198_807_973);
}

#[test]
fn f16_is_cut_from_f32() {
    for (x, bits) in [
        (1.0, 0x3c00),
        (-2.5, 0xc100),
        (0.1, 0x2e66),
        (0.0, 0),
        (6.2e-5, 0x0410),
        (-6.0e-5, 0x83ee),
    ] {
        assert_eq!(f16_bits(x), bits, "{x}");
    }
}
