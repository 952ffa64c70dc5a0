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
from mlxtune import backend, host

LIBRARIES = ("mlx", "mlx-lm", "transformers", "datasets", "huggingface_hub", "numpy", "torch", "peft", "xllamacpp")


def examine() -> tuple[dict[str, str], list[str]]:
    """(facts by name, advice lines). Changes nothing and asks no network."""
    backend.prepare()
    blas = backend.blas()
    import mlx.core as mx

    device = backend.kind()
    free, battery = shutil.disk_usage(Path.cwd()).free, host.battery()
    facts = {
        "mlxtune": mlxtune.__version__,
        "python": f"{platform.python_version()} ({platform.machine()})",
        "system": _system(),
        "chip": backend.chip(),
        "memory": size(backend.memory_bytes()),
        "device": device,
        "free disk": size(free),
        "power": "plugged in, or no battery" if battery is None else f"battery, {battery}%",
    }
    if sys.platform == "darwin":  # elsewhere mlxtune neither holds off sleep nor asks for such a mode
        low_power = {None: "not known here", True: "on (the GPU is slower)", False: "off"}
        facts.update({"sleep": _sleep(), "low power mode": low_power[host.low_power()]})
    held = host.holders()
    facts["other models in memory"] = host.listed(held) or f"none found ({', '.join(host.HOLDERS)})"
    advice = []
    if held and device != "cuda":
        advice.append(f"other programs hold models in memory ({host.listed(held)}): unload them before training")
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set:
        facts["working set"] = size(int(working_set))
    if device == "cpu":
        facts["BLAS"] = blas or "MLX's own (slow)"
        if sys.platform == "linux" and not blas:
            advice.append("OpenBLAS makes float32 some 30 times faster here: apt-get install libopenblas0-pthread")
    if under_rosetta():
        advice.append("this Python runs under Rosetta; install an arm64 Python, or MLX cannot use the GPU")
    advice += host.warnings(Path.cwd())
    facts.update(_hub())
    for name in LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    if "not installed" in (facts["torch"], facts["peft"]):
        advice.append("with torch and peft installed, exports are proven by running them there: pip install torch peft")
    if facts["xllamacpp"] == "not installed":
        advice.append("with xllamacpp installed, GGUF exports are proven by llama.cpp: pip install xllamacpp")
    return facts, advice


def _sleep() -> str:
    if host.can_keep_awake():
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
