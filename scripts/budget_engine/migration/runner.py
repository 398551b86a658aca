"""The runner: sends a plan, each step in a transaction of its own, all of them in one message.

A step is BEGIN, our settings, the guard against other runs, its locks, its statements, its verification, its line in
the history, COMMIT. After an error the server skips the rest: the steps before it are committed, it and those after it
changed nothing. Then the concurrent part: each statement alone, outside any transaction.

The turn is the session's from the first step to the last: a run by another path must not come between two of them. A
pooler's session would keep it after an error, for whoever comes next; there each step takes the turn for itself.

The verification travels once, and is planned once: as a prepared statement, which ends with the message and is executed
in each step.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from budget_engine import __version__, errors
from budget_engine.errors import StatementError
from budget_engine.migration import survey, turn
from budget_engine.migration.chain import Chain, Step
from budget_engine.migration.checks import STRENGTH, Check, Kind, Lock
from budget_engine.migration.plan import Action, Effect, Plan, StepPlan
from budget_engine.migration.survey import Server, Survey
from budget_engine.postgres.connection import (
    BEGIN,
    BEGIN_READ_ONLY,
    MISGUIDING,
    PIN,
    Connection,
    Rows,
    understood,
)
from budget_engine.spelling import in_bytes, literal, respelled

_BUSY = "TB004"  # raised by the guard
AT_WORK = "run is at work in this schema"
_DEADLOCK = "40P01"
_INTEGRITY = "23"  # the class of integrity constraint violations
_DUPLICATE_TABLE = "42P07"
_TIMEOUTS = {"57014", "55P03", "25P04"}  # what a role's own limits end a statement with
_MOST_NOTICES = 20  # of one statement: a trigger may raise them for ever
_MOMENT_MS = 100  # shorter than deadlock_timeout: nobody dies in a deadlock with us

# What runs as if nothing of others were there; for what follows, the search_path is as it was.
_OURS = """DO ${tag}$
DECLARE
  path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
  seen pg_catalog.text;
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
{does}
  PERFORM set_config('search_path', path, true);
END
${tag}$"""
_BUSY_IF = f"""\
  IF {{condition}} THEN
    RAISE EXCEPTION USING ERRCODE = '{_BUSY}', MESSAGE = 'another {AT_WORK}';
  END IF;"""
_RELEASED = f"  PERFORM {turn.released(turn.RUN)};"
_NAME = "budget_engine_verification"
_PREPARE = f"""
  IF EXISTS (SELECT FROM pg_prepared_statements WHERE name = '{_NAME}') THEN  -- of a message that failed
    DEALLOCATE {_NAME};
  END IF;
  EXECUTE {{prepare}};"""
# Without a step ($1): how many checks find something, how many pass, of how many. With one: what differs of that which
# it must have brought. $2: kind, table and name of what more it brings; $3: of a concurrent part; $4: its new tables.
_KEYS = "(SELECT key ->> 0, key ->> 1, key ->> 2 FROM json_array_elements({}) AS key)"
_VERIFICATION = f"""PREPARE {_NAME} (text, json, json, text[]) AS
SELECT CASE WHEN $1 IS NULL THEN concat_ws(' ', count(actual), count(*) FILTER (WHERE actual = expected), count(*))
            ELSE string_agg(format('%s %s is %s, expected %s', kind, concat_ws('.', "table", nullif(name, '')),
                                   coalesce(actual, 'missing'), expected), E'\\n')
                 FILTER (WHERE actual IS DISTINCT FROM expected
                           AND (step = $1 AND (required OR "table" = ANY ($4))  -- of a table that it creates, all
                                OR (kind, "table", name) IN {_KEYS.format("$2")})
                           AND (kind, "table", name) NOT IN {_KEYS.format("$3")})
       END
