"""Reward models published as packages that cannot share an environment with this one, asked in a process of their own.

Neither was run here with its published weights: what is tested is the way to the package and back, with stand-ins
for the packages that answer as their documentation says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from torch import Tensor

from lit_shortcut.contracts import Conditions
from lit_shortcut.metrics.images import ImageMean, prompts_of
from lit_shortcut.weights import WeightsError

_SERVER = Path(__file__).with_name("reward_server.py")
_SECONDS_TO_LEAVE = 10.0


class Reward(ImageMean):
    """Mean of what a reward model says of images; the model is loaded by :meth:`to`, or by the first images.

    Args:
        name: of the model, as ``reward_server.py`` knows it.
        python: interpreter of the environment that holds the package.
        weights: the model's own, as its package takes them; None lets the package download them.
        advice: how to get package and weights.
    """

    def __init__(self, name: str, python: Path, weights: Path | None, advice: str) -> None:
        super().__init__()
        self.name, self.python, self.weights, self.advice = name, python, weights, advice
        self.device = torch.device("cpu")
        self.server: subprocess.Popen[str] | None = None

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for ``conditions``.

        Raises:
            WeightsError: if package or weights are missing, or the model fails.
        """
        self._score(images, [""] * len(images))

    def to(self, device: torch.device) -> None:
        """Load the model on ``device``, so that what is missing shows before any image is drawn.

        Raises:
            WeightsError: if package or weights are missing.
        """
        if self.server is None or device != self.device:
            self.device = device
            super().to(device)
            self._start()

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: Sequence[str]) -> None:
        if self.server is None:
            self._start()
        with TemporaryDirectory() as folder:
            paths = [str(Path(folder, f"{index}.png")) for index in range(len(images))]
            for path, image in zip(paths, images.cpu(), strict=True):
                torchvision.io.write_png(image, path)
            scores = self._ask({"images": paths, "prompts": list(prompts)})["scores"]
        self.gathered.update(torch.tensor(scores, dtype=torch.float32, device=self.device))

    def _start(self) -> None:
        self._stop()
        command = [str(self.python), str(_SERVER), self.name, str(self.device), str(self.weights or "")]
        pipe = subprocess.PIPE
        try:
            self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")  # noqa: S603 - the user's own interpreter
        except OSError as error:
            raise WeightsError(f"{self.python}: no Python interpreter ({error}). {self.advice}") from error
        weakref.finalize(self, _end, self.server)
        self._answer()

    def _stop(self) -> None:
        if self.server is not None:
            _end(self.server)
        self.server = None

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.server
        assert self.server.stdin
        with suppress(BrokenPipeError):  # it has ended, and the answer says so
            self.server.stdin.write(json.dumps(question) + "\n")
            self.server.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.server
        assert self.server.stdout
        line = self.server.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended without an answer"}
        if "error" in answer:
            self._stop()
            raise WeightsError(f"{self.name} in {self.python}: {answer['error']}. {self.advice}")
        return answer


class ImageReward(Reward):
    """Mean of ImageReward-v1.0, how people like images made for a prompt (Xu et al., arXiv 2304.05977).

    The package image-reward 1.5 needs transformers 4, and this project's huggingface_hub needs 5: give the package an
    environment of its own and name its interpreter. Loaded and asked as its documentation says; not verified here with
    the published weights. It takes the first 35 tokens of a prompt.

    Args:
        python: interpreter of that environment; None is the present one.
        weights: folder with ``ImageReward.pt`` and ``med_config.json`` of hf://THUDM/ImageReward; None lets the package
            download them to ~/.cache/ImageReward.
    """

    def __init__(self, python: Path | None = None, weights: Path | None = None) -> None:
        advice = (
            "ImageReward needs an environment of its own: python -m venv ENV && ENV/bin/pip install image-reward==1.5 "
            "'transformers>=4.27.4,<4.50' git+https://github.com/openai/CLIP.git, and ENV/bin/python as `python`. Its "
            "weights: `hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir FOLDER`, and FOLDER as "
            "`weights`; it also takes the tokenizer bert-base-uncased from the hub's cache"
        )
        super().__init__("imagereward", python or Path(sys.executable), weights, advice)

    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Take in uint8 ``images`` (B, 3, H, W), made for ``conditions.prompts``; raises ValueError without."""
        self._score(images, prompts_of(conditions))


class UniPerceptIQA(Reward):
    """Mean image quality by UniPercept, from 0 to 100; it sees no prompts (Cao et al., arXiv 2512.21675).

    The package unipercept-reward 1.0.3 is fixed to torch 2.8.0 and transformers 4.49.0, which cannot stand beside this
    project's huggingface_hub: give it an environment of its own and name its interpreter. Loaded and asked as its
    documentation says; not verified here with the published weights, 8 B parameters.

    Args:
        python: interpreter of that environment; None is the present one.
        weights: folder of hf://Thunderbolt215215/UniPercept; None lets the package download it to the hub's cache.
    """

    def __init__(self, python: Path | None = None, weights: Path | None = None) -> None:
        advice = (
            "UniPercept needs an environment of its own: python -m venv ENV && ENV/bin/pip install "
            "unipercept-reward==1.0.3, and ENV/bin/python as `python`. Its weights: `hf download "
            "Thunderbolt215215/UniPercept --local-dir FOLDER`, and FOLDER as `weights`"
        )
        super().__init__("unipercept-iqa", python or Path(sys.executable), weights, advice)


def _end(server: subprocess.Popen[str]) -> None:
    """Let ``server`` leave by closing its input; it is not to outlive the metric."""
    assert server.stdin
    assert server.stdout
    with suppress(BrokenPipeError):  # of a question that was never read
        server.stdin.close()
    server.stdout.close()
    try:
        server.wait(_SECONDS_TO_LEAVE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
