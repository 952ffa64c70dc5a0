"""LoRA: y = W x + scale * B A x with W frozen (Hu et al. 2021, arXiv:2106.09685), names and file layout as in mlx-lm.

Legend: in, out widths of a linear layer; r rank; E experts. Factors are float32 masters; their products run in the
activation dtype. `lora_a` starts uniform in +-1/sqrt(in), `lora_b` at zero, so the first step sees the base model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlxtune_convert.files import read_json, write_json
from mlxtune_convert.tensors import read_header

from mlxtune.config import LoraSection
from mlxtune.errors import UserError
from mlxtune.model.arrays import save_arrays
from mlxtune.model.dropout import DropoutKeys, keys_for

ADAPTER_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)


class LoRALinear(nn.Module):
    """A linear layer with its update: lora_a [in, r], lora_b [r, out]."""

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, key: mx.array, index: int, dropout: DropoutKeys
    ) -> None:
        super().__init__()
        outputs, inputs = dense_shape(linear)
        self.linear = linear
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))
        self._index = index
        self._dropout = dropout

    def __call__(self, x: mx.array) -> mx.array:
        z = self._dropout.apply(x, self._index)
        z = (z @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return self.linear(x) + self.scale * z

    def delta(self) -> mx.array:
        """The update as a matrix [out, in], float32."""
        return self.scale * (self.lora_b.T @ self.lora_a.T)


class LoRASwitchLinear(nn.Module):
    """Expert layers with one update each: lora_a [E, r, in], lora_b [E, out, r]."""

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, key: mx.array, index: int, dropout: DropoutKeys
    ) -> None:
        super().__init__()
        experts, outputs, inputs = dense_shape(linear)
        self.linear = linear
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs), key=key)
        self.lora_b = mx.zeros((experts, outputs, rank))
        self._index = index
        self._dropout = dropout

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        z = self._dropout.apply(x, self._index)
        for factor in (self.lora_a, self.lora_b):
            weight = factor.astype(x.dtype).swapaxes(-1, -2)
            z = mx.gather_mm(z, weight, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * z

    def delta(self) -> mx.array:
        """The updates as matrices [E, out, in], float32."""
        return self.scale * (self.lora_b @ self.lora_a)


Adapter = LoRALinear | LoRASwitchLinear


def dense_shape(linear: nn.Module) -> tuple[int, ...]:
    """The shape of a linear layer's matrix before quantization: [out, in], or [E, out, in]."""
    *shape, columns = linear.weight.shape
    if isinstance(linear, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)):
        columns = columns * 32 // linear.bits
    return (*shape, columns)


@dataclass(frozen=True)
class Spec:
    """What an adapter is: enough to build it again on the same base. keys: module paths inside a block;
    num_layers: how many blocks from the last one; scale = alpha / rank."""

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    num_layers: int

    @staticmethod
    def of(model: nn.Module, section: LoraSection) -> Spec:
        """Resolve targets and layers against a model. Raises UserError naming what there is."""
        count = len(model.layers)
        wanted = count if section.layers == "all" else section.layers
        if wanted > count:
            raise UserError(f"lora.layers {wanted}: the model has {count} blocks", f"Use 1 to {count}, or all.")
        available = sorted({path for block in model.layers[count - wanted :] for path in linear_paths(block)})
        if section.targets == "all-linear":
            keys = available
        else:
            keys = []
            for target in section.targets:
                matched = [path for path in available if path == target or path.endswith("." + target)]
                if not matched:
                    names = sorted({path.rsplit(".", 1)[-1] for path in available})
                    near = difflib.get_close_matches(target, names, n=1)
                    raise UserError(
                        f"lora.targets: no linear layer is called {target!r}",
                        (f"Did you mean {near[0]}? " if near else "") + f"This model has: {', '.join(names)}.",
                    )
                keys += matched
        return Spec(section.rank, section.alpha / section.rank, section.dropout, tuple(sorted(set(keys))), wanted)


def linear_paths(block: nn.Module) -> list[str]:
    return [path for path, module in block.named_modules() if isinstance(module, LINEAR + SWITCH)]


