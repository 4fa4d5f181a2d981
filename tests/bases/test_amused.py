"""aMUSEd from a folder in the published form, whole and damaged, and at other sizes than published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from lit_shortcut.acceleration.accelerated import Accelerated, Vanilla
from lit_shortcut.acceleration.plans import Even
from lit_shortcut.acceleration.shortcut import Shortcut
from lit_shortcut.bases.amused import AMUSEd, published, random_weights
from lit_shortcut.bases.clip_text import CLIPText, CLIPWords, EncodedContext
from lit_shortcut.contracts import Clock, Conditions
from lit_shortcut.evaluation.drawing import require_known
from lit_shortcut.networks.shortcut import ShortcutNet
from lit_shortcut.sampling import Decoding, generate
from lit_shortcut.weights import WeightsError
from tests.published_amused import TEXT, text_model, tiny_amused, transformer, vqvae, write_folder

CLOCK = Clock(0, 1)
WEIGHTS = "diffusion_pytorch_model.safetensors"
Prompted = Callable[..., Conditions]
DECODING = Decoding(3, "cosine_each", guidance=2.0, guidance_course="constant", temperature=0, confidence_noise=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_folder_becomes_a_base_with_its_weights(whole: Path, prompted: Prompted) -> None:
    base = published(str(whole), dtype="float32")
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    reference = transformer()
    context = base.context(prompted(2), guided=True)
    assert isinstance(context, EncodedContext)
    tokens = torch.arange(32).view(2, 16) % 10
    logits = base.interface.logits(base.features(tokens, context, CLOCK))
    expected = reference(
        tokens.view(2, 4, 4), context.states[0], pooled_text_emb=context.pooled[0], micro_conds=context.micro_conds[0]
    )
    torch.testing.assert_close(logits[0], expected.flatten(2).transpose(1, 2))
    assert base.decode(tokens % 8).shape == (2, 3, 64, 64)


def test_vanilla_image_is_that_of_diffusers_pipeline(whole: Path) -> None:
    """Without guidance and noise; the pipeline's own way to encode, decode and count."""
    base = published(str(whole), dtype="float32")
    words = CLIPTokenizer.from_pretrained(whole / "tokenizer")
    pipe = AmusedPipeline(vqvae(), words, text_model(), transformer(), AmusedScheduler(mask_token_id=9))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.step = greedy_step
    image = pipe("a red cat", num_inference_steps=3, guidance_scale=3.0, output_type="np").images[0]
    zero = torch.zeros(1, dtype=torch.long)
    tokens, _ = generate(base, Conditions(zero, zero, zero, ("a red cat",)), DECODING, Vanilla())
    found = base.decode(tokens)[0].permute(1, 2, 0)
    assert (found - torch.from_numpy(image * 255).round()).abs().max() <= 1


def greedy_step(model_output: Tensor, timestep: Tensor, sample: Tensor, **_: object) -> object:
    """Commit the most confident third of the places that a scheduler of three steps would, the best code each."""
    best = model_output.log_softmax(1).max(dim=1)
    left = {2: 13, 1: 8, 0: 0}[int(timestep)]  # floor(16 · cos(π/2 · (i+1)/3)), i = 2 − timestep
    confidence = torch.where(sample == 9, best.values, torch.inf).flatten(1)
    chosen = confidence.argsort(dim=1, descending=True, stable=True)[:, : 16 - left]
    tokens = torch.where(sample == 9, best.indices, sample).flatten(1)
    after = torch.full_like(tokens, 9).scatter(1, chosen, tokens.gather(1, chosen)).view_as(sample)
    return type("Output", (), {"prev_sample": after})()


@pytest.mark.parametrize(("resampled", "height", "width"), [(False, 16, 48), (True, 64, 32), (True, 96, 96)])
def test_images_have_the_size_asked_for(
    tmp_path: Path, prompted: Prompted, resampled: bool, height: int, width: int
) -> None:
    write_folder(tmp_path / "it", downsample=resampled, upsample=resampled)
    base = published(str(tmp_path / "it"), height=height, width=width, dtype="float32", negative="blurry")
    context = base.context(prompted(2), guided=True)
    assert isinstance(context, EncodedContext)
    assert context.micro_conds[0, 0].tolist() == [width, height, 0, 0, 6]
    tokens, full_steps = generate(base, prompted(2), DECODING, Vanilla())
    assert base.decode(tokens).shape == (2, 3, height, width)
    assert full_steps.tolist() == [3, 3]


@pytest.mark.parametrize("hidden_size", [24, 23])
def test_widths_that_heads_do_not_divide_and_other_widths_work(prompted: Prompted, hidden_size: int) -> None:
    base = tiny_amused(hidden_size=hidden_size, block_num_heads=5, in_channels=20)
    features = base.features(torch.full((2, 16), 9), base.context(prompted(2), guided=False), CLOCK)
    assert features.shape == (1, 2, 16, 20)
    places = torch.arange(8)[None]
    assert base.interface.embed(places, places).shape == (1, 8, 20)


