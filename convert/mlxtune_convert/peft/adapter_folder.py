"""PEFT adapter folders <-> low-rank updates in MLX's layout, bit for bit.

PEFT computes x A^T B^T * scaling with A [r, in] and B [out, r]; MLX computes x a b * scale with a [in, r], b [r, out].
So A = a^T, B = b^T, and scaling = lora_alpha / r, or lora_alpha / sqrt(r) in rsLoRA: transposes, no arithmetic.

**Experts** are one parameter each of gate_up_proj and down_proj (`target_parameters`). PEFT has the factors of all E of
them in two matrices, in A expert after expert and in B with the expert varying fastest. With E = 2 and r = 2:

    A [E * r, in]    rows     expert 0 rank 0, expert 0 rank 1, expert 1 rank 0, expert 1 rank 1
    B [out, r * E]   columns  rank 0 expert 0, rank 0 expert 1, rank 1 expert 0, rank 1 expert 1

MLX has them apart, a [E, r, in] and b [E, out, r]; gate and up, two layers there, are one update of PEFT (`experts`).

**Targets** name what an update changes, in one string:

    model.layers.0.self_attn.q_proj                 the weight of a linear layer
    model.layers.0.mlp.gate:weight                  the parameter `weight` of what is no linear layer (a router)
    model.layers.0.mlp.experts:down_proj            the parameter down_proj of the module of all experts
    model.layers.0.mlp.experts:gate_up_proj#gate    the half of gate in the parameter gate_up_proj; `#up` is the other
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.peft.experts import alternated, joined, split
from mlxtune_convert.peft.names import NAME_BASE
from mlxtune_convert.peft.settings import CONFIG_FILE, MERGE, Settings
from mlxtune_convert.peft.tensors import PREFIX, UNGATHERED, WEIGHTS_FILE, Tensors, is_embedding, is_head
from mlxtune_convert.tensors import save_checked

Matrix = Callable[[str], np.ndarray | None]  # the matrix of a base's layer by PEFT's name, None: it has none


@dataclass(frozen=True)
class Update:
    """One adapted layer, in MLX's layout."""

    a: np.ndarray  # [in, r]; of experts [E, r, in]
    b: np.ndarray  # [r, out]; of experts [E, out, r]
    scale: float  # of their product
    m: np.ndarray | None = None  # [out]: the magnitudes of DoRA

    @property
    def of_experts(self) -> bool:
        return self.a.ndim == 3

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of the layer's matrix: [out, in]; of experts [E, out, in]."""
        if self.of_experts:
            return (len(self.a), self.b.shape[1], self.a.shape[2])
        return (self.b.shape[1], self.a.shape[0])

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2] if self.of_experts else self.a.shape[-1])


