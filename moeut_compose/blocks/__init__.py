"""Modules: they know tensors and other modules, never specs, paths or YAML.

Shape letters: B batch, T new positions, S all positions, N = B*T tokens, D model width, H heads, E experts,
K chosen experts, F hidden width, V vocabulary.
"""
