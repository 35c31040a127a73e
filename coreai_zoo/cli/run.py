"""`zoo run`: text from a bundle."""

from __future__ import annotations

import sys

import click

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import plugins_of


@click.command("run")
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--chat", is_flag=True, help="Treat the prompt as a user's message, in the bundle's chat template.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: most probable token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.pass_context
def run(
    ctx: click.Context, bundle: str, prompt: str, new_tokens: int, chat: bool, temperature: float, seed: int
) -> None:
    """Generate text with a bundle, on the runtime of this machine.

    On Linux that is a slow CPU interpreter: fine for samples and slices. BUNDLE is a path or a name, as for `zoo
    gate`.

    \b
    Example:
        zoo run qwen3.6-27b --chat -p "Hello!"
        zoo run exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p "def main(" -n 40
    """
    from coreai_zoo.bundle.generate import Sampling, chat_prompt, generate
    from coreai_zoo.bundle.verify import backend_of, require_asset

    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    backend = backend_of(opened, plugins.backends())
    require_asset(opened)
    if chat:
        prompt = chat_prompt(opened, prompt)
    else:
        click.echo(prompt, nl=False)
    for text in generate(opened, backend, prompt, new_tokens, Sampling(temperature, seed)):
        click.echo(text, nl=False)
        sys.stdout.flush()
    click.echo()
