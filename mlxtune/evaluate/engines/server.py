"""Answers of a server that speaks OpenAI's protocol: LM Studio, Ollama, llama-server, mlx_lm.server and others.

Prompts go to POST /chat/completions, and stay on this machine unless the user allows another: no proxy is asked, and a
server that sends us elsewhere is refused. What such servers do in silence is looked for and said: another model answers
than was asked for, the seed does nothing, answers are cut before --max-tokens.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from mlxtune_convert.files import json_text
from mlxtune_convert.shown import brief
from mlxtune_convert.sizes import size

from mlxtune.data.rows.tool_calls import parsed_arguments
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling, row_key

HERE = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine
KEY = "MLXTUNE_API_KEY"  # of a server that wants one
AT_ONCE = 4  # requests under way; servers that take one at a time let the others wait
SECONDS = 600.0  # that an answer may take
MOST_BYTES = 64_000_000  # of a reply
LISTED = 8  # models that an error names
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server on this machine might lead to another one, with our prompts."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """A server as an engine. Raises UserError where it does not answer, or has not the model."""

    def __init__(self, address: str, sampling: Sampling, allow_remote: bool = False) -> None:
        """address: as in http://127.0.0.1:8080/v1#model; without #model, the one that the server has."""
        self.url, _, self.model = address.partition("#")
        self.url = self.url.rstrip("/")
        _require_address(address, allow_remote)
        self.sampling = sampling
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        self.notes: list[str] = []
        self._seed_was_tried = False
        if sampling.repetition_penalty != 1.0:
            raise UserError("a server takes no repetition penalty", "Leave out --repetition-penalty.")
        if not self.model:
            self.model = self._only_model()
        self.name = f"{self.url}#{self.model}"

    def work(self) -> dict[str, int]:
        return {}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """As many as are under way at a time. What a seed does is found out once, by asking the first one twice."""
        if self.sampling.temperature > 0 and not self._seed_was_tried:
            self._seed_was_tried = True
            one, other = (self._answer(requests[0]) for _ in range(2))
            if one.text != other.text:
                self._say(f"{self.url} ignores the seed: asked again, it answers otherwise")
        return [list(range(len(requests)))[first : first + AT_ONCE] for first in range(0, len(requests), AT_ONCE)]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Request) -> Answer:
        sampling = self.sampling
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stream": False,
            # Each answer has a seed of its own, as it has a key of its own here.
            "seed": int(row_key(sampling.seed, request.id, request.sample)[0]) >> 1,
        }
        if sampling.top_p < 1:
            asked["top_p"] = sampling.top_p
        if request.tools:
            asked["tools"] = request.tools
        reply = self._call("/chat/completions", asked)
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            text, thought = _parted(message)
            cut = choice.get("finish_reason") == "length"
            tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self.url} answers prompt {request.id} in another form than OpenAI's: {brief(json.dumps(reply))}"
            ) from error
        named = reply.get("model")
        if isinstance(named, str) and named and named != self.model:
            self._say(f"{self.url} was asked for {self.model}, and says that {named} answered")
        if cut and 0 < tokens < sampling.max_tokens:
            self._say(f"{self.url} cuts answers before --max-tokens {sampling.max_tokens}")
        return Answer(request.id, request.sample, text, thought, "length" if cut else "stop", tokens)

    def require_there(self) -> None:
        """Raise UserError where nobody answers, the key is refused, or the server sends us elsewhere. One that lists no
        models will do.
        """
        try:
            self._call("/models")
        except UserError as error:
            cause = error.__cause__
            lists_none = isinstance(cause, urllib.error.HTTPError) and cause.code >= 404
            is_other_text = isinstance(cause, json.JSONDecodeError | UnicodeDecodeError) or cause is None
            if not (lists_none or is_other_text):
                raise

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _only_model(self) -> str:
        """The name of the model that the server has. Raises UserError where it has several, or none."""
        listed = self._call("/models").get("data")
        names = [one.get("id") for one in listed or [] if isinstance(one, dict)] if isinstance(listed, list) else []
        found = [name for name in names if isinstance(name, str) and name]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f"{self.url} names no model", f"Name it: {self.url}#MODEL")
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise UserError(
            f"{self.url} has several models", f"Name one: {self.url}#MODEL. It has: {', '.join(found[:LISTED])}{more}."
        )

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply to GET, or to POST of a body. Raises UserError in one line for whatever goes wrong."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=SECONDS) as response:
                text = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(1000).decode(errors="replace").split())
            raise _refusal(self.url + path, error, said) from error
        except TimeoutError as error:
            raise UserError(f"{self.url} gives no answer in {SECONDS:.0f} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, socket.timeout):
                raise UserError(f"{self.url} gives no answer in {SECONDS:.0f} s") from error
            raise UserError(f"no server answers at {self.url} ({brief(str(reason))})", "Is it running?") from error
        if len(text) > MOST_BYTES:
            raise UserError(f"{self.url}{path} replies with more than {size(MOST_BYTES)}")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.url}{path} replies with what is no JSON", "Most addresses end in /v1.") from error
        if not isinstance(reply, dict):
            raise UserError(f"{self.url}{path} replies with what is no JSON object", "Most addresses end in /v1.")
        return reply


def is_same_server(name: str, other: str) -> bool:
    """Whether two `Server.name` mean the same model of the same server: this machine has several names."""

    def parts(of: str) -> tuple[Any, ...]:
        address = urlsplit(of)
        host = HERE[0] if address.hostname in HERE else address.hostname
        return address.scheme, host, address.port, address.path, address.fragment

    return parts(name) == parts(other)


def _require_address(address: str, allow_remote: bool) -> None:
    """Raise UserError for what is no address, and for another machine's unless that is allowed."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{address} is no address ({error})", "As in http://127.0.0.1:8080/v1#model") from error
    if not host or parts.username is not None or parts.query:
        raise UserError(f"{address} is no address of a server", "As in http://127.0.0.1:8080/v1#model")
    if host not in HERE and not allow_remote:
        raise UserError(
            f"{host} is another machine: the prompts would leave this one", "Add --allow-remote to send them there."
        )


def _refusal(address: str, error: urllib.error.HTTPError, said: str) -> UserError:
    """What a server's error status means. said: the text that came with it."""
    if 300 <= error.code < 400:
        return UserError(f"{address} leads to {error.headers.get('Location')}", "Name that address itself.")
    hints = {
        401: f"A key is read from {KEY}.",
        403: f"A key is read from {KEY}.",
        404: "Most addresses end in /v1; and the server may not know the model behind #.",
    }
    return UserError(
        f"{address}: {error.code} {error.reason}{': ' + brief(said) if said else ''}", hints.get(error.code, "")
    )


def _parted(message: dict[str, Any]) -> tuple[str, str]:
    """(answer, thought) of a message: servers give the thought apart, or leave it in the text as <think>. Calls of
    tools, which they give apart too, end the answer, each as a line of JSON.
    """
    text = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(thought, str):
        raise TypeError("no text")
    found = THOUGHT.match(text)
    if not thought and found:
        text, thought = text[found.end() :], found.group(1).strip()
    calls = [_call_as_text(call["function"]) for call in message.get("tool_calls") or []]
    return "\n".join([text] * bool(text) + calls), thought


def _call_as_text(function: dict[str, Any]) -> str:
    """A call as models write it: {"name": "f", "arguments": {"a": 1}}. The protocol has the arguments as a text of
    JSON; one that is no JSON stays a text, which no check takes for arguments.
    """
    return json_text({"name": function["name"], "arguments": parsed_arguments(function.get("arguments"))})
