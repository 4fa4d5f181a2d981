"""MaskGIT for ImageNet at its published vocabulary and guidance, but narrow and on small grids."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.maskgit import imagenet
from lit_shortcut.bases.maskgit.adapter import MaskGIT
from lit_shortcut.bases.maskgit.transformer import NAMES as MASKGIT
from lit_shortcut.bases.maskgit.transformer import MaskGITTransformer
from lit_shortcut.bases.maskgit.vqgan import vqgan_decoder
from lit_shortcut.contracts import Conditions, TokenSpec
from lit_shortcut.networks.shortcut import NAMES as SHORTCUT
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.published import save_published
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError, fingerprint
from tests.parity.taming import Sizes, random_weights, write_folder

GRID = 4
VQGAN_SIZES = Sizes(1024, 4, 4, 32, [1, 1], 1, 8, [])


@pytest.fixture(autouse=True, scope="module")
def narrow() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(imagenet.SIZES, "base", {"width": 32, "depth": 1})
        yield


@pytest.fixture(scope="module")
def transformer(narrow: None) -> MaskGITTransformer:
    torch.manual_seed(0)
    network = MaskGITTransformer(**imagenet.imagenet_sizes(GRID, "base"))
    torch.nn.init.normal_(network.token_embedding.weight)
    return network


@pytest.fixture(scope="module")
def release(transformer: MaskGITTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the hub's repository."""
    folder = tmp_path_factory.mktemp("release")
    save_published(folder / "bare.pth", transformer, MASKGIT)
    state = torch.load(folder / "bare.pth", weights_only=True)
    state["pos_emb"] = state["pos_emb"][None]
    torch.save({"model_state_dict": state, "iter": 1_500_000, "global_epoch": 300}, folder / "MaskGIT.pth")
    write_folder(folder / "VQGAN", random_weights(VQGAN_SIZES, seed=0), VQGAN_SIZES)
    return folder


@pytest.fixture(scope="module")
def base(release: Path) -> MaskGIT:
    return imagenet.published(str(release / "MaskGIT.pth"), str(release / "VQGAN"), grid=GRID)


def conditions(count: int) -> Conditions:
    ids = torch.arange(count)
    return Conditions(ids, ids + 7, (ids * 333) % 1000)


def test_base_is_what_the_files_hold(base: MaskGIT, transformer: MaskGITTransformer) -> None:
    assert base.fingerprint == fingerprint(transformer.state_dict())
    assert base.spec == TokenSpec(GRID**2, GRID**2 + 1, 32, 1024, 1024, 1000)
    images = base.decode(generate(base, conditions(2), Decoding(num_steps=4), Vanilla()).tokens)
    assert images.shape == (2, 3, 2 * GRID, 2 * GRID)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_full_budget_equals_vanilla_exactly(base: MaskGIT, num_steps: int) -> None:
    decoding = Decoding(num_steps=num_steps)
    shortcut = Accelerated(Even(num_steps), Shortcut(ShortcutNet(32, num_heads=2)))
    vanilla = generate(base, conditions(3), decoding, Vanilla()).tokens
    assert torch.equal(generate(base, conditions(3), decoding, shortcut).tokens, vanilla)


def test_image_depends_on_its_seed_not_on_its_batch(base: MaskGIT) -> None:
    decoding, everyone = Decoding(num_steps=5), conditions(5)
    network = ShortcutNet(32, num_heads=2).eval().requires_grad_(False)
    torch.nn.init.normal_(network.widen.weight, std=0.1)
    for acceleration in (Vanilla(), Accelerated(Even(2), Shortcut(network))):
        together = generate(base, everyone, decoding, acceleration).tokens
        for row in range(5):
            alone = Conditions(*(part[row : row + 1] for part in everyone))
            assert torch.equal(generate(base, alone, decoding, acceleration).tokens[0], together[row])
        reseeded = generate(base, everyone._replace(seeds=everyone.seeds + 100), decoding, acceleration).tokens
        assert not (reseeded == together).all(dim=1).any()


