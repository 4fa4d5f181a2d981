from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from lit_shortcut.fashion.clip import SmallCLIP
from lit_shortcut.weights import WeightsError, load_module, save_module
from tests.fashion.small_clip import SIZES, write_tokenizer

PROMPTS = ["a dark coat", "bag", "dark " * 20]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json")


@pytest.fixture
def clip(words: Path) -> SmallCLIP:
    torch.manual_seed(0)
    return SmallCLIP(str(words), **SIZES).eval()


def grey_images() -> torch.Tensor:
    return torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_those_of_the_clip_that_was_saved(clip: SmallCLIP, tmp_path: Path) -> None:
    weights = clip.save(tmp_path / "clip")
    assert weights == tmp_path / "clip" / "model.safetensors"
    model = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    colour = list(grey_images().expand(-1, 3, -1, -1))
    inputs = processor(text=PROMPTS, images=colour, padding=True, truncation=True, return_tensors="pt")
    torch.testing.assert_close(clip(grey_images(), PROMPTS), model(**inputs).logits_per_image)


def test_saving_again_replaces_the_files_and_leaves_no_others(clip: SmallCLIP, words: Path, tmp_path: Path) -> None:
    SmallCLIP(str(words), **SIZES).save(tmp_path / "clip")
    names = {path.name for path in (tmp_path / "clip").iterdir()}
    clip.save(tmp_path / "clip")
    assert {path.name for path in (tmp_path / "clip").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    loaded = CLIPModel.from_pretrained(tmp_path / "clip").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in clip.clip.state_dict().items())


@torch.no_grad()
def test_similarities_are_cosines(clip: SmallCLIP) -> None:
    similarities = clip.similarities(grey_images(), PROMPTS)
    assert similarities.shape == (4, 3)
    assert similarities.abs().max() <= 1
    torch.testing.assert_close(clip(grey_images(), PROMPTS), similarities * clip.clip.logit_scale.exp())


@torch.no_grad()
def test_padding_does_not_change_a_texts_features(clip: SmallCLIP) -> None:
    together = clip.similarities(grey_images(), PROMPTS)
    apart = torch.cat([clip.similarities(grey_images(), [prompt]) for prompt in PROMPTS], dim=1)
    torch.testing.assert_close(together, apart)


def test_weight_file_builds_the_same_network_again(clip: SmallCLIP, tmp_path: Path) -> None:
    save_module(tmp_path / "clip.safetensors", clip)
    loaded = load_module(SmallCLIP, tmp_path / "clip.safetensors")
    assert torch.equal(loaded(grey_images(), PROMPTS), clip(grey_images(), PROMPTS))


def test_tokenizer_without_a_special_token_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "words.json", ("<a>", "<b>", "<c>", "<s>", "</s>"))
    with pytest.raises(WeightsError, match=r"words\.json: .* it lacks \['<pad>'\]"):
        SmallCLIP(str(path), **SIZES)


def test_end_token_that_older_configs_use_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "words.json", ("<pad>", "<s>", "</s>"))
    with pytest.raises(WeightsError, match=r"words\.json: </s> must not be token 2"):
        SmallCLIP(str(path), **SIZES)


def test_missing_and_damaged_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.json: no such tokenizer file"):
        SmallCLIP(str(tmp_path / "none.json"), **SIZES)
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(WeightsError, match=r"bad\.json: not a tokenizer file"):
        SmallCLIP(str(tmp_path / "bad.json"), **SIZES)
