//! What the environment says of proxies, where the HTTP library makes something else of it.

use reqwest::Url;

use super::credentials::variable;
use super::fault::Fault;

const NAMES: [&str; 6] = [
    "ALL_PROXY",
    "all_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
];
const SCHEMES: [&str; 6] = ["http", "https", "socks4", "socks4a", "socks5", "socks5h"];

/// Fails if a variable holds no proxy that can be used. The library would go without one, where
/// perhaps nobody may.
pub fn check() -> Result<(), Fault> {
    let is_wrong = |name: &&str| variable(name).is_some_and(|value| !is_proxy(&value));
    match NAMES.into_iter().find(is_wrong) {
        Some(name) => Err(Fault::Proxy(format!("{name} does not hold the URL of one"))),
        None => Ok(()),
    }
}

fn is_proxy(value: &str) -> bool {
    let url = match value.contains("://") {
        true => Url::parse(value),
        false => Url::parse(&format!("http://{value}")),
    };
    url.is_ok_and(|url| SCHEMES.contains(&url.scheme()) && url.has_host())
}

/// Whether every host is an exception. The library excepts names only, and no addresses.
pub fn are_all_excepted() -> bool {
    let excepted = variable("NO_PROXY").or_else(|| variable("no_proxy"));
    excepted.is_some_and(|hosts| hosts.split(',').any(|host| host.trim() == "*"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_written_with_and_without_a_scheme() {
        for good in ["proxy:3128", "http://u:p@proxy:1/", "socks5h://[::1]:1080"] {
            assert!(is_proxy(good), "{good}");
        }
        for bad in ["http://[bad", "ftp://proxy:1", "http://", "a b"] {
            assert!(!is_proxy(bad), "{bad}");
        }
    }
}
