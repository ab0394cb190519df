"""A folder beside DST that holds what is being written, outlives a killed run, and takes DST's name once it is whole.

.DST.partial/plan.json      what is being written, from what
.DST.partial/checkpoint/    what DST will be
.DST.partial/done/          a note for each part that is whole
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

WORKERS = 4


class Work:
    """The folder for one run, or for several that share the work.

    Args:
      dst: what will be written.
      source: the folder that it is made from.
      plan: what makes this run the same as an earlier one: JSON.

    Raises:
      ValueError: `dst` is inside `source`.
    """

    def __init__(self, dst: Path, source: Path, plan: dict[str, Any]) -> None:
        self.dst, self.target, self._plan = dst, dst.resolve(), plan
        if self.target.is_relative_to(source.resolve()):
            raise ValueError(f"DST is {str(dst)!r}; it should not be inside SRC, {str(source)!r}")
        self.folder = self.target.parent / f".{self.target.name}.partial"
        self.checkpoint = self.folder / "checkpoint"

    def is_finished(self) -> bool:
        """Whether an earlier run ended between giving DST its name and removing the folder, which is then done here.

        Raises:
          ValueError: DST exists and is something else, or the folder holds something else.
        """
        is_this = read_or_none(self.folder / "plan.json") == self._plan
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            if self.checkpoint.exists() and not is_this:
                raise ValueError(
                    f"{self.folder} holds an unfinished conversion of another checkpoint or with other options;"
                    " it should be of this one: remove it, or choose another DST"
                )
            return False
        if self.checkpoint.exists() or not is_this:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # which is empty if a run was killed in its last step
            raise ValueError(f"DST {str(self.dst)!r} exists; it should be a new or an empty folder")
        self.remove()
        return True

    def begin(self, nbytes: int, lay_out: Callable[[Path], None]) -> None:
        """Makes the folder, unless an earlier run or another process has: `lay_out` fills a new one.

        Args:
          nbytes: what will be written, for which there must be room.

        Raises:
          ValueError: there is too little room on the disk.
        """
        self.check_space(nbytes)
        if self.checkpoint.exists():
            return
        new = self.folder / f"new-{os.getpid()}"
        (self.folder / "done").mkdir(parents=True, exist_ok=True)
        try:
            write_whole(self.folder / "plan.json", self._plan)
            new.mkdir()
            with ThreadPoolExecutor(1) as thread:  # so that Ctrl-C does not stop Orbax half-way
                thread.submit(lay_out, new).result()
            new.rename(self.checkpoint)
        except BaseException as error:
            was_first = self.checkpoint.exists() and isinstance(error, OSError)  # another process
            if not self.checkpoint.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            if not was_first:
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def check_space(self, nbytes: int) -> None:
        """Refuses a disk with too little room for `nbytes`, less what an earlier run has written of them."""
        existing, free = self.free()
        needed = nbytes - _nbytes(self.folder)
        if needed > free:
            raise ValueError(
                f"{existing} has {free / 1e9:.1f} GB free; it should have {needed / 1e9:.1f} GB for {self.target.name}"
            )

    def free(self) -> tuple[Path, int]:
        """The nearest folder of DST's that exists, and how many bytes its disk has free."""
        existing = next(parent for parent in self.target.parents if parent.exists())
        return existing, shutil.disk_usage(existing).free

    def done(self, name: str) -> Any:
        """What `set_done` was told of a part; None before."""
        return read_or_none(self.folder / "done" / f"{name}.json")

    def set_done(self, name: str, entry: Any) -> None:
        """Notes that a part is whole."""
        write_whole(self.folder / "done" / f"{name}.json", entry, is_flushed=False)  # lost with the power: made again

    def end(self) -> None:
        """Gives the result its name."""
        self.checkpoint.rename(self.target)
        self.remove()

    def remove(self) -> None:
        """Removes the folder and all that is in it, what tells of DST last."""
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == "plan.json"):
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
        self.folder.rmdir()


def _nbytes(folder: Path) -> int:
    """What the files in a folder take, which others may be writing and renaming."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, file)).st_size
    return total


def read_or_none(file: Path) -> Any:
    """What a JSON file holds, or None where there is none or it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_whole(file: Path, content: Any, is_flushed: bool = True) -> None:
    """Writes a JSON file that is never seen in part; flushed, not even after the power has failed."""
    new = file.with_name(f"{file.name}.new-{os.getpid()}")
    with open(new, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        if is_flushed:
            stream.flush()
            os.fsync(stream.fileno())
    new.replace(file)


def in_threads[T](function: Callable[[T, Callable[[], None]], None], items: Iterable[T]) -> None:
    """Calls `function(item, stop)` for each item, in WORKERS threads.

    The first error, or Ctrl-C, ends all: `stop()` raises in the others, and the error is raised when none runs any more.
    """
    stopping = threading.Event()

    def stop() -> None:
        if stopping.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(function, item, stop) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def progress_bar(what: str, total: int, initial: int, shown: bool) -> tqdm:
    """A bar of bytes with the time left, where stderr is a terminal."""
    disable = None if shown else True  # None: where it is none
    return tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, smoothing=0.02, disable=disable)


def advance(bar: tqdm, nbytes: int) -> None:
    """Moves a bar that several threads share."""
    with bar.get_lock():
        bar.update(nbytes)
