//! The state of a file on a server, and whether an answer is of that state.
//!
//! The problem: an object can be replaced between two requests, and no descriptor holds the old one.
//!
//! The plan: the first answer is the pin. Each request names it (`If-Match`), and each answer must
//! have its ETag and its size; without an ETag, its time of modification and its size.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use crc_fast::{CrcAlgorithm, checksum};
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName,
    LAST_MODIFIED, RETRY_AFTER, TRANSFER_ENCODING,
};
use serde::{Deserialize, Serialize};

use super::fault::Fault;

/// The state of a file that everything is read from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Bytes of the whole file.
    pub size: u64,
    /// As the server writes it, with its quotes.
    pub etag: Option<String>,
    /// As the server writes it.
    pub modified: Option<String>,
    /// What the Hub calls the content of the file; it is the same behind every signed URL.
    #[serde(default)]
    pub linked: Option<String>,
}

impl Pin {
    /// What to say as `If-Match`. Weak ETags never match there (RFC 9110, 13.1.1), so they are only
    /// compared.
    pub fn if_match(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }

    /// What to say as `If-Unmodified-Since`, where there is no ETag.
    pub fn if_unmodified_since(&self) -> Option<&str> {
        match self.etag {
            Some(_) => None,
            None => self.modified.as_deref(),
        }
    }

    /// Whether a change would be noticed.
    pub fn holds(&self) -> bool {
        self.identity().is_some()
    }

    /// What tells this state from others of the same size; `None` if nothing does.
    pub fn identity(&self) -> Option<&str> {
        let named = self.linked.as_deref().or(self.etag.as_deref());
        named.or(self.modified.as_deref())
    }

    /// What pins the file, in words.
    pub fn in_words(&self) -> &'static str {
        match (&self.linked, &self.etag, &self.modified) {
            (Some(_), ..) => "by the Hub's ETag of its content",
            (None, Some(etag), _) if etag.starts_with("W/") => "by a weak ETag, which is compared",
            (None, Some(_), _) => "by its ETag",
            (None, None, Some(_)) => "by the time of its last change and its size",
            (None, None, None) => "by its size only",
        }
    }

    /// When the file was last changed, as far as the server says.
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified.as_deref().and_then(http_date)
    }

    /// Fails if `other` is another state than this. `same_route` is whether both come by the same
    /// URL: behind a fresh signed URL only what the Hub says of the content must be the same.
    pub fn check(&self, other: &Self, same_route: bool) -> Result<(), Fault> {
        let changed = |what: String| Err(Fault::Changed(what));
        if self.size != other.size {
            return changed(format!(
                "it has {} bytes instead of {}",
                other.size, self.size
            ));
        }
        if self.linked.is_some() && self.linked != other.linked {
            return changed("the Hub has another ETag for it".to_owned());
        }
        if self.linked.is_some() && !same_route {
            return Ok(());
        }
        if self.etag.is_some() {
            return match self.etag == other.etag {
                true => Ok(()),
                false => changed("its ETag is another".to_owned()),
            };
        }
        if self.modified.is_some() && self.modified != other.modified {
            return changed("the time of its last change is another".to_owned());
        }
        Ok(())
    }
}

/// A number that hardly any other states of the files of a model have.
pub fn fingerprint<'a>(pins: impl IntoIterator<Item = &'a Pin>) -> u64 {
    let pins = pins.into_iter();
    let lines = pins.map(|pin| format!("{} {}\n", pin.size, pin.identity().unwrap_or_default()));
    checksum(
        CrcAlgorithm::Crc64Nvme,
        lines.collect::<String>().as_bytes(),
    )
}

/// What the headers of an answer to a range request say.
#[derive(Debug, PartialEq, Eq)]
pub struct Facts {
    pub pin: Pin,
    /// The bytes that follow.
    pub range: Range<u64>,
}

impl Facts {
    /// The fault behind a status 416 of the first request, which begins where every file does.
    pub fn of_refused_range(headers: &HeaderMap) -> Fault {
        let size = headers.get(CONTENT_RANGE).and_then(|value| {
            let (_, size) = value.to_str().ok()?.split_once('/')?;
            size.trim().parse().ok()
        });
        match size {
            None | Some(0) => Fault::Empty,
            Some(size) => Fault::RefusedRange(size),
        }
    }

