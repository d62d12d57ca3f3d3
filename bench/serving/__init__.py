"""What latency.py, throughput.py and gpu.py share: cases, the clock around an engine, and the peers' processes."""