@dataclass(frozen=True)
class Adapter:
    """An adapter under PEFT's names, or under MLX's once `names.to_mlx` has translated it."""

    updates: dict[str, Update]  # by target (see the module), or by module path in MLX
    trained: dict[str, np.ndarray] = field(default_factory=dict)  # whole tensors that replace the base's, by name
    dropout: float = 0.0  # part of the inputs that training leaves out
    rslora: bool = False  # scale = alpha / sqrt(rank)
    base: str = ""  # where the base is, for PEFT: a path or a hub id
    own_head: bool = False  # the embedding is trained and a tied head would not follow it
    tied: bool = False  # the embedding is trained and is the head as well, or was when it was read
    transposed: bool = False  # transformers keeps the linear layers as Conv1D (GPT-2)
    alternate: bool = False  # rows of gate and up alternate in transformers' experts
    some_blocks: bool = False  # it was made for some blocks of its base, not for all
    copies: dict[str, np.ndarray] = field(default_factory=dict)  # matrices below adapted layers, where it has them


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    updates = joined(adapter.updates, adapter.alternate)
    parameters = [_dotted(target) for target in updates if ":" in target]
    dora = any(update.m is not None for update in updates.values())
    if dora and parameters:
        raise UserError(
            f"PEFT has no DoRA for experts, routers and their like ({parameters[0]})",
            "`mlxtune export --to hf` exports the merged model.",
        )
    tensors = {PREFIX + name: array for name, array in adapter.trained.items()}
    for target, update in updates.items():
        module, _, parameter = target.partition(":")
        # PEFT wraps the experts once per parameter: gate_up_proj ends up inside.
        inner = ".base_layer" if parameter == "gate_up_proj" and f"{module}:down_proj" in updates else ""
        a, b = _peft_factors(update)
        tensors[f"{PREFIX}{module}{inner}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{module}{inner}.lora_B.weight"] = np.ascontiguousarray(b)
        if update.m is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = update.m
    save_checked(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(folder / CONFIG_FILE, _config(adapter, updates, parameters, dora))


def _dotted(target: str) -> str:
    """A target as adapter_config.json has it, whether module or parameter."""
    return target.replace(":", ".")


def _config(adapter: Adapter, updates: dict[str, Update], parameters: list[str], dora: bool) -> dict[str, Any]:
    """adapter_config.json. parameters: those of the targets that are no linear layers, with dots."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, update in updates.items():
        divisor = math.sqrt(update.rank) if adapter.rslora else update.rank
        ranks[_dotted(target)] = update.rank
        alphas[_dotted(target)] = _alpha(update.scale, divisor)
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        # PEFT refuses dropout on parameters; it matters to training alone.
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "use_rslora": adapter.rslora,
        "use_dora": dora,
        "inference_mode": True,
        # Full paths: exactly these modules, whatever else in the model has the same last name.
        "target_modules": sorted(ranks.keys() - set(parameters)),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.trained}) or None,
        "ensure_weight_tying": adapter.tied,
    }


def _peft_factors(update: Update) -> tuple[np.ndarray, np.ndarray]:
    """A and B as PEFT has them: [r, in] and [out, r]; of experts [E * r, in] and [out, r * E]."""
    if not update.of_experts:
        return update.a.T, update.b.T
    experts, rank, inputs = update.a.shape
    outputs = update.b.shape[1]
    a = update.a.reshape(experts * rank, inputs)  # [E, r, in] -> [E * r, in]
    b = update.b.transpose(1, 2, 0).reshape(outputs, rank * experts)  # [E, out, r] -> [out, r, E] -> [out, r * E]
    return a, b


def _of_peft_experts(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_peft_factors` for experts: [E, r, in] and [E, out, r]."""
    experts, outputs = len(a) // rank, len(b)
    a = a.reshape(experts, rank, -1)  # [E * r, in] -> [E, r, in]
    b = b.reshape(outputs, rank, experts).transpose(2, 0, 1)  # [out, r * E] -> [out, r, E] -> [E, out, r]
    return a, np.ascontiguousarray(b)


def _usual(found: Collection[float]) -> float:
    """The most common number, the largest of several: whatever the order of the layers."""
    counts = Counter(found or [8])
    return max(counts, key=lambda number: (counts[number], number))


def _alpha(scale: float, divisor: float) -> float:
    """The lora_alpha that PEFT divides back into exactly `scale`, a whole number where one does."""
    near = scale * divisor
    tries = (float(round(near)), round(near, 6), near, np.nextafter(near, 0.0), np.nextafter(near, np.inf))
    alpha = next((float(value) for value in tries if value / divisor == scale), near)
    return int(alpha) if alpha.is_integer() else alpha


def read_adapter(folder: Path, matrix: Matrix | None = None) -> Adapter:
    """A PEFT adapter folder, under the names in its file.

    LoRA on an embedding and trained token rows become the whole matrix [vocabulary, width] that they make; `matrix`
    gives it as it is in the base, where the file has no copy. Raises UserError naming the key or tensor of whatever
    would be understood wrongly or not at all, and for an adapter without numbers.
    """
    settings = Settings.read(folder)
    tensors = Tensors.read(folder, settings)
    updates: dict[str, Update] = {}
    trained = dict(tensors.whole)
    for module, parts in tensors.factors.items():
        if "embedding_A" in parts or "embedding_B" in parts:
            trained[f"{module}.weight"] = _embedding(settings, tensors, module, matrix)
        else:
            updates |= _updates(settings, tensors, module)
    chosen = settings.values.get("trainable_token_indices")
    if chosen and not tensors.rows:
        raise UserError(
            f"{tensors.file} has no rows for trainable_token_indices {chosen!r}", "Save it again with PEFT."
        )
    for module in tensors.rows:
        trained[f"{module}.weight"] = _with_rows(settings, tensors, module, matrix)
    if not (updates or trained):
        raise UserError(f"{tensors.file} adapts no layer", "Save it again with PEFT.")
    return _tied(settings, tensors, updates, trained)


def _embedding(settings: Settings, tensors: Tensors, module: str, matrix: Matrix | None) -> np.ndarray:
    """W + scale * (B A)^T of an embedding; embedding_A is [r, vocabulary], embedding_B [width, r]."""
    a, b = _pair(tensors, module, "embedding_")
    if "magnitude_vector" in tensors.factors[module]:
        raise UserError(f"{tensors.file}: DoRA on the embedding {module} is not understood", MERGE)
    _check_rank(tensors, module, len(a), settings.rank(module))
    update = np.float32(settings.scale(module)) * (a.T @ b.T)
    below = _below(tensors, module, matrix)
    if below.shape != update.shape:
        raise UserError(
            f"{tensors.file}: the factors of {module} are for {update.shape}, the base's matrix is {below.shape}",
            "Name the model that it was trained on, with the same tokens added.",
        )
    return below + update


def _with_rows(settings: Settings, tensors: Tensors, module: str, matrix: Matrix | None) -> np.ndarray:
    """An embedding or head whose chosen rows are the trained ones; PEFT calls these values a delta, they are whole."""
    rows, values = settings.token_rows(module), tensors.rows[module]
    whole = np.array(_below(tensors, module, matrix))
    if len(rows) != len(values) or max(rows) >= len(whole) or values.shape[1:] != whole.shape[1:]:
        raise UserError(
            f"{tensors.file}: trainable_token_indices names {len(rows)} tokens up to {max(rows, default=0)}, the file "
            f"has {len(values)} rows for {module}, which has {len(whole)}",
            "Name the model that it was trained on, with the same tokens added.",
        )
    whole[rows] = values
    return whole


def _below(tensors: Tensors, module: str, matrix: Matrix | None) -> np.ndarray:
    """The matrix that an embedding's adapter changes: of the adapter's own file, which PEFT loads, or of the base."""
    found = tensors.copies.get(module)
    if found is None:
        found = tensors.whole.get(f"{module}.weight")
    if found is None and matrix is not None:
        found = matrix(module)
    if found is None:
        raise UserError(
            f"{tensors.file} changes a part of the embedding {module}, which MLX trains whole: the rest is needed",
            NAME_BASE,
        )
    return found


def _tied(settings: Settings, tensors: Tensors, updates: dict[str, Update], trained: dict[str, np.ndarray]) -> Adapter:
    """The adapter, one matrix where embedding and head are the same. PEFT writes tied ones under both names."""
    embedding = _first(trained, is_embedding)
    module = embedding.removesuffix(".weight")
    lora_head = _first(updates, is_head)
    if lora_head and _is_transposed(updates[lora_head], tensors.factors.get(module, {})):
        del updates[lora_head]
        trained[f"{lora_head}.weight"] = trained[embedding]
    head = _first(trained, lambda name: is_head(name.rpartition(".")[0]))
    tied = bool(embedding and head) and _same(trained[embedding], trained[head])
    if settings.ties and embedding and head and not tied:
        raise UserError(
            f"{tensors.file}: {embedding} and {head} differ, and ensure_weight_tying says that they are one matrix",
            "Save it again with PEFT.",
        )
    if tied:
        del trained[head]
    # To a tied head PEFT gives rows of tokens by itself, and other changes where it is told to and the name is this.
    follows = module in tensors.rows or (settings.ties and module.rpartition(".")[2] == "embed_tokens")
    return Adapter(
        updates,
        trained,
        dropout=settings.dropout,
        rslora=settings.rslora,
        base=settings.base,
        own_head=bool(embedding) and not head and not follows,
        tied=tied,
        some_blocks=settings.some_blocks,
        copies={module: copy for module, copy in tensors.copies.items() if module in updates},
    )


def _first(names: Iterable[str], is_one: Callable[[str], bool]) -> str:
    """The first name that is one, or ""."""
    return next((name for name in names if is_one(name)), "")


def _is_transposed(head: Update, embedding: dict[str, np.ndarray]) -> bool:
    """Whether a head's update is that of the embedding: a [width, r] = B and b [r, tokens] = A of that one."""
    if "embedding_A" not in embedding:
        return False
    return _same(head.b, embedding["embedding_A"]) and _same(head.a, embedding["embedding_B"])


def with_head(adapter: Adapter) -> Adapter:
    """The same for a model whose head is a matrix of its own."""
    if not adapter.tied:
        return adapter
    embedding = next(array for name, array in adapter.trained.items() if is_embedding(name))
    return replace(adapter, trained={**adapter.trained, "lm_head.weight": embedding}, tied=False)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _pair(tensors: Tensors, module: str, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The factors A and B of a module, both matrices."""
    parts = tensors.factors[module]
    a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
    if a is None or b is None:
        raise UserError(f"{tensors.file}: {module} lacks lora_{kind}A or lora_{kind}B", "Copy or download it again.")
    if a.ndim == b.ndim == 1:
        raise UserError(f"{tensors.file}: the factors of {module} have one axis", UNGATHERED)
    if a.ndim != 2 or b.ndim != 2:
        raise UserError(
            f"{tensors.file}: {module} is no linear layer: its factors are {a.shape} and {b.shape}",
            "LoRA on convolutions cannot be read. " + MERGE,
        )
    if a.shape[0] != b.shape[1]:
        raise UserError(
            f"{tensors.file}: the factors of {module} do not fit each other: {a.shape} and {b.shape}",
            "Copy or download it again.",
        )
    return a, b


def _check_rank(tensors: Tensors, module: str, found: int, said: int) -> None:
    if found != said:
        raise UserError(
            f"{tensors.file}: {module} has rank {found}, adapter_config.json says {said}",
            "Copy or download both files again: they belong together.",
        )


def _updates(settings: Settings, tensors: Tensors, module: str) -> dict[str, Update]:
    """The update of one PEFT module by target: one, or two for the experts' gate_up_proj."""
    a, b = _pair(tensors, module)
    m = tensors.factors[module].get("magnitude_vector")
    parameter = _parameter(settings, module, tensors.factors.keys())
    module = module.removesuffix(".base_layer")
    name = f"{module}.{parameter}" if parameter else module
    target = f"{module}:{parameter}" if parameter else module
    rank, scale = settings.rank(name), settings.scale(name)
    of_experts = parameter not in ("", "weight")
    if not of_experts or len(a) % rank:
        _check_rank(tensors, module, len(a), rank)
    if not of_experts:
        m = None if m is None else m.reshape(-1)  # [out], without axes of length 1
        return {target: Update(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), scale, m)}
    update = Update(*_of_peft_experts(a, b, rank), scale)
    return split(target, update, alternate=False) if parameter == "gate_up_proj" else {target: update}


def _parameter(settings: Settings, module: str, modules: Collection[str]) -> str:
    """Which parameter of `module` PEFT adapts, or "" when it is a linear layer. modules: all that are adapted."""
    plain = module.removesuffix(".base_layer")
    found = set()
    for wanted in settings.parameters:  # the end of a path, such as mlp.experts.down_proj, or all of it
        parameter = wanted.rpartition(".")[2]
        if f".{plain}.{parameter}".endswith(f".{wanted}"):
            found.add(parameter)
    if len(found) < 2:
        return next(iter(found), "")
    # PEFT wrapped the module twice: gate_up_proj is inside.
    if f"{plain}.base_layer" not in modules:
        raise UserError(f"{module}: which of its parameters is adapted cannot be told", MERGE)
    return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"


def check_adapter(folder: Path, adapter: Adapter) -> int:
    """Read the folder back; return how many tensors are the given ones bit for bit. Raises UserError otherwise."""
    found, expected = arrays(read_back(folder, adapter)), arrays(adapter)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or not _same(found[name], expected[name]):
            raise UserError(f"{name}: the file does not hold what was trained", "Check the disk.")
    return len([name for name in found if not name.endswith(".scale")])


def read_back(folder: Path, adapter: Adapter) -> Adapter:
    """A folder that should hold `adapter`, in the form that this has."""
    read = with_head(read_adapter(folder))
    return replace(read, updates=alternated(read.updates)) if adapter.alternate else read


def arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every array of an adapter by name, in the shapes of `Update`, each scale as one without axes."""
    out = dict(adapter.trained)
    for path, update in adapter.updates.items():
        parts = {"a": update.a, "b": update.b, "m": update.m, "scale": np.array(update.scale)}
        out |= {f"{path}.{name}": array for name, array in parts.items() if array is not None}
    return out
