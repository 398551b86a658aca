"""The runner: carries out a plan, each step in a transaction of its own, all of them in one message.

A step is BEGIN, our settings, the advisory lock, its DO block, its verification, its line in the diary, COMMIT. After
an error the server skips the rest: the steps before it stand, it and those after it left no trace. Then the online
parts: each statement that a migration's online SELECT returns, alone, outside any transaction.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from psycopg import sql
from psycopg.errors import Diagnostic

from scripts import errors, turn
from scripts.chain import Step, tables, version
from scripts.database import BEGIN, BEGIN_READ_ONLY, MISGUIDING, Database
from scripts.errors import StatementError
from scripts.plan import Plan
from scripts.survey import Item, items_of, items_query

Say = Callable[[str, str], None]  # (label of the step, what happened to it)

_BUSY = "TB004"  # raised by the guard
_AT_WORK = "run is at work in this schema"
_DEADLOCK = "40P01"
_INTEGRITY = "23"  # the class of integrity constraint violations
_DUPLICATE_TABLE = "42P07"
_TIMEOUTS = {"57014", "55P03", "25P04"}  # what a role's own limits end a statement with
_GUARD = """DO $guard$
BEGIN
  IF NOT {taken} THEN
    RAISE EXCEPTION USING ERRCODE = '{busy}', MESSAGE = 'another {at_work}';
  END IF;
END
$guard$"""

_VERIFICATION = """DO $verification$
DECLARE
  broken text;
  obstructed boolean;
BEGIN
  SELECT string_agg(format('%s is %s, promised: %s', item, coalesce(actual, 'missing'), expected), E'\\n'),
         bool_or(mended_by IS DISTINCT FROM {stem})
    INTO broken, obstructed
    FROM (
{promises}
    ) AS promise
   WHERE actual IS DISTINCT FROM expected
     AND (mended_by = {stem} OR own AND coalesce(split_part(mended_by, ' ', 1) <> ALL ({stems}), true));
  IF broken IS NOT NULL THEN
    RAISE EXCEPTION USING ERRCODE = CASE WHEN obstructed THEN 'TB002' ELSE 'TB003' END,
      MESSAGE = {message}, DETAIL = broken;
  END IF;
END
$verification$"""

# Where another run got there first, the step's transaction wrote nothing, and the diary says nothing.
DIARY = """DO $diary$
BEGIN
  IF {part} = 'atomic' AND pg_current_xact_id_if_assigned() IS NULL
     OR EXISTS (SELECT FROM pg_publication WHERE puballtables) THEN  -- its rows would stop subscribers without it
    RETURN;
  END IF;
  -- Who makes the diary now is about to commit. Where locks were asked for, the migration has left a shorter moment.
  PERFORM set_config('lock_timeout', '1s', true) WHERE current_setting('lock_timeout')::interval > '1s';
  IF NOT EXISTS (SELECT FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
                 WHERE nspname = 'budget_engine' AND relname = 'diary') THEN
    BEGIN
      CREATE SCHEMA IF NOT EXISTS budget_engine;
      CREATE TABLE budget_engine.diary (
        id           bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT diary_pkey PRIMARY KEY,
        step         text        NOT NULL,
        part         text        NOT NULL CONSTRAINT diary_part_check CHECK (part IN ('atomic', 'online')),
        schema_name  text        NOT NULL DEFAULT current_schema(),
        finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
        duration     interval    NOT NULL,
        role_name    text        NOT NULL DEFAULT session_user,
        checksum     text        NOT NULL,
        version      text        NOT NULL
      );
      COMMENT ON SCHEMA budget_engine IS 'Bookkeeping of the Budget Engine & Telemetry recipes';
      COMMENT ON TABLE budget_engine.diary IS 'Who ran which step when: for people to read, nothing decides by it';
      COMMENT ON COLUMN budget_engine.diary.checksum IS 'SHA-256 of the migration with LF line ends';
      COMMENT ON COLUMN budget_engine.diary.version IS 'Version of the recipes';
    EXCEPTION WHEN unique_violation OR duplicate_table THEN  -- a run in another schema was faster: its diary is ours
    END;
  END IF;
  INSERT INTO budget_engine.diary (step, part, duration, checksum, version)
  VALUES ({stem}, {part}, coalesce({duration}::interval,
          clock_timestamp() - to_timestamp(current_setting('budget_engine.started_at')::float8)),
          {checksum}, {version});