FROM ({{verification}}) AS checks"""
_ONE_PLAN = "set_config('plan_cache_mode', 'force_generic_plan', true)"
_BROKEN_IF_SEEN = f"""\
  IF seen IS NOT NULL THEN
    RAISE EXCEPTION USING ERRCODE = 'TB003', MESSAGE = {literal(errors.BROKEN_STEP.says)}, DETAIL = seen;
  END IF;"""

# All of them or none: who waits for one table while holding another holds up everybody who wants that one. So the queue
# is for the first only, while nothing is held; what comes after it is waited for a moment at most.
_LOCKS = """DO ${tag}$
DECLARE
  give_up CONSTANT pg_catalog.timestamptz :=
    pg_catalog.clock_timestamp() + pg_catalog.current_setting('lock_timeout')::pg_catalog.interval;
BEGIN
  LOOP
    BEGIN
{locks}
      EXIT;
    EXCEPTION WHEN lock_not_available THEN  -- this lets go of those that were locked
      IF pg_catalog.clock_timestamp() > give_up THEN
        RAISE;
      END IF;
    END;
    PERFORM pg_catalog.pg_sleep(0.02);
  END LOOP;
END
${tag}$"""
_ONE_LOCK = """\
      -- without the right to LOCK it, the statement itself has to wait
      IF pg_catalog.has_table_privilege('{name}', 'UPDATE, DELETE, TRUNCATE') THEN
        LOCK TABLE {table} IN {mode} MODE;
        PERFORM pg_catalog.set_config('lock_timeout', '{moment_ms}ms', true);
      END IF;"""

# A right that is missing, another table of that name: no reason to give up the step. Subscribers of all tables would
# stop at the history's rows, unless they have it.
_NOTED = """
  BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE puballtables) THEN
{does}
    END IF;
  EXCEPTION WHEN OTHERS THEN
    RAISE NOTICE 'not written into the history: %', SQLERRM;
  END;
