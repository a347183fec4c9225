"""A FLUX.2 folder is read as data: what is missing, foreign or broken is one line before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from safetensors.torch import load_file, save_file

from sdlab.errors import SdlabError
from sdlab.models.flux2 import Flux2, size_of
from sdlab.models.flux2_folder import Flux2Parts, read_flux2_folder
from sdlab.models.flux2_text import PromptReader
from sdlab.models.parts import Part, load
from tests.models.helpers import TEXT, VAE, copied, edit_json, edit_tensors

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], Any]


def js(name: str, **values: Any) -> Change:
    return lambda folder: edit_json(folder / name, **values)


def index(part: str, value: Any) -> Change:
    return js("model_index.json", **{part: value})


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda folder: edit_tensors(folder / name, change)


def template(text: str) -> Change:
    return lambda folder: (folder / "tokenizer/chat_template.jinja").write_text(text)


BROKEN: dict[str, tuple[Change, str]] = {
    "a foreign class": (index("transformer", ["os", "system"]), "class sdlab does not load"),
    "a foreign text encoder": (
        index("text_encoder", ["transformers", "AutoModel"]),
        "class sdlab does not load",
    ),
    "code beside it": (index("custom", ["my_code", "Thing"]), "unknown part 'custom'"),
    "a processor for klein": (index("tokenizer", ["transformers", "PixtralProcessor"]), "does not load"),
    "no vae": (index("vae", [None, None]), "names no vae"),
    "another transformer": (
        js("transformer/config.json", _class_name="FluxTransformer2DModel"),
        "not Flux2",
    ),
    "another vae": (js("vae/config.json", _class_name="AutoencoderKL"), "not AutoencoderKLFlux2"),
    "another text encoder": (
        js("text_encoder/config.json", model_type="llama"),
        "is a 'llama', not the 'qwen3'",
    ),
    "few layers": (
        js("text_encoder/config.json", num_hidden_layers=20),
        "has 20 layers, FLUX.2 klein reads 28",
    ),
    "no layers": (js("text_encoder/config.json", num_hidden_layers="x"), "has x layers"),
    "endless layers": (js("transformer/config.json", num_layers=10**6), "num_layers is 1000000"),
    "endless width": (js("text_encoder/config.json", hidden_size=10**9), "hidden_size is"),
    "other positions": (
        js("text_encoder/config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
        "rope_type is 'yarn'",
    ),
    "positions unsaid": (js("text_encoder/config.json", rope_parameters={}), "does not say its rope_theta"),
    "fewer prompt channels": (js("transformer/config.json", joint_attention_dim=24), "context_embedder"),
    "a schedule of one": (
        js("scheduler/scheduler_config.json", num_train_timesteps=1),
        "num_train_timesteps",
    ),
    "no template": (lambda f: (f / "tokenizer/chat_template.jinja").unlink(), "has no chat template"),
    "an endless template": (template("x" * (1 << 19)), "too large for a chat template"),
    "a lost tensor": (
        tensors(TRANSFORMER, lambda t: t.pop("x_embedder.weight")),
        "'x_embedder.weight'.*missing",
    ),
    "a lost layer": (
        tensors(TEXT, lambda t: t.pop("model.layers.27.mlp.up_proj.weight")),
        "'layers.27.mlp.up_proj.weight'.*missing",
    ),
    "a tensor too many": (
        tensors(TRANSFORMER, lambda t: t.update(evil=torch.zeros(1))),
        "'evil' has no place",
    ),
    "a misshapen tensor": (
        tensors(VAE, lambda t: t.update({"bn.running_var": torch.ones(3)})),
        r"'bn.running_var' has the shape \[3\]",
    ),
    "no statistics": (tensors(VAE, lambda t: t.pop("bn.running_var")), "'bn.running_var'.*missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_before_loading(
    tiny_klein_folder: Path, tmp_path: Path, name: str
) -> None:
    change, said = BROKEN[name]
    folder = copied(tiny_klein_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(SdlabError, match=said) as raised:
        Flux2(read_flux2_folder(folder))
    assert "\n" not in str(raised.value)


def test_parts_of_models_of_two_sizes_are_refused(tiny_klein_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_klein_folder, tmp_path / "model")
    edit_json(folder / "transformer/config.json", joint_attention_dim=96)
    edit_tensors(folder / TRANSFORMER, lambda t: t.update({"context_embedder.weight": torch.zeros(32, 96)}))
    with pytest.raises(SdlabError, match=r"prompt width \(96\) differ from the 3 times the width .*\(48\)"):
        Flux2(read_flux2_folder(folder))


def test_a_vae_without_its_count_of_batches_loads(tiny_klein_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_klein_folder, tmp_path / "model")
    edit_tensors(folder / VAE, lambda t: t.pop("bn.num_batches_tracked"))
    family = Flux2(read_flux2_folder(folder))
    assert family.fingerprint == Flux2(read_flux2_folder(tiny_klein_folder)).fingerprint
    vae = load(family.parts.vae, torch.device("cpu"), torch.float32)
    assert vae.bn.running_mean.std() > 0.1


def test_shards_and_older_names_of_text_encoders_are_the_same(
    tiny_klein_folder: Path, tiny_dev_folder: Path, tmp_path: Path
) -> None:
    """Two shards for klein; for dev the names of transformers 5, in which the language half moved."""
    folder = copied(tiny_klein_folder, tmp_path / "klein")
    whole = load_file(folder / TEXT)
    names = sorted(whole)
    (folder / TEXT).unlink()
    places = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, folder / "text_encoder" / file)
        places |= dict.fromkeys(part, file)
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same_text(read_flux2_folder(folder), read_flux2_folder(tiny_klein_folder))

    folder = copied(tiny_dev_folder, tmp_path / "dev")

    def rename(table: dict[str, torch.Tensor]) -> None:
        for name in list(table):
            old = name.removeprefix("model.")
            new = {
                "language_model.model.": "model.language_model.",
                "language_model.layers": "language_model.model.layers",
                "language_model.embed": "language_model.model.embed",
                "language_model.norm": "language_model.model.norm",
            }
            for before, after in new.items():
                if old.startswith(before):
                    table[after + old.removeprefix(before)] = table.pop(name)
                    break

    edit_tensors(folder / TEXT, rename)
    assert load_file(folder / TEXT).keys() != load_file(tiny_dev_folder / TEXT).keys()
    assert same_text(read_flux2_folder(folder), read_flux2_folder(tiny_dev_folder))


def same_text(mine: Flux2Parts, wanted: Flux2Parts) -> bool:
    def state(part: Part) -> dict[str, torch.Tensor]:
        return {name: stored.read() for name, stored in part.weights.items()}

    one, two = state(mine.text_encoder), state(wanted.text_encoder)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def test_a_processors_folder_gives_its_plain_tokenizer(tiny_dev_folder: Path, tmp_path: Path) -> None:
    """FLUX.2 dev names a PixtralProcessor, which needs torchvision; its text side does not."""
    folder = copied(tiny_dev_folder, tmp_path / "dev")
    edit_json(folder / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    edit_json(
        folder / "tokenizer/tokenizer_config.json", processor_class="PixtralProcessor", tokenizer_class="Evil"
    )
    (folder / "tokenizer/processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    mine, plain = PromptReader(read_flux2_folder(folder)), PromptReader(read_flux2_folder(tiny_dev_folder))
    for prompt in ("a red star", "[IMG] no picture", ""):
        assert all(torch.equal(t, plain.tokens(prompt)[name]) for name, t in mine.tokens(prompt).items())
    tokens = mine.tokens("a red star")
    assert tokens["attention_mask"][0, 0] == 0 and tokens["attention_mask"][0, -1] == 1  # filled on the left


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "hello",
    ],
)
def test_a_models_own_template_is_never_run(tiny_klein_folder: Path, tmp_path: Path, text: str) -> None:
    folder = copied(tiny_klein_folder, tmp_path / "model")
    template(text)(folder)
    said = PromptReader(read_flux2_folder(folder)).render("a red star")
    assert said == PromptReader(read_flux2_folder(tiny_klein_folder)).render("a red star")


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_the_template_is_what_the_models_own_gives(
    tiny_klein_folder: Path, tiny_dev_folder: Path, kind: str
) -> None:
    reader = PromptReader(read_flux2_folder({"klein": tiny_klein_folder, "dev": tiny_dev_folder}[kind]))
    messages = [{"role": "user", "content": "a {red} star"}]
    settings = {"add_generation_prompt": True, "enable_thinking": False}
    if kind == "dev":
        messages, settings = format_input(["a {red} star"])[0], {"add_generation_prompt": False}
    theirs = reader.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    assert reader.render("a {red} star") == theirs


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_what_falls_out_of_the_window_is_told(
    tiny_klein_folder: Path, tiny_dev_folder: Path, kind: str
) -> None:
    reader = PromptReader(read_flux2_folder({"klein": tiny_klein_folder, "dev": tiny_dev_folder}[kind]))
    around = reader.lost("")[0]
    assert reader.lost("a red star") == (around + 10, "")
    before = len(reader.tokenizer(reader.render("X").split("X")[0], add_special_tokens=False).input_ids)
    room = reader.window - before
    prompt = "x" * (room - 3) + " yz tail"
    count, lost = reader.lost(prompt)
    assert count == around + len(prompt) and lost == "tail"
    kept = reader.tokenizer.decode(reader.tokens(prompt)["input_ids"][0])
    assert " yz" in kept.replace("Ġ", " ") and "tail" not in kept


def test_the_size_of_the_released_models_is_known_without_their_weights() -> None:
    """Counts of flux2.md: transformer parameters, and LoRA parameters at rank 16."""
    real = {
        (5, 20, 24, 7680, False): (3_875_544_576, 24.1e6, 25, 3072),
        (8, 24, 32, 12288, False): (9_078_581_248, 43.5e6, 32, 4096),
        (8, 48, 48, 15360, True): (32_223_281_152, 100.7e6, 56, 6144),
    }
    for (doubles, singles, heads, joint, guided), (count, lora, blocks, width) in real.items():
        config = {
            "num_layers": doubles, "num_single_layers": singles, "num_attention_heads": heads,
            "joint_attention_dim": joint, "guidance_embeds": guided,
        }  # fmt: skip
        part = Part("transformer", "Flux2Transformer2DModel", config, {}, Path("x"))
        parts: Any = type("Parts", (), {"transformer": part})()
        size = size_of(parts)
        assert (size.num_parameters, size.num_blocks, size.width) == (count, blocks, width)
        assert abs(size.num_lora_parameters(16) - lora) < 0.06e6
        assert size.num_lora_parameters(32) == 2 * size.num_lora_parameters(16)