def attach(model: nn.Module, spec: Spec, seed: int = 0) -> DropoutKeys:
    """Freeze the model and wrap its target layers; only lora_a and lora_b stay trainable.

    Returns the keys object that a training step sets before each forward pass.
    """
    model.freeze()
    dropout = DropoutKeys(spec.dropout)
    keys = set(spec.keys)
    index = 0
    for block in model.layers[len(model.layers) - spec.num_layers :]:
        wrapped = []
        for path, module in block.named_modules():
            if path in keys and isinstance(module, LINEAR + SWITCH):
                kind = LoRASwitchLinear if isinstance(module, SWITCH) else LoRALinear
                layer = kind(module, spec.rank, spec.scale, _init_key(seed, index), index, dropout)
                layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
                wrapped.append((path, layer))
                index += 1
        if wrapped:
            block.update_modules(tree_unflatten(wrapped))
    if index == 0:
        raise UserError("the adapter fits no layer of this model", "It was trained on another architecture.")
    return dropout


def _init_key(seed: int, index: int) -> mx.array:
    return mx.array(keys_for(seed, 0, [index], 1)[0, 0])


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapted layer by its path in the model, such as `model.layers.0.self_attn.q_proj`."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, (LoRALinear, LoRASwitchLinear))
    }


def factors(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors under mlx-lm's names."""
    out = {}
    for path, layer in adapters(model).items():
        out[f"{path}.lora_a"] = layer.lora_a
        out[f"{path}.lora_b"] = layer.lora_b
    return out


def save_config(folder: Path, spec: Spec) -> None:
    """adapter_config.json, as mlx-lm reads it."""
    parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "keys": list(spec.keys)}
    write_json(
        folder / CONFIG_FILE, {"fine_tune_type": "lora", "num_layers": spec.num_layers, "lora_parameters": parameters}
    )


def read_spec(folder: Path) -> Spec:
    """The adapter that a run folder (or any mlx-lm adapter folder) holds. Raises UserError when it holds none."""
    if not folder.is_dir():
        raise UserError(f"no adapter folder {folder}")
    config = read_json(folder / CONFIG_FILE, "an adapter folder: adapters.safetensors and adapter_config.json")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{folder}: adapters of type {kind!r} cannot be used yet", "Only LoRA adapters can.")
    try:
        parameters = config["lora_parameters"]
        return Spec(
            int(parameters["rank"]),
            float(parameters["scale"]),
            float(parameters.get("dropout", 0.0)),
            tuple(parameters.get("keys") or _keys_in(folder)),
            int(config["num_layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: not an MLX adapter's configuration ({error})") from error


def _keys_in(folder: Path) -> list[str]:
    """Module paths inside a block, from the tensors' names: mlx-lm leaves them out when it adapts every layer."""
    names = read_header(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else {}
    matches = (re.search(r"layers\.\d+\.(.+)\.lora_a$", name) for name in names)
    return sorted({match[1] for match in matches if match})


def load_adapter(model: nn.Module, folder: Path) -> Spec:
    """Attach the adapter in `folder` and load its tensors.

    Raises UserError listing every tensor that does not fit: the adapter was trained on another base.
    """
    spec = read_spec(folder)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {ADAPTER_FILE}", "The run saved no adapter: train it, or resume it.")
    layers = len(model.layers)
    if spec.num_layers > layers:
        raise UserError(f"{folder}: the adapter covers {spec.num_layers} blocks, the model has {layers}")
    if spec.num_layers <= 0:  # mlx-lm's way to say all
        spec = Spec(spec.rank, spec.scale, spec.dropout, spec.keys, layers)
    attach(model, spec)
    load_factors(model, file)
    return spec


def load_factors(model: nn.Module, file: Path) -> None:
    """Copy saved factors into the attached layers, exactly. Raises UserError for a torn file or wrong names or
    shapes.
    """
    try:
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: not a safetensors file, or a torn one") from error
    expected = {name: array.shape for name, array in factors(model).items()}
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} has no place in this model" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{file} does not fit this model: {min(problems)}{more}", "Use the model that the adapter was trained on."
        )
    # Copies: MLX reads files lazily, and the file may be replaced while we hold it.
    model.load_weights([(name, mx.array(array.astype(mx.float32))) for name, array in tensors.items()], strict=False)
    mx.eval(factors(model))


def save_factors(model: nn.Module, folder: Path) -> None:
    """Write adapters.safetensors into `folder`, whole or not at all. A full disk raises OSError."""
    save_arrays(folder / ADAPTER_FILE, factors(model))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model: every adapter's scale is zero inside."""
    layers = list(adapters(model).values())
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def describe(spec: Spec, model: nn.Module) -> str:
    """One line for people: what is trained."""
    count = sum(array.size for array in factors(model).values())
    names = sorted({key.rsplit(".", 1)[-1] for key in spec.keys})
    return (
        f"{count:,} parameters (rank {spec.rank}, scale {spec.scale:g}, {spec.num_layers} blocks: {', '.join(names)})"
    )