"""
# Of anybody else's table a trigger, a rule or a default would run with our rights.
_IS_OURS = """(SELECT relkind = 'r' AND ARRAY[relowner, nspowner] <@ ARRAY(
               SELECT oid FROM pg_roles WHERE rolsuper OR rolname = current_user)
             FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
             WHERE nspname = 'budget_engine' AND relname = 'history')"""
# Once in a message, and before anything is locked: who makes it at the same moment is waited for until that step's end.
_MADE = f"""\
      IF {_IS_OURS} IS NULL THEN
        DECLARE
          patience CONSTANT text := current_setting('lock_timeout');
        BEGIN
          PERFORM set_config('lock_timeout', '5s', true) WHERE patience::interval > '5s'::interval;
          CREATE SCHEMA IF NOT EXISTS budget_engine;
          CREATE TABLE budget_engine.history (
            id           bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT history_pkey PRIMARY KEY,
            step         text        NOT NULL,
            part         text        NOT NULL
                                     CONSTRAINT history_part_check CHECK (part IN ('transaction', 'concurrent')),
            schema_name  text        NOT NULL,
            finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
            duration     interval    NOT NULL,
            role_name    text        NOT NULL DEFAULT session_user,
            checksum     text        NOT NULL,
            version      text        NOT NULL
          );
          COMMENT ON SCHEMA budget_engine IS 'Bookkeeping of the Budget Engine & Telemetry recipes';
          COMMENT ON TABLE budget_engine.history IS
            'Who ran which step when: for people to read, nothing decides by it';
          COMMENT ON COLUMN budget_engine.history.checksum IS 'SHA-256 of the migration with LF line ends';
          COMMENT ON COLUMN budget_engine.history.version IS 'Version of the recipes';
          PERFORM set_config('lock_timeout', patience, true);
        EXCEPTION WHEN unique_violation OR duplicate_table THEN
          -- A run in another schema was faster: its history is ours. Our caches hear of it a moment after its commit,
          -- and look for news where a table is opened.
          PERFORM pg_sleep(0.1);
          PERFORM FROM pg_class LIMIT 1;
        END;
      END IF;
      IF NOT {_IS_OURS} THEN
        RAISE EXCEPTION 'it belongs to another role that is no superuser, or is no table';
      END IF;"""
_LINE = f"""\
      IF {_IS_OURS} THEN
        INSERT INTO budget_engine.history (step, part, schema_name, duration, checksum, version)
        VALUES ({{step}}, {{part}}, {{schema}}, coalesce({{duration}}::interval, clock_timestamp() - to_timestamp(
                                                     current_setting('budget_engine.started_at')::float8)),
                {{checksum}}, {{version}});
      END IF;"""

# Not now(): in a message of many transactions that is the time at which the message came, for all of them.
_CLOCK = "extract(epoch FROM pg_catalog.clock_timestamp())"
_STARTED = f"pg_catalog.set_config('budget_engine.started_at', ({_CLOCK})::pg_catalog.text, true)"
_TOOK = f"SELECT 1000.0 * ({_CLOCK} - pg_catalog.current_setting('budget_engine.started_at')::pg_catalog.numeric)"

_AS_BUILT = f"SELECT pg_catalog.set_config(name, boot_val, false) FROM pg_catalog.pg_settings WHERE {MISGUIDING}"
# For the session that builds (transaction_timeout is new in 17).
_UNLIMITED = """SELECT pg_catalog.set_config('lock_timeout', '{lock_timeout_ms}', false),
  (SELECT pg_catalog.max(pg_catalog.set_config(name, '0', false)) FROM pg_catalog.pg_settings
   WHERE name OPERATOR(pg_catalog.=) ANY ('{{statement_timeout,transaction_timeout}}'))"""


class Part(Enum):
    """What a statement of a step's transaction is there for."""

    FRAME = "its transaction"
    CLOCK = "its clock"
    GUARD = "the lock against other runs"
    LOCKS = "its locks"
    MIGRATION = "its migration"
    CONCURRENT = "its concurrent part"
    VERIFICATION = "its verification"
    DEFERRED = "its deferred triggers"  # of a rehearsal, which comes to no commit
    HISTORY = "its line in the history"
    COMMIT = "its commit"
    OUTCOME = "the last verification"  # of all that was committed


@dataclass(frozen=True)
class Sent:
    """One statement of the message; action: the one of the plan that it is, if any."""

    step: Step
    part: Part
    sql: str
    action: Action | None = None


Say = Callable[[Sent, Rows], None]  # what was done, and the rows that came back
Notice = Callable[[Step, str], None]