    /// Reads the headers of an answer with a status 2xx. Whatever is not certainly the range that
    /// was asked for is a fault. The end of the first request may lie beyond the end of the file.
    pub fn of(status: u16, headers: &HeaderMap, asked: &Range<u64>) -> Result<Self, Fault> {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        check_encodings(headers)?;
        match status {
            206 => {}
            200 if text(CONTENT_LENGTH) == Some("0") => return Err(Fault::Empty),
            200 if text(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html")) => {
                return Err(Fault::Page);
            }
            200 => return Err(Fault::NoRanges),
            other => return Err(Fault::Status(other)),
        }
        // Several ranges come with headers of their own between them, whatever the first ones say.
        if every(headers, CONTENT_TYPE).any(|kind| kind.starts_with("multipart/")) {
            return Err(Fault::OtherRange("several come at once".to_owned()));
        }
        let Some(written) = text(CONTENT_RANGE) else {
            return Err(Fault::OtherRange("none is named".to_owned()));
        };
        if let Some(other) =
            every(headers, CONTENT_RANGE).find(|other| !other.eq_ignore_ascii_case(written))
        {
            let both = format!("{written}, and {other}");
            return Err(Fault::OtherRange(printable(&both)));
        }
        let Some((range, size)) = content_range(written) else {
            return Err(Fault::OtherRange(printable(written)));
        };
        if range.start != asked.start || range.end != asked.end.min(size) {
            return Err(Fault::OtherRange(printable(written)));
        }
        // A server that contradicts itself may have sent any range.
        let length = text(CONTENT_LENGTH).map(str::trim);
        if let Some(length) = length
            && length.parse() != Ok(range.end - range.start)
        {
            let both = format!("{written}, in {length} bytes");
            return Err(Fault::OtherRange(printable(&both)));
        }
        let owned = |name| text(name).map(str::to_owned);
        let pin = Pin {
            size,
            etag: owned(ETAG).filter(|etag| !etag.is_empty()),
            modified: owned(LAST_MODIFIED),
            linked: None,
        };
        Ok(Self { pin, range })
    }
}

/// All values of a header, in small letters.
fn every(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = String> {
    let values = headers.get_all(name).into_iter();
    values.map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase())
}

/// Fails unless the body is the bytes as they are. Frames around them (`chunked`) are gone by now.
fn check_encodings(headers: &HeaderMap) -> Result<(), Fault> {
    for name in [CONTENT_ENCODING, TRANSFER_ENCODING] {
        for encoding in every(headers, name) {
            if !["", "identity", "chunked"].contains(&encoding.trim()) {
                return Err(Fault::Encoded(printable(&encoding)));
            }
        }
    }
    Ok(())
}

/// `bytes 0-99/1234`: the range and the size of the whole.
fn content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (unit, place) = text.trim().split_once(' ')?;
    let (range, size) = place.split_once('/')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let (first, last, size): (u64, u64, u64) = (
        first.parse().ok()?,
        last.parse().ok()?,
        size.trim().parse().ok()?,
    );
    (first <= last && last < size).then_some((first..last + 1, size))
}

/// What a server says, for a message: short, and without anything that moves a cursor.
fn printable(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect()
}

