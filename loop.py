"""A training loop that can be killed: its state goes to the disk now and then and comes back bit for bit, Ctrl-C stops it between two steps, and an
update that isn't finite is skipped.

The order of the data is not saved. A loop draws from a generator of its own, and on the way back draws again what it has drawn before.
"""

import functools
import json
import math
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import parallel
from data import UserError
from files import parse_json, read_header, read_tensors, write

SAVED = {
    "stage": str,
    "belongs": dict,
    "done": int,
    "good": int,
    "skipped": int,
    "state": dict,
    "seconds": float,
}
BROKEN = "{}: not the state of this run: delete it, or say --resume false to begin the stage anew"


class Loop:
    """What a loop over optimizer steps has to do with the world.

        with loop:
            for step in range(c.steps):
                part = next(...)                                 # what comes from the random generator, always
                if loop.skip(step, model, optimizer): continue   # done before the process was killed
                loss = ...                                       # of `part`
                loop.update(step, loss, model.parameters())      # an optimizer step; log, save, stop

    path: the file of the state; None: no state. resume: take up the one that is there, of the same stage. belongs: what must be the same then, as {name: value}.
    every: seconds between two states. patience: skipped updates in a row that are too many.
    """

    def __init__(
        self,
        stage: str = "",
        path: Path | None = None,
        resume: bool = True,
        belongs: dict | None = None,
        every: float = 60.0,
        patience: int = 5,
        log=lambda **record: None,
    ):
        self.stage, self.path, self.belongs, self.every, self.patience, self.log = (
            stage,
            path,
            belongs or {},
            every,
            patience,
            log,
        )
        self.done = self.good = self.skipped = 0  # steps; those not skipped; skipped in a row
        self.state, self.before = (
            {},
            0.0,
        )  # what the loop itself wants kept; seconds in earlier processes
        if resume and path and path.exists() and (saved := read_state(path))["stage"] == stage:
            refuse_differences(saved["belongs"], self.belongs, path)
            self.done, self.good, self.skipped, self.state, self.before = (
                saved[name] for name in ("done", "good", "skipped", "state", "seconds")
            )
        self.resumed, self.restored = self.done, self.done == 0
        self.start, self.saved, self.stop, self.bad, self.model = (
            time.time(),
            time.time(),
            False,
            [],
            None,
        )

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.handler)
        if error != (None, None, None):
            return
        if not self.restored:  # a state of more steps than there are
            raise UserError(BROKEN.format(self.path))
        if self.done and not self.good:
            raise UserError(
                f"{self.stage}: every update was skipped, as its numbers were not finite: try a lower learning rate, or --dtype fp32"
            )

    def interrupt(self, *_):
        if self.stop or self.model is None:  # asked twice, or before the first step
            raise KeyboardInterrupt
        self.stop = True
        print(f"\n{self.stage}: stopping after this step; once more to stop at once", flush=True)

    @property
    def seconds(self) -> float:
        """Of work so far, without what was done twice because of a kill."""
        return self.before + time.time() - self.start

    def skip(self, step: int, model: torch.nn.Module, optimizer) -> bool:
        """Whether step 0, 1, ... was done in an earlier process. At the last such step model and optimizer become what they were after it."""
        self.model, self.optimizer = model, optimizer
        if step == self.resumed - 1:
            try:
                self.restore(read_tensors(self.path))
            except (UserError, LookupError, ValueError, TypeError, RuntimeError):
                raise UserError(BROKEN.format(self.path)) from None
        return step < self.resumed

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        learnt, moments = [p for group in self.optimizer.param_groups for p in group["params"]], {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                p.copy_(tensors.pop(f"weight.{name}").view(p.shape))
        for name, x in tensors.items():
            _, i, key = name.split(".")
            moments.setdefault(int(i), {})[key] = x.view(
                () if key == "step" else learnt[int(i)].shape
            )
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.start, self.restored = time.time(), True

    def finite(self, **values) -> bool:
        """Whether these numbers or tensors are; if not, `end` logs their names, and the caller skips what it would do with them."""
        bad = [name for name, x in values.items() if not torch.as_tensor(x).isfinite().all()]
        self.bad += bad
        return not bad

    def update(self, step: int, loss: torch.Tensor, parameters, /, **record) -> None:
        """One optimizer step down the gradient of `loss`, whose norm is cut to 1, unless loss or gradient is not finite; then `end`."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if self.finite(loss=loss, grad_norm=norm):
            self.optimizer.step()
        self.optimizer.zero_grad()  # to None: AdamW leaves alone what this loss did not reach
        self.end(step, **{"loss": loss.item(), "grad_norm": norm.item(), **record})

    def end(self, step: int, **record) -> None:
        """The end of a step: logs it, saves the state if it is time, raises KeyboardInterrupt if asked to stop, UserError if too many updates were skipped."""
        bad, self.bad = self.bad, []
        self.done, self.good, self.skipped = (
            step + 1,
            self.good + (not bad),
            self.skipped + 1 if bad else 0,
        )
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }  # JSON has no NaN
        self.log(stage=self.stage, step=self.done, **record, **({"skipped": bad} if bad else {}))
        if bad and not parallel.rank():
            print(
                f"\n{self.stage}: step {self.done} skipped: {', '.join(dict.fromkeys(bad))} not finite",
                flush=True,
            )
        if self.skipped >= self.patience:
            raise UserError(
                f"{self.stage}: {', '.join(dict.fromkeys(bad))} not finite at step {self.done}, {self.skipped} updates skipped in a row: begin {self.stage} anew "
                f"(--resume false) with a lower learning rate, or with --dtype fp32"
            )
        stop = bool(parallel.most(int(self.stop)))  # all processes after the same step
        if self.path and (stop or time.time() - self.saved >= self.every):
            self.save()
        if stop:
            raise KeyboardInterrupt

    def save(self) -> None:
        if not parallel.rank():
            tensors = {
                f"weight.{name}": p.detach()
                for name, p in self.model.named_parameters()
                if p.requires_grad
            }
            tensors |= {
                f"moment.{i}.{key}": x
                for i, moments in self.optimizer.state_dict()["state"].items()
                for key, x in moments.items()
            }
            state = {name: getattr(self, name) for name in SAVED}
            write(
                {
                    self.path: functools.partial(
                        save_file, tensors, metadata={"state": json.dumps(state)}
                    )
                }
            )
        self.saved = time.time()


def read_state(path: Path) -> dict:
    """What save wrote beside the tensors."""
    try:
        saved = parse_json(parse_json(read_header(path).decode())["__metadata__"]["state"])
        if all(type(saved[name]) is kind for name, kind in SAVED.items()) and saved["done"] > 0:
            return saved
    except (UserError, ValueError, KeyError, TypeError):
        pass
    raise UserError(BROKEN.format(path))


def refuse_differences(saved: dict, now: dict, what: Path | str) -> None:
    """Raises UserError for a run begun with other settings, and lists them."""
    lines = [
        f"{name} {saved.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if lines:
        raise UserError(
            f"{what}: begun with other settings: {'; '.join(lines)}. Say the same to go on, --resume false to start anew, or choose another --run"
        )
