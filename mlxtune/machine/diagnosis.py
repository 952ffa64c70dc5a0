"""Facts about this machine and its installation, and advice on what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from mlxtune_convert.sizes import size

import mlxtune
from mlxtune.machine import backend, surroundings, tested

LIBRARIES = ("mlx", "mlx-lm", "transformers", "datasets", "huggingface_hub", "numpy", "torch", "peft", "xllamacpp")


def examine() -> tuple[dict[str, str], list[str]]:
    """(facts by name, advice lines). Changes nothing and asks no network."""
    backend.prepare()
    facts = {**_machine(), **_surroundings(), **_computing(), **_hub(), **_versions()}
    return facts, _advice(facts)


def _machine() -> dict[str, str]:
    return {
        "mlxtune": mlxtune.__version__,
        "python": f"{platform.python_version()} ({platform.machine()})",
        "system": _system(),
        "chip": backend.chip(),
        "memory": size(backend.memory_bytes()),
        "device": backend.kind(),
    }


def _surroundings() -> dict[str, str]:
    battery = surroundings.battery()
    facts = {
        "free disk": size(shutil.disk_usage(Path.cwd()).free),
        "power": "plugged in, or no battery" if battery is None else f"battery, {battery}%",
    }
    if sys.platform == "darwin":  # elsewhere mlxtune neither holds off sleep nor asks for such a mode
        low_power = {None: "not known here", True: "on (the GPU is slower)", False: "off"}
        facts["sleep"] = _sleep()
        facts["low power mode"] = low_power[surroundings.low_power()]
    held = surroundings.listed(surroundings.holders())
    facts["other models in memory"] = held or f"none found ({', '.join(surroundings.HOLDERS)})"
    return facts


def _computing() -> dict[str, str]:
    import mlx.core as mx

    facts = {}
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set:
        facts["working set"] = size(int(working_set))
    if backend.kind() == "cpu":
        facts["BLAS"] = backend.blas() or "MLX's own (slow)"
    return facts


def _versions() -> dict[str, str]:
    facts = {}
    for name in LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    known = tested.versions()
    facts["tested with"] = ", ".join(f"{name} {known[name]}" for name in tested.DECISIVE)
    return facts


def _advice(facts: dict[str, str]) -> list[str]:
    advice = []
    held = surroundings.holders()
    if held and backend.kind() != "cuda":  # a CUDA device has memory of its own
        advice.append(
            f"other programs hold models in memory ({surroundings.listed(held)}): unload them before training"
        )
    if backend.kind() == "cpu" and sys.platform == "linux" and not backend.blas():
        advice.append("OpenBLAS makes float32 some 30 times faster here: apt-get install libopenblas0-pthread")
    if under_rosetta():
        advice.append("this Python runs under Rosetta; install an arm64 Python, or MLX cannot use the GPU")
    advice += surroundings.warnings(Path.cwd())
    advice += tested.untested()
    if "not installed" in (facts["torch"], facts["peft"]):
        advice.append("with torch and peft installed, exports are proven by running them there: pip install torch peft")
    if facts["xllamacpp"] == "not installed":
        advice.append("with xllamacpp installed, GGUF exports are proven by llama.cpp: pip install xllamacpp")
    return advice


def _sleep() -> str:
    if surroundings.can_keep_awake():
        return "held off while training, as long as the lid is open (caffeinate)"
    return "not held off here"


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def under_rosetta() -> bool:
    """An x86_64 process on Apple silicon."""
    if sys.platform != "darwin":
        return False
    answer = subprocess.run(["sysctl", "-in", "sysctl.proc_translated"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "1"


def _hub() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    return {
        "hub login": "yes" if get_token() else "no (needed for gated models: hf auth login)",
        "hub offline": "yes" if constants.is_offline_mode() else "no",
        "hub cache": str(os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)),
    }
