"""URLs of databases, as a study file names them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from rankfront.methods import InputError


def parse_url(text: str) -> URL:
    """`InputError` where ``text`` is no URL or names a database that ends with the process. Never shows a password."""
    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError) as error:
        raise InputError("search.storage is no database URL: write it as postgresql://user@host/name") from error
    place = url.database or ""
    if url.get_backend_name() == "sqlite" and (
        not place or ":memory:" in place or "memory" in url.query.get("mode", "")
    ):
        raise InputError(
            f"search.storage = {text!r} is memory, and the search would end with the process: name a file, such as"
            " 'sqlite:///trials.db', or leave it out"
        )
    return url


def masked(text: str) -> str:
    """The URL ``text`` with asterisks for its password."""
    return parse_url(text).render_as_string(hide_password=True)


def without_password(text: str | None) -> str | None:
    """The URL ``text`` without its password: what says where a study lies."""
    return None if text is None else parse_url(text).set(password=None).render_as_string()


def sqlite_file(text: str, folder: Path) -> Path | None:
    """The SQLite file that the URL ``text`` names, relative to ``folder``; None for any other database."""
    url = parse_url(text)
    if url.get_backend_name() != "sqlite" or str(url.database).startswith("file:"):
        return None
    return folder / Path(str(url.database)).expanduser()