/// When the server wants to be asked again: seconds, or a date.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(text)?;
    Some(until.duration_since(SystemTime::now()).unwrap_or_default())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`: the only form that is still written (RFC 9110, 5.6.7).
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, rest) = text.split_once(", ")?;
    let mut words = rest.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words
        .next()?
        .split(':')
        .map(|part| part.parse::<u64>().ok());
    let (hours, minutes, seconds) = (clock.next()??, clock.next()??, clock.next()??);
    let is_time = hours < 24 && minutes < 60 && seconds <= 60;
    if !is_time || !(1..=31).contains(&day) || !(1970..10_000).contains(&year) {
        return None;
    }
    // Days since 1970, counting years from March so that the leap day comes last.
    let shifted = year - u64::from(month < 2);
    let of_year = (153 * ((month + 10) % 12) + 2) / 5 + day - 1;
    let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + of_year;
    let days = days.checked_sub(719_468)?;
    let seconds = days * 86_400 + hours * 3600 + minutes * 60 + seconds;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| (name.clone(), value.parse().unwrap()))
            .collect()
    }

    fn facts(status: u16, pairs: &[(HeaderName, &str)], asked: Range<u64>) -> Result<Facts, Fault> {
        Facts::of(status, &headers(pairs), &asked)
    }

    #[test]
    fn only_the_range_that_was_asked_for_is_data() {
        let good = facts(
            206,
            &[(CONTENT_RANGE, "bytes 10-19/100"), (ETAG, "\"a\"")],
            10..20,
        );
        let good = good.unwrap();
        assert_eq!((good.range, good.pin.size), (10..20, 100));
        // The first request may ask for more than there is.
        assert!(facts(206, &[(CONTENT_RANGE, "bytes 0-99/100")], 0..4096).is_ok());
        assert_eq!(facts(200, &[], 10..20), Err(Fault::NoRanges));
        let typed = |kind| facts(200, &[(CONTENT_TYPE, kind)], 10..20);
        assert_eq!(typed("text/html; charset=utf-8"), Err(Fault::Page));
        assert_eq!(typed("application/octet-stream"), Err(Fault::NoRanges));
        assert_eq!(
            facts(200, &[(CONTENT_LENGTH, "0")], 10..20),
            Err(Fault::Empty)
        );
        for range in [
            "bytes 10-18/100",
            "bytes 11-19/100",
            "bytes 10-20/100",
            "bytes 10-19/*",
            "bytes 10-19/15",
            "bytes 19-10/100",
            "bytes */100",
            "10-19/100",
            "",
        ] {
            let found = facts(206, &[(CONTENT_RANGE, range)], 10..20);
            assert!(matches!(found, Err(Fault::OtherRange(_))), "{range}");
        }
        for (length, is_good) in [("10", true), ("9", false), ("11", false), ("ten", false)] {
            let pairs = [(CONTENT_RANGE, "bytes 10-19/100"), (CONTENT_LENGTH, length)];
            assert_eq!(facts(206, &pairs, 10..20).is_ok(), is_good, "{length}");
        }
        // The units have no case (RFC 9110, 14.1).
        assert!(facts(206, &[(CONTENT_RANGE, "Bytes 10-19/100")], 10..20).is_ok());
        assert!(matches!(facts(206, &[], 0..1), Err(Fault::OtherRange(_))));
        assert_eq!(facts(204, &[], 0..1), Err(Fault::Status(204)));
    }

    #[test]
    fn what_is_encoded_is_not_data() {
        let encoded = |encoding| {
            let pairs = [(CONTENT_RANGE, "bytes 0-0/9"), (CONTENT_ENCODING, encoding)];
            facts(206, &pairs, 0..1)
        };
        for encoding in ["gzip", "br", "aws-chunked", "gzip, identity"] {
            assert!(matches!(encoded(encoding), Err(Fault::Encoded(_))));
        }
        assert!(encoded("identity").is_ok() && encoded("").is_ok());
    }

    #[test]
    fn another_etag_size_or_time_is_another_file() {
        let pin = Pin {
            size: 9,
            etag: Some("\"a\"".into()),
            modified: Some("x".into()),
            linked: None,
        };
        assert_eq!(pin.if_match(), Some("\"a\""));
        pin.check(&pin, true).unwrap();
        for other in [
            Pin {
                size: 8,
                ..pin.clone()
            },
            Pin {
                etag: Some("\"b\"".into()),
                ..pin.clone()
            },
            Pin {
                etag: None,
                ..pin.clone()
            },
        ] {
            assert!(pin.check(&other, true).is_err(), "{other:?}");
        }
        // A server behind others may have its own clock; the ETag decides.
        let later = Pin {
            modified: None,
            ..pin.clone()
        };
        pin.check(&later, true).unwrap();
        let timed = Pin {
            etag: None,
            ..pin.clone()
        };
        assert_eq!(timed.if_unmodified_since(), Some("x"));
        assert!(
            timed
                .check(
                    &Pin {
                        modified: None,
                        ..timed.clone()
                    },
                    true
                )
                .is_err()
        );
        assert!(
            !Pin {
                size: 9,
                ..Pin::default()
            }
            .holds()
        );
    }

    #[test]
    fn a_weak_etag_is_compared_and_not_sent() {
        let weak = |etag: &str| Pin {
            etag: Some(etag.into()),
            ..Pin::default()
        };
        assert_eq!(weak("W/\"a\"").if_match(), None);
        assert!(weak("W/\"a\"").check(&weak("W/\"b\""), true).is_err());
        weak("W/\"a\"").check(&weak("W/\"a\""), true).unwrap();
    }

    #[test]
    fn behind_a_fresh_signed_url_the_hubs_etag_decides() {
        let pin = |etag: &str, linked: &str| Pin {
            size: 9,
            etag: Some(etag.into()),
            modified: None,
            linked: Some(linked.into()),
        };
        pin("a", "l").check(&pin("b", "l"), false).unwrap();
        assert!(pin("a", "l").check(&pin("b", "l"), true).is_err());
        assert!(pin("a", "l").check(&pin("a", "m"), false).is_err());
    }

    #[test]
    fn dates_and_seconds_say_when_to_ask_again() {
        let after = |text| retry_after(&headers(&[(RETRY_AFTER, text)]));
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(after("soon"), None);
        let seconds = |text| {
            let since = http_date(text)?.duration_since(SystemTime::UNIX_EPOCH);
            Some(since.unwrap().as_secs())
        };
        for (text, expected) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777)),
            ("Tue, 29 Feb 2000 12:00:00 GMT", Some(951_825_600)),
            ("Fri, 31 Dec 2100 23:59:59 GMT", Some(4_133_980_799)),
            ("Sun, 06 Xyz 1994 08:49:37 GMT", None),
            ("Sun, 06 Nov 1994 25:49:37 GMT", None),
            ("1994", None),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
    }
}
