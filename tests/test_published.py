from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import maskgit_names, shortcut_names
from lit_shortcut.weights import load_tensors

GOLDEN, META = load_tensors(Path(__file__).parent / "parity" / "maskgit_tiny.safetensors")
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def transformer(depth: int = META["depth"]) -> nn.Module:
    return MaskGITTransformer(
        codebook_size=META["codebook_size"],
        num_classes=META["nclass"],
        grid=META["grid"],
        width=META["hidden_dim"],
        depth=depth,
        num_heads=META["heads"],
        mlp_width=META["mlp_dim"],
    )


def shortcut() -> nn.Module:
    return ShortcutNet(META["hidden_dim"], META["heads"], META["bottleneck_ratio"], META["n_block"])


@pytest.fixture(params=["base.", "shortcut."])
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Rename, nn.Module]:
    """A published state dict, the function that renames it, and our network."""
    published = {k.removeprefix(request.param): v for k, v in GOLDEN.items() if k.startswith(request.param)}
    if request.param == "base.":
        return published, maskgit_names, transformer()
    return published, shortcut_names, shortcut()


def test_published_names_cover_ours_exactly(case: tuple[dict[str, Tensor], Rename, nn.Module]) -> None:
    published, rename, network = case
    renamed, ours = rename(published), network.state_dict()
    assert len(renamed) == len(published)  # no two names fall together
    assert renamed.keys() == ours.keys()
    assert {name: tensor.shape for name, tensor in renamed.items()} == {n: t.shape for n, t in ours.items()}
    network.load_state_dict(renamed)


def test_renaming_leaves_the_values_alone(case: tuple[dict[str, Tensor], Rename, nn.Module]) -> None:
    published, rename, _ = case
    for before, after in zip(published.values(), rename(published).values(), strict=True):
        assert torch.equal(after.flatten(), before.flatten())


@pytest.mark.parametrize(
    "unknown", ["ema.decay", "transformer.layers.0.2.norm.weight", "blocks.0.third_attn.norm.bias"]
)
def test_strict_loading_names_an_unknown_key(case: tuple[dict[str, Tensor], Rename, nn.Module], unknown: str) -> None:
    published, rename, network = case
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{unknown}"'):
        network.load_state_dict(rename(published | {unknown: torch.zeros(1)}))


def test_strict_loading_names_a_missing_key(case: tuple[dict[str, Tensor], Rename, nn.Module]) -> None:
    published, rename, network = case
    gone = next(name for name in rename(published) if name.endswith("in_proj.weight"))
    kept = {name: tensor for name, tensor in rename(published).items() if name != gone}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{gone}"'):
        network.load_state_dict(kept)


def test_layers_of_two_digits_keep_their_number() -> None:
    published = {k.removeprefix("base."): v for k, v in GOLDEN.items() if k.startswith("base.")}
    deep = {
        name.replace("layers.0.", f"layers.{layer}."): tensor + layer
        for layer in range(24)
        for name, tensor in published.items()
        if "layers.0." in name
    } | {name: tensor for name, tensor in published.items() if "transformer.layers." not in name}
    network = transformer(depth=24)
    network.load_state_dict(maskgit_names(deep))
    first = published["transformer.layers.0.1.fn.net.3.bias"]
    for layer in (0, 9, 10, 23):
        assert torch.equal(network.state_dict()[f"layers.{layer}.mlp.2.bias"], first + layer)


def test_position_embedding_loses_its_batch_dimension() -> None:
    renamed = maskgit_names({"pos_emb": torch.zeros(1, 65, 4)})
    assert renamed["position_embedding"].shape == (65, 4)
