use super::formats::SIGNATURES;
use super::texts::{ADDRESS, LOG_IN};
use super::*;

fn of(head: &[u8]) -> Option<Foreign> {
    match recognise(head, head.len() as u64)? {
        Problem::Foreign(foreign) => Some(foreign),
        _ => None,
    }
}

fn what(head: &[u8]) -> String {
    of(head).map_or_else(String::new, |foreign| foreign.what.into_owned())
}

fn advice(head: &[u8]) -> String {
    of(head).map_or_else(String::new, |foreign| foreign.advice.into_owned())
}

#[test]
fn every_signature_is_found_at_its_place_and_nowhere_else() {
    for (at, bytes, expected, _) in SIGNATURES {
        let mut head = vec![0xf5; 1024];
        head[*at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(what(&head), *expected);
        head.insert(0, 0xf5);
        assert_eq!(of(&head), None, "{expected}, moved");
        // Too little of a longer file is not judged.
        assert!(recognise(&head[..100], 1 << 40).is_none());
    }
}

#[test]
fn a_gguf_and_its_beginning_are_not_foreign() {
    for head in [&b"GGUF\x03\0\0\0"[..], b"GGUF", b"GGU", b"G"] {
        assert_eq!(of(head), None);
    }
    assert!(matches!(recognise(b"", 0), Some(Problem::EmptyFile)));
    assert!(recognise(b"", 10).is_none()); // it shrank while we looked
}

#[test]
fn pointers_of_git_say_what_fetches_the_file() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7c\nsize 7516192768\n";
    assert_eq!(
        what(pointer),
        "a Git LFS pointer to a file of 7516192768 bytes"
    );
    assert!(advice(pointer).contains("`git lfs pull`"));
    assert_eq!(
        what(b"version https://git-lfs.github.com/spec/v1\nsize many\n"),
        "a Git LFS pointer to a file"
    );
    for annex in [
        "/annex/objects/SHA256E-s7--00ff.gguf\n",
        "../../.git/annex/objects/aa/bb/SHA256E-s7--00ff.gguf/SHA256E-s7--00ff.gguf",
    ] {
        assert_eq!(what(annex.as_bytes()), "a git-annex pointer");
    }
}

#[test]
fn pages_are_recognised_whatever_comes_first() {
    for page in [
        "<!DOCTYPE html><html>",
        "\u{feff}\n  <!doctype HTML>\n<title>Log in</title>",
        "<?xml version='1.0'?>\n<!-- hello -->\n<html xmlns='...'>",
        "<HTML><BODY>504 Gateway Time-out",
    ] {
        assert!(what(page.as_bytes()).starts_with("a web page"), "{page}");
    }
    let long = format!("<!doctype html>{}", "é".repeat(HEAD_BYTES));
    assert!(what(long.as_bytes()).starts_with("a web page"));
}

#[test]
fn answers_of_servers_are_quoted_with_what_they_call_for() {
    for (text, kind, expected) in [
        ("Invalid username or password.", "a text", LOG_IN),
        ("Entry not found", "a text", ADDRESS),
        ("404: Not Found", "a text", ADDRESS),
        (
            r#"{"error":"Access to model a/b is restricted. You must be authenticated."}"#,
            "a JSON text",
            LOG_IN,
        ),
        (
            "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
            "an XML text",
            "get a new link, and download it again",
        ),
        ("hello", "a text", THE_MODEL_ITSELF),
    ] {
        let foreign = of(text.as_bytes()).unwrap();
        assert!(foreign.what.starts_with(kind), "{foreign:?}");
        assert_eq!(foreign.advice, expected, "{text}");
    }
    assert_eq!(what(b"Entry not found\n"), r#"a text ("Entry not found")"#);
    let long = "word ".repeat(100);
    let shown = what(long.as_bytes());
    assert!(
        shown.ends_with("word…\")") && shown.chars().count() < 120,
        "{shown}"
    );
    // Only what is short enough for an answer is taken for one.
    let story = format!("It was not found. {}", "And so on. ".repeat(500));
    assert_eq!(advice(story.as_bytes()), THE_MODEL_ITSELF);
}

#[test]
fn a_manifest_of_ollama_names_the_blob_of_the_model() {
    let layer = |kind: &str, hash: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.ollama.image.{kind}","digest":"sha256:{hash}","size":7}}"#
        )
    };
    let of_layers =
        |layers: &[String]| format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
    let text = of_layers(&[layer("template", "11"), layer("model", "22aF")]);
    assert_eq!(what(text.as_bytes()), "a manifest of Ollama");
    assert!(advice(text.as_bytes()).contains("blobs/sha256-22aF "));
    // Nothing that is no hash becomes a path.
    let text = of_layers(&[layer("model", "../../x")]);
    assert!(what(text.as_bytes()).starts_with("a JSON text"));
}

