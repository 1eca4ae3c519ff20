"""Tasks (GLUE from local files or the hub, built-in grammars, metrics), corpora, and tokenizers for both."""
