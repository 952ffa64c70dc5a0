"""mlxtune completion."""

from __future__ import annotations

import click

VARIABLE = "_MLXTUNE_COMPLETE"  # the shell's scripts set it where they ask for completions, as click has it


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what a shell needs to complete mlxtune's commands, options, recipes, keys of --set, and files.

    Once for every terminal to come:

    \b
    mlxtune completion zsh > ~/.mlxtune.zsh             # and in ~/.zshrc:  source ~/.mlxtune.zsh
    mlxtune completion bash > ~/.mlxtune.bash           # and in ~/.bashrc: source ~/.mlxtune.bash
    mlxtune completion fish > ~/.config/fish/completions/mlxtune.fish

    In ~/.zshrc that line stands behind `autoload -U compinit; compinit`. Bash must be 4.4 or later; macOS's own is 3.2.
    """
    from mlxtune.cli import completing

    click.echo(completing.script(shell), nl=False)
