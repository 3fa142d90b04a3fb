"""State in, HTML out: pure functions that know nothing of Gradio and escape every text."""
