"""The transports that `bench/bus.py` compares, one file per family, and what drives them.

registry.py   their names, what each needs, what is measured of it
messages.py   what is sent and replied, the same for all
peer.py       the interface of a transport, processes, CPU clocks, pinning
host.py       the process that holds the driver's end of one transport and measures it
hosts.py      the benchmark's side of that process: start, stop for a while, end
plan.py       which measurements, in which order
targets.py    what the numbers are held against
encoding.py   what messages cost by themselves
report.py     table, JSON; plot.py the plot

zmqexec_bus.py  reference.py  bare.py (pingpong.c)  zeromq.py  mp.py  ray_peers.py  torch_rpc.py  vllm_queue.py
"""