EXCEPTION WHEN OTHERS THEN  -- a right that is missing, another table of that name: no reason to give up the step
  RAISE NOTICE 'not written into the diary: %', SQLERRM;
END
$diary$"""

# Not now(): in a message of many transactions that is the time at which the message came, for all of them.
_STARTED = "set_config('budget_engine.started_at', extract(epoch FROM clock_timestamp())::text, true)"

# For the session that builds, and for the transaction that holds the turn meanwhile (transaction_timeout is new in 17).
_UNLIMITED = """SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN '{lock_timeout_ms}' ELSE '0' END, false)
FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout', 'lock_timeout')"""
_AS_BUILT = f"SELECT set_config(name, boot_val, false) FROM pg_settings WHERE {MISGUIDING}"
STAY = """SELECT set_config(name, '0', true)
FROM pg_settings WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')"""


class Part(Enum):
    """What a statement of a step's transaction is there for."""

    FRAME = "its transaction"
    CLOCK = "its clock"
    GUARD = "the lock against other runs"
    MIGRATION = "its migration"
    ONLINE = "its online part"
    VERIFICATION = "its verification"
    DEFERRED = "its deferred triggers"  # of a rehearsal, which comes to no commit
    DIARY = "its line in the diary"
    COMMIT = "its commit"


@dataclass(frozen=True)
class Statement:
    """One statement of the message."""

    step: Step
    part: Part
    sql: str


def script(steps: Sequence[Step], chain: Sequence[Step], transaction_settings: str) -> list[Statement]:
    """Write the message that carries out the atomic parts of the steps; chain: every step, for their verifications."""
    return [
        Statement(step, part, text)
        for step in steps
        for part, text in (
            *((Part.FRAME, text) for text in BEGIN),
            (Part.FRAME, f"SELECT {transaction_settings}, {_STARTED}"),
            (Part.GUARD, _guard(chain)),
            (Part.MIGRATION, step.atomic),
            (Part.VERIFICATION, _verification(step, chain)),
            (Part.DIARY, _diary(step, "atomic", None)),
            (Part.COMMIT, "COMMIT"),
        )
    ]


def as_sql(todo: Plan, chain: Sequence[Step], transaction_settings: str, search_path: str | None) -> str:
    """Write what would be sent for a plan as a file for psql; search_path: for what runs outside of transactions."""
    atomic = [step for step in chain if step.stem in todo.atomic]
    message = [f"{statement.sql};" for statement in script(atomic, chain, transaction_settings)]
    online = [f"{query}\n\\gexec" for step in chain if step.stem in todo.online for query in step.online]
    if online and search_path is not None:
        message.append(f"SELECT set_config('search_path', {_literal(search_path)}, false);")
    return "\n".join([*message, *online]) or "-- nothing to do"


class Rehearsed(NamedTuple):
    """How a rehearsal went: what stood at its end, and how long each step took, in milliseconds, by its label."""

    items: tuple[Item, ...]
    duration_ms: dict[str, float]


