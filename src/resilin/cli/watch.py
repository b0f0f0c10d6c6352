"""`resilin watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one with runs below it.", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the page is served; 0: any that is free.")] = 8420,
    host: Annotated[
        str, typer.Option(help="The address to listen at. Any but this machine's loopback asks for a token.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in this machine's browser.")] = False,
) -> None:
    """Show a run in the browser: cluster, curves and changes, while it trains or afterwards. Ctrl-C ends it.

    \b
    resilin watch runs/shakespeare
    resilin watch runs                          a list of all runs below
    resilin watch runs/big --host 0.0.0.0       for others too: the address that is printed has a token
    """
    import webbrowser

    from resilin.dashboard.server import Server, Site

    with Server(Site(folder), host, port) as server:
        typer.echo(f"{folder} is shown at {server.url} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")
