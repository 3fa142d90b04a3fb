"""The browser front end: `python -m app`. It calls only what `dora_mlx/__init__.py` exports."""
