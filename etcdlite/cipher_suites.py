"""The names of cipher suites: those of the IANA, which etcd's flag takes, and those of OpenSSL.

As in Go, the suites of TLS 1.3 cannot be chosen: all of them are on. Suites with RC4 and 3DES,
which Go still knows, are refused.
"""

from __future__ import annotations

from itertools import product

_KEY_EXCHANGES = {"RSA": "", "ECDHE_RSA": "ECDHE-RSA-", "ECDHE_ECDSA": "ECDHE-ECDSA-"}
_CIPHERS = {
    "AES_128_CBC_SHA": "AES128-SHA",
    "AES_256_CBC_SHA": "AES256-SHA",
    "AES_128_CBC_SHA256": "AES128-SHA256",
    "AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "AES_256_GCM_SHA384": "AES256-GCM-SHA384",
    "CHACHA20_POLY1305": "CHACHA20-POLY1305",
    "CHACHA20_POLY1305_SHA256": "CHACHA20-POLY1305",
}
OPENSSL_NAMES = {
    f"TLS_{exchange}_WITH_{cipher}": _KEY_EXCHANGES[exchange] + _CIPHERS[cipher]
    for exchange, cipher in product(_KEY_EXCHANGES, _CIPHERS)
    if (exchange, cipher[:6]) != ("RSA", "CHACHA")
}
"""The suites of TLS 1.2, by their IANA name."""

OF_TLS_1_3 = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}


def check(name: str) -> None:
    """Raises ValueError unless `name` is a suite that may be listed."""
    if name in OPENSSL_NAMES or name in OF_TLS_1_3:
        return
    if "_RC4_" in name or "_3DES_" in name:
        raise ValueError("it is not secure; remove it")
    raise ValueError(
        "unknown cipher suite; write IANA names, as in TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
    )
