"""What one slice does for a study: members come, train together, report, end, and make room for others.

Process 0 alone talks to the study; what it decides is told to the other processes, and all do the same.
"""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ppo_jax.parallel.agreement import agree, of_first
from ppo_jax.parallel.mesh import use_mesh
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.facts import record_start
from ppo_jax.runs.output import rundir
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.setup import Result, Setup
from ppo_jax.runs.signals import stop_requests
from ppo_jax.runs.sweep.board import Board, Line, MemberScreen
from ppo_jax.runs.sweep.crowd import Crowd, Request, member_iteration
from ppo_jax.runs.sweep.plan import Plan
from ppo_jax.runs.sweep.ranges import describe
from ppo_jax.runs.sweep.routine import Routine
from ppo_jax.runs.sweep.setting import Lost, Member, Pruned, Setting, mean_of, spread_of
from ppo_jax.runs.sweep.study import Claim, Study
from ppo_jax.runs.sweep.task import Job, Task, job_name, job_settings
from ppo_jax.runs.sweep.values import final_value, read_records, value_at
from ppo_jax.train.loop import Interrupted, Stopped

T = TypeVar("T")


class Slice:
    """A slice at work on a study; `study` is None in every process but the first."""

    def __init__(self, directory: Path, base: Any, plan: Plan, task: Task, study: Study | None, board: Board) -> None:
        self.directory, self.base, self.plan, self.task, self.board = directory, base, plan, task, board
        self.study = study
        self.chunk = plan.config.chunk or max(1, task.updates(base) // 10)
        self.queue: collections.deque[Job] = collections.deque()
        self.settings: dict[int, Setting] = {}
        self.members: list[Member | None] = [None] * plan.places
        self.crowd: Crowd | None = None
        self.group = -1
        self.round, self.pace = 0, math.nan  # iterations of the population, and the seconds of one
        self.asked_at, self.eager = -math.inf, True
        self.ended = 0  # runs that ended here
        self.asked: Callable[[], str | None] = lambda: None

    def run(self) -> None:
        """Works until every trial of the study has ended, here or elsewhere. Raises `Interrupted` where asked to."""
        with stop_requests(self.board.message) as self.asked, self._giving_back():
            while True:
                self._fill()
                if reason := self._decide(self.asked) or store.preempted(self.round):
                    raise Interrupted(f"the sweep was stopped by {reason}")
                if any(self.members):
                    self._advance()
                elif self._decide(lambda: self._study().all_ended()):
                    return
                else:
                    self._wait()

    # -- members come --------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Puts a run into every free place, as long as there are some of the group at work."""
        for place, member in enumerate(self.members):
            if member is not None:
                continue
            if not self.queue and not self._ask():
                return
            if self.queue[0].group != self.group:
                if any(self.members):
                    return  # the others of the old group come to their end first
                self.group, self.crowd = self.queue[0].group, None
            self._start(place, self.queue.popleft())

    def _ask(self) -> bool:
        """Asks the study for a setting, and queues its runs; not more often than a heartbeat where there was none."""
        claim = self._decide(self._next_claim)
        if claim is None:
            return False
        values = dict(claim["values"])
        found = Claim(claim["trial"], claim["run"], claim["group"], values)
        self.settings[found.trial] = Setting(found, set(self.plan.space.seeds))
        self.queue.extend(Job(*found, seed) for seed in self.plan.space.seeds)
        return True

    def _next_claim(self) -> dict[str, Any] | None:
        now = time.monotonic()
        if not self.eager and now - self.asked_at < self.plan.config.heartbeat:
            return None
        claim = self._study().next()
        self.asked_at, self.eager = now, claim is not None
        return None if claim is None else claim._asdict()

    def _start(self, place: int, job: Job) -> None:
        """Begins a run, or goes on with it from its checkpoint; it evaluates, and comes to its first iteration."""
        settings = job_settings(job, self.plan, self.base, self.directory)
        assert self.task.setup is not None
        setup, name = self.task.setup(settings), job_name(job, self.plan)

        def open_run() -> Path:
            found = rundir.open_run(settings.run_dir, "auto")
            record_start(found)
            return found

        directory = rundir.run_directory(settings.run_dir, open_run)
        if self.crowd is None:
            self.crowd = Crowd(setup, self.plan.places)
        self.crowd.seat(place, setup)
        screen = MemberScreen(self.board, f"trial {name}")
        mesh = settings.mesh

        def work(park: Callable[[Any], Any]) -> tuple[Setup, Result]:
            with use_mesh(mesh):  # of a thread
                result = run_ppo(directory, setup, screen, "auto", member_iteration(park))
                self.task.finish(directory, settings, setup, result)
            return setup, result

        member = Member(job, Routine(work, name), directory, setup.loop.updates)
        self.members[place] = member
        member.routine.start()
        self._look(place)

    # -- members train -------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One update of every member, and what comes of it."""
        assert self.crowd is not None
        began = time.perf_counter()
        requests: list[Request | None] = [None if m is None else m.routine.request for m in self.members]
        answers = self.crowd.advance(requests)
        self.round += 1
        moved = [place for place, answer in enumerate(answers) if answer is not None]
        for place in moved:  # all of them first: a run that ends may end others, which must know of this update
            member, answer = self._member(place), answers[place]
            member.done += 1
            member.shown = mean_of(answer[1], "reward"), mean_of(answer[1], "kl")  # type: ignore[index]
            member.routine.resume(answer)
        for place in moved:
            if self.members[place] is not None:
                self._look(place)
        seconds = time.perf_counter() - began
        if self.round > 1:  # the first one compiles
            self.pace = seconds if math.isnan(self.pace) else 0.8 * self.pace + 0.2 * seconds
        self._report()
        self._show()

    def _look(self, place: int) -> None:
        """After a member was resumed: where it stands, or what it ended with."""
        member = self._member(place)
        if not member.routine.ended:
            member.done = int(member.routine.request.state.step)
            if member.done == 1:  # a name that is not logged is found after the first update, not after the last
                agree(lambda: self._check_metrics(member.directory), ValueError)
            return
        error = member.routine.error
        setting = self.settings[member.job.trial]
        self.members[place] = None
        if error is None:
            member.done = member.updates
            setting.finals[member.job.seed] = self._decide(lambda: self._finals(member.directory))
        elif isinstance(error, Lost):
            setting.lost = True
        elif isinstance(error, Stopped) and (not isinstance(error, Interrupted) or isinstance(error, Pruned)):
            setting.fault = setting.fault or str(error)
        else:
            raise error
        setting.updates[member.job.seed] = member.done
        setting.seeds.discard(member.job.seed)
        self.ended, self.eager = self.ended + 1, True
        if setting.fault or setting.lost:
            self._end_setting(setting)
        if not setting.seeds:
            self._conclude(setting)

    def _end_setting(self, setting: Setting) -> None:
        """Ends the runs of a setting with its other seeds."""
        trial = setting.claim.trial
        waiting = [job for job in self.queue if job.trial == trial]
        self.queue = collections.deque(job for job in self.queue if job.trial != trial)
        setting.seeds -= {job.seed for job in waiting}
        for place, member in enumerate(self.members):
            if member is not None and member.job.trial == trial and not member.routine.ended:
                ending: Exception = Lost() if setting.lost else Pruned(setting.fault)
                member.routine.resume(error=ending)
                self._look(place)

    def _conclude(self, setting: Setting) -> None:
        """Tells the study what became of a setting, once."""
        claim = setting.claim
        if self.settings.pop(claim.trial, None) is None:
            return
        name = f"trial {claim.run:04d} ({describe(claim.values)})"
        facts = {"updates": max(setting.updates.values(), default=0)}
        if setting.lost:
            self.board.message(f"{name}: another slice has taken it up")
        elif setting.fault:
            self._on_first(lambda study: study.stop(claim.trial, setting.fault, facts))
            self.board.message(f"{name}: {setting.fault}")
        else:
            columns = list(zip(*(setting.finals[seed] for seed in sorted(setting.finals)), strict=True))
            means = [sum(column) / len(column) for column in columns]
            spread = [spread_of(column) for column in columns]
            facts |= {"spread": spread, "seeds": sorted(setting.finals), "by_seed": [list(c) for c in columns]}  # type: ignore[dict-item]
            shown = ", ".join(
                f"{metric.removeprefix('-')} {mean:.4g}" + (f" ± {s:.2g}" if len(columns[0]) > 1 else "")
                for metric, mean, s in zip(self.plan.config.objective, means, spread, strict=True)
            )
            if all(map(math.isfinite, means)):
                self._on_first(lambda study: study.finish(claim.trial, means, facts))
            else:
                self._on_first(lambda study: study.stop(claim.trial, "an objective is not a number", facts))
            self.board.message(f"{name}: {shown}")

    # -- the study hears of it -----------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Tells the study what members have reached at the end of a chunk; those that it gives up end there."""
        for trial, verdict in self._decide(self._verdicts):
            setting = self.settings.get(trial)
            if setting is None:
                continue
            setting.lost = verdict == "lost"
            done = max((m.done for m in self.members if m and m.job.trial == trial), default=0)
            setting.fault = "" if setting.lost else f"pruned after update {done}"
            self._end_setting(setting)
            if not setting.seeds:
                self._conclude(setting)

    def _verdicts(self) -> list[tuple[int, str]]:
        reached = []
        metric = self.plan.config.prune_metric or self.plan.config.objective[0]
        for member in self.members:
            if member is None or not member.done or (member.done % self.chunk and member.done < member.updates):
                continue
            setting = self.settings[member.job.trial]
            reports = setting.reports.setdefault(member.done, {})
            if member.job.seed in reports:
                continue
            reports[member.job.seed] = value_at(read_records(member.directory), metric, member.done, self.chunk)
            if len(reports) == len(self.plan.space.seeds):
                mean = sum(reports.values()) / len(reports)
                if metric.startswith("-") != self.plan.config.objective[0].startswith("-"):
                    mean = -mean  # the pruner goes by the direction of the objective
                reached.append((mean, member.job.trial, member.done))
        # The best first: halving compares a trial with those that have come to its rung before it.
        reached.sort(reverse=not self.plan.config.objective[0].startswith("-"))
        found = [(trial, self._study().report(trial, done, value)) for value, trial, done in reached]
        return [(trial, verdict) for trial, verdict in found if verdict != "go on"]

    def _check_metrics(self, directory: Path) -> None:
        if is_first():
            records = read_records(directory)
            for metric in {*self.plan.config.objective, self.plan.config.prune_metric} - {""}:
                final_value(records, metric, 1)

    def _finals(self, directory: Path) -> list[float]:
        records = read_records(directory)
        return [final_value(records, metric, self.chunk) for metric in self.plan.config.objective]

    @contextlib.contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Whatever ends the block, no trial stays behind: runs save, and their trials can be taken up at once."""
        try:
            yield
        except BaseException as error:
            asked = isinstance(error, Interrupted)
            said: list[str] = []
            for member in self.members:
                if member is not None and not member.routine.ended:
                    member.routine.resume(error=Interrupted(str(error)) if asked else Lost())
                    said.append(str(member.routine.error))
            for trial in list(self.settings):
                if self.study is not None:
                    self.study.release(trial)
            if asked:
                raise Interrupted(f"{error}; {len(said)} runs are saved. The same command goes on") from None
            raise
        finally:
            self._on_first(lambda study: study.close())

    def _wait(self) -> None:
        """Other slices have the rest: looks from time to time whether one of them dies."""
        self.board.show([], "waiting for other slices", math.nan)
        time.sleep(min(self.plan.config.heartbeat, 2.0))

    def _show(self) -> None:
        members = [member for member in self.members if member is not None]
        lines = [
            Line(job_name(m.job, self.plan), describe(m.job.values), m.done, m.updates, *m.shown, m.state)
            for m in members
        ]
        rest = sum(m.updates - m.done for m in members)
        untouched = max(0, self.plan.runs - self.ended - len(members)) * self.task.updates(self.base)
        left = (rest + untouched) / self.plan.places * self.pace
        self.board.show(lines, f"{self.ended} of {self.plan.runs} runs ended here", left)

    # -- process 0 and the others --------------------------------------------------------------------------------------

    def _decide(self, action: Callable[[], T]) -> T:
        """What process 0 gets from `action`, in all processes."""
        return of_first(action() if is_first() else None)  # type: ignore[return-value]

    def _on_first(self, action: Callable[[Study], object]) -> None:
        if self.study is not None:
            action(self.study)

    def _study(self) -> Study:
        assert self.study is not None
        return self.study

    def _member(self, place: int) -> Member:
        member = self.members[place]
        assert member is not None
        return member