@dataclass(frozen=True)
class Script:
    """Writes the messages of one plan: chain, the survey that it was made of, and our settings for a transaction."""

    chain: Chain
    plan: Plan
    found: Survey
    settings: str

    def transactions(self, *, rehearsed: bool = False) -> list[Sent]:
        """Write the message that runs the plan's transactions, the verification noted for as long as it lasts.

        Where that is all that is missing, its end says how many checks pass then. rehearsed: as one transaction that is
        rolled back, in which only the first lock is queued for.
        """
        if not (steps := self.plan.transactions):
            return []
        pins = pinned(self.found.server)
        begun = [*BEGIN, f"SELECT {self.settings}, {pins}, {_STARTED}"]
        goes_on = f"SELECT pg_catalog.set_config('lock_timeout', '{_MOMENT_MS}ms', true), {pins}, {_STARTED}"
        message: list[Sent] = []
        for planned in steps:
            first, step = planned is steps[0], planned.step
            if first or not rehearsed:
                message += (Sent(step, Part.FRAME, sql) for sql in begun)
                guard = self._guard(first=first, last=planned is steps[-1], rehearsed=rehearsed)
                message.append(Sent(step, Part.GUARD, guard))
            if locks := self._locks(planned.transaction):
                message.append(Sent(step, Part.LOCKS, locks))
            message += (Sent(step, Part.MIGRATION, sql, action) for action in planned.transaction for sql in action.sql)
            message.append(Sent(step, Part.VERIFICATION, self._verification(planned)))
            if rehearsed:
                end = [(Part.DEFERRED, "SET CONSTRAINTS ALL IMMEDIATE"), (Part.CLOCK, _TOOK), (Part.FRAME, goes_on)]
            else:
                line = history(step, "transaction", self.found.server.schema)
                end = [(Part.HISTORY, line), (Part.CLOCK, _TOOK), (Part.COMMIT, "COMMIT")]
            message += (Sent(step, *part) for part in end)
        last = [*survey.statements(self.chain), "ROLLBACK"] if rehearsed else []
        ending = [(Part.FRAME, sql) for sql in (f"DEALLOCATE {_NAME}", *last)]
        if not rehearsed and self.plan.is_complete:
            verified = [*BEGIN_READ_ONLY, f"SELECT {self.settings}", PIN, f"SELECT {_ONE_PLAN}", _verified(), "COMMIT"]
            ending = [*((Part.OUTCOME, sql) for sql in verified), *ending]
        return [*message, *(Sent(steps[-1].step, *part) for part in ending)]

    @property
    def keeps_turn(self) -> bool:
        """Whether the session has the turn from the first step to the last."""
        return len(self.plan.transactions) > 1 and not self.found.server.pooled

    def _guard(self, *, first: bool, last: bool, rehearsed: bool) -> str:
        """Write what takes the turn: in the first step for the session, where that has it until the last one's end."""
        keeps = self.keeps_turn and not rehearsed
        does = _BUSY_IF.format(condition=f"NOT {self.found.turn.taken(turn.RUN, session=first and keeps)}")
        if last and keeps:
            does += f"\n{_RELEASED}"
        if first:
            does += "" if rehearsed else _NOTED.format(does=_MADE)
            checks = self.found.checks
            there = sum(check.actual is not None for check in checks), sum(check.is_there for check in checks)
            seen = f"{there[0]} {there[1]} {len(checks)}"
            prepare = literal(_VERIFICATION.format(verification=self.chain.verification))
            does += _PREPARE.format(prepare=prepare) + _seen() + _BUSY_IF.format(condition=f"seen <> '{seen}'")
        return _OURS.format(tag=_tag("guard", does), does=does)

    def _locks(self, actions: Sequence[Action]) -> str:
        """Write what takes the locks that the actions want, the strongest first."""
        wanted: dict[str, Lock] = {}
        for action in actions:
            for table, lock in action.locks.items():
                name = self.plan.found.get(table, table)
                wanted[name] = max(lock, wanted.get(name, lock), key=STRENGTH.index)
        locks = [
            _ONE_LOCK.format(table=name, name=name.replace("'", "''"), mode=lock.value, moment_ms=_MOMENT_MS)
            for name, lock in sorted(wanted.items(), key=lambda item: -STRENGTH.index(item[1]))
        ]
        body = "\n".join(locks)
        return _LOCKS.format(tag=_tag("locks", body), locks=body) if locks else ""

    def _verification(self, planned: StepPlan) -> str:
        """Write what raises unless the step's checks pass, those excepted that come later or concurrently."""
        checks = [check for action in planned.transaction for check in action.checks]
        concurrent = {check.key for action in self.plan.concurrent for check in action.checks}
        now = {check.key for check in checks} - concurrent
        own = {check.key for check in self.plan.checks if check.step == planned.label and not check.passed}
        seen = _seen(
            literal(planned.label),
            _keys(check.key for check in checks if check.step != planned.label and check.key in now),
            _keys(own - now),
            literal([check.table for check in checks if check.kind is Kind.TABLE]),
        )
        return _OURS.format(tag=_tag("verification", seen), does=seen + _BROKEN_IF_SEEN)

    def as_sql(self) -> str:
        """Write what would be sent as a file for psql."""
        message = [f"{sent.sql};" for sent in self.transactions()]
        concurrent = [f"{sql};" for action in self.plan.concurrent for sql in action.sql]
        if any(action.effect is Effect.SCAN for action in self.plan.concurrent):
            message.append(f"SELECT {pinned(self.found.server, local=False)};")
        if in_bytes("".join(self.found.server.path)):  # psql is told them, too
            message.insert(0, "SET client_encoding = SQL_ASCII;")
        return respelled("\n".join([*message, *concurrent]), kept="\n") or "-- nothing to do"


