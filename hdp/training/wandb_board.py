"""WandB: a board at Weights & Biases. The only file that imports wandb.

Without an API key, or without a network, the run is kept offline in RUN/wandb, to be uploaded later
by `wandb sync`; nothing ever asks for a key on the terminal. RUN/wandb.json holds the run's id, so
that a run that resumes goes on in the same curves. Steps after the last checkpoint were trained
twice then, and W&B, which cannot take rows back, shows both.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CONNECT_S = 30.0  # for a first answer of the server
_FINISH_S = 120.0  # for the last upload; the files stay in RUN/wandb


class WandB:
    """A run of `project`, online if that works, else offline."""

    name = "W&B"

    def __init__(
        self,
        run_dir: Path,
        project: str,
        *,
        mode: str,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        import wandb

        self._wandb, self._say = wandb, say
        self._folder = run_dir / "wandb"
        options = {
            "project": project,
            "dir": str(run_dir),
            "id": _run_id(run_dir / "wandb.json", project, is_new=first_step == 1),
            "name": run_dir.resolve().name,
            "resume": "allow",
        }
        if mode == "online" and not _has_key(wandb):
            say(f"W&B: no API key; {self._offline_note()} (after `wandb login`)")
            mode = "offline"
        try:
            self._run = self._start(mode, options)
        except Exception as error:
            if mode == "offline":
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"W&B cannot be reached ({reason}); {self._offline_note()}")
            mode = "offline"
            wandb.teardown()  # else the id counts as taken by the start that failed
            self._run = self._start(mode, options)
        self._mode = mode
        # Steps as a value: W&B's own counter refuses the steps that a resume trains again.
        self._run.define_metric("*", step_metric="step")
        say(f"W&B: project {project}, run {self._run.id}, {mode}")

    def _start(self, mode: str, options: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(init_timeout=_CONNECT_S)
        return self._wandb.init(mode=mode, settings=settings, **options)

    def _offline_note(self) -> str:
        return (
            f"this run is kept in {self._folder}: upload it with "
            f"`wandb sync {self._folder}/offline-run-*`"
        )

    def config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def texts(self, step: int, name: str, rows: Sequence[tuple[str, str]]) -> None:
        table = self._wandb.Table(columns=["sequence", "text"], data=[list(row) for row in rows])
        self._run.log({name: table, "step": step})

    def close(self, *, failed: bool) -> None:
        """Finish the run. Uploading may wait for a network, so it has a time limit."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
        thread.start()
        thread.join(_FINISH_S)
        if thread.is_alive():
            self._say(
                f"W&B has not uploaded everything in {_FINISH_S:.0f} s; the files are in "
                f"{self._folder}: `wandb sync` uploads the rest"
            )
        if errors:
            raise errors[0]


def _has_key(wandb: Any) -> bool:
    """Whether wandb finds an API key by itself, without asking: the environment, or a login."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # an older wandb, whose login always asks
        return bool(wandb.api.api_key)
    except Exception:  # no netrc, or one that cannot be read
        return False


def _run_id(path: Path, project: str, *, is_new: bool) -> str:
    """The id in `path` if a run goes on in the same project, else a new one, stored there."""
    try:
        stored = json.loads(path.read_text())
        if not is_new and stored["project"] == project and isinstance(stored["id"], str):
            return stored["id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: a new run at W&B is no harm
    made = uuid.uuid4().hex[:12]
    path.write_text(json.dumps({"id": made, "project": project}) + "\n")
    return made
