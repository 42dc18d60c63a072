//! A server of byte ranges that behaves like one far away: every answer is late, and every connection
//! has its own speed. `range_server FOLDER LATENCY_MS MB_PER_S` prints its port, and serves until its
//! standard input ends. `GET /counts` answers with the requests and the bytes so far.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bytes that are sent before it is looked whether they were sent too fast.
const STEP: usize = 64 << 10;

struct Server {
    folder: PathBuf,
    latency: Duration,
    /// Bytes a second of one connection.
    rate: f64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or(io::ErrorKind::InvalidInput);
    let number = |text: String| text.parse::<f64>().map_err(io::Error::other);
    let server = Arc::new(Server {
        folder: next()?.into(),
        latency: Duration::from_secs_f64(number(next()?)? / 1e3),
        rate: number(next()?)? * 1e6,
        requests: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
    });
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let server = server.clone();
            // A client that goes away is no error.
            std::thread::spawn(move || server.serve(stream).ok());
        }
    });
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

impl Server {
    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut lines = BufReader::new(stream.try_clone()?);
        loop {
            let mut first = String::new();
            if lines.read_line(&mut first)? == 0 {
                return Ok(());
            }
            let mut range = None;
            loop {
                let mut line = String::new();
                lines.read_line(&mut line)?;
                let line = line.trim().to_ascii_lowercase();
                if line.is_empty() {
                    break;
                }
                if let Some(asked) = line.strip_prefix("range: bytes=") {
                    let (start, end) = asked.split_once('-').unwrap_or((asked, ""));
                    let number = |text: &str| text.parse::<u64>().ok();
                    range = number(start).map(|start| (start, number(end)));
                }
            }
            let path = first
                .split(' ')
                .nth(1)
                .unwrap_or("/")
                .trim_start_matches('/');
            if path == "counts" {
                let (requests, bytes) = (self.requests.load(Relaxed), self.bytes.load(Relaxed));
                let body = format!("{requests} {bytes}");
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                )?;
                continue;
            }
            std::thread::sleep(self.latency);
            let wants_body = !first.starts_with("HEAD");
            self.answer(&mut stream, path, range, wants_body)?;
        }
    }

    fn answer(
        &self,
        stream: &mut TcpStream,
        path: &str,
        range: Option<(u64, Option<u64>)>,
        wants_body: bool,
    ) -> io::Result<()> {
        self.requests.fetch_add(1, Relaxed);
        if path.is_empty() {
            return self.list(stream);
        }
        let Ok(file) = File::open(self.folder.join(path)) else {
            return write!(stream, "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n");
        };
        let size = file.metadata()?.len();
        let (start, last) = range.unwrap_or((0, None));
        let end = last.map_or(size, |last| last.saturating_add(1).min(size));
        let status = if range.is_some() {
            "206 Part"
        } else {
            "200 OK"
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nETag: \"{size}\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\nContent-Range: bytes {start}-{}/{size}\r\nContent-Length: {}\r\n\r\n",
            end.saturating_sub(1),
            end - start
        )?;
        if !wants_body {
            return Ok(());
        }
        let (began, mut place) = (Instant::now(), start);
        let mut space = vec![0; STEP];
        while place < end {
            let piece = &mut space[..STEP.min((end - place) as usize)];
            file.read_exact_at(piece, place)?;
            stream.write_all(piece)?;
            place += piece.len() as u64;
            self.bytes.fetch_add(piece.len() as u64, Relaxed);
            let due = Duration::from_secs_f64((place - start) as f64 / self.rate);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
        Ok(())
    }

    /// The folder as a page of links.
    fn list(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut page = String::new();
        for entry in self.folder.read_dir()?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            page += &format!("<a href=\"{name}\">{name}</a>\n");
        }
        let length = page.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {length}\r\n\r\n{page}"
        )
    }
}
