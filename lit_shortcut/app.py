"""A page to try a shortcut on: vanilla and accelerated side by side; needs the extra ``app`` (Gradio)."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import NamedTuple

import gradio as gr
import torch
from PIL import Image

from lit_shortcut.contracts import Step
from lit_shortcut.pictures import conditions_of, draw, row_of, to_pil
from lit_shortcut.pipeline import Pipeline

MOST_WAITING = 8
"""Requests that wait for their turn; further ones are turned away. One is drawn at a time."""

MOST_CHARACTERS = 500
"""Length of a prompt; its tokens are counted by the base, which may take fewer."""

_MOST_SEED = 2**31 - 1
_LEAST_SIDE = 320  # pixels that a picture is magnified to, so that one of 28×28 can be looked at


class Side(NamedTuple):
    """One picture, how long its decoding loop took, and at which steps the base ran."""

    name: str
    image: Image.Image
    latency_ms: float
    full: tuple[bool, ...]

    def __str__(self) -> str:
        """Return what stands under the picture: ``shortcut: 3 of 8 base passes, 12.0 ms`` and a disc for each step."""
        discs = "".join("●" if is_full else "○" for is_full in self.full)
        return f"{self.name}: {sum(self.full)} of {len(self.full)} base passes, {self.latency_ms:.1f} ms  \n{discs}"


def compare(
    pipeline: Pipeline,
    wanted: str | int,
    seed: int,
    num_steps: int,
    budget: int,
    on_step: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[Side, Side]:
    """Draw ``wanted``, a prompt or a class, by vanilla and by the shortcut, at one seed.

    Args:
        pipeline: a base with its shortcut.
        wanted: prompt or class, whichever the base takes.
        seed: 64-bit integer.
        num_steps: N of vanilla, at most that of the pipeline; the shortcut runs in as many steps as it was trained for.
        budget: b, steps of the shortcut's at which the base runs.
        on_step: called with the numbers of finished steps and of all steps.

    Raises:
        ValueError: if a number is out of range, or the prompt is empty, too long or not what the base takes.
    """
    most = pipeline.decoding.num_steps
    if not 1 <= num_steps <= most:
        raise ValueError(f"steps must lie in 1..{most}, got {num_steps}")
    if isinstance(wanted, str) and not 1 <= len(wanted.strip()) <= MOST_CHARACTERS:
        raise ValueError(f"expected a prompt of 1 to {MOST_CHARACTERS} characters, got {len(wanted.strip())}")
    prompts, labels = ([wanted], []) if isinstance(wanted, str) else ([], [wanted])
    conditions = conditions_of(pipeline.base, prompts, labels, [seed], pipeline.device)
    rows = {
        "vanilla": row_of(None, "even", None, pipeline.decoding.at(num_steps)),
        "shortcut": row_of(pipeline.shortcut, pipeline.plan, budget, pipeline.decoding),
    }
    total, full = num_steps + most, list[bool]()

    def stepped(step: Step) -> None:
        full.append(bool(torch.as_tensor(step.is_full).any()))
        on_step(len(full), total)

    drawn = {name: draw(pipeline.base, conditions, row, on_step=stepped) for name, row in rows.items()}
    passes = {"vanilla": tuple(full[:num_steps]), "shortcut": tuple(full[num_steps:])}
    vanilla, shortcut = (
        Side(name, _magnified(to_pil(found.images)[0]), found.latency_ms, passes[name]) for name, found in drawn.items()
    )
    return vanilla, shortcut


def build(pipeline: Pipeline) -> gr.Blocks:
    """Return the page that draws with ``pipeline``.

    Raises:
        ValueError: if it has no shortcut.
    """
    if pipeline.shortcut is None:
        raise ValueError("the app compares vanilla with a shortcut; the configuration has no model.shortcut")
    most, classes = pipeline.decoding.num_steps, pipeline.base.spec.num_classes

    def on_draw(
        wanted: str | int,
        seed: int | None,
        num_steps: int,
        budget: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Image.Image, str, Image.Image, str]:
        def on_step(done: int, total: int) -> None:
            progress((done, total), unit="steps")

        try:
            if seed is None:  # the field is empty
                raise ValueError("expected a seed, got none")
            vanilla, shortcut = compare(pipeline, wanted, seed, num_steps, budget, on_step)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=8, print_exception=False) from error
        return vanilla.image, str(vanilla), shortcut.image, str(shortcut)

    with gr.Blocks(analytics_enabled=False, title="lit-shortcut") as page:
        gr.Markdown("# One seed, with and without the shortcut\n● the base ran at this step, ○ the shortcut did.")
        with gr.Row():
            wanted = (
                gr.Slider(0, classes - 1, 0, step=1, precision=0, label="Class")
                if classes
                else gr.Textbox(label="Prompt", max_length=MOST_CHARACTERS, scale=3)
            )
            seed = gr.Number(0, minimum=0, maximum=_MOST_SEED, precision=0, label="Seed")
            button = gr.Button("Draw", variant="primary")
        with gr.Row():
            num_steps = gr.Slider(1, most, most, step=1, precision=0, label="Vanilla: steps N")
            budget = gr.Slider(
                1, most, pipeline.budget or most, step=1, precision=0, label=f"Shortcut: base passes b of {most} steps"
            )
        with gr.Row():
            outputs = [part for _ in range(2) for part in _side()]
        triggers = [button.click, num_steps.release, budget.release]
        triggers += [wanted.release if classes else wanted.submit, seed.submit]
        gr.on(triggers, on_draw, [wanted, seed, num_steps, budget], outputs, api_name="draw")
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    return page


def serve(pipeline: Pipeline, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until the process is stopped.

    Args:
        pipeline: a base with its shortcut.
        host: address to listen at; None takes ``GRADIO_SERVER_NAME``, or 127.0.0.1 where that is not set.
        port: None takes ``GRADIO_SERVER_PORT``, or the first free one from 7860 on.
    """
    page = build(pipeline)
    wanted = 0 if pipeline.base.spec.num_classes else "warm up"
    budget = pipeline.budget or 1  # a calibrated plan has some budgets only
    compare(pipeline, wanted, 0, pipeline.decoding.num_steps, budget)  # what a device does once is no visitor's latency
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others come from a network
    page.launch(server_name=host, server_port=port, share=False, ssr_mode=False, footer_links=[], theme=theme)


def _side() -> tuple[gr.Image, gr.Markdown]:
    with gr.Column():
        return gr.Image(
            type="pil", format="png", interactive=False, show_label=False, buttons=["download"]
        ), gr.Markdown()


def _magnified(image: Image.Image) -> Image.Image:
    factor = -(-_LEAST_SIDE // max(image.size)) if max(image.size) < _LEAST_SIDE else 1
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
