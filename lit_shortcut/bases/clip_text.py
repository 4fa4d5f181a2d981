"""CLIP's text encoder, and bases that see their prompts through it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from lit_shortcut.bases.frozen import FrozenBase, grid_of
from lit_shortcut.bases.saved import TRANSFORMERS, Variant, read_json, read_weights, take
from lit_shortcut.contracts import Conditions, Context, ImageDecoder, require_prompts
from lit_shortcut.weights import WeightsError, network_fingerprint

_POSITIONS = "text_model.embeddings.position_ids"  # 0, 1, 2 …, in files of old versions
_NO_TEXT = ("vision_model.", "visual_projection.", "logit_scale")  # in files of a whole CLIP


@dataclass(frozen=True, kw_only=True)
class EncodedContext(Context):
    """Encoded prompts and the size of the images.

    Args:
        states: (G, B, T, E), output of the encoder's last layer but one.
        pooled: (G, B, E'), the projected state at the end token.
        micro_conds: (G, B, 5): width and height in pixels, crop (0, 0), aesthetic score 6.
    """

    states: Tensor
    pooled: Tensor
    micro_conds: Tensor


class PromptTokenizer(Protocol):
    """Texts to token ids."""

    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids (B, ``length``) of ``texts``, cut or padded to ``length``."""

    def identity(self) -> str:
        """Equal only for tokenizers that encode alike."""


class CLIPWords:
    """The tokenizer of a CLIP.

    Args:
        tokenizer: tokenizer of transformers.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer: Any = tokenizer
        # at once, since encoding sets padding and truncation in the tokenizer
        settings = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.pad_token_id}"
        self._identity = sha256(settings.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path) -> CLIPWords:
        """Load the tokenizer in ``folder``: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``.

        Raises:
            WeightsError: if files are missing or damaged.
        """
        has_words = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
        if not has_words and not (folder / "tokenizer.json").is_file():
            raise WeightsError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, of a CLIP tokenizer")
        try:
            return cls(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # the libraries raise no narrower class
            raise WeightsError(f"{folder}: not a CLIP tokenizer ({error})") from error

    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids (B, ``length``), with begin and end; longer texts are cut with a warning, as the base does."""
        for text, whole in zip(texts, self._tokenizer(list(texts), verbose=False).input_ids, strict=True):
            if len(whole) > length:
                warnings.warn(
                    f"prompt {text[:40]!r}… has {len(whole)} tokens, the text encoder takes {length}: the rest is cut",
                    stacklevel=2,
                )
        padded = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = padded.input_ids
        return ids

    def identity(self) -> str:
        """Digest of vocabulary, merges, settings and padding."""
        return self._identity


class Bytes:
    """Bytes as tokens: for random weights, which ship no vocabulary.

    Args:
        begin: id of the token before a text.
        end: id of the token behind it, and of padding.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids (B, ``length``): begin, as many bytes as fit, end and padding."""
        rows = [[self.begin, *text.encode()][: length - 1] for text in texts]
        return torch.tensor([row + [self.end] * (length - len(row)) for row in rows])

    def identity(self) -> str:
        """Name and ids."""
        return f"bytes:{self.begin}:{self.end}"


class Encoded(NamedTuple):
    """Encoded texts: ``states`` (B, T, E) before the last layer, ``pooled`` (B, E')."""

    states: Tensor
    pooled: Tensor


class CLIPText(nn.Module):
    """Frozen encoder of texts to hidden states and a pooled state.

    Args:
        model: model of transformers.
        tokenizer: maps texts to the model's token ids.
    """

    def __init__(self, model: CLIPTextModelWithProjection, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: Path,
        variant: Variant | None = None,
        dtype: torch.dtype = torch.float32,
        widths: tuple[int, int] | None = None,
    ) -> CLIPText:
        """Load the encoder in ``folder``, saved by itself or within a whole CLIP, and its tokenizer.

        Args:
            folder: folder of the model.
            tokenizer: folder of the tokenizer.
            variant: variant of the weight files.
            dtype: dtype of the model.
            widths: widths of states and pooled state that the base takes; None takes any.

        Raises:
            WeightsError: if a file is missing or damaged, tensors are missing, unknown or misshapen, or widths differ.
        """
        path, state = folder / "config.json", read_weights(folder, TRANSFORMERS, variant)
        config = read_json(path)
        try:
            if "text_config" in config:  # the whole model's configuration decides the projection's width
                config = config["text_config"] | {"projection_dim": config["projection_dim"]}
            model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)).to(dtype)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, StrictDataclassError) as error:
            raise WeightsError(f"{path}: not the configuration of a CLIP text encoder ({error})") from error
        take(model, state, folder, but_for=(_POSITIONS, *_NO_TEXT))
        found = (model.config.hidden_size, model.config.projection_dim)
        if widths not in (None, found):
            raise WeightsError(f"{folder}: expected states and a pooled state of widths {widths}, found {found}")
        return cls(model, CLIPWords.load(tokenizer))

    @classmethod
    def random(cls, width: int, depth: int, num_heads: int, activation: str, dtype: torch.dtype) -> CLIPText:
        """Make an encoder of CLIP's sizes with random weights, whose tokens are the bytes of a prompt."""
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_attention_heads=num_heads,
            num_hidden_layers=depth,
            hidden_act=activation,
        )
        return cls(
            CLIPTextModelWithProjection(config).to(dtype), Bytes(begin=config.bos_token_id, end=config.eos_token_id)
        )

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Hidden states and pooled state of ``texts``, each cut or padded to the length that the model takes."""
        length = self.model.config.max_position_embeddings
        ids = self.tokenizer.ids(texts, length).to(self.model.device, non_blocking=True)
        output = self.model(ids, output_hidden_states=True)
        return Encoded(output.hidden_states[-2], output.text_embeds)

    def identity(self) -> dict[str, str]:
        """Fingerprints of model and tokenizer, and the end token, which is where the state is pooled."""
        end = self.model.config.eos_token_id
        return {"weights": f"{network_fingerprint(self.model)}:{end}", "tokenizer": self.tokenizer.identity()}


class TextEncoder(Protocol):
    """An encoder of prompts for a base."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Hidden states and pooled state of ``texts``."""

    def identity(self) -> dict[str, str]:
        """JSON values that differ between encoders that encode differently."""


