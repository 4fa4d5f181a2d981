"""The VQGAN against golden tensors of the reference implementation, and against its formulas at other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_shortcut.bases.maskgit.vqgan import VQGAN
from lit_shortcut.weights import load_tensors
from tests.parity.taming import Reference, Sizes, random_weights, write_folder

GOLDEN = Path(__file__).with_name("vqgan_tiny.safetensors")
SIZES = {
    "as the fixture": Sizes(48, 16, 32, 32, [1, 1, 2], 1, 32, [8]),
    "as f16": Sizes(64, 8, 16, 32, [1, 1, 2, 2, 4], 2, 64, [4]),
    "attention in the middle levels": Sizes(24, 4, 4, 32, [1, 3, 2], 2, 16, [8, 4]),
    "no attention": Sizes(24, 4, 4, 32, [1, 2], 1, 16, []),
}


def test_codes_and_reconstruction_equal_the_reference_implementation(tmp_path: Path) -> None:
    golden, meta = load_tensors(GOLDEN)
    config = {name: value for name, value in meta["ddconfig"].items() if name in Sizes._fields}
    sizes = Sizes(n_embed=meta["n_embed"], embed_dim=meta["embed_dim"], **config)
    weights = {name.removeprefix("vqgan."): tensor for name, tensor in golden.items() if name.startswith("vqgan.")}
    write_folder(tmp_path, weights, sizes)
    vqgan, formulas = VQGAN.load_published(tmp_path), Reference(weights, sizes)
    # as in encode, but of the images as they are, not in 256 shades
    _, _, (_, _, codes) = vqgan.model.quantize(vqgan.model.encode(golden["in.image"]).latents)
    assert torch.equal(codes.view_as(golden["out.ids"]), golden["out.ids"])
    assert torch.equal(formulas.encode(golden["in.image"]), golden["out.ids"])
    for reconstruction in (vqgan.pixels(golden["out.ids"].flatten(1)), formulas.decode(golden["out.ids"])):
        torch.testing.assert_close(reconstruction, golden["out.reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_codes_and_reconstruction_equal_the_formulas(tmp_path: Path, sizes: Sizes) -> None:
    weights = random_weights(sizes, seed=len(sizes.ch_mult))
    write_folder(tmp_path, weights, sizes)
    vqgan, formulas = VQGAN.load_published(tmp_path), Reference(weights, sizes)
    shape = (2, 3, 2 * sizes.resolution, 2 * sizes.resolution)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    codes = vqgan.encode(images)
    assert len(codes.unique()) > 4
    side = 2 * sizes.resolution >> (len(sizes.ch_mult) - 1)
    assert torch.equal(codes, formulas.encode(images / 127.5 - 1).flatten(1))
    expected = formulas.decode(codes.unflatten(1, (side, side)))
    torch.testing.assert_close(vqgan.pixels(codes), expected, rtol=1e-5, atol=2e-5)
    assert expected.std() > 0.05