def test_prompts_are_checked_before_a_run_without_encoding_them_all(
    prompted: Prompted, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, encoded = tiny_amused(), list[int]()
    encode = base.text_encoder.encode
    monkeypatch.setattr(base.text_encoder, "encode", lambda texts: encoded.append(len(texts)) or encode(texts))
    batches = [prompted(2), prompted(2), prompted(2)]
    asked: Any = SimpleNamespace(loader=lambda: batches)
    assert require_known(base, asked, guided=True) is not None
    assert encoded == [3]  # the first batch's, and the negative prompt
    batches[2] = batches[2]._replace(prompts=("a cat", ""))
    with pytest.raises(ValueError, match="empty"):
        require_known(base, asked, guided=True)


def test_shortcut_with_a_neighbourhood_accelerates_the_base(prompted: Prompted) -> None:
    base = tiny_amused()
    network = ShortcutNet(32, num_heads=2, grid=4, reach=2)
    exact = generate(base, prompted(2), DECODING, Accelerated(Even(3), Shortcut(network)))
    assert torch.equal(exact.tokens, generate(base, prompted(2), DECODING, Vanilla()).tokens)
    _, full_steps = generate(base, prompted(2), DECODING, Accelerated(Even(2), Shortcut(network)))
    assert full_steps.tolist() == [2, 2]


def test_the_transformer_given_is_left_as_it_was() -> None:
    given = transformer()
    before = dict(given.named_modules())
    base = AMUSEd(given, tiny_amused().tokenizer, tiny_amused().text_encoder)
    assert dict(given.named_modules()) == before
    assert base.fingerprint == tiny_amused().fingerprint
    head = given.mlm_layer.conv2.weight
    assert base.interface.head_weight.data_ptr() == head.data_ptr()
    with torch.no_grad():
        head[0] += 1
    assert AMUSEd(given, base.tokenizer, base.text_encoder).fingerprint != base.fingerprint


def test_identity_knows_prompts_size_and_encoder(whole: Path) -> None:
    base = published(str(whole))
    others = [published(str(whole), negative="blurry"), published(str(whole), height=32, width=128)]
    assert len({json.dumps(each.identity()) for each in (base, *others)}) == 3
    assert {each.fingerprint for each in others} == {base.fingerprint}


# ---- files


def test_half_precision_files_are_taken_by_name_or_where_there_are_no_others(tmp_path: Path, whole: Path) -> None:
    write_folder(tmp_path / "half", variant="fp16")
    halves = [published(str(tmp_path / "half"), variant=variant, dtype="float32") for variant in ("fp16", None)]
    assert halves[0].identity() == halves[1].identity()
    expected = transformer().half().float().mlm_layer.conv2.weight[..., 0, 0]
    assert torch.equal(halves[0].interface.head_weight, expected)
    with pytest.raises(WeightsError, match=r"1 of 1 weight files are missing: diffusion_pytorch_model\.fp16\.safe"):
        published(str(whole), variant="fp16")


def test_weights_in_several_files_are_taken_together(folder: Path) -> None:
    transformer().save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert (folder / "transformer" / f"{WEIGHTS}.index.json").is_file()
    (folder / "transformer" / WEIGHTS).unlink(missing_ok=True)
    assert published(str(folder), dtype="float32").fingerprint == tiny_amused().fingerprint


def edit(path: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("part", "missing", "misshapen"),
    [
        ("transformer", "mlm_layer.conv2.weight", "embed.layer_norm.weight"),
        ("vqvae", "post_quant_conv.bias", "quantize.embedding.weight"),
        ("text_encoder", "text_projection.weight", "text_model.embeddings.token_embedding.weight"),
    ],
)
def test_tensors_missing_unknown_and_misshapen_are_all_named(
    folder: Path, part: str, missing: str, misshapen: str
) -> None:
    path = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
    edit(path, **{missing: None, misshapen: torch.ones(3), "other.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=rf"{part}: not the weights of a") as caught:
        published(str(folder))
    for wanted in (f"{missing} is missing", "other.weight is unknown", f"{misshapen} has shape (3,), expected ("):
        assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer/config.json", r"transformer/config\.json: no such file"),
        (f"transformer/{WEIGHTS}", "transformer: 1 of 1 weight files are missing"),
        ("vqvae/config.json", r"vqvae/config\.json: no such file"),
        (f"vqvae/{WEIGHTS}", "vqvae: 1 of 1 weight files are missing"),
        ("text_encoder/config.json", r"text_encoder/config\.json: no such file"),
        ("text_encoder/model.safetensors", r"text_encoder: 1 of 1 weight files are missing: model\.safetensors"),
        ("tokenizer/merges.txt", r"tokenizer: expected tokenizer\.json, or vocab\.json and merges\.txt"),
    ],
)
def test_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=message):
        published(str(folder))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"_class_name": "UNet2DModel"}, "_class_name: expected UVit2DModel, found 'UNet2DModel'"),
        ("transformer", {"hidden_size": "wide"}, "not the configuration of a UVit2DModel"),
        ("vqvae", {"up_block_types": ["Other"] * 5}, "not the configuration of a VQModel"),
        ("text_encoder", {"hidden_size": 15}, "not the configuration of a CLIP text encoder"),
    ],
)
def test_configuration_of_another_network_is_refused(
    folder: Path, part: str, change: dict[str, object], message: str
) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=rf"{part}/config\.json: {message}"):
        published(str(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "transformer" / WEIGHTS), folder / "transformer" / "diffusion_pytorch_model.bin")
    (folder / "transformer" / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match="1 of 1 weight files are missing"):
        published(str(folder))