class EncodedBase(FrozenBase):
    """A frozen base that sees its prompts through a text encoder; ``grid`` is the images' height and width in tokens.

    Args:
        transformer: the network that is accelerated.
        tokenizer: decodes image tokens to images.
        text_encoder: encodes prompts.
        negative: prompt of the unconditional branch.
        size: height and width of the images in pixels.
        patch_size: side in pixels of the square that a token stands for.
        stride: side in tokens of the square that the transformer sees.

    Raises:
        ValueError: if height or width is not a positive multiple of the squares that the transformer sees.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: ImageDecoder,
        text_encoder: TextEncoder,
        negative: str,
        size: tuple[int, int],
        patch_size: int,
        stride: int,
    ) -> None:
        height, width = grid_of(*size, patch_size * stride)
        super().__init__(transformer, tokenizer)
        self.text_encoder, self.negative, self.size = text_encoder, negative, size
        self.grid = (height * stride, width * stride)
        self.eval().requires_grad_(False)

    def identity(self) -> dict[str, Any]:
        """Identity of the base, with its text encoder, the negative prompt and the images' size."""
        own = {"text_encoder": self.text_encoder.identity(), "negative": self.negative, "size": list(self.size)}
        return super().identity() | own

    def require_known(self, conditions: Conditions) -> None:
        """Raise ValueError if there is not a prompt for each sample, or one is empty; encodes none."""
        require_prompts(conditions)

    def context(self, conditions: Conditions, *, guided: bool) -> Context:
        """Encode the prompts and, if ``guided``, the negative prompt for the unconditional branch.

        Raises:
            ValueError: if there is not a prompt for each sample, or one is empty.
        """
        prompts = require_prompts(conditions)
        states, pooled = self.text_encoder.encode([*prompts, self.negative] if guided else prompts)
        count, height, width = len(prompts), *self.size
        branches = [slice(0, count)] + ([slice(count, None)] if guided else [])
        sizes = torch.tensor([width, height, 0, 0, 6], dtype=states.dtype).to(states.device, non_blocking=True)
        return EncodedContext(
            states=torch.stack([states[branch].expand(count, -1, -1) for branch in branches]),
            pooled=torch.stack([pooled[branch].expand(count, -1) for branch in branches]),
            micro_conds=sizes.expand(len(branches), count, -1),
        )
