"""Real guests without a virtual machine: User-mode Linux, found or fetched, booted and spoken to.

User-mode Linux (UML) is a Linux kernel that runs as an ordinary process, needs neither KVM nor root, and has
virtio over vhost-user built in, so that a daemon can be tried against the true driver in a second::

    files = find_uml()
    memory_folder, _ = choose_memory_folder(1 << 30)
    guest = UmlGuest(files, memory_bytes=1 << 29, socket_path=path, folder=work, memory_folder=memory_folder)
    with guest:
        guest.start()                # a back-end must listen on `path` by now
        guest.load_balloon()
        guest.run("dd if=/dev/zero of=/mnt/x bs=1M count=200; rm /mnt/x")
        guest.memory_file_bytes()    # what the host holds for it
        guest.poweroff()

Every wait has a deadline, and leaving the `with` block ends the guest and all its helper processes. The
guest's memory is one deleted file in `memory_folder`; the daemon gets that file's descriptor.

`python -m balloon.testing.uml --fetch` unpacks the Debian packages in the cache, without root, if need be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from balloon.errors import BalloonError, ConfigError, StateError
from balloon.testing.initrd import LINE_BYTES, MODULE_PATH, build_initrd, escape_command
from balloon.testing.uml_files import (
    UmlFiles,
    UmlUnavailable,
    choose_memory_folder,
    fetch_uml,
    find_uml,
)
from balloon.testing.uml_xstate import find_preload

__all__ = [
    "GuestCommandError",
    "GuestEndedError",
    "UmlFiles",
    "UmlGuest",
    "UmlUnavailable",
    "build_initrd",
    "choose_memory_folder",
    "fetch_uml",
    "find_uml",
]

MAX_OUTPUT_BYTES = 16 << 20
"""The most that one command may print; a guest must not be able to fill the host's memory."""
TAIL_BYTES = 8192
TAIL_LINES = 40
"""How much of the console, or of a command's output, an error message can show."""

MIN_MEMORY_BYTES = 64 << 20
"""UML with this initial RAM disk boots in this much."""
SOCKET_PATH_BYTES = 107
"""The longest path of a UNIX socket (unix(7), sun_path)."""

_READY = b"@@READY\r\n"


class GuestEndedError(BalloonError):
    """The guest is gone: it panicked, was killed, or never came up."""


class GuestCommandError(BalloonError):
    """A command in the guest failed; `command`, `status` and the whole `output` say how."""

    def __init__(self, command: str, status: int, output: str, *, what: str = "") -> None:
        what = what or f"ended with status {status}"
        super().__init__(f"in the guest, {command!r} {what}; last lines:\n{_last_lines(output)}")
        self.command = command
        self.status = status
        self.output = output


