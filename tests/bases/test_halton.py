"""Halton-MaskGIT in the branches its published sizes have, on small ones, and what it refuses to load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.halton import imagenet
from lit_shortcut.bases.halton.transformer import HaltonTransformer
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.contracts import Conditions
from lit_shortcut.convert import to_safetensors
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError, load_module, save_module
from tests.published_halton import make_release, published_state, shrink

SIZES = {"codebook_size": 20, "num_classes": 4, "grid": 3, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24}


def made(**sizes: Any) -> HaltonTransformer:
    torch.manual_seed(1)
    return HaltonTransformer(**SIZES | sizes).eval().requires_grad_(False)


def logits_by_formula(w: dict[str, Tensor], tokens: Tensor, classes: Tensor, heads: int) -> Tensor:
    """Logits (B, L, V + 1) straight from a published state dict ``w``."""

    def rms(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def parts(name: str, count: int) -> tuple[Tensor, ...]:
        return (F.silu(condition) @ w[f"{name}.weight"].T + w[f"{name}.bias"]).chunk(count, dim=-1)

    condition = w["cls_emb.weight"][classes][:, None]
    x = w["tok_emb.weight"][tokens] + w["pos_emb.weight"]
    if "reg_tokens.weight" in w:
        x = torch.cat([x, w["reg_tokens.weight"].repeat(len(x), 1, 1)], dim=1)
    for layer in range(SIZES["depth"]):
        name = f"transformer.layers.{layer}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts(f"{name}.mlp.1", 6)
        y = rms(x) * w[f"{name}.ln1.weight"] * (1 + scale) + shift
        q, k, v = (y @ w[f"{name}.attn.w{which}.weight"].T for which in "qkv")
        outs = []
        for a, b, c in zip(rms(q).chunk(heads, -1), rms(k).chunk(heads, -1), v.chunk(heads, -1), strict=True):
            outs.append((a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1) @ c)
        x = x + gate * (torch.cat(outs, -1) @ w[f"{name}.attn.wo.weight"].T)
        y = rms(x) * w[f"{name}.ln2.weight"] * (1 + mlp_scale) + mlp_shift
        y = F.silu(y @ w[f"{name}.ff.w1.weight"].T) * (y @ w[f"{name}.ff.w3.weight"].T)
        x = x + mlp_gate * (y @ w[f"{name}.ff.w2.weight"].T)
    shift, scale = parts("last_norm.mlp.1", 2)
    x = rms(x[:, : tokens.shape[1]]) * w["last_norm.norm_final.weight"] + w["last_norm.norm_final.bias"]
    return (x * (1 + scale) + shift) @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_heads": 3},  # heads of 5: queries 15 wide, as size small's are 510 wide
        {"num_registers": 0},
        {"num_registers": 3, "grid": 2},
        {"is_tied": False},
    ],
    ids=repr,
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_logits_equal_the_formulas(tmp_path: Path, sizes: dict[str, Any], prefix: str) -> None:
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in published_state(made(**sizes)).items()}
    if sizes.get("is_tied", True):
        state["head.weight"] = state["tok_emb.weight"].clone()
    torch.save({"model_state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "a.pth")
    given = {name: value for name, value in (SIZES | sizes).items() if name != "is_tied"}
    network = HaltonTransformer.load_published(tmp_path / "a.pth", **given)
    assert network.hparams["is_tied"] == sizes.get("is_tied", True)
    tokens = torch.randint(SIZES["codebook_size"] + 1, (3, given["grid"] ** 2))
    classes = torch.tensor([0, 2, SIZES["num_classes"]])
    expected = logits_by_formula(state, tokens, classes, given["num_heads"])[..., : SIZES["codebook_size"]]
    logits = network.interface().logits(network(tokens, classes))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_stored_network_is_loaded_again(tmp_path: Path) -> None:
    for is_tied in (True, False):
        network = made(is_tied=is_tied)
        save_module(tmp_path / "network.safetensors", network)
        again = load_module(HaltonTransformer, tmp_path / "network.safetensors")
        tokens, classes = torch.zeros(1, 9, dtype=torch.long), torch.tensor([1])
        assert torch.equal(again(tokens, classes), network(tokens, classes))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("head.weight"), r"head\.weight is missing, expected \(21, 16\)"),
        (lambda s: s.pop("tok_emb.weight"), r"tok_emb\.weight is missing"),
        (
            lambda s: s.update({"transformer.layers.1.attn.wq.weight": torch.ones(15, 16)}),
            r"transformer\.layers\.1\.attn\.wq\.weight has shape \(15, 16\), expected \(16, 16\)",
        ),
        (lambda s: s.update({"txt_emb.weight": torch.ones(2)}), r"txt_emb\.weight is unknown"),
        (lambda s: s.pop("last_norm.norm_final.bias"), r"last_norm\.norm_final\.bias is missing"),
    ],
    ids=["head", "embedding", "shape", "unknown", "bias"],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = published_state(made())
    edit(state)
    torch.save({"model_state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        HaltonTransformer.load_published(tmp_path / "a.pth", **SIZES)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of both resolutions and the decoder."""
    shrink(monkeypatch, "small")
    (tmp_path / "release").mkdir()
    make_release(tmp_path / "release", "small", 256, 384)
    return tmp_path / "release"


