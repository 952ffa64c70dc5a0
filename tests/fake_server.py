"""A server on this machine that speaks OpenAI's protocol, with the habits that real ones have."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Habits:
    """What a server does that it was not asked for."""

    models: tuple[str, ...] = ("tiny",)  # that it names
    renames: str = ""  # the name it gives the model that answered
    ignores_seed: bool = False  # its answers are others each time
    most_tokens: int = 1 << 20  # it cuts longer answers
    status: int = 200  # of every reply
    reply: bytes | None = None  # in place of every reply
    leads_to: str = ""  # it sends who asks elsewhere
    thinks: str = ""  # "apart" or "tags": where its thought is
    calls: tuple[dict[str, Any], ...] = ()  # of tools, in place of a text
    says: dict[str, str] = field(default_factory=dict)  # answers by the last message; else they repeat it


class FakeServer:
    """Use as a context manager; `url` is its address. What it was asked is in `asked`, paths and headers too."""

    def __init__(self, **habits: Any) -> None:
        self.habits = Habits(**habits)
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._note(self, {})
                outer._reply(self, {"data": [{"id": name} for name in outer.habits.models]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._note(self, asked)
                outer._reply(self, outer._answer(asked))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def _note(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        self.paths.append(handler.path)
        self.keys.append(handler.headers.get("Authorization"))
        if asked:
            self.asked.append(asked)

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        said = asked["messages"][-1]["content"]
        words = self.habits.says.get(said, f"You said {said}").split(" ")
        if asked["temperature"] > 0:
            words.append(str(len(self.asked) if self.habits.ignores_seed else asked["seed"]))
        most = min(asked["max_tokens"], self.habits.most_tokens)
        message: dict[str, Any] = {"role": "assistant", "content": " ".join(words[:most])}
        if self.habits.thinks == "apart":
            message["reasoning_content"] = "Hm."
        if self.habits.thinks == "tags":
            message["content"] = f"<think>\nHm.\n</think>\n\n{message['content']}"
        if self.habits.calls:
            message["content"] = None
            message["tool_calls"] = [
                {"id": str(number), "type": "function", "function": call}
                for number, call in enumerate(self.habits.calls)
            ]
        reason = "length" if len(words) > most else "stop"
        return {
            "model": self.habits.renames or asked["model"],
            "choices": [{"message": message, "finish_reason": reason}],
            "usage": {"completion_tokens": min(most, len(words))},
        }

    def _reply(self, handler: BaseHTTPRequestHandler, reply: dict[str, Any]) -> None:
        handler.send_response(302 if self.habits.leads_to else self.habits.status)
        if self.habits.leads_to:
            handler.send_header("Location", self.habits.leads_to)
        handler.end_headers()
        handler.wfile.write(json.dumps(reply).encode() if self.habits.reply is None else self.habits.reply)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
