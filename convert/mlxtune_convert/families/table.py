"""The table of all model families, by model_type of config.json.

**To add a family**, touch two places and a test:

1. One entry in the module here whose models are nearest (`grep -rn '"gemma2"' families` finds the whole of a family).
   `ModelFamily` explains each field; an empty one says "all as in Llama". Begin with `hf=Layout()`; what its files
   name or shape in another way becomes a rule (`hf/rules.py` explains them, `hf/family_rules.py` has the usual ones).
   `gguf=entry(...)` where llama.cpp has the architecture (`gguf/family.py`). A setting that mlx-lm does not heed goes
   to `computes` or `checks`, one that it spells in another way to `config_first` or `config_last`.
2. A tiny model of it in tests/zoo.py. The tests run over that table: tests/conformance.py compares logits of every
   way in and out with transformers (`python tests/conformance.py > tests/families.md` adds the family's row), and
   tests/sweep.py changes every setting and finds those that mlx-lm does not heed.
3. With `gguf`, a line in SHAPES of tests/test_gguf_families.py, which compares with llama.cpp.

Where mlx-lm computes otherwise than transformers and mlxtune mends that in memory, the entry is one of
mlxtune/model/corrections/families.py: this package knows no MLX.

A family that cannot leave as Hugging Face's files gets `not_exported` with the reason instead of `hf`.
"""

from __future__ import annotations

from mlxtune_convert.families import deepseek, exaone, gemma, gpt, granite, llama, olmo, others, phi, qwen, state_space
from mlxtune_convert.families.family import Config, ModelFamily

MODULES = (llama, qwen, gemma, phi, olmo, granite, gpt, deepseek, exaone, state_space, others)
FAMILIES: dict[str, ModelFamily] = {}
for module in MODULES:
    FAMILIES |= module.FAMILIES
_UNKNOWN = ModelFamily()


def family_of(config: Config) -> ModelFamily:
    """The entry of a configuration; an empty one where there is none."""
    return FAMILIES.get(str(config.get("model_type")), _UNKNOWN)
