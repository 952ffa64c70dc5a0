"""Every family against transformers and PEFT, and what a Hugging Face export holds beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conformance
import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from fake_hub import FakeHub, Repo, environment, own_port
from mlxtune_convert.hf import families
from mlxtune_convert.hf.configs import normalise
from mlxtune_convert.sizes import size
from mlxtune_convert.ways_out import described
from safetensors.numpy import load_file

from mlxtune.model import convert
from mlxtune.model.load import load

ROOT = Path(__file__).resolve().parent.parent
UNLIKE = ("ernie4_5_moe", "jamba", "falcon_h1", "deepseek_v32", "mistral3 of mistral4")
# One of each kind of layout; `python tests/conformance.py` measures all.
SAMPLE = (
    *("llama", "phi3", "gemma3_text", "cohere2", "exaone4", "gpt_bigcode", "apertus", "exaone", "glm"),
    *("mixtral", "qwen2_moe", "phimoe", "granitemoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"),
    *("lfm2", "lfm2_moe", "mamba", "mamba2", "qwen3_next", "qwen3_5_text", "llama4_text", "gpt2", "gpt_neox"),
    *("gemma4_text", "gemma4_text experts", "gemma4_text shared", "gemma3n_text", "granitemoehybrid"),
    *("granitemoehybrid dense", "laguna", "nanochat", "nemotron_h", "olmo_hybrid", "exaone_moe", "minimax_m2"),
    *("gemma3", "gemma4", "llama4", "mistral3 of ministral3", "muse_glimmer", "qwen2_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),  # they do match
    pytest.mark.filterwarnings("ignore:.*target_parameters.*:UserWarning"),
]


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_computes_what_transformers_and_peft_compute(family: str, tmp_path: Path) -> None:
    """Converted, trained, taken out as a PEFT adapter and as a model; tables are inverses of each other."""
    row = conformance.measure(family, tmp_path)
    assert not row.refused
    assert row.logits < 5e-5
    assert max(row.peft, row.hf) < 1e-3
    assert row.step < 1e-4
    assert row.back
    assert row.inverse.startswith("bits") or family.startswith(("qwen3_next", "qwen3_5"))


@pytest.mark.parametrize("family", UNLIKE)
def test_a_family_that_mlx_lm_computes_otherwise_is_refused_by_name(family: str, tmp_path: Path) -> None:
    row = conformance.measure(family, tmp_path)
    assert "mlx-lm" in row.refused
    # ernie's bias is zero in a random model: there the difference shows in trained ones alone.
    assert row.logits > 1e-4 or family == "ernie4_5_moe"


def test_an_export_that_cannot_be_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", "falcon_h1")
    options = ("--model", folder, "--to", "hf", "--out", tmp_path / "out", "--no-verify")
    tiny.refused(tmp_path / "out", "export", *options, expected=("falcon_h1", "mlx-lm", "mlxtune fuse"))


@pytest.mark.parametrize("family", [name for name in zoo.REFUSED if name not in ("deepseek_v32", "glm_moe_dsa")])
def test_what_transformers_saves_of_a_refused_family_is_refused_or_measured(family: str, tmp_path: Path) -> None:
    """None of them can be trained and then turn out to have no way out for an unknown reason."""
    row = conformance.measure(family, tmp_path)
    assert row.refused in {*families.NOT_EXPORTED.values(), families.differs(_config(tmp_path / family))}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_an_unknown_family_is_refused_before_any_work(hf_model: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in hf_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "afm7"}))
    options = ("--model", folder, "--adapter", run, "--out", tmp_path / "out")
    for target in ("hf", "peft"):
        expected = ("afm7", "covered: ", "mlxtune fuse")
        tiny.refused(tmp_path / "out", "export", *options, "--to", target, expected=expected)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", "exports of llama: hf, peft, gguf, gguf-lora"),
        (
            "qwen3_vl",
            "exports of qwen3_vl: hf (with --base ORIGINAL, which has the tensors beside the text), peft, gguf",
        ),
        ("granitemoehybrid", "exports of granitemoehybrid: hf, peft; no gguf (models of type granitemoehybrid cannot"),
        ("gemma3_text", "; no gguf (llama.cpp's gemma3 architecture cannot express sliding_window_pattern 2"),
        ("jamba", "cannot be exported: mlx-lm normalises the router"),
        ("dbrx", "what is trained leaves by `mlxtune fuse` alone"),
    ],
)
def test_what_can_leave_is_said_of_a_configuration(family: str, expected: str, tmp_path: Path) -> None:
    original = _config(tiny.make_model(tmp_path, family))
    assert expected in described(original, normalise(original))


def test_train_says_at_its_start_and_in_its_plan_which_exports_there_are(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", "jamba")
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", tiny.conversations(8))
    options = ("--model", model, "--data", tmp_path / "data", "--out", tmp_path / "run", "--set", "train.steps=1")
    said = "note: models of type jamba cannot be exported"
    assert said in tiny.done("train", *options, "--dry-run").stdout
    assert said in tiny.done("train", *options).stderr


def test_the_documented_matrix_names_every_family() -> None:
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "tests" / "families.md").read_text().splitlines() if "|" in line
    ]
    measured = {row for row in rows if row not in ("family", "---")}
    assert measured == set(zoo.SHAPES) | set(families.NOT_EXPORTED)
    assert set(families.LAYOUTS) - {"gemma3n"} <= measured  # Gemma 3n's tower is in another library
    assert not set(families.LAYOUTS) & set(families.NOT_EXPORTED)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_oss", "llama4_text", "mamba2", "qwen3_5_moe", "gemma3n_text", "nanochat"]
)
def test_a_converted_folder_is_plain_mlx_lms(family: str, tmp_path: Path) -> None:
    """What only our table can read from transformers, mlx-lm alone reads from the converted folder; so do we."""
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache

    hf = tiny.make_model(tmp_path / "hf", family)
    convert.convert(str(hf), tmp_path / "mlx", convert.Quantization.of(16, None, None))
    ids = mx.array(conformance.IDS)
    wanted = conformance.logits(conformance.reference(hf))
    theirs, _ = mlx_lm.load(str(tmp_path / "mlx"))
    # As mlx-lm generates: without its cache, Gemma 3n is another model there.
    assert conformance.apart(np.array(theirs(ids, cache=make_prompt_cache(theirs))), wanted) < 5e-5
    assert conformance.apart(np.array(load(str(tmp_path / "mlx")).model(ids)), wanted) < 5e-5


def test_a_vision_model_takes_its_tower_from_the_base(tmp_path: Path) -> None:
    """Refused without it; with it every tensor of the original is there, the tower's bit for bit."""
    hf = tiny.make_model(tmp_path / "hf", "gemma4")
    tiny.done("convert", hf, tmp_path / "mlx", "--bits", "16")
    options = ("--model", tmp_path / "mlx", "--to", "hf", "--out", tmp_path / "out", "--no-verify")
    tiny.refused(tmp_path / "out", "export", *options, expected=("embed_vision", "--base HF_DIR"))
    tiny.done("export", *options, "--base", hf)
    one, other = load_file(hf / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_an_export_stops_where_the_chat_ends_and_tells_its_recipe(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    out = tmp_path / "hf"
    for file in mlx_model.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "generation_config.json").write_text(
        '{"eos_token_id": 0, "temperature": 0.7, "do_sample": true}'
    )
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    options = ("--adapter", run, "--to", "hf", "--out", out, "--no-verify", "--base-name", "acme/tiny")
    tiny.done("export", "--model", tmp_path / "model", *options)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.temperature) == ([0, 2], 0.7)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHATML
    assert (out / "chat_template.jinja").read_text() == tiny.CHATML
    card = (out / "README.md").read_text()
    for text in ("license: apache-2.0", "base_model: acme/tiny", "rank 4", "12 steps", "learning rate 0.01"):
        assert text in card
    assert str(tmp_path) not in card


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(own_port()) as hub:
        yield hub


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with environment(tmp_path_factory.mktemp("home"), HF_TOKEN="hf_mine", HF_HUB_DISABLE_XET="1") as found:
        yield found


