"""The VQGAN's decoder against golden tensors of the reference implementation, and against its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_shortcut.bases.maskgit.vqgan import load_vqgan
from lit_shortcut.weights import load_tensors
from tests.parity.taming import Reference, Sizes, random_weights, write_folder

GOLDEN = Path(__file__).with_name("vqgan_tiny.safetensors")
SIZES = {
    "as the fixture": Sizes(48, 16, 32, 32, [1, 1, 2], 1, 32, [8]),
    "as f16": Sizes(64, 8, 16, 32, [1, 1, 2, 2, 4], 2, 64, [4]),
    "attention in the middle levels": Sizes(24, 4, 4, 32, [1, 3, 2], 2, 16, [8, 4]),
    "no attention": Sizes(24, 4, 4, 32, [1, 2], 1, 16, []),
}


def test_reconstruction_equals_the_reference_implementation(tmp_path: Path) -> None:
    golden, meta = load_tensors(GOLDEN)
    config = {name: value for name, value in meta["ddconfig"].items() if name in Sizes._fields}
    sizes = Sizes(n_embed=meta["n_embed"], embed_dim=meta["embed_dim"], **config)
    weights = {name.removeprefix("vqgan."): tensor for name, tensor in golden.items() if name.startswith("vqgan.")}
    write_folder(tmp_path, weights, sizes)
    vqgan, formulas, codes = load_vqgan(tmp_path), Reference(weights, sizes), golden["out.ids"]
    for reconstruction in (vqgan.pixels(codes.flatten(1)), formulas.decode(codes)):
        torch.testing.assert_close(reconstruction, golden["out.reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_reconstruction_equals_the_formulas(tmp_path: Path, sizes: Sizes) -> None:
    weights = random_weights(sizes, seed=len(sizes.ch_mult))
    write_folder(tmp_path, weights, sizes)
    side = 2 * sizes.resolution >> (len(sizes.ch_mult) - 1)
    codes = torch.randint(sizes.n_embed, (2, side, side), generator=torch.Generator().manual_seed(0))
    expected = Reference(weights, sizes).decode(codes)
    torch.testing.assert_close(load_vqgan(tmp_path).pixels(codes.flatten(1)), expected, rtol=1e-5, atol=2e-5)
    assert expected.std() > 0.05