def rehearse(database: Database, steps: Sequence[Step], chain: Sequence[Step], say: Say) -> Rehearsed:
    """Carry out the atomic parts of the steps in one transaction, verify each, survey what stands, and roll back.

    Raises as run_atomic() does. Only the first lock is queued for: who waits for a later one holds up others with what
    he has got already.
    """
    message = _rehearsal(steps, chain, database)
    current = message[0]

    def on_done(index: int) -> None:
        nonlocal current
        current = message[min(index + 1, len(message) - 1)]

    try:
        with database.notices(lambda notice: say(current.step.label, notice.message_primary or "")):
            answers = database.run([statement.sql for statement in message], on_done)
    except StatementError as error:
        if error.sqlstate == _BUSY:
            raise errors.BusyError(who=_AT_WORK) from error
        raise _failure(message[: error.index + 1], error) from error
    times = [float(rows[0][-1] or 0) for rows, told in zip(answers, message, strict=True) if told.part is Part.CLOCK]
    took = {step.label: 1000 * (end - start) for step, start, end in zip(steps, times, times[1:], strict=False)}
    return Rehearsed(items_of(answers[-2], chain), took)


_CLOCK = "extract(epoch FROM clock_timestamp())"
_MOMENT_MS = 100  # as in the migrations: shorter than deadlock_timeout
_BUDGET = """SELECT set_config('lock_timeout', CASE WHEN pg_current_xact_id_if_assigned() IS NULL THEN '{first_ms}'
                                       ELSE '{later_ms}' END || 'ms', true), {clock}"""


def _rehearsal(steps: Sequence[Step], chain: Sequence[Step], database: Database) -> list[Statement]:
    budget = _BUDGET.format(
        first_ms=database.lock_timeout_ms, later_ms=min(_MOMENT_MS, database.lock_timeout_ms), clock=_CLOCK
    )
    first, last = steps[0], steps[-1]
    return [
        *(Statement(first, Part.FRAME, text) for text in BEGIN),
        Statement(first, Part.FRAME, f"SELECT {database.transaction_settings}"),
        Statement(first, Part.GUARD, _guard(chain)),
        *(
            Statement(step, part, text)
            for step in steps
            for part, text in (
                (Part.CLOCK, budget),
                (Part.MIGRATION, step.atomic),
                (Part.VERIFICATION, _verification(step, chain)),
                (Part.DEFERRED, "SET CONSTRAINTS ALL IMMEDIATE"),
            )
        ),
        Statement(last, Part.CLOCK, f"SELECT {_CLOCK}"),
        Statement(last, Part.FRAME, items_query(chain)),
        Statement(last, Part.FRAME, "ROLLBACK"),
    ]


def run_atomic(database: Database, steps: Sequence[Step], chain: Sequence[Step], say: Say) -> None:
    """Carry out the atomic parts of the steps in one message.

    Raises BusyError where another run holds the lock, else the RecipeError that the server's error stands for.
    """
    statements = script(steps, chain, database.transaction_settings)
    current = 0

    def on_done(index: int) -> None:
        nonlocal current
        if statements[index].part is Part.COMMIT:
            say(statements[index].step.label, "done")
        current = min(index + 1, len(statements) - 1)

    try:
        with database.notices(lambda notice: say(statements[current].step.label, notice.message_primary or "")):
            database.run([statement.sql for statement in statements], on_done)
    except StatementError as error:
        if error.sqlstate == _BUSY:
            raise errors.BusyError(who=_AT_WORK) from error
        raise _failure(statements[: error.index + 1], error) from error


