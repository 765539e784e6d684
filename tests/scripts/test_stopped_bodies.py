"""What the clients that stop in the middle of a body note of their answers."""

from __future__ import annotations

import asyncio

from stopped_bodies import PIECE, head_of, stop_in_the_middle


async def test_who_is_answered_and_who_is_not() -> None:
    received = list[int]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        place = len(received)
        received.append(0)
        if place == 0:
            writer.write(b"HTTP/1.1 503 No\r\nRetry-After: 2\r\n\r\n")
        if place == 1:
            writer.write(b"HTTP/1.1 413 No\r\n\r\n")
        if place != 2:
            while data := await reader.read(1 << 20):
                received[place] += len(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    statuses, is_over = list[str](), asyncio.Event()
    head = head_of("127.0.0.1", 8 << 20, "k")
    clients = []
    for place in range(4):
        clients.append(asyncio.create_task(stop_in_the_middle("127.0.0.1", port, head, 1 << 20, statuses, is_over)))
        while len(received) <= place:
            await asyncio.sleep(0.001)
    expected = ["503 with Retry-After", "413"]
    while statuses[:2] != expected or statuses[3] != "none" or received[3] < 1 << 20 or not clients[2].done():
        await asyncio.sleep(0.001)
    is_over.set()
    await asyncio.gather(*clients)
    server.close()
    await server.wait_closed()
    assert statuses[:2] == expected and statuses[2].endswith("Error") and statuses[3] == "none"
    assert received[3] == 1 << 20 == 16 * len(PIECE)
