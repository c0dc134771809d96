"""`presets` and `schema`: what there is."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from meshwright.cli.common import AsJson, app, new_console, print_json
from meshwright.cli.placing import OPERATOR_SPACE, graph_methods


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the models, clusters, engines, schedules, methods and spaces that come with Meshwright."""
    import meshwright.search.calculon
    import meshwright.search.exhaustive  # noqa: F401  (registers itself)
    from meshwright.cluster import cluster_templates
    from meshwright.engine import engine_names
    from meshwright.io.models import load_model, model_presets
    from meshwright.schedule import SCHEDULES
    from meshwright.search.method import METHODS
    from meshwright.search.space import SPACES

    methods, spaces = [*METHODS, *graph_methods()], [*SPACES, OPERATOR_SPACE]

    models = {name: load_model(name).num_parameters for name in model_presets()}
    clusters = cluster_templates()
    if as_json:
        print_json(
            "presets/1",
            {
                "models": [{"name": name, "num_parameters": count} for name, count in models.items()],
                "clusters": [
                    {"name": f"{name}xN", "counts": found.counts, "devices_per_unit": found.devices_per_unit}
                    for name, found in clusters.items()
                ],
                "engines": list(engine_names()),
                "schedules": list(SCHEDULES),
                "methods": methods,
                "spaces": spaces,
            },
        )
        return
    from rich.columns import Columns

    from meshwright.units import format_count

    console = new_console()
    console.print("[bold]models[/bold]  (or a Hugging Face config.json)")
    console.print(
        Columns([f"{name} [dim]{format_count(count)}[/dim]" for name, count in models.items()], padding=(0, 3))
    )
    console.print("\n[bold]clusters[/bold]  (NAMExN: N nodes, racks, chips or processes)")
    console.print(
        Columns(
            [f"{name}xN [dim]{found.devices_per_unit} per {found.counts}[/dim]" for name, found in clusters.items()],
            padding=(0, 3),
        )
    )
    listed = {"engines": engine_names(), "schedules": SCHEDULES, "methods": methods, "spaces": spaces}
    for title, names in listed.items():
        console.print(f"\n[bold]{title}[/bold]  {', '.join(names)}")


@app.command()
def schema(
    noun: Annotated[str, typer.Argument(help="graph, cluster, strategy, plan, ...")] = "", as_json: AsJson = False
) -> None:
    """Print the JSON Schema of a noun's file, or list the nouns."""
    from meshwright.io.native import NOUNS, json_schema

    if as_json:
        print_json("schema/1", {"noun": noun, "json_schema": json_schema(noun)} if noun else {"nouns": list(NOUNS)})
    elif not noun:
        new_console().print("\n".join(NOUNS))
    else:
        sys.stdout.write(json.dumps(json_schema(noun), indent=2) + "\n")
