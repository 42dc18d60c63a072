"""What a server does wrong, or otherwise: each for `RangeServer.fail`."""

import contextlib
import time

from servers import Closed


def status(code, **headers):
    """A status and no file; `Retry_After=1` is the header of that name."""

    def answer(server, connection, request, stored):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        server.head(connection, request, code, named, b"<Error><Signature>leaked</Signature></Error>")

    return answer


def whole(server, connection, request, stored):
    """Ignores the range."""
    request.range = None
    server.answer(connection, request, stored)


def changed(**headers):
    """A good answer but for some headers."""
    return lambda server, connection, request, stored: server.answer(connection, request, stored, **headers)


def cut(after):
    """Ends the connection after so many bytes of the body."""

    def answer(server, connection, request, stored):
        start, end = request.range
        end = min(end, len(stored.data))
        headers = {**server.describe(stored), "Content-Length": end - start}
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(stored.data)}"
        server.head(connection, request, 206, headers)
        server.body(connection, request, memoryview(stored.data)[start : min(end, start + after)])
        raise Closed

    return answer


def stall(after, seconds):
    """Sends so many bytes of the body and then nothing for a while."""

    def answer(server, connection, request, stored):
        with contextlib.suppress(Closed):
            cut(after)(server, connection, request, stored)
        time.sleep(seconds)
        raise Closed

    return answer


def partial(server, request, stored):
    """The bytes that were asked for, and the headers of an answer with them but for their length."""
    start, end = request.range
    body = stored.data[start:end]
    about = f"bytes {start}-{start + len(body) - 1}/{len(stored.data)}"
    return body, {**server.describe(stored), "Content-Range": about}


def chunked(server, connection, request, stored):
    """A good answer of no announced length, in chunks."""
    body, headers = partial(server, request, stored)
    server.head(connection, request, 206, {**headers, "Transfer-Encoding": "chunked"})
    for place in range(0, len(body), 60_000):
        piece = body[place : place + 60_000]
        connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        request.sent += len(piece)
    connection.sendall(b"0\r\n\r\n")


def unframed(more=b""):
    """A good answer of no announced length that ends with the connection, and perhaps bytes behind it."""

    def answer(server, connection, request, stored):
        body, headers = partial(server, request, stored)
        server.head(connection, request, 206, {**headers, "Transfer-Encoding": "identity", "Connection": "close"})
        connection.sendall(body + more)
        request.sent += len(body)
        raise Closed

    return answer


def trickle(every):
    """A good answer of which a byte comes every so many seconds."""

    def answer(server, connection, request, stored):
        body, headers = partial(server, request, stored)
        server.head(connection, request, 206, {**headers, "Content-Length": len(body)})
        for place in range(len(body)):
            connection.sendall(body[place : place + 1])
            request.sent += 1
            time.sleep(every)

    return answer


def page(server, connection, request, stored):
    """The page of a login."""
    server.head(connection, request, 200, {"Content-Type": "text/html; charset=utf-8"}, b"<!DOCTYPE html><p>Log in" * 99)


def hang_up(server, connection, request, stored):
    """Ends the connection without a word."""
    raise Closed
