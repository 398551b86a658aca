"""What libpq knows: its parameters, and what it adds to those of a URL by itself.

That is what PG* variables, a service file and a password file hold. libpq is asked, not imitated: it is made to prepare
a connection, and kept from opening it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from psycopg import pq
from psycopg.conninfo import make_conninfo

_OPTIONS = pq.Conninfo.parse(b"")  # all that this libpq knows; get_defaults() would read the environment, and a file
KNOWN = {option.keyword.decode() for option in _OPTIONS}
SECRET = {option.keyword.decode() for option in _OPTIONS if option.dispchar == b"*"}
SECRET |= {"scram_client_key", "scram_server_key"}  # not marked by libpq, but as good as the password
VARIABLES = {option.envvar.decode() for option in _OPTIONS if option.envvar} | {"PGSERVICEFILE", "PGSYSCONFDIR"}

ADDRESS = ("host", "hostaddr", "port", "user", "dbname")
_LISTS = ("host", "hostaddr", "port")  # one for each host to be tried
# Checked after all else was looked up, and before a socket is opened: with this value every connection ends there.
_REFUSED = {"gssencmode": "nowhere"}
_UNREADABLE = "\ufffd"  # of bytes that are not UTF-8, which psycopg could not pass on
_ITS_OWN = {"gssencmode", "passfile", "sslcertmode", "client_encoding"}  # libpq finds them again, or we set our own


def resolve(conninfo: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Return where this really leads; unchanged where libpq cannot say (no such service): connecting will tell why.

    Also the secrets among what libpq adds, or in the password file, and where all that was taken from.
    """
    prepared = _prepare(conninfo)
    if not prepared.db:
        return dict(conninfo), (), ()
    found = {
        option.keyword.decode(): _text(option.val)
        for option in prepared.info
        if option.val and (option.val != option.compiled or option.keyword.decode() in ADDRESS)
    }
    if found.keys().isdisjoint({"host", "hostaddr"}):
        found["host"] = _text(prepared.host)  # the folder of sockets that this libpq was built for
    left = {name for name, value in found.items() if name in _ITS_OWN or _UNREADABLE in value}
    whole = {name: value for name, value in found.items() if name not in left} | dict(conninfo)
    in_file = () if "password" in found else tuple(_passwords(whole))
    secrets = [value for name, value in found.items() if name in SECRET]
    return whole, (*secrets, *in_file), tuple(_sources(found, conninfo, in_file))


def _text(value: bytes) -> str:
    return value.decode(errors="replace")  # as psycopg reads what a server says


def _prepare(conninfo: Mapping[str, str]) -> pq.abc.PGconn:
    return pq.PGconn.connect_start(make_conninfo(**{**conninfo, **_REFUSED}).encode())


def _passwords(conninfo: Mapping[str, str]) -> Iterator[str]:
    """Look into the password file as libpq does: anew for each host."""
    lists = {name: conninfo[name].split(",") for name in _LISTS if name in conninfo}
    for index in range(max(map(len, lists.values()))):
        one = {name: values[min(index, len(values) - 1)] for name, values in lists.items()}
        if password := _text(_prepare({**conninfo, **one}).password):
            yield password


def _sources(found: Mapping[str, str], conninfo: Mapping[str, str], in_file: tuple[str, ...]) -> Iterator[str]:
    for option in _OPTIONS:
        name, variable = option.keyword.decode(), (option.envvar or b"").decode()
        if name in found and name not in conninfo and os.environ.get(variable) == found[name]:
            yield variable
    if "service" in found:
        yield f"service {found['service']}"
    if in_file:
        yield "the password file"


def find_certificates() -> None:
    """Let sslrootcert=system mean this system's: psycopg's wheels bring an OpenSSL that looks in a place of its own."""
    import ssl  # seldom needed, and slow to load

    places = ssl.get_default_verify_paths()
    for variable, place in ((places.openssl_cafile_env, places.cafile), (places.openssl_capath_env, places.capath)):
        if place:
            os.environ.setdefault(variable, place)
