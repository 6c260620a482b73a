"""An HBONE client that shares no code with ours: Python's OpenSSL and the package `h2`.

    client.py ADDRESS AUTHORITY CERTIFICATES NAME CASE...

CERTIFICATES is a directory with `NAME.pem`, `NAME.key` and `ca-cert.pem`; the application behind AUTHORITY says back what it
hears, with the client's address before it. Each CASE that holds is a line "ok CASE", or "cut CASE" where it
ended the connection; the first that does not hold is an exception.
"""

import socket
import sys

import h2.config
import h2.connection
import h2.events as events
import h2.settings

sys.dont_write_bytecode = True
from certified import context as certified  # noqa: E402

ADDRESS, AUTHORITY, CERTIFICATES, NAME = sys.argv[1:5]
HOST, PORT = ADDRESS.rsplit(":", 1)
CONNECT = [(":method", "CONNECT"), (":authority", AUTHORITY)]


class Client:
    def __init__(self):
        context = certified(CERTIFICATES, NAME)
        raw = socket.create_connection((HOST, int(PORT)), timeout=20)
        self.tls = context.wrap_socket(raw)
        assert self.tls.selected_alpn_protocol() == "h2"
        assert self.tls.version() == "TLSv1.3"
        # What is wrong shall reach the other side.
        config = h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.waiting = []
        self.flush()

    def flush(self):
        self.tls.sendall(self.h2.data_to_send())

    def open(self, headers=CONNECT, end=False):
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, headers, end_stream=end)
        self.flush()
        return stream

    def say(self, stream, data, end=False):
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def event(self, kind, stream=None):
        """The next event of that kind; those of other streams stay for later."""
        while True:
            for event in self.waiting:
                if isinstance(event, kind) and stream in (None, getattr(event, "stream_id", None)):
                    self.waiting.remove(event)
                    return event
            data = self.tls.recv(1 << 16)
            assert data, f"closed while {kind} of {stream} was awaited, after {self.waiting}"
            for event in self.h2.receive_data(data):
                if isinstance(event, events.DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.waiting.append(event)
            self.flush()

    def status(self, stream):
        return dict(self.event(events.ResponseReceived, stream).headers)[":status"]

    def hear(self, stream, length):
        data = b""
        while len(data) < length:
            data += self.event(events.DataReceived, stream).data
        return data

    def talk(self, stream, words):
        """There and back: what came after the address."""
        self.say(stream, words)
        data = b""
        while not data.endswith(b" " + words):
            data += self.event(events.DataReceived, stream).data


def tunnel():
    client = Client()
    stream = client.open()
    assert client.status(stream) == "200"
    client.talk(stream, b"hello")
    client.talk(stream, b"again")


def interleaved():
    client = Client()
    first, second = client.open(), client.open()
    for stream in (second, first):
        assert client.status(stream) == "200"
    for n in range(50):
        client.talk(first, b"first %d" % n)
        client.talk(second, b"second %d" % n)
    client.say(first, b"", end=True)
    client.event(events.StreamEnded, first)
    client.talk(second, b"goes on")


def end_stream():
    """Our end reaches the application, and its end reaches us, after what it still had to say."""
    client = Client()
    stream = client.open()
    assert client.status(stream) == "200"
    client.say(stream, b"last words", end=True)
    heard = client.hear(stream, len(b" last words"))
    assert heard.endswith(b" last words"), heard
    client.event(events.StreamEnded, stream)


def reset():
    """One stream is reset, with the other in the middle of something; the connection stays."""
    client = Client()
    lost, kept = client.open(), client.open()
    for stream in (lost, kept):
        assert client.status(stream) == "200"
    client.talk(kept, b"before")
    client.h2.reset_stream(lost, 8)
    client.talk(kept, b"after")
    another = client.open()
    assert client.status(another) == "200"
    client.talk(another, b"new")


def bulk():
    """Several of our windows, in small frames."""
    client = Client()
    stream = client.open()
    assert client.status(stream) == "200"
    piece, sent, heard, most = b"x" * 60, 0, 0, 1 << 19
    while heard < most:
        while sent < most and client.h2.local_flow_control_window(stream) >= len(piece) * 200:
            for _ in range(200):
                client.h2.send_data(stream, piece)
            client.flush()
            sent += len(piece) * 200
        heard += len(client.event(events.DataReceived, stream).data)


def denied():
    client = Client()
    stream = client.open()
    assert client.status(stream) == "401"
    client.event(events.StreamEnded, stream)
    # And again, on the same connection.
    assert client.status(client.open()) == "401"


def refused(headers, statuses, codes=(1,)):
    """That request fails: by status or by stream, and the connection goes on, or with the connection."""
    client = Client()
    stream = client.open(headers, end=headers[0][1] != "CONNECT")
    event = client.event((events.ResponseReceived, events.StreamReset, events.ConnectionTerminated))
    if isinstance(event, events.ConnectionTerminated):
        assert event.error_code in codes, event
        return "cut"
    if isinstance(event, events.ResponseReceived):
        assert dict(event.headers)[":status"] in statuses, event.headers
    else:
        assert isinstance(event, events.StreamReset) and event.error_code in codes, event
    assert event.stream_id == stream
    good = client.open()
    assert client.status(good) == "200"
    client.talk(good, b"still here")


def get():
    ordinary = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", AUTHORITY)]
    return refused(ordinary, ["400"])


def path_in_connect():
    return refused(CONNECT + [(":scheme", "http"), (":path", "/")], ["400"])


def no_authority():
    return refused(CONNECT[:1], ["400"])


def no_method():
    return refused(CONNECT[1:], ["400"])


def twice_an_authority():
    return refused(CONNECT + CONNECT[1:], ["400"])


def unknown_pseudo_header():
    return refused(CONNECT + [(":origin", "x")], ["400"])


def pseudo_header_after_others():
    return refused([CONNECT[0], ("x", "y"), CONNECT[1]], ["400"])


def status_in_request():
    return refused(CONNECT + [(":status", "200")], ["400"])


def extended_connect():
    return refused([*CONNECT, (":protocol", "websocket"), (":scheme", "https"), (":path", "/")], ["400"])


def upper_case():
    return refused(CONNECT + [("X-Upper", "y")], ["400"])


def connection_header():
    return refused(CONNECT + [("connection", "close")], ["400"])


def somebody_elses_address():
    return refused([CONNECT[0], (":authority", "192.0.2.1:80")], ["400", "404"])


def no_port():
    return refused([CONNECT[0], (":authority", HOST)], ["400"])


def port_of_nobody():
    return refused([CONNECT[0], (":authority", f"{HOST}:9")], ["503"])


for case in sys.argv[5:]:
    print(globals()[case]() or "ok", case, flush=True)