def test_image_decoder_of_another_codebook_is_refused(folder: Path) -> None:
    vqvae(codes=9).save_pretrained(folder / "vqvae")
    with pytest.raises(WeightsError, match="vqvae: expected the 8 codes that the transformer draws, found 9"):
        published(str(folder))


@pytest.mark.parametrize(("resampled", "pixels"), [(False, 40), (True, 48), (False, 0)])
def test_size_that_fits_no_grid_is_refused(tmp_path: Path, resampled: bool, pixels: int) -> None:
    write_folder(tmp_path / "it", downsample=resampled, upsample=resampled)
    with pytest.raises(ValueError, match=f"width .* got {pixels}"):
        published(str(tmp_path / "it"), height=64, width=pixels)


# ---- prompts


def test_prompts_are_encoded_as_the_pipeline_does(whole: Path) -> None:
    encoder = CLIPText.load(whole / "text_encoder", whole / "tokenizer")
    words, model = CLIPTokenizer.from_pretrained(whole / "tokenizer"), text_model().eval()
    texts = ["A red  cat", "größer", ""]
    ids = words(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        states, pooled = encoder.encode(texts)
    torch.testing.assert_close(states, output.hidden_states[-2])
    torch.testing.assert_close(pooled, output.text_embeds)


def test_prompt_over_length_is_cut_with_a_warning(whole: Path) -> None:
    words = CLIPWords.load(whole / "tokenizer")
    with pytest.warns(UserWarning, match=r"prompt 'a{40}'… has 52 tokens, the text encoder takes 20: the rest is cut"):
        ids = words.ids(["a" * 50, "b"], 20)
    assert ids.shape == (2, 20)
    assert ids[0, -1] == TEXT["eos_token_id"]
    assert ids[0, 1:-1].unique().numel() == 1  # letters within the word


def test_identity_of_the_words_stays_when_texts_are_encoded(whole: Path) -> None:
    words = CLIPWords.load(whole / "tokenizer")
    before = words.identity()
    words.ids(["a cat"], 20)
    assert words.identity() == before == CLIPWords.load(whole / "tokenizer").identity()


def test_end_token_of_old_configurations_is_the_highest_id(folder: Path) -> None:
    modern = published(str(folder))
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    legacy = published(str(folder))
    encoded = [base.text_encoder.encode(["a cat", "dogs"]).pooled for base in (modern, legacy)]
    torch.testing.assert_close(*encoded)  # END is the highest id
    assert legacy.identity() != modern.identity()


def test_text_encoder_may_be_part_of_a_whole_clip(folder: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    projection = config.pop("projection_dim")
    whole_clip = {"model_type": "clip", "projection_dim": projection, "text_config": config, "vision_config": {}}
    before = CLIPText.load(folder / "text_encoder", folder / "tokenizer").identity()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(whole_clip))
    edit(
        folder / "text_encoder" / "model.safetensors",
        **{
            "vision_model.post_layernorm.bias": torch.ones(3),
            "logit_scale": torch.ones(()),
            "text_model.embeddings.position_ids": torch.arange(20)[None],
        },
    )
    assert CLIPText.load(folder / "text_encoder", folder / "tokenizer").identity() == before


def test_text_encoder_of_other_widths_is_refused(folder: Path) -> None:
    text_model(projection_dim=13).save_pretrained(folder / "text_encoder")
    with pytest.raises(WeightsError, match=r"text_encoder: expected .* widths \(16, 12\), found \(16, 13\)"):
        published(str(folder))


def test_prompts_missing_or_empty_are_refused(prompted: Prompted) -> None:
    base = tiny_amused()
    with pytest.raises(ValueError, match="expected a prompt for each of 2 samples, got 0"):
        base.context(prompted(2)._replace(prompts=()), guided=True)
    with pytest.raises(ValueError, match="got an empty one"):
        base.context(prompted(2)._replace(prompts=("a", " ")), guided=True)


# ---- sizes without weights


def test_random_weights_are_labelled_and_repeatable() -> None:
    before = torch.get_rng_state()
    one, same = (random_weights(256, depth=1, text_depth=1, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint.startswith("random-")
    assert one.fingerprint == same.fingerprint
    assert one.transformer.dtype == torch.bfloat16
    assert one.spec[:5] == (256, 256, 768, 8192, 8255)


def test_published_sizes_are_those_of_the_model_card() -> None:
    with torch.device("meta"):
        for resampled, millions in ((False, 603), (True, 608)):
            network = UVit2DModel(sample_size=32, downsample=resampled, upsample=resampled)
            assert sum(parameter.numel() for parameter in network.parameters()) // 10**6 == millions
