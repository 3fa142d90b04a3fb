"""From an adapted model to files that other programs load: safetensors and GGUF.

``merge`` gives one tensor at a time, a writer stages and writes them, ``verify`` loads the result
in the program it is meant for and compares it with the model that was exported.
"""
