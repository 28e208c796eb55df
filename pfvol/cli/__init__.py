"""The command line: Typer commands over the REST API, one module per noun. It never imports the control plane."""
