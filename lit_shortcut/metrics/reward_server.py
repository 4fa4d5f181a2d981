"""Run by another environment's Python: scores images with that environment's reward package.

``python reward_server.py NAME DEVICE WEIGHTS``. A line of JSON says that the model is loaded; then each line of input,
``{"images": [paths], "prompts": [texts]}``, is answered by a line, ``{"scores": [numbers]}``. A failure is answered by
``{"error": text}``. Imports nothing of this project, which that environment does not hold.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

Score = Callable[[list[str], list[str]], list[float]]


def imagereward(device: str, weights: str) -> Score:
    """Scores by the package image-reward; ``weights`` is a folder or empty."""
    package = import_module("ImageReward")
    names = {"name": "ImageReward-v1.0"}
    if weights:
        names = {
            "name": os.path.join(weights, "ImageReward.pt"),
            "med_config": os.path.join(weights, "med_config.json"),
        }
    model = package.load(device=device, **names)
    return lambda images, prompts: [
        float(model.score(prompt, image)) for image, prompt in zip(images, prompts, strict=True)
    ]


def unipercept_iqa(device: str, weights: str) -> Score:
    """Scores by the package unipercept-reward; ``weights`` is a folder or empty."""
    model = import_module("unipercept_reward").UniPerceptRewardInferencer(model_path=weights or None, device=device)

    def score(images: list[str], prompts: list[str]) -> list[float]:
        rewards = model.reward(image_paths=images)
        if None in rewards:  # so the package tells of an image that it failed on, and prints why
            raise RuntimeError("unipercept-reward failed on an image; see its output above")
        return [float(reward["iqa"]) for reward in rewards]

    return score


MODELS = {"imagereward": imagereward, "unipercept-iqa": unipercept_iqa}


def main(name: str, device: str, weights: str) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the packages print

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        score = MODELS[name](device, weights)
        answer({})
        for line in sys.stdin:
            question = json.loads(line)
            answer({"scores": score(question["images"], question["prompts"])})
    except Exception as error:  # whatever it is, it ends this process and is told on the other side
        answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
