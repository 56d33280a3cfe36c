"""What `llm-mlp bench` runs, and how results are recorded."""
