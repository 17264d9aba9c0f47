"""A training loop that can be killed: its state goes to the disk and comes back bit for bit.

The order of the data is not saved: a resumed loop replays its draws from its own generator.
"""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import UserError
from support import parallel
from support.files import parse_json, read_tensors, write

SAVE_EVERY = 120.0  # seconds between two saved states
SAVED = dict(stage=str, belongs=dict, done=int, state=dict, seconds=float)
REMEDY = "say --resume false, with a lower learning rate or with --dtype fp32"
WAYS = "say the same, --resume false, or another --run"
BROKEN = "{}: not the state of this run: delete it, or say --resume false"


class Loop:
    """What a loop over optimizer steps has to do with the world; sft.train is the simplest.

    A step draws its random numbers, then asks `skip`; then it calls `update`, or `end`.
    path: the file of the state, or None. resume: take it up if it is of this stage, with the same
    `belongs`. log: called with each step's record.
    """

    def __init__(self, stage, path=None, belongs=None, log=lambda **record: None, resume=True):
        self.stage, self.path, self.belongs, self.log = stage, path, belongs or {}, log
        self.done = 0  # steps
        self.state, self.before = {}, 0.0  # what the loop wants kept; earlier processes' seconds
        if resume and path and path.exists() and (saved := read_state(path))["stage"] == stage:
            refuse_differences(saved["belongs"], self.belongs, path)
            self.done, self.state, self.before = saved["done"], saved["state"], saved["seconds"]
        self.resumed, self.restored = self.done, self.done == 0
        self.start = self.saved = time.time()
        self.stop = False
        self.model, self.optimizer, self.learnt = None, None, {}  # see `skip`
        self.partly = False  # the last step was not a whole one: see `end`
        self.gradient = None  # of the last update, where the stage keeps it

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.handler)
        if not error[0] and not self.restored:  # a state of more steps than there are
            raise UserError(BROKEN.format(self.path))

    def interrupt(self, *_):
        if self.stop or self.model is None:  # asked twice, or before the first step
            raise KeyboardInterrupt
        self.stop = True
        told = "stopping after this step (in grpo, this rollout); once more to stop at once"
        print(f"\n{self.stage}: {told}", flush=True)

    @property
    def seconds(self) -> float:  # of work, without what was done twice because of a kill
        return self.before + time.time() - self.start

    def skip(self, step: int, model: torch.nn.Module, optimizer) -> bool:
        """Whether an earlier process did this step. At its last one, restores its state."""
        self.model, self.optimizer = model, optimizer
        self.learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if step == self.resumed - 1:
            try:
                self.restore(read_tensors(self.path))
            except (LookupError, ValueError, TypeError, RuntimeError):
                raise UserError(BROKEN.format(self.path)) from None
        return step < self.resumed

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, p in self.learnt.items():
            p.copy_(tensors.pop(f"weight {name}").view(p.shape))
        for label, x in tensors.items():
            key, name = label.split(" ")
            p = self.learnt[name]
            self.optimizer.state[p][key] = x.view(() if key == "step" else p.shape).to(p.device)
        self.start, self.restored = time.time(), True

    def check(self, **values) -> None:
        """UserError if one of these numbers or tensors is not finite: training has diverged."""
        bad = [name for name, x in values.items() if not torch.as_tensor(x).isfinite().all()]
        if bad:
            raise UserError(f"{self.stage}, step {self.done + 1}: {bad[0]} is not finite: {REMEDY}")

    def descend(self, **values) -> None:
        """An optimizer step; these numbers must be finite."""
        self.check(**values)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: AdamW leaves alone what this loss did not reach

    def update(self, step: int, loss: torch.Tensor, parameters, /, **record) -> None:
        """A step down the gradient of `loss`, its norm cut to 1; then `end`."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.descend(loss=loss, grad_norm=norm)
        self.end(step, **{"loss": loss.item(), "grad_norm": norm.item(), **record})

    def end(self, step: int, whole: bool = True, **record) -> None:
        """Logs a step; after a `whole` one, from which the loop can go on, it may save or stop."""
        self.done = step + 1
        self.log(stage=self.stage, step=self.done, **record)
        stop = whole and bool(parallel.most(int(self.stop)))  # all processes after the same step
        due = stop or self.partly or time.time() - self.saved >= SAVE_EVERY
        self.partly = not whole
        if self.path and due and whole and not parallel.rank():
            self.save()
        if stop:
            raise KeyboardInterrupt

    def save(self) -> None:
        tensors = {}
        for name, p in self.learnt.items():
            kept = {"weight": p.detach(), **self.optimizer.state.get(p, {})}  # and AdamW's moments
            tensors |= {f"{key} {name}": x for key, x in kept.items()}
        about = {"state": json.dumps({name: getattr(self, name) for name in SAVED})}
        write({self.path: lambda aside: save_file(tensors, aside, metadata=about)})
        self.saved = time.time()


def read_state(path: Path) -> dict:
    """What `save` wrote beside the tensors."""
    with suppress(Exception), safe_open(path, "pt") as f:  # of several kinds, by what is wrong
        saved = parse_json(f.metadata()["state"])
        if all(type(saved[name]) is kind for name, kind in SAVED.items()) and saved["done"] > 0:
            return saved
    raise UserError(BROKEN.format(path))


def refuse_differences(saved, now, what, ways=WAYS) -> None:
    """Raises UserError for settings (dicts) that differ, and lists them."""
    facts = [(k, saved.get(k), now.get(k)) for k in sorted(saved.keys() | now.keys())]
    if lines := [f"{k} {old!r} there, {new!r} here" for k, old, new in facts if old != new]:
        raise UserError(f"{what}: begun with other settings: {'; '.join(lines)}: {ways}")
