"""Gives a client certificate to programs that cannot show one: takes plain TCP and passes it on inside TLS.

    forward.py LISTEN ADDRESS CERTIFICATES NAME

Says "ready" once it listens. An end travels on as an end, a reset as a reset.
"""

import asyncio
import contextlib
import socket
import struct
import sys

sys.dont_write_bytecode = True
from certified import context as certified  # noqa: E402

LISTEN, ADDRESS, CERTIFICATES, NAME = sys.argv[1:5]
HOST, PORT = ADDRESS.rsplit(":", 1)

context = certified(CERTIFICATES, NAME)


async def copy(reader, writer):
    """True if it was reset. TLS has no half-closed streams here, so whoever ends ends both ways."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        return False
    except OSError:
        return True


async def serve(reader, writer):
    try:
        inner_reader, inner_writer = await asyncio.open_connection(HOST, int(PORT), ssl=context, server_hostname="")
    except OSError:
        writer.transport.abort()
        return
    ways = [asyncio.create_task(copy(reader, inner_writer)), asyncio.create_task(copy(inner_reader, writer))]
    done, waiting = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    if any(way.result() for way in done):
        linger = struct.pack("ii", 1, 0)
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    for way in waiting:
        way.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for end in (writer, inner_writer):
        end.close()


async def main():
    host, port = LISTEN.rsplit(":", 1)
    async with await asyncio.start_server(serve, host, int(port)) as server:
        print("ready", flush=True)
        await server.serve_forever()


asyncio.run(main())
