"""Answers of a model in this process: several at once are those of one at a time, and only the needed work is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache
from test_extent import LIMIT, LONGROPE

from mlxtune.adapter import adapter_files, attach
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines import applied, beginning, proof, room
from mlxtune.evaluate.engines.decode import Counted
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Chooser, Sampling, row_key
from mlxtune.model.load import Loaded, load

GREEDY = Sampling(max_tokens=6)
BY_CHANCE = Sampling(max_tokens=6, temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=3)


def asked(count: int = 24, system: str = "You are the desk of a shop.") -> list[Request]:
    """Prompts of different lengths that begin alike, all longer than a window of 16 tokens."""
    requests = []
    for index in range(count):
        question = f"Why{' very' * (index % 4)} late, {chr(97 + index) * 4}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        requests.append(Request(f"r{index}", messages))
    return requests


class Watched(Local):
    """Keeps the tokens of each answer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made: dict[str, list[int]] = {}

    def _read(self, request: Request, tokens: list[int]) -> Answer:
        self.made[request.id] = tokens
        return super()._read(request, tokens)


def in_batches_of(size: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(room, "rows_at_once", lambda *_: size)


def look_far(loaded: Loaded) -> None:
    """Make the last token small beside what was read before it, so that answers differ from prompt to prompt."""
    smaller = {}
    for name, array in tree_flatten(loaded.model.parameters()):
        if "embed" in name:
            smaller[name] = array * 0.01
    loaded.model.load_weights(list(smaller.items()), strict=False)


def all_answers(engine: Local, requests: list[Request]) -> list[Answer]:
    """In the requests' order."""
    got = {}
    for places in engine.plan(requests):
        for place, answer in zip(places, engine.answers([requests[place] for place in places]), strict=True):
            got[place] = answer
    return [got[place] for place in range(len(requests))]


def one_by_one(loaded: Loaded, requests: list[Request], sampling: Sampling) -> list[list[int]]:
    """The tokens of each answer, the plain way."""
    made = []
    for one in requests:
        ids = generate.prompt_ids(loaded, list(one.messages), {})
        key = row_key(sampling.seed, one.id, one.sample)
        made.append(list(generate.one_by_one(Counted(loaded.model), ids, key, sampling, generate.end_ids(loaded))))
    return made


def until(ends: set[int], tokens: list[int]) -> list[int]:
    """Up to and with the first of them that ends an answer."""
    found = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: found[0] + 1] if found else tokens


