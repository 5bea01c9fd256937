"""An OpenAI-compatible server on loopback, for the tests, the benchmark and the demo.

    python tests/openai_server.py --port 8000 --delay 0.2   # a process; GET /count: calls so far

    with Server(answer) as server:                          # a thread; answer(request): what to do
        ... server.url ... server.requests ...

It is asyncio on raw sockets, so that it can break off and say what no server should.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import threading
import time


@dataclasses.dataclass
class Request:
    prompt: str
    body: dict
    key: str
    time: float  # time.monotonic() of its arrival
    number: int  # 0, 1, ... in order of arrival

    @property
    def step(self):
        return 1 if self.prompt.startswith("Paraphrase the given caption") else 2

    @property
    def source(self):
        """The text between the prompt's quotes."""
        return self.prompt[self.prompt.index('"') + 1 : self.prompt.rindex('"')]


USAGE = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}


@dataclasses.dataclass
class Reply:
    """What the server does with a request: a chat completion of `content`, or else `body`."""

    content: object = ""
    finish_reason: str = "stop"
    usage: object = dataclasses.field(default_factory=USAGE.copy)
    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0  # seconds
    reset: bool = False  # cut the connection in mid-answer
    interim: bytes = b""  # sent at once, before the delay and the answer

    def encode(self):
        body = self.body
        if body is None:
            message = {"role": "assistant", "content": self.content}
            choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
            reply = {"object": "chat.completion", "choices": [choice], "usage": self.usage}
            body = json.dumps(reply).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} X\r\n{head}\r\n".encode() + body


def reword(request):
    """A plain stand-in for a paraphrase: never an echo, and it shows which step made it."""
    return Reply(f"{'plainly' if request.step == 1 else 'in other words'} {request.source}")


class Server:
    """Serves on a thread between __enter__ and __exit__.

    answer(Request) returns a Reply, or a text as its content.
    """

    def __init__(self, answer=reword, port=0, keep=True):
        self.answer = answer
        self.port = port
        self.keep = keep
        self.requests = []
        self.count = 0
        self.connections = 0
        self.loop = asyncio.new_event_loop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        started = threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(started,), daemon=True)
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def serve(self, started=None):
        server = self.loop.run_until_complete(
            self.loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=4096)
        )
        self.port = server.sockets[0].getsockname()[1]
        if started:
            started.set()
        with contextlib.suppress(KeyboardInterrupt):
            self.loop.run_forever()
        server.close()
        self.loop.close()


class Connection(asyncio.Protocol):
    def __init__(self, server):
        self.server = server
        self.buffer = b""

    def connection_made(self, transport):
        self.transport = transport
        self.server.connections += 1

    def data_received(self, data):
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        body = rest[:size]
        if first.startswith("GET"):
            reply = Reply(body=json.dumps({"count": self.server.count}).encode())
        else:
            reply = self.reply(json.loads(body), headers.get("authorization", ""))
        self.transport.write(reply.interim)
        self.server.loop.call_later(reply.delay, self.send, reply)

    def reply(self, body, authorization):
        prompt = body["messages"][-1]["content"]
        key = authorization.removeprefix("Bearer ")
        request = Request(prompt, body, key, time.monotonic(), self.server.count)
        self.server.count += 1
        if self.server.keep:
            self.server.requests.append(request)
        reply = self.server.answer(request)
        return reply if isinstance(reply, Reply) else Reply(reply)

    def send(self, reply):
        if self.transport.is_closing():
            return
        data = reply.encode()
        self.transport.write(data[: len(data) // 2] if reply.reset else data)
        if reply.reset:
            self.transport.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer takes")
    flags = parser.parse_args()

    def answer(request):
        return dataclasses.replace(reword(request), delay=flags.delay)

    Server(answer, flags.port, keep=False).serve()


if __name__ == "__main__":
    main()
