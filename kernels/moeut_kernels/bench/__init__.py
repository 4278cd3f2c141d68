"""Benchmarks of the expert layers: ours in parts (`python -m moeut_kernels.bench`), and beside others (`compare`)."""
