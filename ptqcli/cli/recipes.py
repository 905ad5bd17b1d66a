"""``ptq recipes``: the recipes that come with the package."""

from __future__ import annotations

import click

from ptqcli.cli import examples
from ptqcli.cli.console import Output
from ptqcli.cli.options import json_option

COLUMNS = ("recipe", "algorithm", "scheme", "what for")


@click.command(epilog=examples("ptq recipes", "ptq quantize ~/models/Llama-3.2-1B --recipe w4a16-awq --wbits 3"))
@json_option
def command(as_json: bool) -> None:
    """List the recipes that come along.

    `ptq quantize --recipe NAME` takes one by its name; flags win over it.
    """
    from ptqcli.recipe_loading import load_recipe
    from ptqcli.shipped import first_comment, shipped_recipes

    words = Output(as_json=as_json)
    found = []
    for name, file in shipped_recipes().items():
        recipe = load_recipe(file)
        scheme = str(recipe.default_scheme)
        found.append({"name": name, "algo": recipe.algo, "scheme": scheme, "summary": first_comment(file), "file": str(file)})
    words.table("Recipes", COLUMNS, ([row["name"], row["algo"], row["scheme"], row["summary"]] for row in found), words=True)
    words.result({"recipes": found})
