"""Tasks: GLUE from local files or the hub, built-in grammars, metrics and a small tokenizer."""