@pytest.mark.parametrize("label", [1000, -1])
def test_class_beyond_999_is_refused(base: MaskGIT, label: int) -> None:
    wrong = conditions(2)._replace(labels=torch.tensor([999, label]))
    with pytest.raises(ValueError, match=rf"0\.\.999.*{label}"):
        base.context(wrong, guided=True)


def test_checkpoint_of_256_pixels_is_refused_for_512(release: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        imagenet.published(str(release / "MaskGIT.pth"), str(release / "VQGAN"), grid=2 * GRID)
    message = str(caught.value)
    assert str(release / "MaskGIT.pth") in message
    assert f"grid {2 * GRID}" in message
    assert f"pos_emb has shape (1, {GRID**2 + 1}, 32), expected ({4 * GRID**2 + 1}, 32)" in message
    assert f"bias has shape ({GRID**2 + 1}, 2026), expected ({4 * GRID**2 + 1}, 2026)" in message


def test_checkpoint_of_another_size_is_refused(release: Path) -> None:
    with pytest.raises(WeightsError, match=r"width 1024, depth 32.*\n.*transformer.layers.1\D.* is missing"):
        imagenet.published(str(release / "MaskGIT.pth"), str(release / "VQGAN"), grid=GRID, size="big")


def test_unknown_size_is_refused_before_files_are_looked_for() -> None:
    with pytest.raises(ValueError, match="size must be one of base, big, huge; got 'large'"):
        imagenet.published("nowhere.pth", "nowhere", size="large")  # type: ignore[arg-type]


def test_vqgan_of_another_codebook_size_is_refused(release: Path, tmp_path: Path) -> None:
    sizes = VQGAN_SIZES._replace(n_embed=512)
    write_folder(tmp_path, random_weights(sizes, seed=0), sizes)
    with pytest.raises(WeightsError, match="the one draws 1024 codes, the other has 512"):
        imagenet.published(str(release / "MaskGIT.pth"), str(tmp_path), grid=GRID)


def test_shortcut_of_another_width_is_refused(base: MaskGIT, tmp_path: Path) -> None:
    save_published(tmp_path / "maskgit-shortcut.pth", ShortcutNet(64, num_heads=2), SHORTCUT)
    shortcut = Accelerated(Even(2), Shortcut.load_published(str(tmp_path / "maskgit-shortcut.pth"), num_heads=2))
    with pytest.raises(WeightsError, match=r"width: expected 32.* 64"):
        generate(base, conditions(1), Decoding(num_steps=4), shortcut)


def test_released_shortcut_draws_what_the_network_it_was_saved_from_draws(base: MaskGIT, tmp_path: Path) -> None:
    network = ShortcutNet(32, num_heads=2)
    torch.nn.init.normal_(network.widen.weight, std=0.1)
    save_published(tmp_path / "maskgit-shortcut.pth", network, SHORTCUT)
    released = Shortcut.load_published(str(tmp_path / "maskgit-shortcut.pth"), num_heads=2)
    assert released.identity() == Shortcut(network).identity()
    drawn, expected = (
        generate(base, conditions(2), Decoding(num_steps=6), Accelerated(Even(2), shortcut)).tokens
        for shortcut in (released, Shortcut(network.eval()))
    )
    assert torch.equal(drawn, expected)


def test_hub_addresses_lead_to_the_cache(
    base: MaskGIT, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, revision = "hf://someone/weights", "c" * 40
    with pytest.raises(WeightsError, match=r"hf download someone/weights MaskGIT\.pth"):
        imagenet.published(f"{repository}/MaskGIT.pth", f"{repository}/VQGAN", grid=GRID)
    shutil.copytree(release, tmp_path / "models--someone--weights" / "snapshots" / revision)
    refs = tmp_path / "models--someone--weights" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    cached = imagenet.published(f"{repository}/MaskGIT.pth", f"{repository}/VQGAN", grid=GRID)
    assert cached.fingerprint == base.fingerprint


def test_random_weights_are_labelled_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"width": 32, "multipliers": [1], "num_blocks": [1], "attention_levels": []}
    monkeypatch.setattr(imagenet, "vqgan_decoder", lambda: vqgan_decoder(**small))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (imagenet.random_weights(GRID, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint.startswith("random-")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert fingerprint(one.tokenizer.state_dict()) == fingerprint(same.tokenizer.state_dict())
