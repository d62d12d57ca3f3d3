"""The message bus between the driver and its workers: shared memory first, ZeroMQ for what does not fit.

Runs in: driver | worker.

    transport.py chooses between the two below
    channel.py   typed messages: DriverChannel, WorkerChannel      <- what the rest of the package uses
    link.py      bytes of any length, in order, one direction
    ring.py      records in shared memory
    zmq_path.py  payloads larger than the ring
    status.py    what each rank is doing
    extension.py what every process needs of the C extension, and what stands in for it
    memory.py    files without a name, to share memory by
    cores.py     how many cores there are to spin on

csrc/bus/PROTOCOL.md describes the shared memory.
"""
