"""Methods trained side by side: what to run, running it, and the report."""