def pinned(server: Server, *, local: bool = True) -> str:
    """Write what pins the search_path to the schemas that it leads to, and notes them for the verification."""
    path = ", ".join(['"' + schema.replace('"', '""') + '"' for schema in server.path] + ["pg_temp"])
    values = {"search_path": path, "budget_engine.path": json.dumps(server.path, ensure_ascii=False)}
    return ", ".join(f"pg_catalog.set_config('{name}', {literal(value)}, {local})" for name, value in values.items())


def _tag(name: str, body: str) -> str:
    """Return a tag for dollar quotes that nobody's name in the body ends."""
    while f"${name}$" in body:
        name += "_"
    return name


def _seen(*arguments: str) -> str:
    """Write what notes what the prepared verification says."""
    return f"\n  PERFORM {_ONE_PLAN};\n  EXECUTE {literal(_verified(*arguments))} INTO seen;\n"


def _verified(step: str = "NULL", also: str = "NULL", later: str = "NULL", new_tables: str = "NULL") -> str:
    """Write what executes the prepared verification; each argument as SQL writes it."""
    return f"EXECUTE {_NAME} ({step}, {also}, {later}, {new_tables})"


def _keys(keys: Iterable[tuple[Kind, str, str]]) -> str:
    return literal(json.dumps(sorted((kind.value, table, name) for kind, table, name in keys)))


def history(step: Step, part: str, schema: str | None, duration: str | None = None) -> str:
    """Write the statement that adds a line to the history; duration: of a concurrent part, which makes it, too."""
    values = {"step": step.label, "part": part, "schema": schema or "", "duration": duration}
    values |= {"checksum": step.checksum, "version": __version__}
    line = _LINE.format(**{name: literal(value) for name, value in values.items()})
    does = _NOTED.format(does=f"{_MADE}\n{line}" if duration else line)
    return _OURS.format(tag=_tag("history", str(schema)), does=does)


@understood()
def run_transactions(connection: Connection, script: Script, say: Say, notice: Notice) -> Survey | None:
    """Run the plan's transactions in one message; return what exists then, if all checks pass; else look again.

    Raises BUSY where another run holds the lock or was faster, else what the server's error stands for.
    """
    answers = _send(connection, script, say, notice)
    counted = [rows[0][0] for sent, rows in answers if sent.part is Part.OUTCOME and sent.sql == _verified()]
    every = len(script.plan.checks)
    all_pass = counted == [f"{every} {every} {every}"] and not connection.one_by_one  # else Citus has a say
    return survey.all_passing(script.found, script.plan.checks) if all_pass else None


