"""What Supabase puts into a database, as far as the chain meets it: roles, auth, default privileges, profiles."""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from budget_engine.postgres.embedded import Cluster
from conftest import Db, assert_done
from psycopg import sql

ROLES = ("anon", "authenticated", "service_role")

# Who migrates there: not a superuser, but the database, the schema public and the three roles are its own.
MIGRATOR = "supabase_postgres"

ADMIN = "00000000-0000-4000-8000-00000000000a"
PLAYER = "00000000-0000-4000-8000-00000000000b"

# Roles belong to the server, not to the database: another test has created them already, or does so at this moment.
_GRANTING = threading.Lock()
_ROLES = "\n".join(
    f"""DO $$ BEGIN CREATE ROLE {role} {rights};
EXCEPTION WHEN duplicate_object THEN NULL; END $$;"""
    for role, rights in (
        ("anon", "NOLOGIN NOINHERIT"),
        ("authenticated", "NOLOGIN NOINHERIT"),
        ("service_role", "NOLOGIN NOINHERIT BYPASSRLS"),
        ("authenticator", "LOGIN NOINHERIT"),
        (MIGRATOR, "LOGIN CREATEROLE BYPASSRLS"),
    )
)

_MEMBERS = f"GRANT anon, authenticated, service_role TO authenticator, {MIGRATOR};"

_AUTH = f"""
ALTER DATABASE {{database}} OWNER TO {MIGRATOR};
ALTER SCHEMA public OWNER TO {MIGRATOR};
CREATE SCHEMA auth;
CREATE TABLE auth.users (
  id uuid CONSTRAINT users_pkey PRIMARY KEY,
  email text,
  created_at timestamptz DEFAULT now()
);
ALTER TABLE auth.users ENABLE ROW LEVEL SECURITY;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$
  SELECT coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''),
                  nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid $$;
CREATE FUNCTION auth.role() RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(nullif(current_setting('request.jwt.claim.role', true), ''),
                  nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role') $$;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role, {MIGRATOR};
GRANT ALL ON auth.users TO {MIGRATOR};
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
INSERT INTO auth.users (id, email) VALUES ('{ADMIN}', 'admin@example.org'), ('{PLAYER}', 'player@example.org');
"""

_DEFAULT_PRIVILEGES = f"""
ALTER DEFAULT PRIVILEGES FOR ROLE postgres, {MIGRATOR} IN SCHEMA public
  GRANT ALL ON TABLES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE postgres, {MIGRATOR} IN SCHEMA public
  GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE postgres, {MIGRATOR} IN SCHEMA public
  GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
"""

_PROFILES = f"""
CREATE TABLE public.profiles (
  id uuid CONSTRAINT profiles_pkey PRIMARY KEY REFERENCES auth.users (id) ON DELETE CASCADE,
  role text NOT NULL DEFAULT 'player'
);
ALTER TABLE public.profiles ENABLE ROW LEVEL SECURITY;
CREATE POLICY profiles_own ON public.profiles FOR SELECT TO authenticated USING (id = (SELECT auth.uid()));
GRANT SELECT ON public.profiles TO authenticated;
INSERT INTO public.profiles (id, role) VALUES ('{ADMIN}', 'admin'), ('{PLAYER}', 'player');
"""


def install(db: Db, *, default_privileges: bool = True) -> None:
    """Make the database a Supabase one; newer projects come without default privileges."""
    with db.connect() as connection:
        # Two that grant the same membership at once: the later one fails on the catalog row of the earlier one.
        with _GRANTING:
            connection.execute(_ROLES)
            connection.execute(_MEMBERS)
        connection.execute(_AUTH.format(database=db.name))
        if default_privileges:
            connection.execute(_DEFAULT_PRIVILEGES)


def add_profiles(db: Db) -> None:
    """Create profiles as an application does, each user seeing its own row; with an admin and a player."""
    db.execute(_PROFILES)


@functools.cache
def template(cluster: Cluster, *, profiles: bool = True, default_privileges: bool = True, role: str = "postgres") -> Db:
    """Return a database that setup has finished, to look at, or to be cloned (which makes postgres its owner)."""
    db = Db(cluster, f"supabase_{uuid.uuid4().hex}")
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {db.name} TEMPLATE template0")
    install(db, default_privileges=default_privileges)
    if profiles:
        add_profiles(db)
    assert_done(db, db.invoke("setup", role=role))
    return db


@contextmanager
def session(db: Db, role: str, user: str | None = None) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """Open a session as the HTTP gateway does: log in as authenticator, become the role, say who the user is."""
    with db.connect("authenticator") as connection:
        claims = "" if user is None else f'{{"sub": "{user}", "role": "{role}"}}'
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        connection.execute("SELECT set_config('request.jwt.claims', %s, false)", [claims])
        yield connection