#[test]
fn archives_that_are_zip_files_are_told_apart_by_their_first_entry() {
    let zip = |name: &str| {
        let mut bytes = b"PK\x03\x04".to_vec();
        bytes.resize(30, 0);
        bytes.extend(name.as_bytes());
        what(&bytes)
    };
    assert_eq!(zip("archive/data.pkl"), "a PyTorch checkpoint");
    assert_eq!(zip("pytorch_model-00001/data/0"), "a PyTorch checkpoint");
    assert_eq!(zip("arr_0.npy"), "a NumPy archive");
    assert_eq!(zip("model.gguf"), "a zip archive");
}

#[test]
fn programs_may_hold_a_model() {
    let mut windows = b"MZ".to_vec();
    windows.resize(0x3c, 0);
    windows.extend([0x80, 0, 0, 0]);
    assert_eq!(of(&windows), None);
    windows.resize(0x80, 0);
    windows.extend(b"PE\0\0");
    assert_eq!(what(&windows), "a program");
    assert_eq!(what(b"\x7fELF\x02\x01"), "a program");
    let llamafile = b"MZqFpD='\n\n\0\x10\0\xf8";
    assert!(what(llamafile).starts_with("a llamafile"));
    assert!(advice(llamafile).contains("unzip"));
}

#[test]
fn safetensors_files_have_a_length_that_fits() {
    let file = |length: u64, json: &[u8]| {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(json);
        what(&bytes)
    };
    let json = br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    let length = json.len() as u64;
    assert_eq!(file(length, json), "a safetensors file");
    assert_eq!(file(2, b"{}"), "a safetensors file");
    assert_eq!(file(length + 1, json), "");
    assert_eq!(file(u64::MAX, json), "");
}

#[test]
fn a_gguf_behind_something_else_is_found() {
    let mut bytes = vec![0xf5; 1000];
    bytes.extend(b"GGUF\x09\0\0\0");
    assert_eq!(of(&bytes), None);
    bytes.extend(b"GGUF\x03\0\0\0");
    assert_eq!(
        what(&bytes),
        "a file in which a GGUF begins only at byte 1008"
    );
    assert!(advice(&bytes).contains("`tail -c +1009 FILE >model.gguf`"));
}

#[test]
fn uncertain_contents_are_not_named() {
    for head in [
        &b"\xf5\xf6\xf7\xf8 and so on"[..],
        b"GGUX\x03\0\0\0",
        b"text with \x1b[2J an escape",
        b"\xff\xfe\xf5\xf6\xf7",
        b"  \n ",
    ] {
        assert_eq!(of(head), None, "{head:?}");
    }
    let zeros = recognise(&[0; 4096], 1 << 40);
    assert!(matches!(zeros, Some(Problem::Zeros(4096))));
    let importance = b"\x99\0\0\0\x15\0\0\0blk.0.attn_k.weight";
    assert_eq!(what(importance), "an importance matrix of llama.cpp");
    let wide: Vec<u8> = "\u{feff}Entry not found"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    assert_eq!(what(&wide), "a text in UTF-16");
}
