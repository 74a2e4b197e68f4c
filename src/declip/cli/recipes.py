"""The command ``declip recipes``: list the shipped recipes, or show one."""

from typing import Annotated

import typer

from declip.cli.options import Overrides, console, say

group = typer.Typer(help="List the shipped recipes, or show one with all its keys.")


@group.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes with their image towers, data and loss weights."""
    if context.invoked_subcommand is not None:
        return
    from declip.recipe.load import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        losses = ", ".join(f"{weight:g} {loss}" for loss, weight in recipe.active_losses.items())
        own = recipe.finetune.pretrained is not None
        towers = "your weights" if own else f"{recipe.image.model}, {recipe.image.size} px"
        line = f"[bold]{name}[/]  {towers}, {recipe.data.label}: {losses}"
        console.print(line, highlight=False, soft_wrap=True)


@group.command()
def show(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe, or a YAML file")],
    overrides: Overrides = None,
) -> None:
    """Print a recipe as YAML, with every key and default."""
    from declip.recipe.load import load_recipe, parse_overrides

    say(load_recipe(recipe, parse_overrides(overrides or [])).to_yaml().rstrip())
