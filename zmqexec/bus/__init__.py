"""The message bus between the driver and its workers: shared memory first, ZeroMQ where that is not to be had.

Runs in: driver | worker; statistics.py and observer.py also in whoever watches: server, `zmqexec-top`.

    transport.py  chooses between the two below                    <- what the rest of the package uses
    channel.py    typed messages by shared memory: DriverChannel, WorkerChannel
    link.py       messages of any length, in order, one direction
    ring.py       records in shared memory
    zmq_path.py   payloads larger than the ring
    zeromq/       typed messages by ZeroMQ alone, also to other hosts
    status.py     what each rank is doing
    statistics.py what the bus and its engine have done, in figures
    observer.py   finding engines and looking at their bus from outside
    extension.py  what every process needs of the C extension, and what stands in for it
    memory.py     files without a name, to share memory by
    cores.py      how many cores there are to spin on
    echo_worker.py  a worker that only answers, to try a connection with

csrc/bus/PROTOCOL.md describes the shared memory.
"""
