"""Preference objectives against TRL's own trainers: losses, reference, gradients, and twenty steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from preferences import answer, of_pairs, of_rated

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import proof
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.preference.batch_value import Value
from mlxtune.compute.preference.objectives import Settings
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.data.dataset.batches import Batch
from mlxtune.model.arrays import named
from mlxtune.model.load import load
from mlxtune.train import optim

pytestmark = [
    pytest.mark.filterwarnings("ignore:::trl"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::accelerate"),
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, BETA = 4, 8, 0.3
ROWS = [
    ("What is it?", "A cat sits here.", "No."),
    ("Tell me about the long history of tea", "Tea came from China.", "I know nothing at all about it, sorry"),
    ("Hi", "Hello! How can I help?", "what"),
    ("One two three four five six seven", "eight", "nine ten eleven twelve"),
]
STEPS = 20


class Pair:
    """The same tiny llama with the same LoRA on all linear layers: TRL's and ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = load(str(folder), "float32").model
        attach.attach(self.model, AdapterPlan.of(self.model, LoraSection(rank=RANK, alpha=ALPHA)), 0)
        draw = np.random.default_rng(0)
        self.factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for path, layer in attach.adapted_layers(self.model).items():
            shapes = layer.lora_a.shape, layer.lora_b.shape
            self.factors[path] = tuple(0.2 * draw.normal(size=shape).astype(np.float32) for shape in shapes)  # type: ignore[assignment]

    def set_factors(self, theirs: Any, b: float = 1.0) -> dict[str, Any]:
        """Give both the same factors, B times `b`. Returns TRL's parameters by our names."""
        import torch

        found = {}
        for path, layer in attach.adapted_layers(self.model).items():
            layer.lora_a, layer.lora_b = mx.array(self.factors[path][0]), mx.array(b * self.factors[path][1])
        for name, parameter in theirs.named_parameters():
            if "lora_" not in name:
                continue
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            which = "AB".index(rest[0])
            factor = self.factors[path][which] * (b if which else 1.0)
            parameter.data = torch.tensor(np.ascontiguousarray(factor.T))
            found[f"{path}.lora_{'ab'[which]}"] = parameter
        return found

    def gradients(self, batch: Batch) -> Gradients:
        return Gradients(self.model, Way(Split.of(self.model, mx.array(batch.ids)), prefix=0, recompute=1))

    def reference(self, batch: Batch) -> np.ndarray:
        """[A] summed losses of the base."""
        with_adapter = {path: layer.lora_b for path, layer in attach.adapted_layers(self.model).items()}
        for layer in attach.adapted_layers(self.model).values():
            layer.lora_b = mx.zeros_like(layer.lora_b)
        sums = np.array(self.gradients(batch).answer_sums(batch))
        for path, layer in attach.adapted_layers(self.model).items():
            layer.lora_b = with_adapter[path]
        return sums


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def trainer(kind: str, folder: Path, rows: Sequence[dict[str, Any]], out: Path, **settings: Any) -> Any:
    """TRL's trainer on a tiny llama. kind: DPO or KTO."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    options = getattr(trl, f"{kind}Config")(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        bf16=False,
        per_device_train_batch_size=len(rows),
        max_length=None,
        gradient_checkpointing=False,
        beta=BETA,
        disable_tqdm=True,
        **settings,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"),
        args=options,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tiny.make_model(tmp_path_factory.mktemp("trl") / "model", num_key_value_heads=2))


@pytest.fixture(scope="module")
def dpo(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A DPOTrainer whose one batch is all of ROWS."""
    rows = [
        {"prompt": messages("user", p), "chosen": messages("assistant", c), "rejected": messages("assistant", r)}
        for p, c, r in ROWS
    ]
    return trainer("DPO", pair.folder, rows, tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def theirs(dpo: Any) -> dict[str, Any]:
    """TRL's own batch: ids and masks, chosen answers first."""
    found: dict[str, Any] = next(iter(dpo.get_train_dataloader()))
    return found


def rows_of(batch: dict[str, Any], rows: Sequence[int], prefix: str = "") -> list[Any]:
    """The rows of one of TRL's batches, padded on the right, as examples."""
    ids, mask = (batch[f"{prefix}{name}"].numpy() for name in ("input_ids", "completion_mask"))
    lengths = batch[f"{prefix}attention_mask"].sum(1).tolist()
    found = []
    for row in rows:
        first = int(mask[row].argmax())
        found.append(answer(ids[row, :first].tolist(), ids[row, first : lengths[row]].tolist()))
    return found


def as_ours(batch: dict[str, Any]) -> Batch:
    count = len(batch["input_ids"]) // 2
    return of_pairs(rows_of(batch, [side * count + row for row in range(count) for side in (0, 1)]))


def some(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some pairs of TRL's batch."""
    count = len(batch["input_ids"]) // 2
    return {name: array[[*rows, *(row + count for row in rows)]] for name, array in batch.items()}


def sft_scale(batch: Batch) -> float:
    return batch.pairs / int(batch.answer_tokens[0::2].sum())


def assert_same(found: proof.Sums, loss: Any, parameters: dict[str, Any]) -> None:
    """loss: TRL's, whose gradients are taken here. Losses to 1e-5, every gradient to 1e-4 of its norm."""
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward()
    value, gradients = found
    assert value == pytest.approx(loss.item(), abs=1e-5)
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        wanted = parameter.grad.numpy().T
        norm = np.linalg.norm(wanted)
        assert norm > 0, name
        assert np.linalg.norm(gradients[name] - wanted) <= 1e-4 * norm, name


def ours(pair: Pair, batch: Batch, settings: Settings, reference: np.ndarray | None, **known: Any) -> proof.Sums:
    """Value and gradients of a step that is this batch."""
    value_of = Value.of(settings, batch, reference, **known)
    value, _, tree = pair.gradients(batch).of_answers(batch, value_of)
    total, gradients = proof._read(value, tree)
    count = batch.pairs or batch.answers
    return total / count, {name: array / count for name, array in gradients.items()}


def test_the_references_log_probabilities_are_trls(pair: Pair, dpo: Any, theirs: dict[str, Any]) -> None:
    pair.set_factors(dpo.model)
    chosen, rejected = dpo.compute_ref_log_probs(dpo.model, theirs)
    batch = as_ours(theirs)
    sums = pair.reference(batch)
    np.testing.assert_allclose(-sums[0::2], chosen.numpy(), atol=1e-4)
    np.testing.assert_allclose(-sums[1::2], rejected.numpy(), atol=1e-4)
    assert np.abs(np.array(pair.gradients(batch).answer_sums(batch)) - sums).min() > 1e-3  # the adapter does something


WRONG = 0.1  # share of labels that TRL's robust loss takes to be wrong
DPO: dict[str, tuple[Settings, dict[str, Any]]] = {
    "sigmoid": (Settings("dpo", BETA), {}),
    # One formula, as `objectives` says.
    "robust": (Settings("dpo", BETA, label_smoothing=-WRONG / (1 - 2 * WRONG)), {"label_smoothing": WRONG}),
    "sigmoid_norm": (Settings("dpo", BETA, length_normalised=True), {}),
    "ipo": (Settings("ipo", BETA), {}),
    "apo_zero": (Settings("apo", BETA), {}),
    "sigmoid sft": (Settings("dpo", BETA, sft=0.7), {"loss_weights": [1.0, 0.7]}),
}


@pytest.mark.parametrize("name", DPO)
def test_losses_and_gradients_are_those_of_trls_dpo_trainer(
    name: str, pair: Pair, dpo: Any, theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, changes = DPO[name]
    kinds = name.split()
    for key, value in {"loss_types": kinds, "loss_weights": [1.0] * len(kinds), **changes}.items():
        assert hasattr(dpo, key)
        monkeypatch.setattr(dpo, key, value)
    parameters = pair.set_factors(dpo.model)
    dpo.model.train()
    batch = as_ours(theirs)
    found = ours(pair, batch, settings, pair.reference(batch), sft_scale=sft_scale(batch))
    assert_same(found, dpo.compute_loss(dpo.model, theirs), parameters)


def means_of_answers(dpo: Any, batch: dict[str, Any], get_batch_logps: Any) -> tuple[Any, Any, Any]:
    """TRL's mean log-probabilities of chosen and rejected answers, and the chosen ones' own loss, a mean over their
    tokens.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = dpo.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    means = get_batch_logps(logits, labels, average_log_prob=True, is_encoder_decoder=False)
    count = len(labels) // 2
    tokens = (labels[:, 1:] != -100).sum(1)[:count]
    return means[:count], means[count:], -(means[:count] * tokens).sum() / tokens.sum()


def test_orpo_is_trls(pair: Pair, dpo: Any, theirs: dict[str, Any]) -> None:
    """TRL's odds of TRL's means. Its trainer adds the loss of the prompt's tokens too; the paper and we do not."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    parameters = pair.set_factors(dpo.model)
    chosen, rejected, own = means_of_answers(dpo, theirs, ORPOTrainer.get_batch_logps)
    itself = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    odds = ORPOTrainer.odds_ratio_loss(itself, chosen, rejected)[0]
    batch = as_ours(theirs)
    found = ours(pair, batch, Settings("orpo", BETA), None, sft_scale=sft_scale(batch))
    assert_same(found, own - odds.mean(), parameters)


def test_simpo_is_trls(pair: Pair, dpo: Any, theirs: dict[str, Any]) -> None:
    """Without AlphaPO's change of probabilities, which TRL's trainer has inside: its alpha is 0."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    parameters = pair.set_factors(dpo.model)
    chosen, rejected, _ = means_of_answers(dpo, theirs, CPOTrainer.get_batch_logps)
    itself = SimpleNamespace(
        beta=2.0,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses = CPOTrainer.cpo_loss(itself, chosen, rejected)[0]
    found = ours(pair, as_ours(theirs), Settings("simpo", 2.0, gamma=0.5), None)
    assert_same(found, losses.mean(), parameters)


@pytest.fixture(scope="module")
def kto(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = []
    for place, (prompt, chosen, rejected) in enumerate(ROWS):
        text = rejected if place % 2 else chosen
        row = {"prompt": messages("user", prompt), "completion": messages("assistant", text), "label": place % 2 == 0}
        rows.append(row)
    folder = tmp_path_factory.mktemp("kto")
    return trainer("KTO", pair.folder, rows, folder, train_sampling_strategy="sequential")


@pytest.mark.parametrize("objective", ["kto", "apo"])
def test_rated_answers_are_trls(objective: Any, pair: Pair, kto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: the baseline comes from TRL's own pairing of prompts with other answers, by our sums."""
    batch = next(iter(kto.get_train_dataloader()))
    monkeypatch.setattr(kto, "loss_type", "kto" if objective == "kto" else "apo_zero_unpaired")
    monkeypatch.setattr(kto, "calculate_KL", objective == "kto")
    monkeypatch.setattr(kto, "desirable_weight", 1.3)
    monkeypatch.setattr(kto, "undesirable_weight", 0.8)
    good = batch["label"].tolist()
    matched = of_rated(rows_of(batch, range(len(ROWS))), good)
    others = of_rated(rows_of(batch, range(len(ROWS)), "KL_"), good)

    # An adapter that makes the other answers likelier: a baseline of 0 would hide whether it is used.
    pair.set_factors(kto.model, b=0.0)
    _, _, tree = pair.gradients(others).of_answers(others, lambda sums: sums.sum())
    uphill = named(tree)
    factors = {path: (a, -0.02 * np.array(uphill[f"{path}.lora_b"])) for path, (a, _) in pair.factors.items()}
    monkeypatch.setattr(pair, "factors", factors)
    parameters = pair.set_factors(kto.model)
    likelier = pair.reference(others) - np.array(pair.gradients(others).answer_sums(others))
    baseline = float(likelier.mean())
    assert baseline > 0.1

    settings = Settings(objective, BETA, good_weight=1.3, bad_weight=0.8)
    found = ours(pair, matched, settings, pair.reference(matched), baseline=baseline)
    kto.model.train()
    assert_same(found, kto.compute_loss(kto.model, batch), parameters)


def test_twenty_steps_have_the_losses_of_trl(pair: Pair, dpo: Any, theirs: dict[str, Any]) -> None:
    """AdamW, clipped, a constant rate; two pairs a step, the adapter as it begins: B is 0, and the first loss log 2."""
    import torch

    config = configuration.load(None, ("data.path=x", f"train.steps={STEPS}", "train.lr=1e-2", "train.clip_norm=0.5"))
    section = config.train.model_copy(update={"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.01})
    parameters = pair.set_factors(dpo.model, b=0.0)
    batches = [some(theirs, [0, 1]), some(theirs, [2, 3])]
    wanted = []
    adamw = torch.optim.AdamW(parameters.values(), lr=section.lr, weight_decay=section.weight_decay)
    dpo.model.train()
    for number in range(STEPS):
        adamw.zero_grad()
        loss = dpo.compute_loss(dpo.model, batches[number % 2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), section.clip_norm)
        adamw.step()
        wanted.append(loss.item())

    optimizer = optim.build(section, pair.model.trainable_parameters())
    update = optim.Update(optimizer, section.clip_norm)
    mine = [as_ours(batch) for batch in batches]
    references = [np.array(pair.gradients(batch).answer_sums(batch)) for batch in mine]
    losses = []
    for number in range(STEPS):
        batch = mine[number % 2]
        value_of = Value.of(Settings("dpo", BETA), batch, references[number % 2])
        value, _, tree = pair.gradients(batch).of_answers(batch, value_of)
        rate = optim.learning_rate(section, number + 1, STEPS)
        new, state, _ = update(tree, pair.model.trainable_parameters(), batch.pairs, rate)
        mx.eval(new, state)
        pair.model.update(new)
        optimizer.state = state
        losses.append(value.item() / batch.pairs)
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert wanted[-1] < 0.5 * wanted[0]
    np.testing.assert_allclose(losses, wanted, atol=1e-4)
