"""What a trained model does inside: observed, summed up, drawn, and told in one report.

`observe` watches forward passes, the statistics add up what it saw, `collect` runs them over held-out text, `draw_*`
makes figures of the results, `report` makes one page of the figures.
"""
