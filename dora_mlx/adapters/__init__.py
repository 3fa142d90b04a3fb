"""Put adapters into a model, take them out again, and keep them in a folder."""
