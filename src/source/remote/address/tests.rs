use super::*;

fn parse(text: &str) -> Result<Address, AddressError> {
    Address::parse(text, false)
}

#[test]
fn addresses_of_all_kinds_are_shown_as_they_were_written() {
    for text in [
        "https://h.example/a/b-00001-of-00002.gguf",
        "http://127.0.0.1:8080/m.gguf",
        "http://[::1]:8080/m.gguf",
        "http://localhost/m.gguf",
        "s3://bucket/some key/m.gguf",
        "gs://bucket/m.gguf",
        "az://container/a/m.gguf",
        "hf://org/repo/m.gguf",
        "hf://org/repo@5f2a/Q4/m.gguf",
    ] {
        let address = parse(text).unwrap();
        assert_eq!(address.to_string(), text);
        assert_eq!(format!("{address:?}"), text);
        assert!(is_url(Path::new(text)));
    }
    assert_eq!(
        parse("hf://o/r@refs/pr/3/m.gguf").unwrap().to_string(),
        parse("hf://o/r@refs%2Fpr%2F3/m.gguf").unwrap().to_string()
    );
    let link = "https://huggingface.co/o/r/resolve/main/m.gguf";
    let copied = parse(&format!("{link}?download=true")).unwrap();
    assert_eq!(copied, parse(link).unwrap());
}

#[test]
fn nothing_secret_is_taken_from_a_command_line() {
    for text in [
        "https://user:secret@h.example/m.gguf",
        "https://secret@h.example/m.gguf",
        "https://user:secret@h.example:x/m.gguf",
        "s3://key:secret@bucket/m.gguf",
        "hf://user:secret@org/repo/m.gguf",
    ] {
        assert_eq!(parse(text), Err(AddressError::Password), "{text}");
    }
    for text in [
        "https://h.example/m.gguf?X-Amz-Signature=secret",
        "https://h.example/m.gguf?sig=secret#x",
        "hf://org/repo/m.gguf?token=secret",
        "s3://bucket/m.gguf?X-Amz-Signature=secret",
    ] {
        assert_eq!(parse(text), Err(AddressError::Query), "{text}");
    }
    for text in ["https://h.example:x/m.gguf?secret", "https://?secret"] {
        assert!(!format!("{:?}", parse(text).unwrap_err()).contains("secret"));
    }
}

#[test]
fn what_is_not_the_address_of_a_file_is_refused() {
    for text in [
        "ftp://h/m.gguf",
        "https://h.example/",
        "https://h.example/models/",
        "https://huggingface.co/o/r/blob/main/m.gguf",
        "http://h.example/m.gguf",
        "http://10.0.0.1/m.gguf",
        "s3://bucket",
        "s3://bucket/folder/",
        "s3:///m.gguf",
        "hf://org/repo",
        "hf://org/m.gguf",
        "hf://org/repo@/m.gguf",
        "hf://org/repo/../m.gguf",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    assert!(Address::parse("http://h.example/m.gguf", true).is_ok());
    for path in ["m.gguf", "/a/b.gguf", "a:/b", "C:\\m.gguf", "1x://h/m"] {
        assert!(!is_url(Path::new(path)), "{path}");
    }
}

#[test]
fn a_file_of_urls_may_hold_signatures_and_shows_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("urls");
    let url = "https://h.example/m%20n-00001-of-00002.gguf?X-Amz-Signature=secret";
    std::fs::write(&path, format!("# parts\n\n  {url}\n")).unwrap();
    let addresses = Address::of_file(&path, false).unwrap();
    let [address] = &addresses[..] else {
        panic!("one URL");
    };
    assert!(address.is_signed());
    assert!(!format!("{address} {address:?}").contains("secret"));
    assert_eq!(address.file_name(), "m n-00001-of-00002.gguf");
    let sibling = address.sibling("m n-00002-of-00002.gguf");
    let expected = "https://h.example/m%20n-00002-of-00002.gguf";
    assert_eq!(sibling.to_string(), expected);
    assert!(!sibling.is_signed());
    std::fs::write(&path, "# none\n").unwrap();
    let empty = Address::of_file(&path, false);
    assert_eq!(empty, Err(AddressError::EmptyFile(path)));
}

#[test]
fn siblings_lie_in_the_same_folder_and_at_the_same_commit() {
    let sibling = |text: &str| parse(text).unwrap().sibling("b.gguf").to_string();
    assert_eq!(sibling("s3://bucket/x/a.gguf"), "s3://bucket/x/b.gguf");
    assert_eq!(sibling("gs://bucket/a.gguf"), "gs://bucket/b.gguf");
    let address = parse("hf://o/r/Q4/a.gguf").unwrap().at_commit("5f2a");
    let sibling = address.sibling("b.gguf");
    assert_eq!(sibling.to_string(), "hf://o/r@5f2a/Q4/b.gguf");
}

#[test]
fn the_hubs_urls_have_the_revision_escaped() {
    let endpoint = Url::parse("http://127.0.0.1:1/").unwrap();
    let url = hub_url(&endpoint, "o/r", "refs/pr/1", "a b/m.gguf");
    let expected = "http://127.0.0.1:1/o/r/resolve/refs%2Fpr%2F1/a%20b/m.gguf";
    assert_eq!(url.as_str(), expected);
}
