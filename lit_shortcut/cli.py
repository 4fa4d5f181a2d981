"""The ``lightning`` command, also installed as ``lit-shortcut``: fit, validate, test, predict."""

from __future__ import annotations

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningCLI

import datamodules  # noqa: F401 - so that YAML may name its classes in short
import lit_shortcut  # noqa: F401


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line ``args``, or the process's own."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${model.…} works under every verb
    torch.set_float32_matmul_precision("high")
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # tasks take the optimiser and its schedule as arguments
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=args,
    )


if __name__ == "__main__":
    main()
