"""PEFT folders in both directions against the real `peft` on a small transformers Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resilin.adapt.attach import attach
from resilin.adapt.peft_folder import load_adapter, save_adapter
from resilin.adapt.settings import AdapterSettings
from resilin.adapt.switch import without_adapters
from resilin.adapt.targets import AdapterError
from resilin.models.decoder import Decoder
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.huggingface import load_pretrained, save_pretrained

TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))
SIZES = {"vocab_size": 40, "hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_size": 24, "init_std": 0.3}
SHARED = [
    {"method": "lora", "rank": 4, "alpha": 6},
    {"method": "rslora", "rank": 4},
    {"method": "dora", "rank": 3, "alpha": 9},
    {"method": "miss", "rank": 4},
    {"method": "miss", "rank": 5},
    {"method": "bat_col", "rank": 8},
    {"method": "mini", "rank": 4, "mini_rank": 2},
]
shared = pytest.mark.parametrize("shape", SHARED, ids=lambda s: f"{s['method']}{s['rank']}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    settings = DecoderSettings(**SIZES, qkv_bias=True, out_bias=True)
    save_pretrained(Decoder(settings, seed=3), folder)
    return folder


@pytest.fixture
def theirs(base: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, Decoder):
            return model.logits(model(TOKENS).hidden_BTD)
        return model(TOKENS).logits


def agree(ours: Decoder, theirs) -> None:
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def stir(parameters) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@shared
def test_peft_opens_what_we_save(base: Path, theirs, move, tmp_path: Path, shape: dict) -> None:
    import peft

    ours = load_pretrained(base)
    plain = logits(ours)
    attach(ours, {"a": AdapterSettings(**shape)}, seed=4)
    move(ours, 0.1)
    save_adapter(ours, tmp_path, "a", base=str(base))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    agree(ours, adapted)
    assert not torch.allclose(logits(ours), plain, atol=1e-2)
    agree(ours, adapted.merge_and_unload())


@shared
def test_we_open_what_peft_saves(base: Path, theirs, tmp_path: Path, shape: dict) -> None:
    import peft

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if shape["method"] in ("lora", "rslora", "dora"):
        config = peft.LoraConfig(
            r=shape["rank"],
            lora_alpha=shape.get("alpha", 8),
            use_rslora=shape["method"] == "rslora",
            use_dora=shape["method"] == "dora",
            target_modules=linears,
        )
    else:
        variant = {"miss": True, "bat_col": "bat", "mini": "mini"}[shape["method"]]
        config = peft.MissConfig(
            r=shape["rank"], mini_r=shape.get("mini_rank", 1), init_weights=variant, target_modules=linears
        )
    adapted = peft.get_peft_model(theirs, config)
    stir(p for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path)
    ours = load_pretrained(base)
    settings = load_adapter(ours, tmp_path, "theirs")
    assert settings.method == shape["method"]
    agree(ours, adapted.eval())
    with without_adapters(ours), adapted.disable_adapter():
        agree(ours, adapted)


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_biases_and_modules_travel_in_both_directions(
    base: Path, theirs, move, tmp_path: Path, bias: str, method: str
) -> None:
    import peft

    ours = load_pretrained(base)
    saved = ("lm_head", "norm")
    attach(ours, {"a": AdapterSettings(method=method, rank=4, targets=("q", "v"), bias=bias, modules_to_save=saved)})
    move(ours, 0.1)
    stir(p for name, p in ours.named_parameters() if p.requires_grad and ".adapters." not in name)
    save_adapter(ours, tmp_path / "ours", "a")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True).eval()
    agree(ours, adapted)
    stir(p for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(base)
    load_adapter(again, tmp_path / "theirs")
    agree(again, adapted)
    assert not torch.allclose(logits(again), logits(ours), atol=1e-2)


@pytest.mark.parametrize(
    "where",
    [{"targets": ("q",)}, {"layers": (1,)}, {"targets": ("down_proj",), "layers": (0,)}, {"targets": r".*0\..*[qk]"}],
)
def test_the_folder_says_exactly_which_maps(base: Path, theirs, move, tmp_path: Path, where: dict) -> None:
    import peft

    ours = load_pretrained(base)
    attach(ours, {"a": AdapterSettings(rank=4, **where)})
    move(ours, 0.1)
    save_adapter(ours, tmp_path, "a")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    blocks = sum(".miss_block." in name for name, _ in adapted.named_parameters())
    assert blocks == len(load_file(tmp_path / "adapter_model.safetensors"))
    agree(ours, adapted)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) <= 7


@pytest.mark.parametrize("method", ["bat_row", "bat_ab"])
def test_what_peft_lacks_is_refused_by_name(base: Path, tmp_path: Path, method: str) -> None:
    ours = load_pretrained(base)
    attach(ours, {"a": AdapterSettings(method=method, rank=4)})
    with pytest.raises(AdapterError, match=f"PEFT has no {method}: .*export the merged model"):
        save_adapter(ours, tmp_path / "out", "a")
    assert not (tmp_path / "out").exists()


def test_what_peft_could_not_open_is_not_written(tmp_path: Path) -> None:
    tied = Decoder(DecoderSettings(**SIZES, tie_embeddings=True), seed=1)
    attach(tied, {"a": AdapterSettings(rank=4, modules_to_save=("embed_tokens",))})
    with pytest.raises(AdapterError, match="also the output head here"):
        save_adapter(tied, tmp_path, "a")
    wide = Decoder(DecoderSettings(**SIZES), seed=1)
    attach(wide, {"a": AdapterSettings(rank=20)})
    with pytest.raises(AdapterError, match=r"refuses a rank \(20\) above the inputs \(16\)"):
        save_adapter(wide, tmp_path, "a")
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        save_adapter(wide, tmp_path, "b")


def test_an_older_bone_folder_is_read(base: Path, move, tmp_path: Path) -> None:
    ours = load_pretrained(base)
    attach(ours, {"a": AdapterSettings(method="bat", rank=8, targets=("q", "o"))})
    move(ours, 0.1)
    save_adapter(ours, tmp_path, "a")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.replace("miss_block", "bone_block"): t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    old = {k.replace("miss_", "bone_"): v for k, v in config.items() if k != "mini_r"} | {"peft_type": "BONE"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    again = load_pretrained(base)
    assert load_adapter(again, tmp_path).method == "bat_col"
    assert torch.equal(logits(again), logits(ours))


@pytest.fixture
def folder(base: Path, move, tmp_path: Path) -> Path:
    ours = load_pretrained(base)
    attach(ours, {"a": AdapterSettings(method="lora", rank=2)})
    save_adapter(ours, tmp_path / "good", "a")
    return tmp_path / "good"


def config_with(**changes):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors_with(change):
    def write(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"not a PEFT folder: .*it holds adapter_model\.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "adapter_model.bin is a pickle, and Resilin opens none",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"), "not a whole safetensors file"),
        (config_with(peft_type="IA3"), r"peft_type is 'IA3'; read here are LORA, MISS, BONE"),
        (config_with(rank_pattern={"q_proj": 4}), "uses PEFT's rank_pattern"),
        (config_with(init_lora_weights="pissa"), "changes the base model too"),
        (config_with(bias="some"), "bias is 'some'"),
        (config_with(r="eight"), "r is 'eight'"),
        (config_with(r=3), r"mlp\.down should have .*'down': \(3, 24\).* 16 x 24 map, and has .*'down': \(2, 24\)"),
        (
            tensors_with(lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}),
            r"layers\.9.*has no place in this Decoder: was the adapter trained on another model",
        ),
        (tensors_with(lambda t: dict(list(t.items())[1:])), "should have"),
    ],
)
def test_a_wrong_folder_is_refused_and_nothing_is_attached(base: Path, folder: Path, damage, message) -> None:
    from resilin.adapt.attach import adapted_maps

    damage(folder)
    ours = load_pretrained(base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(ours, folder)
    assert not adapted_maps(ours)


def test_a_folder_that_is_not_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such folder"):
        load_adapter(load_pretrained(base), tmp_path / "nowhere")
