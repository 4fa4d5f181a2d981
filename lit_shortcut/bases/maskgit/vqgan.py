"""Image decoder of taming-transformers' VQGAN (Esser et al., arXiv 2012.09841), for the codes of MaskGIT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lit_shortcut.bases.code_decoder import CodeDecoder, taming_pairs
from lit_shortcut.published import Names, filled, load_state
from lit_shortcut.weights import WeightsError

_UNUSED = ("encoder.", "quant_conv.", "loss.")  # other tensors of the checkpoint
_SIZES: dict[str, Any] = {"codebook_size": 1024, "code_width": 256, "latent_width": 256, "attention_levels": (4,)}


def vqgan_decoder(**sizes: Any) -> CodeDecoder:
    """The decoder of MaskGIT's f16 VQGAN with random weights; ``sizes`` change arguments of :class:`CodeDecoder`."""
    return CodeDecoder(**_SIZES | sizes)


def load_vqgan(folder: Path) -> CodeDecoder:
    """Load the frozen decoder of ``model.yaml`` and ``last.ckpt``, or ``last.safetensors`` if there is one.

    Raises:
        WeightsError: if a file is missing or damaged, or the weights do not fit the configuration.
    """
    sizes = read_sizes(folder / "model.yaml")
    converted = folder / "last.safetensors"
    path = converted if converted.exists() else folder / "last.ckpt"
    names = Names([("quantize.embedding.", "codes."), *taming_pairs(len(sizes["multipliers"]))])
    return filled(lambda: CodeDecoder(**sizes), load_state(path), names, path, _UNUSED)


def read_sizes(path: Path) -> dict[str, Any]:
    """Arguments of :class:`CodeDecoder` from taming's ``model.yaml``.

    Raises:
        WeightsError: if the file is missing, is not YAML, lacks a size, or describes an unsupported variant.
    """
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        config = params["ddconfig"]
        levels = [config["resolution"] >> level for level in range(len(config["ch_mult"]))]
        sizes = {
            "codebook_size": params["n_embed"],
            "code_width": params["embed_dim"],
            "latent_width": config["z_channels"],
            "width": config["ch"],
            "multipliers": config["ch_mult"],
            "num_blocks": [config["num_res_blocks"] + 1] * len(levels),  # one more than the encoder, whose number it is
            "attention_levels": [  # taming ignores resolutions that no level has
                levels.index(resolution) for resolution in config["attn_resolutions"] if resolution in levels
            ],
        }
        fixed = {name: config[name] for name in ("double_z", "in_channels", "out_ch")}
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; it belongs beside last.ckpt") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected model.params with n_embed, embed_dim and ddconfig of a taming VQModel "
            f"({type(error).__name__}: {error})"
        ) from error
    if fixed != {"double_z": False, "in_channels": 3, "out_ch": 3}:
        raise WeightsError(f"{path}: expected double_z false, in_channels 3 and out_ch 3, got {fixed}")
    return sizes