class Online:
    """The online parts of one task's steps, round after round; a context, which ends this run's turn.

    patience_s: how long a statement may wait for locks (seconds); None, through a pooler: as long as the role's
    settings allow. open_second: opens the connection whose transaction holds the turn meanwhile.
    """

    def __init__(
        self,
        database: Database,
        chain: Sequence[Step],
        patience_s: float | None,
        say: Say,
        open_second: Callable[[], Database],
    ) -> None:
        self.database, self.chain, self.say = database, chain, say
        self.pooled = patience_s is None
        self.refused: set[str] = set()
        self._open_second = open_second
        self._turn: Database | None = None
        if patience_s is not None:
            # The role's own limits are meant for queries. Through a pooler a SET would stay with another's session.
            database.run(["SET jit = off", _UNLIMITED.format(lock_timeout_ms=round(patience_s * 1000)), _AS_BUILT])

    def __enter__(self) -> Online:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._turn is not None:
            self._turn.close()

    def run(self, steps: Sequence[Step]) -> None:
        """Carry out what is missing.

        A statement that the rows themselves refuse (a key that is not unique, a reference to nothing) is said, and
        passed over from then on: its item stays missing. Raises BusyError where another run, or another session, is
        building; CrowdedError where there is no room for the second connection; else the RecipeError that the server's
        error stands for.
        """
        self._take_turn()
        found_work = [self._run_step(step) for step in steps]
        if not any(found_work):
            raise errors.BusyError(who="session is building an index")

    def _run_step(self, step: Step) -> bool:
        """Run the step's online statements; tell whether it had any."""
        started = time.monotonic()
        statements = self._statements(step)
        due = [statement for statement in statements if statement not in self.refused]
        for statement in due:
            self._run_alone(step, statement)
        if not self.refused.issuperset(statements):
            diary = _diary(step, "online", f"{time.monotonic() - started} s")
            self.database.run([*BEGIN, f"SELECT {self.database.transaction_settings}", diary, "COMMIT"])
        return bool(statements)

    def _take_turn(self) -> None:
        """Be the one who builds; a second connection, which keeps the turn, is opened only where it seems free.

        The first one's transaction stays open until the second has had an answer: a pooler with a single server
        connection would lend it to either, and then keep the work waiting for the turn to end.
        """
        if self._turn is not None:
            return
        with self._tried() as turn_taken, needing_room():
            second = self._open_second() if turn_taken else None
            if second is not None:
                second.ask([])
        if second is not None:
            with needing_room():  # its transaction stays open, without a snapshot that a build would wait for
                *_, rows = second.run([*BEGIN_READ_ONLY, STAY, f"SELECT {turn_taken}"])
            if rows == [("t",)]:
                self._turn = second
                return
            second.close()
        raise errors.BusyError(who="run is building indexes in this schema")

    @contextmanager
    def _tried(self) -> Iterator[str | None]:
        """Have the turn to build for a moment, and let it go; tell how to take it. None: it is not free."""
        ours = tables(self.chain)
        settings = f"SELECT {self.database.transaction_settings}"
        looks = [f"SELECT {turn.taken(turn.BUILD, ours)}", turn.numbers(ours)]
        *_, free, numbers = self.database.run([*BEGIN_READ_ONLY, settings, STAY, *looks])
        try:
            yield turn.taken_by_number(turn.BUILD, numbers) if free == [("t",)] else None
        finally:
            self.database.run(["COMMIT"])

    def _statements(self, step: Step) -> list[str]:
        """Ask the step's SELECTs what is missing, twice, and believe what they say both times.

        A look may be torn: an index that was INVALID when its snapshot was taken may be finished, and its builder gone,
        when it comes to read the locks. The second look's snapshot is newer than that.
        """
        answers = self.database.ask([*step.online, *step.online])
        statements = [statement for rows in answers for (statement,) in rows if statement is not None]
        return [statement for statement, times in Counter(statements).items() if times == 2]

    def _run_alone(self, step: Step, statement: str) -> None:
        started, skipped = time.monotonic(), []

        def on_notice(notice: Diagnostic) -> None:
            if notice.sqlstate == _DUPLICATE_TABLE:  # IF NOT EXISTS found that another session was faster
                skipped.append(notice)

        try:
            with self.database.notices(on_notice):
                self.database.run([statement])
        except StatementError as error:
            if error.sqlstate == _DEADLOCK:  # two builds on one table waited for each other; the other one goes on
                raise errors.BusyError(who="session is building an index on the same table") from error
            if not (error.sqlstate or "").startswith(_INTEGRITY):
                raise _failure([Statement(step, Part.ONLINE, statement)], error, pooled=self.pooled) from error
            self.refused.add(statement)
            self.say(step.label, f"{statement}: refused by the rows: {error.message}\n{error.detail}")
        else:
            if skipped:
                raise errors.BusyError(who="session is building the same index")
            self.say(step.label, f"{statement}: done, {(time.monotonic() - started) * 1000:.0f} ms")


