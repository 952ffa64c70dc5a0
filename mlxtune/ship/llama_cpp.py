"""llama.cpp as a witness: full logits of a GGUF file, through the C interface inside the optional package xllamacpp.

llama.cpp ends its process on what it takes for a programming error, so it runs in one of its own: token ids or a text
go in, logits or token ids come out of its pipes. Computed on the CPU, keys and values kept in float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from mlxtune_convert.gguf import ggml

from mlxtune.data.dataset.batches import Batch
from mlxtune.errors import UserError

FAILED = 3  # exit status of the process when llama.cpp refuses; the reason is on its standard error
LOG_FROM = 3  # GGML_LOG_LEVEL_WARN of ggml.h: warnings and errors are kept
ROUNDED_TO = 256  # tokens; a context is asked for in multiples of it
REASON = 300  # characters of a reason that are shown
# llama_context_params and llama_model_params of llama.h as words of 4 bytes: byte -> the default there. Some of them
# are set below. Their neighbours show that they are where they were: a version of llama.cpp may put new fields between.
CONTEXT = {
    0: 512,  # n_ctx
    4: 2048,  # n_batch
    8: 512,  # n_ubatch
    12: 1,
    36: 0,
    40: -1,  # from here four kinds: of rope scaling, of pooling, of attention,
    44: -1,
    48: -1,
    52: -1,  # and flash_attn_type
    56: 0,
    100: 0,
    104: 1,  # type_k: float16
    108: 1,  # type_v
    112: 0,
}
MODEL = {0: 0, 4: 0, 8: 0, 12: 0, 16: -1, 20: 1}  # devices, tensor_buft_overrides; n_gpu_layers, split_mode


OTHER_INTERFACE = (
    f"this version of {ggml.PACKAGE} has another interface; one that works: pip install {ggml.PACKAGE}=={ggml.TRIED}"
)


class _Parameters(ctypes.Structure):
    """Larger than llama.cpp's own parameter structs; it fills and reads the front part. 8 bytes aligned."""

    _fields_ = (("raw", ctypes.c_uint64 * 64),)

    def check(self, words: dict[int, int]) -> None:
        """Raise RuntimeError where these defaults of a library are not at these bytes: its layout is another one."""
        if any(struct.unpack_from("@i", self, byte)[0] != default for byte, default in words.items()):
            raise RuntimeError(OTHER_INTERFACE)

    def put(self, letter: str, byte: int, value: int) -> None:
        struct.pack_into(letter, self, byte, value)


