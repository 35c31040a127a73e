"""`zoo run`: text from a bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.commands import plugins_of


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--chat", is_flag=True, help="Treat the prompt as a user's message, in the bundle's chat template.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: most probable token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.pass_context
def run(
    ctx: click.Context, bundle: Path, prompt: str, new_tokens: int, chat: bool, temperature: float, seed: int
) -> None:
    """Generate text with a bundle, on the runtime of this machine.

    On Linux that is a slow CPU interpreter: fine for samples and slices.

    \b
    Example:
        zoo run exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p "def main(" -n 40
    """
    from coreai_zoo.bundle.generate import Sampling, chat_prompt, generate
    from coreai_zoo.bundle.verify import backend_of, require_asset

    opened = Bundle.open(bundle)
    backend = backend_of(opened, plugins_of(ctx).backends())
    require_asset(opened)
    if chat:
        prompt = chat_prompt(opened, prompt)
    else:
        click.echo(prompt, nl=False)
    for text in generate(opened, backend, prompt, new_tokens, Sampling(temperature, seed)):
        click.echo(text, nl=False)
        sys.stdout.flush()
    click.echo()