class UmlGuest:
    """One User-mode Linux guest: a process, its console and a serial line for commands.

    `folder` gets `initrd.gz`, `console.log` (all that the guest ever printed) and UML's own `uml/`.
    `memory_folder` must have room for all memory that the guest can touch: see choose_memory_folder().
    `socket_path` is where a vhost-user back-end listens *already*: UML connects at boot, once; None is for a
    guest without a balloon. One command at a time; use from one thread.

    :raise ConfigError: too little memory to boot, or a `socket_path` that UML cannot take.
    """

    def __init__(
        self,
        files: UmlFiles,
        *,
        memory_bytes: int,
        socket_path: Path | None,
        folder: Path,
        memory_folder: Path,
        kernel_arguments: Sequence[str] = (),
    ) -> None:
        if memory_bytes < MIN_MEMORY_BYTES or memory_bytes % 4096:
            raise ConfigError(f"memory_bytes={memory_bytes}: {MIN_MEMORY_BYTES} at least, in whole pages")
        if socket_path is not None:
            socket_path = socket_path.absolute()
            if re.search(r'[\s:"]', str(socket_path)):
                raise ConfigError(f"socket_path={str(socket_path)!r}: no colon, space or quote can be passed")
            if len(os.fsencode(socket_path)) > SOCKET_PATH_BYTES:
                raise ConfigError(f"socket_path={str(socket_path)!r}: longer than {SOCKET_PATH_BYTES} bytes")
        self.files = files
        self.memory_bytes = memory_bytes
        self.socket_path = socket_path
        self.folder = folder.absolute()
        self.memory_folder = memory_folder.absolute()
        self.kernel_arguments = tuple(kernel_arguments)
        self.log_path = self.folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._command_fd = -1
        self._token = b""  # of the command under way
        self._news = threading.Condition()  # guards the three below; notified when any of them changes
        self._answers = bytearray()  # what came on the serial line since the last command was sent
        self._dropped = 0  # how many bytes before `_answers` were thrown away, being too many
        self._tail = b""

    def command_line(self, read_fd: int, write_fd: int) -> list[str]:
        """Return the program and its arguments; the two fds are the guest's ends of the serial line."""
        arguments = [
            str(self.files.kernel.absolute()),
            f"mem={self.memory_bytes // 1024}K",
            "initrd=initrd.gz",
            "uml_dir=uml",  # relative to `folder`: UML makes a socket there, whose path must be short
            "umid=guest",
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            f"ssl0=fd:{read_fd},fd:{write_fd}",
            "noreboot",
            "panic=-1",
            "initcall_blacklist=raid6_select_algo",  # a benchmark, half of the time of a boot
        ]
        if self.socket_path is not None:
            arguments.append(f"virtio_uml.device={self.socket_path}:5")
        return [*arguments, *self.kernel_arguments]

    def start(self, timeout: float = 60.0) -> None:
        """Boot the guest until it takes commands.

        :raise StateError: it was started before.
        :raise UmlUnavailable: the kernel cannot be run at all; :raise OSError: `folder` cannot be written.
        :raise GuestEndedError: it ended in boot; :raise TimeoutError: it is not up in `timeout` seconds. Both
            with the last words of the console; the guest is ended.
        """
        if self._process is not None:
            raise StateError("a UmlGuest starts once")
        self.folder.mkdir(parents=True, exist_ok=True)
        build_initrd(self.files, self.folder / "initrd.gz")
        environment = {**os.environ, "TMPDIR": str(self.memory_folder)}
        if (library := find_preload()) is not None:
            environment["LD_PRELOAD"] = str(library)
        deadline = time.monotonic() + timeout
        log = self.log_path.open("wb")
        guest_in, command_fd = os.pipe()
        answer_fd, guest_out = os.pipe()
        console_fd, guest_console = os.pipe()
        try:
            self._process = subprocess.Popen(
                self.command_line(guest_in, guest_out),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=guest_console,
                stderr=subprocess.STDOUT,
                pass_fds=(guest_in, guest_out),
                start_new_session=True,  # so that kill() can end its helper processes too
            )
        except OSError as error:
            log.close()
            for fd in (command_fd, answer_fd, console_fd):
                os.close(fd)
            raise UmlUnavailable(f"cannot run {self.files.kernel}: {error.strerror}") from error
        finally:
            for fd in (guest_in, guest_out, guest_console):
                os.close(fd)
        self._command_fd = command_fd
        self._reader = threading.Thread(
            target=self._read, args=(console_fd, answer_fd, log), name="uml-console", daemon=True
        )
        self._reader.start()
        try:
            self._wait(lambda: _READY in self._answers, deadline, f"guest is not up in {timeout:g} s")
        except BaseException:
            self.kill()
            raise

    def run(self, command: str, timeout: float = 60.0) -> str:
        """Run a shell command in the guest and return exactly what it printed, errors included.

        It runs in a subshell of its own, without input, in `/`; bytes that are no UTF-8 come as surrogates.
        After a TimeoutError the guest is still at it, and the next command waits until it is done.

        :raise GuestCommandError: its status is not 0, or it printed more than MAX_OUTPUT_BYTES.
        :raise TimeoutError: it is not done in `timeout` seconds.
        :raise GuestEndedError: the guest ended meanwhile.
        :raise ConfigError: the command is too long for a terminal's line, or holds a NUL.
        :raise StateError: the guest is not running.
        """
        deadline = time.monotonic() + timeout
        late = f"guest did not finish {command!r} in {timeout:g} s"
        token = self._send(command, deadline, late)
        end, status = self._answer(deadline, late)
        begin = b"@@BEGIN " + token + b"\r\n"
        with self._news:
            start = self._answers.find(begin)
            output = bytes(self._answers[start + len(begin) if start >= 0 else 0 : end])
            dropped = self._dropped
        text = output.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
        if dropped:
            raise GuestCommandError(command, status, text, what=f"printed more than {MAX_OUTPUT_BYTES} bytes")
        if status:
            raise GuestCommandError(command, status, text)
        return text

    def load_balloon(self, *options: str, timeout: float = 30.0) -> None:
        """Load the balloon driver with module parameters `options` and check that it took a device.

        :raise GuestCommandError: it did not (then with the kernel's last messages); and what run() raises.
        """
        bound = "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* >/dev/null 2>&1"
        failed = "{ echo 'no device bound, or loaded twice:'; dmesg | grep -i virtio | tail; exit 1; }"
        self.run(f"insmod {' '.join((MODULE_PATH, *options))} && {bound} || {failed}", timeout)

    def features(self) -> int:
        """Return the feature bits that the driver acknowledged on virtio0, as a number."""
        digits = self.run("cat /sys/bus/virtio/devices/virtio0/features").strip()
        return int(digits[::-1], 2)  # sysfs has bit 0 first

    def meminfo(self) -> dict[str, int]:
        """Return the sizes in the guest's /proc/meminfo, in bytes, by name."""
        fields = (line.split() for line in self.run("cat /proc/meminfo").splitlines())
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[2:] == ["kB"]}

    def memory_file_bytes(self) -> int:
        """Return how many bytes the host holds for the guest's memory (its file's blocks, not its length).

        :raise StateError: the guest is not running, or has no memory file yet.
        """
        return self._memory_file().st_blocks * 512

    def memory_file_size(self) -> int:
        """Return the length of the guest's memory file: memory_bytes and what the kernel itself takes.

        :raise StateError: the guest is not running, or has no memory file yet.
        """
        return self._memory_file().st_size

    @property
    def pid(self) -> int:
        """The main process; it leads the guest's process group and session.

        :raise StateError: the guest is not running.
        """
        if self._process is None or self._process.returncode is not None:
            raise StateError("the guest is not running")
        return self._process.pid

    @property
    def console_tail(self) -> str:
        """The last lines that the guest printed, on the console or the serial line; each cut to 200."""
        with self._news:
            return _last_lines(self._tail.decode("utf-8", "replace"))

    def poweroff(self, timeout: float = 30.0) -> None:
        """Power the guest off as a guest does: the driver is shut down and the back-end sees it go.

        :raise TimeoutError: it still runs after `timeout` seconds.
        :raise GuestEndedError: it ended, but not like this: it panicked, say.
        :raise StateError: it does not run.
        """
        deadline = time.monotonic() + timeout
        late = f"guest is not off in {timeout:g} s"
        try:
            self._send("poweroff -f", deadline, late)
            self._wait(lambda: False, deadline, late)
        except GuestEndedError:
            ending = self._ending()
            self.kill()
            if ending != "ended with status 0":
                raise

    def kill(self) -> None:
        """End the guest and its helper processes with SIGKILL, wait for them; nothing if there are none.

        SIGKILL to the main process alone would leave traced helpers that hold the vhost-user socket open.

        :raise TimeoutError: the host's kernel cannot end the process.
        """
        process, reader = self._process, self._reader
        if process is None or reader is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        try:
            process.wait(30)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"process {process.pid} does not end on SIGKILL") from error
        os.close(self._command_fd)
        reader.join(30)  # it ends when the last helper has let go of the pipes
        if reader.is_alive():
            raise TimeoutError(f"a helper of process {process.pid} does not end on SIGKILL")

    def __enter__(self) -> UmlGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _send(self, command: str, deadline: float, late: str) -> bytes:
        """Give the guest one command, when it is done with the last; return the token of its answer."""
        token = secrets.token_hex(8).encode("ascii")
        line = token + b" " + escape_command(command).encode("ascii") + b"\n"
        if len(line) > LINE_BYTES or "\0" in command:
            raise ConfigError(f"a command of {len(line)} bytes, escaped; {LINE_BYTES} at most, and no NUL")
        if self._process is None or self._process.returncode is not None:
            raise StateError("the guest is not running")
        if self._token:
            self._answer(deadline, late)
        with self._news:
            self._answers.clear()
            self._dropped = 0
        self._token = token
        with contextlib.suppress(BrokenPipeError):  # it ended: who waits for the answer will see
            os.write(self._command_fd, line)
        return token

    def _answer(self, deadline: float, late: str) -> tuple[int, int]:
        """Wait for the command under way; return where in `_answers` its output ends, and its status."""
        done = re.compile(rb"\r\n@@DONE " + self._token + rb" (\d+)\r\n")
        looked = 0  # so that a long output is not searched from its start again and again
        result = (0, 0)

        def is_done() -> bool:
            nonlocal looked, result
            found = done.search(self._answers, max(0, looked - self._dropped - 64))
            looked = self._dropped + len(self._answers)
            if found:
                result = found.start(), int(found[1])
            return found is not None

        self._wait(is_done, deadline, late)
        self._token = b""
        return result

    def _wait(self, condition: Callable[[], bool], deadline: float, late: str) -> None:
        """Wait until `condition()`, which is called with the lock held, the guest's end, or the deadline."""
        with self._news:
            while not condition():
                if ending := self._ending():
                    self._news.wait(0.2)  # its last words may still be on the way
                    if condition():
                        return
                    raise GuestEndedError(f"the guest {ending}; last console lines:\n{self.console_tail}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{late}; last console lines:\n{self.console_tail}")
                self._news.wait(min(left, 0.1))

    def _ending(self) -> str:
        """Say how the main process ended, nothing if it runs; not reaped: its group must keep its number."""
        assert self._process is not None
        result = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return ""
        if result.si_code == os.CLD_EXITED:
            return f"ended with status {result.si_status}"
        return f"was ended by signal {result.si_status} ({signal.strsignal(result.si_status)})"

    def _read(self, console_fd: int, answer_fd: int, log: BinaryIO) -> None:
        """Take all that the guest prints, in a thread of its own: a full pipe would stop the guest."""
        fds = {console_fd, answer_fd}
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        try:
            while fds:
                for fd, _ in poll.poll():
                    data = os.read(fd, 1 << 16)
                    if not data:
                        poll.unregister(fd)
                        fds.remove(fd)
                    log.write(data.replace(b"\r", b""))
                    log.flush()
                    with self._news:
                        self._tail = (self._tail + data.replace(b"\r", b""))[-TAIL_BYTES:]
                        if fd == answer_fd:
                            self._answers += data
                            if (excess := len(self._answers) - TAIL_BYTES) > MAX_OUTPUT_BYTES:
                                del self._answers[:excess]
                                self._dropped += excess
                        self._news.notify_all()
        finally:
            os.close(console_fd)
            os.close(answer_fd)
            log.close()

    def _memory_file(self) -> os.stat_result:
        """Find the memory file among the main process's open files: the largest that has no name any more."""
        files = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    files.append(link.stat())
        deleted = [file for file in files if stat.S_ISREG(file.st_mode) and file.st_nlink == 0]
        if not deleted:
            raise StateError("the guest has no memory file (any more)")
        return max(deleted, key=lambda file: file.st_size)


def _last_lines(text: str) -> str:
    return "\n".join([line[:200] for line in text[-TAIL_BYTES:].split("\n") if line][-TAIL_LINES:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Say which guest there is; with --fetch, get one if there is none. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m balloon.testing.uml", description=main.__doc__)
    parser.add_argument("--fetch", action="store_true", help="get the Debian packages if there is no guest")
    parser.add_argument("--cache", type=Path, default=None, help="the folder to get them to")
    options = parser.parse_args(arguments)
    try:
        try:
            files = find_uml(options.cache)
        except UmlUnavailable:
            if not options.fetch:
                raise
            files = fetch_uml(options.cache)
    except UmlUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"User-mode Linux {files.version}: {files.kernel}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
