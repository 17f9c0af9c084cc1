#!/usr/bin/env python3
"""A watch whose client sends one create request and half-closes must go on streaming events.

ENDPOINT=127.0.0.1:2379 python watch_half_close.py    needs: pip install grpcio
Raw protobuf bytes, so that no generated code is needed.
"""

import os
import sys
import threading
import time

import grpc

ENDPOINT = os.environ.get("ENDPOINT", "127.0.0.1:2379")


def raw(b):
    return b


def field(n, b):
    return bytes([n << 3 | 2, len(b)]) + b


channel = grpc.insecure_channel(ENDPOINT)
plain = {"request_serializer": raw, "response_deserializer": raw}
watch = channel.stream_stream("/etcdserverpb.Watch/Watch", **plain)
put = channel.unary_unary("/etcdserverpb.KV/Put", **plain)

key = b"half-close-%d" % os.getpid()
create = field(1, field(1, key))  # WatchRequest{create_request{key}}
# The iterator ends: END_STREAM right after the message.
call = watch(iter([create]), timeout=60)
got = []


def read():
    try:
        for response in call:
            got.append(("response", key in response))
        got.append(("ended by the server", call.code().name))
    except grpc.RpcError as e:
        got.append(("error", e.code().name))


def come(count):
    """Wait for `count` responses, or the end."""
    while len(got) < count and not any(g[0] != "response" for g in got):
        time.sleep(0.02)


threading.Thread(target=read, daemon=True).start()
come(1)
put(field(1, key) + field(2, b"1"))
come(2)
print(got)
ok = ("response", True) in got and not any(g[0] == "ended by the server" for g in got)
print("RIGHT: the event came" if ok else "FAULT: no event; the watch ended with the request side")
sys.exit(0 if ok else 1)