def _send(
    connection: Connection, script: Script, say: Say, notice: Notice, *, rehearsed: bool = False
) -> list[tuple[Sent, Rows]]:
    """Send a plan's transactions as one message; return what was sent, and the rows that came back."""
    message = script.transactions(rehearsed=rehearsed)
    done = 0
    noticed: Counter[int] = Counter()  # by how much was done

    def on_done(index: int, rows: Rows) -> None:
        nonlocal done
        say(message[index], rows)
        done = index + 1

    def on_notice(sqlstate: str, words: str) -> None:
        if sqlstate.startswith("42"):  # IF NOT EXISTS was asked for: that it exists is no news
            return
        noticed[done] += 1
        if noticed[done] <= _MOST_NOTICES:
            more = noticed[done] == _MOST_NOTICES
            notice(message[min(done, len(message) - 1)].step, "… (more such notices)" if more else words)

    # Any of them may wait for a lock; the server keeps its answers back until they fill 8 kB.
    answer_s = connection.answer_s + len(message) * connection.lock_timeout_ms / 1000
    try:
        with connection.notices(on_notice):
            answers = connection.run([sent.sql for sent in message], on_done, answer_s=answer_s)
            return list(zip(message, answers, strict=True))
    except StatementError as error:
        reached = message[: error.index + 1]
        if script.keeps_turn and not rehearsed and any(sent.part is Part.GUARD for sent in reached):
            with suppress(StatementError):  # a session that is gone has no turn
                connection.run([*BEGIN, _OURS.format(tag="guard", does=_RELEASED), "COMMIT"])
        if error.sqlstate == _BUSY:
            raise errors.BUSY(who=AT_WORK) from error
        raise _failure(reached, error) from error


class Rehearsed(NamedTuple):
    """How a rehearsal went: the checks at its end, and how long each step took, in milliseconds, by its label."""

    checks: tuple[Check, ...]
    duration_ms: dict[str, float]


@understood()
def rehearse(connection: Connection, script: Script, say: Say, notice: Notice) -> Rehearsed:
    """Run the plan's transactions as one, verify each, survey, and roll back. Raises as run_transactions() does."""
    answers = _send(connection, script, say, notice, rehearsed=True)
    took = {sent.step.label: float(rows[0][0] or 0) for sent, rows in answers if sent.part is Part.CLOCK}
    return Rehearsed(survey.checks_of(answers[-2][1], script.chain), took)


class Builder:
    """Runs the concurrent part of one task's plans, round after round.

    patience_s: how long a statement may wait for locks (seconds); None, through a pooler: as long as the role's
    settings allow.
    """

    def __init__(self, connection: Connection, found: Survey, patience_s: float | None, say: Say) -> None:
        self.connection, self.found, self.say = connection, found, say
        self.refused: dict[str, str] = {}  # the statement, and why the rows refuse it
        self._pooled = patience_s is None
        self._frame = f"SELECT {connection.transaction_settings}, {pinned(found.server)}"
        self._patience = "pg_catalog.set_config('statement_timeout', '0', true)"
        self._has_turn = False
        if patience_s is not None:
            self._patience += f", pg_catalog.set_config('lock_timeout', '{patience_s * 1000:.0f}ms', true)"
            # The role's own limits are meant for queries. Through a pooler a SET would stay with another's session.
            connection.run(["SET jit = off", _AS_BUILT, _UNLIMITED.format(lock_timeout_ms=round(patience_s * 1000))])

    def run(self, plan: Plan) -> None:
        """Run what is missing.

        A statement that the rows themselves refuse (a key that is not unique, a reference to nothing) is noted in
        `refused`, and passed over from then on: its check goes on failing. Raises BUSY where another run, or
        another session, is building; else what the server's error stands for.
        """
        self._take_turn()
        if any(check.being_built for action in plan.concurrent for check in action.checks):
            raise errors.BUSY(who="session is building an index")
        for step in plan.steps:
            started = time.monotonic()
            due = [action for action in step.concurrent if self.refused.keys().isdisjoint(action.sql)]
            for action in due:
                for sql in action.sql:
                    self._run_alone(step.step, action, sql)
            if any(self.refused.keys().isdisjoint(action.sql) for action in due):
                took = f"{time.monotonic() - started} s"
                line = history(step.step, "concurrent", self.found.server.schema, took)
                self.connection.run([*BEGIN, self._frame, line, "COMMIT"])

    def _take_turn(self) -> None:
        """Be the one who builds until the session ends.

        A pooler's session is ours for a transaction: there we only look whether anybody builds. Who collides all the
        same loses a deadlock, and tries again.
        """
        if self._has_turn:
            return
        free = self.found.turn.taken(turn.BUILD, session=not self._pooled)
        if self._pooled:
            tables = sorted({check.found for check in self.found.checks if check.found})
            free += f" AND NOT {turn.being_built(f'{literal(tables)}::regclass[]')}"
        *_, rows, _ = self.connection.run([*BEGIN_READ_ONLY, PIN, f"SELECT {free}", "COMMIT"])
        if rows != [("t",)]:
            self.connection.run(["SELECT pg_catalog.pg_advisory_unlock_all()"])  # those of some schemas, perhaps
            raise errors.BUSY(who=f"{'session' if self._pooled else 'run'} is building indexes in this schema")
        self._has_turn = not self._pooled

    def _run_alone(self, step: Step, action: Action, sql: str) -> None:
        noticed: set[str] = set()
        sent = Sent(step, Part.CONCURRENT, sql, action)
        message = [*BEGIN, f"{self._frame}, {self._patience}", sql, "COMMIT"] if action.effect is Effect.SCAN else [sql]
        try:
            with self.connection.notices(lambda sqlstate, _: noticed.add(sqlstate)):
                self.connection.run(message, answer_s=math.inf)
        except StatementError as error:
            if error.sqlstate == _DEADLOCK:  # two builds on one table waited for each other; the other one goes on
                raise errors.BUSY(who="session is building an index on the same table") from error
            if not (error.sqlstate or "").startswith(_INTEGRITY):
                raise _failure([sent], error, pooled=self._pooled) from error
            self.refused[sql] = "\n".join(filter(None, [error.message, error.detail]))
        else:
            if _DUPLICATE_TABLE in noticed:  # IF NOT EXISTS found that another session was faster
                raise errors.BUSY(who="session is building the same index")
            self.say(sent, [])


