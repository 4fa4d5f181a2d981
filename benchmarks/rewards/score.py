"""Score a folder of images by a reward model, with the Python of an environment that holds the model's package.

``ENV/bin/python benchmarks/rewards/score.py MODEL FOLDER`` reads the PNGs that ``lit-shortcut generate`` wrote to
FOLDER, which hold their prompts, or any others, with ``prompts.json``, a list with one for each in the order of their
names. It writes ``scores_MODEL.json`` beside them, with a mean of its own for vanilla's pictures. Imports nothing of
this project: the packages cannot be installed beside it.

imagereward: ImageReward-v1.0, how people like images made for a prompt (Xu et al., arXiv 2304.05977); it takes the
first 35 tokens of a prompt. Package: ``pip install image-reward==1.5 'transformers>=4.27.4,<4.50'
git+https://github.com/openai/CLIP.git``; weights: ``hf download THUDM/ImageReward ImageReward.pt med_config.json
--local-dir WEIGHTS``.

unipercept: UniPercept-IQA, image quality from 0 to 100 without prompts (Cao et al., arXiv 2512.21675). Package:
``pip install unipercept-reward==1.0.3``; weights: ``hf download Thunderbolt215215/UniPercept --local-dir WEIGHTS``.

Neither was run here with its published weights; the packages are called as their documentation says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from PIL import Image

_GRID = "grid.png"  # of all pictures, beside them
_VANILLA = "_vanilla.png"  # end of the names of vanilla's, which generate --compare writes beside the others


def imagereward(images: list[Path], prompts: list[str], weights: Path | None, device: str) -> Iterator[float]:
    """Yield a score for each image and its prompt."""
    own = {} if weights is None else {"med_config": str(weights / "med_config.json")}
    name = "ImageReward-v1.0" if weights is None else str(weights / "ImageReward.pt")
    model = import_module("ImageReward").load(name=name, device=device, **own)
    for image, prompt in zip(images, prompts, strict=True):
        yield float(model.score(prompt, str(image)))


def unipercept(images: list[Path], prompts: list[str], weights: Path | None, device: str) -> Iterator[float]:
    """Yield a quality for each image, asked for one at a time, so that a failure names its image."""
    package = import_module("unipercept_reward")
    model = package.UniPerceptRewardInferencer(model_path=None if weights is None else str(weights), device=device)
    for image in images:
        (reward,) = model.reward(image_paths=[str(image)])
        if reward is None:  # the package prints why
            raise SystemExit(f"{image}: unipercept-reward failed on it; see its output above")
        yield float(reward["iqa"])


MODELS = {"imagereward": imagereward, "unipercept": unipercept}


def prompts_of(images: list[Path], listed: Path) -> list[str]:
    """Return the prompt of each of ``images``, from the file ``listed`` or else from the images' own text chunks."""
    if listed.exists():
        prompts: list[str] = json.loads(listed.read_text(encoding="utf-8"))
        if len(prompts) != len(images):
            raise SystemExit(f"{listed}: expected a prompt for each of {len(images)} images, found {len(prompts)}")
        return prompts
    held = [Image.open(path).info.get("prompt") for path in images]
    if None in held:
        raise SystemExit(f"{images[held.index(None)]}: expected its prompt inside it, or all prompts in {listed}")
    return [str(prompt) for prompt in held]


def main() -> None:
    """Read the command line, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, help="folder; by default the package downloads them")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    images = sorted(path for path in args.folder.glob("*.png") if path.name != _GRID and not path.name.startswith("."))
    if not images:
        raise SystemExit(f"{args.folder}: expected PNG files, found none")
    prompts = prompts_of(images, args.folder / "prompts.json") if args.model == "imagereward" else []
    scores = list(MODELS[args.model](images, prompts, args.weights, args.device))
    named = {image.name: score for image, score in zip(images, scores, strict=True)}
    vanilla = [score for name, score in named.items() if name.endswith(_VANILLA)]
    others = [score for name, score in named.items() if not name.endswith(_VANILLA)]
    means = {part: sum(own) / len(own) for part, own in (("mean", others), ("mean_vanilla", vanilla)) if own}
    found = {"model": args.model, **means, "scores": named}
    (args.folder / f"scores_{args.model}.json").write_text(json.dumps(found, indent=1) + "\n")
    said = ", ".join(f"{part} {mean:.4f}" for part, mean in means.items())
    print(f"{args.model}: {said} of {len(scores)} images")  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
