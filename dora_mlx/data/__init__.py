"""From a file to batches: records with line numbers, examples with a loss mask, batches."""