def drawn(base: MaskGIT, guidance: float = 0.5) -> Tensor:
    conditions = Conditions(torch.arange(2), torch.arange(2), torch.tensor([1, 999]))
    decoding = Decoding(4, schedule="arccos_left", guidance=guidance, guidance_course="constant", order="halton_rolled")
    shortcut = Shortcut(ShortcutNet(base.spec.width, num_heads=2).eval().requires_grad_(False))
    full = generate(base, conditions, decoding, Accelerated(Even(4), shortcut)).tokens
    assert torch.equal(full, generate(base, conditions, decoding, Vanilla()).tokens)
    return generate(base, conditions, decoding, Accelerated(Even(2), shortcut)).tokens


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_published_base_draws_images_at_both_resolutions(release: Path, guidance: float) -> None:
    for resolution, grid in ((256, 16), (384, 24)):
        base = imagenet.published(str(release), str(release), size="small", resolution=resolution)
        tokens = drawn(base, guidance)
        assert tokens.shape == (2, grid * grid)
        assert int(tokens.max()) < 16384
        assert base.decode(tokens).shape == (2, 3, 2 * grid, 2 * grid)


def test_converted_files_go_first(release: Path) -> None:
    expected = imagenet.published(str(release), str(release), size="small")
    for name in ("ImageNet_384_small.pth", "vq_ds16_c2i.pt"):
        to_safetensors(release / name, (release / name).with_suffix(".safetensors"))
        (release / name).unlink()
    assert imagenet.published(str(release), str(release), size="small").identity() == expected.identity()


def test_hub_addresses_lead_to_the_cache(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    address = "hf://someone/weights"
    with pytest.raises(WeightsError, match=r"hf download someone/weights ImageNet_384_small\.pth"):
        imagenet.published(address, str(release), size="small")
    revision = "c" * 40
    shutil.copytree(release, tmp_path / "models--someone--weights" / "snapshots" / revision)
    refs = tmp_path / "models--someone--weights" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    cached = imagenet.published(address, address, size="small")
    assert cached.identity() == imagenet.published(str(release), str(release), size="small").identity()


class Marks:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["ImageNet_384_small.pth", "vq_ds16_c2i.pt"])
def test_pickled_code_is_not_run(release: Path, tmp_path: Path, name: str) -> None:
    torch.save({"model_state_dict": {}, "args": Marks(tmp_path / "mark")}, release / name)
    with pytest.raises(WeightsError, match=name):
        imagenet.published(str(release), str(release), size="small")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("post_quant_conv.bias"), r"post_quant_conv\.bias is missing"),
        (lambda s: s.update({"decoder.extra": torch.ones(1)}), r"decoder\.extra is unknown"),
        (
            lambda s: s.update({"quantize.embedding.weight": torch.ones(3, 8)}),
            r"quantize\.embedding\.weight has shape \(3, 8\), expected \(16384, 8\)",
        ),
        (lambda s: s.pop("decoder.conv_blocks.0.attn.0.q.weight"), r"decoder\.conv_blocks\.0\.attn\.0\.q\.weight is"),
    ],
    ids=["missing", "unknown", "shape", "attention"],
)
def test_decoder_that_does_not_fit_is_refused_by_name(
    release: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    file = release / "vq_ds16_c2i.pt"
    content = torch.load(file, weights_only=True)
    edit(content["model"])
    torch.save(content, file)
    with pytest.raises(WeightsError, match=message):
        imagenet.published(str(release), str(release), size="small")


@pytest.mark.parametrize(("size", "resolution"), [("huge", 256), ("large", 512)])
def test_unknown_size_is_refused_with_the_known_ones(size: Any, resolution: Any) -> None:
    with pytest.raises(ValueError, match=f"tiny, small, base, large, xlarge.*256 or 384.*'{size}' at {resolution}"):
        imagenet.imagenet_sizes(size, resolution)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 23), ("small", 69), ("base", 142), ("large", 480), ("xlarge", None)]
)
def test_published_sizes_have_the_published_numbers_of_parameters(size: Any, millions: int | None) -> None:
    with torch.device("meta"):
        network = HaltonTransformer(**imagenet.imagenet_sizes(size, 384))
    assert network.layers[0].query.out_features == (510 if size == "small" else network.width)
    if millions:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_random_weights_are_labelled_and_repeatable(release: Path) -> None:
    before = torch.get_rng_state()
    one, same, other = (imagenet.random_weights("small", 256, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint.startswith("random-")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert drawn(one).shape == (2, 256)
