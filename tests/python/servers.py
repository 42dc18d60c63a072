"""Servers of files on loopback: one of ours that misbehaves when it is told to, nginx with TLS, and one of S3."""

import contextlib
import dataclasses
import email.utils
import hashlib
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

from odmoe import wait_for

NEVER = 10**9


@dataclasses.dataclass
class Stored:
    """A file as a server has it."""

    data: bytes
    etag: str | None
    modified: str | None = email.utils.formatdate(1.7e9, usegmt=True)


@dataclasses.dataclass
class Request:
    """A request, and what came of it."""

    path: str
    query: str
    headers: dict
    at: float
    range: tuple | None = None
    status: int = 0
    sent: int = 0
    done: float = 0


class Closed(Exception):
    """The connection ends here."""


class RangeServer:
    """Serves `files` by range, counts, and does instead what `rules` say: functions that may answer a request."""

    def __init__(self, latency=0.0, rate=None, host="127.0.0.1", tls=None):
        self.host, self.tls = host, tls
        self.files, self.rules, self.requests = {}, [], []
        self.latency, self.rate = latency, rate
        self.peak, self._now = 0, 0
        self._lock = threading.Lock()
        self._connections = set()
        self.port = 0
        self.restart()

    # --- what tests say and ask

    def put(self, path, data, **kinds):
        """Stores or replaces a file; returns its URL."""
        data = Path(data).read_bytes() if isinstance(data, Path) else data
        kinds = {"etag": f'"{hashlib.md5(data).hexdigest()}"', **kinds}
        self.files[path] = Stored(data, **kinds)
        return self.url(path)

    def put_all(self, parts, folder="/models"):
        """Stores the parts of a model; returns the URL of the last."""
        return [self.put(f"{folder}/{part.name}", part) for part in parts][-1]

    def url(self, path):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{urllib.parse.quote(path)}"

    def fail(self, answer, times=NEVER, when=lambda request: True):
        """Has `answer` answer the next requests, as many as said, for which `when` is true."""
        left = [times]

        def rule(connection, request, stored):
            with self._lock:
                if left[0] <= 0 or not when(request):
                    return False
                left[0] -= 1
            answer(self, connection, request, stored)
            return True

        self.rules.append(rule)
        return rule

    def heal(self):
        self.rules.clear()

    def forget(self):
        """Counts from zero."""
        with self._lock:
            self.requests.clear()
            self.peak = 0

    @property
    def sent(self):
        """Bytes of bodies."""
        return sum(request.sent for request in self.requests)

    def twice(self):
        """Bytes that were sent more than once."""
        twice, last = 0, {}
        done = [r for r in list(self.requests) if r.status == 206]
        for request in sorted(done, key=lambda r: (r.path, r.range)):
            start, end = request.range[0], request.range[0] + request.sent
            twice += max(0, min(last.get(request.path, 0), end) - start)
            last[request.path] = max(last.get(request.path, 0), end)
        return twice

    def rounds(self):
        """The most requests of which each was asked after the answer to the one before."""
        count, last = 0, 0.0
        for request in sorted(self.requests, key=lambda r: r.done):
            if request.at >= last:
                count, last = count + 1, request.done
        return count

    def stop(self):
        """Refuses connections from now on, and ends those that there are."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self):
        """Listens again, on the same port."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, self.port), family=family, backlog=256)
        self.port = self._listener.getsockname()[1]
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    # --- the server

    def _accept(self):
        listener = self._listener
        while not self._ended:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection):
        if self.tls:
            try:
                connection = self.tls.wrap_socket(connection, server_side=True)
            except OSError:
                return
        with contextlib.suppress(OSError, Closed), connection, connection.makefile("rb") as lines:
            if lines.peek(1)[:1] == b"\x16":  # a greeting of TLS, which is not spoken here
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                return
            while request := self._read(lines):
                with self._lock:
                    self.requests.append(request)
                    self._now += 1
                    self.peak = max(self.peak, self._now)
                try:
                    time.sleep(self.latency)
                    stored = self.files.get(request.path)
                    if not any(rule(connection, request, stored) for rule in list(self.rules)):
                        self.answer(connection, request, stored)
                finally:
                    request.done = time.monotonic()
                    with self._lock:
                        self._now -= 1
        self._connections.discard(connection)

    @staticmethod
    def _read(lines):
        first = lines.readline().decode("latin-1").split()
        if len(first) < 2:
            return None
        headers = {}
        while (line := lines.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        path, _, query = first[1].partition("?")
        request = Request(urllib.parse.unquote(path), query, headers, time.monotonic())
        if asked := headers.get("range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            request.range = int(start), int(end) + 1
        return request

    def head(self, connection, request, status, headers=(), body=b""):
        request.status = status
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in dict(headers).items())]
        if not {"Content-Length", "Transfer-Encoding"} & set(dict(headers)):
            lines.append(f"Content-Length: {len(body)}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def describe(self, stored):
        named = {"ETag": stored.etag, "Last-Modified": stored.modified}
        return {name: value for name, value in named.items() if value is not None}

    def answer(self, connection, request, stored, **changes):
        """Answers as a good server does, but for `changes` of headers."""
        if stored is None:
            return self.head(connection, request, 404, body=b"no")
        wanted = request.headers.get("if-match")
        if wanted is not None and wanted != stored.etag:
            return self.head(connection, request, 412)
        if request.range is None:
            self.head(connection, request, 200, {**self.describe(stored), "Content-Length": len(stored.data)})
            return self.body(connection, request, stored.data)
        start, end = request.range
        if start >= len(stored.data):
            return self.head(connection, request, 416, {"Content-Range": f"bytes */{len(stored.data)}"})
        body = memoryview(stored.data)[start:end]
        headers = {
            **self.describe(stored),
            "Content-Length": len(body),
            "Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(stored.data)}",
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        self.head(connection, request, 206, headers)
        self.body(connection, request, body)

    def body(self, connection, request, body):
        step = 256 << 10
        for place in range(0, len(body), step):
            piece = body[place : place + step]
            connection.sendall(piece)
            request.sent += len(piece)
            if self.rate:
                time.sleep(len(piece) / self.rate)


class Hub(RangeServer):
    """As the Hugging Face Hub: `/resolve/` leads to a signed URL of another origin, which expires."""

    def __init__(self, token=None, lasts=NEVER, **options):
        super().__init__(**options)
        self.store = RangeServer(**options)
        self.token, self.lasts, self.commit = token, lasts, secrets.token_hex(20)
        self.signatures = {}
        self.linked = {}
        self.rules.append(self._resolve)
        self.store.rules.append(self._check)

    def add(self, repository, part):
        data = part.read_bytes()
        blob = f"/blobs/{hashlib.sha256(data).hexdigest()}"
        self.store.put(blob, data)
        for revision in ("main", self.commit):
            self.linked[f"/{repository}/resolve/{revision}/{part.name}"] = blob
        return f"hf://{repository}/{part.name}"

    def _resolve(self, connection, request, _):
        blob = self.linked.get(request.path)
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            self.head(connection, request, 401)
        elif blob is None:
            self.head(connection, request, 404)
        else:
            signature = secrets.token_hex(16)
            self.signatures[signature] = self.lasts
            headers = {
                "Location": f"{self.store.url(blob)}?X-Amz-Signature={signature}",
                "X-Repo-Commit": self.commit,
                "X-Linked-ETag": f'"{blob.rpartition("/")[2]}"',
                "X-Linked-Size": len(self.store.files[blob].data),
            }
            self.head(connection, request, 302, headers)
        return True

    def _check(self, connection, request, _):
        signature = dict(urllib.parse.parse_qsl(request.query)).get("X-Amz-Signature")
        assert "authorization" not in request.headers, "a token went to another origin"
        if self.signatures.get(signature, 0) <= 0:
            self.store.head(connection, request, 403, body=b"Request has expired")
            return True
        self.signatures[signature] -= 1
        return False

    def fail(self, answer, times=NEVER, when=lambda request: True):
        rule = super().fail(answer, times, when)
        self.rules.insert(0, self.rules.pop())  # before `_resolve`
        return rule

    def stop(self):
        super().stop()
        self.store.stop()


class Proxy:
    """A proxy: of SOCKS 5, or an HTTP proxy that lets nobody through. Counts its connections."""

    def __init__(self):
        self.used = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        listener = self._listener
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.used += 1
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            first = connection.recv(1, socket.MSG_PEEK)
            if first != b"\x05":
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 407 X\r\nContent-Length: 0\r\n\r\n")
                return
            connection.recv(2 + 255)  # its greeting
            connection.sendall(b"\x05\x00")
            wanted = connection.recv(262)
            name, port = wanted[4:-2], int.from_bytes(wanted[-2:])
            host = socket.inet_ntoa(name) if wanted[3] == 1 else name[1:].decode()
            with socket.create_connection((host, port)) as server:
                connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
                threading.Thread(target=self._pass_on, args=[connection, server], daemon=True).start()
                self._pass_on(server, connection)

    @staticmethod
    def _pass_on(source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)

    def stop(self):
        # Closing alone would leave the thread waiting, for whatever has this number next.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def tls(folder, names=("localhost", "127.0.0.1"), days=(-1, 1), authority=False):
    """A context of a server with a certificate of its own for these names and days from now, and the file of it."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    is_address = lambda name: name.replace(".", "").isdigit() or ":" in name  # noqa: E731
    named = [x509.IPAddress(ipaddress.ip_address(n)) if is_address(n) else x509.DNSName(n) for n in names]
    first, last = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=n) for n in days)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(first).not_valid_after(last)
    builder = builder.add_extension(x509.SubjectAlternativeName(named), critical=False)
    if authority:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    folder.mkdir(exist_ok=True)
    (folder / "tls.pem").write_bytes(certificate)
    plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "tls.key").write_bytes(key.private_bytes(*plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    return context, folder / "tls.pem"


def ranges_of(log):
    """(path, first byte, end, bytes sent) of each answer with a range in a log of `nginx`, and the bytes sent twice."""
    answers = []
    for line in log.read_text().splitlines():
        status, asked, sent, path = line.split(" ", 3)
        if status == "206":
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            answers.append((path, first, first + int(sent), int(sent)))
    twice, last = 0, {}
    for path, first, end, _ in sorted(answers):
        twice += max(0, min(last.get(path, 0), end) - first)
        last[path] = max(last.get(path, 0), end)
    return answers, twice


@contextlib.contextmanager
def nginx(root, scratch):
    """nginx with TLS: yields its origin and the file of the authority that it is to be trusted by."""
    scratch.mkdir()
    key, certificate = scratch / "key.pem", scratch / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subject += ["-addext", "basicConstraints=critical,CA:FALSE"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    scratch.chmod(0o755)
    (scratch / "nginx.conf").write_text(f"""
daemon off; pid {scratch}/pid; error_log {scratch}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    log_format ranges '$status $http_range $body_bytes_sent $uri'; access_log {scratch}/access.log ranges;
    client_body_temp_path {scratch}/t; proxy_temp_path {scratch}/t; fastcgi_temp_path {scratch}/t;
    uwsgi_temp_path {scratch}/t; scgi_temp_path {scratch}/t;
    server {{
        listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};
        location / {{ root {root}; }}
    }}
}}
""")
    command = [shutil.which("nginx"), "-p", scratch, "-c", scratch / "nginx.conf", "-e", scratch / "error.log"]
    if os.getuid() == 0:
        command += ["-g", "user root;"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            context = ssl.create_default_context(cafile=certificate)

            def is_up():
                assert process.poll() is None, (scratch / "error.log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as plain:
                    context.wrap_socket(plain, server_hostname="localhost").close()
                    return True

            wait_for(is_up)
            yield f"https://localhost:{port}", certificate
        finally:
            process.terminate()


@contextlib.contextmanager
def s3(objects):
    """moto as Amazon S3, with objects by their keys in the bucket `models`: yields the environment of a client."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], **quiet) as process:
        try:
            import boto3

            names = {"aws_access_key_id": "AKIA" + "T" * 16, "aws_secret_access_key": "s3cr3t" * 6}
            endpoint = f"http://127.0.0.1:{port}"

            def is_up():
                assert process.poll() is None
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    return True

            wait_for(is_up)
            client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **names)
            client.create_bucket(Bucket="models")
            for key, data in objects.items():
                client.put_object(Bucket="models", Key=key, Body=data)
            yield {
                **os.environ,
                **{name.upper(): value for name, value in names.items()},
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": endpoint,
            }
        finally:
            process.terminate()