def test_a_push_makes_a_private_repository_with_the_same_files(
    hub: FakeHub, user: dict[str, str], mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "peft"
    options = ("--adapter", run, "--to", "peft", "--out", out, "--no-verify", "--push", "me/tiny-tuned")
    result = tiny.done("export", "--model", mlx_model, *options, **user)
    assert "me/tiny-tuned: private" in result.stdout
    repo = hub.repos["me/tiny-tuned"]
    assert repo.private
    assert repo.files == {path.name: path.read_bytes() for path in out.iterdir()}
    posts = [request for request in hub.requests if (request.host, request.method) == ("site", "POST")]
    assert {request.authorization for request in posts} == {"Bearer hf_mine"}


@pytest.mark.parametrize(("private", "option"), [(False, ()), (True, ("--public",))], ids=["public", "private"])
def test_a_repository_that_others_see_than_was_asked_for_is_refused_before_any_work(
    private: bool,
    option: tuple[str, ...],
    hub: FakeHub,
    user: dict[str, str],
    mlx_model: Path,
    run: Path,
    tmp_path: Path,
) -> None:
    """The hub ignores `private` for a repository that is there, and says nothing."""
    hub.repos["me/tiny-tuned"] = Repo({"README.md": b"mine"}, private=private)
    options = ("--adapter", run, "--to", "peft", "--out", tmp_path / "peft", "--no-verify", "--push", "me/tiny-tuned")
    expected = (f"this repository is {'private' if private else 'public'}", "--public")
    words = ("export", "--model", mlx_model, *options, *option)
    tiny.refused(tmp_path / "peft", *words, expected=expected, **user)
    assert hub.repos["me/tiny-tuned"].files == {"README.md": b"mine"}


def test_a_public_push_says_so_and_lists_what_it_uploads(
    hub: FakeHub, user: dict[str, str], mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "peft"
    options = ("--adapter", run, "--to", "peft", "--out", out, "--no-verify", "--push", "me/tiny-tuned", "--public")
    result = tiny.done("export", "--model", mlx_model, *options, **user)
    assert "me/tiny-tuned: public" in result.stdout and not hub.repos["me/tiny-tuned"].private
    for file in out.iterdir():
        assert f"uploading {file.name}, {size(file.stat().st_size)}" in result.stderr
    idle = tiny.mlxtune("export", "--model", mlx_model, *options[:-3], "--force", "--public")
    tiny.one_clear_line(idle, "--public has no effect without --push")


@pytest.mark.parametrize(
    ("repo", "token", "refusal", "expected"),
    [
        ("tiny", "hf_mine", None, "USER/NAME"),
        ("me/tiny", "", None, "hf auth login"),
        ("you/tiny", "hf_mine", (403, "", "Forbidden"), "may not write there"),
    ],
)
def test_a_push_that_cannot_be_says_why(
    repo: str,
    token: str,
    refusal: tuple,
    expected: str,
    hub: FakeHub,
    user: dict[str, str],
    mlx_model: Path,
    run: Path,
    tmp_path: Path,
) -> None:
    hub.upload_refusal = refusal
    options = ("--adapter", run, "--to", "peft", "--out", tmp_path / "peft", "--no-verify", "--push", repo)
    result = tiny.mlxtune("export", "--model", mlx_model, *options, **{**user, "HF_TOKEN": token})
    tiny.one_clear_line(result, expected)
    assert (tmp_path / "peft").exists() == (refusal is not None)  # the export itself is kept
