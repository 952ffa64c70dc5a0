"""Known benchmarks: log-likelihoods beside lm_eval's own model, the work that sharing saves, scores, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_rows as made
import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

pytest.importorskip("lm_eval", reason="the extra harness is not installed")

from lm_eval.api.instance import Instance

from mlxtune.adapter import attach
from mlxtune.api import tuned
from mlxtune.cli import cli
from mlxtune.data.dataset.beginnings import common
from mlxtune.errors import UserError
from mlxtune.evaluate.benchmarks import package, run, tasks
from mlxtune.evaluate.benchmarks.asking import Asking, both, instances_of
from mlxtune.evaluate.benchmarks.continuing import Continuing
from mlxtune.evaluate.benchmarks.likelihood import Scorer
from mlxtune.evaluate.benchmarks.model import Model
from mlxtune.evaluate.benchmarks.parts import Pair
from mlxtune.evaluate.benchmarks.rows import Rows
from mlxtune.evaluate.benchmarks.scoring import measure
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.model.load import Loaded, load

TOLERANCE = 2e-3  # nats, of a text: float32 sums in another order
ALL = tasks.Wanted(limit=None, shots=None, seed=0)
FIVE = tasks.Wanted(limit=None, shots=5, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred questions of two subjects, and a few rows of two other benchmarks."""
    out = tmp_path_factory.mktemp("benchmarks")
    return made.write(out, mmlu=made.mmlu(100), hellaswag=made.hellaswag(5), gsm8k=made.gsm8k(6))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that takes five examples in bytes."""
    path = tmp_path_factory.mktemp("long")
    tiny.make_model(path, max_position_embeddings=2048)
    return load(str(path))


def asked(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)  # type: ignore[arg-type]


def test_log_likelihoods_are_those_of_lm_evals_own_model(long: Loaded, folder: Path) -> None:
    """Choices of one and of several tokens, shared contexts, none, spaces at the join, too long ones, whole texts."""
    from lm_eval.models.huggingface import HFLM

    few = tasks.Wanted(limit=4, shots=None, seed=0)
    loading = tasks.load(["mmlu", "hellaswag"], Rows(folder), few)
    requests = list(instances_of(loading.parts).values())
    pairs = [
        ("", " and then"),
        ("One two ", "three"),
        ("é", "à"),
        ("<|endoftext|>twice", " no"),
        ("long " * 420, "end"),
    ]
    requests += [asked("loglikelihood", *pair) for pair in pairs]
    whole = [asked("loglikelihood_rolling", text) for text in ("A text of its own.", "more " * 450)]
    ours = Model(long)
    with package.quiet():
        oracle = HFLM(pretrained=str(long.path), device="cpu", dtype="float32", batch_size=8, max_length=2048)
        expected = oracle.loglikelihood(requests, disable_tqdm=True)
        expected_whole = oracle.loglikelihood_rolling(whole, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    assert len(found) == 16 + 16 + len(pairs)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert np.abs(np.subtract([value for value, _ in found], [value for value, _ in expected])).max() < TOLERANCE
    assert ours.loglikelihood_rolling(whole) == pytest.approx(expected_whole, abs=TOLERANCE)


def test_five_examples_are_read_once_for_all_questions_of_their_subject(long: Loaded, folder: Path) -> None:
    """100 questions, four choices each: at most 1.05 times the examples of each subject and the questions."""
    loading = tasks.load(["mmlu"], Rows(folder), FIVE)
    once = 0
    for part in loading.parts:
        texts = list(dict.fromkeys(one.args[0] for one in part.task.instances))
        assert len(texts) == 50
        shown = min(common(list(texts[0]), list(text)) for text in texts[1:])
        once += shown + sum(len(text) + 1 - shown for text in texts)  # a byte a token; a space before each choice
    engine = Asking(long, instances_of(loading.parts))
    requests = [Request(id, []) for id in instances_of(loading.parts)]
    for batch in engine.plan(requests):
        engine.answers([requests[place] for place in batch])
    assert once < engine.work()["computed"] <= 1.05 * once
    assert engine.work()["passes"] < 20


@pytest.mark.parametrize("kind", ["gemma3", "mamba2", "llama4_text"])
def test_a_text_is_as_likely_beside_others_as_alone(kind: str, tmp_path: Path) -> None:
    """Of windows, of states, and of a family that keeps one row only; behind beginnings within beginnings."""
    tiny.make_tokenizer(tmp_path)
    loaded = load(str(tiny.make_model(tmp_path, kind)))
    rng = np.random.default_rng(0)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(3, 250, count)))

    examples = drawn(50)
    questions = [examples + drawn(36) for _ in range(2)] + [drawn(5), drawn(1)]
    pairs = [Pair(question, drawn(length)) for question in questions for length in (1, 1, 4)]
    pairs += [Pair(pair.context + pair.text[:2], pair.text[2:]) for pair in pairs if len(pair.text) == 4]
    scorer = Scorer(loaded)
    plan = scorer.plan(pairs, scorer.prepare(pairs))
    found: dict[int, Any] = {}
    for part in plan:
        found |= scorer.likelihoods(part, pairs)
    alone = bool(scorer.notes)
    assert alone == (kind == "llama4_text") and max(len(part.shared) for part in plan) == (0 if alone else 2)
    for place, pair in enumerate(pairs):
        logits = loaded.model(mx.array([pair.inputs]))[0].astype(mx.float32)
        probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        plain = sum(float(probabilities[pair.first + offset, token].item()) for offset, token in enumerate(pair.text))
        assert found[place][0] == pytest.approx(plain, abs=1e-4)


SAID = (
    "She has 5. #### 1,234",
    "It is $72.00",
    "the answer is 5.",
    "",
    "#### -7\nQuestion: 8",
    "12 apples of 3/4",
    "#### .5",
)


def test_answers_to_gsm8k_are_read_as_lm_eval_reads_them(folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class Recorded(LM):
        def generate_until(self, requests: list[Any]) -> list[str]:
            return [SAID[request.doc_id % len(SAID)] for request in requests]

        loglikelihood = loglikelihood_rolling = None  # type: ignore[assignment]

    golds = ("1,234", "72.00", "5", "5", "-7", "4", "0.5")
    rows = [{"question": f"Number {index}?", "answer": f"So.\n#### {gold}"} for index, gold in enumerate(golds)]
    made.write(tmp_path, gsm8k={"test": rows})
    (part,) = tasks.load(["gsm8k"], Rows(tmp_path), tasks.Wanted(None, 0, 0)).parts
    ids = instances_of([part])
    ours = measure([part], {id: Answer(id, 0, text, "", "stop", 1) for id, text in zip(ids, SAID, strict=True)}).scores
    with package.quiet():
        theirs = evaluate(Recorded(), {"tasks": {"gsm8k": part.task}}, bootstrap_iters=0)
    samples = theirs["samples"]["gsm8k"]
    assert len(samples) == len(ours) == 2 * len(SAID)
    for sample in samples:
        id = f"gsm8k/{sample['doc_id'] + 1}"
        assert ours[id, f"gsm8k:exact_match:{sample['filter']}"] == sample["exact_match"]
    strict = [ours[f"gsm8k/{number}", "gsm8k:exact_match:strict-match"] for number in range(1, 8)]
    flexible = [ours[f"gsm8k/{number}", "gsm8k:exact_match:flexible-extract"] for number in range(1, 8)]
    assert strict == [1, 0, 0, 0, 1, 0, 0] and flexible == [1, 1, 1, 0, 0, 1, 0]


def test_an_answer_ends_before_a_text_that_ends_it(long: Loaded) -> None:
    """Which spans tokens; together and alone, and no further token is computed than those of the longest answer."""
    requests = [Request(str(number), [{"content": f"{number} and more of it"}]) for number in range(3)]

    def answers(until: list[str], rows: int) -> tuple[list[Answer], int]:
        engine = Continuing(long, Sampling(24), until, rows_at_once=rows)
        plan = engine.plan(requests)
        before = engine.work()["computed"]
        found = [answer for batch in plan for answer in engine.answers([requests[place] for place in batch])]
        return sorted(found, key=lambda one: one.id), engine.work()["computed"] - before

    whole, all_tokens = answers([], 3)
    end = whole[0].text[6:8]
    for rows in (1, 3):
        cut, tokens = answers([end, "never there"], rows)
        assert tokens < all_tokens
        for one, full in zip(cut, whole, strict=True):
            assert one.text == full.text.split(end)[0]
            assert one.finish == ("stop" if end in full.text else full.finish)
    assert cut[0].text == whole[0].text[:6] and cut[0].tokens < whole[0].tokens


@pytest.mark.parametrize("planted", [False, True])
def test_an_adapter_that_is_not_applied_is_noticed(planted: bool, mlx_model: Path, run: Path, folder: Path) -> None:
    loaded = tuned.load_model(str(mlx_model), run)
    instances = instances_of(tasks.load(["hellaswag"], Rows(folder), ALL).parts)
    requests = [Request(id, []) for id in instances]
    base, after = both(loaded, instances, run)
    if planted:
        for layer in attach.adapted_layers(loaded.model).values():
            layer.scale = 0.0
        with pytest.raises(UserError, match="is not applied"):
            base.plan(requests)
        return
    plan = base.plan(requests)
    assert plan == after.plan(requests)
    answers = [[one.answers([requests[place] for place in batch]) for batch in plan] for one in (base, after)]
    assert answers[0] != answers[1]


def test_a_benchmark_that_was_stopped_ends_with_the_same_bytes(long: Loaded, folder: Path, tmp_path: Path) -> None:
    how = tasks.Wanted(limit=6, shots=1, seed=3)
    told: list[int] = []

    def go(out: Path, stop_after: int) -> int:
        rows = Rows(folder)
        loading = tasks.load(["mmlu", "gsm8k"], rows, how)
        for part in loading.parts:
            for instance in part.task.instances:
                if instance.request_type == "generate_until":
                    instance.args[1]["max_gen_toks"] = 4
        side = run.Answering(lambda instances: Asking(long, instances), {}, {})

        def stopping(_: str, done: int, every: int) -> None:
            told.append(done)
            if len(told) == stop_after:
                raise KeyboardInterrupt

        return run.evaluate(run.Asked(loading, how, rows.digest()), {"base": side}, out, stopping)[1]

    go(tmp_path / "whole", 0)
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", 1)
    assert go(tmp_path / "stopped", 0) == told[0] > 0
    for name in ("answers.jsonl", "scores.jsonl", "prompts.jsonl", "summary.json", "requests/answers.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# A process that never had torch, since libraries keep in mind whether it is there, and whose calls of the network fail.
BARE = """
import os, sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if str(name).partition(".")[0] == "torch" else real(name, path, target)
PathFinder.find_spec = find_spec
sys.path.insert(0, sys.argv.pop(1))
import network
network.forbid(os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT))
from mlxtune.cli import main
main()
"""


def test_the_command_compares_base_and_tuned_without_a_network_or_torch(
    mlx_model: Path, run: Path, folder: Path, tmp_path: Path
) -> None:
    words = ["--model", mlx_model, "--adapter", run, "--benchmark", "mmlu,hellaswag", "--benchmark-data", folder]
    words += ["--limit", "5", "--out", tmp_path / "out", "--html", tmp_path / "page.html", "--json"]
    start = [sys.executable, "-c", BARE, Path(__file__).parent, tmp_path / "calls", "eval"]
    done = subprocess.run([*start, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == f"note: the page is {tmp_path / 'page.html'}\n", done.stderr
    assert (tmp_path / "calls").read_text() == ""
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="benchmarks"' in page and "hellaswag:acc_norm" in page and "mmlu by subject (" in page
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(found["checks"]) == ["mmlu:acc", "hellaswag:acc", "hellaswag:acc_norm"]
    for check in found["checks"].values():
        assert check["n"] == 5 and check["difference"] == pytest.approx(check["tuned"] - check["base"])
    assert sum(one["mmlu:acc"]["n"] for one in found["benchmarks"]["mmlu"]["subjects"].values()) == 5
    notes = " ".join(found["notes"])
    assert "mmlu: 5 of 100 rows, drawn by the seed 0" in notes and "2 of its 57 subjects are here" in notes
    assert "without the chat template" in notes and "not to be compared with published numbers" in notes
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["side"] for line in lines] == ["base"] * 10 + ["tuned"] * 10


def refusal(*options: str) -> str:
    """What `eval` says to these options."""
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli, ["eval", *options], catch_exceptions=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--benchmark", "mmul"), "no benchmark mmul"),
        (("--benchmark", "piqa"), "has no rows of piqa: expected piqa/validation.jsonl"),
        (("--benchmark", "gsm8k", "--shots", "9"), "shows 9 examples of its split train, and"),
        (("--benchmark", "truthfulqa_mc2", "--shots", "9"), "or has its own in each text"),
        (("--benchmark", "gsm8k,gsm8k"), "each once"),
        (("--benchmark", "gsm8k,humaneval"), "humaneval is asked by itself"),
        (("--benchmark", "humaneval"), "has no rows of humaneval"),
        (("--benchmark", "gsm8k", "--temperature", "1"), "--temperature has no effect with --benchmark"),
        (("--benchmark", "gsm8k", "--min-better", "gsm8k:exact_match=0.1"), "a gate needs two sides"),
    ],
)
def test_what_cannot_be_asked_is_said(options: tuple[str, ...], said: str, mlx_model: Path, folder: Path) -> None:
    assert said in refusal("--model", str(mlx_model), "--benchmark-data", str(folder), *options)


def test_a_server_is_refused(folder: Path) -> None:
    asks = ("--model", "http://127.0.0.1:1/v1", "--benchmark", "gsm8k", "--benchmark-data", str(folder))
    assert "cannot be asked how likely a given text is" in refusal(*asks)


def test_a_missing_package_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "NAME", "lm_eval_that_is_not_there")
    with pytest.raises(UserError, match="which is not installed") as caught:
        package.require()
    assert "mlxtune[harness]" in caught.value.hint
