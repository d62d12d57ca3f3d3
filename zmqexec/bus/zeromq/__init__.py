"""The bus over ZeroMQ alone: where memory cannot be shared, and for workers on other hosts.

Runs in: driver | worker.

    driver_channel.py  ZmqDriverChannel      the methods and promises of ../channel.py, with other means
    worker_channel.py  ZmqWorkerChannel
    codec.py           messages to bytes and back
    frames.py          the header before each payload, checked on arrival
    lane.py            one direction of one rank: sequence, credits, what went wrong
    control.py         what the two ends say to each other beside the messages
    driver_end.py  worker_end.py          sockets and threads of an end, opened and closed
    driver_service.py  worker_service.py  the thread that owns the control connections
    endpoints.py       where sockets meet: abstract names, a private folder, TCP under CURVE
    keys.py            CURVE keys and their files
    wake.py            how any thread ends another's wait
"""
