//! Tokens and keys, from the environment or the files where other programs keep them.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use reqwest::header::HeaderValue;

use super::fault::Fault;

/// A variable of the environment, unless it is empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn home() -> Option<PathBuf> {
    env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

/// A path of the environment, from the folder in which the program was started: it reads such files
/// again when what was in them expires, and is elsewhere by then.
pub fn from_start(path: PathBuf) -> PathBuf {
    static START: OnceLock<PathBuf> = OnceLock::new();
    START
        .get_or_init(|| env::current_dir().unwrap_or_default())
        .join(path)
}

/// What a token of the Hub is taken from, in the order of huggingface_hub.
fn hub_token_text() -> Option<(String, &'static str)> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(token) = variable(name) {
            return Some((token, name));
        }
    }
    let path = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
        let hub = variable("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(home()?.join(".cache")))?;
            Some(cache.join("huggingface"))
        })?;
        Some(hub.join("token"))
    })?;
    let text = fs::read_to_string(from_start(path)).ok()?;
    Some((text, "the file of `hf auth login`"))
}

/// The token of the Hub as a header; `None` if there is none.
pub fn hub_token() -> Result<Option<HeaderValue>, Fault> {
    let Some((token, from)) = hub_token_text() else {
        return Ok(None);
    };
    let token = token.trim();
    if token.is_empty() {
        return Ok(None);
    }
    let value = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut value = value.map_err(|_| Fault::Credentials(format!("{from} holds no token")))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Where a token of the Hub would come from, without the token.
pub fn hub_token_source() -> Option<&'static str> {
    let (token, from) = hub_token_text()?;
    (!token.trim().is_empty()).then_some(from)
}

/// What the files of the AWS tools say of a profile, by the names that they use.
pub fn aws_profile() -> HashMap<String, String> {
    let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
    let file = |name: &str, usual: &str| {
        let path = variable(name).map(PathBuf::from);
        let path = path.or_else(|| Some(home()?.join(".aws").join(usual)))?;
        fs::read_to_string(from_start(path)).ok()
    };
    let mut found = HashMap::new();
    let config = file("AWS_CONFIG_FILE", "config").unwrap_or_default();
    found.extend(section(&config, &profile));
    found.extend(section(&config, &format!("profile {profile}")));
    let credentials = file("AWS_SHARED_CREDENTIALS_FILE", "credentials").unwrap_or_default();
    found.extend(section(&credentials, &profile));
    found
}

/// The settings of one section of an INI file.
fn section(text: &str, wanted: &str) -> Vec<(String, String)> {
    let mut is_here = false;
    let mut found = Vec::new();
    for line in text.lines() {
        let is_nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            is_here = name.trim() == wanted;
        } else if is_here
            && !is_nested
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
        {
            found.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_one_section_without_comments_and_nested_settings() {
        let text = "[default]\nregion = eu-west-1\n# aws_access_key_id = no\n\
            [profile big]\naws_access_key_id=AKIA\naws_secret_access_key = a=b\n\
            s3 =\n  addressing_style = path\n[other]\nregion = us-east-2\n";
        let pairs = |name| section(text, name);
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(pairs("default"), [pair("region", "eu-west-1")]);
        assert_eq!(
            pairs("profile big"),
            [
                pair("aws_access_key_id", "AKIA"),
                pair("aws_secret_access_key", "a=b"),
                pair("s3", "")
            ]
        );
        assert_eq!(pairs("big"), []);
    }
}