def watched_tokens(loaded: Loaded, patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the model computes, as they are made."""
    sizes: list[int] = []
    plain = type(loaded.model).__call__

    def watched(self: Any, ids: mx.array, *others: Any, **named: Any) -> Any:
        sizes.append(ids.size)
        return plain(self, ids, *others, **named)

    patch.setattr(type(loaded.model), "__call__", watched)
    return sizes


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mamba2"])
def test_answers_of_a_batch_are_those_of_one_at_a_time_token_for_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(tiny.make_model(tmp_path / "model", kind, initializer_range=0.3)), "float32")
    look_far(loaded)
    requests = asked()
    for sampling in (GREEDY, BY_CHANCE):
        plain = one_by_one(loaded, requests, sampling)
        assert len({tuple(tokens) for tokens in plain}) > 6  # else a batch could not be wrong
        # So that rows leave their batch at different times.
        ends = generate.end_ids(loaded) | {tokens[2] for tokens in plain[::6] if len(tokens) > 2}
        plain = [until(ends, tokens) for tokens in plain]
        assert len({len(tokens) for tokens in plain}) > 1
        monkeypatch.setattr(generate, "end_ids", lambda _, ends=ends: ends)
        for size in (1, 4, 24):
            in_batches_of(size, monkeypatch)
            engine = Watched(loaded, sampling)
            answers = all_answers(engine, requests)
            assert engine.notes == [] and engine._beginning is not None
            assert {answer.finish for answer in answers} == {"stop", "length"}
            assert [engine.made[one.id] for one in requests] == plain, (kind, sampling, size)
            assert [answer.id for answer in answers] == [one.id for one in requests]
        monkeypatch.undo()


def test_a_family_whose_caches_hold_one_row_is_answered_one_by_one_and_that_is_said(tmp_path: Path) -> None:
    loaded = load(str(tiny.make_model(tmp_path / "model", "llama4_text")), "float32")
    requests = asked(3)
    engine = Local(loaded, GREEDY)
    assert engine.plan(requests) == [[0], [1], [2]]
    (note,) = engine.notes
    assert "one by one" in note and "holds one row" in note
    assert [len(tokens) for tokens in one_by_one(loaded, requests, GREEDY)] == [
        answer.tokens for answer in all_answers(engine, requests)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(str(tiny.make_model(tmp_path_factory.mktemp("engine") / "llama")), "float32")


def test_a_thought_is_parted_from_the_answer_as_the_template_prints_it(llama: Loaded) -> None:
    template = (Path(__file__).parent / "templates" / "qwen.jinja").read_text()
    before, llama.tokenizer.chat_template = llama.tokenizer.chat_template, template
    llama.__dict__.pop("templates", None)  # what was learnt about the other template
    try:
        engine = Local(llama, GREEDY)
        (request,) = asked(1)
        engine.plan([request])
        for text, expected in (
            ("<think>\nHm.\n</think>\n\nYes<|im_end|>", ("Yes", "Hm.", "stop")),
            ("<think>\nHm.\n</think>\n\nYes", ("Yes", "Hm.", "length")),
            ("No<|endoftext|><|im_end|>", ("No", "", "stop")),
        ):
            ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = engine._read(request, ids)
            assert (answer.text, answer.thought, answer.finish, answer.tokens) == (*expected, len(ids))
    finally:
        llama.tokenizer.chat_template = before
        llama.__dict__.pop("templates", None)


@pytest.mark.parametrize(
    ("template", "missing"),
    [("qwen", []), ("phi", ["the tools", "earlier tool calls"]), ("", ["the tools", "earlier tool calls"])],
)
def test_what_of_a_prompts_tools_the_model_is_not_shown_is_said(
    template: str, missing: list[str], llama: Loaded
) -> None:
    call = {"type": "function", "function": {"name": "count", "arguments": {"things": "apples"}}}
    asks = {"role": "user", "content": "How many?"}
    messages = [
        asks,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        asks,
    ]
    tools = [{"type": "function", "function": {"name": "count", "description": "Counts.", "parameters": {}}}]
    text = (Path(__file__).parent / "templates" / f"{template}.jinja").read_text() if template else None
    before, llama.tokenizer.chat_template = llama.tokenizer.chat_template, text
    llama.__dict__.pop("templates", None)
    try:
        engine = Local(llama, GREEDY)
        engine.plan([Request("calls", messages, tools), Request("none", [asks])])
        told = [note for note in engine.notes if "does not show" in note]
        assert [note.split("the model ")[1] for note in told] == [f"{what} of 1 prompts" for what in missing]
    finally:
        llama.tokenizer.chat_template = before
        llama.__dict__.pop("templates", None)


def test_a_second_plan_proves_anew_only_for_longer_prompts(mlx_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_batches_of(4, monkeypatch)
    engine = Local(load(mlx_model), GREEDY)
    longest = []
    real = proof.wrong_together

    def counted(model: Any, prompts: Any, begin: Any) -> str:
        longest.append(max(map(len, prompts)))
        return real(model, prompts, begin)

    monkeypatch.setattr(proof, "wrong_together", counted)
    requests = asked(6)
    for some in (requests[:3], requests[:2], requests[3:], requests):
        engine.plan(some)
    assert len(longest) == 2 and longest[0] < longest[1]
    monkeypatch.setattr(Local, "_together", lambda *_: pytest.fail("a plan of one prompt is answered as if alone"))
    engine.plan(requests[:1])
    assert engine.answers(requests[:1])[0].id == requests[0].id


def test_two_samples_of_one_id_are_each_answered_by_their_own_messages(mlx_model: Path) -> None:
    first, second = asked(2)
    same = [replace(first, id="one"), replace(second, id="one", sample=1), replace(second, id="one")]
    engine = Local(load(mlx_model), GREEDY)
    for one in same:  # as makers do, which ask about an answer under one id
        engine.plan([one])
    prompts = [prompt for prompt, _ in engine.tokens_of(same)]
    own = [generate.prompt_ids(engine.loaded, list(one.messages), {}) for one in same]
    assert prompts == own and prompts[0] != prompts[1] == prompts[2]


def test_a_batch_that_gives_other_logits_is_refused_by_the_proof(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were padded on the right, and are not moved to where the next token is expected."""
    monkeypatch.setattr(BatchKVCache, "finalize", lambda self: None)
    engine = Local(llama, GREEDY)
    assert [len(places) for places in engine.plan(asked(4))] == [1, 1, 1, 1]
    assert "its logits for several rows are others" in engine.notes[0]


def test_24_prompts_that_share_23_tokens_save_529(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """(24 - 1) * 23 tokens, counted where they go through the model."""
    shared = "x" * 17  # behind the 6 tokens of <|im_start|>user and the end of that line
    requests = [Request(str(n), [{"role": "user", "content": shared + chr(97 + n) * 9}]) for n in range(24)]
    sizes = watched_tokens(llama, monkeypatch)
    spent = {}
    for sharing in (True, False):
        with monkeypatch.context() as patch:
            if not sharing:
                patch.setattr(beginning, "shared", lambda prompts: [])
            in_batches_of(24, patch)
            engine = Local(llama, GREEDY)
            plan = engine.plan(requests)
            assert [len(places) for places in plan] == [24]
            begin = engine._beginning
            assert begin is not None and begin.tokens == (23 if sharing else 0)
            sizes.clear()
            engine.answers([requests[place] for place in plan[0]])
            spent[sharing] = sum(sizes) + begin.tokens  # which `plan` computed, once
    assert spent[False] - spent[True] == 529


def test_rows_longer_than_a_models_rotation_is_alike_are_answered_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(tiny.make_model(tmp_path / "model", "phi3", **LONGROPE)), "float32")
    requests = [
        Request(name, [{"role": "user", "content": name * letters}])
        for name, letters in (("a", 20), ("b", LIMIT), ("c", 22), ("d", LIMIT - 20))
    ]
    in_batches_of(8, monkeypatch)
    engine = Local(loaded, GREEDY)
    assert engine.plan(requests) == [[0, 2], [1], [3]]
    assert engine.notes == []
    answers = all_answers(engine, requests)
    assert [answer.tokens for answer in answers] == [6, 6, 6, 6]
    plain = one_by_one(loaded, requests, GREEDY)
    assert [answer.text for answer in answers] == [generate.decoded(loaded, tokens) for tokens in plain]


def test_a_rows_chance_is_its_own() -> None:
    """Drawn by softmax(logits / T) within the nucleus, whatever row of a batch it is in; another key, another draw."""
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    keys = [row_key(0, str(n)) for n in range(4000)]
    sampling = Sampling(temperature=0.5)
    drawn = np.array(Chooser(sampling, keys, [[0]] * 4000)(mx.broadcast_to(logits, (4000, 4))))
    expected = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    shares = np.bincount(drawn, minlength=4) / 4000
    # Four standard errors of a share of 4,000 draws are 0.032 at most.
    assert np.abs(shares - expected / expected.sum()).max() < 0.032
    alone = [int(Chooser(sampling, [key], [[0]])(logits[None]).item()) for key in keys[:40]]
    assert alone == drawn[:40].tolist()
    nucleus = Sampling(temperature=0.5, top_p=0.79)
    kept = np.array(Chooser(nucleus, keys, [[0]] * 4000)(mx.broadcast_to(logits, (4000, 4))))
    assert set(kept.tolist()) == {0, 1}


def test_a_repetition_penalty_divides_what_was_said_in_the_last_64_tokens() -> None:
    """Positive logits divided, negative ones multiplied; a token counts once, and not after 64 others."""
    old_prompt = [9, *[5] * 60, 6, 6, 7]  # its 9 falls out with the first token of the answer
    chooser = Chooser(Sampling(repetition_penalty=2.0), [row_key(0)], [old_prompt])
    logits = mx.array([[0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 6.0, -1.0, 3.5, 7.9]])
    first = chooser(logits)  # 5: 4.0, 6: 3.0, 9: 3.95, and 8, unseen: 3.5
    assert first.tolist() == [5]
    assert chooser(logits).tolist() == [9]


def test_the_memory_decides_how_many_prompts_run_together(llama: Loaded) -> None:
    model = Counted(llama.model)
    prompt = list(range(3, 203))
    of_one = None
    for budget in (0, 1 << 40):
        rows = room.rows_at_once(model, prompt, 64, budget)
        assert rows == (1 if budget == 0 else room.MOST_ROWS)
    for rows in (2, 5):
        low, high = 0, 1 << 30
        while high - low > 1:
            middle = (low + high) // 2
            enough = room.rows_at_once(model, prompt, 64, middle) >= rows
            low, high = (low, middle) if enough else (middle, high)
        of_one = of_one or high / rows
        # What one prompt takes, whatever the number: a measured peak, and on a busy machine MLX frees a little later.
        assert high / rows == pytest.approx(of_one, rel=0.25)


def test_an_adapter_that_is_not_applied_is_known_by_whatever_it_trained(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """Nothing of it is on the model, and all of it is as it began but one tensor; rows of tokens may not be asked."""
    settings = ("lora.variant=dora", "lora.train_also=[norms, embeddings]", "train.steps=1", "train.warmup_steps=0")
    run = tiny.trained(mlx_model, data, tmp_path / "run", *settings)
    loaded, fresh = load(str(mlx_model), "float32"), load(str(mlx_model), "float32")
    plan = adapter_files.load_adapter(loaded.model, run)
    trained = attach.trained_tensors(loaded.model)
    attach.attach(fresh.model, plan)
    began = attach.trained_tensors(fresh.model)
    base = load(str(mlx_model), "float32")
    for end in ("", ".lora_b", ".m", "norm.weight", "embed_tokens.weight"):
        names = [name for name in trained if end and name.endswith(end)][:1]
        tensors = {**began, **{name: trained[name] for name in names}}
        assert all(not mx.array_equal(began[name], trained[name]) for name in names) and bool(names) == bool(end)
        mx.save_safetensors(str(run / plan.file), tensors)
        if end in ("", "embed_tokens.weight"):
            note = applied.note_on(base, run, [3, 4, 5])
            assert ("none of the token rows" if end else "all that it trained is as it began") in note
        else:
            with pytest.raises(UserError, match="is not applied"):
                applied.note_on(base, run, [3, 4, 5])
