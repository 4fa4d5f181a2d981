"""The decoder half of a VQGAN by its formulas, at sizes that no golden tensor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_shortcut.bases.code_decoder import CodeDecoder, taming_pairs
from lit_shortcut.published import Names
from tests.parity.taming import Reference, Sizes

SIZES: dict[str, dict[str, Any]] = {
    "one level": {"multipliers": [1], "num_blocks": [1]},
    "blocks of their own at each level": {"multipliers": [1, 2, 2], "num_blocks": [3, 1, 2]},
    "attention where there are fewer blocks": {"multipliers": [2, 1], "num_blocks": [2, 1], "attention_levels": [1]},
    "attention at every level": {"multipliers": [1, 1], "num_blocks": [1, 3], "attention_levels": [0, 1]},
    "codes of unit length": {"multipliers": [1, 2], "num_blocks": [2, 2], "is_normalised": True},
}


def made(**sizes: Any) -> CodeDecoder:
    torch.manual_seed(len(sizes["multipliers"]))
    return CodeDecoder(codebook_size=20, code_width=3, latent_width=5, width=32, **sizes)


def by_formulas(decoder: CodeDecoder, codes: Tensor) -> Tensor:
    num_levels, resolution = len(decoder.hparams["multipliers"]), 64
    names = Names([("quantize.embedding.", "codes."), *taming_pairs(num_levels)])
    weights = {names.published(name): tensor for name, tensor in decoder.state_dict().items()}
    is_linear = {name: ".attn" in name and tensor.dim() == 2 for name, tensor in weights.items()}
    weights = {name: tensor[..., None, None] if is_linear[name] else tensor for name, tensor in weights.items()}
    if decoder.is_normalised:
        weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=1)
    levels = [resolution >> level for level in decoder.hparams["attention_levels"]]
    sizes = Sizes(20, 3, 5, 32, decoder.hparams["multipliers"], 0, resolution, levels)
    return Reference(weights, sizes).decode(codes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_images_equal_the_formulas(sizes: dict[str, Any]) -> None:
    decoder, codes = made(**sizes), torch.randint(20, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    expected = by_formulas(decoder, codes)
    torch.testing.assert_close(decoder.pixels(codes.flatten(1)), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("is_rounded", [True, False])
def test_shades_are_rounded_or_cut(is_rounded: bool) -> None:
    decoder = made(multipliers=[1], num_blocks=[1], is_rounded=is_rounded)
    codes = torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(0))
    shades = (decoder.pixels(codes) + 1) * 127.5
    assert torch.equal(decoder.decode(codes), (shades.round() if is_rounded else shades.floor()).byte())


def test_images_do_not_depend_on_the_chunk() -> None:
    decoder = made(multipliers=[1, 1], num_blocks=[1, 1])
    codes = torch.randint(20, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = decoder.decode(codes)
    decoder.chunk = 2
    assert (decoder.decode(codes).int() - whole.int()).abs().max() <= 1  # a batch of another size may round otherwise


@pytest.mark.parametrize("num_blocks", [[1], [1, 0], [1, 1, 1]])
def test_number_of_blocks_must_fit_the_levels(num_blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"num_blocks must hold a positive number for each of 2 levels"):
        made(multipliers=[1, 1], num_blocks=num_blocks)