class _Batch(ctypes.Structure):
    """llama_batch of llama.h: how many tokens, then a pointer to an array for each of their properties."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


def installed() -> bool:
    return ggml.library_file() is not None


@contextlib.contextmanager
def runner(model: Path, adapter: Path | None = None) -> Iterator[Runner]:
    """Logits at a batch's supervised positions, by llama.cpp. Raises UserError when it refuses the file."""
    command = [sys.executable, "-m", "mlxtune.ship.llama_cpp", str(model), *([str(adapter)] if adapter else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield Runner(process, model)
        finally:
            process.kill()


class Runner:
    """Asks the process for the logits, or the tokens, of one row after the other."""

    def __init__(self, process: subprocess.Popen[bytes], model: Path) -> None:
        """model: the file that runs there, named in errors."""
        self.process = process
        self.model = model

    def __call__(self, batch: Batch) -> np.ndarray:
        """[N, V] float32 at the N supervised positions of a batch of one row."""
        positions, _ = batch.supervised()
        assert len(batch.ids) == 1
        return self.logits(batch.ids[0, :-1])[positions]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[T] token ids -> [T, V] float32."""
        return self._asked(ids.astype(np.int32))

    def tokenize(self, text: str) -> list[int]:
        """Without special tokens around the text; those inside it are recognised."""
        return self._asked(text)

    def _asked(self, question: np.ndarray | str) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        try:
            _send(stdin, question)
            return pickle.load(stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(f"llama.cpp cannot run {self.model.name}: {self._last_words()}") from error

    def _last_words(self) -> str:
        """The last line that the process printed before it ended."""
        errors = (self.process.communicate()[1] or b"").decode(errors="replace")
        lines = [line for line in errors.strip().splitlines() if line.strip()]
        return lines[-1][:REASON] if lines else "it ended without a word"


def _send(stream: IO[bytes], value: Any) -> None:
    pickle.dump(value, stream)
    stream.flush()


class Model:
    """A loaded GGUF model, in this process."""

    def __init__(self, path: str, adapter: str | None) -> None:
        """path, adapter: GGUF files. Raises RuntimeError when llama.cpp refuses one, or its interface is another."""
        self.library = lib = ggml.library()
        # Kept here: C holds no reference to what it calls back.
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._on_log)
        self.errors: list[str] = []
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(lib, name).restype = _Parameters
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_get_vocab.restype = ctypes.c_void_p
        lib.llama_batch_get_one.restype = _Batch
        lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        parameters = lib.llama_model_default_params()
        self._no_devices = (ctypes.c_void_p * 1)()
        parameters.check(MODEL)
        parameters.put("@Q", 0, ctypes.addressof(self._no_devices))
        self.model = ctypes.c_void_p(self._made(lib.llama_model_load_from_file(os.fsencode(path), parameters)))
        self.vocab = ctypes.c_void_p(lib.llama_model_get_vocab(self.model))
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        self.adapter = None
        if adapter is not None:
            self.adapter = self._made(lib.llama_adapter_lora_init(self.model, os.fsencode(adapter)))

    def _on_log(self, level: int, text: bytes, _: int) -> None:
        if level >= LOG_FROM:
            self.errors.append(text.decode(errors="replace"))

    def _made(self, pointer: int | None) -> int:
        """What llama.cpp made. Raises RuntimeError with its reason where it made nothing."""
        if not pointer:
            raise RuntimeError(" ".join("".join(self.errors).split()) or "no reason given")
        return pointer

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[T] int32 -> [T, V] float32."""
        lib, count = self.library, len(ids)
        parameters = lib.llama_context_default_params()
        room = -(-count // ROUNDED_TO) * ROUNDED_TO
        parameters.check(CONTEXT)
        for byte in (0, 4, 8):  # context, batch, micro-batch
            parameters.put("@I", byte, room)
        parameters.put("@i", 52, 0)  # no flash attention: it rounds
        for byte in (104, 108):  # keys and values: float32 instead of float16
            parameters.put("@i", byte, 0)
        context = ctypes.c_void_p(self._made(lib.llama_init_from_model(self.model, parameters)))
        try:
            self._adapt(context)
            self._decode(context, np.ascontiguousarray(ids, dtype=np.int32))
            return np.ctypeslib.as_array(lib.llama_get_logits(context), (count, self.size)).copy()
        finally:
            lib.llama_free(context)

    def _adapt(self, context: ctypes.c_void_p) -> None:
        if self.adapter is None:
            return
        adapters, scales = (ctypes.c_void_p * 1)(self.adapter), (ctypes.c_float * 1)(1.0)
        if self.library.llama_set_adapters_lora(context, adapters, ctypes.c_size_t(1), scales):
            raise RuntimeError("the adapter does not fit")

    def _decode(self, context: ctypes.c_void_p, tokens: np.ndarray) -> None:
        """Compute the logits of one row at all its places. tokens: [T] int32."""
        lib, count = self.library, len(tokens)
        made = lib.llama_batch_get_one(ctypes.c_void_p(tokens.ctypes.data), count)
        if (made.n_tokens, made.token, made.pos, made.logits) != (count, tokens.ctypes.data, None, None):
            raise RuntimeError(OTHER_INTERFACE)
        positions = np.arange(count, dtype=np.int32)
        sequence_counts = np.ones(count, dtype=np.int32)  # each token is part of one sequence,
        zero = (ctypes.c_int32 * 1)(0)  # number 0
        sequences = (ctypes.c_void_p * count)(*[ctypes.addressof(zero)] * count)
        wanted = np.ones(count, dtype=np.int8)
        batch = _Batch(
            count,
            tokens.ctypes.data,
            None,  # no embeddings in place of tokens
            positions.ctypes.data,
            sequence_counts.ctypes.data,
            ctypes.addressof(sequences),
            wanted.ctypes.data,
        )
        if lib.llama_decode(context, batch):
            raise RuntimeError("it cannot compute this text")

    def tokenize(self, text: str) -> list[int]:
        """Without special tokens around the text; those inside it are recognised."""
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()  # a token has a byte at least; some for what is put before a text
        count = self.library.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)
        return out[:count]


def main() -> None:
    """The process: a GGUF file, and perhaps an adapter, as arguments; questions on standard input, pickled."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up between the arrays
    try:
        model = Model(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
        with contextlib.suppress(EOFError):
            while True:
                asked = pickle.load(sys.stdin.buffer)
                _send(answers, model.tokenize(asked) if isinstance(asked, str) else model.logits(asked))
    except (RuntimeError, UserError) as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
