"""The model on an NVIDIA GPU: state that lives on the device, one CUDA graph a decode step, results that come later.

Runs in: worker. `runner.py` is what the worker's loop calls; read it first.
"""