@contextmanager
def needing_room() -> Iterator[None]:
    """Say of a failure that it is the second connection's."""
    try:
        yield
    except (errors.UnreachableError, StatementError) as error:
        where = error.message if isinstance(error, StatementError) else error.where
        raise errors.CrowdedError(where=where) from error


def _guard(chain: Sequence[Step]) -> str:
    return _GUARD.format(taken=turn.taken(turn.RUN, tables(chain)), busy=_BUSY, at_work=_AT_WORK)


def _verification(step: Step, chain: Sequence[Step]) -> str:
    # An item that this step mends may belong to another one: turn_id to the fix, parent_id to slots_templates.
    promises = "\nUNION ALL\n".join(
        f"SELECT {str(other is step).lower()} AS own, v.* FROM (\n{other.verification}\n) AS v"
        for other in chain
        if other is step or step.stem in other.verification
    )
    stems = ", ".join(_literal(other.stem) for other in chain)
    message = _literal(errors.BrokenPromiseError.says)
    return _VERIFICATION.format(promises=promises, stem=_literal(step.stem), stems=f"ARRAY[{stems}]", message=message)


def _diary(step: Step, part: str, duration: str | None) -> str:
    values = {"stem": step.stem, "part": part, "duration": duration, "checksum": step.checksum, "version": version()}
    return DIARY.format(**{name: _literal(value) for name, value in values.items()})


def _literal(value: str | None) -> str:
    return sql.Literal(value).as_string()


def _failure(statements: Sequence[Statement], error: StatementError, *, pooled: bool = False) -> errors.RecipeError:
    """Say what the server's error stands for; statements: those that were run, the failed one last."""
    failed = statements[-1]
    kind = errors.for_sqlstate(error.sqlstate)
    expected = (error.sqlstate or "").startswith("TB")  # the message is our own, and says which step
    done = [statement.step.label for statement in statements[:-1] if statement.part is Part.COMMIT]
    where = [
        _place(failed, error.context),
        error.where,
        *error.holders,
        _aftermath(failed, kind),
        f"done before it: {', '.join(done)}" if done else "",
    ]
    in_a_step = kind.in_a_step.format(step=failed.step.label, part=failed.part.value, words=error.message)
    return kind(
        what=error.message if expected else in_a_step,
        where="\n".join(line for line in where if line),
        remedy=errors.LIMITS_OF_THE_ROLE if pooled and error.sqlstate in _TIMEOUTS else error.remedy,
    )


def _aftermath(failed: Statement, kind: type[errors.RecipeError]) -> str:
    if failed.part is Part.ONLINE:
        return "what it left unfinished, an INVALID index perhaps, the next run finishes"
    if issubclass(kind, errors.UnreachableError):  # the server has the whole message, and may go on without us
        return "the next run reads from the catalogs how far it came"
    return f"{failed.step.label} left no trace"


def _place(failed: Statement, context: str) -> str:
    """File and line of the failure, and the statement, from the context that PL/pgSQL reports."""
    if failed.part is Part.ONLINE:
        return f"{failed.step.file}: {failed.sql}"
    if failed.part is not Part.MIGRATION:
        return ""
    line = re.search(r"inline_code_block line (\d+)", context)
    statement = re.search(r'SQL statement "(.*?)"\s*\n?PL/pgSQL', context, re.S)
    place = failed.step.file
    if line:
        place += f", line {failed.step.atomic_line + int(line[1]) - 1}"
    return place + (f": {' '.join(statement[1].split())}" if statement else "")
