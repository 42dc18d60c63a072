//! `doctor URL`: whether a model can be read from where it is, and how fast.

use std::time::Duration;

use odmoe_fs::doctor::Check;
use odmoe_fs::explain::Explain;
use odmoe_fs::source::remote::probe::{CONNECTIONS, Found, credentials, probe};
use odmoe_fs::source::remote::{Address, Fault};

use super::text;

/// Looks at everything that decides how a model is read from an address.
pub fn checks(address: &Address, insecure_http: bool) -> Vec<Check> {
    let mut checks = vec![Check::good("credentials", credentials(address))];
    match probe(address, insecure_http) {
        Ok(found) => checks.extend(of_server(&found)),
        Err(fault) => checks.push(of_fault(&fault)),
    }
    checks
}

fn of_server(found: &Found) -> Vec<Check> {
    let mut checks = vec![
        Check::good(
            "server",
            format!(
                "it answers within {}, and has {}",
                milliseconds(found.latency),
                text::size(found.bytes())
            ),
        ),
        Check::good("ranges", "it sends the ranges that are asked for"),
        match found.is_pinned() {
            true => Check::good("pin", format!("a change is noticed {}", found.pinned())),
            false => Check::failure(
                "pin",
                "it gives neither an ETag nor a time, so a change would go unnoticed",
                "pass --unpinned if you know that nobody replaces the file",
            ),
        },
    ];
    let rate = |bytes: f64| format!("{}/s", text::size(bytes as u64));
    checks.extend(found.one.map(|one| {
        let many = found.many.map_or(String::new(), |many| {
            format!(", {CONNECTIONS} together {}", rate(many))
        });
        Check::good("throughput", format!("one connection {}{many}", rate(one)))
    }));
    checks
}

/// What a fault says of a server.
fn of_fault(fault: &Fault) -> Check {
    let name = match fault {
        Fault::NoRanges | Fault::OtherRange(_) | Fault::Encoded(_) => "ranges",
        Fault::Unauthorized(_) | Fault::Forbidden(_) | Fault::Credentials(_) => "access",
        _ => "server",
    };
    let hint = match fault {
        // What their hints say of this command is not the next step here.
        Fault::Busy { .. } | Fault::Stalled(_) | Fault::Broken(_) => {
            Some("try again later, or ask whoever runs the server".into())
        }
        Fault::Credentials(_) => Some("set them in the environment or in the usual files".into()),
        _ => fault.hint(),
    };
    match hint {
        Some(hint) => Check::failure(name, fault.to_string(), hint),
        None => Check::new(
            name,
            odmoe_fs::doctor::Verdict::Failure,
            fault.to_string(),
            None,
        ),
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
