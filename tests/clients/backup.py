"""Each of PyPI's client libraries saves a backup: python backup.py LIBRARY ENDPOINT FILE."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import BinaryIO

# What etcd3's messages, generated in 2020, need with a protobuf of today. Before its import.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"


def aetcd(host: str, port: int, file: BinaryIO) -> None:
    import aetcd

    async def save() -> None:
        async with aetcd.Client(host, port) as client:
            await client.snapshot(file)

    asyncio.run(save())


def etcd3(host: str, port: int, file: BinaryIO) -> None:
    import etcd3

    with etcd3.client(host, port) as client:
        client.snapshot(file)


def pyetcd(host: str, port: int, file: BinaryIO) -> None:
    from pyetcd.client import Endpoint, MultiEndpointEtcd3Client

    with MultiEndpointEtcd3Client([Endpoint(host, port, secure=False)]) as client:
        client.snapshot(file)


if __name__ == "__main__":
    library, endpoint, path = sys.argv[1:]
    host, port = endpoint.rsplit(":", 1)
    with open(path, "wb") as file:
        {"aetcd": aetcd, "etcd3": etcd3, "pyetcd": pyetcd}[library](host, int(port), file)