def _failure(sent: Sequence[Sent], error: StatementError, *, pooled: bool = False) -> errors.RecipeError:
    """Say what the server's error stands for; sent: those that were run, the failed one last."""
    failed = sent[-1]
    kind = errors.for_sqlstate(error.sqlstate)
    ours = (error.sqlstate or "").startswith("TB")  # the message is our own, and says which step
    done = [one.step.label for one in sent[:-1] if one.part is Part.COMMIT]
    where = [
        _place(failed, error.context),
        *error.where.split("\n"),
        *error.holders,
        _aftermath(failed, kind),
        f"done before it: {', '.join(done)}" if done else "",
    ]
    in_a_step = kind.in_a_step.format(step=failed.step.label, part=failed.part.value, words=error.message)
    return kind(
        what=error.message if ours else in_a_step,
        where=where,
        remedy=errors.LIMITS_OF_THE_ROLE if pooled and error.sqlstate in _TIMEOUTS else error.remedy,
    )


def _aftermath(failed: Sent, kind: errors.Case) -> str:
    if failed.part is Part.CONCURRENT:
        return "what it left unfinished, an INVALID index perhaps, the next run finishes"
    if failed.part is Part.OUTCOME:
        return "what was committed stays"
    if kind.exit_code == 4:  # the server has the whole message, and may go on without us
        return "the next run reads from the catalogs how far it came"
    return f"{failed.step.label} changed nothing"


def _place(failed: Sent, context: str) -> str:
    """File and line of the failure, and the statement."""
    if failed.action is None:
        return ""
    statement = failed.action.statement
    if failed.part is Part.CONCURRENT:
        return f"{failed.step.file}: {' '.join(failed.sql.split())}"
    inside = re.search(r"inline_code_block line (\d+)", context)
    line = statement.line + (int(inside[1]) - 1 if inside else 0)
    nested = re.search(r'SQL statement "(.*?)"\s*\n?PL/pgSQL', context, re.S)
    words = nested[1] if nested else "" if inside else failed.sql
    return f"{failed.step.file}, line {line}: {' '.join(words.split())[:200]}".removesuffix(": ")
