"""Exchange with the original research code: its parameter names and configurations in terms of ours."""
